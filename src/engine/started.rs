//! `Vring`: a started virtqueue with the fds and counters that make it a vhost-user object.
//!
//! Common to all endpoints: publish and call, kicks on and off, the one report of a broken ring,
//! and the way to another memory table.

use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::eventfd::EventFd;

use crate::device::CallLimits;
use crate::memory::GuestRam;
use crate::ring::{Areas, RingConfig, RingFault, RingFormat, Virtqueue, VringBase};
use crate::sync::Counter;
use crate::sys::eventfd::Told;

use super::mailbox::{CallFds, Mailbox};
use super::runner::{FdKind, VringSetup};
use super::telling::Teller;

/// What is counted per vring. One writer: the worker that owns it.
#[derive(Debug, Default)]
pub(crate) struct VringCounters {
    /// Calls made.
    pub calls: Counter,
    /// Calls and words of a broken ring that a worker slept in, until it was interrupted.
    pub blocked: Counter,
    /// Times that the ring broke.
    pub faults: Counter,
    /// Requests in flight now; disks only.
    pub in_flight: Counter,
}

/// A virtqueue of format `F` with what the front-end gave for it.
#[derive(Debug)]
pub(crate) struct Vring<F: RingFormat> {
    pub(crate) vq: Virtqueue<F>,
    fds: CallFds,
    kick: Option<EventFd>,
    teller: Teller,
    counters: Arc<VringCounters>,
    /// For the one log line of a broken ring.
    label: String,
    reported: bool,
    /// How calls are put off, if they are.
    limits: Option<CallLimits>,
    /// A call that the driver wants and did not get yet.
    owed: Option<Owed>,
    /// Somebody may have served the ring before, and ended between a publish and the call.
    resumes: bool,
}

/// A call that was put off.
#[derive(Debug)]
struct Owed {
    /// Since when.
    since: Instant,
    /// Buffers that it tells of.
    used: u32,
}

impl<F: RingFormat> Vring<F> {
    /// A vring over `areas`, standing where `setup` says. `label` names it in the log.
    pub(crate) fn new(
        setup: VringSetup,
        teller: Teller,
        areas: Areas,
        label: String,
        counters: Arc<VringCounters>,
        readable_only: bool,
        limits: Option<CallLimits>,
    ) -> Result<Vring<F>, RingFault> {
        let bit = |bit: u32| setup.features & (1 << bit) != 0;
        let base = match setup.base {
            Some(num) => VringBase::from_u32(F::PACKED, num),
            None => VringBase::fresh(F::PACKED),
        };
        let config = RingConfig {
            size: setup.size,
            event_idx: bit(virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX),
            indirect: bit(virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC),
            in_order: bit(virtio_bindings::virtio_config::VIRTIO_F_IN_ORDER),
            readable_only,
            base,
        };
        let mut vring = Vring {
            vq: Virtqueue::new(setup.ram, areas, &config)?,
            fds: CallFds {
                call: setup.call,
                err: setup.err,
            },
            kick: setup.kick,
            teller,
            counters,
            label,
            reported: false,
            limits,
            owed: None,
            resumes: setup.base.is_some(),
        };
        let stands = vring.base();
        if let Some(asked) = setup.base
            && !F::PACKED
            && asked != stands
        {
            // DPDK's virtio-user sends 0 when its back-end was started anew.
            tracing::warn!(
                "{}: base {asked:#x} does not fit the ring in memory, which goes on at {stands:#x}",
                vring.label
            );
        }
        // A worker polls what it was just given; it asks for kicks when it parks.
        vring.vq.set_kicks(false);
        Ok(vring)
    }

    /// Shows the staged used elements to the driver and calls it if it wants to be called.
    #[inline]
    pub(crate) fn publish(&mut self) {
        let used = self.vq.staged();
        if self.vq.publish() {
            if self.limits.is_none() {
                self.call();
            } else {
                self.owe(used);
            }
        } else if let Some(owed) = &mut self.owed {
            owed.used += used;
        }
    }

    fn owe(&mut self, used: u32) {
        let owed = self.owed.get_or_insert_with(|| Owed {
            since: Instant::now(),
            used: 0,
        });
        owed.used += used;
        self.flush_call(false);
    }

    /// Whether calls are put off, so that somebody must ask for them in time.
    pub(crate) fn puts_calls_off(&self) -> bool {
        self.limits.is_some()
    }

    /// Makes the call that is owed, if it is time, or at once with `now`.
    pub(crate) fn flush_call(&mut self, now: bool) {
        let (Some(limits), Some(owed)) = (&self.limits, &self.owed) else {
            return;
        };
        if now || owed.used >= limits.used || owed.since.elapsed() >= limits.wait {
            self.owed = None;
            self.call();
        }
    }

    /// From now on the worker of `mailbox` serves it.
    pub(crate) fn served_by(&mut self, mailbox: &Arc<Mailbox>) {
        self.teller.served_by(mailbox);
        // A driver that sleeps on what was published before may not ask for a call again: the
        // position that it named is behind the ring's. Where a ring begins says nothing, as a
        // packed one is back there after each lap.
        if core::mem::take(&mut self.resumes) {
            self.call();
        }
    }

    fn call(&mut self) {
        if let Some(call) = &self.fds.call {
            match self.teller.tell(call, FdKind::Call) {
                None => {}
                Some(Told::Interrupted) => self.counters.blocked.add(1),
                // A counter that is full has called the driver already.
                Some(_) => self.counters.calls.add(1),
            }
        }
    }

    /// The ring is broken: counts it, says so once, tells the front-end.
    #[cold]
    pub(crate) fn report(&mut self, fault: RingFault) {
        self.vq.latch(fault);
        if !core::mem::replace(&mut self.reported, true) {
            self.counters.faults.add(1);
            tracing::warn!(
                "{}: ring broken by its driver and stopped: {fault}",
                self.label
            );
            if let Some(err) = &self.fds.err
                && self.teller.tell(err, FdKind::Err) == Some(Told::Interrupted)
            {
                self.counters.blocked.add(1);
            }
        }
    }

    /// Turns kicks on or off; on: whether a chain is there already.
    pub(crate) fn set_kicks(&mut self, wanted: bool) -> bool {
        self.vq.set_kicks(wanted)
    }

    /// Exchanges where the driver is called.
    pub(crate) fn set_fds(&mut self, fds: CallFds) -> CallFds {
        let old = core::mem::replace(&mut self.fds, fds);
        // The driver may have missed what went to the old fd: it looks at the ring when called.
        self.call();
        old
    }

    pub(crate) fn kick(&self) -> Option<&EventFd> {
        self.kick.as_ref()
    }

    pub(crate) fn base(&self) -> u32 {
        self.vq.base().to_u32(F::PACKED)
    }

    pub(crate) fn swap(&mut self, ram: Arc<GuestRam>, areas: Areas) -> (Arc<GuestRam>, Areas) {
        self.vq.swap(ram, areas)
    }
}
