//! The transmit queue: chains that the guest sends become frames of a burst.
//!
//! No payload is touched. Frames point into the burst's list of segments; the chains that they
//! came from are kept here, in order, until the burst is complete. What the guest got wrong stays
//! in the burst as a dropped frame, so that its chain goes back in its turn. VIRTIO 1.3 §5.1.6.2.

use std::sync::Arc;

use crate::host::net::{
    BURST_FRAMES_MAX, DropReason, Frame, FrameBurst, Verdict, VnetHeader, vnet_header_bytes,
};
use crate::memory::{Segment, copy};
use crate::ring::{Chain, ChainId, ChainQueue, Popped, RingFault, Single};

use super::counters::{QueueCounters, Tally};
use super::{FRAME_BYTES_MAX, feature, header};

/// The logic of one transmit queue.
#[derive(Debug)]
pub struct TxHandler {
    features: u64,
    /// The driver may ask for offloads; if not, its headers are all zero by rule and not read.
    offloads: bool,
    /// Bytes of the virtio-net header.
    header: usize,
    /// The chains of the burst's first frames, in order.
    singles: Box<[Single]>,
    /// How many of them.
    plain: usize,
    /// The chains of the frames after them.
    held: Vec<ChainId>,
    counters: Arc<QueueCounters>,
}

impl TxHandler {
    /// The handler of a queue whose driver acknowledged `features`.
    pub fn new(features: u64, counters: Arc<QueueCounters>) -> TxHandler {
        TxHandler {
            features,
            offloads: features & feature::ANY_HOST_OFFLOAD != 0,
            header: vnet_header_bytes(features),
            singles: (0..BURST_FRAMES_MAX).map(|_| Single::EMPTY).collect(),
            plain: 0,
            held: Vec::with_capacity(BURST_FRAMES_MAX),
            counters,
        }
    }

    /// Fills `burst` with up to `burst.limit` frames and returns their number.
    ///
    /// # Errors
    /// The ring's fault, once all frames before it were received: the ring latches it, so a call
    /// that still finds frames returns those, and the next one the fault.
    pub fn receive<Q: ChainQueue>(
        &mut self,
        vq: &mut Q,
        burst: &mut FrameBurst,
    ) -> Result<usize, RingFault> {
        debug_assert!(self.held.is_empty(), "the last burst was not completed");
        burst.clear();
        let limit = burst.limit.min(self.singles.len());
        self.plain = vq.pop_singles(false, &mut self.singles[..limit]);
        self.add_singles(burst);
        while burst.frames.len() < limit {
            match vq.pop(&mut burst.segments) {
                Ok(Popped::Chain(chain)) => {
                    let mut frame = self.frame(&chain);
                    if !self.offloads {
                        strip(burst.segments.as_mut_slice(), &mut frame, self.header);
                    } else if chain.readable > 0 {
                        copy::prefetch_read(&burst.segments.as_slice()[chain.first as usize]);
                    }
                    burst.frames.push(frame);
                    self.held.push(chain.id);
                }
                Ok(Popped::Empty | Popped::Wait) => break,
                Err(fault) if burst.frames.is_empty() => return Err(fault),
                Err(_) => break,
            }
        }
        if self.offloads {
            self.read_headers(burst);
        }
        Ok(burst.frames.len())
    }

    /// The frames of `self.singles`, the first ones of the burst.
    #[inline]
    fn add_singles(&self, burst: &mut FrameBurst) {
        let singles = &self.singles[..self.plain];
        let header = if self.offloads { 0 } else { self.header };
        burst
            .segments
            .extend(singles.iter().map(|single| single.segment.skip(header)));
        burst
            .frames
            .extend(singles.iter().zip(0..).map(|(single, first)| {
                #[expect(clippy::cast_possible_truncation, reason = "came as 32 bits")]
                let bytes = self.payload_bytes(single.segment.len() as u32);
                Frame {
                    header: VnetHeader::PLAIN,
                    first,
                    count: 1,
                    bytes,
                    verdict: verdict(false, bytes),
                }
            }));
        if self.offloads {
            for single in singles {
                copy::prefetch_read(&single.segment);
            }
        }
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
        }
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "10 or 12")]
    fn payload_bytes(&self, bytes: u32) -> u32 {
        bytes.saturating_sub(self.header as u32)
    }

    /// Ends the burst: chains of frames that were sent or dropped are used, in order; from the
    /// first frame that is to be tried again on, all go back to the ring and will come again.
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
        let (plain, singles) = (decided.min(self.plain), &mut self.singles[..self.plain]);
        vq.put_used_singles(&singles[..plain], core::iter::repeat_n(0, plain));
        let mut held = self.held.drain(..);
        for chain in held.by_ref().take(decided - plain) {
            vq.put_used(chain, 0, &[]);
        }
        for chain in held.rev() {
            vq.unpop(chain);
        }
        for single in singles[plain..].iter_mut().rev() {
            vq.unpop(single.take_id());
        }
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
