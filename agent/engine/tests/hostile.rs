//! Graphs that were damaged or made to harm: an error in words, never a panic.

use millwright_engine::{Engine, OpenError, Options};
use millwright_forge::cache::Cache;
use millwright_forge::catalogue::Catalogue;
use millwright_forge::export::{Form, export, graph_path};
use prost::Message;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::Instant;
use tempfile::TempDir;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::{
    AttributeProto, GraphProto, ModelProto, NodeProto, StringStringEntryProto, TensorProto,
    ValueInfoProto, attribute_proto::AttributeType,
};

/// The tiny model in some form, and its graph as it was written.
struct Export {
    folder: TempDir,
    graph: PathBuf,
    bytes: Vec<u8>,
}

impl Export {
    fn new(form: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let form = Form::find(form).unwrap();
        let out = folder.path().join("out");
        let cache = Cache::at(folder.path().join("no-cache"));
        export(
            &cache,
            &Catalogue::built_in().unwrap(),
            "tiny",
            form,
            false,
            &out,
        )
        .unwrap();
        let graph = graph_path(&out, form);
        let bytes = fs::read(&graph).unwrap();
        Self {
            folder,
            graph,
            bytes,
        }
    }

    /// Opens it with another graph.
    fn open(&self, graph: &[u8]) -> Result<Engine, OpenError> {
        fs::write(&self.graph, graph).unwrap();
        let options = Options {
            threads: Some(1),
            state_dir: TempDir::new().unwrap().path().join("state"),
            ..Options::default()
        };
        Engine::open(&self.folder.path().join("out"), &options)
    }

    fn edited(&self, change: impl FnOnce(&mut ModelProto)) -> Vec<u8> {
        let mut model = ModelProto::decode(&*self.bytes).unwrap();
        change(&mut model);
        model.encode_to_vec()
    }

    #[track_caller]
    fn refused(&self, change: impl FnOnce(&mut ModelProto), expected: &str) {
        let error = self
            .open(&self.edited(change))
            .err()
            .expect("it must not open");
        let said = error.to_string();
        assert!(said.contains(expected), "{said:?} should say {expected:?}");
    }
}

fn nodes(model: &mut ModelProto) -> &mut Vec<NodeProto> {
    &mut model.graph.as_mut().unwrap().node
}

fn tensors(model: &mut ModelProto) -> &mut Vec<TensorProto> {
    &mut model.graph.as_mut().unwrap().initializer
}

#[test]
fn damaged_bytes_never_panic() {
    // Forms whose weights are elsewhere, so that it is the graph that is hit.
    for form in ["f32", "genai-int4", "qdq-block", "q8-zp", "opset23-mask"] {
        let export = Export::new(form);
        let mut seed = 1u64;
        let mut random = |below: usize| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % below
        };
        for round in 0..40 {
            let mut bytes = export.bytes.clone();
            let at = random(bytes.len());
            match round % 4 {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= 1 << random(8),
                2 => bytes[at] = u8::MAX,
                _ => {
                    let end = bytes.len().min(at + 1 + random(64));
                    bytes.drain(at..end);
                }
            }
            let opened = catch_unwind(AssertUnwindSafe(|| export.open(&bytes).map(drop)));
            assert!(opened.is_ok(), "{form}, round {round}, at {at}");
        }
    }
}

#[test]
fn nodes_that_read_each_other_are_named() {
    let export = Export::new("q4");
    export.refused(
        |model| {
            let node = |name: &str, input: &str, output: &str| NodeProto {
                op_type: "Neg".into(),
                name: name.into(),
                input: vec![input.into()],
                output: vec![output.into()],
                ..NodeProto::default()
            };
            nodes(model).extend([node("one", "b", "a"), node("two", "a", "b")]);
        },
        "in a circle",
    );
}

#[test]
fn what_nothing_makes_is_named() {
    let export = Export::new("q4");
    export.refused(
        |model| {
            let linear = nodes(model).iter_mut().find(|n| n.op_type == "MatMulNBits");
            linear.unwrap().input[0] = "ghost".into();
        },
        "reads ghost, which nothing makes",
    );
}

