//! A network namespace for one test: nothing that it does is seen outside.

use std::process::{Command, Output};

use super::tmp::unique;

/// A namespace that is removed at the end.
pub struct Netns(String);

impl Netns {
    /// A fresh namespace with its loopback up.
    pub fn new() -> Netns {
        let netns = Netns(format!("vt{}", unique()));
        let added = Command::new("ip").args(["netns", "add", &netns.0]).output();
        let added = added.expect("ip (package iproute2) runs");
        assert!(added.status.success(), "ip netns add: {added:?}");
        netns.ok("ip link set lo up");
        netns
    }

    /// A command to be run in it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0, program]);
        command
    }

    /// Runs a shell line in it.
    pub fn run(&self, line: &str) -> Output {
        self.command("sh").args(["-c", line]).output().expect("ip netns exec runs")
    }

    /// Runs a shell line that must succeed; returns what it printed.
    pub fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}
