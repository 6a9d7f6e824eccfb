//! `FileMap`: a file in memory (tmpfs), mapped, so that its blocks are moved without system calls.
//!
//! Touching a page that the file does not have would make one, so that reading a sparse disk would
//! fill it. Therefore only what is known to have memory is handed out; of everything else the
//! caller asks the kernel, and we learn what it has meanwhile. Being wrong costs memory, never
//! data: somebody else may punch a hole, and a page of zeros takes its place when it is touched.
//!
//! When somebody cuts the file, zeros stand in place of the pages that are missing
//! ([`super::torn`]), and whatever was moved since is to be done again, by the kernel.

use std::alloc::{Layout, alloc_zeroed};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use super::torn::{self, Watched};
use super::{Segment, copy};

/// What is known to have memory, or not, as one; no more than a page of the file.
const PAGE: usize = 4096;
/// Pages in a word of the marks.
const WORD: usize = 64;
/// Pages that the kernel maps when one of them is read.
const AROUND: usize = 16;
/// How many times its size at first the file can become and still be mapped as a whole, where
/// there are so many addresses.
const GROWTH: usize = 16;

/// A file that is mapped as a whole.
#[derive(Debug)]
pub struct FileMap {
    base: *mut u8,
    /// Bytes of the mapping, but for one page behind them. It reaches beyond the end of the file.
    bytes: usize,
    /// By page, one bit: it has memory. Made of zeros that take none until they are used.
    marks: Box<[AtomicU64]>,
    watched: &'static Watched,
}

// SAFETY: the mapping is shared memory, of which only addresses are handed out; every access to it
// tolerates concurrent change.
unsafe impl Send for FileMap {}
// SAFETY: as above; the marks are atomics.
unsafe impl Sync for FileMap {}

impl FileMap {
    /// Maps `file`, now `bytes` long.
    ///
    /// # Errors
    /// When the system says so.
    pub fn new(file: &File, bytes: u64, writable: bool) -> io::Result<FileMap> {
        let exact = usize::try_from(bytes)
            .ok()
            .and_then(|bytes| bytes.checked_next_multiple_of(PAGE))
            .filter(|bytes| *bytes < usize::MAX - PAGE)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let protection = match writable {
            true => libc::PROT_READ | libc::PROT_WRITE,
            false => libc::PROT_READ,
        };
        let map = |bytes: usize| {
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            let fd = file.as_raw_fd();
            let (anywhere, whole) = (core::ptr::null_mut(), bytes + PAGE);
            // SAFETY: a new mapping, at an address that the kernel chooses.
            let at = unsafe { libc::mmap(anywhere, whole, protection, flags, fd, 0) };
            if at == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: advice about the mapping just made. A disk is no use in a core dump of ours.
            unsafe { libc::madvise(at, whole, libc::MADV_DONTDUMP) };
            let base = at.cast::<u8>();
            let mut map = FileMap {
                base,
                bytes,
                marks: Box::default(),
                watched: torn::watch(base, whole, PAGE),
            };
            map.marks = zeros((bytes / PAGE).div_ceil(WORD))?;
            Ok(map)
        };
        let grown = exact.checked_mul(GROWTH);
        let grown = grown.filter(|bytes| bytes.checked_add(PAGE).is_some());
        let grown = grown.map(map).and_then(Result::ok);
        grown.map_or_else(|| map(exact), Ok)
    }

