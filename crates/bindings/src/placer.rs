use std::sync::Arc;
use std::sync::atomic::Ordering;

use pageferry_engine::placer;
use pyo3::prelude::*;

use crate::errors;
use crate::mapping::Mapping;
use crate::space::{MappedSegment, segments};

/// Region whose contents a placer or a pager provides.
#[pyclass(frozen, module = "pageferry._engine")]
pub struct TargetRegion {
    #[pyo3(get)]
    mapping: Py<Mapping>,
    #[pyo3(get)]
    page_size: usize,
    large: Vec<bool>,
}

#[pymethods]
impl TargetRegion {
    #[new]
    #[pyo3(signature = (mapping, page_size, large = Vec::new()))]
    fn new(mapping: Py<Mapping>, page_size: usize, large: Vec<bool>) -> Self {
        Self { mapping, page_size, large }
    }
}

pub fn targets(given: &[PyRef<'_, TargetRegion>]) -> Vec<placer::Target> {
    let plain = |target: &PyRef<'_, TargetRegion>| placer::Target {
        mapping: target.mapping.get().inner.clone(),
        page_size: target.page_size,
        large: target.large.clone(),
    };
    given.iter().map(plain).collect()
}

/// Numbers of pages mapped into page tables, and total time spent on mapping, seconds.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct Populated {
    large: u64,
    small: u64,
    failed: u64,
    seconds: f64,
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Placer {
    pub inner: Arc<placer::Placer>,
}

#[pymethods]
impl Placer {
    #[new]
    #[pyo3(signature = (targets, segments, *, keep_large = true, workers = 0))]
    fn new(
        targets: Vec<PyRef<'_, TargetRegion>>,
        segments: Vec<PyRef<'_, MappedSegment>>,
        keep_large: bool,
        workers: usize,
    ) -> PyResult<Self> {
        let (targets, segments) = (self::targets(&targets), self::segments(&segments));
        let inner = placer::Placer::new(targets, segments, keep_large, workers).map_err(errors::kernel)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn missing(&self) -> usize {
        self.inner.missing()
    }

    #[getter]
    fn fallbacks(&self) -> u64 {
        self.inner.fallbacks()
    }

    #[getter]
    fn populated(&self) -> Populated {
        let populated = self.inner.populated();
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = std::time::Duration::from_nanos(load(&populated.nanoseconds)).as_secs_f64();
        Populated {
            large: load(&populated.large),
            small: load(&populated.small),
            failed: load(&populated.failed),
            seconds,
        }
    }

    fn populate(&self, py: Python<'_>, region: usize, units: Vec<usize>) -> PyResult<()> {
        py.detach(|| self.inner.populate(region, &units)).map_err(errors::place)
    }

    fn allocate_ahead(&self, py: Python<'_>, region: usize, units: Vec<usize>) {
        py.detach(|| units.iter().for_each(|&unit| self.inner.allocate_ahead(region, unit)));
    }

    #[pyo3(signature = (*, populate_rest))]
    fn finish(&self, py: Python<'_>, populate_rest: bool) -> PyResult<()> {
        py.detach(|| self.inner.finish(populate_rest)).map_err(errors::adopt)
    }
}
