//! Frames by reference: what travels from a [`FrameSource`] to a [`FrameSink`].
//!
//! A [`Frame`] is the virtio-net header by value and a range of segments in the burst's list: no
//! payload is touched before the sink copies it, once. A link does `receive` → `transmit` →
//! `complete` → `flush`, in this order: what the source's driver gets back becomes visible before
//! what the sink's driver receives, because a driver that has both may need the first to answer the
//! second.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use crate::memory::{SEGMENTS_MAX, Segment, Segments, copy};

/// Frames in a burst at most.
pub const BURST_FRAMES_MAX: usize = 256;

/// Bytes in a burst, but for its last frame: the other guests of a worker wait while they are
/// copied, some 0.1 ms; at a switch as often as there are ports that a frame is for.
pub const BURST_BYTES_MAX: usize = 1 << 20;

/// The virtio-net header (VIRTIO 1.3 §5.1.6), decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// VIRTIO_NET_HDR_F_* bits.
    pub flags: u8,
    /// VIRTIO_NET_HDR_GSO_* value.
    pub gso_type: u8,
    /// Length of the headers to replicate, a hint.
    pub hdr_len: u16,
    /// Bytes of payload per segment.
    pub gso_size: u16,
    /// Where checksumming starts.
    pub csum_start: u16,
    /// Where the checksum is stored, from `csum_start`.
    pub csum_offset: u16,
    /// RX buffers that the frame takes; 1 except in received mergeable frames.
    pub num_buffers: u16,
}

impl VnetHeader {
    /// The header of a frame that asks nothing of its receiver.
    pub const PLAIN: VnetHeader = VnetHeader {
        flags: 0,
        gso_type: 0,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
        num_buffers: 0,
    };

    /// Bytes of the header with VIRTIO_F_VERSION_1 or VIRTIO_NET_F_MRG_RXBUF.
    pub const BYTES: usize = 12;
    /// Bytes of the header of a legacy driver that did not negotiate mergeable buffers: there is no
    /// `num_buffers`.
    pub const LEGACY_BYTES: usize = 10;

    /// The header in its bytes.
    #[inline]
    pub fn decode(bytes: &[u8; VnetHeader::BYTES]) -> VnetHeader {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        VnetHeader {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    /// The bytes of the header.
    #[inline]
    pub fn encode(&self) -> [u8; VnetHeader::BYTES] {
        let (low, high) = self.words();
        let mut bytes = [0; VnetHeader::BYTES];
        bytes[..8].copy_from_slice(&low.to_le_bytes());
        bytes[8..].copy_from_slice(&high.to_le_bytes());
        bytes
    }

    /// The bytes of the header as two words, to be stored little-endian. Made in registers: bytes
    /// written one by one and read back as words would wait for every store before them.
    #[inline]
    pub fn words(&self) -> (u64, u32) {
        let low = u64::from(self.flags)
            | u64::from(self.gso_type) << 8
            | u64::from(self.hdr_len) << 16
            | u64::from(self.gso_size) << 32
            | u64::from(self.csum_start) << 48;
        let high = u32::from(self.csum_offset) | u32::from(self.num_buffers) << 16;
        (low, high)
    }
}

/// Bytes of the header before each frame of a driver that acknowledged `features`: `num_buffers` is
/// there with VERSION_1 or MRG_RXBUF only (VIRTIO 1.3 §5.1.6.1).
pub fn vnet_header_bytes(features: u64) -> usize {
    if features & (1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF) != 0 {
        VnetHeader::BYTES
    } else {
        VnetHeader::LEGACY_BYTES
    }
}

/// Why a frame was dropped. Every drop is counted under its reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DropReason {
    /// The receiver's buffer is smaller than the frame, and it did not negotiate mergeable buffers.
    RxTooSmall,
    /// The frame needs more buffers than the receiver's ring can ever hold.
    RxRingTooSmall,
    /// The receiver did not negotiate the offload that the frame asks for, and we can't do it.
    NoOffload,
    /// The sender's virtio-net header contradicts itself or the frame.
    BadVnetHeader,
    /// The sender's chain is shorter than the header, or has device-writable buffers.
    BadChain,
    /// The frame is longer than anything can take.
    TooBig,
    /// The host interface refused the frame: its queue is full.
    HostFull,
    /// The host interface failed or is down.
    HostError,
    /// The link is a sink: dropping is its purpose.
    Sink,
    /// The receiver's ring is broken.
    PeerBroken,
    /// The receiver had no buffers for as long as a frame may wait.
    PeerFull,
    /// Nobody receives at the other port.
    PeerDown,
    /// The frame is shorter than an Ethernet header.
    BadFrame,
    /// The port may not send, or not receive, in the frame's VLAN.
    Vlan,
    /// The sender's address is not among those of its port.
    Spoofed,
    /// The port has sent its share of frames for all.
    Storm,
    /// Both ports are isolated.
    Isolated,
    /// The packet is longer than the MTU of the port.
    Mtu,
    /// The port has sent or received as much as it may.
    Policed,
    /// A switch has no port for it: its station is where it came from, or nobody else is in its
    /// VLAN.
    NoPort,
    /// Its sender's vring is disabled, and has been for a while.
    Disabled,
}

impl DropReason {
    /// Number of reasons.
    pub const COUNT: usize = 21;

