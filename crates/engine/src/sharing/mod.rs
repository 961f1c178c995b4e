//! Small pages whose content stands elsewhere too (S9), found inside large pages without touching these.
//!
//! A [`Scan`] hashes the pages of several workloads, a slice at a time on several threads, so that whoever drives it
//! can pace it; then it counts, per unit of 2 MiB, pages of zeros, of a pattern, and pages that have an equal, and says
//! what sharing them would free. Hashes are hints: the kernel (KSM) compares contents under write protection before it
//! frees anything, and [`holes`] those of zeros in shared files while their workload is paused.
//!
//! Memory is bounded: a page costs 24 bytes, and where that is more than allowed only contents whose hash has its
//! lowest bits clear are kept, which keeps or drops *all* copies of a content. Counts are then scaled up.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::SMALL_PAGE;

mod content;
mod file;
mod groups;
pub mod holes;
mod source;

pub use content::{Content, WORDS};
pub use file::{Deferred, SharedFile};
pub use groups::{Limits, Totals};
pub use source::{Others, Reader, Source, Span};

use groups::{Groups, Signature};

/// Kinds of pages that can be shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Of zeros.
    Zero,
    /// Of one word over and over, and there is another such page.
    Pattern,
    /// Stands in the same workload once more.
    Inside,
    /// Stands once in its workload, and in another one.
    Across,
}

impl Class {
    /// How many there are.
    pub const COUNT: usize = 4;
}

/// A part of a workload to look at.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Number of the workload.
    pub workload: u32,
    /// Where it is.
    pub source: Source,
    /// Position of the first byte in the source.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// A unit of 2 MiB, or the part of one that a piece holds.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// Number of its piece.
    pub piece: u32,
    /// Number of its workload.
    pub workload: u32,
    /// Where.
    pub span: Span,
    /// Whether it stood on a large page when the scan began.
    pub large: bool,
    /// Pages looked at in memory.
    pub present: u32,
    /// Pages that are not there yet (S8), and are known by their signatures.
    pub deferred: u32,
    /// Pages that are shared already.
    pub shared: u32,
    /// Pages by [`Class`]; those that have an equal when the scan is finished.
    pub counts: [u32; Class::COUNT],
}

/// A scan of the memory of workloads.
#[derive(Debug)]
pub struct Scan {
    pieces: Vec<Piece>,
    units: Vec<Unit>,
    next: usize,
    signatures: Vec<Signature>,
    most: usize,
    /// Contents are kept whose hash has so many low bits clear.
    shift: u32,
    groups: Groups,
    totals: Totals,
}

/// What a thread found in its share of a slice.
#[derive(Default)]
struct Found {
    units: Vec<(usize, Unit)>,
    signatures: Vec<Signature>,
}

impl Scan {
    /// Prepares a scan that keeps at most `most` pages in mind. Pages of hugetlbfs count as any others.
    ///
    /// # Errors
    /// What the kernel says about pagemap or file of a piece.
    pub fn new(pieces: Vec<Piece>, most: usize) -> io::Result<Self> {
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
        Ok(Self { pieces, units, next: 0, signatures: Vec::new(), most, shift: 0, groups, totals })
    }

    /// Keeps only every `n`th unit, spread evenly: a sample.
    pub fn thin_out(&mut self, n: usize) {
        let mut number = 0;
        self.units.retain(|_| {
            number += 1;
            number % n.max(1) == 0
        });
    }

    /// Bytes that are left to look at.
    pub fn remaining(&self) -> u64 {
        self.units[self.next..].iter().map(|unit| (unit.span.pages * SMALL_PAGE) as u64).sum()
    }

    /// The next units, up to `bytes` (at least one), on `threads` threads. Returns the bytes looked at: 0 at the end.
    ///
    /// # Errors
    /// ESRCH when a process has ended.
    pub fn step(&mut self, bytes: u64, threads: usize) -> io::Result<u64> {
        let (start, mut end, mut sum) = (self.next, self.next, 0);
        while end < self.units.len() && (sum == 0 || sum < bytes) {
            sum += (self.units[end].span.pages * SMALL_PAGE) as u64;
            end += 1;
        }
        let cursor = AtomicUsize::new(start);
        let results = Mutex::new(Vec::new());
        let look = || {
            let found = self.look(&cursor, end);
            results.lock().push(found);
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // Where there is no thread to be had the others do it all.
                let _ = std::thread::Builder::new().spawn_scoped(scope, look);
            }
            look();
        });
        for found in results.into_inner() {
            let found = found?;
            found.units.into_iter().for_each(|(number, unit)| self.units[number] = unit);
            self.keep(found.signatures);
        }
        self.next = end;
        Ok(sum)
    }

    /// The work of one thread: takes units from the cursor until `end`.
    fn look(&self, cursor: &AtomicUsize, end: usize) -> io::Result<Found> {
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
        while self.signatures.len() > self.most && self.shift < 32 {
            self.shift += 1;
            let shift = self.shift;
            self.signatures.retain(|page| page.hash.trailing_zeros() >= shift);
        }
    }

    /// Finds equal pages among those that were looked at, and fills in the units' counts.
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

    /// The units, in the order of the pieces.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// What the last `finish` found.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// One of how many contents was kept in mind; 1: every one.
    pub fn scale(&self) -> u64 {
        1 << self.shift
    }

    /// Pages freed by sharing everything shareable in the first 1, 2, 3... units of `order`. With `possible`, only what
    /// can be shared here: of shared files that is pages of zeros.
    ///
    /// # Errors
    /// InvalidInput for a unit that there is not.
    pub fn curve(&self, order: &[u32], pages_per_copy: u32, possible: bool) -> io::Result<Vec<u64>> {
        if order.iter().any(|&unit| unit as usize >= self.units.len()) || pages_per_copy < 2 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no such unit, or nothing may be shared"));
        }
        let limits = Limits { pages_per_copy };
        let only_zeros = |unit: &Unit| possible && matches!(self.pieces[unit.piece as usize].source, Source::File(_));
        let curve = self.groups.curve(&self.units, order, limits, only_zeros);
        Ok(if self.shift == 0 { curve } else { self.scaled(order, &curve) })
    }

    /// A curve of kept contents only, scaled up; zeros were all counted.
    fn scaled(&self, order: &[u32], curve: &[u64]) -> Vec<u64> {
        let mut zeros = 0;
        let point = |(&unit, &freed): (&u32, &u64)| {
            zeros += u64::from(self.units[unit as usize].counts[Class::Zero as usize]);
            zeros + ((freed - zeros) << self.shift)
        };
        order.iter().zip(curve).map(point).collect()
    }
}

/// Patterns are told apart by their word itself; its bits are spread, so that sampling by low bits is fair to them.
fn spread(word: u64) -> u64 {
    // An odd factor and a shift of the high half: one to one.
    let mixed = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 32)
}
