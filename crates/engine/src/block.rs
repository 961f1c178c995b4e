//! Storage blocks: the unit in which pages are sent and stored, with the same format on the wire and in files.
//!
//! ```text
//! storage block = header (64 bytes)
//!                 runs          24 bytes each: consecutive pages of one class
//!                 page blocks   16 bytes each: raw length, stored length, checksum
//!                 payload       the page blocks, one after the other, each compressed separately
//! ```
//!
//! The data pages of all runs, in order, form the *raw* stream. The stream is divided into page blocks of `unit` bytes;
//! the last one may be shorter. Pages of other classes contribute no bytes. All numbers are little endian. The checksum
//! in the header covers header, runs and page-block table, so that every length is verified before it is used. Every
//! length has an upper bound, so a peer cannot cause large allocations.

use thiserror::Error;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::SMALL_PAGE;
use crate::checksum::{Checksum, checksum};

/// Magic number of a storage block.
pub const MAGIC: [u8; 4] = *b"PFBK";
/// Version of the format.
pub const VERSION: u8 = 1;
/// Maximum number of data bytes of a storage block, before compression.
pub const MAX_RAW: usize = 4 << 20;
/// Maximum number of runs of a storage block.
pub const MAX_RUNS: usize = 2048;
/// Maximum size of a page block in bytes, before compression.
pub const MAX_UNIT: usize = 1 << 20;
/// Maximum number of page blocks of a storage block, reached if each page block consists of one page.
pub const MAX_PAGE_BLOCKS: usize = MAX_RAW / SMALL_PAGE;
/// Maximum number of pages of a run.
pub const MAX_RUN_PAGES: usize = 1 << 24;

/// Reason why a storage block is invalid.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum BlockError {
    /// The magic number is invalid.
    #[error("not a storage block: magic is {0:02x?}")]
    Magic([u8; 4]),
    /// The version is not supported.
    #[error("unsupported storage block version {0}: expected {VERSION}")]
    Version(u8),
    /// A field has an invalid value.
    #[error("invalid storage block: {field} is {value}, expected {allowed}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Value of the field.
        value: u64,
        /// Valid values.
        allowed: &'static str,
    },
    /// The checksum of the header does not match.
    #[error("invalid storage block: header checksum mismatch")]
    HeaderChecksum,
    /// The checksum of a page block does not match.
    #[error("damaged page block {index} (page {page} of region {region}): checksum mismatch")]
    PayloadChecksum {
        /// Index of the page block.
        index: usize,
        /// First page of the page block.
        page: u64,
        /// Index of the region of the storage block.
        region: u32,
    },
    /// A page block cannot be decompressed to its raw length.
    #[error("cannot decompress page block {index} of region {region}: {reason}")]
    Decompress {
        /// Index of the page block.
        index: usize,
        /// Index of the region of the storage block.
        region: u32,
        /// Error of the codec.
        reason: String,
    },
}

/// Compression of page blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// No compression.
    None = 0,
    /// LZ4 block format.
    Lz4 = 1,
    /// Zstandard, level 1.
    Zstd = 2,
}

impl Codec {
    /// Returns the codec with this name (`none`, `lz4` or `zstd`). Returns `None` for other names.
    pub fn named(name: &str) -> Option<Self> {
        [("none", Self::None), ("lz4", Self::Lz4), ("zstd", Self::Zstd)]
            .into_iter()
            .find(|(known, _)| *known == name)
            .map(|(_, codec)| codec)
    }

    fn from_byte(byte: u8) -> Result<Self, BlockError> {
        match byte {
            0 => Ok(Self::None),
            1 => Ok(Self::Lz4),
            2 => Ok(Self::Zstd),
            _ => Err(field("codec", byte, "0 (none), 1 (lz4) or 2 (zstd)")),
        }
    }
}

/// Class of pages, by their contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Hole: page that is not present in memory.
    Absent = 0,
    /// Present page of zeros.
    Zero = 1,
    /// Page that consists of a repeated 64-bit word.
    Pattern = 2,
    /// Duplicate of another page. In a storage block, the other page is in the same region.
    SameAs = 3,
    /// Page with any other contents, stored in the payload of a storage block.
    Data = 4,
}

