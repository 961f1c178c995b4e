//! Write traces that go on where a save ends (S2), so that the next one knows what was written since this instant.
//!
//! Memory is registered with one userfaultfd at a time, and one is synchronous or asynchronous for life: what the sweep
//! has saved is handed over from the one to the other, a part of a region at a time. In between nothing is protected.
//! So the sweep keeps what it copied of that part, and compares once the trace is on; what differs, and what traps have
//! saved, was written since the instant: its protection is taken off again, by which the trace reports it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard};

use super::SaveError;
use super::area::Area;
use super::shared::Shared;
use super::traps::within;
use crate::SMALL_PAGE;
use crate::trace::Userfaults;
use crate::uapi::REGISTER_MODE_WP;

/// The traces.
#[derive(Debug)]
pub(super) struct Follow {
    userfaults: Userfaults,
    /// Per region: how many bytes from its start have been handed over.
    handed: Vec<AtomicUsize>,
    broken: AtomicBool,
    /// Held while registrations change hands.
    changing: Mutex<()>,
}

impl Follow {
    pub(super) fn new(userfaults: Userfaults, regions: usize) -> Self {
        let handed = (0..regions).map(|_| AtomicUsize::new(0)).collect();
        Self { userfaults, handed, broken: AtomicBool::new(false), changing: Mutex::default() }
    }

    /// Whether everything that has been handed over is traced.
    pub(super) fn whole(&self) -> bool {
        !self.broken.load(Ordering::Acquire)
    }

    /// While this is held, what is handed over stays as it is.
    pub(super) fn still(&self) -> MutexGuard<'_, ()> {
        self.changing.lock()
    }

    /// Bytes from the start of a region that the saver has nothing to do with any more.
    pub(super) fn handed(&self, region: usize) -> usize {
        self.handed[region].load(Ordering::Acquire)
    }
}

/// What the sweep has copied of a part of a region.
#[derive(Debug, Default)]
pub(super) struct Kept {
    start: usize,
    bytes: Vec<u8>,
    runs: Vec<(usize, usize)>,
}

impl Kept {
    /// Begins with `[start, start + len)` of a region.
    pub(super) fn begin(&mut self, start: usize, len: usize) {
        self.start = start;
        self.bytes.resize(len.max(self.bytes.len()), 0);
        self.runs.clear();
    }

    /// Keeps bytes that were at `at` in the region.
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

impl Shared {
    /// Lets go of a part of a region that is saved: to the traces where there are any, else for good.
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
            // The save does not need it. The next one compares.
            follow.broken.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn trace(&self, follow: &Follow, region: usize, from: usize, to: usize, kept: &Kept) -> io::Result<()> {
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

    /// Where `[from, to)` of a region is mapped, as (mapping, address, length).
    fn mappings_of(
        &self,
        region: usize,
        from: usize,
        to: usize,
    ) -> impl Iterator<Item = (&super::traps::Armed, u64, u64)> {
        let here = self.armed.iter().filter(move |armed| armed.segment.region == region);
        here.filter_map(move |armed| {
            within(&armed.segment, from, to - from).map(|(address, len)| (armed, address, len))
        })
    }
}

/// What may have been written since the instant in a part that is traced now, as (start, end) in bytes of the region.
fn written(area: &Area, from: usize, to: usize, kept: &Kept) -> io::Result<Vec<(usize, usize)>> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let mut now = vec![0; SMALL_PAGE];
    let granule = if area.hugetlb { area.trap_block } else { SMALL_PAGE };
    let data = if area.hugetlb { vec![(from, to)] } else { area.source.data_within(from, to)? };
    for at in data.into_iter().flat_map(|(start, end)| (start..end).step_by(SMALL_PAGE)) {
        if let Some(then) = kept.page(at) {
            // Who writes to it now traps, and is reported for that.
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
