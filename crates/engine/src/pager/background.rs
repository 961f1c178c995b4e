//! Background loading of the remaining pages of storage blocks that were read for faults, of the blocks that the next
//! faults need, and of pages that were not requested, in an order that the user of the engine gives (S10).

use std::mem::take;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, select_biased};

use super::blocks::{Blocks, Fetched, Number};
use super::config::FillOrder;
use super::memory::{Installer, LoadError, Scratch, WINDOW};
use super::read_ahead::ReadAhead;
use super::source::PageSource;
use super::{Failure, PagerState};
use crate::SLOTS;
use crate::image::request_in_background;

/// Minimum and maximum pause of the background thread after a load. The pause is doubled while there are faults, and
/// halved otherwise; a pause below the minimum is omitted.
const PAUSES: (Duration, Duration) = (Duration::from_micros(250), Duration::from_millis(16));
/// Maximum number of threads that load.
const MAX_THREADS: usize = 8;
/// Number of consecutive storage blocks that one thread loads. Together they fill at least one huge page, so that
/// threads rarely wait for each other's allocations.
const GROUP: usize = 4;
/// Number of storage blocks (of 1 MiB before compression) that the kernel reads ahead during eager loading.
const DEPTH: usize = 32;
/// Like `DEPTH`, but for loading that gives precedence to faults. It is lower, because the reads of faults wait for the
/// reads that the disk has begun.
const LAZY_DEPTH: usize = 4;

/// Maximum number of storage blocks of each kind that are queued for the rest threads. Pages of further blocks are loaded
/// on demand or by the background thread.
const MAX_REST: usize = 32;

/// Queues of the rest threads.
#[derive(Debug)]
pub struct RestQueues {
    rest: Sender<Fetched>,
    ahead: Sender<Number>,
    /// Recent faults; `None` if no blocks are loaded ahead.
    recent: Option<ReadAhead>,
}

impl RestQueues {
    /// Creates empty queues, and their receiving ends. `read_ahead`: whether blocks are loaded ahead.
    pub fn new(read_ahead: bool) -> (Self, RestJobs) {
        let ((rest, rest_jobs), (ahead, ahead_jobs)) = (bounded(MAX_REST), bounded(MAX_REST));
        let recent = read_ahead.then(ReadAhead::default);
        (Self { rest, ahead, recent }, RestJobs { rest: rest_jobs, ahead: ahead_jobs })
    }

    /// Queues a storage block that was read for a fault, so that its other pages are installed, and the blocks to load
    /// ahead of the next faults.
    pub fn queue(&mut self, blocks: &Blocks, fetched: Fetched) {
        let (image, block) = fetched.0;
        if !blocks.is_done(fetched.0) {
            let _ = self.rest.try_send(fetched);
        }
        let Some(recent) = &mut self.recent else { return };
        let count = u32::try_from(blocks.chain().images()[image].blocks().len()).unwrap_or(u32::MAX);
        for block in recent.record((image, block), count) {
            if !blocks.is_done((image, block)) {
                let _ = self.ahead.try_send((image, block));
            }
        }
    }
}

/// Work of the rest threads.
#[derive(Debug, Clone)]
pub struct RestJobs {
    /// Storage blocks that were read for a fault, whose other pages are to be installed.
    pub rest: Receiver<Fetched>,
    /// Storage blocks to load ahead.
    pub ahead: Receiver<Number>,
}

/// Installs the remaining pages of storage blocks that were loaded for a fault and, when there are none, the pages of
/// the blocks to load ahead.
pub fn install_rest(shared: &PagerState, jobs: &RestJobs) {
    let mut scratch = Scratch::default();
    let PageSource::Images(blocks) = &shared.loader.source else { return };
    while !shared.stopping() {
        // Ignore errors: a fault on an affected page reports them.
        select_biased! {
            recv(jobs.rest) -> fetched => {
                let Ok((number, block)) = fetched else { return };
                let _ = shared.loader.install_block(blocks, number, &block, &mut scratch);
                scratch.installed = 0; // the fault has requested the block
            }
            recv(jobs.ahead) -> number => {
                let Ok(number) = number else { return };
                let _ = shared.loader.load_block(blocks, number, &mut scratch);
                shared.loader.memory.counters.prefetched.fetch_add(take(&mut scratch.installed), Ordering::Relaxed);
            }
        }
    }
}