    /// The `len` bytes from `offset` on, valid as long as the mapping; `None` where the kernel has
    /// to be asked.
    #[inline]
    pub fn segment(&self, offset: u64, len: usize) -> Option<Segment> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(len).filter(|end| *end <= self.bytes)?;
        if len == 0 || self.is_torn() {
            return None;
        }
        let marked = |page: usize| self.marks[page / WORD].load(Ordering::Relaxed) & bit(page) != 0;
        let has_memory = (offset / PAGE..=(end - 1) / PAGE).all(marked);
        has_memory.then(|| Segment::new(self.base.wrapping_add(offset), len))
    }

    /// Whether a page of the file was missing when it was touched: what was moved from or to any
    /// of it since is to be done again.
    #[inline]
    pub fn is_torn(&self) -> bool {
        // Asked after the bytes were moved. Where they went to a page that the handler has put
        // there, somebody has had a page fault for it after the flag was set: no load is ahead of
        // its store by as much. The compiler must not put it there either.
        core::sync::atomic::compiler_fence(Ordering::SeqCst);
        self.watched.is_torn()
    }

    /// The kernel has moved `len` bytes at `offset`: what is there, and around, is looked up.
    pub fn learn(&self, offset: u64, len: usize) {
        if self.is_torn() {
            return;
        }
        for (word, bits) in self.words(offset, len) {
            if self.marks[word].load(Ordering::Relaxed) & bits != bits {
                self.look(word);
            }
        }
    }

    /// `len` bytes at `offset` lose their memory: to be called before and after they do.
    pub fn forget(&self, offset: u64, len: usize) {
        for (word, bits) in self.words(offset, len) {
            if self.marks[word].load(Ordering::Relaxed) & bits != 0 {
                self.marks[word].fetch_and(!bits, Ordering::Relaxed);
            }
        }
    }

    /// Marks the pages of a word that are in memory.
    #[cold]
    fn look(&self, word: usize) {
        let first = word * WORD;
        let there = self.cached(first..(first + WORD).min(self.bytes / PAGE));
        let new = there & !self.marks[word].load(Ordering::Relaxed);
        // Of a file that is not ours to write the kernel says that all of it is in memory, what is
        // behind its end as well.
        let behind = self.bytes / PAGE;
        if new == 0 || self.cached(behind..behind + 1) != 0 {
            return;
        }
        self.marks[word].fetch_or(new, Ordering::Relaxed);
        for around in (0..WORD).step_by(AROUND) {
            let of_these = new >> around & ((1 << AROUND) - 1);
            if of_these != 0 {
                self.fault_in(first + around + of_these.trailing_zeros() as usize);
            }
        }
    }

    /// Has the kernel map `page`. It maps what there is around a page that is read, for writing
    /// too, and a page alone when it is written.
    fn fault_in(&self, page: usize) {
        let first = Segment::new(self.base.wrapping_add(page * PAGE), PAGE);
        core::hint::black_box(copy::first_word(&first));
    }

    /// Which of these pages, at most [`WORD`], are in memory: a bit each.
    fn cached(&self, pages: Range<usize>) -> u64 {
        let mut told = [0u8; WORD];
        let at = self.base.wrapping_add(pages.start * PAGE).cast();
        // SAFETY: the range lies in our mapping, and there is a byte for each of its pages.
        let answer = unsafe { libc::mincore(at, pages.len() * PAGE, told.as_mut_ptr()) };
        if answer < 0 {
            return 0;
        }
        let bits = told.iter().enumerate();
        bits.fold(0, |all, (at, page)| all | u64::from(page & 1) << at)
    }

    /// The words that have the pages of a range, as far as it is mapped, and the bits of them.
    fn words(&self, offset: u64, len: usize) -> impl Iterator<Item = (usize, u64)> {
        let offset = usize::try_from(offset).map_or(self.bytes, |at| at.min(self.bytes));
        let end = (offset + len.min(self.bytes - offset)).div_ceil(PAGE);
        let first = offset / PAGE;
        (first / WORD..end.div_ceil(WORD)).map(move |word| {
            let from = first.saturating_sub(word * WORD);
            let to = (end - word * WORD).min(WORD);
            (word, u64::MAX << from & u64::MAX >> (WORD - to))
        })
    }
}

impl Drop for FileMap {
    fn drop(&mut self) {
        // Before it is unmapped.
        self.watched.forget();
        // SAFETY: the mapping that `new` made, whoever has mended it; nobody has a segment of it.
        unsafe { libc::munmap(self.base.cast(), self.bytes + PAGE) };
    }
}

fn bit(page: usize) -> u64 {
    1 << (page % WORD)
}

