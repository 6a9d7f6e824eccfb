//! `NetTx` and `NetRx`: the two vrings of a queue pair, as a source and a sink of frames.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use vmm_sys_util::eventfd::EventFd;

use crate::device::net::{Refill, RxHandler, RxWindow, TxHandler};
use crate::host::limit::PortLimits;
use crate::host::net::{
    BURST_BYTES_MAX, BURST_FRAMES_MAX, DropReason, Frame, FrameBurst, FrameReader, FrameSink,
    FrameSource, Verdict, decided,
};
use crate::memory::{GuestRam, Segments};
use crate::ring::{Areas, RingFault, RingFormat};

use super::endpoint::{Fill, GuestSink, GuestSource, VringEndpoint};
use super::mailbox::{CallFds, Retired};
use super::started::Vring;
use super::worker::WorkerCx;

/// A TX vring: the guest sends.
#[derive(Debug)]
pub(super) struct NetTx<F: RingFormat> {
    vring: Vring<F>,
    handler: TxHandler,
    limits: Arc<PortLimits>,
    /// Tables that pending bursts point into, each with the number of bursts to be complete first.
    old: Vec<(usize, Retired)>,
    /// Where they go then.
    retired: Option<Sender<Retired>>,
}

impl<F: RingFormat> NetTx<F> {
    pub(super) fn new(vring: Vring<F>, handler: TxHandler, limits: Arc<PortLimits>) -> NetTx<F> {
        NetTx {
            vring,
            handler,
            limits,
            old: Vec::new(),
            retired: None,
        }
    }

    /// Gives up the tables that nothing points into any more.
    #[cold]
    fn retire(&mut self) {
        let completed = self.handler.completed();
        while let Some((until, _)) = self.old.first()
            && *until <= completed
        {
            let (_, table) = self.old.remove(0);
            if let Some(retired) = &self.retired {
                // When nobody takes it, it is unmapped here.
                let _ = retired.try_send(table);
            }
        }
    }
}

impl<F: RingFormat> FrameSource for NetTx<F> {
    fn receive(&mut self, burst: &mut FrameBurst) -> usize {
        match self.handler.receive(&mut self.vring.vq, burst) {
            Ok(count) => {
                if self.limits.ingress.is_on() {
                    self.limits.ingress.police(&mut burst.frames);
                }
                count
            }
            Err(fault) => {
                self.vring.report(fault);
                0
            }
        }
    }

    fn complete(&mut self, burst: &mut FrameBurst) {
        if self.limits.ingress.is_on() {
            // The others come again, even those that are dropped behind one that waits.
            let done = decided(&burst.frames);
            self.limits.ingress.charge_frames(&burst.frames[..done]);
        }
        self.handler.complete(&mut self.vring.vq, burst);
        self.vring.publish();
        if !self.old.is_empty() {
            self.retire();
        }
    }
}

impl<F: RingFormat> VringEndpoint for NetTx<F> {
    fn attach(&mut self, cx: &mut WorkerCx) -> io::Result<()> {
        self.vring.served_by(&cx.mailbox);
        Ok(())
    }

    fn kick(&self) -> Option<&EventFd> {
        self.vring.kick()
    }

    fn disarm(&mut self) {
        self.vring.set_kicks(false);
    }

    fn puts_calls_off(&self) -> bool {
        self.vring.puts_calls_off()
    }

    fn flush_call(&mut self, now: bool) {
        self.vring.flush_call(now);
    }

    fn drain(&mut self, _cx: &mut WorkerCx) -> bool {
        self.handler.pending() == 0
    }

    fn base(&self) -> u32 {
        self.vring.base()
    }

    fn set_fds(&mut self, fds: CallFds) -> CallFds {
        self.vring.set_fds(fds)
    }

    fn swap(&mut self, cx: &mut WorkerCx, ram: Arc<GuestRam>, areas: Areas) -> Option<Retired> {
        let (ram, areas) = self.vring.swap(ram, areas);
        let old = Retired { ram, areas };
        if self.handler.pending() == 0 {
            return Some(old);
        }
        self.retired = Some(cx.retired.clone());
        self.old.push((self.handler.received(), old));
        None
    }
}

