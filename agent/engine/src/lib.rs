//! Text in, text out: a Micro-LLM run through tract. Knows no MQTT and no tokio.
//!
//! A bundle is opened once ([`Engine::open`]): its graph is rewritten at the protobuf (`lower`, `fuse`), its weights
//! are packed (`pack`), tract plans what is left (`forward`). Then [`Engine::step`] runs one flat batch of tokens
//! after the other for all answers in progress.

#![deny(unsafe_code)]

mod arena;
pub mod bandwidth;
mod buffers;
pub mod bundle;
pub mod bundling;
mod cores;
mod fit;
mod folder;
mod forward;
mod guard;
mod import;
mod inspect;
mod map;
mod observer;
mod onnx;
mod open;
mod ops;
mod pack;
mod plan;
pub mod quant;
mod recipe;
mod reference;
mod request;
mod room;
pub mod sampler;
mod share;
mod small;
mod source;
mod step;
pub mod text;
mod tuning;
mod turn;

pub use arena::KvPrecision;
pub use fit::{Fit, Misfit, Needs, fit};
pub use guard::{Misread, Progress, Refusal};
pub use inspect::{Inspection, Part as InspectedPart, inspect};
pub use observer::{Observer, Part};
pub use onnx::GraphError;
pub use open::{Card, OpenError, Options, PlanChoice};
pub use pack::PackError;
pub use request::{Prepared, Preparer, Prompt, Request, RequestError};
pub use room::{Bound, Room};
pub use step::{Completion, Engine, Event, Finish, Reads, Slot, StepError, Usage};
pub use tuning::Threads;

/// The kernels that run on this CPU, by name; each gives the same logits.
pub fn kernels() -> Vec<&'static str> {
    millwright_kernels::Kernel::available()
        .iter()
        .map(millwright_kernels::Kernel::name)
        .collect()
}
