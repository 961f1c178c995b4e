use std::os::fd::AsRawFd;
use std::sync::Arc;

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::image::{self, ImageError, PageReader};
use pageferry_engine::mapping::duplicate;
use parking_lot::Mutex;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::{blocks, errors};

pub fn image_error(error: ImageError) -> PyErr {
    let message = error.to_string();
    match error {
        ImageError::Io(error) if error.raw_os_error().is_some() => PyOSError::new_err((error.raw_os_error(), message)),
        _ => PyValueError::new_err(message),
    }
}

/// Page map entry: class, whether it is in the parent, signature, storage block and slot.
pub type Entry = (u8, bool, u64, u32, u16);
/// Stored pages, in the order of storage blocks.
type StoredPages = Arc<Vec<(image::PageEntry, usize)>>;
/// Page (or None) and message of each finding.
type Findings = Vec<(Option<usize>, String)>;

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Image {
    pub inner: Arc<image::Image>,
}

#[pymethods]
impl Image {
    #[new]
    fn new(py: Python<'_>, fd: i32) -> PyResult<Self> {
        let file = duplicate(fd).map_err(errors::kernel)?;
        let mut signal = None;
        let mut wanted = || {
            signal = Python::attach(|py| py.check_signals()).err();
            signal.is_none()
        };
        let opened = py.detach(|| image::Image::open_while(file, &mut wanted));
        if let Some(signal) = signal {
            return Err(signal);
        }
        let inner = opened.map_err(image_error)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    fn fileno(&self) -> i32 {
        self.inner.file().as_raw_fd()
    }

    #[getter]
    fn id(&self) -> [u8; 16] {
        self.inner.id()
    }

    #[getter]
    fn digest(&self) -> u64 {
        self.inner.digest()
    }

    #[getter]
    fn regions(&self) -> usize {
        self.inner.regions()
    }

    #[getter]
    fn pages(&self) -> usize {
        self.inner.page_map().len()
    }

    #[getter]
    fn length(&self) -> u64 {
        self.inner.len()
    }

    #[getter]
    fn page_block(&self) -> usize {
        self.inner.page_block()
    }

    #[getter]
    fn blocks(&self) -> Vec<(u64, u32)> {
        self.inner.blocks().iter().map(|entry| (entry.offset.get(), entry.len.get())).collect()
    }

    fn section<'py>(&self, py: Python<'py>, kind: u32) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let contents = py.detach(|| self.inner.section(kind)).map_err(image_error)?;
        Ok(contents.map(|contents| PyBytes::new(py, &contents)))
    }

    fn entries(&self, first: usize, count: usize) -> PyResult<Vec<Entry>> {
        let end = first.saturating_add(count);
        let part = self.inner.page_map().get(first..end);
        let part = part.ok_or_else(|| PyValueError::new_err(self.no_such_pages(first, end)))?;
        let plain = |entry: &image::PageEntry| {
            (entry.class, entry.in_parent(), entry.signature.get(), entry.block.get(), entry.slot.get())
        };
        Ok(part.iter().map(plain).collect())
    }

    /// Counts pages by class (absent, zero, pattern, same-as, data), and those in the parent.
    fn count(&self, py: Python<'_>, first: usize, count: usize) -> PyResult<[usize; 6]> {
        let end = first.saturating_add(count);
        let part = self.inner.page_map().get(first..end);
        let part = part.ok_or_else(|| PyValueError::new_err(self.no_such_pages(first, end)))?;
        Ok(py.detach(|| {
            let mut counts = [0; 6];
            for entry in part {
                let place = if entry.in_parent() { 5 } else { usize::from(entry.class).min(4) };
                counts[place] += 1;
            }
            counts
        }))
    }
}

