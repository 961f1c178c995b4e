//! Tests of hostile, failing and stalled peers: each causes an error in bounded time, and no writes outside the
//! regions.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{BlockError, Builder, Class, Codec};
use pageferry_engine::mapping::Mapping;
use pageferry_engine::pages::PageSet;
use pageferry_engine::placer::{PlaceError, Placer};
use pageferry_engine::wire::{BlockReceiver, BlockSender, WireError};
use proptest::prelude::*;

mod memory;
use memory::{TIMEOUT, contents, fill, format, page, placer, small_file, target};

const PAGES: usize = 8;
/// Duration within which each operation must end.
const DEADLINE: Duration = Duration::from_secs(10);

/// Region between two guard pages, in one file.
struct Guarded {
    all: Arc<Mapping>,
    region: Arc<Mapping>,
}

impl Guarded {
    fn new() -> Self {
        let all = small_file(PAGES + 2);
        (0..PAGES + 2).for_each(|page| fill(&all, page, 0x5a));
        let inner = Mapping::new(std::os::fd::AsFd::as_fd(&*all), PAGES * SMALL_PAGE, SMALL_PAGE as u64);
        Self { all, region: Arc::new(inner.expect("a mapping")) }
    }

    fn check(&self) {
        for guard in [0, PAGES + 1] {
            assert!(page(&self.all, guard).iter().all(|&byte| byte == 0x5a), "guard page {guard} was written");
        }
    }
}

/// Feeds bytes to a receiver of round 0 and closes the stream. Returns the result of the receiver.
fn feed(bytes: &[u8]) -> Result<(), WireError> {
    let guarded = Guarded::new();
    let placer = placer(vec![target(&guarded.region)]);
    let ended = feed_into(&placer, bytes);
    guarded.check();
    ended
}

fn feed_into(placer: &Arc<Placer>, bytes: &[u8]) -> Result<(), WireError> {
    let (mut peer, ours) = UnixStream::pair().expect("sockets");
    let receiver = BlockReceiver::new(vec![OwnedFd::from(ours)], placer.clone(), TIMEOUT).expect("a receiver");
    let begin = Instant::now();
    let ended = thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(0));
        // Ignore errors: the receiver may have failed and closed the socket.
        let _ = peer.write_all(bytes);
        drop(peer);
        receiving.join().expect("the thread panicked")
    });
    assert!(begin.elapsed() < DEADLINE);
    ended
}

/// Builds a block with the contents that `make` adds, followed by a barrier.
fn block(codec: Codec, region: u32, round: u32, sequence: u64, make: impl Fn(&mut Builder)) -> Vec<u8> {
    let mut builder = Builder::new(codec, 2 * SMALL_PAGE, 16 * SMALL_PAGE);
    make(&mut builder);
    let built = builder.build(region, round, sequence);
    let mut bytes = [built.head, built.payload].concat();
    let barrier = Builder::new(codec, SMALL_PAGE, SMALL_PAGE).barrier(round, sequence + 1).head.to_vec();
    bytes.extend(barrier);
    bytes
}

fn data(first: usize, count: usize) -> impl Fn(&mut Builder) {
    let bytes = vec![3; SMALL_PAGE];
    // SAFETY: the vector has the length of a page, and lives as long as the closure.
    move |builder| (first..first + count).for_each(|page| unsafe { builder.push_page(page, bytes.as_ptr()) })
}

#[test]
fn valid_stream_is_accepted() {
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        feed(&block(codec, 0, 0, 0, data(0, PAGES))).expect("a valid block");
    }
}

#[test]
fn pages_outside_the_regions_are_rejected() {
    for codec in [Codec::None, Codec::Lz4] {
        for (region, first, count) in [(0, PAGES - 1, 2), (0, PAGES, 1), (0, usize::MAX >> 14, 1)] {
            let ended = feed(&block(codec, region, 0, 0, data(first, count)));
            assert!(matches!(ended, Err(WireError::Place(PlaceError::Pages { .. }))), "{ended:?}");
        }
        for region in [1, u32::MAX] {
            let ended = feed(&block(codec, region, 0, 0, data(0, 1)));
            assert!(matches!(ended, Err(WireError::Place(PlaceError::Region(..)))), "{ended:?}");
        }
        for class in [Class::Zero, Class::Absent] {
            let ended = feed(&block(codec, 0, 0, 0, |builder| builder.push_run(PAGES - 1, 1 << 24, class, 0)));
            assert!(matches!(ended, Err(WireError::Place(PlaceError::Pages { .. }))), "{ended:?}");
        }
    }
}

