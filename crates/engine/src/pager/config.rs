//! Configuration of a pager, and its errors.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::flags::Flags;
use crate::image::{Chain, ImageError};
use crate::placer::Target;
use crate::segment::Segment;
use crate::space::AdoptError;
use crate::uapi::Userfault;
use crate::wire::PeerSource;

/// Reason for which a pager could not be started, or an operation of a pager failed.
#[derive(Debug, Error)]
pub enum PagerError {
    /// The regions do not match the image.
    #[error("regions do not match the image: {regions} pages, expected {image}")]
    Regions {
        /// Number of pages of the regions.
        regions: usize,
        /// Number of pages of the image.
        image: usize,
    },
    /// Clones may have read zeros in a unit of the base.
    #[error("{}", super::memory::given_up(*.0))]
    GivenUp(usize),
    /// The image is invalid.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Mappings of deferred pages could not be removed.
    #[error("cannot unmap deferred pages from the workload: {0}")]
    Mapped(#[from] AdoptError),
    /// The workload maps pages again after they were unmapped.
    #[error("cannot unmap deferred pages from the workload: the workload maps them again; pause it first")]
    Running,
    /// The peer connection cannot be used.
    #[error("{0}")]
    Peer(&'static str),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Initial state of the memory and its deferred bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// All contents are deferred: the files are emptied, and the bitmap is set from the image.
    Empty,
    /// The bitmap is valid, and the files hold all pages that are not deferred. Segments without deferred pages are not
    /// registered.
    Kept,
    /// The previous pager has exited. The bitmap is valid. Threads whose faults that pager had read are woken, and
    /// fault again.
    TakenOver,
}

/// Page that could not be loaded.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Index of the region; the number of regions for a fault outside all of them.
    pub region: usize,
    /// Index of the page in the region; for a fault outside all regions, in the address space.
    pub page: usize,
    /// Whether a thread of the workload waits for the page.
    pub accessed: bool,
    /// Cause of the failure.
    pub message: String,
}

/// Origin of the contents.
#[derive(Debug)]
pub enum Origin {
    /// Image and its parents.
    Images(Chain),
    /// The source of a post-copy migration.
    Peer(Arc<PeerSource>),
}

/// Region of private memory, which the pager cannot map. Its contents are installed by UFFDIO_COPY.
///
/// The workload has registered the memory for MISSING faults. A page that is not deferred and not present is zeros.
#[derive(Debug, Clone, Copy)]
pub struct PrivateRegion {
    /// Number of base pages.
    pub pages: usize,
    /// Page size, bytes: 4 KiB, or 2 MiB for memory of hugetlbfs. Every segment must consist of whole pages.
    pub page_size: usize,
}

/// Regions of a workload. All of them have the same kind of memory.
#[derive(Debug)]
pub enum Targets {
    /// Files, which the pager maps as well. Their `large` units are allocated as huge pages.
    Files(Vec<Target>),
    /// Private memory.
    Private(Vec<PrivateRegion>),
}

impl Targets {
    /// Returns whether the pager maps the memory as well.
    pub fn are_files(&self) -> bool {
        matches!(self, Self::Files(_))
    }
}

/// Order of background loading from images. Pages that it leaves out are loaded last, one after the other.
#[derive(Debug, Default)]
pub struct FillOrder {
    /// Windows of 16 pages to load first, in this order.
    pub windows: Vec<u32>,
    /// Storage blocks to load next, in this order, as (index of the image in the chain, number of the block).
    pub blocks: Vec<(usize, u32)>,
}

impl FillOrder {
    /// Checks that all storage blocks exist.
    ///
    /// # Errors
    /// `InvalidInput` if the chain has no such block.
    pub(super) fn check(&self, chain: &Chain) -> io::Result<()> {
        let images = chain.images();
        let exists = |&(image, block): &(usize, u32)| {
            images.get(image).is_some_and(|image| (block as usize) < image.blocks().len())
        };
        match self.blocks.iter().find(|&block| !exists(block)) {
            Some((image, block)) => {
                let message = format!("image {image} of the chain has no storage block {block}");
                Err(io::Error::new(io::ErrorKind::InvalidInput, message))
            }
            None => Ok(()),
        }
    }
}

/// Configuration of a pager.
#[derive(Debug)]
pub struct Plan {
    /// Origin of the contents.
    pub from: Origin,
    /// Regions.
    pub targets: Targets,
    /// Mappings of the regions by the workload, with the userfaultfd of their address space.
    pub watched: Vec<(Segment, Arc<Userfault>)>,
    /// Deferred bitmap of all pages of all regions.
    pub flags: Flags,
    /// Initial state of the memory.
    pub begin: Begin,
    /// Order of background loading.
    pub order: FillOrder,
    /// Whether to load pages that have not been requested.
    pub background: bool,
    /// Whether background loading runs at full speed instead of giving precedence to faults.
    pub eager: bool,
    /// Whether a fault also loads the remaining pages of the storage block that contains the page.
    pub whole_blocks: bool,
    /// Whether faults in the order of the image also load the next storage blocks. Requires `whole_blocks`.
    pub read_ahead: bool,
    /// Whether pages may be evicted. If so, the pager does not finish before [`super::Pager::evicted`] is called.
    pub evicting: bool,
    /// Whether removals must be checked. This is required for programs, whose removals may only unmap pages; every
    /// removal by QEMU is a discard.
    pub checks_removals: bool,
    /// Whether an access to a page that cannot be loaded raises SIGBUS; otherwise, the access blocks.
    pub fatal: bool,
}