#[test]
fn absurd_sizes_are_refused() {
    let export = Export::new("f32");
    for dims in [
        vec![i64::MAX, i64::MAX],
        vec![-1, 64],
        vec![1 << 40, 1 << 40],
        vec![0; 2],
    ] {
        export.refused(|model| tensors(model)[0].dims = dims, "does not fit");
    }
}

#[test]
fn a_type_that_models_do_not_have_is_refused() {
    let export = Export::new("f32");
    export.refused(
        |model| tensors(model)[0].data_type = DataType::Complex64 as i32,
        "not one that models",
    );
}

#[test]
fn a_tensor_out_of_proportion_to_the_file_is_not_made() {
    let export = Export::new("f32");
    for op_type in ["ConstantOfShape", "Expand"] {
        export.refused(
            |model| {
                tensors(model).push(TensorProto {
                    name: "vast".into(),
                    data_type: DataType::Int64 as i32,
                    dims: vec![2],
                    int64_data: vec![1 << 20, 1 << 20],
                    ..TensorProto::default()
                });
                let input = if op_type == "Expand" {
                    vec!["vast"; 2]
                } else {
                    vec!["vast"]
                };
                nodes(model).push(NodeProto {
                    op_type: op_type.into(),
                    input: input.into_iter().map(str::to_owned).collect(),
                    output: vec!["made".into()],
                    ..NodeProto::default()
                });
            },
            "numbers",
        );
    }
}

fn operator(op: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: op.into(),
        input: inputs.iter().map(ToString::to_string).collect(),
        output: vec![output.into()],
        ..NodeProto::default()
    }
}

fn whole(name: &str, dims: &[i64], values: &[i64]) -> TensorProto {
    TensorProto {
        name: name.into(),
        data_type: DataType::Int64 as i32,
        dims: dims.to_vec(),
        int64_data: values.to_vec(),
        ..TensorProto::default()
    }
}

#[test]
fn a_tensor_of_computed_sizes_is_not_made() {
    let export = Export::new("f32");
    for (op, inputs) in [
        ("ConstantOfShape", &["sizes"][..]),
        ("Expand", &["one", "sizes"]),
        ("Tile", &["ones", "sizes"]),
        ("Pad", &["ones", "pads"]),
        ("Range", &["one", "product", "one"]),
        ("OneHot", &["ones", "product", "ones"]),
        // As the product is of what the tokens are, nobody knows how large it becomes.
        ("Range", &["one", "token", "one"]),
    ] {
        export.refused(
            |model| {
                tensors(model).extend([
                    whole("one", &[], &[1]),
                    whole("ones", &[2], &[1, 1]),
                    whole("root", &[2], &[1 << 14, 1 << 14]),
                ]);
                nodes(model).extend([
                    operator("Mul", &["root", "root"], "sizes"),
                    operator("Concat", &["sizes", "sizes"], "pads"),
                    operator("ReduceProd", &["root"], "product"),
                    operator("ReduceMax", &["input_ids"], "token"),
                    operator(op, inputs, "vast"),
                ]);
                let concat = nodes(model).iter_mut().find(|n| n.output == ["pads"]);
                concat.unwrap().attribute.push(AttributeProto {
                    name: "axis".into(),
                    ..AttributeProto::default()
                });
            },
            op,
        );
    }
}

