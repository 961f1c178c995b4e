//! Pager of a base: resolves the faults of all clones that map the base.
//!
//! ```text
//! access to a hole ─▶ userfaultfd of the clone ─▶ serving thread: load the unit into the base, wake the clone
//!                                                 fill thread: the working set, then all units
//!                                                 retry thread: units that could not be loaded
//! ```
//!
//! The mappings of the clones are registered for MISSING faults only, so a page that the base contains is mapped by the
//! kernel, without an event. The pager neither writes through a mapping of the base nor maps pages of the base: a woken
//! thread accesses the page again. Units of zeros stay holes of the base; for these, the pager maps zeros in the clone.
//!
//! A unit that cannot be loaded is recorded. The kernel reports each fault only once, so the thread that later loads
//! the unit wakes all clones.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::{Mutex, RwLock};

use super::base_fill::{BaseFile, FillScratch, UnitState};
use super::config::FillOrder;
use super::memory::WINDOW;
use crate::image::request_in_background;
use crate::segment::Segment;
use crate::uapi::{self, Userfault, check, owned};
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Minimum and maximum number of threads that resolve faults, for all clones together.
const SERVERS: (usize, usize) = (2, 8);
/// Interval in milliseconds at which a waiting thread checks whether to stop.
const POLL_INTERVAL: libc::c_int = 100;
/// The same interval for a thread that waits for parked faults.
const RECEIVE_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum pause of the fill thread while faults are being resolved.
const MAX_PAUSE: Duration = Duration::from_millis(16);
/// Maximum number of reported failures.
const MAX_FAILURES: usize = 64;
/// Interval of attempts to load the units that could not be loaded.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of failed attempts per interval: storage that does not respond must not be flooded.
const MAX_RETRIES: usize = 64;

/// Counters of one clone.
#[derive(Debug, Default)]
pub struct BaseCounters {
    /// Number of faults.
    pub faults: AtomicU64,
    /// Number of faults for which a unit was loaded.
    pub missed: AtomicU64,
    /// Number of faults on units of zeros.
    pub zeros: AtomicU64,
    /// Total service time of all faults in nanoseconds.
    pub service: AtomicU64,
    /// Longest service time of a fault in nanoseconds.
    pub longest: AtomicU64,
}

/// Unit that could not be loaded.
#[derive(Debug, Clone)]
pub struct BaseFailure {
    /// Index of the unit in the base.
    pub unit: usize,
    /// Cause.
    pub message: String,
}

#[derive(Debug)]
struct Served {
    uffd: Userfault,
    segments: Vec<Segment>,
    counters: BaseCounters,
}

/// Fault of a clone.
#[derive(Debug, Clone)]
struct Fault {
    clone: Arc<Served>,
    address: u64,
    /// Time at which the fault was read.
    begin: Instant,
}

#[derive(Debug)]
struct Shared {
    base: BaseFile,
    /// Queue of faults whose contents have been fetched from a store; `None` if the files of the images are complete.
    parked: Option<Sender<Fault>>,
    clones: RwLock<HashMap<u64, Arc<Served>>>,
    epoll: OwnedFd,
    stop: AtomicBool,
    /// Number of faults being resolved.
    demanding: AtomicUsize,
    prefetched: AtomicU64,
    /// Units that could not be loaded, with the cause of the last attempt.
    failures: Mutex<BTreeMap<usize, String>>,
}

/// Pager of a base and its clones.
#[derive(Debug)]
pub struct BasePager {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    next: AtomicU64,
}

