//! The pager (S10, S8): a workload runs at once; the contents of its pages come on access, from an image or a peer.
//!
//! ```text
//! access ─▶ userfaultfd ─▶ demand thread ─▶ page block of the page: read, verify, write, clear the flag, map
//!                               └─▶ rest thread: the other pages of the storage block
//!                       background thread: the working set, then everything else; gives way to demand
//! ```
//!
//! From a peer ([`Origin::Peer`], post-copy) the demand thread only asks: what is asked for, and everything else, comes
//! over streams whose threads install it the same way.
//!
//! The workload's mappings are registered for MISSING and MINOR faults, so that a page of the file that is not mapped
//! always traps, whether it is there or not. Contents go through our own mapping of the file; only then are they mapped
//! where the workload sees them (UFFDIO_CONTINUE). A large page of the file is allocated whole and mapped piece by
//! piece as its contents come; when everything is there the registration goes, and large pages are mapped as such.
//!
//! The flags live in a file: a pager that dies leaves the workload waiting at the next missing page, and another one
//! goes on from the flags ([`Begin::TakenOver`]). No thread here takes a lock that a faulting thread can hold.

mod background;
mod blocks;
mod demand;
mod evict;
mod flags;
mod hold;
mod memory;
mod peer;
mod plan;
mod register;
mod removals;
mod source;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use parking_lot::{Condvar, Mutex, RwLock};

use blocks::{Blocks, Fetched};
use demand::Inbox;
pub use flags::{Flags, file_len};
use hold::Held;
pub use memory::{Counters, LoadError};
use memory::{Memory, Region, Scratch, Watched};
use peer::Peer;
pub use plan::{Begin, Failure, Origin, PagerError, Plan};
use register::{mark, register};
use removals::Removals;
use source::Source;

use crate::pages::PageSet;
use crate::placer::Placer;
use crate::uapi::{self, Userfault};
use crate::wire::PeerSource;
use crate::{SLOTS, SMALL_PAGE};

/// Threads that answer accesses, for each address space.
const SERVERS: usize = 2;
/// Storage blocks whose rest may wait to be installed; the background reader sees to what is too many.
const MAX_REST: usize = 32;
/// From so many pages on, whole storage blocks are brought.
const MANY: usize = 1024;
/// Pages that are brought for others before it is looked whether all shall end.
const MOST: usize = 4096;
/// How often one looks whether everything is there: where it is being brought, and where only accesses bring it.
const SOON: Duration = Duration::from_millis(5);
const LATER: Duration = Duration::from_millis(50);
/// Failures that are kept: more of them say nothing new.
const MAX_FAILURES: usize = 64;

/// The features that a userfaultfd for the pager needs.
pub const FEATURES: u64 = uapi::FEATURE_MISSING_SHMEM
    | uapi::FEATURE_MISSING_HUGETLBFS
    | uapi::FEATURE_MINOR_SHMEM
    | uapi::FEATURE_MINOR_HUGETLBFS;
/// Those that others need who put write traces on by it ([`Pager::hold`]).
pub const TRACE_FEATURES: u64 = crate::trace::FEATURES;

#[derive(Debug)]
struct Shared {
    memory: Memory,
    stop: AtomicBool,
    /// Accesses that are being answered.
    demanding: AtomicUsize,
    rest: Mutex<Option<Sender<Fetched>>>,
    failures: Mutex<Vec<Failure>>,
    finished: (Mutex<bool>, Condvar),
    eager: bool,
    whole_blocks: bool,
    evicting: AtomicBool,
    fatal: bool,
    held: Mutex<Held>,
    /// Which units of each region stand on large pages when their contents are there.
    large: Vec<Vec<bool>>,
    /// Held by who brings pages for others; alone by who ends it: then nobody writes contents any more.
    bringing: RwLock<()>,
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn pages(&self) -> usize {
        self.memory.regions.iter().map(|region| region.mapping.pages()).sum()
    }

    /// Has the rest of a storage block installed, unless there is too much of that already.
    fn ask(&self, fetched: Fetched) {
        if !self.whole_blocks {
            return;
        }
        if let Some(rest) = self.rest.lock().as_ref()
            && let Source::Images(blocks) = &self.memory.source
            && !blocks.is_done(fetched.0)
        {
            let _ = rest.try_send(fetched);
        }
    }

