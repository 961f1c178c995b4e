//! Reader of images: finds and verifies any page by reading only the storage block that holds it.

use std::fs::File;
use std::io;
use std::mem::take;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::format::{
    BlockEntry, FOOTER_LEN, FOOTER_MAGIC, FileHeader, Footer, ImageError, KNOWN_FEATURES, MAGIC, MAX_LEN, MAX_PAGES,
    MAX_SECTIONS, PageEntry, SectionEntry, VERSION, section,
};
use super::supply::Supply;
use crate::SMALL_PAGE;
use crate::block::{self, BlockError, Class, Header};
use crate::checksum::{Checksum, checksum};
use crate::mapping::prefer_large;

/// Maximum size in bytes of a section other than the page map.
const MAX_SECTION: u64 = 1 << 30;

/// Number of table records per read. Records are validated while they are in the CPU cache.
const CHUNK: usize = 8 << 10;

/// Number of chunks between two checks for cancellation.
const CHUNKS_PER_CHECK: usize = 32;

/// Limit for the holes of a section, as (base, factor): `base` bytes plus `factor` times the bytes of data.
const HOLES: (u64, u64) = (64 << 20, 64);
/// Like `HOLES`, but for the page map. The limit is higher, because holes in the page map take no memory when read.
const MAP_HOLES: (u64, u64) = (1 << 30, 4096);

/// Number of attempts to read a block that can be fetched again if it is damaged.
const SUPPLIED_READS: usize = 2;

/// Open image. Header, footer, page map and block table have been read and verified.
#[derive(Debug)]
pub struct Image {
    file: File,
    id: [u8; 16],
    digest: u64,
    regions: usize,
    len: u64,
    page_block: usize,
    page_map: Vec<PageEntry>,
    blocks: Vec<BlockEntry>,
    sections: Vec<SectionEntry>,
    /// Supply of blocks that the file does not contain yet, and the index of this image in its chain.
    supply: OnceLock<(Arc<Supply>, usize)>,
}

impl Image {
    /// Opens an image, and verifies its header, footer, page map and block table. All lengths are validated before
    /// memory is allocated.
    ///
    /// # Errors
    /// [`ImageError`] for the first part that is invalid or damaged, or that cannot be read.
    pub fn open(file: OwnedFd) -> Result<Self, ImageError> {
        Self::open_while(file, &mut || true)
    }

    /// Like [`open`](Self::open), but stops when `wanted` returns false. `wanted` is called at least once per 6 MiB.
    ///
    /// # Errors
    /// [`ImageError::Interrupted`] if `wanted` returned false; otherwise the same errors as `open`.
    pub fn open_while(file: OwnedFd, wanted: &mut dyn FnMut() -> bool) -> Result<Self, ImageError> {
        let file = File::from(file);
        let len = file.metadata()?.len();
        let header = read_header(&file, len)?;
        let footer = read_footer(&file, len)?;
        if footer.id != header.id {
            return Err(ImageError::Checksum("index (it belongs to another image)".to_owned()));
        }
        let count = footer.sections.get() as usize;
        if count > MAX_SECTIONS {
            return Err(value("section count", count as u64, "up to 24"));
        }
        let sections = footer.table[..count].to_vec();
        for entry in &sections {
            let limit = if entry.kind.get() == section::PAGE_MAP { MAX_PAGES * 16 } else { MAX_SECTION };
            let end = entry.offset.get().checked_add(entry.len.get());
            if entry.len.get() > limit || end.is_none_or(|end| end > len - FOOTER_LEN as u64) {
                return Err(value("section length", entry.len.get(), "a length within the file"));
            }
        }
        let mut image = Self {
            file,
            id: header.id,
            digest: footer.checksum.get(),
            regions: footer.regions.get() as usize,
            len,
            page_block: header.page_block.get() as usize,
            page_map: Vec::new(),
            blocks: Vec::new(),
            sections,
            supply: OnceLock::new(),
        };
        image.blocks =
            image.table("block table", section::BLOCK_TABLE, wanted, |entries| image.check_blocks(entries))?;
        image.page_map = image.table("page map", section::PAGE_MAP, wanted, |entries| image.check_pages(entries))?;
        Ok(image)
    }

