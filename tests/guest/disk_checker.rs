//! Disk checker, `/init` of a test guest: fills two IDE disks with self-describing blocks, keeps rewriting and verifying
//! them, and reports errors on the serial line, in the format of the checker of memory.
//!
//! The contents of each block are a function of (disk, block, version). A table in memory holds the current version of
//! each block, so a disk that is older or newer than memory is detected. The program accesses the disks by the I/O ports
//! of the controller, because the kernel of test guests has no driver for disks. Nothing is cached in the guest.
//!
//! Options on the kernel command line, each with its default: `ferry.kib` (checked area of each disk, KiB, 1024),
//! `ferry.rate` (blocks of 4 KiB written per second, 100), `ferry.verify` (blocks verified per second, 400),
//! `ferry.tick` (ms between ticks, 100).

use std::arch::asm;
use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::thread;
use std::time::{Duration, Instant};

const DISKS: u8 = 2;
const SECTOR_WORDS: usize = 256;
const SECTORS: usize = 8;
const WORDS: usize = SECTORS * SECTOR_WORDS / 4;
const REPORTED: u64 = 8;
const SLOT: Duration = Duration::from_millis(20);

const DATA: u16 = 0x1f0;
const COUNT: u16 = 0x1f2;
const ADDRESS: u16 = 0x1f3;
const DRIVE: u16 = 0x1f6;
const COMMAND: u16 = 0x1f7;
const BUSY: u8 = 0x80;
const TRANSFER: u8 = 0x08;
const FAILED: u8 = 0x21;
const READ: u8 = 0x20;
const WRITE: u8 = 0x30;
const FLUSH: u8 = 0xe7;

type Block = [u64; WORDS];

unsafe extern "C" {
    fn iopl(level: c_int) -> c_int;
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
}

fn main() {
    // SAFETY: the call changes only the privileges of this thread.
    assert!(unsafe { iopl(3) } == 0, "cannot access I/O ports: {}", std::io::Error::last_os_error());
    // SAFETY: the arguments are static C strings; `data` may be null.
    let failed = unsafe { mount(c"proc".as_ptr(), c"/proc".as_ptr(), c"proc".as_ptr(), 0, std::ptr::null()) } != 0;
    assert!(!failed, "cannot mount /proc: {}", std::io::Error::last_os_error());
    let blocks = option("kib", 1024) as usize / 4;
    let mut checker = Checker {
        versions: vec![vec![1; blocks]; usize::from(DISKS)],
        next: 0,
        random: 1,
        writes: 0,
        verified: 0,
        passes: 0,
        errors: 0,
    };
    for disk in 0..DISKS {
        (0..blocks).for_each(|block| write(disk, block, &contents(disk, block, 1)));
        flush(disk);
    }
    println!("FERRY ready pages={} threads=1", blocks * usize::from(DISKS));
    checker.run(option("rate", 100), option("verify", 400), Duration::from_millis(option("tick", 100)));
}

struct Checker {
    versions: Vec<Vec<u64>>,
    next: usize,
    random: u64,
    writes: u64,
    verified: u64,
    passes: u64,
    errors: u64,
}

impl Checker {
    /// In each time slot, writes and verifies as many blocks as the rates allow, then sleeps.
    fn run(&mut self, rate: u64, verify: u64, tick: Duration) -> ! {
        let per_second = 1000 / SLOT.as_millis() as u64;
        let (mut number, mut ticked, mut write_credit, mut verify_credit) = (0, Instant::now(), 0, 0);
        loop {
            let started = Instant::now();
            write_credit += rate;
            verify_credit += verify;
            (0..write_credit / per_second).for_each(|_| self.write_one());
            (0..verify_credit / per_second).for_each(|_| self.verify_next());
            write_credit %= per_second;
            verify_credit %= per_second;
            if ticked.elapsed() >= tick {
                (number, ticked) = (number + 1, Instant::now());
                (0..DISKS).for_each(flush);
                let Self { writes, verified, passes, errors, .. } = self;
                println!("FERRY tick {number} writes={writes} verified={verified} passes={passes} errors={errors}");
            }
            thread::sleep(SLOT.saturating_sub(started.elapsed()).max(Duration::from_millis(1)));
        }
    }

