//! Received pages into their slots, and into the workload's page tables (S1, S5, S6, S7).
//!
//! A page is placed at its own offset of the region, whatever it holds and whenever it comes, so that a large page of
//! the source is a large page here: the first page of a unit allocates all of it; zeros are zeros in it and never a
//! hole. A unit whose every slot has been received is *complete*: its contents are final or will be overwritten in
//! place, so it may be mapped into the workload's page tables as one large page while the transfer goes on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;
use thiserror::Error;

use crate::block::Class;
use crate::mapping::Mapping;
use crate::pages::AtomicBits;
use crate::segment::Segment;
use crate::space::{AdoptError, Space};
use crate::uapi::{self, check};
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// So many units may be begun at the same time, at the most.
const LOCKS: usize = 64;

/// Why pages could not be placed.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// A region that was not announced.
    #[error("pages of region {0}, and only {1} regions were announced")]
    Region(u32, usize),
    /// Pages that are not in the region.
    #[error("pages {first} to {end} of a region of {pages} pages")]
    Pages {
        /// First page.
        first: usize,
        /// Page after the last.
        end: usize,
        /// Pages of the region.
        pages: usize,
    },
    /// Contents by reference that this flow does not use.
    #[error("pages of class {0:?} are not expected here")]
    Class(Class),
    /// The file system, the pool or the machine is full.
    #[error(
        "no memory for pages {first} to {end} of region {region} ({error}): free some, or enlarge their file system"
    )]
    Memory {
        /// Number of the region.
        region: u32,
        /// First page.
        first: usize,
        /// Page after the last.
        end: usize,
        /// The kernel's words.
        error: io::Error,
    },
}

/// A region at the destination.
#[derive(Debug)]
pub struct Target {
    /// Our mapping of its file. The file is fresh: all holes.
    pub mapping: Arc<Mapping>,
    /// Size of a page of the file, bytes: 4 KiB, or 2 MiB on hugetlbfs.
    pub page_size: usize,
    /// Which units stand on large pages at the source (S6); may be shorter than the region, or empty.
    pub large: Vec<bool>,
}

#[derive(Debug)]
struct Region {
    target: Target,
    received: AtomicBits,
    /// Pages that hold bytes which a zero or absent page must clear.
    filled: AtomicBits,
    /// Units whose first page has come.
    begun: AtomicBits,
    /// Units for which a large page was allocated: all their slots are there.
    whole: AtomicBits,
    /// Per unit, pages still to come.
    missing: Vec<AtomicU16>,
    mapped: Vec<AtomicBool>,
}

impl Region {
    fn new(target: Target) -> Self {
        let pages = target.mapping.pages();
        let units = pages.div_ceil(SLOTS);
        let missing = (0..units).map(|unit| (pages - unit * SLOTS).min(SLOTS));
        Self {
            received: AtomicBits::new(pages),
            filled: AtomicBits::new(pages),
            begun: AtomicBits::new(units),
            whole: AtomicBits::new(units),
            missing: missing.map(|count| AtomicU16::new(u16::try_from(count).unwrap_or(u16::MAX))).collect(),
            mapped: (0..units).map(|_| AtomicBool::new(false)).collect(),
            target,
        }
    }

    /// Whether a unit stands on a large page at the source. What is shorter than a large page cannot.
    fn is_large(&self, unit: usize) -> bool {
        let fits = unit < self.target.mapping.pages() / SLOTS;
        fits && self.target.large.get(unit).copied().unwrap_or(false)
    }

    /// Whether every slot of a unit has been received.
    fn is_complete(&self, unit: usize) -> bool {
        self.missing[unit].load(Ordering::Acquire) == 0
    }

    /// Makes sure of the memory of `[first, end)` of one unit: where there is none, writing to it would end us by a
    /// signal.
    fn allocate(&self, unit: usize, first: usize, end: usize) -> io::Result<()> {
        if self.whole.get(unit) || (first..end).all(|page| self.filled.get(page)) {
            return Ok(());
        }
        populate_write(self.target.mapping.page(first), (end - first) * SMALL_PAGE)
    }
}

/// What population has done so far.
#[derive(Debug, Default)]
pub struct Populated {
    /// Large pages mapped into page tables.
    pub large: AtomicU64,
    /// Small pages (or hugetlbfs pages) mapped.
    pub small: AtomicU64,
    /// Large pages that had to be left to the first access.
    pub failed: AtomicU64,
    /// Nanoseconds of work, over all workers.
    pub nanoseconds: AtomicU64,
}

