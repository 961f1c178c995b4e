//! Tests of block headers with valid checksums but invalid fields, as a hostile peer may send them or a file may
//! contain them. Each header is rejected with an error that names the field.

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{
    self, BlockError, Class, HEADER_LEN, Head, Header, MAX_PAGE_BLOCKS, MAX_RAW, MAX_RUN_PAGES, MAX_RUNS, MAX_UNIT,
    PageBlockRecord, RunRecord,
};
use proptest::prelude::*;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const PAGE: u32 = 4096;

/// Parts of a block, which are valid until a test changes one of them.
#[derive(Clone)]
struct Forged {
    header: Header,
    runs: Vec<RunRecord>,
    blocks: Vec<PageBlockRecord>,
}

fn run(first: u64, count: u32, class: u8) -> RunRecord {
    RunRecord { first: U64::new(first), count: U32::new(count), class, reserved: [0; 3], value: U64::ZERO }
}

fn page_block(raw_len: u32, stored_len: u32) -> PageBlockRecord {
    PageBlockRecord { raw_len: U32::new(raw_len), stored_len: U32::new(stored_len), checksum: U64::ZERO }
}

/// Creates a block of three data pages, in page blocks of two pages.
fn forged(codec: u8) -> Forged {
    let blocks = vec![page_block(2 * PAGE, 2 * PAGE), page_block(PAGE, PAGE)];
    let mut header = Header::new_zeroed();
    header.magic = block::MAGIC;
    header.version = block::VERSION;
    header.kind = 1;
    header.codec = codec;
    header.unit = U32::new(2 * PAGE);
    header.raw_len = U32::new(3 * PAGE);
    header.stored_len = U32::new(3 * PAGE);
    let mut block = Forged { header, runs: vec![run(5, 3, Class::Data as u8)], blocks };
    block.count();
    block
}

impl Forged {
    fn count(&mut self) {
        self.header.runs = U16::new(u16::try_from(self.runs.len()).unwrap());
        self.header.page_blocks = U16::new(u16::try_from(self.blocks.len()).unwrap());
    }

    fn table(&self) -> Vec<u8> {
        [self.runs.as_bytes(), self.blocks.as_bytes()].concat()
    }

    /// Computes the checksum of the header, and decodes the block.
    fn decode(&self) -> Result<Head, BlockError> {
        let table = self.table();
        let mut header = self.header;
        header.checksum = U64::ZERO;
        let mut hash = Xxh3Default::new();
        hash.update(header.as_bytes());
        hash.update(&table);
        header.checksum = U64::new(hash.digest());
        block::table_len(&header)?;
        block::decode_head(&header, &table)
    }

