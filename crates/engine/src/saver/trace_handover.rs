//! Hand-over of saved memory to write traces (S2), which record the writes since the snapshot point for the next
//! checkpoint.
//!
//! Memory can be registered with only one userfaultfd at a time, and a userfaultfd is either synchronous or
//! asynchronous. Saved memory is therefore unregistered from the synchronous userfaultfd and registered with the
//! asynchronous one, a part of a region at a time. Between these steps, the part is unprotected, and writes to it are
//! not recorded. The sweep therefore keeps a copy of the part, and compares the memory with the copy once the trace is
//! installed. Pages that differ, or that a trap has saved, were written since the snapshot point. They are unprotected
//! again, so that the trace reports them.

use std::io;
use std::sync::atomic::Ordering;

use super::SaveError;
use super::armed::{Armed, TraceHandover, within};
use super::state::SaverState;
use super::trap_blocks::Area;
use crate::SMALL_PAGE;
use crate::uapi::REGISTER_MODE_WP;

/// Copy of a part of a region, made by the sweep.
#[derive(Debug, Default)]
pub(super) struct Kept {
    start: usize,
    bytes: Vec<u8>,
    runs: Vec<(usize, usize)>,
}

impl Kept {
    /// Starts a copy of `[start, start + len)` of a region.
    pub(super) fn begin(&mut self, start: usize, len: usize) {
        self.start = start;
        self.bytes.resize(len.max(self.bytes.len()), 0);
        self.runs.clear();
    }

    /// Stores a copy of the bytes at offset `at` of the region.
    pub(super) fn keep(&mut self, at: usize, bytes: &[u8]) {
        let from = at - self.start;
        self.bytes[from..from + bytes.len()].copy_from_slice(bytes);
        self.runs.push((at, at + bytes.len()));
    }

    fn page(&self, at: usize) -> Option<&[u8]> {
        let kept = self.runs.iter().any(|&(from, to)| from <= at && at < to);
        kept.then(|| &self.bytes[at - self.start..at - self.start + SMALL_PAGE])
    }
}

impl SaverState {
    /// Hands the saved part `[from, to)` (bytes) of a region over to the traces. `kept` is the copy that the sweep has
    /// made. If there are no traces, or if an earlier part could not be traced, only unprotects the part.
    pub(super) fn hand_over(&self, region: usize, from: usize, to: usize, kept: &Kept) -> Result<(), SaveError> {
        let Some(follow) = self.follow.as_ref().filter(|follow| follow.whole()) else {
            return self.release(region, from, to - from);
        };
        {
            let _still = follow.still();
            if self.is_released() {
                return Ok(());
            }
            for (armed, address, len) in self.mappings_of(region, from, to) {
                self.check(armed.uffd.unregister(address, len))?;
            }
            follow.handed[region].store(to, Ordering::Release);
        }
        if self.trace(follow, region, from, to, kept).is_err() {
            // This checkpoint does not need the trace. The next checkpoint cannot use it, and compares all pages.
            follow.broken.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn trace(&self, follow: &TraceHandover, region: usize, from: usize, to: usize, kept: &Kept) -> io::Result<()> {
        let none = || io::Error::from_raw_os_error(libc::ENOENT);
        for (armed, address, len) in self.mappings_of(region, from, to) {
            let uffd = follow.userfaults.get(&armed.segment.space.pid()).ok_or_else(none)?;
            uffd.register(address, len, REGISTER_MODE_WP)?;
            uffd.write_protect(address, len, true)?;
        }
        for (start, end) in written(&self.areas[region], from, to, kept)? {
            for (armed, address, len) in self.mappings_of(region, start, end) {
                let uffd = follow.userfaults.get(&armed.segment.space.pid()).ok_or_else(none)?;
                uffd.write_protect(address, len, false)?;
            }
        }
        Ok(())
    }

    /// Returns the mappings of `[from, to)` (bytes) of a region, as (segment, address, length).
    fn mappings_of(&self, region: usize, from: usize, to: usize) -> impl Iterator<Item = (&Armed, u64, u64)> {
        let here = self.armed.iter().filter(move |armed| armed.segment.region == region);
        here.filter_map(move |armed| {
            within(&armed.segment, from, to - from).map(|(address, len)| (armed, address, len))
        })
    }
}

/// Returns the pages of a traced part that may have been written since the snapshot point, as runs (start, end) in
/// bytes.
fn written(area: &Area, from: usize, to: usize, kept: &Kept) -> io::Result<Vec<(usize, usize)>> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let mut now = vec![0; SMALL_PAGE];
    let granule = if area.hugetlb { area.trap_block } else { SMALL_PAGE };
    let data = if area.hugetlb { vec![(from, to)] } else { area.source.data_within(from, to)? };
    for at in data.into_iter().flat_map(|(start, end)| (start..end).step_by(SMALL_PAGE)) {
        if let Some(then) = kept.page(at) {
            // The trace is installed: it reports any write after this read.
            area.source.read(at, &mut now)?;
            if now == then {
                continue;
            }
        }
        let (start, end) = (at / granule * granule, (at / granule + 1) * granule);
        match runs.last_mut() {
            Some((_, last)) if *last >= start => *last = end,
            _ => runs.push((start, end)),
        }
    }
    Ok(runs)
}