impl Image {
    fn no_such_pages(&self, first: usize, end: usize) -> String {
        format!("invalid pages {first} to {end}: the image has {}", self.pages())
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct ImageChain {
    pub inner: image::Chain,
    /// Pages to verify, in the order of storage blocks; created on first use.
    stored: Mutex<Option<StoredPages>>,
}

#[pymethods]
impl ImageChain {
    #[new]
    fn new(images: Vec<PyRef<'_, Image>>) -> PyResult<Self> {
        let images = images.iter().map(|image| image.inner.clone()).collect();
        let inner = image::Chain::new(images).map_err(image_error)?;
        Ok(Self { inner, stored: Mutex::new(None) })
    }

    fn read<'py>(&self, py: Python<'py>, first: usize, count: usize) -> PyResult<Bound<'py, PyBytes>> {
        let len = count.checked_mul(SMALL_PAGE).filter(|len| *len <= 1 << 30);
        let len =
            len.ok_or_else(|| PyValueError::new_err(format!("cannot read {count} pages at once: the limit is 1 GiB")))?;
        let contents = py.detach(|| {
            let mut contents = vec![0; len];
            let mut reader = PageReader::new(&self.inner);
            for (page, out) in (first..).zip(contents.chunks_exact_mut(SMALL_PAGE)) {
                reader.read(page, out)?;
            }
            Ok(contents)
        });
        Ok(PyBytes::new(py, &contents.map_err(image_error)?))
    }

    /// Returns the pages of a range that differ, as runs (start, end).
    fn differences(
        &self,
        py: Python<'_>,
        other: PyRef<'_, Self>,
        first: usize,
        count: usize,
    ) -> PyResult<Vec<(usize, usize)>> {
        let (ours, theirs) = (&self.inner, &other.inner);
        py.detach(|| image::differences(ours, theirs, first, count)).map_err(image_error)
    }

    #[getter]
    fn stored(&self, py: Python<'_>) -> usize {
        py.detach(|| self.stored_pages().len())
    }

    fn verify(&self, py: Python<'_>, first: usize, count: usize, limit: usize) -> Findings {
        let findings = py.detach(|| {
            let stored = self.stored_pages();
            let part = &stored[first.min(stored.len())..first.saturating_add(count).min(stored.len())];
            image::verify(&self.inner, part, limit)
        });
        findings.into_iter().map(|finding| (finding.page, finding.message)).collect()
    }

    fn verify_unused(&self, py: Python<'_>) -> Findings {
        let findings = py.detach(|| image::verify_unused(self.inner.nearest(), &self.stored_pages()));
        findings.into_iter().map(|finding| (finding.page, finding.message)).collect()
    }

    /// Writes the whole chain as one image. `sections` are pairs of kind and contents.
    #[expect(clippy::too_many_arguments, reason = "keyword arguments in Python")]
    #[pyo3(signature = (fd, id, regions, sections, codec = "lz4", page_block = 65536, storage_block = 1048576))]
    fn flatten(
        &self,
        py: Python<'_>,
        fd: i32,
        id: [u8; 16],
        regions: Vec<usize>,
        sections: Vec<(u32, Vec<u8>)>,
        codec: &str,
        page_block: usize,
        storage_block: usize,
    ) -> PyResult<(u64, u64)> {
        let (codec, sizes) = (blocks::codec(codec)?, blocks::sizes(page_block, storage_block)?);
        if regions.iter().sum::<usize>() != self.inner.nearest().page_map().len() {
            return Err(PyValueError::new_err("cannot flatten: the regions do not match the page map"));
        }
        let file = duplicate(fd).map_err(errors::kernel)?;
        let written = py.detach(|| {
            let mut writer = image::ImageWriter::new(file, id, sizes)?;
            let map = image::flatten(&self.inner, &mut writer, codec, sizes, &regions)?;
            for (kind, contents) in &sections {
                writer.section(*kind, contents)?;
            }
            let finished = writer.finish(regions.len(), &map)?;
            Ok((finished.digest, finished.len))
        });
        written.map_err(image_error)
    }
}

impl ImageChain {
    fn stored_pages(&self) -> StoredPages {
        let mut stored = self.stored.lock();
        stored.get_or_insert_with(|| Arc::new(image::stored_pages(self.inner.nearest()))).clone()
    }
}
