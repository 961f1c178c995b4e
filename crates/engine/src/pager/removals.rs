//! Removals of pages whose contents are deferred: are they zeros from now on, or not?
//!
//! The kernel reports MADV_DONTNEED and MADV_REMOVE by the same event, before it does either, and the caller waits only
//! until the event has been read. Of shared memory the first only unmaps pages: their contents stay. The second punches
//! a hole into the file. Afterwards both look the same where contents are deferred, because the file has a hole there
//! anyway. But the file system reports every hole that is punched (inotify, IN_MODIFY), and it does so before the call
//! returns.
//!
//! So a removal of deferred pages is *open* at first. Before each read of events the reports of the file system are
//! taken: one that comes later is of the removals read then, or of later ones. An open removal is decided
//!
//! - as a discard, by a report: its pages are zeros;
//! - as MADV_DONTNEED, when the next removal is read without a report: a thread makes one such call after the other;
//! - by an access, or when contents come, after [`GRACE`]: until then the call may be at work.
//!
//! Threads that remove parts of the same memory at the same moment are decided together. A guest needs none of this: QEMU
//! punches first, and unmaps then, so each removal is a discard.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::memory::Memory;
use crate::discards::Discards;

/// How long a call may take from the event that announces it to the report of its end.
const GRACE: Duration = Duration::from_millis(10);

/// Runs of pages that were removed together, and when that was read.
#[derive(Debug)]
struct Removed {
    runs: Vec<(usize, usize)>,
    read: Instant,
}

/// What is known of removals that are not decided.
#[derive(Debug)]
pub struct Removals {
    /// Whether removals are checked; else each is a discard.
    checked: bool,
    /// Until nothing is deferred.
    watch: Mutex<Option<Discards>>,
    open: Mutex<Option<Removed>>,
    any: AtomicBool,
}

impl Removals {
    /// `files`: those whose removals must be checked.
    pub fn new(files: Option<Vec<RawFd>>) -> io::Result<Self> {
        let watch = files.map(|files| Discards::watch(files.into_iter())).transpose().map_err(|error| {
            let words = format!("memory cannot be watched for discards ({error}): raise fs.inotify.max_user_instances");
            io::Error::other(words)
        })?;
        let checked = watch.is_some();
        Ok(Self { checked, watch: Mutex::new(watch), open: Mutex::default(), any: AtomicBool::new(false) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Removed>> {
        self.open.lock()
    }

    /// Whether a hole was punched since the last call. What cannot be read is taken for one.
    fn punched(&self) -> bool {
        let watch = self.watch.lock();
        watch.as_ref().is_some_and(|watch| watch.seen().unwrap_or(true))
    }

    fn set(&self, open: &mut Option<Removed>, removed: Option<Removed>) {
        self.any.store(removed.is_some(), Ordering::Release);
        *open = removed;
    }

    /// Reports that our own work caused are of no removal.
    pub fn forget_reports(&self) {
        let _ = self.punched();
    }

    /// Nothing is deferred any longer.
    pub fn close(&self) {
        drop(self.watch.lock().take());
    }
}

impl Memory {
    /// Before events are read: decides a removal that has been reported. `removing` is held alone.
    pub fn take_reports(&self) {
        let removals = &self.removals;
        let mut open = removals.lock();
        if removals.punched()
            && let Some(removed) = open.as_ref()
        {
            self.discard_all(&removed.runs);
            removals.set(&mut open, None);
        }
    }

    /// After removals were read. `removing` is held alone.
    pub fn removed(&self, runs: Vec<(usize, usize)>) {
        if !self.removals.checked {
            return self.discard_all(&runs);
        }
        let deferred = runs.iter().any(|&(first, end)| self.flags.next(first, end).is_some());
        let removed = deferred.then(|| Removed { runs, read: Instant::now() });
        self.removals.set(&mut self.removals.lock(), removed);
    }

    /// Before contents of pages are written: decides an open removal of them.
    pub fn decide(&self, first: usize, end: usize) {
        let removals = &self.removals;
        if !removals.any.load(Ordering::Acquire) {
            return;
        }
        let mut open = removals.lock();
        let Some(removed) = open.as_ref() else { return };
        if !removed.runs.iter().any(|&(start, stop)| start < end && first < stop) {
            return;
        }
        thread::sleep(GRACE.saturating_sub(removed.read.elapsed()));
        if removals.punched() {
            self.discard_all(&removed.runs);
        }
        removals.set(&mut open, None);
    }

    fn discard_all(&self, runs: &[(usize, usize)]) {
        runs.iter().for_each(|&(first, end)| self.discard(first, end));
    }
}
