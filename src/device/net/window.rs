//! The read window: popped receive chains that a host interface reads frames straight into.
//!
//! A read cuts a frame that does not fit without saying so. So the window is made large enough for
//! the largest frame where the guest has the buffers, and a bounce buffer always stands behind it:
//! what a frame has beyond the window lands there, and waits for more of the guest's buffers. That
//! way no frame is cut, none is lost while the guest can still take it, and a guest that posts
//! buffers only after it got frames is not waited for. VIRTIO 1.3 §5.1.6.3 and §5.1.6.4.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::host::net::{Cast, DropReason, VnetHeader, vnet_header_bytes};
use crate::memory::{Bounce, SEGMENTS_MAX, Segment, Segments, copy};
use crate::ring::{ChainQueue, RingFault};

use super::counters::{QueueCounters, Tally};
use super::header::{self, DATA_VALID};
use super::rx::{PoppedRx, RxChain, pop, put_used, write_header};
use super::{FRAME_BYTES_MAX, feature};

/// Segments that one system call takes (IOV_MAX).
const LENT_MAX: usize = 1024;
/// Bytes beyond the MTU: Ethernet header and one VLAN tag.
const ETHERNET: usize = 18;
/// Bytes of a VLAN tag, which a tap may put into a frame of the greatest length.
const VLAN_TAG: usize = 4;
/// The MTU of Ethernet where none is configured.
const MTU_DEFAULT: u16 = 1500;

/// Bytes of the largest frame that a driver with `features` gets, with its virtio-net header.
pub fn need_bytes(features: u64, mtu: Option<u16>) -> usize {
    if features & feature::ANY_GUEST_GSO != 0 {
        return vnet_header_bytes(features) + FRAME_BYTES_MAX as usize;
    }
    vnet_header_bytes(features) + usize::from(mtu.unwrap_or(MTU_DEFAULT)) + ETHERNET
}

/// What [`RxWindow::refill`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refill {
    /// A frame can be read into [`RxWindow::segments`].
    Ready,
    /// Don't read: the guest has no buffer, or not enough for the frame read last.
    Empty,
}

/// A frame that was read but not delivered yet.
#[derive(Debug, Clone, Copy)]
struct Pending {
    /// Its bytes, with the header.
    bytes: usize,
    /// How many of them are in the window; the others are in the bounce buffer.
    direct: usize,
}

/// The window of one receive queue.
#[derive(Debug)]
pub struct RxWindow {
    features: u64,
    mergeable: bool,
    /// Bytes of the virtio-net header.
    header: usize,
    /// How many bytes the window should hold.
    need: usize,
    /// The segments of `chains`; while lent, the bounce buffer is among them.
    segments: Segments,
    chains: VecDeque<RxChain>,
    /// Bytes of `chains`.
    bytes: usize,
    /// While lent: where the bounce buffer is, and the segment it stands for, if any.
    lent: Option<(usize, Option<Segment>)>,
    bounce: Bounce,
    pending: Option<Pending>,
    /// What was counted since `count` was called last.
    tally: Tally,
    counters: Arc<QueueCounters>,
}

impl RxWindow {
    /// The window of a queue with `size` descriptors whose driver acknowledged `features`, on a
    /// link with `mtu` where one is configured.
    pub fn new(
        features: u64,
        size: u16,
        mtu: Option<u16>,
        counters: Arc<QueueCounters>,
    ) -> RxWindow {
        RxWindow {
            features,
            mergeable: features & feature::MRG_RXBUF != 0,
            header: vnet_header_bytes(features),
            need: need_bytes(features, mtu),
            segments: Segments::with_capacity(SEGMENTS_MAX),
            chains: VecDeque::with_capacity(usize::from(size)),
            bytes: 0,
            lent: None,
            bounce: Bounce::new(VnetHeader::BYTES + FRAME_BYTES_MAX as usize + VLAN_TAG),
            pending: None,
            tally: Tally::default(),
            counters,
        }
    }

    /// Delivers the frame that waits, if it can be now, and takes the chains for the next.
    ///
    /// # Errors
    /// The ring's fault.
    pub fn refill<Q: ChainQueue>(&mut self, vq: &mut Q) -> Result<Refill, RingFault> {
        self.take_back();
        if let Some(pending) = self.pending {
            match self.pop_until(vq, pending.bytes)? {
                true => self.finish(vq, pending),
                false if self.has_whole_ring(vq) => self.drop_pending(DropReason::RxRingTooSmall),
                false => return Ok(Refill::Empty),
            }
        }
        let wanted = if self.mergeable { self.need } else { 1 };
        self.pop_until(vq, wanted)?;
        if self.chains.is_empty() {
            return Ok(Refill::Empty);
        }
        self.lend();
        Ok(Refill::Ready)
    }

    /// Where the next frame is to be read, after [`Refill::Ready`]: at most 1024 segments, at least
    /// as long as any frame.
    pub fn segments(&self) -> &[Segment] {
        match self.lent {
            Some((at, _)) => &self.segments.as_slice()[..=at],
            None => &[],
        }
    }

    /// A frame was read: `bytes` bytes, its header among them. Delivers it, or keeps it until the
    /// guest has buffers enough, or drops it.
    pub fn commit<Q: ChainQueue>(&mut self, vq: &mut Q, bytes: usize) {
        let direct: usize = match self.segments().split_last() {
            Some((_, window)) => window.iter().map(Segment::len).sum(),
            None => return,
        };
        self.take_back();
        let first = self.chains.front().map_or(0, |chain| chain.bytes);
        if bytes <= self.header {
            self.tally.dropped(DropReason::HostError);
        } else if first < self.header || (!self.mergeable && first < bytes) {
            self.tally.dropped(DropReason::RxTooSmall);
        } else {
            let frame = Pending { bytes, direct };
            self.pending = Some(frame);
            // A fault is latched: the next refill tells it.
            if matches!(self.pop_until(vq, bytes), Ok(true)) {
                self.finish(vq, frame);
            }
        }
    }

