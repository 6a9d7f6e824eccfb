//! From devices to workers: which vring lives where, and what stands behind it.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::device::DeviceModel;
use crate::device::blk::{BlkHandler, BlkModel};
use crate::device::net::{NetModel, QueueCounters, RxHandler, RxWindow, TxHandler};
use crate::host::fault::FaultDisk;
use crate::host::net::DropReason;
use crate::host::sink::SinkPort;
use crate::host::switch::{PortRules, Switch};
use crate::host::tap::{self, TapQueue};
use crate::host::xdp::XdpQueue;
use crate::ring::{Areas, RingFault, RingFormat};
use crate::sys::tap::Tap;
use crate::sys::xdp::Xdp;

use super::backing::Backing;
use super::counted;
use super::disk::DiskQueue;
use super::endpoint::Endpoint;
use super::fabric::{Fabric, Gate, Inbound, LANE_PARCELS, Lane, Outlet, Running, lane};
use super::handle::{DeviceHandle, Place};
use super::idle::IdlePolicy;
use super::link::{End, HostPorts, Link};
use super::mailbox::{Command, Mailbox, Retired};
use super::net::{NetRx, NetTx};
use super::placement::{worker_of, workers_of};
use super::places::places_of;
use super::runner::VringSetup;
use super::started::Vring;
use super::telling::{Blocking, Teller, Watch};
use super::topology::{Placement, Topology, groups};
use super::uplink::{HostEnd, HostOutlet, Uplink};
use super::worker::{UringNeed, Worker, WorkerConfig, WorkerCounters};

/// Old memory tables waiting to be unmapped at most; beyond that the worker unmaps itself.
const RETIRED_MAX: usize = 64;

/// Where the frames of a port go.
#[derive(Debug, Clone)]
pub enum LinkSpec {
    /// Back to the sender.
    Echo,
    /// Nowhere.
    Sink,
    /// To and from a tap with a queue for each queue pair.
    Tap(Arc<Tap>),
    /// To and from an interface, by a socket for each queue pair.
    Xdp(Arc<Xdp>),
    /// To and from another port of this daemon, whose link is a wire to this one.
    Wire {
        /// Number of the other port's device.
        peer: usize,
        /// How long frames wait for a receiver without buffers.
        hold: Duration,
    },
    /// A port of a switch.
    Switch {
        /// Number of the switch.
        switch: usize,
        /// What is chosen about the port.
        rules: Box<PortRules>,
    },
}

/// What stands behind the vrings of a device.
#[derive(Debug, Clone)]
pub enum Parts {
    /// A port.
    Net(Arc<NetModel>, LinkSpec),
    /// A disk.
    Blk(Arc<BlkModel>, Backing),
}

impl Parts {
    pub(super) fn model(&self) -> &dyn DeviceModel {
        match self {
            Parts::Net(model, _) => model.as_ref(),
            Parts::Blk(model, _) => model.as_ref(),
        }
    }

    /// Whether its vrings stay with the workers that they are spread over, wherever its memory is.
    pub(super) fn stay(&self) -> bool {
        match self {
            // The ends of a wire must find each other; the rings of a socket have one owner.
            Parts::Net(_, link) => matches!(
                link,
                LinkSpec::Wire { .. } | LinkSpec::Switch { .. } | LinkSpec::Xdp(_)
            ),
            Parts::Blk(..) => false,
        }
    }