/// Places pages of several streams at once, and populates page tables in the background.
#[derive(Debug)]
pub struct Placer {
    shared: Arc<Shared>,
    queue: Mutex<Option<Sender<(usize, usize)>>>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    regions: Vec<Region>,
    /// Held by who allocates the large page of a unit; a unit has always the same one.
    beginning: [Mutex<()>; LOCKS],
    own: Space,
    segments: Vec<Segment>,
    keep_large: bool,
    /// Large pages of the source for which there was no large page here (S6).
    fallbacks: AtomicU64,
    populated: Populated,
}

impl Placer {
    /// For the `targets` and the `segments` in which the workload maps them. With `workers` > 0, complete units are
    /// mapped into the workload's page tables as they come (S5).
    ///
    /// # Errors
    /// InvalidInput for a segment of a region that is no target, or what the kernel says about threads.
    pub fn new(targets: Vec<Target>, segments: Vec<Segment>, keep_large: bool, workers: usize) -> io::Result<Self> {
        if let Some(stray) = segments.iter().find(|segment| segment.region >= targets.len()) {
            let words = format!("a segment of region {}, and only {} targets", stray.region, targets.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        let own = Space::open(libc::pid_t::try_from(std::process::id()).map_err(io::Error::other)?)?;
        let shared = Arc::new(Shared {
            regions: targets.into_iter().map(Region::new).collect(),
            beginning: [const { Mutex::new(()) }; LOCKS],
            own,
            segments,
            keep_large,
            fallbacks: AtomicU64::new(0),
            populated: Populated::default(),
        });
        let (queue, jobs) = unbounded();
        let spawn = |number| {
            let (shared, jobs) = (shared.clone(), jobs.clone());
            std::thread::Builder::new()
                .name(format!("pf-populate{number}"))
                .spawn(move || populate_loop(&shared, &jobs))
        };
        let threads = (0..workers).map(spawn).collect::<io::Result<Vec<_>>>()?;
        let queue = if workers > 0 { Some(queue) } else { None };
        Ok(Self { shared, queue: Mutex::new(queue), workers: Mutex::new(threads) })
    }

    fn region(&self, region: u32, first: usize, count: usize) -> Result<&Region, PlaceError> {
        let known = self.shared.regions.len();
        let index = usize::try_from(region).map_err(|_| PlaceError::Region(region, known))?;
        let found = self.shared.regions.get(index).ok_or(PlaceError::Region(region, known))?;
        let (end, pages) = (first.saturating_add(count), found.target.mapping.pages());
        if end > pages { Err(PlaceError::Pages { first, end, pages }) } else { Ok(found) }
    }

    /// Whether there are such pages.
    pub fn check(&self, region: u32, first: usize, count: usize) -> Result<(), PlaceError> {
        self.region(region, first, count).map(drop)
    }

    /// Where the bytes of data pages go: memory that is there, on large pages where the source has them.
    pub fn slots(&self, region: u32, first: usize, count: usize) -> Result<*mut u8, PlaceError> {
        let found = self.region(region, first, count)?;
        for unit in first / SLOTS..(first + count).div_ceil(SLOTS) {
            self.begin(found, unit);
            let (first, end) = (first.max(unit * SLOTS), (first + count).min((unit + 1) * SLOTS));
            found.allocate(unit, first, end).map_err(|error| PlaceError::Memory { region, first, end, error })?;
        }
        Ok(found.target.mapping.page(first))
    }

    /// The bytes of data pages have been written to their slots, and verified.
    pub fn placed(&self, region: u32, first: usize, count: usize) -> Result<(), PlaceError> {
        let found = self.region(region, first, count)?;
        (first..first + count).for_each(|page| {
            found.filled.set(page);
        });
        self.received(region, found, first, count);
        Ok(())
    }

    /// Places pages that have no bytes.
    pub fn place_empty(&self, region: u32, first: usize, count: usize, class: Class) -> Result<(), PlaceError> {
        let found = self.region(region, first, count)?;
        if !matches!(class, Class::Zero | Class::Absent) {
            return Err(PlaceError::Class(class));
        }
        for unit in first / SLOTS..(first + count).div_ceil(SLOTS) {
            let start = first.max(unit * SLOTS);
            let end = (first + count).min((unit + 1) * SLOTS);
            if class == Class::Zero && found.is_large(unit) {
                self.begin(found, unit);
            }
            (start..end).filter(|&page| found.filled.take(page)).for_each(|page| {
                // SAFETY: the page is within the mapping; a filled slot is allocated, so writing cannot run out of it.
                unsafe { std::ptr::write_bytes(found.target.mapping.page(page), 0, SMALL_PAGE) }
            });
        }
        self.received(region, found, first, count);
        Ok(())
    }

    /// The first page of a unit that is large at the source allocates a large page for all of it (S6). Other streams
    /// wait for that: small pages that come in between would have to be copied, and could be in the way.
    fn begin(&self, region: &Region, unit: usize) {
        if region.begun.get(unit) {
            return;
        }
        let _beginning = self.shared.beginning[unit % LOCKS].lock();
        if !region.begun.get(unit) {
            if self.shared.keep_large && region.is_large(unit) {
                self.allocate_large(region, unit);
            }
            region.begun.set(unit);
        }
    }

    /// Allocates the large page of a unit that is large at the source, before its first page comes.
    pub fn allocate_ahead(&self, region: usize, unit: usize) {
        if let Some(found) = self.shared.regions.get(region).filter(|found| found.is_large(unit)) {
            self.begin(found, unit);
        }
    }

    fn allocate_large(&self, region: &Region, unit: usize) {
        match self.shared.allocate_large(&region.target, unit) {
            Ok(()) => drop(region.whole.set(unit)),
            Err(_) => drop(self.shared.fallbacks.fetch_add(1, Ordering::Relaxed)),
        }
    }

    fn received(&self, number: u32, region: &Region, first: usize, count: usize) {
        let mut at = first;
        while at < first + count {
            let unit = at / SLOTS;
            let end = (first + count).min((unit + 1) * SLOTS);
            let new = u16::try_from((at..end).filter(|&page| !region.received.set(page)).count()).unwrap_or(0);
            if new > 0 && region.missing[unit].fetch_sub(new, Ordering::AcqRel) == new {
                self.complete(number as usize, unit);
            }
            at = end;
        }
    }

    fn complete(&self, region: usize, unit: usize) {
        let queue = self.queue.lock();
        if let Some(queue) = queue.as_ref() {
            // The workers live as long as the queue.
            let _ = queue.send((region, unit));
        }
    }

    /// Our own address space, in which the targets are mapped.
    pub(crate) fn own(&self) -> &Space {
        &self.shared.own
    }

    /// Number of pages of all regions that have not been received.
    pub fn missing(&self) -> usize {
        let missing = self.shared.regions.iter().flat_map(|region| &region.missing);
        missing.map(|count| usize::from(count.load(Ordering::Acquire))).sum()
    }

    /// Large pages of the source that could not be kept.
    pub fn fallbacks(&self) -> u64 {
        self.shared.fallbacks.load(Ordering::Relaxed)
    }

    /// What population has done so far.
    pub fn populated(&self) -> &Populated {
        &self.shared.populated
    }

    /// Maps those of the `units` of a region that are complete into the workload's page tables now (S1).
    ///
    /// # Errors
    /// For a region or unit that there is not; the units before it are mapped then.
    pub fn populate(&self, region: u32, units: &[usize]) -> Result<(), PlaceError> {
        for &unit in units {
            self.region(region, unit.saturating_mul(SLOTS), 1)?;
            self.shared.populate_unit(region as usize, unit);
        }
        Ok(())
    }

    /// Waits for the workers, then maps what did not go as large pages, page by page, where it is in memory.
    ///
    /// # Errors
    /// When the workload cannot be adopted. The pages are left to the first access then, which is slower, not wrong.
    pub fn finish(&self, rest: bool) -> Result<(), AdoptError> {
        self.join();
        if rest { self.shared.populate_small() } else { Ok(()) }
    }

    fn join(&self) {
        drop(self.queue.lock().take());
        for worker in self.workers.lock().drain(..) {
            let _ = worker.join();
        }
    }
}

impl Drop for Placer {
    fn drop(&mut self) {
        self.join();
    }
}

impl Shared {
    fn allocate_large(&self, target: &Target, unit: usize) -> io::Result<()> {
        let start = target.mapping.page(unit * SLOTS);
        // A write fault, which allocates and maps all of the large page, and changes no byte that another stream may
        // have placed meanwhile.
        populate_write(start, SMALL_PAGE)?;
        if target.page_size == LARGE_PAGE || self.is_large(start)? {
            return Ok(());
        }
        self.own.collapse(start as u64, LARGE_PAGE as u64)
    }

    fn is_large(&self, start: *mut u8) -> io::Result<bool> {
        Ok(!self.own.large_mapped(start as u64, LARGE_PAGE as u64)?.is_empty())
    }

    /// Maps a complete unit in every process that maps it. Units that stand on small pages here are left to
    /// `populate_small`: to collapse them would copy them, and fill their holes.
    fn populate_unit(&self, region: usize, unit: usize) {
        let (found, begin) = (&self.regions[region], Instant::now());
        let (start, end) = (unit * SLOTS, (unit + 1) * SLOTS);
        let piecewise = found.target.page_size == LARGE_PAGE || end > found.target.mapping.pages();
        let ready = !piecewise && found.is_complete(unit) && !found.mapped[unit].load(Ordering::Acquire);
        if !ready || !self.is_large(found.target.mapping.page(start)).unwrap_or(false) {
            return;
        }
        let mut touching = self.segments.iter().filter(|other| other.region == region && other.touches(start, end));
        let all = touching.clone().all(|segment| segment.map_large(start, end));
        if touching.next().is_some() {
            let counter = if all { &self.populated.large } else { &self.populated.failed };
            // A worker and `populate` may have been at it at the same time.
            let before = found.mapped[unit].fetch_or(all, Ordering::AcqRel);
            counter.fetch_add(u64::from(!before), Ordering::Relaxed);
        }
        self.spent(begin.elapsed());
    }

    fn spent(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.populated.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Maps by UFFDIO_CONTINUE what is in the page cache, of all complete units that are not mapped as large pages.
    fn populate_small(&self) -> Result<(), AdoptError> {
        let begin = Instant::now();
        for segment in &self.segments {
            let region = &self.regions[segment.region];
            let mut ranges = Vec::new();
            for (start, end) in region.target.mapping.data_ranges()? {
                unmapped(region, start / SMALL_PAGE, end / SMALL_PAGE, &mut ranges);
            }
            if !ranges.is_empty() {
                let page = region.target.page_size as u64;
                let mapped = map_small(segment, page, &ranges)?;
                self.populated.small.fetch_add(mapped / page, Ordering::Relaxed);
            }
        }
        self.spent(begin.elapsed());
        Ok(())
    }
}

/// Allocates and maps, changing no byte. ENOMEM where there is no memory.
fn populate_write(start: *mut u8, len: usize) -> io::Result<()> {
    // SAFETY: the callers, all in this file, give ranges within a mapping of ours.
    check(unsafe { libc::madvise(start.cast(), len, libc::MADV_POPULATE_WRITE) }).map(drop).map_err(|error| {
        // A full file system or pool: what would have been SIGBUS is EFAULT here.
        let full = error.raw_os_error() == Some(libc::EFAULT);
        if full { io::Error::from_raw_os_error(libc::ENOMEM) } else { error }
    })
}

/// Cuts the units that are mapped as large pages, and those with pages still to come, out of `[start, end)`.
fn unmapped(region: &Region, start: usize, end: usize, ranges: &mut Vec<(usize, usize)>) {
    let mut at = start;
    while at < end {
        let unit = at / SLOTS;
        let stop = end.min((unit + 1) * SLOTS);
        if region.is_complete(unit) && !region.mapped[unit].load(Ordering::Acquire) {
            match ranges.last_mut() {
                Some((_, last)) if *last == at => *last = stop,
                _ => ranges.push((at, stop)),
            }
        }
        at = stop;
    }
}

/// Maps existing pages of `ranges` (in pages of the region) in one segment; returns the bytes mapped.
fn map_small(segment: &Segment, page: u64, ranges: &[(usize, usize)]) -> Result<u64, AdoptError> {
    // For all faults: with one for user mode only, system calls of the workload would fail while it is registered.
    let uffd = match segment.space.full_userfault(uapi::FEATURE_MINOR_SHMEM | uapi::FEATURE_MINOR_HUGETLBFS) {
        Err(AdoptError::NoFaults(..)) => return populate_read(segment, ranges),
        made => made?,
    };
    let mut mapped = 0;
    uffd.register(segment.address, segment.len, uapi::REGISTER_MODE_MINOR)?;
    for &(start, end) in ranges {
        if let Some((address, len)) = segment.part(start, end) {
            // What does not go is left to the first access.
            mapped += uffd.map_existing(address, len, page).unwrap_or(0);
        }
    }
    uffd.unregister(segment.address, segment.len)?;
    Ok(mapped)
}

/// As `map_small`, without a userfaultfd: by MADV_POPULATE_READ in the process, which reads no hole of `ranges`.
fn populate_read(segment: &Segment, ranges: &[(usize, usize)]) -> Result<u64, AdoptError> {
    let mut mapped = 0;
    for &(start, end) in ranges {
        if let Some((address, len)) = segment.part(start, end) {
            segment.space.populate_read(address, len)?;
            mapped += len;
        }
    }
    Ok(mapped)
}

fn populate_loop(shared: &Shared, jobs: &Receiver<(usize, usize)>) {
    for (region, unit) in jobs {
        // Only what exists: a unit of nothing but holes has no large page to map, and must not get one.
        if shared.regions[region].begun.get(unit) {
            shared.populate_unit(region, unit);
        }
    }
}
