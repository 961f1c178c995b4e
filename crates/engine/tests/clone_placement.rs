//! Private pages of a clone: sending from one private mapping of a base, and placement in another one.

mod memory;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::thread;

use memory::{TIMEOUT, allocated, ends, format, small_file, target};
use pageferry_engine::block::{Class, Codec};
use pageferry_engine::mapping::Mapping;
use pageferry_engine::pages::PageSet;
use pageferry_engine::placer::Placer;
use pageferry_engine::private_mappings::PrivateMappings;
use pageferry_engine::saver::{Overlay, PageOrigin, ProcessRange};
use pageferry_engine::segment::Segment;
use pageferry_engine::space::Space;
use pageferry_engine::uapi::{REGISTER_MODE_MISSING, Userfault};
use pageferry_engine::{SLOTS, SMALL_PAGE};

const PAGES: usize = 2 * SLOTS;
/// Number of pages that the base contains. The others are holes.
const FILLED: usize = SLOTS;

/// Private mapping of a base in this process.
struct Guest {
    address: *mut u8,
    uffd: Arc<Userfault>,
}

impl Guest {
    fn new(base: &Mapping) -> Self {
        let (len, access) = (PAGES * SMALL_PAGE, libc::PROT_READ | libc::PROT_WRITE);
        let fd = base.as_fd().as_raw_fd();
        // SAFETY: the kernel chooses an unused address.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_PRIVATE, fd, 0) };
        assert_ne!(address, libc::MAP_FAILED);
        let uffd = Userfault::own().expect("a userfaultfd");
        uffd.enable(0).expect("the API");
        uffd.register(address as u64, len as u64, REGISTER_MODE_MISSING).expect("a registration");
        Self { address: address.cast(), uffd: Arc::new(uffd) }
    }

    /// Returns the byte of which all bytes of a page consist.
    fn byte(&self, page: usize) -> u8 {
        // SAFETY: the page lies in the mapping, and no other thread writes to it.
        let bytes = unsafe { std::slice::from_raw_parts(self.address.wrapping_add(page * SMALL_PAGE), SMALL_PAGE) };
        assert!(bytes.iter().all(|&byte| byte == bytes[0]), "page {page} is torn");
        bytes[0]
    }

    fn write(&self, page: usize, byte: u8) {
        // SAFETY: the page lies in the mapping.
        unsafe { self.address.wrapping_add(page * SMALL_PAGE).write_bytes(byte, SMALL_PAGE) };
    }

    fn range(&self) -> ProcessRange {
        ProcessRange { space: own(), address: self.address as u64, len: PAGES * SMALL_PAGE }
    }

