//! `Gate`: where the frames of one queue pair enter a fabric.

use std::sync::Arc;
use std::time::Duration;

use crate::host::net::{DropReason, FrameBurst, Verdict, decided};

use super::super::batch::Batch;
use super::super::endpoint::{Endpoint, GuestSource};
use super::super::link::{Armed, HostPorts};
use super::super::worker::Slots;
use super::hub::Hub;
use super::lane::{LANE_PARCELS, Lane, Parcel};
use super::{Fabric, Hold, deliver, drop_waiting};

/// How long the frames of a vring that has just come wait for the other end of a wire to come too:
/// front-ends begin one after the other.
const MEET_WITHIN: Duration = Duration::from_secs(1);

/// The sink of a link whose source is a transmit vring.
#[derive(Debug)]
pub(crate) struct Gate {
    fabric: Arc<Fabric>,
    /// Number of the port whose frames enter here, and of its queue pair.
    port: usize,
    pair: usize,
    /// Number of our worker.
    worker: usize,
    hold: Hold,
    /// Frames wait for the other end to come.
    awaits: bool,
    /// What it takes to send to other workers; `None` when all receivers are on ours.
    remote: Option<Remote>,
    /// What it takes to send to several ports; `None` on a wire.
    hub: Option<Box<Hub>>,
}

/// Bursts on their way.
#[derive(Debug)]
struct Remote {
    lanes: Vec<Lane>,
    #[expect(clippy::vec_box, reason = "parcels travel by pointer")]
    free: Vec<Box<Parcel>>,
    /// Parcels that are back, by their number modulo their count: bursts are completed in order.
    back: [Option<Box<Parcel>>; LANE_PARCELS],
    /// A parcel for our own worker whose last frames wait for buffers.
    stuck: Option<Box<Parcel>>,
    /// Bursts sent off, and completed.
    sent: usize,
    done: usize,
}

impl Gate {
    /// The gate of queue pair `pair` of `port`, on `worker`; `lanes` go to all other workers on
    /// which frames may be received.
    pub(crate) fn new(
        fabric: Arc<Fabric>,
        [port, pair]: [usize; 2],
        worker: usize,
        lanes: Vec<Lane>,
    ) -> Gate {
        let remote = (!lanes.is_empty()).then(|| Remote {
            lanes,
            free: (0..LANE_PARCELS).map(|_| Box::new(Parcel::new())).collect(),
            back: [const { None }; LANE_PARCELS],
            stuck: None,
            sent: 0,
            done: 0,
        });
        Gate {
            hub: fabric
                .switch
                .is_some()
                .then(|| Box::new(Hub::new(fabric.count()))),
            fabric,
            port,
            pair,
            worker,
            hold: Hold::default(),
            awaits: false,
            remote,
        }
    }

    /// The port that receives what enters here.
    fn peer(&self) -> usize {
        1 - self.port
    }

    /// Whether nothing is left to be done while the vring whose frames enter here is gone.
    pub(crate) fn is_at_rest(&self) -> bool {
        let remote = self.remote.as_ref();
        !self.hold.is_active()
            && remote.is_none_or(|remote| remote.stuck.is_none() && remote.sent == remote.done)
    }

    /// Moves at most one burst from the vring at `from`. Returns the frames that moved.
    #[inline]
    pub(crate) fn poll(
        &mut self,
        from: usize,
        slots: &mut Slots,
        ports: &mut HostPorts,
        burst: &mut FrameBurst,
        batch: &mut Batch,
    ) -> usize {
        if let Some(hub) = &mut self.hub {
            let at = [self.port, self.pair];
            return hub.poll(&self.fabric, at, from, slots, ports, burst, batch);
        }
        if self.remote.is_some() {
            return self.poll_remote(from, slots, batch);
        }
        let outlet = self.fabric.outlet(self.peer(), self.pair);
        let Some((Endpoint::Source(source), Endpoint::Sink(sink))) =
            outlet.and_then(|outlet| slots.pair(from, outlet.slot))
        else {
            self.hold.over();
            self.awaits = slots.is_new(from, MEET_WITHIN);
            return if self.awaits {
                0
            } else {
                drop_all(from, slots, burst)
            };
        };
        self.awaits = false;
        burst.limit = batch.collect(source.as_mut());
        if source.receive(burst) == 0 {
            self.hold.over();
            return 0;
        }
        sink.transmit(&mut burst.frames, &burst.segments);
        let mut done = decided(&burst.frames);
        if done == burst.frames.len() {
            self.hold.over();
        } else if self.hold.expired(done, self.fabric.holds[self.port]) {
            drop_waiting(&mut burst.frames[done..], DropReason::PeerFull);
            done = burst.frames.len();
        }
        source.complete(burst);
        sink.flush();
        done
    }

    /// As `poll`, from the uplink whose frames enter here.
    pub(crate) fn poll_host(
        &mut self,
        slots: &mut Slots,
        ports: &mut HostPorts,
        burst: &mut FrameBurst,
    ) -> usize {
        let Some(hub) = &mut self.hub else {
            return 0;
        };
        hub.poll_host(&self.fabric, self.port, slots, ports, burst)
    }

