//! Write traces (S2), which report the pages of a workload that were written since the last collection.
//!
//! A write trace is a userfaultfd write protection in asynchronous mode. The first write to a protected page costs
//! about a microsecond in the kernel, which removes the protection and marks the page as written. PAGEMAP_SCAN returns
//! the marked pages and protects them again, atomically per page. Installing a trace does not stop any thread of the
//! workload. If the tracer exits, its descriptor is closed, and the kernel removes every protection.
//!
//! *Coarse* traces mark a whole huge page as written once a given number of its base pages have been written. They also
//! unprotect the other base pages, so the workload takes only a few faults instead of up to 512. A helper thread polls
//! for such huge pages. The helper marks them as written while they are still registered, so all later writes are
//! covered; then it unregisters them and maps them as huge pages again. Removing only the protection would not help:
//! protecting a huge page splits its PMD mapping, and each base page would still fault once. `collect` registers and
//! protects the huge pages again. Memory backed by base pages is always protected page by page.
//!
//! Correctness follows from the order: `collect` protects pages before the caller reads them, so the next `collect`
//! reports any later write.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::mapping::{scan, walk};
use crate::pages::PageSet;
use crate::saver::private;
use crate::segment::{Segment, register_for_writes};
use crate::space::AdoptError;
use crate::uapi::{self, PmScanArg, Userfault};
use crate::{LARGE_PAGE, SLOTS};

/// Features that the userfaultfd of a trace requires.
pub const FEATURES: u64 = uapi::FEATURE_PAGEFAULT_FLAG_WP
    | uapi::FEATURE_WP_HUGETLBFS_SHMEM
    | uapi::FEATURE_WP_UNPOPULATED
    | uapi::FEATURE_WP_ASYNC;

/// Interval at which the helper of a coarse trace polls for units to unprotect.
const POLL: Duration = Duration::from_millis(5);
/// Maximum number of units of a segment that may be unprotected at a time. Each unprotected unit can split a mapping in
/// two, and a process may have 65,530 mappings by default (vm.max_map_count).
const MAX_RELEASED: usize = 8192;

#[derive(Debug)]
struct Armed {
    segment: Segment,
    uffd: Arc<Userfault>,
    /// Whether each unit of the segment is backed by a huge page. Units beyond the end of the list are not.
    large: Vec<bool>,
    /// Indices of the units unprotected since the last collection. Locked while protections change.
    released: Mutex<BTreeSet<usize>>,
    /// Whether the segment is no longer traced.
    gone: AtomicBool,
    /// Whether only private pages are traced, in a private mapping of a file.
    private: bool,
}

impl Armed {
    fn written(&self, flags: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        if self.gone.load(Ordering::Acquire) {
            return Ok(());
        }
        let (start, end) = (self.segment.address, self.segment.address + self.segment.len);
        if self.private {
            let what = PmScanArg { flags, ..private(uapi::PAGE_IS_WRITTEN) };
            return walk(self.segment.space.pagemap(), start, end, what, &mut found);
        }
        // Scan for PAGE_IS_WRITTEN only: with more categories, some kernels omit pages that were discarded.
        scan(self.segment.space.pagemap(), start, end, flags, uapi::PAGE_IS_WRITTEN, &mut found)
    }

    fn released(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.released.lock()
    }

    /// Returns the address of the unit with this index.
    fn unit(&self, unit: usize) -> u64 {
        self.segment.address + (unit * LARGE_PAGE) as u64
    }

    /// Marks a unit as written, unprotects the unit and maps it as a huge page if possible.
    fn release(&self, unit: usize, released: &mut BTreeSet<usize>) -> io::Result<()> {
        released.insert(unit);
        self.uffd.unregister(self.unit(unit), LARGE_PAGE as u64)?;
        // If the unit cannot be mapped as a whole, it is mapped page by page on access.
        let _ = self.segment.space.collapse(self.unit(unit), LARGE_PAGE as u64);
        Ok(())
    }

    /// Registers and protects the unprotected units again, and adds all of their pages to `set`.
    fn protect(&self, released: &mut BTreeSet<usize>, set: &mut PageSet) -> io::Result<()> {
        for (first, count) in consecutive(&std::mem::take(released)) {
            let (start, len) = (self.unit(first), (count * LARGE_PAGE) as u64);
            let (page, last) = self.segment.pages(start, start + len);
            set.insert(page, last);
            self.uffd.register(start, len, uapi::REGISTER_MODE_WP)?;
            self.uffd.write_protect(start, len, true)?;
        }
        Ok(())
    }
}

