//! Events of a userfaultfd, and their resolution.
//!
//! While a removal event is pending, every resolution fails with EAGAIN. In this case, nothing is mapped, and the woken
//! threads fault again. EEXIST means that the page is already mapped. The faults of an exited process need no
//! resolution.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::SMALL_PAGE;
use crate::uapi::{
    READ, RETRY_TIMEOUT, UFFD, UFFDIO_CONTINUE, UffdioContinue, UffdioRange, Userfault, WRITE, check, ioc, ioctl,
};

/// Argument of UFFDIO_POISON (`struct uffdio_poison`).
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
struct UffdioPoison {
    range: UffdioRange,
    mode: u64,
    updated: i64,
}

/// Argument of UFFDIO_ZEROPAGE (`struct uffdio_zeropage`).
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeroed: i64,
}

/// Argument of UFFDIO_COPY (`struct uffdio_copy`).
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
struct UffdioCopy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

const UFFDIO_WAKE: u64 = ioc(READ, UFFD, 0x02, size_of::<UffdioRange>());
const UFFDIO_COPY: u64 = ioc(READ | WRITE, UFFD, 0x03, size_of::<UffdioCopy>());
const UFFDIO_ZEROPAGE: u64 = ioc(READ | WRITE, UFFD, 0x04, size_of::<UffdioZeropage>());
const UFFDIO_POISON: u64 = ioc(READ | WRITE, UFFD, 0x08, size_of::<UffdioPoison>());
const _: () = assert!(UFFDIO_WAKE == 0x8010_aa02 && UFFDIO_POISON == 0xc020_aa08);
const _: () = assert!(UFFDIO_COPY == 0xc028_aa03 && UFFDIO_ZEROPAGE == 0xc020_aa04);

const CONTINUE_MODE_WP: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;
const PAGEFAULT_FLAG_WP: u64 = 1 << 1;

/// Message read from a userfaultfd (`struct uffd_msg`).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    /// Flags of a fault, or first address of a removal.
    first: u64,
    /// Address of a fault, or address after the end of a removal.
    second: u64,
    third: u64,
}
const _: () = assert!(size_of::<Message>() == 32);

/// Maximum number of messages per read.
pub const BATCH: usize = 64;

/// Event of an address space, read from a userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Fault: a thread waits for a page.
    Fault {
        /// Address of the access, rounded down to a page.
        address: u64,
        /// Whether the access was a write to a write-protected page. Otherwise the page was not mapped.
        protected: bool,
    },
    /// Removal of a range, before it is performed. The system call that discards the range continues once the event has
    /// been read.
    Removal {
        /// First address.
        start: u64,
        /// Address after the end.
        end: u64,
    },
}

impl Userfault {
    /// Waits for an event. Returns true if an event can be read; false after `timeout`, after a signal, or if the
    /// address space no longer exists.
    ///
    /// # Errors
    /// The error of poll(2).
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let mut waiting = libc::pollfd { fd: self.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the pollfd lives through the call.
        match check(unsafe { libc::poll(&raw mut waiting, 1, milliseconds) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(error),
            Ok(_) => Ok(waiting.revents & libc::POLLIN != 0),
        }
    }

    /// Reads available events without waiting, at most `limit` and at most [`BATCH`], and appends them to `events`.
    ///
    /// # Errors
    /// The error of read(2).
    pub fn read(&self, events: &mut Vec<Event>, limit: usize) -> io::Result<()> {
        let mut messages = [Message::default(); BATCH];
        let messages = &mut messages[..limit.min(BATCH)];
        // SAFETY: the buffer is valid for writing its length, and any bytes are a valid `Message`.
        let read = unsafe { libc::read(self.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(messages)) };
        let Ok(read) = usize::try_from(read) else {
            let error = io::Error::last_os_error();
            let none = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if none { Ok(()) } else { Err(error) };
        };
        events.extend(messages[..read / size_of::<Message>()].iter().filter_map(|message| match message.event {
            EVENT_PAGEFAULT => {
                let protected = message.first & PAGEFAULT_FLAG_WP != 0;
                Some(Event::Fault { address: message.second & !4095, protected })
            }
            EVENT_REMOVE => Some(Event::Removal { start: message.first, end: message.second }),
            _ => None,
        }));
        Ok(())
    }

    /// Wakes the threads that wait for pages of a range. The threads retry their accesses.
    ///
    /// # Errors
    /// The error of UFFDIO_WAKE.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start, len };
        // SAFETY: `range` lives through the call, which wakes threads without changing memory.
        unsafe { ioctl(self, UFFDIO_WAKE, &mut range) }.map(drop)
    }

