//! `Link`: frames from one source to one sink, a burst at a time.
//!
//! `echo` is a link from a port to itself, a tap port is two links. A link whose ends are not both
//! there does nothing. Frames that the sink has no room for stay the source's: the link is
//! *blocked*, and while it is, the worker waits for the sink and not for the source.

use std::sync::Arc;
use std::time::Instant;

use crate::device::net::QueueCounters;
use crate::host::net::{BURST_FRAMES_MAX, DropReason, FrameBurst, FrameSink, FrameSource, decided};
use crate::host::sink::SinkPort;
use crate::host::tap::TapQueue;
use crate::host::xdp::XdpQueue;
use crate::ring::RingFault;

use super::batch::Batch;
use super::endpoint::{Endpoint, GuestSink, GuestSource};
use super::fabric::Gate;
use super::net::HOLD;
use super::worker::Slots;

/// One end of a link.
#[derive(Debug)]
pub(crate) enum End {
    /// A vring, by its place in the worker's table.
    Vring(usize),
    /// A tap queue, by its place in the worker's list.
    Tap(usize),
    /// A queue of an interface, by its place in the worker's list.
    Xdp(usize),
    /// Nowhere: every frame is dropped and counted.
    Sink(SinkPort),
    /// Another port, by way of a fabric.
    Gate(Box<Gate>),
}

/// What links have at the host's side, on one worker.
#[derive(Debug, Default)]
pub(crate) struct HostPorts {
    /// Queues of taps.
    pub(crate) taps: Vec<TapQueue>,
    /// Queues of interfaces.
    pub(crate) xdps: Vec<XdpQueue>,
}

/// What a worker may do about a link, disk or slot before it sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Armed {
    /// Sleep: a kick or the host will wake us.
    Sleep,
    /// Sleep, but not for long: what we wait for may come without a kick.
    Bounded,
    /// There is work: don't sleep.
    Work,
}

/// A source, a sink, and what happened last between them.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) source: End,
    pub(crate) sink: End,
    /// The sink had no room in the last burst.
    blocked: bool,
    /// Bursts in a row that moved nothing for want of room.
    stalled: u32,
    /// Since when.
    stalled_since: Option<Instant>,
    /// How long to wait for a burst worth taking.
    batch: Batch,
    /// Where it is counted what comes while the sink, a vring of our worker, is not there.
    losses: Option<Arc<QueueCounters>>,
}

/// What one turn of a link did.
struct Turn {
    moved: usize,
    blocked: bool,
}

impl Link {
    pub(crate) fn new(source: End, sink: End) -> Link {
        Link {
            source,
            sink,
            blocked: false,
            stalled: 0,
            stalled_since: None,
            batch: Batch::new(),
            losses: None,
        }
    }

    /// The same, with counters for what comes while its sink is not there.
    pub(crate) fn with_losses(self, losses: Option<Arc<QueueCounters>>) -> Link {
        Link { losses, ..self }
    }

    /// Whether a turn may do anything, as long as no vring comes, goes, or is paused.
    pub(crate) fn is_live(&self, slots: &Slots) -> bool {
        match (&self.source, &self.sink) {
            (End::Vring(from), End::Vring(to)) => slots.is_running(*from) && slots.is_running(*to),
            (End::Vring(from), End::Gate(gate)) => slots.is_there(*from) || !gate.is_at_rest(),
            (End::Vring(from), End::Tap(_) | End::Sink(_)) => slots.is_running(*from),
            (End::Tap(_), End::Vring(to)) => slots.is_running(*to),
            // What an interface has or was given goes on without the guest.
            _ => true,
        }
    }

