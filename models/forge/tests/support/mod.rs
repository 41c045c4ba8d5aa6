//! Runs a bundle's graph in tract as it comes, for whoever compares logits.

use millwright_forge::tiny;
use tract_onnx::prelude::*;

pub(crate) type Plan = Arc<TypedRunnableModel>;

/// The f32 form of a model with the tiny one's heads.
pub(crate) fn load(dir: &std::path::Path) -> TractResult<Plan> {
    let path = dir.join("model.onnx");
    let mut model = tract_onnx::onnx()
        .with_ignore_value_info(true)
        .model_for_path(path)?;
    // Lengths stay symbolic: with concrete ones tract's Attention would mask as if there were no past.
    let (s, p) = (
        model.symbols.sym("S").to_dim(),
        model.symbols.sym("P").to_dim(),
    );
    let (heads, channels) = (
        tiny::shape().kv_heads.to_dim(),
        tiny::shape().head_dim.to_dim(),
    );
    for input in 0..model.inputs.len() {
        let fact = match input {
            0 | 2 => i64::fact([1.to_dim(), s.clone()]),
            1 => i64::fact([1.to_dim(), s.clone() + &p]),
            _ => f32::fact([1.to_dim(), heads.clone(), p.clone(), channels.clone()]),
        };
        model.set_input_fact(input, fact.into())?;
    }
    model.into_optimized()?.into_runnable()
}

/// Logits of `[tokens, vocab]`, the tokens being fed in pieces that end at `cuts` and at the last token.
pub(crate) fn logits(plan: &Plan, tokens: &[i64], cuts: &[usize]) -> TractResult<Vec<f32>> {
    let shape = tiny::shape();
    let mut past =
        vec![Tensor::zero::<f32>(&[1, shape.kv_heads, 0, shape.head_dim])?; 2 * shape.layers];
    let (mut begin, mut all) = (0, Vec::new());
    for &end in cuts.iter().chain(&[tokens.len()]) {
        let row = |values: Vec<i64>| Tensor::from_shape(&[1, values.len()], &values);
        let positions = (begin as i64..end as i64).collect();
        let mut inputs = vec![
            row(tokens[begin..end].to_vec())?,
            row(vec![1; end])?,
            row(positions)?,
        ];
        inputs.append(&mut past);
        let mut outputs = plan
            .run(inputs.into_iter().map(TValue::from).collect())?
            .into_iter();
        let piece = outputs.next().expect("logits").into_tensor();
        all.extend_from_slice(piece.try_as_plain_ram()?.as_slice::<f32>()?);
        past = outputs.map(TValue::into_tensor).collect();
        begin = end;
    }
    Ok(all)
}
