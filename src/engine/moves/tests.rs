//! What can't leave stays, and goes on.

use super::*;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::device::blk::{BlkModel, BlkSetup};
use crate::engine::endpoint::{GuestDisk, VringEndpoint};
use crate::engine::link::Armed;
use crate::engine::mailbox::{CallFds, Retired};
use crate::engine::worker::WorkerCx;
use crate::engine::{Backing, Engine, Member};
use crate::memory::GuestRam;
use crate::ring::Areas;

/// A queue that leaves and starts as it is told.
#[derive(Debug, Clone, Default)]
struct Stubborn {
    leaves: Arc<AtomicBool>,
    starts: Arc<AtomicBool>,
    /// Polls with a budget.
    polls: Arc<AtomicU64>,
}

impl VringEndpoint for Stubborn {
    fn attach(&mut self, _cx: &mut WorkerCx) -> io::Result<()> {
        match self.starts.load(Ordering::Relaxed) {
            true => Ok(()),
            false => Err(io::Error::other("no room")),
        }
    }
    fn kick(&self) -> Option<&EventFd> {
        None
    }
    fn disarm(&mut self) {}
    fn puts_calls_off(&self) -> bool {
        false
    }
    fn flush_call(&mut self, _now: bool) {}
    fn drain(&mut self, _cx: &mut WorkerCx) -> bool {
        true
    }
    fn is_movable(&mut self, _cx: &mut WorkerCx) -> bool {
        self.leaves.load(Ordering::Relaxed)
    }
    fn base(&self) -> u32 {
        0
    }
    fn set_fds(&mut self, fds: CallFds) -> CallFds {
        fds
    }
    fn swap(&mut self, _: &mut WorkerCx, _: Arc<GuestRam>, _: Areas) -> Option<Retired> {
        None
    }
}

impl GuestDisk for Stubborn {
    fn poll(&mut self, _cx: &mut WorkerCx, budget: usize) -> usize {
        if budget > 0 {
            self.polls.fetch_add(1, Ordering::Relaxed);
        }
        0
    }
    fn arm(&mut self, _takes: bool) -> Armed {
        Armed::Sleep
    }
    fn wait(&mut self) -> Option<Duration> {
        None
    }
}

/// Waits until the queue is polled again.
fn is_served(queue: &Stubborn) {
    let before = queue.polls.load(Ordering::Relaxed);
    let deadline = Instant::now() + Duration::from_secs(10);
    while queue.polls.load(Ordering::Relaxed) == before {
        assert!(Instant::now() < deadline, "nobody polls it");
        std::thread::yield_now();
    }
}

#[test]
fn what_can_not_leave_or_start_goes_on_where_it_is() {
    let options = EngineOptions {
        cores: vec![0, 1],
        ..EngineOptions::default()
    };
    let setup = BlkSetup {
        name: "disk0".into(),
        capacity_bytes: 1 << 20,
        block_size: 512,
        queues: 1,
        serial: "disk0".into(),
        ..BlkSetup::default()
    };
    let parts = Parts::Blk(Arc::new(BlkModel::new(setup)), Backing::Null);
    let cores = vec![0];
    let (engine, handles) = Engine::start(&options, vec![Member { parts, cores }]).unwrap();
    let handle = &handles[0];
    let queue = Stubborn::default();
    queue.starts.store(true, Ordering::Relaxed);
    let start = || {
        let endpoint = Endpoint::Disk(Box::new(queue.clone()));
        let entered = handle.enter(0, &handle.places[0][0], endpoint, false);
        entered.unwrap();
        handle.started[0].store(true, Ordering::Relaxed);
    };
    start();
    let at = || handle.group[0].load(Ordering::Relaxed);
    handle.allow(&[1]);
    handle.settle();
    assert_eq!((at(), handle.moves.done()), (0, 0), "it does not leave");
    is_served(&queue);
    queue.leaves.store(true, Ordering::Relaxed);
    queue.starts.store(false, Ordering::Relaxed);
    // Neither worker takes it over: that is all that can be said.
    handle.settle();
    assert_eq!((at(), handle.moves.done()), (0, 0), "it does not start");
    assert!(!handle.started[0].load(Ordering::Relaxed));
    queue.starts.store(true, Ordering::Relaxed);
    start();
    // One that its session could not stop is left alone.
    handle.moves.lost(0, true);
    handle.settle();
    assert_eq!((at(), handle.choose_worker(0, None)), (0, 0));
    handle.moves.lost(0, false);
    assert_eq!(handle.choose_worker(0, None), 1);
    handle.settle();
    assert_eq!((at(), handle.moves.done()), (1, 1));
    is_served(&queue);
    engine.stop();
}
