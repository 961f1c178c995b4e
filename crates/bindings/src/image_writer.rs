use parking_lot::Mutex;

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Builder, Class};
use pageferry_engine::image::{self, FLAG_IN_PARENT, PageEntry, Sizes};
use pageferry_engine::mapping::duplicate;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::image::WrittenImage;
use crate::{blocks, errors};

/// Page map entry: class, whether the contents are in the parent, signature, storage block and slot.
type Entry = (u8, bool, u64, u32, u16);

#[pyclass(frozen, module = "pageferry._engine")]
pub struct ImageWriter {
    inner: Mutex<Option<(image::ImageWriter, Builder)>>,
    /// Maximum number of pages of a storage block.
    max: usize,
}

fn finished() -> PyErr {
    PyValueError::new_err("cannot write to the image: it is already finished")
}

impl ImageWriter {
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut image::ImageWriter, &mut Builder) -> std::io::Result<T> + Send,
    ) -> PyResult<T> {
        let done = py.detach(|| self.inner.lock().as_mut().map(|(writer, builder)| work(writer, builder)));
        done.ok_or_else(finished)?.map_err(errors::kernel)
    }
}

#[pymethods]
impl ImageWriter {
    #[new]
    #[pyo3(signature = (fd, id, **format))]
    fn new(py: Python<'_>, fd: i32, id: [u8; 16], format: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let (codec, sizes) = blocks::only_image_format(py, format)?;
        let Sizes { page_block, storage_block } = sizes;
        let file = duplicate(fd).map_err(errors::kernel)?;
        let writer = py.detach(|| image::ImageWriter::new(file, id, sizes)).map_err(errors::kernel)?;
        let inner = Mutex::new(Some((writer, Builder::new(codec, page_block, storage_block))));
        Ok(Self { inner, max: storage_block / SMALL_PAGE })
    }

    /// Writes a storage block of data pages, given as (index of the page, contents). Returns the number of the block.
    fn append(&self, py: Python<'_>, region: u32, pages: Vec<(usize, Vec<u8>)>) -> PyResult<u32> {
        if let Some((page, _)) = pages.iter().find(|(_, contents)| contents.len() != SMALL_PAGE) {
            return Err(PyValueError::new_err(format!("invalid contents of page {page}: expected 4096 bytes")));
        }
        if pages.len() > self.max {
            let count = pages.len();
            return Err(PyValueError::new_err(format!(
                "cannot store {count} pages in a block: the limit is {}",
                self.max
            )));
        }
        self.with(py, |writer, builder| {
            for (page, contents) in &pages {
                builder.push_data(*page, contents);
            }
            writer.append(&builder.build(region, 0, 0))
        })
    }

    fn section(&self, py: Python<'_>, kind: u32, contents: &[u8]) -> PyResult<()> {
        self.with(py, |writer, _| writer.section(kind, contents))
    }

    fn finish(&self, py: Python<'_>, regions: usize, entries: Vec<Entry>) -> PyResult<WrittenImage> {
        let class = |number: u8| {
            Class::numbered(number)
                .ok_or_else(|| PyValueError::new_err(format!("invalid page class {number}: expected 0 to 4")))
        };
        let entry = |(number, in_parent, signature, block, slot): Entry| -> PyResult<PageEntry> {
            let mut entry = PageEntry::stored(class(number)?, signature, block, slot);
            entry.flags = if in_parent { FLAG_IN_PARENT } else { 0 };
            Ok(entry)
        };
        let map = entries.into_iter().map(entry).collect::<PyResult<Vec<_>>>()?;
        let written = py.detach(|| self.inner.lock().take().map(|(writer, _)| writer.finish(regions, &map)));
        written.ok_or_else(finished)?.map(Into::into).map_err(errors::kernel)
    }
}
