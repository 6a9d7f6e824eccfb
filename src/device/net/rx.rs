//! The receive queue: frames of a burst are copied into the guest's buffers, once.
//!
//! Three passes per burst, so that the copies of many frames overlap in the memory system: take a
//! chain or more for every frame, copy, put all in the used ring. Chains are taken and used in ring
//! order and in no other: IN_ORDER asks for it, and drivers with vector code count on it.
//! VIRTIO 1.3 §5.1.6.3 and §5.1.6.4.
//!
//! A frame that asks for more than the guest acknowledged is completed in software, off this way
//! and one at a time: the frames before it are delivered first.

use std::sync::Arc;

use crate::host::net::{
    BURST_FRAMES_MAX, Cast, DropReason, Frame, Verdict, VnetHeader, vnet_header_bytes,
};
use crate::host::offload::{Offload, PIECES_MAX};
use crate::memory::{SEGMENTS_MAX, Segment, Segments, copy};
use crate::ring::{Chain, ChainId, ChainQueue, Popped, RingFault, Single};

use super::counters::{QueueCounters, Tally};
use super::{feature, header};

/// How many frames ahead of the copy its first lines are fetched.
const PREFETCH_FRAMES: usize = 16;

/// The header of a frame in one buffer that asks nothing of its receiver.
const PLAIN_HEADER: VnetHeader = VnetHeader {
    num_buffers: 1,
    ..VnetHeader::PLAIN
};

/// A popped chain of a receive queue; its writable segments lie in its owner's list.
#[derive(Debug)]
pub(super) struct RxChain {
    pub(super) id: ChainId,
    /// Number of its segments.
    pub(super) segments: usize,
    /// Bytes that they hold.
    pub(super) bytes: usize,
}

/// What [`pop`] found.
#[derive(Debug)]
pub(super) enum PoppedRx {
    Chain(RxChain),
    Empty,
    Wait,
}

/// Pops a chain and appends its writable segments to `segments`, so that the segments of chains
/// popped one after the other are contiguous. Readable ones, which have no meaning on this queue,
/// are left out.
pub(super) fn pop<Q: ChainQueue>(
    vq: &mut Q,
    segments: &mut Segments,
) -> Result<PoppedRx, RingFault> {
    Ok(match vq.pop(segments)? {
        Popped::Chain(chain) => {
            if chain.readable > 0 {
                leave_readable_out(&chain, segments);
            }
            let (count, bytes) = (chain.writable as usize, chain.writable_bytes as usize);
            PoppedRx::Chain(RxChain {
                id: chain.id,
                segments: count,
                bytes,
            })
        }
        Popped::Empty => PoppedRx::Empty,
        Popped::Wait => PoppedRx::Wait,
    })
}

#[cold]
fn leave_readable_out(chain: &Chain, segments: &mut Segments) {
    let first = chain.first as usize;
    let writable = first + chain.readable as usize;
    let end = segments.len();
    segments.as_mut_slice().copy_within(writable..end, first);
    segments.truncate(end - chain.readable as usize);
}

/// Writes `header`, of `bytes` bytes, at the start of `to` unless it is there already: most headers
/// are alike, and a line that is not written stays in the driver's cache.
#[inline(always)]
pub(super) fn write_header(to: &[Segment], header: &VnetHeader, bytes: usize) {
    let (low, high) = header.words();
    if bytes == VnetHeader::BYTES {
        copy::write_if_different(to, low, high);
    } else {
        copy::write(to, 0, &header.encode()[..bytes]);
    }
}

/// The chains that one frame takes.
#[derive(Debug)]
struct Take {
    /// Index of the frame in the burst, or of the piece of the frame that is completed.
    frame: usize,
    /// Index of its first segment.
    first: usize,
    /// Number of segments.
    segments: usize,
    /// Number of chains.
    chains: usize,
}

