use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pageferry_engine::image::Sizes;
use pageferry_engine::mapping::duplicate;
use pageferry_engine::saver::{self, Handle, NewImage, Options, Overlay, PageOrigin, SaveError, SavedRegion, Traces};
use pageferry_engine::{LARGE_PAGE, SMALL_PAGE};
use parking_lot::Mutex;
use pyo3::exceptions::{
    PyInterruptedError, PyLookupError, PyOSError, PyProcessLookupError, PyRuntimeError, PyValueError,
};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::detached::Detached;
use crate::image::ImageChain;
use crate::mapping::Mapping;
use crate::options::Keywords;
use crate::space::{MappedSegment, Space, segments, userfaults};
use crate::{blocks, errors};

fn raised(error: SaveError) -> PyErr {
    let message = error.to_string();
    let with_number = |error: &io::Error| PyOSError::new_err((error.raw_os_error(), message.clone()));
    match &error {
        // Set the errno only for write errors: the errno of a memory error would be mistaken for an error of the image
        // file.
        SaveError::Write(error) if error.raw_os_error().is_some() => with_number(error),
        SaveError::Gone => PyProcessLookupError::new_err(message),
        SaveError::Untraceable(_) => PyLookupError::new_err(message),
        SaveError::Cancelled => PyInterruptedError::new_err(message),
        SaveError::Write(_) | SaveError::Memory(_) | SaveError::Discarded | SaveError::Thread => {
            PyOSError::new_err(message)
        }
        SaveError::Adopt(_) => match error {
            SaveError::Adopt(error) => errors::adopt(error),
            _ => PyOSError::new_err(message),
        },
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct ProcessRange {
    inner: PageOrigin,
}

#[pymethods]
impl ProcessRange {
    #[new]
    #[pyo3(signature = (space, address, length, *, private = false, base = None))]
    fn new(
        space: PyRef<'_, Space>,
        address: u64,
        length: usize,
        private: bool,
        base: Option<(i32, u64)>,
    ) -> PyResult<Self> {
        if length == 0 || !length.is_multiple_of(SMALL_PAGE) || !address.is_multiple_of(SMALL_PAGE as u64) {
            return Err(PyValueError::new_err(format!(
                "invalid range of {length} bytes at {address:#x}: expected whole pages, at least one"
            )));
        }
        let range = saver::ProcessRange { space: space.inner.clone(), address, len: length };
        let inner = match base {
            Some((file, offset)) => {
                let base = Arc::new(File::from(duplicate(file).map_err(errors::kernel)?));
                PageOrigin::Overlay(Overlay { base, offset, private: range })
            }
            None if private => PageOrigin::Private(range),
            None => PageOrigin::Process(range),
        };
        Ok(Self { inner })
    }

    fn data_ranges(&self, py: Python<'_>) -> PyResult<Vec<(usize, usize)>> {
        py.detach(|| self.inner.data_ranges()).map_err(errors::kernel)
    }

    fn overlay<'py>(&self, py: Python<'py>, start: usize, contents: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
        let whole = start.is_multiple_of(SMALL_PAGE) && contents.len().is_multiple_of(SMALL_PAGE);
        if !whole || start.checked_add(contents.len()).is_none_or(|end| end > self.inner.len()) {
            let words = format!("invalid range of {} bytes at {start}: expected whole pages", contents.len());
            return Err(PyValueError::new_err(words));
        }
        let mut bytes = contents.to_vec();
        py.detach(|| self.inner.overlay(start, &mut bytes)).map_err(errors::kernel)?;
        Ok(PyBytes::new(py, &bytes))
    }
}

/// Memory that can be saved or sent.
#[derive(FromPyObject)]
pub enum Contents<'py> {
    Mapping(PyRef<'py, Mapping>),
    Process(PyRef<'py, ProcessRange>),
}

impl Contents<'_> {
    pub fn source(&self) -> PageOrigin {
        match self {
            Self::Mapping(mapping) => PageOrigin::Shared(mapping.inner.clone()),
            Self::Process(range) => range.inner.clone(),
        }
    }
}

/// Keyword arguments of `Saver`.
struct SaverOptions<'py> {
    parent: Option<PyRef<'py, ImageChain>>,
    traces: Traces,
    engine: Options,
}

impl<'py> SaverOptions<'py> {
    fn take(keywords: &Keywords<'py>) -> PyResult<Self> {
        let (codec, Sizes { page_block, storage_block }) = blocks::image_format(keywords)?;
        let trap_block: usize = keywords.take("trap_block", 65_536)?;
        if !trap_block.is_power_of_two() || !(SMALL_PAGE..=LARGE_PAGE).contains(&trap_block) {
            return Err(PyValueError::new_err(format!(
                "invalid trap block of {trap_block} bytes: expected a power of two, 4 KiB to 2 MiB"
            )));
        }
        let engine = Options {
            codec,
            page_block,
            storage_block,
            trap_block,
            staging: keywords.take("staging", 16_777_216)?,
            bandwidth: keywords.take("bandwidth", 0)?,
            packers: keywords.take("packers", 1)?,
        };
        let (parent, traces) = (keywords.take("parent", None)?, traces(keywords.take("traces", None)?)?);
        keywords.finish().map(|()| Self { parent, traces, engine })
    }
}

