use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::layout::{Layout, load, store};
use super::page::{Entry, WORDS, compose};
use super::writer::{Writer, choose};
use super::{Ledger, LedgerError, Options, Report, State};
use pageferry_engine::mapping::Mapping;
use pageferry_engine::{LARGE_PAGE, SMALL_PAGE};

const MIB: usize = 1 << 20;

fn memory(len: usize) -> Arc<Mapping> {
    // SAFETY: the name is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ledger".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(len as u64).unwrap();
    Arc::new(Mapping::new(file.as_fd(), len, 0).unwrap())
}

fn create(mapping: &Arc<Mapping>, options: &Options) -> Ledger {
    Ledger::create(Arc::clone(mapping), options, None, &AtomicBool::new(false)).unwrap()
}

fn verify(ledger: &Ledger) -> Report {
    ledger.verify(2, &AtomicBool::new(false)).unwrap()
}

fn digest(ledger: &Ledger) -> u64 {
    ledger.digest(2, &AtomicBool::new(false)).unwrap()
}

fn pause(ledger: &Ledger) {
    assert!(ledger.pause(Duration::from_secs(60)).unwrap(), "threads did not pause");
    assert_eq!(ledger.state(), State::Paused);
}

/// Waits until the ledger has performed `writes` further writes.
fn wait_for(ledger: &Ledger, writes: u64) {
    let goal = ledger.writes().iter().sum::<u64>() + writes;
    let end = Instant::now() + Duration::from_secs(60);
    while ledger.writes().iter().sum::<u64>() < goal {
        assert!(Instant::now() < end, "the ledger makes no progress");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn copy(from: &Mapping, to: &Mapping, range: std::ops::Range<usize>) {
    // SAFETY: the range lies within both mappings, and no other thread accesses either of them.
    unsafe { std::ptr::copy_nonoverlapping(from.base().add(range.start), to.base().add(range.start), range.len()) };
}

/// Creates a ledger with zero pages and pages with contents.
fn sample() -> (Arc<Mapping>, Ledger) {
    let mapping = memory(2 * MIB);
    let ledger = create(&mapping, &Options { threads: 2, seed: 7, zero_fraction: 0.3, ..Options::default() });
    (mapping, ledger)
}

fn run_and_pause(ledger: &Ledger, writes: u64) {
    ledger.start(false).unwrap();
    wait_for(ledger, writes);
    pause(ledger);
}

#[test]
fn writes_and_pauses_are_consistent() {
    let (_mapping, ledger) = sample();
    assert_eq!(ledger.state(), State::Stopped);
    ledger.start(false).unwrap();
    assert_eq!(ledger.tids().len(), 2);
    for _ in 0..20 {
        wait_for(&ledger, 200);
        pause(&ledger);
        let (report, before) = (verify(&ledger), digest(&ledger));
        assert!(report.intact(), "{report:?}");
        assert_eq!(report.versions, ledger.writes().iter().sum::<u64>());
        assert!(report.zeros > 0 && report.zeros < report.checked);
        assert_eq!(digest(&ledger), before, "a paused ledger changed");
        ledger.resume().unwrap();
    }
    ledger.stop();
    assert!(verify(&ledger).intact());
    let stalls = ledger.stalls(true);
    assert!(stalls.longest > 0 && stalls.histogram.iter().sum::<u64>() >= 4000);
    assert_eq!(ledger.stalls(false).histogram.iter().sum::<u64>(), 0);
}

#[test]
fn calls_in_the_wrong_state_are_rejected() {
    let (_mapping, ledger) = sample();
    assert!(matches!(ledger.pause(Duration::ZERO), Err(LedgerError::WrongState(State::Stopped))));
    assert!(matches!(ledger.resume(), Err(LedgerError::WrongState(State::Stopped))));
    ledger.start(true).unwrap();
    pause(&ledger);
    assert!(matches!(ledger.start(false), Err(LedgerError::WrongState(State::Paused))));
    ledger.stop();
    ledger.stop();
    ledger.start(false).unwrap();
    wait_for(&ledger, 10);
}

#[test]
fn invalid_options_are_rejected() {
    let refused = |options: Options| {
        let made = Ledger::create(memory(MIB), &options, None, &AtomicBool::new(false));
        assert!(matches!(made, Err(LedgerError::BadOption(_))), "{options:?}");
    };
    refused(Options { threads: 0, ..Options::default() });
    refused(Options { threads: 1 << 20, ..Options::default() });
    refused(Options { rate: Some(0), ..Options::default() });
    refused(Options { skew: 0.5, ..Options::default() });
    refused(Options { fill: 1.01, ..Options::default() });
    refused(Options { zero_fraction: -0.1, ..Options::default() });
    refused(Options { working_set: f64::NAN, ..Options::default() });
    let small =
        Ledger::create(memory(4 * SMALL_PAGE), &Options { threads: 2, ..Options::default() }, None, &false.into());
    assert!(matches!(small, Err(LedgerError::TooSmall { .. })));
    let cancelled = Ledger::create(memory(MIB), &Options::default(), None, &true.into());
    assert!(matches!(cancelled, Err(LedgerError::Interrupted)));
}

#[test]
fn unfilled_pages_are_never_accessed() {
    let mapping = memory(64 * MIB);
    let ledger = create(&mapping, &Options { threads: 2, fill: 0.25, scatter: true, ..Options::default() });
    run_and_pause(&ledger, 20_000);
    assert!(verify(&ledger).intact());
    digest(&ledger);
    Ledger::attach(Arc::clone(&mapping), 0, None).unwrap();
    let data: usize = mapping.data_ranges().unwrap().iter().map(|(start, end)| end - start).sum();
    let expected = ledger.filled() * SMALL_PAGE;
    assert!(data >= expected && data < expected + MIB, "{data} bytes of data, {expected} filled");
}

#[test]
fn ledger_continues_from_a_copy() {
    let (mapping, ledger) = sample();
    run_and_pause(&ledger, 1000);
    let moved = memory(mapping.len());
    copy(&mapping, &moved, 0..mapping.len());
    let next = Ledger::attach(Arc::clone(&moved), 0, None).unwrap();
    assert_eq!(next.options(), ledger.options());
    assert_eq!((next.fingerprint(), digest(&next)), (ledger.fingerprint(), digest(&ledger)));
    next.start(true).unwrap();
    assert_eq!(next.fingerprint(), ledger.fingerprint());
    assert!(next.table_agrees());
    next.resume().unwrap();
    wait_for(&next, 1000);
    pause(&next);
    assert_ne!(next.fingerprint(), ledger.fingerprint());
    assert!(next.table_agrees() && verify(&next).intact());
}

#[test]
fn shares_run_all_partitions() {
    let mapping = memory(2 * MIB);
    create(&mapping, &Options { threads: 3, ..Options::default() });
    let first = Ledger::attach(Arc::clone(&mapping), 0, Some(1)).unwrap();
    let second = Ledger::attach(Arc::clone(&mapping), 1, None).unwrap();
    assert!(matches!(Ledger::attach(mapping, 2, Some(2)), Err(LedgerError::NoSuchPartition { end: 4, .. })));
    let before = first.writes();
    first.start(false).unwrap();
    second.start(false).unwrap();
    assert_eq!((first.tids().len(), second.tids().len()), (1, 2));
    wait_for(&first, 3000);
    pause(&first);
    pause(&second);
    assert!(verify(&first).intact());
    assert_eq!(verify(&first), verify(&second));
    assert!(first.writes()[0] > before[0] && first.writes()[1..].iter().sum::<u64>() > before[1..].iter().sum());
}

#[test]
fn write_rate_is_limited() {
    let mapping = memory(4 * MIB);
    let ledger = create(&mapping, &Options { threads: 2, rate: Some(8 << 20), ..Options::default() });
    let before: u64 = ledger.writes().iter().sum();
    let start = Instant::now();
    ledger.start(false).unwrap();
    wait_for(&ledger, 1024);
    let took = start.elapsed();
    pause(&ledger);
    let most = (took + Duration::from_millis(200)).as_secs_f64() * 2048.0;
    let written = ledger.writes().iter().sum::<u64>() - before;
    assert!(written as f64 <= most, "{written} pages in {took:?}");
}

/// Runs and pauses a ledger, damages it, and returns the report of its verification.
fn damaged(damage: impl FnOnce(&Layout, &Mapping)) -> Report {
    let (mapping, ledger) = sample();
    run_and_pause(&ledger, 3000);
    assert!(verify(&ledger).intact());
    let before = digest(&ledger);
    damage(&ledger.layout, &mapping);
    let report = verify(&ledger);
    assert!(!report.intact());
    assert_ne!(digest(&ledger), before);
    report
}

fn with_content(layout: &Layout) -> usize {
    (0..layout.pages).find(|number| !Entry(layout.entry(*number).load(Ordering::Relaxed)).is_zeros()).unwrap()
}

fn of_zeros(layout: &Layout) -> usize {
    (0..layout.pages).find(|number| Entry(layout.entry(*number).load(Ordering::Relaxed)).is_zeros()).unwrap()
}

fn put(layout: &Layout, number: usize, of: usize, version: u64) {
    let mut words = [0; WORDS];
    compose(&mut words, layout.options.seed, of as u64, version, layout.options.compressible);
    store(layout.body(number), &words);
}

#[test]
fn lost_page_is_detected() {
    let report = damaged(|layout, _| store(layout.body(with_content(layout)), &[0; WORDS]));
    assert_eq!((report.lost, report.stale, report.torn), (1, 0, 0));
}

#[test]
fn stale_page_is_detected() {
    let mut planted = 0;
    let report = damaged(|layout, _| {
        planted = with_content(layout);
        let version = Entry(layout.entry(planted).load(Ordering::Relaxed)).version();
        put(layout, planted, planted, version - 1);
    });
    assert_eq!((report.lost, report.stale, report.torn, report.first_bad), (0, 1, 0, Some(planted)));
}

#[test]
fn missing_zeros_are_detected() {
    let report = damaged(|layout, _| {
        let number = of_zeros(layout);
        put(layout, number, number, 1);
    });
    assert_eq!((report.lost, report.stale, report.torn), (0, 1, 0));
}

#[test]
fn misplaced_page_is_detected() {
    let report = damaged(|layout, _| {
        let number = with_content(layout);
        put(layout, number, number + 1, Entry(layout.entry(number).load(Ordering::Relaxed)).version());
    });
    assert_eq!((report.misplaced, report.torn), (1, 0));
}

#[test]
fn torn_page_is_detected() {
    let report = damaged(|layout, _| {
        let number = with_content(layout);
        let (mut old, mut new) = ([0; WORDS], [0; WORDS]);
        load(layout.body(number), &mut new);
        compose(&mut old, layout.options.seed, number as u64, 1000, 0.0);
        new[WORDS / 2..].copy_from_slice(&old[WORDS / 2..]);
        store(layout.body(number), &new);
    });
    assert_eq!((report.lost, report.stale, report.torn), (0, 0, 1));
}

#[test]
fn single_changed_bit_is_detected() {
    let report = damaged(|layout, _| {
        layout.body(of_zeros(layout))[17].store(1 << 40, Ordering::Relaxed);
        let number = with_content(layout);
        layout.body(number)[WORDS - 1].fetch_xor(1, Ordering::Relaxed);
    });
    assert_eq!(report.torn, 2);
}

#[test]
fn stale_table_entry_is_detected() {
    let report = damaged(|layout, _| {
        layout.entry(with_content(layout)).fetch_sub(2, Ordering::Relaxed);
    });
    assert_eq!((report.stale, report.disagreeing), (1, 1));
}

#[test]
fn page_stale_with_its_entry_is_detected() {
    let report = damaged(|layout, _| {
        let number = with_content(layout);
        let entry = Entry(layout.entry(number).load(Ordering::Relaxed));
        put(layout, number, number, entry.version() - 1);
        layout.entry(number).store(Entry::new(entry.version() - 1, false).0, Ordering::Relaxed);
    });
    assert_eq!((report.lost + report.stale + report.torn, report.disagreeing), (0, 1));
}

#[test]
fn inconsistent_entries_with_equal_sum_are_detected() {
    let report = damaged(|layout, _| {
        let number = with_content(layout);
        for (number, change) in [(number, 1), (number + 1, -1)] {
            let version = Entry(layout.entry(number).load(Ordering::Relaxed)).version().wrapping_add_signed(change);
            put(layout, number, number, version);
            layout.entry(number).store(Entry::new(version, false).0, Ordering::Relaxed);
        }
    });
    assert_eq!((report.lost + report.stale + report.torn, report.disagreeing), (0, 1));
    assert_eq!(report.versions, report.writes);
}

#[test]
fn stale_and_lost_counters_are_detected() {
    let stale = damaged(|_, mapping| {
        // SAFETY: the write counter of the first partition lies in the mapping and is aligned; no other thread accesses
        // it.
        unsafe { *mapping.page(1).cast::<u64>().add(1) -= 1 };
    });
    assert_eq!(stale.disagreeing, 1);
    let lost = damaged(|_, mapping| {
        // SAFETY: the page lies within the mapping; no other thread accesses it.
        unsafe { mapping.page(2).write_bytes(0, SMALL_PAGE) };
    });
    assert_eq!(lost.disagreeing, 1);
}

#[test]
fn damaged_header_is_detected() {
    let damage = |_: &Layout, mapping: &Mapping| {
        // SAFETY: the word of the header lies in the mapping and is aligned; no other thread accesses it.
        unsafe { *mapping.base().cast::<u64>().add(5) += 1 };
    };
    assert!(!damaged(damage).header);
    let (mapping, ledger) = sample();
    damage(&ledger.layout, &mapping);
    assert!(matches!(Ledger::attach(mapping, 0, None), Err(LedgerError::NoLedger(_))));
}

#[test]
fn memory_without_a_ledger_is_rejected() {
    assert!(matches!(Ledger::attach(memory(MIB), 0, None), Err(LedgerError::NoLedger(_))));
    let (mapping, _ledger) = sample();
    let larger = memory(2 * mapping.len());
    copy(&mapping, &larger, 0..mapping.len());
    assert!(matches!(Ledger::attach(larger, 0, None), Err(LedgerError::NoLedger(_))));
}

#[test]
fn overwritten_damage_is_detected() {
    let (_mapping, ledger) = sample();
    run_and_pause(&ledger, 100);
    let number = with_content(&ledger.layout);
    store(ledger.layout.body(number), &[0; WORDS]);
    ledger.resume().unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let report = loop {
        wait_for(&ledger, 5000);
        pause(&ledger);
        let report = verify(&ledger);
        if report.lost == 0 {
            break report;
        }
        assert!(Instant::now() < end, "no operation has written the damaged page");
        ledger.resume().unwrap();
    };
    assert_eq!((report.overwritten, report.first_bad), (1, Some(number)));
    assert!(!report.intact());
}

#[test]
fn huge_pages_can_be_excluded_in_part() {
    let mapping = memory(8 * LARGE_PAGE);
    let ledger = Ledger::create(Arc::clone(&mapping), &Options::default(), Some(0.5), &AtomicBool::new(false)).unwrap();
    assert!(verify(&ledger).intact());
    let refused = Ledger::create(mapping, &Options::default(), Some(1.5), &AtomicBool::new(false));
    assert!(matches!(refused, Err(LedgerError::BadOption(_))));
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Model {
    version: u64,
    zeros: bool,
}

fn any_options() -> impl Strategy<Value = Options> {
    let fraction = || prop_oneof![Just(0.0), Just(1.0), 0.0..1.0_f64];
    (1..5_usize, any::<u64>(), fraction(), any::<bool>(), 1.0..8.0_f64, fraction(), fraction(), fraction()).prop_map(
        |(threads, seed, working_set, scatter, skew, zero_fraction, fill, compressible)| Options {
            threads,
            seed,
            rate: None,
            working_set,
            scatter,
            skew,
            zero_fraction,
            fill,
            compressible,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The table equals a plain model of the operations, for any options and interleaving.
    #[test]
    fn table_follows_from_the_counters(
        options in any_options(),
        order in prop::collection::vec(0..4_usize, 0..400),
    ) {
        let mapping = memory(64 * SMALL_PAGE);
        let ledger = create(&mapping, &options);
        let layout = &ledger.layout;
        let mut writers: Vec<_> = (0..options.threads).map(|partition| Writer::new(layout, partition)).collect();
        let mut model: Vec<Option<Model>> = vec![None; layout.pages];
        for partition in 0..options.threads {
            let start = layout.partition(partition).start;
            for (number, page) in model.iter_mut().enumerate().skip(start).take(layout.filled(partition)) {
                let zeros = Entry(layout.entry(number).load(Ordering::Relaxed)).is_zeros();
                *page = Some(Model { version: 1, zeros });
            }
        }
        let mut done = vec![0; options.threads];
        for partition in order.into_iter().map(|partition| partition % options.threads) {
            if !writers[partition].idle() {
                let (index, zeros) = choose(layout, partition, done[partition]);
                let page = model[layout.partition(partition).start + index].as_mut().unwrap();
                *page = Model { version: page.version + 1, zeros };
                done[partition] += 1;
                let written = writers[partition].write();
                writers[partition].check(&written);
            }
        }
        let report = verify(&ledger);
        prop_assert!(report.intact(), "{report:?}");
        prop_assert_eq!(report.checked, model.iter().flatten().count());
        prop_assert_eq!(report.checked, ledger.filled());
        for (number, page) in model.iter().enumerate() {
            let entry = Entry(layout.entry(number).load(Ordering::Relaxed));
            let expected = page.map_or(Entry(0), |page| Entry::new(page.version, page.zeros));
            prop_assert_eq!(entry, expected, "page {}", number);
            let zeros = layout.body(number).iter().all(|word| word.load(Ordering::Relaxed) == 0);
            prop_assert_eq!(zeros, page.is_none_or(|page| page.zeros), "page {}", number);
        }
    }

    /// A change to a used word changes the digest, and the verification then fails. A change to an unused word has
    /// neither effect.
    #[test]
    fn any_damage_is_detected(
        page in prop_oneof![0..4_usize, 0..64_usize],
        word in prop_oneof![0..16_usize, 0..WORDS],
        bits in 1_u64..,
    ) {
        let mapping = memory(64 * SMALL_PAGE);
        let ledger = create(&mapping, &Options { threads: 2, zero_fraction: 0.5, ..Options::default() });
        let before = digest(&ledger);
        // SAFETY: the word lies in the mapping and is aligned; no other thread accesses it.
        unsafe { *mapping.page(page).cast::<u64>().add(word) ^= bits };
        let table = page == 3 && word < ledger.pages();
        let used = match page { 0 => word < 14, 1 | 2 => word < 5, 3 => table, _ => true };
        prop_assert_eq!(verify(&ledger).intact(), !used);
        prop_assert_eq!(digest(&ledger) == before, !used);
    }
}
