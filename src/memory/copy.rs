//! Copies between guest segments and our own bytes, and between two guests.
//!
//! What is said below of memory that a `GuestRam` holds is true of that of a `Store` or `FileMap`.
//! Every function stops at the shorter side and returns the number of bytes moved. Source and
//! destination segments may overlap (a hostile guest posts the same buffer twice), so the copies
//! are moves.

use core::ptr;

use super::{Segment, prefetch, stream};

#[cfg(test)]
std::thread_local! {
    /// Bytes that this thread has copied, for tests that say how often a byte may be.
    static COPIED: core::cell::Cell<usize> = const { core::cell::Cell::new(0) };
}

/// How many bytes `what` copies.
#[cfg(test)]
pub(crate) fn copied_by<T>(what: impl FnOnce() -> T) -> (T, usize) {
    let before = COPIED.get();
    let answer = what();
    (answer, COPIED.get() - before)
}

/// # Safety
/// As for [`ptr::copy`].
#[inline(always)]
unsafe fn move_bytes(from: *const u8, to: *mut u8, bytes: usize) {
    #[cfg(test)]
    COPIED.set(COPIED.get() + bytes);
    // SAFETY: as the caller says.
    unsafe { ptr::copy(from, to, bytes) };
}

/// Copies guest bytes, beginning `skip` bytes into `from`, to `to`. Returns the bytes copied.
#[inline]
pub fn read(from: &[Segment], mut skip: usize, to: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in from {
        let here = segment.skip(skip);
        skip -= segment.len() - here.len();
        let bytes = here.len().min(to.len() - done);
        // SAFETY: `here` lies in a mapping that the caller's `GuestRam` holds; `to[done..]` has at
        // least `bytes` bytes and is ours alone.
        unsafe { move_bytes(here.base(), to.as_mut_ptr().add(done), bytes) };
        done += bytes;
        if done == to.len() {
            break;
        }
    }
    done
}

/// Copies `from` to guest memory, beginning `skip` bytes into `to`. Returns the bytes copied.
#[inline]
pub fn write(to: &[Segment], mut skip: usize, from: &[u8]) -> usize {
    let mut done = 0;
    for segment in to {
        let here = segment.skip(skip);
        skip -= segment.len() - here.len();
        let bytes = here.len().min(from.len() - done);
        // SAFETY: `here` lies in a mapping that the caller's `GuestRam` holds; `from[done..]` has
        // at least `bytes` bytes.
        unsafe { move_bytes(from.as_ptr().add(done), here.base(), bytes) };
        done += bytes;
        if done == from.len() {
            break;
        }
    }
    done
}

/// The first eight bytes of `from`, little-endian, if it has as many.
#[inline(always)]
pub fn first_word(from: &Segment) -> Option<u64> {
    (from.len() >= 8).then(|| {
        // SAFETY: eight bytes in a mapping that the caller's `GuestRam` holds. The guest may change
        // them meanwhile, so they are read by value, once.
        u64::from_le(unsafe { from.base().cast::<u64>().read_unaligned() })
    })
}

/// Writes zeros over the first `bytes` bytes of `to`, beginning `skip` bytes in.
pub fn zero(to: &[Segment], mut skip: usize, bytes: usize) -> usize {
    let mut done = 0;
    for segment in to {
        let here = segment.skip(skip);
        skip -= segment.len() - here.len();
        let count = here.len().min(bytes - done);
        // SAFETY: `here` lies in a mapping that the caller's `GuestRam` holds.
        unsafe { ptr::write_bytes(here.base(), 0, count) };
        done += count;
        if done == bytes {
            break;
        }
    }
    done
}

/// Copies up to `bytes` bytes from one guest's segment straight into another's. Returns the bytes
/// copied.
#[inline(always)]
pub fn one(source: Segment, target: Segment, bytes: usize) -> usize {
    let bytes = bytes.min(source.len()).min(target.len());
    // SAFETY: both lie in mappings that the callers' `GuestRam`s hold, for at least `bytes`.
    unsafe { move_bytes(source.base(), target.base(), bytes) };
    bytes
}

/// A cache line, bytes.
pub(super) const LINE: usize = 64;

