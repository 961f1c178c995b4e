//! Shared mappings of the files that back a workload's memory.
//!
//! The engine maps the same files as the workload, and reads and writes pages through its own mapping. This requires no
//! copies or system calls. Traces and fault handling are not triggered, because they apply only to the workload's
//! mapping.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::file_systems;
use crate::uapi::{self, PageRegion, PmScanArg, Userfault, check};
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Shared writable mapping of `[offset, offset + len)` of a file, aligned to 2 MiB in our address space.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: AtomicUsize,
    /// Length of the reserved addresses, of which the mapping uses the first `len` bytes. Locked while the mapping
    /// grows.
    reserved: Mutex<usize>,
    file: OwnedFd,
    offset: u64,
    /// Page size of the hugetlbfs that holds the file; `None` for other file systems.
    hugetlb: Option<usize>,
    closed: AtomicBool,
    /// Descriptors that are closed after the memory has been unmapped.
    kept: Mutex<Vec<OwnedFd>>,
    /// Whether [`registered`] contains the mapping.
    listed: bool,
}

/// Address and length of every mapping of this process.
static REGISTERED: Mutex<Vec<(u64, u64)>> = Mutex::new(Vec::new());

/// Returns the address and length of every [`Mapping`] of this process. All other mappings of the process belong to the
/// program.
pub fn registered() -> Vec<(u64, u64)> {
    REGISTERED.lock().clone()
}

fn register(address: u64, len: u64) {
    REGISTERED.lock().push((address, len));
}

fn unregister(address: u64) {
    let mut registered = REGISTERED.lock();
    if let Some(at) = registered.iter().position(|(start, _)| *start == address) {
        registered.swap_remove(at);
    }
}

