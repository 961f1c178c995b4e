//! Tests of storage blocks: blocks are decoded as they were built, and damaged blocks are rejected.

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{self, BlockError, Builder, Class, Codec, HEADER_LEN, Head, Header, Kind, Run};
use proptest::prelude::*;
use zerocopy::FromBytes;

/// Page of a block: number, class, value, and seed and kind of its contents.
#[derive(Debug, Clone)]
struct Page {
    number: usize,
    class: Class,
    value: u64,
    seed: u64,
    filler: Filler,
}

#[derive(Debug, Clone, Copy)]
enum Filler {
    /// Repeated byte.
    Same,
    /// Byte that changes every 64 bytes.
    Steps,
    /// Incompressible contents.
    Noise,
}

fn content(page: &Page) -> Vec<u8> {
    let mut word = page.seed | 1;
    let mut next = || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()[3]
    };
    let first = page.seed.to_le_bytes()[0].max(1);
    match page.filler {
        Filler::Same => vec![first; SMALL_PAGE],
        Filler::Steps => (0..SMALL_PAGE).map(|at| first.wrapping_add(u8::try_from(at / 64).unwrap())).collect(),
        Filler::Noise => (0..SMALL_PAGE).map(|_| next()).collect(),
    }
}

fn pages() -> impl Strategy<Value = Vec<Page>> {
    let class = prop_oneof![
        4 => Just(Class::Data),
        2 => Just(Class::Zero),
        1 => Just(Class::Absent),
        1 => Just(Class::Pattern),
        1 => Just(Class::SameAs),
    ];
    let filler = prop_oneof![Just(Filler::Same), Just(Filler::Steps), Just(Filler::Noise)];
    let page = (1usize..4, class, any::<u64>(), any::<u64>(), filler);
    prop::collection::vec(page, 1..60).prop_map(|steps| {
        let mut number = 0;
        let page = |(step, class, value, seed, filler)| {
            number += step;
            let value = if matches!(class, Class::Pattern | Class::SameAs) { value % 3 } else { 0 };
            Page { number, class, value, seed, filler }
        };
        steps.into_iter().map(page).collect()
    })
}

fn codecs() -> impl Strategy<Value = Codec> {
    prop_oneof![Just(Codec::None), Just(Codec::Lz4), Just(Codec::Zstd)]
}

fn push(builder: &mut Builder, page: &Page) {
    match page.class {
        // SAFETY: the vector has the length of a page.
        Class::Data => unsafe { builder.push_page(page.number, content(page).as_ptr()) },
        class => builder.push_run(page.number, 1, class, page.value),
    }
}

fn build(builder: &mut Builder, pages: &[Page]) -> Vec<u8> {
    pages.iter().for_each(|page| push(builder, page));
    let built = builder.build(3, 7, 11);
    [built.head, built.payload].concat()
}

/// Decodes a whole block as a receiver does. Returns the head, the contents of its pages, and the number of remaining
/// bytes.
fn parse(bytes: &[u8]) -> Result<(Head, Vec<u8>, usize), BlockError> {
    let (header, rest) = Header::read_from_prefix(bytes).map_err(|_| BlockError::HeaderChecksum)?;
    let len = block::table_len(&header)?;
    let head = block::decode_head(&header, rest.get(..len).ok_or(BlockError::HeaderChecksum)?)?;
    let (mut raw, mut scratch, mut at) = (Vec::new(), Vec::new(), HEADER_LEN + len);
    for index in 0..head.page_blocks.len() {
        let end = at + head.page_blocks[index].stored_len.get() as usize;
        let stored = bytes.get(at..end).ok_or(BlockError::HeaderChecksum)?;
        head.unpack(index, stored, &mut scratch)?;
        raw.extend_from_slice(&scratch);
        at = end;
    }
    Ok((head, raw, at))
}