    /// Maps the pages of a range from the page cache and wakes the threads that wait for them. `page` is the page size
    /// in bytes. Skips holes, and pages that are already mapped. If the address space is changing, or if there is no
    /// memory for page tables, stops and wakes the threads, which retry their accesses. If `protect` is true, maps the
    /// pages write-protected; the range must be registered for write protection.
    ///
    /// # Errors
    /// The error of UFFDIO_CONTINUE, such as ESRCH if the process has exited.
    pub fn resolve(&self, start: u64, len: u64, page: u64, protect: bool) -> io::Result<()> {
        let (mut at, end) = (start, start + len);
        let mode = if protect { CONTINUE_MODE_WP } else { 0 };
        let mut stepped = false;
        while at < end {
            let range = UffdioRange { start: at, len: end - at };
            let mut argument = UffdioContinue { range, mode, mapped: 0 };
            // SAFETY: `argument` lives through the call, which only installs page table entries for pages of the mapped
            // file.
            let result = unsafe { ioctl(self, UFFDIO_CONTINUE, &mut argument) };
            at += u64::try_from(argument.mapped).unwrap_or(0);
            let Err(error) = result else { continue };
            match error.raw_os_error() {
                Some(libc::EEXIST | libc::EFAULT) => at += page,
                Some(libc::EAGAIN) if argument.mapped > 0 => {}
                Some(libc::EAGAIN | libc::ENOENT | libc::ENOMEM) => return self.wake(start, len),
                _ => return Err(error),
            }
            stepped = true;
        }
        if stepped { self.wake(start, len) } else { Ok(()) }
    }

    /// Reads the address of one fault without waiting. Returns `None` if no event can be read, or if the event is not a
    /// fault.
    ///
    /// # Errors
    /// The error of read(2).
    pub fn read_fault(&self) -> io::Result<Option<u64>> {
        let mut message = Message::default();
        // SAFETY: the buffer is valid for writing its length, and any bytes are a valid `Message`.
        let read = unsafe { libc::read(self.as_raw_fd(), (&raw mut message).cast(), size_of::<Message>()) };
        if read < 0 {
            let error = io::Error::last_os_error();
            let none = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if none { Ok(None) } else { Err(error) };
        }
        Ok((message.event == EVENT_PAGEFAULT).then_some(message.second & !4095))
    }

    /// Maps zeros at those pages of a range that are not mapped, and wakes the threads that wait for them. In a private
    /// mapping of a file, the process then reads zeros instead of the contents of the file.
    ///
    /// # Errors
    /// The error of UFFDIO_ZEROPAGE, such as ESRCH if the process has exited.
    pub fn map_zeros(&self, start: u64, len: u64) -> io::Result<()> {
        let (mut at, end) = (start, start + len);
        while at < end {
            let mut argument = UffdioZeropage { range: UffdioRange { start: at, len: end - at }, mode: 0, zeroed: 0 };
            // SAFETY: `argument` lives through the call, which only changes page table entries of pages that are not
            // mapped.
            let result = unsafe { ioctl(self, UFFDIO_ZEROPAGE, &mut argument) };
            at += u64::try_from(argument.zeroed).unwrap_or(0);
            match result.as_ref().map_err(io::Error::raw_os_error) {
                Ok(_) => {}
                Err(Some(libc::EEXIST)) => at += SMALL_PAGE as u64,
                Err(Some(libc::EAGAIN | libc::ENOMEM)) => break,
                Err(_) => return result.map(drop),
            }
        }
        self.wake(start, len)
    }