// SAFETY: the mapping is plain shared memory, accessed through raw pointers, volatile reads and atomics. Code that
// creates a reference to plain bytes ensures that no other thread or process uses these bytes at the same time, or
// states in its SAFETY comment why such use is harmless.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a file from `offset` on. `len` and `offset` must be multiples of the page size of the file.
    ///
    /// # Errors
    /// EINVAL if `len` is 0, or if `len` or `offset` is not a multiple of the file's page size; otherwise the error of
    /// fcntl(2), fstatfs(2) or mmap(2).
    pub fn new(file: BorrowedFd<'_>, len: usize, offset: u64) -> io::Result<Self> {
        Self::with_room(file, len, offset, len)
    }

    /// Like [`new`](Self::new), but reserves the addresses of `room` bytes, up to which the mapping can grow.
    ///
    /// # Errors
    /// The same errors as [`new`](Self::new); EINVAL if `room` is less than `len`, or not a multiple of the page size.
    pub fn with_room(file: BorrowedFd<'_>, len: usize, offset: u64, room: usize) -> io::Result<Self> {
        let hugetlb = hugetlb_page(file)?;
        // The kernel would round a length up to the page size of hugetlbfs, and replace memory after the reservation.
        let page = hugetlb.unwrap_or(SMALL_PAGE);
        let whole = len.is_multiple_of(page) && offset.is_multiple_of(page as u64);
        if len == 0 || !whole || room < len || !room.is_multiple_of(page) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let file = file.try_clone_to_owned()?;
        let base = map(file.as_fd(), len, offset, room, 0)?;
        register(base.as_ptr() as u64, len as u64);
        let (closed, kept) = (AtomicBool::new(false), Mutex::default());
        let (len, reserved) = (AtomicUsize::new(len), Mutex::new(room));
        Ok(Self { base, len, reserved, file, offset, hugetlb, closed, kept, listed: true })
    }

    /// Extends the mapping to `len` bytes of the file. The address of the mapping stays the same. A shorter length has
    /// no effect.
    ///
    /// # Errors
    /// ENOMEM if `len` exceeds the reserved addresses, EINVAL if `len` is not a multiple of the page size or if the
    /// mapping is closed; otherwise the error of mmap(2).
    pub fn grow(&self, len: usize) -> io::Result<()> {
        let reserved = self.reserved.lock();
        let old = self.len();
        if len > *reserved {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        if !len.is_multiple_of(self.hugetlb.unwrap_or(SMALL_PAGE)) || self.is_closed() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if len <= old {
            return Ok(());
        }
        let start = libc::off_t::try_from(self.offset + old as u64).map_err(io::Error::other)?;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: the range follows the mapping and lies within the reservation, to which there are no references.
        let mapped = unsafe {
            libc::mmap(self.base.as_ptr().add(old).cast(), len - old, access, flags, self.file.as_raw_fd(), start)
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.len.store(len, Ordering::Release);
        unregister(self.address());
        register(self.address(), len as u64);
        Ok(())
    }

    /// Replaces the memory by a private mapping of another file, which permits no access before
    /// [`permit`](Self::permit). A write to a page creates a private copy of the page.
    ///
    /// # Errors
    /// The error of mmap(2).
    pub fn replace(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range is our mapping, and no reference to its bytes exists before `permit`.
        let mapped =
            unsafe { libc::mmap(self.base.as_ptr().cast(), self.len(), libc::PROT_NONE, flags, file.as_raw_fd(), 0) };
        if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Permits reads and writes after [`replace`](Self::replace).
    ///
    /// # Errors
    /// The error of mprotect(2).
    pub fn permit(&self) -> io::Result<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is our mapping.
        check(unsafe { libc::mprotect(self.base.as_ptr().cast(), self.len(), access) }).map(drop)
    }

    /// Removes the mapping from [`registered`], as its drop would do otherwise.
    pub fn unlist(&mut self) {
        if std::mem::take(&mut self.listed) {
            unregister(self.address());
        }
    }

    /// Takes ownership of a descriptor, and closes it after the memory has been unmapped.
    pub fn keep(&self, descriptor: OwnedFd) {
        self.kept.lock().push(descriptor);
    }

    /// Makes the mapping read-only, for use after the hand-over of the workload, when a write would be lost. A later
    /// write terminates the program with a message (see [`crate::closed`]).
    ///
    /// # Errors
    /// The error of mprotect(2).
    pub fn close(&self) -> io::Result<()> {
        crate::closed::watch(self.base.as_ptr().addr(), self.len());
        // SAFETY: the range is our mapping, which stays mapped and readable. There are no mutable references to its
        // bytes.
        check(unsafe { libc::mprotect(self.base.as_ptr().cast(), self.len(), libc::PROT_READ) })?;
        self.closed.store(true, Ordering::Release);
        Ok(())
    }

    /// Returns whether [`close`](Self::close) has been called.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Returns a pointer to the first byte of the mapping.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Returns the address of the first byte of the mapping.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Returns the length of the mapping in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// Returns the number of base pages of the mapping.
    pub fn pages(&self) -> usize {
        self.len() / SMALL_PAGE
    }

    /// Returns the descriptor of the file.
    pub fn file(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Returns whether the file is in hugetlbfs.
    pub fn is_hugetlb(&self) -> bool {
        self.hugetlb.is_some()
    }

    /// Returns a pointer to the first byte of a base page.
    ///
    /// # Panics
    /// If the page is not within the mapping.
    pub fn page(&self, page: usize) -> *mut u8 {
        assert!(page < self.pages(), "page {page} of {}", self.pages());
        // SAFETY: the page lies within the mapping, by the assertion.
        unsafe { self.base.as_ptr().add(page * SMALL_PAGE) }
    }

    /// Returns the ranges that hold data, as (start, end) in bytes. Reading a byte outside these ranges would allocate
    /// a page.
    ///
    /// # Errors
    /// The error of lseek(2); in hugetlbfs, the error of mmap(2), userfaultfd(2) or PAGEMAP_SCAN.
    pub fn data_ranges(&self) -> io::Result<Vec<(usize, usize)>> {
        match self.hugetlb {
            Some(page) => self.hugetlb_ranges(page),
            None => self.data_within(0, self.len()),
        }
    }

    /// Like [`data_ranges`](Self::data_ranges), but only within `[start, end)` (bytes). Must not be called for
    /// hugetlbfs, where lseek(2) reports the whole file as data.
    ///
    /// # Errors
    /// The error of lseek(2).
    pub fn data_within(&self, start: usize, end: usize) -> io::Result<Vec<(usize, usize)>> {
        let (start, end) = (self.offset + start as u64, self.offset + end.min(self.len()) as u64);
        let ranges = data_of(&self.file, start, end)?.into_iter();
        Ok(ranges.map(|(start, end)| (self.relative(start), self.relative(end))).collect())
    }

    /// Returns whether the byte at offset `at` of the mapping is in a data range. The result is always true in
    /// hugetlbfs.
    ///
    /// # Errors
    /// The error of lseek(2).
    pub fn is_data(&self, at: usize) -> io::Result<bool> {
        let position = self.offset + at as u64;
        Ok(seek(&self.file, position, libc::SEEK_DATA)? == Some(position))
    }

    /// Sets the lowest bit of `found[n]` if page `first + n` is in memory, which excludes holes and pages in swap
    /// (mincore(2)). In hugetlbfs, the bit is set only for pages that this process has mapped.
    ///
    /// # Errors
    /// The error of mincore(2).
    ///
    /// # Panics
    /// If the pages are not within the mapping.
    pub fn resident(&self, first: usize, found: &mut [u8]) -> io::Result<()> {
        assert!(first + found.len() <= self.pages(), "pages {first} and {} more of {}", found.len(), self.pages());
        let len = found.len() * SMALL_PAGE;
        // SAFETY: the pages lie within the mapping, by the assertion, and `found` has one byte per page.
        check(unsafe { libc::mincore(self.base.as_ptr().add(first * SMALL_PAGE).cast(), len, found.as_mut_ptr()) })
            .map(drop)
    }

    /// Returns the ranges that are in memory, as (start, end) in bytes.
    fn resident_ranges(&self) -> io::Result<Vec<(usize, usize)>> {
        let ranges = self.data_ranges()?;
        if self.is_hugetlb() {
            return Ok(ranges); // hugetlbfs is never swapped
        }
        let mut found = Vec::with_capacity(ranges.len());
        let mut resident = Vec::new();
        for (start, end) in ranges {
            resident.clear();
            resident.resize((end - start).div_ceil(SMALL_PAGE), 0);
            self.resident(start / SMALL_PAGE, &mut resident)?;
            let mut at = start;
            for run in resident.chunk_by(|one, other| one & 1 == other & 1) {
                let stop = at + run.len() * SMALL_PAGE;
                if run[0] & 1 == 1 {
                    found.push((at, stop));
                }
                at = stop;
            }
        }
        Ok(found)
    }

    /// Returns the data ranges of a file in hugetlbfs. Finds them by mapping the existing pages into a temporary
    /// mapping, because lseek(2) reports the whole file as data.
    fn hugetlb_ranges(&self, page: usize) -> io::Result<Vec<(usize, usize)>> {
        let len = self.len();
        let base = map(self.as_fd(), len, self.offset, len, libc::MAP_NORESERVE)?;
        let mut ranges = Vec::new();
        let found = present(base.as_ptr() as u64, len as u64, page as u64, |start, end| ranges.push((start, end)));
        // SAFETY: the mapping was created above, and there are no other references to it.
        unsafe { libc::munmap(base.as_ptr().cast(), len) };
        found.map(|()| ranges)
    }

    fn relative(&self, position: u64) -> usize {
        usize::try_from(position - self.offset).unwrap_or(usize::MAX)
    }

    /// Punches a hole into the file: the range is freed and reads as zeros.
    ///
    /// # Errors
    /// The error of fallocate(2).
    pub fn punch(&self, start: usize, len: usize) -> io::Result<()> {
        let position = libc::off_t::try_from(self.offset + start as u64).map_err(io::Error::other)?;
        let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: fallocate takes no pointers.
        check(unsafe { libc::fallocate(self.file.as_raw_fd(), mode, position, len) }).map(drop)
    }

    /// Returns for each 2 MiB unit whether it is backed by a huge page. Maps the pages that are in memory, and checks
    /// whether a PMD entry maps the unit.
    ///
    /// Holes stay holes, and swapped pages stay in swap. Units are counted from the start of the mapping. A shorter
    /// last unit is never huge.
    ///
    /// # Errors
    /// Errors of lseek(2), mincore(2), madvise(2) and PAGEMAP_SCAN.
    pub fn large_units(&self) -> io::Result<Vec<bool>> {
        let mut units = vec![false; self.len().div_ceil(LARGE_PAGE)];
        for (start, end) in self.resident_ranges()? {
            self.populate_read(start, end - start)?;
        }
        let pagemap = File::open("/proc/self/pagemap")?;
        let categories = uapi::PAGE_IS_HUGE | uapi::PAGE_IS_PRESENT;
        scan(&pagemap, self.address(), self.address() + self.len() as u64, 0, categories, |start, end| {
            let first = usize::try_from(start - self.address()).unwrap_or(0) / SMALL_PAGE;
            let last = usize::try_from(end - self.address()).unwrap_or(0) / SMALL_PAGE;
            if let Some(units) = units.get_mut(first.div_ceil(SLOTS)..last / SLOTS) {
                units.fill(true);
            }
        })?;
        Ok(units)
    }

    /// Copies `len` bytes into the mapping.
    ///
    /// # Errors
    /// EINVAL if the bytes do not fit into the mapping, EACCES if the mapping is closed.
    ///
    /// # Safety
    /// `from` must be valid for reads of `len` bytes.
    pub unsafe fn copy_in(&self, offset: usize, from: *const u8, len: usize) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len()) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if self.is_closed() {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        // SAFETY: the target lies in the mapping, by the check above. The caller ensures that the bytes can be read;
        // they may overlap the target.
        unsafe { std::ptr::copy(from, self.base.as_ptr().add(offset), len) };
        Ok(())
    }

    /// Returns whether a present page contains only zeros. Stops reading at the first word that is not zero.
    pub fn is_zero(&self, page: usize) -> bool {
        let words = self.page(page).cast::<u64>();
        // SAFETY: the words lie in one page of the mapping, by the assertion in `page`. The reads are volatile, because
        // the workload may write to the page.
        (0..SMALL_PAGE / size_of::<u64>()).all(|at| unsafe { words.add(at).read_volatile() } == 0)
    }

    /// Maps the pages of a range of data in this process, without changing them.
    fn populate_read(&self, start: usize, len: usize) -> io::Result<()> {
        // SAFETY: the range lies within our mapping, and reading data changes nothing.
        check(unsafe { libc::madvise(self.base.as_ptr().add(start).cast(), len, libc::MADV_POPULATE_READ) }).map(drop)
    }
}

impl AsFd for Mapping {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.unlist();
        if self.is_closed() {
            crate::closed::forget(self.base.as_ptr().addr());
        }
        // SAFETY: `new` created the mapping. Callers must not use pointers into the mapping after the drop.
        unsafe { libc::munmap(self.base.as_ptr().cast(), *self.reserved.get_mut()) };
    }
}

