//! Tests of the pager against a plain model: pages of an image are loaded on demand during writes, discards and
//! takeovers.
//!
//! Operations that may hang run in a thread with a deadline.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Builder, Class, Codec};
use pageferry_engine::image::{Chain, Image, ImageWriter, PageEntry, Sizes};
use pageferry_engine::mapping::{Mapping, duplicate};
use pageferry_engine::pager::{
    Begin, FEATURES, FillOrder, Flags, Origin, Pager, Plan, TRACE_FEATURES, Targets, file_len,
};
use pageferry_engine::pages::PageSet;
use pageferry_engine::placer::Target;
use pageferry_engine::segment::Segment;
use pageferry_engine::space::{Faults, Space};
use pageferry_engine::uapi::{FEATURE_EVENT_REMOVE, Userfault};

mod memory;
use memory::within_a_minute;

const PAGES: usize = 2048;
const STORAGE_BLOCK: usize = 256 << 10;
/// Zero page that the image omits.
const NEVER_STORED: usize = 15;

fn memory_file(len: usize) -> OwnedFd {
    // SAFETY: the name is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
    let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"paging".as_ptr(), libc::MFD_CLOEXEC)) };
    File::from(file.try_clone().expect("a duplicate")).set_len(len as u64).expect("space");
    file
}

