//! The journal's rows: whatever bytes a damaged disk brings.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millwright::journal::is_sound_row;
use millwright_fuzz::guard::{Limits, guarded, note_panics};
use millwright_fuzz::heap::Counted;

#[global_allocator]
static HEAP: Counted = Counted;

fuzz_target!(
    init: { note_panics(); },
    |row: &[u8]| { assert!(guarded("read", Limits::SMALL, || is_sound_row(row))); }
);
