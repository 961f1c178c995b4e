use parking_lot::Mutex;

use pageferry_engine::image;
use pageferry_engine::mapping::duplicate;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::detached::Detached;
use crate::image::{ImageChain, WrittenImage, image_error};
use crate::mapping::Mapping;
use crate::pages::PageSet;
use crate::{blocks, errors};

#[pyclass(frozen, module = "pageferry._engine")]
pub struct PageStore {
    inner: Detached<Mutex<Option<image::PageAppender>>>,
}

fn finished() -> PyErr {
    PyValueError::new_err("cannot write to the image: it is already finished")
}

#[pymethods]
impl PageStore {
    #[new]
    #[pyo3(signature = (fd, id, regions, **format))]
    fn new(
        py: Python<'_>,
        fd: i32,
        id: [u8; 16],
        regions: Vec<usize>,
        format: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let (codec, sizes) = blocks::only_image_format(py, format)?;
        let file = duplicate(fd).map_err(errors::kernel)?;
        let inner = py.detach(|| image::PageAppender::new(file, id, codec, sizes, &regions)).map_err(errors::kernel)?;
        Ok(Self { inner: Mutex::new(Some(inner)).into() })
    }

    fn add(
        &self,
        py: Python<'_>,
        region: usize,
        memory: PyRef<'_, Mapping>,
        pages: PyRef<'_, PageSet>,
    ) -> PyResult<PageSet> {
        let (memory, pages) = (memory.inner.clone(), pages.inner.clone());
        let added = py.detach(|| self.inner.lock().as_mut().map(|store| store.add(region, &memory, &pages)));
        Ok(PageSet { inner: added.ok_or_else(finished)?.map_err(image_error)? })
    }

    #[pyo3(signature = (sections, parent = None))]
    fn finish(
        &self,
        py: Python<'_>,
        sections: Vec<(u32, Vec<u8>)>,
        parent: Option<PyRef<'_, ImageChain>>,
    ) -> PyResult<WrittenImage> {
        let parent = parent.map(|chain| chain.inner.clone());
        let written = py.detach(|| self.inner.lock().take().map(|store| store.finish(parent.as_ref(), &sections)));
        written.ok_or_else(finished)?.map(Into::into).map_err(image_error)
    }
}