impl<F: RingFormat> GuestSource for NetTx<F> {
    fn arm_source(&mut self) -> bool {
        self.vring.set_kicks(true)
    }

    fn backlog(&mut self, want: u16) -> u16 {
        self.vring.vq.backlog(want)
    }

    fn latch(&mut self, fault: RingFault) {
        self.vring.report(fault);
    }

    fn discard(&mut self, burst: &mut FrameBurst) -> usize {
        // Chains go back in order: what was sent off before comes first.
        if self.handler.pending() > 0 {
            return 0;
        }
        burst.clear();
        burst.limit = BURST_FRAMES_MAX;
        match self.handler.receive(&mut self.vring.vq, burst) {
            Ok(0) => 0,
            Ok(count) => {
                drop_all(&mut burst.frames, DropReason::Disabled);
                self.handler.complete(&mut self.vring.vq, burst);
                self.vring.publish();
                count
            }
            Err(fault) => {
                self.vring.report(fault);
                0
            }
        }
    }

    fn arm_discard(&mut self) -> bool {
        // What is on its way wakes us when it is back.
        self.handler.pending() == 0 && self.vring.set_kicks(true)
    }
}

/// An RX vring: the guest receives.
#[derive(Debug)]
pub(super) struct NetRx<F: RingFormat> {
    vring: Vring<F>,
    handler: RxHandler,
    window: RxWindow,
    limits: Arc<PortLimits>,
    /// Since when a frame that was read waits for buffers.
    held_since: Option<Instant>,
}

/// How long a frame from the host waits for the guest's buffers. A driver that posts buffers only
/// after it got frames would otherwise wait for us while we wait for it.
pub(super) const HOLD: Duration = Duration::from_millis(10);

impl<F: RingFormat> NetRx<F> {
    pub(super) fn new(
        vring: Vring<F>,
        handler: RxHandler,
        window: RxWindow,
        limits: Arc<PortLimits>,
    ) -> NetRx<F> {
        NetRx {
            vring,
            handler,
            window,
            limits,
            held_since: None,
        }
    }

    /// One frame from `reader` into the guest; `Ok(None)` when there is none, or no room for it.
    fn fill_one(&mut self, reader: &mut dyn FrameReader) -> Result<Filled, RingFault> {
        if self.window.refill(&mut self.vring.vq)? == Refill::Empty {
            return Ok(self.hold());
        }
        self.held_since = None;
        match reader.read_frame(self.window.segments()) {
            Ok(Some(bytes)) => {
                if self.may_pass(bytes) {
                    self.window.commit(&mut self.vring.vq, bytes);
                } else {
                    self.window.discard(DropReason::Policed);
                }
                Ok(Filled::Frame(bytes))
            }
            Ok(None) => Ok(Filled::Nothing),
            Err(error) if error.raw_os_error() == Some(EFAULT) => {
                // The kernel has taken it from the interface.
                self.window.discard(DropReason::PeerBroken);
                Err(RingFault::Memory)
            }
            // An interface that is down has no frames; the reader counts what it refuses.
            Err(_) => Ok(Filled::Nothing),
        }
    }
}

impl<F: RingFormat> NetRx<F> {
    /// Whether a frame of `bytes` bytes, its header among them, is within the port's limit.
    #[inline]
    fn may_pass(&self, bytes: usize) -> bool {
        let limit = &self.limits.egress;
        if !limit.is_on() {
            return true;
        }
        let bits = bytes.saturating_sub(self.window.header()) as u64 * 8;
        let passes = limit.allowance().take(bits);
        if passes {
            limit.charge(1, bits);
        }
        passes
    }

    /// Copies the frames into the guest's buffers, as many as there is room for.
    #[inline]
    fn deliver(&mut self, frames: &mut [Frame], segments: &Segments) {
        if let Err(fault) = self.handler.transmit(&mut self.vring.vq, frames, segments) {
            self.vring.report(fault);
            // Nobody will ever take these: the sender must not wait for a broken receiver.
            let dropped = drop_all(frames, DropReason::PeerBroken);
            self.handler.count_drops(DropReason::PeerBroken, dropped);
        }
    }

