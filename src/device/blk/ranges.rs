//! DISCARD and WRITE_ZEROES: requests about ranges of the disk. VIRTIO 1.3 §5.2.6.
//!
//! A request has up to `segments_max` ranges, 16 bytes each. They are read once, checked before any
//! of them is acted on, and done one after the other.

use virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

use crate::host::blk::BlkOp;
use crate::memory::{Segment, copy};

use super::SECTOR_BYTES;
use super::request::{HEADER_BYTES, IOERR, Limits, Reject, Request, UNSUPP};
use super::slots::Slot;

/// Bytes of `struct virtio_blk_discard_write_zeroes`: sector, sectors, flags.
const ENTRY_BYTES: usize = 16;

/// Bytes of one discarded range at most, however many the medium takes: a stop waits for them.
const DISCARD_MAX: u32 = 256 << 20;

/// What a disk does with ranges that its guest gives up or wants zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeLimits {
    /// DISCARD is offered, and WRITE_ZEROES gives space back when it is told that it may.
    pub discard: bool,
    /// Zeroing may give space back too, where `discard` allows it.
    pub zero_unmaps: bool,
    /// Bytes of one discarded range at most.
    pub discard_bytes: u32,
    /// Bytes of one zeroed range at most.
    pub zero_bytes: u32,
    /// Ranges of one request at most.
    pub segments: u32,
    /// What discarded ranges should be aligned to, in bytes, to have an effect.
    pub align_bytes: u32,
}

impl RangeLimits {
    /// For a file or block device whose space is given back in units of `align_bytes`, at most
    /// `discard_max` bytes as one (0: none is, which the guest need not know). Zeroing may mean
    /// writing: less at a time, so that a stop does not wait long.
    pub fn file(align_bytes: u32, discard_max: u64) -> RangeLimits {
        let most = u64::from(DISCARD_MAX);
        let whole = discard_max - discard_max % u64::from(align_bytes.max(1));
        let told = u32::try_from(whole.min(most)).ok();
        RangeLimits {
            discard: true,
            zero_unmaps: true,
            discard_bytes: told.filter(|bytes| *bytes > 0).unwrap_or(DISCARD_MAX),
            zero_bytes: 16 << 20,
            segments: 32,
            align_bytes,
        }
    }

    /// For memory, which the worker zeroes itself: little enough that other queues do not wait.
    pub const RAM: RangeLimits = RangeLimits {
        discard: true,
        zero_unmaps: true,
        discard_bytes: 4 << 20,
        zero_bytes: 4 << 20,
        segments: 16,
        align_bytes: 4096,
    };

    /// For a disk that does nothing.
    pub const NULL: RangeLimits = RangeLimits {
        discard: true,
        zero_unmaps: true,
        discard_bytes: 1 << 30,
        zero_bytes: 1 << 30,
        segments: 32,
        align_bytes: 512,
    };
}

impl Default for RangeLimits {
    fn default() -> RangeLimits {
        RangeLimits::NULL
    }
}

/// A range of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    offset: u64,
    bytes: u32,
    unmap: bool,
}

/// The ranges of a request in flight.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// All of them. The first request of a slot makes room, once.
    pub(super) list: Vec<Range>,
    /// Index of the first that is not done, after as many of its bytes as the slot says.
    pub(super) next: usize,
}

