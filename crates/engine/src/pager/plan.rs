//! What a pager is told to do, and why it does not.

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

/// Why a pager could not begin, or could not do what it was asked to.
#[derive(Debug, Error)]
pub enum PagerError {
    /// The regions are not those of the image.
    #[error("the regions have {regions} pages, the page map of the image has {image}")]
    Regions {
        /// Pages of the regions.
        regions: usize,
        /// Pages of the image.
        image: usize,
    },
    /// The image is wrong.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Mappings of pages that are still to come could not be taken away.
    #[error("pages that are still to come are mapped by the workload: {0}")]
    Mapped(#[from] AdoptError),
    /// The workload maps them again and again.
    #[error("pages that are still to come are mapped by the workload again and again: it must be paused")]
    Running,
    /// Contents do not come from a peer, or not over a connection of its own.
    #[error("{0}")]
    Peer(&'static str),
    /// The kernel's words.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What a pager finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// Nothing that counts: the files are emptied, and the flags set as the image says.
    Empty,
    /// Flags that somebody has set; the files hold all other pages. Segments without any are left alone.
    Kept,
    /// The work of a pager before: the flags hold, and faults that it had read are read again.
    TakenOver,
}

/// A page that cannot be had.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Number of the region.
    pub region: usize,
    /// Page of the region.
    pub page: usize,
    /// Whether a thread of the workload waits for it.
    pub accessed: bool,
    /// What is wrong, and where.
    pub message: String,
}

/// Where contents come from.
#[derive(Debug)]
pub enum Origin {
    /// An image and those it builds on.
    Images(Chain),
    /// The source of a post-copy migration.
    Peer(Arc<PeerSource>),
}

/// What a pager is to do.
#[derive(Debug)]
pub struct Plan {
    /// Where contents come from.
    pub from: Origin,
    /// The regions; which units are large says where large pages are allocated.
    pub targets: Vec<Target>,
    /// Where the workload maps them, and the userfaultfd of each of these address spaces.
    pub watched: Vec<(Segment, Arc<Userfault>)>,
    /// The flags of all pages of all regions.
    pub flags: Flags,
    /// What is there already.
    pub begin: Begin,
    /// Windows of 16 pages to be read first, in this order.
    pub working_set: Vec<u32>,
    /// Whether to read what nobody has asked for.
    pub background: bool,
    /// Whether that goes on at full speed, without giving way to demand.
    pub eager: bool,
    /// Whether an access brings all of the storage block, after the pages around its own.
    pub whole_blocks: bool,
    /// Whether pages will be let go: until [`super::Pager::evicted`] it is not finished, even if nothing is missing.
    pub evicting: bool,
    /// Whether removals must be checked: those of a program, which may only unmap. QEMU's are discards.
    pub checks_removals: bool,
    /// Whether an access to a page that cannot be had ends in SIGBUS; else it waits.
    pub fatal: bool,
}
