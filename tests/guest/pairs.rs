//! Which queue pairs of a guest's card carry its connections.

use std::process::Stdio;
use std::time::Duration;

use crate::support::daemon::Daemon;
use crate::support::deadline::wait_until;
use crate::support::guest::Guest;
use crate::support::netns::Netns;
use crate::support::program::Program;

const PATIENCE: Duration = Duration::from_secs(20);

/// Frames that each of two queue pairs has carried, to the guest and from it.
pub(crate) fn carried(daemon: &Daemon) -> [[u64; 2]; 2] {
    [0, 1].map(|pair| {
        ["rx", "tx"]
            .map(|way| daemon.one_queue_counter("net0", &format!("{way}_q{pair}_good_packets")))
    })
}

/// A server for so many runs of iperf3, or for as many as come.
pub(crate) fn iperf_server(netns: &Netns, port: u16, more: &[&str]) -> Program {
    let mut server = netns.command("iperf3");
    let server = server.args(["-s", "-p", &port.to_string()]).args(more);
    let server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let server = Program(server.expect("iperf3 (package iperf3) runs"));
    wait_until("the server listens", PATIENCE, || {
        let listens = netns.ok("ss -ltn").contains(&format!(":{port} "));
        listens.then_some(())
    });
    server
}

/// A new connection from each of the guest's processors, each of which has a pair: both carry
/// frames both ways.
pub(crate) fn each_pair_carries(guest: &mut Guest, daemon: &Daemon) {
    for pair in 0..2 {
        let before = carried(daemon)[pair];
        let mask = 1 << pair;
        guest.ok(&format!(
            "taskset {mask} iperf3 -c 10.7.0.1 -p 5202 -n 2M </dev/null"
        ));
        let after = carried(daemon)[pair];
        // So many at least: no frame is larger than 64 KiB, and half of them are answered.
        for (way, least) in [16, 32].into_iter().enumerate() {
            let more = after[way] - before[way];
            assert!(more >= least, "pair {pair}: {before:?} to {after:?}");
        }
    }
}