/// As [`one`], and fetches the memory that is copied `next`, a line of it with each line that is
/// moved, at most as many. For memory that is in no cache: waiting for a line then takes the time
/// in which others are moved. Where source and target overlap, what arrives is not what was there.
pub fn one_before(source: Segment, target: Segment, bytes: usize, next: Segment) -> usize {
    let bytes = bytes.min(source.len()).min(target.len());
    let lines = bytes.min(next.len()) / LINE;
    for line in 0..lines {
        let at = line * LINE;
        prefetch::for_later(next.base().wrapping_add(at));
        let from = source.base().wrapping_add(at).cast::<[u8; LINE]>();
        let to = target.base().wrapping_add(at).cast::<[u8; LINE]>();
        // SAFETY: both lie in mappings that the callers' `GuestRam`s hold, for at least `bytes`, of
        // which this is a part; arrays of bytes need no alignment.
        unsafe { to.write(from.read()) };
    }
    let moved = lines * LINE;
    one(source.skip(moved), target.skip(moved), bytes - moved);
    bytes
}

/// As [`one`], past the caches, for a target that is in none and is not read soon; and fetches the
/// memory that is copied `next` meanwhile. Other CPUs see it after [`settle`]. Source and target
/// are memory of different owners.
pub fn one_past_caches(source: Segment, target: Segment, bytes: usize, next: Segment) -> usize {
    let bytes = bytes.min(source.len()).min(target.len());
    let whole = target.base().addr().is_multiple_of(LINE);
    let lines = if whole { bytes / LINE } else { 0 };
    for at in (0..lines).map(|line| line * LINE) {
        if at < next.len() {
            prefetch::for_later(next.base().wrapping_add(at));
        }
        // SAFETY: both lie in mappings that the caller's `GuestRam` and disk hold, for at least
        // `bytes`, and the target begins with a line.
        unsafe {
            stream::line(
                source.base().wrapping_add(at),
                target.base().wrapping_add(at),
            );
        };
    }
    let moved = lines * LINE;
    one(source.skip(moved), target.skip(moved), bytes - moved);
    bytes
}

/// Lets other CPUs see what was copied past the caches before all that is written from now on.
#[inline]
pub fn settle() {
    stream::settle();
}

/// Copies up to `bytes` bytes from one guest's segments (from `from_skip` on) straight into
/// another's (from `to_skip` on). Returns the bytes copied.
#[inline]
pub fn between(
    from: &[Segment],
    from_skip: usize,
    to: &[Segment],
    to_skip: usize,
    bytes: usize,
) -> usize {
    if let ([source], [target]) = (from, to) {
        return one(source.skip(from_skip), target.skip(to_skip), bytes);
    }
    between_many(from, from_skip, to, to_skip, bytes)
}

fn between_many(
    from: &[Segment],
    mut from_skip: usize,
    to: &[Segment],
    mut to_skip: usize,
    bytes: usize,
) -> usize {
    let (mut from, mut to) = (from.iter(), to.iter());
    let (mut source, mut target) = (Segment::EMPTY, Segment::EMPTY);
    let mut done = 0;
    while done < bytes {
        while source.is_empty() {
            let Some(next) = from.next() else { return done };
            source = next.skip(from_skip);
            from_skip -= next.len() - source.len();
        }
        while target.is_empty() {
            let Some(next) = to.next() else { return done };
            target = next.skip(to_skip);
            to_skip -= next.len() - target.len();
        }
        let here = source.len().min(target.len()).min(bytes - done);
        // SAFETY: both lie in mappings that the callers' `GuestRam`s hold, for at least `here`.
        unsafe { move_bytes(source.base(), target.base(), here) };
        (source, target) = (source.skip(here), target.skip(here));
        done += here;
    }
    done
}

/// Writes two little-endian words, twelve bytes, at the start of `to` unless they stand there
/// already: a line that is not written stays in the cache of whoever reads it.
#[inline]
pub fn write_if_different(to: &[Segment], low: u64, high: u32) {
    if let [first, ..] = to
        && first.len() >= 12
    {
        let low_at = first.base().cast::<u64>();
        let high_at = first.base().wrapping_add(8).cast::<u32>();
        // SAFETY: the segment has 12 bytes in a mapping that the caller's `GuestRam` holds. The
        // guest may change them meanwhile, so they are read by value, once.
        let there = unsafe { (low_at.read_unaligned(), high_at.read_unaligned()) };
        if there != (low.to_le(), high.to_le()) {
            // SAFETY: as above.
            unsafe {
                low_at.write_unaligned(low.to_le());
                high_at.write_unaligned(high.to_le());
            }
        }
        return;
    }
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&low.to_le_bytes());
    bytes[8..].copy_from_slice(&high.to_le_bytes());
    let mut there = [0; 12];
    read(to, 0, &mut there);
    if there != bytes {
        write(to, 0, &bytes);
    }
}

