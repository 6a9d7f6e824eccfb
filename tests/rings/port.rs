//! A port of a running engine, and the guest at its rings.

use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;
use vringd::device::DeviceModel;
use vringd::device::net::{LinkInfo, NetModel, NetOptions, Offloads, feature};
use vringd::engine::{
    DeviceHandle, Engine, EngineOptions, IdlePolicy, LinkSpec, Member, Parts, VringAddr,
    VringRunner, VringSetup,
};
use vringd::memory::GuestRam;
use vringd::ring::RingFormat;
use vringd::testing::driver::{Buf, Driver, RingMemory, UVA, read_guest, write_guest};

use crate::support::deadline::wait_until;

const RAM: u64 = 0x40_0000;
const BUFFERS: u64 = 0x10_0000;
const BUFFER: u64 = 2048;
/// Descriptors in each ring.
pub const SIZE: u16 = 64;
const HEADER: usize = 12;
pub const PATIENCE: Duration = Duration::from_secs(10);
const PACKED: u64 = 1 << 34;

pub fn model(name: &str, pairs: u16) -> Arc<NetModel> {
    Arc::new(NetModel::new(NetOptions {
        name: name.to_owned(),
        queue_pairs: pairs,
        mac: None,
        mtu: None,
        offloads: Offloads::CSUM_TSO,
        link: LinkInfo::default(),
        rings: vringd::device::RingOptions::default(),
    }))
}

/// One port and its guest.
pub struct Port<D: Driver> {
    pub handle: Arc<DeviceHandle>,
    pub model: Arc<NetModel>,
    pub ram: Arc<GuestRam>,
    pub rings: Vec<RingMemory>,
    pub drivers: Vec<D>,
    pub started: Vec<u16>,
    /// With one the device is told of what it wants to be told of; without it polls.
    pub kick: Option<EventFd>,
}

impl<D: Driver> Port<D> {
    pub fn new(handle: Arc<DeviceHandle>, model: Arc<NetModel>) -> Port<D> {
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let mut rings = Vec::new();
        let mut at = 0;
        for _ in 0..model.vrings_max() {
            let ring = RingMemory::new::<D::Format>(&ram, at, SIZE);
            at = ring.end::<D::Format>().next_multiple_of(4096);
            rings.push(ring);
        }
        let drivers = rings.iter().map(|ring| D::new(ring, false)).collect();
        Port {
            handle,
            model,
            ram,
            rings,
            drivers,
            started: Vec::new(),
            kick: None,
        }
    }

    /// Where vring `index` lies.
    pub fn addr(&self, index: u16) -> VringAddr {
        let [desc, driver, device] = self.rings[usize::from(index)].at.map(|gpa| gpa + UVA);
        VringAddr {
            desc,
            driver,
            device,
        }
    }

    pub fn start(&mut self, index: u16) {
        self.start_with(index, 0, None);
    }

    /// Where it stood when it was stopped.
    pub fn go_on(&mut self, index: u16, base: u32) {
        self.start_at(index, 0, None, Some(base));
    }

    /// With more features than the usual ones, and an err fd.
    pub fn start_with(&mut self, index: u16, more: u64, err: Option<&EventFd>) {
        self.start_at(index, more, err, None);
    }

    fn start_at(&mut self, index: u16, more: u64, err: Option<&EventFd>, base: Option<u32>) {
        let packed = if D::Format::PACKED { PACKED } else { 0 };
        self.handle
            .start(VringSetup {
                index,
                size: SIZE,
                features: feature::VERSION_1 | feature::MRG_RXBUF | packed | more,
                base,
                addr: self.addr(index),
                ram: Arc::clone(&self.ram),
                kick: self.kick.as_ref().map(|fd| fd.try_clone().unwrap()),
                call: None,
                err: err.map(|fd| fd.try_clone().unwrap()),
            })
            .unwrap();
        self.started.push(index);
    }

    /// Returns the low half of the base: where the ring stands.
    pub fn stop(&mut self, index: u16) -> u32 {
        self.pull(index) & 0xffff
    }

    /// Stops a vring. Returns its base, with which it may go on.
    pub fn pull(&mut self, index: u16) -> u32 {
        let base = self.handle.stop(index).unwrap();
        self.started.retain(|&other| other != index);
        base
    }

    /// Where buffer `number` of vring `index` is.
    pub fn buffer(index: u16, number: u64) -> u64 {
        BUFFERS + (u64::from(index) * u64::from(SIZE) + number) * BUFFER
    }

