use pageferry_engine::pages;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

#[pyclass(module = "pageferry._engine")]
#[derive(Clone)]
pub struct PageSet {
    pub inner: pages::PageSet,
}

impl PageSet {
    fn check(&self, other: &Self) -> PyResult<()> {
        let (ours, theirs) = (self.inner.pages(), other.inner.pages());
        if ours == theirs {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("cannot combine sets for regions of {ours} and {theirs} pages")))
    }
}

#[pymethods]
impl PageSet {
    #[new]
    fn new(pages: usize) -> Self {
        Self { inner: pages::PageSet::new(pages) }
    }

    #[staticmethod]
    fn full(pages: usize) -> Self {
        Self { inner: pages::PageSet::full(pages) }
    }

    #[getter]
    fn pages(&self) -> usize {
        self.inner.pages()
    }

    fn __len__(&self) -> usize {
        self.inner.count()
    }

    fn __bool__(&self) -> bool {
        !self.inner.is_empty()
    }

    fn __contains__(&self, page: usize) -> bool {
        self.inner.contains(page)
    }

    fn insert(&mut self, start: usize, end: usize) {
        self.inner.insert(start, end);
    }

    fn remove(&mut self, start: usize, end: usize) {
        self.inner.remove(start, end);
    }

    fn clear(&mut self) {
        self.inner.clear();
    }

    fn update(&mut self, other: PyRef<'_, Self>) -> PyResult<()> {
        self.check(&other)?;
        self.inner.union(&other.inner);
        Ok(())
    }

    fn subtract(&mut self, other: PyRef<'_, Self>) -> PyResult<()> {
        self.check(&other)?;
        self.inner.subtract(&other.inner);
        Ok(())
    }

    fn unit_counts(&self) -> Vec<u16> {
        self.inner.unit_counts()
    }

    fn runs(&self) -> Vec<(usize, usize)> {
        self.inner.runs().collect()
    }

    fn pack<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &py.detach(|| self.inner.pack()))
    }

    #[staticmethod]
    fn unpack(py: Python<'_>, data: &[u8], pages: usize) -> PyResult<Self> {
        let inner = py.detach(|| pages::PageSet::unpack(data, pages));
        Ok(Self { inner: inner.map_err(|error| PyValueError::new_err(error.to_string()))? })
    }

    fn copy(&self) -> Self {
        self.clone()
    }
}