impl Class {
    /// Returns the class with this number, or `None` if the number is invalid.
    #[inline]
    pub fn numbered(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Absent),
            1 => Some(Self::Zero),
            2 => Some(Self::Pattern),
            3 => Some(Self::SameAs),
            4 => Some(Self::Data),
            _ => None,
        }
    }

    fn from_byte(byte: u8) -> Result<Self, BlockError> {
        Self::numbered(byte).ok_or_else(|| field("page class", byte, "0 (absent) to 4 (data)"))
    }
}

fn field(field: &'static str, value: impl Into<u64>, allowed: &'static str) -> BlockError {
    BlockError::Field { field, value: value.into(), allowed }
}

/// Purpose of a storage block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Block of pages.
    Pages = 1,
    /// End of a round on a stream. `sequence` is the number of preceding blocks.
    Barrier = 2,
}

/// Header of a storage block, as it is sent and stored.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Magic number, [`MAGIC`].
    pub magic: [u8; 4],
    /// Version of the format, [`VERSION`].
    pub version: u8,
    /// Number of the [`Kind`].
    pub kind: u8,
    /// Number of the [`Codec`].
    pub codec: u8,
    /// Reserved; must be 0.
    pub reserved: u8,
    /// Index of the region in the region table.
    pub region: U32,
    /// Number of runs.
    pub runs: U16,
    /// Number of page blocks.
    pub page_blocks: U16,
    /// Number of data bytes per page block, before compression.
    pub unit: U32,
    /// Number of data bytes of all page blocks together, before compression.
    pub raw_len: U32,
    /// Size of the payload in bytes.
    pub stored_len: U32,
    /// Round of a migration; 0 in a file.
    pub round: U32,
    /// Number of the block in its stream or file, starting at 0.
    pub sequence: U64,
    /// Reserved; must be 0.
    pub reserved2: [u8; 16],
    /// xxh3-64 of header (this field zero), runs and page-block table.
    pub checksum: U64,
}

/// Run of consecutive pages of one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RunRecord {
    /// First page, within the region.
    pub first: U64,
    /// Number of pages, at least 1.
    pub count: U32,
    /// Number of the [`Class`].
    pub class: u8,
    /// Reserved; must be 0.
    pub reserved: [u8; 3],
    /// Pattern: the repeated word. Duplicate: the page with the same contents, within the region. Otherwise 0.
    pub value: U64,
}

/// Entry of the page-block table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct PageBlockRecord {
    /// Number of data bytes, before compression.
    pub raw_len: U32,
    /// Number of bytes in the payload. If it equals `raw_len`, the page block is not compressed, regardless of the
    /// codec.
    pub stored_len: U32,
    /// xxh3-64 of the stored bytes.
    pub checksum: U64,
}

/// Size of the header in bytes.
pub const HEADER_LEN: usize = size_of::<Header>();
const RUN_LEN: usize = size_of::<RunRecord>();
const PAGE_BLOCK_LEN: usize = size_of::<PageBlockRecord>();
const _: () = assert!(HEADER_LEN == 64 && RUN_LEN == 24 && PAGE_BLOCK_LEN == 16);

/// Decoded run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First page, within the region.
    pub first: usize,
    /// Number of pages.
    pub count: usize,
    /// Class of the pages.
    pub class: Class,
    /// Pattern: the repeated word. Duplicate: the page with the same contents, within the region. Otherwise 0.
    pub value: u64,
}

/// Decoded and verified header of a storage block, with runs and page-block table, but without the payload.
#[derive(Debug)]
pub struct Head {
    /// Purpose of the block.
    pub kind: Kind,
    /// Codec of the page blocks.
    pub codec: Codec,
    /// Index of the region.
    pub region: u32,
    /// Round of a migration; 0 in a file.
    pub round: u32,
    /// Number of the block in its stream or file.
    pub sequence: u64,
    /// Runs, in the order of their pages in the raw stream.
    pub runs: Vec<Run>,
    /// Page-block table, in the order of the payload.
    pub page_blocks: Vec<PageBlockRecord>,
    /// Size of the payload in bytes.
    pub stored_len: usize,
}

impl Head {
    /// Checks that no page is in two runs. A correct peer does not send a page twice in a block. Without this check, a
    /// block of 49 KB could make the receiver process the whole region 2048 times. A later block of the same round may
    /// contain the page again, if the page was discarded between the two blocks.
    ///
    /// # Errors
    /// [`BlockError::Field`] with the page that is in two runs.
    pub fn check_distinct(&self) -> Result<(), BlockError> {
        let mut runs: Vec<(usize, usize)> = self.runs.iter().map(|run| (run.first, run.first + run.count)).collect();
        if !runs.is_sorted() {
            runs.sort_unstable();
        }
        match runs.windows(2).find(|pair| pair[0].1 > pair[1].0) {
            Some(pair) => Err(field("page", pair[1].0 as u64, "one run for each page")),
            None => Ok(()),
        }
    }