/// `count` zeros, of which the kernel makes memory when they are touched; it may refuse so many
/// all the same.
fn zeros(count: usize) -> io::Result<Box<[AtomicU64]>> {
    let layout = Layout::array::<AtomicU64>(count).map_err(|_| io::ErrorKind::OutOfMemory)?;
    if layout.size() == 0 {
        return Ok(Box::default());
    }
    // SAFETY: the layout is not that of nothing.
    let words = unsafe { alloc_zeroed(layout) }.cast::<AtomicU64>();
    if words.is_null() {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let words = core::ptr::slice_from_raw_parts_mut(words, count);
    // SAFETY: allocated as such a slice is, with zeros, which are atomics, and nobody else has it.
    Ok(unsafe { Box::from_raw(words) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

    use super::super::memfd;
    use super::*;

    const BYTES: u64 = 64 * PAGE as u64;

    fn page(number: usize) -> u64 {
        (number * PAGE) as u64
    }

    #[test]
    fn only_what_has_memory_is_handed_out() {
        let file = memfd(BYTES).unwrap();
        file.write_all_at(&[7; 2 * PAGE], page(4)).unwrap();
        let map = FileMap::new(&file, BYTES, true).unwrap();
        assert!(map.segment(page(4), 10).is_none(), "nothing is known");
        // Both sides of it are holes.
        map.learn(page(3), 4 * PAGE);
        for (at, len, there) in [
            (page(4), 2 * PAGE, true),
            (page(4) + 100, PAGE, true),
            (page(5), PAGE, true),
            (page(5), PAGE + 1, false),
            (page(4) - 1, 2, false),
            (page(6), 1, false),
            (page(4), 0, false),
            (u64::MAX, 1, false),
            (u64::MAX - 100, usize::MAX, false),
        ] {
            let segment = map.segment(at, len);
            assert_eq!(
                segment.map(|it| it.len()),
                there.then_some(len),
                "{at}+{len}"
            );
        }
        let mut got = [0; 3];
        copy::read(&[map.segment(page(5), 3).unwrap()], 0, &mut got);
        assert_eq!(got, [7; 3]);
        // A write makes memory for every page that it touches.
        file.write_all_at(&[8; PAGE], page(8) + 1).unwrap();
        map.learn(page(8) + 1, PAGE);
        let both = map.segment(page(8), 2 * PAGE).unwrap();
        copy::write(&[both], 1, b"xy");
        let mut got = [0; 4];
        file.read_exact_at(&mut got, page(8)).unwrap();
        assert_eq!(got, [0, b'x', b'y', 8]);
        map.forget(page(9), 1);
        assert!(map.segment(page(8), 2 * PAGE).is_none());
        assert!(map.segment(page(8), PAGE).is_some());
        let blocks = file.metadata().unwrap().blocks();
        assert_eq!(blocks, 4 * 8, "and no page was made");
    }

    #[test]
    fn neighbours_are_known_when_all_of_them_have_memory() {
        let file = memfd(4 * WORD as u64 * PAGE as u64).unwrap();
        let map = FileMap::new(&file, 4 * WORD as u64 * PAGE as u64, true).unwrap();
        file.write_all_at(&[7; 2 * WORD * PAGE], page(WORD))
            .unwrap();
        file.write_all_at(&[7; PAGE], page(3 * WORD)).unwrap();
        for at in [WORD, 2 * WORD + 5, 3 * WORD] {
            map.learn(page(at), PAGE);
        }
        assert!(map.segment(page(3 * WORD), PAGE).is_some());
        assert!(map.segment(page(WORD) - 1, 1).is_none());
        assert!(map.segment(page(3 * WORD + 1), 1).is_none(), "a hole");
        assert!(map.segment(page(WORD), 2 * WORD * PAGE).is_some());
        let blocks = file.metadata().unwrap().blocks();
        assert_eq!(blocks, (2 * WORD as u64 + 1) * 8, "and no page was made");
    }

    #[test]
    fn nothing_is_taken_for_known_of_which_the_kernel_tells_nothing() {
        // Of root, to be read by all.
        let file = memfd(BYTES).unwrap();
        let mode = std::fs::Permissions::from_mode(0o444);
        file.set_permissions(mode).unwrap();
        file.write_all_at(&[7; PAGE], page(4)).unwrap();
        let map = FileMap::new(&file, BYTES, false).unwrap();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                // SAFETY: no memory is passed; this thread alone becomes somebody else.
                unsafe { libc::syscall(libc::SYS_setfsuid, 65534) };
                let pretends = map.cached(0..WORD) == u64::MAX;
                map.learn(page(4), PAGE);
                // SAFETY: no memory is passed.
                let is_root = unsafe { libc::geteuid() } == 0;
                assert!(
                    pretends || !is_root,
                    "the kernel has said what it should not"
                );
            });
        });
        assert!((0..16).all(|at| map.segment(page(at), PAGE).is_none()));
        let blocks = file.metadata().unwrap().blocks();
        assert_eq!(blocks, 8, "and no page was made");
    }

    #[test]
    fn a_file_that_grows_is_mapped_where_it_grew() {
        let file = memfd(BYTES).unwrap();
        let map = FileMap::new(&file, BYTES, true).unwrap();
        let end = BYTES * GROWTH as u64;
        file.set_len(end).unwrap();
        file.write_all_at(&[7; 10], end - 10).unwrap();
        map.learn(end - 10, 20);
        let last = map.segment(end - 10, 10).unwrap();
        copy::write(&[last], 0, b"0123456789");
        let mut got = [0; 10];
        file.read_exact_at(&mut got, end - 10).unwrap();
        assert_eq!(&got, b"0123456789");
        assert!(map.segment(end - 10, 11).is_none());
        map.forget(0, usize::MAX);
        assert!(map.segment(end - 10, 10).is_none());
    }

    #[test]
    fn what_is_read_only_stays_so_and_a_cut_file_is_told() {
        let file = memfd(BYTES).unwrap();
        file.write_all_at(&[7; PAGE], 0).unwrap();
        let maps = [true, false].map(|writable| FileMap::new(&file, BYTES, writable).unwrap());
        let neighbour = memfd(BYTES).unwrap();
        let other = FileMap::new(&neighbour, BYTES, true).unwrap();
        neighbour.write_all_at(&[7; PAGE], 0).unwrap();
        other.learn(0, PAGE);
        for map in &maps {
            map.learn(0, PAGE);
            assert!(map.segment(0, PAGE).is_some() && !map.is_torn());
        }
        file.set_len(0).unwrap();
        for map in &maps {
            let mut got = [1; 2];
            copy::read(&[map.segment(0, 2).unwrap()], 0, &mut got);
            assert_eq!((got, map.is_torn()), ([0; 2], true));
            assert!(map.segment(0, 2).is_none(), "the kernel is to be asked");
        }
        assert!(!other.is_torn());
        copy::write(&[other.segment(0, 2).unwrap()], 0, b"ok");
        assert!(!other.is_torn());
    }
}
