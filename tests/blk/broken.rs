//! Requests that can't be answered: their ring stops, visibly, and nothing else does.

use std::time::Duration;

use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::front_end::{F_FLUSH, FrontEnd, IN};
use super::served::{assert_same, image};
use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::tmp::TempDir;

const SOON: Duration = Duration::from_secs(20);
const LEN: usize = 4096;

fn breaks_its_ring_alone<D: Driver>() {
    let dir = TempDir::new("broken");
    let (path, model) = image(&dir);
    let socket = |name: &str| dir.path(&format!("{name}.sock"));
    let disk = |name: &str| {
        let (socket, path) = (socket(name), path.display());
        format!(
            "name={name},socket={},path={path},read_only=true",
            socket.display()
        )
    };
    let (bad, good) = (disk("bad"), disk("good"));
    let args = ["run", "--core", "1", "--blk", &bad, "--blk", &good];
    let daemon = Daemon::start(&args);
    let mut neighbour: FrontEnd<D> = FrontEnd::open(&socket("good"), F_FLUSH);
    // Half a header; no byte for the status; nothing but a status byte.
    for (broken, (readable, writable)) in (1..).zip([(15, 1), (16, 0), (0, 1)]) {
        let mut front: FrontEnd<D> = FrontEnd::open(&socket("bad"), F_FLUSH);
        assert_same("before", &front.run(IN, 0, &[], LEN).data, &model[..LEN]);
        front.post(0, IN, 8, &[], LEN);
        front.post_unanswerable(readable, writable);
        let faults = || daemon.counter("bad", "ring_faults") == broken;
        wait_until("the ring to break", SOON, || faults().then_some(()));
        front.post(1, IN, 16, &[], LEN);
        for at in 0..50 {
            let read = neighbour.run(IN, at * 8, &[], LEN);
            let at = usize::try_from(at).unwrap() * LEN;
            assert_same("the neighbour", &read.data, &model[at..at + LEN]);
        }
        let (place, answer) = front.answered().expect("what came before is answered");
        assert_eq!((place, answer.status), (0, 0));
        assert_same("before it", &answer.data, &model[LEN..2 * LEN]);
        assert_eq!(front.waits(), 1);
        assert!(front.answered().is_none(), "nothing behind it is answered");
        assert_eq!(daemon.counter("bad", "bad_chains"), broken);
    }
    assert_eq!(daemon.counter("good", "ring_faults"), 0);
    let why = "request without a whole header or a byte for its status";
    wait_until("a line for each", SOON, || {
        (daemon.log().matches(why).count() == 3).then_some(())
    });
}

#[test]
fn an_unanswerable_request_breaks_a_split_ring_alone() {
    breaks_its_ring_alone::<SplitDriver>();
}

#[test]
fn an_unanswerable_request_breaks_a_packed_ring_alone() {
    breaks_its_ring_alone::<PackedDriver>();
}
