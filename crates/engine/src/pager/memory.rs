//! Memory of a restored workload. For every page, the contents are written first, then the deferred bit is cleared, and
//! then the page is mapped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock, RwLockWriteGuard};
use thiserror::Error;

use super::flags::Flags;
use super::removals::Removals;
use crate::image::ImageError;
use crate::mapping::Mapping;
use crate::pages::AtomicBits;
use crate::placer::{PlaceError, Placer};
use crate::segment::Segment;
use crate::uapi::Userfault;
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Number of base pages in a window (64 KiB), which the pager maps together.
pub const WINDOW: usize = 16;

/// Reason why a page cannot be loaded. The page stays deferred, so it never reads as zeros.
#[derive(Debug, Error, Clone)]
pub enum LoadError {
    /// The image is damaged, truncated or missing.
    #[error("{0}")]
    Image(Arc<ImageError>),
    /// Memory for the page could not be allocated.
    #[error("{0}")]
    Place(Arc<PlaceError>),
    /// The connection to the peer is lost.
    #[error("lost the connection to the source of the page: {0}")]
    Lost(String),
    /// The pager has stopped; another pager must load the page.
    #[error("the pager has stopped")]
    Ended,
}

impl From<Arc<ImageError>> for LoadError {
    fn from(error: Arc<ImageError>) -> Self {
        Self::Image(error)
    }
}

impl From<ImageError> for LoadError {
    fn from(error: ImageError) -> Self {
        Self::Image(Arc::new(error))
    }
}

impl From<PlaceError> for LoadError {
    fn from(error: PlaceError) -> Self {
        Self::Place(Arc::new(error))
    }
}

/// Region whose contents are loaded by the pager.
#[derive(Debug)]
pub struct PagedRegion {
    /// Pager's mapping of the region's file.
    pub mapping: Arc<Mapping>,
    /// Page size of the file, bytes.
    pub page_size: usize,
    /// Index of the first page, counted over all regions.
    pub base: usize,
}

impl PagedRegion {
    /// Returns the index of the page after the last one.
    pub fn end(&self) -> usize {
        self.base + self.mapping.pages()
    }

    /// Returns the number of base pages per page of the file. These base pages are mapped together.
    pub fn granule(&self) -> usize {
        self.page_size / SMALL_PAGE
    }

    /// Returns the pages around `page` that are mapped together, as (first, end).
    pub fn window(&self, page: usize) -> (usize, usize) {
        let unit = WINDOW.max(self.granule());
        let start = (page - self.base) / unit * unit;
        (self.base + start, self.end().min(self.base + start + unit))
    }
}

/// Workload's mapping of a part of a region, and the userfaultfd that reports the faults in this mapping.
#[derive(Debug)]
pub struct Watched {
    pub segment: Segment,
    pub uffd: Arc<Userfault>,
}

/// Counters of a pager.
#[derive(Debug, Default)]
pub struct Counters {
    /// Number of page faults.
    pub faults: AtomicU64,
    /// Number of faults on deferred pages.
    pub missed: AtomicU64,
    /// Number of pages loaded before they were requested.
    pub prefetched: AtomicU64,
    /// Number of pages loaded.
    pub loaded: AtomicU64,
    /// Total service time of all faults, nanoseconds.
    pub service: AtomicU64,
    /// Longest service time of a fault, nanoseconds.
    pub longest: AtomicU64,
    /// Number of faults by service time. Bin 0 counts faults of less than 1 us, and bin `k` faults of 2^(k-1) us to
    /// less than 2^k us. The last bin has no upper limit.
    pub histogram: [AtomicU64; 32],
}

impl Counters {
    /// Counts a resolved fault and its service time.
    pub fn served(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.service.fetch_add(nanoseconds, Ordering::Relaxed);
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
        let bin = (u64::BITS - (nanoseconds / 1000).leading_zeros()) as usize;
        self.histogram[bin.min(self.histogram.len() - 1)].fetch_add(1, Ordering::Relaxed);
    }
}

/// Memory of the workload, in which the pager installs contents.
#[derive(Debug)]
pub struct Memory {
    pub regions: Vec<PagedRegion>,
    pub watched: Vec<Watched>,
    pub flags: Flags,
    pub placer: Placer,
    pub counters: Counters,
    /// Pages that a thread has claimed in order to write their contents, or that were discarded.
    claims: AtomicBits,
    /// Lock held shared while contents are written, and exclusively while removals are read or pages are evicted. The
    /// lock prevents contents from being written to pages after their removal.
    pub removing: RwLock<()>,
    /// Removals of deferred pages that may be discards.
    pub removals: Removals,
    /// Windows in the order of their first fault on a deferred page.
    pub touched: Mutex<Vec<u32>>,
    /// Windows that are recorded in `touched`. A window is recorded only once, even if its pages are evicted and loaded
    /// again.
    noted: AtomicBits,
    /// Whether pages are mapped write-protected when their contents are installed.
    pub protecting: AtomicBool,
}

