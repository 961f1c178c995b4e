//! Contents into memory: load, install, map. What always holds: contents, then flag, then map.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use thiserror::Error;

use super::flags::Flags;
use super::removals::Removals;
use super::source::{Brought, Source};
use crate::image::ImageError;
use crate::mapping::Mapping;
use crate::pages::AtomicBits;
use crate::placer::{PlaceError, Placer};
use crate::segment::Segment;
use crate::uapi::Userfault;
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Pages that are mapped at a time, 64 KiB.
pub const WINDOW: usize = 16;

/// Why a page cannot be had. It is never zeros instead.
#[derive(Debug, Error, Clone)]
pub enum LoadError {
    /// The image is damaged, cut off or gone.
    #[error("{0}")]
    Image(Arc<ImageError>),
    /// There is no memory for it.
    #[error("{0}")]
    Place(Arc<PlaceError>),
    /// The peer that has it cannot be reached.
    #[error("the connection to the peer that has the page is lost: {0}")]
    Lost(String),
    /// Another pager brings it, or will.
    #[error("its pager has ended")]
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

/// A region that is being restored.
#[derive(Debug)]
pub struct Region {
    /// Our mapping of its file, which holds nothing that the image does not say.
    pub mapping: Arc<Mapping>,
    /// Size of a page of the file, bytes.
    pub page_size: usize,
    /// Number of its first page, counted over all regions.
    pub base: usize,
}

impl Region {
    /// Number of the page after its last.
    pub fn end(&self) -> usize {
        self.base + self.mapping.pages()
    }

    /// Pages that only go together: those of a page of the file.
    pub fn granule(&self) -> usize {
        self.page_size / SMALL_PAGE
    }

    /// The pages around `page` that are mapped together.
    pub fn window(&self, page: usize) -> (usize, usize) {
        let unit = WINDOW.max(self.granule());
        let start = (page - self.base) / unit * unit;
        (self.base + start, self.end().min(self.base + start + unit))
    }
}

/// A mapping of a part of a region by the workload, and what its faults come through.
#[derive(Debug)]
pub struct Watched {
    pub segment: Segment,
    pub uffd: Arc<Userfault>,
}

/// What has been done so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// Accesses that waited for us.
    pub faults: AtomicU64,
    /// Of these, to pages whose contents were still to come.
    pub missed: AtomicU64,
    /// Pages whose contents were read before anybody asked for them.
    pub prefetched: AtomicU64,
    /// Pages whose contents were read, in all.
    pub loaded: AtomicU64,
    /// Nanoseconds of service of all faults.
    pub service: AtomicU64,
    /// Nanoseconds of service of the longest.
    pub longest: AtomicU64,
    /// Faults by time of service: number `k` is of those that took less than 2^k us, and 2^(k-1) us or more.
    pub histogram: [AtomicU64; 32],
}

impl Counters {
    /// Takes in the service of a fault.
    pub fn served(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.service.fetch_add(nanoseconds, Ordering::Relaxed);
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
        let bin = (u64::BITS - (nanoseconds / 1000).leading_zeros()) as usize;
        self.histogram[bin.min(self.histogram.len() - 1)].fetch_add(1, Ordering::Relaxed);
    }
}

/// Memory that contents come to.
#[derive(Debug)]
pub struct Memory {
    pub regions: Vec<Region>,
    pub watched: Vec<Watched>,
    pub flags: Flags,
    /// Where contents come from.
    pub source: Source,
    pub placer: Placer,
    pub counters: Counters,
    /// Pages that somebody has taken upon himself to fill, or that were discarded.
    claims: AtomicBits,
    /// Held shared while contents are written, alone while removals are read or pages let go: contents never come after
    /// a removal.
    pub removing: RwLock<()>,
    /// Removals of deferred pages that may be discards.
    pub removals: Removals,
    /// Windows in the order of their first fault.
    pub touched: Mutex<Vec<u32>>,
    /// Those that are in it: pages may go and come back for as long as the workload lives.
    noted: AtomicBits,
    /// Whether contents that have come are mapped write-protected.
    pub protecting: AtomicBool,
}

/// Buffers of one thread.
#[derive(Debug, Default)]
pub struct Scratch {
    /// What has been read, verified.
    pub contents: Vec<u8>,
    /// Pages that are in it, and where.
    pub wanted: Vec<(usize, usize)>,
}

impl Memory {
    pub fn new(
        regions: Vec<Region>,
        watched: Vec<Watched>,
        flags: Flags,
        source: Source,
        placer: Placer,
        removals: Removals,
    ) -> Self {
        let pages = regions.last().map_or(0, Region::end);
        let (claims, noted) = (AtomicBits::new(pages), AtomicBits::new(pages.div_ceil(WINDOW)));
        let (counters, removing, touched) = (Counters::default(), RwLock::default(), Mutex::default());
        let protecting = AtomicBool::new(false);
        Self {
            regions,
            watched,
            flags,
            source,
            placer,
            counters,
            claims,
            removing,
            removals,
            touched,
            noted,
            protecting,
        }
    }

    /// Number of the region that a page is in.
    pub fn region_of(&self, page: usize) -> usize {
        self.regions.partition_point(|region| region.end() <= page)
    }

