//! Demand threads, which resolve the page faults of the workload. Of the threads of an address space, one waits for the
//! next fault, while the others resolve faults.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use parking_lot::Mutex;

use super::memory::{Installer, LoadError, Scratch};
use super::source::Loaded;
use super::{Failure, PagerState};
use crate::SMALL_PAGE;
use crate::faults::{BATCH, Event};
use crate::uapi::{self, Userfault};

/// Interval at which a waiting thread checks whether to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Number of faults after which a thread reads its CPU time.
const METERED: u32 = 64;

/// Userfaultfd, and the addresses of faults that were read from it and that no thread has taken.
#[derive(Debug)]
pub struct Inbox {
    uffd: Arc<Userfault>,
    waiting: Mutex<VecDeque<u64>>,
}

impl Inbox {
    pub fn new(uffd: Arc<Userfault>) -> Self {
        Self { uffd, waiting: Mutex::default() }
    }
}

/// Resolves the faults of one address space until the pager stops.
pub fn serve(shared: &PagerState, inbox: &Arc<Inbox>) {
    uapi::short_slices();
    let (mut scratch, mut events, mut cpu) = (Scratch::default(), Vec::new(), CpuMeter::default());
    while !shared.stopping() {
        let next = next(shared, inbox, &mut events);
        cpu.count(&shared.loader.memory.counters.demand_cpu, next.is_none());
        let Some(address) = next else { continue };
        let fault = Fault { inbox: inbox.clone(), address, begin: Instant::now() };
        if let Some(fault) = park(shared, fault) {
            resolve(shared, &fault, &mut scratch);
        }
    }
}

/// Fault that was read from a userfaultfd.
#[derive(Debug)]
pub struct Fault {
    inbox: Arc<Inbox>,
    address: u64,
    /// Time at which the fault was read.
    begin: Instant,
}

/// Resolves the faults whose contents have been fetched from a store, or could not be fetched, until the pager stops.
pub fn serve_parked(shared: &PagerState, parked: &Receiver<Fault>) {
    uapi::short_slices();
    let mut scratch = Scratch::default();
    while !shared.stopping() {
        let Ok(fault) = parked.recv_timeout(POLL_INTERVAL) else { continue };
        if let Some(fault) = park(shared, fault) {
            resolve(shared, &fault, &mut scratch);
        }
    }
}

/// Defers a fault whose contents have to be fetched from a store, so that no thread waits for them. Returns the fault
/// if it can be resolved at once.
fn park(shared: &PagerState, fault: Fault) -> Option<Fault> {
    let Some(parked) = &shared.parked else { return Some(fault) };
    let Some(page) = shared.page_at(&fault.inbox.uffd, fault.address) else { return Some(fault) };
    let (parked, later) = (parked.clone(), Fault { inbox: fault.inbox.clone(), ..fault });
    // The receiver is dropped when the pager has stopped.
    let notify = move || drop(parked.send(later));
    (!shared.loader.park(page, notify)).then_some(fault)
}

fn resolve(shared: &PagerState, fault: &Fault, scratch: &mut Scratch) {
    shared.demanding.fetch_add(1, Ordering::AcqRel);
    let loaded = answer(shared, &fault.inbox, fault.address, scratch);
    shared.demanding.fetch_sub(1, Ordering::AcqRel);
    // If the pages have been requested from the peer, the fault is counted when they are installed.
    if !matches!(loaded, Some(Loaded::Later)) {
        shared.loader.memory.counters.served(fault.begin.elapsed());
    }
    if let Some(Loaded::Rest(fetched)) = loaded {
        shared.queue_rest(fetched);
    }
}

/// Meter of the CPU time of one thread.
#[derive(Debug, Default)]
struct CpuMeter {
    /// Number of faults since the CPU time was last read, which takes a system call.
    faults: u32,
    /// CPU time in nanoseconds when it was last read.
    read: u64,
}

impl CpuMeter {
    /// Counts a fault, unless `idle` is true. Every `METERED` faults, and if `idle` is true, adds the CPU time since
    /// the last addition to `total`.
    fn count(&mut self, total: &AtomicU64, idle: bool) {
        self.faults += 1;
        if idle || self.faults >= METERED {
            let now = uapi::thread_cpu_time();
            total.fetch_add(now.saturating_sub(self.read), Ordering::Relaxed);
            (self.faults, self.read) = (0, now);
        }
    }
}

