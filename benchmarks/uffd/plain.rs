//! Baseline for comparison: a simple page fault handler for the interface of Firecracker, which reads an uncompressed
//! memory file.
//!
//! `plain SOCKET MEMORY demand PAGE` installs one page per fault, in one thread. `plain SOCKET MEMORY all THREADS`
//! installs all memory at once, in ranges that are as large as possible, and prints the time in microseconds.
//!
//! Only the layout of x86-64 Linux is supported. Errors end the program.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::time::Instant;

#[repr(C)]
struct IoVec {
    base: *mut u8,
    len: usize,
}

#[repr(C)]
struct Message {
    name: *mut u8,
    name_len: u32,
    parts: *mut IoVec,
    part_count: usize,
    control: *mut u8,
    control_len: usize,
    flags: i32,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Poll {
    fd: i32,
    events: i16,
    found: i16,
}

unsafe extern "C" {
    fn recvmsg(socket: i32, message: *mut Message, flags: i32) -> isize;
    fn mmap(address: *mut u8, len: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> *mut u8;
    fn ioctl(fd: i32, request: u64, argument: *mut Copy) -> i32;
    fn poll(fds: *mut Poll, count: u64, timeout: i32) -> i32;
    fn read(fd: i32, buffer: *mut u64, len: usize) -> isize;
}

const UFFDIO_COPY: u64 = 0xc028_aa03;
const READABLE: i16 = 1;
const FAULT: u64 = 0x12;

/// Mapping of the microVM: address, length and offset in the memory file.
type Mapped = (u64, u64, u64);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number: usize = arguments[4].parse().expect("a number");
    let listener = UnixListener::bind(&arguments[1]).expect("a socket");
    let file = File::open(&arguments[2]).expect("a memory file");
    let len = usize::try_from(file.metadata().expect("a length").len()).expect("a length");
    // MAP_PRIVATE | MAP_POPULATE: the page cache is mapped before the first fault.
    let memory = unsafe { mmap(std::ptr::null_mut(), len, 1, 0x8002, file.as_raw_fd(), 0) } as u64;
    println!("listening");
    let (mut stream, _) = listener.accept().expect("a connection");
    let (text, uffd) = handshake(stream.as_raw_fd());
    let mapped = mappings(&text);
    if arguments[3] == "all" {
        let begin = Instant::now();
        populate(uffd, memory, &mapped, number as u64);
        println!("{}", begin.elapsed().as_micros());
        let _ = stream.read(&mut [0]);
    } else {
        serve(uffd, stream.as_raw_fd(), memory, &mapped, number as u64);
    }
}

/// Receives the message and the userfaultfd.
fn handshake(socket: i32) -> (String, i32) {
    let (mut text, mut control) = (vec![0u8; 65536], [0u64; 8]);
    let mut part = IoVec { base: text.as_mut_ptr(), len: text.len() };
    let mut message = Message {
        name: std::ptr::null_mut(),
        name_len: 0,
        parts: &raw mut part,
        part_count: 1,
        control: control.as_mut_ptr().cast(),
        control_len: 64,
        flags: 0,
    };
    let len = unsafe { recvmsg(socket, &raw mut message, 0) };
    text.truncate(usize::try_from(len).expect("a message"));
    // struct cmsghdr: 8 bytes of length, 4 of level, 4 of type, then the descriptor.
    (String::from_utf8(text).expect("text"), (control[2] & 0xffff_ffff) as i32)
}

fn mappings(text: &str) -> Vec<Mapped> {
    let field = |object: &str, name: &str| -> u64 {
        let at = object.find(&format!("\"{name}\":")).expect("a field") + name.len() + 3;
        object[at..].chars().take_while(char::is_ascii_digit).collect::<String>().parse().expect("a number")
    };
    let objects = text.split('{').skip(1);
    objects.map(|one| (field(one, "base_host_virt_addr"), field(one, "size"), field(one, "offset"))).collect()
}

fn copy(uffd: i32, to: u64, from: u64, len: u64) {
    let mut argument = Copy { to, from, len, mode: 0, copied: 0 };
    unsafe { ioctl(uffd, UFFDIO_COPY, &raw mut argument) };
}

/// Installs all memory, in equal parts by several threads.
fn populate(uffd: i32, memory: u64, mapped: &[Mapped], threads: u64) {
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for &(address, size, offset) in mapped {
                    let part = (size / threads).next_multiple_of(2 << 20);
                    let start = (thread * part).min(size);
                    copy(uffd, address + start, memory + offset + start, part.min(size - start));
                }
            });
        }
    });
}

/// Resolves faults until the microVM has exited.
fn serve(uffd: i32, stream: i32, memory: u64, mapped: &[Mapped], page: u64) {
    let mut event = [0u64; 4];
    loop {
        let mut fds = [Poll { fd: uffd, events: READABLE, found: 0 }, Poll { fd: stream, events: READABLE, found: 0 }];
        unsafe { poll(fds.as_mut_ptr(), 2, -1) };
        if fds[1].found != 0 {
            return;
        }
        if unsafe { read(uffd, event.as_mut_ptr(), 32) } != 32 || event[0] & 0xff != FAULT {
            continue;
        }
        let fault = event[2] / page * page;
        if let Some((address, _, offset)) = mapped.iter().find(|(at, len, _)| (*at..at + len).contains(&fault)) {
            copy(uffd, fault, memory + offset + (fault - address), page);
        }
    }
}
