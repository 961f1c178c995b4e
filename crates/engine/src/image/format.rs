//! Format of an image: a file of storage blocks, with an index to find any page.
//!
//! ```text
//! 0            file header   64 bytes, then zeros to 4096
//! 4096         storage blocks, one after the other, as in [`crate::block`]
//!              sections, each at a multiple of 4096: page map, block table, and those of Python code
//! end - 1024   footer        section table; written last
//! ```
//!
//! The page map has 16 bytes for each page of each region, in the order of the regions: class, signature, storage block
//! and slot. A page is therefore found without a search. Storage blocks contain their own checksums. The footer
//! contains the checksums of the sections, and its own checksum. All numbers are little endian.

use std::io;

use thiserror::Error;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::block::{BlockError, Class};

/// Magic number of an image.
pub const MAGIC: [u8; 8] = *b"PFIMAGE\n";
/// Magic number of a footer.
pub const FOOTER_MAGIC: [u8; 8] = *b"PFINDEX\n";
/// Version of the format.
pub const VERSION: u16 = 1;
/// Alignment in bytes of sections and of the first storage block.
pub const ALIGN: u64 = 4096;
/// Maximum number of sections.
pub const MAX_SECTIONS: usize = 24;
/// Maximum size of an image in bytes.
pub const MAX_LEN: u64 = 1 << 48;
/// Maximum number of pages of all regions: 16 TiB of memory.
pub const MAX_PAGES: u64 = 1 << 32;
/// Bit set of supported features. The reader rejects an image with any other feature bit.
pub const KNOWN_FEATURES: u32 = 0;

/// Numbers of the sections that the engine uses. Python code uses numbers from 16 on.
pub mod section {
    /// Page map: a [`super::PageEntry`] for each page of all regions.
    pub const PAGE_MAP: u32 = 1;
    /// Block table: a [`super::BlockEntry`] for each storage block.
    pub const BLOCK_TABLE: u32 = 2;
}

/// Reason why an image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The magic number is invalid.
    #[error("not a pageferry image")]
    Magic([u8; 8]),
    /// The version is not supported.
    #[error("unsupported image version {0}: expected {VERSION}; use the release that wrote the image")]
    Version(u16),
    /// The image requires unsupported features.
    #[error("unsupported image features {0:#x}; use the release that wrote the image")]
    Features(u32),
    /// The file is truncated, or the image was not finished.
    #[error("image has no index: the file is truncated, or the checkpoint did not finish")]
    NoFooter,
    /// The checksum of a part does not match.
    #[error("damaged image: checksum mismatch in the {0}")]
    Checksum(String),
    /// A field has an invalid value.
    #[error("invalid image: {what} is {value}, expected {allowed}")]
    Value {
        /// Name of the field.
        what: &'static str,
        /// Value of the field.
        value: u64,
        /// Valid values.
        allowed: String,
    },
    /// A storage block is invalid or damaged.
    #[error("storage block {number} at offset {offset} of the image: {error}")]
    Block {
        /// Number of the storage block.
        number: u32,
        /// Offset in the file, in bytes.
        offset: u64,
        /// Cause.
        error: BlockError,
    },
    /// The page is in the parent image, which is not part of the chain.
    #[error("page {0}, counted over all regions, is in the parent image, which was not given")]
    InParent(usize),
    /// The page is deferred, but no image of the chain holds it.
    #[error("page {0}, counted over all regions, is not in this image: the deferred pages belong to another image")]
    NotStored(usize),
    /// A section consists almost entirely of holes. The fields are the bytes in holes and the bytes of data.
    #[error(
        "a section of the image has {0} bytes of holes and {1} bytes of data: the file is damaged or was copied as a \
         sparse file; copy it again with `cp --sparse=never`"
    )]
    Holes(u64, u64),
    /// A storage block is not in the file, and cannot be fetched from the store.
    #[error("cannot fetch storage block {number}: {message}")]
    Unavailable {
        /// Number of the block.
        number: u32,
        /// Cause.
        message: String,
    },
    /// The caller cancelled the operation.
    #[error("cannot read the image: interrupted")]
    Interrupted,
    /// The file cannot be read or written.
    #[error("cannot read or write the image: {0}")]
    Io(#[from] io::Error),
}

