use std::os::fd::AsRawFd;
use std::sync::Arc;

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::image::{self, ImageError, PageReader};
use pageferry_engine::mapping::duplicate;
use parking_lot::Mutex;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::detached::Detached;
use crate::{blocks, errors};

pub fn image_error(error: ImageError) -> PyErr {
    let message = error.to_string();
    match error {
        ImageError::Io(error) if error.raw_os_error().is_some() => PyOSError::new_err((error.raw_os_error(), message)),
        _ => PyValueError::new_err(message),
    }
}

/// Stored pages, as (page map entry, index of the page), in the order of their storage blocks.
type StoredPages = Arc<Vec<(image::PageEntry, usize)>>;
/// Damage found by a verification.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct Finding {
    page: Option<usize>,
    message: String,
}

impl From<image::Finding> for Finding {
    fn from(finding: image::Finding) -> Self {
        Self { page: finding.page, message: finding.message }
    }
}

/// Digest of a complete image file, and its length in bytes.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct WrittenImage {
    digest: u64,
    length: u64,
}

impl From<image::Finished> for WrittenImage {
    fn from(finished: image::Finished) -> Self {
        Self { digest: finished.digest, length: finished.len }
    }
}

/// Numbers of pages by class.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct PageCounts {
    absent: usize,
    zero: usize,
    pattern: usize,
    same_as: usize,
    data: usize,
    in_parent: usize,
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Image {
    pub inner: Detached<Arc<image::Image>>,
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
        Ok(Self { inner: Arc::new(inner).into() })
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
    fn block_count(&self) -> usize {
        self.inner.blocks().len()
    }

    #[getter]
    fn blocks(&self) -> Vec<(u64, u32)> {
        self.inner.blocks().iter().map(|entry| (entry.offset.get(), entry.len.get())).collect()
    }

    fn section<'py>(&self, py: Python<'py>, kind: u32) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let contents = py.detach(|| self.inner.section(kind)).map_err(image_error)?;
        Ok(contents.map(|contents| PyBytes::new(py, &contents)))
    }

    fn classes<'py>(&self, py: Python<'py>, first: usize, count: usize) -> PyResult<Bound<'py, PyBytes>> {
        let entries = self.entries(first, count)?;
        let classes: Vec<u8> = py.detach(|| entries.iter().map(|entry| entry.class).collect());
        Ok(PyBytes::new(py, &classes))
    }

    fn count(&self, py: Python<'_>, first: usize, count: usize) -> PyResult<PageCounts> {
        let entries = self.entries(first, count)?;
        let [absent, zero, pattern, same_as, data, in_parent] = py.detach(|| {
            let mut counts = [0; 6];
            for entry in entries {
                let place = if entry.in_parent() { 5 } else { usize::from(entry.class).min(4) };
                counts[place] += 1;
            }
            counts
        });
        Ok(PageCounts { absent, zero, pattern, same_as, data, in_parent })
    }
}

impl Image {
    fn entries(&self, first: usize, count: usize) -> PyResult<&[image::PageEntry]> {
        let end = first.saturating_add(count);
        self.inner.page_map().get(first..end).ok_or_else(|| PyValueError::new_err(self.no_such_pages(first, end)))
    }

    fn no_such_pages(&self, first: usize, end: usize) -> String {
        format!("invalid pages {first} to {end}: the image has {} pages", self.pages())
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct ImageChain {
    pub inner: Detached<image::Chain>,
    /// Pages to verify, in the order of their storage blocks; created on first use.
    stored: Detached<Mutex<Option<StoredPages>>>,
}

#[pymethods]
impl ImageChain {
    #[new]
    fn new(images: Vec<PyRef<'_, Image>>) -> PyResult<Self> {
        let images = images.iter().map(|image| image.inner.clone()).collect();
        let inner = image::Chain::new(images).map_err(image_error)?.into();
        Ok(Self { inner, stored: Mutex::new(None).into() })
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

    /// Fetches storage blocks that the files of image `first` and its ancestors do not contain from the provider at the other end of a socket.
    fn supply_from(&self, py: Python<'_>, socket: i32, first: usize) -> PyResult<()> {
        let socket = duplicate(socket).map_err(errors::kernel)?;
        py.detach(|| image::Supply::attach(&self.inner, first, socket)).map(drop).map_err(errors::kernel)
    }

    /// Returns those pages of a range whose contents differ between two chains, as runs (start, end).
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

    fn verify(&self, py: Python<'_>, first: usize, count: usize, limit: usize) -> Vec<Finding> {
        let findings = py.detach(|| {
            let stored = self.stored_pages();
            let part = &stored[first.min(stored.len())..first.saturating_add(count).min(stored.len())];
            image::verify(&self.inner, part, limit)
        });
        findings.into_iter().map(Finding::from).collect()
    }

    fn verify_unused(&self, py: Python<'_>) -> Vec<Finding> {
        let findings = py.detach(|| image::verify_unused(self.inner.nearest(), &self.stored_pages()));
        findings.into_iter().map(Finding::from).collect()
    }

    /// Writes the contents of the chain as one image. `sections` are pairs of kind and contents.
    #[expect(clippy::too_many_arguments, reason = "five arguments in Python, besides the interpreter token")]
    #[pyo3(signature = (fd, id, regions, sections, **format))]
    fn flatten(
        &self,
        py: Python<'_>,
        fd: i32,
        id: [u8; 16],
        regions: Vec<usize>,
        sections: Vec<(u32, Vec<u8>)>,
        format: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<WrittenImage> {
        let (codec, sizes) = blocks::only_image_format(py, format)?;
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
            Ok(writer.finish(regions.len(), &map)?.into())
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
