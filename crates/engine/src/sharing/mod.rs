//! Duplicate pages (S9), found inside huge pages without splitting them.
//!
//! A [`Scan`] hashes the pages of several workloads with several threads, a slice at a time, so that the caller
//! controls the pace. The scan then counts zero pages, patterns and duplicates for each 2 MiB unit, and estimates the
//! memory that sharing would free. Hashes are hints: the kernel (KSM) compares contents under write protection before
//! it merges pages, and [`holes`] compares zero pages of shared files while their workload is paused.
//!
//! Memory use is bounded. A recorded page costs 24 bytes. Beyond the limit, the scan records only pages whose hash has
//! its lowest bits clear, so either all copies of a page are recorded or none. The counts are then scaled up.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::SMALL_PAGE;

mod content;
mod file;
mod groups;
pub mod holes;
mod source;
mod span;

pub use content::{Content, WORDS};
pub use file::{Deferred, SharedFile};
pub use groups::{Limits, Totals};
pub use source::ScannedMemory;
pub use span::{Others, Reader, Span};

use groups::{Groups, Signature};

/// Class of shareable pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Zero page.
    Zero,
    /// Pattern with at least one duplicate.
    Pattern,
    /// Duplicate of another page of the same workload.
    Inside,
    /// Page without duplicates in its workload, but with duplicates in another workload.
    Across,
}

impl Class {
    /// Number of classes.
    pub const COUNT: usize = 4;
}

/// Part of the memory of a workload, to be scanned.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Index of the workload.
    pub workload: u32,
    /// Memory that contains the part.
    pub source: ScannedMemory,
    /// Position of the first byte in `source`.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// 2 MiB unit, or the part of it that belongs to a piece.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// Index of the piece.
    pub piece: u32,
    /// Index of the workload.
    pub workload: u32,
    /// Location in the memory that contains the piece.
    pub span: Span,
    /// Whether the unit was backed by a huge page at the start of the scan.
    pub large: bool,
    /// Number of pages read from memory.
    pub present: u32,
    /// Number of deferred pages (S8) known by their signatures.
    pub deferred: u32,
    /// Number of pages that are already shared.
    pub shared: u32,
    /// Number of pages by [`Class`]. Before [`Scan::finish`], only zero pages are counted.
    pub counts: [u32; Class::COUNT],
}

/// Scan of the memory of workloads.
#[derive(Debug)]
pub struct Scan {
    pieces: Vec<Piece>,
    units: Vec<Unit>,
    next: usize,
    signatures: Vec<Signature>,
    max: usize,
    /// Number of low bits that are clear in the hash of every recorded page.
    shift: u32,
    groups: Groups,
    totals: Totals,
}

/// Results of a thread for its share of a slice.
#[derive(Default)]
struct Found {
    units: Vec<(usize, Unit)>,
    signatures: Vec<Signature>,
}

impl Scan {
    /// Prepares a scan that records up to `max` pages. Pages in hugetlbfs are included.
    ///
    /// # Errors
    /// The error of scanning the pagemap or the file of a piece.
    pub fn new(pieces: Vec<Piece>, max: usize) -> io::Result<Self> {
        let mut units = Vec::new();
        for (number, piece) in (0..).zip(&pieces) {
            let unit = |(span, large)| Unit {
                piece: number,
                workload: piece.workload,
                span,
                large,
                present: 0,
                deferred: 0,
                shared: 0,
                counts: [0; Class::COUNT],
            };
            units.extend(piece.source.units(piece.start, piece.len)?.into_iter().map(unit));
        }
        let (groups, totals) = (Groups::default(), Totals::default());
        Ok(Self { pieces, units, next: 0, signatures: Vec::new(), max, shift: 0, groups, totals })
    }

    /// Keeps only every `n`th unit, as an evenly spread sample.
    pub fn thin_out(&mut self, n: usize) {
        let mut number = 0;
        self.units.retain(|_| {
            number += 1;
            number % n.max(1) == 0
        });
    }

    /// Returns the number of bytes that have not been scanned.
    pub fn remaining(&self) -> u64 {
        self.units[self.next..].iter().map(|unit| (unit.span.pages * SMALL_PAGE) as u64).sum()
    }