#[test]
fn overlapping_runs_are_rejected() {
    let run = |first, count, class| move |builder: &mut Builder| builder.push_run(first, count, class, 0);
    for second in [run(0, PAGES, Class::Zero), run(3, 1, Class::Zero), run(0, 1, Class::Absent)] {
        let ended = feed(&block(Codec::None, 0, 0, 0, |builder| {
            builder.push_run(0, 4, Class::Absent, 0);
            second(builder);
        }));
        assert!(matches!(ended, Err(WireError::Block(BlockError::Field { field: "page", .. }))), "{ended:?}");
    }
    let apart = block(Codec::None, 0, 0, 0, |builder| {
        builder.push_run(4, 4, Class::Absent, 0);
        builder.push_run(0, 4, Class::Zero, 0);
    });
    feed(&apart).expect("runs without a common page");
}

/// A page that is discarded during a round is sent twice.
#[test]
fn page_may_be_sent_twice_in_a_round() {
    let whole = |sequence| {
        let mut builder = Builder::new(Codec::None, SMALL_PAGE, SMALL_PAGE);
        builder.push_run(0, PAGES, Class::Absent, 0);
        let built = builder.build(0, 0, sequence);
        [built.head, built.payload].concat()
    };
    let barrier = Builder::new(Codec::None, SMALL_PAGE, SMALL_PAGE).barrier(0, 2).head.to_vec();
    feed(&[whole(0), whole(1), barrier].concat()).expect("a valid block");
}

/// A block of 88 bytes may contain a run that covers a whole large region.
#[test]
fn long_run_can_be_cancelled() {
    let file = memory::small_file(1 << 24);
    let placer = placer(vec![target(&file)]);
    let (mut peer, ours) = UnixStream::pair().expect("sockets");
    let receiver = BlockReceiver::new(vec![OwnedFd::from(ours)], placer.clone(), TIMEOUT).expect("a receiver");
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(0));
        peer.write_all(&block(Codec::None, 0, 0, 0, |builder| builder.push_run(0, 1 << 24, Class::Absent, 0)))
            .expect("a receiver that reads");
        while placer.missing() == 1 << 24 {
            thread::yield_now();
        }
        receiver.cancel();
        let ended = receiving.join().expect("the thread panicked");
        assert!(matches!(ended, Err(WireError::Cancelled)), "{ended:?}");
        assert!(placer.missing() > 0);
    });
}

#[test]
fn contents_by_reference_are_rejected() {
    for class in [Class::Pattern, Class::SameAs] {
        let ended = feed(&block(Codec::None, 0, 0, 0, |builder| builder.push_run(0, 1, class, 1)));
        assert!(matches!(ended, Err(WireError::Place(PlaceError::Class(refused))) if refused == class), "{ended:?}");
    }
}

#[test]
fn blocks_out_of_order_are_rejected() {
    for (round, sequence) in [(1, 0), (u32::MAX, 0), (0, 1), (0, u64::MAX - 1)] {
        let ended = feed(&block(Codec::None, 0, round, sequence, data(0, 1)));
        assert!(matches!(ended, Err(WireError::Order(_))), "{ended:?}");
    }
    let twice = [block(Codec::None, 0, 0, 0, data(0, 1)), block(Codec::None, 0, 0, 0, data(1, 1))].concat();
    let at_barrier = twice.len() / 2 - 64;
    let replayed = [&twice[..at_barrier], &twice[twice.len() / 2..]].concat();
    assert!(matches!(feed(&replayed), Err(WireError::Order(_))));
}

#[test]
fn stream_cut_off_anywhere_is_closed() {
    for codec in [Codec::None, Codec::Zstd] {
        let whole = block(codec, 0, 0, 0, data(0, 3));
        for cut in (0..whole.len()).step_by(whole.len() / 40 + 1).chain([1, 63, 64, 65, whole.len() - 1]) {
            let ended = feed(&whole[..cut]);
            assert!(matches!(ended, Err(WireError::Closed)), "cut at {cut} of {}: {ended:?}", whole.len());
        }
    }
}

