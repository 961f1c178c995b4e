//! Pager (S8, S10): loads the pages of a running workload on demand, from an image or from a peer.
//!
//! ```text
//! access ─▶ userfaultfd ─▶ demand thread ─▶ page block of the page: read, verify, write, clear the bit, map
//!                               └─▶ rest threads: the other pages of the storage block; if faults are in the order
//!                                   of the image, the next storage blocks
//!                       background thread: the working set, then all pages; gives precedence to faults
//! ```
//!
//! With a peer ([`Origin::Peer`], post-copy), the demand thread only requests the pages. One thread per stream receives
//! requested and pushed pages, and installs them in the same way.
//!
//! The workload's mappings are registered for MISSING and MINOR faults, so that the userfaultfd reports every access to
//! an unmapped page, whether or not the file holds the page. Contents are written through the pager's own mapping of
//! the file, and then mapped in the workload (UFFDIO_CONTINUE). A huge page of the file is allocated as a whole and
//! mapped in parts as its contents are loaded. When all pages are loaded, the memory is unregistered, and huge pages
//! are mapped by PMD entries.
//!
//! Private memory, which the pager cannot map, is filled by UFFDIO_COPY instead (see `private`); everything else is the
//! same.
//!
//! The deferred bitmap is in a file. If a pager exits, the workload blocks at its next access to a deferred page, and
//! the next pager continues from the bitmap ([`Begin::TakenOver`]). No pager thread takes a lock that a faulting thread
//! can hold: each could otherwise wait for the other.

mod background;
mod base;
mod base_fill;
mod base_marks;
mod blocks;
mod config;
mod demand;
mod evict;
mod flags;
mod memory;
mod peer;
mod private;
mod read_ahead;
mod register;
mod removals;
mod requests;
mod source;
mod uffd_lending;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::{Condvar, Mutex, RwLock};

use background::{RestJobs, RestQueues};
pub use base::{BaseCounters, BaseFailure, BasePager};
pub use base_fill::BaseFile;
use blocks::{Blocks, Fetched};
pub use config::{Begin, Failure, FillOrder, Origin, PagerError, Plan, PrivateRegion, Targets};
use demand::{Fault, Inbox};
pub use flags::{Flags, file_len};
pub use memory::{Counters, LoadError};
use memory::{Installer, Memory, PagedRegion, Scratch, Watched};
use peer::Peer;
use private::PrivateMemory;
use register::{mark, register};
use removals::Removals;
pub use requests::{RequestError, RequestRange};
use source::{Loader, PageSource};
use uffd_lending::Held;

use crate::block::Head;
use crate::pages::PageSet;
use crate::placer::{Placer, Target};
use crate::segment::Segment;
use crate::uapi::{self, Userfault};
use crate::wire::PeerSource;
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Number of threads that resolve faults, per address space.
const SERVERS: usize = 2;
/// Maximum number of rest threads. Half of the cores are left to the workload.
const MAX_REST_THREADS: usize = 4;
/// Minimum number of pages for which `ensure` loads whole storage blocks.
const MIN_BULK: usize = 1024;
/// Maximum number of pages that `ensure` loads between two checks for a stop.
const MAX_LOAD: usize = 4096;
/// Interval of the check whether all pages are loaded, with background loading.
const SOON: Duration = Duration::from_millis(5);
/// Interval of the check whether all pages are loaded, without background loading.
const LATER: Duration = Duration::from_millis(50);
/// Maximum number of recorded failures.
const MAX_FAILURES: usize = 64;

/// Userfaultfd features that a pager requires.
pub const FEATURES: u64 = uapi::FEATURE_MISSING_SHMEM
    | uapi::FEATURE_MISSING_HUGETLBFS
    | uapi::FEATURE_MINOR_SHMEM
    | uapi::FEATURE_MINOR_HUGETLBFS;
/// Additional userfaultfd features, required for write traces through the userfaultfd of a pager ([`Pager::hold`]).
pub const TRACE_FEATURES: u64 = crate::trace::FEATURES;