/// Returns the number, class, value and contents of each page of a block.
fn unrolled(head: &Head, raw: &[u8]) -> Vec<(usize, Class, u64, Vec<u8>)> {
    let mut chunks = raw.chunks(SMALL_PAGE);
    let one =
        |run: &Run| (run.first..run.first + run.count).map(|page| (page, run.class, run.value)).collect::<Vec<_>>();
    let pages = head.runs.iter().flat_map(one);
    pages.map(|(page, class, value)| (page, class, value, bytes_of(class, &mut chunks))).collect()
}

fn bytes_of<'a>(class: Class, chunks: &mut impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    if class == Class::Data { chunks.next().expect("bytes for every data page").to_vec() } else { Vec::new() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The builder is reused for a second block, which must not contain data of the first block.
    #[test]
    fn decoded_block_equals_built_block(codec in codecs(), unit in 1usize..5, first in pages(), second in pages()) {
        let mut builder = Builder::new(codec, unit * SMALL_PAGE, unit * SMALL_PAGE * 64);
        for pages in [&first, &second] {
            let bytes = build(&mut builder, pages);
            let (head, raw, end) = parse(&bytes).expect("a whole block");
            prop_assert_eq!(end, bytes.len());
            prop_assert_eq!((head.kind, head.codec, head.region), (Kind::Pages, codec, 3));
            prop_assert_eq!((head.round, head.sequence), (7, 11));
            let expected: Vec<_> = pages.iter().map(|page| {
                let bytes = if page.class == Class::Data { content(page) } else { Vec::new() };
                (page.number, page.class, page.value, bytes)
            }).collect();
            prop_assert_eq!(unrolled(&head, &raw), expected);
            prop_assert!(head.runs.len() <= pages.len());
        }
    }

    #[test]
    fn truncated_block_is_rejected(codec in codecs(), pages in pages(), cut in any::<prop::sample::Index>()) {
        let mut builder = Builder::new(codec, 2 * SMALL_PAGE, 64 * SMALL_PAGE);
        let bytes = build(&mut builder, &pages);
        prop_assert!(parse(&bytes[..cut.index(bytes.len())]).is_err());
    }

    /// Any bytes are either rejected or decoded within all bounds, without a panic.
    #[test]
    fn noise_is_rejected_or_bounded(mut bytes in prop::collection::vec(any::<u8>(), 0..400), honest in 0usize..6) {
        let start = [&block::MAGIC[..], &[block::VERSION]].concat();
        let known = honest.min(bytes.len()).min(start.len());
        bytes[..known].copy_from_slice(&start[..known]);
        prop_assert!(parse(&bytes).is_err());
    }
}

/// Every byte of a block is changed, in one bit or completely. Every change must be detected.
#[test]
fn every_changed_byte_is_detected() {
    let page = |number, class, filler| Page { number, class, value: 0, seed: 77, filler };
    let pages = [
        page(4, Class::Data, Filler::Steps),
        page(5, Class::Zero, Filler::Same),
        page(6, Class::Data, Filler::Noise),
        page(9, Class::Absent, Filler::Same),
        page(10, Class::Data, Filler::Same),
    ];
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let mut builder = Builder::new(codec, SMALL_PAGE, 8 * SMALL_PAGE);
        let whole = build(&mut builder, &pages);
        let table = whole.len() - parse(&whole).expect("whole").0.stored_len;
        let mut changed = whole.clone();
        for at in 0..whole.len() {
            // Change each bit of parsed bytes, and all bits. Of bytes that are only hashed, change the lowest bit, the
            // highest bit, and all bits.
            let bits: &[u8] = if at < table { &[1, 2, 4, 8, 16, 32, 64, 128, 255] } else { &[1, 128, 255] };
            for &pattern in bits {
                changed[at] ^= pattern;
                let error = parse(&changed).expect_err("a damaged block");
                let expected = match at {
                    0..4 => matches!(error, BlockError::Magic(_)),
                    4 => matches!(error, BlockError::Version(_)),
                    _ if at < table => matches!(error, BlockError::HeaderChecksum | BlockError::Field { .. }),
                    _ => matches!(error, BlockError::PayloadChecksum { .. }),
                };
                assert!(expected, "{codec:?}: byte {at} of {}, {pattern:#x}: {error}", whole.len());
                changed[at] = whole[at];
            }
        }
    }
}

