//! Memory of a restored workload. For every page of a file, the contents are written first, then the deferred bit is
//! cleared, and then the page is mapped. In private memory, one call writes and maps a page; see [`super::private`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use thiserror::Error;

use super::blocks::PageScratch;
use super::flags::Flags;
use super::private::PrivateMemory;
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
    /// Clones may have read zeros in a unit of the base, so the pager loads no further pages.
    #[error("{}", given_up(*.0))]
    GivenUp(usize),
    /// The connection to the peer is lost.
    #[error("lost the connection to the source of the page: {0}")]
    Lost(String),
    /// The workload does not accept the page.
    #[error("cannot install pages {first} to {end} of region {region}: {error}; the workload has unmapped the memory")]
    Unmapped {
        /// Index of the region.
        region: usize,
        /// First page.
        first: usize,
        /// Page after the last.
        end: usize,
        /// Cause.
        error: String,
    },
    /// The workload is removing pages. The page can be loaded once the event of the removal has been read.
    #[error("the workload is removing pages")]
    Removing,
    /// The process of the workload has exited.
    #[error("the process of the workload has exited")]
    Exited,
    /// The pager has stopped; another pager must load the page.
    #[error("the pager has stopped")]
    Ended,
}

/// Returns the message for a base that was given up because of a unit.
pub fn given_up(unit: usize) -> String {
    format!(
        "the base was given up: a write of unit {unit} was incomplete, and clones may have read zeros there; end all \
         clones of the image, and start them again"
    )
}

impl From<Arc<ImageError>> for LoadError {
    fn from(error: Arc<ImageError>) -> Self {
        // Only a pager that stops interrupts the wait for a block.
        if matches!(*error, ImageError::Interrupted) { Self::Ended } else { Self::Image(error) }
    }
}

impl From<ImageError> for LoadError {
    fn from(error: ImageError) -> Self {
        Arc::new(error).into()
    }
}

impl From<PlaceError> for LoadError {
    fn from(error: PlaceError) -> Self {
        Self::Place(Arc::new(error))
    }
}

/// Region whose contents the pager loads.
#[derive(Debug)]
pub struct PagedRegion {
    /// Pager's mapping of the region's file; `None` for private memory.
    pub mapping: Option<Arc<Mapping>>,
    /// Number of base pages.
    pub pages: usize,
    /// Page size of the memory in bytes.
    pub page_size: usize,
    /// Index of the first page, counted over all regions.
    pub base: usize,
}

impl PagedRegion {
    /// Returns the index of the page after the last one.
    pub fn end(&self) -> usize {
        self.base + self.pages
    }

    /// Returns the number of base pages per page of the memory. These base pages are mapped together.
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
    /// Number of times that a thread of the pager waited for [`Memory::removing`].
    pub waits: AtomicU64,
    /// Total time of these waits in nanoseconds.
    pub waited: AtomicU64,
    /// CPU time of the demand threads in nanoseconds. Updated every 64 faults of a thread, and when the thread is idle.
    pub demand_cpu: AtomicU64,
    /// Total service time of all faults in nanoseconds.
    pub service: AtomicU64,
    /// Longest service time of a fault in nanoseconds.
    pub longest: AtomicU64,
    /// Number of faults by service time. Bin 0 counts faults of less than 1 us, and bin `k` faults of 2^(k-1) us to
    /// less than 2^k us. The last bin has no upper limit.
    pub histogram: [AtomicU64; 32],
}

impl Counters {
    /// Acquires a lock with `take`. If this fails, waits for the lock with `wait`, and counts the wait.
    fn counted<T>(&self, take: impl FnOnce() -> Option<T>, wait: impl FnOnce() -> T) -> T {
        take().unwrap_or_else(|| {
            let begin = Instant::now();
            let taken = wait();
            self.waits.fetch_add(1, Ordering::Relaxed);
            self.waited.fetch_add(u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
            taken
        })
    }

    /// Counts a resolved fault and its service time.
    pub fn served(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.service.fetch_add(nanoseconds, Ordering::Relaxed);
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
        let bin = (u64::BITS - (nanoseconds / 1000).leading_zeros()) as usize;
        self.histogram[bin.min(self.histogram.len() - 1)].fetch_add(1, Ordering::Relaxed);
    }
}

/// Way in which contents get into the memory of the workload.
#[derive(Debug)]
pub enum Installer {
    /// Contents are written to the files, and then mapped.
    Files(Placer),
    /// Contents are written into the private memory of the workload by the kernel.
    Private(PrivateMemory),
}

/// Memory of the workload, in which the pager installs contents.
#[derive(Debug)]
pub struct Memory {
    pub regions: Vec<PagedRegion>,
    pub watched: Vec<Watched>,
    pub flags: Flags,
    pub installer: Installer,
    pub counters: Counters,
    /// Pages that a thread has claimed in order to write their contents, or that were discarded.
    pub(super) claims: AtomicBits,
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
    /// Buffers for reading the pages of a huge page.
    pub pages: PageScratch,
    /// Verified contents.
    pub contents: Vec<u8>,
    /// Pages to install, each with the offset in bytes of its contents in `contents`.
    pub wanted: Vec<(usize, usize)>,
    /// Buffer for the next storage block that is read without the cache.
    pub buffer: Vec<u8>,
    /// Number of pages that this thread has installed.
    pub installed: u64,
}

impl Memory {
    pub fn new(
        regions: Vec<PagedRegion>,
        watched: Vec<Watched>,
        flags: Flags,
        installer: Installer,
        removals: Removals,
    ) -> Self {
        let pages = regions.last().map_or(0, PagedRegion::end);
        let (claims, noted) = (AtomicBits::new(pages), AtomicBits::new(pages.div_ceil(WINDOW)));
        let (counters, removing, touched) = (Counters::default(), RwLock::default(), Mutex::default());
        let protecting = AtomicBool::new(false);
        Self { regions, watched, flags, installer, counters, claims, removing, removals, touched, noted, protecting }
    }

