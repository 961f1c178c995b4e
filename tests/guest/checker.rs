//! Checker, `/init` of the test guest: fills memory with self-describing pages, keeps rewriting and verifying them, and
//! reports errors on the serial line.
//!
//! The contents of each page are a function of (page number, version). A table elsewhere in memory holds the current
//! version of each page, and a separate counter holds the sum of all versions. They reveal lost writes, stale pages,
//! torn pages, and a table older than its pages:
//!
//! ```text
//! FERRY ready pages=12800 threads=2
//! FERRY tick 7 writes=3500 verified=25600 passes=2 errors=0
//! FERRY BAD page=17 word=3 expected-version=5 found-version=4
//! FERRY BAD total thread=0 expected=812 found=811
//! ```
//!
//! `passes` is the number of complete sweeps of the slowest thread: after two more passes, each page has been verified
//! again.
//!
//! Options on the kernel command line, each with its default: `ferry.mib` (memory, MiB, 64), `ferry.rate` (pages
//! written per second, 2000), `ferry.verify` (pages verified per second, one sweep), `ferry.hot` (percent of the pages
//! that are written, 100), `ferry.zero` (percent of (page, version) pairs whose contents are all zeros, 20),
//! `ferry.threads` (one per vCPU), `ferry.tick` (ms between ticks, 200).

use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_long, c_ulong, c_void};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

const WORDS: usize = 512;
const REPORTED_PER_THREAD: u64 = 8;
const SLOT: Duration = Duration::from_millis(10);

type Page = [u64; WORDS];