    /// The endpoint of a vring in format `F`.
    pub(super) fn endpoint<F: RingFormat>(
        &self,
        setup: VringSetup,
        teller: Teller,
        areas: Areas,
        label: String,
        place: &Place,
    ) -> Result<Endpoint, RingFault> {
        let counters = Arc::clone(&place.counters);
        let (index, size, features) = (setup.index, setup.size, setup.features);
        // VIRTIO 1.3 §5.1.2: receiveq1, transmitq1, receiveq2, …
        let transmits = matches!(self, Parts::Net(..)) && index % 2 == 1;
        let limits = self.model().ring_options().calls;
        let vring = Vring::<F>::new(
            setup,
            teller,
            areas,
            label,
            Arc::clone(&counters),
            transmits,
            limits,
        )?;
        // Control checks indices against the model; a vring that it has not is a ring fault.
        let missing = RingFault::Areas;
        match self {
            Parts::Net(model, _) => {
                let pair = Arc::clone(model.pair_counters(index / 2).ok_or(missing)?);
                if transmits {
                    let handler = TxHandler::new(features, place.bursts, pair);
                    let tx = NetTx::new(vring, handler, Arc::clone(model.limits()));
                    return Ok(Endpoint::Source(Box::new(tx)));
                }
                let window = RxWindow::new(features, size, model.mtu(), Arc::clone(&pair));
                let handler = RxHandler::new(features, size, pair);
                let rx = NetRx::new(vring, handler, window, Arc::clone(model.limits()));
                Ok(Endpoint::Sink(Box::new(rx)))
            }
            Parts::Blk(model, backing) => {
                let handler = BlkHandler::new(model, index, size, features).ok_or(missing)?;
                let queue = Arc::clone(model.queue_counters(index).ok_or(missing)?);
                let setup = model.setup();
                let faults = FaultDisk::new(Arc::clone(&setup.faults), setup.block_size);
                let host = backing.queue();
                let disk = DiskQueue::new(vring, handler, host, faults, counters, queue);
                Ok(Endpoint::Disk(Box::new(disk)))
            }
        }
    }

    /// The counters of queue pair `pair`.
    fn counters(&self, pair: u16) -> Option<Arc<QueueCounters>> {
        match self {
            Parts::Net(model, _) => model.pair_counters(pair).cloned(),
            Parts::Blk(..) => None,
        }
    }

    /// The host side follows the acknowledged features.
    pub(super) fn negotiated(&self, features: u64) -> io::Result<()> {
        match self {
            Parts::Net(_, LinkSpec::Tap(tap)) => tap::follow_features(tap, features),
            _ => Ok(()),
        }
    }

    /// No vring is started yet: a tap keeps one queue, so that it has a carrier.
    fn nobody_served(&self) -> io::Result<()> {
        match self {
            Parts::Net(model, LinkSpec::Tap(_)) => (0..model.vrings_max())
                .step_by(2)
                .try_for_each(|index| self.served(index, false)),
            _ => Ok(()),
        }
    }

    /// What the host counts, by name.
    pub(super) fn host_counters(&self) -> Vec<(&'static str, u64)> {
        match self {
            Parts::Net(_, LinkSpec::Tap(tap)) => counted::of_tap(tap),
            Parts::Net(_, LinkSpec::Xdp(xdp)) => counted::of_xdp(xdp),
            _ => Vec::new(),
        }
    }

    /// A vring is about to be stopped: what comes from now on must not wait for the next guest.
    pub(super) fn stopping(&self, index: u16) -> io::Result<()> {
        match self {
            Parts::Net(_, LinkSpec::Xdp(_)) => self.served(index, false),
            _ => Ok(()),
        }
    }

    /// A vring was disabled (`true`), or will be enabled again: of a tap's queues only the first
    /// stays, and keeps its frames. What an interface has for a disabled vring its worker counts.
    pub(super) fn paused(&self, index: u16, paused: bool) -> io::Result<()> {
        match self {
            Parts::Net(_, LinkSpec::Tap(_)) if index > 0 => self.served(index, !paused),
            _ => Ok(()),
        }
    }