/// Returns the ranges of a file within `[start, end)` (bytes) that hold data. Not for hugetlbfs, where lseek(2) reports
/// the whole file as data.
///
/// # Errors
/// The error of lseek(2).
pub(crate) fn data_of(file: &impl AsRawFd, start: u64, end: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    let mut at = start;
    while at < end {
        let Some(start) = seek(file, at, libc::SEEK_DATA)?.filter(|&start| start < end) else { break };
        let stop = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
        ranges.push((start, stop));
        at = stop;
    }
    Ok(ranges)
}

fn seek(file: &impl AsRawFd, from: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let from = libc::off_t::try_from(from).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: lseek takes no pointers.
    let found = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
    if let Ok(position) = u64::try_from(found) {
        return Ok(Some(position));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
}

/// Maps a part of a file at an address aligned to 2 MiB, and reserves `room` bytes from that address on.
fn map(file: BorrowedFd<'_>, len: usize, offset: u64, room: usize, flags: libc::c_int) -> io::Result<NonNull<u8>> {
    let base = reserve(room)?;
    let start = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED | flags);
    // SAFETY: MAP_FIXED replaces the first `len` bytes of the reservation, to which there are no other references. The
    // caller has checked that `len` is a multiple of the file's page size, to which the kernel would round it up.
    let mapped = unsafe { libc::mmap(base.as_ptr().cast(), len, access, flags, file.as_raw_fd(), start) };
    if mapped == libc::MAP_FAILED {
        let error = io::Error::last_os_error();
        // SAFETY: the range is the reservation made above, to which there are no other references.
        unsafe { libc::munmap(base.as_ptr().cast(), room) };
        return Err(error);
    }
    Ok(base)
}

