//! Where the pages of a workload are read from: our own mapping of a shared file, or another process.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::content::{Content, WORDS};
use super::file::SharedFile;
use crate::mapping::scan;
use crate::space::Space;
use crate::uapi::{PAGE_IS_HUGE, PAGE_IS_PRESENT};
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Pages read at a time from another process: they stay in the second-level cache until they are hashed.
const CHUNK: usize = 64;

/// Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const PM_PRESENT: u64 = 1 << 63;
const PM_SWAP: u64 = 1 << 62;
const PM_FILE: u64 = 1 << 61;
const PM_EXCLUSIVE: u64 = 1 << 56;

/// Memory to look at.
#[derive(Debug, Clone)]
pub enum Source {
    /// A shared file. Positions are bytes from the start of the mapping.
    File(Arc<SharedFile>),
    /// Private anonymous memory of a process. Positions are its addresses.
    Process(Arc<Space>),
}

/// A run of a [`Source`] within one unit of 2 MiB.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Position of the first byte.
    pub start: u64,
    /// Pages, at most 512.
    pub pages: usize,
}

/// Pages of a [`Span`] that were not looked at in memory.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Others {
    /// Shared already, with a forked process or by KSM.
    pub shared: u32,
    /// Still to come (S8), and known by their signatures.
    pub deferred: u32,
}

/// Buffers of a thread.
#[derive(Debug)]
pub struct Reader {
    entries: Vec<u64>,
    /// Of each page, whether it is in memory: see `Mapping::resident`.
    pub(super) resident: Vec<u8>,
    pub(super) chunk: Vec<[u64; WORDS]>,
}

impl Default for Reader {
    fn default() -> Self {
        Self { entries: vec![0; SLOTS], resident: vec![0; SLOTS], chunk: vec![[0; WORDS]; CHUNK] }
    }
}

impl Source {
    /// The 2 MiB units of `[start, start + len)` that may hold pages, and whether each stands on a large page.
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

    /// Calls `found` with what every page of a span holds that the workload has for itself; returns how many of the
    /// others are known.
    ///
    /// What is not in memory is left there: nothing is faulted or swapped in, no hole filled.
    pub fn read(&self, span: Span, reader: &mut Reader, found: impl FnMut(Content)) -> io::Result<Others> {
        match self {
            Self::File(file) => file.read(span, reader, found),
            Self::Process(space) => read_process(space, span, reader, found),
        }
    }
}

/// Units of 2 MiB that `[start, end)` touches; runs within a unit become one span. Runs come in order, and are apart.
pub(super) fn split(start: u64, end: u64, spans: &mut Vec<Span>) {
    let unit_len = LARGE_PAGE as u64;
    let mut at = start;
    while at < end {
        let stop = end.min((at / unit_len + 1) * unit_len);
        match spans.last_mut() {
            Some(last) if last.start / unit_len == at / unit_len => last.pages = pages(last.start, stop),
            _ => spans.push(Span { start: at, pages: pages(at, stop) }),
        }
        at = stop;
    }
}

fn pages(start: u64, end: u64) -> usize {
    usize::try_from((end - start) / SMALL_PAGE as u64).unwrap_or(0)
}

/// Grows spans to their units, as far as these lie in `[start, end)`: pages may come to be while we look.
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
    // The pagemap of a process that has ended is empty.
    let gone = |_| io::Error::from_raw_os_error(libc::ESRCH);
    space.pagemap().read_exact_at(entries.as_mut_bytes(), position).map_err(gone)?;
    let in_memory = |entry: u64| entry & PM_PRESENT != 0 && entry & (PM_SWAP | PM_FILE) == 0;
    // Pages shared already are not read: process_vm_readv would give the process a copy of its own of each.
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

/// Copies pages of a process; those from the first that is gone on are left out. Returns how many were copied.
fn copy_pages(space: &Space, addresses: &[u64], to: &mut [[u64; WORDS]]) -> io::Result<usize> {
    let page = |&address: &u64| libc::iovec { iov_base: address as *mut libc::c_void, iov_len: SMALL_PAGE };
    let remote: Vec<libc::iovec> = addresses.iter().map(page).collect();
    let target = &mut to[..addresses.len()];
    let local = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: size_of_val(target) };
    // SAFETY: writes within `target` only; the remote addresses are looked up in the other address space.
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
