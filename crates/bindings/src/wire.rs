use std::sync::atomic::Ordering;
use std::time::Duration;

use pageferry_engine::image::Sizes;
use pageferry_engine::mapping::duplicate;
use pageferry_engine::pages::PageSet as Pages;
use pageferry_engine::wire;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::detached::Detached;
use crate::options::Keywords;
use crate::pages::PageSet;
use crate::placer::Placer;
use crate::saver::Contents;
use crate::tls::TlsSession;
use crate::{blocks, errors};

pub fn timeout(seconds: f64) -> PyResult<Duration> {
    let wrong = |_| PyValueError::new_err(format!("invalid timeout of {seconds} seconds: expected at least 0"));
    Duration::try_from_secs_f64(seconds).map_err(wrong)
}

/// Descriptor of a socket, optionally with the TLS session established on it.
#[derive(FromPyObject)]
pub enum Stream<'py> {
    Plain(i32),
    Secure(i32, PyRef<'py, TlsSession>),
}

pub fn endpoint(stream: Stream<'_>) -> PyResult<wire::Endpoint> {
    let duplicate = |fd| duplicate(fd).map_err(errors::kernel);
    match stream {
        Stream::Plain(fd) => Ok(duplicate(fd)?.into()),
        Stream::Secure(fd, session) => Ok(wire::Endpoint { fd: duplicate(fd)?, session: Some(session.take()?) }),
    }
}

pub fn endpoints(streams: Vec<Stream<'_>>) -> PyResult<Vec<wire::Endpoint>> {
    streams.into_iter().map(endpoint).collect()
}

/// Takes the format and the timeout of a sender of pages from keyword arguments. Rejects all other arguments.
pub fn sending(keywords: &Keywords<'_>, sizes: Sizes) -> PyResult<(wire::Format, Duration)> {
    let Sizes { page_block, storage_block } = sizes;
    let format = wire::Format {
        codec: blocks::codec(&keywords.take("codec", "none".to_owned())?)?,
        adaptive: keywords.take("adaptive", false)?,
        bandwidth: keywords.take("bandwidth", 0)?,
        page_block,
        storage_block,
    };
    let timeout = timeout(keywords.take("timeout", 30.0)?)?;
    keywords.finish().map(|()| (format, timeout))
}

/// Counters of sent or received pages.
#[pyclass(eq, hash, frozen, get_all, module = "pageferry._engine")]
#[derive(Debug, Default, PartialEq, Eq, Hash)]
pub struct SendProgress {
    bytes: u64,
    blocks: u64,
    data: u64,
    zero: u64,
    absent: u64,
}

impl From<&wire::Progress> for SendProgress {
    fn from(progress: &wire::Progress) -> Self {
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        Self {
            bytes: load(&progress.bytes),
            blocks: load(&progress.blocks),
            data: load(&progress.data),
            zero: load(&progress.zero),
            absent: load(&progress.absent),
        }
    }
}

#[pymethods]
impl SendProgress {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    #[getter]
    fn pages(&self) -> u64 {
        self.data + self.zero + self.absent
    }

    fn __repr__(&self) -> String {
        format!("{self:?}")
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct BlockSender {
    inner: wire::BlockSender,
}

#[pymethods]
impl BlockSender {
    #[new]
    #[pyo3(signature = (sockets, **options))]
    fn new(py: Python<'_>, sockets: Vec<Stream<'_>>, options: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let keywords = Keywords::new(py, options)?;
        let (page_block, storage_block) =
            (keywords.take("page_block", 65_536)?, keywords.take("storage_block", 524_288)?);
        let (format, timeout) = sending(&keywords, blocks::sizes(page_block, storage_block)?)?;
        let sockets = endpoints(sockets)?;
        let inner = py.detach(|| wire::BlockSender::new(sockets, format, timeout));
        Ok(Self { inner: inner.map_err(errors::argument)? })
    }

    #[pyo3(signature = (regions, pages, round, *, barrier = true))]
    fn send(
        &self,
        py: Python<'_>,
        regions: Vec<Contents<'_>>,
        pages: Vec<PyRef<'_, PageSet>>,
        round: u32,
        barrier: bool,
    ) -> PyResult<()> {
        let sources: Vec<_> = regions.iter().map(Contents::source).collect();
        let fits = sources.len() == pages.len()
            && sources.iter().zip(&pages).all(|(source, set)| source.pages() == set.inner.pages());
        if !fits {
            let words = "pages do not match the regions: expected one set per region, with as many pages";
            return Err(PyValueError::new_err(words));
        }
        let sets: Vec<Pages> = pages.iter().map(|set| set.inner.clone()).collect();
        py.detach(|| self.inner.send(&sources, &sets, round, barrier)).map_err(errors::wire)
    }

    #[getter]
    fn progress(&self) -> SendProgress {
        self.inner.progress().into()
    }

    #[getter]
    fn uncompressed(&self) -> u64 {
        self.inner.progress().uncompressed.load(Ordering::Relaxed)
    }

    fn relay(&self, py: Python<'_>, local: i32, remote: Stream<'_>) -> PyResult<Relay> {
        let (local, remote) = (duplicate(local).map_err(errors::kernel)?, endpoint(remote)?);
        let relay = py.detach(|| self.inner.relay(local, remote));
        Ok(Relay { inner: relay.map_err(errors::kernel)?.into() })
    }

    fn cancel(&self) {
        self.inner.cancel();
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Relay {
    inner: Detached<wire::Relay>,
}

#[pymethods]
impl Relay {
    #[new]
    fn new(py: Python<'_>, local: i32, remote: Stream<'_>) -> PyResult<Self> {
        let (local, remote) = (duplicate(local).map_err(errors::kernel)?, endpoint(remote)?);
        let inner = py.detach(|| wire::Relay::new(local, remote));
        Ok(Self { inner: inner.map_err(errors::kernel)?.into() })
    }

    #[getter]
    fn sent(&self) -> u64 {
        self.inner.sent()
    }

    #[getter]
    fn received(&self) -> u64 {
        self.inner.received()
    }

    #[getter]
    fn ended(&self) -> bool {
        self.inner.has_ended()
    }

    #[getter]
    fn failure(&self) -> Option<String> {
        self.inner.failure()
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct BlockReceiver {
    inner: wire::BlockReceiver,
}

#[pymethods]
impl BlockReceiver {
    #[new]
    #[pyo3(signature = (sockets, placer, timeout = 30.0))]
    fn new(sockets: Vec<Stream<'_>>, placer: PyRef<'_, Placer>, timeout: f64) -> PyResult<Self> {
        let (endpoints, timeout) = (endpoints(sockets)?, self::timeout(timeout)?);
        let inner = wire::BlockReceiver::new(endpoints, placer.inner.clone(), timeout);
        Ok(Self { inner: inner.map_err(errors::argument)? })
    }

    fn receive(&self, py: Python<'_>, round: u32) -> PyResult<()> {
        py.detach(|| self.inner.receive(round)).map_err(errors::wire)
    }

    #[getter]
    fn progress(&self) -> SendProgress {
        self.inner.progress().into()
    }

    fn cancel(&self) {
        self.inner.cancel();
    }
}
