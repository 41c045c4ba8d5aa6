//! What tests of logits share.

use millwright_forge::cache::Cache;
use millwright_forge::catalogue::Catalogue;
use millwright_forge::export::{Form, export};
use tempfile::TempDir;

/// The tiny model as an exporter writes it, in the folder `out`.
#[allow(dead_code)] // not every test that shares this file writes models
pub(crate) fn written(form: &str, bias: bool) -> TempDir {
    let folder = TempDir::new().unwrap();
    let cache = Cache::at(folder.path().join("no-cache"));
    let catalogue = Catalogue::built_in().unwrap();
    let form = Form::find(form).unwrap();
    let out = folder.path().join("out");
    export(&cache, &catalogue, "tiny", form, bias, &out).unwrap();
    folder
}

/// KL(p ‖ q) in nats, of the distributions that two rows of logits make.
pub(crate) fn kl(p: &[f32], q: &[f32]) -> f64 {
    let norm = |row: &[f32]| row.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
    let (np, nq) = (norm(p), norm(q));
    let terms = p.iter().zip(q).map(|(&a, &b)| {
        let log_p = f64::from(a) - np;
        log_p.exp() * (log_p - (f64::from(b) - nq))
    });
    terms.sum()
}
