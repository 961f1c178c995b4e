//! Placement of received pages in their slots, and population of the workload's page tables (S1, S5, S6, S7).
//!
//! A page is placed at its own offset in the region, regardless of its contents and of the order in which pages are
//! received, so a huge page of the source is a huge page at the destination. The first page received for a unit that is
//! a huge page at the source allocates the whole huge page; zero pages are zeros in the huge page, never holes. A unit
//! is *complete* when all of its slots have been received. From then on, its contents are final or overwritten in
//! place, so the unit can be mapped into the workload's page tables as one huge page during the transfer.
//!
//! A clone that shares a base has private pages, which are not in a file. Its pages are placed in staging files, and
//! moved from there into the process of the clone after each round. An absent page is a page of the base.

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
use crate::pages::{AtomicBits, PageSet};
use crate::private_mappings::PrivateMappings;
use crate::segment::Segment;
use crate::space::{AdoptError, Space};
use crate::uapi::{self, check};
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Number of allocation locks, which bounds the number of units that are allocated in parallel.
const LOCKS: usize = 64;

/// Reason why pages could not be placed.
#[derive(Debug, Error)]
pub enum PlaceError {
    /// The region does not exist.
    #[error("cannot place pages of region {0}: there are only {1} regions")]
    Region(usize, usize),
    /// The range of pages extends beyond the region.
    #[error("cannot place pages {first} to {end}: the region has {pages} pages")]
    Pages {
        /// First page.
        first: usize,
        /// Page after the last.
        end: usize,
        /// Number of pages of the region.
        pages: usize,
    },
    /// The class of the pages is invalid: the protocol does not send such pages.
    #[error("cannot place pages of class {0:?}: expected data, zero or absent pages")]
    Class(Class),
    /// A page of a clone was received as a private page before.
    #[error("cannot place page {0} as a page of the base: it was received as a private page before")]
    Private(usize),
    /// The file system, the huge page pool or the host is out of memory.
    #[error(
        "cannot allocate memory for pages {first} to {end} of region {region}: {error}; free memory, or enlarge the \
         file system"
    )]
    Memory {
        /// Index of the region.
        region: usize,
        /// First page.
        first: usize,
        /// Page after the last.
        end: usize,
        /// Cause.
        error: io::Error,
    },
}

/// Region at the destination.
#[derive(Debug)]
pub struct Target {
    /// Mapping of the region's file by this process. [`Placer::place_empty`] assumes that the file initially had no
    /// data.
    pub mapping: Arc<Mapping>,
    /// Page size of the file in bytes: 4 KiB, or 2 MiB in hugetlbfs.
    pub page_size: usize,
    /// Whether each 2 MiB unit is backed by a huge page at the source (S6). The list may be shorter than the region, or
    /// empty.
    pub large: Vec<bool>,
}

#[derive(Debug)]
struct PlacedRegion {
    target: Target,
    received: AtomicBits,
    /// Pages that were filled with data, which must be cleared if a zero or absent page is received.
    filled: AtomicBits,
    /// Units whose allocation has been attempted.
    begun: AtomicBits,
    /// Units for which a huge page was allocated. All of their slots have memory.
    whole: AtomicBits,
    /// For each unit, the number of pages that have not been received.
    missing: Vec<AtomicU16>,
    mapped: Vec<AtomicBool>,
}

impl PlacedRegion {
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

    /// Returns whether a unit is backed by a huge page at the source; false for a last unit of less than 2 MiB.
    fn is_large(&self, unit: usize) -> bool {
        let fits = unit < self.target.mapping.pages() / SLOTS;
        fits && self.target.large.get(unit).copied().unwrap_or(false)
    }

    /// Returns whether all slots of a unit have been received.
    fn is_complete(&self, unit: usize) -> bool {
        self.missing[unit].load(Ordering::Acquire) == 0
    }

    /// Allocates memory for pages `[first, end)` of a unit. Writing to a slot without memory would raise SIGBUS.
    fn allocate(&self, unit: usize, first: usize, end: usize) -> io::Result<()> {
        if self.whole.get(unit) || (first..end).all(|page| self.filled.get(page)) {
            return Ok(());
        }
        populate_write(self.target.mapping.page(first), (end - first) * SMALL_PAGE)
    }
}

