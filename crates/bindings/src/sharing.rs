use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use pageferry_engine::pager::Flags;
use pageferry_engine::sharing;
use pageferry_engine::sharing::{Deferred, Piece, ScannedMemory, SharedFile};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::detached::Detached;
use crate::errors;
use crate::image::Image;
use crate::mapping::Mapping;
use crate::pager::open_flags;
use crate::space::Space;

/// Piece: index of the workload, mapping or address space, position and length in bytes.
type PieceTuple<'py> = (u32, Bound<'py, PyAny>, u64, u64);
/// Deferred contents of a piece: bitmap, first page of the region in the bitmap, and for each unit whether it will be a
/// huge page.
type DeferredTuple<'py> = (PyRef<'py, PagerFlags>, usize, Vec<bool>);

/// Numbers of duplicate pages by class.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
#[derive(Clone)]
pub struct ClassCounts {
    zero: u64,
    pattern: u64,
    inside: u64,
    across: u64,
}

impl<T: Into<u64>> From<[T; sharing::Class::COUNT]> for ClassCounts {
    fn from([zero, pattern, inside, across]: [T; sharing::Class::COUNT]) -> Self {
        Self { zero: zero.into(), pattern: pattern.into(), inside: inside.into(), across: across.into() }
    }
}

/// Scanned 2 MiB unit.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct ScannedUnit {
    piece: u32,
    position: u64,
    length: usize,
    large: bool,
    present: u32,
    deferred: u32,
    shared: u32,
    counts: ClassCounts,
}

/// Numbers of duplicate pages in all units, and of pages that sharing would free, by class.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct SharingTotals {
    pages: ClassCounts,
    freed: ClassCounts,
}

/// Result of `free_zeros`.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct FreedZeros {
    ranges: usize,
    pages: usize,
}

/// Deferred bitmap of a pager (S8), for scans of memory whose contents are deferred.
#[pyclass(frozen, module = "pageferry._engine")]
pub struct PagerFlags {
    flags: Arc<Flags>,
    image: Option<Arc<pageferry_engine::image::Image>>,
}

#[pymethods]
impl PagerFlags {
    #[new]
    #[pyo3(signature = (fd, pages, image = None))]
    fn new(fd: i32, pages: usize, image: Option<PyRef<'_, Image>>) -> PyResult<Self> {
        let image = image.map(|image| image.inner.clone());
        if image.as_ref().is_some_and(|image| image.page_map().len() != pages) {
            return Err(PyValueError::new_err(format!("invalid image: expected {pages} pages")));
        }
        let flags = open_flags(fd, pages).map_err(errors::argument)?;
        Ok(Self { flags: Arc::new(flags), image })
    }
}

impl PagerFlags {
    /// Returns the bitmap if it covers `pages` pages from page `base` on. Fails with a ValueError otherwise.
    fn within(&self, base: usize, pages: usize) -> PyResult<Arc<Flags>> {
        let fits = base.checked_add(pages).is_some_and(|end| end <= self.flags.pages());
        let all = self.flags.pages();
        let outside = || {
            let message = format!("invalid range of {pages} pages from page {base} on: the bitmap has {all} pages");
            PyValueError::new_err(message)
        };
        fits.then(|| self.flags.clone()).ok_or_else(outside)
    }
}

fn piece((workload, source, start, len): PieceTuple<'_>, deferred: Option<DeferredTuple<'_>>) -> PyResult<Piece> {
    let source = if let Ok(mapping) = source.cast::<Mapping>() {
        let mapping = mapping.get().inner.clone();
        let deferred = deferred.map(|(of, base, large)| {
            let flags = of.within(base, mapping.pages())?;
            Ok::<_, PyErr>(Deferred { flags, base, image: of.image.clone(), large })
        });
        ScannedMemory::File(Arc::new(SharedFile { mapping, deferred: deferred.transpose()? }))
    } else if let Ok(space) = source.cast::<Space>() {
        ScannedMemory::Process(space.get().inner.clone())
    } else {
        return Err(PyTypeError::new_err("invalid piece: expected a Mapping or a Space"));
    };
    Ok(Piece { workload, source, start, len })
}

#[pyclass(module = "pageferry._engine")]
pub struct SharingScan {
    inner: Detached<sharing::Scan>,
}

#[pymethods]
impl SharingScan {
    #[new]
    #[pyo3(signature = (pieces, most_pages, every = 1, deferred = None))]
    fn new(
        py: Python<'_>,
        pieces: Vec<PieceTuple<'_>>,
        most_pages: usize,
        every: usize,
        deferred: Option<HashMap<usize, DeferredTuple<'_>>>,
    ) -> PyResult<Self> {
        let mut deferred = deferred.unwrap_or_default();
        let pieces = (0..).zip(pieces).map(|(number, one)| piece(one, deferred.remove(&number)));
        let pieces = pieces.collect::<PyResult<Vec<_>>>()?;
        let mut inner = py.detach(|| sharing::Scan::new(pieces, most_pages)).map_err(errors::kernel)?;
        inner.thin_out(every);
        Ok(Self { inner: inner.into() })
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

    fn units(&self) -> Vec<ScannedUnit> {
        let named = |unit: &sharing::Unit| ScannedUnit {
            piece: unit.piece,
            position: unit.span.start,
            length: unit.span.pages * pageferry_engine::SMALL_PAGE,
            large: unit.large,
            present: unit.present,
            deferred: unit.deferred,
            shared: unit.shared,
            counts: unit.counts.into(),
        };
        self.inner.units().iter().map(named).collect()
    }

    #[getter]
    fn totals(&self) -> SharingTotals {
        let totals = self.inner.totals();
        SharingTotals { pages: totals.pages.into(), freed: totals.freed.into() }
    }

    #[pyo3(signature = (order, pages_per_copy = 256, *, possible = false))]
    fn curve(&self, py: Python<'_>, order: Vec<u32>, pages_per_copy: u32, possible: bool) -> PyResult<Vec<u64>> {
        py.detach(|| self.inner.curve(&order, pages_per_copy, possible)).map_err(errors::kernel)
    }
}

#[pyfunction]
#[pyo3(signature = (mapping, ranges, seconds, waiting = None))]
pub fn free_zeros(
    py: Python<'_>,
    mapping: &Bound<'_, Mapping>,
    ranges: Vec<(usize, usize)>,
    seconds: f64,
    waiting: Option<(PyRef<'_, PagerFlags>, usize)>,
) -> PyResult<FreedZeros> {
    let mapping = mapping.get().inner.clone();
    let waiting = waiting.map(|(of, base)| of.within(base, mapping.pages()).map(|flags| (flags, base))).transpose()?;
    let budget = Duration::try_from_secs_f64(seconds.clamp(0.0, 3600.0)).unwrap_or_default();
    py.detach(|| {
        let waiting = waiting.as_ref().map(|(flags, base)| (flags.as_ref(), *base));
        sharing::holes::free_zeros(&mapping, &ranges, budget, waiting)
    })
    .map(|(ranges, pages)| FreedZeros { ranges, pages })
    .map_err(errors::kernel)
}
