//! `TapQueue`: one queue of a tap as the host side of a link.
//!
//! Frames go to the kernel straight from the sender's memory, one system call each, behind the
//! header that was checked and rebuilt; frames from the kernel are read straight into the
//! receiver's buffers. Checksums and segmentation stay undone both ways.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use crate::memory::{Segment, Segments};
use crate::sys::tap::{Tap, TapFd, TapOffloads, WriteError};

use super::net::{DropReason, Frame, FrameReader, FrameSink, Verdict, vnet_header_bytes};

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

/// One queue of a tap.
#[derive(Debug)]
pub struct TapQueue {
    fd: TapFd,
    guest_fault: bool,
}

impl TapQueue {
    /// Queue `index` of `tap`; `None` past the last queue.
    pub fn new(tap: &Tap, index: u16) -> Option<TapQueue> {
        Some(TapQueue {
            fd: tap.queue(index)?,
            guest_fault: false,
        })
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
        for frame in frames {
            if frame.verdict != Verdict::Retry {
                continue;
            }
            let answer = self
                .fd
                .write_frame(&frame.header.encode(), frame.payload(segments));
            frame.verdict = match answer {
                Ok(()) => Verdict::Sent,
                Err(error) => Verdict::Dropped(self.reason(error)),
            };
        }
    }

    fn flush(&mut self) {}
}

impl FrameReader for TapQueue {
    fn read_frame(&mut self, window: &[Segment]) -> io::Result<Option<usize>> {
        self.fd.read_frame(window)
    }
}

#[cfg(test)]
mod tests;