/// Counters of the population of page tables.
#[derive(Debug, Default)]
pub struct Populated {
    /// Number of huge pages mapped into page tables.
    pub large: AtomicU64,
    /// Number of base pages (or hugetlbfs pages) mapped.
    pub small: AtomicU64,
    /// Number of huge pages that could not be mapped. They are mapped on first access.
    pub failed: AtomicU64,
    /// Total time spent on the population in nanoseconds.
    pub nanoseconds: AtomicU64,
}

/// Placer of the pages of several streams. It also populates page tables in the background.
#[derive(Debug)]
pub struct Placer {
    shared: Arc<PlacerState>,
    queue: Mutex<Option<Sender<(usize, usize)>>>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

/// Private pages of a clone that is received.
#[derive(Debug)]
struct PrivatePages {
    mappings: PrivateMappings,
    /// For each region, the pages that were received as zeros and not yet moved.
    zeros: Vec<AtomicBits>,
    /// For each region, the pages that were moved.
    moved: Vec<AtomicBits>,
}

#[derive(Debug)]
struct PlacerState {
    regions: Vec<PlacedRegion>,
    /// Private pages, if the workload is a clone. The targets are staging files then.
    private: Option<PrivatePages>,
    /// Allocation locks. A unit always uses the same lock.
    beginning: [Mutex<()>; LOCKS],
    own: Space,
    segments: Vec<Segment>,
    keep_large: bool,
    /// Number of huge pages of the source that are replaced by base pages (S6).
    fallbacks: AtomicU64,
    populated: Populated,
}

impl Placer {
    /// Creates a placer for `targets`, and for the `segments` in which the workload maps them. With `keep_large`, units
    /// that are backed by huge pages at the source are allocated as huge pages (S6). `workers` is the number of threads
    /// that map units into the workload's page tables as soon as the units are complete (S5).
    ///
    /// # Errors
    /// `InvalidInput` if a segment does not belong to a target; otherwise the error of opening our own address space or
    /// of starting a thread.
    pub fn new(targets: Vec<Target>, segments: Vec<Segment>, keep_large: bool, workers: usize) -> io::Result<Self> {
        Self::create(targets, segments, keep_large, workers, None)
    }

    /// Creates a placer for a clone. `targets` are staging files, whose memory is freed when
    /// [`move_private`](Self::move_private) moves the pages to `mappings`.
    ///
    /// # Errors
    /// The error of opening our own address space.
    pub fn for_clone(targets: Vec<Target>, mappings: PrivateMappings) -> io::Result<Self> {
        let bits = || targets.iter().map(|target| AtomicBits::new(target.mapping.pages())).collect();
        let private = PrivatePages { mappings, zeros: bits(), moved: bits() };
        Self::create(targets, Vec::new(), false, 0, Some(private))
    }