/// Nodes and stored numbers, a line each: `name = Op(a, b) attribute:1 attribute:[1,2] attribute:text`, or `name = [1,2]`.
fn add(model: &mut ModelProto, lines: &str) {
    let numbers = |text: &str| -> Vec<i64> {
        let all = text.trim_matches(['[', ']']).split(',');
        all.filter(|n| !n.is_empty())
            .map(|n| n.parse().unwrap())
            .collect()
    };
    for line in lines.split(';') {
        let (name, made) = line.trim().split_once(" = ").unwrap();
        let Some((op, rest)) = made.split_once('(') else {
            let values = numbers(made);
            let dims = if made.starts_with('[') {
                vec![values.len() as i64]
            } else {
                vec![]
            };
            tensors(model).push(whole(name, &dims, &values));
            continue;
        };
        let (inputs, attributes) = rest.split_once(')').unwrap();
        let inputs: Vec<&str> = inputs.split(", ").collect();
        let mut node = operator(op, &inputs, "");
        node.output = name.split(", ").map(str::to_owned).collect();
        for attribute in attributes.split_whitespace() {
            let (name, value) = attribute.split_once(':').unwrap();
            let mut attribute = AttributeProto {
                name: name.into(),
                ..AttributeProto::default()
            };
            let of = match value.parse() {
                Ok(number) => {
                    attribute.i = number;
                    AttributeType::Int
                }
                Err(_) if value.starts_with('[') => {
                    attribute.ints = numbers(value);
                    AttributeType::Ints
                }
                Err(_) => {
                    attribute.s = value.into();
                    AttributeType::String
                }
            };
            attribute.r#type = of as i32;
            node.attribute.push(attribute);
        }
        nodes(model).push(node);
    }
}

#[test]
fn what_could_pass_for_small_is_refused() {
    let export = Export::new("f32");
    let cases = [
        // Broadcast by what is not the first input.
        "v = Clip(one, row)",
        "column = Reshape(row, standing); v = LayerNormalization(row, column)",
        "column = Reshape(row, standing); v = DequantizeLinear(row, column)",
        "column = Reshape(row, standing); v = Gemm(square, square, column)",
        // Sizes that are none.
        "huge = -2147483648; v = OneHot(ones, huge, ones)",
        "all = [-1,-1]; v = Expand(one, all)",
        "v = ConstantOfShape(below)",
        "n = ReduceMax(input_ids); v = Range(zero, n, one)",
        "many = ReduceSum(place); n = Cast(many) to:1; v = Range(zero, n, one)",
        "n = Mod(below, two); v = ConstantOfShape(n)",
        "n = Div(below, two); v = ConstantOfShape(n)",
        "n = Cast(place) to:3; v = ConstantOfShape(n)",
        "n = CastLike(place, place); v = ConstantOfShape(n)",
        // Numbers that a float does not hold.
        "a = [16777217]; b = [16777216]; c = Sub(a, b); n = Mul(c, place); v = ConstantOfShape(n)",
        // Sizes of values whose sizes nobody knows.
        "a = NonZero(input_ids); n = Shape(a); v = ConstantOfShape(n)",
        "a = Slice(input_ids, zeros, token); n = Shape(a); v = ConstantOfShape(n)",
        "a = Slice(input_ids, zeros, place); n = Shape(a); v = ConstantOfShape(n)",
        "a = Squeeze(input_ids); n = Shape(a); v = ConstantOfShape(n)",
        "a, k = TopK(ones, token); n = Shape(a); v = ConstantOfShape(n)",
        "a = Compress(ones, ones); n = Shape(a); v = ConstantOfShape(n)",
        // What tract believes to be larger than it is, in a product with a constant.
        "far = [274877906944]; at = [1]; a = Slice(input_ids, zeros, far, at); v = Mul(a, zero)",
        // A size of zero, which a norm reduces away.
        "vast = [1073741824,0]; a = ConstantOfShape(vast); v = LayerNormalization(a, a)",
        // Sizes that are larger than they seem.
        "a = ArgMax(square) axis:1 keepdims:0; n = Shape(a); m = Mul(n, n); v = ConstantOfShape(m)",
        "a = ReduceSum(row, none) noop_with_empty_axes:1 keepdims:0; n = Shape(a); m = Mul(n, n); v = ConstantOfShape(m)",
        "a = ReduceSum(row) axes:[0] keepdims:0; n = Size(a); v = ConstantOfShape(n)",
        "v = Tile(square, ten)",
        "v = Einsum(row, row) equation:ij,kl->ijkl",
        "v = Einsum(square, square) equation:ij,kl->i",
        "v = Einsum(row, standing) equation:ij,i->j",
        // All of it together, and again where a size is stored alone.
        "n = Shape(square); a = ConstantOfShape(n); b = Neg(a); c = Neg(b); d = Neg(c); e = Neg(d); v = Neg(e)",
        "a = Shape(square); n = Mul(a, a); v = ConstantOfShape(n)",
        // Ranks and lists.
        "v = Unsqueeze(one, many)",
        "v = Unsqueeze(ones, twice)",
        "v = Reshape(one, many)",
        "v = Nonsense(one)",
        // What tract may read in another way.
        "a = ReduceSum(row) keepdims:2; v = Identity(a)",
        "v = Squeeze(ones) axes:[0]",
    ];
    for case in cases {
        println!("{case}");
        let given = "one = 1; zero = 0; two = 2; ones = [1,1]; zeros = [0]; ten = [10]; none = [];
            below = [-7,3]; twice = [0,0]; place = [1073741824]; thousands = [4096,1]; sides = [2048,2048];
            standing = [1,4096]; many = [0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16];
            token = ReduceMax(input_ids); square = ConstantOfShape(sides); row = ConstantOfShape(thousands)";
        export.refused(
            |model| {
                add(model, given);
                add(model, case);
            },
            "the graph has ",
        );
    }
}