/// The first sixteen bytes of `segment` as two little-endian words, read once; `None` when it is
/// shorter.
#[inline]
pub fn front(segment: &Segment) -> Option<[u64; 2]> {
    if segment.len() < 16 {
        return None;
    }
    let at = segment.base().cast::<u64>();
    // SAFETY: the segment has 16 bytes in a mapping that the caller's `GuestRam` holds.
    let words = unsafe { [at.read_unaligned(), at.wrapping_add(1).read_unaligned()] };
    Some(words.map(u64::from_le))
}

/// Writes what [`front`] read at the start of `segment`, as far as it reaches.
#[inline]
pub fn put_front(segment: &Segment, words: [u64; 2]) {
    if segment.len() >= 16 {
        let at = segment.base().cast::<u64>();
        // SAFETY: the segment has 16 bytes in a mapping that the caller's `GuestRam` holds.
        unsafe {
            at.write_unaligned(words[0].to_le());
            at.wrapping_add(1).write_unaligned(words[1].to_le());
        }
        return;
    }
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&words[0].to_le_bytes());
    bytes[8..].copy_from_slice(&words[1].to_le_bytes());
    write(core::slice::from_ref(segment), 0, &bytes);
}

/// Asks the CPU to fetch the first line of `segment` for reading.
#[inline]
pub fn prefetch_read(segment: &Segment) {
    prefetch::for_read(segment.base());
}

/// Asks the CPU to fetch the first line of `segment` for writing.
#[inline]
pub fn prefetch_write(segment: &Segment) {
    prefetch::for_write(segment.base());
}

#[cfg(test)]
mod tests {
    use super::super::{Access, GuestRam, Segments};
    use super::*;

    fn cut(ram: &GuestRam, at: u64, lens: &[u32]) -> Segments {
        let mut out = Segments::with_capacity(lens.len());
        let mut gpa = at;
        for &len in lens {
            ram.translate(gpa, len, Access::Write, &mut out).unwrap();
            gpa += u64::from(len) + 3;
        }
        out
    }