    /// All reasons with the names of their counters.
    pub const NAMES: [(DropReason, &'static str); DropReason::COUNT] = [
        (DropReason::RxTooSmall, "drop_rx_too_small"),
        (DropReason::RxRingTooSmall, "drop_rx_ring_too_small"),
        (DropReason::NoOffload, "drop_no_offload"),
        (DropReason::BadVnetHeader, "drop_bad_vnet_header"),
        (DropReason::BadChain, "drop_bad_chain"),
        (DropReason::TooBig, "drop_too_big"),
        (DropReason::HostFull, "drop_host_full"),
        (DropReason::HostError, "drop_host_error"),
        (DropReason::Sink, "drop_sink"),
        (DropReason::PeerBroken, "drop_peer_broken"),
        (DropReason::PeerFull, "drop_peer_full"),
        (DropReason::PeerDown, "drop_peer_down"),
        (DropReason::BadFrame, "drop_bad_frame"),
        (DropReason::Vlan, "drop_vlan"),
        (DropReason::Spoofed, "drop_spoofed"),
        (DropReason::Storm, "drop_storm"),
        (DropReason::Isolated, "drop_isolated"),
        (DropReason::Mtu, "drop_mtu"),
        (DropReason::Policed, "drop_policed"),
        (DropReason::NoPort, "drop_no_port"),
        (DropReason::Disabled, "drop_disabled"),
    ];
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not decided: the sink has no room now. No frame overtakes one that is left so: what comes
    /// after it is not sent, and all of that goes back to the source, which offers it again; even a
    /// frame among it that is dropped already ([`decided`]).
    Retry,
    /// Delivered.
    Sent,
    /// Dropped.
    Dropped(DropReason),
}

/// How many frames at the front of a burst are decided, once a sink had them. The others come
/// again.
#[inline]
pub fn decided(frames: &[Frame]) -> usize {
    match frames.last() {
        // Nothing waits, or this one would have to: as a rule that is all there is to look at.
        Some(last) if last.verdict == Verdict::Sent => frames.len(),
        _ => {
            let mut each = frames.iter();
            let waits = each.position(|frame| frame.verdict == Verdict::Retry);
            waits.unwrap_or(frames.len())
        }
    }
}

/// Who a frame is for, by the address that it begins with.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Cast {
    /// One station; also what nobody has looked at yet.
    #[default]
    Unicast,
    /// A group.
    Multicast,
    /// All.
    Broadcast,
}

impl Cast {
    /// Of a frame that begins with `payload`.
    #[inline(always)]
    pub fn of(payload: &[Segment]) -> Cast {
        match payload.first().and_then(copy::first_word) {
            Some(word) => Cast::of_word(word),
            None => Cast::of_pieces(payload),
        }
    }

    /// Of a frame that begins with the eight bytes of `word`, the first of them the lowest.
    #[inline(always)]
    pub fn of_word(word: u64) -> Cast {
        if word & 1 == 0 {
            return Cast::Unicast;
        }
        let all = (1 << 48) - 1;
        if word & all == all {
            Cast::Broadcast
        } else {
            Cast::Multicast
        }
    }

    #[cold]
    #[inline(never)]
    fn of_pieces(payload: &[Segment]) -> Cast {
        let mut to = [0; 6];
        copy::read(payload, 0, &mut to);
        Cast::of_address(&to)
    }

