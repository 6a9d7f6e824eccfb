//! The transmit queue: chains that the guest sends become frames of a burst.
//!
//! No payload is touched. Frames point into the burst's list of segments; the chains that they
//! came from are kept here, in order, until the burst is complete. What the guest got wrong stays
//! in the burst as a dropped frame, so that its chain goes back in its turn. VIRTIO 1.3 §5.1.6.2.

use std::sync::Arc;

use crate::host::net::{
    BURST_BYTES_MAX, BURST_FRAMES_MAX, Cast, DropReason, Frame, FrameBurst, Verdict, VnetHeader,
    vnet_header_bytes,
};
use crate::memory::{Segment, copy};
use crate::ring::{Chain, ChainId, ChainQueue, Popped, RingFault, Single};

use super::counters::{QueueCounters, Tally};
use super::{FRAME_BYTES_MAX, feature, header};

/// The chains of one burst.
#[derive(Debug)]
struct Held {
    /// The chains of its first frames, in order.
    singles: Box<[Single]>,
    /// How many of them.
    plain: usize,
    /// The chains of the frames after them.
    chains: Vec<ChainId>,
}

impl Held {
    fn new() -> Held {
        Held {
            singles: (0..BURST_FRAMES_MAX).map(|_| Single::EMPTY).collect(),
            plain: 0,
            chains: Vec::with_capacity(BURST_FRAMES_MAX),
        }
    }
}

/// The logic of one transmit queue.
#[derive(Debug)]
pub struct TxHandler {
    features: u64,
    /// The driver may ask for offloads; if not, its headers are all zero by rule and not read.
    offloads: bool,
    /// Bytes of the virtio-net header.
    header: usize,
    /// The chains of bursts that are not complete, a ring of them.
    held: Box<[Held]>,
    /// Bursts received so far.
    received: usize,
    /// As many as are complete.
    completed: usize,
    counters: Arc<QueueCounters>,
}

impl TxHandler {
    /// The handler of a queue whose driver acknowledged `features`, with at most `bursts` that are
    /// received and not complete.
    pub fn new(features: u64, bursts: usize, counters: Arc<QueueCounters>) -> TxHandler {
        TxHandler {
            features,
            offloads: features & feature::ANY_HOST_OFFLOAD != 0,
            header: vnet_header_bytes(features),
            held: (0..bursts.max(1)).map(|_| Held::new()).collect(),
            received: 0,
            completed: 0,
            counters,
        }
    }

    /// Bursts that were received and are not complete.
    #[inline]
    pub fn pending(&self) -> usize {
        self.received.wrapping_sub(self.completed)
    }

    /// Bursts received so far.
    pub fn received(&self) -> usize {
        self.received
    }

    /// Bursts completed so far.
    pub fn completed(&self) -> usize {
        self.completed
    }