/// Returns the address of the next fault; `None` if there was no fault within `POLL_INTERVAL`. One thread holds the
/// lock and waits for events; the others wait for the lock.
fn next(shared: &PagerState, inbox: &Inbox, events: &mut Vec<Event>) -> Option<u64> {
    let mut waiting = inbox.waiting.lock();
    if waiting.is_empty() && inbox.uffd.wait(POLL_INTERVAL).ok()? {
        // Reading a removal event lets the removal proceed. No thread may write to the removed pages until the event
        // has been handled.
        let alone = shared.loader.memory.no_writes();
        events.clear();
        // See `removals`: the event must be available before the notifications of the file system are read, and no
        // further event may be read after them.
        let limit = if shared.loader.memory.removals.checked {
            if !inbox.uffd.wait(Duration::ZERO).ok()? {
                return None;
            }
            1
        } else {
            BATCH
        };
        shared.loader.memory.take_reports(&alone);
        if inbox.uffd.read(events, limit).is_err() {
            std::thread::sleep(POLL_INTERVAL);
        }
        let mut removed = Vec::new();
        for event in events.iter() {
            match *event {
                Event::Fault { address, protected: false } => waiting.push_back(address),
                Event::Fault { .. } => {}
                Event::Removal { start, end } => removed.extend(shared.pages_at(&inbox.uffd, start, end)),
            }
        }
        if !removed.is_empty() {
            shared.loader.memory.removed(removed);
        }
    }
    waiting.pop_front()
}

/// Loads and maps the page of a fault, or requests it from the peer. Returns `None` if no segment maps the address, or
/// if the page cannot be loaded. If the page cannot be loaded, records the failure, and poisons the page if `fatal` is
/// set.
fn answer(shared: &PagerState, inbox: &Inbox, address: u64, scratch: &mut Scratch) -> Option<Loaded> {
    let memory = &shared.loader.memory;
    memory.counters.faults.fetch_add(1, Ordering::Relaxed);
    let Some(page) = shared.page_at(&inbox.uffd, address) else {
        outside(shared, inbox, address);
        return None;
    };
    match shared.loader.touch(page, scratch) {
        Ok(loaded) => Some(loaded),
        // A pager that stops leaves the fault to the next pager.
        Err(LoadError::Exited | LoadError::Ended) => None,
        Err(LoadError::Removing) => {
            // The thread faults again, and the next read returns the event of the removal.
            let len = memory.regions[memory.region_of(page)].page_size as u64;
            let _ = inbox.uffd.wake(address / len * len, len);
            None
        }
        Err(error) => {
            let (region, base) = (memory.region_of(page), memory.regions[memory.region_of(page)].base);
            let failure = Failure { region, page: page - base, accessed: true, message: error.to_string() };
            let new = shared.fail(failure);
            if shared.fatal {
                if new {
                    eprintln!("pageferry: cannot read page {} of region {region}: {error}", page - base);
                }
                // `fatal` is set if no other process can stop the workload: the access must raise SIGBUS, because
                // blocking would never end and zeros would be wrong. UFFDIO_POISON fails with EAGAIN while a discard is
                // pending; the woken thread then faults again.
                let len = memory.regions[region].page_size as u64;
                let start = address / len * len;
                if inbox.uffd.poison(start, len).is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN)) {
                    let _ = inbox.uffd.wake(start, len);
                }
            }
            None
        }
    }
}

/// Handles a fault at an address that no segment maps. A thread of a workload that has registered more memory than it
/// has described would fault again for ever if it were woken, so it stays blocked, and the fault is a failure.
fn outside(shared: &PagerState, inbox: &Inbox, address: u64) {
    let memory = &shared.loader.memory;
    if matches!(memory.installer, Installer::Files(_)) {
        let _ = inbox.uffd.wake(address, SMALL_PAGE as u64);
        return;
    }
    let page = usize::try_from(address / SMALL_PAGE as u64).unwrap_or(usize::MAX);
    let message = format!("fault at address {address:#x}, outside the memory that the workload has described");
    shared.fail(Failure { region: memory.regions.len(), page, accessed: true, message });
}
