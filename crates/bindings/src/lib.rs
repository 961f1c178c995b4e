//! Python bindings of the engine: one file per module, without logic. `_engine.pyi` is the reference.

use pyo3::prelude::*;

mod activity;
mod blocks;
mod errors;
mod image;
mod image_writer;
mod ledger;
mod mappers;
mod mapping;
mod options;
mod page_store;
mod pager;
mod pages;
mod peer;
mod placer;
mod saver;
mod sharing;
mod space;
mod tls;
mod trace;
mod wire;

#[pymodule(gil_used = false)]
fn _engine(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("SMALL_PAGE", pageferry_engine::SMALL_PAGE)?;
    module.add("LARGE_PAGE", pageferry_engine::LARGE_PAGE)?;
    module.add_class::<mapping::Mapping>()?;
    module.add_class::<image::Image>()?;
    module.add_class::<image::ImageChain>()?;
    module.add_class::<image_writer::ImageWriter>()?;
    module.add_class::<page_store::PageStore>()?;
    module.add_class::<pager::Pager>()?;
    module.add_class::<pages::PageSet>()?;
    module.add_class::<peer::PageServer>()?;
    module.add_class::<peer::PeerSource>()?;
    module.add_class::<space::Space>()?;
    module.add_class::<trace::Trace>()?;
    module.add_class::<activity::Sampler>()?;
    module.add_class::<placer::Placer>()?;
    module.add_class::<saver::ProcessRange>()?;
    module.add_class::<saver::Saver>()?;
    module.add_class::<tls::TlsIdentity>()?;
    module.add_class::<tls::TlsSession>()?;
    module.add_class::<wire::BlockSender>()?;
    module.add_class::<wire::BlockReceiver>()?;
    module.add_class::<sharing::PagerFlags>()?;
    module.add_class::<sharing::SharingScan>()?;
    module.add_class::<ledger::Ledger>()?;
    module.add_class::<ledger::LedgerReport>()?;
    module.add_function(wrap_pyfunction!(mapping::end_on_truncation, module)?)?;
    module.add_function(wrap_pyfunction!(mapping::large_tmpfs, module)?)?;
    module.add_function(wrap_pyfunction!(mappers::own_mappings, module)?)?;
    module.add_function(wrap_pyfunction!(mappers::scan_mappers, module)?)?;
    module.add_function(wrap_pyfunction!(sharing::free_zeros, module)?)?;
    Ok(())
}
