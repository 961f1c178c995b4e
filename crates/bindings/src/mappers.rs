use pageferry_engine::mappers::{self, FileId};
use pyo3::prelude::*;

use crate::errors;

/// Index of the file, process ID, address, length, offset in the file, writable.
type MappingTuple = (usize, i32, u64, u64, u64, bool);
/// Mappings, writers, processes that may not be inspected, and number of processes inspected.
type FoundTuple = (Vec<MappingTuple>, Vec<(usize, i32, i32)>, Vec<i32>, usize);

#[pyfunction]
pub fn scan_mappers(py: Python<'_>, files: Vec<(u64, u64, u64)>) -> PyResult<FoundTuple> {
    let files: Vec<_> =
        files.into_iter().map(|(device, inode, mapped_device)| FileId { device, inode, mapped_device }).collect();
    let found = py.detach(|| mappers::scan(&files)).map_err(errors::kernel)?;
    let mappings = found.mappings.iter().map(|m| (m.file, m.pid, m.address, m.length, m.offset, m.writable)).collect();
    Ok((mappings, found.writers, found.unreadable, found.read))
}

#[pyfunction]
pub fn own_mappings() -> Vec<(u64, u64)> {
    pageferry_engine::mapping::registered()
}
