//! What the threads of a save share: blocks, protections, the first error, counters.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::SaveError;
use super::area::{Area, RELEASED, UNSAVED};
use super::follow::Follow;
use super::staging::Staging;
use super::traps::{Armed, is_gone, within};
use crate::discards::Discards;
use crate::image::PageEntry;

/// Counters of a save.
#[derive(Debug, Default)]
pub struct Stats {
    /// Traps after the instant.
    pub traps: AtomicU64,
    /// Traps before it, which were only released and noted.
    pub early_traps: AtomicU64,
    /// Blocks that the sweep copied; traps copied the others.
    pub swept: AtomicU64,
    /// Traps that waited for a staging slot.
    pub staging_waits: AtomicU64,
    /// The longest service of a trap, nanoseconds.
    pub longest_trap: AtomicU64,
    /// Service of all traps, nanoseconds.
    pub trap_time: AtomicU64,
    /// Pages that are in memory and have been classified.
    pub pages: AtomicU64,
    /// Of each [`Class`], by its number. Pages of the parent are not among them.
    pub classes: [AtomicU64; 5],
    /// Pages whose contents are those of the parent image.
    pub in_parent: AtomicU64,
    /// Bytes of storage blocks.
    pub stored: AtomicU64,
    /// Storage blocks.
    pub blocks: AtomicU64,
    /// Write calls.
    pub writes: AtomicU64,
    /// Pages that the trace since the parent reported, some of them more than once.
    pub written: AtomicU64,
    /// Rounds in which they were saved while the workload ran.
    pub rounds: AtomicU64,
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

    /// What all pages are in the end: some were seen more than once, others never.
    pub(super) fn recount(&self, page_map: &[PageEntry]) {
        self.classes.iter().chain([&self.in_parent]).for_each(|counter| counter.store(0, Ordering::Relaxed));
        page_map.iter().for_each(|entry| self.count(entry));
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) areas: Vec<Area>,
    pub(super) armed: Vec<Armed>,
    pub(super) staging: Staging,
    pub(super) discards: Discards,
    /// Traces that go on where the save ends.
    pub(super) follow: Option<Follow>,
    /// Whether the workload runs meanwhile.
    pub(super) live: bool,
    pub(super) stats: Stats,
    begun: AtomicBool,
    /// Held while protections change before, and at, the instant.
    beginning: Mutex<()>,
    failed: AtomicBool,
    released: AtomicBool,
    error: Mutex<Option<SaveError>>,
    done: Mutex<bool>,
    end: Condvar,
}

impl Shared {
    pub(super) fn new(
        areas: Vec<Area>,
        armed: Vec<Armed>,
        staging: Staging,
        discards: Discards,
        follow: Option<Follow>,
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

    /// The instant: protects again what was released since `protect_all`, in few calls.
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
        // Their pages are holes at the instant, or were written to since and are saved as such.
        self.discards.seen()?;
        self.begun.store(true, Ordering::Release);
        Ok(())
    }

    /// Before the instant: releases a block and notes that, and returns true. After it: false.
    pub(super) fn release_before_instant(&self, armed: &Armed, block: usize) -> bool {
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

    /// Takes the protection off a block in one mapping, and wakes who waits for it there.
    pub(super) fn release_block(&self, armed: &Armed, block: usize) -> Result<(), SaveError> {
        let (start, len) = self.areas[armed.segment.region].bounds(block);
        let Some((address, bytes)) = within(&armed.segment, start, len) else { return Ok(()) };
        match self.check(armed.uffd.write_protect(address, bytes, false)) {
            // Handed over meanwhile: everybody who waited there was woken.
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

    /// Takes the protection off a range of a region, in all mappings.
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

    /// Once everything has been released, calls fail.
    pub(super) fn check(&self, result: io::Result<()>) -> Result<(), SaveError> {
        match result {
            Err(_) if self.released.load(Ordering::Acquire) => Ok(()),
            Err(error) if is_gone(&error) => Err(SaveError::Gone),
            other => other.map_err(SaveError::Memory),
        }
    }

    /// Takes every protection off and wakes everybody. Errors are left out: who is gone waits for nothing.
    pub(super) fn release_all(&self) {
        let _still = self.follow.as_ref().map(Follow::still);
        self.released.store(true, Ordering::Release);
        for Armed { segment, uffd } in &self.armed {
            let handed = self.follow.as_ref().map_or(0, |follow| follow.handed(segment.region));
            let rest = self.areas[segment.region].source.len() - handed;
            if let Some((address, len)) = within(segment, handed, rest) {
                let _ = uffd.unregister(address, len);
            }
        }
    }

    // -- ends

    /// Notes the first error, and lets the workload go.
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
