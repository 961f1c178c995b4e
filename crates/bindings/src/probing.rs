use std::os::fd::IntoRawFd;

use pageferry_engine::probing;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors;

#[pyfunction]
#[pyo3(signature = (*, user_mode_only))]
pub fn userfaultfd(user_mode_only: bool) -> PyResult<i32> {
    probing::userfaultfd(user_mode_only).map(IntoRawFd::into_raw_fd).map_err(errors::kernel)
}

#[pyfunction]
pub fn read_memory(py: Python<'_>, address: u64, length: usize) -> Bound<'_, PyBytes> {
    // SAFETY: the callers are probes, which pass ranges that they have mapped and that are readable.
    let contents = py.detach(|| unsafe { probing::read_memory(address, length) });
    PyBytes::new(py, &contents)
}

#[pyfunction]
pub fn write_memory(py: Python<'_>, address: u64, contents: &[u8]) {
    // SAFETY: the callers are probes, which pass ranges that they have mapped for this purpose. The ranges are
    // writable, and no Rust reference covers them.
    py.detach(|| unsafe { probing::write_memory(address, contents) });
}

#[pyfunction]
pub fn kernel_reads(py: Python<'_>, address: u64) -> PyResult<()> {
    py.detach(|| probing::kernel_reads(address)).map_err(errors::kernel)
}

#[pyfunction]
pub fn kernel_writes(py: Python<'_>, address: u64, contents: &[u8]) -> PyResult<usize> {
    // SAFETY: the callers are probes, which pass addresses in ranges that they have mapped for this purpose. No Rust
    // reference covers these ranges.
    py.detach(|| unsafe { probing::kernel_writes(address, contents) }).map_err(errors::kernel)
}