impl BasePager {
    /// Starts the threads that resolve the faults of clones.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(base: BaseFile) -> io::Result<Self> {
        // SAFETY: epoll_create1 takes no pointers; the descriptor it returns is new and has no other owner.
        let epoll = unsafe { owned(libc::c_long::from(libc::epoll_create1(libc::EPOLL_CLOEXEC))) }?;
        let (parked, ready) = unbounded();
        let supplied = base.blocks().supply().is_some();
        let shared = Arc::new(Shared {
            base,
            parked: supplied.then_some(parked),
            clones: RwLock::default(),
            epoll,
            stop: AtomicBool::new(false),
            demanding: AtomicUsize::new(0),
            prefetched: AtomicU64::new(0),
            failures: Mutex::default(),
        });
        let pager = Self { shared, threads: Mutex::default(), next: AtomicU64::new(1) };
        let count = std::thread::available_parallelism().map_or(1, usize::from).clamp(SERVERS.0, SERVERS.1);
        for _ in 0..count {
            let shared = pager.shared.clone();
            pager.spawn("pf-clones", move || shared.serve())?;
        }
        for _ in 0..if supplied { SERVERS.0 } else { 0 } {
            let (shared, ready) = (pager.shared.clone(), ready.clone());
            pager.spawn("pf-parked", move || shared.serve_parked(&ready))?;
        }
        let shared = pager.shared.clone();
        pager.spawn("pf-retry", move || shared.retry())?;
        Ok(pager)
    }

    fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work)?;
        self.threads.lock().push(thread);
        Ok(())
    }

    /// Resolves the faults of a clone from now on. Wakes the threads whose faults another pager has read. Returns the
    /// number of the clone.
    ///
    /// # Errors
    /// If the userfaultfd cannot be waited for, or a segment maps pages that do not exist.
    pub fn add(&self, uffd: Userfault, segments: Vec<Segment>) -> io::Result<u64> {
        let fits = |one: &Segment| {
            let pages = self.shared.base.regions().get(one.region).map_or(0, |region| region.pages);
            one.extent().1 <= pages
        };
        if !segments.iter().all(fits) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "segment does not match the regions of the base"));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let clone = Arc::new(Served { uffd, segments, counters: BaseCounters::default() });
        self.shared.clones.write().insert(number, clone.clone());
        let events = (libc::EPOLLIN | libc::EPOLLEXCLUSIVE).cast_unsigned();
        let mut event = libc::epoll_event { events, u64: number };
        let (epoll, fd) = (self.shared.epoll.as_raw_fd(), clone.uffd.as_raw_fd());
        // SAFETY: the event lives through the call, and both descriptors are open.
        if let Err(error) = check(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) }) {
            self.remove(number);
            return Err(error);
        }
        for segment in &clone.segments {
            let _ = clone.uffd.wake(segment.address, segment.len);
        }
        Ok(number)
    }

    /// Stops resolving the faults of a clone, such as one that has exited.
    pub fn remove(&self, number: u64) {
        if let Some(clone) = self.shared.clones.write().remove(&number) {
            let (epoll, fd) = (self.shared.epoll.as_raw_fd(), clone.uffd.as_raw_fd());
            // SAFETY: EPOLL_CTL_DEL ignores the event, and both descriptors are open. The call fails only if `add` has
            // failed.
            unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
        }
    }

    /// Returns the result of `read` for the counters of a clone; `None` if there is no such clone.
    pub fn counters<T>(&self, number: u64, read: impl FnOnce(&BaseCounters) -> T) -> Option<T> {
        self.shared.clones.read().get(&number).map(|clone| read(&clone.counters))
    }

    /// Starts to load all units in the background, those of the windows of `order` first. `eager`: with one thread per
    /// core, up to 8, and without yielding to faults.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn fill(&self, order: &FillOrder, eager: bool) -> io::Result<()> {
        let base = &self.shared.base;
        let mut known = vec![false; base.units()];
        let first = order.windows.iter().filter_map(|&window| base.unit_of(window as usize * WINDOW));
        let units: Vec<usize> =
            first.chain(0..base.units()).filter(|&unit| !std::mem::replace(&mut known[unit], true)).collect();
        base.prefetch(&units);
        let work = Arc::new((AtomicUsize::new(0), units));
        let cores = std::thread::available_parallelism().map_or(1, usize::from).min(SERVERS.1);
        for _ in 0..if eager { cores } else { 1 } {
            let (shared, work) = (self.shared.clone(), work.clone());
            self.spawn("pf-fill", move || shared.fill(&work.0, &work.1, eager))?;
        }
        Ok(())
    }

    /// Loads the units `first..end`, unless they are loaded, and returns when they are.
    ///
    /// # Errors
    /// The first unit that cannot be loaded. The other units may be missing.
    pub fn ensure(&self, first: usize, end: usize) -> Result<(), BaseFailure> {
        let mut scratch = FillScratch::default();
        let end = end.min(self.shared.base.units());
        self.shared.base.request(first..end);
        for unit in first..end {
            if self.shared.load(unit, &mut scratch).is_none() {
                let cause = self.shared.failures.lock().get(&unit).cloned();
                // If there is no cause, another thread has loaded the unit after this attempt.
                cause.map_or(Ok(()), |message| Err(BaseFailure { unit, message }))?;
            }
        }
        Ok(())
    }

    /// Returns the number of units that are not loaded.
    pub fn holes(&self) -> usize {
        self.shared.base.holes()
    }

    /// Returns the number of units loaded in the background.
    pub fn prefetched(&self) -> u64 {
        self.shared.prefetched.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes of storage blocks read.
    pub fn bytes_read(&self) -> u64 {
        self.shared.base.bytes_read()
    }

    /// Returns units that could not be loaded, at most `MAX_FAILURES`. A unit that is loaded later is removed.
    pub fn failures(&self) -> Vec<BaseFailure> {
        let failures = self.shared.failures.lock();
        let plain = |(&unit, message): (&usize, &String)| BaseFailure { unit, message: message.clone() };
        failures.iter().take(MAX_FAILURES).map(plain).collect()
    }

    /// Stops all threads. Accesses to holes then wait until another pager takes over.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.base.blocks().stop();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Drop for BasePager {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Resolves faults of all clones until the pager stops.
    fn serve(&self) {
        uapi::short_slices();
        let mut scratch = FillScratch::default();
        while !self.stopping() {
            let Some(clone) = self.next() else { continue };
            if let Ok(Some(address)) = clone.uffd.read_fault() {
                clone.counters.faults.fetch_add(1, Ordering::Relaxed);
                self.park_or_answer(Fault { clone, address, begin: Instant::now() }, &mut scratch);
            }
        }
    }

    /// Resolves the faults whose contents have been fetched from a store, or could not be fetched, until the pager
    /// stops.
    fn serve_parked(&self, parked: &Receiver<Fault>) {
        uapi::short_slices();
        let mut scratch = FillScratch::default();
        while !self.stopping() {
            if let Ok(fault) = parked.recv_timeout(RECEIVE_INTERVAL) {
                self.park_or_answer(fault, &mut scratch);
            }
        }
    }

    /// Resolves a fault, or defers it if its contents have to be fetched from a store, so that no thread waits.
    fn park_or_answer(&self, fault: Fault, scratch: &mut FillScratch) {
        if let Some(parked) = &self.parked
            && let Some((unit, ..)) = self.unit_at(&fault.clone, fault.address)
        {
            let (parked, later) = (parked.clone(), fault.clone());
            // The receiver is dropped when the pager has stopped.
            if self.base.park(unit, move || drop(parked.send(later))) {
                return;
            }
        }
        self.demanding.fetch_add(1, Ordering::AcqRel);
        self.answer(&fault.clone, fault.address, scratch);
        self.demanding.fetch_sub(1, Ordering::AcqRel);
        let time = u64::try_from(fault.begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        fault.clone.counters.service.fetch_add(time, Ordering::Relaxed);
        fault.clone.counters.longest.fetch_max(time, Ordering::Relaxed);
    }

    /// Returns the unit at an address of a clone, and the address and length of its part of the segment.
    fn unit_at(&self, clone: &Served, address: u64) -> Option<(usize, u64, u64)> {
        let segment = clone.segments.iter().find(|one| (one.address..one.address + one.len).contains(&address))?;
        let region = self.base.regions()[segment.region];
        let page = segment.pages(address, address).0;
        let unit = region.first_unit + page * SMALL_PAGE / LARGE_PAGE;
        let (first, end) = region.pages_of(unit);
        segment.part(first, end).map(|(start, len)| (unit, start, len))
    }

    /// Waits for a clone with a fault. Returns `None` after `POLL_INTERVAL`.
    fn next(&self) -> Option<Arc<Served>> {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: the buffer has space for the one event that is requested, and lives through the call.
        let found = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), &raw mut event, 1, POLL_INTERVAL) };
        let number = event.u64;
        if found == 1 { self.clones.read().get(&number).cloned() } else { None }
    }

    /// Makes the page of a fault available, and wakes the thread that waits for it. If the page cannot be loaded, the
    /// thread continues to wait, until another attempt loads the page: it must not read zeros.
    fn answer(&self, clone: &Served, address: u64, scratch: &mut FillScratch) {
        let Some((unit, start, len)) = self.unit_at(clone, address) else {
            if !clone.segments.iter().any(|one| (one.address..one.address + one.len).contains(&address)) {
                let _ = clone.uffd.wake(address, SMALL_PAGE as u64);
            }
            return;
        };
        if self.base.state(unit) == UnitState::Zero {
            clone.counters.zeros.fetch_add(1, Ordering::Relaxed);
            // This fails only for a process that has exited.
            let _ = clone.uffd.map_zeros(start, len);
            return;
        }
        if let Some(loaded) = self.load(unit, scratch) {
            clone.counters.missed.fetch_add(u64::from(loaded), Ordering::Relaxed);
            let _ = clone.uffd.wake(start, len);
        }
    }

    /// Loads a unit, unless it is loaded. Returns whether this call has loaded it; `None` if it cannot be loaded. Wakes
    /// all clones if an earlier attempt has failed, because threads of each clone may wait for the unit.
    fn load(&self, unit: usize, scratch: &mut FillScratch) -> Option<bool> {
        let loaded = match self.base.fill(unit, scratch) {
            Ok(loaded) => Some(loaded),
            Err(error) => {
                self.failures.lock().insert(unit, error.to_string());
                // The unit may have been loaded before the failure was recorded. Its loader has then woken no clone.
                (self.base.state(unit) != UnitState::Hole).then_some(false)
            }
        };
        if loaded.is_some() && self.failures.lock().remove(&unit).is_some() {
            self.wake_all(unit);
        }
        loaded
    }

    /// Wakes the threads of all clones that wait for a unit.
    fn wake_all(&self, unit: usize) {
        let clones: Vec<_> = self.clones.read().values().cloned().collect();
        for clone in clones {
            for segment in &clone.segments {
                let region = self.base.regions()[segment.region];
                if !region.contains(unit) {
                    continue;
                }
                let (first, end) = region.pages_of(unit);
                if let Some((start, len)) = segment.part(first, end) {
                    let _ = clone.uffd.wake(start, len);
                }
            }
        }
    }

    /// Retries the units that could not be loaded, until the pager stops, because a cause such as a lack of memory may
    /// disappear.
    fn retry(&self) {
        let (mut scratch, mut next) = (FillScratch::default(), 0);
        while !self.stopping() {
            std::thread::park_timeout(RETRY_INTERVAL);
            let failed: Vec<usize> = {
                let failures = self.failures.lock();
                failures.range(next..).chain(failures.range(..next)).map(|(&unit, _)| unit).collect()
            };
            let mut left = MAX_RETRIES;
            for unit in failed {
                if left == 0 || self.stopping() {
                    break;
                }
                left -= usize::from(self.load(unit, &mut scratch).is_none());
                next = unit + 1;
            }
        }
    }

    /// Loads units until none is left in the order, or the pager is stopped.
    fn fill(&self, next: &AtomicUsize, units: &[usize], eager: bool) {
        request_in_background();
        let (mut scratch, mut pause) = (FillScratch::default(), Duration::ZERO);
        while let Some(&unit) = units.get(next.fetch_add(1, Ordering::Relaxed)).filter(|_| !self.stopping()) {
            if self.base.state(unit) != UnitState::Hole {
                continue;
            }
            if let Some(loaded) = self.load(unit, &mut scratch) {
                self.prefetched.fetch_add(u64::from(loaded), Ordering::Relaxed);
            }
            let busy = self.demanding.load(Ordering::Acquire) > 0;
            pause = if busy { (pause * 2).clamp(Duration::from_millis(1), MAX_PAUSE) } else { Duration::ZERO };
            if !eager {
                std::thread::sleep(pause);
            }
        }
    }
}
