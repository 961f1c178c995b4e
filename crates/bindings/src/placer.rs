use std::sync::Arc;
use std::sync::atomic::Ordering;

use pageferry_engine::placer;
use pyo3::prelude::*;

use crate::errors;
use crate::mapping::Mapping;
use crate::space::{SegmentTuple, segments};

/// Region at the destination: mapping, page size, and which units are huge at the source.
pub type TargetTuple<'py> = (PyRef<'py, Mapping>, usize, Vec<bool>);

pub fn targets(tuples: Vec<TargetTuple<'_>>) -> Vec<placer::Target> {
    let target = |(mapping, page_size, large): TargetTuple<'_>| {
        let mapping = mapping.inner.clone();
        placer::Target { mapping, page_size, large }
    };
    tuples.into_iter().map(target).collect()
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Placer {
    pub inner: Arc<placer::Placer>,
}

#[pymethods]
impl Placer {
    #[new]
    #[pyo3(signature = (targets, segments, keep_large = true, workers = 0))]
    fn new(
        targets: Vec<TargetTuple<'_>>,
        segments: Vec<SegmentTuple<'_>>,
        keep_large: bool,
        workers: usize,
    ) -> PyResult<Self> {
        let (targets, segments) = (self::targets(targets), self::segments(segments));
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
    fn populated(&self) -> (u64, u64, u64, f64) {
        let populated = self.inner.populated();
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let seconds = std::time::Duration::from_nanos(load(&populated.nanoseconds)).as_secs_f64();
        (load(&populated.large), load(&populated.small), load(&populated.failed), seconds)
    }

    fn populate(&self, py: Python<'_>, region: usize, units: Vec<usize>) -> PyResult<()> {
        py.detach(|| self.inner.populate(region, &units)).map_err(errors::place)
    }

    fn allocate_ahead(&self, py: Python<'_>, region: usize, units: Vec<usize>) {
        py.detach(|| units.iter().for_each(|&unit| self.inner.allocate_ahead(region, unit)));
    }

    fn finish(&self, py: Python<'_>, rest: bool) -> PyResult<()> {
        py.detach(|| self.inner.finish(rest)).map_err(errors::adopt)
    }
}