    /// Moves at most one burst. Returns the frames that moved.
    #[inline]
    pub(crate) fn poll(
        &mut self,
        slots: &mut Slots,
        ports: &mut HostPorts,
        burst: &mut FrameBurst,
    ) -> usize {
        let turn = match (&mut self.source, &mut self.sink) {
            (End::Vring(from), End::Vring(to)) => match slots.pair(*from, *to) {
                Some((Endpoint::Source(source), Endpoint::Sink(sink))) => {
                    burst.limit = self.batch.collect(source.as_mut());
                    Some(forward(source.as_mut(), sink.as_mut(), burst))
                }
                _ => None,
            },
            (End::Vring(from), End::Gate(gate)) => Some(Turn {
                moved: gate.poll(*from, slots, ports, burst, &mut self.batch),
                blocked: false,
            }),
            (End::Tap(_) | End::Xdp(_), End::Gate(gate)) => Some(Turn {
                moved: gate.poll_host(slots, ports, burst),
                blocked: false,
            }),
            (End::Vring(from), sink) => {
                leave(slots.source(*from), sink, ports, burst, &mut self.batch)
            }
            (source, End::Vring(to)) => {
                let late = self
                    .stalled_since
                    .is_some_and(|since| since.elapsed() >= HOLD);
                let losses = self.losses.as_deref();
                enter(source, slots.sink(*to), ports, burst, (late, losses))
            }
            _ => None,
        };
        let Some(turn) = turn else {
            // Whoever waited for room is gone or disabled.
            (self.blocked, self.stalled_since) = (false, None);
            return 0;
        };
        self.batch.moved(turn.moved);
        self.blocked = turn.blocked;
        self.stalled = if turn.blocked && turn.moved == 0 {
            self.stalled.saturating_add(1)
        } else {
            0
        };
        self.stalled_since = match (&self.source, self.stalled) {
            // Each burst that could not be moved is looked at, once it has waited for long enough.
            (End::Xdp(_), 1..) => self.stalled_since.or_else(|| Some(Instant::now())),
            _ => None,
        };
        turn.moved
    }

    /// The worker wants to sleep: turns on what will wake it, and looks once more.
    pub(crate) fn arm(&mut self, slots: &mut Slots, ports: &mut HostPorts) -> Armed {
        if let (End::Xdp(at), End::Gate(_)) = (&self.source, &self.sink) {
            let xdp = &mut ports.xdps[*at];
            return match (xdp.arm(), xdp.is_sending()) {
                (true, _) => Armed::Work,
                (false, true) => Armed::Bounded,
                (false, false) => Armed::Sleep,
            };
        }
        match self.sink {
            // What an interface had no room for, it takes without a word when it has.
            End::Xdp(to) if ports.xdps[to].is_sending() => {
                self.arm_guests(slots, ports).max(Armed::Bounded)
            }
            _ => self.arm_guests(slots, ports),
        }
    }

    fn arm_guests(&mut self, slots: &mut Slots, ports: &mut HostPorts) -> Armed {
        // Nothing can move while the sink is not there: a frame that waits is no work then.
        if let End::Vring(slot) = &self.sink
            && slots.sink(*slot).is_none()
        {
            return Armed::Sleep;
        }
        let from = match &self.source {
            End::Vring(slot) => slots
                .source(*slot)
                .map(|source| source as &mut dyn GuestSource),
            _ => None,
        };
        if let End::Gate(gate) = &mut self.sink {
            return gate.arm(from);
        }
        if let End::Vring(_) = &self.source
            && from.is_none()
        {
            // What it waited to send is not to be sent any more: it has no turns that would say so.
            self.blocked = false;
        }
        if !self.blocked {
            if let End::Xdp(from) = self.source
                && ports.xdps[from].arm()
            {
                return Armed::Work;
            }
            // A tap's frames wake us through epoll, whose edge stays pending until we sleep.
            return match from.map(GuestSource::arm_source) {
                Some(true) => Armed::Work,
                _ => Armed::Sleep,
            };
        }
        let mut held = false;
        let room = match &self.sink {
            End::Vring(slot) => slots.sink(*slot).is_some_and(|sink| {
                held = sink.holds_frame();
                sink.arm_sink()
            }),
            End::Tap(_) | End::Xdp(_) | End::Sink(_) | End::Gate(_) => true,
        };
        match (room, self.stalled) {
            // A frame that waits for buffers has a deadline.
            (false, _) if held => Armed::Bounded,
            (false, _) => Armed::Sleep,
            (true, 0 | 1) => Armed::Work,
            // There are buffers, but too few for the frame at the front: more may come with a kick
            // that we asked for too late, so look again soon.
            (true, _) => Armed::Bounded,
        }
    }
}

