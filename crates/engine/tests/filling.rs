//! Tests of background loading of images whose page blocks contain consecutive pages, which are unpacked in place.
//!
//! Operations that may hang run in a thread with a deadline.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use pageferry_engine::block::{Builder, Class, Codec};
use pageferry_engine::image::{Chain, Image, ImageWriter, PageEntry, Sizes};
use pageferry_engine::mapping::Mapping;
use pageferry_engine::pager::{Begin, FEATURES, FillOrder, Flags, Origin, Pager, Plan, Targets, file_len};
use pageferry_engine::placer::Target;
use pageferry_engine::segment::Segment;
use pageferry_engine::space::{Faults, Space};
use pageferry_engine::{SLOTS, SMALL_PAGE};

mod memory;
use memory::within_a_minute;

/// Number of pages; the last page block is not full.
const PAGES: usize = 2 * SLOTS + 37;
const SIZES: Sizes = Sizes { page_block: 64 << 10, storage_block: 256 << 10 };
const PER_BLOCK: usize = SIZES.page_block / SMALL_PAGE;
const CODECS: [Codec; 3] = [Codec::None, Codec::Lz4, Codec::Zstd];

fn memory_file(len: usize) -> OwnedFd {
    // SAFETY: the name is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
    let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"filling".as_ptr(), libc::MFD_CLOEXEC)) };
    File::from(file.try_clone().expect("a duplicate")).set_len(len as u64).expect("space");
    file
}

/// Returns the contents of a page: half random, half constant, so that both codecs compress the page.
fn contents(page: usize) -> Vec<u8> {
    let word = |at: usize| ((page as u64) << 32 | at as u64 | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..512).flat_map(|at| if at < 256 { word(at) } else { page as u64 }.to_le_bytes()).collect()
}

/// Creates an image whose pages are stored in their order. Returns the chain and the file.
fn image(codec: Codec) -> (Chain, File) {
    let file = memory_file(0);
    let mut writer = ImageWriter::new(file.try_clone().expect("a duplicate"), [7; 16], SIZES).expect("a writer");
    let mut builder = Builder::new(codec, SIZES.page_block, SIZES.storage_block);
    let pages: Vec<usize> = (0..PAGES).collect();
    let mut map = Vec::new();
    for pages in pages.chunks(SIZES.storage_block / SMALL_PAGE) {
        let slots: Vec<_> = pages.iter().map(|&page| builder.push_data(page, &contents(page))).collect();
        let number = writer.append(&builder.build(0, 0, 0)).expect("a block");
        let slots = slots.into_iter().map(|slot| u16::try_from(slot).expect("a slot"));
        map.extend(slots.map(|slot| PageEntry::stored(Class::Data, 0, number, slot)));
    }
    writer.finish(1, &map).expect("an image");
    let chain = Chain::new(vec![Arc::new(Image::open(file.try_clone().expect("a duplicate")).expect("an image"))]);
    (chain.expect("a chain"), file.into())
}

/// Starts eager loading into `mapping`. `workload`: mapping whose faults the pager resolves.
fn pager(chain: Chain, mapping: Arc<Mapping>, workload: Option<&Mapping>) -> Pager {
    let blocks = u32::try_from(chain.nearest().blocks().len()).expect("few blocks");
    let watched = workload.map(|workload| {
        let space = Space::open(libc::pid_t::try_from(std::process::id()).expect("a pid")).expect("our own process");
        let space = Arc::new(space);
        let (uffd, _) = space.kept_userfault(FEATURES, 0, Faults::All).expect("a userfaultfd");
        let (address, len) = (workload.address(), (PAGES * SMALL_PAGE) as u64);
        (Segment { space, address, len, region: 0, first_page: 0 }, Arc::new(uffd))
    });
    Pager::start(Plan {
        from: Origin::Images(chain),
        targets: Targets::Files(vec![Target { mapping, page_size: SMALL_PAGE, large: vec![true; PAGES / SLOTS] }]),
        watched: watched.into_iter().collect(),
        flags: Flags::open(memory_file(file_len(PAGES)).as_fd(), PAGES).expect("flags"),
        begin: Begin::Empty,
        order: FillOrder { windows: vec![3], blocks: (0..blocks).map(|block| (0, block)).collect() },
        background: true,
        eager: true,
        whole_blocks: true,
        read_ahead: true,
        evicting: false,
        checks_removals: false,
        fatal: false,
    })
    .expect("a pager")
}