    #[test]
    fn bytes_arrive_in_order_for_every_cut_and_skip() {
        let ram = GuestRam::for_test(&[(0, 65536)]);
        let data: Vec<u8> = (0..60u8).collect();
        for cuts in [
            &[60u32][..],
            &[1, 59],
            &[20, 20, 20],
            &[7, 1, 1, 51],
            &[0, 30, 0, 30],
        ] {
            for skip in [0usize, 1, 20, 59, 60] {
                let (a, b) = (cut(&ram, 0, cuts), cut(&ram, 4096, &[25, 35]));
                write(a.as_slice(), 0, &data);
                zero(b.as_slice(), 0, 60);
                let want = (60 - skip).min(50);
                assert_eq!(between(a.as_slice(), skip, b.as_slice(), 5, 50), want);
                let mut back = vec![0; 60];
                assert_eq!(read(b.as_slice(), 0, &mut back), 60);
                assert_eq!(back[..5], [0; 5]);
                assert_eq!(back[5..5 + want], data[skip..skip + want]);
                assert!(back[5 + want..].iter().all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn copies_are_exact_at_every_length_and_overlap() {
        let ram = GuestRam::for_test(&[(0, 4096)]);
        let data: Vec<u8> = (0..=255).cycle().take(600).collect();
        for bytes in 0..200usize {
            for (from, to) in [(0, 300), (10, 0), (0, 10), (5, 6), (40, 8), (7, 7)] {
                let all = cut(&ram, 0, &[600]);
                write(all.as_slice(), 0, &data);
                let (a, b) = (cut(&ram, from, &[300]), cut(&ram, to, &[300]));
                assert_eq!(between(a.as_slice(), 0, b.as_slice(), 0, bytes), bytes);
                let mut wanted = data.clone();
                let (from, to) = (usize::try_from(from).unwrap(), usize::try_from(to).unwrap());
                wanted.copy_within(from..from + bytes, to);
                let mut got = vec![0; 600];
                read(all.as_slice(), 0, &mut got);
                assert!(got == wanted, "{bytes} bytes from {from} to {to}");
            }
        }
    }

    #[test]
    fn a_copy_before_another_is_exact_whatever_comes_next() {
        let ram = GuestRam::for_test(&[(0, 65536)]);
        let data: Vec<u8> = (0..=255).cycle().take(700).collect();
        let segment = |at, len| cut(&ram, at, &[4096]).as_slice()[0].take(len);
        for bytes in [0, 1, 63, 64, 65, 200, 512, 700] {
            for next in [0, 63, 64, 100, 700, 4096] {
                write(&[segment(3, 700)], 0, &data);
                let to = segment(8192, 900);
                zero(&[to], 0, 900);
                let ahead = segment(16384, next);
                assert_eq!(one_before(segment(3, 700), to, bytes, ahead), bytes);
                let mut got = vec![0; 900];
                read(&[to], 0, &mut got);
                assert!(got[..bytes] == data[..bytes], "{bytes} {next}");
                assert!(got[bytes..].iter().all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn a_copy_past_the_caches_is_the_same_copy() {
        let ram = GuestRam::for_test(&[(0, 65536)]);
        let segment = |at: u64, len: u32| {
            let mut out = Segments::with_capacity(1);
            ram.translate(at, len, Access::Write, &mut out).unwrap();
            out.as_slice()[0]
        };
        let (all, next) = (segment(0, 65536), segment(40000, 300));
        let data: Vec<u8> = (0..65536u32).map(|at| (at % 251) as u8).collect();
        // Where the target is no whole line, or the source begins anywhere.
        for to in [16384, 16384 + 64, 16384 + 16, 16384 + 1] {
            for from in [0, 3, 64] {
                for bytes in [0usize, 1, 63, 64, 65, 512, 4096, 5000] {
                    write(&[all], 0, &data);
                    let (source, target) = (segment(from, 5000), segment(to, 4999));
                    let want = bytes.min(4999);
                    assert_eq!(one_past_caches(source, target, bytes, next), want);
                    settle();
                    let [from, to] = [from, to].map(|at| usize::try_from(at).unwrap());
                    let mut wanted = data.clone();
                    wanted[to..to + want].copy_from_slice(&data[from..from + want]);
                    let mut got = vec![0; 65536];
                    assert_eq!(read(&[all], 0, &mut got), got.len());
                    assert!(got == wanted, "{bytes} bytes from {from} to {to}");
                }
            }
        }
    }

    #[test]
    fn a_front_is_read_and_put_back_whole_or_as_far_as_it_reaches() {
        let ram = GuestRam::for_test(&[(0, 4096)]);
        let from = cut(&ram, 1, &[40]);
        write(from.as_slice(), 0, b"0123456789abcdefgh");
        let words = front(&from.as_slice()[0]).unwrap();
        for len in [0u8, 1, 12, 15, 16, 17] {
            let to = cut(&ram, 101, &[40]);
            zero(to.as_slice(), 0, 40);
            let short = to.as_slice()[0].take(len.into());
            assert_eq!(front(&short).is_some(), len >= 16);
            put_front(&short, words);
            let mut back = [0; 18];
            read(to.as_slice(), 0, &mut back);
            let mut wanted = [0; 18];
            let there = usize::from(len.min(16));
            wanted[..there].copy_from_slice(&b"0123456789abcdef"[..there]);
            assert_eq!(back, wanted, "{len}");
        }
    }

    #[test]
    fn the_shorter_side_ends_a_copy() {
        let ram = GuestRam::for_test(&[(0, 4096)]);
        let segments = cut(&ram, 0, &[4, 4]);
        assert_eq!(write(segments.as_slice(), 6, b"abcdef"), 2);
        let mut back = [0; 12];
        assert_eq!(read(segments.as_slice(), 0, &mut back), 8);
        assert_eq!(&back[6..8], b"ab");
        assert_eq!(between(segments.as_slice(), 0, &[], 0, 9), 0);
    }
}