    /// Compares `checksum` with the recorded checksum of page block `index`.
    ///
    /// # Errors
    /// [`BlockError::PayloadChecksum`] if they differ.
    pub fn verify(&self, index: usize, checksum: u64) -> Result<(), BlockError> {
        if checksum == self.page_blocks[index].checksum.get() {
            return Ok(());
        }
        Err(BlockError::PayloadChecksum { index, page: self.first_page(index), region: self.region })
    }

    /// Verifies the stored bytes of a page block and decompresses them into `out`, which is resized to the raw length.
    ///
    /// # Errors
    /// [`BlockError::PayloadChecksum`] if the checksum differs, [`BlockError::Decompress`] if decompression fails.
    pub fn unpack(&self, index: usize, stored: &[u8], out: &mut Vec<u8>) -> Result<(), BlockError> {
        out.resize(self.page_blocks[index].raw_len.get() as usize, 0);
        self.unpack_into(index, stored, out)
    }

    /// Like [`unpack`](Self::unpack), but writes to `out`, whose length must be the raw length.
    ///
    /// # Errors
    /// As for `unpack`. If the checksum differs, `out` is unchanged.
    pub fn unpack_into(&self, index: usize, stored: &[u8], out: &mut [u8]) -> Result<(), BlockError> {
        self.verify(index, checksum(stored))?;
        decompress(self.codec, stored, out).map_err(|reason| BlockError::Decompress {
            index,
            region: self.region,
            reason,
        })
    }

    /// Returns the first page of a page block.
    fn first_page(&self, index: usize) -> u64 {
        let bytes: usize = self.page_blocks[..index].iter().map(|block| block.raw_len.get() as usize).sum();
        let mut pages = bytes / SMALL_PAGE;
        for run in self.runs.iter().filter(|run| run.class == Class::Data) {
            if pages < run.count {
                return (run.first + pages) as u64;
            }
            pages -= run.count;
        }
        0
    }
}

/// Returns the total size of the runs and the page-block table in bytes. Validates all fields that determine the size.
///
/// # Errors
/// [`BlockError`] for an invalid magic number, an unsupported version or a count beyond its limit.
pub fn table_len(header: &Header) -> Result<usize, BlockError> {
    if header.magic != MAGIC {
        return Err(BlockError::Magic(header.magic));
    }
    if header.version != VERSION {
        return Err(BlockError::Version(header.version));
    }
    let (runs, page_blocks) = (usize::from(header.runs.get()), usize::from(header.page_blocks.get()));
    if runs > MAX_RUNS {
        return Err(field("run count", header.runs.get(), "up to 2048"));
    }
    if page_blocks > MAX_PAGE_BLOCKS {
        return Err(field("page-block count", header.page_blocks.get(), "up to 1024"));
    }
    Ok(runs * RUN_LEN + page_blocks * PAGE_BLOCK_LEN)
}

/// Decodes and verifies a header and its table of runs and page blocks. The length of `table` must be [`table_len`].
///
/// # Errors
/// [`BlockError`] for the first invalid field.
pub fn decode_head(header: &Header, table: &[u8]) -> Result<Head, BlockError> {
    if table.len() != table_len(header)? {
        return Err(field("table length", table.len() as u64, "the runs and page blocks of its header"));
    }
    if header_checksum(header, table) != header.checksum.get() {
        return Err(BlockError::HeaderChecksum);
    }
    let kind = match header.kind {
        1 => Kind::Pages,
        2 => Kind::Barrier,
        other => return Err(field("kind", other, "1 (pages) or 2 (barrier)")),
    };
    if header.reserved != 0 || header.reserved2 != [0; 16] {
        let value = header.reserved2.iter().fold(header.reserved, |seen, &byte| seen | byte);
        return Err(field("reserved bytes", value, "0"));
    }
    let codec = Codec::from_byte(header.codec)?;
    if kind == Kind::Barrier && !table.is_empty() {
        return Err(field("table length of a barrier", table.len() as u64, "0"));
    }
    let split = usize::from(header.runs.get()) * RUN_LEN;
    let runs = decode_runs(&table[..split])?;
    let page_blocks = decode_page_blocks(header, codec, &table[split..])?;
    let data: usize = runs.iter().filter(|run| run.class == Class::Data).map(|run| run.count * SMALL_PAGE).sum();
    if data != header.raw_len.get() as usize {
        return Err(field("raw length", header.raw_len.get(), "the data pages of its runs"));
    }
    Ok(Head {
        kind,
        codec,
        region: header.region.get(),
        round: header.round.get(),
        sequence: header.sequence.get(),
        runs,
        page_blocks,
        stored_len: header.stored_len.get() as usize,
    })
}