    /// Of a frame that begins with this address.
    pub fn of_address(to: &[u8]) -> Cast {
        match to {
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => Cast::Broadcast,
            [first, ..] if first & 1 != 0 => Cast::Multicast,
            _ => Cast::Unicast,
        }
    }
}

/// One frame of a burst.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    /// The virtio-net header, checked.
    pub header: VnetHeader,
    /// Index of the first payload segment in the burst's list.
    pub first: u32,
    /// Number of payload segments.
    pub count: u32,
    /// Bytes of payload, without the virtio-net header.
    pub bytes: u32,
    /// What became of it; sources set [`Verdict::Retry`], or `Dropped` for a frame that must not
    /// travel.
    pub verdict: Verdict,
    /// Who it is for; set by the sink that copies it, who has its first line at hand.
    pub cast: Cast,
}

impl Frame {
    /// Its payload among `segments`, the list of its burst.
    #[inline]
    pub fn payload<'a>(&self, segments: &'a Segments) -> &'a [Segment] {
        let first = self.first as usize;
        &segments.as_slice()[first..first + self.count as usize]
    }
}

/// The frames of one burst and their segments. Made once per worker, reused for every burst.
#[derive(Debug)]
pub struct FrameBurst {
    /// The frames, in order.
    pub frames: Vec<Frame>,
    /// Their segments (and the source's own: headers, for one).
    pub segments: Segments,
    /// Frames that a source may put in, [`BURST_FRAMES_MAX`] at most.
    pub limit: usize,
}

impl FrameBurst {
    /// An empty burst with room for [`BURST_FRAMES_MAX`] frames of any shape.
    pub fn new() -> FrameBurst {
        FrameBurst {
            frames: Vec::with_capacity(BURST_FRAMES_MAX),
            segments: Segments::with_capacity(SEGMENTS_MAX),
            limit: BURST_FRAMES_MAX,
        }
    }

    /// Forgets all frames.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.segments.clear();
    }

    /// The payload segments of `frame`.
    #[inline]
    pub fn payload(&self, frame: &Frame) -> &[Segment] {
        frame.payload(&self.segments)
    }
}

impl Default for FrameBurst {
    fn default() -> FrameBurst {
        FrameBurst::new()
    }
}

/// Where frames come from.
pub trait FrameSource: Send {
    /// Fills the empty `burst` with up to `burst.limit` frames; returns their number. The
    /// frames stay the source's until `complete`.
    fn receive(&mut self, burst: &mut FrameBurst) -> usize;

    /// Ends the burst: frames that were sent or dropped go back to their owner; from the first that
    /// is still [`Verdict::Retry`] on, all will be received again.
    fn complete(&mut self, burst: &mut FrameBurst);
}

/// Where frames go.
pub trait FrameSink: Send {
    /// Sends the frames that are not dropped yet, whose payloads are among `segments`, and sets
    /// each verdict. Frames are taken in order: after the first that stays [`Verdict::Retry`] none
    /// is taken.
    fn transmit(&mut self, frames: &mut [Frame], segments: &Segments);

    /// Makes everything taken visible to the receiver.
    fn flush(&mut self);
}

/// A host interface that a frame can be read from straight into a guest's buffers.
pub trait FrameReader: Send {
    /// Reads one frame, preceded by a virtio-net header of [`vnet_header_bytes`], into
    /// `window`. Returns the bytes read including the header; `None` when there is no frame.
    ///
    /// # Errors
    /// The system's error; EFAULT means that the window is not accessible guest memory.
    fn read_frame(&mut self, window: &[Segment]) -> std::io::Result<Option<usize>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decided_are_the_frames_before_the_first_that_waits() {
        let bad = Verdict::Dropped(DropReason::BadChain);
        let (wait, sent) = (Verdict::Retry, Verdict::Sent);
        for (verdicts, wanted) in [
            (&[][..], 0),
            (&[wait], 0),
            (&[bad], 1),
            (&[sent, bad], 2),
            (&[bad, sent], 2),
            (&[sent, wait, bad], 1),
            (&[wait, bad, wait], 0),
            (&[bad, wait, wait], 1),
        ] {
            let frame = |&verdict| Frame {
                header: VnetHeader::PLAIN,
                first: 0,
                count: 1,
                bytes: 60,
                verdict,
                cast: Cast::Unicast,
            };
            let frames: Vec<_> = verdicts.iter().map(frame).collect();
            assert_eq!(decided(&frames), wanted, "{verdicts:?}");
        }
    }

    #[test]
    fn encode_and_decode_are_inverse_and_little_endian() {
        let bytes = [1, 0x81, 0x36, 0, 0xa8, 5, 34, 0, 16, 0, 2, 1];
        let header = VnetHeader {
            flags: 1,
            gso_type: 0x81,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0x102,
        };
        assert_eq!(VnetHeader::decode(&bytes), header);
        assert_eq!(header.encode(), bytes);
    }
}
