//! Parcels between two workers: there with frames, back with verdicts.

use std::sync::Arc;
use std::time::Duration;

use crate::host::net::{DropReason, FrameBurst, decided};
use crate::sys::spsc::{self, Consumer, Producer};

use super::super::mailbox::Mailbox;
use super::super::worker::Slots;
use super::{Hold, deliver, drop_waiting};

/// Parcels of one gate that may be under way at a time: one is filled while another is emptied.
pub(crate) const LANE_PARCELS: usize = 4;

/// A burst that travels.
#[derive(Debug)]
pub(super) struct Parcel {
    /// Which burst of its gate it is, counted from 0.
    pub(super) number: usize,
    pub(super) burst: FrameBurst,
    /// The receive vring that it is for, on the worker that it travels to.
    pub(super) slot: usize,
}

impl Parcel {
    pub(super) fn new() -> Parcel {
        Parcel {
            number: 0,
            burst: FrameBurst::new(),
            slot: 0,
        }
    }
}

/// A gate's end of a lane to another worker.
#[derive(Debug)]
pub(crate) struct Lane {
    /// Number of the worker at the other end.
    pub(super) worker: usize,
    there: Producer<Box<Parcel>>,
    back: Consumer<Box<Parcel>>,
    mailbox: Arc<Mailbox>,
}

/// The receiving worker's end of a lane.
#[derive(Debug)]
pub(crate) struct Inbound {
    there: Consumer<Box<Parcel>>,
    back: Producer<Box<Parcel>>,
    /// The sender's.
    mailbox: Arc<Mailbox>,
    /// Its first frames were delivered, the others wait for buffers.
    current: Option<Box<Parcel>>,
    hold: Hold,
    /// How long they may wait.
    most: Duration,
}

/// A lane from a gate on a worker to another worker, with the mailboxes of both; `hold` is how long
/// frames may wait at its end.
pub(crate) fn lane(
    hold: Duration,
    from: &Arc<Mailbox>,
    worker: usize,
    to: &Arc<Mailbox>,
) -> (Lane, Inbound) {
    let (there, arrives) = spsc::channel(LANE_PARCELS);
    let (returns, back) = spsc::channel(LANE_PARCELS);
    let lane = Lane {
        worker,
        there,
        back,
        mailbox: Arc::clone(to),
    };
    let inbound = Inbound {
        there: arrives,
        back: returns,
        mailbox: Arc::clone(from),
        current: None,
        hold: Hold::default(),
        most: hold,
    };
    (lane, inbound)
}

impl Lane {
    /// Sends a parcel off.
    ///
    /// # Errors
    /// The parcel, when the lane is full: a gate has no more parcels than a lane has room for, so
    /// this does not happen.
    pub(super) fn send(&mut self, parcel: Box<Parcel>) -> Result<(), Box<Parcel>> {
        self.there.push(parcel)?;
        self.mailbox.nudge();
        Ok(())
    }

    /// A parcel that is back.
    pub(super) fn receive(&mut self) -> Option<Box<Parcel>> {
        self.back.pop()
    }

    /// Whether a parcel is back.
    pub(super) fn has_work(&mut self) -> bool {
        !self.back.is_empty()
    }
}

impl Inbound {
    /// Delivers at most one parcel. Returns the frames that were delivered or dropped.
    #[inline]
    pub(crate) fn poll(&mut self, slots: &mut Slots) -> usize {
        let Some(mut parcel) = self.current.take().or_else(|| self.there.pop()) else {
            return 0;
        };
        let FrameBurst {
            frames, segments, ..
        } = &mut parcel.burst;
        // From the first frame on that waits: there may be others, dropped, on both sides of it.
        let first = decided(frames);
        let mut done = deliver(slots, parcel.slot, frames, first, segments);
        if let Some(sink) = slots.sink(parcel.slot) {
            sink.flush();
        }
        if done < frames.len() && self.hold.expired(done - first, self.most) {
            drop_waiting(&mut frames[done..], DropReason::PeerFull);
            done = frames.len();
        }
        let moved = done - first;
        if done < frames.len() {
            self.current = Some(parcel);
            return moved;
        }
        self.hold.over();
        // There is room for as many as can be under way.
        if self.back.push(parcel).is_ok() {
            self.mailbox.nudge();
        }
        moved
    }

    /// Whether a parcel waits.
    pub(crate) fn has_work(&mut self) -> bool {
        self.current.is_some() || !self.there.is_empty()
    }
}
