//! Checksums and segmentation in software, for a receiver that did not negotiate what a frame asks
//! for.
//!
//! [`Offload::plan`] copies the headers, parses the copy and says how many frames there will be;
//! once the receiver has buffers for all, [`Offload::fetch`] copies the rest, and each frame is
//! then made by [`Offload::piece`]. Every byte that is parsed or summed is read from the sender's
//! memory once: what a sender changes meanwhile changes nothing but its own payload.
//! VIRTIO 1.3 §5.1.6.2.

use crate::memory::{Segments, copy};

use super::net::{DropReason, Frame, VnetHeader};

mod packet;
mod sum;

use packet::{Layout, Transport};
use sum::Sum;

/// Bytes of headers that are looked at: Ethernet, two tags, IPv6 with some options, TCP with all.
pub(super) const HEADERS_MAX: usize = 256;
/// Bytes of the longest frame: an IP packet of 65,535 bytes, Ethernet header and tags.
const FRAME_MAX: usize = (1 << 16) + 32;

/// Frames that are made of larger ones for one receiver in a turn, after which the rest waits: a
/// sender that wants them tiny costs the others on its worker little more. A queue of an interface
/// has as many chunks to send in.
pub(crate) const PIECES_MAX: usize = 2048;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM.
pub(super) const NEEDS_CSUM: u8 = 1;
/// VIRTIO_NET_HDR_GSO_NONE, _TCPV4, _TCPV6, _UDP_L4 and _ECN.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// TCP flags, in the second half of the word that holds the header's length.
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// What is to be done with the frame at hand.
#[derive(Debug, Clone, Copy)]
enum Plan {
    /// A checksum over everything from `start` on, stored at `at`.
    Csum { start: usize, at: usize },
    /// Segments with so many bytes of payload.
    Segments { layout: Layout, size: usize },
}

/// The work of one receive queue, one frame at a time. Made when the queue starts.
#[derive(Debug)]
pub struct Offload {
    /// A copy of the frame: its headers after `plan`, all of it after `fetch`.
    bytes: Box<[u8]>,
    /// Bytes of the frame.
    len: usize,
    plan: Plan,
    /// The headers of one segment.
    headers: [u8; HEADERS_MAX],
}

impl Offload {
    /// Room for one frame.
    pub fn new() -> Offload {
        Offload {
            bytes: vec![0; FRAME_MAX].into_boxed_slice(),
            len: 0,
            plan: Plan::Csum { start: 0, at: 0 },
            headers: [0; HEADERS_MAX],
        }
    }

    /// Looks at `frame`, whose header asks for something. What it asks for is not done yet.
    ///
    /// # Errors
    /// [`DropReason::NoOffload`] when we can't do it, [`DropReason::BadVnetHeader`] when header and
    /// frame contradict each other, [`DropReason::TooBig`] when nothing can hold the frame.
    #[cold]
    pub fn plan(&mut self, frame: &Frame, segments: &Segments) -> Result<(), DropReason> {
        self.len = frame.bytes as usize;
        if self.len > FRAME_MAX {
            return Err(DropReason::TooBig);
        }
        let header = &frame.header;
        let start = usize::from(header.csum_start);
        let at = start + usize::from(header.csum_offset);
        if header.flags & NEEDS_CSUM == 0 || at + 2 > self.len {
            return Err(DropReason::BadVnetHeader);
        }
        if header.gso_type == GSO_NONE {
            self.plan = Plan::Csum { start, at };
            return Ok(());
        }
        let looked_at = self.len.min(HEADERS_MAX);
        let head = &mut self.bytes[..looked_at];
        if copy::read(frame.payload(segments), 0, head) != looked_at {
            return Err(DropReason::BadVnetHeader);
        }
        self.plan = plan_segments(header, head, self.len)?;
        Ok(())
    }