    /// Fills `burst` with up to `burst.limit` frames, of [`BURST_BYTES_MAX`] bytes as a whole but
    /// for the last one, and returns their number: a burst that is to be completed, unless it is
    /// empty. None are received while as many are pending as the handler was made for.
    ///
    /// # Errors
    /// The ring's fault, once all frames before it were received: the ring latches it, so a call
    /// that still finds frames returns those, and the next one the fault.
    pub fn receive<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        burst: &mut FrameBurst,
    ) -> Result<usize, RingFault> {
        burst.clear();
        if self.pending() == self.held.len() {
            return Ok(0);
        }
        let place = self.received % self.held.len();
        let limit = burst.limit.min(BURST_FRAMES_MAX);
        let held = &mut self.held[place];
        held.plain = vq.pop_singles(false, &mut held.singles[..limit]);
        let mut bytes = self.add_singles(&self.held[place], burst);
        if bytes > BURST_BYTES_MAX {
            self.leave_for_later(vq, place, burst);
        }
        while burst.frames.len() < limit && bytes < BURST_BYTES_MAX {
            match vq.pop(&mut burst.segments) {
                Ok(Popped::Chain(chain)) => {
                    let mut frame = self.frame(&chain);
                    if !self.offloads {
                        strip(burst.segments.as_mut_slice(), &mut frame, self.header);
                    } else if chain.readable > 0 {
                        copy::prefetch_read(&burst.segments.as_slice()[chain.first as usize]);
                    }
                    bytes += frame.bytes as usize;
                    burst.frames.push(frame);
                    self.held[place].chains.push(chain.id);
                }
                Ok(Popped::Empty | Popped::Wait) => break,
                Err(fault) if burst.frames.is_empty() => return Err(fault),
                Err(_) => break,
            }
        }
        if self.offloads {
            self.read_headers(burst);
        }
        let count = burst.frames.len();
        self.received = self.received.wrapping_add(usize::from(count > 0));
        Ok(count)
    }

    /// The frames of the simple chains of `held`, the first ones of the burst. Returns the bytes of
    /// all of them.
    #[inline]
    fn add_singles(&self, held: &Held, burst: &mut FrameBurst) -> usize {
        let mut sum = 0;
        let singles = &held.singles[..held.plain];
        let header = if self.offloads { 0 } else { self.header };
        burst
            .segments
            .extend(singles.iter().map(|single| single.segment.skip(header)));
        burst
            .frames
            .extend(singles.iter().zip(0..).map(|(single, first)| {
                #[expect(clippy::cast_possible_truncation, reason = "came as 32 bits")]
                let bytes = self.payload_bytes(single.segment.len() as u32);
                sum += bytes as usize;
                Frame {
                    header: VnetHeader::PLAIN,
                    first,
                    count: 1,
                    bytes,
                    verdict: verdict(false, bytes),
                    cast: Cast::Unicast,
                }
            }));
        if self.offloads {
            for single in singles {
                copy::prefetch_read(&single.segment);
            }
        }
        sum
    }

    /// Gives simple chains back to the ring that are more than a burst may have of bytes.
    #[cold]
    fn leave_for_later<Q: ChainQueue>(&mut self, vq: &mut Q, place: usize, burst: &mut FrameBurst) {
        let mut sum = 0;
        let is_full = |frame: &Frame| {
            sum += frame.bytes as usize;
            sum >= BURST_BYTES_MAX
        };
        let Some(last) = burst.frames.iter().position(is_full) else {
            return;
        };
        let held = &mut self.held[place];
        for single in held.singles[last + 1..held.plain].iter_mut().rev() {
            vq.unpop(single.take_id());
        }
        held.plain = last + 1;
        burst.frames.truncate(last + 1);
        burst.segments.truncate(last + 1);
    }

    /// The headers, after all of them were asked for.
    fn read_headers(&self, burst: &mut FrameBurst) {
        let segments = burst.segments.as_mut_slice();
        for frame in &mut burst.frames {
            if frame.verdict == Verdict::Retry {
                let first = frame.first as usize;
                self.read_header(&segments[first..first + frame.count as usize], frame);
                strip(segments, frame, self.header);
            }
        }
    }

    #[inline]
    fn read_header(&self, chain: &[Segment], frame: &mut Frame) {
        let mut bytes = [0; VnetHeader::BYTES];
        copy::read(chain, 0, &mut bytes[..self.header]);
        match header::check(&VnetHeader::decode(&bytes), frame.bytes, self.features) {
            Ok(header) => frame.header = header,
            Err(reason) => frame.verdict = Verdict::Dropped(reason),
        }
    }

    /// The frame that `chain` holds, its header still among its segments.
    #[inline]
    fn frame(&self, chain: &Chain) -> Frame {
        let bytes = self.payload_bytes(chain.readable_bytes);
        Frame {
            header: VnetHeader::default(),
            first: chain.first,
            count: chain.readable,
            bytes,
            verdict: verdict(chain.writable > 0, bytes),
            cast: Cast::Unicast,
        }
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "10 or 12")]
    fn payload_bytes(&self, bytes: u32) -> u32 {
        bytes.saturating_sub(self.header as u32)
    }

    /// Ends the oldest pending burst: chains of frames that were sent or dropped are used, in
    /// order; from the first frame that is to be tried again on, all go back to the ring and will
    /// come again. That is only possible for the burst received last.
    pub fn complete<Q: ChainQueue>(&mut self, vq: &mut Q, burst: &mut FrameBurst) {
        let mut tally = Tally::default();
        let mut decided = 0;
        for frame in &burst.frames {
            if frame.verdict == Verdict::Retry {
                break;
            }
            tally.frame(frame);
            decided += 1;
        }
        if self.pending() == 0 {
            return;
        }
        debug_assert!(decided == burst.frames.len() || self.pending() == 1);
        let place = self.completed % self.held.len();
        let held = &mut self.held[place];
        let (plain, singles) = (decided.min(held.plain), &mut held.singles[..held.plain]);
        vq.put_used_singles(&singles[..plain], core::iter::repeat_n(0, plain));
        let mut chains = held.chains.drain(..);
        for chain in chains.by_ref().take(decided - plain) {
            vq.put_used(chain, 0, &[]);
        }
        for chain in chains.rev() {
            vq.unpop(chain);
        }
        for single in singles[plain..].iter_mut().rev() {
            vq.unpop(single.take_id());
        }
        self.completed = self.completed.wrapping_add(1);
        if decided > 0 {
            self.counters.tx.add(&tally);
        }
        burst.clear();
    }
}

/// What is to become of a frame of `bytes` bytes, before anybody saw it.
#[inline]
fn verdict(writable: bool, bytes: u32) -> Verdict {
    if writable || bytes == 0 {
        Verdict::Dropped(DropReason::BadChain)
    } else if bytes > FRAME_BYTES_MAX {
        Verdict::Dropped(DropReason::TooBig)
    } else {
        Verdict::Retry
    }
}

/// Takes the header, of `header` bytes, off the front of `frame`, whose segments are in `segments`.
/// A frame that is dropped may be shorter than that.
#[inline]
fn strip(segments: &mut [Segment], frame: &mut Frame, header: usize) {
    let first = frame.first as usize;
    let mut left = header;
    let mut gone = 0;
    for segment in &mut segments[first..first + frame.count as usize] {
        if segment.len() > left {
            *segment = segment.skip(left);
            break;
        }
        left -= segment.len();
        gone += 1;
    }
    frame.first += gone;
    frame.count -= gone;
}
