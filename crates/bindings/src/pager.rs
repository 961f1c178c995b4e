use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pageferry_engine::mapping::duplicate;
use pageferry_engine::pager::{self, Begin, Flags, LoadError, Origin, PagerError, Plan, RequestError, RequestRange};
use pyo3::exceptions::{PyConnectionAbortedError, PyConnectionResetError, PyKeyError, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::detached::Detached;
use crate::errors;
use crate::image::{ImageChain, image_error};
use crate::options::Keywords;
use crate::pages::PageSet;
use crate::peer::PeerSource;
use crate::placer::PagerTargets;
use crate::space::{self, MappedSegment, segments};

fn begin_error(error: PagerError) -> PyErr {
    match error {
        PagerError::Io(error) => errors::kernel(error),
        PagerError::Image(error) => image_error(error),
        PagerError::Mapped(error) => errors::adopt(error),
        PagerError::Running | PagerError::GivenUp(_) => PyOSError::new_err(error.to_string()),
        PagerError::Peer(_) | PagerError::Regions { .. } => PyValueError::new_err(error.to_string()),
    }
}

fn load_error(error: &LoadError) -> PyErr {
    match error {
        LoadError::Image(_) => PyValueError::new_err(error.to_string()),
        LoadError::Place(_)
        | LoadError::GivenUp(_)
        | LoadError::Unmapped { .. }
        | LoadError::Removing
        | LoadError::Exited
        | LoadError::Ended => PyOSError::new_err(error.to_string()),
        LoadError::Lost(_) => PyConnectionResetError::new_err(error.to_string()),
    }
}

fn request_error(error: RequestError) -> PyErr {
    match error {
        RequestError::Io(error) => errors::kernel(error),
        RequestError::Load { ref error, .. } => load_error(error),
        RequestError::Invalid(words) => PyConnectionAbortedError::new_err(words),
    }
}

/// Opens the deferred bitmap of `pages` pages in a file. The caller keeps the descriptor.
pub fn open_flags(fd: i32, pages: usize) -> io::Result<Flags> {
    Flags::open(duplicate(fd)?.as_fd(), pages)
}

/// Page that could not be loaded.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct Failure {
    region: usize,
    page: usize,
    accessed: bool,
    message: String,
}

/// Counters of a pager; times in seconds.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct PagerCounters {
    faults: u64,
    missed: u64,
    loaded: u64,
    prefetched: u64,
    bytes_read: u64,
    service: f64,
    longest: f64,
}

/// Origin of the contents of pages.
#[derive(FromPyObject)]
enum ContentOrigin<'py> {
    Images(PyRef<'py, ImageChain>),
    Peer(PyRef<'py, PeerSource>),
}

/// Keyword arguments of `Pager`.
struct PagerOptions {
    order: pager::FillOrder,
    begin: Begin,
    background: bool,
    eager: bool,
    fatal: bool,
    whole_blocks: bool,
    read_ahead: bool,
    evicting: bool,
    checks_removals: bool,
}

impl PagerOptions {
    fn take(keywords: &Keywords<'_>) -> PyResult<Self> {
        let choice = |name, default: &str| keywords.take(name, default.to_owned());
        let (background, eager) = choose("fill", &choice("fill", "gentle")?, FILL)?;
        let options = Self {
            order: pager::FillOrder {
                windows: keywords.take("windows", Vec::new())?,
                blocks: keywords.take("blocks", Vec::new())?,
            },
            begin: choose("begin", &choice("begin", "empty")?, BEGIN)?,
            background,
            eager,
            fatal: choose("on_failure", &choice("on_failure", "block")?, ON_FAILURE)?,
            whole_blocks: keywords.take("whole_blocks", true)?,
            read_ahead: keywords.take("read_ahead", true)?,
            evicting: keywords.take("evicting", false)?,
            checks_removals: keywords.take("checks_removals", false)?,
        };
        keywords.finish().map(|()| options)
    }
}

const BEGIN: &[(&str, Begin)] = &[("empty", Begin::Empty), ("kept", Begin::Kept), ("taken-over", Begin::TakenOver)];
/// Values of `fill`: whether to load pages in the background, and whether at full speed.
const FILL: &[(&str, (bool, bool))] = &[("none", (false, false)), ("gentle", (true, false)), ("eager", (true, true))];
/// Values of `on_failure`: whether an access to a page that cannot be loaded raises SIGBUS.
const ON_FAILURE: &[(&str, bool)] = &[("block", false), ("sigbus", true)];

fn choose<T: Copy>(option: &str, given: &str, choices: &[(&str, T)]) -> PyResult<T> {
    choices.iter().find(|(name, _)| *name == given).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        PyValueError::new_err(format!("invalid {option} {given:?}: expected {}", names.join(", ")))
    })
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Pager {
    inner: Detached<pager::Pager>,
}

