//! Places where the process may be asked to die, for the fault suite (tests/faults). Nothing happens where the variable is
//! not set.

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
