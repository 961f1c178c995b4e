//! Validation of the codec and the block sizes that Python passes.

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Codec, MAX_RAW, MAX_UNIT};
use pageferry_engine::image::Sizes;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::options::Keywords;

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

/// Takes the codec and the block sizes of a new image from keyword arguments.
pub fn image_format(keywords: &Keywords<'_>) -> PyResult<(Codec, Sizes)> {
    let codec = codec(&keywords.take("codec", "lz4".to_owned())?)?;
    let sizes = sizes(keywords.take("page_block", 65_536)?, keywords.take("storage_block", 1_048_576)?)?;
    Ok((codec, sizes))
}

/// Returns the codec and the block sizes of a new image. Rejects other keyword arguments.
pub fn only_image_format(py: Python<'_>, given: Option<&Bound<'_, PyDict>>) -> PyResult<(Codec, Sizes)> {
    let keywords = Keywords::new(py, given)?;
    let format = image_format(&keywords)?;
    keywords.finish().map(|()| format)
}
