use std::sync::atomic::{AtomicU64, Ordering};

use pageferry_engine::mapping::duplicate;
use pageferry_engine::pager::{self, BaseFile, FillOrder, PagerError};
use pageferry_engine::uapi::{REGISTER_MODE_MISSING, Userfault};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::detached::Detached;
use crate::errors;
use crate::image::{ImageChain, image_error};
use crate::space::{MappedSegment, segments};

/// Failure to load a unit of a base.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct BaseFailure {
    unit: usize,
    message: String,
}

/// Counters of a clone; times in seconds.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct CloneCounters {
    faults: u64,
    missed: u64,
    zeros: u64,
    service: f64,
    longest: f64,
}

fn open_error(error: PagerError) -> PyErr {
    match error {
        PagerError::Io(error) => errors::argument(error),
        PagerError::Image(error) => image_error(error),
        PagerError::GivenUp(_) => PyOSError::new_err(error.to_string()),
        other => PyValueError::new_err(other.to_string()),
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct BasePager {
    inner: Detached<pager::BasePager>,
}

#[pymethods]
impl BasePager {
    #[new]
    fn new(py: Python<'_>, chain: PyRef<'_, ImageChain>, descriptor: i32, regions: Vec<usize>) -> PyResult<Self> {
        let file = duplicate(descriptor).map_err(errors::kernel)?;
        let chain = chain.inner.clone();
        let open = || pager::BasePager::start(BaseFile::open(file, chain, &regions)?).map_err(PagerError::from);
        py.detach(open).map(|inner| Self { inner: inner.into() }).map_err(open_error)
    }

    #[staticmethod]
    fn file_length(regions: Vec<usize>) -> usize {
        BaseFile::len_for(&regions)
    }

    #[staticmethod]
    fn register(py: Python<'_>, userfault: i32, address: u64, length: u64) -> PyResult<()> {
        let uffd = Userfault::from_fd(duplicate(userfault).map_err(errors::kernel)?);
        py.detach(|| uffd.register(address, length, REGISTER_MODE_MISSING)).map_err(errors::kernel)
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn add(&self, py: Python<'_>, userfault: i32, segments: Vec<PyRef<'_, MappedSegment>>) -> PyResult<u64> {
        let uffd = Userfault::from_fd(duplicate(userfault).map_err(errors::kernel)?);
        let segments = self::segments(&segments);
        py.detach(|| self.inner.add(uffd, segments)).map_err(errors::argument)
    }

    fn remove(&self, py: Python<'_>, number: u64) {
        py.detach(|| self.inner.remove(number));
    }

    fn fill(&self, py: Python<'_>, windows: Vec<u32>, eager: bool) -> PyResult<()> {
        py.detach(|| self.inner.fill(&FillOrder { windows, blocks: Vec::new() }, eager)).map_err(errors::kernel)
    }

    fn ensure(&self, py: Python<'_>, first: usize, end: usize) -> Option<BaseFailure> {
        let failed = py.detach(|| self.inner.ensure(first, end)).err();
        failed.map(|found| BaseFailure { unit: found.unit, message: found.message })
    }

    fn counters(&self, number: u64) -> PyResult<CloneCounters> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = |counter: &AtomicU64| std::time::Duration::from_nanos(get(counter)).as_secs_f64();
        let read = |found: &pager::BaseCounters| CloneCounters {
            faults: get(&found.faults),
            missed: get(&found.missed),
            zeros: get(&found.zeros),
            service: seconds(&found.service),
            longest: seconds(&found.longest),
        };
        self.inner.counters(number, read).ok_or_else(|| PyValueError::new_err(format!("no such clone: {number}")))
    }

    #[getter]
    fn holes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.inner.holes())
    }

    #[getter]
    fn prefetched(&self) -> u64 {
        self.inner.prefetched()
    }

    #[getter]
    fn bytes_read(&self) -> u64 {
        self.inner.bytes_read()
    }

    #[getter]
    fn failures(&self) -> Vec<BaseFailure> {
        let plain = |found: pager::BaseFailure| BaseFailure { unit: found.unit, message: found.message };
        self.inner.failures().into_iter().map(plain).collect()
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.inner.stop());
    }
}
