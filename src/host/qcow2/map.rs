//! `Map`: where the clusters of an image are in its file, for those who read and write there
//! themselves. The image's thread writes it, workers read it.
//!
//! Only clusters that stay where they are while nobody zeroes or discards them have an entry.
//! Before one goes, its entry is taken out, and the image's thread waits until nobody uses it any
//! more ([`Users`]).

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use crate::sync::{AtomicUsize, Ordering, fence};

/// Entries that are made at once.
const LEAF: u64 = 8192;
/// So many pieces of so many entries at most, whatever size the image says it has: what is behind
/// them the thread does.
const LEAVES_MAX: u64 = 1 << 20;
/// Of these so many are made at most, which is 512 MiB: tables of an image may send every L1 entry
/// to the same few clusters.
const MADE_MAX: usize = 1 << 13;
/// Clusters that one operation may lie in.
const SPAN_MAX: u64 = 256;

/// Places of clusters. Takes eight bytes per cluster of the image, where there were any accesses.
#[derive(Debug)]
pub(super) struct Map {
    bits: u32,
    /// Leaves that were made.
    made: AtomicUsize,
    /// In each entry an offset in the file; 0 where none is known (the header is there).
    leaves: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl Map {
    /// Of an image of `bytes` bytes in clusters of 2^`bits`; it knows nothing yet.
    pub(super) fn new(bytes: u64, bits: u32) -> Map {
        let leaves = ((bytes >> bits) / LEAF + 1).min(LEAVES_MAX);
        Map {
            bits,
            made: AtomicUsize::new(0),
            leaves: (0..leaves).map(|_| OnceLock::new()).collect(),
        }
    }

    fn entry(&self, cluster: u64) -> Option<&AtomicU64> {
        let leaf = usize::try_from(cluster / LEAF).ok()?;
        let entry = usize::try_from(cluster % LEAF).ok()?;
        self.leaves.get(leaf)?.get()?.get(entry)
    }

    fn of(&self, cluster: u64) -> Option<u64> {
        // Acquire: pairs with the release in `set`. What the image's thread has written there, and
        // what it has put in the file before, comes first.
        let at = self.entry(cluster)?.load(Ordering::Acquire);
        (at != 0).then_some(at)
    }

    /// Where in the file the range is, if it is there in one piece as far as is known.
    #[inline]
    pub(super) fn find(&self, offset: u64, bytes: u64) -> Option<u64> {
        let first = offset >> self.bits;
        let last = (offset + bytes.max(1) - 1) >> self.bits;
        let start = self.of(first)?;
        if last - first >= SPAN_MAX {
            return None;
        }
        let in_one = (first + 1..=last)
            .all(|cluster| self.of(cluster) == Some(start + ((cluster - first) << self.bits)));
        in_one.then_some(start + (offset & ((1 << self.bits) - 1)))
    }

    /// The numbers of the clusters that a range touches.
    pub(super) fn clusters(&self, offset: u64, bytes: u64) -> core::ops::Range<u64> {
        let end = offset + bytes;
        offset >> self.bits..(end + (1 << self.bits) - 1) >> self.bits
    }

    /// Whether a place is known.
    pub(super) fn knows(&self, cluster: u64) -> bool {
        self.of(cluster).is_some()
    }

    /// Tells where a cluster is. Only the image's thread may.
    pub(super) fn set(&self, cluster: u64, at: u64) {
        let leaf = usize::try_from(cluster / LEAF).ok();
        if let Some(leaf) = leaf.and_then(|leaf| self.leaves.get(leaf))
            && leaf.get().is_none()
        {
            let made = self.made.load(Ordering::Relaxed);
            if made == MADE_MAX {
                return;
            }
            self.made.store(made + 1, Ordering::Relaxed);
            leaf.get_or_init(|| (0..LEAF).map(|_| AtomicU64::new(0)).collect());
        }
        if let Some(entry) = self.entry(cluster) {
            entry.store(at, Ordering::Release);
        }
    }

    /// Takes the entries of `clusters` out; whether there were any. Only the image's thread may.
    pub(super) fn clear(&self, clusters: core::ops::Range<u64>) -> bool {
        let mut any = false;
        for cluster in clusters {
            if let Some(entry) = self.entry(cluster) {
                any |= entry.load(Ordering::Relaxed) != 0;
                entry.store(0, Ordering::Relaxed);
            }
        }
        any
    }

    /// Takes all entries out. Only the image's thread may.
    pub(super) fn clear_all(&self) {
        let made = self.leaves.iter().filter_map(OnceLock::get);
        for entry in made.flatten() {
            entry.store(0, Ordering::Relaxed);
        }
    }
}

/// How many operations of one queue use places that it found in the map. They are counted in one of
/// two numbers, which change at the image's word, so that the old one empties while others begin.
#[derive(Debug)]
pub(super) struct Users([AtomicUsize; 2]);

impl Users {
    /// Nobody.
    pub(super) fn new() -> Users {
        Users([AtomicUsize::new(0), AtomicUsize::new(0)])
    }

