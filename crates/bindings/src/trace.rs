use std::collections::HashMap;

use pageferry_engine::{pages, trace};
use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::detached::Detached;
use crate::errors;
use crate::pages::PageSet;
use crate::space::{self, MappedSegment, segments};

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Trace {
    inner: Detached<Mutex<Option<trace::Trace>>>,
}

impl Trace {
    fn with<T>(&self, work: impl FnOnce(&trace::Trace) -> T) -> PyResult<T> {
        let guard = self.inner.lock();
        guard.as_ref().map(work).ok_or_else(|| PyValueError::new_err("cannot use the trace: it has been removed"))
    }
}

/// Calls `work` with empty sets while the GIL is released, and adds the pages found to `sets`. Adds them even after an
/// error, because collected pages are not reported again.
fn on_sets(
    py: Python<'_>,
    sets: &[Py<PageSet>],
    work: impl FnOnce(&mut [pages::PageSet]) -> PyResult<()> + Send,
) -> PyResult<()> {
    let mut found: Vec<_> = sets.iter().map(|set| pages::PageSet::new(set.borrow(py).inner.pages())).collect();
    let result = py.detach(|| work(&mut found));
    for (set, found) in sets.iter().zip(found) {
        set.borrow_mut(py).inner.union(&found);
    }
    result
}

#[pymethods]
impl Trace {
    #[new]
    #[pyo3(signature = (segments, release_after = 0, large = None, userfaults = None, *, private = false))]
    fn new(
        py: Python<'_>,
        segments: Vec<PyRef<'_, MappedSegment>>,
        release_after: usize,
        large: Option<Vec<Vec<bool>>>,
        userfaults: Option<HashMap<i32, i32>>,
        private: bool,
    ) -> PyResult<Self> {
        let plain = self::segments(&segments);
        if let Some(found) = userfaults {
            let known = space::userfaults(found)?;
            let install = if private { trace::Trace::install_private } else { trace::Trace::install_on };
            let inner = py.detach(|| install(plain, &known)).map_err(errors::kernel)?;
            return Ok(Self { inner: Mutex::new(Some(inner)).into() });
        }
        let inner = py
            .detach(|| trace::Trace::install(plain, &large.unwrap_or_default(), release_after))
            .map_err(errors::adopt)?;
        Ok(Self { inner: Mutex::new(Some(inner)).into() })
    }

    #[getter]
    fn install_seconds(&self, py: Python<'_>) -> PyResult<f64> {
        py.detach(|| self.with(|trace| trace.install_time().as_secs_f64()))
    }

    #[getter]
    fn released_units(&self, py: Python<'_>) -> PyResult<u64> {
        py.detach(|| self.with(trace::Trace::released_units))
    }

    fn collect(&self, py: Python<'_>, dirty: Vec<Py<PageSet>>) -> PyResult<()> {
        on_sets(py, &dirty, |sets| self.with(|trace| trace.collect(sets))?.map_err(errors::kernel))
    }

    fn peek(&self, py: Python<'_>, dirty: Vec<Py<PageSet>>) -> PyResult<()> {
        on_sets(py, &dirty, |sets| self.with(|trace| trace.peek(sets))?.map_err(errors::kernel))
    }

    fn release(&self, py: Python<'_>, segment: usize) -> PyResult<()> {
        py.detach(|| self.with(|trace| trace.release(segment))?.map_err(errors::kernel))
    }

    fn remove(&self, py: Python<'_>) {
        py.detach(|| drop(self.inner.lock().take()));
    }
}
