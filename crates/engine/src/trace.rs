//! Write traces (S2): which pages of a workload were written since the last time one looked.
//!
//! Traces are userfaultfd write protections in asynchronous mode: the first write to a protected page costs the writer
//! about a microsecond in the kernel, which takes the protection off and leaves a mark; PAGEMAP_SCAN collects the marks
//! and protects again, atomically per page. No thread of the workload is stopped to install them, and if the tracer
//! dies the descriptor goes, and every protection with it.
//!
//! *Coarse* traces mark a whole large page when one fires in it, and release the rest of it, so that the workload takes
//! one trap where it would take up to 512. A helper thread looks for units in which traces fired and releases them
//! (dirty first: an unprotected page counts as written at the next collection, whether it was or not).
//!
//! Order, which is what makes it right: `collect` protects before anybody reads the pages it reports; a write after
//! that fires again and is reported by the next `collect`.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::mapping::scan;
use crate::pages::PageSet;
use crate::space::{AdoptError, Space};
use crate::uapi::{self, Userfault};
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// How often the helper of a coarse trace looks for units to release.
const POLL: Duration = Duration::from_millis(5);

/// A mapping of a part of a region in an address space.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Whose.
    pub space: Arc<Space>,
    /// Where, in that address space.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Number of the region.
    pub region: usize,
    /// First page of the region that is mapped there.
    pub first_page: usize,
}

impl Segment {
    /// Pages of the region between two addresses of the segment.
    fn pages(&self, start: u64, end: u64) -> (usize, usize) {
        let page = |address: u64| usize::try_from((address - self.address) / SMALL_PAGE as u64).unwrap_or(0);
        (self.first_page + page(start), self.first_page + page(end))
    }
}

#[derive(Debug)]
struct Armed {
    segment: Segment,
    uffd: Arc<Userfault>,
}

impl Armed {
    fn written(&self, flags: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let (start, end) = (self.segment.address, self.segment.address + self.segment.len);
        let flags = flags | uapi::PM_SCAN_CHECK_WPASYNC;
        // PAGE_IS_WRITTEN alone: with more categories some kernels leave out pages that were discarded.
        scan(self.segment.space.pagemap(), start, end, flags, uapi::PAGE_IS_WRITTEN, &mut found)
    }
}

/// Write traces over segments. Dropping it takes every protection off.
#[derive(Debug)]
pub struct Trace {
    armed: Arc<Vec<Armed>>,
    shared: Arc<Shared>,
    helper: Option<JoinHandle<()>>,
    expand: bool,
    install: Duration,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    released: AtomicU64,
    /// Held while protections are changed: by the helper while it releases, by `collect` while it protects.
    changing: Mutex<()>,
}

impl Trace {
    /// Installs traces over `segments`; from its return on, every write is seen.
    ///
    /// `release_after` makes them coarse: a unit of 2 MiB in which so many traces fired is released as a whole (1: at
    /// the first, and all of it is reported as written). 0 leaves every small page traced for itself.
    ///
    /// # Errors
    /// When a process cannot be adopted, or one of its segments is registered with somebody else's userfaultfd (EBUSY).
    pub fn install(segments: Vec<Segment>, release_after: usize) -> Result<Self, AdoptError> {
        let features = uapi::FEATURE_PAGEFAULT_FLAG_WP
            | uapi::FEATURE_WP_HUGETLBFS_SHMEM
            | uapi::FEATURE_WP_UNPOPULATED
            | uapi::FEATURE_WP_ASYNC;
        let mut armed: Vec<Armed> = Vec::with_capacity(segments.len());
        for segment in segments {
            let known = armed.iter().find(|other| other.segment.space.pid() == segment.space.pid());
            let uffd = match known {
                Some(other) => other.uffd.clone(),
                None => Arc::new(segment.space.userfault(features)?),
            };
            uffd.register(segment.address, segment.len, uapi::REGISTER_MODE_WP).map_err(|error| {
                let taken = error.raw_os_error() == Some(libc::EBUSY);
                let (pid, address) = (segment.space.pid(), segment.address);
                if taken { AdoptError::Registered(pid, address, error) } else { error.into() }
            })?;
            armed.push(Armed { segment, uffd });
        }
        let begin = Instant::now();
        for Armed { segment, uffd } in &armed {
            uffd.write_protect(segment.address, segment.len, true)?;
        }
        let install = begin.elapsed();
        let mut trace =
            Self { armed: Arc::new(armed), shared: Arc::default(), helper: None, expand: release_after == 1, install };
        if release_after > 0 {
            let (armed, shared) = (trace.armed.clone(), trace.shared.clone());
            let release = move || release_loop(&armed, &shared, release_after);
            trace.helper = Some(std::thread::Builder::new().name("pf-trace".into()).spawn(release)?);
        }
        Ok(trace)
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
        let _changing = self.shared.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.fits(dirty)?;
        for armed in self.armed.iter() {
            let segment = &armed.segment;
            let set = &mut dirty[segment.region];
            armed.written(uapi::PM_SCAN_WP_MATCHING, |start, end| {
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
        for Armed { segment, uffd } in self.armed.iter() {
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
    let _changing = shared.changing.lock().unwrap_or_else(PoisonError::into_inner);
    let segment = &armed.segment;
    let unit_len = LARGE_PAGE as u64;
    let mut fired: Vec<(u64, usize)> = Vec::new();
    armed.written(0, |start, end| {
        let mut at = start;
        while at < end {
            let unit = (at - segment.address) / unit_len;
            let stop = end.min(segment.address + (unit + 1) * unit_len);
            let count = usize::try_from((stop - at) / SMALL_PAGE as u64).unwrap_or(0);
            match fired.last_mut() {
                Some((last, sum)) if *last == unit => *sum += count,
                _ => fired.push((unit, count)),
            }
            at = stop;
        }
    })?;
    for (unit, count) in fired {
        let start = segment.address + unit * unit_len;
        let len = unit_len.min(segment.address + segment.len - start);
        // A unit that is written all over has nothing left to release.
        if count < threshold || (count * SMALL_PAGE) as u64 >= len {
            continue;
        }
        armed.uffd.write_protect(start, len, false)?;
        shared.released.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
