//! How storage blocks are made, as Python says it.

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Codec, MAX_RAW, MAX_UNIT};
use pageferry_engine::image::Sizes;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

pub fn codec(name: &str) -> PyResult<Codec> {
    Codec::named(name).ok_or_else(|| PyValueError::new_err(format!("codec {name}: choose none, lz4 or zstd")))
}

pub fn sizes(page_block: usize, storage_block: usize) -> PyResult<Sizes> {
    let whole = |value: usize, unit: usize| value > 0 && value.is_multiple_of(unit);
    if !whole(page_block, SMALL_PAGE) || page_block > MAX_UNIT {
        return Err(PyValueError::new_err(format!("page block of {page_block} bytes: 4 KiB to 1 MiB")));
    }
    if !whole(storage_block, page_block) || storage_block > MAX_RAW {
        return Err(PyValueError::new_err(format!("storage block of {storage_block} bytes: up to 4 MiB")));
    }
    Ok(Sizes { page_block, storage_block })
}