    /// Installs pages with these contents at an address of private memory, and wakes the threads that wait for them.
    /// Each page appears with all of its contents, or not at all. Returns the number of bytes installed, and the reason
    /// why this is less than the length of `contents`: EEXIST if the next page is present, EAGAIN while a removal event
    /// is pending, ENOENT if the next page is not registered, ENOMEM without memory, ESRCH if the process has exited.
    ///
    /// Unlike [`copy`](Self::copy), does not wait while a removal event is pending: the calling thread may be the one that
    /// reads it. Address and length must be multiples of the page size of the memory.
    pub fn install(&self, address: u64, contents: &[u8]) -> (usize, io::Result<()>) {
        let mut done = 0;
        while done < contents.len() {
            let (from, len) = (contents[done..].as_ptr() as u64, (contents.len() - done) as u64);
            let mut argument = UffdioCopy { to: address + done as u64, from, len, mode: 0, copied: 0 };
            // SAFETY: `from` and `len` describe a part of `contents`, which the kernel only reads. The pages that it
            // installs were not present, so no contents of the other process are overwritten.
            let result = unsafe { ioctl(self, UFFDIO_COPY, &mut argument) };
            let copied = usize::try_from(argument.copied).unwrap_or(0);
            done += copied;
            match result {
                // The call ended early after it had installed pages. Repeating it returns the reason.
                Err(error) if copied > 0 && error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return (done, Err(error)),
                Ok(_) => {}
            }
        }
        (done, Ok(()))
    }

    /// Maps copies of `len` bytes of `contents` at a range, up to the first page that is mapped. Returns the number of
    /// bytes up to that page, `len` if no page is mapped. In a private mapping of a file, the copies are private.
    ///
    /// # Errors
    /// The error of UFFDIO_COPY, such as ESRCH if the process has exited.
    ///
    /// # Safety
    /// `contents` must be valid for reading `len` bytes.
    pub unsafe fn copy(&self, start: u64, contents: *const u8, len: u64) -> io::Result<u64> {
        place(len, |done| {
            let (to, from) = (start + done, contents as u64 + done);
            let mut argument = UffdioCopy { to, from, len: len - done, mode: 0, copied: 0 };
            // SAFETY: `argument` lives through the call, and the caller guarantees that the source can be read. The
            // call only changes page table entries of pages that are not mapped.
            (unsafe { ioctl(self, UFFDIO_COPY, &mut argument) }, argument.copied)
        })
    }

    /// Like [`copy`](Self::copy), but maps zeros.
    ///
    /// # Errors
    /// The error of UFFDIO_ZEROPAGE.
    pub fn zero(&self, start: u64, len: u64) -> io::Result<u64> {
        place(len, |done| {
            let range = UffdioRange { start: start + done, len: len - done };
            let mut argument = UffdioZeropage { range, mode: 0, zeroed: 0 };
            // SAFETY: `argument` lives through the call, which only changes page table entries of pages that are not
            // mapped.
            (unsafe { ioctl(self, UFFDIO_ZEROPAGE, &mut argument) }, argument.zeroed)
        })
    }

    /// Makes every later access to a range raise SIGBUS.
    ///
    /// # Errors
    /// The error of UFFDIO_POISON.
    pub fn poison(&self, start: u64, len: u64) -> io::Result<()> {
        let mut argument = UffdioPoison { range: UffdioRange { start, len }, mode: 0, updated: 0 };
        // SAFETY: `argument` lives through the call, which only changes page table entries of pages that are not
        // mapped.
        unsafe { ioctl(self, UFFDIO_POISON, &mut argument) }.map(drop)
    }
}

/// Repeats a call that maps pages of a range of `len` bytes, from the given number of bytes on, until it reaches a page
/// that is mapped, or the end. `call` returns the result, and the number of bytes that it has mapped (negative: errno).
/// Returns the number of bytes mapped.
fn place(len: u64, mut call: impl FnMut(u64) -> (io::Result<libc::c_int>, i64)) -> io::Result<u64> {
    let (mut done, begin) = (0, Instant::now());
    while done < len {
        let (result, placed) = call(done);
        done += u64::try_from(placed).unwrap_or(0);
        match result {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => return Ok(done),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && begin.elapsed() < RETRY_TIMEOUT => {
                std::thread::yield_now();
            }
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
