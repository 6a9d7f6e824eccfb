//! Memory that is shared with the kernel: the frames of a socket, and its four rings.
//!
//! Each ring has one producer and one consumer, of which we are one and the kernel is the other.
//! Indices run freely and are cut by a mask, so that none can lead out of the mapping, whatever
//! the other side writes. Linux: Documentation/networking/af_xdp.rst.

use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::memory::Segment;

/// A mapping that is removed at the end.
#[derive(Debug)]
struct Mapping {
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a mapping is an address and a length; whoever accesses it says how.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(
        bytes: usize,
        flags: libc::c_int,
        fd: Option<BorrowedFd<'_>>,
        offset: libc::off_t,
    ) -> io::Result<Mapping> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = fd.map_or(-1, |fd| fd.as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses.
        let at = unsafe { libc::mmap(core::ptr::null_mut(), bytes, protection, flags, fd, offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Mapping { at, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody but the owner knows the mapping, and its segments die with it.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.bytes) };
    }
}

/// The frames of a socket, which the kernel reads and writes.
#[derive(Debug)]
pub(super) struct Umem {
    map: Mapping,
    huge: bool,
}

impl Umem {
    /// `bytes` bytes, a multiple of 2 MiB, in huge pages where there are enough of them.
    pub(super) fn new(bytes: usize) -> io::Result<Umem> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let two_mib = libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        if let Ok(map) = Mapping::new(bytes, flags | two_mib, None, 0) {
            return Ok(Umem { map, huge: true });
        }
        let map = Mapping::new(bytes, flags, None, 0)?;
        Ok(Umem { map, huge: false })
    }

    /// Whether it is in huge pages.
    pub(super) fn is_huge(&self) -> bool {
        self.huge
    }

    /// Where it is, for the kernel.
    pub(super) fn address(&self) -> u64 {
        self.map.at.as_ptr().expose_provenance() as u64
    }

    pub(super) fn bytes(&self) -> usize {
        self.map.bytes
    }

    /// `len` bytes from `offset` on, cut where the memory ends; valid as long as it.
    #[inline]
    pub(super) fn segment(&self, offset: u64, len: u32) -> Segment {
        let offset = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(self.map.bytes);
        let len = (len as usize).min(self.map.bytes - offset);
        Segment::new(self.map.at.as_ptr().wrapping_add(offset), len)
    }
}

/// A ring with entries of type `T`.
#[derive(Debug)]
struct Ring<T> {
    map: Mapping,
    /// Where producer, consumer and flags are, and the first entry.
    at: libc::xdp_ring_offset,
    /// Entries less one; their number is a power of two.
    mask: u32,
    entries: PhantomData<T>,
}

impl<T: Copy> Ring<T> {
    /// Maps a ring of `socket` with `entries` entries.
    fn map(
        socket: BorrowedFd<'_>,
        page: libc::off_t,
        at: libc::xdp_ring_offset,
        entries: u32,
    ) -> io::Result<Ring<T>> {
        let bytes =
            usize::try_from(at.desc).map_err(io::Error::other)? + entries as usize * size_of::<T>();
        let aligned = [at.producer, at.consumer, at.flags]
            .iter()
            .all(|word| word.is_multiple_of(4) && *word < at.desc);
        if !entries.is_power_of_two() || !aligned || !at.desc.is_multiple_of(8) {
            return Err(io::Error::other("the kernel describes an impossible ring"));
        }
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        Ok(Ring {
            map: Mapping::new(bytes, flags, Some(socket), page)?,
            at,
            mask: entries - 1,
            entries: PhantomData,
        })
    }

