use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pageferry_engine::mapping::duplicate;
use pageferry_engine::pager::{self, Begin, Flags, LoadError, Origin, PagerError, Plan};
use pyo3::exceptions::{PyConnectionResetError, PyKeyError, PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::errors;
use crate::image::{ImageChain, image_error};
use crate::pages::PageSet;
use crate::peer::PeerSource;
use crate::placer::{TargetTuple, targets};
use crate::space::{self, SegmentTuple, segments};

fn begin_error(error: PagerError) -> PyErr {
    match error {
        PagerError::Io(error) => errors::kernel(error),
        PagerError::Image(error) => image_error(error),
        PagerError::Mapped(error) => errors::adopt(error),
        PagerError::Running => PyOSError::new_err(error.to_string()),
        PagerError::Peer(_) | PagerError::Regions { .. } => PyValueError::new_err(error.to_string()),
    }
}

fn load_error(error: &LoadError) -> PyErr {
    match error {
        LoadError::Image(_) => PyValueError::new_err(error.to_string()),
        LoadError::Place(_) | LoadError::Ended => PyOSError::new_err(error.to_string()),
        LoadError::Lost(_) => PyConnectionResetError::new_err(error.to_string()),
    }
}

/// Opens the deferred bitmap of `pages` pages in a file. The caller keeps the descriptor.
pub fn open_flags(fd: i32, pages: usize) -> io::Result<Flags> {
    Flags::open(duplicate(fd)?.as_fd(), pages)
}

/// Region, page, whether a thread waits for it, message.
type Failure = (usize, usize, bool, String);

/// Origin of contents.
#[derive(FromPyObject)]
enum Source<'py> {
    Images(PyRef<'py, ImageChain>),
    Peer(PyRef<'py, PeerSource>),
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Pager {
    inner: pager::Pager,
}

#[pymethods]
impl Pager {
    #[new]
    #[pyo3(signature = (source, targets, segments, userfaults, flags, *, working_set = Vec::new(), background = true,
                        eager = false, taken_over = false, kept = false, fatal = false, whole_blocks = true,
                        evicting = false, checks_removals = false))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    fn new(
        py: Python<'_>,
        source: Source<'_>,
        targets: Vec<TargetTuple<'_>>,
        segments: Vec<SegmentTuple<'_>>,
        userfaults: HashMap<i32, i32>,
        flags: i32,
        working_set: Vec<u32>,
        background: bool,
        eager: bool,
        taken_over: bool,
        kept: bool,
        fatal: bool,
        whole_blocks: bool,
        evicting: bool,
        checks_removals: bool,
    ) -> PyResult<Self> {
        let known = space::userfaults(userfaults)?;
        let mut watched = Vec::new();
        for segment in self::segments(segments) {
            let pid = segment.space.pid();
            let uffd =
                known.get(&pid).ok_or_else(|| PyKeyError::new_err(format!("no userfaultfd of process {pid}")))?;
            watched.push((segment, uffd.clone()));
        }
        let targets = self::targets(targets);
        let pages = targets.iter().map(|target| target.mapping.pages()).sum();
        let flags = open_flags(flags, pages).map_err(errors::argument)?;
        let from = match source {
            Source::Images(chain) => Origin::Images(chain.inner.clone()),
            Source::Peer(peer) => Origin::Peer(peer.inner.clone()),
        };
        let begin = match (taken_over, kept) {
            (true, _) => Begin::TakenOver,
            (false, true) => Begin::Kept,
            (false, false) => Begin::Empty,
        };
        let plan = Plan {
            from,
            targets,
            watched,
            flags,
            begin,
            working_set,
            background,
            eager,
            whole_blocks,
            evicting,
            checks_removals,
            fatal,
        };
        let inner = py.detach(|| pager::Pager::start(plan)).map_err(begin_error)?;
        Ok(Self { inner })
    }

    #[staticmethod]
    fn flags_length(pages: usize) -> usize {
        pager::file_len(pages)
    }

    #[staticmethod]
    fn set_flags(py: Python<'_>, flags: i32, missing: Vec<PyRef<'_, PageSet>>) -> PyResult<()> {
        let sets: Vec<_> = missing.iter().map(|set| set.inner.clone()).collect();
        py.detach(|| {
            let pages = sets.iter().map(pageferry_engine::pages::PageSet::pages).sum();
            let flags = open_flags(flags, pages)?;
            sets.iter().fold(0, |base, set| {
                flags.set_all(base, set);
                base + set.pages()
            });
            Ok(())
        })
        .map_err(errors::argument)
    }

    #[getter]
    fn pending(&self, py: Python<'_>) -> usize {
        py.detach(|| self.inner.pending())
    }

    fn missing(&self, py: Python<'_>, region: usize) -> PyResult<PageSet> {
        let inner = py.detach(|| self.inner.missing(region));
        Ok(PageSet { inner: inner.ok_or_else(|| PyValueError::new_err(format!("no such region: {region}")))? })
    }

    #[getter]
    fn finished(&self) -> bool {
        self.inner.is_finished()
    }

    /// Faults, missed, loaded, prefetched, bytes read, seconds of service, seconds of the longest service.
    #[getter]
    fn counters(&self) -> (u64, u64, u64, u64, u64, f64, f64) {
        let counters = self.inner.counters();
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = |counter| Duration::from_nanos(load(counter)).as_secs_f64();
        (
            load(&counters.faults),
            load(&counters.missed),
            load(&counters.loaded),
            load(&counters.prefetched),
            self.inner.bytes_read(),
            seconds(&counters.service),
            seconds(&counters.longest),
        )
    }

    #[getter]
    fn histogram(&self) -> Vec<u64> {
        self.inner.counters().histogram.iter().map(|bin| bin.load(Ordering::Relaxed)).collect()
    }

    #[getter]
    fn touched(&self) -> Vec<u32> {
        self.inner.touched()
    }

    #[getter]
    fn failures(&self) -> Vec<Failure> {
        let plain = |failure: pager::Failure| (failure.region, failure.page, failure.accessed, failure.message);
        self.inner.failures().into_iter().map(plain).collect()
    }

    #[pyo3(signature = (patience, known = 0))]
    fn wait(&self, py: Python<'_>, patience: f64, known: usize) -> PyResult<bool> {
        let patience = Duration::try_from_secs_f64(patience).map_err(|e| PyValueError::new_err(e.to_string()))?;
        let deadline = std::time::Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let slice = left.min(Duration::from_millis(100));
            let finished = py.detach(|| self.inner.wait(slice, known));
            if finished || left <= slice || self.inner.failures().len() > known {
                return Ok(finished);
            }
            py.check_signals()?;
        }
    }

    fn ensure(&self, py: Python<'_>, region: usize, first: usize, count: usize) -> PyResult<()> {
        py.detach(|| self.inner.ensure(region, first, count)).map_err(|error| load_error(&error))
    }

    fn hold(&self, py: Python<'_>) -> PyResult<Option<HashMap<i32, i32>>> {
        let held = py.detach(|| self.inner.hold()).map_err(errors::kernel)?;
        Ok(held.then(|| self.inner.userfaults().into_iter().collect()))
    }

    fn release(&self, py: Python<'_>) {
        py.detach(|| self.inner.release());
    }

    fn large(&self, region: usize) -> Vec<bool> {
        self.inner.large(region).to_vec()
    }

    fn populate(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.populate()).map_err(errors::kernel)
    }

    fn reconnect(&self, py: Python<'_>, source: PyRef<'_, PeerSource>) -> PyResult<()> {
        let link = source.inner.clone();
        py.detach(|| self.inner.reconnect(link)).map_err(begin_error)
    }

    fn evict(&self, py: Python<'_>, region: usize, pages: PyRef<'_, PageSet>) -> PyResult<usize> {
        let pages = pages.inner.clone();
        py.detach(|| self.inner.evict(region, &pages)).map_err(begin_error)
    }

    fn evicted(&self) {
        self.inner.evicted();
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.inner.stop());
    }

    fn abandon(&self, py: Python<'_>) {
        py.detach(|| self.inner.abandon());
    }
}
