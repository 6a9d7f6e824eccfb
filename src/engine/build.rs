//! From devices to workers: which vring lives where, and what stands behind it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::device::DeviceModel;
use crate::device::blk::{BlkHandler, BlkModel};
use crate::device::net::{NetModel, RxHandler, RxWindow, TxHandler};
use crate::host::null::NullDisk;
use crate::host::ram::RamDisk;
use crate::host::sink::SinkPort;
use crate::host::tap::{self, TapQueue};
use crate::host::uring::UringDisk;
use crate::memory::Store;
use crate::ring::{Areas, RingFault, RingFormat};
use crate::sys::disk::DiskFile;
use crate::sys::tap::Tap;

use super::disk::{DiskQueue, HostDisk, IN_FLIGHT_MAX};
use super::endpoint::Endpoint;
use super::handle::{DeviceHandle, Place};
use super::idle::IdlePolicy;
use super::link::{End, Link};
use super::mailbox::{Command, Mailbox, Retired};
use super::net::{NetRx, NetTx};
use super::placement::worker_of;
use super::runner::VringSetup;
use super::started::{Vring, VringCounters};
use super::worker::{Worker, WorkerConfig, WorkerCounters};

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
}

/// Where the blocks of a disk are.
#[derive(Debug, Clone)]
pub enum Backing {
    /// A file or block device.
    File(Arc<DiskFile>),
    /// Memory of the daemon.
    Ram(Arc<Store>),
    /// Nowhere.
    Null,
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
    fn model(&self) -> &dyn DeviceModel {
        match self {
            Parts::Net(model, _) => model.as_ref(),
            Parts::Blk(model, _) => model.as_ref(),
        }
    }

    /// The endpoint of a vring in format `F`.
    pub(super) fn endpoint<F: RingFormat>(
        &self,
        setup: VringSetup,
        areas: Areas,
        label: String,
        counters: Arc<VringCounters>,
    ) -> Result<Endpoint, RingFault> {
        let (index, size, features) = (setup.index, setup.size, setup.features);
        // VIRTIO 1.3 §5.1.2: receiveq1, transmitq1, receiveq2, …
        let transmits = matches!(self, Parts::Net(..)) && index % 2 == 1;
        let limits = self.model().ring_options().calls;
        let vring = Vring::<F>::new(
            setup,
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
                    let tx = NetTx::new(vring, TxHandler::new(features, pair));
                    return Ok(Endpoint::Source(Box::new(tx)));
                }
                let window = RxWindow::new(features, size, model.mtu(), Arc::clone(&pair));
                let rx = NetRx::new(vring, RxHandler::new(features, size, pair), window);
                Ok(Endpoint::Sink(Box::new(rx)))
            }
            Parts::Blk(model, backing) => {
                let handler = BlkHandler::new(model, index, size, features).ok_or(missing)?;
                let queue = Arc::clone(model.queue_counters(index).ok_or(missing)?);
                let host = match backing {
                    Backing::File(file) => HostDisk::Uring(UringDisk::new(Arc::clone(file))),
                    Backing::Ram(store) => {
                        HostDisk::Ram(RamDisk::new(Arc::clone(store), IN_FLIGHT_MAX))
                    }
                    Backing::Null => HostDisk::Null(NullDisk::new(IN_FLIGHT_MAX)),
                };
                let disk = DiskQueue::new(vring, handler, host, counters, queue);
                Ok(Endpoint::Disk(Box::new(disk)))
            }
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

    /// A vring starts (`true`) or has stopped: the kernel spreads frames over a tap's attached
    /// queues, so only those that somebody reads may be attached.
    pub(super) fn served(&self, index: u16, served: bool) -> io::Result<()> {
        match self {
            Parts::Net(_, LinkSpec::Tap(tap)) if index.is_multiple_of(2) => {
                let pair = index / 2;
                if served && let Some(queue) = TapQueue::new(tap, pair) {
                    queue.discard_waiting();
                }
                tap.set_attached(pair, served || pair == 0)
            }
            _ => Ok(()),
        }
    }
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
}