    /// Whether contents of a page that a segment maps are still to come.
    pub fn lacks_any(&self, segment: &Segment) -> bool {
        let (first, last) = segment.extent();
        let base = self.regions[segment.region].base;
        self.flags.next(base + first, base + last).is_some()
    }

    /// Writes what is wanted to its slots, clears the flags, and maps it.
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
            self.write(region, run, &scratch.contents)?;
            self.map_with(region, first, first + count, self.protecting.load(Ordering::Acquire));
        }
        Ok(())
    }

    fn write(&self, region: usize, run: &[(usize, usize)], contents: &[u8]) -> Result<(), LoadError> {
        let first = run[0].0 - self.regions[region].base;
        let _no_removals = self.removing.read();
        self.decide(run[0].0, run[0].0 + run.len());
        let slots = self.placer.slots(u32::try_from(region).unwrap_or(u32::MAX), first, run.len())?;
        let mut done = 0;
        for (at, &(page, offset)) in run.iter().enumerate() {
            if !self.claim(page) {
                continue;
            }
            let from = contents[offset..offset + SMALL_PAGE].as_ptr();
            // SAFETY: `slots` gave room for the run in our own mapping; nobody else writes the page: it is claimed, and
            // the workload has it not mapped before its flag is clear.
            unsafe { std::ptr::copy_nonoverlapping(from, slots.add(at * SMALL_PAGE), SMALL_PAGE) };
            self.flags.clear(page);
            done += 1;
        }
        self.counters.loaded.fetch_add(done, Ordering::Relaxed);
        Ok(())
    }

    /// Takes a page that needs its contents upon oneself; false: it has them, or somebody else is at it.
    fn claim(&self, page: usize) -> bool {
        self.flags.is_set(page) && !self.claims.set(page)
    }

    /// A page has no contents any more, and may be claimed again. `removing` is held alone.
    pub fn lack(&self, page: usize) {
        self.claims.take(page);
        self.flags.set(page);
    }

    /// The workload has discarded pages: they are zeros from now on. `removing` is held alone.
    pub fn discard(&self, first: usize, end: usize) {
        let mut at = first;
        while let Some(page) = self.flags.next(at, end) {
            self.claims.set(page);
            self.flags.clear(page);
            at = page + 1;
        }
    }

    /// Maps what of `[first, end)` is in memory, wherever the workload maps it; wakes who waits.
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

    /// Maps pages, counted in the region, all of which are in memory. An error is of a process that ends.
    fn map_run(&self, region: usize, start: usize, stop: usize, protect: bool) {
        let page = self.regions[region].page_size as u64;
        for Watched { segment, uffd } in self.watched.iter().filter(|watched| watched.segment.region == region) {
            if let Some((address, len)) = segment.part(start, stop) {
                let _ = uffd.resolve(address, len, page, protect);
            }
        }
    }

    /// Sees to it that the contents of a page are in memory and mapped: the answer to an access.
    pub fn touch(&self, page: usize, scratch: &mut Scratch) -> Result<Brought, LoadError> {
        let region = self.region_of(page);
        let found = &self.regions[region];
        let (first, end) = found.window(page);
        if !self.flags.is_set(page) && found.granule() == 1 {
            self.map_present(region, page)?;
            return Ok(Brought::All);
        }
        if let Ok(window) = u32::try_from(page / WINDOW)
            && !self.noted.set(page / WINDOW)
        {
            self.touched.lock().push(window);
        }
        self.counters.missed.fetch_add(1, Ordering::Relaxed);
        let brought = self.bring(page, (first, end), scratch)?;
        if matches!(brought, Brought::Later) {
            return Ok(brought);
        }
        if found.granule() > 1 {
            self.placer.slots(u32::try_from(region).unwrap_or(u32::MAX), first - found.base, end - first)?;
            self.map(region, first, end);
        } else {
            self.map(region, page, page + 1);
        }
        Ok(brought)
    }

    /// Maps a page that needs nothing read, and its neighbours that need nothing either.
    fn map_present(&self, region: usize, page: usize) -> Result<(), LoadError> {
        let found = &self.regions[region];
        let (first, end) = found.window(page);
        // What has no flag now must have none when there is room for it.
        let _no_removals = self.removing.read();
        let runs = self.flags.clear_runs(first, end);
        let Some(&(start, stop)) = runs.iter().find(|(start, stop)| (*start..*stop).contains(&page)) else {
            return Ok(());
        };
        let number = u32::try_from(region).unwrap_or(u32::MAX);
        self.placer.slots(number, start - found.base, stop - start)?;
        // Where a large page has come into being for it, all of that is there.
        let unit = (page - found.base) / SLOTS * SLOTS;
        let (head, tail) = (found.base + unit, found.base + unit + SLOTS);
        if tail <= found.end() && self.flags.next(head, tail).is_none() && self.is_large(region, unit) {
            self.map_run(region, unit, unit + SLOTS, false);
        } else {
            self.map_run(region, start - found.base, stop - found.base, false);
        }
        Ok(())
    }

    /// Maps what is in memory of a region: units of which nothing is missing as large pages, where they are such.
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

    /// Maps a large page wherever the workload maps it; false where one has to be mapped page by page.
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
}