/// Header of an image file.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct FileHeader {
    /// Magic number, [`MAGIC`].
    pub magic: [u8; 8],
    /// Version of the format, [`VERSION`].
    pub version: U16,
    /// Reserved; written as 0.
    pub reserved: U16,
    /// Bit set of features that a reader must support.
    pub features: U32,
    /// Bit set of features that a reader may ignore.
    pub optional: U32,
    /// Page size in bytes: 4096.
    pub page: U32,
    /// Number of data bytes per page block, before compression.
    pub page_block: U32,
    /// Maximum number of data bytes of a storage block, before compression.
    pub storage_block: U32,
    /// Random identifier of the image.
    pub id: [u8; 16],
    /// Reserved; written as 0.
    pub reserved2: [u8; 8],
    /// xxh3-64 of this header, with this field zero.
    pub checksum: U64,
}

/// Entry of the page map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct PageEntry {
    /// Data and duplicate: xxh3-64 of the contents. Pattern: the repeated word. Zero and absent: 0.
    pub signature: U64,
    /// Data and duplicate: number of the storage block that holds the contents, unless they are in the parent image.
    pub block: U32,
    /// Data and duplicate: index of the contents among the data pages of `block`, unless they are in the parent image.
    pub slot: U16,
    /// Number of the [`Class`].
    pub class: u8,
    /// Bit set of `FLAG_*`.
    pub flags: u8,
}

/// Flag of a page whose contents are those of the same page in the parent image. The class and the signature in its
/// entry are valid.
pub const FLAG_IN_PARENT: u8 = 1;

/// Entry of the block table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockEntry {
    /// Offset in the file, in bytes.
    pub offset: U64,
    /// Size of the block in bytes, including its header.
    pub len: U32,
    /// Reserved; written as 0.
    pub reserved: U32,
    /// Checksum in the header of the block, to detect a misplaced block.
    pub checksum: U64,
}

/// Entry of the section table in the footer.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SectionEntry {
    /// Number of the section, see [`section`].
    pub kind: U32,
    /// Reserved; written as 0.
    pub reserved: U32,
    /// Offset in the file, in bytes.
    pub offset: U64,
    /// Size in bytes.
    pub len: U64,
    /// xxh3-64 of the section.
    pub checksum: U64,
}

/// Footer of an image file.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Footer {
    /// Magic number, [`FOOTER_MAGIC`].
    pub magic: [u8; 8],
    /// Number of sections.
    pub sections: U32,
    /// Number of regions.
    pub regions: U32,
    /// Identifier from the header, to detect an index of another file.
    pub id: [u8; 16],
    /// Size of the file in bytes.
    pub file_len: U64,
    /// Section table; unused entries are zero.
    pub table: [SectionEntry; MAX_SECTIONS],
    /// Reserved; written as 0.
    pub reserved: [u8; 1024 - 8 - 4 - 4 - 16 - 8 - 32 * MAX_SECTIONS - 8],
    /// xxh3-64 of this footer, with this field zero.
    pub checksum: U64,
}

/// Size of the footer in bytes.
pub const FOOTER_LEN: usize = size_of::<Footer>();
const _: () = assert!(size_of::<FileHeader>() == 64 && size_of::<PageEntry>() == 16);
const _: () = assert!(size_of::<BlockEntry>() == 24 && size_of::<SectionEntry>() == 32 && FOOTER_LEN == 1024);

impl PageEntry {
    /// Returns the class, or `None` if its number is invalid.
    #[inline]
    pub fn class(&self) -> Option<Class> {
        Class::numbered(self.class)
    }

    /// Creates an entry without stored contents. `signature` is the word of a pattern; 0 for absent and zero pages.
    pub fn plain(class: Class, signature: u64) -> Self {
        let (signature, block, slot) = (U64::new(signature), U32::ZERO, U16::ZERO);
        Self { signature, block, slot, class: class as u8, flags: 0 }
    }

    /// Creates an entry whose contents are in a storage block.
    pub fn stored(class: Class, signature: u64, block: u32, slot: u16) -> Self {
        let (signature, block, slot) = (U64::new(signature), U32::new(block), U16::new(slot));
        Self { signature, block, slot, class: class as u8, flags: 0 }
    }

    /// Returns whether the contents are in the parent image.
    pub fn in_parent(&self) -> bool {
        self.flags & FLAG_IN_PARENT != 0
    }
}