    /// A vring starts (`true`) or has stopped: the kernel spreads frames over a tap's attached
    /// queues, so only those that somebody reads may be attached, and an interface's frames are
    /// kept only for a guest that is there.
    pub(super) fn served(&self, index: u16, served: bool) -> io::Result<()> {
        match self {
            Parts::Net(model, LinkSpec::Tap(tap)) if index.is_multiple_of(2) => {
                let pair = index / 2;
                if let Some(queue) = TapQueue::new(tap, pair)
                    && let Some(counters) = model.pair_counters(pair)
                {
                    // They were for a guest that is gone, or not there yet; with a queue that is
                    // detached the kernel throws them away and tells nobody. No worker has the
                    // vring that it would count for, or it is paused there.
                    let lost = queue.discard_waiting();
                    counters.rx.add_lost(DropReason::PeerDown, lost);
                }
                tap.set_attached(pair, served || pair == 0)
            }
            Parts::Net(_, LinkSpec::Xdp(xdp)) if index.is_multiple_of(2) => {
                xdp.set_receiving(index / 2, served)
            }
            _ => Ok(()),
        }
    }
}

/// A device, and who may serve it.
#[derive(Debug, Clone)]
pub struct Member {
    /// What stands behind its vrings.
    pub parts: Parts,
    /// The cores whose workers may serve it; those that have none are left out, and when none is
    /// left all may.
    pub cores: Vec<usize>,
}

/// How the engine is set up.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// One worker for each.
    pub cores: Vec<usize>,
    /// What they do without work.
    pub idle: IdlePolicy,
    /// How long a stop waits for requests in flight.
    pub stop_timeout: Duration,
    /// How workers are chosen.
    pub placement: Placement,
    /// Who knows the memory nodes.
    pub topology: Topology,
    /// Ports of switches behind which is no guest.
    pub uplinks: Vec<Uplink>,
    /// Seconds after which a switch forgets a station, by the number of the switch.
    pub ageing: Vec<(usize, u32)>,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            cores: Vec::new(),
            idle: IdlePolicy::default(),
            stop_timeout: Duration::from_secs(10),
            placement: Placement::default(),
            topology: Topology::MACHINE,
            uplinks: Vec::new(),
            ageing: Vec::new(),
        }
    }
}

impl Member {
    /// How long what it sends into a wire may wait.
    fn hold(&self) -> Duration {
        match self.parts {
            Parts::Net(_, LinkSpec::Wire { hold, .. }) => hold,
            _ => Duration::ZERO,
        }
    }

    /// The switch that it is a port of.
    fn switch(&self) -> Option<usize> {
        match &self.parts {
            Parts::Net(_, LinkSpec::Switch { switch, .. }) => Some(*switch),
            _ => None,
        }
    }

    /// The numbers of the workers that may serve it, in groups of which one is chosen when its
    /// vrings start.
    pub(super) fn groups(&self, options: &EngineOptions) -> Vec<(Option<usize>, Vec<usize>)> {
        let cores = &options.cores;
        let workers = workers_of(&self.cores, cores);
        let placement = if self.parts.stay() {
            Placement::Spread
        } else {
            options.placement
        };
        groups(placement, &workers, |worker| {
            (options.topology.of_core)(cores[worker])
        })
    }
}

/// The workers.
#[derive(Debug)]
pub struct Engine {
    workers: Vec<(Arc<Mailbox>, JoinHandle<()>, Arc<WorkerCounters>)>,
    retire: Option<JoinHandle<()>>,
    /// Sees to it that none of them sleeps in an fd of a front-end.
    watch: Watch,
}

/// What a worker will be made of.
pub(super) struct Plan {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) slots: Vec<Running>,
    links: Vec<Link>,
    inbounds: Vec<Inbound>,
    ports: HostPorts,
    pub(super) uring: UringNeed,
}

