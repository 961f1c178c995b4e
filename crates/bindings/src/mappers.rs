use pageferry_engine::mappers::{self, FileId};
use pyo3::prelude::*;

use crate::errors;

/// Shared mapping of one of the scanned files.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
#[derive(Clone)]
pub struct FileMapping {
    file: usize,
    pid: i32,
    address: u64,
    length: u64,
    offset: u64,
    writable: bool,
    engine: bool,
}

/// Shared mappings of the scanned files, IDs of the processes that have one of the files open for writing, and IDs of
/// the processes that cannot be inspected.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct Mappers {
    mappings: Vec<FileMapping>,
    writers: Vec<i32>,
    unreadable: Vec<i32>,
}

#[pyfunction]
pub fn scan_mappers(py: Python<'_>, files: Vec<(u64, u64, u64)>) -> PyResult<Mappers> {
    let files: Vec<_> =
        files.into_iter().map(|(device, inode, mapped_device)| FileId { device, inode, mapped_device }).collect();
    let found = py.detach(|| mappers::scan(&files)).map_err(errors::kernel)?;
    let mapping =
        |&mappers::FileMapping { file, pid, address, length, offset, writable, engine }: &mappers::FileMapping| {
            FileMapping { file, pid, address, length, offset, writable, engine }
        };
    Ok(Mappers {
        mappings: found.mappings.iter().map(mapping).collect(),
        writers: found.writers.iter().map(|&(_, pid, _)| pid).collect(),
        unreadable: found.unreadable,
    })
}

#[pyfunction]
pub fn own_mappings() -> Vec<(u64, u64)> {
    pageferry_engine::mapping::registered()
}
