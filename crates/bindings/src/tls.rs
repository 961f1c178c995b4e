use parking_lot::{Mutex, MutexGuard};

use pageferry_engine::wire::tls;
use pyo3::exceptions::{PyPermissionError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

fn refused(error: tls::TlsError) -> PyErr {
    let message = error.to_string();
    match error {
        tls::TlsError::Identity(_) => PyValueError::new_err(message),
        _ => PyPermissionError::new_err(message),
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct TlsIdentity {
    inner: tls::Identity,
}

#[pymethods]
impl TlsIdentity {
    #[new]
    fn new(certificates: &[u8], key: &[u8]) -> PyResult<Self> {
        Ok(Self { inner: tls::Identity::new(certificates, key).map_err(refused)? })
    }

    fn connect(&self, expected: Vec<u8>) -> PyResult<TlsSession> {
        TlsSession::new(self.inner.connect(expected))
    }

    fn accept(&self, accepted: Vec<Vec<u8>>) -> PyResult<TlsSession> {
        TlsSession::new(self.inner.accept(accepted))
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

    fn with<T>(&self, work: impl FnOnce(&mut tls::Session) -> T) -> PyResult<T> {
        self.lock().as_mut().map(work).ok_or_else(taken)
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
    fn feed(&self, received: &[u8]) -> PyResult<()> {
        self.with(|session| session.feed(received))?.map_err(refused)
    }

    fn outgoing<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.with(tls::Session::outgoing)?))
    }

    #[getter]
    fn established(&self) -> PyResult<bool> {
        self.with(|session| session.established())
    }

    #[getter]
    fn peer_certificate<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.with(|session| session.peer_certificate().map(|shown| PyBytes::new(py, shown)))
    }

    fn write(&self, data: &[u8]) -> PyResult<()> {
        self.with(|session| session.write(data))?.map_err(refused)
    }

    fn read<'py>(&self, py: Python<'py>, count: usize) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.with(|session| session.read(count).map(|read| PyBytes::new(py, &read)))
    }
}
