use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pageferry_engine::pager::{self, Targets};
use pageferry_engine::placer;
use pageferry_engine::private_mappings::PrivateMappings;
use pyo3::prelude::*;

use crate::detached::Detached;
use crate::errors;
use crate::mapping::Mapping;
use crate::space::{MappedSegment, segments, userfaults};

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

/// Region of private memory, whose contents a pager installs by UFFDIO_COPY.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct PrivateRegion {
    pages: usize,
    page_size: usize,
}

#[pymethods]
impl PrivateRegion {
    #[new]
    fn new(pages: usize, page_size: usize) -> Self {
        Self { pages, page_size }
    }
}

/// Memory that a pager fills.
#[derive(FromPyObject)]
pub enum PagerTargets<'py> {
    Files(Vec<PyRef<'py, TargetRegion>>),
    Private(Vec<PyRef<'py, PrivateRegion>>),
}

impl PagerTargets<'_> {
    /// Returns the regions.
    pub fn plain(&self) -> Targets {
        match self {
            Self::Files(files) => Targets::Files(targets(files)),
            Self::Private(regions) => {
                let plain = |region: &PyRef<'_, PrivateRegion>| pager::PrivateRegion {
                    pages: region.pages,
                    page_size: region.page_size,
                };
                Targets::Private(regions.iter().map(plain).collect())
            }
        }
    }

    /// Returns the number of base pages of all regions.
    pub fn pages(&self) -> usize {
        match self {
            Self::Files(files) => files.iter().map(|target| target.mapping.get().inner.pages()).sum(),
            Self::Private(regions) => regions.iter().map(|region| region.pages).sum(),
        }
    }
}

/// Numbers of pages mapped into page tables, and total duration of the mapping in seconds.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct Populated {
    large: u64,
    small: u64,
    failed: u64,
    seconds: f64,
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Placer {
    pub inner: Detached<Arc<placer::Placer>>,
}

#[pymethods]
impl Placer {
    #[new]
    #[pyo3(signature = (targets, segments, *, keep_large = true, workers = 0, private = None))]
    fn new(
        py: Python<'_>,
        targets: Vec<PyRef<'_, TargetRegion>>,
        segments: Vec<PyRef<'_, MappedSegment>>,
        keep_large: bool,
        workers: usize,
        private: Option<HashMap<i32, i32>>,
    ) -> PyResult<Self> {
        let (targets, segments) = (self::targets(&targets), self::segments(&segments));
        let private = private.map(userfaults).transpose()?;
        let inner = py.detach(|| match private {
            None => placer::Placer::new(targets, segments, keep_large, workers),
            Some(found) => placer::Placer::for_clone(targets, PrivateMappings::new(segments, found)),
        });
        Ok(Self { inner: Arc::new(inner.map_err(errors::kernel)?).into() })
    }

    fn move_private(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| self.inner.move_private()).map_err(errors::kernel)
    }

    #[getter]
    fn missing(&self, py: Python<'_>) -> usize {
        py.detach(|| self.inner.missing())
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
