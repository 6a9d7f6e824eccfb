//! Answers and data, as segments.

use crate::memory::{Segment, copy};
use crate::ring::{Chain, ChainQueue};

use super::request::Request;
use super::slots::Slot;

/// What the host gets of a request at a time.
const PIECE_BYTES: u32 = 2 << 20;

/// Answers a chain that needs no host: `told` bytes were written from its start.
pub(super) fn answer_at_once<Q: ChainQueue>(
    vq: &mut Q,
    chain: Chain,
    writable: &[Segment],
    status: u8,
    told: usize,
) {
    let data = chain.writable_bytes as usize - 1;
    let written = match told {
        // Nothing is missing before the status byte, or it is made up for.
        told if told == data => chain.writable_bytes,
        0 => blank(writable).min(chain.writable_bytes),
        told => u32::try_from(told).unwrap_or(u32::MAX),
    };
    copy::write(&[last_byte(writable)], 0, &[status]);
    vq.put_used(chain.id, written, writable);
}

/// Writes zeros to data that will never come, and returns the used length with the status byte
/// behind it. `used.len` counts bytes written without a gap (VIRTIO 1.3 §2.7.8.2), and drivers
/// expect the status byte among them. A request of a size that no driver makes is not worth the
/// time: its length is 0.
pub(super) fn blank(data: &[Segment]) -> u32 {
    const WORTH_BYTES: usize = 2 << 20;
    let bytes: usize = data.iter().map(Segment::len).sum();
    if bytes > WORTH_BYTES {
        return 0;
    }
    copy::zero(data, 0, bytes);
    u32::try_from(bytes + 1).unwrap_or(0)
}

/// Puts `bytes` bytes of `from`, from `skip` on, into the slot's list.
pub(super) fn cut(slot: &mut Slot, from: &[Segment], mut skip: usize, mut bytes: usize) {
    for segment in from {
        let here = segment.skip(skip);
        skip -= segment.len() - here.len();
        let here = here.take(bytes);
        bytes -= here.len();
        if !here.is_empty() {
            slot.segments.push(here);
        }
    }
}

/// The last byte of `segments`, which have at least one.
pub(super) fn last_byte(segments: &[Segment]) -> Segment {
    let last = segments.iter().rev().find(|segment| !segment.is_empty());
    last.map_or(Segment::EMPTY, |segment| segment.skip(segment.len() - 1))
}

/// The segments that the request in `slot`, of `wanted` bytes, goes on with, and their bytes.
#[inline]
pub(super) fn next_piece(slot: &mut Slot, wanted: u32) -> (&[Segment], u32) {
    let (rest, end) = (wanted - slot.done, slot.segments.len() - 1);
    if rest <= PIECE_BYTES {
        return (&slot.segments[slot.next..end], rest);
    }
    let end = cut_after(slot, PIECE_BYTES as usize);
    (&slot.segments[slot.next..end], PIECE_BYTES)
}

/// Sees to it that a segment ends `bytes` after the slot's place in its data; returns the index of
/// the one behind it.
#[inline]
pub(super) fn cut_after(slot: &mut Slot, mut bytes: usize) -> usize {
    let mut at = slot.next;
    while bytes > 0 {
        let segment = slot.segments[at];
        if bytes < segment.len() {
            slot.segments[at] = segment.skip(bytes);
            slot.segments.insert(at, segment.take(bytes));
        }
        bytes -= bytes.min(segment.len());
        at += 1;
    }
    at
}

/// Whether the host did less of the request in `slot` than it was asked for, when it did `moved`
/// bytes, which the slot knows of.
pub(super) fn is_short(slot: &Slot, moved: u32) -> bool {
    match slot.request {
        Request::In { bytes, .. } | Request::Out { bytes, .. } => {
            let rest = bytes - slot.done.saturating_sub(moved);
            moved < rest.min(PIECE_BYTES)
        }
        _ => false,
    }
}
