//! Python bindings of the pageferry engine: one file per part, no logic. The reference is `_engine.pyi`.

use pyo3::prelude::*;

mod mapping;

#[pymodule(gil_used = false)]
fn _engine(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("SMALL_PAGE", pageferry_engine::SMALL_PAGE)?;
    module.add("LARGE_PAGE", pageferry_engine::LARGE_PAGE)?;
    module.add_class::<mapping::Mapping>()?;
    module.add_function(wrap_pyfunction!(mapping::large_tmpfs, module)?)?;
    Ok(())
}