/// The logic of one receive queue that frames of a burst are copied into.
#[derive(Debug)]
pub struct RxHandler {
    features: u64,
    mergeable: bool,
    /// Bytes of the virtio-net header.
    header: usize,
    /// The segments of `chains`, contiguous and in order.
    segments: Segments,
    /// Chains of plain frames, in order.
    singles: Box<[Single]>,
    /// Chains popped in this burst, in order.
    chains: Vec<RxChain>,
    /// Frames that have their chains, in order.
    takes: Vec<Take>,
    /// What the guest did not acknowledge is done here.
    offload: Offload,
    counters: Arc<QueueCounters>,
}

/// Where [`RxHandler::assign`] stopped.
enum Assigned {
    /// Every frame is decided, or has to be tried again.
    Done,
    /// At this frame, which the guest can't take as it is.
    Undeliverable(usize),
}

impl RxHandler {
    /// The handler of a queue with `size` descriptors whose driver acknowledged `features`.
    pub fn new(features: u64, size: u16, counters: Arc<QueueCounters>) -> RxHandler {
        RxHandler {
            features,
            mergeable: features & feature::MRG_RXBUF != 0,
            header: vnet_header_bytes(features),
            segments: Segments::with_capacity(SEGMENTS_MAX),
            singles: (0..BURST_FRAMES_MAX).map(|_| Single::EMPTY).collect(),
            chains: Vec::with_capacity(usize::from(size)),
            // Each frame or piece of one takes a chain at least.
            takes: Vec::with_capacity(BURST_FRAMES_MAX.max(usize::from(size))),
            offload: Offload::new(),
            counters,
        }
    }

