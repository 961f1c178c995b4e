//! Memory scanned for duplicates: our mapping of a shared file, or the memory of another process.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::content::{Content, WORDS};
use super::file::SharedFile;
use super::span::{CHUNK, Others, Reader, Span, pages, split};
use crate::mapping::scan;
use crate::space::Space;
use crate::uapi::{PAGE_IS_HUGE, PAGE_IS_PRESENT};
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Bit of a pagemap entry (Documentation/admin-guide/mm/pagemap.rst): the page is in memory.
const PM_PRESENT: u64 = 1 << 63;
/// Bit of a pagemap entry: the page is in swap.
const PM_SWAP: u64 = 1 << 62;
/// Bit of a pagemap entry: the page is a file page or shared anonymous memory.
const PM_FILE: u64 = 1 << 61;
/// Bit of a pagemap entry: the page is mapped exclusively.
const PM_EXCLUSIVE: u64 = 1 << 56;

/// Memory to scan.
#[derive(Debug, Clone)]
pub enum ScannedMemory {
    /// Shared file. Positions are offsets in the mapping.
    File(Arc<SharedFile>),
    /// Private anonymous memory of a process. Positions are addresses.
    Process(Arc<Space>),
}

impl ScannedMemory {
    /// Returns the 2 MiB units of `[start, start + len)` that may contain pages, and whether each is backed by a huge
    /// page.
    ///
    /// # Errors
    /// Errors of PAGEMAP_SCAN, lseek(2), mincore(2) or madvise(2).
    pub fn units(&self, start: u64, len: u64) -> io::Result<Vec<(Span, bool)>> {
        let end = start + len;
        match self {
            Self::Process(space) => {
                let mut spans = Vec::new();
                scan(space.pagemap(), start, end, 0, PAGE_IS_PRESENT, |start, end| split(start, end, &mut spans))?;
                let mut huge = Vec::new();
                let both = PAGE_IS_PRESENT | PAGE_IS_HUGE;
                scan(space.pagemap(), start, end, 0, both, |start, end| split(start, end, &mut huge))?;
                let is_huge = |span: &Span| huge.binary_search_by_key(&span.start, |other| other.start).is_ok();
                Ok(whole_units(&spans, start, end).map(|span| (span, is_huge(&span))).collect())
            }
            Self::File(file) => file.units(start, end),
        }
    }

    /// Calls `found` with the contents of every page of a span, except pages that are already shared. Returns the
    /// numbers of pages that were not read from memory.
    ///
    /// Does not change memory: no page is faulted in or swapped in, and no hole is filled.
    ///
    /// # Errors
    /// ESRCH if the process has exited; otherwise the error of mincore(2) or process_vm_readv(2).
    pub fn read(&self, span: Span, reader: &mut Reader, found: impl FnMut(Content)) -> io::Result<Others> {
        match self {
            Self::File(file) => file.read(span, reader, found),
            Self::Process(space) => read_process(space, span, reader, found),
        }
    }
}

/// Extends each span to its whole unit within `[start, end)`, because pages may be populated during the scan.
fn whole_units(spans: &[Span], start: u64, end: u64) -> impl Iterator<Item = Span> {
    let unit_len = LARGE_PAGE as u64;
    spans.iter().map(move |span| {
        let unit = span.start / unit_len * unit_len;
        let first = unit.max(start);
        Span { start: first, pages: pages(first, (unit + unit_len).min(end)) }
    })
}

fn read_process(space: &Space, span: Span, reader: &mut Reader, mut found: impl FnMut(Content)) -> io::Result<Others> {
    let entries = &mut reader.entries[..span.pages];
    let position = span.start / SMALL_PAGE as u64 * size_of::<u64>() as u64;
    // The pagemap of an exited process is empty.
    let gone = |_| io::Error::from_raw_os_error(libc::ESRCH);
    space.pagemap().read_exact_at(entries.as_mut_bytes(), position).map_err(gone)?;
    let in_memory = |entry: u64| entry & PM_PRESENT != 0 && entry & (PM_SWAP | PM_FILE) == 0;
    // Pages that are shared are not read: process_vm_readv(2) would create private copies of them in the process.
    let ours: Vec<u64> = (span.start..)
        .step_by(SMALL_PAGE)
        .zip(entries.iter())
        .filter(|&(_, &entry)| in_memory(entry) && entry & PM_EXCLUSIVE != 0)
        .map(|(address, _)| address)
        .collect();
    let shared = entries.iter().filter(|&&entry| in_memory(entry)).count() - ours.len();
    for addresses in ours.chunks(CHUNK) {
        let copied = copy_pages(space, addresses, &mut reader.chunk)?;
        reader.chunk[..copied].iter().map(Content::of).for_each(&mut found);
    }
    Ok(Others { shared: u32::try_from(shared).unwrap_or(u32::MAX), deferred: 0 })
}

/// Copies pages of a process, up to the first unmapped one. Returns the number of copied pages.
fn copy_pages(space: &Space, addresses: &[u64], to: &mut [[u64; WORDS]]) -> io::Result<usize> {
    let page = |&address: &u64| libc::iovec { iov_base: address as *mut libc::c_void, iov_len: SMALL_PAGE };
    let remote: Vec<libc::iovec> = addresses.iter().map(page).collect();
    let target = &mut to[..addresses.len()];
    let local = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: size_of_val(target) };
    // SAFETY: the arrays live through the call, which only writes to `target`. The kernel checks the remote addresses.
    let copied = unsafe {
        libc::process_vm_readv(space.pid(), &raw const local, 1, remote.as_ptr(), remote.len() as libc::c_ulong, 0)
    };
    match usize::try_from(copied) {
        Ok(bytes) => Ok(bytes / SMALL_PAGE),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EFAULT) => Ok(0),
            error => Err(error),
        },
    }
}
