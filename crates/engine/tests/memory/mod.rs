//! Helpers for the tests of wire, placer and pager: memory files, sockets and a deadline.
#![allow(dead_code, reason = "each test file uses only part of this module")]

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use pageferry_engine::block::Codec;
use pageferry_engine::file_systems;
use pageferry_engine::mapping::Mapping;
use pageferry_engine::placer::{Placer, Target};
use pageferry_engine::wire::{BlockReceiver, BlockSender, Format};
use pageferry_engine::{LARGE_PAGE, SMALL_PAGE};

/// Timeout for operations that must complete earlier.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Runs `work`, which may hang, in a separate thread. Panics if `work` takes more than a minute.
pub fn within_a_minute(work: impl FnOnce() + Send + 'static) {
    let (done, finished) = mpsc::channel();
    let worker = thread::spawn(move || {
        work();
        let _ = done.send(());
    });
    match finished.recv_timeout(Duration::from_secs(60)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("the operation takes more than a minute"),
        _ => worker.join().expect("the thread panicked"),
    }
}

/// Creates and maps a memfd of `pages` base pages, all holes.
pub fn small_file(pages: usize) -> Arc<Mapping> {
    // SAFETY: the name is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
    mapped(&file, pages)
}

/// Creates and maps a file on a detached tmpfs with huge=always and a capacity of `room` bytes. Returns `None` if
/// mounting is not permitted.
pub fn large_file(pages: usize, room: u64) -> Option<Arc<Mapping>> {
    let directory = match file_systems::large_tmpfs(room) {
        Ok(directory) => directory,
        Err(error) => {
            eprintln!("skipped: cannot mount a tmpfs ({error})");
            return None;
        }
    };
    Some(mapped(&open_unnamed(directory.as_fd().as_raw_fd(), c"."), pages))
}

/// Creates and maps a hugetlbfs file with reserved pages. Returns `None` if there are too few free huge pages.
pub fn huge_file(pages: usize) -> Option<Arc<Mapping>> {
    // SAFETY: the name is NUL-terminated.
    let file = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB) };
    if file < 0 {
        return None;
    }
    // SAFETY: the descriptor is not negative, is new and has no other owner.
    let file = unsafe { File::from_raw_fd(file) };
    let len = pages * SMALL_PAGE;
    file.set_len(len as u64).ok()?;
    // Mapping the file reserves its pages, or fails.
    let mapping = Mapping::new(file.as_fd(), len, 0);
    if mapping.is_err() {
        eprintln!("skipped: fewer than {} free huge pages", len / LARGE_PAGE);
    }
    mapping.ok().map(Arc::new)
}

fn open_unnamed(directory: i32, path: &CStr) -> File {
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: the path is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
    unsafe { File::from_raw_fd(libc::openat(directory, path.as_ptr(), flags, 0o600)) }
}

fn mapped(file: &File, pages: usize) -> Arc<Mapping> {
    file.set_len((pages * SMALL_PAGE) as u64).expect("a file of that size");
    Arc::new(Mapping::new(file.as_fd(), pages * SMALL_PAGE, 0).expect("a mapping"))
}

/// Returns the allocated size of a file in bytes.
pub fn allocated(mapping: &Mapping) -> u64 {
    let file = File::from(mapping.as_fd().try_clone_to_owned().expect("a descriptor"));
    file.metadata().expect("metadata").blocks() * 512
}

/// Fills a page with a byte; 0 makes it a zero page.
pub fn fill(mapping: &Mapping, page: usize, byte: u8) {
    // SAFETY: the page lies within the mapping, which `page` asserts.
    unsafe { std::ptr::write_bytes(mapping.page(page), byte, SMALL_PAGE) }
}

/// Returns the contents of a page. Reading a hole may allocate it.
pub fn page(mapping: &Mapping, page: usize) -> &[u8] {
    // SAFETY: the page lies within the mapping, and the tests do not write while they read.
    unsafe { std::slice::from_raw_parts(mapping.page(page), SMALL_PAGE) }
}

/// Returns the contents of the whole file. Reads the file with pread(2), so that holes stay holes.
pub fn contents(mapping: &Mapping) -> Vec<u8> {
    let file = File::from(mapping.as_fd().try_clone_to_owned().expect("a descriptor"));
    let mut bytes = vec![0; mapping.len()];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).expect("the whole file");
    bytes
}

/// Creates a target of base pages that has no huge pages at the source.
pub fn target(mapping: &Arc<Mapping>) -> Target {
    Target { mapping: mapping.clone(), page_size: SMALL_PAGE, large: Vec::new() }
}

/// Creates a target with huge pages at the source. `large` contains, for each unit, whether it is backed by a huge
/// page.
pub fn large_target(mapping: &Arc<Mapping>, large: Vec<bool>) -> Target {
    Target { mapping: mapping.clone(), page_size: SMALL_PAGE, large }
}

pub fn placer(targets: Vec<Target>) -> Arc<Placer> {
    Arc::new(Placer::new(targets, Vec::new(), true, 0).expect("a placer"))
}

/// Creates a sender and a receiver that are connected by `streams` socket pairs.
pub fn ends(streams: usize, format: Format, placer: &Arc<Placer>, timeout: Duration) -> (BlockSender, BlockReceiver) {
    let pairs = (0..streams).map(|_| UnixStream::pair().expect("a pair of sockets"));
    let (ours, theirs): (Vec<OwnedFd>, Vec<OwnedFd>) = pairs.map(|(a, b)| (a.into(), b.into())).unzip();
    let sender = BlockSender::new(ours, format, timeout).expect("a sender");
    (sender, BlockReceiver::new(theirs, placer.clone(), timeout).expect("a receiver"))
}

pub fn format(codec: Codec) -> Format {
    Format { codec, adaptive: false, bandwidth: 0, page_block: 4 * SMALL_PAGE, storage_block: 32 * SMALL_PAGE }
}

/// Returns the number of 2 MiB units of a mapping, including a shorter last one.
pub fn units(mapping: &Mapping) -> usize {
    mapping.len().div_ceil(LARGE_PAGE)
}