    /// There are no buffers. A frame that waits for them is dropped in the end.
    #[cold]
    fn hold(&mut self) -> Filled {
        if !self.window.is_pending() {
            return Filled::Blocked;
        }
        let since = *self.held_since.get_or_insert_with(Instant::now);
        if since.elapsed() < HOLD {
            return Filled::Blocked;
        }
        self.held_since = None;
        self.window.drop_pending(DropReason::RxRingTooSmall);
        Filled::Frame(0)
    }
}

/// Drops the frames that are not decided. Returns how many.
fn drop_all(frames: &mut [Frame], reason: DropReason) -> u64 {
    let mut dropped = 0;
    for frame in frames.iter_mut().filter(|f| f.verdict == Verdict::Retry) {
        frame.verdict = Verdict::Dropped(reason);
        dropped += 1;
    }
    dropped
}

/// Bad address: the guest's buffer is not accessible memory (errno 14 on every Linux).
const EFAULT: i32 = 14;

enum Filled {
    /// A frame of so many bytes.
    Frame(usize),
    Nothing,
    Blocked,
}

impl<F: RingFormat> FrameSink for NetRx<F> {
    fn transmit(&mut self, frames: &mut [Frame], segments: &Segments) {
        if !self.limits.egress.is_on() {
            return self.deliver(frames, segments);
        }
        let within = self.limits.egress.within(frames);
        let (frames, beyond) = frames.split_at_mut(within);
        self.deliver(frames, segments);
        self.limits.egress.charge_sent(frames);
        // Behind a frame that waits nothing is decided: all of it will be offered again.
        if decided(frames) == frames.len() {
            let dropped = drop_all(beyond, DropReason::Policed);
            self.handler.count_drops(DropReason::Policed, dropped);
        }
    }

    fn flush(&mut self) {
        self.vring.publish();
    }
}

impl<F: RingFormat> VringEndpoint for NetRx<F> {
    fn attach(&mut self, cx: &mut WorkerCx) -> io::Result<()> {
        self.vring.served_by(&cx.mailbox);
        Ok(())
    }

    fn kick(&self) -> Option<&EventFd> {
        self.vring.kick()
    }

    fn disarm(&mut self) {
        self.vring.set_kicks(false);
    }

    fn puts_calls_off(&self) -> bool {
        self.vring.puts_calls_off()
    }

    fn flush_call(&mut self, now: bool) {
        self.vring.flush_call(now);
    }

    fn drain(&mut self, _cx: &mut WorkerCx) -> bool {
        self.window.drop_pending(DropReason::PeerDown);
        self.window.give_back(&mut self.vring.vq);
        self.vring.publish();
        true
    }

    fn base(&self) -> u32 {
        self.vring.base()
    }

    fn set_fds(&mut self, fds: CallFds) -> CallFds {
        self.vring.set_fds(fds)
    }

    fn swap(&mut self, _cx: &mut WorkerCx, ram: Arc<GuestRam>, areas: Areas) -> Option<Retired> {
        // The window points into the old table; its chains are popped again from the new one.
        self.window.give_back(&mut self.vring.vq);
        let (ram, areas) = self.vring.swap(ram, areas);
        Some(Retired { ram, areas })
    }
}

impl<F: RingFormat> GuestSink for NetRx<F> {
    fn arm_sink(&mut self) -> bool {
        self.vring.set_kicks(true)
    }

    fn refuse(&mut self, frames: &mut [Frame], reason: DropReason) {
        self.handler.refuse(frames, reason);
    }

    fn holds_frame(&self) -> bool {
        self.window.is_pending()
    }

    fn fill(&mut self, reader: &mut dyn FrameReader) -> Fill {
        let mut fill = Fill {
            frames: 0,
            blocked: false,
        };
        let mut sum = 0;
        while fill.frames < BURST_FRAMES_MAX && sum < BURST_BYTES_MAX {
            match self.fill_one(reader) {
                Ok(Filled::Frame(bytes)) => {
                    fill.frames += 1;
                    sum += bytes;
                }
                Ok(Filled::Nothing) => break,
                Ok(Filled::Blocked) => {
                    fill.blocked = true;
                    break;
                }
                Err(fault) => {
                    self.vring.report(fault);
                    // Its buffers will never come.
                    self.window.drop_pending(DropReason::PeerBroken);
                    break;
                }
            }
        }
        self.window.count();
        self.vring.publish();
        fill
    }
}
