//! State shared by the threads of a checkpoint: blocks, protections, first error and counters.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::SaveError;
use super::armed::{Armed, TraceHandover, is_gone, within};
use super::staging::Staging;
use super::trap_blocks::{Area, RELEASED, UNSAVED};
use crate::hole_notifications::Discards;
use crate::image::PageEntry;

/// Counters of a checkpoint.
#[derive(Debug, Default)]
pub struct Stats {
    /// Number of traps after the snapshot point.
    pub traps: AtomicU64,
    /// Number of traps before the snapshot point. Their blocks were only unprotected and recorded.
    pub early_traps: AtomicU64,
    /// Number of blocks copied by the sweep.
    pub swept: AtomicU64,
    /// Number of traps that waited for a staging slot.
    pub staging_waits: AtomicU64,
    /// Longest service time of a trap in nanoseconds.
    pub longest_trap: AtomicU64,
    /// Total service time of all traps in nanoseconds.
    pub trap_time: AtomicU64,
    /// Number of present pages that have been classified.
    pub pages: AtomicU64,
    /// Number of pages of each [`Class`](crate::block::Class), indexed by the number of the class. Pages whose contents
    /// are in the parent image are not included.
    pub classes: [AtomicU64; 5],
    /// Number of pages whose contents are in the parent image.
    pub in_parent: AtomicU64,
    /// Number of bytes of storage blocks written.
    pub stored: AtomicU64,
    /// Number of storage blocks written.
    pub blocks: AtomicU64,
    /// Number of write calls.
    pub writes: AtomicU64,
    /// Number of pages reported by the trace; a page may be counted more than once.
    pub written: AtomicU64,
}

impl Stats {
    pub(super) fn trap(&self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.traps.fetch_add(1, Ordering::Relaxed);
        self.trap_time.fetch_add(time, Ordering::Relaxed);
        self.longest_trap.fetch_max(time, Ordering::Relaxed);
    }