    /// Copies what `plan` left, and completes what is one for all frames; whether all of it was
    /// there.
    #[cold]
    pub fn fetch(&mut self, frame: &Frame, segments: &Segments) -> bool {
        let have = match self.plan {
            Plan::Csum { .. } => 0,
            Plan::Segments { layout, .. } => layout.payload,
        };
        let rest = &mut self.bytes[have..self.len];
        if copy::read(frame.payload(segments), have, rest) != rest.len() {
            return false;
        }
        if let Plan::Csum { start, at } = self.plan {
            // The sum of the pseudo-header stands where the checksum will: it is summed too.
            let sum = Sum::of(&self.bytes[start..self.len]).checksum();
            // Zero means "no checksum" to UDP, and the other zero is as good for all.
            put16(&mut self.bytes, at, if sum == 0 { u16::MAX } else { sum });
        }
        true
    }

    /// How many frames it becomes.
    pub fn pieces(&self) -> usize {
        match self.plan {
            Plan::Csum { .. } => 1,
            // One even of nothing: the headers are a packet of their own.
            Plan::Segments { layout, size } => (self.len - layout.payload).div_ceil(size).max(1),
        }
    }

    /// Whether it becomes segments.
    pub fn is_segmented(&self) -> bool {
        matches!(self.plan, Plan::Segments { .. })
    }

    /// Bytes of frame `index`.
    pub fn piece_bytes(&self, index: usize) -> usize {
        match self.plan {
            Plan::Csum { .. } => self.len,
            Plan::Segments { layout, .. } => layout.payload + self.payload(index).len(),
        }
    }

    /// Where the checksum of segments begins and where it stands, from there on, if an interface
    /// that looks at their headers itself finds it.
    pub fn usual_csum(&self) -> Option<(u16, u16)> {
        match self.plan {
            Plan::Segments { layout, .. } if layout.is_usual() => {
                let offset = layout.checksum() - layout.l4;
                Some((low16(layout.l4), low16(offset)))
            }
            _ => None,
        }
    }

    /// Makes frame `index`: its headers, and what follows them.
    #[cold]
    pub fn piece(&mut self, index: usize) -> (&[u8], &[u8]) {
        self.make(index, false)
    }

    /// The same without the checksum of a segment: where it will be stands the sum of its
    /// pseudo-header.
    #[cold]
    pub fn piece_undone(&mut self, index: usize) -> (&[u8], &[u8]) {
        self.make(index, true)
    }

    fn make(&mut self, index: usize, undone: bool) -> (&[u8], &[u8]) {
        let payload = self.payload(index);
        let Plan::Segments { layout, size } = self.plan else {
            return (&[], &self.bytes[payload]);
        };
        let head = &mut self.headers[..layout.payload];
        head.copy_from_slice(&self.bytes[..layout.payload]);
        let last = payload.end == self.len;
        let payload = &self.bytes[payload];
        complete_segment(head, &layout, (index, index * size, last), payload.len());
        finish_csum(head, &layout, payload, undone);
        (&self.headers[..layout.payload], payload)
    }

    /// Where the payload of frame `index` is.
    fn payload(&self, index: usize) -> core::ops::Range<usize> {
        match self.plan {
            Plan::Csum { .. } => 0..self.len,
            Plan::Segments { layout, size } => {
                let start = (layout.payload + index * size).min(self.len);
                start..(start + size).min(self.len)
            }
        }
    }
}

impl Default for Offload {
    fn default() -> Offload {
        Offload::new()
    }
}

/// Bytes of the headers that each segment of a frame of `len` bytes has, which begins with `head`,
/// up to [`HEADERS_MAX`] bytes of it.
///
/// # Errors
/// As [`Offload::plan`].
pub(super) fn segment_headers(
    header: &VnetHeader,
    head: &[u8],
    len: usize,
) -> Result<usize, DropReason> {
    layout_of_segments(header, head, len).map(|layout| layout.payload)
}

/// Whether an interface that looks at headers itself finds the checksum that `header` tells of, in
/// a frame of `len` bytes that begins with `head`, up to [`HEADERS_MAX`] bytes of it.
pub(super) fn has_usual_csum(header: &VnetHeader, head: &[u8], len: usize) -> bool {
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    Layout::parse(head, len)
        .is_ok_and(|layout| layout.is_usual() && layout.l4 == start && layout.checksum() == at)
}