#[derive(Debug)]
struct PagerState {
    loader: Loader,
    stop: AtomicBool,
    /// Number of faults being resolved.
    demanding: AtomicUsize,
    /// Queues of the rest threads; `None` if the pager is stopped.
    rest: Mutex<Option<RestQueues>>,
    failures: Mutex<Vec<Failure>>,
    finished: (Mutex<bool>, Condvar),
    eager: AtomicBool,
    whole_blocks: bool,
    evicting: AtomicBool,
    fatal: bool,
    held: Mutex<Held>,
    /// Queue of faults whose contents have been fetched from a store; `None` if the files of the images are complete.
    parked: Option<Sender<Fault>>,
    /// For each region and unit, whether the unit is backed by a huge page once its contents are present.
    large: Vec<Vec<bool>>,
    /// Lock held shared while `ensure` loads pages. `Pager::stop` acquires it exclusively, to wait for these loads.
    loading: RwLock<()>,
}

impl PagerState {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn pages(&self) -> usize {
        self.loader.memory.regions.iter().map(|region| region.pages).sum()
    }

    /// Queues a storage block that was read for a fault, so that its remaining pages are loaded, and the blocks that
    /// the next faults need if the faults are in order. Does nothing if the pager does not load whole blocks. Skips
    /// blocks whose pages are all loaded, and those for which a queue is full.
    fn queue_rest(&self, fetched: Fetched) {
        if !self.whole_blocks {
            return;
        }
        if let Some(queues) = self.rest.lock().as_mut()
            && let PageSource::Images(blocks) = &self.loader.source
        {
            queues.queue(blocks, fetched);
        }
    }

    /// Records a failure, and wakes the threads in `wait`. Returns true if the page had no recorded failure, or if its
    /// `accessed` changes to true.
    fn fail(&self, failure: Failure) -> bool {
        let mut failures = self.failures.lock();
        let same = |other: &&mut Failure| (other.region, other.page) == (failure.region, failure.page);
        let new = match failures.iter_mut().find(same) {
            Some(known) => {
                let before = known.accessed;
                known.accessed |= failure.accessed;
                known.accessed != before
            }
            None => {
                if failures.len() < MAX_FAILURES {
                    failures.push(failure);
                } else if failure.accessed
                    && let Some(other) = failures.iter_mut().find(|other| !other.accessed)
                {
                    // The workload waits for this page, so the caller must see it.
                    *other = failure;
                }
                true
            }
        };
        drop(failures);
        self.finished.1.notify_all();
        new
    }

    /// Returns the page ranges that the segments of a userfaultfd map in an address range. Pages are counted over all
    /// regions.
    fn pages_at(&self, uffd: &Arc<Userfault>, start: u64, end: u64) -> Vec<(usize, usize)> {
        let ours = self.loader.memory.watched.iter().filter(|watched| Arc::ptr_eq(&watched.uffd, uffd));
        let part = |Watched { segment, .. }: &Watched| {
            let from = start.max(segment.address);
            let to = end.min(segment.address + segment.len);
            let base = self.loader.memory.regions[segment.region].base;
            let pages = |(first, end)| (base + first, base + end);
            (from < to).then(|| pages(segment.pages(from, to)))
        };
        ours.filter_map(part).collect()
    }

    fn page_at(&self, uffd: &Arc<Userfault>, address: u64) -> Option<usize> {
        self.pages_at(uffd, address, address + SMALL_PAGE as u64).first().map(|&(first, _)| first)
    }

    fn receive(&self, link: &PeerSource, stream: usize) {
        let PageSource::Peer(peer) = &self.loader.source else { return };
        let install = |head: &Head, scratch: &mut Scratch| self.loader.install_sent(head, scratch);
        peer.receive(&self.loader.memory, link, stream, install);
    }

