//! What tests of logits share.

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
