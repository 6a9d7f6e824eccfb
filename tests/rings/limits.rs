//! Rate limits of a port, on real rings: what passes, how exactly, and that it changes while the
//! port is in use.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vringd::device::DeviceModel;
use vringd::engine::{Engine, EngineOptions, IdlePolicy, LinkSpec, Member, Parts, VringRunner};
use vringd::host::limit::{Limit, Rates};
use vringd::testing::driver::{Buf, Driver, PackedDriver, SplitDriver};

use super::port::{PATIENCE, Port, SIZE, model, payload};

const FRAME: usize = 500;
/// Longer than a thread is ever not scheduled: what a pause keeps from passing comes after it.
const BURST: Duration = Duration::from_secs(5);

/// Pairs of ports, each on a wire, the first of which sends as fast as it can on all queue pairs.
struct Wires<D: Driver> {
    engine: Option<Engine>,
    /// The sender and the receiver of each wire.
    ports: Vec<[Port<D>; 2]>,
    pairs: u16,
    frames: Vec<Vec<u8>>,
    next: usize,
    /// Frames sent and not given back yet, buffers posted and not used yet: of each pair.
    pending: Vec<[u64; 2]>,
    /// Frames and bytes that each receiver has seen.
    received: Vec<[u64; 2]>,
}

/// A moment at which a limit has let pass all that it may, and what was received until then.
#[derive(Clone, Copy)]
struct Mark {
    at: Instant,
    received: [u64; 2],
}

impl<D: Driver> Wires<D> {
    /// With frames of `sizes` in turn, and a worker for each queue pair.
    fn new(wires: usize, pairs: u16, sizes: &[usize]) -> Wires<D> {
        Wires::on((0..usize::from(pairs)).collect(), wires, sizes)
    }

    /// With a queue pair for each of these cores.
    fn on(cores: Vec<usize>, wires: usize, sizes: &[usize]) -> Wires<D> {
        let pairs = u16::try_from(cores.len()).unwrap();
        let models: Vec<_> = (0..2 * wires)
            .map(|port| model(&format!("net{port}"), pairs))
            .collect();
        let member = |port: usize| Member {
            parts: Parts::Net(
                Arc::clone(&models[port]),
                LinkSpec::Wire {
                    peer: port ^ 1,
                    hold: Duration::from_millis(2),
                },
            ),
            cores: cores.clone(),
        };
        let options = EngineOptions {
            cores: cores.clone(),
            idle: IdlePolicy::Adaptive,
            stop_timeout: PATIENCE,
            ..EngineOptions::default()
        };
        let members = (0..2 * wires).map(member).collect();
        let (engine, handles) = Engine::start(&options, members).unwrap();
        let port = |at: usize| {
            let mut port = Port::new(Arc::clone(&handles[at]), Arc::clone(&models[at]));
            (0..port.model.vrings_max()).for_each(|index| port.start(index));
            port
        };
        Wires {
            engine: Some(engine),
            ports: (0..wires)
                .map(|wire| [port(2 * wire), port(2 * wire + 1)])
                .collect(),
            pairs,
            frames: sizes.iter().map(|&size| payload(1, size)).collect(),
            next: 0,
            pending: vec![[0, 0]; wires * usize::from(pairs)],
            received: vec![[0, 0]; wires],
        }
    }

    /// The limit of the sender, or of the receiver.
    fn limit(&self, wire: usize, egress: bool) -> &Limit {
        let limits = self.ports[wire][usize::from(egress)].model.limits();
        if egress {
            &limits.egress
        } else {
            &limits.ingress
        }
    }

    /// Frames that were too much, at either port of each wire.
    fn policed(&self) -> Vec<[u64; 2]> {
        let of_wire = |[sender, receiver]: &[Port<D>; 2]| {
            let sent = sender.counter("tx_drop_policed");
            [sent, receiver.counter("rx_drop_policed")]
        };
        self.ports.iter().map(of_wire).collect()
    }

