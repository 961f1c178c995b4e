use pageferry_engine::activity;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::detached::Detached;
use crate::errors;
use crate::space::Space;

/// Huge page whose mapping stays split, and the reason.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct SplitPage {
    address: u64,
    reason: String,
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Sampler {
    inner: Detached<activity::Sampler>,
}

#[pymethods]
impl Sampler {
    #[new]
    fn new(py: Python<'_>, space: PyRef<'_, Space>) -> PyResult<Self> {
        let space = space.inner.clone();
        let inner = py.detach(|| activity::Sampler::new(space)).map_err(errors::adopt)?;
        Ok(Self { inner: inner.into() })
    }

    fn hold(&self, py: Python<'_>, pages: Vec<u64>) -> PyResult<Vec<u64>> {
        py.detach(|| self.inner.hold(&pages)).map_err(errors::kernel)
    }

    #[pyo3(signature = (pages, *, marked))]
    fn split(&self, py: Python<'_>, pages: Vec<u64>, marked: bool) -> PyResult<()> {
        py.detach(|| self.inner.split(&pages, marked)).map_err(errors::kernel)
    }

    fn cool(&self, py: Python<'_>, pages: Vec<u64>) -> PyResult<()> {
        py.detach(|| self.inner.cool(&pages)).map_err(errors::kernel)
    }

    fn touched<'py>(&self, py: Python<'py>, pages: Vec<u64>) -> PyResult<Vec<Bound<'py, PyBytes>>> {
        let found = py.detach(|| self.inner.touched(&pages)).map_err(errors::kernel)?;
        let bytes = |words: &activity::Touched| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        Ok(found.iter().map(|words| PyBytes::new(py, &bytes(words))).collect())
    }

    fn restore(&self, py: Python<'_>) -> Vec<SplitPage> {
        let small = py.detach(|| self.inner.restore());
        small.into_iter().map(|(address, error)| SplitPage { address, reason: error.to_string() }).collect()
    }
}