fn traces(given: Option<(String, HashMap<i32, i32>)>) -> PyResult<Traces> {
    let Some((use_, descriptors)) = given else { return Ok(Traces::Without) };
    let known = userfaults(descriptors)?;
    match use_.as_str() {
        "leave" => Ok(Traces::Leave(known)),
        "take-up" => Ok(Traces::TakeUp(known)),
        "begin" => Ok(Traces::Begin(known)),
        "borrow" => Ok(Traces::Borrow(known)),
        "private" => Ok(Traces::Private(known)),
        _ => {
            let words = format!("invalid use of traces {use_:?}: expected leave, take-up, begin, borrow or private");
            Err(PyValueError::new_err(words))
        }
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Saver {
    inner: Detached<Mutex<saver::Saver>>,
    handle: Handle,
}

/// Digest of a written image, its length in bytes, and its numbers of write calls and storage blocks.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct SaveFinished {
    digest: u64,
    length: u64,
    writes: u64,
    blocks: usize,
}

/// Counters of a checkpoint; times in nanoseconds.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct SaveCounters {
    traps: u64,
    early_traps: u64,
    swept: u64,
    staging_waits: u64,
    longest_trap: u64,
    trap_time: u64,
    pages: u64,
    absent: u64,
    zero: u64,
    pattern: u64,
    same_as: u64,
    data: u64,
    in_parent: u64,
    stored: u64,
    blocks: u64,
    writes: u64,
    written: u64,
}

impl Saver {
    fn with<T>(&self, work: impl FnOnce(&mut saver::Saver) -> T) -> T {
        work(&mut self.inner.lock())
    }
}

#[pymethods]
impl Saver {
    #[new]
    #[pyo3(signature = (regions, segments, fd, id, **options))]
    fn new(
        py: Python<'_>,
        regions: Vec<(Contents<'_>, usize)>,
        segments: Vec<PyRef<'_, MappedSegment>>,
        fd: i32,
        id: [u8; 16],
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let SaverOptions { parent, traces, engine: options } = SaverOptions::take(&Keywords::new(py, options)?)?;
        let region =
            |(contents, page_size): (Contents<'_>, usize)| SavedRegion { source: contents.source(), page_size };
        let regions: Vec<_> = regions.into_iter().map(region).collect();
        let parent = parent.map(|parent| parent.inner.clone());
        let pages: usize = regions.iter().map(|region| region.source.pages()).sum();
        if parent.as_ref().is_some_and(|parent| parent.nearest().page_map().len() != pages) {
            return Err(PyValueError::new_err("invalid parent: expected an image with as many pages as the regions"));
        }
        let segments = self::segments(&segments);
        let image = NewImage { file: duplicate(fd).map_err(errors::kernel)?, id, parent };
        let inner = py.detach(|| saver::Saver::arm(regions, segments, image, traces, &options)).map_err(raised)?;
        Ok(Self { handle: inner.handle(), inner: Mutex::new(inner).into() })
    }

    #[getter]
    fn arm_seconds(&self, py: Python<'_>) -> f64 {
        py.detach(|| self.with(|saver| saver.arm_time().as_secs_f64()))
    }

    #[getter]
    fn leaves_traces(&self, py: Python<'_>) -> bool {
        py.detach(|| self.with(|saver| saver.leaves_traces()))
    }

    #[getter]
    fn pages(&self, py: Python<'_>) -> &'static str {
        match py.detach(|| self.with(|saver| saver.pages())) {
            saver::Pages::Swept => "swept",
            saver::Pages::InRounds { as_parent: true } => "written",
            saver::Pages::InRounds { as_parent: false } => "all",
        }
    }

    fn collect(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| self.with(saver::Saver::collect)).map_err(raised)
    }

    fn scan(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| self.with(saver::Saver::scan)).map_err(raised)
    }

    fn copy(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.with(saver::Saver::copy)).map_err(raised)
    }

    fn copy_range(&self, py: Python<'_>, region: usize, first: usize, count: usize) -> PyResult<()> {
        py.detach(|| self.with(|saver| saver.copy_range(region, first, count))).map_err(raised)
    }

    fn lost(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.with(saver::Saver::lost)).map_err(raised)
    }

    fn begin(&self, py: Python<'_>) -> PyResult<f64> {
        py.detach(|| self.with(saver::Saver::begin)).map(|time| time.as_secs_f64()).map_err(raised)
    }

    fn sweep(&self, py: Python<'_>) {
        py.detach(|| self.with(saver::Saver::sweep));
    }

    fn wait(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let time = Duration::try_from_secs_f64(seconds).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(py.detach(|| self.handle.wait(time)))
    }

    fn cancel(&self, py: Python<'_>) {
        py.detach(|| self.handle.cancel());
    }

    fn finish(&self, py: Python<'_>, sections: Vec<(u32, Vec<u8>)>) -> PyResult<SaveFinished> {
        let finished = py.detach(|| self.with(|saver| saver.finish(&sections))).map_err(raised)?;
        Ok(SaveFinished {
            digest: finished.digest,
            length: finished.len,
            writes: finished.writes,
            blocks: finished.blocks,
        })
    }

    #[getter]
    fn counters(&self) -> SaveCounters {
        let stats = self.handle.stats();
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let [absent, zero, pattern, same_as, data] = &stats.classes;
        SaveCounters {
            traps: load(&stats.traps),
            early_traps: load(&stats.early_traps),
            swept: load(&stats.swept),
            staging_waits: load(&stats.staging_waits),
            longest_trap: load(&stats.longest_trap),
            trap_time: load(&stats.trap_time),
            pages: load(&stats.pages),
            absent: load(absent),
            zero: load(zero),
            pattern: load(pattern),
            same_as: load(same_as),
            data: load(data),
            in_parent: load(&stats.in_parent),
            stored: load(&stats.stored),
            blocks: load(&stats.blocks),
            writes: load(&stats.writes),
            written: load(&stats.written),
        }
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            self.handle.cancel();
            self.with(saver::Saver::close)
        })
        .map_err(|error| PyRuntimeError::new_err(error.to_string()))
    }
}