    /// Requests all threads to stop, and cancels the connection to the peer.
    fn end(&self) {
        self.stop.store(true, Ordering::Release);
        self.loader.stop_waiting();
        if let PageSource::Peer(peer) = &self.loader.source {
            peer.link().cancel();
        }
    }

    /// Unregisters all memory.
    fn unregister(&self) {
        for Watched { segment, uffd } in &self.loader.memory.watched {
            // This fails only for exited processes.
            let _ = uffd.unregister(segment.address, segment.len);
        }
    }

    /// Waits until all pages are loaded and the pager is neither acquired nor evicting, and then finishes. Checks these
    /// conditions every `interval`. Returns early if the pager is stopped.
    fn wait_and_finish(&self, interval: Duration) {
        let memory = &self.loader.memory;
        let unfinished = || self.is_held() || self.evicting.load(Ordering::Acquire) || memory.flags.any();
        while !self.stopping() && (unfinished() || !self.may_end()) {
            memory.take_reports(&memory.removing.write());
            std::thread::sleep(interval);
        }
        if !self.stopping() {
            self.finish();
        }
    }

    /// Finishes the pager after all pages are loaded: unregisters the memory, stops the other threads, and maps huge
    /// pages by PMD entries.
    fn finish(&self) {
        self.unregister();
        // A removal that began before the memory was unregistered waits until a demand thread has read its event.
        for Watched { uffd, .. } in &self.loader.memory.watched {
            while uffd.is_removing() && !self.stopping() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.loader.memory.removals.close();
        // Stop the other threads, but keep the link to the peer open, unlike `end`. The peer completes the block that
        // it is pushing. The pages of that block are ignored, because none of them is deferred.
        self.stop.store(true, Ordering::Release);
        self.loader.stop_waiting();
        for (number, region) in
            self.loader.memory.regions.iter().enumerate().filter(|(_, region)| region.page_size == SMALL_PAGE)
        {
            let large = region.mapping.as_ref().and_then(|mapping| mapping.large_units().ok()).unwrap_or_default();
            for (unit, _) in large.iter().enumerate().filter(|(_, large)| **large) {
                self.loader.memory.map_large(number, unit * SLOTS);
            }
        }
        *self.finished.0.lock() = true;
        self.finished.1.notify_all();
    }
}

/// Running pager. If it is dropped before it has finished, the workload blocks at its next access to a deferred page.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<PagerState>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Threads that receive from a peer.
    readers: Mutex<Vec<JoinHandle<()>>>,
    abandoned: AtomicBool,
}

impl Pager {
    /// Registers the workload's mappings, and starts the threads that resolve their faults. The files must be in the
    /// state that [`Plan::begin`] describes.
    ///
    /// # Errors
    /// If the configuration is inconsistent, if discards cannot be watched, if a mapping cannot be registered, if
    /// deferred pages cannot be unmapped, or if a thread cannot be started.
    pub fn start(plan: Plan) -> Result<Self, PagerError> {
        let regions = paged_regions(&plan.targets);
        let base = regions.last().map_or(0, PagedRegion::end);
        let flags = plan.flags;
        check_flags(&flags, base)?;
        if matches!(plan.from, Origin::Peer(_)) && !plan.targets.are_files() {
            return Err(PagerError::Peer("cannot load private memory from a peer"));
        }
        let source = source(plan.from, plan.begin, &flags)?;
        source.check(&plan.order)?;
        let segments = plan.watched.iter().map(|(segment, _)| segment.clone()).collect();
        let (installer, large) = installer(plan.targets, segments)?;
        let watched = plan.watched.into_iter().map(|(segment, uffd)| Watched { segment, uffd }).collect();
        let files = regions.iter().filter_map(|region| Some(region.mapping.as_ref()?.file())).collect();
        let removals = Removals::new(plan.checks_removals.then_some(files))?;
        let memory = Memory::new(regions, watched, flags, installer, removals);
        register(&memory, plan.begin)?;
        memory.removals.forget_reports();
        let (queues, jobs) = RestQueues::new(plan.read_ahead);
        let (parked, ready) = parking(&source);
        let shared = Arc::new(PagerState {
            loader: Loader { memory, source },
            stop: AtomicBool::new(false),
            demanding: AtomicUsize::new(0),
            rest: Mutex::new(Some(queues)),
            failures: Mutex::default(),
            finished: (Mutex::new(false), Condvar::new()),
            eager: AtomicBool::new(plan.eager),
            whole_blocks: plan.whole_blocks,
            evicting: AtomicBool::new(plan.evicting),
            fatal: plan.fatal,
            held: Mutex::new(Held::No),
            parked,
            large,
            loading: RwLock::default(),
        });
        let abandoned = AtomicBool::new(false);
        let pager = Self { shared, threads: Mutex::default(), readers: Mutex::default(), abandoned };
        pager.spawn_parked(&ready)?;
        pager.spawn_all(plan.begin, jobs, plan.order, plan.background)?;
        Ok(pager)
    }