    #[inline]
    fn word(&self, offset: u64) -> &AtomicU32 {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "less than the mapping's size"
        )]
        let at = self.map.at.as_ptr().wrapping_add(offset as usize);
        // SAFETY: one of the three words that `map` found aligned and inside the mapping, which
        // lives as long as the ring; the kernel, too, accesses them as single words.
        unsafe { AtomicU32::from_ptr(at.cast()) }
    }

    #[inline]
    fn producer(&self) -> &AtomicU32 {
        self.word(self.at.producer)
    }

    #[inline]
    fn consumer(&self) -> &AtomicU32 {
        self.word(self.at.consumer)
    }

    #[inline]
    fn entry(&self, index: u32) -> *mut T {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "less than the mapping's size"
        )]
        let first = self.map.at.as_ptr().wrapping_add(self.at.desc as usize);
        first.cast::<T>().wrapping_add((index & self.mask) as usize)
    }

    fn wants_wakeup(&self) -> bool {
        self.word(self.at.flags).load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// A ring that we fill: the fill ring and the TX ring. It has more entries than there are frames to
/// be put in it, so that it is never full.
#[derive(Debug)]
pub(super) struct Producer<T> {
    ring: Ring<T>,
    /// Where the next entry goes.
    next: u32,
}

impl<T: Copy> Producer<T> {
    pub(super) fn map(
        socket: BorrowedFd<'_>,
        page: libc::off_t,
        at: libc::xdp_ring_offset,
        entries: u32,
    ) -> io::Result<Producer<T>> {
        Ok(Producer {
            ring: Ring::map(socket, page, at, entries)?,
            next: 0,
        })
    }

    /// Writes the next entry; there is room for it. Nobody sees it before `publish`.
    #[inline]
    pub(super) fn push(&mut self, value: T) {
        // SAFETY: the entry lies in the mapping, and it is ours until it is published.
        unsafe { self.ring.entry(self.next).write(value) };
        self.next = self.next.wrapping_add(1);
    }

    /// Lets the kernel see what was pushed.
    #[inline]
    pub(super) fn publish(&mut self) {
        // Release: the entries, and the frames that they point at, are written.
        self.ring.producer().store(self.next, Ordering::Release);
    }

    /// Entries that the kernel has not taken.
    #[inline]
    pub(super) fn waiting(&self) -> u32 {
        let consumed = self.ring.consumer().load(Ordering::Relaxed);
        self.next.wrapping_sub(consumed)
    }

    /// Whether the kernel goes on only after a system call.
    #[inline]
    pub(super) fn wants_wakeup(&self) -> bool {
        self.ring.wants_wakeup()
    }
}

/// A ring that we empty: the completion ring and the RX ring.
#[derive(Debug)]
pub(super) struct Consumer<T> {
    ring: Ring<T>,
    /// Where the next entry is.
    next: u32,
    /// The producer's index as it was last seen.
    produced: u32,
}

impl<T: Copy> Consumer<T> {
    pub(super) fn map(
        socket: BorrowedFd<'_>,
        page: libc::off_t,
        at: libc::xdp_ring_offset,
        entries: u32,
    ) -> io::Result<Consumer<T>> {
        Ok(Consumer {
            ring: Ring::map(socket, page, at, entries)?,
            next: 0,
            produced: 0,
        })
    }

    /// Entries that are there, at most as many as the ring has. Looks at the producer again when
    /// that seems to be less than `want`.
    #[inline]
    pub(super) fn available(&mut self, want: u32) -> u32 {
        let entries = self.ring.mask + 1;
        let there = self.produced.wrapping_sub(self.next);
        if there >= want {
            return there.min(entries);
        }
        // Acquire: the entries, and the frames that they point at, are written.
        self.produced = self.ring.producer().load(Ordering::Acquire);
        self.produced.wrapping_sub(self.next).min(entries)
    }

    /// Entry `index` of those that are available.
    #[inline]
    pub(super) fn peek(&self, index: u32) -> T {
        // SAFETY: the entry lies in the mapping. `T` is made of integers, so that any bytes are
        // one; the kernel does not write it before it is released.
        unsafe { self.ring.entry(self.next.wrapping_add(index)).read() }
    }

    /// Gives the first `count` available entries back.
    #[inline]
    pub(super) fn release(&mut self, count: u32) {
        self.next = self.next.wrapping_add(count);
        // Release: they have been read.
        self.ring.consumer().store(self.next, Ordering::Release);
    }
}