impl Engine {
    /// Starts the workers and gives each device its places.
    ///
    /// # Errors
    /// A core that can't be used, or what the kernel refuses.
    pub fn start(
        options: &EngineOptions,
        devices: Vec<Member>,
    ) -> io::Result<(Engine, Vec<Arc<DeviceHandle>>)> {
        let mut plans = Vec::new();
        for _ in &options.cores {
            plans.push(Plan {
                mailbox: Arc::new(Mailbox::new()?),
                slots: Vec::new(),
                links: Vec::new(),
                inbounds: Vec::new(),
                ports: HostPorts::default(),
                uring: UringNeed::default(),
            });
        }
        let mut places: Vec<Vec<Vec<Place>>> = (0..)
            .zip(&devices)
            .map(|(number, device)| {
                let mut groups = device.groups(options);
                if let Some(worker) = worker_of_switch(&devices, device, options) {
                    groups = vec![(None, vec![worker])];
                }
                places_of(&mut plans, number, &device.parts, &groups)
            })
            .collect();
        join_all(&mut plans, &mut places, &devices, options)?;
        let handle = |(number, (device, places)): (usize, (Member, _))| {
            let blocking = Arc::new(Blocking::new()?);
            let handle = DeviceHandle::new(number, device, places, blocking, options);
            Ok(Arc::new(handle))
        };
        let each = devices.into_iter().zip(places).enumerate();
        let handles: Vec<_> = each.map(handle).collect::<io::Result<_>>()?;
        let (retired, receive): (Sender<Retired>, Receiver<Retired>) = bounded(RETIRED_MAX);
        let retire = std::thread::Builder::new()
            .name("retire".into())
            .spawn(move || receive.into_iter().for_each(drop))?;
        let mailboxes = plans.iter().map(|plan| Arc::clone(&plan.mailbox));
        let mut engine = Engine {
            workers: Vec::new(),
            watch: Watch::begin(mailboxes.collect())?,
            retire: Some(retire),
        };
        for (plan, &core) in plans.into_iter().zip(&options.cores) {
            let counters = Arc::new(WorkerCounters::default());
            let mailbox = Arc::clone(&plan.mailbox);
            let thread = Worker::spawn(WorkerConfig {
                core,
                policy: options.idle,
                slots: plan.slots,
                links: plan.links,
                inbounds: plan.inbounds,
                ports: plan.ports,
                uring: plan.uring,
                retired: retired.clone(),
                mailbox: plan.mailbox,
                counters: Arc::clone(&counters),
            })?;
            engine.workers.push((mailbox, thread, counters));
        }
        // Only now: a worker can't wait for a queue that was detached when it began to.
        for handle in &handles {
            handle.parts.nobody_served()?;
        }
        Ok((engine, handles))
    }

    /// The workers' counters by name, one list per worker.
    pub fn counters(&self) -> Vec<Vec<(&'static str, u64)>> {
        let of = |c: &WorkerCounters| {
            vec![
                ("busy_turns", c.busy_turns.get()),
                ("empty_turns", c.empty_turns.get()),
                ("parks", c.parks.get()),
                ("bounded_parks", c.bounded_parks.get()),
            ]
        };
        self.workers
            .iter()
            .map(|(_, _, counters)| of(counters))
            .collect()
    }

    /// Wakes the workers: limits that some of them sleep for have changed.
    pub fn wake(&self) {
        for (mailbox, _, _) in &self.workers {
            mailbox.nudge();
        }
    }

    /// Ends the workers. Every vring should be stopped before.
    pub fn stop(mut self) {
        for (mailbox, _, _) in &self.workers {
            let _ = mailbox.send(Command::Exit, Instant::now() + Duration::from_secs(5));
        }
        for (_, thread, _) in self.workers.drain(..) {
            let _ = thread.join();
        }
        // Until here one of them might have slept.
        drop(self.watch);
        if let Some(retire) = self.retire.take() {
            let _ = retire.join();
        }
    }
}