/// Reads the ranges of a request into `ranges`, without the empty ones.
///
/// # Errors
/// [`Reject`]: UNSUPP for a flag that the request type does not have, which comes first, and IOERR
/// for anything beyond the limits.
pub(super) fn parse(
    request: Request,
    readable: &[Segment],
    limits: &Limits,
    ranges: &mut Vec<Range>,
) -> Result<(), Reject> {
    ranges.clear();
    let bytes: usize = readable.iter().map(Segment::len).sum();
    let bytes = bytes.saturating_sub(HEADER_BYTES);
    let count = bytes / ENTRY_BYTES;
    if bytes == 0 || !bytes.is_multiple_of(ENTRY_BYTES) || count > limits.ranges.segments as usize {
        return Err(IOERR);
    }
    let discard = request == Request::Discard;
    let mut outside = false;
    for index in 0..count {
        let mut entry = [0; ENTRY_BYTES];
        copy::read(readable, HEADER_BYTES + index * ENTRY_BYTES, &mut entry);
        let sector = u64::from_le_bytes(core::array::from_fn(|i| entry[i]));
        let sectors = u32::from_le_bytes(core::array::from_fn(|i| entry[8 + i]));
        let flags = u32::from_le_bytes(core::array::from_fn(|i| entry[12 + i]));
        let known = if discard {
            0
        } else {
            VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        };
        if flags & !known != 0 {
            return Err(UNSUPP);
        }
        match checked(sector, sectors, discard, limits) {
            None => outside = true,
            Some((_, 0)) => {}
            Some((offset, bytes)) => ranges.push(Range {
                offset,
                bytes,
                unmap: flags != 0 && limits.ranges.discard && limits.ranges.zero_unmaps,
            }),
        }
    }
    if outside { Err(IOERR) } else { Ok(()) }
}

/// Offset and length in bytes of a range within the limits: whole blocks, inside the disk.
fn checked(sector: u64, sectors: u32, discard: bool, limits: &Limits) -> Option<(u64, u32)> {
    let block = u64::from(limits.block_size);
    let max = if discard {
        limits.ranges.discard_bytes
    } else {
        limits.ranges.zero_bytes
    };
    let offset = sector.checked_mul(SECTOR_BYTES)?;
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    let inside = offset.checked_add(bytes)? <= limits.capacity_bytes;
    let whole = offset.is_multiple_of(block) && bytes.is_multiple_of(block);
    let bytes = u32::try_from(bytes).ok().filter(|bytes| *bytes <= max)?;
    (inside && whole).then_some((offset, bytes))
}

/// What a request about ranges needs next, and its bytes: its next range, or, when all are done, a
/// flush.
pub(super) fn next_op(slot: &Slot) -> (BlkOp<'static>, u32) {
    let Some(range) = slot.ranges.list.get(slot.ranges.next) else {
        return (BlkOp::Flush, 0);
    };
    let (offset, bytes) = (range.offset + u64::from(slot.done), range.bytes - slot.done);
    let op = if slot.request == Request::Discard {
        BlkOp::Discard { offset, bytes }
    } else {
        BlkOp::WriteZeroes {
            offset,
            bytes,
            unmap: range.unmap,
        }
    };
    (op, bytes)
}

/// Where what a request needs next ends on the disk, if it is not a flush.
pub(super) fn end_of_next(slot: &Slot) -> Option<u64> {
    let range = slot.ranges.list.get(slot.ranges.next)?;
    Some(range.offset + u64::from(range.bytes))
}

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// Everything is done.
    Done,
    /// There is more to do.
    More,
    /// The host did nothing.
    Stuck,
}

/// Notes that the host did `moved` bytes of what [`next_op`] asked for. Zeros that must be durable
/// take a flush at the end; what is discarded is not promised to be anything.
pub(super) fn advance(slot: &mut Slot, moved: u32, durable: bool) -> Progress {
    let Some(range) = slot.ranges.list.get(slot.ranges.next) else {
        return Progress::Done;
    };
    if moved == 0 {
        return Progress::Stuck;
    }
    slot.done += moved.min(range.bytes - slot.done);
    if slot.done == range.bytes {
        slot.ranges.next += 1;
        slot.done = 0;
    }
    let flush = durable && slot.request == Request::WriteZeroes;
    if slot.ranges.next < slot.ranges.list.len() || flush {
        Progress::More
    } else {
        Progress::Done
    }
}

/// Bytes of all ranges.
pub(super) fn bytes(ranges: &[Range]) -> u64 {
    ranges.iter().map(|range| u64::from(range.bytes)).sum()
}