    /// The queue's worker: one more, counted in number `which`, which may look into the map now.
    #[inline]
    pub(super) fn enter(&self, which: usize) {
        let count = &self.0[which & 1];
        count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        // Orders the count before the look into the map. Pairs with the fence in `after_clear`:
        // either the image's thread sees us, or we see that the entry is gone. Without it a
        // cluster could be given to another place of the disk while we write to it.
        fence(Ordering::SeqCst);
    }

    /// The queue's worker: one less.
    #[inline]
    pub(super) fn leave(&self, which: usize) {
        let count = &self.0[which & 1];
        // Release: the image's thread comes after what we did.
        count.store(count.load(Ordering::Relaxed) - 1, Ordering::Release);
    }

    /// The image's thread, after [`after_clear`]: whether nobody is left in number `which`.
    pub(super) fn is_empty(&self, which: usize) -> bool {
        // Acquire: pairs with the release in `leave`.
        self.0[which & 1].load(Ordering::Acquire) == 0
    }
}

/// The image's thread, after it has taken entries out and before it looks who may use them.
pub(super) fn after_clear() {
    // Orders the empty entries before the look at the counts; pairs with the fence in `enter`.
    fence(Ordering::SeqCst);
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn a_huge_image_takes_so_much_memory_and_no_more() {
        let map = Map::new(1 << 61, 21);
        assert_eq!(map.leaves.len() as u64, LEAVES_MAX);
        map.set(u64::MAX >> 21, 0x20_0000);
        assert!(!map.knows(u64::MAX >> 21));
        for leaf in 0..5 {
            map.made
                .store(MADE_MAX - 2 + leaf.min(2), Ordering::Relaxed);
            map.set(leaf as u64 * LEAF, 0x20_0000);
            assert_eq!(map.knows(leaf as u64 * LEAF), leaf < 2, "{leaf}");
        }
        map.set(1, 0x40_0000);
        assert!(map.knows(1), "of a leaf that there is");
    }

    #[test]
    fn a_range_is_found_where_all_of_it_is_in_one_piece() {
        let map = Map::new(1 << 30, 16);
        assert_eq!(map.find(0, 512), None);
        map.set(0, 0x50000);
        map.set(1, 0x60000);
        map.set(2, 0x90000);
        map.set(9000, 0xa0000);
        assert_eq!(map.find(512, 4096), Some(0x50200));
        assert_eq!(map.find(0xf000, 0x2000), Some(0x5f000));
        assert_eq!(map.find(0, 0x20000), Some(0x50000));
        assert_eq!(map.find(0x1f000, 0x2000), None);
        assert_eq!(map.find(0x20000, 0x10000), Some(0x90000));
        assert_eq!(map.find(0x20000, 0x10001), None);
        assert_eq!(map.find(9000 << 16, 512), Some(0xa0000));
        assert_eq!(map.find(1 << 40, 512), None);
        assert_eq!(map.clusters(0xffff, 2), 0..2);
        assert_eq!(map.clusters(0x10000, 0x10000), 1..2);
        assert!(map.clear(1..3));
        assert!(!map.clear(1..3));
        assert!(map.knows(0) && !map.knows(1));
        assert_eq!(map.find(0, 0x10001), None);
        map.clear_all();
        assert!(!map.knows(0) && !map.knows(9000));
    }
}

#[cfg(test)]
#[cfg(loom)]
mod loom_tests {
    use super::{Users, after_clear};
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering};

    /// The map is one entry: a worker that found it there is seen by who took it out.
    #[test]
    fn loom_no_cluster_goes_while_it_is_used() {
        loom::model(|| {
            let shared = Arc::new((Users::new(), AtomicUsize::new(1), AtomicUsize::new(0)));
            let other = Arc::clone(&shared);
            let worker = loom::thread::spawn(move || {
                let (users, entry, gone) = &*other;
                users.enter(0);
                if entry.load(Ordering::Acquire) != 0 {
                    assert_eq!(gone.load(Ordering::Relaxed), 0, "used after it went");
                }
                users.leave(0);
            });
            let (users, entry, gone) = &*shared;
            entry.store(0, Ordering::Relaxed);
            after_clear();
            if users.is_empty(0) {
                gone.store(1, Ordering::Relaxed);
            }
            worker.join().unwrap();
        });
    }
}
