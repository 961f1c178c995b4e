//! Write traces (S2): which pages of a workload were written since the last time one looked.
//!
//! Traces are userfaultfd write protections in asynchronous mode: the first write to a protected page costs the writer
//! about a microsecond in the kernel, which takes the protection off and leaves a mark; PAGEMAP_SCAN collects the marks
//! and protects again, atomically per page. No thread of the workload is stopped to install them, and if the tracer
//! dies the descriptor goes, and every protection with it.
//!
//! *Coarse* traces mark a whole large page when one fires in it, and release the rest of it, so that the workload takes
//! one trap where it would take up to 512. A helper thread looks for large pages in which traces fired, marks them as
//! written (before the write is let through: whatever is written afterwards is covered), takes their registration off
//! and has them mapped as large pages again. To take off the protections alone would gain nothing: to protect a large
//! page splits its mapping, and every small page of it would still fault once. `collect` registers and protects them
//! again. Memory that stands on small pages is always traced page by page.
//!
//! Order, which is what makes it right: `collect` protects before anybody reads the pages it reports; a write after
//! that fires again and is reported by the next `collect`.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::mapping::scan;
use crate::pages::PageSet;
use crate::segment::{Segment, register_for_writes};
use crate::space::AdoptError;
use crate::uapi::{self, Userfault};
use crate::{LARGE_PAGE, SLOTS};

/// The features that a userfaultfd for traces needs.
pub const FEATURES: u64 = uapi::FEATURE_PAGEFAULT_FLAG_WP
    | uapi::FEATURE_WP_HUGETLBFS_SHMEM
    | uapi::FEATURE_WP_UNPOPULATED
    | uapi::FEATURE_WP_ASYNC;

/// How often the helper of a coarse trace looks for units to release.
const POLL: Duration = Duration::from_millis(5);
/// Most units of a segment that may be released at a time: each can split a mapping in two, and a process may have
/// 65,530 of them (vm.max_map_count).
const MAX_RELEASED: usize = 8192;

#[derive(Debug)]
struct Armed {
    segment: Segment,
    uffd: Arc<Userfault>,
    /// Which 2 MiB units of the segment stand on large pages.
    large: Vec<bool>,
    /// Units that have been released since the last collection. Locked while protections are changed.
    released: Mutex<BTreeSet<usize>>,
    /// Whether it is traced no more.
    gone: AtomicBool,
}

impl Armed {
    fn written(&self, flags: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        if self.gone.load(Ordering::Acquire) {
            return Ok(());
        }
        let (start, end) = (self.segment.address, self.segment.address + self.segment.len);
        // PAGE_IS_WRITTEN alone: with more categories some kernels leave out pages that were discarded.
        scan(self.segment.space.pagemap(), start, end, flags, uapi::PAGE_IS_WRITTEN, &mut found)
    }

    fn released(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.released.lock()
    }

    /// Address of a unit of the segment.
    fn unit(&self, unit: usize) -> u64 {
        self.segment.address + (unit * LARGE_PAGE) as u64
    }

    /// Marks a large page as written, and lets it be written to, mapped as a large page.
    fn release(&self, unit: usize, released: &mut BTreeSet<usize>) -> io::Result<()> {
        released.insert(unit);
        self.uffd.unregister(self.unit(unit), LARGE_PAGE as u64)?;
        // If it cannot be mapped as a whole it is mapped page by page, as it is touched.
        let _ = self.segment.space.collapse(self.unit(unit), LARGE_PAGE as u64);
        Ok(())
    }

    /// Protects what was released, and reports all of it.
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

/// Numbers that follow each other, as (first, count).
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

/// Which units of a segment stand on large pages that can be mapped as such there, from those of its region.
fn large_units(segment: &Segment, region: Option<&Vec<bool>>) -> Vec<bool> {
    let aligned = segment.address.is_multiple_of(LARGE_PAGE as u64) && segment.first_page.is_multiple_of(SLOTS);
    let Some(region) = region.filter(|_| aligned) else { return Vec::new() };
    let whole = usize::try_from(segment.len).unwrap_or(0) / LARGE_PAGE;
    region.iter().skip(segment.first_page / SLOTS).take(whole).copied().collect()
}

/// Write traces over segments. Dropping it takes every protection off.
#[derive(Debug)]
pub struct Trace {
    armed: Arc<Vec<Armed>>,
    shared: Arc<Shared>,
    helper: Option<JoinHandle<()>>,
    expand: bool,
    install: Duration,
    /// The traces are another's, and stay when this goes.
    lent: bool,
}

/// The userfaultfd of every process.
pub type Userfaults = HashMap<libc::pid_t, Arc<Userfault>>;

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    released: AtomicU64,
}