/// Advises the kernel to use huge pages for memory that is about to be filled, which avoids a fault per base page.
pub fn prefer_large<T>(memory: &[T]) {
    let (start, len) = (memory.as_ptr() as usize, size_of_val(memory));
    let first = start.next_multiple_of(LARGE_PAGE);
    if let Some(whole) = (start + len).checked_sub(first).filter(|&rest| rest >= LARGE_PAGE) {
        // SAFETY: the range lies within `memory`, whose contents do not change. A failure has no effect.
        unsafe { libc::madvise(first as *mut libc::c_void, whole, libc::MADV_HUGEPAGE) };
    }
}

/// Returns the page size of the hugetlbfs that holds a file, or `None` for other file systems.
fn hugetlb_page(file: BorrowedFd<'_>) -> io::Result<Option<usize>> {
    let found = file_systems::status(file)?;
    if found.f_type != libc::HUGETLBFS_MAGIC {
        return Ok(None);
    }
    usize::try_from(found.f_bsize).map(Some).map_err(io::Error::other)
}

/// Maps the existing pages of a hugetlbfs file into a new mapping of the file. Calls `found` with their runs, as
/// (start, end) in bytes from `address`.
fn present(address: u64, len: u64, page: u64, mut found: impl FnMut(usize, usize)) -> io::Result<()> {
    let uffd = Userfault::own()?;
    uffd.enable(uapi::FEATURE_MINOR_HUGETLBFS)?;
    uffd.register(address, len, uapi::REGISTER_MODE_MINOR)?;
    uffd.map_existing(address, len, page)?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let offset = |at: u64| usize::try_from(at - address).unwrap_or(0);
    scan(&pagemap, address, address + len, 0, uapi::PAGE_IS_PRESENT, |start, end| found(offset(start), offset(end)))
}

