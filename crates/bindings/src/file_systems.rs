use std::os::fd::{AsFd, IntoRawFd};

use pageferry_engine::{file_systems, mapping};
use pyo3::prelude::*;

use crate::errors;

#[pyfunction]
pub fn large_tmpfs(py: Python<'_>, size: u64) -> PyResult<i32> {
    py.detach(|| file_systems::large_tmpfs(size)).map(IntoRawFd::into_raw_fd).map_err(errors::kernel)
}

#[pyfunction]
pub fn hugetlbfs(py: Python<'_>, size: u64) -> PyResult<i32> {
    py.detach(|| file_systems::hugetlbfs(size)).map(IntoRawFd::into_raw_fd).map_err(errors::kernel)
}

#[pyfunction]
pub fn file_system_type(fd: i32) -> PyResult<i64> {
    let file = mapping::duplicate(fd).map_err(errors::kernel)?;
    file_systems::file_system_type(file.as_fd()).map_err(errors::kernel)
}
