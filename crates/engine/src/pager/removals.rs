//! Removals of deferred pages: discards, after which pages are zeros, and mere unmapping.
//!
//! The kernel reports MADV_DONTNEED and MADV_REMOVE with the same event, before it performs the operation. The calling
//! thread waits only until the event has been read. For shared memory, MADV_DONTNEED only unmaps pages and keeps their
//! contents, whereas MADV_REMOVE punches a hole into the file. If the pages are deferred, the file does not show the
//! difference, because it already has a hole at these pages. However, the file system reports every punched hole
//! (inotify, IN_MODIFY) before the call returns.
//!
//! A removal of deferred pages is therefore *open* at first. The pager waits until an event is available, reads the
//! notifications of the file system, and then reads this one event. If the event is a removal, the thread that makes the
//! call has returned from its earlier calls, whose notifications have therefore been read. A notification that is sent
//! later belongs to this removal or to a later one. The pager resolves an open removal
//!
//! - as a discard, if there is a notification: its pages are zeros;
//! - as MADV_DONTNEED, if the event of the next removal is read first: a thread makes one such call at a time, so its
//!   earlier call has returned without a notification;
//! - before contents are written to its pages: as a discard if there is a notification, otherwise as MADV_DONTNEED. The
//!   pager waits until [`GRACE`] has passed since the event was read, because the call may be running until then.
//!
//! These rules are exact if only one thread removes pages. The kernel does not report which of several threads has
//! punched a hole. If a thread removes pages before the notification of another thread's MADV_REMOVE is sent, the
//! notification counts for the later removal. For a guest, the distinction is not required: QEMU punches holes before
//! it unmaps pages, so each removal is a discard.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::hole_notifications::Discards;

/// Maximum time between the removal event of a call and the file system's notification of the same call.
const GRACE: Duration = Duration::from_millis(10);

/// Page runs removed together, and the time at which their events were read.
#[derive(Debug)]
struct Removed {
    runs: Vec<(usize, usize)>,
    read: Instant,
}

/// Removals that have not been resolved.
#[derive(Debug)]
pub struct Removals {
    /// Whether removals are checked; if false, every removal counts as a discard.
    pub checked: bool,
    /// Inotify watch that reports punched holes; `None` if removals are not checked, or once no page is deferred.
    watch: Mutex<Option<Discards>>,
    open: Mutex<Option<Removed>>,
    any: AtomicBool,
}

impl Removals {
    /// Starts to watch `files`, the files in which removals must be checked; `None` if removals need not be checked.
    /// Fails if the files cannot be watched.
    pub fn new(files: Option<Vec<RawFd>>) -> io::Result<Self> {
        let watch = files.map(|files| Discards::watch(files.into_iter())).transpose().map_err(|error| {
            let words = format!("cannot watch memory for discards: {error}; raise fs.inotify.max_user_instances");
            io::Error::other(words)
        })?;
        let checked = watch.is_some();
        Ok(Self { checked, watch: Mutex::new(watch), open: Mutex::default(), any: AtomicBool::new(false) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Removed>> {
        self.open.lock()
    }

    /// Returns true if a hole was punched since the last call, or if the notifications cannot be read.
    fn punched(&self) -> bool {
        let watch = self.watch.lock();
        watch.as_ref().is_some_and(|watch| watch.seen().unwrap_or(true))
    }

    fn set(&self, open: &mut Option<Removed>, removed: Option<Removed>) {
        self.any.store(removed.is_some(), Ordering::Release);
        *open = removed;
    }

    /// Clears the notifications that the pager itself has caused.
    pub fn forget_reports(&self) {
        let _ = self.punched();
    }

    /// Closes the watch. Must not be called while a page is deferred.
    pub fn close(&self) {
        drop(self.watch.lock().take());
    }

    /// Resolves the open removal as a discard, through `discard`, if a hole was punched.
    pub fn take_reports(&self, discard: impl FnOnce(&[(usize, usize)])) {
        let mut open = self.lock();
        if self.punched()
            && let Some(removed) = open.as_ref()
        {
            discard(&removed.runs);
            self.set(&mut open, None);
        }
    }

    /// Records the removal of `runs` as open; `None` if the removal affects no deferred pages. Resolves the previous
    /// open removal as mere unmapping.
    pub fn record(&self, runs: Option<Vec<(usize, usize)>>) {
        let removed = runs.map(|runs| Removed { runs, read: Instant::now() });
        self.set(&mut self.lock(), removed);
    }

    /// Resolves the open removal if it overlaps `[first, end)`; may wait for up to `GRACE`. If a hole was punched,
    /// calls `discard` before the removal counts as resolved.
    pub fn decide(&self, first: usize, end: usize, discard: impl FnOnce(&[(usize, usize)])) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut open = self.lock();
        let Some(removed) = open.as_ref() else { return };
        if !removed.runs.iter().any(|&(start, stop)| start < end && first < stop) {
            return;
        }
        thread::sleep(GRACE.saturating_sub(removed.read.elapsed()));
        if self.punched() {
            discard(&removed.runs);
        }
        self.set(&mut open, None);
    }
}