/// Returns word `at` of a page in the image.
fn word(page: usize, at: usize) -> u64 {
    ((page as u64) << 32 | at as u64 | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Returns an image of one region, in which every eighth page is zero and all others are data. The image is created
/// only once, because its creation takes longer than the tests.
fn image() -> Chain {
    static IMAGE: OnceLock<Chain> = OnceLock::new();
    IMAGE.get_or_init(new_image).clone()
}

/// Returns an order without a working set.
fn all_blocks() -> FillOrder {
    let blocks = image().images()[0].blocks().len();
    let blocks = (0..u32::try_from(blocks).expect("few blocks")).map(|block| (0, block)).collect();
    FillOrder { windows: Vec::new(), blocks }
}

fn new_image() -> Chain {
    let file = memory_file(0);
    let sizes = Sizes { page_block: 64 << 10, storage_block: STORAGE_BLOCK };
    let mut writer = ImageWriter::new(file.try_clone().expect("a duplicate"), [7; 16], sizes).expect("a writer");
    let mut builder = Builder::new(Codec::Lz4, sizes.page_block, sizes.storage_block);
    let mut map = vec![PageEntry::plain(Class::Zero, 0); PAGES];
    map[NEVER_STORED] = PageEntry::plain(Class::Absent, 0);
    let mut pending: Vec<(usize, usize)> = Vec::new();
    let mut flush = |builder: &mut Builder, pending: &mut Vec<(usize, usize)>, map: &mut Vec<PageEntry>| {
        if builder.is_empty() {
            return;
        }
        let number = writer.append(&builder.build(0, 0, 0)).expect("a block");
        for (page, slot) in pending.drain(..) {
            map[page] = PageEntry::stored(Class::Data, 0, number, u16::try_from(slot).expect("a slot"));
        }
    };
    // Store the pages out of order, as traps of a checkpoint do.
    for page in (0..PAGES).map(|number| number * 769 % PAGES).filter(|page| page % 8 != 7) {
        let contents: Vec<u8> = (0..512).flat_map(|at| word(page, at).to_le_bytes()).collect();
        let slot = builder.push_data(page, &contents);
        pending.push((page, slot));
        if builder.is_full() {
            flush(&mut builder, &mut pending, &mut map);
        }
    }
    flush(&mut builder, &mut pending, &mut map);
    writer.finish(1, &map).expect("an image");
    Chain::new(vec![Arc::new(Image::open(file).expect("an image"))]).expect("a chain")
}

/// Mapping of a workload, the pager's mapping of the same file, the deferred bitmap and the userfaultfd.
struct Scene {
    workload: Mapping,
    ours: Arc<Mapping>,
    flags: OwnedFd,
    uffd: OwnedFd,
}

impl Scene {
    fn new() -> Self {
        let file = memory_file(PAGES * SMALL_PAGE);
        let workload = Mapping::new(file.as_fd(), PAGES * SMALL_PAGE, 0).expect("a mapping");
        let ours = Arc::new(Mapping::new(file.as_fd(), PAGES * SMALL_PAGE, 0).expect("a mapping"));
        let (uffd, _) = Self::space()
            .kept_userfault(FEATURES | FEATURE_EVENT_REMOVE, TRACE_FEATURES, Faults::All)
            .expect("a userfaultfd");
        Self { workload, ours, flags: memory_file(file_len(PAGES)), uffd: uffd.into() }
    }

    fn space() -> Arc<Space> {
        Arc::new(Space::open(libc::pid_t::try_from(std::process::id()).expect("a pid")).expect("our own process"))
    }

    fn pager(&self, taken_over: bool, background: bool) -> Pager {
        self.begin(if taken_over { Begin::TakenOver } else { Begin::Empty }, background)
    }

    fn begin(&self, begin: Begin, background: bool) -> Pager {
        self.start(begin, background, false)
    }

    fn start(&self, begin: Begin, background: bool, evicting: bool) -> Pager {
        let len = PAGES * SMALL_PAGE;
        let segment = Segment {
            space: Self::space(),
            address: self.workload.address(),
            len: len as u64,
            region: 0,
            first_page: 0,
        };
        let uffd = Arc::new(Userfault::from_fd(duplicate(self.uffd.as_raw_fd()).expect("a duplicate")));
        Pager::start(Plan {
            from: Origin::Images(image()),
            targets: Targets::Files(vec![Target {
                mapping: self.ours.clone(),
                page_size: SMALL_PAGE,
                large: Vec::new(),
            }]),
            watched: vec![(segment, uffd)],
            flags: Flags::open(self.flags.as_fd(), PAGES).expect("flags"),
            begin,
            order: all_blocks(),
            background,
            eager: true,
            whole_blocks: true,
            read_ahead: true,
            evicting,
            checks_removals: false,
            fatal: false,
        })
        .expect("a pager")
    }

    fn read(&self, page: usize, at: usize) -> u64 {
        // SAFETY: the word lies in the mapping and is aligned; other threads do not write to it.
        unsafe { self.workload.page(page).cast::<u64>().add(at).read_volatile() }
    }

    fn write(&self, page: usize, at: usize, value: u64) {
        // SAFETY: the word lies in the mapping and is aligned; other threads do not access it.
        unsafe { self.workload.page(page).cast::<u64>().add(at).write_volatile(value) }
    }

    fn discard(&self, page: usize) {
        // SAFETY: the page lies in the mapping of shared memory, and no Rust reference to it exists.
        let result = unsafe { libc::madvise(self.workload.page(page).cast(), SMALL_PAGE, libc::MADV_REMOVE) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

fn expected(page: usize, at: usize) -> u64 {
    if page % 8 == 7 { 0 } else { word(page, at) }
}

/// Returns the next pseudo-random number, and updates `state`.
fn random(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    usize::try_from(*state >> 33).expect("31 bits")
}

#[test]
fn pages_are_loaded_on_demand_and_in_the_background() {
    for background in [false, true] {
        within_a_minute(move || {
            let scene = Scene::new();
            let pager = scene.pager(false, background);
            for page in (0..PAGES).map(|number| number * 331 % PAGES) {
                assert_eq!(scene.read(page, 300), expected(page, 300), "page {page}");
            }
            assert!(pager.wait(Duration::from_secs(10), 0), "{} pages are missing", pager.pending());
            let counters = pager.counters();
            // A fault is added to the histogram after the access has continued.
            let binned = || counters.histogram.iter().map(|bin| bin.load(Ordering::Relaxed)).sum::<u64>();
            let faults = counters.faults.load(Ordering::Relaxed);
            while binned() != faults {
                std::thread::sleep(Duration::from_millis(1)); // the test fails after a minute
            }
            assert!(faults > 0);
        });
    }
}

/// After faults in two storage blocks in order, the pager loads the next two without further accesses, and no others.
#[test]
fn storage_blocks_are_loaded_ahead_of_faults_in_order() {
    within_a_minute(|| {
        let scene = Scene::new();
        let pager = scene.pager(false, false);
        // The data pages in the order in which they are stored.
        let stored: Vec<usize> = (0..PAGES).map(|number| number * 769 % PAGES).filter(|page| page % 8 != 7).collect();
        let per_block = STORAGE_BLOCK / SMALL_PAGE;
        let missing = || pager.missing(0).expect("the only region");
        let await_blocks = |count: usize| {
            while stored[..count * per_block].iter().any(|&page| missing().contains(page)) {
                thread::sleep(Duration::from_millis(1)); // the test fails after a minute
            }
        };
        assert_eq!(scene.read(stored[0], 300), expected(stored[0], 300));
        await_blocks(1); // otherwise, another thread of the pager could record the second fault before the first
        assert_eq!(scene.read(stored[per_block], 300), expected(stored[per_block], 300));
        await_blocks(4);
        let others = &stored[4 * per_block..];
        assert!(others.iter().all(|&page| missing().contains(page)));
        for &page in &stored {
            assert_eq!(scene.read(page, 9), expected(page, 9), "page {page}");
        }
    });
}

#[test]
fn discarded_pages_stay_zero() {
    for seed in 1..20 {
        within_a_minute(move || {
            let scene = Scene::new();
            let pager = scene.pager(false, true);
            let (mut state, mut discarded) = (seed, vec![false; PAGES]);
            while pager.pending() > 0 {
                let page = random(&mut state) % PAGES;
                scene.discard(page);
                discarded[page] = true;
            }
            assert!(pager.wait(Duration::from_secs(10), 0));
            for (page, discarded) in discarded.iter().enumerate() {
                let right = if *discarded { 0 } else { expected(page, 9) };
                assert_eq!(scene.read(page, 9), right, "page {page}, discarded {discarded}");
            }
        });
    }
}

#[test]
fn late_contents_do_not_overwrite_writes_and_discards() {
    within_a_minute(|| {
        let scene = Arc::new(Scene::new());
        let pager = scene.pager(false, true);
        // Thread `number` accesses only pages whose index modulo 4 is `number`, and has a model of these pages.
        let threads: Vec<_> = (0..4)
            .map(|number| {
                let scene = scene.clone();
                thread::spawn(move || {
                    let mut model: Vec<u64> = (0..PAGES).map(|page| expected(page, 3)).collect();
                    let mut state = number as u64;
                    for turn in 0..3000 {
                        let page = random(&mut state) % (PAGES / 4) * 4 + number;
                        assert_eq!(scene.read(page, 3), model[page], "page {page} in turn {turn}");
                        if random(&mut state).is_multiple_of(8) {
                            scene.discard(page);
                            model[page] = 0;
                        } else {
                            model[page] = turn;
                            scene.write(page, 3, turn);
                        }
                    }
                    for page in (number..PAGES).step_by(4) {
                        assert_eq!(scene.read(page, 3), model[page], "page {page} at the end");
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("a thread"));
        assert!(pager.wait(Duration::from_secs(10), 0));
    });
}

/// Threads discard pages until the pager has finished. No discard may block because the pager does not read its event.
#[test]
fn pager_finishes_only_after_the_discards_in_progress() {
    for round in 0..30 {
        within_a_minute(move || {
            let scene = Arc::new(Scene::new());
            let pager = scene.pager(false, true);
            let ended = Arc::new(AtomicBool::new(false));
            let threads: Vec<_> = (0..4)
                .map(|number| {
                    let (scene, ended) = (scene.clone(), ended.clone());
                    thread::spawn(move || {
                        let mut state = round * 4 + number;
                        while !ended.load(Ordering::Relaxed) {
                            let page = random(&mut state) % PAGES;
                            scene.discard(page);
                            assert_eq!(scene.read(page, 3), 0, "page {page}");
                        }
                    })
                })
                .collect();
            assert!(pager.wait(Duration::from_secs(30), 0));
            ended.store(true, Ordering::Relaxed);
            threads.into_iter().for_each(|thread| thread.join().expect("a thread"));
        });
    }
}

/// Deferred pages with old contents are mapped when the pager starts. The old contents must not be visible afterwards.
#[test]
fn present_pages_are_kept_and_deferred_pages_loaded() {
    for background in [false, true] {
        within_a_minute(move || {
            let scene = Scene::new();
            (0..PAGES).for_each(|page| scene.write(page, 9, page as u64));
            let flagged = |page: usize| page % 3 == 1 && page % 8 != 7;
            let flags = Mapping::new(scene.flags.as_fd(), file_len(PAGES), 0).expect("a mapping");
            for page in (0..PAGES).filter(|&page| flagged(page)) {
                // SAFETY: the page lies in the mapping, and no other thread accesses it yet.
                unsafe { *flags.base().add(page / 8) |= 1 << (page % 8) };
            }
            let pager = scene.begin(Begin::Kept, background);
            if !background {
                let missing = pager.missing(0).expect("the only region");
                assert!((0..PAGES).all(|page| missing.contains(page) == flagged(page)));
            }
            for page in (0..PAGES).map(|number| number * 331 % PAGES) {
                let right = if flagged(page) { expected(page, 9) } else { page as u64 };
                assert_eq!(scene.read(page, 9), right, "page {page}");
            }
            assert!(pager.wait(Duration::from_secs(10), 0), "{} pages are missing", pager.pending());
        });
    }
}

/// Evicted pages are removed from the file, and are loaded again on access. All other pages are unaffected.
#[test]
fn evicted_pages_are_loaded_again() {
    within_a_minute(|| {
        let scene = Scene::new();
        for page in 0..PAGES {
            (0..512).for_each(|at| scene.write(page, at, expected(page, at)));
        }
        let cold = |page: usize| page % 3 == 1 && page < 1024;
        let mut pages = PageSet::new(PAGES);
        (0..PAGES).filter(|&page| cold(page)).for_each(|page| pages.insert(page, page + 1));
        scene.write(3, 7, 77); // not evicted: differs from the stored contents
        scene.discard(4);
        let pager = scene.start(Begin::Kept, false, true);
        assert_eq!(pager.pending(), 0);
        let before = scene.ours.data_ranges().expect("ranges").iter().map(|(start, end)| end - start).sum::<usize>();
        let gone = pager.evict(0, &pages).expect("eviction");
        let after = scene.ours.data_ranges().expect("ranges").iter().map(|(start, end)| end - start).sum::<usize>();
        assert_eq!((gone, before - after), (pages.count() - 1, gone * SMALL_PAGE), "page 4 is a hole");
        let again = pager.evict(0, &pages).expect_err("evicted pages cannot be evicted");
        assert!(again.to_string().contains("have deferred pages"), "{again}");
        assert_eq!(scene.read(4, 9), 0);
        for page in (0..PAGES).map(|number| number * 331 % PAGES).filter(|&page| page != 4) {
            assert_eq!(scene.read(page, 9), expected(page, 9), "page {page}");
        }
        assert_eq!(scene.read(3, 7), 77);
        let (mut noted, touched) = (pager.touched(), pager.touched().len());
        noted.sort_unstable();
        noted.dedup();
        assert_eq!(noted.len(), touched, "each window is recorded once");
        assert!(touched > 0);
        assert!(!pager.wait(Duration::from_millis(200), 0), "evictions have not ended");
        pager.evicted();
        assert!(pager.wait(Duration::from_secs(10), 0), "{} pages are missing", pager.pending());
    });
}

#[test]
fn short_bitmap_file_is_rejected() {
    let refused = Flags::open(memory_file(file_len(PAGES) - SMALL_PAGE).as_fd(), PAGES).expect_err("too short");
    assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput, "{refused}");
}

#[test]
fn page_missing_from_the_image_is_an_error() {
    within_a_minute(|| {
        let scene = Scene::new();
        Flags::open(scene.flags.as_fd(), PAGES).expect("flags").set(NEVER_STORED);
        let error = scene.begin(Begin::Kept, false).ensure(0, 0, 16).expect_err("a page without contents");
        assert!(error.to_string().contains("page 15"), "{error}");
    });
}

#[test]
fn pager_takes_over_from_a_stopped_one() {
    within_a_minute(|| {
        let scene = Arc::new(Scene::new());
        let mut pager = scene.pager(false, false);
        let done = Arc::new(AtomicBool::new(false));
        let reader = {
            let (scene, done) = (scene.clone(), done.clone());
            thread::spawn(move || {
                let mut state = 5;
                for _ in 0..4000 {
                    let page = random(&mut state) % PAGES;
                    assert_eq!(scene.read(page, 100), expected(page, 100), "page {page}");
                    scene.write(page, 101, 1);
                }
                done.store(true, Ordering::Release);
            })
        };
        while !done.load(Ordering::Acquire) {
            while pager.counters().faults.load(Ordering::Relaxed) < 50 && !done.load(Ordering::Acquire) {
                thread::sleep(Duration::from_millis(1));
            }
            drop(pager);
            pager = scene.pager(true, false);
        }
        reader.join().expect("the reader");
        pager.ensure(0, 0, PAGES).expect("all pages");
        assert!(pager.wait(Duration::from_secs(10), 0));
        for page in 0..PAGES {
            assert_eq!(scene.read(page, 100), expected(page, 100), "page {page}");
        }
    });
}