#[pymethods]
impl Pager {
    #[new]
    #[pyo3(signature = (source, targets, segments, userfaults, flags, **options))]
    #[expect(clippy::too_many_arguments, reason = "six arguments in Python, besides the interpreter token")]
    fn new(
        py: Python<'_>,
        source: ContentOrigin<'_>,
        targets: PagerTargets<'_>,
        segments: Vec<PyRef<'_, MappedSegment>>,
        userfaults: HashMap<i32, i32>,
        flags: i32,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let options = PagerOptions::take(&Keywords::new(py, options)?)?;
        let known = space::userfaults(userfaults)?;
        let mut watched = Vec::new();
        for segment in self::segments(&segments) {
            let pid = segment.space.pid();
            let uffd =
                known.get(&pid).ok_or_else(|| PyKeyError::new_err(format!("no userfaultfd of process {pid}")))?;
            watched.push((segment, uffd.clone()));
        }
        let flags = open_flags(flags, targets.pages()).map_err(errors::argument)?;
        let targets = targets.plain();
        let from = match source {
            ContentOrigin::Images(chain) => Origin::Images(chain.inner.clone()),
            ContentOrigin::Peer(peer) => Origin::Peer(peer.inner.clone()),
        };
        let plan = Plan {
            from,
            targets,
            watched,
            flags,
            begin: options.begin,
            order: options.order,
            background: options.background,
            eager: options.eager,
            whole_blocks: options.whole_blocks,
            read_ahead: options.read_ahead,
            evicting: options.evicting,
            checks_removals: options.checks_removals,
            fatal: options.fatal,
        };
        let inner = py.detach(|| pager::Pager::start(plan)).map_err(begin_error)?;
        Ok(Self { inner: inner.into() })
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

    #[getter]
    fn counters(&self) -> PagerCounters {
        let counters = self.inner.counters();
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = |counter| Duration::from_nanos(load(counter)).as_secs_f64();
        PagerCounters {
            faults: load(&counters.faults),
            missed: load(&counters.missed),
            loaded: load(&counters.loaded),
            prefetched: load(&counters.prefetched),
            bytes_read: self.inner.bytes_read(),
            service: seconds(&counters.service),
            longest: seconds(&counters.longest),
        }
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
        let plain = |pager::Failure { region, page, accessed, message }| Failure { region, page, accessed, message };
        self.inner.failures().into_iter().map(plain).collect()
    }

    #[pyo3(signature = (timeout, known = 0))]
    fn wait(&self, py: Python<'_>, timeout: f64, known: usize) -> PyResult<bool> {
        let timeout = Duration::try_from_secs_f64(timeout).map_err(|e| PyValueError::new_err(e.to_string()))?;
        let deadline = std::time::Instant::now() + timeout;
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

    #[pyo3(signature = (windows, blocks, eager = false))]
    fn fill(&self, py: Python<'_>, windows: Vec<u32>, blocks: Vec<(usize, u32)>, eager: bool) -> PyResult<()> {
        py.detach(|| self.inner.fill(pager::FillOrder { windows, blocks }, eager)).map_err(errors::kernel)
    }

    fn ensure(&self, py: Python<'_>, region: usize, first: usize, count: usize) -> PyResult<()> {
        py.detach(|| self.inner.ensure(region, first, count)).map_err(|error| load_error(&error))
    }

    fn answer_requests(&self, py: Python<'_>, socket: i32, ranges: Vec<(u64, u64, usize, usize)>) -> PyResult<bool> {
        let plain = |(address, len, region, first)| RequestRange { address, len, region, first };
        let ranges: Vec<_> = ranges.into_iter().map(plain).collect();
        let socket = duplicate(socket).map_err(errors::kernel)?;
        py.detach(|| self.inner.answer_requests(socket.as_fd(), &ranges)).map_err(request_error)
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
