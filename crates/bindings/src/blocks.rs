//! Validation of the codec and the block sizes given by Python.

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Codec, MAX_RAW, MAX_UNIT};
use pageferry_engine::image::Sizes;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

pub fn codec(name: &str) -> PyResult<Codec> {
    Codec::named(name)
        .ok_or_else(|| PyValueError::new_err(format!("invalid codec {name:?}: expected none, lz4 or zstd")))
}

pub fn sizes(page_block: usize, storage_block: usize) -> PyResult<Sizes> {
    let whole = |value: usize, unit: usize| value > 0 && value.is_multiple_of(unit);
    if !whole(page_block, SMALL_PAGE) || page_block > MAX_UNIT {
        return Err(PyValueError::new_err(format!(
            "invalid page block of {page_block} bytes: expected a multiple of 4 KiB, up to 1 MiB"
        )));
    }
    if !whole(storage_block, page_block) || storage_block > MAX_RAW {
        return Err(PyValueError::new_err(format!(
            "invalid storage block of {storage_block} bytes: expected a multiple of the page block, up to 4 MiB"
        )));
    }
    Ok(Sizes { page_block, storage_block })
}