/// The error for a damaged page block names its first page.
#[test]
fn damaged_page_is_named() {
    let mut builder = Builder::new(Codec::None, 2 * SMALL_PAGE, 16 * SMALL_PAGE);
    let page = |number| Page { number, class: Class::Data, value: 0, seed: 9, filler: Filler::Noise };
    let mut bytes = build(&mut builder, &[page(10), page(11), page(12), page(90), page(91), page(92)]);
    *bytes.last_mut().expect("not empty") ^= 1;
    let expected = BlockError::PayloadChecksum { index: 2, page: 91, region: 3 };
    assert_eq!(parse(&bytes).map(drop), Err(expected));
}

#[test]
fn runs_are_joined_up_to_the_maximum() {
    let mut builder = Builder::new(Codec::None, SMALL_PAGE, SMALL_PAGE);
    builder.push_run(0, block::MAX_RUN_PAGES, Class::Absent, 0);
    builder.push_run(block::MAX_RUN_PAGES, 5, Class::Absent, 0);
    builder.push_run(block::MAX_RUN_PAGES + 5, 1, Class::Absent, 0);
    let built = builder.build(0, 0, 0);
    let (head, ..) = parse(&[built.head, built.payload].concat()).expect("whole");
    let lengths: Vec<_> = head.runs.iter().map(|run| (run.first, run.count)).collect();
    assert_eq!(lengths, [(0, block::MAX_RUN_PAGES), (block::MAX_RUN_PAGES, 6)]);
}

#[test]
fn block_with_maximum_runs_is_full_and_decodes() {
    let mut builder = Builder::new(Codec::Lz4, SMALL_PAGE, 8 * SMALL_PAGE);
    let mut page = 0;
    while !builder.is_full() {
        builder.push_run(page, 1, Class::Zero, 0);
        page += 2;
    }
    let built = builder.build(0, 0, 0);
    let (head, ..) = parse(&[built.head, built.payload].concat()).expect("whole");
    assert_eq!(head.runs.len(), block::MAX_RUNS);
}

#[test]
fn barrier_contains_round_and_sequence() {
    let mut builder = Builder::new(Codec::Zstd, SMALL_PAGE, SMALL_PAGE);
    let built = builder.barrier(5, 1 << 40);
    let (head, raw, end) = parse(built.head).expect("whole");
    assert_eq!((head.kind, head.round, head.sequence), (Kind::Barrier, 5, 1 << 40));
    assert_eq!((raw.len(), end, built.payload.len()), (0, HEADER_LEN, 0));
}

/// A single non-zero byte is detected at every position of a page, and at the end of slices whose lengths are near the
/// widths of the comparison.
#[test]
fn zero_detection_is_exact() {
    let mut bytes = vec![0; SMALL_PAGE];
    assert!(block::is_zero(&[]) && block::is_zero(&bytes));
    for at in 0..SMALL_PAGE {
        bytes[at] = 1 << (at % 8);
        assert!(!block::is_zero(&bytes), "byte {at}");
        bytes[at] = 0;
    }
    for len in [1, 2, 63, 64, 65, 127, 128, 255, 256, 257, 319, 320, 321, 575, 576, 577] {
        assert!(block::is_zero(&bytes[..len]));
        bytes[len - 1] = 0x80;
        assert!(!block::is_zero(&bytes[..len]), "last of {len}");
        assert!(block::is_zero(&bytes[..len - 1]), "all but the last of {len}");
        bytes[len - 1] = 0;
    }
}