    /// As `poll`, where receivers may be on other workers.
    fn poll_remote(&mut self, from: usize, slots: &mut Slots, batch: &mut Batch) -> usize {
        self.unstick(slots);
        self.complete(from, slots);
        let absent = self.fabric.outlet(self.peer(), self.pair).is_none();
        self.awaits = absent && slots.is_new(from, MEET_WITHIN);
        if self.awaits {
            return 0;
        }
        let Some(remote) = self.remote.as_mut().filter(|remote| remote.stuck.is_none()) else {
            return 0;
        };
        let Some(source) = slots.source(from) else {
            return 0;
        };
        let Some(mut parcel) = remote.free.pop() else {
            return 0;
        };
        parcel.burst.limit = batch.collect(source);
        let moved = source.receive(&mut parcel.burst);
        if moved == 0 {
            remote.free.push(parcel);
            return 0;
        }
        parcel.number = remote.sent;
        remote.sent += 1;
        self.send(parcel, slots);
        self.complete(from, slots);
        moved
    }

    /// Sends a filled parcel where it belongs.
    fn send(&mut self, mut parcel: Box<Parcel>, slots: &mut Slots) {
        let outlet = self.fabric.outlet(self.peer(), self.pair);
        let Some(remote) = &mut self.remote else {
            return;
        };
        match outlet {
            Some(outlet) if outlet.worker == self.worker => {
                parcel.slot = outlet.slot;
                remote.stuck = Some(parcel);
                self.unstick(slots);
            }
            Some(outlet) => {
                parcel.slot = outlet.slot;
                let lane = remote.lanes.iter_mut().find(|l| l.worker == outlet.worker);
                let refused = match lane {
                    Some(lane) => lane.send(parcel).err(),
                    None => Some(parcel),
                };
                if let Some(mut parcel) = refused {
                    drop_waiting(&mut parcel.burst.frames, DropReason::PeerDown);
                    remote.file(parcel);
                }
            }
            None => {
                drop_waiting(&mut parcel.burst.frames, DropReason::PeerDown);
                remote.file(parcel);
            }
        }
    }

    /// Delivers what is left of a parcel for our own worker, or gives it up in the end.
    fn unstick(&mut self, slots: &mut Slots) {
        let Some(remote) = &mut self.remote else {
            return;
        };
        let Some(mut parcel) = remote.stuck.take() else {
            return;
        };
        let FrameBurst {
            frames, segments, ..
        } = &mut parcel.burst;
        let first = decided(frames);
        let done = deliver(slots, parcel.slot, frames, first, segments);
        if let Some(sink) = slots.sink(parcel.slot) {
            sink.flush();
        }
        if done < frames.len() {
            let most = self.fabric.holds[self.port];
            if !self.hold.expired(done - first, most) {
                remote.stuck = Some(parcel);
                return;
            }
            drop_waiting(&mut frames[done..], DropReason::PeerFull);
        }
        self.hold.over();
        remote.file(parcel);
    }

    /// Completes the bursts that are back, in order: in whatever state the source is, since it
    /// can't stop before.
    fn complete(&mut self, from: usize, slots: &mut Slots) {
        let Some(remote) = &mut self.remote else {
            return;
        };
        for lane in &mut remote.lanes {
            while let Some(parcel) = lane.receive() {
                let place = parcel.number % LANE_PARCELS;
                remote.back[place] = Some(parcel);
            }
        }
        while let Some(mut parcel) = remote.back[remote.done % LANE_PARCELS].take() {
            if let Some(source) = slots.source_in_any_state(from) {
                source.complete(&mut parcel.burst);
            }
            remote.done += 1;
            remote.free.push(parcel);
        }
    }

    /// Before the worker sleeps: what will wake it.
    pub(crate) fn arm(&mut self, source: Option<&mut dyn GuestSource>) -> Armed {
        // Frames that wait have a deadline, nearer than any sleep is short.
        if self.hold.is_active() {
            return Armed::Work;
        }
        let mut room = true;
        if let Some(remote) = &mut self.remote {
            let back = remote.lanes.iter_mut().any(Lane::has_work);
            if back || remote.stuck.is_some() {
                return Armed::Work;
            }
            // A parcel that comes back wakes us.
            room = !remote.free.is_empty();
        }
        match source.filter(|_| room).map(GuestSource::arm_source) {
            // They are to go when their time is up, or when the other end has come.
            Some(true) if self.awaits => Armed::Bounded,
            Some(true) => Armed::Work,
            _ => Armed::Sleep,
        }
    }
}

impl Remote {
    /// A parcel that needs nothing more but to be completed.
    fn file(&mut self, parcel: Box<Parcel>) {
        let place = parcel.number % LANE_PARCELS;
        self.back[place] = Some(parcel);
    }
}

/// Nobody receives: what is sent is lost, as on a cable whose other end hangs in the air.
#[cold]
fn drop_all(from: usize, slots: &mut Slots, burst: &mut FrameBurst) -> usize {
    let Some(source) = slots.source(from) else {
        return 0;
    };
    burst.limit = burst.frames.capacity();
    let count = source.receive(burst);
    if count > 0 {
        for frame in &mut burst.frames {
            if frame.verdict == Verdict::Retry {
                frame.verdict = Verdict::Dropped(DropReason::PeerDown);
            }
        }
        source.complete(burst);
    }
    count
}