/// Returns the runs of consecutive numbers, as (first, count).
fn consecutive(numbers: &BTreeSet<usize>) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == number => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    runs
}

/// Returns for each unit of a segment whether it can be mapped as a huge page. `region` states which units of the
/// region are backed by huge pages. The result is empty if the segment is not aligned with the units of the region.
fn large_units(segment: &Segment, region: Option<&Vec<bool>>) -> Vec<bool> {
    let aligned = segment.address.is_multiple_of(LARGE_PAGE as u64) && segment.first_page.is_multiple_of(SLOTS);
    let Some(region) = region.filter(|_| aligned) else { return Vec::new() };
    let whole = usize::try_from(segment.len).unwrap_or(0) / LARGE_PAGE;
    region.iter().skip(segment.first_page / SLOTS).take(whole).copied().collect()
}

/// Write traces over segments. Dropping the value removes all traces, unless they are borrowed.
#[derive(Debug)]
pub struct Trace {
    armed: Arc<Vec<Armed>>,
    shared: Arc<TraceState>,
    helper: Option<JoinHandle<()>>,
    expand: bool,
    install: Duration,
    /// Whether the userfaultfds belong to another owner. If so, the traces stay installed after a drop.
    borrowed: bool,
}

/// Userfaultfds by process ID.
pub type Userfaults = HashMap<libc::pid_t, Arc<Userfault>>;

#[derive(Debug, Default)]
struct TraceState {
    stop: AtomicBool,
    released: AtomicU64,
}

impl Trace {
    /// Installs traces over `segments`. Every write after this function returns is reported.
    ///
    /// `release_after` makes the traces coarse: a huge page is unprotected as a whole once `release_after` of its base
    /// pages have been written. If `release_after` is 1, every 2 MiB unit with a written page is reported as a whole.
    /// If it is 0, each base page is traced separately. `large` states for each unit of each region whether the unit is
    /// backed by a huge page; omitted regions have no huge pages.
    ///
    /// # Errors
    /// If a process cannot be adopted, if a segment is registered with another userfaultfd (EBUSY) or cannot be
    /// protected, or if the helper thread cannot be started.
    pub fn install(segments: Vec<Segment>, large: &[Vec<bool>], release_after: usize) -> Result<Self, AdoptError> {
        let arm = |(segment, uffd): (Segment, Arc<Userfault>)| {
            let large = large_units(&segment, large.get(segment.region));
            Armed { segment, uffd, large, released: Mutex::default(), gone: AtomicBool::new(false), private: false }
        };
        let registered = register_for_writes(segments, |space| space.userfault(FEATURES))?;
        let armed: Vec<Armed> = registered.into_iter().map(arm).collect();
        let begin = Instant::now();
        for Armed { segment, uffd, .. } in &armed {
            uffd.write_protect(segment.address, segment.len, true)?;
        }
        let install = begin.elapsed();
        let expand = release_after == 1;
        let mut trace =
            Self { armed: Arc::new(armed), shared: Arc::default(), helper: None, expand, install, borrowed: false };
        if release_after > 0 {
            let (armed, shared) = (trace.armed.clone(), trace.shared.clone());
            let release = move || release_loop(&armed, &shared, release_after);
            trace.helper = Some(std::thread::Builder::new().name("pf-trace".into()).spawn(release)?);
        }
        Ok(trace)
    }

    /// Uses existing traces on `segments`, installed through these userfaultfds. The traces stay installed after a
    /// drop.
    ///
    /// # Errors
    /// EPERM if a part of a segment is not traced (for example, because it was remapped), EBUSY if the part is
    /// registered with another userfaultfd, ENOENT if a process has no userfaultfd in `userfaults`.
    pub fn take_up(segments: Vec<Segment>, userfaults: &Userfaults) -> io::Result<Self> {
        Self::borrowed(segments, userfaults, |Segment { space, address, len, .. }, uffd| {
            // Check first, because registering would hide a missing trace. Registering again leaves existing traces
            // unchanged.
            let flags = uapi::PM_SCAN_CHECK_WPASYNC;
            scan(space.pagemap(), *address, address + len, flags, uapi::PAGE_IS_WRITTEN, |_, _| ())?;
            uffd.register(*address, *len, uapi::REGISTER_MODE_WP)
        })
    }

