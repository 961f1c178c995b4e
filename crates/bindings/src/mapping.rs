use std::ffi::c_int;
use std::os::fd::AsFd;
use std::sync::Arc;

use pageferry_engine::mapping;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::errors;

#[pyclass(subclass, frozen, module = "pageferry._engine")]
pub struct Mapping {
    pub inner: Arc<mapping::Mapping>,
}

#[pymethods]
impl Mapping {
    #[new]
    #[pyo3(signature = (fd, length, offset = 0))]
    fn new(fd: i32, length: usize, offset: u64) -> PyResult<Self> {
        let file = mapping::duplicate(fd).map_err(errors::kernel)?;
        let inner = mapping::Mapping::new(file.as_fd(), length, offset).map_err(errors::kernel)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn address(&self) -> u64 {
        self.inner.address()
    }

    #[getter]
    fn length(&self) -> usize {
        self.inner.len()
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// Returns the descriptor of the file. The mapping owns the descriptor.
    fn fileno(&self) -> i32 {
        self.inner.file()
    }

    /// Returns the ranges of the mapping that hold data (SEEK_DATA, SEEK_HOLE). Reading any other byte would allocate a
    /// page.
    fn data_ranges(&self, py: Python<'_>) -> PyResult<Vec<(usize, usize)>> {
        py.detach(|| self.inner.data_ranges()).map_err(errors::kernel)
    }

    /// Returns, for each 2 MiB unit, whether it is backed by a huge page.
    fn large_units(&self, py: Python<'_>) -> PyResult<Vec<bool>> {
        py.detach(|| self.inner.large_units()).map_err(errors::kernel)
    }

    fn close_memory(&self) -> PyResult<()> {
        self.inner.close().map_err(errors::kernel)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("invalid buffer request: no view"));
        }
        let (base, len) = (slf.get().inner.base(), slf.get().inner.len());
        let len = ffi::Py_ssize_t::try_from(len)
            .map_err(|_| PyBufferError::new_err("invalid buffer request: the mapping is too large"))?;
        let closed = slf.get().inner.is_closed();
        let py = slf.py();
        let owner = slf.into_any().into_ptr();
        let readonly = c_int::from(closed);
        // SAFETY: CPython passes a view to fill. `base` and `len` describe the mapping, which the owner keeps alive
        // until the buffer is released.
        let result = unsafe { ffi::PyBuffer_FillInfo(view, owner, base.cast(), len, readonly, flags) };
        // SAFETY: this releases the reference from `into_ptr`. On success, PyBuffer_FillInfo has taken another one.
        unsafe { ffi::Py_DECREF(owner) };
        if result < 0 { Err(PyErr::fetch(py)) } else { Ok(()) }
    }
}

#[pyfunction]
pub fn end_on_truncation(code: i32) -> PyResult<()> {
    pageferry_engine::truncated::end_with(code).map_err(errors::kernel)
}