    /// Whether a frame waits for the guest's buffers. The link must not let it wait for ever.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Drops the frame that waits, if any.
    pub fn drop_pending(&mut self, reason: DropReason) {
        if self.pending.take().is_some() {
            self.tally.dropped(reason);
        }
    }

    /// A frame was read and is not to be delivered.
    pub fn discard(&mut self, reason: DropReason) {
        self.take_back();
        self.tally.dropped(reason);
    }

    /// Bytes of the virtio-net header.
    pub fn header(&self) -> usize {
        self.header
    }

    /// Adds what was counted since the last time: at the end of every burst.
    pub fn count(&mut self) {
        if !self.tally.is_empty() {
            self.counters.rx.add(&self.tally);
            self.tally = Tally::default();
        }
    }

    /// Gives all chains back to the ring, unused. A frame that waits goes on waiting, in memory of
    /// our own.
    pub fn give_back<Q: ChainQueue>(&mut self, vq: &mut Q) {
        self.take_back();
        if let Some(frame) = &mut self.pending {
            let mut bytes = vec![0; frame.bytes];
            let (direct, spilled) = bytes.split_at_mut(frame.direct.min(frame.bytes));
            copy::read(self.segments.as_slice(), 0, direct);
            copy::read(&[self.bounce.segment()], 0, spilled);
            copy::write(&[self.bounce.segment()], 0, &bytes);
            frame.direct = 0;
        }
        for chain in self.chains.drain(..).rev() {
            vq.unpop(chain.id);
        }
        self.segments.clear();
        self.bytes = 0;
        self.count();
    }

    /// Pops until the window holds `wanted` bytes; whether it does.
    fn pop_until<Q: ChainQueue>(&mut self, vq: &mut Q, wanted: usize) -> Result<bool, RingFault> {
        while self.bytes < wanted || self.chains.is_empty() {
            match pop(vq, &mut self.segments)? {
                PoppedRx::Chain(chain) => {
                    self.bytes += chain.bytes;
                    self.chains.push_back(chain);
                }
                PoppedRx::Empty | PoppedRx::Wait => return Ok(false),
            }
            if !self.mergeable {
                break;
            }
        }
        Ok(self.bytes >= wanted)
    }

    fn has_whole_ring<Q: ChainQueue>(&self, vq: &Q) -> bool {
        vq.in_flight() == u32::from(vq.size())
    }

    /// Puts the bounce buffer behind the window.
    fn lend(&mut self) {
        let at = self.segments.len().min(LENT_MAX - 1);
        let bounce = self.bounce.segment();
        let displaced = match self.segments.as_mut_slice().get_mut(at) {
            Some(segment) => Some(core::mem::replace(segment, bounce)),
            None => {
                // A list with fewer than 1024 segments is not full.
                let _ = self.segments.push(bounce);
                None
            }
        };
        self.lent = Some((at, displaced));
    }

    /// Takes the bounce buffer away again.
    fn take_back(&mut self) {
        match self.lent.take() {
            Some((at, Some(segment))) => self.segments.as_mut_slice()[at] = segment,
            Some((at, None)) => self.segments.truncate(at),
            None => {}
        }
    }

    /// Delivers a frame for which the window has room.
    fn finish<Q: ChainQueue>(&mut self, vq: &mut Q, frame: Pending) {
        self.pending = None;
        let Pending { bytes, direct } = frame;
        if bytes > direct {
            let spilled = [self.bounce.segment()];
            copy::between(
                &spilled,
                0,
                self.segments.as_slice(),
                direct,
                bytes - direct,
            );
            self.tally.bounced();
        }
        let (mut count, mut held) = (0, 0);
        while held < bytes {
            held += self.chains[usize::from(count)].bytes;
            count += 1;
        }
        if !self.complete_header(count) {
            self.tally.dropped(DropReason::NoOffload);
            return;
        }
        let cast = self.cast();
        let (mut left, mut gone) = (bytes, 0);
        for chain in self.chains.drain(..usize::from(count)) {
            let next = gone + chain.segments;
            self.bytes -= chain.bytes;
            left -= put_used(vq, chain, &self.segments.as_slice()[gone..next], left);
            gone = next;
        }
        self.segments.drop_front(gone);
        self.tally.sent((bytes - self.header) as u64, cast);
    }

    /// Who the first frame in the window is for; its header may end where a buffer does.
    fn cast(&self) -> Cast {
        let mut front = [0; VnetHeader::BYTES + 6];
        let front = &mut front[..self.header + 6];
        copy::read(self.segments.as_slice(), 0, front);
        Cast::of_address(&front[self.header..])
    }

    /// Makes the header that the host wrote one that this guest may see; whether it can be. The
    /// host does not write `num_buffers`, and a frame that was queued in it while another guest was
    /// here may ask for what this one did not acknowledge.
    fn complete_header(&self, num_buffers: u16) -> bool {
        let mut raw = [0; VnetHeader::BYTES];
        copy::read(self.segments.as_slice(), 0, &mut raw[..self.header]);
        let mut header = VnetHeader {
            num_buffers,
            ..VnetHeader::decode(&raw)
        };
        if self.features & feature::GUEST_CSUM == 0 {
            header.flags &= !DATA_VALID;
        }
        if !header::deliverable(&header, self.features) {
            return false;
        }
        write_header(self.segments.as_slice(), &header, self.header);
        true
    }
}
