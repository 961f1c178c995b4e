//! Kernel interfaces: userfaultfd and PAGEMAP_SCAN, and how system calls are made.
//!
//! Distributions' headers lag behind (WP_ASYNC and PAGEMAP_SCAN are of Linux 6.7, MOVE of 6.8), so the constants and
//! structures stand here, with the ioctl numbers derived from them and asserted against the published values.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// How long a call is tried again while an address space changes.
const PATIENCE: Duration = Duration::from_secs(5);

/// The shortest slice of CPU time that the scheduler knows, nanoseconds.
const SLICE_NS: u64 = 100_000;

pub(crate) const fn ioc(direction: u64, group: u64, number: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (group << 8) | number
}
pub(crate) const WRITE: u64 = 1;
pub(crate) const READ: u64 = 2;
pub(crate) const UFFD: u64 = 0xaa;

/// `struct uffdio_api`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct UffdioApi {
    /// Always [`UFFD_API`].
    pub api: u64,
    /// In: features wanted. Out: features there are.
    pub features: u64,
    /// Out: ioctls available on the descriptor.
    pub ioctls: u64,
}

/// `struct uffdio_range`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct UffdioRange {
    /// First byte, page aligned.
    pub start: u64,
    /// Bytes, page aligned.
    pub len: u64,
}

/// `struct uffdio_register`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct UffdioRegister {
    /// The range to register.
    pub range: UffdioRange,
    /// A set of `REGISTER_MODE_*`.
    pub mode: u64,
    /// Out: ioctls available on the range.
    pub ioctls: u64,
}

/// `struct uffdio_writeprotect`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct UffdioWriteprotect {
    /// The range to protect or release.
    pub range: UffdioRange,
    /// A set of `WRITEPROTECT_MODE_*`; 0 releases and wakes.
    pub mode: u64,
}

/// `struct uffdio_continue`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct UffdioContinue {
    /// The range to map from the page cache.
    pub range: UffdioRange,
    /// A set of `CONTINUE_MODE_*`.
    pub mode: u64,
    /// Out: bytes mapped, or a negative errno.
    pub mapped: i64,
}

/// `struct pm_scan_arg`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct PmScanArg {
    /// Size of this structure.
    pub size: u64,
    /// A set of `PM_SCAN_*`.
    pub flags: u64,
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Out: where the walk ended.
    pub walk_end: u64,
    /// Address of an array of [`PageRegion`].
    pub vec: u64,
    /// Its length.
    pub vec_len: u64,
    /// Stop after so many pages; 0: no limit.
    pub max_pages: u64,
    /// Categories whose sense is turned round.
    pub category_inverted: u64,
    /// Categories that must all hold.
    pub category_mask: u64,
    /// Categories of which one must hold.
    pub category_anyof_mask: u64,
    /// Categories to report.
    pub return_mask: u64,
}

/// `struct page_region`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct PageRegion {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// A set of `PAGE_IS_*`.
    pub categories: u64,
}

/// Version of the userfaultfd API.
pub const UFFD_API: u64 = 0xaa;
/// `userfaultfd(2)`: handle only faults from user mode (all that an unprivileged process may ask for).
pub const UFFD_USER_MODE_ONLY: i32 = 1;
/// Flags of every userfaultfd.
pub const UFFD_FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
/// Creates a userfaultfd for all faults, whatever the caller's privileges: opening it is what is restricted.
pub const UFFD_DEVICE: &CStr = c"/dev/userfaultfd";
/// `ioctl(2)` of [`UFFD_DEVICE`]; the argument is the flags of `userfaultfd(2)`.
pub const USERFAULTFD_IOC_NEW: u64 = ioc(0, UFFD, 0, 0);
const _: () = assert!(USERFAULTFD_IOC_NEW == 0xaa00);

/// Write-protect faults on anonymous memory.
pub const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Tell of ranges that are discarded (`madvise`), before they are.
pub const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Missing faults on hugetlbfs.
pub const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
/// Missing faults on shared memory.
pub const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Minor faults on hugetlbfs.
pub const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
/// Minor faults on shared memory.
pub const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// Write-protect faults on hugetlbfs and shared memory.
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Write protection of pages that are not there yet.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// Write-protect faults are resolved by the kernel and only recorded.
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// Trap accesses to missing pages.
pub const REGISTER_MODE_MISSING: u64 = 1;
/// Trap writes to protected pages.
pub const REGISTER_MODE_WP: u64 = 2;
/// Trap accesses to pages that are in the page cache and not mapped.
pub const REGISTER_MODE_MINOR: u64 = 4;
/// Protect (without it: release).
pub const WRITEPROTECT_MODE_WP: u64 = 1;

