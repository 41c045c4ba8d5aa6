//! How the process dies: places where it may be asked to, for the fault suite (tests/faults), which do nothing where the
//! variable is not set; and what a panic says.

use std::panic::PanicHookInfo;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// `NAME:N`: the process dies when it comes to the place of that name for the N-th time.
const VARIABLE: &str = "MILLWRIGHT_CRASH_AT";

struct Plan {
    place: String,
    left: AtomicU64,
}

/// A place where the process may be asked to die.
pub(crate) fn point(place: &str) {
    static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
    let plan = PLAN.get_or_init(|| {
        let said = std::env::var(VARIABLE).ok()?;
        let (place, times) = said.split_once(':')?;
        Some(Plan {
            place: place.to_owned(),
            left: AtomicU64::new(times.parse().ok()?),
        })
    });
    if let Some(plan) = plan
        && plan.place == place
        && plan.left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        std::process::abort();
    }
}

/// A panic says where it was. What it says beside may have parts of a prompt in it, unless it was written in the source.
pub(crate) fn say_no_more_than_where() {
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        let what = info.payload().downcast_ref::<&'static str>();
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current();
        tracing::error!(
            "a defect in thread {} at {place}: {}",
            thread.name().unwrap_or("without a name"),
            what.unwrap_or(&"(what it says may be a task's and is left out)")
        );
    }));
}
