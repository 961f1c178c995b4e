use std::collections::HashMap;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Arc;

use pageferry_engine::mapping::duplicate;
use pageferry_engine::pager::{FEATURES, TRACE_FEATURES};
use pageferry_engine::segment::Segment;
use pageferry_engine::space::{self, Faults};
use pageferry_engine::trace::{self, Userfaults};
use pageferry_engine::uapi::{FEATURE_EVENT_REMOVE, Userfault};
use pyo3::prelude::*;

use crate::errors;

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Space {
    pub inner: Arc<space::Space>,
}

#[pymethods]
impl Space {
    #[new]
    #[pyo3(signature = (pid = None))]
    fn new(pid: Option<i32>) -> PyResult<Self> {
        let pid = pid.map_or_else(errors::own_pid, Ok)?;
        let inner = space::Space::open(pid).map_err(errors::kernel)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn pid(&self) -> i32 {
        self.inner.pid()
    }

    #[pyo3(signature = (number, *arguments))]
    fn call(&self, py: Python<'_>, number: i64, arguments: Vec<u64>) -> PyResult<u64> {
        let mut six = [0; 6];
        six.iter_mut().zip(&arguments).for_each(|(to, from)| *to = *from);
        py.detach(|| self.inner.call(number, six)).map_err(errors::adopt)
    }

    #[pyo3(signature = (discards = false))]
    fn missing_faults(&self, py: Python<'_>, discards: bool) -> PyResult<(i32, Option<u64>)> {
        let features = FEATURES | if discards { FEATURE_EVENT_REMOVE } else { 0 };
        let (uffd, remote) =
            py.detach(|| self.inner.kept_userfault(features, TRACE_FEATURES, Faults::All)).map_err(errors::adopt)?;
        Ok((OwnedFd::from(uffd).into_raw_fd(), remote))
    }

    fn write_traces(&self, py: Python<'_>) -> PyResult<(i32, Option<u64>)> {
        let (uffd, remote) =
            py.detach(|| self.inner.kept_userfault(trace::FEATURES, 0, Faults::Resolved)).map_err(errors::adopt)?;
        Ok((OwnedFd::from(uffd).into_raw_fd(), remote))
    }

    fn descriptor(&self, number: i32) -> PyResult<i32> {
        self.inner.descriptor(number).map(IntoRawFd::into_raw_fd).map_err(errors::kernel)
    }

    fn collapse(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<()> {
        py.detach(|| self.inner.collapse(address, length)).map_err(errors::kernel)
    }

    fn advise(&self, py: Python<'_>, address: u64, length: u64, advice: i32) -> PyResult<()> {
        py.detach(|| self.inner.advise(address, length, advice)).map_err(errors::kernel)
    }

    fn large_mapped(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<Vec<(u64, u64)>> {
        py.detach(|| self.inner.large_mapped(address, length)).map_err(errors::kernel)
    }
}

/// Segment: address space, address, length, region, first page.
pub type SegmentTuple<'py> = (PyRef<'py, Space>, u64, u64, usize, usize);

pub fn segments(tuples: Vec<SegmentTuple<'_>>) -> Vec<Segment> {
    let segment = |(space, address, len, region, first_page): SegmentTuple<'_>| {
        let space = space.inner.clone();
        Segment { space, address, len, region, first_page }
    };
    tuples.into_iter().map(segment).collect()
}

/// Duplicates userfaultfds, given by process ID.
pub fn userfaults(descriptors: HashMap<i32, i32>) -> PyResult<Userfaults> {
    let known = |(pid, fd)| Ok((pid, Arc::new(Userfault::from_fd(duplicate(fd).map_err(errors::kernel)?))));
    descriptors.into_iter().map(known).collect()
}
