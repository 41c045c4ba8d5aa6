//! The configuration: a text is a configuration, or an error in words.
#![no_main]

use libfuzzer_sys::fuzz_target;
use millwright::config::Config;
use millwright_fuzz::guard::{Limits, guarded, note_panics};
use millwright_fuzz::heap::Counted;

#[global_allocator]
static HEAP: Counted = Counted;

fuzz_target!(
    init: { note_panics(); },
    |text: &[u8]| {
        let Ok(text) = std::str::from_utf8(text) else { return };
        let parsed = guarded("parse", Limits::SMALL, || Config::parse(text).map(drop));
        if let Err(e) = parsed {
            assert!(!e.to_string().is_empty());
        }
    }
);
