use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use pageferry_ledger::{self as ledger, LedgerError, Options};
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors;
use crate::mapping::Mapping;
use crate::options::Keywords;

/// Interval at which a long call checks for signals.
const SLICE: Duration = Duration::from_millis(50);

fn raised(error: LedgerError) -> PyErr {
    match error {
        LedgerError::BadOption(_)
        | LedgerError::TooSmall { .. }
        | LedgerError::NoLedger(_)
        | LedgerError::NoSuchPartition { .. } => PyValueError::new_err(error.to_string()),
        LedgerError::WrongState(_) | LedgerError::ThreadDied => PyRuntimeError::new_err(error.to_string()),
        LedgerError::Interrupted => PyKeyboardInterrupt::new_err(()),
        LedgerError::Kernel(error) => errors::kernel(error),
    }
}

/// Runs `work` in a thread, and checks for signals until `work` returns. If a signal handler raises an exception, sets
/// the flag passed to `work`, and returns the exception after `work` has returned.
fn interruptible<T: Send>(
    py: Python<'_>,
    work: impl FnOnce(&AtomicBool) -> Result<T, LedgerError> + Send,
) -> PyResult<T> {
    let cancel = AtomicBool::new(false);
    py.detach(|| {
        thread::scope(|scope| {
            let (done, finished) = mpsc::channel();
            let flag = &cancel;
            scope.spawn(move || drop(done.send(work(flag))));
            let mut signal = Ok(());
            loop {
                match finished.recv_timeout(SLICE) {
                    Ok(result) => return signal.and_then(|()| result.map_err(raised)),
                    Err(RecvTimeoutError::Disconnected) => return Err(raised(LedgerError::ThreadDied)),
                    Err(RecvTimeoutError::Timeout) if signal.is_ok() => {
                        signal = Python::attach(|py| py.check_signals());
                        cancel.store(signal.is_err(), Ordering::Relaxed);
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                }
            }
        })
    })
}

/// Takes the keyword arguments of a new ledger.
fn options(keywords: &Keywords<'_>) -> PyResult<Options> {
    let options = Options {
        threads: keywords.take("threads", 1)?,
        seed: keywords.take("seed", 1)?,
        rate: keywords.take("rate", None)?,
        working_set: keywords.take("working_set", 1.0)?,
        scatter: keywords.take("scatter", false)?,
        skew: keywords.take("skew", 1.0)?,
        zero_fraction: keywords.take("zero_fraction", 0.0)?,
        fill: keywords.take("fill", 1.0)?,
        compressible: keywords.take("compressible", 0.0)?,
    };
    keywords.finish().map(|()| options)
}

fn default_threads(threads: usize) -> usize {
    if threads > 0 { threads } else { thread::available_parallelism().map_or(1, usize::from) }
}

#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct LedgerReport {
    pages: usize,
    checked: usize,
    zeros: usize,
    lost: usize,
    stale: usize,
    misplaced: usize,
    torn: usize,
    first_bad: Option<usize>,
    overwritten: u64,
    versions: u64,
    writes: u64,
    disagreeing: usize,
    header: bool,
    intact: bool,
}

impl From<ledger::Report> for LedgerReport {
    fn from(report: ledger::Report) -> Self {
        Self {
            intact: report.intact(),
            pages: report.pages,
            checked: report.checked,
            zeros: report.zeros,
            lost: report.lost,
            stale: report.stale,
            misplaced: report.misplaced,
            torn: report.torn,
            first_bad: report.first_bad,
            overwritten: report.overwritten,
            versions: report.versions,
            writes: report.writes,
            disagreeing: report.disagreeing,
            header: report.header,
        }
    }
}

/// Longest duration of an operation in nanoseconds, and histogram of the durations.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct Stalls {
    longest: u64,
    histogram: Vec<u64>,
}