#[test]
fn branches_make_what_either_may() {
    let export = Export::new("f32");
    let cases = [
        // Of unlike sizes: which it is, nobody knows.
        (
            "one",
            "zeros",
            "n = Shape(a); v = ConstantOfShape(n)",
            "(ConstantOfShape)",
        ),
        (
            "one",
            "large",
            "b = Expand(a, sizes); v = Expand(a, sizes)",
            "too many",
        ),
        // One that passes for a value around it.
        ("one", "one", "v = Identity(a)", "logits a second time"),
        // A branch has as many outputs as there are.
        ("one", "one", "v = Identity(a)", "other outputs"),
    ];
    for (first, second, rest, expected) in cases {
        export.refused(
            |model| {
                add(
                    model,
                    "one = [1]; zeros = [0,0]; sizes = [4096,4096]; large = [1,2,3]",
                );
                let branch = |name: &str, value: &str| {
                    let made = if expected.starts_with("logits") {
                        "logits"
                    } else {
                        name
                    };
                    AttributeProto {
                        name: name.into(),
                        r#type: AttributeType::Graph as i32,
                        g: Some(GraphProto {
                            node: vec![operator("Identity", &[value], made)],
                            output: vec![
                                ValueInfoProto {
                                    name: made.into(),
                                    ..ValueInfoProto::default()
                                };
                                if expected == "other outputs" { 2 } else { 1 }
                            ],
                            ..GraphProto::default()
                        }),
                        ..AttributeProto::default()
                    }
                };
                let mut choice = operator("If", &["one"], "a");
                choice.attribute =
                    vec![branch("then_branch", first), branch("else_branch", second)];
                nodes(model).push(choice);
                add(model, rest);
            },
            expected,
        );
    }
}

#[test]
fn sizes_that_exports_compute_are_followed() {
    let export = Export::new("f32");
    let cases = [
        "s = Shape(input_ids) start:1; n = Squeeze(s); v = Range(zero, n, one)",
        "s = Shape(input_ids); n = Cast(s) to:6; v = ConstantOfShape(n)",
        "s = Shape(input_ids); n = Slice(s, zeros, ends); v = ConstantOfShape(n)",
        "m = ReduceMax(attention_mask) keepdims:0; n = Unsqueeze(m, zeros); v = ConstantOfShape(n)",
        "a = Expand(ones, sides); v = Unsqueeze(a, zeros)",
        "v = OneHot(ones, two, ones) axis:0",
        "v = Einsum(ones, ones) equation:i,i->i",
    ];
    for case in cases {
        let graph = export.edited(|model| {
            add(
                model,
                "one = 1; zero = 0; two = 2; zeros = [0]; ends = [-1]; ones = [1,1]; sides = [3,2]",
            );
            add(model, case);
        });
        let opened = export.open(&graph).map(drop);
        assert!(opened.is_ok(), "{case}: {opened:?}");
    }
}

