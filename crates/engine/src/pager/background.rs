//! Background loading: the remaining pages of storage blocks that were read for faults, and pages that were not
//! requested, in an order that the user of the engine gives (S10).

use std::mem::take;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::Receiver;

use super::blocks::{Blocks, Fetched};
use super::config::FillOrder;
use super::memory::{Scratch, WINDOW};
use super::source::PageSource;
use super::{Failure, PagerState};
use crate::SLOTS;

/// Initial and maximum pause of the background thread after each load. The pause is doubled while there are faults, and
/// halved otherwise.
const PAUSES: (Duration, Duration) = (Duration::from_micros(250), Duration::from_millis(16));
/// Maximum number of threads that load eagerly.
const MAX_THREADS: usize = 8;

/// Installs the remaining pages of storage blocks that were loaded for a fault.
pub fn install_rest(shared: &PagerState, jobs: &Receiver<Fetched>) {
    let mut scratch = Scratch::default();
    let PageSource::Images(blocks) = &shared.loader.source else { return };
    for fetched in jobs {
        if shared.stopping() {
            return;
        }
        // Ignore errors: a fault on an affected page reports them.
        let _ = shared.loader.install_block(blocks, &fetched, &mut scratch);
    }
}

/// Loads pages before they are requested: first the windows of `order`, then, if `everything` is set, its storage
/// blocks and all remaining pages. With a peer, which pushes all pages, only allocates huge pages.
///
/// If loading is eager, several threads take windows and blocks from the order. Otherwise, faults have precedence, and
/// one thread is enough.
pub fn fill(shared: &PagerState, order: &FillOrder, everything: bool) {
    let PageSource::Images(blocks) = &shared.loader.source else { return allocate_large_pages(shared) };
    let steps = Steps { order, everything, next: AtomicUsize::new(0) };
    let work = || steps.work(shared, blocks);
    thread::scope(|scope| {
        if shared.eager.load(Ordering::Relaxed) {
            for _ in 1..thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS) {
                // If no thread can be started, the others load the pages.
                let _ = thread::Builder::new().name("pf-fill".into()).spawn_scoped(scope, work);
            }
        }
        work();
    });
    if everything {
        rest(shared, blocks, &mut Scratch::default());
    }
}

/// Order of background loading, and the position in it.
struct Steps<'a> {
    order: &'a FillOrder,
    everything: bool,
    next: AtomicUsize,
}

impl Steps<'_> {
    /// Takes steps until none is left, no page is deferred, or the pager is stopped.
    fn work(&self, shared: &PagerState, blocks: &Blocks) {
        let mut pace = DemandThrottle { shared, faults: 0, pause: Duration::ZERO };
        let mut scratch = Scratch::default();
        let windows = &self.order.windows;
        while !shared.stopping() && shared.loader.memory.flags.any() {
            let step = self.next.fetch_add(1, Ordering::Relaxed);
            let loaded = if let Some(&window) = windows.get(step) {
                let first = window as usize * WINDOW;
                let end = (first + WINDOW).min(shared.pages());
                shared.loader.load(first.min(end), end, &mut scratch)
            } else if let Some(&block) = self.order.blocks.get(step - windows.len()).filter(|_| self.everything) {
                shared.loader.load_block(blocks, block, &mut scratch)
            } else {
                return;
            };
            // Ignore errors: a fault on the page, or `rest`, reports them.
            drop(loaded);
            shared.loader.memory.counters.prefetched.fetch_add(take(&mut scratch.installed), Ordering::Relaxed);
            pace.yield_to_demand();
        }
    }
}

/// Allocates the huge pages of deferred contents in advance. Otherwise, the first access to each huge page would wait
/// until the kernel has cleared all of its 512 base pages.
fn allocate_large_pages(shared: &PagerState) {
    for (number, (region, large)) in shared.loader.memory.regions.iter().zip(&shared.large).enumerate() {
        for (unit, _) in large.iter().enumerate().filter(|(_, large)| **large) {
            let first = (region.base + unit * SLOTS).min(region.end());
            if shared.stopping() {
                return;
            }
            if shared.loader.memory.flags.next(first, region.end().min(first + SLOTS)).is_some() {
                shared.loader.memory.placer.allocate_ahead(number, unit);
            }
        }
    }
}

/// Loads the remaining pages: those of no storage block, namely patterns and duplicates, and those that the order leaves
/// out. Records a failure for each page that cannot be loaded.
fn rest(shared: &PagerState, blocks: &Blocks, scratch: &mut Scratch) {
    let (mut at, pages) = (0, shared.pages());
    while let Some(page) = shared.loader.memory.flags.next(at, pages) {
        if shared.stopping() {
            return;
        }
        at = page + 1;
        let region = shared.loader.memory.region_of(page);
        let window = shared.loader.memory.regions[region].window(page);
        if let Err(error) = shared.loader.load_with(blocks, page, window, scratch) {
            let page = page - shared.loader.memory.regions[region].base;
            shared.fail(Failure { region, page, accessed: false, message: error.to_string() });
        }
    }
}

/// Throttle that gives precedence to faults: the more faults, the longer the pauses of background loading.
struct DemandThrottle<'a> {
    shared: &'a PagerState,
    faults: u64,
    pause: Duration,
}

impl DemandThrottle<'_> {
    fn yield_to_demand(&mut self) {
        let missed = self.shared.loader.memory.counters.missed.load(Ordering::Relaxed);
        let (shortest, longest) = PAUSES;
        if missed > self.faults || self.shared.demanding.load(Ordering::Acquire) > 0 {
            self.pause = (self.pause * 2).clamp(shortest, longest);
        } else {
            self.pause /= 2;
        }
        self.faults = missed;
        if self.pause >= shortest && !self.shared.eager.load(Ordering::Relaxed) {
            thread::sleep(self.pause);
        }
    }
}