/// One burst from a guest to the host; `None` when the guest is not there.
fn leave(
    source: Option<&mut (dyn GuestSource + 'static)>,
    sink: &mut End,
    ports: &mut HostPorts,
    burst: &mut FrameBurst,
    batch: &mut Batch,
) -> Option<Turn> {
    match sink {
        End::Tap(tap) => {
            let (tap, source) = (&mut ports.taps[*tap], source?);
            burst.limit = batch.collect(source);
            let turn = forward(source, tap, burst);
            if tap.take_guest_fault() {
                source.latch(RingFault::Memory);
            }
            Some(turn)
        }
        End::Sink(sink) => {
            let source = source?;
            burst.limit = batch.collect(source);
            Some(forward(source, sink, burst))
        }
        End::Xdp(to) => {
            let xdp = &mut ports.xdps[*to];
            xdp.go_on();
            let source = source?;
            burst.limit = batch.collect(source);
            Some(forward(source, xdp, burst))
        }
        End::Vring(_) | End::Gate(_) => None,
    }
}

/// One burst from the host to a guest; `None` when the guest is not there.
fn enter(
    source: &mut End,
    sink: Option<&mut (dyn GuestSink + 'static)>,
    ports: &mut HostPorts,
    burst: &mut FrameBurst,
    (late, losses): (bool, Option<&QueueCounters>),
) -> Option<Turn> {
    match source {
        End::Tap(tap) => {
            let fill = sink?.fill(&mut ports.taps[*tap]);
            Some(Turn {
                moved: fill.frames,
                blocked: fill.blocked,
            })
        }
        End::Xdp(from) => {
            let xdp = &mut ports.xdps[*from];
            let Some(sink) = sink else {
                let lost = xdp.discard_waiting();
                if let Some(losses) = losses.filter(|_| lost > 0) {
                    losses.rx.add_lost(DropReason::PeerDown, lost);
                }
                return None;
            };
            // Without any buffer the guest is merely slow.
            if late && sink.arm_sink() {
                return Some(give_up(xdp, sink, burst));
            }
            burst.limit = BURST_FRAMES_MAX;
            Some(forward(xdp, sink, burst))
        }
        End::Vring(_) | End::Sink(_) | End::Gate(_) => None,
    }
}

/// The frame at the front, for which there have been too few buffers for long: a driver that posts
/// more only after it got frames would never get one. Dropped if there still are.
#[cold]
fn give_up(
    xdp: &mut XdpQueue,
    sink: &mut (dyn GuestSink + 'static),
    burst: &mut FrameBurst,
) -> Turn {
    burst.clear();
    burst.limit = 1;
    let moved = xdp.receive(burst);
    sink.transmit(&mut burst.frames, &burst.segments);
    sink.refuse(&mut burst.frames, DropReason::RxRingTooSmall);
    xdp.complete(burst);
    sink.flush();
    let blocked = false;
    Turn { moved, blocked }
}

/// One burst: receive, transmit, complete, flush.
#[inline]
fn forward(
    source: &mut (impl FrameSource + ?Sized),
    sink: &mut (impl FrameSink + ?Sized),
    burst: &mut FrameBurst,
) -> Turn {
    burst.clear();
    if source.receive(burst) == 0 {
        return Turn {
            moved: 0,
            blocked: false,
        };
    }
    sink.transmit(&mut burst.frames, &burst.segments);
    let moved = decided(&burst.frames);
    let blocked = moved < burst.frames.len();
    source.complete(burst);
    sink.flush();
    Turn { moved, blocked }
}