    /// Starts the threads that resolve faults whose contents have been fetched from a store.
    fn spawn_parked(&self, ready: &Receiver<Fault>) -> io::Result<()> {
        for _ in 0..if self.shared.parked.is_some() { SERVERS } else { 0 } {
            let (shared, ready) = (self.shared.clone(), ready.clone());
            self.spawn("pf-parked", move || demand::serve_parked(&shared, &ready))?;
        }
        Ok(())
    }

    fn spawn_all(&self, begin: Begin, jobs: RestJobs, order: FillOrder, everything: bool) -> io::Result<()> {
        self.spawn_readers()?;
        self.spawn_servers()?;
        if begin == Begin::TakenOver {
            // Remove the write traces of the process that had acquired the previous pager. The demand threads must be
            // running, because the removal fails while the event of a discard has not been read.
            uffd_lending::unprotect(&self.shared.loader.memory);
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        for _ in 0..(cores / 2).clamp(1, MAX_REST_THREADS) {
            let (shared, jobs) = (self.shared.clone(), jobs.clone());
            self.spawn("pf-rest", move || background::install_rest(&shared, &jobs))?;
        }
        let shared = self.shared.clone();
        self.spawn("pf-fill", move || {
            background::fill(&shared, &order, everything);
            shared.wait_and_finish(if everything { SOON } else { LATER });
        })
    }

    /// Starts to load all pages in the background, in this order. The pager must have been started without background
    /// loading. `eager` has the meaning of [`Plan::eager`].
    ///
    /// # Errors
    /// If the order names a block that does not exist, or the thread cannot be started.
    pub fn fill(&self, order: FillOrder, eager: bool) -> io::Result<()> {
        self.shared.loader.source.check(&order)?;
        self.shared.eager.store(eager, Ordering::Relaxed);
        let shared = self.shared.clone();
        self.spawn("pf-fill", move || background::fill(&shared, &order, true))
    }

    fn spawn_servers(&self) -> io::Result<()> {
        let mut known: Vec<Arc<Userfault>> = Vec::new();
        for Watched { uffd, .. } in &self.shared.loader.memory.watched {
            if known.iter().any(|other| Arc::ptr_eq(other, uffd)) {
                continue;
            }
            known.push(uffd.clone());
            let inbox = Arc::new(Inbox::new(uffd.clone()));
            for _ in 0..SERVERS {
                let (shared, inbox) = (self.shared.clone(), inbox.clone());
                self.spawn("pf-demand", move || demand::serve(&shared, &inbox))?;
            }
        }
        Ok(())
    }

    /// Starts a receiving thread for each stream of the connection to the peer.
    fn spawn_readers(&self) -> io::Result<()> {
        let PageSource::Peer(peer) = &self.shared.loader.source else { return Ok(()) };
        let link = peer.link();
        for stream in 0..link.streams() {
            let (shared, link) = (self.shared.clone(), link.clone());
            let thread = std::thread::Builder::new().name(format!("pf-peer{stream}"));
            let thread = thread.spawn(move || shared.receive(&link, stream))?;
            self.readers.lock().push(thread);
        }
        Ok(())
    }

    /// Switches to another connection to the peer, and repeats all pending requests on it.
    ///
    /// # Errors
    /// [`PagerError::Peer`] if the origin is an image, or if another pager uses the connection; [`PagerError::Io`] if a
    /// thread cannot be started.
    pub fn reconnect(&self, link: Arc<PeerSource>) -> Result<(), PagerError> {
        let PageSource::Peer(peer) = &self.shared.loader.source else {
            return Err(PagerError::Peer("cannot reconnect: this pager loads from images"));
        };
        let link = taken(link)?;
        peer.link().cancel();
        self.join_readers();
        peer.reconnect(&self.shared.loader.memory, link.clone());
        self.spawn_readers()?;
        if self.shared.stopping() {
            link.cancel();
        }
        Ok(())
    }

    fn join_readers(&self) {
        for reader in self.readers.lock().drain(..) {
            let _ = reader.join();
        }
    }

    fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work)?;
        self.threads.lock().push(thread);
        Ok(())
    }

    /// Returns the number of deferred pages.
    pub fn pending(&self) -> usize {
        self.shared.loader.memory.flags.count()
    }

    /// Returns the deferred pages of a region; `None` if there is no such region.
    pub fn missing(&self, region: usize) -> Option<PageSet> {
        let found = self.shared.loader.memory.regions.get(region)?;
        Some(self.shared.loader.memory.flags.set_in(found.base, found.end()))
    }

    /// Returns the counters.
    pub fn counters(&self) -> &Counters {
        &self.shared.loader.memory.counters
    }

    /// Returns the number of bytes of storage blocks that were read, or that were received on the current connection to
    /// the peer.
    pub fn bytes_read(&self) -> u64 {
        match &self.shared.loader.source {
            PageSource::Images(blocks) => blocks.bytes_read(),
            PageSource::Peer(peer) => peer.link().progress().bytes.load(Ordering::Relaxed),
        }
    }

    /// Returns the windows of 16 pages in the order of their first fault on a deferred page.
    pub fn touched(&self) -> Vec<u32> {
        self.shared.loader.memory.touched.lock().clone()
    }

    /// Returns the pages that could not be loaded.
    pub fn failures(&self) -> Vec<Failure> {
        self.shared.failures.lock().clone()
    }

    /// Returns whether all pages are loaded and the memory is unregistered.
    pub fn is_finished(&self) -> bool {
        *self.shared.finished.0.lock()
    }

    /// Waits until the pager has finished, until there are more than `known` failures, or until `timeout` has passed.
    /// Returns whether the pager has finished.
    pub fn wait(&self, timeout: Duration, known: usize) -> bool {
        let deadline = Instant::now() + timeout;
        let mut finished = self.shared.finished.0.lock();
        while !*finished && self.failures().len() <= known {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.shared.finished.1.wait_for(&mut finished, left.min(Duration::from_millis(100)));
        }
        *finished
    }

    /// Loads the deferred pages among `count` pages of a region, for readers that bypass the workload's page tables
    /// (S8). Ignores pages beyond the end of the region.
    ///
    /// # Errors
    /// If a page cannot be loaded, or if the pager has been stopped.
    pub fn ensure(&self, region: usize, first: usize, count: usize) -> Result<(), LoadError> {
        let Some(found) = self.shared.loader.memory.regions.get(region) else { return Ok(()) };
        let pages = found.pages;
        let (start, end) = (found.base + first.min(pages), found.base + first.saturating_add(count).min(pages));
        let (loader, mut scratch) = (&self.shared.loader, Scratch::default());
        let _bringing = self.shared.loading.read();
        loader.request(start, end);
        for first in (start..end).step_by(MAX_LOAD) {
            let last = end.min(first + MAX_LOAD);
            // Another pager may have taken over: this pager could overwrite newer contents.
            if self.shared.stopping() && loader.memory.flags.next(first, last).is_some() {
                return Err(LoadError::Ended);
            }
            if last - first < MIN_BULK {
                loader.load(first, last, &mut scratch)?;
            } else {
                loader.load_many(first, last, &mut scratch)?;
            }
        }
        Ok(())
    }

    /// Answers the requests for pages that are received on a blocking stream socket, for a virtual machine monitor that
    /// maps the files of the pager and handles its own page faults. `ranges`: guest physical addresses of the regions.
    /// Also answers after all pages are loaded. To end the call, shut the socket down.
    ///
    /// Returns when the monitor has closed the socket (false) or has abandoned the restore (true).
    ///
    /// # Errors
    /// If a page cannot be loaded, which leaves its request without a reply; if a request is invalid; or if the socket
    /// fails.
    pub fn answer_requests(&self, socket: BorrowedFd<'_>, ranges: &[RequestRange]) -> Result<bool, RequestError> {
        requests::answer(&self.shared, socket, ranges)
    }

    /// Returns, for each 2 MiB unit of a region, whether it is backed by a huge page once its contents are present.
    pub fn large(&self, region: usize) -> &[bool] {
        self.shared.large.get(region).map_or(&[], Vec::as_slice)
    }

    /// Maps all present pages into the workload's page tables (S1): huge pages without deferred pages by PMD entries,
    /// all other pages as base pages. Call this for a workload that is about to resume on existing memory.
    ///
    /// # Errors
    /// Errors of lseek(2), or of reading the pager's own page tables.
    pub fn populate(&self) -> io::Result<()> {
        (0..self.shared.loader.memory.regions.len()).try_for_each(|region| self.shared.loader.memory.populate(region))
    }

    /// Evicts pages of a region whose contents are in the chain; a later access loads them again. The other pages of
    /// their 2 MiB units stay present and are mapped as base pages. Returns the number of evicted pages.
    ///
    /// The workload must be paused and must not have written to the pages since they were stored.
    ///
    /// # Errors
    /// If [`Plan::evicting`] is false, if the region does not consist of base pages, if a unit has deferred pages, if
    /// the workload maps memory although it should be paused, or if its mappings cannot be changed. Pages evicted
    /// before the error stay evicted; all others are unchanged.
    pub fn evict(&self, region: usize, pages: &PageSet) -> Result<usize, PagerError> {
        if !self.shared.evicting.load(Ordering::Acquire) {
            return Err(PagerError::Io(io::Error::new(io::ErrorKind::InvalidInput, "cannot evict: not configured")));
        }
        evict::evict(&self.shared.loader.memory, region, pages)
    }

    /// Ends evictions, so that the pager finishes when all pages are loaded.
    pub fn evicted(&self) {
        self.shared.evicting.store(false, Ordering::Release);
    }

    /// Stops all threads. Deferred pages stay deferred: accesses to them block until another pager takes over.
    pub fn stop(&self) {
        self.shared.end();
        drop(self.shared.rest.lock().take());
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join();
        }
        self.join_readers();
        drop(self.shared.loading.write());
    }

    /// Stops all threads, for a workload that will never resume on this memory. Blocked threads continue, and read
    /// zeros from deferred pages.
    pub fn abandon(&self) {
        self.stop();
        self.shared.unregister();
        self.abandoned.store(true, Ordering::Release);
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stop();
        if !self.is_finished() && !self.abandoned.load(Ordering::Acquire) {
            // Closing the last descriptor would unregister the memory, and deferred pages would read as zeros.
            self.shared.loader.memory.watched.iter().for_each(|watched| std::mem::forget(watched.uffd.clone()));
        }
    }
}