#[test]
fn damaged_pages_are_named() {
    for codec in [Codec::None, Codec::Lz4] {
        let mut bytes = block(codec, 0, 0, 0, data(2, 2));
        let last = bytes.len() - 64 - 1;
        bytes[last] ^= 4;
        let ended = feed(&bytes);
        let expected = BlockError::PayloadChecksum { index: 0, page: 2, region: 0 };
        assert!(matches!(&ended, Err(WireError::Block(error)) if *error == expected), "{ended:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn noise_ends_in_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(feed(&bytes).is_err());
    }

    /// A changed byte of a valid stream is detected, even in the barrier after the pages.
    #[test]
    fn changed_byte_is_detected(at in any::<prop::sample::Index>(), change in 1u8.., lz4 in any::<bool>()) {
        let codec = if lz4 { Codec::Lz4 } else { Codec::None };
        let mut bytes = block(codec, 0, 0, 0, data(1, 4));
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        prop_assert!(feed(&bytes).is_err());
    }
}

/// The wait for a silent peer is bounded by the timeout, even within a block.
#[test]
fn stalled_peer_times_out() {
    let whole = block(Codec::None, 0, 0, 0, data(0, 2));
    for sent in [0, 10, 64, whole.len() - 65] {
        let (mut peer, ours) = UnixStream::pair().expect("sockets");
        let placer = placer(vec![target(&small_file(PAGES))]);
        let receiver =
            BlockReceiver::new(vec![OwnedFd::from(ours)], placer, Duration::from_millis(250)).expect("a receiver");
        peer.write_all(&whole[..sent]).expect("room");
        let begin = Instant::now();
        let ended = receiver.receive(0);
        assert!(matches!(ended, Err(WireError::Stalled(_))), "{ended:?}");
        assert!((Duration::from_millis(250)..DEADLINE).contains(&begin.elapsed()));
    }
}

/// A sender fails after the timeout if its peer does not read from the socket.
#[test]
fn peer_that_does_not_read_times_out() {
    let source = full_file(4096);
    let (peer, ours) = UnixStream::pair().expect("sockets");
    let sender =
        BlockSender::new(vec![OwnedFd::from(ours)], format(Codec::None), Duration::from_millis(250)).expect("a sender");
    let ended = sender.send(std::slice::from_ref(&source), &[PageSet::full(4096)], 0, true);
    assert!(matches!(ended, Err(WireError::Stalled(_))), "{ended:?}");
    drop(peer);
    let ended = sender.send(&[source], &[PageSet::full(4096)], 0, true);
    assert!(matches!(ended, Err(WireError::Cancelled)), "not cancelled: {ended:?}");
}

fn full_file(pages: usize) -> Arc<Mapping> {
    let file = small_file(pages);
    (0..pages).for_each(|page| fill(&file, page, 1));
    file
}

/// Streams support sockets in non-blocking mode, without busy waiting.
#[test]
fn non_blocking_sockets_are_polled() {
    let (mut peer, ours) = UnixStream::pair().expect("sockets");
    ours.set_nonblocking(true).expect("an option");
    let copy = small_file(PAGES);
    let placer = placer(vec![target(&copy)]);
    let receiver = BlockReceiver::new(vec![OwnedFd::from(ours)], placer, TIMEOUT).expect("a receiver");
    let used = thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let before = thread_time();
            receiver.receive(0).expect("a round");
            thread_time() - before
        });
        thread::sleep(Duration::from_millis(400));
        peer.write_all(&block(Codec::None, 0, 0, 0, data(0, PAGES))).expect("room");
        receiving.join().expect("the thread panicked")
    });
    assert_eq!(page(&copy, PAGES - 1)[0], 3);
    assert!(used < Duration::from_millis(200), "{used:?} of processor time in 400 ms of waiting");
}

fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec that is valid for writing.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap(), u32::try_from(time.tv_nsec).unwrap())
}