/// Makes the links of all devices, in each of their groups.
fn join_all(
    plans: &mut [Plan],
    places: &mut [Vec<Vec<Place>>],
    devices: &[Member],
    options: &EngineOptions,
) -> io::Result<()> {
    let mut joined = Vec::new();
    for (number, device) in devices.iter().enumerate() {
        match &device.parts {
            &Parts::Net(_, LinkSpec::Wire { peer, .. }) => {
                // Once, for both ends.
                if let Some(other) = devices.get(peer).filter(|_| number < peer) {
                    let holds = [device, other].map(Member::hold);
                    join_wire(plans, places, [number, peer], holds);
                }
            }
            &Parts::Net(_, LinkSpec::Switch { switch, .. }) => {
                // Once, for all ports.
                if !joined.contains(&switch) {
                    joined.push(switch);
                    join_switch(plans, places, devices, switch, options)?;
                }
            }
            Parts::Net(_, link) => {
                let groups = places[number].iter();
                groups.for_each(|places| join(plans, places, device, link));
            }
            Parts::Blk(..) => {}
        }
    }
    Ok(())
}

/// Makes the links of a device whose vrings have these places.
fn join(plans: &mut [Plan], places: &[Place], device: &Member, link: &LinkSpec) {
    for (pair, vrings) in (0..).zip(places.chunks_exact(2)) {
        let (plan, rx, tx) = (&mut plans[vrings[0].worker], vrings[0].slot, vrings[1].slot);
        match link {
            LinkSpec::Echo => plan.links.push(Link::new(End::Vring(tx), End::Vring(rx))),
            LinkSpec::Sink => plan
                .links
                .push(Link::new(End::Vring(tx), End::Sink(SinkPort::new()))),
            LinkSpec::Tap(tap) => join_tap(plan, tap, [rx, tx], pair),
            LinkSpec::Xdp(xdp) => join_xdp(plan, xdp, [rx, tx], device.parts.counters(pair)),
            LinkSpec::Wire { .. } | LinkSpec::Switch { .. } => {}
        }
    }
}

/// Links the vrings `rx` and `tx` of queue pair `pair` with a queue of `tap`.
fn join_tap(plan: &mut Plan, tap: &Tap, [rx, tx]: [usize; 2], pair: u16) {
    // A single-queue tap serves the first pair; its frames may come from any.
    let Some(queue) = TapQueue::new(tap, pair).or_else(|| TapQueue::new(tap, 0)) else {
        return;
    };
    plan.ports.taps.push(queue);
    let at = plan.ports.taps.len() - 1;
    plan.links.push(Link::new(End::Vring(tx), End::Tap(at)));
    if usize::from(pair) < tap.queues() {
        plan.links.push(Link::new(End::Tap(at), End::Vring(rx)));
    }
}

/// Links the vrings `rx` and `tx` of the next queue pair, which has these counters, with the next
/// queue of `xdp`.
fn join_xdp(
    plan: &mut Plan,
    xdp: &Xdp,
    [rx, tx]: [usize; 2],
    counters: Option<Arc<QueueCounters>>,
) {
    let Some(queue) = XdpQueue::take(xdp) else {
        return;
    };
    plan.ports.xdps.push(queue);
    let at = plan.ports.xdps.len() - 1;
    plan.links.push(Link::new(End::Vring(tx), End::Xdp(at)));
    let enters = Link::new(End::Xdp(at), End::Vring(rx));
    plan.links.push(enters.with_losses(counters));
}

/// Joins two devices by a wire.
fn join_wire(
    plans: &mut [Plan],
    places: &mut [Vec<Vec<Place>>],
    ends: [usize; 2],
    holds: [Duration; 2],
) {
    let outlets = ends.map(|device| outlets(&places[device][0]));
    let fabric = Arc::new(Fabric::wire(outlets, holds));
    for (port, device) in ends.into_iter().enumerate() {
        for (pair, vrings) in places[device][0].chunks_exact_mut(2).enumerate() {
            let tx = &mut vrings[1];
            let lanes = lanes(plans, &fabric, port, tx.worker);
            if !lanes.is_empty() {
                tx.bursts = LANE_PARCELS;
            }
            let gate = Gate::new(Arc::clone(&fabric), [port, pair], tx.worker, lanes);
            let sink = End::Gate(Box::new(gate));
            plans[tx.worker]
                .links
                .push(Link::new(End::Vring(tx.slot), sink));
        }
    }
}

