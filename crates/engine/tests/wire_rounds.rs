//! Tests of rounds over sockets: after each barrier, the destination equals the source.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use pageferry_engine::block::Codec;
use pageferry_engine::mapping::Mapping;
use pageferry_engine::pages::PageSet;
use pageferry_engine::wire::{BlockReceiver, BlockSender, Progress};
use pageferry_engine::{SLOTS, SMALL_PAGE};
use proptest::prelude::*;

mod memory;
use memory::{TIMEOUT, contents, ends, fill, format, placer, small_file, target};

/// Number of pages of each region: not a multiple of 2 MiB, more than one share of a stream, and one.
const REGIONS: [usize; 3] = [SLOTS + 37, 4 * SLOTS + 3, 1];

#[derive(Debug, Clone)]
enum Change {
    /// Write that fills pages with a byte; 0 makes them zero pages.
    Write { region: usize, first: prop::sample::Index, count: usize, byte: u8 },
    /// Freeing of pages, which no trace reports.
    Punch { region: usize, first: prop::sample::Index, count: usize },
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let count = prop_oneof![3 => 1usize..4, 1 => 1usize..700];
    let place = || (0..REGIONS.len(), any::<prop::sample::Index>(), count.clone());
    let byte = prop_oneof![1 => Just(0u8), 2 => any::<u8>()];
    let write = (place(), byte).prop_map(|((region, first, count), byte)| Change::Write { region, first, count, byte });
    let punch = place().prop_map(|(region, first, count)| Change::Punch { region, first, count });
    prop::collection::vec(prop_oneof![4 => write, 1 => punch], 0..12)
}

/// Applies the changes. Returns the pages that a write trace would report.
fn apply(source: &[Arc<Mapping>], changes: &[Change]) -> Vec<PageSet> {
    let mut dirty: Vec<_> = source.iter().map(|mapping| PageSet::new(mapping.pages())).collect();
    for change in changes {
        match change {
            Change::Write { region, first, count, byte } => {
                let first = first.index(REGIONS[*region]);
                let end = (first + count).min(REGIONS[*region]);
                (first..end).for_each(|page| fill(&source[*region], page, *byte));
                dirty[*region].insert(first, end);
            }
            Change::Punch { region, first, count } => {
                let first = first.index(REGIONS[*region]);
                let end = (first + count).min(REGIONS[*region]);
                source[*region].punch(first * SMALL_PAGE, (end - first) * SMALL_PAGE).expect("a hole");
                dirty[*region].remove(first, end);
            }
        }
    }
    dirty
}

fn round(sender: &BlockSender, receiver: &BlockReceiver, source: &[Arc<Mapping>], sets: &[PageSet], number: u32) {
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(number));
        sender.send(source, sets, number, true).expect("a round sent");
        receiving.join().expect("the thread panicked").expect("a round received");
    });
}

fn counted(progress: &Progress) -> [u64; 5] {
    let Progress { bytes, blocks, data, zero, absent, .. } = progress;
    [bytes, blocks, data, zero, absent].map(|counter| counter.load(Ordering::Relaxed))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn destination_is_source_after_each_barrier(
        codec in prop_oneof![Just(Codec::None), Just(Codec::Lz4), Just(Codec::Zstd)],
        streams in prop_oneof![Just(1usize), Just(2), Just(4)],
        before in changes(),
        rounds in prop::collection::vec(changes(), 1..4),
    ) {
        let source = REGIONS.map(small_file);
        let copies = REGIONS.map(small_file);
        let placer = placer(copies.iter().map(target).collect());
        let (sender, receiver) = ends(streams, format(codec), &placer, TIMEOUT);
        apply(&source, &before);
        let mut sets = REGIONS.map(PageSet::full).to_vec();
        for (number, changes) in (0..).zip(std::iter::once(&Vec::new()).chain(&rounds)) {
            let dirty = apply(&source, changes);
            if number > 0 {
                sets = dirty;
            }
            round(&sender, &receiver, &source, &sets, number);
            prop_assert_eq!(placer.missing(), 0);
            for (ours, theirs) in source.iter().zip(&copies) {
                let (ours, theirs) = (contents(ours), contents(theirs));
                let differing = ours.chunks(SMALL_PAGE).zip(theirs.chunks(SMALL_PAGE)).position(|(a, b)| a != b);
                prop_assert_eq!(differing, None, "round {}", number);
            }
        }
        prop_assert_eq!(counted(sender.progress()), counted(receiver.progress()));
    }
}

/// Holes are detected without reading: neither source nor destination allocates pages for them.
#[test]
fn holes_are_not_allocated() {
    let (source, copy) = (small_file(64 * SLOTS), small_file(64 * SLOTS));
    fill(&source, 9 * SLOTS, 1);
    let placer = placer(vec![target(&copy)]);
    let (sender, receiver) = ends(2, format(Codec::None), &placer, TIMEOUT);
    round(&sender, &receiver, std::slice::from_ref(&source), &[PageSet::full(64 * SLOTS)], 0);
    assert_eq!((memory::allocated(&source), memory::allocated(&copy)), (4096, 4096));
    let progress = receiver.progress();
    assert_eq!(counted(progress)[2..], [1, 0, 64 * 512 - 1]);
}

/// A part of a round that is sent without a barrier does not end the round.
#[test]
fn round_may_be_sent_in_parts() {
    let (source, copy) = (small_file(600), small_file(600));
    let placer = placer(vec![target(&copy)]);
    let (sender, receiver) = ends(2, format(Codec::Lz4), &placer, TIMEOUT);
    (0..600).for_each(|page| fill(&source, page, 7));
    let (mut first, mut second) = (PageSet::new(600), PageSet::new(600));
    first.insert(0, 300);
    second.insert(300, 600);
    let regions = [source.clone()];
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(4));
        sender.send(&regions, &[first], 4, false).expect("a part sent");
        sender.send(&regions, &[second], 4, true).expect("the remaining part sent");
        receiving.join().expect("the thread panicked").expect("a round received");
    });
    assert_eq!(contents(&source), contents(&copy));
}

#[test]
fn empty_lists_of_sockets_are_rejected() {
    let placer = placer(vec![target(&small_file(1))]);
    assert!(BlockSender::new(Vec::<OwnedFd>::new(), format(Codec::None), TIMEOUT).is_err());
    assert!(BlockReceiver::new(Vec::<OwnedFd>::new(), placer, TIMEOUT).is_err());
}
