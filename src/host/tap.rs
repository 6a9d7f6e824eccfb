//! `TapQueue`: one queue of a tap as the host side of a link.
//!
//! Frames go to the kernel one system call each, behind the header that was checked and rebuilt:
//! long ones straight from the sender's memory, short ones copied into one piece before. Frames
//! from the kernel are read straight into the receiver's buffers. Checksums and segmentation stay
//! undone both ways.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_HDR_F_NEEDS_CSUM,
};

use crate::memory::{Bounce, Segment, Segments, copy};
use crate::sys::tap::{Tap, TapFd, TapOffloads, WriteError};

use super::net::{
    BURST_BYTES_MAX, Cast, DropReason, Frame, FrameBurst, FrameReader, FrameSink, FrameSource,
    Verdict, VnetHeader, vnet_header_bytes,
};

#[expect(clippy::cast_possible_truncation, reason = "bit 0")]
const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;

/// What `tap` leaves undone for a reader that acknowledged the virtio-net feature bits `features`:
/// once before its first vring starts, for all queues.
///
/// # Errors
/// The system's refusal.
pub fn follow_features(tap: &Tap, features: u64) -> io::Result<()> {
    let has = |bit: u32| features & (1 << bit) != 0;
    tap.set_header_bytes(vnet_header_bytes(features))?;
    tap.set_offload(TapOffloads {
        csum: has(VIRTIO_NET_F_GUEST_CSUM),
        tso4: has(VIRTIO_NET_F_GUEST_TSO4),
        tso6: has(VIRTIO_NET_F_GUEST_TSO6),
        ecn: has(VIRTIO_NET_F_GUEST_ECN),
        uso: has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6),
    })
}

/// As [`follow_features`], for a reader that has what is undone done where it is wanted.
///
/// # Errors
/// The system's refusal.
pub fn leave_all_undone(tap: &Tap) -> io::Result<()> {
    tap.set_header_bytes(VnetHeader::BYTES)?;
    tap.set_offload(TapOffloads {
        csum: true,
        tso4: true,
        tso6: true,
        ecn: true,
        uso: tap.supports_uso(),
    })
}

/// Frames that are read at once into buffers of our own.
const POOL_FRAMES: usize = 64;
/// Bytes of each of these buffers: the longest frame, its header, and a cache line's alignment.
const POOL_BYTES: usize = 65600;

/// Frames between the one that is written and the one whose payload is fetched.
const FETCH_AHEAD: usize = 4;

/// One queue of a tap.
#[derive(Debug)]
pub struct TapQueue {
    fd: TapFd,
    guest_fault: bool,
    /// Where frames are read to that may go to several receivers.
    pool: Option<Bounce>,
}

impl TapQueue {
    /// Queue `index` of `tap`; `None` past the last queue.
    pub fn new(tap: &Tap, index: u16) -> Option<TapQueue> {
        Some(TapQueue {
            fd: tap.queue(index)?,
            guest_fault: false,
            pool: None,
        })
    }

    /// The same, with buffers of its own to read frames into: a [`FrameSource`].
    pub fn with_pool(mut self) -> TapQueue {
        self.pool = Some(Bounce::new(POOL_FRAMES * POOL_BYTES));
        self
    }

    /// Whether a frame since the last time was not accessible memory: the sender's fault, whose
    /// ring should be latched.
    pub fn take_guest_fault(&mut self) -> bool {
        core::mem::take(&mut self.guest_fault)
    }

    /// Throws away the frames that wait, meant for a guest that is gone. Returns their number.
    pub fn discard_waiting(&self) -> usize {
        self.fd.discard_waiting()
    }

    #[cold]
    fn reason(&mut self, error: WriteError) -> DropReason {
        match error {
            WriteError::Full => DropReason::HostFull,
            WriteError::TooManySegments => DropReason::TooBig,
            WriteError::Inaccessible => {
                self.guest_fault = true;
                DropReason::HostError
            }
            WriteError::Refused(_) => DropReason::HostError,
        }
    }
}

/// To wait for frames with.
impl AsRawFd for TapQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl FrameSink for TapQueue {
    fn transmit(&mut self, frames: &mut [Frame], segments: &Segments) {
        for at in 0..frames.len() {
            // The kernel would wait for each payload to come from the sender's core.
            if let Some(next) = frames.get(at + FETCH_AHEAD)
                && let Some(first) = next.payload(segments).first()
            {
                copy::prefetch_read(first);
            }
            let frame = &mut frames[at];
            if frame.verdict != Verdict::Retry {
                continue;
            }
            let payload = frame.payload(segments);
            let header = frame.header.encode();
            let answer = self.fd.write_frame(&header, payload, frame.bytes as usize);
            frame.verdict = match answer {
                Ok(()) => {
                    // Of long ones not before: memory that the kernel can't read would be our end.
                    frame.cast = Cast::of(payload);
                    Verdict::Sent
                }
                Err(error) => Verdict::Dropped(self.reason(error)),
            };
        }
    }

    fn flush(&mut self) {}
}

impl FrameSource for TapQueue {
    fn receive(&mut self, burst: &mut FrameBurst) -> usize {
        let Some(pool) = &self.pool else {
            return 0;
        };
        let mut sum = 0;
        for number in 0..POOL_FRAMES.min(burst.limit) {
            if sum >= BURST_BYTES_MAX {
                break;
            }
            let buffer = pool.segment().skip(number * POOL_BYTES).take(POOL_BYTES);
            // An interface that is down has no frames.
            let Ok(Some(bytes)) = self.fd.read_frame(&[buffer]) else {
                break;
            };
            let mut header = [0; VnetHeader::BYTES];
            copy::read(&[buffer], 0, &mut header);
            let header = VnetHeader::decode(&header);
            let payload = buffer.take(bytes).skip(VnetHeader::BYTES);
            #[expect(clippy::cast_possible_truncation, reason = "at most POOL_BYTES")]
            let (first, bytes) = (burst.segments.len() as u32, payload.len() as u32);
            if bytes == 0 || !burst.segments.push(payload) {
                break;
            }
            sum += bytes as usize;
            burst.frames.push(Frame {
                header: VnetHeader {
                    // The kernel's word that a sum is right is not passed on.
                    flags: header.flags & NEEDS_CSUM,
                    num_buffers: 0,
                    ..header
                },
                first,
                count: 1,
                bytes,
                verdict: Verdict::Retry,
                cast: Cast::Unicast,
            });
        }
        burst.frames.len()
    }

    fn complete(&mut self, burst: &mut FrameBurst) {
        burst.clear();
    }
}

impl FrameReader for TapQueue {
    fn read_frame(&mut self, window: &[Segment]) -> io::Result<Option<usize>> {
        self.fd.read_frame(window)
    }
}

#[cfg(test)]
mod tests;