fn mapping() -> (Arc<Mapping>, Mapping) {
    let file = memory_file(PAGES * SMALL_PAGE);
    let map = || Mapping::new(file.as_fd(), PAGES * SMALL_PAGE, 0).expect("a mapping");
    (Arc::new(map()), map())
}

/// Returns the bytes of a page of a mapping.
fn read(mapping: &Mapping, page: usize) -> Vec<u8> {
    let mut bytes = vec![0; SMALL_PAGE];
    // SAFETY: the page lies in the mapping, and no thread writes to it after it has been loaded.
    unsafe { std::ptr::copy_nonoverlapping(mapping.page(page), bytes.as_mut_ptr(), SMALL_PAGE) };
    bytes
}

#[test]
fn all_pages_are_loaded_without_faults() {
    for codec in CODECS {
        within_a_minute(move || {
            let (ours, _) = mapping();
            let pager = pager(image(codec).0, ours.clone(), None);
            assert!(pager.wait(Duration::from_secs(30), 0), "{:?}", pager.failures());
            assert!((0..PAGES).all(|page| read(&ours, page) == contents(page)));
            assert_eq!(pager.counters().loaded.load(Ordering::Relaxed), PAGES as u64);
        });
    }
}

#[test]
fn faults_during_eager_loading_read_the_same_contents() {
    for codec in CODECS {
        within_a_minute(move || {
            let (ours, theirs) = mapping();
            let pager = pager(image(codec).0, ours, Some(&theirs));
            thread::scope(|scope| {
                for first in [0, 700] {
                    let theirs = &theirs;
                    scope.spawn(move || {
                        for page in (0..PAGES).map(|number| (first + number * 331) % PAGES) {
                            assert_eq!(read(theirs, page), contents(page), "page {page}");
                        }
                    });
                }
            });
            assert!(pager.wait(Duration::from_secs(30), 0), "{:?}", pager.failures());
            assert_eq!(pager.counters().loaded.load(Ordering::Relaxed), PAGES as u64);
        });
    }
}

#[test]
fn damaged_page_block_stays_deferred_and_all_others_are_loaded() {
    for codec in CODECS {
        within_a_minute(move || {
            let (chain, file) = image(codec);
            // The last byte of the third storage block is in its last page block.
            let entry = chain.nearest().blocks()[2];
            let at = entry.offset.get() + u64::from(entry.len.get()) - 1;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("a byte");
            file.write_all_at(&[!byte[0]], at).expect("a byte");
            let (ours, _) = mapping();
            let pager = pager(chain, ours.clone(), None);
            let end = 3 * SIZES.storage_block / SMALL_PAGE;
            while pager.pending() > PER_BLOCK || pager.failures().len() < PER_BLOCK {
                thread::sleep(Duration::from_millis(1)); // the test fails after a minute
            }
            assert!(!pager.is_finished());
            let missing = pager.missing(0).expect("a region");
            assert_eq!(missing.runs().collect::<Vec<_>>(), [(end - PER_BLOCK, end)]);
            assert!(pager.failures().iter().all(|failure| (end - PER_BLOCK..end).contains(&failure.page)));
            assert!(pager.ensure(0, end - 1, 1).is_err());
            assert!((0..PAGES).filter(|&page| !missing.contains(page)).all(|page| read(&ours, page) == contents(page)));
        });
    }
}
