use std::sync::Arc;
use std::sync::atomic::Ordering;

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::image::Sizes;
use pageferry_engine::pages::PageSet as Pages;
use pageferry_engine::wire;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::detached::Detached;
use crate::errors;
use crate::mapping::Mapping;
use crate::options::Keywords;
use crate::pages::PageSet;
use crate::wire::{SendProgress, Stream, endpoint, endpoints, sending, timeout};

/// Size of a page block in bytes.
const PAGE_BLOCK: usize = 16 * SMALL_PAGE;
/// Maximum size of a storage block in bytes. It is small, because a block delays the replies that are sent after it.
const STORAGE_BLOCK: usize = 4 * PAGE_BLOCK;

#[pyclass(frozen, module = "pageferry._engine")]
pub struct PageServer {
    inner: Detached<wire::PageServer>,
}

#[pymethods]
impl PageServer {
    #[new]
    #[pyo3(signature = (regions, missing, urgent, streams, **options))]
    fn new(
        py: Python<'_>,
        regions: Vec<PyRef<'_, Mapping>>,
        missing: Vec<PyRef<'_, PageSet>>,
        urgent: Stream<'_>,
        streams: Vec<Stream<'_>>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let sizes = Sizes { page_block: PAGE_BLOCK, storage_block: STORAGE_BLOCK };
        let (format, timeout) = sending(&Keywords::new(py, options)?, sizes)?;
        let regions = regions.iter().map(|mapping| mapping.inner.clone()).collect();
        let missing: Vec<Pages> = missing.iter().map(|set| set.inner.clone()).collect();
        let (urgent, streams) = (endpoint(urgent)?, endpoints(streams)?);
        let inner = py.detach(|| wire::PageServer::new(regions, &missing, urgent, streams, format, timeout));
        Ok(Self { inner: inner.map_err(errors::argument)?.into() })
    }

    fn start(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.start()).map_err(errors::kernel)
    }

    fn push(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.push()).map_err(errors::wire)
    }

    fn cancel(&self) {
        self.inner.cancel();
    }

    #[getter]
    fn progress(&self) -> SendProgress {
        self.inner.progress().into()
    }

    #[getter]
    fn uncompressed(&self) -> u64 {
        self.inner.progress().uncompressed.load(Ordering::Relaxed)
    }

    #[getter]
    fn requests(&self) -> u64 {
        self.inner.requests()
    }

    #[getter]
    fn remaining(&self) -> usize {
        self.inner.remaining()
    }

    #[getter]
    fn lost(&self) -> Option<String> {
        self.inner.lost()
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct PeerSource {
    pub inner: Arc<wire::PeerSource>,
}

#[pymethods]
impl PeerSource {
    #[new]
    #[pyo3(signature = (urgent, streams, timeout = 30.0))]
    fn new(urgent: Stream<'_>, streams: Vec<Stream<'_>>, timeout: f64) -> PyResult<Self> {
        let (urgent, streams) = (endpoint(urgent)?, endpoints(streams)?);
        let inner = wire::PeerSource::new(urgent, streams, self::timeout(timeout)?).map_err(errors::argument)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn lost(&self) -> Option<String> {
        self.inner.lost()
    }

    #[getter]
    fn ended(&self) -> bool {
        self.inner.has_ended()
    }

    #[getter]
    fn requests(&self) -> u64 {
        self.inner.requests()
    }

    #[getter]
    fn progress(&self) -> SendProgress {
        self.inner.progress().into()
    }
}