    /// Verifies a random block and writes its next version.
    fn write_one(&mut self) {
        self.random = mix(self.random);
        let disk = (self.random % u64::from(DISKS)) as u8;
        let block = (self.random / u64::from(DISKS)) as usize % self.versions[0].len();
        self.verify(disk, block);
        let version = &mut self.versions[usize::from(disk)][block];
        *version += 1;
        write(disk, block, &contents(disk, block, *version));
        self.writes += 1;
    }

    fn verify_next(&mut self) {
        let blocks = self.versions[0].len();
        self.verify((self.next / blocks) as u8, self.next % blocks);
        self.next += 1;
        if self.next == blocks * usize::from(DISKS) {
            self.next = 0;
            self.passes += 1;
        }
    }

    fn verify(&mut self, disk: u8, block: usize) {
        let version = self.versions[usize::from(disk)][block];
        let (expected, found) = (contents(disk, block, version), read(disk, block));
        if found != expected {
            self.errors += 1;
            if self.errors <= REPORTED {
                println!("FERRY BAD disk={disk} block={block} expected-version={version} found-version={}", found[1]);
            }
            write(disk, block, &expected); // so that only one pass reports the error
        }
        self.verified += 1;
    }
}

/// Returns the contents of a block: its number, its version, and words that differ between all versions.
fn contents(disk: u8, block: usize, version: u64) -> Block {
    let seed = mix(mix(u64::from(disk) << 32 | block as u64) ^ version) | 1;
    let mut words: Block = std::array::from_fn(|index| seed.wrapping_mul(index as u64 + 1));
    (words[0], words[1]) = (block as u64, version);
    words
}

/// Returns the image of `value` under a pseudo-random permutation of the 64-bit values (splitmix64).
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Returns the value of an option on the kernel command line.
fn option(name: &str, default: u64) -> u64 {
    let line = std::fs::read_to_string("/proc/cmdline").expect("cannot read /proc/cmdline");
    let value = line.split_whitespace().find_map(|word| word.strip_prefix("ferry.")?.strip_prefix(name)?.strip_prefix('='));
    value.map_or(default, |value| value.parse().expect("ferry.* options must be whole numbers"))
}

// -- the controller, by programmed I/O with 28-bit addresses (ATA)

fn read(disk: u8, block: usize) -> Block {
    begin(disk, block, READ);
    let mut found = [0; WORDS];
    for sector in found.chunks_exact_mut(SECTOR_WORDS / 4) {
        wait_for_transfer(disk);
        // SAFETY: the sector has 256 words of 16 bits, and is exclusively borrowed.
        unsafe { asm!("rep insw", in("dx") DATA, inout("rdi") sector.as_mut_ptr() => _, inout("rcx") SECTOR_WORDS => _) };
    }
    found
}

fn write(disk: u8, block: usize, contents: &Block) {
    begin(disk, block, WRITE);
    for sector in contents.chunks_exact(SECTOR_WORDS / 4) {
        wait_for_transfer(disk);
        // SAFETY: the sector has 256 words of 16 bits, which are only read.
        unsafe { asm!("rep outsw", in("dx") DATA, inout("rsi") sector.as_ptr() => _, inout("rcx") SECTOR_WORDS => _) };
    }
    wait(disk);
}

fn flush(disk: u8) {
    put(DRIVE, 0xe0 | disk << 4);
    put(COMMAND, FLUSH);
    wait(disk);
}

fn begin(disk: u8, block: usize, command: u8) {
    let address = (block * SECTORS) as u32;
    put(DRIVE, 0xe0 | disk << 4 | (address >> 24) as u8 & 0xf);
    wait(disk);
    put(COUNT, SECTORS as u8);
    (0..3u16).for_each(|byte| put(ADDRESS + byte, (address >> (8 * byte)) as u8));
    put(COMMAND, command);
}

/// Waits until the disk is not busy. Returns its status.
fn wait(disk: u8) -> u8 {
    loop {
        let status = get(COMMAND);
        if status & BUSY == 0 {
            assert!(status & FAILED == 0, "FERRY BAD disk={disk} failed, status {status:#x}");
            return status;
        }
        thread::yield_now();
    }
}

fn wait_for_transfer(disk: u8) {
    while wait(disk) & TRANSFER == 0 {
        thread::yield_now();
    }
}

fn put(port: u16, value: u8) {
    // SAFETY: the ports belong to the disk controller, which no driver uses.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}

fn get(port: u16) -> u8 {
    let value: u8;
    // SAFETY: the ports belong to the disk controller, which no driver uses.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value) };
    value
}