#[test]
fn cancellation_unblocks_sender_and_receiver() {
    let (peer, ours) = UnixStream::pair().expect("sockets");
    let placer = placer(vec![target(&small_file(PAGES))]);
    let receiver = BlockReceiver::new(vec![OwnedFd::from(ours)], placer, TIMEOUT).expect("a receiver");
    let sender = BlockSender::new(vec![OwnedFd::from(peer)], format(Codec::None), TIMEOUT).expect("a sender");
    let source = full_file(4096);
    let begin = Instant::now();
    thread::scope(|scope| {
        // The receiver does not read yet, so the sender blocks when the socket buffer is full.
        let sending = scope.spawn(|| sender.send(&[source], &[PageSet::full(4096)], 0, true));
        thread::sleep(Duration::from_millis(100));
        sender.cancel();
        assert!(matches!(sending.join().expect("the thread panicked"), Err(WireError::Cancelled)));
    });
    receiver.cancel();
    assert!(matches!(receiver.receive(0), Err(WireError::Cancelled)));
    assert!(begin.elapsed() < DEADLINE);
}

#[test]
fn cancellation_unblocks_a_waiting_receiver() {
    let (_peer, ours) = UnixStream::pair().expect("sockets");
    let placer = placer(vec![target(&small_file(PAGES))]);
    let receiver = BlockReceiver::new(vec![OwnedFd::from(ours)], placer, TIMEOUT).expect("a receiver");
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(0));
        thread::sleep(Duration::from_millis(50));
        receiver.cancel();
        assert!(matches!(receiving.join().expect("the thread panicked"), Err(WireError::Cancelled)));
    });
}

/// If one of several streams fails, the other streams are cancelled and the error is returned. The test repeats this to
/// detect races.
#[test]
fn first_failure_is_returned() {
    for _ in 0..50 {
        let pairs: Vec<_> = (0..4).map(|_| UnixStream::pair().expect("sockets")).collect();
        let (mut peers, ours): (Vec<UnixStream>, Vec<OwnedFd>) = pairs.into_iter().map(|(a, b)| (a, b.into())).unzip();
        let placer = placer(vec![target(&small_file(PAGES))]);
        let receiver = BlockReceiver::new(ours, placer, TIMEOUT).expect("a receiver");
        let ended = thread::scope(|scope| {
            let receiving = scope.spawn(|| receiver.receive(0));
            peers[2].write_all(&[0x47; 64]).expect("room");
            for peer in [0, 1, 3] {
                // Send one header at a time, so that the other streams are woken repeatedly while the third stream
                // fails.
                let _ = peers[peer].write_all(&block(Codec::None, 0, 0, 0, data(0, 4))[..100]);
            }
            receiving.join().expect("the thread panicked")
        });
        assert!(matches!(ended, Err(WireError::Block(BlockError::Magic(_)))), "{ended:?}");
    }
}

/// A sender reports that its peer has closed the connection during a round.
#[test]
fn closed_peer_is_reported() {
    let (mut peer, ours) = UnixStream::pair().expect("sockets");
    let sender = BlockSender::new(vec![OwnedFd::from(ours)], format(Codec::None), TIMEOUT).expect("a sender");
    let source = full_file(4096);
    let ended = thread::scope(|scope| {
        let sending = scope.spawn(|| sender.send(&[source], &[PageSet::full(4096)], 0, true));
        peer.read_exact(&mut [0; 100_000]).expect("the first bytes");
        drop(peer);
        sending.join().expect("the thread panicked")
    });
    assert!(matches!(ended, Err(WireError::Closed)), "{ended:?}");
}

/// The pages of blocks that were received before a rejected block are complete.
#[test]
fn pages_before_a_rejected_block_are_complete() {
    let copy = small_file(PAGES);
    let placer = placer(vec![target(&copy)]);
    let good = block(Codec::Lz4, 0, 0, 0, data(0, 2));
    let bad = block(Codec::Lz4, 0, 0, 1, data(PAGES, 1));
    let bytes = [&good[..good.len() - 64], &bad[..]].concat();
    assert!(feed_into(&placer, &bytes).is_err());
    let expected = [vec![3; 2 * SMALL_PAGE], vec![0; (PAGES - 2) * SMALL_PAGE]].concat();
    assert_eq!(contents(&copy), expected);
    assert_eq!(placer.missing(), PAGES - 2);
}