    /// Installs traces on `segments` through the userfaultfds of an acquired pager ([`crate::pager::Pager::hold`]),
    /// with which the segments are already registered. The traces stay installed after a drop, until the pager is
    /// released.
    ///
    /// # Errors
    /// ENOENT if a part of a segment is not registered or if a process has no userfaultfd in `userfaults`, ESRCH if a
    /// process has exited.
    pub fn install_on(segments: Vec<Segment>, userfaults: &Userfaults) -> io::Result<Self> {
        let begin = Instant::now();
        let mut trace = Self::borrowed(segments, userfaults, |segment, uffd| {
            uffd.write_protect(segment.address, segment.len, true)
        })?;
        trace.install = begin.elapsed();
        Ok(trace)
    }

    /// Registers `segments` with these userfaultfds and installs traces. The traces stay installed after a drop.
    ///
    /// # Errors
    /// EBUSY if a segment is registered with another userfaultfd, ENOENT if a process has no userfaultfd in
    /// `userfaults`, ESRCH if a process has exited.
    pub fn begin_on(segments: Vec<Segment>, userfaults: &Userfaults) -> io::Result<Self> {
        let begin = Instant::now();
        let mut trace = Self::borrowed(segments, userfaults, |Segment { address, len, .. }, uffd| {
            uffd.register(*address, *len, uapi::REGISTER_MODE_WP)?;
            uffd.write_protect(*address, *len, true)
        })?;
        trace.install = begin.elapsed();
        Ok(trace)
    }

    /// Installs traces of the private pages of `segments`, which are private mappings of a file. They are registered for
    /// missing faults with these userfaultfds, and stay registered. A trace reports private pages that are written, and
    /// pages that a write has copied since the installation. Pages of the file are not protected, and stay mapped as
    /// huge pages.
    ///
    /// # Errors
    /// EPERM if the userfaultfds are not asynchronous, EBUSY if a segment is registered with another userfaultfd,
    /// ENOENT if a process has no userfaultfd in `userfaults`, ESRCH if a process has exited.
    pub fn install_private(segments: Vec<Segment>, userfaults: &Userfaults) -> io::Result<Self> {
        let begin = Instant::now();
        let mut trace = Self::borrowed(segments, userfaults, |Segment { space, address, len, .. }, uffd| {
            // This replaces the modes of an earlier registration. Without MISSING, an access to a hole would fill the
            // hole with zeros.
            uffd.register(*address, *len, uapi::REGISTER_MODE_MISSING | uapi::REGISTER_MODE_WP)?;
            // The scan also protects the pages that have not been written since an earlier trace protected them.
            let flags = uapi::PM_SCAN_WP_MATCHING | uapi::PM_SCAN_CHECK_WPASYNC;
            let what = PmScanArg { flags, ..private(0) };
            walk(space.pagemap(), *address, address + len, what, |_, _| ())
        })?;
        let armed = Arc::get_mut(&mut trace.armed).into_iter().flatten();
        armed.for_each(|armed| armed.private = true);
        trace.install = begin.elapsed();
        Ok(trace)
    }

    /// Creates traces from userfaultfds of another owner. Calls `each` for every segment to check or install its trace.
    fn borrowed(
        segments: Vec<Segment>,
        userfaults: &Userfaults,
        each: impl Fn(&Segment, &Userfault) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut armed = Vec::with_capacity(segments.len());
        for segment in segments {
            let found = userfaults.get(&segment.space.pid());
            let uffd = found.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?.clone();
            each(&segment, &uffd)?;
            let (large, released) = (Vec::new(), Mutex::default());
            armed.push(Armed { segment, uffd, large, released, gone: AtomicBool::new(false), private: false });
        }
        let (armed, install) = (Arc::new(armed), Duration::ZERO);
        Ok(Self { armed, shared: Arc::default(), helper: None, expand: false, install, borrowed: true })
    }

    /// Returns the duration of installing the protections; 0 for existing traces.
    pub fn install_time(&self) -> Duration {
        self.install
    }

    /// Returns the number of 2 MiB units unprotected by coarse traces so far.
    pub fn released_units(&self) -> u64 {
        self.shared.released.load(Ordering::Relaxed)
    }

