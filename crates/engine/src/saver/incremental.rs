//! Checkpoints from a write trace (S2, S4). If the trace has been installed since the parent image, only the reported
//! pages are read and saved. Otherwise the trace is installed first, for example through the userfaultfd of a pager
//! (S8). All present pages are then saved, and after them the pages that the trace has reported.
//!
//! The trace stays installed during the whole checkpoint. While the workload runs, written pages are saved in rounds,
//! which the caller controls. `collect` protects pages before they are read: if a page is written later, the trace
//! reports it, and it is saved again. The last pages are copied at the snapshot point; from then on, the trace serves
//! the next checkpoint.
//!
//! A device that has pinned a page can write to the page regardless of its protection. The caller must drain such I/O
//! between a collection and the next copy (docs/decisions/0012).
//!
//! The trace does not report a page that is discarded and then read. Such a page is zero or a hole although the parent
//! holds contents for it. `scan` checks all pages for this case; for most pages it reads a single word. The file system
//! reports later discards with notifications.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Sender;

use super::staging::Origin;
use super::state::SaverState;
use super::sweep::RateLimit;
use super::trap_blocks::{Area, Copied};
use super::{SaveError, trouble};
use crate::SMALL_PAGE;
use crate::block::Class;
use crate::image::{Chain, PageEntry};
use crate::pages::PageSet;
use crate::trace::Trace;

const HUGE_PAGES_GONE: &str = "huge pages were discarded during the checkpoint";

/// Checkpoint from a trace, in progress. The caller decides when to collect, to scan and to copy.
#[derive(Debug)]
pub(super) struct Rounds {
    shared: Arc<SaverState>,
    trace: Trace,
    slots: Sender<Copied>,
    /// Parent image, if the trace has been installed since its snapshot point; `None` if all memory must be saved.
    since: Option<Chain>,
    /// Pages to save, by region.
    dirty: Vec<PageSet>,
    /// Pages that have been saved, by region.
    saved: Vec<PageSet>,
    /// Pages that were present in the last scan, by region.
    present: Vec<PageSet>,
    /// Whether no memory has been discarded since the last scan.
    unchanged: bool,
    /// Rate limit of the copies before the snapshot point.
    pace: RateLimit,
}

impl Rounds {
    pub(super) fn new(
        shared: Arc<SaverState>,
        trace: Trace,
        since: Option<Chain>,
        slots: Sender<Copied>,
        bandwidth: u64,
    ) -> Self {
        let empty = || shared.areas.iter().map(|area| PageSet::new(area.source.pages())).collect::<Vec<_>>();
        let (dirty, saved, present) = (empty(), empty(), empty());
        let pace = RateLimit::new(bandwidth);
        Self { shared, trace, slots, since, dirty, saved, present, unchanged: false, pace }
    }

    /// Sets the snapshot point: collects and saves the last pages. The workload must be paused.
    pub(super) fn end(mut self) -> Result<(), SaveError> {
        if !self.unchanged {
            return Err(SaveError::Memory(io::Error::other("cannot begin a checkpoint before its memory is scanned")));
        }
        // No drain is needed: the pause has drained all direct I/O.
        self.collect()?;
        self.save(true)?;
        if self.discarded()? {
            return Err(SaveError::Untraceable("memory was discarded at the snapshot point"));
        }
        Ok(())
    }

    /// Returns whether memory has been discarded since the last call. If so, marks all saved pages as dirty, so that
    /// they are copied again: their saved contents may have been discarded.
    ///
    /// # Errors
    /// [`SaveError::Untraceable`] if huge pages may have been discarded; otherwise [`SaveError::Memory`].
    pub(super) fn lost(&mut self) -> Result<bool, SaveError> {
        let lost = self.discarded()?;
        self.unchanged &= !lost;
        if lost && self.since.is_none() && self.shared.areas.iter().any(|area| area.hugetlb) {
            return Err(SaveError::Untraceable(HUGE_PAGES_GONE));
        }
        if lost {
            self.dirty.iter_mut().zip(&self.saved).for_each(|(dirty, saved)| dirty.union(saved));
        }
        Ok(lost)
    }

    fn discarded(&self) -> Result<bool, SaveError> {
        self.shared.discards.seen().map_err(SaveError::Memory)
    }