#[test]
fn formulas_that_grow_with_each_operator_are_not_followed() {
    let export = Export::new("f32");
    let cases = [
        // Numbers by position, to ever higher powers.
        (
            "s = Shape(input_ids) start:1; n = Squeeze(s); n0 = Range(zero, n, one)",
            "{to} = Mul({from}, {from})",
        ),
        // Sizes: a value for each pair of the last one's.
        (
            "n0 = Shape(input_ids)",
            "{to}b = Add({from}, ones); {to} = Mul({from}, {to}b)",
        ),
        // No product, and nothing that could be put together.
        (
            "s = Shape(input_ids) start:1; n = Squeeze(s); n0 = Range(zero, n, one)",
            "{to}b = Add({from}, n0); {to}c = Sub(one, {from}); {to} = Max({to}b, {to}c)",
        ),
    ];
    for (start, step) in cases {
        let began = Instant::now();
        export.refused(
            |model| {
                add(model, "one = 1; zero = 0; ones = [1,1]");
                add(model, start);
                for step_at in 0..40 {
                    let [from, to] = [step_at, step_at + 1].map(|at| format!("n{at}"));
                    add(model, &step.replace("{from}", &from).replace("{to}", &to));
                }
                // What nobody reads is not planned.
                let made = nodes(model).iter_mut().flat_map(|node| &mut node.output);
                let logits = made.filter(|name| *name == "logits");
                logits.for_each(|name| *name = "before".into());
                add(
                    model,
                    "r = ReduceMax(n40) keepdims:0; f = Cast(r) to:1; logits = Add(before, f)",
                );
            },
            "terms",
        );
        println!("{start}: {:?}", began.elapsed());
    }
}

#[test]
fn doubling_ends_in_time() {
    let export = Export::new("f32");
    export.refused(
        |model| {
            tensors(model).push(whole("step 0", &[1], &[1]));
            for step in 0..40 {
                let [from, to] = [step, step + 1].map(|step| format!("step {step}"));
                let mut concat = operator("Concat", &[&from, &from], &to);
                concat.attribute.push(AttributeProto {
                    name: "axis".into(),
                    ..AttributeProto::default()
                });
                nodes(model).push(concat);
            }
        },
        "too many for the model's files",
    );
}

#[test]
fn tensors_that_all_lie_in_the_same_bytes_are_refused() {
    let export = Export::new("f32");
    export.refused(
        |model| {
            let large = tensors(model)
                .iter()
                .max_by_key(|t| t.dims.iter().product::<i64>());
            let large = large.unwrap().clone();
            let copies = (0..1000).map(|i| TensorProto {
                name: format!("copy {i}"),
                ..large.clone()
            });
            tensors(model).extend(copies);
        },
        "bytes of files",
    );
}

#[test]
fn weights_outside_the_folder_are_refused() {
    let export = Export::new("f32");
    let outside = export.folder.path().join("outside");
    fs::write(&outside, [0; 64]).unwrap();
    std::os::unix::fs::symlink(&outside, export.graph.with_file_name("link")).unwrap();
    for location in ["../outside", "/etc/hostname", "link", "..", ""] {
        export.refused(
            |model| {
                let tensor = &mut tensors(model)[0];
                tensor.raw_data.clear();
                tensor.data_location = Some(DataLocation::External as i32);
                let entry = |key: &str, value: &str| StringStringEntryProto {
                    key: key.into(),
                    value: value.into(),
                };
                tensor.external_data = vec![entry("location", location)];
            },
            "outside the model's folder",
        );
    }
}

#[test]
fn a_range_beyond_its_file_is_refused() {
    let export = Export::new("f32");
    for (key, value) in [
        ("offset", "18446744073709551615"),
        ("length", "99999999999"),
        ("offset", "-1"),
    ] {
        let tensor = |model: &mut ModelProto| {
            let tensor = tensors(model)
                .iter_mut()
                .find(|t| !t.external_data.is_empty())
                .unwrap();
            let entry = tensor
                .external_data
                .iter_mut()
                .find(|e| e.key == key)
                .unwrap();
            entry.value = value.into();
        };
        export.refused(tensor, "the graph's tensor");
    }
}
