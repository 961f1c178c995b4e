//! Tests of post-copy against a plain model: requests during the push, hostile peers, and lost connections. Operations
//! that may hang run in a thread with a deadline.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use pageferry_engine::block::{Builder, Class, Codec};
use pageferry_engine::mapping::{Mapping, duplicate};
use pageferry_engine::pager::{
    Begin, FEATURES, FillOrder, Flags, Origin, Pager, Plan, TRACE_FEATURES, Targets, file_len,
};
use pageferry_engine::pages::PageSet;
use pageferry_engine::placer::Target;
use pageferry_engine::segment::Segment;
use pageferry_engine::space::{Faults, Space};
use pageferry_engine::uapi::{FEATURE_EVENT_REMOVE, Userfault};
use pageferry_engine::wire::{Format, POSTCOPY, PageServer, PeerSource, Request, WireError};
use pageferry_engine::{LARGE_PAGE, SLOTS, SMALL_PAGE};

mod memory;
use memory::{TIMEOUT, contents, format, large_file, small_file, within_a_minute};

const PAGES: usize = 4 * SLOTS;

/// Returns the contents at the source. Of every sixteen pages, one is a hole and one is a zero page.
fn at_source(page: usize) -> u64 {
    if matches!(page % 16, 3 | 5) { 0 } else { (page as u64 + 1) << 20 }
}

/// Returns the contents that earlier rounds have left at the destination; those of missing pages are outdated.
fn at_destination(page: usize) -> u64 {
    if is_missing(page) { 0xdead } else { at_source(page) ^ 7 }
}

fn is_missing(page: usize) -> bool {
    page / 7 % 5 != 2
}

/// Returns the contents that a reader must see. Pages that are not missing differ from the source, so that overwrites
/// are detected.
fn expected(page: usize) -> u64 {
    if is_missing(page) { at_source(page) } else { at_destination(page) }
}

fn put(mapping: &Mapping, page: usize, word: u64) {
    // SAFETY: the page lies within the mapping, which `page` asserts; no other thread accesses it yet.
    unsafe { mapping.page(page).cast::<u64>().write_volatile(word) }
}

/// Memory of the source, the workload's and the pager's mapping of the destination memory, the deferred bitmap, the
/// userfaultfd, and the missing pages.
struct Scene {
    source: Arc<Mapping>,
    ours: Arc<Mapping>,
    workload: Mapping,
    flags: Arc<Mapping>,
    uffd: OwnedFd,
    page_size: usize,
    missing: PageSet,
}

impl Scene {
    fn new() -> Arc<Self> {
        Self::on(small_file(PAGES), small_file(PAGES), SMALL_PAGE, is_missing)
    }

    fn on(source: Arc<Mapping>, ours: Arc<Mapping>, page_size: usize, missing: impl Fn(usize) -> bool) -> Arc<Self> {
        let workload = Mapping::new(ours.as_fd(), ours.len(), 0).expect("a mapping");
        let (uffd, _) = space()
            .kept_userfault(FEATURES | FEATURE_EVENT_REMOVE, TRACE_FEATURES, Faults::All)
            .expect("a userfaultfd");
        let flags = small_file(file_len(PAGES).div_ceil(SMALL_PAGE));
        let mut set = PageSet::new(PAGES);
        for page in 0..PAGES {
            if page % 16 != 3 {
                put(&source, page, at_source(page));
            }
            // Write through the mapping of the workload: this maps the page, as if the workload had accessed it before
            // its pause.
            put(&workload, page, at_destination(page));
            if missing(page) {
                set.insert(page, page + 1);
                // SAFETY: the page lies in the mapping, and no other thread accesses it yet.
                unsafe { *flags.base().add(page / 8) |= 1 << (page % 8) };
            }
        }
        Arc::new(Self { source, ours, workload, flags, uffd: uffd.into(), page_size, missing: set })
    }