    /// Posts `count` receive buffers.
    pub fn post(&mut self, pair: u16, count: u64) {
        for number in 0..count {
            let buf = Buf::writable(Self::buffer(2 * pair, number), 2048);
            self.drivers[usize::from(2 * pair)].add(&[buf]).unwrap();
        }
        self.publish(2 * pair);
    }

    fn publish(&mut self, index: u16) {
        let wanted = self.drivers[usize::from(index)].publish();
        if let Some(kick) = self.kick.as_ref().filter(|_| wanted) {
            kick.write(1).unwrap();
        }
    }

    /// Sends a frame from place `number`.
    pub fn send(&mut self, pair: u16, number: u64, payload: &[u8]) {
        self.put(pair, number, payload);
        self.publish(2 * pair + 1);
    }

    /// Sends frames from places 0 to `count` all at once.
    pub fn send_burst(&mut self, pair: u16, count: u64, payload: impl Fn(u64) -> Vec<u8>) {
        (0..count).for_each(|number| self.put(pair, number, &payload(number)));
        self.publish(2 * pair + 1);
    }

    /// Makes a frame ready that is sent with the next that is.
    fn put(&mut self, pair: u16, number: u64, payload: &[u8]) {
        let (index, at) = (2 * pair + 1, Self::buffer(2 * pair + 1, number));
        write_guest(&self.ram, at, &[0; HEADER]);
        write_guest(&self.ram, at + HEADER as u64, payload);
        let len = u32::try_from(HEADER + payload.len()).unwrap();
        let driver = &mut self.drivers[usize::from(index)];
        driver.add(&[Buf::readable(at, len)]).unwrap();
    }

    /// The next frame received, from buffer `number`.
    pub fn receive(&mut self, pair: u16, number: u64) -> Vec<u8> {
        let driver = &mut self.drivers[usize::from(2 * pair)];
        let (_, len) = wait_until("a frame comes", PATIENCE, || driver.used());
        let at = Self::buffer(2 * pair, number);
        read_guest(&self.ram, at + HEADER as u64, len as usize - HEADER)
    }

    pub fn await_sent(&mut self, pair: u16) {
        let driver = &mut self.drivers[usize::from(2 * pair + 1)];
        wait_until("the buffer is given back", PATIENCE, || driver.used());
    }

    pub fn counter(&self, name: &str) -> u64 {
        let counters = DeviceModel::counters(self.model.as_ref());
        counters.iter().find(|(n, _)| *n == name).unwrap().1
    }
}

/// A port that has its workers to itself. They end with it, so that a case that fails leaves none
/// to the next.
pub struct Alone<D: Driver> {
    pub engine: Option<Engine>,
    pub port: Port<D>,
}

impl<D: Driver> Alone<D> {
    /// One that sends every frame back, with so many queue pairs, on workers of these cores.
    pub fn echo(pairs: u16, cores: &[usize], idle: IdlePolicy) -> Alone<D> {
        Alone::new(model("net0", pairs), LinkSpec::Echo, cores, idle)
    }

    pub fn new(
        model: Arc<NetModel>,
        link: LinkSpec,
        cores: &[usize],
        idle: IdlePolicy,
    ) -> Alone<D> {
        let member = Member {
            parts: Parts::Net(Arc::clone(&model), link),
            cores: cores.to_vec(),
        };
        let options = EngineOptions {
            cores: cores.to_vec(),
            idle,
            stop_timeout: PATIENCE,
            ..EngineOptions::default()
        };
        let (engine, mut handles) = Engine::start(&options, vec![member]).unwrap();
        Alone {
            engine: Some(engine),
            port: Port::new(handles.remove(0), model),
        }
    }
}

impl<D: Driver> Drop for Alone<D> {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.take() {
            engine.stop();
        }
    }
}

/// What the workers have counted by this name, all together.
pub fn workers_counted(engine: &Engine, name: &str) -> u64 {
    let counters = engine.counters().concat();
    let of_name = counters.iter().filter(|(other, _)| *other == name);
    of_name.map(|(_, count)| count).sum()
}

pub fn payload(seed: u64, bytes: usize) -> Vec<u8> {
    (0..bytes as u64)
        .map(|at| (at.wrapping_mul(31) ^ seed.wrapping_mul(0x9e37)).to_le_bytes()[0])
        .collect()
}

/// A driver over a ring that was zeroed.
pub fn fresh<D: Driver>(ring: &RingMemory) -> D {
    let areas = ring.areas::<D::Format>();
    for area in [&areas.desc, &areas.driver, &areas.device] {
        for at in (0..area.len() & !1).step_by(2) {
            area.store16(at, 0);
        }
    }
    D::new(ring, false)
}
