//! `XdpQueue`: one queue of an interface as the host side of a link.
//!
//! Frames are copied once each way: what a guest sends from its memory into chunks that the
//! interface sends from, what was received from such chunks into the guest's buffers. Interfaces
//! cut nothing here, and few make checksums: what a guest leaves undone is done while it is copied,
//! but for checksums that the interface may be left (`TxCsum`).

use std::os::fd::{AsRawFd, RawFd};

use crate::memory::{Segments, copy};
use crate::sys::xdp::{Undone, Xdp, XdpSocket};

use super::net::{
    BURST_BYTES_MAX, Cast, DropReason, Frame, FrameBurst, FrameSink, FrameSource, Verdict,
    VnetHeader,
};
use super::offload::{HEADERS_MAX, NEEDS_CSUM, Offload, PIECES_MAX, has_usual_csum};

/// Bytes of an Ethernet header.
const HEADER_BYTES: u32 = 14;

/// One queue of an interface.
#[derive(Debug)]
pub struct XdpQueue {
    socket: XdpSocket,
    /// Bytes of a frame that one chunk takes.
    chunk: u32,
    /// Bytes of the longest frame that the interface sends.
    frame_max: u32,
    /// The kernel did not take all that was sent.
    sending: bool,
    /// The interface refused to send.
    down: bool,
    /// Does what senders left undone; there once one did.
    offload: Option<Box<Offload>>,
    /// Frames that were made of larger ones in this turn.
    pieces: usize,
}

impl XdpQueue {
    /// The next queue of `xdp`, from 0 on; `None` when all are taken.
    pub fn take(xdp: &Xdp) -> Option<XdpQueue> {
        let socket = xdp.take_socket()?;
        Some(XdpQueue {
            chunk: socket.chunk_bytes(),
            socket,
            frame_max: xdp.frame_max(),
            sending: false,
            down: false,
            offload: None,
            pieces: 0,
        })
    }

    /// Throws away the frames that wait, meant for a guest that is gone. Returns their number.
    pub fn discard_waiting(&mut self) -> usize {
        let waiting = self.socket.received(1);
        let is_last = |index: &u32| !self.socket.buffer(*index).1;
        let frames = (0..waiting).filter(is_last).count();
        if waiting > 0 {
            self.socket.give_back(waiting);
        }
        frames
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
        if frame.bytes < HEADER_BYTES {
            return Verdict::Dropped(DropReason::BadFrame);
        }
        let mut undone = None;
        if frame.header.flags | frame.header.gso_type != 0 {
            undone = self.left_to_interface(frame, segments);
            if undone.is_none() {
                let answer = self.complete_and_send(frame, segments);
                return answer.unwrap_or_else(Verdict::Dropped);
            }
        }
        if frame.bytes > self.frame_max {
            return Verdict::Dropped(DropReason::TooBig);
        }
        let chunks = frame.bytes.div_ceil(self.chunk) as usize;
        if self.socket.free_chunks() < chunks && !self.make_room(chunks) {
            return Verdict::Dropped(DropReason::HostFull);
        }
        let payload = frame.payload(segments);
        let mut done = 0;
        while done < frame.bytes {
            let len = (frame.bytes - done).min(self.chunk);
            if let Some(chunk) = self.socket.next_chunk() {
                copy::between(payload, done as usize, &[chunk], 0, len as usize);
            }
            done += len;
            self.put(len, done < frame.bytes, undone.take());
        }
        Verdict::Sent
    }

    /// Puts the chunk that was written in the TX ring. `undone` is of its frame, if it is the first
    /// of that.
    #[inline]
    fn put(&mut self, len: u32, more: bool, undone: Option<Undone>) {
        match undone {
            None => self.socket.send(len, more),
            Some(undone) => {
                self.socket.send_undone(len, more, undone);
                self.socket.counters().offloaded_csum.add(1);
            }
        }
    }

