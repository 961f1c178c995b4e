use std::collections::HashMap;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Arc;

use pageferry_engine::mapping::duplicate;
use pageferry_engine::pager::{FEATURES, TRACE_FEATURES};
use pageferry_engine::segment::Segment;
use pageferry_engine::space::{self, AdoptError, Faults};
use pageferry_engine::trace::{self, Userfaults};
use pageferry_engine::uapi::{FEATURE_EVENT_REMOVE, Userfault};
use pyo3::prelude::*;

use crate::errors;

/// Advice of madvise(2).
#[pyclass(eq, hash, frozen, from_py_object, rename_all = "SCREAMING_SNAKE_CASE", module = "pageferry._engine")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Advice {
    Cold,
    Collapse,
    Dofork,
    Dontdump,
    Dontfork,
    Hugepage,
    Mergeable,
    Nohugepage,
    Pageout,
    PopulateRead,
    PopulateWrite,
    Unmergeable,
}

impl From<Advice> for space::Advice {
    fn from(advice: Advice) -> Self {
        match advice {
            Advice::Cold => Self::Cold,
            Advice::Collapse => Self::Collapse,
            Advice::Dofork => Self::Dofork,
            Advice::Dontdump => Self::Dontdump,
            Advice::Dontfork => Self::Dontfork,
            Advice::Hugepage => Self::Hugepage,
            Advice::Mergeable => Self::Mergeable,
            Advice::Nohugepage => Self::Nohugepage,
            Advice::Pageout => Self::Pageout,
            Advice::PopulateRead => Self::PopulateRead,
            Advice::PopulateWrite => Self::PopulateWrite,
            Advice::Unmergeable => Self::Unmergeable,
        }
    }
}

/// Descriptor of a userfaultfd in this process, and number of the descriptor in the process that keeps the userfaultfd
/// open.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct KeptUserfault {
    descriptor: i32,
    number: Option<i32>,
}

#[pyclass(frozen, module = "pageferry._engine")]
pub struct Space {
    pub inner: Arc<space::Space>,
}

#[pymethods]
impl Space {
    #[new]
    #[pyo3(signature = (pid = None))]
    fn new(py: Python<'_>, pid: Option<i32>) -> PyResult<Self> {
        let pid = pid.map_or_else(errors::own_pid, Ok)?;
        let inner = py.detach(|| space::Space::open(pid)).map_err(errors::kernel)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn pid(&self) -> i32 {
        self.inner.pid()
    }

    #[pyo3(signature = (*, discards = false))]
    fn missing_faults(&self, py: Python<'_>, discards: bool) -> PyResult<KeptUserfault> {
        let features = FEATURES | if discards { FEATURE_EVENT_REMOVE } else { 0 };
        self.kept_userfault(py, features, TRACE_FEATURES, Faults::All)
    }

    fn write_traces(&self, py: Python<'_>) -> PyResult<KeptUserfault> {
        self.kept_userfault(py, trace::FEATURES, 0, Faults::Resolved)
    }

    fn descriptor(&self, number: i32) -> PyResult<i32> {
        self.inner.descriptor(number).map(IntoRawFd::into_raw_fd).map_err(errors::kernel)
    }

    fn collapse(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<()> {
        py.detach(|| self.inner.collapse(address, length)).map_err(errors::kernel)
    }

    fn madvise(&self, py: Python<'_>, address: u64, length: u64, advice: Advice) -> PyResult<()> {
        self.made(py, |space| space.madvise(address, length, advice.into()))
    }

    fn make_read_only(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<()> {
        self.made(py, |space| space.make_read_only(address, length))
    }

    fn map_private(&self, py: Python<'_>, address: u64, length: u64, number: i32, offset: u64) -> PyResult<()> {
        self.made(py, |space| space.map_private(address, length, number, offset))
    }

    fn make_writable(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<()> {
        self.made(py, |space| space.make_writable(address, length))
    }

    fn lock_on_fault(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<()> {
        self.made(py, |space| space.lock_on_fault(address, length))
    }

    fn mmap(&self, py: Python<'_>, length: u64) -> PyResult<u64> {
        self.made(py, |space| space.mmap(length))
    }

    fn munmap(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<()> {
        self.made(py, |space| space.munmap(address, length))
    }

    fn ioctl(&self, py: Python<'_>, descriptor: i32, request: u64, argument: u64) -> PyResult<u64> {
        self.made(py, |space| space.ioctl(descriptor, request, argument))
    }

    fn close_fd(&self, py: Python<'_>, number: i32) -> PyResult<()> {
        self.made(py, |space| space.close_fd(number))
    }

    fn getppid(&self, py: Python<'_>) -> PyResult<u64> {
        self.made(py, space::Space::getppid)
    }

    fn present(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<Vec<(u64, u64)>> {
        py.detach(|| self.inner.present(address, length)).map_err(errors::kernel)
    }

    fn large_mapped(&self, py: Python<'_>, address: u64, length: u64) -> PyResult<Vec<(u64, u64)>> {
        py.detach(|| self.inner.large_mapped(address, length)).map_err(errors::kernel)
    }
}

impl Space {
    fn made<T: Send>(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&space::Space) -> Result<T, AdoptError> + Send,
    ) -> PyResult<T> {
        py.detach(|| call(&self.inner)).map_err(errors::adopt)
    }

    fn kept_userfault(&self, py: Python<'_>, features: u64, wanted: u64, faults: Faults) -> PyResult<KeptUserfault> {
        let (uffd, remote) = self.made(py, |space| space.kept_userfault(features, wanted, faults))?;
        let number = remote.map(i32::try_from).transpose()?;
        Ok(KeptUserfault { descriptor: OwnedFd::from(uffd).into_raw_fd(), number })
    }
}

/// Part of a region that a process maps.
#[pyclass(frozen, get_all, module = "pageferry._engine")]
pub struct MappedSegment {
    space: Py<Space>,
    address: u64,
    length: u64,
    region: usize,
    first_page: usize,
}

#[pymethods]
impl MappedSegment {
    #[new]
    #[pyo3(signature = (space, address, length, region = 0, first_page = 0))]
    fn new(space: Py<Space>, address: u64, length: u64, region: usize, first_page: usize) -> Self {
        Self { space, address, length, region, first_page }
    }
}

pub fn segments(given: &[PyRef<'_, MappedSegment>]) -> Vec<Segment> {
    let plain = |segment: &PyRef<'_, MappedSegment>| Segment {
        space: segment.space.get().inner.clone(),
        address: segment.address,
        len: segment.length,
        region: segment.region,
        first_page: segment.first_page,
    };
    given.iter().map(plain).collect()
}

/// Duplicates the userfaultfds in `descriptors`, which maps process IDs to descriptors.
pub fn userfaults(descriptors: HashMap<i32, i32>) -> PyResult<Userfaults> {
    let known = |(pid, fd)| Ok((pid, Arc::new(Userfault::from_fd(duplicate(fd).map_err(errors::kernel)?))));
    descriptors.into_iter().map(known).collect()
}
