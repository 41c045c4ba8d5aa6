//! A global allocator that counts what is live and ends the process at a limit, before the memory is taken.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// To be declared a target's `#[global_allocator]`.
#[derive(Debug)]
pub struct Counted;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Allows this many bytes more than are live now; none but what there is when `None`.
pub fn allow(bytes: Option<usize>) {
    let limit = bytes.map_or(usize::MAX, |bytes| LIVE.load(Relaxed).saturating_add(bytes));
    LIMIT.store(limit, Relaxed);
}

fn take(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed).saturating_add(bytes);
    let limit = LIMIT.load(Relaxed);
    if live > limit {
        // What follows needs memory too.
        LIMIT.store(usize::MAX, Relaxed);
        eprintln!(
            "FAILURE: {} bytes of heap are live with the next {bytes}, where {} are allowed\n{}",
            live,
            limit,
            Backtrace::force_capture()
        );
        std::process::abort();
    }
}

// SAFETY: the system's allocator does the work; counting changes nothing about what it is given or gives.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size);
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(old, layout) }
    }
}
