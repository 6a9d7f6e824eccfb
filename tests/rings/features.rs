//! Every set of features that a net driver may have taken: frames of all kinds of chains go there
//! and back, with kicks where the device asks for them, and calls where the driver does
//! (VIRTIO 1.3 §5.1.6, §6).

use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vringd::device::DeviceModel;
use vringd::device::net::feature;
use vringd::engine::{IdlePolicy, VringRunner, VringSetup};
use vringd::ring::{Desc, RingFormat};
use vringd::testing::driver::{
    Buf, Calls, Driver, PackedDriver, SplitDriver, read_guest, write_guest,
};

use super::port::{Alone, PATIENCE, Port, SIZE, fresh, payload};

pub const ANY_LAYOUT: u64 = 1 << 27;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
const PACKED: u64 = 1 << 34;
pub const IN_ORDER: u64 = 1 << 35;
pub const ORDER_PLATFORM: u64 = 1 << 36;
pub const NOTIFICATION_DATA: u64 = 1 << 38;

/// Tables, behind all buffers.
const TABLES: u64 = 0x3f_0000;
/// Frames in a burst, and bursts: more than two laps of chains of three descriptors, more than one
/// of chains of one.
const FRAMES: u64 = 16;
const ROUNDS: u64 = 5;
/// Frames in a burst that goes into several buffers each: as many as these leave room for.
const MERGED: u64 = 4;
/// Bytes of such a buffer: a frame takes up to five.
const SHORT: u32 = 320;

pub fn wait_for<T>(what: &str, features: u64, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{what}, features {features:#x}: not within {PATIENCE:?}"
        );
        std::thread::yield_now();
    }
}

/// A queue pair whose driver took `features`.
pub struct Guest<'a, D: Driver> {
    port: &'a mut Port<D>,
    features: u64,
    /// In a burst: what the ring has room for.
    frames: u64,
    /// Bytes of a receive buffer.
    room: u32,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    errs: [EventFd; 2],
}

