//! Two real QEMU guests that talk to each other through the daemon: on a wire, and at a switch.
//!
//! One has packed rings, the other split ones. Data is compared by checksums that the guests make;
//! checksums and segmentation are left to the receiver, which the counters show. Needs what
//! tests/guest.rs needs.

mod support;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::support::daemon::Daemon;
    use super::support::guest::{Guest, GuestConfig, Nic};
    use super::support::tmp::TempDir;

    const MIB: u64 = 1 << 20;
    const PATIENCE: Duration = Duration::from_secs(60);

    fn boot(dir: &TempDir, name: &str, last: u8, packed: bool) -> Guest {
        let mac = ["52:54:00:12:34:01", "52:54:00:12:34:02"][usize::from(last - 1)];
        let nics = vec![Nic {
            socket: dir.path(&format!("{name}.sock")),
            queues: 2,
            packed,
            mac,
            extra: "",
        }];
        let mut guest = Guest::boot(&GuestConfig {
            nics,
            ..GuestConfig::default()
        });
        let bits = guest.features("/sys/class/net/eth0/device");
        assert_eq!(bits & 1 << 34 != 0, packed, "{bits:#x}");
        // CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4.
        let offloads = 1 | 1 << 1 | 1 << 7 | 1 << 11;
        assert_eq!(bits & offloads, offloads, "{bits:#x}");
        guest.ok(&format!("ip addr add 10.1.0.{last}/24 dev eth0"));
        guest.ok("ip link set eth0 up");
        guest
    }

    /// Sends random bytes from one guest to the other by TCP.
    fn transfer(from: &mut Guest, to: &mut Guest, address: &str) {
        to.ok("rm -f /tmp/got /tmp/ended");
        // The end of its own input would end the connection.
        let server = "sleep 60 | (nc -l -p 5000 >/tmp/got; echo >/tmp/ended)";
        to.ok(&format!("({server}) </dev/null >/dev/null 2>&1 &"));
        // The server is there when its port is.
        to.ok("until netstat -tln | grep -q :5000; do usleep 10000; done");
        let sent =
            from.ok("dd if=/dev/urandom bs=1M count=8 2>/dev/null >/tmp/x; sha256sum </tmp/x");
        from.run_within(&format!("nc {address} 5000 </tmp/x"), PATIENCE);
        to.ok("until [ -e /tmp/ended ]; do usleep 10000; done");
        assert_eq!(to.ok("wc -c </tmp/got"), (8 * MIB).to_string());
        assert_eq!(to.ok("sha256sum </tmp/got"), sent);
    }

    fn two_guests_talk(options: &[&str]) {
        let dir = TempDir::new("lan");
        let net = |name: &str, option: &str| {
            let socket = dir.path(&format!("{name}.sock"));
            format!("name={name},socket={},queues=2{option}", socket.display())
        };
        let (a, b) = (net("a", options[0]), net("b", options[1]));
        let mut arguments = vec!["run"];
        arguments.extend(&options[2..]);
        arguments.extend(["--net", &a, "--net", &b]);
        let daemon = Daemon::start(&arguments);
        let mut one = boot(&dir, "a", 1, true);
        let mut other = boot(&dir, "b", 2, false);
        one.ok("ping -c 3 -i 0.2 -s 1400 10.1.0.2");
        other.ok("ping -c 1 -s 9000 10.1.0.1");
        transfer(&mut one, &mut other, "10.1.0.2");
        transfer(&mut other, &mut one, "10.1.0.1");
        for name in ["a", "b"] {
            let (bytes, frames) = (
                daemon.counter(name, "tx_bytes"),
                daemon.counter(name, "tx_frames"),
            );
            assert!(bytes > 8 * MIB, "{name}: {bytes}");
            // Segmentation stays undone: frames travel that are longer than a cable would take.
            assert!(
                frames < bytes / 70,
                "{name}: {frames} frames of {bytes} bytes"
            );
            let large = daemon.queue_counter(name, "tx", "size_1519_max_packets");
            assert!(
                large > 100,
                "{name}: {large} of {frames} frames, {bytes} bytes"
            );
            assert_eq!(daemon.counter(name, "tx_drop_no_offload"), 0);
            assert_eq!(daemon.counter(name, "tx_drop_bad_vnet_header"), 0);
            assert_eq!(daemon.counter(name, "tx_drop_mtu"), 0);
        }
        drop((one, other));
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn two_guests_talk_over_a_wire() {
        two_guests_talk(&[",link=wire:b", "", "--core", "1"]);
    }

    #[test]
    fn two_guests_talk_over_a_wire_between_two_workers() {
        two_guests_talk(&[",link=wire:b,cores=0", ",cores=1", "--core", "0,1"]);
    }

    #[test]
    fn two_guests_talk_through_a_switch() {
        // What the guests leave to be segmented is longer, and its segments are not.
        let port = ",link=switch:lan,vlan=10,mtu=1500";
        two_guests_talk(&[port, port, "--core", "1"]);
    }
}
