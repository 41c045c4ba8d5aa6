//! Text in, text out: a Micro-LLM run through tract. Knows no MQTT and no tokio.
//!
//! A bundle is opened once ([`Engine::open`]): its graph is rewritten at the protobuf (`lower`, `fuse`), its weights
//! are packed (`pack`), tract plans what is left (`forward`). Then [`Engine::step`] runs one flat batch of tokens
//! after the other for all answers in progress.

#![deny(unsafe_code)]

mod arena;
pub mod bandwidth;
pub mod bundle;
mod forward;
mod fuse;
mod lower;
mod map;
mod nbits;
mod onnx;
mod open;
mod ops;
mod pack;
mod recipe;
pub mod sampler;
mod source;
mod step;
pub mod text;
mod turn;

pub use onnx::GraphError;
pub use open::{Card, OpenError, Options, PlanChoice};
pub use pack::PackError;
pub use step::{
    Completion, Engine, Event, Finish, Prepared, Preparer, Prompt, Request, RequestError, Slot,
    StepError, Usage,
};

/// The kernels that run on this CPU, by name; each gives the same logits.
pub fn kernels() -> Vec<&'static str> {
    millwright_kernels::Kernel::available()
        .iter()
        .map(millwright_kernels::Kernel::name)
        .collect()
}
