//! `XdpQueue`: one queue of an interface as the host side of a link.
//!
//! Frames are copied once each way: what a guest sends from its memory into chunks that the
//! interface sends from, what was received from such chunks into the guest's buffers. Interfaces
//! finish no checksums and cut nothing here, so the port offers its guest no offloads.

use std::os::fd::{AsRawFd, RawFd};

use crate::memory::{Segments, copy};
use crate::sys::xdp::{CHUNK, Xdp, XdpSocket};

use super::net::{DropReason, Frame, FrameBurst, FrameSink, FrameSource, Verdict, VnetHeader};

/// Bytes of an Ethernet header.
const HEADER_BYTES: u32 = 14;

/// One queue of an interface.
#[derive(Debug)]
pub struct XdpQueue {
    socket: XdpSocket,
    /// Bytes of the longest frame that the interface sends.
    frame_max: u32,
    /// The kernel did not take all that was sent.
    sending: bool,
    /// The interface refused to send.
    down: bool,
}

impl XdpQueue {
    /// The next queue of `xdp`, from 0 on; `None` when all are taken.
    pub fn take(xdp: &Xdp) -> Option<XdpQueue> {
        Some(XdpQueue {
            socket: xdp.take_socket()?,
            frame_max: xdp.frame_max(),
            sending: false,
            down: false,
        })
    }

    /// Throws away the frames that wait, meant for a guest that is gone. Returns the number of
    /// their buffers.
    pub fn discard_waiting(&mut self) -> u32 {
        let waiting = self.socket.received(1);
        if waiting > 0 {
            self.socket.give_back(waiting);
        }
        waiting
    }

    /// Goes on with what the kernel could not take before.
    #[inline]
    pub fn go_on(&mut self) {
        if self.sending && !self.down {
            self.flush();
        }
    }

    /// Whether it must be asked to go on.
    pub fn is_sending(&self) -> bool {
        self.sending && !self.down
    }

    /// Before its receiver sleeps: whether a frame is there already.
    pub fn arm(&mut self) -> bool {
        self.socket.wake_receiver();
        self.socket.received(1) > 0
    }

    /// Puts one frame into chunks and these in the TX ring.
    #[inline]
    fn send(&mut self, frame: &Frame, segments: &Segments) -> Verdict {
        if frame.header.flags | frame.header.gso_type != 0 {
            return Verdict::Dropped(DropReason::NoOffload);
        }
        if frame.bytes < HEADER_BYTES {
            return Verdict::Dropped(DropReason::BadFrame);
        }
        if frame.bytes > self.frame_max {
            return Verdict::Dropped(DropReason::TooBig);
        }
        let chunks = frame.bytes.div_ceil(CHUNK) as usize;
        if self.socket.free_chunks() < chunks && !self.make_room(chunks) {
            return Verdict::Dropped(DropReason::HostFull);
        }
        let payload = frame.payload(segments);
        let mut done = 0;
        while done < frame.bytes {
            let len = (frame.bytes - done).min(CHUNK);
            if let Some(chunk) = self.socket.next_chunk() {
                copy::between(payload, done as usize, &[chunk], 0, len as usize);
            }
            done += len;
            self.socket.send(len, done < frame.bytes);
        }
        Verdict::Sent
    }

    /// Has the kernel take what it can. Returns whether `chunks` chunks are free then.
    #[cold]
    fn make_room(&mut self, chunks: usize) -> bool {
        self.socket.publish();
        self.flush();
        self.socket.reap();
        self.socket.free_chunks() >= chunks
    }
}

/// To wait for frames with.
impl AsRawFd for XdpQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl FrameSource for XdpQueue {
    fn receive(&mut self, burst: &mut FrameBurst) -> usize {
        let limit = u32::try_from(burst.limit).unwrap_or(u32::MAX);
        let received = self.socket.received(limit);
        if received == 0 {
            self.socket.wake_receiver();
            return 0;
        }
        let (mut next, mut first) = (0, 0);
        let mut bytes = 0;
        while next < received && burst.frames.len() < burst.limit {
            let (segment, more) = self.socket.buffer(next);
            if !burst.segments.push(segment) {
                break;
            }
            #[expect(clippy::cast_possible_truncation, reason = "less than a chunk")]
            let len = segment.len() as u32;
            (next, bytes) = (next + 1, bytes + len);
            if more {
                continue;
            }
            burst.frames.push(Frame {
                header: VnetHeader::PLAIN,
                first,
                count: next - first,
                bytes,
                verdict: Verdict::Retry,
            });
            (first, bytes) = (next, 0);
        }
        burst.frames.len()
    }

    fn complete(&mut self, burst: &mut FrameBurst) {
        let done = burst
            .frames
            .iter()
            .take_while(|frame| frame.verdict != Verdict::Retry);
        let buffers = done.map(|frame| frame.count).sum();
        if buffers > 0 {
            self.socket.give_back(buffers);
        }
    }
}

impl FrameSink for XdpQueue {
    fn transmit(&mut self, frames: &mut [Frame], segments: &Segments) {
        self.socket.reap();
        if self.down {
            self.flush();
        }
        for frame in frames {
            if frame.verdict == Verdict::Retry {
                frame.verdict = if self.down {
                    Verdict::Dropped(DropReason::HostError)
                } else {
                    self.send(frame, segments)
                };
            }
        }
        self.socket.publish();
    }

    fn flush(&mut self) {
        self.down = self.socket.wake_sender().is_err();
        self.sending = self.socket.is_sending();
    }
}

#[cfg(test)]
mod tests;