/// Buffers of one thread.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Verified contents.
    pub contents: Vec<u8>,
    /// Pages to install, each with the offset of its contents in `contents`, bytes.
    pub wanted: Vec<(usize, usize)>,
    /// Number of pages that this thread has installed.
    pub installed: u64,
}

impl Memory {
    pub fn new(
        regions: Vec<PagedRegion>,
        watched: Vec<Watched>,
        flags: Flags,
        placer: Placer,
        removals: Removals,
    ) -> Self {
        let pages = regions.last().map_or(0, PagedRegion::end);
        let (claims, noted) = (AtomicBits::new(pages), AtomicBits::new(pages.div_ceil(WINDOW)));
        let (counters, removing, touched) = (Counters::default(), RwLock::default(), Mutex::default());
        let protecting = AtomicBool::new(false);
        Self { regions, watched, flags, placer, counters, claims, removing, removals, touched, noted, protecting }
    }

    /// Returns the index of the region of a page.
    pub fn region_of(&self, page: usize) -> usize {
        self.regions.partition_point(|region| region.end() <= page)
    }

    /// Returns whether any page that a segment maps is deferred.
    pub fn lacks_any(&self, segment: &Segment) -> bool {
        let (first, last) = segment.extent();
        let base = self.regions[segment.region].base;
        self.flags.next(base + first, base + last).is_some()
    }

    /// Writes the pages of `scratch.wanted` to their slots, clears their deferred bits, and maps them. Does not write
    /// pages that are present or claimed by another thread.
    pub fn install(&self, scratch: &mut Scratch) -> Result<(), LoadError> {
        scratch.wanted.sort_unstable();
        let mut rest = scratch.wanted.as_slice();
        while let Some(&(first, _)) = rest.first() {
            let region = self.region_of(first);
            let limit = self.regions[region].end();
            let count =
                rest.iter().enumerate().take_while(|(at, (page, _))| *page == first + at && *page < limit).count();
            let (run, others) = rest.split_at(count);
            rest = others;
            scratch.installed += self.write(region, run, &scratch.contents)?;
            self.map_with(region, first, first + count, self.protecting.load(Ordering::Acquire));
        }
        Ok(())
    }

    /// Returns the number of pages that this thread has written.
    fn write(&self, region: usize, run: &[(usize, usize)], contents: &[u8]) -> Result<u64, LoadError> {
        let first = run[0].0 - self.regions[region].base;
        let _no_removals = self.removing.read();
        self.decide(run[0].0, run[0].0 + run.len());
        let slots = self.placer.slots(region, first, run.len())?;
        let mut done = 0;
        for (at, &(page, offset)) in run.iter().enumerate() {
            if !self.claim(page) {
                continue;
            }
            let from = contents[offset..offset + SMALL_PAGE].as_ptr();
            // SAFETY: `from` points to a page of `contents`, because the slice is checked. The run lies in our mapping,
            // and `slots` has allocated its memory. The claim makes this thread the only writer of the page; the
            // workload has not mapped it, because its deferred bit is set.
            unsafe { std::ptr::copy_nonoverlapping(from, slots.add(at * SMALL_PAGE), SMALL_PAGE) };
            self.flags.clear(page);
            done += 1;
        }
        self.counters.loaded.fetch_add(done, Ordering::Relaxed);
        Ok(done)
    }

    /// Claims a deferred page for writing. Returns false if the page is present or claimed by another thread.
    fn claim(&self, page: usize) -> bool {
        self.flags.is_set(page) && !self.claims.set(page)
    }

    /// Marks a page as deferred again. The caller must have locked `removing` exclusively.
    pub fn lack(&self, page: usize) {
        self.claims.take(page);
        self.flags.set(page);
    }

    /// Marks the deferred pages of a discarded range as present: they are holes, which read as zeros. The caller must
    /// have locked `removing` exclusively.
    pub fn discard(&self, first: usize, end: usize) {
        let mut at = first;
        while let Some(page) = self.flags.next(at, end) {
            self.claims.set(page);
            self.flags.clear(page);
            at = page + 1;
        }
    }

    /// Maps the present pages of `[first, end)` in all mappings of the workload, and wakes the threads blocked on them.
    pub fn map(&self, region: usize, first: usize, end: usize) {
        self.map_with(region, first, end, false);
    }

    fn map_with(&self, region: usize, first: usize, end: usize, protect: bool) {
        let found = &self.regions[region];
        let granule = found.granule();
        let (first, end) = if granule > 1 { (found.window(first).0, found.window(end - 1).1) } else { (first, end) };
        for (start, stop) in self.flags.clear_runs(first, end) {
            let start = (start - found.base).next_multiple_of(granule);
            let stop = (stop - found.base) / granule * granule;
            if start < stop {
                self.map_run(region, start, stop, protect);
            }
        }
    }