    /// The checksum of `frame` as the interface is told of it; `None` when that can't make it, or
    /// not surely. Interfaces look at headers themselves, whatever they are told.
    #[inline]
    fn left_to_interface(&self, frame: &Frame, segments: &Segments) -> Option<Undone> {
        let header = &frame.header;
        if !self.socket.leaves_csum() || header.flags & NEEDS_CSUM == 0 || header.gso_type != 0 {
            return None;
        }
        let undone = Undone {
            start: header.csum_start,
            offset: header.csum_offset,
        };
        if !undone.is_within(frame.bytes.min(self.chunk)) {
            return None;
        }
        // What a sender changes before it is copied is wrong in its own frame alone.
        let mut head = [0; HEADERS_MAX];
        let head = &mut head[..HEADERS_MAX.min(frame.bytes as usize)];
        let whole = copy::read(frame.payload(segments), 0, head) == head.len();
        (whole && has_usual_csum(header, head, frame.bytes as usize)).then_some(undone)
    }

    /// A frame whose checksum or segmentation is left to us.
    #[cold]
    fn complete_and_send(
        &mut self,
        frame: &Frame,
        segments: &Segments,
    ) -> Result<Verdict, DropReason> {
        let mut offload = self.offload.take().unwrap_or_default();
        let answer = self.send_pieces(&mut offload, frame, segments);
        self.offload = Some(offload);
        answer
    }

    fn send_pieces(
        &mut self,
        offload: &mut Offload,
        frame: &Frame,
        segments: &Segments,
    ) -> Result<Verdict, DropReason> {
        offload.plan(frame, segments)?;
        let pieces = offload.pieces();
        let chunks_of = |index| offload.piece_bytes(index).div_ceil(self.chunk as usize);
        // The last piece may be shorter, the others are alike.
        let chunks = chunks_of(0) * (pieces - 1) + chunks_of(pieces - 1);
        if offload.piece_bytes(0) > self.frame_max as usize || chunks > self.socket.chunks() {
            return Err(DropReason::TooBig);
        }
        if self.pieces > 0 && self.pieces + pieces > PIECES_MAX {
            return Ok(Verdict::Retry);
        }
        if self.socket.free_chunks() < chunks && !self.make_room(chunks) {
            return Err(DropReason::HostFull);
        }
        if !offload.fetch(frame, segments) {
            return Err(DropReason::BadVnetHeader);
        }
        let usual = offload.usual_csum();
        let usual = usual.filter(|_| self.socket.leaves_csum());
        let undone = usual.map(|(start, offset)| Undone { start, offset });
        for index in 0..pieces {
            let (head, body) = match undone {
                None => offload.piece(index),
                Some(_) => offload.piece_undone(index),
            };
            self.send_parts(head, body, undone);
        }
        self.pieces += pieces;
        let counters = self.socket.counters();
        if offload.is_segmented() {
            counters.software_segments.add(pieces as u64);
        } else {
            counters.software_csum.add(1);
        }
        Ok(Verdict::Sent)
    }

    /// One frame in two parts, for which there are chunks enough.
    fn send_parts(&mut self, head: &[u8], body: &[u8], mut undone: Option<Undone>) {
        let total = head.len() + body.len();
        let mut done = 0;
        while done < total {
            let len = (total - done).min(self.chunk as usize);
            if let Some(chunk) = self.socket.next_chunk() {
                let front = head.get(done..).unwrap_or_default();
                let front = &front[..front.len().min(len)];
                let start = (done + front.len()) - head.len();
                copy::write(&[chunk], 0, front);
                copy::write(
                    &[chunk],
                    front.len(),
                    &body[start..start + len - front.len()],
                );
            }
            done += len;
            #[expect(clippy::cast_possible_truncation, reason = "at most a chunk")]
            self.put(len as u32, done < total, undone.take());
        }
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
        let (mut bytes, mut sum) = (0, 0);
        while next < received && burst.frames.len() < burst.limit && sum < BURST_BYTES_MAX {
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
                cast: Cast::Unicast,
            });
            sum += bytes as usize;
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
        self.pieces = 0;
        for frame in frames {
            if frame.verdict == Verdict::Retry {
                frame.verdict = if self.down {
                    Verdict::Dropped(DropReason::HostError)
                } else {
                    self.send(frame, segments)
                };
                match frame.verdict {
                    Verdict::Sent => frame.cast = Cast::of(frame.payload(segments)),
                    Verdict::Retry => break,
                    Verdict::Dropped(_) => {}
                }
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
