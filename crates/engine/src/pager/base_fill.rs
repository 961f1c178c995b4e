//! Base of clones: a memory file with the contents of an image, which is filled on demand.
//!
//! Clones map the file privately. The holes of the file are its page map: a page that exists is final. A page must
//! therefore appear with all of its contents, and in a file of huge pages, a huge page must appear with all of its base
//! pages. Only one way to write ensures this: one write(2) of a whole unit (2 MiB), from a buffer that is resident. The
//! kernel then fills the huge page while no reader can see it. If a part of the buffer were not resident, the kernel
//! would expose zeros in the remaining part, until it continues the write (a full count is returned) or ends it.
//!
//! Therefore, the pages of the buffers are locked and cannot be moved (see [`ResidentBuffer`]). As a second defence,
//! after an incomplete write, the pager compares those pages of the unit that exist with the image. If the pager is
//! killed before that, the next pager compares them (see [`Marks`]). If they differ, the base is given up: clones may
//! have read the zeros, and what they have read cannot be corrected.
//!
//! Each region starts at a unit of the file. A unit of zeros stays a hole.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::base_marks::Marks;
use super::blocks::{Blocks, PageScratch};
use super::config::PagerError;
use super::memory::LoadError;
use crate::block::Class;
use crate::image::Chain;
use crate::mapping::data_of;
use crate::placer::PlaceError;
use crate::uapi::check;
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Number of locks. Each unit is assigned to one of them, so that only one thread fills the unit.
const LOCKS: usize = 64;
/// Number of resident buffers. An unprivileged process may lock 8 MiB by default.
const BUFFERS: usize = 2;
/// Size of a pipe in bytes: the default maximum for an unprivileged process.
const PIPE: usize = 1 << 20;

const HOLE: u8 = 0;
const FILLED: u8 = 1;
const ZERO: u8 = 2;

/// Contents of a unit of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitState {
    /// The unit is not loaded.
    Hole,
    /// All pages are in the file.
    Filled,
    /// All pages are zeros, and are not in the file.
    Zero,
}

/// Part of a base that has the contents of one region.
#[derive(Debug, Clone, Copy)]
pub struct BaseRegion {
    /// First page of the region, counted over all regions of the image.
    first_page: usize,
    /// Number of pages.
    pub pages: usize,
    /// First unit of the region in the file.
    pub first_unit: usize,
}

impl BaseRegion {
    fn units(&self) -> usize {
        self.pages.div_ceil(SLOTS)
    }

    /// Returns whether a unit belongs to the region.
    pub fn contains(&self, unit: usize) -> bool {
        (self.first_unit..self.first_unit + self.units()).contains(&unit)
    }

    /// Returns the pages of a unit, relative to the first page of the region, as (first, end).
    pub fn pages_of(&self, unit: usize) -> (usize, usize) {
        let first = (unit - self.first_unit) * SLOTS;
        (first, self.pages.min(first + SLOTS))
    }
}

/// Memory file with the contents of an image.
#[derive(Debug)]
pub struct BaseFile {
    file: File,
    regions: Vec<BaseRegion>,
    blocks: Blocks,
    units: Vec<AtomicU8>,
    holes: AtomicUsize,
    filling: Vec<Mutex<()>>,
    buffers: Vec<Mutex<ResidentBuffer>>,
    marks: Marks,
}

/// Buffers of a thread that fills units.
#[derive(Debug, Default)]
pub struct FillScratch {
    unit: Vec<u8>,
    pages: PageScratch,
}

impl BaseFile {
    /// Returns the length of the file in bytes, for regions with these numbers of pages. The last page contains the
    /// marks.
    pub fn len_for(regions: &[usize]) -> usize {
        regions.iter().map(|pages| pages.div_ceil(SLOTS) * LARGE_PAGE).sum::<usize>() + Marks::LEN
    }