impl<D: Driver> Guest<'_, D> {
    /// On rings that are made anew.
    pub fn new(port: &mut Port<D>, features: u64) -> Guest<'_, D> {
        let fds = || [0; 2].map(|_| EventFd::new(EFD_NONBLOCK).unwrap());
        let shortest = port.rings.iter().map(|ring| ring.size).min().unwrap();
        for at in 0..2 {
            let ring = port.rings[at].clone();
            drop(fresh::<D>(&ring));
            port.drivers[at] = D::new(&ring, features & EVENT_IDX != 0);
            port.drivers[at].set_in_order(features & IN_ORDER != 0);
        }
        let guest = Guest {
            features,
            frames: FRAMES.min(u64::from(shortest / 3)),
            room: 2048,
            kicks: fds(),
            calls: fds(),
            errs: fds(),
            port,
        };
        (0..2).for_each(|index| guest.start(index, None));
        guest
    }

    fn start(&self, index: u16, base: Option<u32>) {
        let packed = if D::Format::PACKED { PACKED } else { 0 };
        let copy = |fds: &[EventFd; 2]| fds[usize::from(index)].try_clone().unwrap();
        let setup = VringSetup {
            index,
            size: self.port.rings[usize::from(index)].size,
            features: self.features | packed,
            base,
            addr: self.port.addr(index),
            ram: Arc::clone(&self.port.ram),
            kick: Some(copy(&self.kicks)),
            call: Some(copy(&self.calls)),
            err: Some(copy(&self.errs)),
        };
        self.port.handle.start(setup).unwrap();
    }

    /// Stops both vrings and starts them where they stood.
    pub fn restart(&self) {
        let bases = [1, 0].map(|index| (index, self.port.handle.stop(index).unwrap()));
        for (index, base) in bases {
            self.start(index, Some(base));
        }
    }

    pub fn stop(self) {
        for index in 0..2 {
            self.port.handle.stop(index).unwrap();
        }
    }

    /// Does `harm` to the transmit ring, and waits for the word that it broke.
    pub fn break_ring(&mut self, harm: impl FnOnce(&mut D)) {
        harm(&mut self.port.drivers[1]);
        self.kicks[1].write(1).unwrap();
        wait_for("the word of a fault", self.features, || {
            self.errs[1].read().ok()
        });
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Bytes of the virtio-net header.
    fn header(&self) -> usize {
        match self.has(feature::VERSION_1 | feature::MRG_RXBUF) {
            true => 12,
            false => 10,
        }
    }

    /// Adds chain `number`: in one piece or three, direct, in a table, or in a table behind the
    /// first piece. Returns the slots that it takes in its ring.
    fn add(&mut self, index: u16, number: u64, bytes: u32, write: bool) -> u16 {
        let at = Port::<D>::buffer(index, number);
        let whole = |addr, len| Buf { addr, len, write };
        let head = u32::try_from(self.header()).unwrap();
        let pieces = [
            whole(at, head),
            whole(at + u64::from(head), 20),
            whole(at + u64::from(head) + 20, bytes - head - 20),
        ];
        let kind = number % if self.has(INDIRECT) { 4 } else { 2 };
        let table = TABLES + (u64::from(index) * u64::from(SIZE) + number) * 64;
        let driver = &mut self.port.drivers[usize::from(index)];
        let behind = match kind {
            0 => {
                driver.add(&[whole(at, bytes)]).unwrap();
                return 1;
            }
            1 => {
                driver.add(&pieces).unwrap();
                return if D::Format::PACKED { 3 } else { 1 };
            }
            2 => {
                driver.add_indirect(&pieces, table).unwrap();
                return 1;
            }
            _ => &pieces[1..],
        };
        let words = D::table(behind);
        let words: Vec<u8> = words
            .iter()
            .flatten()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        write_guest(&self.port.ram, table, &words);
        let len = u32::try_from(words.len()).unwrap();
        let descs = [(pieces[0], 0), (Buf::readable(table, len), Desc::INDIRECT)];
        let driver = &mut self.port.drivers[usize::from(index)];
        driver.add_raw(&descs).unwrap();
        if D::Format::PACKED { 2 } else { 1 }
    }

    /// Adds a burst and shows it; a call is asked for when all of it is used.
    fn show(&mut self, index: u16, lens: impl Iterator<Item = u32>) {
        let at = usize::from(index);
        let (mut slots, mut last) = (0, 0);
        for (number, len) in (0..).zip(lens) {
            last = self.add(index, number, len, index == 0);
            slots += last;
        }
        let calls = match self.has(EVENT_IDX) {
            true => Calls::After(slots - last),
            false => Calls::On,
        };
        let driver = &mut self.port.drivers[at];
        driver.set_calls(calls);
        if driver.publish() {
            self.kicks[at].write(1).unwrap();
        }
    }

    /// What was used of a burst of `count` chains, after the call for it.
    fn reap(&mut self, index: u16, count: usize) -> Vec<u32> {
        let at = usize::from(index);
        let mut used = Vec::new();
        let (calls, driver) = (&self.calls[at], &mut self.port.drivers[at]);
        wait_for("a call", self.features, || {
            calls.read().ok()?;
            used.extend(core::iter::from_fn(|| driver.used().map(|used| used.1)));
            (used.len() == count).then_some(())
        });
        used
    }

    /// The same, with receive buffers that are shorter than most frames.
    fn merging(self) -> Self {
        let (frames, room) = (MERGED, SHORT);
        Guest {
            frames,
            room,
            ..self
        }
    }

    /// Posts buffers for a burst whose frames take one each.
    pub fn post(&mut self) {
        let (frames, room) = (self.frames, self.room);
        self.show(0, (0..frames).map(|_| room));
    }

    /// Posts buffers for burst `round`, as many as it takes.
    fn post_for(&mut self, round: u64) {
        let (header, room) = (self.header(), self.room);
        let buffers = |number| (header + bytes(round, number)).div_ceil(room as usize);
        let count = (0..self.frames).map(buffers).sum();
        self.show(0, core::iter::repeat_n(room, count));
    }

    /// What came into the buffers in order, in frames: each as long as its header says.
    fn received(&self, used: &[u32]) -> Vec<Vec<u8>> {
        let (header, mut frames) = (self.header(), Vec::new());
        let mut buffers = (0..).zip(used);
        while let Some((number, &len)) = buffers.next() {
            let read = |number, len: u32| {
                read_guest(&self.port.ram, Port::<D>::buffer(0, number), len as usize)
            };
            let mut frame = read(number, len);
            let parts = match header {
                12 => u16::from_le_bytes([frame[10], frame[11]]),
                _ => 1,
            };
            for (number, &len) in buffers.by_ref().take(usize::from(parts) - 1) {
                frame.extend(read(number, len));
            }
            frames.push(frame.split_off(header));
        }
        frames
    }

    /// Sends a burst into buffers that were posted, and compares all that comes of it.
    pub fn send(&mut self, round: u64) {
        let (header, frames) = (self.header(), self.frames);
        let bytes = |number| bytes(round, number);
        for number in 0..frames {
            let at = Port::<D>::buffer(1, number);
            write_guest(&self.port.ram, at, &vec![0; header]);
            let frame = payload(round * FRAMES + number, bytes(number));
            write_guest(&self.port.ram, at + header as u64, &frame);
        }
        let lens = (0..frames).map(|number| u32::try_from(header + bytes(number)).unwrap());
        self.show(1, lens.clone());
        let told = format!("features {:#x}, round {round}", self.features);
        let room = self.room;
        // All buffers of a frame but the last are full.
        let parts = |len: u32| {
            let count = len.div_ceil(room);
            (1..=count).map(move |part| {
                if part == count {
                    len - (count - 1) * room
                } else {
                    room
                }
            })
        };
        let wanted: Vec<_> = lens.flat_map(parts).collect();
        let used = self.reap(0, wanted.len());
        assert_eq!(used, wanted, "{told}");
        let received = self.received(&used);
        assert_eq!(received.len() as u64, frames, "{told}");
        for (number, got) in (0..).zip(received) {
            let sent = payload(round * FRAMES + number, bytes(number));
            assert!(got == sent, "{told}, frame {number}");
        }
        let sent = self.reap(1, usize::try_from(frames).unwrap());
        assert!(sent.iter().all(|&written| written == 0), "{told}");
    }
}

