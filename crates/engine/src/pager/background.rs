//! Everything else: the rest of storage blocks that accesses were about, the working set, and then all there is.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::Receiver;

use super::blocks::{Blocks, Fetched};
use super::memory::{LoadError, Scratch, WINDOW};
use super::source::Source;
use super::{Failure, Shared};
use crate::SLOTS;

/// Pauses of the background reader while accesses come in: it starts with the first and doubles it up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_micros(250), Duration::from_millis(16));

/// Installs the rest of storage blocks that accesses were about.
pub fn install_rest(shared: &Shared, jobs: &Receiver<Fetched>) {
    let mut scratch = Scratch::default();
    let Source::Images(blocks) = &shared.memory.source else { return };
    for fetched in jobs {
        if shared.stopping() {
            return;
        }
        // What is wrong with it is told by the access to the page that it is about.
        let _ = shared.memory.install_block(blocks, &fetched, &mut scratch);
    }
}

/// Reads what nobody has asked for yet: first the working set, in its order, then the storage blocks, in theirs. A peer
/// sends that by itself: the large pages that it goes to are allocated.
pub fn fill(shared: &Shared, working_set: &[u32], everything: bool) {
    let Source::Images(blocks) = &shared.memory.source else { return allocate_large_pages(shared) };
    let mut pace = Pace { shared, faults: 0, pause: Duration::ZERO };
    let mut scratch = Scratch::default();
    for &window in working_set {
        if shared.stopping() {
            return;
        }
        let first = window as usize * WINDOW;
        let end = (first + WINDOW).min(shared.pages());
        counted(shared, || shared.memory.load(first.min(end), end, &mut scratch));
        pace.yield_to_demand();
    }
    if !everything {
        return;
    }
    let images = blocks.chain().images().to_vec();
    for (number, image) in images.iter().enumerate() {
        for block in 0..u32::try_from(image.blocks().len()).unwrap_or(u32::MAX) {
            if shared.stopping() || !shared.memory.flags.any() {
                return;
            }
            counted(shared, || shared.memory.load_block(blocks, (number, block), &mut scratch));
            pace.yield_to_demand();
        }
    }
    rest(shared, blocks, &mut scratch);
}

/// Allocates the large pages that what is missing goes to: all of them will be needed, and an access to the first page
/// of one waits for the kernel to clear all 512.
fn allocate_large_pages(shared: &Shared) {
    for (number, (region, large)) in shared.memory.regions.iter().zip(&shared.large).enumerate() {
        for (unit, _) in large.iter().enumerate().filter(|(_, large)| **large) {
            let first = (region.base + unit * SLOTS).min(region.end());
            if shared.stopping() {
                return;
            }
            if shared.memory.flags.next(first, region.end().min(first + SLOTS)).is_some() {
                shared.memory.placer.allocate_ahead(number, unit);
            }
        }
    }
}

/// Pages that no storage block says it holds: patterns, and those that are the same as others. Then those that failed
/// are told of, page by page.
fn rest(shared: &Shared, blocks: &Blocks, scratch: &mut Scratch) {
    let (mut at, pages) = (0, shared.pages());
    while let Some(page) = shared.memory.flags.next(at, pages) {
        if shared.stopping() {
            return;
        }
        at = page + 1;
        let region = shared.memory.region_of(page);
        let window = shared.memory.regions[region].window(page);
        if let Err(error) = shared.memory.load_with(blocks, page, window, scratch) {
            let page = page - shared.memory.regions[region].base;
            shared.fail(Failure { region, page, accessed: false, message: error.to_string() });
        }
    }
}

fn counted(shared: &Shared, load: impl FnOnce() -> Result<(), LoadError>) {
    let before = shared.memory.counters.loaded.load(Ordering::Relaxed);
    // An error is told when the pages are accessed, or at the end.
    let _ = load();
    let after = shared.memory.counters.loaded.load(Ordering::Relaxed);
    shared.memory.counters.prefetched.fetch_add(after - before, Ordering::Relaxed);
}

/// Demand goes first: the more of it there is, the longer the pauses.
struct Pace<'a> {
    shared: &'a Shared,
    faults: u64,
    pause: Duration,
}

impl Pace<'_> {
    fn yield_to_demand(&mut self) {
        let missed = self.shared.memory.counters.missed.load(Ordering::Relaxed);
        let (shortest, longest) = PAUSES;
        if missed > self.faults || self.shared.demanding.load(Ordering::Acquire) > 0 {
            self.pause = (self.pause * 2).clamp(shortest, longest);
        } else {
            self.pause /= 2;
        }
        self.faults = missed;
        if self.pause >= shortest && !self.shared.eager {
            std::thread::sleep(self.pause);
        }
    }
}
