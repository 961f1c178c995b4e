//! Saving what a trace has seen since the parent image (S2, S4): the rest is as it is there, and is not read. Or, of
//! memory whose contents are still to come (S8), everything as it comes, and then what a trace has seen since.
//!
//! The trace stays on all the time. While the workload runs, what was written is saved in rounds, until little enough
//! is left to be copied in the pause. `collect` protects before anybody reads: what is written after a round was copied
//! is reported again, and saved again. At the instant the last of it is copied, and from there on the trace is the next
//! one's.
//!
//! A device that has pinned a page writes to it whatever is protected: between a collection and the reading of its pages
//! such I/O has to end (docs/decisions/0012).
//!
//! A page that is discarded, and read again, is not reported: but it has nothing but zeros, or is not there, where the
//! parent has something. All pages are looked at for that, mostly at one word each; and while that is worth something
//! the file tells of discards.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Sender;

use super::SaveError;
use super::area::{Area, Copied};
use super::shared::Shared;
use super::staging::Origin;
use crate::SMALL_PAGE;
use crate::block::Class;
use crate::image::{Chain, PageEntry};
use crate::pages::PageSet;
use crate::trace::Trace;

/// Pages that are brought at a time, 16 MiB.
const PORTION: usize = 4096;

const HUGE_PAGES_GONE: &str = "huge pages were given back";

/// How often it is begun anew when memory is discarded meanwhile.
const ATTEMPTS: usize = 3;

/// A save under way.
#[derive(Debug)]
pub(super) struct Rounds {
    shared: Arc<Shared>,
    trace: Trace,
    slots: Sender<Copied>,
    /// What may be left for the instant, pages.
    most: usize,
    /// The parent since which the trace tells; without one, all of memory is to be saved.
    since: Option<Chain>,
    /// Per region: what has to be saved, what has been, and what was in memory when it was looked at.
    dirty: Vec<PageSet>,
    saved: Vec<PageSet>,
    present: Vec<PageSet>,
    ready: bool,
    /// Direct I/O may be in flight that pinned pages before the last collection: it ends before they are read.
    due: bool,
}

/// What rounds need of their caller while the workload runs.
#[expect(missing_debug_implementations, reason = "closures")]
pub struct Help<'a> {
    /// Has pages of a region, (region, first, count), in memory before they are read.
    pub bring: &'a dyn Fn(usize, usize, usize) -> io::Result<()>,
    /// Returns when direct I/O into the memory that had begun before the call has ended.
    pub drain: &'a dyn Fn() -> io::Result<()>,
}

impl Rounds {
    pub(super) fn new(
        shared: Arc<Shared>,
        trace: Trace,
        since: Option<Chain>,
        slots: Sender<Copied>,
        most: usize,
    ) -> Self {
        let empty = || shared.areas.iter().map(|area| PageSet::new(area.source.pages())).collect::<Vec<_>>();
        let (dirty, saved, present) = (empty(), empty(), empty());
        let due = since.is_none(); // the trace has just been installed
        Self { shared, trace, slots, most: most / SMALL_PAGE, since, dirty, saved, present, ready: false, due }
    }

    /// While the workload runs: saves until little enough is left.
    pub(super) fn run(&mut self, help: &Help<'_>) -> Result<(), SaveError> {
        if self.since.is_none() {
            self.save_all(help)?;
        }
        self.collect()?;
        for _ in 0..ATTEMPTS {
            self.look()?;
            let mut left = self.count();
            while left > self.most {
                self.drain(help)?;
                self.save(false)?;
                self.collect()?;
                self.shared.stats.rounds.fetch_add(1, Ordering::Relaxed);
                // What is saved again was saved in vain: together no more than once.
                if self.count() > left / 2 {
                    return Err(SaveError::Untraceable("too much was written again while it was saved"));
                }
                left = self.count();
            }
            if !self.discarded()? {
                self.ready = true;
                return Ok(());
            }
            if self.since.is_none() && self.shared.areas.iter().any(|area| area.hugetlb) {
                return Err(SaveError::Untraceable(HUGE_PAGES_GONE));
            }
            // What was saved may have been discarded since.
            self.dirty.iter_mut().zip(&self.saved).for_each(|(dirty, saved)| dirty.union(saved));
        }
        Err(SaveError::Untraceable("memory was given back all the time"))
    }

    /// The instant: the workload is paused.
    pub(super) fn end(mut self) -> Result<(), SaveError> {
        if !self.ready {
            return Err(SaveError::Memory(io::Error::other("the instant comes after `prepare`")));
        }
        // The pause has waited for all direct I/O.
        self.collect()?;
        self.save(true)?;
        if self.discarded()? {
            return Err(SaveError::Untraceable("memory was given back at the last moment"));
        }
        Ok(())
    }