#[pymethods]
impl Stalls {
    #[new]
    fn new(longest: u64, histogram: Vec<u64>) -> Self {
        Self { longest, histogram }
    }
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Ledger {
    inner: ledger::Ledger,
}

impl Drop for Ledger {
    /// Joins the threads without the GIL: a thread may wait for a page that Python must load.
    fn drop(&mut self) {
        Python::try_attach(|py| py.detach(|| self.inner.stop()));
    }
}

#[pymethods]
impl Ledger {
    #[staticmethod]
    #[pyo3(signature = (mapping, *, large_fraction = None, **options))]
    fn create(
        py: Python<'_>,
        mapping: &Bound<'_, Mapping>,
        large_fraction: Option<f64>,
        options: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let options = self::options(&Keywords::new(py, options)?)?;
        let mapping = mapping.get().inner.clone();
        let work = |cancel: &AtomicBool| ledger::Ledger::create(mapping, &options, large_fraction, cancel);
        Ok(Self { inner: interruptible(py, work)? })
    }

    #[staticmethod]
    #[pyo3(signature = (mapping, *, first_thread = 0, threads = None))]
    fn attach(
        py: Python<'_>,
        mapping: &Bound<'_, Mapping>,
        first_thread: usize,
        threads: Option<usize>,
    ) -> PyResult<Self> {
        let mapping = mapping.get().inner.clone();
        // Release the GIL: the pages that are read may be deferred.
        let inner = py.detach(|| ledger::Ledger::attach(mapping, first_thread, threads)).map_err(raised)?;
        Ok(Self { inner })
    }

    #[getter]
    fn options<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let options = self.inner.options();
        let dict = PyDict::new(py);
        dict.set_item("threads", options.threads)?;
        dict.set_item("seed", options.seed)?;
        dict.set_item("rate", options.rate)?;
        dict.set_item("working_set", options.working_set)?;
        dict.set_item("scatter", options.scatter)?;
        dict.set_item("skew", options.skew)?;
        dict.set_item("zero_fraction", options.zero_fraction)?;
        dict.set_item("fill", options.fill)?;
        dict.set_item("compressible", options.compressible)?;
        Ok(dict)
    }

    #[getter]
    fn pages(&self) -> usize {
        self.inner.pages()
    }

    #[getter]
    fn filled(&self) -> usize {
        self.inner.filled()
    }

    #[getter]
    fn state(&self, py: Python<'_>) -> String {
        // Release the GIL: a concurrent `stop` holds the lock while it waits for threads, which may wait for a page.
        py.detach(|| self.inner.state()).to_string()
    }

    #[getter]
    fn tids(&self, py: Python<'_>) -> Vec<i32> {
        py.detach(|| self.inner.tids())
    }

    #[pyo3(signature = (*, paused = false))]
    fn start(&self, py: Python<'_>, paused: bool) -> PyResult<()> {
        py.detach(|| self.inner.start(paused)).map_err(raised)
    }

    fn pause(&self, py: Python<'_>) -> PyResult<()> {
        while !py.detach(|| self.inner.pause(SLICE)).map_err(raised)? {
            if let Err(signal) = py.check_signals() {
                py.detach(|| self.inner.resume()).map_err(raised)?;
                return Err(signal);
            }
        }
        Ok(())
    }

    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.resume()).map_err(raised)
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.inner.stop());
    }

    #[pyo3(signature = (*, threads = 0))]
    fn verify(&self, py: Python<'_>, threads: usize) -> PyResult<LedgerReport> {
        interruptible(py, |cancel| self.inner.verify(default_threads(threads), cancel)).map(LedgerReport::from)
    }

    #[pyo3(signature = (*, threads = 0))]
    fn digest(&self, py: Python<'_>, threads: usize) -> PyResult<u64> {
        interruptible(py, |cancel| self.inner.digest(default_threads(threads), cancel))
    }

    fn fingerprint(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.inner.fingerprint())
    }

    fn table_agrees(&self, py: Python<'_>) -> bool {
        py.detach(|| self.inner.table_agrees())
    }

    fn writes(&self, py: Python<'_>) -> Vec<u64> {
        py.detach(|| self.inner.writes())
    }

    #[pyo3(signature = (*, reset = false))]
    fn stalls(&self, reset: bool) -> Stalls {
        let stalls = self.inner.stalls(reset);
        Stalls { longest: stalls.longest, histogram: stalls.histogram.to_vec() }
    }

    fn page_offset(&self, number: usize) -> PyResult<usize> {
        let pages = self.inner.pages();
        let missing = || PyValueError::new_err(format!("invalid body page {number}: the ledger has {pages} pages"));
        self.inner.page_offset(number).ok_or_else(missing)
    }
}