    fn pager(&self, begin: Begin, peer: &Arc<PeerSource>) -> Pager {
        let (address, len) = (self.workload.address(), self.workload.len() as u64);
        let segment = Segment { space: space(), address, len, region: 0, first_page: 0 };
        let uffd = Arc::new(Userfault::from_fd(duplicate(self.uffd.as_raw_fd()).expect("a duplicate")));
        let large = self.source.large_units().expect("a scan");
        Pager::start(Plan {
            from: Origin::Peer(peer.clone()),
            targets: Targets::Files(vec![Target { mapping: self.ours.clone(), page_size: self.page_size, large }]),
            watched: vec![(segment, uffd)],
            flags: Flags::open(self.flags.as_fd(), PAGES).expect("flags"),
            begin,
            order: FillOrder::default(),
            background: true,
            eager: false,
            whole_blocks: true,
            read_ahead: true,
            evicting: false,
            checks_removals: false,
            fatal: false,
        })
        .expect("a pager")
    }

    fn server(&self, ends: Ends, missing: &PageSet, format: Format) -> Arc<PageServer> {
        let regions = vec![self.source.clone()];
        let server =
            PageServer::new(regions, std::slice::from_ref(missing), ends.urgent, ends.streams, format, TIMEOUT);
        Arc::new(server.expect("a server"))
    }

    /// Creates a server that replies to requests, and a pager connected to it.
    fn connected(&self, format: Format) -> (Arc<PageServer>, Arc<PeerSource>, Pager) {
        let (theirs, peer) = connection(2);
        let server = self.server(theirs, &self.missing, format);
        server.start().expect("a thread");
        let pager = self.pager(Begin::Kept, &peer);
        (server, peer, pager)
    }

    fn read(&self, page: usize) -> u64 {
        // SAFETY: the word lies in the mapping and is aligned; other threads do not write to it.
        unsafe { self.workload.page(page).cast::<u64>().read_volatile() }
    }

    fn check(&self) {
        for page in 0..PAGES {
            assert_eq!(
                self.read(page),
                if self.missing.contains(page) { at_source(page) } else { at_destination(page) }
            );
        }
    }

    /// Starts a thread that reads a page.
    fn reader(self: &Arc<Self>, page: usize) -> thread::JoinHandle<u64> {
        let scene = self.clone();
        thread::spawn(move || scene.read(page))
    }
}

fn space() -> Arc<Space> {
    Arc::new(Space::open(libc::pid_t::try_from(std::process::id()).expect("a pid")).expect("our own process"))
}

/// Source side of a connection.
struct Ends {
    urgent: OwnedFd,
    streams: Vec<OwnedFd>,
}

fn connection(streams: usize) -> (Ends, Arc<PeerSource>) {
    connection_with(streams, TIMEOUT)
}