/// Page was written since it was last protected.
pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Page is mapped.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
/// Page is in swap.
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// Page is part of a mapping by a page-middle-directory entry, or of hugetlbfs.
pub const PAGE_IS_HUGE: u64 = 1 << 6;
/// Protect what matches.
pub const PM_SCAN_WP_MATCHING: u64 = 1;
/// Refuse ranges that are not under WP_ASYNC.
pub const PM_SCAN_CHECK_WPASYNC: u64 = 2;

const UFFDIO_API: u64 = ioc(READ | WRITE, UFFD, 0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = ioc(READ | WRITE, UFFD, 0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: u64 = ioc(READ, UFFD, 0x01, size_of::<UffdioRange>());
const UFFDIO_WRITEPROTECT: u64 = ioc(READ | WRITE, UFFD, 0x06, size_of::<UffdioWriteprotect>());
pub(crate) const UFFDIO_CONTINUE: u64 = ioc(READ | WRITE, UFFD, 0x07, size_of::<UffdioContinue>());
const PAGEMAP_SCAN: u64 = ioc(READ | WRITE, b'f' as u64, 16, size_of::<PmScanArg>());

const _: () = assert!(UFFDIO_API == 0xc018_aa3f);
const _: () = assert!(UFFDIO_REGISTER == 0xc020_aa00);
const _: () = assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);
const _: () = assert!(UFFDIO_CONTINUE == 0xc020_aa07);
const _: () = assert!(PAGEMAP_SCAN == 0xc060_6610);

/// Turns the result of a system call into a descriptor that we own.
///
/// # Safety
/// A non-negative `result` must be a descriptor that nobody else owns.
pub unsafe fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(|_| io::Error::other("descriptor out of range"))?;
    // SAFETY: by this function's contract the descriptor is valid and ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Has the calling thread scheduled in slices of 0.1 ms (`sched_setattr`, Linux 6.12; before that it changes nothing):
/// among busy threads it gets the CPU sooner, and leaves it sooner to the others who have something urgent to do.
pub fn short_slices() {
    // SAFETY: takes no pointers. For process 0 it is about the calling thread alone.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attributes = libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).unwrap_or(0),
        sched_policy: 0,
        // A thread of a real-time policy stays as it is.
        sched_flags: u64::from(libc::SCHED_FLAG_KEEP_POLICY.cast_unsigned()),
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: SLICE_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: reads a structure that lives for the time of the call. Failing does no harm.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

/// Turns -1 into the thread's errno.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// One `ioctl` with a structure that the kernel reads and may write.
///
/// # Safety
/// `request` must be a call that takes exactly a `T`, and any address in it must be valid for that call.
pub(crate) unsafe fn ioctl<T>(fd: &impl AsRawFd, request: u64, argument: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: by this function's contract; the reference is valid for the time of the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

/// A userfaultfd, of our own address space or of another.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// A userfaultfd of our own address space, without features yet: for all faults where this process may have one,
    /// otherwise for faults of user mode only.
    ///
    /// # Errors
    /// EPERM or ENOSYS where this process may have none.
    pub fn own() -> io::Result<Self> {
        Self::own_full().or_else(|error| {
            // SAFETY: the call takes no pointers, and the descriptor it returns is new.
            let limited = unsafe { owned(libc::syscall(libc::SYS_userfaultfd, UFFD_FLAGS | UFFD_USER_MODE_ONLY)) };
            limited.map(Self).map_err(|_| error)
        })
    }

    /// As `own`, but never for faults of user mode only: by the system call, or else by [`UFFD_DEVICE`].
    ///
    /// # Errors
    /// Those of the system call.
    pub fn own_full() -> io::Result<Self> {
        // SAFETY: the call takes no pointers, and the descriptor it returns is new.
        let made = unsafe { owned(libc::syscall(libc::SYS_userfaultfd, UFFD_FLAGS)) };
        made.or_else(|error| Self::from_device().map_err(|_| error)).map(Self)
    }

    fn from_device() -> io::Result<OwnedFd> {
        // SAFETY: a string with its NUL; the descriptor is new.
        let device =
            unsafe { owned(libc::c_long::from(libc::open(UFFD_DEVICE.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))) }?;
        // SAFETY: the argument is a number; the descriptor is new.
        unsafe { owned(libc::c_long::from(libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, UFFD_FLAGS))) }
    }

    /// Takes over a descriptor that was made in another process.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Agrees on the API with the `features` wanted. EINVAL: this kernel lacks one of them.
    pub fn enable(&self, features: u64) -> io::Result<()> {
        let mut api = UffdioApi { api: UFFD_API, features, ..Default::default() };
        // SAFETY: UFFDIO_API takes a UffdioApi without addresses.
        unsafe { ioctl(&self.0, UFFDIO_API, &mut api) }.map(drop)
    }

    /// Registers `[start, start + len)` for the faults of `mode`.
    pub fn register(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        let mut argument = UffdioRegister { range: UffdioRange { start, len }, mode, ioctls: 0 };
        // SAFETY: the range is in the address space of the userfaultfd; registering changes no memory.
        unsafe { ioctl(&self.0, UFFDIO_REGISTER, &mut argument) }.map(drop)
    }

    /// Ends a registration: protections go, waiters are woken.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start, len };
        // SAFETY: as for `register`.
        let result = unsafe { ioctl(&self.0, UFFDIO_UNREGISTER, &mut range) };
        // The kernel wakes before it waits for faults under way: one of those may have gone to sleep after it.
        let _ = self.wake(start, len);
        result.map(drop)
    }

    /// Write-protects (or releases) a range.
    pub fn write_protect(&self, start: u64, len: u64, protect: bool) -> io::Result<()> {
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        let mut argument = UffdioWriteprotect { range: UffdioRange { start, len }, mode };
        retry(|| {
            // SAFETY: protection changes no content.
            unsafe { ioctl(&self.0, UFFDIO_WRITEPROTECT, &mut argument) }.map(drop)
        })
    }

    /// Maps pages of a MINOR-registered range that are in the page cache; returns the bytes mapped.
    ///
    /// Pages of `page` bytes that are mapped already, and holes of the file, are stepped over.
    pub fn map_existing(&self, start: u64, len: u64, page: u64) -> io::Result<u64> {
        let (mut at, end, mut mapped) = (start, start + len, 0);
        while at < end {
            let range = UffdioRange { start: at, len: end - at };
            let mut argument = UffdioContinue { range, mode: 0, mapped: 0 };
            // SAFETY: only installs page-table entries for pages of the file that is mapped there.
            let result = unsafe { ioctl(&self.0, UFFDIO_CONTINUE, &mut argument) };
            let done = u64::try_from(argument.mapped).unwrap_or(0);
            mapped += done;
            at += done;
            match result {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EEXIST | libc::EFAULT)) => at += page,
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(mapped)
    }
}

impl From<Userfault> for OwnedFd {
    fn from(uffd: Userfault) -> Self {
        uffd.0
    }
}

impl AsRawFd for Userfault {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// EAGAIN from a userfaultfd means that the layout of the address space changes at this moment: try again. Where nobody
/// reads what it has to tell, that moment does not end.
fn retry(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let begin = Instant::now();
    loop {
        match call() {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && begin.elapsed() < PATIENCE => {
                std::thread::yield_now();
            }
            other => return other,
        }
    }
}

/// One PAGEMAP_SCAN call; returns the number of regions filled in. See `pm_scan_arg`.
pub fn pagemap_scan(pagemap: &impl AsRawFd, argument: &mut PmScanArg, regions: &mut [PageRegion]) -> io::Result<usize> {
    argument.size = size_of::<PmScanArg>() as u64;
    argument.vec = regions.as_mut_ptr() as u64;
    argument.vec_len = regions.len() as u64;
    // SAFETY: `vec` and `vec_len` describe `regions`, which outlives the call.
    let count = unsafe { ioctl(pagemap, PAGEMAP_SCAN, argument) }?;
    usize::try_from(count).map_err(io::Error::other)
}
