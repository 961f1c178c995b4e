//! Groups of duplicate pages, and the memory that sharing them would free.

use super::{Class, Unit};

/// Limits of page sharing in the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum number of pages per shared copy (`max_page_sharing` of KSM), at least 2.
    pub pages_per_copy: u32,
}

/// Page that may have duplicates, collected during a scan. Zero pages are not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Signature {
    /// Hash of the contents; for a pattern, its word after a bijective mixing of the bits.
    pub hash: u64,
    /// Whether the page is a pattern.
    pub pattern: bool,
    /// Index of the unit.
    pub unit: u32,
}

/// Numbers of shareable pages and of pages that sharing would free, by class.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Number of shareable pages, by [`Class`].
    pub pages: [u64; Class::COUNT],
    /// Number of pages that sharing would free, by [`Class`].
    pub freed: [u64; Class::COUNT],
}

/// Pages that have duplicates, as (unit, group), ordered by unit.
#[derive(Debug, Default)]
pub struct Groups {
    members: Vec<(u32, u32)>,
    count: usize,
}

impl Groups {
    /// Finds pages that have duplicates, and adds them to the counts of their units and to `totals`.
    pub fn find(mut signatures: Vec<Signature>, units: &mut [Unit], totals: &mut Totals) -> Self {
        signatures.sort_unstable();
        let mut groups = Self::default();
        for group in signatures.chunk_by(|a, b| (a.hash, a.pattern) == (b.hash, b.pattern)) {
            if group.len() > 1 {
                let number = u32::try_from(groups.count).unwrap_or(u32::MAX);
                groups.count += 1;
                groups.members.extend(group.iter().map(|page| (page.unit, number)));
                count(group, units, totals);
            }
        }
        groups.members.sort_unstable();
        groups
    }

    fn of_unit(&self, unit: u32) -> impl Iterator<Item = usize> {
        let start = self.members.partition_point(|&(other, _)| other < unit);
        self.members[start..].iter().take_while(move |&&(other, _)| other == unit).map(|&(_, group)| group as usize)
    }

    /// Returns the numbers of pages freed by sharing all shareable pages of the first 1, 2, 3... units of `order`.
    ///
    /// In each group of identical pages, the first of every `pages_per_copy` pages is retained, in the order of the
    /// units. All zero pages are freed. In units for which `only_zeros` returns true, only zero pages are freed.
    pub fn curve(&self, units: &[Unit], order: &[u32], limits: Limits, only_zeros: impl Fn(&Unit) -> bool) -> Vec<u64> {
        let mut met = vec![0u32; self.count];
        let mut freed = 0;
        let mut curve = Vec::with_capacity(order.len());
        for &number in order {
            let unit = &units[number as usize];
            freed += u64::from(unit.counts[Class::Zero as usize]);
            for group in self.of_unit(number).filter(|_| !only_zeros(unit)) {
                freed += u64::from(!met[group].is_multiple_of(limits.pages_per_copy));
                met[group] += 1;
            }
            curve.push(freed);
        }
        curve
    }
}

/// Adds the pages of one group to the counts of their units and to `totals`. The pages may belong to several workloads.
fn count(group: &[Signature], units: &mut [Unit], totals: &mut Totals) {
    let mut workloads: Vec<(u32, u64)> = Vec::new();
    for page in group {
        let workload = units[page.unit as usize].workload;
        match workloads.iter_mut().find(|(other, _)| *other == workload) {
            Some((_, pages)) => *pages += 1,
            None => workloads.push((workload, 1)),
        }
    }
    let inside: u64 = workloads.iter().map(|(_, pages)| pages - 1).sum();
    let across = workloads.len() as u64 - 1;
    if group[0].pattern {
        totals.freed[Class::Pattern as usize] += inside + across;
    } else {
        totals.freed[Class::Inside as usize] += inside;
        totals.freed[Class::Across as usize] += across;
    }
    for page in group {
        let unit = &mut units[page.unit as usize];
        let repeated = workloads.iter().any(|&(workload, pages)| workload == unit.workload && pages > 1);
        let class = match (page.pattern, repeated) {
            (true, _) => Class::Pattern,
            (false, true) => Class::Inside,
            (false, false) => Class::Across,
        };
        unit.counts[class as usize] += 1;
        totals.pages[class as usize] += 1;
    }
}
