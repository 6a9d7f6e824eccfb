//! `Store`: memory of our own that a guest's disk is kept in (`ram:`).
//!
//! Zero pages until written, shared by all queues of the disk. Two queues may write the same
//! sector at the same time; what is read then is as undefined as on any disk.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::MmapRegion;

use super::{Segment, copy};

/// What memory is given back in.
const PAGE: usize = 4096;

/// How many times its size at first a store can become.
const GROWTH: usize = 16;

/// A range of zero-initialised memory.
#[derive(Debug)]
pub struct Store {
    map: MmapRegion<()>,
    /// Bytes of it that are there: the rest can't be touched yet.
    len: AtomicUsize,
}

impl Store {
    /// `bytes` bytes, reserved now and taken page by page when they are written.
    ///
    /// # Errors
    /// When the address space has no room.
    pub fn new(bytes: u64) -> io::Result<Store> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let map = MmapRegion::new(bytes).map_err(|error| io::Error::other(error.to_string()))?;
        prefer_huge_pages(&map);
        let len = AtomicUsize::new(bytes);
        Ok(Store { map, len })
    }

    /// As [`Store::new`], with addresses kept free behind it for [`Store::grow`], as far as there
    /// are some.
    ///
    /// # Errors
    /// When the address space has no room.
    pub fn growable(bytes: u64) -> io::Result<Store> {
        let wanted = usize::try_from(bytes).map_err(io::Error::other)?;
        let reserved = wanted.checked_next_multiple_of(PAGE);
        let reserved = reserved.and_then(|bytes| bytes.checked_mul(GROWTH));
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let map =
            reserved.and_then(|bytes| MmapRegion::build(None, bytes, libc::PROT_NONE, flags).ok());
        let Some(map) = map else {
            return Store::new(bytes);
        };
        prefer_huge_pages(&map);
        let len = AtomicUsize::new(0);
        let store = Store { map, len };
        store.grow(bytes)?;
        Ok(store)
    }

    /// Makes it `bytes` bytes long, which is no less than it was. What is new is zero.
    ///
    /// # Errors
    /// When no addresses were kept for that; nothing has changed then.
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        let wanted = usize::try_from(bytes).map_err(io::Error::other)?;
        let (len, room) = (self.len.load(Ordering::Relaxed), self.map.size());
        if wanted < len || wanted > room {
            return Err(io::Error::other(format!(
                "memory of {len} bytes can become at most {room} bytes long, and not shorter"
            )));
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let pages = wanted.next_multiple_of(PAGE).min(room);
        // SAFETY: the pages lie in our own private anonymous mapping; they only become accessible.
        if unsafe { libc::mprotect(self.map.as_ptr().cast(), pages, protection) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // Segments may reach that far from now on.
        self.len.store(wanted, Ordering::Release);
        Ok(())
    }

    /// How many bytes there are now.
    pub fn bytes(&self) -> usize {
        self.len.load(Ordering::Acquire)
    }

    /// The bytes from `offset` on, `len` at most; valid as long as the store.
    pub fn segment(&self, offset: u64, len: usize) -> Segment {
        let all = self.len.load(Ordering::Acquire);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(all);
        let len = len.min(all - offset);
        Segment::new(self.map.as_ptr().wrapping_add(offset), len)
    }

    /// Makes the `bytes` bytes from `offset` on zero, and gives their memory back when `release`
    /// says so. Returns the bytes that are zero now: fewer at the end of the store.
    pub fn zero(&self, offset: u64, bytes: usize, release: bool) -> usize {
        let whole = self.segment(offset, bytes);
        let head = whole.base().align_offset(PAGE).min(whole.len());
        let pages = whole.skip(head).take((whole.len() - head) / PAGE * PAGE);
        if !release || pages.is_empty() || !give_back(pages) {
            return copy::zero(&[whole], 0, whole.len());
        }
        let tail = whole.skip(head + pages.len());
        copy::zero(&[whole.take(head), tail], 0, head + tail.len());
        whole.len()
    }
}