/// Reserves `len` bytes (whole pages) of address space, aligned to 2 MiB.
fn reserve(len: usize) -> io::Result<NonNull<u8>> {
    let whole = len.checked_add(LARGE_PAGE).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: mmap creates a new mapping at an address that the kernel chooses.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = base as usize;
    let aligned = start.next_multiple_of(LARGE_PAGE);
    let (head, tail) = (aligned - start, start + whole - (aligned + len));
    // SAFETY: both parts lie in the reservation, outside the part that stays reserved.
    unsafe {
        if head > 0 {
            libc::munmap(base, head);
        }
        if tail > 0 {
            libc::munmap((aligned + len) as *mut libc::c_void, tail);
        }
    }
    NonNull::new(aligned as *mut u8).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

/// Scans `[start, end)` of a pagemap, and calls `found(start, end)` for each run of pages that are in all of
/// `categories`. `flags` are PM_SCAN flags.
///
/// # Errors
/// The error of PAGEMAP_SCAN, or an error if PAGEMAP_SCAN makes no progress.
pub fn scan(
    pagemap: &File,
    start: u64,
    end: u64,
    flags: u64,
    categories: u64,
    found: impl FnMut(u64, u64),
) -> io::Result<()> {
    let what = PmScanArg { flags, category_mask: categories, return_mask: categories, ..Default::default() };
    walk(pagemap, start, end, what, found)
}

/// Like [`scan`], but `what` selects the pages. The range in `what` is ignored.
///
/// Requests up to 512 runs per call: with more, some kernels end the walk early and report pages twice.
///
/// # Errors
/// The error of PAGEMAP_SCAN, or an error if PAGEMAP_SCAN makes no progress.
pub fn walk(pagemap: &File, start: u64, end: u64, what: PmScanArg, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
    let mut regions = [PageRegion::default(); 512];
    let mut at = start;
    while at < end {
        let mut argument = PmScanArg { start: at, end, ..what };
        let count = uapi::pagemap_scan(pagemap, &mut argument, &mut regions)?;
        for region in &regions[..count] {
            found(region.start, region.end);
        }
        if argument.walk_end <= at {
            return Err(io::Error::other("cannot scan the page map: PAGEMAP_SCAN made no progress"));
        }
        at = argument.walk_end;
    }
    Ok(())
}

/// Duplicates a descriptor.
///
/// # Errors
/// The error of fcntl(2), such as EBADF if `fd` is not open.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: this fcntl command takes no pointers.
    let copy = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the descriptor was created above and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
