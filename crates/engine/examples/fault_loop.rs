//! Cost of a fault on a deferred page, measured alternately for the pager and for a minimal loop. For each fault, the
//! loop reads the event, and copies and maps 64 KiB.
//!
//! `cargo run --release -p pageferry-engine --example fault_loop`. The contents for the loop are in memory. The pager
//! reads the same contents from an uncompressed image in the page cache, and verifies them.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Builder, Class, Codec};
use pageferry_engine::faults::Event;
use pageferry_engine::image::{Chain, Image, ImageWriter, PageEntry, Sizes};
use pageferry_engine::mapping::Mapping;
use pageferry_engine::pager::{Begin, FEATURES, FillOrder, Flags, Origin, Pager, Plan, Targets, file_len};
use pageferry_engine::placer::Target;
use pageferry_engine::segment::Segment;
use pageferry_engine::space::{Faults, Space};
use pageferry_engine::uapi::{REGISTER_MODE_MINOR, REGISTER_MODE_MISSING};

const UNIT: usize = 64 << 10;
const LEN: usize = 64 << 20;
const PAGES: usize = LEN / SMALL_PAGE;
const TURNS: usize = 7;

fn memory_file(len: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
    let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"faults".as_ptr(), libc::MFD_CLOEXEC)) };
    File::from(file.try_clone()?).set_len(len as u64)?;
    Ok(file)
}

/// Accesses every unit once, in an irregular order. Returns the duration of each access in nanoseconds.
fn touch(mapping: &Mapping) -> Vec<u128> {
    let units = LEN / UNIT;
    let unit = |number: usize| number * 389 % units * (UNIT / SMALL_PAGE);
    let access = |number| {
        let begin = Instant::now();
        // SAFETY: the unit lies within the mapping.
        unsafe { mapping.page(unit(number)).read_volatile() };
        begin.elapsed().as_nanos()
    };
    (0..units).map(access).collect()
}

fn space() -> io::Result<Arc<Space>> {
    Space::open(libc::pid_t::try_from(std::process::id()).map_err(io::Error::other)?).map(Arc::new)
}

fn bare(contents: &[u8]) -> Result<Vec<u128>, Box<dyn std::error::Error>> {
    let file = memory_file(LEN)?;
    let (ours, theirs) = (Mapping::new(file.as_fd(), LEN, 0)?, Mapping::new(file.as_fd(), LEN, 0)?);
    let (uffd, _) = space()?.kept_userfault(FEATURES, 0, Faults::All)?;
    uffd.register(theirs.address(), LEN as u64, REGISTER_MODE_MISSING | REGISTER_MODE_MINOR)?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut events = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                if uffd.wait(Duration::from_millis(50)).unwrap_or(false) && uffd.read(&mut events, usize::MAX).is_ok() {
                    for event in events.drain(..) {
                        let Event::Fault { address, .. } = event else { continue };
                        let at = usize::try_from(address - theirs.address()).unwrap_or(0) / UNIT * UNIT;
                        let to = ours.page(at / SMALL_PAGE);
                        // SAFETY: both ranges are 64 KiB long, and no other thread accesses this unit yet.
                        unsafe { std::ptr::copy_nonoverlapping(contents[at..].as_ptr(), to, UNIT) };
                        let _ = uffd.resolve(theirs.address() + at as u64, UNIT as u64, SMALL_PAGE as u64, false);
                    }
                }
            }
        });
        let times = touch(&theirs);
        stop.store(true, Ordering::Relaxed);
        Ok(times)
    })
}

fn paged(chain: &Chain) -> Result<Vec<u128>, Box<dyn std::error::Error>> {
    let file = memory_file(LEN)?;
    let (ours, theirs) = (Arc::new(Mapping::new(file.as_fd(), LEN, 0)?), Mapping::new(file.as_fd(), LEN, 0)?);
    let (uffd, _) = space()?.kept_userfault(FEATURES, 0, Faults::All)?;
    let segment = Segment { space: space()?, address: theirs.address(), len: LEN as u64, region: 0, first_page: 0 };
    let pager = Pager::start(Plan {
        from: Origin::Images(chain.clone()),
        targets: Targets::Files(vec![Target { mapping: ours, page_size: SMALL_PAGE, large: Vec::new() }]),
        watched: vec![(segment, Arc::new(uffd))],
        flags: Flags::open(memory_file(file_len(PAGES))?.as_fd(), PAGES)?,
        begin: Begin::Empty,
        order: FillOrder::default(),
        background: false,
        eager: false,
        whole_blocks: true,
        read_ahead: true,
        evicting: false,
        checks_removals: false,
        fatal: false,
    })?;
    let times = touch(&theirs);
    pager.wait(Duration::from_secs(10), 0);
    Ok(times)
}

/// Creates an image with one storage block per unit, so that a fault reads exactly what the loop copies.
fn image(contents: &[u8]) -> Result<Chain, Box<dyn std::error::Error>> {
    let file = memory_file(0)?;
    let mut writer = ImageWriter::new(file.try_clone()?, [1; 16], Sizes { page_block: UNIT, storage_block: UNIT })?;
    let mut builder = Builder::new(Codec::None, UNIT, UNIT);
    let mut map = Vec::with_capacity(PAGES);
    for (unit, bytes) in contents.chunks(UNIT).enumerate() {
        let pages = UNIT / SMALL_PAGE;
        for (slot, page) in bytes.chunks(SMALL_PAGE).enumerate() {
            builder.push_data(unit * pages + slot, page);
        }
        let number = writer.append(&builder.build(0, 0, 0))?;
        map.extend((0..pages).map(|slot| PageEntry::stored(Class::Data, 0, number, u16::try_from(slot).unwrap_or(0))));
    }
    writer.finish(1, &map)?;
    Ok(Chain::new(vec![Arc::new(Image::open(file)?)])?)
}

fn median(mut times: Vec<u128>) -> u128 {
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let contents: Vec<u8> = (0..LEN).map(|at| ((at * 7919) >> 5).to_le_bytes()[0] | 1).collect();
    let chain = image(&contents)?;
    let turns = std::env::args().nth(1).map_or(Ok(TURNS), |word| word.parse())?;
    let mut out = io::stdout();
    let mut ratios = Vec::new();
    for turn in 0..turns {
        let (bare, paged) = (median(bare(&contents)?), median(paged(&chain)?));
        ratios.push(paged * 1000 / bare);
        writeln!(out, "turn {turn}: bare loop {} us, pager {} us for 64 KiB", bare / 1000, paged / 1000)?;
    }
    let ratio = median(ratios);
    writeln!(out, "median ratio {}.{:02}", ratio / 1000, ratio % 1000 / 10)?;
    Ok(())
}