fn decode_runs(table: &[u8]) -> Result<Vec<Run>, BlockError> {
    let records = <[RunRecord]>::ref_from_bytes(table).map_err(|_| BlockError::HeaderChecksum)?;
    records
        .iter()
        .map(|record| {
            let (first, count) = (record.first.get(), record.count.get());
            if count == 0 || count as usize > MAX_RUN_PAGES {
                return Err(field("run length", count, "1 to 16777216 pages"));
            }
            if first > u64::MAX / (2 * SMALL_PAGE as u64) {
                return Err(field("first page", first, "a page of the region"));
            }
            let class = Class::from_byte(record.class)?;
            if record.reserved != [0; 3] {
                return Err(field("reserved bytes of a run", record.reserved[0], "0"));
            }
            if record.value.get() != 0 && !matches!(class, Class::Pattern | Class::SameAs) {
                return Err(field("value of a run", record.value.get(), "0 for its class"));
            }
            #[expect(clippy::cast_possible_truncation, reason = "64-bit hosts only; bounded above")]
            Ok(Run { first: first as usize, count: count as usize, class, value: record.value.get() })
        })
        .collect()
}

fn decode_page_blocks(header: &Header, codec: Codec, table: &[u8]) -> Result<Vec<PageBlockRecord>, BlockError> {
    let blocks = <[PageBlockRecord]>::ref_from_bytes(table).map_err(|_| BlockError::HeaderChecksum)?;
    let (unit, raw_len) = (header.unit.get() as usize, header.raw_len.get() as usize);
    if raw_len > MAX_RAW {
        return Err(field("raw length", header.raw_len.get(), "up to 4 MiB"));
    }
    if !unit.is_multiple_of(SMALL_PAGE) || unit > MAX_UNIT || (unit == 0 && raw_len > 0) {
        return Err(field("page-block size", header.unit.get(), "a multiple of 4096, up to 1 MiB"));
    }
    if blocks.len() != raw_len.div_ceil(unit.max(1)) {
        return Err(field("page-block count", header.page_blocks.get(), "raw length / page-block size"));
    }
    let mut stored = 0;
    for (index, block) in blocks.iter().enumerate() {
        let raw = (raw_len - index * unit).min(unit);
        if block.raw_len.get() as usize != raw {
            return Err(field("raw length of a page block", block.raw_len.get(), "the page-block size"));
        }
        let len = block.stored_len.get() as usize;
        if len == 0 || len > raw || (codec == Codec::None && len != raw) {
            return Err(field("stored length of a page block", block.stored_len.get(), "1 to its raw length"));
        }
        stored += len;
    }
    if stored != header.stored_len.get() as usize {
        return Err(field("stored length", header.stored_len.get(), "the sum over its page blocks"));
    }
    Ok(blocks.to_vec())
}

fn header_checksum(header: &Header, table: &[u8]) -> u64 {
    let mut hash = Checksum::new();
    hash.update(Header { checksum: U64::ZERO, ..*header }.as_bytes());
    hash.update(table);
    hash.digest()
}

/// Decompresses a verified page block into `out`, whose length is the raw length.
fn decompress(codec: Codec, stored: &[u8], out: &mut [u8]) -> Result<(), String> {
    if stored.len() == out.len() {
        out.copy_from_slice(stored);
        return Ok(());
    }
    let len = match codec {
        Codec::None => return Err("stored uncompressed, but with an invalid length".to_owned()),
        Codec::Lz4 => lz4_flex::block::decompress_into(stored, out).map_err(|error| error.to_string())?,
        Codec::Zstd => zstd::bulk::decompress_to_buffer(stored, out).map_err(|error| error.to_string())?,
    };
    if len == out.len() { Ok(()) } else { Err(format!("{len} bytes, expected {}", out.len())) }
}