/// Bytes of frame `number` of a burst.
fn bytes(round: u64, number: u64) -> usize {
    60 + usize::try_from((number * 97 + round * 31) % 1400).unwrap()
}

/// The sets: all of those that change what goes on at a ring, and those that change nothing alone.
fn sets() -> Vec<u64> {
    const BITS: [u64; 6] = [
        INDIRECT,
        EVENT_IDX,
        IN_ORDER,
        feature::MRG_RXBUF,
        NOTIFICATION_DATA,
        feature::VERSION_1,
    ];
    let set = |number: u32| {
        let bits = BITS.iter().enumerate();
        bits.filter(|(at, _)| number & (1 << at) != 0)
            .map(|(_, bit)| bit)
            .sum::<u64>()
    };
    let alone = [ANY_LAYOUT, ORDER_PLATFORM].map(|bit| bit | feature::VERSION_1);
    // A legacy driver's (VIRTIO 1.3 §2.7.4.3), with the shorter header and with the longer one.
    let legacy = [0, feature::MRG_RXBUF].map(|bit| bit | ANY_LAYOUT);
    let all = (0..1 << BITS.len()).map(set);
    all.chain(alone).chain(legacy).collect()
}

fn frames_move_with_every_set<D: Driver>() {
    let mut alone = Alone::<D>::echo(1, &[0], IdlePolicy::Interrupt);
    let port = &mut alone.port;
    for features in sets() {
        assert_eq!(port.model.features() & features, features, "offered");
        let mut guest = Guest::new(port, features);
        for round in 0..ROUNDS {
            guest.post();
            guest.send(round);
        }
        guest.stop();
        if features & feature::MRG_RXBUF != 0 {
            let mut guest = Guest::new(port, features).merging();
            for round in 0..3 * ROUNDS {
                guest.post_for(11 * round);
                guest.send(11 * round);
            }
            guest.stop();
        }
    }
}

#[test]
fn frames_move_with_every_set_of_features_on_split_rings() {
    frames_move_with_every_set::<SplitDriver>();
}

#[test]
fn frames_move_with_every_set_of_features_on_packed_rings() {
    frames_move_with_every_set::<PackedDriver>();
}