    /// Fills all rings, and takes what has been used.
    fn turn(&mut self) {
        let half = u64::from(SIZE) / 2;
        for (wire, [sender, receiver]) in self.ports.iter_mut().enumerate() {
            for pair in 0..self.pairs {
                let (rx, tx) = (usize::from(2 * pair), usize::from(2 * pair + 1));
                let at = wire * usize::from(self.pairs) + usize::from(pair);
                let [sent, posted] = &mut self.pending[at];
                for number in *posted..half {
                    let buf = Buf::writable(Port::<D>::buffer(2 * pair, number), 2048);
                    receiver.drivers[rx].add(&[buf]).unwrap();
                }
                receiver.drivers[rx].publish();
                *posted = half;
                for number in *sent..half {
                    self.next = (self.next + 1) % self.frames.len();
                    sender.send(pair, number, &self.frames[self.next]);
                }
                *sent = half;
                while sender.drivers[tx].used().is_some() {
                    *sent -= 1;
                }
                while let Some((_, bytes)) = receiver.drivers[rx].used() {
                    *posted -= 1;
                    let [frames, sum] = &mut self.received[wire];
                    *frames += 1;
                    *sum += u64::from(bytes) - 12;
                }
            }
        }
        std::thread::yield_now();
    }

    fn run(&mut self, span: Duration) {
        let start = Instant::now();
        while start.elapsed() < span {
            self.turn();
        }
    }

    /// Goes on until every wire's limit has refused frames, and not longer than `fine` ago: what
    /// it has let pass is then what its rate gave, though this machine has made us wait before.
    fn exhausted(&mut self, fine: Duration) -> Vec<Mark> {
        let begin = Instant::now();
        let mut marks = vec![None; self.ports.len()];
        while marks.iter().any(Option::is_none) {
            assert!(begin.elapsed() < 3 * PATIENCE, "a limit refuses nothing");
            let (before, start) = (self.policed(), Instant::now());
            self.turn();
            let (after, at) = (self.policed(), Instant::now());
            if at - start > fine {
                continue;
            }
            for (wire, mark) in marks.iter_mut().enumerate() {
                if mark.is_none() && after[wire] != before[wire] {
                    let received = self.received[wire];
                    *mark = Some(Mark { at, received });
                }
            }
        }
        marks.into_iter().flatten().collect()
    }

    /// Frames and bits that each wire lets pass in a second of `span`.
    fn rates(&mut self, span: Duration) -> Vec<[f64; 2]> {
        let fine = span / 50;
        let first = self.exhausted(fine);
        self.run(span);
        let last = self.exhausted(fine);
        let rates = |(first, last): (Mark, Mark)| {
            let seconds = (last.at - first.at).as_secs_f64();
            #[expect(clippy::cast_precision_loss, reason = "some thousand frames")]
            let rate = |at: usize| (last.received[at] - first.received[at]) as f64 / seconds;
            [rate(0), rate(1) * 8.0]
        };
        first.into_iter().zip(last).map(rates).collect()
    }
}

impl<D: Driver> Drop for Wires<D> {
    fn drop(&mut self) {
        for port in self.ports.iter_mut().flatten() {
            for index in port.started.drain(..) {
                let _ = port.handle.stop(index);
            }
        }
        if let Some(engine) = self.engine.take() {
            engine.stop();
        }
    }
}

fn frames(count: u64) -> Rates {
    Rates {
        count: Some(count),
        size: None,
        burst: BURST,
    }
}

fn bits(size: u64) -> Rates {
    Rates {
        count: None,
        size: Some(size),
        burst: BURST,
    }
}

