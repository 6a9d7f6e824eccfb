//! Endpoints: a vring with the device logic behind it. The one place where format meets device.
//!
//! Control builds an endpoint in [`build_net`] or [`build_disk`], where the acknowledged feature
//! bit picks the ring format; from then on every call is one virtual call per burst.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use crate::host::net::{DropReason, Frame, FrameBurst, FrameReader, FrameSink, FrameSource};
use crate::memory::GuestRam;
use crate::ring::{Areas, RingFault};

use super::link::Armed;
use super::mailbox::{CallFds, Retired};
use super::worker::{UringNeed, WorkerCx};

/// What every endpoint can do.
pub(crate) trait VringEndpoint: Send + core::fmt::Debug {
    /// On the worker, before the first poll: takes what only the worker may make.
    fn attach(&mut self, cx: &mut WorkerCx) -> io::Result<()>;
    /// On the worker, after the last poll.
    fn detach(&mut self, _cx: &mut WorkerCx) {}
    /// The kick fd, if there is one.
    fn kick(&self) -> Option<&EventFd>;
    /// Kicks off: we poll.
    fn disarm(&mut self);
    /// Whether calls to the driver are put off, so that `flush_call` must be asked.
    fn puts_calls_off(&self) -> bool;
    /// Makes the call that is owed, if it is time, or at once with `now`.
    fn flush_call(&mut self, now: bool);
    /// Takes nothing new and gives back what it can; true once nothing is held.
    fn drain(&mut self, cx: &mut WorkerCx) -> bool;
    /// Takes nothing new; true once another worker could go on with it.
    fn is_movable(&mut self, cx: &mut WorkerCx) -> bool {
        self.drain(cx)
    }
    /// Which io_uring it needs.
    fn uring(&self) -> UringNeed {
        UringNeed::Nothing
    }
    /// The 32-bit base.
    fn base(&self) -> u32;
    /// Exchanges the call and err fds.
    fn set_fds(&mut self, fds: CallFds) -> CallFds;
    /// Goes over to another memory table; returns the old one unless something still points there.
    fn swap(&mut self, cx: &mut WorkerCx, ram: Arc<GuestRam>, areas: Areas) -> Option<Retired>;
}

/// What [`GuestSink::fill`] did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fill {
    /// Frames delivered or dropped.
    pub(crate) frames: usize,
    /// The guest has no buffers for the next frame.
    pub(crate) blocked: bool,
}

/// A TX vring: frames come from the guest.
pub(crate) trait GuestSource: VringEndpoint + FrameSource {
    /// Kicks on; whether a frame is there already.
    fn arm_source(&mut self) -> bool;
    /// Frames that seem to be available, without looking for more than `want` of them.
    fn backlog(&mut self, want: u16) -> u16;
    /// A frame's buffer was not accessible: the ring's driver broke it.
    fn latch(&mut self, fault: RingFault);
    /// Drops a burst for the reason that the vring is disabled, unless frames of it are still on
    /// their way. Returns how many frames.
    fn discard(&mut self, burst: &mut FrameBurst) -> usize;
    /// Kicks on; whether `discard` would find a frame.
    fn arm_discard(&mut self) -> bool;
}

/// An RX vring: frames go to the guest.
pub(crate) trait GuestSink: VringEndpoint + FrameSink {
    /// Kicks on; whether a buffer is there already.
    fn arm_sink(&mut self) -> bool;
    /// Reads frames from the host straight into the guest's buffers, at most a burst.
    fn fill(&mut self, reader: &mut dyn FrameReader) -> Fill;
    /// Gives up the frames that wait for buffers.
    fn refuse(&mut self, frames: &mut [Frame], reason: DropReason);
    /// Whether a frame that was read waits for the guest's buffers.
    fn holds_frame(&self) -> bool;
}

/// A request queue of a disk.
pub(crate) trait GuestDisk: VringEndpoint {
    /// Reaps completions and takes at most `budget` new requests; returns how many of both.
    fn poll(&mut self, cx: &mut WorkerCx, budget: usize) -> usize;
    /// Looks for what is done and not answered yet; kicks on too if it `takes` requests, unless
    /// none could be taken anyway.
    fn arm(&mut self, takes: bool) -> Armed;
    /// How long until it must be polled whatever comes, `None` for ever: a request may pass that a
    /// limit holds up, or requests in flight are to be looked at. Whoever asks sleeps until then.
    fn wait(&mut self) -> Option<Duration>;
}

/// A vring with the device logic behind it.
#[derive(Debug)]
pub(crate) enum Endpoint {
    /// A TX vring.
    Source(Box<dyn GuestSource>),
    /// An RX vring.
    Sink(Box<dyn GuestSink>),
    /// A request queue.
    Disk(Box<dyn GuestDisk>),
}

impl Endpoint {
    /// What is common to all.
    pub(crate) fn vring(&mut self) -> &mut dyn VringEndpoint {
        match self {
            Endpoint::Source(source) => source.as_mut(),
            Endpoint::Sink(sink) => sink.as_mut(),
            Endpoint::Disk(disk) => disk.as_mut(),
        }
    }
}
