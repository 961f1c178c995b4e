//! Duration of an eager load of an image, measured alternately for the pager and for a minimal loop. The loop reads the
//! same file into fresh huge pages, without verifying or decompressing the contents. Prints milliseconds, and the sizes
//! of the stored and of the decompressed data.
//!
//! `cargo run --release -p pageferry-engine --example fill_speed -- IMAGE [TURNS]`. In each turn, the file is first
//! dropped from the page cache, and the pager reads the file from disk. Then the loop and the pager read the file from
//! the page cache. Both use one thread per core. The program mounts a tmpfs, which requires root.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry_engine::block::Class;
use pageferry_engine::image::{Chain, Image};
use pageferry_engine::mapping::Mapping;
use pageferry_engine::pager::{Begin, FillOrder, Flags, Origin, Pager, Plan, Targets, file_len};
use pageferry_engine::placer::Target;
use pageferry_engine::uapi::check;
use pageferry_engine::{LARGE_PAGE, SLOTS, SMALL_PAGE, file_systems};

const TURNS: usize = 5;
type Failure = Box<dyn std::error::Error>;

/// Creates an unnamed file in a directory.
fn unnamed(directory: &OwnedFd, len: usize) -> io::Result<OwnedFd> {
    let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
    // SAFETY: the path is NUL-terminated.
    let file = check(unsafe { libc::openat(directory.as_raw_fd(), c".".as_ptr(), flags, 0o600) })?;
    // SAFETY: the descriptor is new and has no other owner.
    let file = unsafe { OwnedFd::from_raw_fd(file) };
    File::from(file.try_clone()?).set_len(len as u64)?;
    Ok(file)
}

/// Creates and maps a file of fresh huge pages.
fn fresh(len: usize) -> io::Result<Arc<Mapping>> {
    let directory = file_systems::large_tmpfs((len + (64 << 20)) as u64)?;
    Mapping::new(unnamed(&directory, len)?.as_fd(), len, 0).map(Arc::new)
}

fn bare(file: &File, len: usize) -> Result<Duration, Failure> {
    let mapping = fresh(len.next_multiple_of(LARGE_PAGE))?;
    let (begin, next) = (Instant::now(), AtomicUsize::new(0));
    let work = || {
        loop {
            let at = next.fetch_add(LARGE_PAGE, Ordering::Relaxed);
            if at >= len {
                return Ok(());
            }
            // SAFETY: the part lies within the mapping, and this thread alone accesses it.
            let part =
                unsafe { std::slice::from_raw_parts_mut(mapping.page(at / SMALL_PAGE), LARGE_PAGE.min(len - at)) };
            file.read_exact_at(part, at as u64)?;
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (1..cores()).map(|_| scope.spawn(work)).collect();
        let ours: io::Result<()> = work();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())))?;
        ours
    })?;
    Ok(begin.elapsed())
}

fn paged(chain: &Chain, pages: usize) -> Result<Duration, Failure> {
    let mapping = fresh(pages * SMALL_PAGE)?;
    let directory = file_systems::large_tmpfs(file_len(pages) as u64 + (4 << 20))?;
    let bitmap = unnamed(&directory, file_len(pages))?;
    let begin = Instant::now();
    let blocks = chain.images().iter().enumerate();
    let pager = Pager::start(Plan {
        from: Origin::Images(chain.clone()),
        targets: Targets::Files(vec![Target { mapping, page_size: SMALL_PAGE, large: vec![true; pages / SLOTS] }]),
        watched: Vec::new(),
        flags: Flags::open(bitmap.as_fd(), pages)?,
        begin: Begin::Empty,
        order: FillOrder {
            windows: Vec::new(),
            blocks: blocks
                .flat_map(|(number, image)| (0u32..).zip(image.blocks()).map(move |(block, _)| (number, block)))
                .collect(),
        },
        background: true,
        eager: true,
        whole_blocks: true,
        read_ahead: true,
        evicting: false,
        checks_removals: false,
        fatal: false,
    })?;
    if !pager.wait(Duration::from_secs(600), 0) {
        return Err("the image cannot be loaded".into());
    }
    Ok(begin.elapsed())
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn main() -> Result<(), Failure> {
    let mut words = std::env::args().skip(1);
    let path = words.next().ok_or("expected the path of an image")?;
    let turns = words.next().map_or(Ok(TURNS), |word| word.parse())?;
    let chain = Chain::new(vec![Arc::new(Image::open(File::open(&path)?.into())?)])?;
    let image = chain.nearest();
    let (file, pages) = (image.file(), image.page_map().len());
    let len = usize::try_from(image.blocks().iter().map(|block| u64::from(block.len.get())).sum::<u64>())?;
    let data = image.page_map().iter().filter(|entry| entry.class() == Some(Class::Data)).count();
    let mut out = io::stdout();
    writeln!(out, "{} MiB stored, {} MiB of data", len >> 20, (data * SMALL_PAGE) >> 20)?;
    for turn in 0..turns {
        // SAFETY: posix_fadvise takes no pointers.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        let (cold, bare, warm) = (paged(&chain, pages)?, bare(file, len)?, paged(&chain, pages)?);
        let [cold, bare, warm] = [cold, bare, warm].map(|time| time.as_millis().max(1));
        writeln!(out, "turn {turn}: bare loop {bare} ms, pager {cold} ms cold, {warm} ms warm")?;
    }
    Ok(())
}
