//! Tests of mappings that grow at the same address, and of mappings that are replaced by private ones.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::fs::FileExt;

use pageferry_engine::mapping::Mapping;
use pageferry_engine::{LARGE_PAGE, SMALL_PAGE};

fn memory_file(len: usize) -> File {
    // SAFETY: the name is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"mapped file".as_ptr(), 0)) };
    file.set_len(len as u64).expect("the file can be extended");
    file
}

fn read(mapping: &Mapping, page: usize) -> u8 {
    // SAFETY: the page lies within the mapping, which permits reads.
    unsafe { mapping.page(page).read_volatile() }
}

fn write(mapping: &Mapping, page: usize, value: u8) {
    // SAFETY: the page lies within the mapping, which permits writes.
    unsafe { mapping.page(page).write_volatile(value) }
}

#[test]
fn mapping_grows_within_its_reservation_only() {
    let file = memory_file(8 * SMALL_PAGE);
    let mapping = Mapping::with_room(file.as_fd(), 2 * SMALL_PAGE, 0, 8 * SMALL_PAGE).expect("a mapping");
    let address = mapping.address();
    write(&mapping, 1, 7);
    mapping.grow(8 * SMALL_PAGE).expect("room");
    assert_eq!((mapping.address(), mapping.pages()), (address, 8));
    write(&mapping, 7, 9);
    let mut bytes = [0; 1];
    file.read_exact_at(&mut bytes, 7 * SMALL_PAGE as u64).expect("a read");
    assert_eq!((read(&mapping, 1), bytes[0]), (7, 9));
    mapping.grow(SMALL_PAGE).expect("a shorter length has no effect");
    assert_eq!(mapping.pages(), 8);
    assert_eq!(mapping.grow(9 * SMALL_PAGE).map_err(|error| error.raw_os_error()), Err(Some(libc::ENOMEM)));
    mapping.close().expect("mprotect");
    assert_eq!(
        Mapping::with_room(file.as_fd(), SMALL_PAGE, 0, 1).map_err(|error| error.raw_os_error()).err(),
        Some(Some(libc::EINVAL))
    );
}

#[test]
fn mapping_of_hugetlbfs_consists_of_whole_huge_pages() {
    // SAFETY: the name is NUL-terminated, and the call has no other pointers.
    let number = unsafe { libc::memfd_create(c"huge pages".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    if number < 0 {
        return; // the kernel has no hugetlbfs
    }
    // SAFETY: the descriptor is new and has no other owner.
    let file = unsafe { File::from_raw_fd(number) };
    for (len, room) in [(SMALL_PAGE, LARGE_PAGE), (LARGE_PAGE, LARGE_PAGE + SMALL_PAGE)] {
        let refused = Mapping::with_room(file.as_fd(), len, 0, room).map_err(|error| error.raw_os_error()).err();
        assert_eq!(refused, Some(Some(libc::EINVAL)));
    }
}

#[test]
fn replaced_mapping_has_the_contents_of_the_file_and_keeps_writes_private() {
    let (scratch, base) = (memory_file(2 * SMALL_PAGE), memory_file(2 * SMALL_PAGE));
    base.write_all_at(&[5], 0).expect("a write");
    let mapping = Mapping::new(scratch.as_fd(), 2 * SMALL_PAGE, 0).expect("a mapping");
    mapping.replace(base.as_fd()).expect("mmap");
    mapping.permit().expect("mprotect");
    assert_eq!(read(&mapping, 0), 5);
    write(&mapping, 0, 6);
    let mut bytes = [0; 1];
    base.read_exact_at(&mut bytes, 0).expect("a read");
    assert_eq!((read(&mapping, 0), bytes[0]), (6, 5));
}