/// The workers.
#[derive(Debug)]
pub struct Engine {
    workers: Vec<(Arc<Mailbox>, JoinHandle<()>, Arc<WorkerCounters>)>,
    retire: Option<JoinHandle<()>>,
}

/// What a worker will be made of.
struct Plan {
    mailbox: Arc<Mailbox>,
    slots: usize,
    links: Vec<Link>,
    taps: Vec<TapQueue>,
    needs_uring: bool,
}

impl Engine {
    /// Starts the workers and gives each device its places.
    ///
    /// # Errors
    /// A core that can't be used, or what the kernel refuses.
    pub fn start(
        options: &EngineOptions,
        devices: Vec<Parts>,
    ) -> io::Result<(Engine, Vec<Arc<DeviceHandle>>)> {
        let mut plans = Vec::new();
        for _ in &options.cores {
            plans.push(Plan {
                mailbox: Arc::new(Mailbox::new()?),
                slots: 0,
                links: Vec::new(),
                taps: Vec::new(),
                needs_uring: false,
            });
        }
        let mut handles = Vec::new();
        for (number, parts) in devices.into_iter().enumerate() {
            handles.push(Arc::new(place(
                &mut plans,
                number,
                parts,
                options.stop_timeout,
            )));
        }
        let (retired, receive): (Sender<Retired>, Receiver<Retired>) = bounded(RETIRED_MAX);
        let retire = std::thread::Builder::new()
            .name("retire".into())
            .spawn(move || receive.into_iter().for_each(drop))?;
        let mut engine = Engine {
            workers: Vec::new(),
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
                taps: plan.taps,
                needs_uring: plan.needs_uring,
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

    /// Ends the workers. Every vring should be stopped before.
    pub fn stop(mut self) {
        for (mailbox, _, _) in &self.workers {
            let _ = mailbox.send(Command::Exit, Instant::now() + Duration::from_secs(5));
        }
        for (_, thread, _) in self.workers.drain(..) {
            let _ = thread.join();
        }
        if let Some(retire) = self.retire.take() {
            let _ = retire.join();
        }
    }
}

/// Gives every vring of a device its place, and the links between them.
fn place(plans: &mut [Plan], device: usize, parts: Parts, stop_timeout: Duration) -> DeviceHandle {
    let vrings = parts.model().vrings_max();
    let per_unit = if matches!(parts, Parts::Net(..)) {
        2
    } else {
        1
    };
    let mut places = Vec::new();
    for index in 0..vrings {
        let unit = index / per_unit;
        let plan = &mut plans[worker_of(device, unit, plans.len())];
        let slot = plan.slots;
        plan.slots += 1;
        places.push(Place {
            mailbox: Arc::clone(&plan.mailbox),
            slot,
            size: AtomicU16::new(0),
            counters: Arc::default(),
        });
        match &parts {
            Parts::Blk(_, backing) => plan.needs_uring |= matches!(backing, Backing::File(_)),
            Parts::Net(_, link) if index % 2 == 1 => join(plan, link, slot - 1, slot, unit),
            Parts::Net(..) => {}
        }
    }
    DeviceHandle {
        name: parts.model().name().to_owned(),
        parts,
        places,
        stop_timeout,
        features: AtomicU64::new(0),
    }
}

/// Links the vrings `rx` and `tx` of queue pair `pair`.
fn join(plan: &mut Plan, link: &LinkSpec, rx: usize, tx: usize, pair: u16) {
    match link {
        LinkSpec::Echo => plan.links.push(Link::new(End::Vring(tx), End::Vring(rx))),
        LinkSpec::Sink => plan
            .links
            .push(Link::new(End::Vring(tx), End::Sink(SinkPort::new()))),
        LinkSpec::Tap(tap) => {
            // A single-queue tap serves the first pair; its frames may come from any.
            let Some(queue) = TapQueue::new(tap, pair).or_else(|| TapQueue::new(tap, 0)) else {
                return;
            };
            plan.taps.push(queue);
            let at = plan.taps.len() - 1;
            plan.links.push(Link::new(End::Vring(tx), End::Tap(at)));
            if usize::from(pair) < tap.queues() {
                plan.links.push(Link::new(End::Tap(at), End::Vring(rx)));
            }
        }
    }
}