    fn placer(&self, staging: &Arc<Mapping>) -> Arc<Placer> {
        let (address, len) = (self.address as u64, (PAGES * SMALL_PAGE) as u64);
        let segments = vec![Segment { space: own(), address, len, region: 0, first_page: 0 }];
        let mappings = PrivateMappings::new(segments, HashMap::from([(own().pid(), self.uffd.clone())]));
        Arc::new(Placer::for_clone(vec![target(staging)], mappings).expect("a placer"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value.
        unsafe { libc::munmap(self.address.cast(), PAGES * SMALL_PAGE) };
    }
}

fn own() -> Arc<Space> {
    let pid = i32::try_from(std::process::id()).expect("a pid");
    Arc::new(Space::open(pid).expect("our address space"))
}

/// Creates a base whose first pages are filled with the byte 9.
fn base() -> Arc<Mapping> {
    let base = small_file(PAGES);
    file(&base).write_all_at(&[9; FILLED * SMALL_PAGE], 0).expect("a base");
    base
}

fn file(mapping: &Mapping) -> File {
    File::from(mapping.as_fd().try_clone_to_owned().expect("a descriptor"))
}

fn blocks(base: &Mapping) -> u64 {
    file(base).metadata().expect("metadata").blocks()
}

fn set(pages: &[usize]) -> PageSet {
    let mut set = PageSet::new(PAGES);
    pages.iter().for_each(|&page| set.insert(page, page + 1));
    set
}

#[test]
fn private_pages_replace_pages_and_holes_of_the_base() {
    let (base, staging) = (base(), small_file(PAGES));
    let (source, clone) = (Guest::new(&base), Guest::new(&base));
    let before = blocks(&base);
    for (page, byte) in [(0, 1), (3, 2), (4, 3), (70, 0)] {
        source.write(page, byte);
    }
    // SAFETY: the page lies in the mapping of the source, which belongs to this test.
    unsafe { source.uffd.copy(source.address as u64 + (SLOTS * SMALL_PAGE) as u64, [5; SMALL_PAGE].as_ptr(), 4096) }
        .expect("a private page over a hole");
    assert_eq!(clone.byte(3), 9); // the page of the base is mapped, so its private page has to be copied by the kernel
    let placer = clone.placer(&staging);
    let (sender, receiver) = ends(2, format(Codec::Lz4), &placer, TIMEOUT);
    let round = |pages: PageSet, number| {
        thread::scope(|scope| {
            let receiving = scope.spawn(|| receiver.receive(number));
            sender.send(&[PageOrigin::Private(source.range())], &[pages], number, true).expect("a round sent");
            receiving.join().expect("no panic").expect("a round received");
        });
    };
    round(PageSet::full(PAGES), 1);
    assert_eq!((placer.missing(), placer.move_private().expect("moved")), (0, 5));
    assert_eq!(allocated(&staging), 0);
    source.write(3, 7);
    source.write(4, 0);
    round(set(&[3, 4]), 2);
    assert_eq!(placer.move_private().expect("moved"), 2);
    assert_eq!(placer.move_private().expect("moved"), 0);
    let found: Vec<u8> = [0, 1, 3, 4, 70, SLOTS].map(|page| clone.byte(page)).to_vec();
    assert_eq!(found, [1, 9, 7, 0, 0, 5]);
    assert_eq!(blocks(&base), before);
}

#[test]
fn private_page_does_not_become_a_page_of_the_base_again() {
    let (base, staging) = (base(), small_file(PAGES));
    let placer = Guest::new(&base).placer(&staging);
    placer.place_empty(0, 0, PAGES, Class::Absent).expect("pages of the base");
    placer.place_empty(0, 5, 1, Class::Zero).expect("a page of zeros");
    let refused = placer.place_empty(0, 0, 6, Class::Absent).expect_err("a private page");
    assert!(refused.to_string().contains("page 5"), "{refused}");
    assert_eq!(placer.missing(), 0);
}

#[test]
fn page_outside_the_private_mapping_is_an_error() {
    let (base, staging) = (base(), small_file(PAGES + 1));
    let clone = Guest::new(&base);
    let placer = clone.placer(&staging);
    placer.place_empty(0, PAGES, 1, Class::Zero).expect("a page of zeros");
    let lost: io::Error = placer.move_private().expect_err("the page is not mapped");
    assert_eq!(lost.raw_os_error(), Some(libc::EFAULT));
}

#[test]
fn overlay_contains_the_base_and_private_pages() {
    let (base, staging) = (base(), small_file(PAGES));
    let source = Guest::new(&base);
    source.write(3, 2);
    let overlay = Overlay { base: Arc::new(file(&base)), offset: 0, private: source.range() };
    let placer = memory::placer(vec![target(&staging)]);
    let (sender, receiver) = ends(1, format(Codec::None), &placer, TIMEOUT);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(1));
        sender.send(&[PageOrigin::Overlay(overlay)], &[PageSet::full(PAGES)], 1, true).expect("a round sent");
        receiving.join().expect("no panic").expect("a round received");
    });
    let contents = memory::contents(&staging);
    let bytes: Vec<u8> = [0, 3, FILLED - 1, FILLED, PAGES - 1].map(|page| contents[page * SMALL_PAGE]).to_vec();
    assert_eq!(bytes, [9, 2, 9, 0, 0]);
    assert_eq!(allocated(&staging), (FILLED * SMALL_PAGE) as u64);
}