    /// Opens a base. The pages that the file contains are kept: they are those of the same image. `regions` are the
    /// numbers of pages of the regions.
    ///
    /// # Errors
    /// If the regions or the length of the file do not match the image, if no memory can be locked, or if the base was
    /// given up, earlier or by this call.
    pub fn open(file: OwnedFd, chain: Chain, regions: &[usize]) -> Result<Self, PagerError> {
        let image = chain.nearest().page_map().len();
        let total = regions.iter().sum();
        if total != image {
            return Err(PagerError::Regions { regions: total, image });
        }
        let file = File::from(file);
        if file.metadata()?.len() != Self::len_for(regions) as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "length of the base does not match").into());
        }
        let regions = base_regions(regions);
        let units = regions.last().map_or(0, |last| last.first_unit + last.units());
        let buffers = (0..BUFFERS).map(|_| ResidentBuffer::new().map(Mutex::new)).collect::<io::Result<_>>()?;
        let marks = Marks::open(file.as_fd(), units)?;
        if let Some(unit) = marks.given_up() {
            return Err(PagerError::GivenUp(unit));
        }
        let base = Self {
            file,
            regions,
            blocks: Blocks::new(chain),
            units: (0..units).map(|_| AtomicU8::new(HOLE)).collect(),
            holes: AtomicUsize::new(units),
            filling: (0..LOCKS).map(|_| Mutex::default()).collect(),
            buffers,
            marks,
        };
        base.check_unfinished()?;
        base.read_page_map()?;
        Ok(base)
    }

    /// Compares the units that a killed pager was writing with the image.
    fn check_unfinished(&self) -> Result<(), PagerError> {
        let mut scratch = FillScratch::default();
        for buffer in 0..BUFFERS {
            let Some(unit) = self.marks.unfinished(buffer) else { continue };
            self.read_unit(unit, &mut scratch).map_err(|error| io::Error::other(error.to_string()))?;
            self.check_pages(unit, &scratch.unit).map_err(|_| PagerError::GivenUp(unit))?;
            self.marks.end(buffer);
        }
        Ok(())
    }

    /// Sets the states of all units from the holes of the file and the page map of the image.
    fn read_page_map(&self) -> io::Result<()> {
        let filled = filled_units(&self.file, self.units.len())?;
        for region in &self.regions {
            for (unit, filled) in filled.iter().enumerate().skip(region.first_unit).take(region.units()) {
                if *filled {
                    self.set(unit, FILLED);
                } else if self.is_zero(region, unit) {
                    self.set(unit, ZERO);
                }
            }
        }
        Ok(())
    }

    fn is_zero(&self, region: &BaseRegion, unit: usize) -> bool {
        let (first, end) = region.pages_of(unit);
        let map = &self.blocks.chain().nearest().page_map()[region.first_page + first..region.first_page + end];
        map.iter().all(|entry| matches!(entry.class(), Some(Class::Absent | Class::Zero)))
    }

    fn set(&self, unit: usize, state: u8) {
        self.units[unit].store(state, Ordering::Release);
        self.holes.fetch_sub(1, Ordering::AcqRel);
    }

    /// Returns the regions.
    pub fn regions(&self) -> &[BaseRegion] {
        &self.regions
    }

    /// Returns the number of units.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// Returns the unit that contains a page, counted over all regions of the image.
    pub fn unit_of(&self, page: usize) -> Option<usize> {
        let region = self.regions.iter().find(|region| page < region.first_page + region.pages)?;
        Some(region.first_unit + (page - region.first_page) / SLOTS)
    }

    /// Returns the number of units that are not loaded.
    pub fn holes(&self) -> usize {
        self.holes.load(Ordering::Acquire)
    }

    /// Returns the number of bytes of storage blocks read so far.
    pub fn bytes_read(&self) -> u64 {
        self.blocks.bytes_read()
    }

    /// Returns the state of a unit.
    pub fn state(&self, unit: usize) -> UnitState {
        match self.units[unit].load(Ordering::Acquire) {
            FILLED => UnitState::Filled,
            ZERO => UnitState::Zero,
            _ => UnitState::Hole,
        }
    }

    /// Loads a unit, unless it is loaded. Returns whether this call has loaded it.
    ///
    /// # Errors
    /// If a page cannot be read or verified, or if no memory is left. The unit is then not complete, and every page of
    /// it that the file contains is final. [`LoadError::GivenUp`] if the base was given up.
    pub fn fill(&self, unit: usize, scratch: &mut FillScratch) -> Result<bool, LoadError> {
        if self.state(unit) == UnitState::Hole {
            // Before the lock: loads of other units must not wait for a request of this one.
            let (first, end) = self.image_pages(unit);
            self.blocks.await_pages(first, end)?;
        }
        let _alone = self.filling[unit % LOCKS].lock();
        if self.state(unit) != UnitState::Hole {
            return Ok(false);
        }
        if let Some(unit) = self.marks.given_up() {
            return Err(LoadError::GivenUp(unit));
        }
        self.read_unit(unit, scratch)?;
        self.write_unit(unit, &scratch.unit)?;
        self.set(unit, FILLED);
        Ok(true)
    }

    fn no_memory(&self, unit: usize, error: io::Error) -> PlaceError {
        let region = self.region_of(unit);
        let (first, end) = self.regions[region].pages_of(unit);
        PlaceError::Memory { region, first, end, error }
    }

    fn region_of(&self, unit: usize) -> usize {
        self.regions.partition_point(|region| region.first_unit + region.units() <= unit)
    }

    /// Returns the pages of a unit, counted over all regions of the image, as (first, end).
    fn image_pages(&self, unit: usize) -> (usize, usize) {
        let region = &self.regions[self.region_of(unit)];
        let (first, end) = region.pages_of(unit);
        (region.first_page + first, region.first_page + end)
    }

    /// Returns the storage blocks of the image.
    pub fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    /// Calls `notify` when storage blocks of a unit have been fetched, or cannot be fetched. Returns false, without a
    /// call, if the unit can be loaded at once.
    pub fn park(&self, unit: usize, notify: impl FnOnce() + Send + 'static) -> bool {
        let (first, end) = self.image_pages(unit);
        self.state(unit) == UnitState::Hole && self.blocks.park(first, end, &|_| true, notify)
    }

    /// Requests the storage blocks of units, without waiting.
    pub fn request(&self, units: std::ops::Range<usize>) {
        for unit in units.filter(|&unit| self.state(unit) == UnitState::Hole) {
            let (first, end) = self.image_pages(unit);
            self.blocks.request(first, end, &|_| true);
        }
    }

    /// Sends the order in which units are loaded in the background to the provider of the storage blocks.
    pub fn prefetch(&self, units: &[usize]) {
        let pages = units.iter().flat_map(|&unit| {
            let (first, end) = self.image_pages(unit);
            first..end
        });
        self.blocks.prefetch_all(pages, &[]);
    }

    /// Reads the contents of a unit from the image into `scratch.unit`.
    fn read_unit(&self, unit: usize, scratch: &mut FillScratch) -> Result<(), LoadError> {
        let region = &self.regions[self.region_of(unit)];
        let (first, end) = region.pages_of(unit);
        scratch.unit.clear();
        scratch.unit.resize(LARGE_PAGE, 0);
        let pages = &mut scratch.unit[..(end - first) * SMALL_PAGE];
        self.blocks.read_pages(region.first_page + first, pages, &mut scratch.pages)
    }

    /// Writes a unit with one call. The unit is marked as being filled during the call.
    fn write_unit(&self, unit: usize, contents: &[u8]) -> Result<(), LoadError> {
        let number = unit % BUFFERS;
        let mut buffer = self.buffers[number].lock();
        buffer.bytes().copy_from_slice(contents);
        self.marks.begin(number, unit);
        let error = match self.file.write_at(buffer.bytes(), (unit * LARGE_PAGE) as u64) {
            Ok(LARGE_PAGE) => None,
            // The kernel ends a write early if it cannot allocate the next page. The next attempt writes the whole unit
            // again, and does not change the bytes of pages that exist.
            Ok(_) => Some(io::Error::from_raw_os_error(libc::ENOSPC)),
            Err(error) => Some(error),
        };
        if error.is_some() {
            self.check_pages(unit, contents)?;
        }
        self.marks.end(number);
        error.map_or(Ok(()), |error| Err(self.no_memory(unit, error).into()))
    }

    /// Compares those pages of a unit that the file contains with `contents`. Gives the base up if they differ.
    fn check_pages(&self, unit: usize, contents: &[u8]) -> Result<(), LoadError> {
        match self.pages_match(unit, contents) {
            Ok(true) => Ok(()),
            // If the pages cannot be read, they cannot be trusted either.
            Ok(false) | Err(_) => {
                self.marks.give_up(unit);
                Err(LoadError::GivenUp(unit))
            }
        }
    }

    /// Returns whether those pages of a unit that the file contains have the right contents. Allocates no page of the
    /// file.
    fn pages_match(&self, unit: usize, contents: &[u8]) -> io::Result<bool> {
        let (begin, mut found) = ((unit * LARGE_PAGE) as u64, Vec::new());
        for (start, end) in data_of(&self.file, begin, begin + LARGE_PAGE as u64)? {
            let (from, to) = (index(start - begin), index(end - begin));
            found.resize(to - from, 0);
            self.file.read_exact_at(&mut found, start)?;
            if found != contents[from..to] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn base_regions(pages: &[usize]) -> Vec<BaseRegion> {
    let (mut first_page, mut first_unit, mut regions) = (0, 0, Vec::with_capacity(pages.len()));
    for &pages in pages {
        let region = BaseRegion { first_page, pages, first_unit };
        first_page += pages;
        first_unit += region.units();
        regions.push(region);
    }
    regions
}

/// Returns, for each unit, whether all of its pages are in the file.
fn filled_units(file: &File, units: usize) -> io::Result<Vec<bool>> {
    let mut filled = vec![false; units];
    for (start, end) in data_of(file, 0, (units * LARGE_PAGE) as u64)? {
        let (first, last) = (index(start).div_ceil(LARGE_PAGE), index(end) / LARGE_PAGE);
        filled.iter_mut().take(last).skip(first).for_each(|unit| *unit = true);
    }
    Ok(filled)
}

/// Converts a position in the file of a base to an index.
fn index(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

/// Locked buffer of one unit, whose pages stay where they are.
///
/// While the kernel moves a page (compaction, NUMA balancing, huge pages), a write(2) from it ends early. The kernel
/// may move even a locked page. Compaction skips an anonymous page with additional references, so pipes hold an
/// additional reference to each page; a separate memory policy excludes the buffer from NUMA balancing. Only the
/// administrator can still cause a move (move_pages(2), removal of memory).
#[derive(Debug)]
struct ResidentBuffer {
    address: *mut u8,
    /// Pipes with references to all pages.
    _pipes: Vec<[OwnedFd; 2]>,
}

// SAFETY: the mapping belongs to the buffer alone, and is accessed through `&mut self` only.
unsafe impl Send for ResidentBuffer {}

impl ResidentBuffer {
    fn new() -> io::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: mmap creates a new mapping at an address chosen by the kernel, so no existing mapping is affected.
        let address = unsafe { libc::mmap(ptr::null_mut(), LARGE_PAGE, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A write after a fork would otherwise replace the pages by copies, to which the pipes do not refer.
        for advice in [libc::MADV_DONTFORK, libc::MADV_NOHUGEPAGE] {
            // SAFETY: the range is the mapping of the buffer; the advice does not change contents. A kernel without
            // huge pages refuses the second advice.
            unsafe { libc::madvise(address, LARGE_PAGE, advice) };
        }
        let mode = libc::c_long::from(libc::MPOL_LOCAL);
        // SAFETY: mbind reads no memory without a node mask. It fails on kernels without NUMA, or in some containers.
        unsafe { libc::syscall(libc::SYS_mbind, address, LARGE_PAGE, mode, ptr::null::<u64>(), 0usize, 0usize) };
        // SAFETY: the range is the mapping of the buffer; locking does not change contents.
        let locked = check(unsafe { libc::mlock(address, LARGE_PAGE) });
        // If no pipe can be created, because the memory limit of pipes is reached, the buffer is only locked. The
        // comparison with the image then still detects an incomplete write.
        let pipes = (0..LARGE_PAGE / PIPE).map_while(|part| hold(address.cast::<u8>().wrapping_add(part * PIPE)).ok());
        let buffer = Self { address: address.cast(), _pipes: pipes.collect() };
        locked.map(|_| buffer)
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is valid for its length until drop, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.address, LARGE_PAGE) }
    }
}

impl Drop for ResidentBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to the buffer, and no reference to it is left.
        unsafe { libc::munmap(self.address.cast(), LARGE_PAGE) };
    }
}

/// Creates a pipe that refers to the pages of `PIPE` bytes from `address` on, which must be mapped. The pages stay
/// writable.
fn hold(address: *mut u8) -> io::Result<[OwnedFd; 2]> {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors, for which `ends` has space.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
    // SAFETY: the descriptors are new and have no other owner.
    let ends = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    let size = libc::c_int::try_from(PIPE).map_err(io::Error::other)?;
    // SAFETY: the call takes no pointers.
    check(unsafe { libc::fcntl(ends[1].as_raw_fd(), libc::F_SETPIPE_SZ, size) })?;
    let range = libc::iovec { iov_base: address.cast(), iov_len: PIPE };
    // SAFETY: the kernel takes references to the pages, and changes nothing; nothing ever reads from the pipe.
    let held = unsafe { libc::vmsplice(ends[1].as_raw_fd(), &raw const range, 1, libc::SPLICE_F_NONBLOCK) };
    if usize::try_from(held).ok() == Some(PIPE) { Ok(ends) } else { Err(io::ErrorKind::OutOfMemory.into()) }
}
