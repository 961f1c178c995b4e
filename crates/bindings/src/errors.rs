//! Conversion of engine errors to built-in exceptions of Python.

use std::io;

use pageferry_engine::placer::PlaceError;
use pageferry_engine::space::AdoptError;
use pageferry_engine::wire::WireError;
use pyo3::exceptions::{
    PyConnectionResetError, PyInterruptedError, PyOSError, PyPermissionError, PyProcessLookupError, PyTimeoutError,
    PyValueError,
};
use pyo3::prelude::*;

pyo3::create_exception!(
    pageferry._engine,
    TlsError,
    PyPermissionError,
    "Error of TLS: the identity of the peer was not accepted, or it has violated the protocol."
);

/// Converts an error to the subclass of OSError for its errno. PyO3 would lose the errno, and convert ENOMEM to
/// MemoryError. PyO3 converts errors without an errno.
pub fn kernel(error: io::Error) -> PyErr {
    let Some(number) = error.raw_os_error() else { return error.into() };
    let text = error.to_string();
    let text = text.strip_suffix(&format!(" (os error {number})")).unwrap_or(&text);
    PyOSError::new_err((number, text.to_owned()))
}

/// Converts an error of a call that validates its arguments: `InvalidInput` without an errno becomes a ValueError, any
/// other error is converted by [`kernel`].
pub fn argument(error: io::Error) -> PyErr {
    if error.kind() == io::ErrorKind::InvalidInput && error.raw_os_error().is_none() {
        return PyValueError::new_err(error.to_string());
    }
    kernel(error)
}

pub fn adopt(error: AdoptError) -> PyErr {
    let message = error.to_string();
    match error {
        AdoptError::Io(error) | AdoptError::Call(error) | AdoptError::Registered(.., error)
            if error.raw_os_error().is_some() =>
        {
            PyOSError::new_err((error.raw_os_error(), message))
        }
        AdoptError::NotPermitted(_)
        | AdoptError::Traced(..)
        | AdoptError::Seccomp(_)
        | AdoptError::NoFaults(..)
        | AdoptError::Code32(..)
        | AdoptError::Sequence(..) => PyPermissionError::new_err(message),
        AdoptError::Gone(_) => PyProcessLookupError::new_err(message),
        _ => PyOSError::new_err(message),
    }
}

pub fn wire(error: WireError) -> PyErr {
    let message = error.to_string();
    match error {
        WireError::Cancelled => PyInterruptedError::new_err(message),
        WireError::Closed => PyConnectionResetError::new_err(message),
        WireError::Stalled(_) => PyTimeoutError::new_err(message),
        WireError::Io(error) => kernel(error),
        WireError::Place(error) => place(error),
        WireError::Tls(_) => TlsError::new_err(message),
        WireError::Block(_) | WireError::Order(_) => PyValueError::new_err(message),
    }
}

pub fn place(error: PlaceError) -> PyErr {
    let message = error.to_string();
    match error {
        PlaceError::Memory { error, .. } => PyOSError::new_err((error.raw_os_error(), message)),
        _ => PyValueError::new_err(message),
    }
}

/// Returns the ID of this process.
pub fn own_pid() -> io::Result<i32> {
    i32::try_from(std::process::id()).map_err(io::Error::other)
}