    fn create(
        targets: Vec<Target>,
        segments: Vec<Segment>,
        keep_large: bool,
        workers: usize,
        private: Option<PrivatePages>,
    ) -> io::Result<Self> {
        if let Some(stray) = segments.iter().find(|segment| segment.region >= targets.len()) {
            let words = format!("invalid segment of region {}: only {} regions given", stray.region, targets.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        let own = Space::open(libc::pid_t::try_from(std::process::id()).map_err(io::Error::other)?)?;
        let shared = Arc::new(PlacerState {
            regions: targets.into_iter().map(PlacedRegion::new).collect(),
            private,
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

    fn region(&self, region: usize, first: usize, count: usize) -> Result<&PlacedRegion, PlaceError> {
        let known = self.shared.regions.len();
        let found = self.shared.regions.get(region).ok_or(PlaceError::Region(region, known))?;
        let (end, pages) = (first.saturating_add(count), found.target.mapping.pages());
        if end > pages { Err(PlaceError::Pages { first, end, pages }) } else { Ok(found) }
    }

    /// Validates a range of pages.
    ///
    /// # Errors
    /// [`PlaceError::Region`] or [`PlaceError::Pages`] if there are no such pages.
    pub fn check(&self, region: usize, first: usize, count: usize) -> Result<(), PlaceError> {
        self.region(region, first, count).map(drop)
    }

    /// Allocates memory for the slots of data pages, in huge pages where the source has them. Returns the address of
    /// the slots.
    ///
    /// # Errors
    /// If there are no such pages, or if memory cannot be allocated.
    pub fn slots(&self, region: usize, first: usize, count: usize) -> Result<*mut u8, PlaceError> {
        let found = self.region(region, first, count)?;
        for unit in first / SLOTS..(first + count).div_ceil(SLOTS) {
            self.begin(found, unit);
            let (first, end) = (first.max(unit * SLOTS), (first + count).min((unit + 1) * SLOTS));
            found.allocate(unit, first, end).map_err(|error| PlaceError::Memory { region, first, end, error })?;
        }
        Ok(found.target.mapping.page(first))
    }

    /// Records that data pages have been written to their slots and verified.
    ///
    /// # Errors
    /// If there are no such pages.
    pub fn placed(&self, region: usize, first: usize, count: usize) -> Result<(), PlaceError> {
        let found = self.region(region, first, count)?;
        (first..first + count).for_each(|page| {
            found.filled.set(page);
        });
        if let Some(private) = &self.shared.private {
            private.zeros[region].take_run(first, first + count);
        }
        self.received(region, found, first, count);
        Ok(())
    }

    /// Places zero or absent pages: clears the slots that were filled with data.
    ///
    /// # Errors
    /// If there are no such pages, if `class` is neither zero nor absent, or if a private page of a clone is absent.
    pub fn place_empty(&self, region: usize, first: usize, count: usize, class: Class) -> Result<(), PlaceError> {
        let found = self.region(region, first, count)?;
        if !matches!(class, Class::Zero | Class::Absent) {
            return Err(PlaceError::Class(class));
        }
        if let Some(private) = &self.shared.private {
            private.place_empty(region, found, (first, first + count), class)?;
            self.received(region, found, first, count);
            return Ok(());
        }
        for unit in first / SLOTS..(first + count).div_ceil(SLOTS) {
            let start = first.max(unit * SLOTS);
            let end = (first + count).min((unit + 1) * SLOTS);
            if class == Class::Zero && found.is_large(unit) {
                self.begin(found, unit);
            }
            (start..end).filter(|&page| found.filled.take(page)).for_each(|page| {
                // SAFETY: the page lies within the mapping. A filled slot is allocated, so the write cannot raise
                // SIGBUS. The bit is taken atomically, so no other thread clears the same slot.
                unsafe { std::ptr::write_bytes(found.target.mapping.page(page), 0, SMALL_PAGE) }
            });
        }
        self.received(region, found, first, count);
        Ok(())
    }

    /// Allocates a huge page for a unit that is backed by one at the source, before its first page is placed (S6).
    /// Other streams wait for the allocation: base pages allocated earlier would have to be copied, and could prevent
    /// the allocation of the huge page.
    fn begin(&self, region: &PlacedRegion, unit: usize) {
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

    /// Allocates the huge page of a unit that is backed by one at the source, before the first page of the unit is
    /// received.
    pub fn allocate_ahead(&self, region: usize, unit: usize) {
        if let Some(found) = self.shared.regions.get(region).filter(|found| found.is_large(unit)) {
            self.begin(found, unit);
        }
    }

    fn allocate_large(&self, region: &PlacedRegion, unit: usize) {
        match self.shared.allocate_large(&region.target, unit) {
            Ok(()) => drop(region.whole.set(unit)),
            Err(_) => drop(self.shared.fallbacks.fetch_add(1, Ordering::Relaxed)),
        }
    }

    fn received(&self, number: usize, region: &PlacedRegion, first: usize, count: usize) {
        let mut at = first;
        while at < first + count {
            let unit = at / SLOTS;
            let end = (first + count).min((unit + 1) * SLOTS);
            let new = u16::try_from((at..end).filter(|&page| !region.received.set(page)).count()).unwrap_or(0);
            if new > 0 && region.missing[unit].fetch_sub(new, Ordering::AcqRel) == new {
                self.complete(number, unit);
            }
            at = end;
        }
    }

    fn complete(&self, region: usize, unit: usize) {
        let queue = self.queue.lock();
        if let Some(queue) = queue.as_ref() {
            // The send cannot fail: the workers exit only after the queue is closed.
            let _ = queue.send((region, unit));
        }
    }

    /// Moves the pages received since the last call from the staging files into the process of the clone, and frees the
    /// memory of the files. Returns the number of pages. Does nothing for a workload that is not a clone. No round may
    /// be received at the same time.
    ///
    /// # Errors
    /// The errors of [`PrivateMappings::copy`], and the error of fallocate(2).
    pub fn move_private(&self) -> io::Result<usize> {
        let Some(private) = &self.shared.private else { return Ok(0) };
        let mut count = 0;
        for (number, region) in self.shared.regions.iter().enumerate() {
            count += private.move_region(number, region)?;
        }
        Ok(count)
    }

    /// Returns the address space of this process, in which the targets are mapped.
    pub(crate) fn own(&self) -> &Space {
        &self.shared.own
    }

    /// Returns the number of pages of all regions that have not been received.
    pub fn missing(&self) -> usize {
        let missing = self.shared.regions.iter().flat_map(|region| &region.missing);
        missing.map(|count| usize::from(count.load(Ordering::Acquire))).sum()
    }

    /// Returns the number of huge pages of the source that are replaced by base pages.
    pub fn fallbacks(&self) -> u64 {
        self.shared.fallbacks.load(Ordering::Relaxed)
    }

    /// Returns the counters of the population of page tables.
    pub fn populated(&self) -> &Populated {
        &self.shared.populated
    }

    /// Maps the complete units among `units` of a region into the workload's page tables (S1).
    ///
    /// # Errors
    /// If there is no such region or unit. The preceding units have been mapped.
    pub fn populate(&self, region: usize, units: &[usize]) -> Result<(), PlaceError> {
        for &unit in units {
            self.region(region, unit.saturating_mul(SLOTS), 1)?;
            self.shared.populate_unit(region, unit);
        }
        Ok(())
    }

    /// Waits until the workers have mapped all queued units. With `rest`, then maps the present pages of complete units
    /// that are not mapped as huge pages.
    ///
    /// # Errors
    /// If the workload cannot be adopted, or if a system call fails. The remaining pages are then mapped on first
    /// access, which is slower but correct.
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

impl PrivatePages {
    fn place_empty(
        &self,
        region: usize,
        found: &PlacedRegion,
        (first, end): (usize, usize),
        class: Class,
    ) -> Result<(), PlaceError> {
        if class == Class::Zero {
            for page in first..end {
                found.filled.take(page);
                self.zeros[region].set(page);
            }
            return Ok(());
        }
        // The pages of a clone are locked, so a private page never becomes a page of the base again.
        let known = [&self.moved[region], &self.zeros[region], &found.filled];
        let private = known.into_iter().filter_map(|bits| bits.next(first)).find(|&page| page < end);
        private.map_or(Ok(()), |page| Err(PlaceError::Private(page)))
    }

    /// Moves the pages of a region. Returns the number of pages.
    fn move_region(&self, number: usize, region: &PlacedRegion) -> io::Result<usize> {
        let (mapping, zeros) = (&region.target.mapping, &self.zeros[number]);
        let (data, empty) = (set_of(&region.filled, mapping.pages()), set_of(zeros, mapping.pages()));
        for (first, end) in data.runs().flat_map(|(first, end)| pieces(first, end)) {
            // SAFETY: the pages lie within the mapping, and were filled, so their memory is allocated. No other thread
            // writes to them, because no round is received.
            unsafe { self.mappings.copy(number, first, end, mapping.page(first)) }?;
            region.filled.take_run(first, end);
            mapping.punch(first * SMALL_PAGE, (end - first) * SMALL_PAGE)?;
        }
        for (first, end) in empty.runs().flat_map(|(first, end)| pieces(first, end)) {
            self.mappings.zero(number, first, end)?;
            zeros.take_run(first, end);
        }
        for page in data.runs().chain(empty.runs()).flat_map(|(first, end)| first..end) {
            self.moved[number].set(page);
        }
        Ok(data.count() + empty.count())
    }
}

/// Returns the pages whose bits are set.
fn set_of(bits: &AtomicBits, pages: usize) -> PageSet {
    let (mut set, mut at) = (PageSet::new(pages), 0);
    while let Some(page) = bits.next(at).filter(|&page| page < pages) {
        set.insert(page, page + 1);
        at = page + 1;
    }
    set
}

/// Returns the parts of `[first, end)` of at most 2 MiB, in order. The lock of an address space is held for each.
fn pieces(first: usize, end: usize) -> impl Iterator<Item = (usize, usize)> {
    (first..end).step_by(SLOTS).map(move |start| (start, (start + SLOTS).min(end)))
}

impl PlacerState {
    fn allocate_large(&self, target: &Target, unit: usize) -> io::Result<()> {
        let start = target.mapping.page(unit * SLOTS);
        // Populating for writing allocates and maps the whole huge page. It does not change bytes that another stream
        // may have placed.
        populate_write(start, SMALL_PAGE)?;
        if target.page_size == LARGE_PAGE || self.is_large(start)? {
            return Ok(());
        }
        self.own.collapse(start as u64, LARGE_PAGE as u64)
    }

    fn is_large(&self, start: *mut u8) -> io::Result<bool> {
        Ok(!self.own.large_mapped(start as u64, LARGE_PAGE as u64)?.is_empty())
    }

    /// Maps a complete unit that is backed by a huge page, in every process that maps the region. `populate_small` maps
    /// units that are backed by base pages: collapsing them would copy the pages and fill holes.
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
            // A worker and `populate` may have mapped the unit concurrently: count it once.
            let before = found.mapped[unit].fetch_or(all, Ordering::AcqRel);
            counter.fetch_add(u64::from(!before), Ordering::Relaxed);
        }
        self.spent(begin.elapsed());
    }

    fn spent(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.populated.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Maps the page cache pages of all complete units that are not mapped as huge pages (UFFDIO_CONTINUE).
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

/// Allocates and maps memory without changing its contents. Fails with ENOMEM if no memory is available.
pub(crate) fn populate_write(start: *mut u8, len: usize) -> io::Result<()> {
    // SAFETY: all callers pass ranges within one of our mappings, and MADV_POPULATE_WRITE does not change contents.
    check(unsafe { libc::madvise(start.cast(), len, libc::MADV_POPULATE_WRITE) }).map(drop).map_err(|error| {
        // A full file system or huge page pool is reported as EFAULT, because a write would raise SIGBUS.
        let full = error.raw_os_error() == Some(libc::EFAULT);
        if full { io::Error::from_raw_os_error(libc::ENOMEM) } else { error }
    })
}

/// Appends to `ranges` the parts of `[start, end)` that belong to complete units not mapped as huge pages.
fn unmapped(region: &PlacedRegion, start: usize, end: usize, ranges: &mut Vec<(usize, usize)>) {
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

/// Maps the pages of `ranges` (page indices in the region) that the file contains and `segment` maps. `page` is the
/// page size of the file in bytes. Returns the number of bytes mapped.
fn map_small(segment: &Segment, page: u64, ranges: &[(usize, usize)]) -> Result<u64, AdoptError> {
    // Handle faults in kernel mode too: otherwise, system calls of the workload would fail while the memory is
    // registered.
    let uffd = match segment.space.full_userfault(uapi::FEATURE_MINOR_SHMEM | uapi::FEATURE_MINOR_HUGETLBFS) {
        Err(AdoptError::NoFaults(..)) => return populate_read(segment, ranges),
        made => made?,
    };
    let mut mapped = 0;
    uffd.register(segment.address, segment.len, uapi::REGISTER_MODE_MINOR)?;
    for &(start, end) in ranges {
        if let Some((address, len)) = segment.part(start, end) {
            // Ignore errors: pages that cannot be mapped are mapped on first access.
            mapped += uffd.map_existing(address, len, page).unwrap_or(0);
        }
    }
    uffd.unregister(segment.address, segment.len)?;
    Ok(mapped)
}

/// Like `map_small`, but without a userfaultfd: the process calls madvise(2) with MADV_POPULATE_READ. `ranges` must not
/// contain holes, because the call would fill them.
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

fn populate_loop(shared: &PlacerState, jobs: &Receiver<(usize, usize)>) {
    for (region, unit) in jobs {
        // Skip units that consist of holes: they have no huge page to map and must not get one.
        if shared.regions[region].begun.get(unit) {
            shared.populate_unit(region, unit);
        }
    }
}
