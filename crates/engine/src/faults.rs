//! Events of a userfaultfd, and their resolution.
//!
//! While a removal event is pending, every resolution fails with EAGAIN. In this case, nothing is mapped, and the woken
//! threads fault again. EEXIST means that another thread has mapped the page. The faults of an exited process need no
//! resolution.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::uapi::{READ, UFFD, UFFDIO_CONTINUE, UffdioContinue, UffdioRange, Userfault, WRITE, check, ioc, ioctl};

/// Argument of UFFDIO_POISON (`struct uffdio_poison`).
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
struct UffdioPoison {
    range: UffdioRange,
    mode: u64,
    updated: i64,
}

const UFFDIO_WAKE: u64 = ioc(READ, UFFD, 0x02, size_of::<UffdioRange>());
const UFFDIO_POISON: u64 = ioc(READ | WRITE, UFFD, 0x08, size_of::<UffdioPoison>());
const _: () = assert!(UFFDIO_WAKE == 0x8010_aa02 && UFFDIO_POISON == 0xc020_aa08);

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
const BATCH: usize = 64;

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

    /// Reads up to 64 available events without waiting, and appends them to `events`.
    ///
    /// # Errors
    /// The error of read(2).
    pub fn read(&self, events: &mut Vec<Event>) -> io::Result<()> {
        let mut messages = [Message::default(); BATCH];
        // SAFETY: the buffer is valid for writing its length, and any bytes are a valid `Message`.
        let read = unsafe { libc::read(self.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) };
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

    /// Maps the pages of a range from the page cache and wakes the threads that wait for them. `page` is the page size,
    /// bytes. Skips holes, and pages that are already mapped. If the address space is changing, or if there is no
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
