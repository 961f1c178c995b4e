use std::time::Duration;

use pageferry_engine::sharing;
use pageferry_engine::sharing::{Piece, Source};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::errors;
use crate::mapping::Mapping;
use crate::space::Space;

/// A piece as Python gives it: (number of the workload, mapping or space, position, length).
type PieceTuple<'py> = (u32, Bound<'py, PyAny>, u64, u64);
/// A unit as Python gets it: (piece, position, length, large, present, shared already, [zero, pattern, inside, across]).
type UnitTuple = (u32, u64, usize, bool, u32, u32, [u32; sharing::Class::COUNT]);

fn piece((workload, source, start, len): PieceTuple<'_>) -> PyResult<Piece> {
    let source = if let Ok(mapping) = source.cast::<Mapping>() {
        Source::File(mapping.get().inner.clone())
    } else if let Ok(space) = source.cast::<Space>() {
        Source::Process(space.get().inner.clone())
    } else {
        return Err(PyTypeError::new_err("a piece is of a Mapping or of a Space"));
    };
    Ok(Piece { workload, source, start, len })
}

#[pyclass(module = "pageferry._engine")]
pub struct SharingScan {
    inner: sharing::Scan,
}

#[pymethods]
impl SharingScan {
    #[new]
    #[pyo3(signature = (pieces, most_pages, every = 1))]
    fn new(py: Python<'_>, pieces: Vec<PieceTuple<'_>>, most_pages: usize, every: usize) -> PyResult<Self> {
        let pieces = pieces.into_iter().map(piece).collect::<PyResult<Vec<_>>>()?;
        let mut inner = py.detach(|| sharing::Scan::new(pieces, most_pages)).map_err(errors::kernel)?;
        inner.thin_out(every);
        Ok(Self { inner })
    }

    #[getter]
    fn remaining(&self) -> u64 {
        self.inner.remaining()
    }

    #[getter]
    fn scale(&self) -> u64 {
        self.inner.scale()
    }

    fn step(&mut self, py: Python<'_>, bytes: u64, threads: usize) -> PyResult<u64> {
        py.detach(|| self.inner.step(bytes, threads)).map_err(errors::kernel)
    }

    fn finish(&mut self, py: Python<'_>) {
        py.detach(|| self.inner.finish());
    }

    fn units(&self) -> Vec<UnitTuple> {
        let tuple = |unit: &sharing::Unit| {
            let length = unit.span.pages * pageferry_engine::SMALL_PAGE;
            (unit.piece, unit.span.start, length, unit.large, unit.present, unit.shared, unit.counts)
        };
        self.inner.units().iter().map(tuple).collect()
    }

    #[getter]
    fn totals(&self) -> ([u64; sharing::Class::COUNT], [u64; sharing::Class::COUNT]) {
        let totals = self.inner.totals();
        (totals.pages, totals.freed)
    }

    #[pyo3(signature = (order, pages_per_copy = 256, possible = false))]
    fn curve(&self, py: Python<'_>, order: Vec<u32>, pages_per_copy: u32, possible: bool) -> PyResult<Vec<u64>> {
        py.detach(|| self.inner.curve(&order, pages_per_copy, possible)).map_err(errors::kernel)
    }
}

#[pyfunction]
pub fn free_zeros(
    py: Python<'_>,
    mapping: &Bound<'_, Mapping>,
    ranges: Vec<(usize, usize)>,
    seconds: f64,
) -> PyResult<(usize, usize)> {
    let mapping = mapping.get().inner.clone();
    let budget = Duration::from_secs_f64(seconds.clamp(0.0, 3600.0));
    py.detach(|| sharing::holes::free_zeros(&mapping, &ranges, budget)).map_err(errors::kernel)
}
