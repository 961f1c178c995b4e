use parking_lot::{Mutex, MutexGuard};

use pageferry_engine::wire::tls;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::TlsError;

fn refused(error: tls::TlsError) -> PyErr {
    let message = error.to_string();
    match error {
        tls::TlsError::Identity(_) => PyValueError::new_err(message),
        _ => TlsError::new_err(message),
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct TlsIdentity {
    inner: tls::Identity,
}

#[pymethods]
impl TlsIdentity {
    #[new]
    fn new(py: Python<'_>, certificates: &[u8], key: &[u8]) -> PyResult<Self> {
        Ok(Self { inner: py.detach(|| tls::Identity::new(certificates, key)).map_err(refused)? })
    }

    fn connect(&self, py: Python<'_>, expected: Vec<u8>) -> PyResult<TlsSession> {
        TlsSession::new(py.detach(|| self.inner.connect(expected)))
    }

    fn accept(&self, py: Python<'_>, accepted: Vec<Vec<u8>>) -> PyResult<TlsSession> {
        TlsSession::new(py.detach(|| self.inner.accept(accepted)))
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct TlsSession {
    /// `None` after a stream has taken over the session.
    inner: Mutex<Option<tls::Session>>,
}

impl TlsSession {
    fn new(made: Result<tls::Session, tls::TlsError>) -> PyResult<Self> {
        Ok(Self { inner: Mutex::new(Some(made.map_err(refused)?)) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<tls::Session>> {
        self.inner.lock()
    }

    /// Runs `work` without the GIL: a handshake takes up to several milliseconds.
    fn with<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut tls::Session) -> T + Send) -> PyResult<T> {
        py.detach(|| self.lock().as_mut().map(work)).ok_or_else(taken)
    }

    /// Takes the session for a stream.
    pub fn take(&self) -> PyResult<tls::Session> {
        self.lock().take().ok_or_else(taken)
    }
}

fn taken() -> PyErr {
    PyValueError::new_err("cannot use the TLS session: a stream has taken it over")
}

#[pymethods]
impl TlsSession {
    fn feed(&self, py: Python<'_>, received: &[u8]) -> PyResult<()> {
        self.with(py, |session| session.feed(received))?.map_err(refused)
    }

    fn outgoing<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.with(py, tls::Session::outgoing)?))
    }

    #[getter]
    fn established(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |session| session.established())
    }

    #[getter]
    fn peer_certificate<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let shown = self.with(py, |session| session.peer_certificate().map(<[u8]>::to_vec))?;
        Ok(shown.map(|shown| PyBytes::new(py, &shown)))
    }

    fn write(&self, py: Python<'_>, data: &[u8]) -> PyResult<()> {
        self.with(py, |session| session.write(data))?.map_err(refused)
    }

    fn read<'py>(&self, py: Python<'py>, count: usize) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let read = self.with(py, |session| session.read(count))?;
        Ok(read.map(|read| PyBytes::new(py, &read)))
    }
}