    /// Copies the frames that are not dropped yet into the guest's buffers and sets each verdict.
    /// From the first frame on for which the guest has no buffers now, or after 2048 segments that
    /// were cut, all stay to be tried again.
    ///
    /// # Errors
    /// The ring's fault; the frames before it were delivered, the others stay as they were.
    pub fn transmit<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        frames: &mut [Frame],
        payloads: &Segments,
    ) -> Result<(), RingFault> {
        let mut tally = Tally::default();
        let mut cut = 0;
        let plain = self.transmit_plain(vq, frames, payloads, &mut tally);
        let mut frames = &mut frames[plain..];
        let mut answer = Ok(());
        while !frames.is_empty() {
            let assigned = self.assign(vq, frames, &mut tally);
            self.copy_all(frames, payloads);
            self.use_all(vq, frames, &mut tally);
            let Ok(Assigned::Undeliverable(index)) = assigned else {
                answer = assigned.map(drop);
                break;
            };
            let completed = self.complete(vq, &mut frames[index], payloads, &mut tally);
            cut += completed.as_ref().unwrap_or(&0);
            answer = completed.map(drop);
            let waits = frames[index].verdict == Verdict::Retry;
            if answer.is_err() || waits || cut >= PIECES_MAX {
                break;
            }
            frames = &mut frames[index + 1..];
        }
        if !tally.is_empty() {
            self.counters.rx.add(&tally);
        }
        answer
    }

    /// Counts frames that were dropped before they came here.
    pub fn count_drops(&self, reason: DropReason, count: u64) {
        if count > 0 {
            let mut tally = Tally::default();
            (0..count).for_each(|_| tally.dropped(reason));
            self.counters.rx.add(&tally);
        }
    }

    /// Gives up the frames that wait for buffers.
    pub fn refuse(&mut self, frames: &mut [Frame], reason: DropReason) {
        let mut tally = Tally::default();
        for frame in frames {
            if frame.verdict == Verdict::Retry {
                frame.verdict = Verdict::Dropped(reason);
                tally.dropped(reason);
            }
        }
        if !tally.is_empty() {
            self.counters.rx.add(&tally);
        }
    }

    /// Asks the CPU for the first lines of a frame that will be copied soon.
    #[inline(always)]
    fn prefetch(&self, payload: &[Segment], to: &Segment) {
        if let Some(source) = payload.first() {
            copy::prefetch_read(source);
        }
        // The header's line is only read as a rule: asking for it to be written would take it from
        // the driver, who reads it.
        copy::prefetch_read(to);
        copy::prefetch_write(&to.skip(self.header));
    }

    /// Delivers the first frames of the burst, as long as frame, header and chain are of the most
    /// frequent kind: in one piece each, nothing asked of the receiver. Returns how many.
    fn transmit_plain<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        frames: &mut [Frame],
        payloads: &Segments,
        tally: &mut Tally,
    ) -> usize {
        let is_plain = |frame: &&Frame| {
            let asks = frame.header.flags | frame.header.gso_type;
            // Two pieces are the front that a switch looked at, and the rest.
            frame.verdict == Verdict::Retry && matches!(frame.count, 1 | 2) && asks == 0
        };
        let plain = frames.iter().take_while(is_plain).count();
        let popped = vq.pop_singles(true, &mut self.singles[..plain]);
        let frames = &mut frames[..popped];
        let delivered = self.copy_plain(frames, payloads, tally);
        // Apart from the copies: stores to lines that the driver holds would keep those back.
        #[expect(clippy::cast_possible_truncation, reason = "10 or 12")]
        let header = self.header as u32;
        let written = frames[..delivered].iter().map(|frame| header + frame.bytes);
        vq.put_used_singles(&self.singles[..delivered], written);
        for single in self.singles[delivered..popped].iter_mut().rev() {
            vq.unpop(single.take_id());
        }
        delivered
    }

    /// Copies plain frames, each to its chain, up to one that its chain does not hold.
    fn copy_plain(&self, frames: &mut [Frame], payloads: &Segments, tally: &mut Tally) -> usize {
        let payloads = payloads.as_slice();
        let count = frames.len();
        let chains = &self.singles[..count];
        let mut copied = 0;
        for (frame, chain) in frames.iter().zip(chains).take(PREFETCH_FRAMES) {
            self.prefetch(&payloads[frame.first as usize..], &chain.segment);
        }
        while copied < count {
            let end = count.min(copied + PREFETCH_FRAMES);
            let ahead = end..count.min(end + PREFETCH_FRAMES);
            for (frame, chain) in frames[ahead.clone()].iter().zip(&chains[ahead]) {
                self.prefetch(&payloads[frame.first as usize..], &chain.segment);
            }
            for (frame, chain) in frames[copied..end].iter_mut().zip(&chains[copied..end]) {
                let bytes = frame.bytes as usize;
                if chain.segment.len() < self.header + bytes {
                    return copied;
                }
                write_header(
                    core::slice::from_ref(&chain.segment),
                    &PLAIN_HEADER,
                    self.header,
                );
                let first = frame.first as usize;
                let (source, to) = (payloads[first], chain.segment.skip(self.header));
                let done = copy::one(source, to, bytes);
                if frame.count > 1 {
                    copy::one(payloads[first + 1], to.skip(done), bytes - done);
                }
                frame.verdict = Verdict::Sent;
                frame.cast = Cast::of(&payloads[first..first + frame.count as usize]);
                tally.sent(frame.bytes.into(), frame.cast);
                copied += 1;
            }
        }
        copied
    }

    /// Pass 1: chains for every frame.
    fn assign<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        frames: &mut [Frame],
        tally: &mut Tally,
    ) -> Result<Assigned, RingFault> {
        // Chains and segments that the frames before this one take.
        let (mut chains, mut segments) = (0, 0);
        let mut answer = Ok(Assigned::Done);
        for (index, frame) in frames.iter_mut().enumerate() {
            if frame.verdict != Verdict::Retry {
                continue;
            }
            if !header::deliverable(&frame.header, self.features) {
                answer = Ok(Assigned::Undeliverable(index));
                break;
            }
            let need = self.header + frame.bytes as usize;
            match self.gather(vq, chains, need, chains == 0) {
                Ok(Gather::Chains(count, taken)) => {
                    self.takes.push(Take {
                        frame: index,
                        first: segments,
                        segments: taken,
                        chains: count,
                    });
                    (chains, segments) = (chains + count, segments + taken);
                    frame.verdict = Verdict::Sent;
                }
                Ok(Gather::Never(reason)) => {
                    frame.verdict = Verdict::Dropped(reason);
                    tally.dropped(reason);
                }
                Ok(Gather::NotNow) => break,
                Err(fault) => {
                    answer = Err(fault);
                    break;
                }
            }
        }
        for chain in self.chains.drain(chains..).rev() {
            vq.unpop(chain.id);
        }
        answer
    }

    /// Chains from index `first` on that hold `need` bytes; pops what is missing. `alone` when the
    /// chains before them are not those of another frame.
    #[inline(never)]
    fn gather<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        first: usize,
        need: usize,
        alone: bool,
    ) -> Result<Gather, RingFault> {
        let (mut count, mut bytes, mut segments) = (0, 0, 0);
        loop {
            if let Some(chain) = self.chains.get(first + count) {
                (count, bytes) = (count + 1, bytes + chain.bytes);
                segments += chain.segments;
                if bytes >= need {
                    return Ok(Gather::Chains(count, segments));
                }
                // The header must lie in the first buffer, whole, and a buffer that others are
                // merged with is no shorter than it (VIRTIO 1.3 §5.1.6.3.1): a whole ring of them
                // is not looked through for each frame.
                if !self.mergeable || chain.bytes < self.header {
                    return Ok(Gather::Never(DropReason::RxTooSmall));
                }
                continue;
            }
            match pop(vq, &mut self.segments)? {
                PoppedRx::Chain(chain) => self.chains.push(chain),
                // Frames before this one give descriptors back; alone, it has them all already.
                PoppedRx::Empty if alone && vq.in_flight() == u32::from(vq.size()) => {
                    return Ok(Gather::Never(DropReason::RxRingTooSmall));
                }
                PoppedRx::Empty | PoppedRx::Wait => return Ok(Gather::NotNow),
            }
        }
    }

    /// Pass 2: headers and payloads.
    fn copy_all(&mut self, frames: &mut [Frame], payloads: &Segments) {
        let segments = self.segments.as_slice();
        for (index, take) in self.takes.iter().enumerate() {
            if let Some(ahead) = self.takes.get(index + PREFETCH_FRAMES) {
                self.prefetch(
                    frames[ahead.frame].payload(payloads),
                    &segments[ahead.first],
                );
            }
            let frame = &mut frames[take.frame];
            let to = &segments[take.first..take.first + take.segments];
            #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
            let num_buffers = take.chains as u16;
            write_header(
                to,
                &VnetHeader {
                    num_buffers,
                    ..frame.header
                },
                self.header,
            );
            copy::between(
                frame.payload(payloads),
                0,
                to,
                self.header,
                frame.bytes as usize,
            );
            frame.cast = Cast::of(frame.payload(payloads));
        }
    }

    /// Pass 3: the used ring.
    fn use_all<Q: ChainQueue>(&mut self, vq: &mut Q, frames: &[Frame], tally: &mut Tally) {
        let mut chains = self.chains.drain(..);
        for take in self.takes.drain(..) {
            let frame = &frames[take.frame];
            tally.frame(frame);
            let bytes = self.header + frame.bytes as usize;
            put_taken(vq, &mut chains, self.segments.as_slice(), &take, bytes);
        }
        drop(chains);
        self.segments.clear();
    }

    /// Delivers a frame that asks for what the guest did not acknowledge, completed: all that
    /// becomes of it, or nothing. No frame before it holds chains. Returns for how many pieces
    /// chains were looked for.
    #[cold]
    #[inline(never)]
    fn complete<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        frame: &mut Frame,
        payloads: &Segments,
        tally: &mut Tally,
    ) -> Result<usize, RingFault> {
        let gathered = match self.offload.plan(frame, payloads) {
            Ok(()) => self.gather_pieces(vq),
            Err(reason) => Ok(Gather::Never(reason)),
        };
        let pieces = self.takes.len();
        let reason = match gathered {
            Ok(Gather::Chains(..)) if self.offload.fetch(frame, payloads) => {
                frame.verdict = Verdict::Sent;
                frame.cast = Cast::of(frame.payload(payloads));
                self.copy_pieces();
                self.use_pieces(vq, frame.cast, tally);
                tally.completed(self.offload.is_segmented().then_some(pieces));
                return Ok(pieces);
            }
            Ok(Gather::Chains(..)) => Some(DropReason::BadVnetHeader),
            Ok(Gather::Never(reason)) => Some(reason),
            Ok(Gather::NotNow) | Err(_) => None,
        };
        if let Some(reason) = reason {
            frame.verdict = Verdict::Dropped(reason);
            tally.dropped(reason);
        }
        self.takes.clear();
        for chain in self.chains.drain(..).rev() {
            vq.unpop(chain.id);
        }
        self.segments.clear();
        gathered.map(|_| pieces)
    }

    /// Chains for all pieces, or none.
    fn gather_pieces<Q: ChainQueue>(&mut self, vq: &mut Q) -> Result<Gather, RingFault> {
        let pieces = self.offload.pieces();
        if pieces > usize::from(vq.size()) {
            return Ok(Gather::Never(DropReason::RxRingTooSmall));
        }
        let (mut chains, mut segments) = (0, 0);
        for piece in 0..pieces {
            let need = self.header + self.offload.piece_bytes(piece);
            match self.gather(vq, chains, need, true)? {
                Gather::Chains(count, taken) => {
                    self.takes.push(Take {
                        frame: piece,
                        first: segments,
                        segments: taken,
                        chains: count,
                    });
                    (chains, segments) = (chains + count, segments + taken);
                }
                other => return Ok(other),
            }
        }
        Ok(Gather::Chains(chains, segments))
    }

    /// Pass 2 for pieces.
    fn copy_pieces(&mut self) {
        for take in &self.takes {
            let to = &self.segments.as_slice()[take.first..take.first + take.segments];
            #[expect(clippy::cast_possible_truncation, reason = "at most the ring's size")]
            let num_buffers = take.chains as u16;
            let plain = VnetHeader {
                num_buffers,
                ..VnetHeader::PLAIN
            };
            write_header(to, &plain, self.header);
            let (headers, payload) = self.offload.piece(take.frame);
            copy::write(to, self.header, headers);
            copy::write(to, self.header + headers.len(), payload);
        }
    }

    /// Pass 3 for pieces.
    fn use_pieces<Q: ChainQueue>(&mut self, vq: &mut Q, cast: Cast, tally: &mut Tally) {
        let mut chains = self.chains.drain(..);
        for take in self.takes.drain(..) {
            let bytes = self.offload.piece_bytes(take.frame);
            tally.sent(bytes as u64, cast);
            let bytes = self.header + bytes;
            put_taken(vq, &mut chains, self.segments.as_slice(), &take, bytes);
        }
        drop(chains);
        self.segments.clear();
    }
}