    /// Notes a failure; false where it was known, and as much an access.
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
                }
                true
            }
        };
        drop(failures);
        self.finished.1.notify_all();
        new
    }

    /// The pages of an address space between two addresses, counted over all regions.
    fn pages_at(&self, uffd: &Arc<Userfault>, start: u64, end: u64) -> Vec<(usize, usize)> {
        let ours = self.memory.watched.iter().filter(|watched| Arc::ptr_eq(&watched.uffd, uffd));
        let part = |Watched { segment, .. }: &Watched| {
            let from = start.max(segment.address);
            let to = end.min(segment.address + segment.len);
            let base = self.memory.regions[segment.region].base;
            let pages = |(first, end)| (base + first, base + end);
            (from < to).then(|| pages(segment.pages(from, to)))
        };
        ours.filter_map(part).collect()
    }

    fn page_at(&self, uffd: &Arc<Userfault>, address: u64) -> Option<usize> {
        self.pages_at(uffd, address, address + SMALL_PAGE as u64).first().map(|&(first, _)| first)
    }

    /// Has all threads end.
    fn end(&self) {
        self.stop.store(true, Ordering::Release);
        if let Source::Peer(peer) = &self.memory.source {
            peer.link().cancel();
        }
    }

    /// Nothing traps any more.
    fn unregister(&self) {
        for Watched { segment, uffd } in &self.memory.watched {
            // An error is of a process that has ended.
            let _ = uffd.unregister(segment.address, segment.len);
        }
    }

    /// Everything is in memory: nothing traps any more, and large pages are mapped as such.
    fn finish(&self) {
        self.unregister();
        self.memory.removals.close();
        // A peer goes on to the end of what it has begun to push, and is listened to: what it says is known.
        self.stop.store(true, Ordering::Release);
        for (number, region) in
            self.memory.regions.iter().enumerate().filter(|(_, region)| region.page_size == SMALL_PAGE)
        {
            let large = region.mapping.large_units().unwrap_or_default();
            for (unit, _) in large.iter().enumerate().filter(|(_, large)| **large) {
                self.memory.map_large(number, unit * SLOTS);
            }
        }
        *self.finished.0.lock() = true;
        self.finished.1.notify_all();
    }
}

/// A pager at work. Dropping it before it is done leaves the workload waiting at the next missing page.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Of the connection to a peer.
    readers: Mutex<Vec<JoinHandle<()>>>,
    abandoned: AtomicBool,
}