    /// Protects the pages written since the last call again, and adds them to `dirty` (one set per region).
    ///
    /// # Errors
    /// ESRCH if a process has exited, in which case its last writes are unknown. EPERM if a part of a segment is no
    /// longer traced. `InvalidInput` if a region has no set. Pages found before an error are in the sets.
    pub fn collect(&self, dirty: &mut [PageSet]) -> io::Result<()> {
        self.fits(dirty)?;
        for armed in self.armed.iter() {
            let segment = &armed.segment;
            let set = &mut dirty[segment.region];
            let mut released = armed.released();
            armed.protect(&mut released, set)?;
            armed.written(uapi::PM_SCAN_WP_MATCHING | uapi::PM_SCAN_CHECK_WPASYNC, |start, end| {
                let (first, last) = segment.pages(start, end);
                if self.expand {
                    set.insert(first / SLOTS * SLOTS, last.next_multiple_of(SLOTS));
                } else {
                    set.insert(first, last);
                }
            })?;
        }
        Ok(())
    }

    /// Adds the pages written since the last `collect` to `dirty`. The next `collect` reports them again.
    ///
    /// # Errors
    /// The same errors as [`collect`](Self::collect), except EPERM.
    pub fn peek(&self, dirty: &mut [PageSet]) -> io::Result<()> {
        self.fits(dirty)?;
        for armed in self.armed.iter() {
            let set = &mut dirty[armed.segment.region];
            armed.written(0, |start, end| {
                let (first, last) = armed.segment.pages(start, end);
                set.insert(first, last);
            })?;
        }
        Ok(())
    }

    /// Removes the traces from the segment with this index. Later writes to the segment are not reported. Does nothing
    /// if there is no such segment, or if the traces are borrowed.
    ///
    /// # Errors
    /// The error of UFFDIO_UNREGISTER.
    pub fn release(&self, segment: usize) -> io::Result<()> {
        let Some(armed) = self.armed.get(segment).filter(|_| !self.borrowed) else { return Ok(()) };
        let mut released = armed.released();
        released.clear();
        armed.gone.store(true, Ordering::Release);
        armed.uffd.unregister(armed.segment.address, armed.segment.len)
    }

    /// Rejects incomplete sets before anything is collected, because collected pages are not reported again.
    fn fits(&self, dirty: &[PageSet]) -> io::Result<()> {
        match self.armed.iter().find(|armed| armed.segment.region >= dirty.len()) {
            None => Ok(()),
            Some(armed) => {
                let words = format!("cannot collect region {}: only {} sets given", armed.segment.region, dirty.len());
                Err(io::Error::new(io::ErrorKind::InvalidInput, words))
            }
        }
    }

    /// Removes all traces, unless they are borrowed. Ignores errors, because an exited process has no traces.
    pub fn remove(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(helper) = self.helper.take() {
            let _ = helper.join();
        }
        // Segments that were released may be registered by another owner now.
        let ours = |armed: &&Armed| !self.borrowed && !armed.gone.load(Ordering::Acquire);
        for Armed { segment, uffd, .. } in self.armed.iter().filter(ours) {
            let _ = uffd.unregister(segment.address, segment.len);
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Repeatedly unprotects the huge pages in which at least `threshold` base pages were written since the last
/// collection, until `shared.stop` is set.
fn release_loop(armed: &[Armed], shared: &TraceState, threshold: usize) {
    while !shared.stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        for armed in armed {
            // This fails if the process has exited, which `collect` reports.
            let _ = release_units(armed, shared, threshold);
        }
        // A scan takes about 2 ms per GiB: poll large memory less often.
        std::thread::sleep(POLL.max(4 * begin.elapsed()));
    }
}

fn release_units(armed: &Armed, shared: &TraceState, threshold: usize) -> io::Result<()> {
    // Skip the scan if there are no huge pages, as in most segments.
    if !armed.large.contains(&true) {
        return Ok(());
    }
    let mut released = armed.released();
    let mut fired = vec![0; armed.large.len()];
    armed.written(0, |start, end| {
        let (first, last) = (armed.segment.page_of(start), armed.segment.page_of(end));
        for (unit, count) in fired.iter_mut().enumerate().take(last.div_ceil(SLOTS)).skip(first / SLOTS) {
            *count += last.min((unit + 1) * SLOTS) - first.max(unit * SLOTS);
        }
    })?;
    for (unit, count) in fired.into_iter().enumerate() {
        // A huge page that has been written completely has no protected pages.
        let worth = armed.large[unit] && (threshold..SLOTS).contains(&count) && released.len() < MAX_RELEASED;
        if worth && !released.contains(&unit) {
            armed.release(unit, &mut released)?;
            shared.released.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}
