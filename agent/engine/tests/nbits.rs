//! Four-bit weights (`MatMulNBits`): every form that is read gives the logits of the f32 model with the very same
//! weights, through every kernel; every form that isn't is refused in a sentence.

use half::f16;
use millwright_engine::bundle::{FileEntry, GRAPH, MANIFEST, Manifest};
use millwright_engine::{Engine, OpenError, Options, PlanChoice, kernels};
use millwright_forge::{Precision, tiny};
use prost::Message;
use std::fs;
use std::path::Path;
use tempfile::TempDir;
use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::{GraphProto, ModelProto, NodeProto, TensorProto};

/// A linear of the tiny model, `[ROWS, COLS]`, that the tests put in another form.
const LINEAR: &str = "layers.0.gate_proj";
const ROWS: usize = 128;
const COLS: usize = 64;
const TEXT: &str = "The pump on the cooling line makes a grinding noise.";

fn bundle(precision: Precision) -> TempDir {
    let folder = TempDir::new().unwrap();
    tiny::write(folder.path(), precision).unwrap();
    folder
}

fn open(folder: &Path, kernel: &str, plan: PlanChoice) -> Result<Engine, OpenError> {
    let options = Options {
        threads: Some(2),
        kernel: Some(kernel.to_owned()),
        state_dir: folder.join("state"),
        plan,
        ..Options::default()
    };
    Engine::open(folder, &options)
}

fn logits(engine: &mut Engine) -> Vec<f32> {
    let tokens = engine.text().encode(TEXT).unwrap();
    let mut all = Vec::new();
    engine
        .score(&tokens, &mut |_, row| all.extend_from_slice(row))
        .unwrap();
    all
}

/// Changes a bundle's graph and makes its manifest agree again.
fn edit(folder: &Path, change: impl FnOnce(&mut GraphProto)) {
    let path = folder.join(GRAPH);
    let mut model = ModelProto::decode(&*fs::read(&path).unwrap()).unwrap();
    change(model.graph.as_mut().unwrap());
    fs::write(&path, model.encode_to_vec()).unwrap();
    let text = fs::read_to_string(folder.join(MANIFEST)).unwrap();
    let mut manifest = Manifest::parse(&text).unwrap();
    for file in &mut manifest.files {
        *file = FileEntry::of(&folder.join(&file.name)).unwrap();
    }
    fs::write(folder.join(MANIFEST), manifest.to_text().unwrap()).unwrap();
}

fn node<'a>(graph: &'a mut GraphProto, output: &str) -> &'a mut NodeProto {
    let mut nodes = graph.node.iter_mut();
    nodes.find(|node| node.output[0] == output).unwrap()
}

fn set(node: &mut NodeProto, attribute: &str, value: i64) {
    let found = node.attribute.iter_mut().find(|a| a.name == attribute);
    found.unwrap().i = value;
}

/// Puts a tensor of this name into the graph, instead of what was there.
fn put(graph: &mut GraphProto, name: &str, kind: DataType, dims: &[usize], bytes: Vec<u8>) {
    graph.initializer.retain(|tensor| tensor.name != name);
    graph.initializer.push(TensorProto {
        name: name.to_owned(),
        data_type: kind as i32,
        dims: dims.iter().map(|&n| n as i64).collect(),
        raw_data: bytes,
        ..TensorProto::default()
    });
}

