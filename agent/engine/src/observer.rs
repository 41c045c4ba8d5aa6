//! A seam for measuring: what happens inside a step, told as it begins and ends. Measures nothing itself.

/// What a step consists of, beside what the engine does around it (gathering rows, sampling, text).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// All of the forward pass, the other parts included: what is left without them is tract's own.
    Forward,
    Embedding,
    /// Norms, quantisation, linears, gates and residuals of the layers.
    Linears,
    /// Rotation, the cache's write, attention.
    Attention,
    /// The final norm and the head.
    Head,
}

/// Is told of each part. Called on the thread that steps; what it does itself counts to the part around it.
pub trait Observer: Send {
    fn begin(&mut self, part: Part);
    fn end(&mut self, part: Part);
}