fn as_much_passes_as_was_chosen<D: Driver>() {
    let mut wires = Wires::<D>::new(1, 1, &[FRAME]);
    let span = Duration::from_millis(500);
    wires.run(Duration::from_millis(50));
    assert_eq!(wires.policed(), [[0, 0]], "no limit");
    for (number, (rates, wanted)) in [
        (frames(4000), 4000.0),
        (bits(3000 * FRAME as u64 * 8), 3000.0),
        (frames(1000), 1000.0),
    ]
    .into_iter()
    .enumerate()
    {
        for egress in [false, true] {
            wires.limit(0, egress).set(rates);
            wires.limit(0, !egress).set(Rates::default());
            // What is in the rings may still be from before.
            wires.run(Duration::from_millis(20));
            let before = wires.policed()[0];
            let [[rate, _]] = wires.rates(span)[..] else {
                unreachable!("one wire")
            };
            let after = wires.policed()[0];
            let drops = [0, 1].map(|port| after[port] - before[port]);
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
    wires.limit(0, true).set(Rates::default());
    wires.run(Duration::from_millis(20));
    let before = wires.policed();
    wires.run(Duration::from_millis(50));
    assert_eq!(wires.policed(), before, "no limit any more");
}

#[test]
fn as_much_passes_as_was_chosen_split() {
    as_much_passes_as_was_chosen::<SplitDriver>();
}

#[test]
fn as_much_passes_as_was_chosen_packed() {
    as_much_passes_as_was_chosen::<PackedDriver>();
}

/// Four ports with a limit each, at the same time, over ten seconds: three in a hundred, no more,
/// for two workers that share each limit and frames of several lengths.
fn ten_seconds_are_exact<D: Driver>() {
    let (count, size) = (1000, 6_000_000);
    let limits = [
        (frames(count), false),
        (frames(count), true),
        (bits(size), false),
        (bits(size), true),
    ];
    let mut wires = Wires::<D>::new(limits.len(), 2, &[60, 1514, 300, 64, 700]);
    for (wire, (rates, egress)) in limits.into_iter().enumerate() {
        wires.limit(wire, egress).set(rates);
    }
    // What is in the rings may still be from before.
    wires.run(Duration::from_millis(50));
    let passed = wires.rates(Duration::from_secs(10));
    for ((rates, egress), passed) in limits.into_iter().zip(passed) {
        let (wanted, rate) = match rates.count {
            Some(_) => (1e3, passed[0]),
            None => (6e6, passed[1]),
        };
        let off = (rate - wanted).abs() / wanted;
        assert!(off <= 0.03, "{rates:?}, egress {egress}: {rate} a second");
    }
}

#[test]
fn ten_seconds_are_exact_split_and_packed() {
    std::thread::scope(|scope| {
        scope.spawn(ten_seconds_are_exact::<SplitDriver>);
        scope.spawn(ten_seconds_are_exact::<PackedDriver>);
    });
}

/// The rates that people choose, with the burst that a port has if nothing is said, over ten
/// seconds; the guests' thread must not be on the worker's core.
#[test]
#[ignore = "needs two cores with nothing else to do: scripts/soak limits"]
fn measure_ports() {
    let usual = Duration::from_millis(10);
    let burst = |rates: Rates| Rates {
        burst: usual,
        ..rates
    };
    println!("| limit | set, per second | passed, per second | off by |");
    let mut worst = 0.0_f64;
    for (rates, size) in [
        (frames(10_000), 64),
        (frames(1_000_000), 64),
        (bits(100_000_000), 1514),
        (bits(5_000_000_000), 1514),
    ] {
        for (egress, packed) in [(false, false), (false, true), (true, false), (true, true)] {
            let passed = match packed {
                true => passed_in_ten_seconds::<PackedDriver>(burst(rates), size, egress),
                false => passed_in_ten_seconds::<SplitDriver>(burst(rates), size, egress),
            };
            let (kind, wanted, passed) = match (rates.count, rates.size) {
                (Some(count), _) => ("frames", count as f64, passed[0]),
                (_, size) => ("bits", size.unwrap_or(0) as f64, passed[1]),
            };
            let off = (passed - wanted) / wanted;
            let way = if egress { "egress" } else { "ingress" };
            let format = if packed { "packed" } else { "split" };
            println!(
                "| `{way}_{kind}`, {format}, frames of {size} bytes | {wanted} | {passed:.0} | \
                 {:+.2} % |",
                100.0 * off
            );
            worst = worst.max(off.abs());
        }
    }
    assert!(worst <= 0.03, "off by {worst}");
}

/// Frames and bits per second that pass a limit, after what was saved up has gone.
fn passed_in_ten_seconds<D: Driver>(rates: Rates, size: usize, egress: bool) -> [f64; 2] {
    let mut wires = Wires::<D>::on(vec![1], 1, &[size]);
    wires.limit(0, egress).set(rates);
    wires.run(Duration::from_millis(200));
    let (begin, before) = (Instant::now(), wires.received[0]);
    wires.run(Duration::from_secs(10));
    let (seconds, after) = (begin.elapsed().as_secs_f64(), wires.received[0]);
    let rate = |at: usize| (after[at] - before[at]) as f64 / seconds;
    [rate(0), rate(1) * 8.0]
}