    /// Maps the present pages `[start, stop)`, counted within the region, in all mappings of the workload. Ignores
    /// errors, which occur only for exiting processes.
    fn map_run(&self, region: usize, start: usize, stop: usize, protect: bool) {
        let page = self.regions[region].page_size as u64;
        for Watched { segment, uffd } in self.watched.iter().filter(|watched| watched.segment.region == region) {
            if let Some((address, len)) = segment.part(start, stop) {
                let _ = uffd.resolve(address, len, page, protect);
            }
        }
    }

    /// Counts a fault on a deferred page. Records the window of the page, unless it has been recorded before.
    pub fn missed(&self, page: usize) {
        if let Ok(window) = u32::try_from(page / WINDOW)
            && !self.noted.set(page / WINDOW)
        {
            self.touched.lock().push(window);
        }
        self.counters.missed.fetch_add(1, Ordering::Relaxed);
    }

    /// Maps a present page together with the adjacent present pages of its window, or with all pages of its huge page
    /// if none of them is deferred. Does nothing if the page itself is deferred.
    pub fn map_present(&self, region: usize, page: usize) -> Result<(), LoadError> {
        let found = &self.regions[region];
        let (first, end) = found.window(page);
        // The lock prevents a discard of these pages until their slots are allocated.
        let _no_removals = self.removing.read();
        let runs = self.flags.clear_runs(first, end);
        let Some(&(start, stop)) = runs.iter().find(|(start, stop)| (*start..*stop).contains(&page)) else {
            return Ok(());
        };
        self.placer.slots(region, start - found.base, stop - start)?;
        // If the file has a huge page for the unit and none of its pages is deferred, map all of it.
        let unit = (page - found.base) / SLOTS * SLOTS;
        let (head, tail) = (found.base + unit, found.base + unit + SLOTS);
        if tail <= found.end() && self.flags.next(head, tail).is_none() && self.is_large(region, unit) {
            self.map_run(region, unit, unit + SLOTS, false);
        } else {
            self.map_run(region, start - found.base, stop - found.base, false);
        }
        Ok(())
    }

    /// Maps the present pages of a region: huge pages without deferred pages by PMD entries, all other pages as base
    /// pages.
    pub fn populate(&self, region: usize) -> std::io::Result<()> {
        let found = &self.regions[region];
        let large = if found.granule() > 1 { Vec::new() } else { found.mapping.large_units()? };
        for (start, end) in found.mapping.data_ranges()? {
            let (mut at, end) = (start / SMALL_PAGE, end / SMALL_PAGE);
            while at < end {
                let stop = end.min((at / SLOTS + 1) * SLOTS);
                let whole = stop - at == SLOTS && large.get(at / SLOTS).copied().unwrap_or(false);
                let (first, last) = (found.base + at, found.base + stop);
                if !whole || self.flags.next(first, last).is_some() || !self.map_large(region, at) {
                    self.map(region, first, last);
                }
                at = stop;
            }
        }
        Ok(())
    }

    /// Maps a huge page, which starts at page `start` of the region, in all mappings of the workload. Returns false,
    /// and skips the remaining mappings, if a mapping cannot map the huge page by a PMD entry.
    pub fn map_large(&self, region: usize, start: usize) -> bool {
        let touching = self.watched.iter().filter(|watched| watched.segment.region == region);
        let end = start + SLOTS;
        touching
            .filter(|watched| watched.segment.touches(start, end))
            .all(|watched| watched.segment.map_large(start, end))
    }

    fn is_large(&self, region: usize, page: usize) -> bool {
        let start = self.regions[region].mapping.page(page) as u64;
        self.placer.own().large_mapped(start, LARGE_PAGE as u64).is_ok_and(|found| !found.is_empty())
    }

    /// Resolves the open removal as a discard if the file system has reported a punched hole. Must be called before
    /// userfaultfd events are read, with `removing` locked exclusively.
    pub fn take_reports(&self, _alone: &RwLockWriteGuard<()>) {
        self.removals.take_reports(|runs| self.discard_all(runs));
    }

    /// Records removals of pages, as reported by events of the userfaultfd. If removals are not checked, discards the
    /// pages immediately. `removing` must be locked exclusively.
    pub fn removed(&self, runs: Vec<(usize, usize)>) {
        if !self.removals.checked {
            return self.discard_all(&runs);
        }
        let deferred = runs.iter().any(|&(first, end)| self.flags.next(first, end).is_some());
        self.removals.record(deferred.then_some(runs));
    }

    /// Resolves the open removal if it overlaps `[first, end)`. Must be called before contents are written to these
    /// pages.
    pub fn decide(&self, first: usize, end: usize) {
        self.removals.decide(first, end, |runs| self.discard_all(runs));
    }

    fn discard_all(&self, runs: &[(usize, usize)]) {
        runs.iter().for_each(|&(first, end)| self.discard(first, end));
    }
}