    /// Collects the written pages, and protects them again. Returns the number of pages to copy.
    pub(super) fn collect(&mut self) -> Result<usize, SaveError> {
        let before = self.count();
        self.trace.collect(&mut self.dirty).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => SaveError::Untraceable("memory of the workload was remapped"),
            Some(libc::ESRCH) => SaveError::Gone,
            _ => SaveError::Memory(error),
        })?;
        let count = self.count();
        self.shared.stats.written.fetch_add((count - before) as u64, Ordering::Relaxed);
        Ok(count)
    }

    /// Copies the collected pages.
    pub(super) fn copy(&mut self) -> Result<(), SaveError> {
        self.save(false)
    }

    fn count(&self) -> usize {
        self.dirty.iter().map(PageSet::count).sum()
    }

    /// Copies the collected pages, and the present pages among `count` pages of a region from page `first` on.
    pub(super) fn copy_range(&mut self, region: usize, first: usize, count: usize) -> Result<(), SaveError> {
        let Some(area) = self.shared.areas.get(region) else { return Ok(()) };
        let end = first.saturating_add(count).min(area.source.pages());
        let (from, to) = (first.min(end) * SMALL_PAGE, end * SMALL_PAGE);
        let found = if area.hugetlb { area.source.data_ranges() } else { area.source.data_within(from, to) };
        for (start, stop) in found.map_err(SaveError::Memory)? {
            let (start, stop) = (start.max(from) / SMALL_PAGE, stop.min(to).div_ceil(SMALL_PAGE));
            if start < stop {
                self.present[region].insert(start, stop);
                self.dirty[region].insert(start, stop);
            }
        }
        self.save(false)
    }

    /// Scans for present pages, and for pages that have lost their contents without a write. Returns the number of
    /// pages to copy.
    pub(super) fn scan(&mut self) -> Result<usize, SaveError> {
        let page_map = self.since.as_ref().map_or(&[][..], |parent| parent.nearest().page_map());
        for (region, area) in self.shared.areas.iter().enumerate() {
            let mut present = PageSet::new(area.source.pages());
            for (start, end) in area.source.data_ranges().map_err(SaveError::Memory)? {
                present.insert(start / SMALL_PAGE, end.div_ceil(SMALL_PAGE));
            }
            let entries = page_map.iter().skip(area.first_page).take(area.source.pages());
            for (page, _) in entries.enumerate().filter(|(_, entry)| has_contents(entry)) {
                if self.dirty[region].contains(page) {
                    continue;
                }
                let there = present.contains(page);
                if !there && area.hugetlb {
                    // In hugetlbfs, a hole cannot be distinguished from data later, and reading a hole would allocate a
                    // huge page.
                    return Err(SaveError::Untraceable(HUGE_PAGES_GONE));
                }
                if !there || area.source.is_zero(page).map_err(SaveError::Memory)? {
                    self.dirty[region].insert(page, page + 1);
                }
            }
            self.present[region] = present;
        }
        self.unchanged = true;
        Ok(self.count())
    }

    /// Copies the dirty pages. With `now`, which requires a paused workload, allocates a staging slot if none is free,
    /// instead of waiting for one, and ignores the rate limit.
    fn save(&mut self, now: bool) -> Result<(), SaveError> {
        for (region, area) in self.shared.areas.iter().enumerate() {
            let pages = area.source.pages();
            let set = std::mem::replace(&mut self.dirty[region], PageSet::new(pages));
            let (per_block, mut at) = (area.trap_block / SMALL_PAGE, 0);
            while let Some((page, _)) = set.runs_in(at, pages).next() {
                let block = page / per_block;
                at = (block + 1) * per_block;
                if !now {
                    self.pace.wait(|| self.shared.failed());
                }
                let bytes = self.save_block(region, block, set.runs_in(block * per_block, at), now)?;
                self.pace.count(bytes);
            }
            self.saved[region].union(&set);
        }
        Ok(())
    }

    /// Copies the given pages of a block. Returns the number of bytes copied.
    fn save_block(
        &self,
        region: usize,
        block: usize,
        runs: impl Iterator<Item = (usize, usize)>,
        now: bool,
    ) -> Result<usize, SaveError> {
        let (staging, area) = (&self.shared.staging, &self.shared.areas[region]);
        let mut slot = if now {
            staging.take_now()
        } else {
            staging.take(Origin::Sweep).ok_or_else(|| self.shared.error().unwrap_or(SaveError::Cancelled))?.0
        };
        let page = block * area.trap_block / SMALL_PAGE;
        let (mut there, mut absent) = (Vec::new(), Vec::new());
        for (start, end) in runs {
            self.split(region, (start, end), page, &mut there, &mut absent).map_err(SaveError::Memory)?;
        }
        let mut bytes = 0;
        for &(start, end) in &there {
            bytes += (end - start) * SMALL_PAGE;
            let target = &mut slot[start * SMALL_PAGE..end * SMALL_PAGE];
            read(area, page + start, target).map_err(trouble)?;
        }
        let _ = self.slots.send(Copied { region, page, runs: there, absent, slot, origin: Origin::Sweep });
        Ok(bytes)
    }

    /// Appends the present pages of a run to `there`, and its holes to `absent`, as runs relative to page `base`.
    fn split(
        &self,
        region: usize,
        (start, end): (usize, usize),
        base: usize,
        there: &mut Vec<(usize, usize)>,
        absent: &mut Vec<(usize, usize)>,
    ) -> io::Result<()> {
        for page in start..end {
            // Pages that were present in the scan are still present, unless memory was discarded, which `lost` and
            // `end` detect. Holes may have been filled since the scan.
            let present =
                self.present[region].contains(page) || self.shared.areas[region].source.is_data(page * SMALL_PAGE)?;
            let runs = if present { &mut *there } else { &mut *absent };
            match runs.last_mut() {
                Some((_, last)) if *last == page - base => *last += 1,
                _ => runs.push((page - base, page - base + 1)),
            }
        }
        Ok(())
    }
}

fn read(area: &Area, page: usize, target: &mut [u8]) -> io::Result<()> {
    area.source.read(page * SMALL_PAGE, target)
}

/// Returns whether a page of the parent has contents other than zeros.
fn has_contents(entry: &PageEntry) -> bool {
    match entry.class() {
        Some(Class::Data | Class::SameAs) => true,
        Some(Class::Pattern) => entry.signature.get() != 0,
        _ => false,
    }
}
