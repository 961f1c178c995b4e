//! Keyword arguments that form an options structure.

use pyo3::conversion::FromPyObjectOwned;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Keyword arguments that have not been taken yet.
pub struct Keywords<'py>(Bound<'py, PyDict>);

impl<'py> Keywords<'py> {
    pub fn new(py: Python<'py>, given: Option<&Bound<'py, PyDict>>) -> PyResult<Self> {
        given.map_or_else(|| Ok(PyDict::new(py)), PyDictMethods::copy).map(Self)
    }

    /// Removes an argument and returns its value; returns `default` if the argument was not given.
    pub fn take<T: FromPyObjectOwned<'py>>(&self, name: &str, default: T) -> PyResult<T> {
        let Some(value) = self.0.get_item(name)? else { return Ok(default) };
        self.0.del_item(name)?;
        value.extract().map_err(Into::into)
    }

    /// Fails with a TypeError if an argument has not been taken.
    pub fn finish(&self) -> PyResult<()> {
        match self.0.keys().iter().next() {
            Some(name) => Err(PyTypeError::new_err(format!("unexpected keyword argument {name}"))),
            None => Ok(()),
        }
    }
}