    fn refused(&self) -> &'static str {
        match self.decode() {
            Err(BlockError::Field { field, .. }) => field,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn valid_block_is_accepted() {
    for codec in 0..3 {
        forged(codec).decode().expect("a valid block");
    }
}

/// Change to a block, and the field that the error must name.
type Change = (fn(&mut Forged), &'static str);

#[test]
fn every_invalid_field_is_named() {
    let changes: [Change; 22] = [
        (|block| block.header.kind = 0, "kind"),
        (|block| block.header.kind = 3, "kind"),
        (|block| block.header.codec = 3, "codec"),
        (|block| block.header.reserved = 1, "reserved bytes"),
        (|block| block.header.reserved2[15] = 1, "reserved bytes"),
        (|block| block.header.unit = U32::ZERO, "page-block size"),
        (|block| block.header.unit = U32::new(PAGE + 1), "page-block size"),
        (|block| block.header.unit = U32::new(u32::MAX - PAGE + 1), "page-block size"),
        (|block| block.header.unit = U32::new(PAGE), "page-block count"),
        (|block| block.header.raw_len = U32::new(u32::MAX), "raw length"),
        (|block| block.header.raw_len = U32::new(4 * PAGE), "raw length of a page block"),
        (|block| block.header.raw_len = U32::new(3 * PAGE - 1), "raw length of a page block"),
        (|block| block.header.stored_len = U32::new(3 * PAGE - 1), "stored length"),
        (|block| block.header.stored_len = U32::new(u32::MAX), "stored length"),
        (|block| block.blocks[0].raw_len = U32::new(PAGE), "raw length of a page block"),
        (|block| block.blocks[1].stored_len = U32::ZERO, "stored length of a page block"),
        (|block| block.blocks[1].stored_len = U32::new(PAGE + 1), "stored length of a page block"),
        (|block| block.runs[0].count = U32::ZERO, "run length"),
        (|block| block.runs[0].first = U64::new(u64::MAX - 1), "first page"),
        (|block| block.runs[0].class = 5, "page class"),
        (|block| block.runs[0].reserved[2] = 9, "reserved bytes of a run"),
        (|block| block.runs[0].value = U64::new(1), "value of a run"),
    ];
    for (number, (change, field)) in changes.into_iter().enumerate() {
        for codec in 0..3 {
            let mut block = forged(codec);
            change(&mut block);
            // Without a codec, an earlier check requires that stored lengths equal raw lengths. Its error names the
            // same field.
            assert_eq!(block.refused(), field, "change {number}, codec {codec}");
        }
    }
}

#[test]
fn uncompressed_page_blocks_have_their_whole_length() {
    let mut block = forged(0);
    block.blocks[0].stored_len = U32::new(PAGE);
    block.header.stored_len = U32::new(2 * PAGE);
    assert_eq!(block.refused(), "stored length of a page block");
    block.header.codec = 1;
    block.decode().expect("compressed blocks may be shorter");
}

#[test]
fn raw_length_must_match_the_runs() {
    for runs in [vec![run(5, 2, 4)], vec![run(5, 4, 4)], vec![run(5, 3, 1)], vec![run(5, 3, 4), run(5, 3, 4)], vec![]] {
        let mut block = forged(0);
        block.runs = runs;
        block.count();
        assert_eq!(block.refused(), "raw length");
    }
}

/// Runs of maximum length do not overflow the sum of the lengths.
#[test]
fn sums_of_huge_runs_do_not_overflow() {
    let mut block = forged(0);
    block.runs = vec![run(u64::from(u32::MAX), u32::try_from(MAX_RUN_PAGES).unwrap(), 4); MAX_RUNS];
    block.count();
    assert_eq!(block.refused(), "raw length");
    block.runs = vec![run(0, u32::MAX, 4)];
    block.count();
    assert_eq!(block.refused(), "run length");
}

#[test]
fn oversized_tables_are_rejected_before_they_are_read() {
    let mut header = forged(0).header;
    header.runs = U16::new(u16::MAX);
    assert!(matches!(block::table_len(&header), Err(BlockError::Field { field: "run count", .. })));
    header.runs = U16::new(1);
    header.page_blocks = U16::new(u16::MAX);
    assert!(matches!(block::table_len(&header), Err(BlockError::Field { field: "page-block count", .. })));
}

#[test]
fn wrong_magic_and_version_are_named() {
    let mut block = forged(0);
    block.header.version = block::VERSION + 1;
    assert_eq!(block.decode().map(drop), Err(BlockError::Version(block::VERSION + 1)));
    block.header.magic = *b"HTTP";
    assert_eq!(block.decode().map(drop), Err(BlockError::Magic(*b"HTTP")));
}

#[test]
fn barrier_with_pages_is_rejected() {
    let mut block = forged(0);
    block.header.kind = 2;
    assert_eq!(block.refused(), "table length of a barrier");
}

#[test]
fn table_of_wrong_length_is_rejected() {
    let block = forged(0);
    for table in [&block.table()[..10], &[block.table(), vec![0; 8]].concat()] {
        assert!(block::decode_head(&block.header, table).is_err());
    }
}

type Pack = fn(&[u8]) -> Vec<u8>;

/// Compressed bytes are rejected if their decompressed length differs from that in the header.
#[test]
fn wrong_decompressed_length_is_rejected() {
    let raw = vec![7; 3 * SMALL_PAGE];
    let pack: [(u8, Pack); 2] =
        [(1, |raw| lz4_flex::block::compress(raw)), (2, |raw| zstd::bulk::compress(raw, 1).unwrap())];
    for (codec, compress) in pack {
        for len in [SMALL_PAGE - 1, 1, SMALL_PAGE + 1, 3 * SMALL_PAGE] {
            let stored = compress(&raw[..len]);
            assert!(stored.len() < SMALL_PAGE);
            let error = unpack(codec, &stored).expect_err("an invalid length");
            assert!(matches!(error, BlockError::Decompress { index: 0, region: 0, .. }), "{error}");
        }
        unpack(codec, &compress(&raw[..SMALL_PAGE])).expect("a valid length");
        unpack(codec, b"no codec ever wrote this").expect_err("uncompressed bytes");
    }
}

/// Unpacks a block that has a valid header and consists of one page, whose stored bytes are `stored`.
fn unpack(codec: u8, stored: &[u8]) -> Result<Vec<u8>, BlockError> {
    let mut block = forged(codec);
    block.runs[0].count = U32::new(1);
    block.header.raw_len = U32::new(PAGE);
    block.header.stored_len = U32::new(u32::try_from(stored.len()).unwrap());
    block.blocks = vec![page_block(PAGE, block.header.stored_len.get())];
    block.blocks[0].checksum = U64::new(xxh3_64(stored));
    block.count();
    let (head, mut out) = (block.decode()?, Vec::new());
    head.unpack(0, stored, &mut out).map(|()| out)
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![Just(PAGE), any::<u32>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Any header with a valid checksum is either rejected or within all bounds.
    #[test]
    fn accepted_headers_are_bounded(
        noise in prop::array::uniform32(any::<u8>()),
        runs in prop::collection::vec((any::<u64>(), prop_oneof![0u32..5, any::<u32>()], 0u8..6), 0..4),
        blocks in prop::collection::vec((length(), length()), 0..4),
        small in any::<bool>(),
    ) {
        let mut bytes = [0; HEADER_LEN];
        bytes[..32].copy_from_slice(&noise);
        let mut header = Header::read_from_bytes(&bytes).unwrap();
        (header.magic, header.version, header.reserved) = (block::MAGIC, block::VERSION, 0);
        (header.kind, header.codec) = (header.kind % 4, header.codec % 4);
        let place = |first| if small { first % 99 } else { first };
        let mut forged = Forged {
            header,
            runs: runs.into_iter().map(|(first, count, class)| run(place(first), count, class)).collect(),
            blocks: blocks.into_iter().map(|(raw, stored)| page_block(raw, stored)).collect(),
        };
        forged.count();
        if small {
            forged.header.unit = U32::new(PAGE);
            forged.header.raw_len = U32::new(PAGE * u32::try_from(forged.blocks.len()).unwrap());
            let stored = forged.blocks.iter().map(|block| block.stored_len.get());
            forged.header.stored_len = U32::new(stored.fold(0, u32::wrapping_add));
        }
        if let Ok(head) = forged.decode() {
            prop_assert!(head.runs.len() <= MAX_RUNS && head.page_blocks.len() <= MAX_PAGE_BLOCKS);
            prop_assert!(head.stored_len <= MAX_RAW);
            let data: usize = head.runs.iter().filter(|run| run.class == Class::Data).map(|run| run.count).sum();
            let raw: usize = head.page_blocks.iter().map(|block| block.raw_len.get() as usize).sum();
            prop_assert_eq!(data * SMALL_PAGE, raw);
            prop_assert!(raw <= MAX_RAW);
            prop_assert!(head.page_blocks.iter().all(|block| block.raw_len.get() as usize <= MAX_UNIT));
            prop_assert!(head.runs.iter().all(|run| run.count > 0 && run.first.checked_add(run.count).is_some()));
        }
    }
}

proptest! {
    /// Noise with a valid checksum is rejected or decompresses to one page.
    #[test]
    fn compressed_noise_is_rejected_or_bounded(
        codec in 1u8..3,
        mut stored in prop::collection::vec(any::<u8>(), 1..600),
        frame in any::<bool>(),
    ) {
        if frame && codec == 2 {
            let start = zstd::bulk::compress(&[1; SMALL_PAGE], 1).unwrap();
            let len = stored.len().min(start.len() - 3);
            stored[..len].copy_from_slice(&start[..len]);
        }
        if let Ok(page) = unpack(codec, &stored) {
            prop_assert_eq!(page.len(), SMALL_PAGE);
        }
    }
}
