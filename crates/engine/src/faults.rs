//! What a userfaultfd reports, and the answers to it.
//!
//! Etiquette: while a removal has not been read every answer ends in EAGAIN; then nothing is mapped, the waiters are
//! woken, and fault again. EEXIST means that somebody was faster. A process that is gone needs no answers.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::uapi::{READ, UFFD, UFFDIO_CONTINUE, UffdioContinue, UffdioRange, Userfault, WRITE, check, ioc, ioctl};

/// `struct uffdio_poison`
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

/// `struct uffd_msg`
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    /// Fault: flags. Removal: first address.
    first: u64,
    /// Fault: address. Removal: address after the last.
    second: u64,
    third: u64,
}
const _: () = assert!(size_of::<Message>() == 32);

/// Messages read at once.
const BATCH: usize = 64;

/// What happened in the address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for a page.
    Fault {
        /// Address that was accessed, rounded down to a page.
        address: u64,
        /// Whether it waits for a write-protected page, not for a missing one.
        protected: bool,
    },
    /// A range is about to be discarded; whoever does that goes on once this has been read.
    Removal {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
}

impl Userfault {
    /// Waits until there is something to read. False: not within `patience`, or the other address space is gone.
    pub fn wait(&self, patience: Duration) -> io::Result<bool> {
        let mut waiting = libc::pollfd { fd: self.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = libc::c_int::try_from(patience.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: one valid structure, for the time of the call.
        match check(unsafe { libc::poll(&raw mut waiting, 1, milliseconds) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(error),
            Ok(_) => Ok(waiting.revents & libc::POLLIN != 0),
        }
    }

    /// Reads what there is, without waiting, and appends it to `events`.
    pub fn read(&self, events: &mut Vec<Event>) -> io::Result<()> {
        let mut messages = [Message::default(); BATCH];
        // SAFETY: the buffer is as long as we say, and any bytes are a valid `Message`.
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

    /// Lets the threads that wait in a range try again.
    pub fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start, len };
        // SAFETY: wakes threads, changes no memory.
        unsafe { ioctl(self, UFFDIO_WAKE, &mut range) }.map(drop)
    }

    /// Maps pages of `page` bytes from the page cache and wakes who waits for them. Those that are mapped already, and
    /// holes, are stepped over; while the address space changes, or there is no memory for page tables, nothing is
    /// mapped. Either way the access is tried again. `protect`: write-protected, in a range registered for that.
    pub fn resolve(&self, start: u64, len: u64, page: u64, protect: bool) -> io::Result<()> {
        let (mut at, end) = (start, start + len);
        let mode = if protect { CONTINUE_MODE_WP } else { 0 };
        let mut stepped = false;
        while at < end {
            let range = UffdioRange { start: at, len: end - at };
            let mut argument = UffdioContinue { range, mode, mapped: 0 };
            // SAFETY: only installs page-table entries for pages of the file that is mapped there.
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

    /// Makes every access to a range fail (SIGBUS) from now on.
    pub fn poison(&self, start: u64, len: u64) -> io::Result<()> {
        let mut argument = UffdioPoison { range: UffdioRange { start, len }, mode: 0, updated: 0 };
        // SAFETY: nothing is mapped there; accesses fail instead of waiting.
        unsafe { ioctl(self, UFFDIO_POISON, &mut argument) }.map(drop)
    }
}
