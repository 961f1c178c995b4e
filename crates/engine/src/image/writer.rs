//! Writer of images: writes storage blocks as they are completed, then the sections, and the footer last.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

use super::format::{
    ALIGN, BlockEntry, FOOTER_LEN, FOOTER_MAGIC, FileHeader, Footer, MAGIC, MAX_SECTIONS, PageEntry, SectionEntry,
    VERSION, section,
};
use crate::SMALL_PAGE;
use crate::block::Built;
use crate::checksum::checksum;

/// Number of bytes that are buffered before a write.
pub const WRITE_LEN: usize = 1 << 20;

/// Block sizes of an image.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Number of data bytes of a page block, before compression.
    pub page_block: usize,
    /// Maximum number of data bytes of a storage block, before compression.
    pub storage_block: usize,
}

/// Image being written. The file is not a valid image before [`finish`](Self::finish) returns.
#[derive(Debug)]
pub struct ImageWriter {
    file: File,
    id: [u8; 16],
    buffer: Vec<u8>,
    /// Size of the file, including buffered bytes.
    len: u64,
    blocks: Vec<BlockEntry>,
    sections: Vec<SectionEntry>,
    writes: u64,
}

impl ImageWriter {
    /// Creates an image in an empty file.
    ///
    /// # Errors
    /// The error of write(2).
    pub fn new(file: OwnedFd, id: [u8; 16], sizes: Sizes) -> io::Result<Self> {
        let number = |value: usize| U32::new(u32::try_from(value).unwrap_or(0));
        let mut header = FileHeader {
            magic: MAGIC,
            version: U16::new(VERSION),
            reserved: U16::ZERO,
            features: U32::ZERO,
            optional: U32::ZERO,
            page: number(SMALL_PAGE),
            page_block: number(sizes.page_block),
            storage_block: number(sizes.storage_block),
            id,
            reserved2: [0; 8],
            checksum: U64::ZERO,
        };
        header.checksum = U64::new(checksum(header.as_bytes()));
        let buffer = Vec::with_capacity(2 * WRITE_LEN);
        let file = File::from(file);
        let mut new = Self { file, id, buffer, len: 0, blocks: Vec::new(), sections: Vec::new(), writes: 0 };
        new.push(header.as_bytes())?;
        new.align()?;
        Ok(new)
    }

    /// Appends a storage block. Returns its number.
    ///
    /// # Errors
    /// If there are too many blocks, or if the block is too large; otherwise the error of write(2).
    pub fn append(&mut self, built: &Built<'_>) -> io::Result<u32> {
        let number = u32::try_from(self.blocks.len()).map_err(|_| io::Error::other("too many storage blocks"))?;
        let len = u32::try_from(built.head.len() + built.payload.len()).map_err(io::Error::other)?;
        let mut checksum = [0; 8];
        checksum.copy_from_slice(&built.head[crate::block::HEADER_LEN - 8..crate::block::HEADER_LEN]);
        let checksum = U64::from_bytes(checksum);
        self.blocks.push(BlockEntry { offset: U64::new(self.len), len: U32::new(len), reserved: U32::ZERO, checksum });
        self.push(built.head)?;
        self.push(built.payload)?;
        Ok(number)
    }

    /// Appends a section with number `kind`.
    ///
    /// # Errors
    /// If there are too many sections; otherwise the error of write(2).
    pub fn section(&mut self, kind: u32, contents: &[u8]) -> io::Result<()> {
        if self.sections.len() >= MAX_SECTIONS {
            return Err(io::Error::other("too many sections"));
        }
        self.align()?;
        self.sections.push(SectionEntry {
            kind: U32::new(kind),
            reserved: U32::ZERO,
            offset: U64::new(self.len),
            len: U64::new(contents.len() as u64),
            checksum: U64::new(checksum(contents)),
        });
        self.push(contents)
    }

    /// Writes page map, block table and footer, and syncs the file.
    ///
    /// # Errors
    /// If there are too many sections or regions; otherwise the error of write(2) or fsync(2).
    pub fn finish(mut self, regions: usize, page_map: &[PageEntry]) -> io::Result<Finished> {
        self.section(section::PAGE_MAP, page_map.as_bytes())?;
        let blocks = std::mem::take(&mut self.blocks);
        self.section(section::BLOCK_TABLE, blocks.as_bytes())?;
        self.align()?;
        let mut table = [SectionEntry::default(); MAX_SECTIONS];
        table[..self.sections.len()].copy_from_slice(&self.sections);
        let mut footer = Footer {
            magic: FOOTER_MAGIC,
            sections: U32::new(u32::try_from(self.sections.len()).unwrap_or(0)),
            regions: U32::new(u32::try_from(regions).map_err(io::Error::other)?),
            id: self.id,
            file_len: U64::new(self.len + FOOTER_LEN as u64),
            table,
            reserved: [0; 1024 - 8 - 4 - 4 - 16 - 8 - 32 * MAX_SECTIONS - 8],
            checksum: U64::ZERO,
        };
        footer.checksum = U64::new(checksum(footer.as_bytes()));
        self.push(footer.as_bytes())?;
        self.flush()?;
        self.file.sync_all()?;
        Ok(Finished { digest: footer.checksum.get(), len: self.len, writes: self.writes, blocks: blocks.len() })
    }

    /// Returns the number of write calls so far.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    fn align(&mut self) -> io::Result<()> {
        let padding = self.len.next_multiple_of(ALIGN) - self.len;
        self.push(&[0; 4096][..usize::try_from(padding).unwrap_or(0)])
    }

    fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        self.len += bytes.len() as u64;
        if self.buffer.len() >= WRITE_LEN { self.flush() } else { Ok(()) }
    }

    /// Writes the buffer to the file, unless it is empty. Buffering makes writes few, large and sequential (S4).
    fn flush(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.file.write_all(&self.buffer)?;
            self.writes += 1;
            self.buffer.clear();
        }
        Ok(())
    }
}

/// Summary of a finished image.
#[derive(Debug, Clone, Copy)]
pub struct Finished {
    /// Digest of the image: the checksum of the footer, by which an incremental image refers to its parent.
    pub digest: u64,
    /// Size of the file in bytes.
    pub len: u64,
    /// Number of write calls.
    pub writes: u64,
    /// Number of storage blocks.
    pub blocks: usize,
}