impl Trace {
    /// Installs traces over `segments`; from its return on, every write is seen.
    ///
    /// `release_after` makes them coarse: a large page in which so many traces fired is released as a whole (1: at the
    /// first, and every unit of 2 MiB with a write in it is reported as written). 0 leaves every small page traced for
    /// itself. `large`: which units of each region stand on large pages; regions that are left out have none.
    ///
    /// # Errors
    /// When a process cannot be adopted, or one of its segments is registered with somebody else's userfaultfd (EBUSY).
    pub fn install(segments: Vec<Segment>, large: &[Vec<bool>], release_after: usize) -> Result<Self, AdoptError> {
        let arm = |(segment, uffd): (Segment, Arc<Userfault>)| {
            let large = large_units(&segment, large.get(segment.region));
            Armed { segment, uffd, large, released: Mutex::default(), gone: AtomicBool::new(false) }
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
            Self { armed: Arc::new(armed), shared: Arc::default(), helper: None, expand, install, lent: false };
        if release_after > 0 {
            let (armed, shared) = (trace.armed.clone(), trace.shared.clone());
            let release = move || release_loop(&armed, &shared, release_after);
            trace.helper = Some(std::thread::Builder::new().name("pf-trace".into()).spawn(release)?);
        }
        Ok(trace)
    }

    /// Takes up traces that are on `segments` already, by these userfaultfds; they stay when this is dropped.
    ///
    /// # Errors
    /// EPERM where a part of a segment is not traced (it was mapped anew, say), EBUSY where it is traced by another
    /// userfaultfd, ENOENT where none is given for its process.
    pub fn take_up(segments: Vec<Segment>, userfaults: &Userfaults) -> io::Result<Self> {
        Self::lent(segments, userfaults, |Segment { space, address, len, .. }, uffd| {
            // First, because registering makes good what this looks for; what is ours already is left as it is.
            let flags = uapi::PM_SCAN_CHECK_WPASYNC;
            scan(space.pagemap(), *address, address + len, flags, uapi::PAGE_IS_WRITTEN, |_, _| ())?;
            uffd.register(*address, *len, uapi::REGISTER_MODE_WP)
        })
    }

    /// Puts traces on `segments`, which are registered with these userfaultfds for more than that: with those of a
    /// pager that is held ([`crate::pager::Pager::hold`]). They stay when this is dropped, and go when the pager is
    /// released.
    ///
    /// # Errors
    /// ENOENT where a part of a segment is not registered, or no userfaultfd is given for its process; ESRCH.
    pub fn put_on(segments: Vec<Segment>, userfaults: &Userfaults) -> io::Result<Self> {
        let begin = Instant::now();
        let mut trace =
            Self::lent(segments, userfaults, |segment, uffd| uffd.write_protect(segment.address, segment.len, true))?;
        trace.install = begin.elapsed();
        Ok(trace)
    }

    /// Puts traces on `segments`, which these userfaultfds are not registered with yet; they stay when this is dropped.
    ///
    /// # Errors
    /// EBUSY where a segment is traced by another userfaultfd, ENOENT where none is given for its process; ESRCH.
    pub fn begin_on(segments: Vec<Segment>, userfaults: &Userfaults) -> io::Result<Self> {
        let begin = Instant::now();
        let mut trace = Self::lent(segments, userfaults, |Segment { address, len, .. }, uffd| {
            uffd.register(*address, *len, uapi::REGISTER_MODE_WP)?;
            uffd.write_protect(*address, *len, true)
        })?;
        trace.install = begin.elapsed();
        Ok(trace)
    }

    /// Traces by userfaultfds that are somebody else's, after `each` segment has been seen to.
    fn lent(
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
            armed.push(Armed { segment, uffd, large, released, gone: AtomicBool::new(false) });
        }
        let (armed, install) = (Arc::new(armed), Duration::ZERO);
        Ok(Self { armed, shared: Arc::default(), helper: None, expand: false, install, lent: true })
    }

    /// How long the installation of the protections took.
    pub fn install_time(&self) -> Duration {
        self.install
    }

    /// Units of 2 MiB released by coarse traces so far.
    pub fn released_units(&self) -> u64 {
        self.shared.released.load(Ordering::Relaxed)
    }

    /// Adds to `dirty` (one set per region) what was written since the last call, and protects it again first.
    ///
    /// # Errors
    /// ESRCH when a process has ended: its last writes are not known then. InvalidInput without a set for each region.
    /// What was found before an error is in the sets.
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

    /// Adds to `dirty` what was written since the last `collect`, and leaves it to be reported again.
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

    /// Takes the traces off one segment, by its number: what is written there from now on is not reported. Not for
    /// traces that are lent.
    pub fn release(&self, segment: usize) -> io::Result<()> {
        let Some(armed) = self.armed.get(segment).filter(|_| !self.lent) else { return Ok(()) };
        let mut released = armed.released();
        released.clear();
        armed.gone.store(true, Ordering::Release);
        armed.uffd.unregister(armed.segment.address, armed.segment.len)
    }

    /// Refuses sets that lack a region before anything is collected, because what is collected is not reported again.
    fn fits(&self, dirty: &[PageSet]) -> io::Result<()> {
        match self.armed.iter().find(|armed| armed.segment.region >= dirty.len()) {
            None => Ok(()),
            Some(armed) => {
                let words = format!("no set for region {}: {} sets were given", armed.segment.region, dirty.len());
                Err(io::Error::new(io::ErrorKind::InvalidInput, words))
            }
        }
    }

    /// Takes all traces off. Errors are left out: a process that is gone has no traces either.
    pub fn remove(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(helper) = self.helper.take() {
            let _ = helper.join();
        }
        // What has been released is nobody's, or somebody else's by now.
        let ours = |armed: &&Armed| !self.lent && !armed.gone.load(Ordering::Acquire);
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

/// Releases units in which at least `threshold` traces have fired since the last collection.
fn release_loop(armed: &[Armed], shared: &Shared, threshold: usize) {
    while !shared.stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        for armed in armed {
            // The process may end at any time: then its traces are gone, and `collect` says so.
            let _ = release_units(armed, shared, threshold);
        }
        // Looking takes about 2 ms per GiB: large memory is looked at less often, not all the time.
        std::thread::sleep(POLL.max(4 * begin.elapsed()));
    }
}

fn release_units(armed: &Armed, shared: &Shared, threshold: usize) -> io::Result<()> {
    // Most memory has nothing to release, and then there is no need to look.
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
        // A large page that has been written all over has nothing left to release.
        let worth = armed.large[unit] && (threshold..SLOTS).contains(&count) && released.len() < MAX_RELEASED;
        if worth && !released.contains(&unit) {
            armed.release(unit, &mut released)?;
            shared.released.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}
