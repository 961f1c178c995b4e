//! Cost of faults on deferred pages, with 1, 4, 16 and 64 threads that fault at the same time: CPU time of the pager's
//! demand threads per fault, and the waits of the pager's threads for each other.
//!
//! `cargo run --release -p pageferry-engine --example fault_threads -- [TURNS [MIB]]`. Each fault loads 64 KiB from an
//! uncompressed image in the page cache.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Builder, Class, Codec};
use pageferry_engine::image::{Chain, Image, ImageWriter, PageEntry, Sizes};
use pageferry_engine::mapping::Mapping;
use pageferry_engine::pager::{Begin, FEATURES, FillOrder, Flags, Origin, Pager, Plan, Targets, file_len};
use pageferry_engine::placer::Target;
use pageferry_engine::segment::Segment;
use pageferry_engine::space::{Faults, Space};

const UNIT: usize = 64 << 10;
const MIB: usize = 256;
const THREADS: [usize; 4] = [1, 4, 16, 64];
const TURNS: usize = 3;
type Failure = Box<dyn std::error::Error>;

fn memory_file(len: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
    let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"faults".as_ptr(), libc::MFD_CLOEXEC)) };
    File::from(file.try_clone()?).set_len(len as u64)?;
    Ok(file)
}

/// Creates an image with one storage block per unit.
fn image(len: usize) -> Result<Chain, Failure> {
    let file = memory_file(0)?;
    let mut writer = ImageWriter::new(file.try_clone()?, [1; 16], Sizes { page_block: UNIT, storage_block: UNIT })?;
    let mut builder = Builder::new(Codec::None, UNIT, UNIT);
    let (pages, contents) = (UNIT / SMALL_PAGE, [1; SMALL_PAGE]);
    let mut map = Vec::with_capacity(len / SMALL_PAGE);
    for unit in 0..len / UNIT {
        for slot in 0..pages {
            builder.push_data(unit * pages + slot, &contents);
        }
        let number = writer.append(&builder.build(0, 0, 0))?;
        map.extend((0..pages).map(|slot| PageEntry::stored(Class::Data, 0, number, u16::try_from(slot).unwrap_or(0))));
    }
    writer.finish(1, &map)?;
    Ok(Chain::new(vec![Arc::new(Image::open(file)?)])?)
}

/// Accesses every unit once, in an irregular order, from `threads` threads.
fn touch(mapping: &Mapping, len: usize, threads: usize) {
    let (units, next) = (len / UNIT, AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= units {
                        break;
                    }
                    // SAFETY: the page lies within the mapping.
                    unsafe { mapping.page(number * 1543 % units * (UNIT / SMALL_PAGE)).read_volatile() };
                }
            });
        }
    });
}

/// Prints the figures of one run.
fn run(chain: &Chain, len: usize, threads: usize, out: &mut impl Write) -> Result<(), Failure> {
    let file = memory_file(len)?;
    let (ours, theirs) = (Arc::new(Mapping::new(file.as_fd(), len, 0)?), Mapping::new(file.as_fd(), len, 0)?);
    let space = Arc::new(Space::open(libc::pid_t::try_from(std::process::id())?)?);
    let (uffd, _) = space.kept_userfault(FEATURES, 0, Faults::All)?;
    let segment = Segment { space, address: theirs.address(), len: len as u64, region: 0, first_page: 0 };
    let pager = Pager::start(Plan {
        from: Origin::Images(chain.clone()),
        targets: Targets::Files(vec![Target { mapping: ours, page_size: SMALL_PAGE, large: Vec::new() }]),
        watched: vec![(segment, Arc::new(uffd))],
        flags: Flags::open(memory_file(file_len(len / SMALL_PAGE))?.as_fd(), len / SMALL_PAGE)?,
        begin: Begin::Empty,
        order: FillOrder::default(),
        background: false,
        eager: false,
        whole_blocks: false,
        read_ahead: false,
        // The pager must not end before the demand threads have added their last CPU time.
        evicting: true,
        checks_removals: false,
        fatal: false,
    })?;
    let begin = Instant::now();
    touch(&theirs, len, threads);
    let elapsed = begin.elapsed();
    thread::sleep(Duration::from_millis(300));
    let counters = pager.counters();
    let [faults, cpu, waits, waited] = [&counters.faults, &counters.demand_cpu, &counters.waits, &counters.waited]
        .map(|counter| counter.load(Ordering::Relaxed));
    let (rate, per) = (u128::from(faults) * 1_000_000 / elapsed.as_micros().max(1), faults.max(1));
    writeln!(
        out,
        "{threads} threads: {faults} faults, {rate} per second, {} ns of CPU, {} waits per 1000, {} ns waited",
        cpu / per,
        waits * 1000 / per,
        waited / per
    )?;
    Ok(())
}

fn main() -> Result<(), Failure> {
    let mut words = std::env::args().skip(1).map(|word| word.parse());
    let turns = words.next().unwrap_or(Ok(TURNS))?;
    let len = words.next().unwrap_or(Ok(MIB))? << 20;
    let chain = image(len)?;
    for _ in 0..turns {
        for threads in THREADS {
            run(&chain, len, threads, &mut io::stdout())?;
        }
    }
    Ok(())
}
