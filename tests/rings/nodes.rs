//! Memory nodes: a machine of two, made up, on which core 0 is near to one and core 1 to the other.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use vringd::engine::{
    Engine, EngineOptions, LinkSpec, Member, Parts, Placement, Topology, VringRunner,
};
use vringd::testing::driver::{PackedDriver, SplitDriver};

use super::port::{PATIENCE, Port, model, payload};

/// Guest memory is on node 1.
const TWO_NODES: Topology = Topology {
    of_core: |core| Some(core),
    of_memory: |_, _| Some(1),
};

/// Runs frames through an echo port and counts vrings that were far from their memory, and turns
/// with work of each worker.
fn served(placement: Placement, cores: &[usize]) -> (u64, Vec<u64>) {
    let model = model("net0", 2);
    let member = Member {
        parts: Parts::Net(Arc::clone(&model), LinkSpec::Echo),
        cores: cores.to_vec(),
    };
    let options = EngineOptions {
        cores: vec![0, 1],
        stop_timeout: PATIENCE,
        placement,
        topology: TWO_NODES,
        ..EngineOptions::default()
    };
    let (engine, mut handles) = Engine::start(&options, vec![member]).unwrap();
    let mut port = Port::<SplitDriver>::new(handles.remove(0), model);
    for index in 0..4 {
        port.start(index);
    }
    for pair in 0..2 {
        port.post(pair, 4);
        for number in 0..4 {
            port.send(pair, number, &payload(number, 90));
            assert_eq!(port.receive(pair, number), payload(number, 90));
        }
    }
    let counters = port.handle.counters();
    let far = counters
        .iter()
        .find(|(name, _)| *name == "vrings_remote_memory");
    let far = far.unwrap().1;
    for index in 0..4 {
        port.handle.stop(index).unwrap();
    }
    let busy = |counters: &Vec<(&str, u64)>| {
        let busy = counters.iter().find(|(name, _)| *name == "busy_turns");
        busy.unwrap().1
    };
    let busy = engine.counters().iter().map(busy).collect();
    engine.stop();
    (far, busy)
}

#[test]
fn spread_uses_all_workers_and_counts_those_that_are_far() {
    let (far, busy) = served(Placement::Spread, &[0, 1]);
    assert_eq!(far, 2, "the vrings of one pair");
    assert!(busy.iter().all(|&turns| turns > 0), "{busy:?}");
}

#[test]
fn auto_takes_the_workers_of_the_memorys_node() {
    let (far, busy) = served(Placement::Auto, &[0, 1]);
    assert_eq!(far, 0);
    assert!(busy[0] == 0 && busy[1] > 0, "{busy:?}");
}

#[test]
fn auto_makes_do_with_the_cores_that_a_device_may_use() {
    let (far, busy) = served(Placement::Auto, &[0]);
    assert_eq!(far, 4);
    assert!(busy[0] > 0 && busy[1] == 0, "{busy:?}");
}

/// A device may be somewhere else in each session.
#[test]
fn a_vring_can_be_started_again() {
    let model = model("net0", 1);
    let member = Member {
        parts: Parts::Net(Arc::clone(&model), LinkSpec::Echo),
        cores: vec![0, 1],
    };
    let options = EngineOptions {
        cores: vec![0, 1],
        stop_timeout: PATIENCE,
        placement: Placement::Auto,
        topology: TWO_NODES,
        ..EngineOptions::default()
    };
    let (engine, mut handles) = Engine::start(&options, vec![member]).unwrap();
    let mut port = Port::<PackedDriver>::new(handles.remove(0), model);
    for _ in 0..5 {
        (0..2).for_each(|index| port.start(index));
        for index in [1, 0] {
            port.stop(index);
        }
    }
    engine.stop();
}

/// What is logged, as it comes.
#[derive(Clone)]
struct Log(Sender<Vec<u8>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.send(bytes.to_vec()).unwrap();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The lines since the last look that warn of far memory.
fn warnings(log: &Receiver<Vec<u8>>) -> Vec<String> {
    let text = String::from_utf8(log.try_iter().flatten().collect()).unwrap();
    let lines = text
        .lines()
        .filter(|line| line.contains("its memory is on"));
    lines.map(str::to_owned).collect()
}

/// Each session says it once, of its first vring, with both nodes and the remedy; none that is near
/// says anything.
#[test]
fn far_memory_is_warned_of_once_in_each_session() {
    for (core, expected) in [(0, 1), (1, 0)] {
        let model = model("net0", 2);
        let member = Member {
            parts: Parts::Net(Arc::clone(&model), LinkSpec::Echo),
            cores: vec![core],
        };
        let options = EngineOptions {
            cores: vec![0, 1],
            stop_timeout: PATIENCE,
            topology: TWO_NODES,
            ..EngineOptions::default()
        };
        let (engine, mut handles) = Engine::start(&options, vec![member]).unwrap();
        let mut port = Port::<SplitDriver>::new(handles.remove(0), model);
        let (sender, log) = channel();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || Log(sender.clone()))
            .with_ansi(false)
            .finish();
        let subscriber = tracing::Dispatch::new(subscriber);
        for session in 0..3 {
            tracing::dispatcher::with_default(&subscriber, || {
                (0..4).for_each(|index| port.start(index));
                for index in 0..4 {
                    port.stop(index);
                }
            });
            let said = warnings(&log);
            assert_eq!(said.len(), expected, "session {session}: {said:?}");
            for part in [
                "WARN",
                "net0 vring 0: served on core 0 of node 0",
                "on node 1",
            ] {
                assert!(said.iter().all(|line| line.contains(part)), "{said:?}");
            }
        }
        engine.stop();
    }
}
