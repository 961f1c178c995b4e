//! Verification and hashing of a paused ledger.

use pageferry_engine::checksum::{checksum, checksum_with_seed};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use zerocopy::IntoBytes;

use super::LedgerError;
use super::layout::{Layout, load};
use super::page::{Entry, Finding, WORDS, Words, examine};

/// Result of [`super::Ledger::verify`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Number of body pages.
    pub pages: usize,
    /// Number of checked body pages, which are all filled pages.
    pub checked: usize,
    /// Number of checked pages that are zeros, as expected.
    pub zeros: usize,
    /// Number of zero pages that should have contents.
    pub lost: usize,
    /// Number of intact pages whose version differs from that in their table entry.
    pub stale: usize,
    /// Number of intact pages that are copies of other pages.
    pub misplaced: usize,
    /// Number of pages that are not intact.
    pub torn: usize,
    /// Index of the first damaged page that this verification or an operation has found; `None` if no page is damaged.
    pub first_bad: Option<usize>,
    /// Number of damaged pages that operations have found and overwritten.
    pub overwritten: u64,
    /// Sum of all versions in the table.
    pub versions: u64,
    /// Sum of the write counters of all partitions.
    pub writes: u64,
    /// Number of partitions whose table entries do not match the counters, or whose counter page is not intact.
    pub disagreeing: usize,
    /// Whether the header is intact.
    pub header: bool,
}

impl Report {
    /// Returns whether this verification and all operations have found no damage, and all sums match.
    pub fn intact(&self) -> bool {
        let bad = self.lost + self.stale + self.misplaced + self.torn;
        bad == 0 && self.overwritten == 0 && self.disagreeing == 0 && self.header
    }

    fn count(&mut self, number: usize, finding: Finding, expected: Entry) {
        self.checked += 1;
        match finding {
            Finding::Good => {
                self.zeros += usize::from(expected.is_zeros());
                return;
            }
            Finding::Lost => self.lost += 1,
            Finding::Stale => self.stale += 1,
            Finding::Misplaced => self.misplaced += 1,
            Finding::Torn => self.torn += 1,
        }
        self.first_bad = Some(self.first_bad.map_or(number, |first| first.min(number)));
    }

    fn add(&mut self, other: &Self) {
        self.checked += other.checked;
        self.zeros += other.zeros;
        self.lost += other.lost;
        self.stale += other.stale;
        self.misplaced += other.misplaced;
        self.torn += other.torn;
        self.first_bad = [self.first_bad, other.first_bad].into_iter().flatten().min();
    }
}

pub(super) fn verify(layout: &Layout, threads: usize, cancel: &AtomicBool) -> Result<Report, LedgerError> {
    let seed = layout.options.seed;
    let examine_pages = |report: &mut Report, numbers: Range<usize>, words: &mut Words| {
        for number in numbers {
            let expected = Entry(layout.entry(number).load(Ordering::Acquire));
            load(layout.body(number), words);
            report.count(number, examine(words, seed, number as u64, expected), expected);
        }
    };
    let mut report = Report { pages: layout.pages, header: layout.header_intact(), ..Report::default() };
    for part in over_written_pages(layout, threads, cancel, examine_pages)? {
        report.add(&part);
    }
    for partition in 0..layout.options.threads {
        let counters = layout.counters(partition);
        let table = Table::of(layout, partition);
        report.versions = report.versions.wrapping_add(table.versions);
        report.writes = report.writes.wrapping_add(counters.writes());
        report.overwritten += counters.bad();
        let agrees = table.versions == counters.writes() && table.hash == counters.table();
        report.disagreeing += usize::from(!counters.intact() || !agrees);
        if let Some(bad) = counters.first_bad().and_then(|number| usize::try_from(number).ok()) {
            report.first_bad = Some(report.first_bad.map_or(bad, |first| first.min(bad)));
        }
    }
    Ok(report)
}

pub(super) fn digest(layout: &Layout, threads: usize, cancel: &AtomicBool) -> Result<u64, LedgerError> {
    // Sum the hashes of the pages, so that the distribution of pages to threads does not matter.
    let hash_pages = |sum: &mut u64, numbers: Range<usize>, words: &mut Words| {
        for number in numbers {
            load(layout.body(number), words);
            *sum = sum.wrapping_add(checksum_with_seed(words.as_bytes(), number as u64));
        }
    };
    let parts = over_written_pages(layout, threads, cancel, hash_pages)?;
    let pages = parts.into_iter().fold(0, u64::wrapping_add);
    let tables = (0..layout.options.threads).map(|partition| Table::of(layout, partition).hash);
    Ok(checksum([fingerprint(layout), tables.fold(0, u64::wrapping_add), pages].as_bytes()))
}

pub(super) fn fingerprint(layout: &Layout) -> u64 {
    let mut parts = vec![u64::from(layout.header_intact())];
    parts.extend(layout.options.to_words());
    parts.extend((0..layout.options.threads).flat_map(|partition| layout.counters(partition).content()));
    checksum(parts.as_bytes())
}

pub(super) fn table_agrees(layout: &Layout) -> bool {
    let agrees = |partition| Table::of(layout, partition).hash == layout.counters(partition).table();
    (0..layout.options.threads).all(agrees)
}

/// Sums over the table entries of a partition.
#[derive(Default)]
struct Table {
    versions: u64,
    hash: u64,
}

impl Table {
    fn of(layout: &Layout, partition: usize) -> Self {
        let mut sum = Self::default();
        let Range { start: mut at, end } = written(layout, partition);
        while at < end {
            let entries = layout.entries(at);
            let page = at..end.min(at + entries.len());
            for (number, entry) in page.clone().zip(entries) {
                let entry = Entry(entry.load(Ordering::Acquire));
                sum.versions = sum.versions.wrapping_add(entry.version());
                sum.hash = sum.hash.wrapping_add(entry.hash(number));
            }
            at = page.end;
        }
        sum
    }
}

/// Returns the filled body pages of a partition.
fn written(layout: &Layout, partition: usize) -> Range<usize> {
    let start = layout.partition(partition).start;
    start..start + layout.filled(partition)
}

/// Maximum number of pages that a thread takes at a time.
const CHUNK: usize = 1024;

/// Calls `work` on runs of filled pages, in `threads` threads. Returns the result of each thread. Fails if `cancel` is
/// set.
fn over_written_pages<T: Default + Send>(
    layout: &Layout,
    threads: usize,
    cancel: &AtomicBool,
    work: impl Fn(&mut T, Range<usize>, &mut Words) + Sync,
) -> Result<Vec<T>, LedgerError> {
    let chunks: Vec<Range<usize>> = (0..layout.options.threads)
        .map(|partition| written(layout, partition))
        .flat_map(|range| range.clone().step_by(CHUNK).map(move |start| start..range.end.min(start + CHUNK)))
        .collect();
    let next = AtomicUsize::new(0);
    let worker = || {
        let mut result = T::default();
        let mut words = Box::new([0; WORDS]);
        while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if cancel.load(Ordering::Relaxed) {
                return Err(LedgerError::Interrupted);
            }
            work(&mut result, chunk.clone(), &mut words);
        }
        Ok(result)
    };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().map(|handle| handle.join().unwrap_or(Err(LedgerError::ThreadDied))).collect()
    })
}