    /// Locks `removing` shared: until the lock is released, no removal is read, and no page is evicted.
    pub(super) fn no_removals(&self) -> RwLockReadGuard<'_, ()> {
        self.counters.counted(|| self.removing.try_read(), || self.removing.read())
    }

    /// Locks `removing` exclusively: until the lock is released, no thread writes contents.
    pub fn no_writes(&self) -> RwLockWriteGuard<'_, ()> {
        self.counters.counted(|| self.removing.try_write(), || self.removing.write())
    }

    /// Returns whether the pages of any region can only be installed as whole huge pages.
    pub fn any_private_huge(&self) -> bool {
        (0..self.regions.len()).any(|region| self.is_private_huge(region))
    }

    /// Returns whether the pages of a region can only be installed as whole huge pages.
    pub fn is_private_huge(&self, region: usize) -> bool {
        matches!(self.installer, Installer::Private(_)) && self.regions[region].granule() > 1
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
            self.map_written(first, first + count);
        }
        Ok(())
    }

    /// Allocates memory for pages `[first, end)` of a region, counted over all regions, which are about to be mapped.
    pub fn allocate(&self, region: usize, first: usize, end: usize) -> Result<(), LoadError> {
        if let Installer::Files(placer) = &self.installer {
            placer.slots(region, first - self.regions[region].base, end - first)?;
        }
        Ok(())
    }

    /// Writes a run of consecutive pages. Returns the number of pages that this thread has written.
    fn write(&self, region: usize, run: &[(usize, usize)], contents: &[u8]) -> Result<u64, LoadError> {
        match &self.installer {
            Installer::Files(placer) => self.write_slots(placer, region, run, contents),
            Installer::Private(_) => self.copy_run(region, run, contents),
        }
    }

    fn write_slots(
        &self,
        placer: &Placer,
        region: usize,
        run: &[(usize, usize)],
        contents: &[u8],
    ) -> Result<u64, LoadError> {
        let first = run[0].0 - self.regions[region].base;
        let _no_removals = self.no_removals();
        self.decide(run[0].0, run[0].0 + run.len());
        let slots = placer.slots(region, first, run.len())?;
        let (start, end) = (run[0].0, run[0].0 + run.len());
        let (from, len) = (run[0].1, run.len() * SMALL_PAGE);
        let in_order = run.iter().enumerate().all(|(at, &(_, offset))| offset == from + at * SMALL_PAGE);
        if in_order && self.claim_all(start, end) {
            let from = contents[from..from + len].as_ptr();
            // SAFETY: as below, for all pages of the run at once.
            unsafe { std::ptr::copy_nonoverlapping(from, slots, len) };
            self.flags.clear_all(start, end);
            self.counters.loaded.fetch_add(run.len() as u64, Ordering::Relaxed);
            return Ok(run.len() as u64);
        }
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

    /// Writes the pages `[first, end)` of a region through `unpack`, and clears their deferred bits, but does not map them.
    /// Returns false, and writes nothing, if any of them is present or claimed by another thread, or in private memory.
    ///
    /// If `unpack` fails, the pages stay deferred. Their claims are released, so that another thread can try to load
    /// them.
    pub fn unpack_all(
        &self,
        (first, end): (usize, usize),
        unpack: impl FnOnce(&mut [u8]) -> Result<(), ImageError>,
    ) -> Result<bool, LoadError> {
        let Installer::Files(placer) = &self.installer else { return Ok(false) };
        let region = self.region_of(first);
        let base = self.regions[region].base;
        let _no_removals = self.no_removals();
        self.decide(first, end);
        let slots = placer.slots(region, first - base, end - first)?;
        if !self.claim_all(first, end) {
            return Ok(false);
        }
        // SAFETY: the pages lie in our mapping, and `slots` has allocated their memory. The claims make this thread the
        // only writer of the pages; the workload has not mapped them, because their deferred bits are set.
        let memory = unsafe { std::slice::from_raw_parts_mut(slots, (end - first) * SMALL_PAGE) };
        if let Err(error) = unpack(memory) {
            self.claims.take_run(first, end);
            return Err(error.into());
        }
        self.flags.clear_all(first, end);
        self.counters.loaded.fetch_add((end - first) as u64, Ordering::Relaxed);
        Ok(true)
    }

    /// Claims deferred pages for writing. Returns false, and claims none of them, if any of them is present or claimed
    /// by another thread. Another thread may find a page claimed for a moment even then, and must not take this to mean
    /// that the page will be written.
    fn claim_all(&self, first: usize, end: usize) -> bool {
        self.flags.all_set(first, end) && self.claims.set_run(first, end)
    }

    /// Waits while another thread that has claimed a deferred page writes it. Returns false if that thread has released
    /// its claim without writing the page.
    pub fn await_claim(&self, page: usize) -> bool {
        while self.flags.is_set(page) {
            if !self.claims.get(page) {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    /// Claims a deferred page for writing. Returns false if the page is present or claimed by another thread.
    pub(super) fn claim(&self, page: usize) -> bool {
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
    /// In private memory, pages that are not deferred and not present are zeros.
    pub fn map(&self, region: usize, first: usize, end: usize) {
        self.map_with(region, first, end, false);
    }

    /// Maps pages whose contents have just been written; see `protecting`. Private pages are mapped already.
    pub fn map_written(&self, first: usize, end: usize) {
        if first < end && matches!(self.installer, Installer::Files(_)) {
            self.map_with(self.region_of(first), first, end, self.protecting.load(Ordering::Acquire));
        }
    }

    fn map_with(&self, region: usize, first: usize, end: usize, protect: bool) {
        if self.watched.is_empty() {
            return;
        }
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
            let Some((address, len)) = segment.part(start, stop) else { continue };
            let _ = match &self.installer {
                Installer::Files(_) => uffd.resolve(address, len, page, protect),
                Installer::Private(private) => private.map_zeros(uffd, address, len, page),
            };
        }
    }

    /// Counts a fault on a deferred page. Records the window of the page at the first fault in it.
    pub fn missed(&self, page: usize) {
        if let Ok(window) = u32::try_from(page / WINDOW)
            && !self.noted.set(page / WINDOW)
        {
            self.touched.lock().push(window);
        }
        self.counters.missed.fetch_add(1, Ordering::Relaxed);
    }

    /// Maps a present page together with the adjacent present pages of its window, or with all pages of its huge page
    /// if none of them is deferred. Maps a page of private memory alone. Does nothing if the page itself is deferred.
    pub fn map_present(&self, region: usize, page: usize) -> Result<(), LoadError> {
        let Installer::Files(placer) = &self.installer else {
            self.map(region, page, page + 1);
            return Ok(());
        };
        let found = &self.regions[region];
        let (first, end) = found.window(page);
        // The lock prevents a discard of these pages until their slots are allocated.
        let _no_removals = self.no_removals();
        let runs = self.flags.clear_runs(first, end);
        let Some(&(start, stop)) = runs.iter().find(|(start, stop)| (*start..*stop).contains(&page)) else {
            return Ok(());
        };
        placer.slots(region, start - found.base, stop - start)?;
        // If the file has a huge page for the unit and none of its pages is deferred, map all of it.
        let unit = (page - found.base) / SLOTS * SLOTS;
        let (head, tail) = (found.base + unit, found.base + unit + SLOTS);
        let is_large = || is_large(placer, found, unit);
        if tail <= found.end() && self.flags.next(head, tail).is_none() && is_large() {
            self.map_run(region, unit, unit + SLOTS, false);
        } else {
            self.map_run(region, start - found.base, stop - found.base, false);
        }
        Ok(())
    }

    /// Maps the present pages of a region: huge pages without deferred pages by PMD entries, all other pages as base
    /// pages. Does nothing for private memory, whose present pages are mapped.
    pub fn populate(&self, region: usize) -> std::io::Result<()> {
        let found = &self.regions[region];
        let Some(mapping) = &found.mapping else { return Ok(()) };
        let large = if found.granule() > 1 { Vec::new() } else { mapping.large_units()? };
        for (start, end) in mapping.data_ranges()? {
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

/// Returns whether our mapping of a region's file maps the unit that begins at `page` of the region by a PMD entry.
fn is_large(placer: &Placer, region: &PagedRegion, page: usize) -> bool {
    let Some(mapping) = &region.mapping else { return false };
    let start = mapping.page(page) as u64;
    placer.own().large_mapped(start, LARGE_PAGE as u64).is_ok_and(|found| !found.is_empty())
}
