use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use pageferry_engine::{SMALL_PAGE, mapping};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;

use crate::detached::Detached;
use crate::errors;

#[pyclass(subclass, frozen, module = "pageferry._engine")]
pub struct Mapping {
    pub inner: Detached<Arc<mapping::Mapping>>,
}

impl Drop for Mapping {
    /// Removes the mapping from the list of mappings while the GIL is held: a child of fork must not inherit the lock of
    /// the list from a thread that it does not have.
    fn drop(&mut self) {
        if let Some(last) = Arc::get_mut(&mut self.inner) {
            last.unlist();
        }
    }
}

#[pymethods]
impl Mapping {
    #[new]
    #[pyo3(signature = (fd, length, offset = 0, room = 0))]
    fn new(fd: i32, length: usize, offset: u64, room: usize) -> PyResult<Self> {
        let file = mapping::duplicate(fd).map_err(errors::kernel)?;
        let room = room.max(length);
        let inner = mapping::Mapping::with_room(file.as_fd(), length, offset, room).map_err(errors::kernel)?;
        Ok(Self { inner: Arc::new(inner).into() })
    }

    fn grow(&self, length: usize) -> PyResult<()> {
        self.inner.grow(length).map_err(errors::kernel)
    }

    fn replace(&self, py: Python<'_>, fd: i32) -> PyResult<()> {
        let file = mapping::duplicate(fd).map_err(errors::kernel)?;
        py.detach(|| self.inner.replace(file.as_fd())).map_err(errors::kernel)
    }

    fn permit(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.permit()).map_err(errors::kernel)
    }

    fn keep(&self, fd: i32) -> PyResult<i32> {
        let kept = mapping::duplicate(fd).map_err(errors::kernel)?;
        let number = kept.as_raw_fd();
        self.inner.keep(kept);
        Ok(number)
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

    /// Copies contiguous bytes into the mapping.
    fn copy_in(&self, py: Python<'_>, offset: usize, contents: PyBuffer<u8>) -> PyResult<()> {
        if !contents.is_c_contiguous() {
            return Err(PyValueError::new_err("invalid contents: expected contiguous bytes"));
        }
        let len = contents.len_bytes();
        // SAFETY: the owner of the buffer keeps its `len` bytes at this address until `contents` is released.
        py.detach(|| unsafe { self.inner.copy_in(offset, contents.buf_ptr().cast(), len) }).map_err(errors::kernel)
    }

    /// Frees a range of whole pages, which reads as zeros from then on.
    fn discard(&self, py: Python<'_>, start: usize, length: usize) -> PyResult<()> {
        let end = start.checked_add(length).filter(|end| *end <= self.inner.len());
        if end.is_none() || !start.is_multiple_of(SMALL_PAGE) || !length.is_multiple_of(SMALL_PAGE) {
            return Err(PyValueError::new_err("invalid range: expected whole pages of the mapping"));
        }
        if length == 0 {
            return Ok(());
        }
        py.detach(|| self.inner.punch(start, length)).map_err(errors::kernel)
    }

    fn close_memory(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.close()).map_err(errors::kernel)
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
