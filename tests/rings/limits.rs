//! Rate limits of a port, on real rings: what passes, how exactly, and that it changes while the
//! port is in use.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vringd::device::DeviceModel;
use vringd::engine::{Engine, EngineOptions, IdlePolicy, LinkSpec, Member, Parts, VringRunner};
use vringd::host::limit::Rates;
use vringd::testing::driver::{Buf, Driver, PackedDriver, SplitDriver};

use super::port::{PATIENCE, Port, SIZE, model, payload};

const FRAME: usize = 500;
/// Long enough that a thread that is not scheduled for a while loses nothing.
const BURST: Duration = Duration::from_millis(200);

/// Two ports on a wire, the first of which sends as fast as it can.
struct Pair<D: Driver> {
    engine: Option<Engine>,
    ports: [Port<D>; 2],
    /// Frames sent and not given back yet, buffers posted and not used yet.
    pending: [u64; 2],
}

impl<D: Driver> Pair<D> {
    fn new() -> Pair<D> {
        let models = [0, 1].map(|port| model(&format!("net{port}"), 1));
        let member = |port: usize| Member {
            parts: Parts::Net(
                Arc::clone(&models[port]),
                LinkSpec::Wire {
                    peer: 1 - port,
                    hold: Duration::from_millis(2),
                },
            ),
            cores: vec![0],
        };
        let options = EngineOptions {
            cores: vec![0],
            idle: IdlePolicy::Adaptive,
            stop_timeout: PATIENCE,
            ..EngineOptions::default()
        };
        let (engine, handles) = Engine::start(&options, vec![member(0), member(1)]).unwrap();
        let port = |at: usize| Port::new(Arc::clone(&handles[at]), Arc::clone(&models[at]));
        let mut ports = [port(0), port(1)];
        for port in &mut ports {
            (0..port.model.vrings_max()).for_each(|index| port.start(index));
        }
        Pair {
            engine: Some(engine),
            ports,
            pending: [0, 0],
        }
    }

    /// Sends for `span`; frames received in a second of it, and frames dropped at each port.
    fn rate(&mut self, span: Duration) -> (f64, [u64; 2]) {
        let frame = payload(1, FRAME);
        let drops = |pair: &Pair<D>| {
            [
                pair.ports[0].counter("tx_drop_policed"),
                pair.ports[1].counter("rx_drop_policed"),
            ]
        };
        let half = u64::from(SIZE) / 2;
        let (start, before) = (Instant::now(), drops(self));
        let first = self.ports[1].counter("rx_frames");
        while start.elapsed() < span {
            let [sender, receiver] = &mut self.ports;
            for number in self.pending[1]..half {
                let buf = Buf::writable(Port::<D>::buffer(0, number), 2048);
                receiver.drivers[0].add(&[buf]).unwrap();
            }
            receiver.drivers[0].publish();
            self.pending[1] = half;
            for number in self.pending[0]..half {
                sender.send(0, number, &frame);
            }
            self.pending[0] = half;
            while sender.drivers[1].used().is_some() {
                self.pending[0] -= 1;
            }
            while receiver.drivers[0].used().is_some() {
                self.pending[1] -= 1;
            }
            std::thread::yield_now();
        }
        let received = self.ports[1].counter("rx_frames") - first;
        let seconds = start.elapsed().as_secs_f64();
        let after = drops(self);
        #[expect(clippy::cast_precision_loss, reason = "some thousand frames")]
        let rate = received as f64 / seconds;
        (rate, [after[0] - before[0], after[1] - before[1]])
    }
}

impl<D: Driver> Drop for Pair<D> {
    fn drop(&mut self) {
        for port in &mut self.ports {
            for index in port.started.drain(..) {
                let _ = port.handle.stop(index);
            }
        }
        if let Some(engine) = self.engine.take() {
            engine.stop();
        }
    }
}

fn as_much_passes_as_was_chosen<D: Driver>() {
    let mut pair = Pair::<D>::new();
    let span = Duration::from_millis(500);
    let (_, drops) = pair.rate(Duration::from_millis(50));
    assert_eq!(drops, [0, 0], "no limit");
    let frames = |count| Rates {
        count: Some(count),
        size: None,
        burst: BURST,
    };
    let bits = |frames: u64| Rates {
        count: None,
        size: Some(frames * FRAME as u64 * 8),
        burst: BURST,
    };
    for (number, (rates, wanted)) in [
        (frames(4000), 4000.0),
        (bits(3000), 3000.0),
        (frames(1000), 1000.0),
    ]
    .into_iter()
    .enumerate()
    {
        for egress in [false, true] {
            let limit = |port: usize| {
                let limits = pair.ports[port].model.limits();
                if port == 0 {
                    &limits.ingress
                } else {
                    &limits.egress
                }
            };
            limit(usize::from(egress)).set(rates);
            limit(usize::from(!egress)).set(Rates::default());
            // What is in the rings may still be from before.
            pair.rate(Duration::from_millis(20));
            let (rate, drops) = pair.rate(span);
            // Three in a hundred, and what is in the rings at either end.
            let slack = wanted * 0.03 + f64::from(SIZE) / span.as_secs_f64();
            assert!(
                (rate - wanted).abs() <= slack,
                "{number}, egress {egress}: {rate} frames a second"
            );
            assert!(drops[usize::from(egress)] > 0, "{number}, egress {egress}");
            // What the receiver's port refuses is sent in vain, and counted there too.
            assert_eq!(drops[1] > 0, egress, "{number}, egress {egress}");
        }
    }
    pair.ports[1].model.limits().egress.set(Rates::default());
    pair.rate(Duration::from_millis(20));
    let (rate, drops) = pair.rate(Duration::from_millis(50));
    assert_eq!(drops, [0, 0], "no limit any more, {rate} frames a second");
}

#[test]
fn as_much_passes_as_was_chosen_split() {
    as_much_passes_as_was_chosen::<SplitDriver>();
}

#[test]
fn as_much_passes_as_was_chosen_packed() {
    as_much_passes_as_was_chosen::<PackedDriver>();
}
