//! The forms of a frame at the ports of a switch: as it came, with a tag, without.

use crate::memory::{Segments, copy};

use super::super::net::{DropReason, Frame, VnetHeader};
use super::super::offload::{HEADERS_MAX, NEEDS_CSUM, segment_headers};
use super::{ADDRESSES, ETHERNET, TAG, Ways, put_front};

/// The forms of one frame, made when a port asks for them.
pub(super) struct Forms {
    pub(super) vlan: u16,
    /// As it came in.
    pub(super) same: Frame,
    /// VLAN number of the tag that it came with (0: a priority only).
    pub(super) tag: Option<u16>,
    pub(super) priority: u16,
    /// Without its first tag it would be of the VLAN of its second.
    pub(super) keeps_tag: bool,
    /// Bytes of the headers of each segment, where it is still to be segmented and its segments
    /// may be what a port can take; see [`measure`].
    pub(super) headers: Option<usize>,
    /// Without a tag, and with one.
    pub(super) made: [Option<Frame>; 2],
}

impl Forms {
    /// The frame with a tag, or without.
    ///
    /// # Errors
    /// [`DropReason::BadVnetHeader`] when its checksum can't go along, [`DropReason::TooBig`] when
    /// there is no room to list it anew.
    #[inline]
    pub(super) fn get(
        &mut self,
        tagged: bool,
        segments: &mut Segments,
        ways: &mut Ways,
    ) -> Result<Frame, DropReason> {
        let as_it_came = match self.tag {
            None => !tagged,
            // A priority alone is not the tag that a trunk wants to see.
            Some(0) => false,
            Some(_) => tagged,
        };
        if as_it_came {
            return Ok(self.same);
        }
        if let Some(made) = self.made[usize::from(tagged)] {
            return Ok(made);
        }
        let frame = self.make(tagged, segments, ways)?;
        self.made[usize::from(tagged)] = Some(frame);
        Ok(frame)
    }

    /// Bytes of the longest packet that comes of it, without Ethernet header and first tag. What is
    /// still to be segmented counts by its segments if their headers are known, or else whole.
    #[inline]
    pub(super) fn packet_bytes(&self) -> usize {
        let frame = &self.same;
        let own = if self.tag.is_some() { TAG } else { 0 };
        let longest = match self.headers {
            Some(headers) => headers + usize::from(frame.header.gso_size),
            None => usize::MAX,
        };
        longest.min(frame.bytes as usize) - ETHERNET - own
    }

    /// Takes the tag out, if there is one, and puts one in, if there is to be one.
    #[cold]
    fn make(
        &self,
        tagged: bool,
        segments: &mut Segments,
        ways: &mut Ways,
    ) -> Result<Frame, DropReason> {
        let taken = if self.tag.is_some() { TAG } else { 0 };
        let put = if tagged { TAG } else { 0 };
        let mut frame = self.same;
        frame.header = moved(&frame.header, taken, put).ok_or(DropReason::BadVnetHeader)?;
        let bytes = frame.bytes as usize + put - taken;
        frame.bytes = u32::try_from(bytes).map_err(|_| DropReason::TooBig)?;
        let (first, count) = self
            .list(tagged, taken, segments, ways)
            .ok_or(DropReason::TooBig)?;
        (frame.first, frame.count) = (first, count);
        Ok(frame)
    }

    /// Lists the frame anew, with a tag of its VLAN or none instead of the `taken` bytes of its
    /// own. Returns where its segments begin, and how many they are.
    fn list(
        &self,
        tagged: bool,
        taken: usize,
        segments: &mut Segments,
        ways: &mut Ways,
    ) -> Option<(u32, u32)> {
        let first = self.same.first as usize;
        let payload = first..first + self.same.count as usize;
        let start = segments.len();
        add_range(segments, payload.clone(), 0, ADDRESSES)?;
        if tagged {
            let tag = ways.tag(self.vlan | self.priority)?;
            segments.push(tag).then_some(())?;
        }
        add_range(segments, payload, ADDRESSES + taken, usize::MAX)?;
        let count = u32::try_from(segments.len() - start).ok()?;
        Some((u32::try_from(start).ok()?, count))
    }
}

/// Finds the headers of the segments that `frame` is to become, and puts them, as they were looked
/// at, in the place of what the sender may still change. Returns their length; `None` where header
/// and frame don't say what the segments are.
#[inline(never)]
pub(super) fn measure(
    frame: &mut Frame,
    index: usize,
    segments: &mut Segments,
    ways: &mut Ways,
) -> Option<usize> {
    let mut head = [0; HEADERS_MAX];
    let looked_at = copy::read(frame.payload(segments), 0, &mut head);
    let head = &head[..looked_at];
    let headers = segment_headers(&frame.header, head, frame.bytes as usize).ok()?;
    let place = ways.head(index).take(headers);
    copy::write(&[place], 0, &head[..headers]);
    put_front(frame, place, segments)?;
    Some(headers)
}

/// The header of a frame from which `taken` bytes went behind the addresses, and into which `put`
/// bytes came there. `None` when the checksum that it asks for would begin beyond what the header
/// can say: it could end behind the frame then.
fn moved(header: &VnetHeader, taken: usize, put: usize) -> Option<VnetHeader> {
    let mut moved = *header;
    if header.flags & NEEDS_CSUM != 0 {
        let start = (usize::from(header.csum_start) + put).checked_sub(taken)?;
        moved.csum_start = u16::try_from(start).ok()?;
    }
    // A hint, and 0 when there is none.
    if header.hdr_len > 0 {
        let hint = (usize::from(header.hdr_len) + put).saturating_sub(taken);
        moved.hdr_len = u16::try_from(hint).unwrap_or(u16::MAX);
    }
    Some(moved)
}

/// Appends bytes `from..to` of the piece of `segments` at `range`.
pub(super) fn add_range(
    segments: &mut Segments,
    range: core::ops::Range<usize>,
    from: usize,
    to: usize,
) -> Option<()> {
    let mut at = 0;
    for index in range {
        let segment = segments.as_slice()[index];
        let (start, end) = (at, at + segment.len());
        at = end;
        if end <= from || start >= to {
            continue;
        }
        let piece = segment.skip(from.saturating_sub(start));
        let piece = piece.take(end.min(to) - start.max(from));
        segments.push(piece).then_some(())?;
    }
    Some(())
}