/// Loads pages before they are requested: first the windows of `order`, then, if `everything` is set, its storage
/// blocks and all remaining pages. With a peer, which pushes all pages, only allocates huge pages.
///
/// If loading is eager, several threads take windows and blocks from the order. Otherwise, faults have precedence, and
/// half of the cores are left to the workload.
pub fn fill(shared: &PagerState, order: &FillOrder, everything: bool) {
    let PageSource::Images(blocks) = &shared.loader.source else { return allocate_large_pages(shared) };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let (threads, depth) = if shared.eager.load(Ordering::Relaxed) { (cores, DEPTH) } else { (cores / 2, LAZY_DEPTH) };
    let first = |window: u32| window as usize * WINDOW;
    let pages = order.windows.iter().flat_map(|&window| first(window)..first(window) + WINDOW);
    if everything {
        blocks.prefetch_all(pages, &order.blocks);
    } else {
        blocks.prefetch_pages(pages);
    }
    let steps = Steps { order, everything, depth, next: 0.into(), ahead: 0.into(), present: 0.into() };
    let work = || steps.work(shared, blocks);
    thread::scope(|scope| {
        for _ in 1..threads.min(MAX_THREADS) {
            // If no thread can be started, the others load the pages.
            let _ = thread::Builder::new().name("pf-fill".into()).spawn_scoped(scope, work);
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
    /// Number of storage blocks that the kernel reads ahead.
    depth: usize,
    /// Next step: a window, or a group of storage blocks.
    next: AtomicUsize,
    /// Number of storage blocks for which reading ahead has begun.
    ahead: AtomicUsize,
    /// Number of pages at the beginning of the memory that were present when last checked.
    present: AtomicUsize,
}

impl Steps<'_> {
    /// Takes steps until none is left, no page is deferred, or the pager is stopped.
    fn work(&self, shared: &PagerState, blocks: &Blocks) {
        request_in_background();
        let mut pace = DemandThrottle { shared, faults: 0, pause: Duration::ZERO };
        let mut scratch = Scratch::default();
        let (loader, windows) = (&shared.loader, &self.order.windows);
        while !shared.stopping() && self.any_deferred(shared) {
            let step = self.next.fetch_add(1, Ordering::Relaxed);
            if let Some(&window) = windows.get(step) {
                let first = window as usize * WINDOW;
                let end = (first + WINDOW).min(shared.pages());
                // Ignore errors: a fault on the page, or `rest`, reports them.
                let _ = loader.load(first.min(end), end, &mut scratch);
                pace.count(&mut scratch);
                continue;
            }
            let first = (step - windows.len()) * GROUP;
            if first >= self.order.blocks.len() || !self.everything {
                return;
            }
            let end = self.order.blocks.len().min(first + GROUP);
            self.read_ahead(blocks, end + self.depth);
            for &block in self.order.blocks[first..end].iter().take_while(|_| !shared.stopping()) {
                let _ = loader.load_block(blocks, block, &mut scratch);
                pace.count(&mut scratch);
            }
        }
    }

    /// Makes the kernel read ahead all storage blocks up to `end`, so that the disk always has several requests.
    fn read_ahead(&self, blocks: &Blocks, end: usize) {
        let end = end.min(self.order.blocks.len());
        let begun = self.ahead.fetch_max(end, Ordering::Relaxed).min(end);
        for &(image, block) in self.order.blocks[begun..end].iter().filter(|&&block| !blocks.is_done(block)) {
            blocks.chain().images()[image].read_ahead(block);
        }
    }

    /// Returns whether any page is deferred. The search begins where the last call found a deferred page: a search of
    /// the whole bitmap for each block would take a time proportional to the square of the memory size.
    fn any_deferred(&self, shared: &PagerState) -> bool {
        let flags = &shared.loader.memory.flags;
        match flags.next(self.present.load(Ordering::Relaxed), flags.pages()) {
            Some(page) => {
                self.present.store(page, Ordering::Relaxed);
                true
            }
            None => flags.any(),
        }
    }
}

/// Allocates the huge pages of deferred contents in advance. Otherwise, the first access to each huge page would wait
/// until the kernel has cleared all of its 512 base pages.
fn allocate_large_pages(shared: &PagerState) {
    let Installer::Files(placer) = &shared.loader.memory.installer else { return };
    for (number, (region, large)) in shared.loader.memory.regions.iter().zip(&shared.large).enumerate() {
        for (unit, _) in large.iter().enumerate().filter(|(_, large)| **large) {
            let first = (region.base + unit * SLOTS).min(region.end());
            if shared.stopping() {
                return;
            }
            if shared.loader.memory.flags.next(first, region.end().min(first + SLOTS)).is_some() {
                placer.allocate_ahead(number, unit);
            }
        }
    }
}

/// Loads the remaining pages: patterns and duplicates, which no storage block lists, and pages that the order leaves
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
        match shared.loader.load_with(blocks, page, window, scratch) {
            Ok(_) => {}
            Err(LoadError::Removing) => {
                // The demand threads read the event of the removal.
                thread::sleep(PAUSES.0);
                at = page;
            }
            Err(LoadError::Exited) => return,
            Err(error) => {
                let page = page - shared.loader.memory.regions[region].base;
                shared.fail(Failure { region, page, accessed: false, message: error.to_string() });
            }
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
    /// Counts the pages that a thread has installed, and gives precedence to faults.
    fn count(&mut self, scratch: &mut Scratch) {
        self.shared.loader.memory.counters.prefetched.fetch_add(take(&mut scratch.installed), Ordering::Relaxed);
        self.yield_to_demand();
    }

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
