//! A front-end whose memory goes away loses its session, and nobody else anything.

use vringd::testing::driver::{PackedDriver, SplitDriver};

use super::front_end::{FLUSH, FrontEnd, IN, OUT};
use super::qcow2::ALL;
use super::served::assert_same;
use crate::support::daemon::Daemon;
use crate::support::tmp::{TempDir, random_bytes};

const OK: u8 = 0;

#[test]
fn memory_that_was_cut_off_costs_its_own_session_only() {
    let dir = TempDir::new("torn");
    let disk = |name: &str| {
        let socket = dir.path(&format!("{name}.sock"));
        format!("name={name},socket={},backend=ram:8M", socket.display())
    };
    let daemon = Daemon::start(&[
        "run",
        "--core",
        "1",
        "--blk",
        &disk("sick"),
        "--blk",
        &disk("well"),
    ]);
    let mut well = FrontEnd::<SplitDriver>::open(&dir.path("well.sock"), ALL);
    let data = random_bytes(7, 65536);
    assert_eq!(well.run(OUT, 0, &data, 0).status, OK);
    for (round, left) in [0, 4096, 1 << 20].into_iter().enumerate() {
        let mut sick = FrontEnd::<PackedDriver>::open(&dir.path("sick.sock"), ALL);
        let kept = random_bytes(round as u64, 4096);
        assert_eq!(sick.run(OUT, 8, &kept, 0).status, OK);
        assert_eq!(sick.run(IN, 8, &[], 4096).data, kept, "round {round}");
        sick.cut_memory(left);
        if left == 1 << 20 {
            // The rings are still there: a buffer is not.
            sick.post(0, IN, 8, &[], 4096);
        }
        sick.is_left();
        daemon.wait_log("has become shorter", std::time::Duration::from_secs(10));
        assert_same("well", &well.run(IN, 0, &[], 65536).data, &data);
        assert_eq!(well.run(FLUSH, 0, &[], 0).status, OK);
    }
    drop(well);
    let (status, log) = daemon.stop();
    assert!(status.success(), "{log}");
    assert_eq!(
        log.matches("blk sick: session ended: the file of the memory region")
            .count(),
        3,
        "{log}"
    );
    assert!(!log.contains("blk well: session ended: the file"), "{log}");
}