/// Returns the two ends of the queue of faults whose contents have been fetched from a store. The first is `None` if no
/// contents are fetched.
fn parking(source: &PageSource) -> (Option<Sender<Fault>>, Receiver<Fault>) {
    let (parked, ready) = unbounded();
    (source.is_supplied().then_some(parked), ready)
}

/// Checks that the deferred bitmap covers the pages of all regions.
fn check_flags(flags: &Flags, pages: usize) -> io::Result<()> {
    if flags.pages() == pages {
        return Ok(());
    }
    let words = format!("deferred bitmap does not match the regions: {} pages, expected {pages}", flags.pages());
    Err(io::Error::new(io::ErrorKind::InvalidInput, words))
}

fn paged_regions(targets: &Targets) -> Vec<PagedRegion> {
    let mut regions: Vec<PagedRegion> = match targets {
        Targets::Files(files) => files.iter().map(file_region).collect(),
        Targets::Private(private) => private.iter().map(private_region).collect(),
    };
    let mut base = 0;
    for region in &mut regions {
        region.base = base;
        base = region.end();
    }
    regions
}

fn file_region(target: &Target) -> PagedRegion {
    let (mapping, pages) = (Some(target.mapping.clone()), target.mapping.pages());
    PagedRegion { mapping, pages, page_size: target.page_size, base: 0 }
}