    /// Returns the file, so that it can be passed to another process that reads the same image.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the random identifier of the image.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// Returns the digest of the image: the checksum of the footer, which contains the checksums of all sections.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Returns the number of regions. Their lengths are in a section that Python code writes.
    pub fn regions(&self) -> usize {
        self.regions
    }

    /// Returns the size of the file in bytes.
    #[expect(clippy::len_without_is_empty, reason = "there is always a header")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns the page map of all regions.
    pub fn page_map(&self) -> &[PageEntry] {
        &self.page_map
    }

    /// Returns the block table.
    pub fn blocks(&self) -> &[BlockEntry] {
        &self.blocks
    }

    /// Returns the size of a page block in bytes, before compression. The last page block of a storage block may be
    /// shorter.
    pub fn page_block(&self) -> usize {
        self.page_block
    }

    /// Reads and verifies the section with number `kind`. Returns its contents, or `None` if the image has no such
    /// section.
    ///
    /// # Errors
    /// If the section cannot be read or verified, or consists almost entirely of holes.
    pub fn section(&self, kind: u32) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(entry) = self.sections.iter().find(|entry| entry.kind.get() == kind) else { return Ok(None) };
        let len = usize::try_from(entry.len.get()).map_err(io::Error::other)?;
        self.check_exists(entry, HOLES)?;
        let mut contents = vec![0; len];
        self.read_at(&mut contents, entry.offset.get())?;
        if checksum(&contents) != entry.checksum.get() {
            return Err(ImageError::Checksum(format!("section {kind}")));
        }
        Ok(Some(contents))
    }

    /// Reads a storage block with a single system call. Verifies its header and table, but not its page blocks.
    ///
    /// # Errors
    /// If there is no such block, or if it cannot be read or verified.
    pub fn read_block(&self, number: u32) -> Result<StoredBlock, ImageError> {
        self.read_block_into(number, Vec::new())
    }

    /// Like [`read_block`](Self::read_block), but reuses the buffer of another block, which avoids page faults on new
    /// memory.
    ///
    /// # Errors
    /// If there is no such block, or if it cannot be read or verified.
    pub fn read_block_into(&self, number: u32, bytes: Vec<u8>) -> Result<StoredBlock, ImageError> {
        self.read_block_while(number, bytes, &|| false)
    }

    /// Like [`read_block_into`](Self::read_block_into), but stops to wait for a block that has to be fetched when
    /// `stopped` returns true.
    ///
    /// # Errors
    /// As for `read_block_into`; [`ImageError::Interrupted`] if `stopped` returned true.
    pub fn read_block_while(
        &self,
        number: u32,
        mut bytes: Vec<u8>,
        stopped: &dyn Fn() -> bool,
    ) -> Result<StoredBlock, ImageError> {
        let Some((supply, image)) = self.supply.get().filter(|_| (number as usize) < self.blocks.len()) else {
            return self.read_stored(number, bytes);
        };
        let mut last = ImageError::Interrupted;
        for _ in 0..SUPPLIED_READS {
            supply.wait(self, (*image, number), stopped)?;
            let checked = supply.is_verified((*image, number));
            let read = self.read_stored(number, take(&mut bytes));
            match read.and_then(|block| if checked { Ok(block) } else { block.verify().map(|()| block) }) {
                Ok(block) => {
                    supply.verified((*image, number));
                    return Ok(block);
                }
                Err(damaged @ (ImageError::Block { .. } | ImageError::Value { .. })) => {
                    supply.distrust((*image, number));
                    last = damaged;
                }
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Sets the supply of the image, which is image `number` of its chain. Returns false if the image has a supply.
    pub(super) fn set_supply(&self, supply: Arc<Supply>, number: usize) -> bool {
        self.supply.set((supply, number)).is_ok()
    }

    /// Returns the supply of blocks that the file does not contain yet; `None` if the file is complete.
    pub fn supply(&self) -> Option<&Arc<Supply>> {
        self.supply.get().map(|(supply, _)| supply)
    }

    /// Returns whether the file contains the header of a storage block that the block table describes.
    pub(super) fn has_header_of(&self, number: u32) -> bool {
        let Some(entry) = self.blocks.get(number as usize) else { return false };
        let mut header = Header::new_zeroed();
        self.read_at(header.as_mut_bytes(), entry.offset.get()).is_ok()
            && header.magic == block::MAGIC
            && header.checksum == entry.checksum
    }

    fn read_stored(&self, number: u32, mut bytes: Vec<u8>) -> Result<StoredBlock, ImageError> {
        let entry = self.blocks.get(number as usize).copied();
        let entry = entry.ok_or_else(|| value("storage block", u64::from(number), "one of the block table"))?;
        bytes.resize(entry.len.get() as usize, 0);
        self.read_at(&mut bytes, entry.offset.get())?;
        let wrong = |error| ImageError::Block { number, offset: entry.offset.get(), error };
        let mut header = Header::new_zeroed();
        header.as_mut_bytes().copy_from_slice(&bytes[..block::HEADER_LEN]);
        let table_len = block::table_len(&header).map_err(wrong)?;
        let start = block::HEADER_LEN + table_len;
        if header.checksum != entry.checksum || start > bytes.len() {
            return Err(wrong(BlockError::HeaderChecksum));
        }
        let head = block::decode_head(&header, &bytes[block::HEADER_LEN..start]).map_err(wrong)?;
        if start + head.stored_len != bytes.len() {
            return Err(wrong(BlockError::HeaderChecksum));
        }
        let mut ends = Vec::with_capacity(head.page_blocks.len());
        let mut at = start;
        let last = head.page_blocks.len().saturating_sub(1);
        for (index, record) in head.page_blocks.iter().enumerate() {
            let raw = record.raw_len.get() as usize;
            if raw > self.page_block || (index < last && raw != self.page_block) {
                return Err(value("data bytes of a page block", raw as u64, "the size in the header of the image"));
            }
            at += record.stored_len.get() as usize;
            ends.push(at);
        }
        Ok(StoredBlock { number, offset: entry.offset.get(), bytes, start, ends, head, page_block: self.page_block })
    }

    /// Asks the kernel to read a storage block into the page cache, without waiting. Ignores blocks that do not exist.
    pub fn read_ahead(&self, number: u32) {
        if let Some((supply, image)) = self.supply.get()
            && ((number as usize) >= self.blocks.len() || !supply.has(self, (*image, number)))
        {
            return;
        }
        if let Some(entry) = self.blocks.get(number as usize)
            && let Ok(offset) = i64::try_from(entry.offset.get())
        {
            let (file, len) = (self.file.as_raw_fd(), i64::from(entry.len.get()));
            // SAFETY: posix_fadvise takes no pointers. It is a hint, so its result is ignored.
            unsafe { libc::posix_fadvise(file, offset, len, libc::POSIX_FADV_WILLNEED) };
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ImageError::NoFooter,
            _ => error.into(),
        })
    }

    /// Reads a section as a table of records, verifies its checksum, and applies `check` to all records.
    fn table<T: FromBytes + IntoBytes + zerocopy::Immutable + Clone>(
        &self,
        name: &'static str,
        kind: u32,
        wanted: &mut dyn FnMut() -> bool,
        check: impl Fn(&[T]) -> Result<(), ImageError>,
    ) -> Result<Vec<T>, ImageError> {
        let entry = self.sections.iter().find(|entry| entry.kind.get() == kind);
        let entry = entry.ok_or_else(|| ImageError::Checksum(format!("index (no {name})")))?;
        let len = usize::try_from(entry.len.get()).map_err(io::Error::other)?;
        if !len.is_multiple_of(size_of::<T>()) {
            return Err(value("section length", entry.len.get(), "a multiple of its record size"));
        }
        self.check_exists(entry, if kind == section::PAGE_MAP { MAP_HOLES } else { HOLES })?;
        let mut records =
            T::new_vec_zeroed(len / size_of::<T>()).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        prefer_large(&records);
        let zeros =
            T::new_vec_zeroed(CHUNK.min(records.len())).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let (mut hash, mut offset, mut finding) = (Checksum::new(), entry.offset.get(), Ok(()));
        let mut data = offset;
        for (number, chunk) in records.chunks_mut(CHUNK).enumerate() {
            if number % CHUNKS_PER_CHECK == 0 && !wanted() {
                return Err(ImageError::Interrupted);
            }
            let end = offset + size_of_val(chunk) as u64;
            if data <= offset {
                data = self.next_data(offset);
            }
            // Do not read a hole: its part of `records` is already zero, and stays unallocated.
            let chunk = if data < end {
                self.read_at(chunk.as_mut_bytes(), offset)?;
                &*chunk
            } else {
                &zeros[..chunk.len()]
            };
            hash.update(chunk.as_bytes());
            finding = finding.and_then(|()| check(chunk));
            offset = end;
        }
        if hash.digest() != entry.checksum.get() {
            return Err(ImageError::Checksum(name.to_owned()));
        }
        finding.map(|()| records)
    }

    /// Returns the offset of the first data at or after `offset`, or `u64::MAX` if only a hole follows. If the file
    /// system does not report holes, returns `offset`.
    fn next_data(&self, offset: u64) -> u64 {
        match self.seek(offset, libc::SEEK_DATA) {
            Ok(data) => data,
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => u64::MAX, // a hole up to the end
            Err(_) => offset,
        }
    }

    fn seek(&self, offset: u64, whence: libc::c_int) -> io::Result<u64> {
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: lseek takes no pointers. The position of the file does not matter, because all reads state their
        // offsets.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), offset, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    }

    /// Rejects a section that consists almost entirely of holes: a small file could otherwise cost much memory or time.
    fn check_exists(&self, entry: &SectionEntry, (least, factor): (u64, u64)) -> Result<(), ImageError> {
        let (mut at, end) = (entry.offset.get(), entry.offset.get() + entry.len.get());
        let (mut data, mut holes) = (0u64, 0u64);
        while at < end {
            let start = self.next_data(at).min(end);
            let stop =
                self.seek(start, libc::SEEK_HOLE).unwrap_or(end).clamp(start, end).max(start + u64::from(start < end));
            (data, holes) = (data + (stop - start), holes + (start - at));
            at = stop;
        }
        if holes > least.saturating_add(data.saturating_mul(factor)) {
            return Err(ImageError::Holes(holes, data));
        }
        Ok(())
    }

    fn check_blocks(&self, entries: &[BlockEntry]) -> Result<(), ImageError> {
        for entry in entries {
            let end = entry.offset.get().checked_add(u64::from(entry.len.get()));
            let largest = block::HEADER_LEN + block::MAX_RUNS * 24 + block::MAX_PAGE_BLOCKS * 16 + block::MAX_RAW;
            let len = entry.len.get() as usize;
            if end.is_none_or(|end| end > self.len) || len < block::HEADER_LEN || len > largest {
                return Err(value("storage block length", u64::from(entry.len.get()), "a length within the file"));
            }
        }
        Ok(())
    }

    fn check_pages(&self, entries: &[PageEntry]) -> Result<(), ImageError> {
        let blocks = self.blocks.len() as u64;
        let stored = |entry: &PageEntry| entry.class >= Class::SameAs as u8 && !entry.in_parent();
        let fits = |entry: &PageEntry| {
            (entry.class <= Class::Data as u8) & (!stored(entry) | (u64::from(entry.block.get()) < blocks))
        };
        // The check of all entries has no branches. The invalid entry is searched for only if there is one.
        if entries.iter().fold(true, |all, entry| all & fits(entry)) {
            return Ok(());
        }
        Err(match entries.iter().find(|entry| !fits(entry)) {
            Some(entry) if entry.class().is_some() => {
                value("storage block of a page", u64::from(entry.block.get()), "one of the block table")
            }
            other => value("page class", other.map_or(0, |entry| u64::from(entry.class)), "0 to 4"),
        })
    }
}

/// Storage block in memory. Its page blocks are verified and decompressed separately, by [`unpack`](Self::unpack).
#[derive(Debug)]
pub struct StoredBlock {
    number: u32,
    offset: u64,
    bytes: Vec<u8>,
    start: usize,
    ends: Vec<usize>,
    head: block::Head,
    page_block: usize,
}

impl StoredBlock {
    /// Returns the buffer, for reuse by another block.
    pub fn into_buffer(self) -> Vec<u8> {
        self.bytes
    }

    /// Returns the number of the block in its image.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Converts an error of this block to an [`ImageError`] with the number and the offset of the block.
    pub fn wrong(&self, error: BlockError) -> ImageError {
        ImageError::Block { number: self.number, offset: self.offset, error }
    }

    /// Returns the decoded header, with runs and page blocks.
    pub fn head(&self) -> &block::Head {
        &self.head
    }

    /// Returns the number of bytes read from the file.
    #[expect(clippy::len_without_is_empty, reason = "there is always a header")]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Returns the number of data pages of the block.
    pub fn slots(&self) -> usize {
        self.head.page_blocks.iter().map(|record| record.raw_len.get() as usize / SMALL_PAGE).sum()
    }

    /// Returns the index of the page block that contains a slot, and the index of the slot within that page block.
    pub fn locate(&self, slot: usize) -> (usize, usize) {
        let pages = (self.page_block / SMALL_PAGE).max(1);
        (slot / pages, slot % pages)
    }

    /// Verifies the stored bytes of all page blocks.
    ///
    /// # Errors
    /// If a page block is damaged.
    pub fn verify(&self) -> Result<(), ImageError> {
        (0..self.ends.len()).try_for_each(|index| {
            let stored = self.stored(index)?;
            self.head.verify(index, checksum(stored)).map_err(|error| self.wrong(error))
        })
    }

    /// Verifies page block `index` and decompresses it into `out`, which is resized to its data length.
    ///
    /// # Errors
    /// If there is no such page block, or if it is damaged.
    pub fn unpack(&self, index: usize, out: &mut Vec<u8>) -> Result<(), ImageError> {
        self.head.unpack(index, self.stored(index)?, out).map_err(|error| self.wrong(error))
    }

    /// Like [`unpack`](Self::unpack), but writes to `out`, whose length must be the data length of the page block.
    ///
    /// # Errors
    /// If there is no such page block, or if it is damaged.
    pub fn unpack_into(&self, index: usize, out: &mut [u8]) -> Result<(), ImageError> {
        let stored = self.stored(index)?;
        let raw = self.head.page_blocks[index].raw_len.get() as usize;
        if out.len() != raw {
            return Err(value("data bytes of a page block", raw as u64, "those of its pages"));
        }
        self.head.unpack_into(index, stored, out).map_err(|error| self.wrong(error))
    }

    /// Returns the stored bytes of a page block.
    fn stored(&self, index: usize) -> Result<&[u8], ImageError> {
        let end = self.ends.get(index).copied();
        let end = end.ok_or_else(|| value("page block", index as u64, "one of the storage block"))?;
        let start = if index == 0 { self.start } else { self.ends[index - 1] };
        Ok(&self.bytes[start..end])
    }
}

/// Image and its parents, nearest first.
#[derive(Debug, Clone)]
pub struct Chain(Vec<Arc<Image>>);

impl Chain {
    /// Creates a chain from at least one image, nearest first.
    ///
    /// # Errors
    /// [`ImageError::Value`] if there is no image, or if the page maps differ in length.
    pub fn new(images: Vec<Arc<Image>>) -> Result<Self, ImageError> {
        let first = images.first().ok_or_else(|| value("number of images", 0, "at least 1"))?;
        let pages = first.page_map.len();
        match images.iter().find(|image| image.page_map.len() != pages) {
            Some(other) => Err(value("pages of a parent", other.page_map.len() as u64, "those of the image")),
            None => Ok(Self(images)),
        }
    }

    /// Returns the nearest image. Its page map has an entry for every page of the chain.
    pub fn nearest(&self) -> &Image {
        &self.0[0]
    }

    /// Returns the images, nearest first.
    pub fn images(&self) -> &[Arc<Image>] {
        &self.0
    }

    /// Finds a page, counted over all regions. Returns the index of the image that holds the page, and the entry of the
    /// page in that image.
    ///
    /// # Errors
    /// If there is no such page, or if the image that holds it is not part of the chain.
    pub fn find(&self, page: usize) -> Result<(usize, PageEntry), ImageError> {
        for (number, image) in self.0.iter().enumerate() {
            let entry = image.page_map.get(page);
            let entry = entry.ok_or_else(|| value("page", page as u64, "one of the page map"))?;
            if !entry.in_parent() {
                return Ok((number, *entry));
            }
        }
        Err(ImageError::InParent(page))
    }
}

fn value(what: &'static str, value: u64, allowed: &str) -> ImageError {
    ImageError::Value { what, value, allowed: allowed.to_owned() }
}

fn read_header(file: &File, len: u64) -> Result<FileHeader, ImageError> {
    let mut header = FileHeader::new_zeroed();
    if len < size_of::<FileHeader>() as u64 {
        return Err(ImageError::NoFooter);
    }
    file.read_exact_at(header.as_mut_bytes(), 0)?;
    if header.magic != MAGIC {
        return Err(ImageError::Magic(header.magic));
    }
    if header.version.get() != VERSION {
        return Err(ImageError::Version(header.version.get()));
    }
    if checksum(FileHeader { checksum: U64::ZERO, ..header }.as_bytes()) != header.checksum.get() {
        return Err(ImageError::Checksum("header".to_owned()));
    }
    let unknown = header.features.get() & !KNOWN_FEATURES;
    if unknown != 0 {
        return Err(ImageError::Features(unknown));
    }
    let unit = header.page_block.get() as usize;
    if header.page.get() as usize != SMALL_PAGE
        || unit == 0
        || !unit.is_multiple_of(SMALL_PAGE)
        || unit > block::MAX_UNIT
    {
        return Err(value("page-block size", unit as u64, "a multiple of 4096, up to 1 MiB"));
    }
    Ok(header)
}

fn read_footer(file: &File, len: u64) -> Result<Footer, ImageError> {
    if len < (FOOTER_LEN + size_of::<FileHeader>()) as u64 || len > MAX_LEN {
        return Err(ImageError::NoFooter);
    }
    let mut footer = Footer::new_zeroed();
    file.read_exact_at(footer.as_mut_bytes(), len - FOOTER_LEN as u64)?;
    if footer.magic != FOOTER_MAGIC || footer.file_len.get() != len {
        return Err(ImageError::NoFooter);
    }
    if checksum(Footer { checksum: U64::ZERO, ..footer }.as_bytes()) != footer.checksum.get() {
        return Err(ImageError::Checksum("index".to_owned()));
    }
    Ok(footer)
}