/// The worker that serves the switch of `device`, if it is a port of one: that of the first port.
fn worker_of_switch(devices: &[Member], device: &Member, options: &EngineOptions) -> Option<usize> {
    let own = device.switch()?;
    let first = devices.iter().find(|other| other.switch() == Some(own))?;
    let groups = first.groups(options);
    groups
        .first()
        .map(|(_, workers)| worker_of(own, 0, workers))
}

/// Joins all ports of a switch.
fn join_switch(
    plans: &mut [Plan],
    places: &[Vec<Vec<Place>>],
    devices: &[Member],
    switch: usize,
    options: &EngineOptions,
) -> io::Result<()> {
    let is_port = |device: &&Member| device.switch() == Some(switch);
    let mut rules = Vec::new();
    let mut models = Vec::new();
    let mut ports = Vec::new();
    for (device, places) in devices.iter().zip(places).filter(|(d, _)| is_port(d)) {
        if let Parts::Net(model, LinkSpec::Switch { rules: own, .. }) = &device.parts {
            rules.push(own.as_ref().clone());
            models.push(Arc::clone(model));
            ports.push(&places[0]);
        }
    }
    let outlets = ports.iter().map(|places| outlets(places)).collect();
    // All ports of a switch have the worker of the first.
    let worker = ports[0][0].worker;
    let mut hosts = Vec::new();
    for uplink in options.uplinks.iter().filter(|u| u.switch == switch) {
        uplink.start()?;
        let outlet = HostOutlet::open(uplink, &mut plans[worker].ports);
        hosts.push(outlet.ok_or_else(|| io::Error::other("an uplink has no queue"))?);
        rules.push(uplink.rules.clone());
    }
    let sources: Vec<_> = hosts.iter().map(HostOutlet::end).collect();
    let table = Switch::new(rules, options.ageing_of(switch));
    let fabric = Arc::new(Fabric::switch(table, outlets, models, hosts));
    for (port, end) in (ports.len()..).zip(sources) {
        let gate = Gate::new(Arc::clone(&fabric), [port, 0], worker, Vec::new());
        let source = match end {
            HostEnd::Tap(at) => End::Tap(at),
            HostEnd::Xdp(at) => End::Xdp(at),
        };
        let link = Link::new(source, End::Gate(Box::new(gate)));
        plans[worker].links.push(link);
    }
    for (port, places) in ports.into_iter().enumerate() {
        for (pair, vrings) in places.chunks_exact(2).enumerate() {
            let tx = &vrings[1];
            let gate = Gate::new(Arc::clone(&fabric), [port, pair], tx.worker, Vec::new());
            let link = Link::new(End::Vring(tx.slot), End::Gate(Box::new(gate)));
            plans[tx.worker].links.push(link);
        }
    }
    Ok(())
}

/// Where the queue pairs with these places receive.
fn outlets(places: &[Place]) -> Vec<Outlet> {
    let outlet = |vrings: &[Place]| Outlet {
        worker: vrings[0].worker,
        slot: vrings[0].slot,
        running: vrings[0].running.clone(),
    };
    places.chunks_exact(2).map(outlet).collect()
}

/// Lanes from a gate of `port` on `worker` to all others on which its peer may receive.
fn lanes(plans: &mut [Plan], fabric: &Arc<Fabric>, port: usize, worker: usize) -> Vec<Lane> {
    let mut lanes = Vec::new();
    for other in fabric.workers_of(1 - port, worker) {
        let (near, far) = lane(
            fabric.hold(port),
            &plans[worker].mailbox,
            other,
            &plans[other].mailbox,
        );
        plans[other].inbounds.push(far);
        lanes.push(near);
    }
    lanes
}