unsafe extern "C" {
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
    fn mmap(address: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    fn pause() -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

/// Counters of one thread, read by the thread that prints.
#[derive(Default)]
struct Counters {
    writes: AtomicU64,
    verified: AtomicU64,
    passes: AtomicU64,
    errors: AtomicU64,
}

struct Settings {
    pages: usize,
    threads: usize,
    writes_per_second: u64,
    verifies_per_second: u64,
    hot_percent: usize,
    zero_percent: u64,
    tick: Duration,
}

fn main() {
    mount_proc();
    load_modules();
    let settings = Arc::new(settings());
    let memory = allocate(settings.pages);
    let counters: Vec<Arc<Counters>> = (0..settings.threads).map(|_| Arc::default()).collect();
    let filled = Arc::new(std::sync::Barrier::new(settings.threads + 1));
    let share = settings.pages.div_ceil(settings.threads);
    for (number, (slice, counters)) in memory.chunks_mut(share).zip(&counters).enumerate() {
        let (settings, counters, filled) = (settings.clone(), counters.clone(), filled.clone());
        thread::spawn(move || {
            let mut checker = Checker::new(slice, number, number * share, settings, counters);
            filled.wait();
            checker.run();
        });
    }
    filled.wait();
    println!("FERRY ready pages={} threads={}", settings.pages, settings.threads);
    tick_for_ever(&settings, &counters);
}

fn tick_for_ever(settings: &Settings, counters: &[Arc<Counters>]) -> ! {
    let sum = |get: fn(&Counters) -> &AtomicU64| counters.iter().map(|one| get(one).load(Relaxed)).sum::<u64>();
    for number in 1u64.. {
        thread::sleep(settings.tick);
        let passes = counters.iter().map(|one| one.passes.load(Relaxed)).min().unwrap_or(0);
        println!(
            "FERRY tick {number} writes={} verified={} passes={passes} errors={}",
            sum(|one| &one.writes),
            sum(|one| &one.verified),
            sum(|one| &one.errors)
        );
    }
    // The first process of a kernel must not exit.
    loop {
        // SAFETY: pause(2) takes no arguments and accesses no memory.
        unsafe { pause() };
    }
}

/// Share of the pages that one thread writes and verifies, with the expected versions.
struct Checker {
    pages: &'static mut [Page],
    number: usize,
    first_page: usize,
    versions: Vec<u64>,
    total: u64,
    next: usize,
    random: u64,
    settings: Arc<Settings>,
    counters: Arc<Counters>,
}

impl Checker {
    fn new(pages: &'static mut [Page], number: usize, first_page: usize, settings: Arc<Settings>, counters: Arc<Counters>) -> Self {
        let versions = vec![1; pages.len()];
        let total = pages.len() as u64;
        for (index, page) in pages.iter_mut().enumerate() {
            fill(page, first_page + index, 1, settings.zero_percent);
        }
        let random = mix(number as u64 + 1);
        Self { pages, number, first_page, versions, total, next: 0, random, settings, counters }
    }

    /// In each time slot, writes and verifies as many pages as the rates allow, then sleeps.
    fn run(&mut self) {
        let slots_per_second = 1000 / SLOT.as_millis() as u64 * self.settings.threads as u64;
        let (mut write_credit, mut verify_credit) = (0, 0);
        loop {
            let started = Instant::now();
            write_credit += self.settings.writes_per_second;
            verify_credit += self.settings.verifies_per_second;
            for _ in 0..write_credit / slots_per_second {
                self.write_one();
            }
            for _ in 0..verify_credit / slots_per_second {
                self.verify_next();
            }
            write_credit %= slots_per_second;
            verify_credit %= slots_per_second;
            thread::sleep(SLOT.saturating_sub(started.elapsed()).max(Duration::from_millis(1)));
        }
    }

    /// Verifies a random page and writes its next version.
    fn write_one(&mut self) {
        self.random = mix(self.random);
        let hot = (self.pages.len() * self.settings.hot_percent / 100).max(1);
        let index = (self.random % hot as u64) as usize;
        self.verify(index);
        let version = self.versions[index] + 1;
        self.versions[index] = version;
        self.total += 1;
        fill(&mut self.pages[index], self.first_page + index, version, self.settings.zero_percent);
        self.counters.writes.fetch_add(1, Relaxed);
    }

    fn verify_next(&mut self) {
        self.verify(self.next);
        self.next += 1;
        if self.next == self.pages.len() {
            self.next = 0;
            self.verify_total();
            self.counters.passes.fetch_add(1, Relaxed);
        }
    }

    fn verify(&mut self, index: usize) {
        let (number, version) = (self.first_page + index, self.versions[index]);
        let page = &self.pages[index];
        if let Some(word) = first_wrong_word(page, number, version, self.settings.zero_percent) {
            let found = page[1];
            self.report(format_args!("page={number} word={word} expected-version={version} found-version={found}"));
            // Restore the expected contents, so that only one pass reports the error.
            fill(&mut self.pages[index], number, version, self.settings.zero_percent);
        }
        self.counters.verified.fetch_add(1, Relaxed);
    }

    fn verify_total(&mut self) {
        let found: u64 = self.versions.iter().sum();
        if found != self.total {
            let (thread, expected) = (self.number, self.total);
            self.report(format_args!("total thread={thread} expected={expected} found={found}"));
            self.total = found;
        }
    }

    fn report(&self, what: std::fmt::Arguments<'_>) {
        if self.counters.errors.fetch_add(1, Relaxed) < REPORTED_PER_THREAD {
            println!("FERRY BAD {what}");
        }
    }
}

/// Returns the image of `value` under a pseudo-random permutation of the 64-bit values (splitmix64).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Returns the difference between adjacent words of a page; `None` if the page is all zeros at this version.
fn recipe(number: usize, version: u64, zero_percent: u64) -> Option<u64> {
    let seed = mix(mix(number as u64) ^ version);
    (seed % 100 >= zero_percent).then_some(seed | 1)
}

/// Fills a page with zeros, or with its number, its version and an arithmetic sequence. The sequences of different
/// versions differ in each word.
fn fill(page: &mut Page, number: usize, version: u64, zero_percent: u64) {
    match recipe(number, version, zero_percent) {
        None => page.fill(0),
        Some(step) => {
            page[0] = number as u64;
            page[1] = version;
            let mut value = step;
            for word in &mut page[2..] {
                value = value.wrapping_add(step);
                *word = value;
            }
        }
    }
}

fn first_wrong_word(page: &Page, number: usize, version: u64, zero_percent: u64) -> Option<usize> {
    match recipe(number, version, zero_percent) {
        None => page.iter().position(|&word| word != 0),
        Some(_) if page[0] != number as u64 => Some(0),
        Some(_) if page[1] != version => Some(1),
        Some(step) => {
            let mut value = step;
            let wrong = page[2..].iter().position(|&word| {
                value = value.wrapping_add(step);
                word != value
            });
            wrong.map(|index| index + 2)
        }
    }
}

fn mount_proc() {
    std::fs::create_dir_all("/proc").expect("cannot create /proc");
    // SAFETY: the arguments are static C strings; `data` may be null.
    let failed = unsafe { mount(c"proc".as_ptr(), c"/proc".as_ptr(), c"proc".as_ptr(), 0, std::ptr::null()) } != 0;
    assert!(!failed, "cannot mount /proc: {}", std::io::Error::last_os_error());
}

/// Loads the kernel modules of the initrd in the order of their names, for drivers such as virtio_balloon.
fn load_modules() {
    const FINIT_MODULE: c_long = 313;
    let Ok(folder) = std::fs::read_dir("/modules") else { return };
    let mut paths: Vec<_> = folder.map(|entry| entry.expect("cannot list /modules").path()).collect();
    paths.sort();
    for path in paths {
        let file = std::fs::File::open(&path).expect("cannot open a module");
        // SAFETY: the file is open during the call. The parameters are a static empty C string.
        let failed = unsafe { syscall(FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) } != 0;
        assert!(!failed, "cannot load {}: {}", path.display(), std::io::Error::last_os_error());
    }
}

fn settings() -> Settings {
    let line = std::fs::read_to_string("/proc/cmdline").expect("cannot read /proc/cmdline");
    let given: HashMap<&str, u64> = line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("ferry.")?.split_once('='))
        .map(|(key, value)| (key, value.parse().expect("ferry.* options must be whole numbers")))
        .collect();
    let get = |key: &str, default: u64| given.get(key).copied().unwrap_or(default);
    let pages = get("mib", 64) * 256;
    Settings {
        pages: pages as usize,
        threads: get("threads", thread::available_parallelism().map_or(1, |n| n.get() as u64)) as usize,
        writes_per_second: get("rate", 2000),
        verifies_per_second: get("verify", pages),
        hot_percent: get("hot", 100) as usize,
        zero_percent: get("zero", 20),
        tick: Duration::from_millis(get("tick", 200)),
    }
}

/// Allocates anonymous memory, without accessing it: the thread that owns a page accesses it first.
fn allocate(pages: usize) -> &'static mut [Page] {
    const READ_WRITE: c_int = 3;
    const PRIVATE_ANONYMOUS: c_int = 0x22;
    // SAFETY: the kernel chooses the address of the new mapping, which is page-aligned, zeroed and never unmapped, and
    // to which no other reference exists. The assertion excludes a failed mmap(2).
    unsafe {
        let address = mmap(std::ptr::null_mut(), pages * 4096, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0);
        assert!(address as isize != -1, "mmap: {}", std::io::Error::last_os_error());
        std::slice::from_raw_parts_mut(address.cast::<Page>(), pages)
    }
}