impl Pager {
    /// Registers the workload's mappings, and answers their faults from now on. The files must hold nothing else than
    /// what [`Begin`] says.
    pub fn start(plan: Plan) -> Result<Self, PagerError> {
        let mut base = 0;
        let mut regions = Vec::new();
        for target in &plan.targets {
            regions.push(Region { mapping: target.mapping.clone(), page_size: target.page_size, base });
            base += target.mapping.pages();
        }
        let flags = plan.flags;
        if flags.pages() != base {
            let words = format!("flags of {} pages, and regions of {base}", flags.pages());
            return Err(PagerError::Io(io::Error::new(io::ErrorKind::InvalidInput, words)));
        }
        let source = match plan.from {
            Origin::Images(chain) => {
                let image = chain.nearest().page_map().len();
                if image != base {
                    return Err(PagerError::Regions { regions: base, image });
                }
                if plan.begin == Begin::Empty {
                    mark(&chain, &flags);
                }
                Source::Images(Blocks::new(chain))
            }
            Origin::Peer(_) if plan.begin == Begin::Empty => {
                return Err(PagerError::Peer("what is to come from a peer is not known: set the flags"));
            }
            Origin::Peer(link) => Source::Peer(Peer::new(taken(link)?)),
        };
        let segments = plan.watched.iter().map(|(segment, _)| segment.clone()).collect();
        let large = plan.targets.iter().map(|target| target.large.clone()).collect();
        let placer = Placer::new(plan.targets, segments, true, 0)?;
        let watched = plan.watched.into_iter().map(|(segment, uffd)| Watched { segment, uffd }).collect();
        let files = regions.iter().map(|region| region.mapping.file()).collect();
        let removals = Removals::new(plan.checks_removals.then_some(files))?;
        let memory = Memory::new(regions, watched, flags, source, placer, removals);
        register(&memory, plan.begin)?;
        memory.removals.forget_reports();
        let (ask, jobs) = bounded(MAX_REST);
        let shared = Arc::new(Shared {
            memory,
            stop: AtomicBool::new(false),
            demanding: AtomicUsize::new(0),
            rest: Mutex::new(Some(ask)),
            failures: Mutex::default(),
            finished: (Mutex::new(false), Condvar::new()),
            eager: plan.eager,
            whole_blocks: plan.whole_blocks,
            evicting: AtomicBool::new(plan.evicting),
            fatal: plan.fatal,
            held: Mutex::new(Held::No),
            large,
            bringing: RwLock::default(),
        });
        let abandoned = AtomicBool::new(false);
        let pager = Self { shared: shared.clone(), threads: Mutex::default(), readers: Mutex::default(), abandoned };
        pager.spawn_readers()?;
        pager.spawn_servers()?;
        if plan.begin == Begin::TakenOver {
            // Of who held the pager before us. Not earlier: while a discard waits to be read, it cannot be done.
            hold::unprotect(&shared.memory);
        }
        let rest = shared.clone();
        pager.spawn("pf-rest", move || background::install_rest(&rest, &jobs))?;
        let (set, everything) = (plan.working_set, plan.background);
        pager.spawn("pf-fill", move || {
            background::fill(&shared, &set, everything);
            let unfinished =
                || shared.is_held() || shared.evicting.load(Ordering::Acquire) || shared.memory.flags.any();
            while !shared.stopping() && (unfinished() || !shared.may_end()) {
                shared.memory.take_reports();
                std::thread::sleep(if everything { SOON } else { LATER });
            }
            if !shared.stopping() {
                shared.finish();
            }
        })?;
        Ok(pager)
    }

