//! Layout of an image: a file of storage blocks, with what is needed to find any page in it.
//!
//! ```text
//! 0            file header   64 bytes, then zeros to 4096
//! 4096         storage blocks, one after the other, as in [`crate::block`]
//!              sections, each at a multiple of 4096: page map, block table, and what Python adds
//! end - 1024   footer        section table; written last
//! ```
//!
//! The page map has 16 bytes for every page of every region, in the order of the regions: page -> class, signature,
//! storage block and place in it, without a search. Everything that is not a storage block has a checksum in the
//! footer, and the footer has one of its own; storage blocks carry theirs. All numbers are little endian.

use std::io;

use thiserror::Error;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{BlockError, Class};

/// First bytes of an image.
pub const MAGIC: [u8; 8] = *b"PFIMAGE\n";
/// First bytes of a footer.
pub const FOOTER_MAGIC: [u8; 8] = *b"PFINDEX\n";
/// Version of the layout.
pub const VERSION: u16 = 1;
/// Sections begin at multiples of this; so does the first storage block.
pub const ALIGN: u64 = 4096;
/// Most sections.
pub const MAX_SECTIONS: usize = 24;
/// Largest image that is accepted, bytes.
pub const MAX_LEN: u64 = 1 << 48;
/// Most pages of all regions: 16 TiB of memory.
pub const MAX_PAGES: u64 = 1 << 32;
/// Features that a reader must know; an image with another bit is refused.
pub const KNOWN_FEATURES: u32 = 0;

/// Numbers of the sections that the engine knows; Python uses others, from 16.
pub mod section {
    /// [`super::PageEntry`] for every page.
    pub const PAGE_MAP: u32 = 1;
    /// [`super::BlockEntry`] for every storage block.
    pub const BLOCK_TABLE: u32 = 2;
}

/// What is wrong with an image.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It is no image.
    #[error("this is not a pageferry image")]
    Magic([u8; 8]),
    /// Written by something newer.
    #[error("image of version {0}; this release knows version {VERSION}: use the release that wrote it")]
    Version(u16),
    /// Needs something newer.
    #[error("image with features {0:#x} that this release does not know: use the release that wrote it")]
    Features(u32),
    /// Cut off, or never finished.
    #[error("image without an index at its end: it was cut off, or the checkpoint that wrote it did not finish")]
    NoFooter,
    /// A part does not have the checksum it was written with.
    #[error("the {0} of the image fails its checksum: the file is damaged")]
    Checksum(String),
    /// A number that is not allowed.
    #[error("image with {what} {value}, allowed is {allowed}")]
    Value {
        /// What the number is.
        what: &'static str,
        /// The number.
        value: u64,
        /// What it may be.
        allowed: String,
    },
    /// A storage block that is not as it must be.
    #[error("storage block {number} (at byte {offset} of the image): {error}")]
    Block {
        /// Number of the block.
        number: u32,
        /// Where it begins.
        offset: u64,
        /// What is wrong.
        error: BlockError,
    },
    /// The page is not in this image but in the one it builds on.
    #[error("page {0} (of all regions) is in the parent of this image, which was not given")]
    InParent(usize),
    /// The page is missing from memory, and no image of the chain says what it holds.
    #[error("page {0} (of all regions) is not in this image: it is not the one that it was left in")]
    NotStored(usize),
    /// Its sections are far longer than what the file holds of them.
    #[error(
        "a section of the image has {0} bytes of holes and {1} bytes of data: the file is damaged, or was copied with \
         holes (copy it again with `cp --sparse=never`)"
    )]
    Holes(u64, u64),
    /// The caller wants to stop.
    #[error("the image was not opened: interrupted")]
    Interrupted,
    /// The file changed or vanished.
    #[error("the image cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Begins every image.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FileHeader {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION`].
    pub version: U16,
    /// 0.
    pub reserved: U16,
    /// Features without which the image cannot be read.
    pub features: U32,
    /// Features that may be left aside.
    pub optional: U32,
    /// Bytes of a page: 4096.
    pub page: U32,
    /// Data bytes of a page block before compression.
    pub page_block: U32,
    /// Most data bytes of a storage block.
    pub storage_block: U32,
    /// Random name of the image.
    pub id: [u8; 16],
    /// 0.
    pub reserved2: [u8; 8],
    /// xxh3-64 of this header, this field zero.
    pub checksum: U64,
}

/// A page, in the page map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct PageEntry {
    /// Zero and absent: 0. Pattern: the word. Data and same-as: xxh3-64 of the contents.
    pub signature: U64,
    /// Data and same-as: number of the storage block that holds the contents.
    pub block: U32,
    /// Data and same-as: which page of the data in that block, from 0.
    pub slot: U16,
    /// [`Class`].
    pub class: u8,
    /// A set of `FLAG_*`.
    pub flags: u8,
}

/// The contents are those of the same page in the parent image; class and signature are right all the same.
pub const FLAG_IN_PARENT: u8 = 1;

/// A storage block, in the block table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockEntry {
    /// Where it begins in the file.
    pub offset: U64,
    /// Bytes, header and all.
    pub len: U32,
    /// 0.
    pub reserved: U32,
    /// Its header checksum, so that no other block is taken for it.
    pub checksum: U64,
}

/// A section, in the footer.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SectionEntry {
    /// What it is: see [`section`].
    pub kind: U32,
    /// 0.
    pub reserved: U32,
    /// Where it begins.
    pub offset: U64,
    /// Bytes.
    pub len: U64,
    /// xxh3-64 of it.
    pub checksum: U64,
}

/// Ends every image.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Footer {
    /// [`FOOTER_MAGIC`].
    pub magic: [u8; 8],
    /// Number of sections.
    pub sections: U32,
    /// Number of regions.
    pub regions: U32,
    /// As in the header: an index of another file is not taken for this one's.
    pub id: [u8; 16],
    /// Bytes of the file.
    pub file_len: U64,
    /// The sections; unused entries are zero.
    pub table: [SectionEntry; MAX_SECTIONS],
    /// 0.
    pub reserved: [u8; 1024 - 8 - 4 - 4 - 16 - 8 - 32 * MAX_SECTIONS - 8],
    /// xxh3-64 of this footer, this field zero.
    pub checksum: U64,
}

/// Bytes of a footer.
pub const FOOTER_LEN: usize = size_of::<Footer>();
const _: () = assert!(size_of::<FileHeader>() == 64 && size_of::<PageEntry>() == 16);
const _: () = assert!(size_of::<BlockEntry>() == 24 && size_of::<SectionEntry>() == 32 && FOOTER_LEN == 1024);

impl PageEntry {
    /// The class, once it is known to be one.
    #[inline]
    pub fn class(&self) -> Option<Class> {
        Class::numbered(self.class)
    }

    /// A page without contents of its own: absent, zero or pattern.
    pub fn plain(class: Class, signature: u64) -> Self {
        let (signature, block, slot) = (U64::new(signature), U32::ZERO, U16::ZERO);
        Self { signature, block, slot, class: class as u8, flags: 0 }
    }

    /// A page whose contents stand in a storage block.
    pub fn stored(class: Class, signature: u64, block: u32, slot: u16) -> Self {
        let (signature, block, slot) = (U64::new(signature), U32::new(block), U16::new(slot));
        Self { signature, block, slot, class: class as u8, flags: 0 }
    }

    /// Whether the contents are in the parent image.
    pub fn in_parent(&self) -> bool {
        self.flags & FLAG_IN_PARENT != 0
    }
}
