//! Kernel interfaces: userfaultfd, PAGEMAP_SCAN, and helpers for system calls.
//!
//! The headers of distributions may be older than these interfaces (WP_ASYNC and PAGEMAP_SCAN: Linux 6.7). Constants
//! and structures are therefore defined here. The ioctl numbers are computed from the sizes of the structures, and
//! checked against the published values.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Maximum time for which a call is retried while the address space changes.
pub(crate) const RETRY_TIMEOUT: Duration = Duration::from_secs(5);

/// Minimum time slice of the scheduler in nanoseconds.
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
    /// API version, always [`UFFD_API`].
    pub api: u64,
    /// In: requested features. Out: supported features.
    pub features: u64,
    /// Out: ioctls available on the descriptor.
    pub ioctls: u64,
}

/// `struct uffdio_range`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct UffdioRange {
    /// Address of the first byte, page-aligned.
    pub start: u64,
    /// Length in bytes, page-aligned.
    pub len: u64,
}

/// `struct uffdio_register`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct UffdioRegister {
    /// Range to register.
    pub range: UffdioRange,
    /// Set of `REGISTER_MODE_*`.
    pub mode: u64,
    /// Out: ioctls available on the range.
    pub ioctls: u64,
}

/// `struct uffdio_writeprotect`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct UffdioWriteprotect {
    /// Range to protect or unprotect.
    pub range: UffdioRange,
    /// Flags `WRITEPROTECT_MODE_*`; 0 unprotects the range and wakes its waiters.
    pub mode: u64,
}

/// `struct uffdio_continue`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct UffdioContinue {
    /// Range to map from the page cache.
    pub range: UffdioRange,
    /// Set of `CONTINUE_MODE_*`.
    pub mode: u64,
    /// Out: number of bytes mapped, or a negative errno.
    pub mapped: i64,
}

/// `struct pm_scan_arg`
#[repr(C)]
#[derive(Default, Debug, Clone, Copy)]
pub struct PmScanArg {
    /// Size of this structure in bytes.
    pub size: u64,
    /// Set of `PM_SCAN_*`.
    pub flags: u64,
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Out: address at which the scan ended.
    pub walk_end: u64,
    /// Address of an array of [`PageRegion`].
    pub vec: u64,
    /// Number of elements of the array at `vec`.
    pub vec_len: u64,
    /// Maximum number of pages; 0 means no limit.
    pub max_pages: u64,
    /// Categories to invert.
    pub category_inverted: u64,
    /// Categories that a page must all have.
    pub category_mask: u64,
    /// Categories of which a page must have at least one.
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
    /// Set of `PAGE_IS_*`.
    pub categories: u64,
}

/// Version of the userfaultfd API.
pub const UFFD_API: u64 = 0xaa;
/// Flag of `userfaultfd(2)`: user-mode faults only, which an unprivileged process may request.
pub const UFFD_USER_MODE_ONLY: i32 = 1;
/// Flags of every userfaultfd.
pub const UFFD_FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
/// Device that creates userfaultfds for all faults. The file permissions of the device control access.
pub const UFFD_DEVICE: &CStr = c"/dev/userfaultfd";
/// `ioctl(2)` request of [`UFFD_DEVICE`]. The argument contains the flags of `userfaultfd(2)`.
pub const USERFAULTFD_IOC_NEW: u64 = ioc(0, UFFD, 0, 0);
const _: () = assert!(USERFAULTFD_IOC_NEW == 0xaa00);

/// Feature: write-protect faults on anonymous memory.
pub const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Feature: events for ranges removed by madvise(2), sent before the removal.
pub const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Feature: missing faults on hugetlbfs.
pub const FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
/// Feature: missing faults on shared memory.
pub const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Feature: minor faults on hugetlbfs.
pub const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
/// Feature: minor faults on shared memory.
pub const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// Feature: write-protect faults on hugetlbfs and shared memory.
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Feature: write protection of unpopulated pages.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// Feature: asynchronous write-protect faults, which the kernel resolves and records.
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;

/// Registration mode: faults on missing pages.
pub const REGISTER_MODE_MISSING: u64 = 1;
/// Registration mode: faults on writes to protected pages.
pub const REGISTER_MODE_WP: u64 = 2;
/// Registration mode: faults on pages that are in the page cache but not mapped.
pub const REGISTER_MODE_MINOR: u64 = 4;
/// Mode of UFFDIO_WRITEPROTECT: protects the range. Without this mode, the range is unprotected.
pub const WRITEPROTECT_MODE_WP: u64 = 1;

