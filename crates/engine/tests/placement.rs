//! Tests of huge pages across a transfer (S6, S7): a page is placed in its slot, regardless of its contents and of the
//! order in which pages are received.

use std::sync::Arc;
use std::thread;

use pageferry_engine::block::Class;
use pageferry_engine::mapping::Mapping;
use pageferry_engine::placer::{PlaceError, Placer};
use pageferry_engine::{LARGE_PAGE, SLOTS};
use proptest::prelude::*;

mod memory;
use memory::{allocated, contents, fill, large_file, large_target, page, placer, small_file};

/// Number of pages of the region: three whole units and a shorter one.
const PAGES: usize = 3 * SLOTS + 100;
const UNITS: usize = 4;
const CAPACITY: u64 = 64 << 20;

/// Run of received pages. `content`: byte that fills the pages; 0 means zero pages, `None` means holes.
#[derive(Debug, Clone)]
struct Arrival {
    first: usize,
    count: usize,
    content: Option<u8>,
}

fn place(placer: &Placer, region: usize, arrival: &Arrival) -> Result<(), PlaceError> {
    let Arrival { first, count, content } = *arrival;
    match content {
        None => placer.place_empty(region, first, count, Class::Absent),
        Some(0) => placer.place_empty(region, first, count, Class::Zero),
        Some(byte) => {
            let slots = placer.slots(region, first, count)?;
            // SAFETY: the placer has allocated `count` adjacent slots in its mapping, and returned the address of the
            // first.
            unsafe { std::ptr::write_bytes(slots, byte, count * 4096) };
            placer.placed(region, first, count)
        }
    }
}

fn arrivals(max: usize) -> impl Strategy<Value = Vec<Arrival>> {
    let count = prop_oneof![2 => Just(1usize), 2 => 1usize..40, 1 => 1usize..1200];
    let content = prop_oneof![2 => Just(Some(0)), 3 => (1u8..).prop_map(Some)];
    let arrival = (0..PAGES, count, content).prop_map(|(first, count, content)| {
        let count = count.min(PAGES - first);
        Arrival { first, count, content }
    });
    prop::collection::vec(arrival, 1..max)
}

/// Returns the last byte received for each page; zero if no page was received.
fn expected(arrivals: &[Arrival]) -> Vec<u8> {
    let mut pages = vec![0; PAGES];
    for arrival in arrivals {
        pages[arrival.first..arrival.first + arrival.count].fill(arrival.content.unwrap_or(0));
    }
    pages
}

fn check_contents(mapping: &Mapping, expected: &[u8]) {
    let bytes = contents(mapping);
    for (number, (page, &byte)) in bytes.chunks(4096).zip(expected).enumerate() {
        assert!(page.iter().all(|&found| found == byte), "page {number} holds {} instead of {byte}", page[0]);
    }
}

/// Returns the units for which a page other than a hole was received.
fn touched(arrivals: &[Arrival]) -> Vec<bool> {
    let mut units = vec![false; UNITS];
    for Arrival { first, count, .. } in arrivals.iter().filter(|arrival| arrival.content.is_some()) {
        units[first / SLOTS..(first + count).div_ceil(SLOTS)].fill(true);
    }
    units
}

fn check_large(arrivals: &[Arrival], copy: &Arc<Mapping>) {
    let large = vec![true, true, true, false];
    let placer = placer(vec![large_target(copy, large.clone())]);
    for arrival in arrivals {
        place(&placer, 0, arrival).expect("within the region");
    }
    let touched = touched(arrivals);
    let kept: Vec<_> = large.iter().zip(&touched).map(|(large, touched)| *large && *touched).collect();
    assert_eq!(copy.large_units().expect("a pagemap")[..3], kept[..3]);
    assert_eq!(placer.fallbacks(), 0);
    // A huge page is allocated as a whole, unless only holes were received for it.
    let whole = kept.iter().filter(|&&kept| kept).count() * LARGE_PAGE;
    assert!((whole as u64..=(whole + LARGE_PAGE) as u64).contains(&allocated(copy)));
    check_contents(copy, &expected(arrivals));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// On a file system that allocates huge pages on first access, huge pages stay whole.
    #[test]
    fn huge_pages_stay_whole(arrivals in arrivals(30)) {
        if let Some(copy) = large_file(PAGES, CAPACITY) {
            check_large(&arrivals, &copy);
        }
    }

    /// On a memfd, huge pages are created by collapsing base pages.
    #[test]
    fn huge_pages_are_made_by_collapsing(arrivals in arrivals(30)) {
        check_large(&arrivals, &small_file(PAGES));
    }

    /// If units are backed by base pages at the source, or if huge pages are not kept, only pages with data are
    /// allocated.
    #[test]
    fn base_pages_are_not_expanded(arrivals in arrivals(30), keep_large in any::<bool>()) {
        let copy = small_file(PAGES);
        let large = if keep_large { Vec::new() } else { vec![true; UNITS] };
        let placer = Placer::new(vec![large_target(&copy, large)], Vec::new(), keep_large, 0).expect("a placer");
        let mut filled = vec![false; PAGES];
        for arrival in &arrivals {
            place(&placer, 0, arrival).expect("within the region");
            if arrival.content.is_some_and(|byte| byte != 0) {
                filled[arrival.first..arrival.first + arrival.count].fill(true);
            }
        }
        prop_assert_eq!(allocated(&copy), filled.iter().filter(|&&page| page).count() as u64 * 4096);
        check_contents(&copy, &expected(&arrivals));
    }
}