/// The values of an f32 tensor of the bundle.
fn floats(folder: &Path, name: &str) -> Vec<f32> {
    let model = ModelProto::decode(&*fs::read(folder.join(GRAPH)).unwrap()).unwrap();
    let graph = model.graph.unwrap();
    let tensor = graph.initializer.iter().find(|t| t.name == name).unwrap();
    assert_eq!(tensor.data_location(), DataLocation::External);
    let entry = |key: &str| {
        let entry = tensor.external_data.iter().find(|e| e.key == key).unwrap();
        entry.value.parse::<usize>().unwrap()
    };
    let data = fs::read(folder.join("model.onnx.data")).unwrap();
    let bytes = data[entry("offset")..][..entry("length")].as_chunks().0;
    bytes.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Zeros {
    Absent,
    Packed,
    Floats,
}

/// How the linear is written.
#[derive(Debug, Clone, Copy)]
struct Form {
    block: usize,
    zeros: Zeros,
    /// Scales in f16, and zero points if they are numbers.
    half: bool,
    /// Whether scales in f32 are exact in f16.
    round: bool,
    /// Whether shapes are flat, as older exports have them.
    flat: bool,
}

impl Form {
    /// A scale that depends on row and group.
    fn scale(self, row: usize, group: usize) -> f32 {
        let scale = 0.05 + 0.001 * ((row * 7 + group * 3) % 11) as f32;
        if self.half || self.round {
            f16::from_f32(scale).to_f32()
        } else {
            scale
        }
    }

    fn zero(self, row: usize, group: usize) -> f32 {
        let whole = ((row * 5 + group) % 16) as f32;
        match self.zeros {
            Zeros::Absent => 8.0,
            Zeros::Packed => whole,
            // −minimum / scale, as the forge writes it.
            Zeros::Floats if !self.half => {
                f16::from_f32(0.11 + 0.02 * whole).to_f32() / self.scale(row, group)
            }
            Zeros::Floats => whole + 0.5,
        }
    }

    fn q(row: usize, col: usize) -> u8 {
        ((row * 13 + col * 29 + row * col) % 16) as u8
    }

    fn value(self, row: usize, col: usize) -> f32 {
        let group = col / self.block;
        (f32::from(Self::q(row, col)) - self.zero(row, group)) * self.scale(row, group)
    }

    /// Gives the linear this form.
    fn write(self, graph: &mut GraphProto) {
        let groups = COLS.div_ceil(self.block);
        let each = |f: &dyn Fn(usize, usize) -> Vec<u8>| -> Vec<u8> {
            let all = (0..ROWS).flat_map(|row| (0..groups).map(move |group| (row, group)));
            all.flat_map(|(row, group)| f(row, group)).collect()
        };
        let number = |value: f32| {
            if self.half {
                f16::from_f32(value).to_le_bytes().to_vec()
            } else {
                value.to_le_bytes().to_vec()
            }
        };
        let kind = if self.half {
            DataType::Float16
        } else {
            DataType::Float
        };
        let dims = |columns| {
            if self.flat {
                vec![ROWS * columns]
            } else {
                vec![ROWS, columns]
            }
        };
        let name = |tensor: &str| format!("{LINEAR}.{tensor}");
        let pairs = each(&|row, group| {
            // What fills the last group up is never read: it is all ones.
            let q = |col| if col < COLS { Self::q(row, col) } else { 15 };
            let columns = (group * self.block..(group + 1) * self.block).step_by(2);
            columns.map(|col| q(col) | q(col + 1) << 4).collect()
        });
        let shape = [ROWS, groups, self.block / 2];
        put(graph, &name("q"), DataType::Uint8, &shape, pairs);
        let scales = each(&|row, group| number(self.scale(row, group)));
        put(graph, &name("scale"), kind, &dims(groups), scales);
        match self.zeros {
            Zeros::Absent => {
                node(graph, &name("out")).input.truncate(3);
            }
            Zeros::Packed => {
                let zero = |row, group| {
                    if group < groups {
                        self.zero(row, group) as u8
                    } else {
                        0
                    }
                };
                let bytes = (0..ROWS).flat_map(|row| {
                    let pairs = (0..groups).step_by(2);
                    pairs.map(move |group| zero(row, group) | zero(row, group + 1) << 4)
                });
                let dims = dims(groups.div_ceil(2));
                put(
                    graph,
                    &name("zero_point"),
                    DataType::Uint8,
                    &dims,
                    bytes.collect(),
                );
            }
            Zeros::Floats => {
                let zeros = each(&|row, group| number(self.zero(row, group)));
                put(graph, &name("zero_point"), kind, &dims(groups), zeros);
            }
        }
        set(node(graph, &name("out")), "block_size", self.block as i64);
    }

    /// The f32 model with the weights of the q4 model at `four`, and this linear's.
    fn reference(self, four: &Path) -> TempDir {
        let folder = bundle(Precision::F32);
        let values = (0..COLS).flat_map(|col| (0..ROWS).map(move |row| self.value(row, col)));
        let bytes = values.flat_map(f32::to_le_bytes).collect();
        edit(folder.path(), |graph| {
            let name = format!("{LINEAR}.weight");
            put(graph, &name, DataType::Float, &[COLS, ROWS], bytes);
            all_weights(graph, four);
        });
        folder
    }
}

/// Puts the dequantised weights of the q4 model into the graph of the f32 one, but for [`LINEAR`].
fn all_weights(graph: &mut GraphProto, four: &Path) {
    let model = ModelProto::decode(&*fs::read(four.join(GRAPH)).unwrap()).unwrap();
    let data = fs::read(four.join("model.onnx.data")).unwrap();
    let source = model.graph.unwrap();
    let bytes = |name: &str| {
        let tensor = source.initializer.iter().find(|t| t.name == name).unwrap();
        let entry = |key: &str| {
            let entry = tensor.external_data.iter().find(|e| e.key == key).unwrap();
            entry.value.parse::<usize>().unwrap()
        };
        data[entry("offset")..][..entry("length")].to_vec()
    };
    for node in source.node.iter().filter(|n| n.op_type == "MatMulNBits") {
        let name = node.output[0].strip_suffix(".out").unwrap();
        if name == LINEAR {
            continue;
        }
        let pairs = bytes(&node.input[1]);
        let (scales, zeros) = (floats(four, &node.input[2]), floats(four, &node.input[3]));
        let cols = node.attribute.iter().find(|a| a.name == "K").unwrap().i as usize;
        let rows = pairs.len() * 2 / cols;
        let value = |row: usize, col: usize| {
            let at = row * cols + col;
            let q = pairs[at / 2] >> (4 * (at % 2)) & 15;
            (f32::from(q) - zeros[at / 32]) * scales[at / 32]
        };
        let values = (0..cols).flat_map(|col| (0..rows).map(move |row| (row, col)));
        let values = values.flat_map(|(row, col)| value(row, col).to_le_bytes());
        let (name, values) = (format!("{name}.weight"), values.collect());
        put(graph, &name, DataType::Float, &[cols, rows], values);
    }
    let (q, scales) = (bytes("embed.q"), floats(four, "embed.scale"));
    let values = q.iter().enumerate();
    let values = values.flat_map(|(at, q)| (f32::from(*q as i8) * scales[at / 32]).to_le_bytes());
    let dims = [q.len() / COLS, COLS];
    put(
        graph,
        "embed.weight",
        DataType::Float,
        &dims,
        values.collect(),
    );
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

/// The packed file's header, as text.
fn header(folder: &Path) -> String {
    let only = fs::read_dir(folder.join("state")).unwrap().next().unwrap();
    let bytes = fs::read(only.unwrap().path()).unwrap();
    String::from_utf8_lossy(&bytes[..4096]).into_owned()
}

#[track_caller]
fn same_as_f32(form: Form, kind: u8) {
    let four = bundle(Precision::Q4);
    edit(four.path(), |graph| form.write(graph));
    // The data of the weights that were not replaced is where it was.
    let f32 = form.reference(four.path());
    let expected = logits(&mut open(f32.path(), "scalar", PlanChoice::Reference).unwrap());
    for (plan, tolerance) in [(PlanChoice::Plain, 1e-3), (PlanChoice::Auto, 5e-2)] {
        let found = logits(&mut open(four.path(), "reference", plan).unwrap());
        let off = worst(&expected, &found);
        assert!(off <= tolerance, "{form:?}, {plan:?}: {off}");
    }
    let entry = format!("\"name\":\"{LINEAR}.q\",\"rows\":{ROWS},\"cols\":{COLS},\"kind\":{kind},");
    assert!(header(four.path()).contains(&entry), "{form:?}");
}

const OURS: Form = Form {
    block: 32,
    zeros: Zeros::Floats,
    half: false,
    round: true,
    flat: false,
};

/// Kinds by their codes: 3 is four bits in groups of 32 with f16 scales; 4 more are groups of 16, 8 more f32.
#[test]
fn every_form_gives_the_logits_of_its_f32_weights() {
    use Zeros::{Absent, Floats, Packed};
    same_as_f32(OURS, 3);
    for (block, zeros, half, round, flat, kind) in [
        (16, Floats, false, true, false, 3 + 4),
        (64, Floats, false, true, false, 3),
        (32, Floats, false, false, false, 3 + 8),
        (32, Floats, true, true, false, 3 + 8),
        (32, Absent, false, true, true, 3),
        (16, Absent, false, false, false, 3 + 4 + 8),
        (32, Packed, true, true, false, 3 + 8),
        (16, Packed, false, true, true, 3 + 4 + 8),
        (128, Packed, false, false, false, 3 + 8),
        (128, Absent, true, true, false, 3),
    ] {
        let form = Form {
            block,
            zeros,
            half,
            round,
            flat,
        };
        same_as_f32(form, kind);
    }
}

#[test]
fn logits_do_not_depend_on_the_kernel() {
    let folder = bundle(Precision::Q4);
    let mut all = kernels().into_iter().filter(|name| *name != "reference");
    let of = |kernel: &str| {
        let mut engine = open(folder.path(), kernel, PlanChoice::Auto).unwrap();
        let card = engine.card();
        assert!(card.exact && card.plan == "flat", "{card:?}");
        assert_eq!(card.precision, "q4");
        let bits = logits(&mut engine).into_iter().map(f32::to_bits);
        bits.collect::<Vec<u32>>()
    };
    let first = of(all.next().unwrap());
    assert!(all.all(|kernel| of(kernel) == first));
}

#[test]
fn a_form_that_is_not_read_is_refused_in_a_sentence() {
    type Change = fn(&mut GraphProto);
    let out = || format!("{LINEAR}.out");
    let cases: [(Change, &str); 7] = [
        (
            |g| set(node(g, &format!("{LINEAR}.out")), "bits", 2),
            "of 2 bits; this version reads 4 and 8",
        ),
        (
            |g| set(node(g, &format!("{LINEAR}.out")), "block_size", 24),
            "in blocks of 24",
        ),
        (
            |g| set(node(g, &format!("{LINEAR}.out")), "block_size", 64),
            "with 128 numbers belong there",
        ),
        (
            |g| set(node(g, &format!("{LINEAR}.out")), "K", 48),
            "no multiple of 32",
        ),
        (
            |g| set(node(g, &format!("{LINEAR}.out")), "N", -1),
            "whose size this version can't tell",
        ),
        (
            |g| {
                let node = node(g, &format!("{LINEAR}.out"));
                let scale = node.input[2].clone();
                node.input.extend([String::new(), scale]);
            },
            "whose bias is no stored vector of its outputs",
        ),
        (
            |g| {
                let name = format!("{LINEAR}.scale");
                put(g, &name, DataType::Float, &[3], vec![0; 12]);
            },
            "Float of [3]",
        ),
    ];
    for (change, expected) in cases {
        let folder = bundle(Precision::Q4);
        edit(folder.path(), change);
        let error = open(folder.path(), "scalar", PlanChoice::Auto);
        let said = error.err().expect("it must not open").to_string();
        assert!(said.contains(expected) && said.contains(&out()), "{said}");
    }
}

#[test]
fn a_scale_that_is_no_number_is_named() {
    let folder = bundle(Precision::Q4);
    edit(folder.path(), |graph| {
        let mut bytes = vec![0; ROWS * 2 * 4];
        bytes[12..16].copy_from_slice(&f32::NAN.to_le_bytes());
        let name = format!("{LINEAR}.scale");
        put(graph, &name, DataType::Float, &[ROWS, 2], bytes);
    });
    let error = open(folder.path(), "scalar", PlanChoice::Auto);
    let said = error.err().expect("it must not open").to_string();
    assert!(said.contains("row 1, group 1 has the scale NaN"), "{said}");
}