    /// Scans the next units with `threads` threads, until at least one unit and at least `bytes` bytes are scanned.
    /// Returns the number of bytes scanned; 0 if no units are left.
    ///
    /// # Errors
    /// ESRCH if a process has exited; otherwise the error of reading the memory.
    pub fn step(&mut self, bytes: u64, threads: usize) -> io::Result<u64> {
        let (start, mut end, mut sum) = (self.next, self.next, 0);
        while end < self.units.len() && (sum == 0 || sum < bytes) {
            sum += (self.units[end].span.pages * SMALL_PAGE) as u64;
            end += 1;
        }
        let cursor = AtomicUsize::new(start);
        let results = Mutex::new(Vec::new());
        let scan = || {
            let found = self.scan(&cursor, end);
            results.lock().push(found);
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // If a thread cannot be started, the other threads do its work.
                let _ = std::thread::Builder::new().spawn_scoped(scope, scan);
            }
            scan();
        });
        for found in results.into_inner() {
            let found = found?;
            found.units.into_iter().for_each(|(number, unit)| self.units[number] = unit);
            self.keep(found.signatures);
        }
        self.next = end;
        Ok(sum)
    }

    /// Scans units from the cursor up to `end`, in one thread.
    fn scan(&self, cursor: &AtomicUsize, end: usize) -> io::Result<Found> {
        let mut reader = Reader::default();
        let mut found = Found::default();
        loop {
            let number = cursor.fetch_add(1, Ordering::Relaxed);
            if number >= end {
                return Ok(found);
            }
            let mut unit = self.units[number];
            let name = u32::try_from(number).map_err(io::Error::other)?;
            let (mut pages, mut zeros) = (0, 0);
            let signatures = &mut found.signatures;
            let mut add = |hash, pattern| {
                if self.keeps(hash) {
                    signatures.push(Signature { hash, pattern, unit: name });
                }
            };
            let source = &self.pieces[unit.piece as usize].source;
            let others = source.read(unit.span, &mut reader, |content| {
                pages += 1;
                match content {
                    Content::Zero => zeros += 1,
                    Content::Pattern(word) => add(spread(word), true),
                    Content::Data(hash) => add(hash, false),
                }
            })?;
            (unit.shared, unit.deferred, unit.present) = (others.shared, others.deferred, pages - others.deferred);
            unit.counts[Class::Zero as usize] = zeros;
            found.units.push((number, unit));
        }
    }

    fn keeps(&self, hash: u64) -> bool {
        hash.trailing_zeros() >= self.shift
    }

    fn keep(&mut self, signatures: Vec<Signature>) {
        self.signatures.extend(signatures);
        while self.signatures.len() > self.max && self.shift < 32 {
            self.shift += 1;
            let shift = self.shift;
            self.signatures.retain(|page| page.hash.trailing_zeros() >= shift);
        }
    }

    /// Finds duplicates among the scanned pages, and completes the counts of the units and the totals.
    pub fn finish(&mut self) {
        let signatures = std::mem::take(&mut self.signatures);
        self.totals = Totals::default();
        self.groups = Groups::find(signatures, &mut self.units, &mut self.totals);
        let zeros = self.units.iter().map(|unit| u64::from(unit.counts[Class::Zero as usize])).sum();
        for totals in [&mut self.totals.pages, &mut self.totals.freed] {
            totals.iter_mut().for_each(|pages| *pages <<= self.shift);
            totals[Class::Zero as usize] = zeros;
        }
        for unit in &mut self.units {
            unit.counts[Class::Pattern as usize..].iter_mut().for_each(|pages| *pages <<= self.shift);
        }
    }

    /// Returns the units, in the order of the pieces.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// Returns the totals; zeros before [`finish`](Self::finish).
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Returns the sampling factor N: about one of N distinct contents was recorded.
    pub fn scale(&self) -> u64 {
        1 << self.shift
    }

    /// Returns the numbers of pages freed by sharing all shareable pages of the first 1, 2, 3... units of `order`. If
    /// `possible` is true, counts only pages that can be shared; in a shared file, these are the zero pages.
    ///
    /// # Errors
    /// `InvalidInput` if there is no such unit, or if `pages_per_copy` is less than 2.
    pub fn curve(&self, order: &[u32], pages_per_copy: u32, possible: bool) -> io::Result<Vec<u64>> {
        if order.iter().any(|&unit| unit as usize >= self.units.len()) || pages_per_copy < 2 {
            let words = "cannot estimate: no such unit, or fewer than 2 pages per copy";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        let limits = Limits { pages_per_copy };
        let only_zeros =
            |unit: &Unit| possible && matches!(self.pieces[unit.piece as usize].source, ScannedMemory::File(_));
        let curve = self.groups.curve(&self.units, order, limits, only_zeros);
        Ok(if self.shift == 0 { curve } else { self.scaled(order, &curve) })
    }

    /// Scales a curve up by the sampling factor, except for zero pages, which are all counted.
    fn scaled(&self, order: &[u32], curve: &[u64]) -> Vec<u64> {
        let mut zeros = 0;
        let point = |(&unit, &freed): (&u32, &u64)| {
            zeros += u64::from(self.units[unit as usize].counts[Class::Zero as usize]);
            zeros + ((freed - zeros) << self.shift)
        };
        order.iter().zip(curve).map(point).collect()
    }
}

/// Spreads the bits of a pattern's word, so that sampling by low bits selects patterns like other contents. Distinct
/// words stay distinct.
fn spread(word: u64) -> u64 {
    // The multiplication by an odd factor and the xor with the shifted high half are both bijective.
    let mixed = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}