    pub(super) fn count(&self, entry: &PageEntry) {
        let counter = match entry.class() {
            _ if entry.in_parent() => &self.in_parent,
            Some(class) => &self.classes[class as usize],
            None => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Replaces the counts of pages by those of the final page map. The counts so far may include a page more than once
    /// or not at all.
    pub(super) fn recount(&self, page_map: &[PageEntry]) {
        self.classes.iter().chain([&self.in_parent]).for_each(|counter| counter.store(0, Ordering::Relaxed));
        page_map.iter().for_each(|entry| self.count(entry));
    }
}

/// State of a checkpoint.
#[derive(Debug)]
pub(super) struct SaverState {
    pub(super) areas: Vec<Area>,
    pub(super) armed: Vec<Armed>,
    pub(super) staging: Staging,
    pub(super) discards: Discards,
    /// Hand-over of saved memory to write traces; `None` if saved memory is unprotected without being traced.
    pub(super) follow: Option<TraceHandover>,
    /// Whether the workload runs during the checkpoint.
    pub(super) live: bool,
    pub(super) stats: Stats,
    begun: AtomicBool,
    /// Locked while protections change before and at the snapshot point.
    beginning: Mutex<()>,
    failed: AtomicBool,
    released: AtomicBool,
    error: Mutex<Option<SaveError>>,
    done: Mutex<bool>,
    end: Condvar,
}

impl SaverState {
    pub(super) fn new(
        areas: Vec<Area>,
        armed: Vec<Armed>,
        staging: Staging,
        discards: Discards,
        follow: Option<TraceHandover>,
        live: bool,
    ) -> Self {
        Self {
            areas,
            armed,
            staging,
            discards,
            follow,
            live,
            stats: Stats::default(),
            begun: AtomicBool::new(false),
            beginning: Mutex::new(()),
            failed: AtomicBool::new(false),
            released: AtomicBool::new(false),
            error: Mutex::new(None),
            done: Mutex::new(false),
            end: Condvar::new(),
        }
    }

    // -- protections

    pub(super) fn protect_all(&self) -> io::Result<()> {
        self.armed.iter().try_for_each(|Armed { segment, uffd }| uffd.write_protect(segment.address, segment.len, true))
    }

    /// Sets the snapshot point: protects the blocks again that were unprotected since `protect_all`, with one call per
    /// run of blocks in each mapping.
    pub(super) fn protect_released(&self) -> io::Result<()> {
        let _beginning = self.beginning.lock();
        for (region, area) in self.areas.iter().enumerate() {
            let mut block = 0;
            while block < area.blocks() {
                let first = block;
                while block < area.blocks() && area.change(block, RELEASED, UNSAVED) {
                    block += 1;
                }
                if first == block {
                    block += 1;
                    continue;
                }
                let (start, (last, len)) = (area.bounds(first).0, area.bounds(block - 1));
                self.each_mapping(region, start, last + len - start, true)?;
            }
        }
        // Ignore earlier discards: the discarded pages are holes at the snapshot point, or have been written again, and
        // are saved in this state.
        self.discards.seen()?;
        self.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// Before the snapshot point, unprotects and records a block, and returns true. After the snapshot point, returns
    /// false.
    pub(super) fn release_before_snapshot(&self, armed: &Armed, block: usize) -> bool {
        if self.begun.load(Ordering::Acquire) {
            return false;
        }
        let _beginning = self.beginning.lock();
        if self.begun.load(Ordering::Acquire) {
            return false;
        }
        self.stats.early_traps.fetch_add(1, Ordering::Relaxed);
        self.areas[armed.segment.region].set(block, RELEASED);
        if let Err(error) = self.release_block(armed, block) {
            self.fail(error);
        }
        true
    }

    /// Unprotects a block in one mapping, and wakes the threads blocked on it.
    pub(super) fn release_block(&self, armed: &Armed, block: usize) -> Result<(), SaveError> {
        let (start, len) = self.areas[armed.segment.region].bounds(block);
        let Some((address, bytes)) = within(&armed.segment, start, len) else { return Ok(()) };
        match self.check(armed.uffd.write_protect(address, bytes, false)) {
            // Ignore the error: the block has been handed over in the meantime, and unregistering it has woken all
            // threads.
            Err(_) if self.is_handed_over(armed.segment.region, start + len) => Ok(()),
            other => other,
        }
    }

    fn is_handed_over(&self, region: usize, end: usize) -> bool {
        self.follow.as_ref().is_some_and(|follow| {
            let _still = follow.still();
            end <= follow.handed(region)
        })
    }

    pub(super) fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    /// Unprotects a range of a region in all mappings.
    pub(super) fn release(&self, region: usize, start: usize, len: usize) -> Result<(), SaveError> {
        self.check(self.each_mapping(region, start, len, false))
    }

    fn each_mapping(&self, region: usize, start: usize, len: usize, protect: bool) -> io::Result<()> {
        for Armed { segment, uffd } in self.armed.iter().filter(|armed| armed.segment.region == region) {
            if let Some((address, len)) = within(segment, start, len) {
                uffd.write_protect(address, len, protect)?;
            }
        }
        Ok(())
    }

    /// Converts the result of a userfaultfd call. Ignores errors after `release_all`, which makes such calls fail.
    pub(super) fn check(&self, result: io::Result<()>) -> Result<(), SaveError> {
        match result {
            Err(_) if self.released.load(Ordering::Acquire) => Ok(()),
            Err(error) if is_gone(&error) => Err(SaveError::Gone),
            other => other.map_err(SaveError::Memory),
        }
    }

    /// Unregisters all memory that has not been handed over, which wakes every blocked thread. Ignores errors, because
    /// an exited process has no registered memory.
    pub(super) fn release_all(&self) {
        let _still = self.follow.as_ref().map(TraceHandover::still);
        self.released.store(true, Ordering::Release);
        for Armed { segment, uffd } in &self.armed {
            let handed = self.follow.as_ref().map_or(0, |follow| follow.handed(segment.region));
            let rest = self.areas[segment.region].source.len() - handed;
            if let Some((address, len)) = within(segment, handed, rest) {
                let _ = uffd.unregister(address, len);
            }
        }
    }

    // -- failure and completion

    /// Fails the checkpoint: records the error, closes the staging buffer and unregisters all memory. Does nothing if
    /// the checkpoint has already failed or finished.
    pub(super) fn fail(&self, error: SaveError) {
        let mut first = self.error.lock();
        if first.is_none() && !self.is_done() {
            *first = Some(error);
            self.failed.store(true, Ordering::Release);
            self.staging.close();
            self.release_all();
            self.finished();
        }
    }

    pub(super) fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(super) fn error(&self) -> Option<SaveError> {
        self.error.lock().take()
    }

    pub(super) fn finished(&self) {
        *self.done.lock() = true;
        self.end.notify_all();
    }

    fn is_done(&self) -> bool {
        *self.done.lock()
    }

    pub(super) fn wait(&self, time: Duration) -> bool {
        let mut done = self.done.lock();
        self.end.wait_while_for(&mut done, |done| !*done, time);
        *done
    }
}