fn private_region(&PrivateRegion { pages, page_size }: &PrivateRegion) -> PagedRegion {
    PagedRegion { mapping: None, pages, page_size, base: 0 }
}

/// Returns the installer of contents, and for each region, the units that are backed by huge pages once their contents
/// are present.
fn installer(targets: Targets, segments: Vec<Segment>) -> io::Result<(Installer, Vec<Vec<bool>>)> {
    match targets {
        Targets::Files(files) => {
            let large = files.iter().map(|target| target.large.clone()).collect();
            Ok((Installer::Files(Placer::new(files, segments, true, 0)?), large))
        }
        Targets::Private(regions) => {
            check_private(&regions, &segments)?;
            Ok((Installer::Private(PrivateMemory::new()), vec![Vec::new(); regions.len()]))
        }
    }
}

/// Checks that regions of private memory have a supported page size, and that their segments consist of whole pages.
fn check_private(regions: &[PrivateRegion], segments: &[Segment]) -> io::Result<()> {
    let invalid = |words: &str| io::Error::new(io::ErrorKind::InvalidInput, words);
    if regions.iter().any(|region| ![SMALL_PAGE, LARGE_PAGE].contains(&region.page_size)) {
        return Err(invalid("invalid page size of private memory: expected 4 KiB or 2 MiB"));
    }
    for segment in segments {
        let region = regions.get(segment.region).ok_or_else(|| invalid("invalid segment: no such region"))?;
        let (first, end) = segment.extent();
        let whole = |value: u64| value.is_multiple_of(region.page_size as u64);
        let aligned = whole(segment.address) && whole(segment.len) && whole((first * SMALL_PAGE) as u64);
        if !aligned || end > region.pages {
            return Err(invalid("invalid segment: not whole pages of its region"));
        }
    }
    Ok(())
}

/// Opens the origin of the contents, and sets the deferred bitmap from the image if `begin` is [`Begin::Empty`].
fn source(from: Origin, begin: Begin, flags: &Flags) -> Result<PageSource, PagerError> {
    match from {
        Origin::Images(chain) => {
            let image = chain.nearest().page_map().len();
            if image != flags.pages() {
                return Err(PagerError::Regions { regions: flags.pages(), image });
            }
            if begin == Begin::Empty {
                mark(&chain, flags);
            }
            Ok(PageSource::Images(Blocks::new(chain)))
        }
        Origin::Peer(_) if begin == Begin::Empty => {
            Err(PagerError::Peer("cannot start from a peer without a deferred bitmap"))
        }
        Origin::Peer(link) => Ok(PageSource::Peer(Peer::new(taken(link)?))),
    }
}

/// Claims a connection for this pager. Fails if another pager has claimed it.
fn taken(link: Arc<PeerSource>) -> Result<Arc<PeerSource>, PagerError> {
    if link.take() { Ok(link) } else { Err(PagerError::Peer("connection is in use by another pager")) }
}
