//! Ports whose memory table is replaced (SET_MEM_TABLE) while frames are on their way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vringd::engine::{DeviceHandle, IdlePolicy, LinkSpec, VringAddr, VringRunner};
use vringd::memory::GuestRam;
use vringd::sys::tap::Tap;
use vringd::sys::testnet::{ETHERTYPE, PacketSocket, VNET_HEADER, in_private_netns};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use crate::support::deadline::wait_until;

use super::neighbour::traffic;
use super::port::{Alone, PATIENCE, Port, model, payload};
use super::wire::{TWO_WORKERS, Wire};

/// Frames of a burst.
const BURST: u64 = 8;

/// The same memory, mapped anew.
fn mapped_anew<D: Driver>(port: &Port<D>) -> Arc<GuestRam> {
    Arc::new(GuestRam::map(port.ram.specs(), None).unwrap())
}

/// What it takes to replace the tables of all vrings of a port that run.
struct Swapper {
    handle: Arc<DeviceHandle>,
    ram: Arc<GuestRam>,
    vrings: Vec<(u16, VringAddr)>,
}

impl Swapper {
    fn of<D: Driver>(port: &Port<D>) -> Swapper {
        let vrings = port.started.iter();
        Swapper {
            handle: Arc::clone(&port.handle),
            ram: Arc::clone(&port.ram),
            vrings: vrings.map(|&index| (index, port.addr(index))).collect(),
        }
    }

    /// One table for all, as a front-end gives it.
    fn swap(&self) {
        let ram = Arc::new(GuestRam::map(self.ram.specs(), None).unwrap());
        for &(index, addr) in &self.vrings {
            self.handle.swap(index, Arc::clone(&ram), addr).unwrap();
        }
    }
}

/// Replaces tables for as long as `work` takes, which is as long as it is asked to go on.
fn while_swapping(swappers: &[Swapper], mut work: impl FnMut()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let swapping = scope.spawn(|| {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                swappers.iter().for_each(Swapper::swap);
                rounds += 1;
            }
            rounds
        });
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut work));
        done.store(true, Ordering::Relaxed);
        let rounds = swapping.join().unwrap();
        if let Err(panic) = worked {
            std::panic::resume_unwind(panic);
        }
        assert!(rounds > 5, "{rounds} rounds of new tables");
    });
}

fn on_a_wire<D: Driver>() {
    let mut wire = Wire::<D>::with_hold([1, 1], TWO_WORKERS, PATIENCE);
    wire.start_all();
    let swappers = wire.ports.each_ref().map(Swapper::of);
    while_swapping(&swappers, || {
        for lap in 0..60 {
            let frame = |number| {
                let bytes = 60 + (lap * 131 + number * 17) % 1455;
                payload(lap * 32 + number, usize::try_from(bytes).unwrap())
            };
            for (from, to) in [(0, 1), (1, 0)] {
                wire.ports[to].post(0, 32);
                for number in 0..32 {
                    wire.ports[from].send(0, number, &frame(number));
                }
                for number in 0..32 {
                    let got = wire.ports[to].receive(0, number);
                    assert!(got == frame(number), "lap {lap}, frame {number}");
                }
                (0..32).for_each(|_| wire.ports[from].await_sent(0));
            }
        }
    });
    for port in &wire.ports {
        let counts = ["tx_frames", "rx_frames"].map(|name| port.counter(name));
        assert_eq!(counts, [60 * 32; 2]);
    }
}

fn on_echo<D: Driver>() {
    let mut alone = Alone::<D>::echo(2, &[0, 1], IdlePolicy::Adaptive);
    let port = &mut alone.port;
    (0..4).for_each(|index| port.start(index));
    let swappers = [Swapper::of(port)];
    while_swapping(&swappers, || {
        for _ in 0..20 {
            for pair in [0, 1] {
                traffic(port, pair, 2);
            }
        }
    });
    assert_eq!(port.counter("rx_frames"), 20 * 2 * 2 * 32);
    for index in 0..4 {
        port.stop(index);
    }
}