/// How a frame of `len` bytes that begins with `head` is cut.
fn plan_segments(header: &VnetHeader, head: &[u8], len: usize) -> Result<Plan, DropReason> {
    let layout = layout_of_segments(header, head, len)?;
    // A connection is not opened by a segment that can be cut: SYN has a sequence number.
    if layout.transport == Transport::Tcp && head[layout.l4 + 13] & SYN != 0 {
        return Err(DropReason::NoOffload);
    }
    Ok(Plan::Segments {
        layout,
        size: usize::from(header.gso_size),
    })
}

/// Where the headers of its segments are, if `header` says the same as they do.
fn layout_of_segments(header: &VnetHeader, head: &[u8], len: usize) -> Result<Layout, DropReason> {
    let (transport, v6) = match header.gso_type & !GSO_ECN {
        GSO_TCPV4 => (Transport::Tcp, Some(false)),
        GSO_TCPV6 => (Transport::Tcp, Some(true)),
        GSO_UDP_L4 => (Transport::Udp, None),
        _ => return Err(DropReason::NoOffload),
    };
    let layout = Layout::parse(head, len)?;
    let csum = usize::from(header.csum_start) + usize::from(header.csum_offset);
    let agrees = layout.transport == transport
        && v6.is_none_or(|v6| v6 == layout.is_v6)
        && usize::from(header.csum_start) == layout.l4
        && csum == layout.checksum();
    // A packet can't tell a length beyond 16 bits.
    if !agrees || header.gso_size == 0 || len - layout.l3 > usize::from(u16::MAX) {
        return Err(DropReason::BadVnetHeader);
    }
    Ok(layout)
}

/// Turns the headers of the whole into those of one segment: its number, its place in the payload,
/// whether it is the last.
fn complete_segment(
    head: &mut [u8],
    layout: &Layout,
    (index, at, last): (usize, usize, bool),
    payload: usize,
) {
    let (l3, l4) = (layout.l3, layout.l4);
    let l4_bytes = low16(head.len() - l4 + payload);
    if layout.is_v6 {
        put16(head, l3 + 4, l4_bytes.wrapping_add(low16(l4 - l3 - 40)));
    } else {
        put16(head, l3 + 2, l4_bytes.wrapping_add(low16(l4 - l3)));
        let id = get16(head, l3 + 4).wrapping_add(low16(index));
        put16(head, l3 + 4, id);
        put16(head, l3 + 10, 0);
        let sum = Sum::of(&head[l3..l4]).checksum();
        put16(head, l3 + 10, sum);
    }
    match layout.transport {
        Transport::Tcp => {
            let first = index == 0;
            let place = &mut head[l4 + 4..l4 + 8];
            let seq = u32::from_be_bytes([place[0], place[1], place[2], place[3]]);
            // At most 64 KiB further.
            #[expect(clippy::cast_possible_truncation, reason = "within one frame")]
            place.copy_from_slice(&seq.wrapping_add(at as u32).to_be_bytes());
            // Congestion is answered once (RFC 3168, section 6.1.2), and only the last one ends.
            let gone = if first { 0 } else { CWR } | if last { 0 } else { FIN | PSH };
            head[l4 + 13] &= !gone;
        }
        Transport::Udp => put16(head, l4 + 4, l4_bytes),
    }
}

/// Makes the checksum of a segment, or what of it is made where the rest is left `undone`.
fn finish_csum(head: &mut [u8], layout: &Layout, payload: &[u8], undone: bool) {
    let l4_bytes = low16(head.len() - layout.l4 + payload.len());
    put16(head, layout.checksum(), 0);
    let mut sum = Sum::of(&head[layout.addresses()]);
    sum.add(&[0, layout.transport as u8]);
    sum.add(&l4_bytes.to_be_bytes());
    if undone {
        put16(head, layout.checksum(), !sum.checksum());
        return;
    }
    sum.add(&head[layout.l4..]);
    sum.add(payload);
    let sum = match (layout.transport, sum.checksum()) {
        // RFC 768: zero is sent as all ones.
        (Transport::Udp, 0) => u16::MAX,
        (_, sum) => sum,
    };
    put16(head, layout.checksum(), sum);
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// A length within one IP packet.
#[expect(
    clippy::cast_possible_truncation,
    reason = "plan_segments bounds the packet"
)]
fn low16(value: usize) -> u16 {
    value as u16
}

#[cfg(test)]
mod tests;