/// Builder of storage blocks. Each stream has a separate builder, which reuses its buffers.
#[derive(Debug)]
pub struct Builder {
    codec: Codec,
    page_block: usize,
    storage_block: usize,
    raw: Vec<u8>,
    runs: Vec<RunRecord>,
    packed: Vec<u8>,
    head: Vec<u8>,
}

/// Finished block in two parts, which the caller writes one after the other.
#[derive(Debug)]
pub struct Built<'a> {
    /// Header, runs and page-block table.
    pub head: &'a [u8],
    /// Page blocks.
    pub payload: &'a [u8],
}

impl Builder {
    /// Creates a builder of storage blocks with up to `storage_block` data bytes, in page blocks of `page_block` bytes.
    ///
    /// # Panics
    /// If `page_block` is not a positive multiple of 4 KiB up to [`MAX_UNIT`], or if `storage_block` is not a positive
    /// multiple of `page_block` up to [`MAX_RAW`].
    pub fn new(codec: Codec, page_block: usize, storage_block: usize) -> Self {
        let fits = |len: usize, part: usize, max: usize| len > 0 && len.is_multiple_of(part) && len <= max;
        assert!(fits(page_block, SMALL_PAGE, MAX_UNIT), "page block of {page_block} bytes");
        assert!(fits(storage_block, page_block, MAX_RAW), "storage block of {storage_block} bytes");
        let (raw, runs) = (Vec::with_capacity(storage_block), Vec::with_capacity(MAX_RUNS));
        Self { codec, page_block, storage_block, raw, runs, packed: Vec::new(), head: Vec::new() }
    }

    /// Returns whether the block has no pages.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Returns whether the block may lack space for another page or run.
    pub fn is_full(&self) -> bool {
        self.raw.len() + SMALL_PAGE > self.storage_block || self.runs.len() >= MAX_RUNS
    }

    /// Returns the number of data bytes of the unfinished block, before compression.
    pub fn raw_len(&self) -> usize {
        self.raw.len()
    }

    /// Adds a run of `count` pages, without data. Extends the last run if possible.
    ///
    /// # Panics
    /// If `count` is 0 or exceeds [`MAX_RUN_PAGES`].
    pub fn push_run(&mut self, first: usize, count: usize, class: Class, value: u64) {
        assert!((1..=MAX_RUN_PAGES).contains(&count), "run of {count} pages");
        if let Some(last) = self.runs.last_mut() {
            let (next, sum) = (last.first.get() + u64::from(last.count.get()), last.count.get() as usize + count);
            if last.class == class as u8 && next == first as u64 && last.value.get() == value && sum <= MAX_RUN_PAGES {
                last.count.set(u32::try_from(sum).unwrap_or(u32::MAX));
                return;
            }
        }
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let (first, count, value) = (U64::new(first as u64), U32::new(count), U64::new(value));
        self.runs.push(RunRecord { first, count, class: class as u8, reserved: [0; 3], value });
    }

    /// Copies a page, which may be written concurrently, and adds the copy as data or as a zero page.
    ///
    /// # Safety
    /// `page` must be valid for reading 4 KiB.
    pub unsafe fn push_page(&mut self, number: usize, page: *const u8) {
        let start = self.raw.len();
        self.raw.reserve(SMALL_PAGE);
        // SAFETY: the space after `start` has been reserved and is initialised by the copy, and the caller guarantees
        // that `page` is readable. The copy may be torn by a concurrent write. The write trace then reports the page
        // again, and a later round sends it.
        unsafe {
            std::ptr::copy_nonoverlapping(page, self.raw.as_mut_ptr().add(start), SMALL_PAGE);
            self.raw.set_len(start + SMALL_PAGE);
        }
        if is_zero(&self.raw[start..]) {
            self.raw.truncate(start);
            self.push_run(number, 1, Class::Zero, 0);
        } else {
            self.push_run(number, 1, Class::Data, 0);
        }
    }

    /// Adds a page as data, even if it consists of zeros. Returns the slot of the page: its index among the data pages
    /// of the block.
    pub fn push_data(&mut self, number: usize, contents: &[u8]) -> usize {
        debug_assert!(contents.len() == SMALL_PAGE, "a page of {} bytes", contents.len());
        let slot = self.raw.len() / SMALL_PAGE;
        self.raw.extend_from_slice(contents);
        self.push_run(number, 1, Class::Data, 0);
        slot
    }

