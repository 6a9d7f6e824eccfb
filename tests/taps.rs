//! Taps of the daemon: in another namespace, passed by descriptor, and macvtaps. What goes through
//! them is tested with guests (tests/guest.rs) and at the queue (src/host/tap).

mod support;

#[cfg(test)]
mod tests {
    use std::process::Command;

    use crate::support::daemon::Daemon;
    use crate::support::netns::Netns;
    use crate::support::tmp::TempDir;

    const VRINGD: &str = env!("CARGO_BIN_EXE_vringd");

    /// A macvtap with its device in /dev, whose number is that of no other interface here.
    fn macvtap(netns: &Netns) -> String {
        let index = 2_000_000 + std::process::id() % 1_000_000;
        netns.ok("ip link add v0 type veth peer name v1");
        netns.ok(&format!(
            "ip link add link v0 name mv0 index {index} type macvtap mode bridge"
        ));
        format!("/dev/tap{index}")
    }

    #[test]
    fn a_daemon_outside_makes_and_removes_a_tap_in_a_namespace() {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        let socket = dir.path("n.sock");
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues=2,mtu=1400,netns={}",
            socket.display(),
            netns.name()
        );
        let daemon = Daemon::start(&["run", "--net", &net]);
        let text = netns.ok("ip -d link show vt0");
        for word in ["mtu 1400", ",UP", "multi_queue"] {
            assert!(text.contains(word), "no `{word}` in {text}");
        }
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
        assert!(
            !netns.run("ip link show vt0").status.success(),
            "it is gone"
        );
    }

    #[test]
    fn a_macvtap_is_opened_by_name_or_by_the_shell() {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        let device = macvtap(&netns);
        let socket = dir.path("n.sock").display().to_string();
        let by_name = format!("socket={socket},link=macvtap:mv0,netns={}", netns.name());
        let daemon = Daemon::start(&["run", "--net", &by_name]);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
        // The daemon knows neither the namespace nor the name.
        let mut shell = Command::new("sh");
        let line = format!("exec \"$0\" \"$@\" 7<>{device}");
        shell.args(["-c", &line, VRINGD]);
        let passed = format!("socket={socket},link=tap:fd=7");
        let daemon = Daemon::spawn(shell, &["run", "--net", &passed]);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn a_tap_that_cannot_be_had_ends_the_daemon_with_a_line_that_names_it() {
        let (dir, netns) = (TempDir::new("taps"), Netns::new());
        netns.ok("ip tuntap add dev one0 mode tap");
        let name = netns.name();
        let socket = dir.path("n.sock").display().to_string();
        for (link, wanted) in [
            (
                "link=tap:fd=9".to_owned(),
                "link = \"tap:fd=9\": tap: the file descriptor 9 is not open",
            ),
            (
                "link=tap:t0,netns=no-such".to_owned(),
                "there is no network namespace \"/run/netns/no-such\"",
            ),
            (
                format!("link=tap:one0,queues=2,netns={name}"),
                "tap `one0`: 2 queues asked for, but the interface exists as a tap with a single \
                 queue",
            ),
            (
                format!("link=macvtap:lo,netns={name}"),
                "macvtap `lo`: it has no device /dev/tap1",
            ),
        ] {
            let net = format!("socket={socket},{link}");
            let output = Command::new(VRINGD)
                .args(["run", "--net", &net])
                .output()
                .unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(!output.status.success(), "{link}");
            assert!(error.contains(wanted), "{link}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