/// Frames wait at another worker, for buffers, while the table that they lie in is replaced: it is
/// there until the last of them was copied, and not for longer.
fn a_table_stays_until_the_last_frame_in_it_was_copied<D: Driver>() {
    let mut wire = Wire::<D>::with_hold([1, 1], TWO_WORKERS, Duration::from_secs(60));
    wire.start_all();
    let [near, far] = &mut wire.ports;
    // The first table is also the driver's; this one is the vring's alone.
    let old = mapped_anew(near);
    let kept = Arc::downgrade(&old);
    near.handle.swap(1, old, near.addr(1)).unwrap();
    near.send_burst(0, BURST, |number| payload(number, 700));
    // Once the first has come, the others are on their way, or soon will be.
    far.post(0, 1);
    assert_eq!(far.receive(0, 0), payload(0, 700));
    near.handle
        .swap(1, mapped_anew(near), near.addr(1))
        .unwrap();
    far.post(0, BURST - 1);
    for number in 1..BURST {
        assert_eq!(far.receive(0, number - 1), payload(number, 700));
    }
    (0..BURST).for_each(|_| near.await_sent(0));
    wait_until("the old table goes", PATIENCE, || {
        kept.upgrade().is_none().then_some(())
    });
    // And from the new one it goes on.
    far.post(0, 1);
    near.send(0, 0, &payload(99, 1400));
    assert_eq!(far.receive(0, 0), payload(99, 1400));
    near.await_sent(0);
    assert_eq!(near.counter("tx_frames"), BURST + 1);
}

/// Buffers that were posted under the old table are filled by way of the new one.
fn a_receiver_goes_over_with_the_buffers_it_has<D: Driver>() {
    let mut wire = Wire::<D>::new([1, 1], TWO_WORKERS);
    wire.start_all();
    let [near, far] = &mut wire.ports;
    let old = mapped_anew(far);
    let kept = Arc::downgrade(&old);
    far.handle.swap(0, old, far.addr(0)).unwrap();
    assert!(kept.upgrade().is_some(), "it is in use");
    far.post(0, 4);
    near.send(0, 0, &payload(0, 700));
    assert_eq!(far.receive(0, 0), payload(0, 700));
    far.handle.swap(0, mapped_anew(far), far.addr(0)).unwrap();
    assert!(kept.upgrade().is_none(), "nothing lies in it");
    for number in 1..4 {
        near.send(0, number, &payload(number, 700));
        assert_eq!(far.receive(0, number), payload(number, 700));
    }
}

/// The same, where a tap reads into buffers that were taken from the ring before the frame came:
/// they are taken anew.
fn a_tap_goes_over_with_the_buffers_it_has<D: Driver + 'static>() {
    in_private_netns(|| {
        let quiet = "/proc/sys/net/ipv6/conf/default/disable_ipv6";
        std::fs::write(quiet, "1").unwrap();
        let tap = Arc::new(Tap::open("t0", 1, None).unwrap());
        let link = LinkSpec::Tap(tap);
        let mut alone = Alone::<D>::new(model("net0", 1), link, &[0], IdlePolicy::Adaptive);
        let port = &mut alone.port;
        (0..2).for_each(|index| port.start(index));
        let old = mapped_anew(port);
        let kept = Arc::downgrade(&old);
        port.handle.swap(0, old, port.addr(0)).unwrap();
        port.post(0, 6);
        let cable = PacketSocket::bind("t0");
        for number in 0..6 {
            if number == 3 {
                port.handle
                    .swap(0, mapped_anew(port), port.addr(0))
                    .unwrap();
                assert!(kept.upgrade().is_none(), "nothing lies in it");
            }
            let mut frame = payload(number, 700);
            frame[12..14].copy_from_slice(&ETHERTYPE);
            cable.send(&[0; VNET_HEADER], &frame);
            assert!(port.receive(0, number) == frame, "{number}");
        }
        let counted = ["rx_frames", "rx_drop_rx_ring_too_small"].map(|name| port.counter(name));
        assert_eq!(counted, [6, 0]);
        (0..2).for_each(|index| {
            port.stop(index);
        });
    });
}

macro_rules! both {
    ($($name:ident)*) => {
        mod split { $(#[test] fn $name() { super::$name::<super::SplitDriver>(); })* }
        mod packed { $(#[test] fn $name() { super::$name::<super::PackedDriver>(); })* }
    };
}

both! {
    on_a_wire
    on_echo
    a_table_stays_until_the_last_frame_in_it_was_copied
    a_receiver_goes_over_with_the_buffers_it_has
    a_tap_goes_over_with_the_buffers_it_has
}