/// The kernel takes huge pages for it where it has some, as far as its settings allow; no harm is
/// done where it does not.
fn prefer_huge_pages(map: &MmapRegion<()>) {
    // SAFETY: advice about our own mapping; nothing in it changes.
    unsafe { libc::madvise(map.as_ptr().cast(), map.size(), libc::MADV_HUGEPAGE) };
}

/// The kernel takes whole pages of a private mapping and has zeros there from now on. `false` when
/// it does not (locked memory).
fn give_back(pages: Segment) -> bool {
    // SAFETY: the pages lie in our own private anonymous mapping; nothing but disk data is there.
    unsafe { libc::madvise(pages.base().cast(), pages.len(), libc::MADV_DONTNEED) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes in huge pages of the mapping that `at` lies in.
    fn huge_kb(at: usize) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = smaps.lines().skip_while(|line| {
            let range = line
                .split_whitespace()
                .next()
                .and_then(|it| it.split_once('-'));
            let bound = |it: &str| usize::from_str_radix(it, 16).unwrap_or(0);
            !range.is_some_and(|(from, to)| (bound(from)..bound(to)).contains(&at))
        });
        let huge = lines.find_map(|line| line.strip_prefix("AnonHugePages:"));
        let huge = huge.and_then(|it| it.split_whitespace().next()).unwrap();
        huge.parse().unwrap()
    }

    #[test]
    fn a_store_is_in_huge_pages_where_the_kernel_has_them() {
        let setting = "/sys/kernel/mm/transparent_hugepage/enabled";
        let setting = std::fs::read_to_string(setting).unwrap_or_default();
        if !setting.contains("[always]") && !setting.contains("[madvise]") {
            eprintln!("no transparent huge pages here: nothing was tested");
            return;
        }
        let store = Store::new(16 << 20).unwrap();
        let whole = store.segment(0, 16 << 20);
        copy::zero(&[whole], 0, whole.len());
        // The first and the last may be cut, and one may not be had.
        assert!(huge_kb(whole.base().addr()) >= 8 << 10);
    }

    #[test]
    fn a_store_grows_in_its_place_and_what_is_new_is_zero() {
        let store = Store::growable(5000).unwrap();
        let whole = |store: &Store| store.segment(0, usize::MAX);
        assert_eq!(whole(&store).len(), 5000);
        copy::write(&[whole(&store)], 0, &[0x5a; 5000]);
        let base = whole(&store).base();
        store.grow(70_000).unwrap();
        assert_eq!((whole(&store).base(), whole(&store).len()), (base, 70_000));
        let mut got = vec![0xff; 70_000];
        copy::read(&[whole(&store)], 0, &mut got);
        assert!(got[..5000] == [0x5a; 5000] && got[5000..] == [0; 65_000]);
        copy::write(&[whole(&store)], 69_999, &[7]);
        for bytes in [69_999, 8192 * 16 + 1, u64::MAX] {
            let refused = store.grow(bytes).unwrap_err().to_string();
            assert!(refused.contains("at most 131072 bytes"), "{refused}");
        }
        assert_eq!(whole(&store).len(), 70_000);
        let fixed = Store::new(8192).unwrap();
        fixed.grow(8192).unwrap();
        assert!(fixed.grow(12288).is_err());
    }

    #[test]
    fn exactly_the_range_becomes_zero_with_and_without_its_memory() {
        for release in [false, true] {
            for (offset, bytes) in [
                (0, 512),
                (512, 20000),
                (4096, 8192),
                (4095, 2),
                (60000, 9999),
            ] {
                let store = Store::new(65536).unwrap();
                let all = [store.segment(0, 65536)];
                copy::write(&all, 0, &[0x5a; 65536]);
                let end = (offset + bytes).min(65536);
                let done = store.zero(offset as u64, bytes, release);
                assert_eq!(done, end - offset);
                let mut want = vec![0x5a; 65536];
                want[offset..end].fill(0);
                let mut got = vec![0; 65536];
                copy::read(&all, 0, &mut got);
                assert!(got == want, "{offset}+{bytes}, release {release}");
            }
        }
    }
}