/// Puts the next chains, those of `take`, in the used ring; they hold `bytes` bytes.
#[inline(always)]
fn put_taken<Q: ChainQueue>(
    vq: &mut Q,
    chains: &mut impl Iterator<Item = RxChain>,
    segments: &[Segment],
    take: &Take,
    bytes: usize,
) {
    let (mut left, mut first) = (bytes, take.first);
    for chain in chains.take(take.chains) {
        let next = first + chain.segments;
        left -= put_used(vq, chain, &segments[first..next], left);
        first = next;
    }
}

/// What [`RxHandler::gather`] found.
enum Gather {
    /// So many chains with so many segments hold the frame.
    Chains(usize, usize),
    /// The guest must make more buffers available first.
    NotNow,
    /// The frame can't be delivered.
    Never(DropReason),
}

/// Stages a used element for `chain`, the next of a frame of which `left` bytes are to be accounted
/// for. Returns how many of them it holds.
#[inline]
pub(super) fn put_used<Q: ChainQueue>(
    vq: &mut Q,
    chain: RxChain,
    segments: &[Segment],
    left: usize,
) -> usize {
    let written = left.min(chain.bytes);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a chain has at most 2^32 - 1 bytes"
    )]
    vq.put_used(chain.id, written as u32, segments);
    written
}