    fn discarded(&self) -> Result<bool, SaveError> {
        self.shared.discards.seen().map_err(SaveError::Memory)
    }

    fn collect(&mut self) -> Result<(), SaveError> {
        let before = self.count();
        self.trace.collect(&mut self.dirty).map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM) => SaveError::Untraceable("its memory was mapped anew"),
            Some(libc::ESRCH) => SaveError::Gone,
            _ => SaveError::Memory(error),
        })?;
        self.due = true;
        self.shared.stats.written.fetch_add((self.count() - before) as u64, Ordering::Relaxed);
        Ok(())
    }

    fn count(&self) -> usize {
        self.dirty.iter().map(PageSet::count).sum()
    }

    fn drain(&mut self, help: &Help<'_>) -> Result<(), SaveError> {
        if std::mem::take(&mut self.due) {
            (help.drain)().map_err(SaveError::Bring)?;
        }
        Ok(())
    }

    /// The first round, of everything, as it comes.
    fn save_all(&mut self, help: &Help<'_>) -> Result<(), SaveError> {
        self.drain(help)?;
        for region in 0..self.shared.areas.len() {
            let area = &self.shared.areas[region];
            let (pages, hugetlb) = (area.source.pages(), area.hugetlb);
            for first in (0..pages).step_by(PORTION) {
                let end = pages.min(first + PORTION);
                (help.bring)(region, first, end - first).map_err(SaveError::Bring)?;
                let (from, to) = (first * SMALL_PAGE, end * SMALL_PAGE);
                let source = &self.shared.areas[region].source;
                let found = if hugetlb { source.data_ranges() } else { source.data_within(from, to) };
                for (start, stop) in found.map_err(SaveError::Memory)? {
                    let (start, stop) = (start.max(from) / SMALL_PAGE, stop.min(to).div_ceil(SMALL_PAGE));
                    if start < stop {
                        self.present[region].insert(start, stop);
                        self.dirty[region].insert(start, stop);
                    }
                }
                self.save(false)?;
            }
        }
        self.shared.stats.rounds.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Finds what is in memory, and pages that lost their contents without having been written to.
    fn look(&mut self) -> Result<(), SaveError> {
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
                    // There a hole cannot be told from data later, and to read it would allocate it.
                    return Err(SaveError::Untraceable(HUGE_PAGES_GONE));
                }
                if !there || area.source.is_zero(page).map_err(SaveError::Memory)? {
                    self.dirty[region].insert(page, page + 1);
                }
            }
            self.present[region] = present;
        }
        Ok(())
    }

    /// Copies what is dirty; `now`: nobody is waited for.
    fn save(&mut self, now: bool) -> Result<(), SaveError> {
        for (region, area) in self.shared.areas.iter().enumerate() {
            let pages = area.source.pages();
            let set = std::mem::replace(&mut self.dirty[region], PageSet::new(pages));
            let (per_block, mut at) = (area.trap_block / SMALL_PAGE, 0);
            while let Some((page, _)) = set.runs_in(at, pages).next() {
                let block = page / per_block;
                at = (block + 1) * per_block;
                self.save_block(region, block, set.runs_in(block * per_block, at), now)?;
            }
            self.saved[region].union(&set);
        }
        Ok(())
    }

    fn save_block(
        &self,
        region: usize,
        block: usize,
        runs: impl Iterator<Item = (usize, usize)>,
        now: bool,
    ) -> Result<(), SaveError> {
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
        for &(start, end) in &there {
            let target = &mut slot[start * SMALL_PAGE..end * SMALL_PAGE];
            read(area, page + start, target).map_err(SaveError::Memory)?;
        }
        let _ = self.slots.send(Copied { region, page, runs: there, absent, slot, origin: Origin::Sweep });
        Ok(())
    }

    /// Splits a run into what is in memory and what is not, counted from page `base`.
    fn split(
        &self,
        region: usize,
        (start, end): (usize, usize),
        base: usize,
        there: &mut Vec<(usize, usize)>,
        absent: &mut Vec<(usize, usize)>,
    ) -> io::Result<()> {
        for page in start..end {
            // What was there is there: the file has told of no discard. What was not may have come since.
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

/// Whether a page of the parent is not just zeros.
fn has_contents(entry: &PageEntry) -> bool {
    match entry.class() {
        Some(Class::Data | Class::SameAs) => true,
        Some(Class::Pattern) => entry.signature.get() != 0,
        _ => false,
    }
}