/// Zeros received after data clear the slot, data received after zeros fill it, and the huge page is not replaced.
#[test]
fn slot_is_cleared_and_filled_in_place() {
    let Some(copy) = large_file(PAGES, CAPACITY) else { return };
    let placer = placer(vec![large_target(&copy, vec![true; 3])]);
    let arrival = |first, count, content| Arrival { first, count, content };
    for content in [Some(9), Some(0), Some(8), None, Some(0), Some(7), Some(0)] {
        place(&placer, 0, &arrival(100, 3, content)).expect("within the region");
        assert_eq!(page(&copy, 101)[0], content.unwrap_or(0));
        assert_eq!(allocated(&copy), LARGE_PAGE as u64);
    }
    assert_eq!(copy.large_units().expect("a pagemap")[..3], [true, false, false]);
}

#[test]
fn units_of_holes_stay_holes() {
    let Some(copy) = large_file(PAGES, CAPACITY) else { return };
    let placer = placer(vec![large_target(&copy, vec![true; 4])]);
    placer.place_empty(0, 0, PAGES, Class::Absent).expect("within the region");
    assert_eq!((allocated(&copy), placer.missing(), placer.fallbacks()), (0, 0, 0));
}

/// The peer announces which units are huge pages; units beyond the region must be ignored.
#[test]
fn huge_units_beyond_the_region_are_ignored() {
    let Some(copy) = large_file(SLOTS + 10, CAPACITY) else { return };
    let placer = placer(vec![large_target(&copy, vec![true; 9000])]);
    placer.place_empty(0, 0, SLOTS + 10, Class::Zero).expect("within the region");
    assert_eq!((allocated(&copy), placer.fallbacks()), (LARGE_PAGE as u64, 0));
}

/// On a file system with space for one huge page and 16 base pages, the second huge page is replaced by base pages and
/// counted.
#[test]
fn base_pages_replace_an_unavailable_huge_page() {
    let Some(copy) = large_file(2 * SLOTS, LARGE_PAGE as u64 + (64 << 10)) else { return };
    let placer = placer(vec![large_target(&copy, vec![true, true])]);
    for (first, content) in [(3, 5), (SLOTS + 9, 6)] {
        place(&placer, 0, &Arrival { first, count: 4, content: Some(content) }).expect("space for the pages");
    }
    assert_eq!(placer.fallbacks(), 1);
    assert_eq!(copy.large_units().expect("a pagemap"), [true, false]);
    assert_eq!((page(&copy, 6)[4095], page(&copy, SLOTS + 12)[4095]), (5, 6));
}

/// If the file system is full, the error names the pages, and no signal is raised.
#[test]
fn full_file_system_is_an_error() {
    let Some(copy) = large_file(2 * SLOTS, LARGE_PAGE as u64 + (16 << 10)) else { return };
    let placer = placer(vec![large_target(&copy, vec![true, true])]);
    place(&placer, 0, &Arrival { first: 0, count: SLOTS, content: Some(1) }).expect("space for a huge page");
    let full = place(&placer, 0, &Arrival { first: SLOTS, count: 16, content: Some(2) });
    assert!(matches!(full, Err(PlaceError::Memory { region: 0, .. })), "{full:?}");
}

/// Several streams place pages of the same units in parallel.
#[test]
fn streams_place_pages_of_the_same_unit() {
    for copy in [large_file(PAGES, CAPACITY), Some(small_file(PAGES))].into_iter().flatten() {
        let placer = placer(vec![large_target(&copy, vec![true; 3])]);
        thread::scope(|scope| {
            for stream in 0..4 {
                let placer = &placer;
                scope.spawn(move || {
                    for first in (0..PAGES).filter(|page| page % 4 == stream) {
                        let content = u8::try_from(first % 3).expect("small");
                        place(placer, 0, &Arrival { first, count: 1, content: Some(content) })
                            .expect("within the region");
                    }
                });
            }
        });
        assert_eq!(copy.large_units().expect("a pagemap")[..3], [true; 3]);
        assert_eq!((placer.missing(), placer.fallbacks()), (0, 0));
        let bytes: Vec<_> = (0..PAGES).map(|page| u8::try_from(page % 3).expect("small")).collect();
        check_contents(&copy, &bytes);
    }
}

/// A page that is received twice is counted once.
#[test]
fn missing_counts_each_page_once() {
    let placer = placer(vec![large_target(&small_file(PAGES), Vec::new())]);
    for (first, count, left) in
        [(0, 10, PAGES - 10), (5, 10, PAGES - 15), (0, 15, PAGES - 15), (0, PAGES, 0), (3, 9, 0)]
    {
        place(&placer, 0, &Arrival { first, count, content: Some(1) }).expect("within the region");
        assert_eq!(placer.missing(), left);
    }
}

#[test]
fn nonexistent_pages_are_rejected() {
    let copy = small_file(PAGES);
    fill(&copy, 0, 1);
    let placer = placer(vec![large_target(&copy, Vec::new())]);
    assert!(matches!(placer.slots(1, 0, 1), Err(PlaceError::Region(1, 1))));
    for (first, count) in [(PAGES, 1), (PAGES - 1, 2), (usize::MAX, 1), (1, usize::MAX)] {
        assert!(matches!(placer.slots(0, first, count), Err(PlaceError::Pages { .. })));
        assert!(matches!(placer.placed(0, first, count), Err(PlaceError::Pages { .. })));
        assert!(matches!(placer.place_empty(0, first, count, Class::Zero), Err(PlaceError::Pages { .. })));
    }
    assert!(matches!(placer.populate(0, &[UNITS]), Err(PlaceError::Pages { .. })));
    assert!(matches!(placer.populate(0, &[usize::MAX]), Err(PlaceError::Pages { .. })));
    assert!(matches!(placer.populate(7, &[0]), Err(PlaceError::Region(7, 1))));
    assert!(matches!(placer.place_empty(0, 0, 1, Class::Pattern), Err(PlaceError::Class(Class::Pattern))));
}
