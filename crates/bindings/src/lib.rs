//! Python bindings of the engine and the ledger: one file per module, conversions only. `_engine.pyi` documents the
//! classes and functions.

use pyo3::prelude::*;

mod activity;
mod base;
mod blocks;
mod detached;
mod errors;
mod file_systems;
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
mod probing;
mod saver;
mod sharing;
mod space;
mod tls;
mod trace;
mod wire;

#[pymodule(gil_used = false)]
mod _engine {
    #[pymodule_export]
    use crate::activity::{Sampler, SplitPage};
    #[pymodule_export]
    use crate::base::{BaseFailure, BasePager, CloneCounters};
    #[pymodule_export]
    use crate::errors::TlsError;
    #[pymodule_export]
    use crate::file_systems::{file_system_type, hugetlbfs, large_tmpfs};
    #[pymodule_export]
    use crate::image::{Finding, Image, ImageChain, PageCounts, WrittenImage};
    #[pymodule_export]
    use crate::image_writer::ImageWriter;
    #[pymodule_export]
    use crate::ledger::{Ledger, LedgerReport, Stalls};
    #[pymodule_export]
    use crate::mappers::{FileMapping, Mappers, own_mappings, scan_mappers};
    #[pymodule_export]
    use crate::mapping::{Mapping, end_on_truncation};
    #[pymodule_export]
    use crate::page_store::PageStore;
    #[pymodule_export]
    use crate::pager::{Failure, Pager, PagerCounters};
    #[pymodule_export]
    use crate::pages::PageSet;
    #[pymodule_export]
    use crate::peer::{PageServer, PeerSource};
    #[pymodule_export]
    use crate::placer::{Placer, Populated, PrivateRegion, TargetRegion};
    #[pymodule_export]
    use crate::probing::{kernel_reads, kernel_writes, read_memory, userfaultfd, write_memory};
    #[pymodule_export]
    use crate::saver::{ProcessRange, SaveCounters, SaveFinished, Saver};
    #[pymodule_export]
    use crate::sharing::{ClassCounts, FreedZeros, PagerFlags, ScannedUnit, SharingScan, SharingTotals, free_zeros};
    #[pymodule_export]
    use crate::space::{Advice, KeptUserfault, MappedSegment, Space};
    #[pymodule_export]
    use crate::tls::{TlsIdentity, TlsSession};
    #[pymodule_export]
    use crate::trace::Trace;
    #[pymodule_export]
    use crate::wire::{BlockReceiver, BlockSender, Relay, SendProgress};

    #[pymodule_export]
    const LARGE_PAGE: usize = pageferry_engine::LARGE_PAGE;
    #[pymodule_export]
    const SMALL_PAGE: usize = pageferry_engine::SMALL_PAGE;
}