/// Category: pages written since they were last protected.
pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Category: pages of a file or of shared memory. In a private mapping, pages that have not been copied by a write.
pub const PAGE_IS_FILE: u64 = 1 << 2;
/// Category: mapped pages.
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
/// Category: pages in swap.
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// Category: pages that are mapped to the kernel's page of zeros.
pub const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Category: pages that are mapped by a PMD entry or belong to hugetlbfs.
pub const PAGE_IS_HUGE: u64 = 1 << 6;
/// Flag of PAGEMAP_SCAN: write-protects the matching pages.
pub const PM_SCAN_WP_MATCHING: u64 = 1;
/// Flag of PAGEMAP_SCAN: the scan fails for ranges that are not registered in WP_ASYNC mode.
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

/// Converts the result of a system call into an owned descriptor.
///
/// # Errors
/// The errno of the call, if `result` is negative.
///
/// # Safety
/// A non-negative `result` must be an open descriptor without another owner.
pub unsafe fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(result).map_err(|_| io::Error::other("descriptor out of range"))?;
    // SAFETY: the caller guarantees that the descriptor is open and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reduces the time slices of the calling thread to 0.1 ms (`sched_setattr`, no effect before Linux 6.12). Among busy
/// threads, the scheduler then runs the thread earlier, and preempts it earlier. Errors are ignored.
pub fn short_slices() {
    // SAFETY: getpriority takes no pointers. Process 0 means the calling thread.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attributes = libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).unwrap_or(0),
        sched_policy: 0,
        // Keep the policy, for threads with a real-time policy.
        sched_flags: u64::from(libc::SCHED_FLAG_KEEP_POLICY.cast_unsigned()),
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: SLICE_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the structure lives through the call, which only reads it.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

/// Returns the CPU time of the calling thread in nanoseconds.
pub fn thread_cpu_time() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writing.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Converts the result of a system call. If it is negative, returns the errno of the thread as an error.
///
/// # Errors
/// The errno of the call.
pub fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes an `ioctl` call with a structure that the kernel reads and may write.
///
/// # Errors
/// The errno of the call.
///
/// # Safety
/// `request` must take a pointer to a `T`, and all addresses in `argument` must be valid for the call.
pub(crate) unsafe fn ioctl<T>(fd: &impl AsRawFd, request: u64, argument: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the caller guarantees that `T` matches the request; the reference is valid during the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

/// Userfaultfd of the address space of this or another process.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Creates a userfaultfd of our address space, without features. The userfaultfd handles all faults if this process
    /// is permitted to create such a userfaultfd, otherwise only user-mode faults.
    ///
    /// # Errors
    /// EPERM if this process may not create a userfaultfd, ENOSYS if the system call is not available.
    pub fn own() -> io::Result<Self> {
        Self::own_full().or_else(|error| {
            // SAFETY: userfaultfd takes no pointers; the descriptor it returns is new and has no other owner.
            let limited = unsafe { owned(libc::syscall(libc::SYS_userfaultfd, UFFD_FLAGS | UFFD_USER_MODE_ONLY)) };
            limited.map(Self).map_err(|_| error)
        })
    }

    /// Like `own`, but the userfaultfd always handles all faults. Uses the system call, or [`UFFD_DEVICE`] if the call
    /// fails.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn own_full() -> io::Result<Self> {
        // SAFETY: userfaultfd takes no pointers; the descriptor it returns is new and has no other owner.
        let made = unsafe { owned(libc::syscall(libc::SYS_userfaultfd, UFFD_FLAGS)) };
        made.or_else(|error| Self::from_device().map_err(|_| error)).map(Self)
    }

    fn from_device() -> io::Result<OwnedFd> {
        // SAFETY: the path is NUL-terminated; the descriptor is new and has no other owner.
        let device =
            unsafe { owned(libc::c_long::from(libc::open(UFFD_DEVICE.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC))) }?;
        // SAFETY: the argument is an integer; the descriptor is new and has no other owner.
        unsafe { owned(libc::c_long::from(libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, UFFD_FLAGS))) }
    }

    /// Wraps a descriptor that was created in another process.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Negotiates the API with `features`.
    ///
    /// # Errors
    /// EINVAL if the kernel lacks one of the features.
    pub fn enable(&self, features: u64) -> io::Result<()> {
        let mut api = UffdioApi { api: UFFD_API, features, ..Default::default() };
        // SAFETY: UFFDIO_API takes a UffdioApi, which contains no addresses.
        unsafe { ioctl(&self.0, UFFDIO_API, &mut api) }.map(drop)
    }

    /// Registers `[start, start + len)` for the faults of `mode`.
    ///
    /// # Errors
    /// The error of UFFDIO_REGISTER, such as EBUSY if another userfaultfd covers a part of the range.
    pub fn register(&self, start: u64, len: u64, mode: u64) -> io::Result<()> {
        let mut argument = UffdioRegister { range: UffdioRange { start, len }, mode, ioctls: 0 };
        // SAFETY: the kernel interprets the range in the address space of the userfaultfd; registering changes no
        // contents.
        unsafe { ioctl(&self.0, UFFDIO_REGISTER, &mut argument) }.map(drop)
    }

    /// Unregisters a range, which removes its protections and wakes its waiters.
    ///
    /// # Errors
    /// The error of UFFDIO_UNREGISTER.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start, len };
        // SAFETY: the kernel interprets the range in the address space of the userfaultfd; unregistering changes no
        // contents.
        let result = unsafe { ioctl(&self.0, UFFDIO_UNREGISTER, &mut range) };
        // Wake again: the kernel wakes the waiters before it waits for concurrent faults. The thread of such a fault
        // may have blocked after the kernel's wake-up.
        let _ = self.wake(start, len);
        result.map(drop)
    }

    /// Protects or unprotects a range.
    ///
    /// # Errors
    /// The error of UFFDIO_WRITEPROTECT.
    pub fn write_protect(&self, start: u64, len: u64, protect: bool) -> io::Result<()> {
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        let mut argument = UffdioWriteprotect { range: UffdioRange { start, len }, mode };
        retry(|| {
            // SAFETY: the kernel interprets the range in the address space of the userfaultfd; protection changes no
            // contents.
            unsafe { ioctl(&self.0, UFFDIO_WRITEPROTECT, &mut argument) }.map(drop)
        })
    }

    /// Maps the page cache pages of a range registered for MINOR faults. Returns the number of bytes mapped.
    ///
    /// `page` is the page size in bytes. Skips pages that are already mapped, and holes of the file.
    ///
    /// # Errors
    /// The error of UFFDIO_CONTINUE.
    pub fn map_existing(&self, start: u64, len: u64, page: u64) -> io::Result<u64> {
        let (mut at, end, mut mapped) = (start, start + len, 0);
        while at < end {
            let range = UffdioRange { start: at, len: end - at };
            let mut argument = UffdioContinue { range, mode: 0, mapped: 0 };
            // SAFETY: the kernel interprets the range in the address space of the userfaultfd, and only installs page
            // table entries for pages of the file that is mapped there.
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

    /// Returns whether a thread that removes pages of registered memory waits until its event is read.
    pub fn is_removing(&self) -> bool {
        // The kernel returns EAGAIN before it checks the range. The range is empty, so the call changes nothing.
        let mut argument = UffdioContinue { range: UffdioRange { start: 0, len: 0 }, mode: 0, mapped: 0 };
        // SAFETY: the range is empty, so the kernel maps nothing.
        let result = unsafe { ioctl(&self.0, UFFDIO_CONTINUE, &mut argument) };
        result.is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
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

/// Retries a call while it fails with EAGAIN, which means that the layout of the address space is changing. Returns the
/// error after `RETRY_TIMEOUT`, because the change does not complete until its event is read.
fn retry(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let begin = Instant::now();
    loop {
        match call() {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && begin.elapsed() < RETRY_TIMEOUT => {
                std::thread::yield_now();
            }
            other => return other,
        }
    }
}

/// Makes a PAGEMAP_SCAN call. Returns the number of regions filled.
///
/// # Errors
/// The errno of the call.
pub fn pagemap_scan(pagemap: &impl AsRawFd, argument: &mut PmScanArg, regions: &mut [PageRegion]) -> io::Result<usize> {
    argument.size = size_of::<PmScanArg>() as u64;
    argument.vec = regions.as_mut_ptr() as u64;
    argument.vec_len = regions.len() as u64;
    // SAFETY: `vec` and `vec_len` describe `regions`, which is exclusively borrowed and outlives the call.
    let count = unsafe { ioctl(pagemap, PAGEMAP_SCAN, argument) }?;
    usize::try_from(count).map_err(io::Error::other)
}