    /// Finishes the block and starts a new one.
    pub fn build(&mut self, region: u32, round: u32, sequence: u64) -> Built<'_> {
        self.finish(Kind::Pages, region, round, sequence)
    }

    /// Like [`build`](Self::build), but changes the codec for this block and all later ones.
    pub fn build_with(&mut self, codec: Codec, region: u32, round: u32, sequence: u64) -> Built<'_> {
        self.codec = codec;
        self.build(region, round, sequence)
    }

    /// Builds a barrier, which ends a round on this stream after `sequence` blocks.
    pub fn barrier(&mut self, round: u32, sequence: u64) -> Built<'_> {
        debug_assert!(self.is_empty(), "a block is unfinished");
        self.finish(Kind::Barrier, 0, round, sequence)
    }

    fn finish(&mut self, kind: Kind, region: u32, round: u32, sequence: u64) -> Built<'_> {
        self.head.clear();
        self.head.resize(HEADER_LEN, 0);
        self.head.extend_from_slice(self.runs.as_bytes());
        let raw_len = self.raw.len();
        let stored_len = self.pack();
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            kind: kind as u8,
            codec: self.codec as u8,
            reserved: 0,
            region: U32::new(region),
            runs: U16::new(u16::try_from(self.runs.len()).unwrap_or(u16::MAX)),
            page_blocks: U16::new(u16::try_from(raw_len.div_ceil(self.page_block)).unwrap_or(u16::MAX)),
            unit: U32::new(u32::try_from(self.page_block).unwrap_or(0)),
            raw_len: U32::new(u32::try_from(raw_len).unwrap_or(u32::MAX)),
            stored_len: U32::new(u32::try_from(stored_len).unwrap_or(u32::MAX)),
            round: U32::new(round),
            sequence: U64::new(sequence),
            reserved2: [0; 16],
            checksum: U64::ZERO,
        };
        let checksum = U64::new(header_checksum(&header, &self.head[HEADER_LEN..]));
        self.head[..HEADER_LEN].copy_from_slice(Header { checksum, ..header }.as_bytes());
        self.runs.clear();
        if self.codec == Codec::None {
            // Without compression, the raw bytes are the payload. They stay valid until the next page is added.
            std::mem::swap(&mut self.raw, &mut self.packed);
        }
        self.raw.clear();
        Built { head: &self.head, payload: &self.packed }
    }

    /// Compresses the page blocks and appends their table to the head. Returns the size of the payload.
    fn pack(&mut self) -> usize {
        let mut total = 0;
        self.packed.clear();
        for raw in self.raw.chunks(self.page_block) {
            let stored = if self.codec == Codec::None {
                raw
            } else {
                let start = self.packed.len();
                compress(self.codec, raw, &mut self.packed);
                &self.packed[start..]
            };
            total += stored.len();
            let record = PageBlockRecord {
                raw_len: U32::new(u32::try_from(raw.len()).unwrap_or(u32::MAX)),
                stored_len: U32::new(u32::try_from(stored.len()).unwrap_or(u32::MAX)),
                checksum: U64::new(checksum(stored)),
            };
            self.head.extend_from_slice(record.as_bytes());
        }
        total
    }
}

/// Appends the compressed form of `raw` to `out`, or `raw` itself if compression does not make it smaller.
fn compress(codec: Codec, raw: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    let bound = match codec {
        Codec::None => 0,
        Codec::Lz4 => lz4_flex::block::get_maximum_output_size(raw.len()),
        Codec::Zstd => zstd::zstd_safe::compress_bound(raw.len()),
    };
    out.resize(start + bound, 0);
    let len = match codec {
        Codec::None => None,
        Codec::Lz4 => lz4_flex::block::compress_into(raw, &mut out[start..]).ok(),
        Codec::Zstd => zstd::bulk::compress_to_buffer(raw, &mut out[start..], 1).ok(),
    };
    match len.filter(|&len| len < raw.len()) {
        Some(len) => out.truncate(start + len),
        None => {
            out.truncate(start);
            out.extend_from_slice(raw);
        }
    }
}

/// Returns whether all bytes are zero. Checks the first 64 bytes first, which contain a non-zero byte in most other
/// pages.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (head, tail) = bytes.split_at(bytes.len().min(64));
    // The check of 256 bytes has no branches, so that the compiler can vectorise it.
    head.iter().all(|&byte| byte == 0)
        && tail.chunks(256).all(|chunk| chunk.iter().fold(0, |seen, &byte| seen | byte) == 0)
}