fn connection_with(streams: usize, timeout: Duration) -> (Ends, Arc<PeerSource>) {
    let pairs = (0..=streams).map(|_| UnixStream::pair().expect("a pair of sockets"));
    let (mut theirs, mut ours): (Vec<OwnedFd>, Vec<OwnedFd>) = pairs.map(|(a, b)| (a.into(), b.into())).unzip();
    let peer = PeerSource::new(ours.remove(0), ours, timeout).expect("a peer");
    (Ends { urgent: theirs.remove(0), streams: theirs }, Arc::new(peer))
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(40);
    while !done() {
        assert!(Instant::now() < deadline, "timeout: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn random(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    usize::try_from(*state >> 33).expect("31 bits")
}

#[test]
fn pages_are_loaded_on_demand_during_the_push() {
    for codec in [Codec::None, Codec::Lz4] {
        within_a_minute(move || {
            let scene = Scene::new();
            let (server, peer, pager) = scene.connected(format(codec));
            let readers: Vec<_> = (0..4u64)
                .map(|seed| {
                    let (scene, mut state) = (scene.clone(), seed);
                    thread::spawn(move || {
                        for _ in 0..2000 {
                            let page = random(&mut state) % PAGES;
                            assert_eq!(scene.read(page), expected(page), "page {page}");
                        }
                    })
                })
                .collect();
            until("a request", || server.requests() > 0);
            server.push().expect("a complete push");
            readers.into_iter().for_each(|reader| reader.join().expect("a reader"));
            assert!(pager.wait(Duration::from_secs(20), 0), "{} pages are missing", pager.pending());
            assert_eq!((server.remaining(), peer.lost(), server.lost()), (0, None, None));
            scene.check();
        });
    }
}

#[test]
fn faults_of_one_window_cause_one_request() {
    within_a_minute(|| {
        let scene = Scene::on(small_file(PAGES), small_file(PAGES), SMALL_PAGE, |_| true);
        let (theirs, peer) = connection(1);
        let pager = scene.pager(Begin::Kept, &peer);
        let readers: Vec<_> = (32..48).map(|page| (page, scene.reader(page))).collect();
        until("faults", || pager.counters().missed.load(Ordering::Relaxed) >= 16);
        let server = scene.server(theirs, &scene.missing, format(Codec::Lz4));
        server.start().expect("a thread");
        readers.into_iter().for_each(|(page, reader)| assert_eq!(reader.join().expect("a reader"), at_source(page)));
        assert_eq!((server.requests(), server.remaining()), (1, PAGES - 16));
        pager.ensure(0, 100, 700).expect("a range");
        let missing = pager.missing(0).expect("the only region");
        assert!(missing.runs_in(100, 800).next().is_none());
        assert_eq!(missing.count(), server.remaining());
    });
}

#[test]
fn push_continues_from_the_last_request() {
    let scene = Scene::new();
    let (theirs, ours) = (UnixStream::pair().expect("sockets"), UnixStream::pair().expect("sockets"));
    let ends = Ends { urgent: theirs.0.into(), streams: vec![ours.0.into()] };
    let (mut urgent, mut stream) = (theirs.1, ours.1);
    let server = scene.server(ends, &PageSet::full(PAGES), format(Codec::None));
    server.start().expect("a thread");
    let request = Request::new(0, (1600, 1616), Some(1601));
    urgent.write_all(zerocopy_bytes(&request)).expect("a request");
    let mut header = [0; 64 + 24];
    urgent.read_exact(&mut header).expect("a reply");
    assert_eq!(u64::from_le_bytes(header[64..72].try_into().expect("eight bytes")), 1601);
    until("the reply to be counted", || server.remaining() == PAGES - 16);
    thread::scope(|scope| {
        scope.spawn(|| server.push());
        stream.read_exact(&mut header).expect("a block");
        assert_eq!(u64::from_le_bytes(header[64..72].try_into().expect("eight bytes")), 1616);
        server.cancel();
    });
}

fn zerocopy_bytes(request: &Request) -> &[u8] {
    // SAFETY: a request consists of 32 bytes without padding, which live as long as the reference.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(request).cast(), size_of::<Request>()) }
}

#[test]
fn pager_continues_over_another_connection() {
    within_a_minute(|| {
        let scene = Scene::new();
        let (mut server, mut peer, pager) = scene.connected(format(Codec::Lz4));
        let readers: Vec<_> = (0..3u64)
            .map(|seed| {
                let (scene, mut state) = (scene.clone(), seed);
                thread::spawn(move || {
                    for _ in 0..300 {
                        let page = random(&mut state) % PAGES;
                        assert_eq!(scene.read(page), expected(page), "page {page}");
                    }
                })
            })
            .collect();
        for turn in 1..=4 {
            let before = server.requests();
            until("a request", || server.requests() > before + 3 * turn || pager.pending() == 0);
            drop(server);
            until("a lost connection", || peer.lost().is_some() || pager.is_finished());
            let (theirs, another) = connection(1);
            peer = another;
            server = scene.server(theirs, &pager.missing(0).expect("the only region"), format(Codec::Zstd));
            server.start().expect("a thread");
            pager.reconnect(peer.clone()).expect("a pager of a peer");
        }
        server.push().expect("the remaining pages");
        readers.into_iter().for_each(|reader| reader.join().expect("a reader"));
        assert!(pager.wait(Duration::from_secs(20), 0), "{} pages are missing", pager.pending());
        scene.check();
        let (_theirs, other) = connection(1);
        assert!(scene.pager(Begin::TakenOver, &other).reconnect(other).is_err(), "the connection is in use");
    });
}

#[test]
fn pager_takes_over_from_an_exited_one() {
    within_a_minute(|| {
        let scene = Scene::new();
        let (theirs, peer) = connection(1);
        let pager = scene.pager(Begin::Kept, &peer);
        let reader = scene.reader(77);
        until("a fault", || pager.counters().missed.load(Ordering::Relaxed) > 0);
        drop((pager, theirs));
        let (server, _peer, pager) = {
            let (theirs, peer) = connection(2);
            let pager = scene.pager(Begin::TakenOver, &peer);
            let server = scene.server(theirs, &pager.missing(0).expect("the only region"), format(Codec::Lz4));
            server.start().expect("a thread");
            (server, peer, pager)
        };
        assert_eq!(reader.join().expect("a reader"), expected(77));
        server.push().expect("the remaining pages");
        assert!(pager.wait(Duration::from_secs(20), 0));
        scene.check();
    });
}

/// Deferred pages that a balloon discards become zeros. They are not loaded, and no error is reported.
#[test]
fn discarded_pages_are_not_loaded() {
    within_a_minute(|| {
        let scene = Scene::new();
        let (server, peer, pager) = scene.connected(format(Codec::None));
        assert_eq!(scene.read(77), expected(77));
        for page in 0..PAGES {
            // SAFETY: the page lies in the mapping of shared memory, and no Rust reference to it exists.
            let result = unsafe { libc::madvise(scene.workload.page(page).cast(), SMALL_PAGE, libc::MADV_REMOVE) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        }
        assert!(pager.wait(Duration::from_secs(20), 0), "{} pages are missing", pager.pending());
        server.push().expect("a complete push");
        until("the end of the streams", || peer.has_ended());
        assert_eq!((peer.lost(), server.lost()), (None, None));
        assert!((0..PAGES).all(|page| scene.read(page) == 0));
    });
}

/// Builds a block as a peer may send it.
fn block(region: u32, round: u32, sequence: u64, make: impl FnOnce(&mut Builder)) -> Vec<u8> {
    let mut builder = Builder::new(Codec::None, 4 * SMALL_PAGE, 64 * SMALL_PAGE);
    make(&mut builder);
    let built = builder.build(region, round, sequence);
    [built.head, built.payload].concat()
}

fn data(first: usize, count: usize) -> impl Fn(&mut Builder) {
    move |builder| {
        (first..first + count).for_each(|page| {
            builder.push_data(page, &[0x66; SMALL_PAGE]);
        })
    }
}

/// Invalid blocks do not change memory: accesses to deferred pages wait for a valid peer, and present pages are not
/// affected.
#[test]
#[expect(clippy::too_many_lines, reason = "one table of blocks and one sequence of connections")]
fn invalid_blocks_do_not_reach_memory() {
    within_a_minute(|| {
        let run = |class, count| move |builder: &mut Builder| builder.push_run(PAGES - 1, count, class, 0);
        let mut damaged = block(0, POSTCOPY, 0, data(77, 3));
        *damaged.last_mut().expect("bytes") ^= 1;
        let mut oversized = block(0, POSTCOPY, 0, data(77, 1));
        oversized[12..14].copy_from_slice(&u16::MAX.to_le_bytes());
        let lies = [
            block(1, POSTCOPY, 0, data(77, 1)),
            block(u32::MAX, POSTCOPY, 0, data(77, 1)),
            block(0, POSTCOPY, 0, data(PAGES - 1, 2)),
            block(0, POSTCOPY, 0, data(PAGES + 5, 1)),
            block(0, POSTCOPY, 0, run(Class::Absent, 2)),
            block(0, POSTCOPY, 0, run(Class::Zero, 1 << 24)),
            block(0, POSTCOPY, 0, run(Class::SameAs, 1)),
            block(0, 3, 0, data(77, 1)),
            block(0, POSTCOPY, 1, data(77, 1)),
            damaged,
            oversized,
            vec![0xee; 4096],
            block(0, POSTCOPY, 0, data(77, 1))[..70].to_vec(),
        ];
        let scene = Scene::new();
        let (theirs, peer) = connection(1);
        let pager = scene.pager(Begin::Kept, &peer);
        let reader = scene.reader(77);
        until("a request", || peer.requests() > 0);
        let (mut theirs, mut peer) = (theirs, peer);
        for (number, lie) in lies.iter().enumerate() {
            let Ends { urgent, mut streams } = theirs;
            let target = if number % 2 == 0 { urgent } else { streams.remove(0) };
            let mut socket = UnixStream::from(target);
            let _ = socket.write_all(lie);
            drop(socket);
            until("a lost connection", || peer.lost().is_some());
            assert!(
                pager.ensure(0, 77, 1).is_err() && pager.missing(0).expect("a region").contains(77),
                "invalid block {number}"
            );
            (theirs, peer) = connection(1);
            pager.reconnect(peer.clone()).expect("a pager of a peer");
        }
        assert!(!reader.is_finished(), "the reader continued");
        assert_eq!(contents(&scene.ours), {
            let untouched = Scene::new();
            contents(&untouched.ours)
        });
        // The pager ignores a page that is neither requested nor missing.
        let mut urgent = UnixStream::from(theirs.urgent.try_clone().expect("a duplicate"));
        let there = (0..PAGES).find(|&page| !is_missing(page)).expect("a page that is not missing");
        urgent.write_all(&block(0, POSTCOPY, 0, data(there, 1))).expect("a block");
        let server = scene.server(theirs, &pager.missing(0).expect("a region"), format(Codec::None));
        server.push().expect("a complete push");
        assert_eq!(reader.join().expect("a reader"), expected(77));
        assert!(pager.wait(Duration::from_secs(20), 0));
        scene.check();
    });
}

#[test]
fn late_reply_loses_the_connection() {
    within_a_minute(|| {
        let scene = Scene::new();
        let (theirs, peer) = connection_with(1, Duration::from_millis(300));
        let pager = scene.pager(Begin::Kept, &peer);
        thread::sleep(Duration::from_secs(1));
        assert_eq!(peer.lost(), None, "no request is pending");
        let reader = scene.reader(77);
        until("a lost connection", || peer.lost().is_some());
        drop(theirs);
        let (theirs, peer) = connection(1);
        let server = scene.server(theirs, &scene.missing, format(Codec::None));
        server.start().expect("a thread");
        pager.reconnect(peer).expect("a pager of a peer");
        assert_eq!(reader.join().expect("a reader"), expected(77));
    });
}

#[test]
fn malformed_request_ends_the_server() {
    let scene = Scene::new();
    let mut noise = [0x5a; 32];
    let mut damaged = [0; 32];
    damaged.copy_from_slice(zerocopy_bytes(&Request::new(0, (0, 1), None)));
    damaged[8] ^= 1;
    noise[..4].copy_from_slice(b"PFRQ");
    let made = |region, range, page| {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(zerocopy_bytes(&Request::new(region, range, page)));
        bytes
    };
    let requests = [
        noise,
        damaged,
        made(1, (0, 1), None),
        made(usize::MAX, (0, 1), None),
        made(0, (0, 0), None),
        made(0, (0, 513), None),
        made(0, (PAGES - 1, PAGES + 1), None),
        made(0, (usize::MAX - 4, usize::MAX), None),
        made(0, (5, 6), Some(6)),
    ];
    for (number, request) in requests.iter().enumerate() {
        let (theirs, mut ours) = UnixStream::pair().expect("sockets");
        let (stream, idle) = UnixStream::pair().expect("sockets");
        let ends = Ends { urgent: theirs.into(), streams: vec![stream.into()] };
        let server = scene.server(ends, &scene.missing, format(Codec::None));
        server.start().expect("a thread");
        ours.write_all(request).expect("a request");
        until("a rejected request", || server.lost().is_some());
        assert!(matches!(server.push(), Err(WireError::Order(_))), "request {number}");
        assert_eq!(server.requests(), 0);
        drop(idle);
    }
}

#[test]
fn blocked_push_can_be_cancelled() {
    within_a_minute(|| {
        let scene = Scene::new();
        let (theirs, _peer) = connection(2);
        let server = scene.server(theirs, &scene.missing, format(Codec::None));
        let pushing = {
            let server = server.clone();
            thread::spawn(move || server.push())
        };
        until("the first sent page", || server.remaining() < scene.missing.count());
        server.cancel();
        assert!(matches!(pushing.join().expect("the thread panicked"), Err(WireError::Cancelled)));
    });
}

#[test]
fn bandwidth_limit_covers_all_streams() {
    within_a_minute(|| {
        let scene = Scene::new();
        let bandwidth = 8 << 20;
        let (server, _peer, pager) = scene.connected(Format { bandwidth, ..format(Codec::None) });
        let begin = Instant::now();
        server.push().expect("a complete push");
        let bytes = server.progress().bytes.load(Ordering::Relaxed);
        // The limit delays neither the initial burst nor the last block of each stream.
        let least = (bytes - (1 << 18)) * 1000 / bandwidth;
        assert!(begin.elapsed() >= Duration::from_millis(least - 50), "{bytes} bytes in {:?}", begin.elapsed());
        assert!(pager.wait(Duration::from_secs(20), 0));
    });
}

/// A huge page of the destination is filled in place, and is mapped by a PMD entry after the push (S7).
#[test]
fn huge_pages_stay_huge() {
    within_a_minute(|| {
        let room = 64 << 20;
        let (Some(source), Some(ours)) = (large_file(PAGES, room), large_file(PAGES, room)) else { return };
        let scene = Scene::on(source, ours, SMALL_PAGE, |page| page % 3 == 0 && page < 3 * SLOTS);
        let (server, _peer, pager) = scene.connected(format(Codec::Lz4));
        let large = || {
            let found = space().large_mapped(scene.workload.address(), scene.workload.len() as u64);
            found.expect("a scan").iter().map(|(start, end)| end - start).sum::<u64>()
        };
        pager.populate().expect("present pages");
        assert_eq!(large(), LARGE_PAGE as u64, "the huge page without deferred pages");
        for page in (0..PAGES).step_by(37) {
            let right = if scene.missing.contains(page) { at_source(page) } else { at_destination(page) };
            assert_eq!(scene.read(page), right, "page {page}");
        }
        server.push().expect("a complete push");
        assert!(pager.wait(Duration::from_secs(20), 0));
        assert_eq!(large(), 4 * LARGE_PAGE as u64);
        scene.check();
    });
}

/// Pages of hugetlbfs are loaded as a whole: a fault requests all pages of its 2 MiB unit at once, and waits for all of
/// them.
#[test]
fn hugetlbfs_pages_are_loaded_as_a_whole() {
    within_a_minute(|| {
        let (Some(source), Some(ours)) = (memory::huge_file(PAGES), memory::huge_file(PAGES)) else { return };
        let scene = Scene::on(source, ours, LARGE_PAGE, |page| page >= SLOTS && is_missing(page));
        let (server, _peer, pager) = scene.connected(format(Codec::Lz4));
        assert_eq!(scene.read(0), at_destination(0));
        assert_eq!(
            scene.read(SLOTS + 9),
            if is_missing(SLOTS + 9) { at_source(SLOTS + 9) } else { at_destination(SLOTS + 9) }
        );
        assert!(pager.missing(0).expect("a region").runs_in(SLOTS, 2 * SLOTS).next().is_none());
        assert_eq!(server.requests(), 1);
        server.push().expect("a complete push");
        assert!(pager.wait(Duration::from_secs(20), 0));
        scene.check();
    });
}