    fn spawn_servers(&self) -> io::Result<()> {
        let mut known: Vec<Arc<Userfault>> = Vec::new();
        for Watched { uffd, .. } in &self.shared.memory.watched {
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

    /// A thread for each stream of the connection to a peer.
    fn spawn_readers(&self) -> io::Result<()> {
        let Source::Peer(peer) = &self.shared.memory.source else { return Ok(()) };
        let link = peer.link();
        for stream in 0..link.streams() {
            let (shared, link) = (self.shared.clone(), link.clone());
            let thread = std::thread::Builder::new().name(format!("pf-peer{stream}"));
            let thread = thread.spawn(move || peer::receive(&shared, &link, stream))?;
            self.readers.lock().push(thread);
        }
        Ok(())
    }

    /// Goes on over another connection to the peer; what accesses wait for is asked for again.
    ///
    /// # Errors
    /// [`PagerError::Peer`] for a pager of images, and for a connection that another pager has.
    pub fn reconnect(&self, link: Arc<PeerSource>) -> Result<(), PagerError> {
        let Source::Peer(peer) = &self.shared.memory.source else {
            return Err(PagerError::Peer("there is no peer: contents come from images"));
        };
        let link = taken(link)?;
        peer.link().cancel();
        self.join_readers();
        peer.reconnect(&self.shared.memory, link.clone());
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

    /// Pages whose contents are still to come.
    pub fn pending(&self) -> usize {
        self.shared.memory.flags.count()
    }

    /// Those of a region.
    pub fn missing(&self, region: usize) -> Option<PageSet> {
        let found = self.shared.memory.regions.get(region)?;
        Some(self.shared.memory.flags.set_in(found.base, found.base + found.mapping.pages()))
    }

    /// What has been done so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.memory.counters
    }

    /// Bytes of storage blocks read so far; of a peer, over the last connection.
    pub fn bytes_read(&self) -> u64 {
        match &self.shared.memory.source {
            Source::Images(blocks) => blocks.bytes_read(),
            Source::Peer(peer) => peer.link().progress().bytes.load(Ordering::Relaxed),
        }
    }

    /// Windows of 16 pages in the order in which the workload first missed them.
    pub fn touched(&self) -> Vec<u32> {
        self.shared.memory.touched.lock().clone()
    }

    /// Pages that could not be had.
    pub fn failures(&self) -> Vec<Failure> {
        self.shared.failures.lock().clone()
    }

    /// Whether everything is in memory and the workload is on its own.
    pub fn is_finished(&self) -> bool {
        *self.shared.finished.0.lock()
    }

    /// Waits until it is finished, or something has failed that had not (`known` failures), or for so long.
    pub fn wait(&self, patience: Duration, known: usize) -> bool {
        let deadline = Instant::now() + patience;
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

    /// Brings pages of a region into memory, for who reads them past the workload's page tables (S8).
    pub fn ensure(&self, region: usize, first: usize, count: usize) -> Result<(), LoadError> {
        let Some(found) = self.shared.memory.regions.get(region) else { return Ok(()) };
        let pages = found.mapping.pages();
        let (start, end) = (found.base + first.min(pages), found.base + first.saturating_add(count).min(pages));
        let (memory, mut scratch) = (&self.shared.memory, Scratch::default());
        let _bringing = self.shared.bringing.read();
        for first in (start..end).step_by(MOST) {
            let last = end.min(first + MOST);
            // The next pager may be at it already: what we wrote now could be late.
            if self.shared.stopping() && memory.flags.next(first, last).is_some() {
                return Err(LoadError::Ended);
            }
            if last - first < MANY {
                memory.load(first, last, &mut scratch)?;
            } else {
                memory.load_many(first, last, &mut scratch)?;
            }
        }
        Ok(())
    }

    /// Which 2 MiB units of a region stand on large pages when their contents are there.
    pub fn large(&self, region: usize) -> &[bool] {
        self.shared.large.get(region).map_or(&[], Vec::as_slice)
    }

    /// Maps what is in memory already: large pages of which nothing is missing as such, the rest page by page (S1). For
    /// a workload that is about to run on memory that was kept.
    pub fn populate(&self) -> io::Result<()> {
        (0..self.shared.memory.regions.len()).try_for_each(|region| self.shared.memory.populate(region))
    }

    /// Lets pages of a region go whose contents stand in the chain: from here on an access brings them back. Everything
    /// else of their 2 MiB units stays, and is mapped as small pages. Returns how many pages were let go.
    ///
    /// Nobody may have written to the pages since they were stored, and the workload is paused.
    ///
    /// # Errors
    /// When the workload maps memory though it should be paused, its mappings cannot be worked on, or the plan did not
    /// say so. Pages that have been let go stay so; all others are where they were.
    pub fn evict(&self, region: usize, pages: &PageSet) -> Result<usize, PagerError> {
        if !self.shared.evicting.load(Ordering::Acquire) {
            return Err(PagerError::Io(io::Error::new(io::ErrorKind::InvalidInput, "this pager lets nothing go")));
        }
        evict::evict(&self.shared.memory, region, pages)
    }

    /// Nothing more is let go: it finishes when everything is back.
    pub fn evicted(&self) {
        self.shared.evicting.store(false, Ordering::Release);
    }

    /// Ends all threads. What is missing stays missing: accesses wait for the next pager.
    pub fn stop(&self) {
        self.shared.end();
        drop(self.shared.rest.lock().take());
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join();
        }
        self.join_readers();
        drop(self.shared.bringing.write());
    }

    /// Ends all threads for a workload that will never run on this memory: whoever still waits for a page goes on, and
    /// finds zeros where contents are missing.
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
            // The last reference to a userfaultfd takes its registrations along, and missing pages would read as zeros.
            self.shared.memory.watched.iter().for_each(|watched| std::mem::forget(watched.uffd.clone()));
        }
    }
}

/// A connection that no other pager has.
fn taken(link: Arc<PeerSource>) -> Result<Arc<PeerSource>, PagerError> {
    if link.take() { Ok(link) } else { Err(PagerError::Peer("another pager has this connection")) }
}
