//! Real QEMU guests on the real daemon: disks and network cards, split and packed rings.
//!
//! Needs root, QEMU, and what scripts/guest-image needs. Data is compared by checksums that another
//! program makes, and what was negotiated is read in the guest and in the daemon's log: front-ends
//! drop feature bits without a word.

#[cfg(test)]
#[path = "guest/mtu.rs"]
mod mtu;
#[path = "guest/pairs.rs"]
mod pairs;
mod support;
#[cfg(test)]
#[path = "guest/toggles.rs"]
mod toggles;

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::pairs::{carried, each_pair_carries, iperf_server};
    use super::support::daemon::Daemon;
    use super::support::deadline::wait_until;
    use super::support::guest::{Disk, Guest, GuestConfig, Nic};
    use super::support::netns::Netns;
    use super::support::tmp::{TempDir, random_bytes, sha256, sha256_of};
    use super::toggles::offloads_are_switched_under_traffic;
    use crate::support::program::Program;

    /// For a balloon in an emulated guest.
    const BALLOON: Duration = Duration::from_secs(60);
    const SOON: Duration = Duration::from_secs(20);
    const MIB: usize = 1 << 20;
    const PACKED: u64 = 1 << 34;
    const VERSION_1: u64 = 1 << 32;
    const MAC: &str = "52:54:00:12:34:56";

    fn disk(dir: &TempDir, name: &str, queues: u16, packed: bool) -> Disk {
        Disk {
            socket: dir.path(&format!("{name}.sock")),
            queues,
            packed,
            extra: "",
        }
    }

    fn nic(dir: &TempDir, queues: u16, packed: bool) -> Nic {
        Nic {
            socket: dir.path("net0.sock"),
            queues,
            packed,
            mac: MAC,
            extra: "",
        }
    }

    /// The daemon's own word on what a session negotiated.
    fn assert_negotiated(daemon: &Daemon, device: &str, packed: bool) {
        let line = daemon.wait_log(&format!("negotiated device={device} "), SOON);
        assert!(line.contains("VIRTIO_F_VERSION_1"), "{line}");
        assert_eq!(line.contains("VIRTIO_F_RING_PACKED"), packed, "{line}");
        assert_eq!(line.contains("rings=packed"), packed, "{line}");
        assert!(line.contains("REPLY_ACK"), "{line}");
    }

    /// Host data is read in the guest, guest data on the host, both byte-exact.
    fn disk_is_exact(queues: u16, packed: bool) {
        let dir = TempDir::new("disk");
        let (image, _) = dir.random_file("disk.img", 64 * MIB, 7);
        let cache = if packed { "writethrough" } else { "writeback" };
        let blk = format!(
            "name=disk0,socket={},path={},queues=4,serial=SN-0042,cache={cache}",
            dir.path("disk0.sock").display(),
            image.display()
        );
        let daemon = Daemon::start(&["run", "--core", "1", "--blk", &blk]);
        let disks = vec![disk(&dir, "disk0", queues, packed)];
        let mut guest = Guest::boot(&GuestConfig {
            disks,
            ..GuestConfig::default()
        });
        let features = guest.features("/sys/block/vda/device");
        assert_eq!(features & PACKED != 0, packed, "{features:#x}");
        assert_ne!(features & VERSION_1, 0, "{features:#x}");
        assert_negotiated(&daemon, "disk0", packed);
        let mq = guest.ok("ls /sys/block/vda/mq | wc -l");
        assert_eq!(mq.parse(), Ok(queues.min(2)), "one hardware queue per vCPU");
        assert_eq!(guest.ok("cat /sys/block/vda/serial"), "SN-0042");
        let read = guest.ok("dd if=/dev/vda bs=1M count=32 2>/dev/null | sha256sum");
        assert!(read.starts_with(&sha256(&image, 0, 32)), "{read}");
        let wrote = guest.ok(
            "dd if=/dev/urandom of=/tmp/x bs=1M count=16 2>/dev/null && \
             dd if=/tmp/x of=/dev/vda bs=64k seek=512 oflag=direct conv=fsync 2>/dev/null && \
             sha256sum </tmp/x",
        );
        assert!(wrote.starts_with(&sha256(&image, 32, 16)), "{wrote}");
        // conv=fsync reached the disk, where the guest has one to send.
        assert_eq!(daemon.counter("disk0", "flushes") > 0, !packed);
        assert_eq!(daemon.counter("disk0", "durable_writes") > 0, packed);
        assert!(daemon.counter("disk0", "write_bytes") >= 16 * MIB as u64);
        assert_eq!(daemon.counter("disk0", "errors"), 0);
        file_system_survives(&mut guest);
        cache_is_the_guests_choice(&mut guest, &daemon, &image, packed);
        drop(guest);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
        assert!(!dir.path("disk0.sock").exists(), "the socket is removed");
    }

    /// The guest sees how the cache is, changes it, and again; what it writes is durable by itself
    /// when it is off, and byte-exact.
    fn cache_is_the_guests_choice(
        guest: &mut Guest,
        daemon: &Daemon,
        image: &Path,
        through_at_first: bool,
    ) {
        let name = |through: bool| match through {
            true => "write through",
            false => "write back",
        };
        let sysfs = "/sys/block/vda/cache_type";
        assert_eq!(guest.ok(&format!("cat {sysfs}")), name(through_at_first));
        let first = through_at_first;
        for (round, through) in [first, !first, first, !first].into_iter().enumerate() {
            if round > 0 {
                guest.ok(&format!("echo {} >{sysfs}", name(through)));
            }
            assert_eq!(guest.ok(&format!("cat {sysfs}")), name(through));
            let counters =
                || ["durable_writes", "flushes"].map(|name| daemon.counter("disk0", name));
            let before = counters();
            // Four requests, and then a flush if the guest holds one to be needed.
            let at = 56 + round;
            let sum = guest.ok(&format!(
                "dd if=/dev/urandom of=/tmp/c bs=1M count=1 2>/dev/null && sync && \
                 dd if=/tmp/c of=/dev/vda bs=256k seek={} oflag=direct conv=fsync 2>/dev/null && \
                 sha256sum </tmp/c",
                at * 4
            ));
            let after = counters();
            let [durable, flushes] = [0, 1].map(|which| after[which] - before[which]);
            assert_eq!(durable >= 4, through, "round {round}: {durable} durable");
            assert_eq!(flushes > 0, !through, "round {round}: {flushes} flushes");
            assert!(sum.starts_with(&sha256(image, at as u64, 1)), "{sum}");
        }
    }

    /// The page cache is dropped by an unmount, so the files come back from the disk.
    fn file_system_survives(guest: &mut Guest) {
        guest.ok("mke2fs -q /dev/vda >/dev/null 2>&1 && mount -t ext4 /dev/vda /mnt");
        let sum = guest.ok("cp /bin/busybox /mnt/a && sha256sum </mnt/a && umount /mnt");
        guest.ok("mount -t ext4 /dev/vda /mnt");
        assert_eq!(guest.ok("sha256sum </mnt/a"), sum);
        guest.ok("umount /mnt");
    }

    #[test]
    fn a_disk_is_byte_exact_on_a_split_ring() {
        disk_is_exact(1, false);
    }

    #[test]
    fn a_disk_is_byte_exact_on_two_packed_rings() {
        disk_is_exact(2, true);
    }

    /// What the balloon takes is gone from the memory file, and comes back as other pages: every
    /// request has to find those that are there now. Buffers of 8 MiB are made of such pages,
    /// smaller ones may never be. With `fixed_buffers` this fails.
    #[test]
    fn a_disk_is_byte_exact_while_a_balloon_grows_and_shrinks() {
        let dir = TempDir::new("balloon");
        let (image, _) = dir.random_file("disk.img", 64 * MIB, 13);
        let socket = dir.path("disk0.sock");
        let blk = format!(
            "name=disk0,socket={},path={}",
            socket.display(),
            image.display()
        );
        let daemon = Daemon::start(&["run", "--core", "1", "--blk", &blk]);
        let mut guest = Guest::boot(&GuestConfig {
            disks: vec![disk(&dir, "disk0", 1, true)],
            devices: vec!["virtio-balloon-pci"],
            ..GuestConfig::default()
        });
        // Other bytes each time, so that nothing old can pass for them.
        guest.ok("while [ ! -e /tmp/stop ]; do \
               dd if=/dev/urandom of=/tmp/x bs=1M count=8 2>/dev/null; \
               dd if=/tmp/x of=/dev/vda bs=8M oflag=direct 2>/dev/null; \
               dd if=/dev/vda of=/tmp/y bs=8M count=1 iflag=direct 2>/dev/null; \
               cmp /tmp/x /tmp/y >>/tmp/bad 2>&1; echo >>/tmp/rounds; rm /tmp/x /tmp/y; \
             done >/dev/null 2>&1 &");
        let rounds = |guest: &mut Guest| -> usize {
            let lines = guest.ok("touch /tmp/rounds; wc -l </tmp/rounds");
            lines.parse().expect("a number")
        };
        let memory = |guest: &mut Guest| -> usize {
            let line = guest.ok("grep MemTotal /proc/meminfo");
            let digits: String = line.chars().filter(char::is_ascii_digit).collect();
            digits.parse::<usize>().expect("a number") / 1024
        };
        let whole = memory(&mut guest);
        for (left, reached) in [(224, 256), (512, whole), (192, 224), (512, whole)] {
            let before = rounds(&mut guest);
            guest.balloon(left * MIB);
            wait_until("the balloon's size", BALLOON, || {
                let now = memory(&mut guest);
                let there = if left < 512 {
                    now <= reached
                } else {
                    now >= reached
                };
                there.then_some(())
            });
            wait_until("data to go both ways", BALLOON, || {
                (rounds(&mut guest) >= before + 2).then_some(())
            });
            // What the balloon has taken is the host's again; some is for firmware and video.
            let has = guest.memory_bytes() / MIB as u64;
            assert!(has <= left as u64 + 16, "{has} MiB of {left} are taken");
        }
        guest.ok("touch /tmp/stop; while [ -e /tmp/x ]; do sleep 1; done");
        assert_eq!(guest.ok("cat /tmp/bad"), "", "other bytes came back");
        assert_eq!(daemon.counter("disk0", "errors"), 0);
        assert!(daemon.counter("disk0", "read_bytes") >= 64 * MIB as u64);
    }

    #[test]
    fn several_disks_of_all_kinds_live_in_one_daemon() {
        let dir = TempDir::new("kinds");
        let (image, _) = dir.random_file("ro.img", 8 * MIB, 9);
        let socket = |name: &str| dir.path(&format!("{name}.sock")).display().to_string();
        let ram = format!(
            "name=ram,socket={},backend=ram:32M,block_size=4096",
            socket("ram")
        );
        let null = format!("name=null,socket={},backend=null:1G", socket("null"));
        let ro = format!(
            "name=ro,socket={},path={},read_only=true",
            socket("ro"),
            image.display()
        );
        let args = [
            "run",
            "--core",
            "0,1",
            "--idle",
            "interrupt",
            "--blk",
            &ram,
            "--blk",
            &null,
            "--blk",
            &ro,
        ];
        let _daemon = Daemon::start(&args);
        let disks = vec![
            disk(&dir, "ram", 2, true),
            disk(&dir, "null", 1, false),
            disk(&dir, "ro", 1, true),
        ];
        let mut guest = Guest::boot(&GuestConfig {
            disks,
            ..GuestConfig::default()
        });
        assert_eq!(
            guest.ok("cat /sys/block/vda/queue/logical_block_size"),
            "4096"
        );
        let sums = guest.ok("dd if=/dev/urandom of=/tmp/x bs=1M count=32 2>/dev/null; \
             dd if=/tmp/x of=/dev/vda bs=256k oflag=direct 2>/dev/null; sha256sum </tmp/x; \
             dd if=/dev/vda bs=256k iflag=direct 2>/dev/null | sha256sum");
        let sums: Vec<_> = sums.lines().collect();
        assert_eq!(sums[0], sums[1], "ram: gives back what it was given");
        guest.ok("dd if=/dev/zero of=/dev/vdb bs=1M count=64 oflag=direct 2>/dev/null");
        assert_eq!(guest.ok("cat /sys/block/vdc/ro"), "1");
        let (status, _) = guest.run("dd if=/dev/zero of=/dev/vdc bs=4k count=1 conv=fsync");
        assert_ne!(status, 0, "a read-only disk takes no writes");
        let read = guest.ok("dd if=/dev/vdc bs=1M 2>/dev/null | sha256sum");
        assert!(read.starts_with(&sha256(&image, 0, 8)), "{read}");
    }

    /// A daemon in a namespace with a tap of this name, which has an address.
    fn tap_daemon(netns: &Netns, dir: &TempDir, queues: u16, with_disk: bool) -> Daemon {
        // One queue sleeps whenever it can, several poll for a while first.
        let idle = if queues.is_multiple_of(2) {
            "interrupt"
        } else {
            "adaptive"
        };
        // In the namespace, or outside with the tap in it.
        let key = if with_disk {
            format!(",netns={}", netns.name())
        } else {
            String::new()
        };
        let net = format!(
            "name=net0,socket={},link=tap:vt0,queues={queues}{key}",
            dir.path("net0.sock").display()
        );
        let blk = format!(
            "name=disk0,socket={},backend=ram:64M",
            dir.path("disk0.sock").display()
        );
        let mut args = vec!["run", "--core", "1", "--idle", idle, "--net", &net];
        if with_disk {
            args.extend(["--blk", &blk]);
        }
        let daemon = if with_disk {
            Daemon::start(&args)
        } else {
            Daemon::start_in(netns, &args)
        };
        netns.ok("ip addr add 10.7.0.1/24 dev vt0 && ip link set vt0 up");
        daemon
    }

    fn configure_nic(guest: &mut Guest) {
        guest.ok("ip addr add 10.7.0.2/24 dev eth0 && ip link set eth0 up");
        guest.ok("for i in 1 2 3 4 5 6 7 8 9 10; do \
             ping -c1 -W1 10.7.0.1 >/dev/null && exit 0; done; exit 1");
    }

    /// Random bytes over TCP, both ways, compared byte for byte.
    fn tcp_is_exact(guest: &mut Guest, netns: &Netns) {
        let sum = guest.ok(
            "mkdir -p /tmp/www && dd if=/dev/urandom of=/tmp/www/y bs=1M count=16 2>/dev/null; \
             { pidof httpd >/dev/null || httpd -p 8001 -h /tmp/www; } && sha256sum </tmp/www/y",
        );
        let received = netns.fetch("10.7.0.2:8001", "/y");
        assert_eq!(received.len(), 16 * MIB, "guest to host");
        assert!(
            sum.starts_with(&sha256_of(&received)),
            "guest to host: {sum}"
        );
        let sent = random_bytes(11, 16 * MIB);
        let wanted = sha256_of(&sent);
        let server = netns.serve_once("10.7.0.1:8002", sent);
        let sum = guest.ok("wget -q -O /tmp/z http://10.7.0.1:8002/ && sha256sum </tmp/z");
        server.join().expect("the server got a request");
        assert!(sum.starts_with(&wanted), "host to guest: {sum}");
    }

    fn iperf_moves_bytes(guest: &mut Guest, netns: &Netns) {
        for reverse in ["", "-R"] {
            let mut server = iperf_server(netns, 5201, &["-1"]);
            let line = format!(
                "iperf3 -c 10.7.0.1 -t 1 -J {reverse} >/tmp/json; \
                 grep -A12 sum_received /tmp/json | grep '\"bytes\"'"
            );
            let bytes = guest.ok(&line);
            server.wait();
            let digits: String = bytes.chars().filter(char::is_ascii_digit).collect();
            assert!(
                digits.parse::<u64>().expect("a number") > MIB as u64,
                "{reverse}: {bytes}"
            );
        }
    }

    fn network_works(queues: u16, packed: bool) {
        let (netns, dir) = (Netns::new(), TempDir::new("net"));
        // The tap has more queues than the guest uses: no frame may go to one that nobody reads.
        let daemon = tap_daemon(&netns, &dir, queues + 3, false);
        let nics = vec![nic(&dir, queues, packed)];
        let mut guest = Guest::boot(&GuestConfig {
            nics,
            ..GuestConfig::default()
        });
        configure_nic(&mut guest);
        let said = guest.qemu_said();
        assert!(!said.contains("falling back"), "{said}");
        let features = guest.features("/sys/class/net/eth0/device");
        assert_eq!(features & PACKED != 0, packed, "{features:#x}");
        // CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MRG_RXBUF, VERSION_1.
        for bit in [0, 1, 7, 8, 11, 12, 15, 32] {
            assert_ne!(features & (1 << bit), 0, "bit {bit} of {features:#x}");
        }
        assert_negotiated(&daemon, "net0", packed);
        // QEMU tells a vhost-user back-end nothing when a guest resets a virtqueue, so the bit must
        // not be there unless it was asked for (docs/decisions/0008).
        assert_eq!(features & (1 << 40), 0, "RING_RESET in {features:#x}");
        let (status, _) = guest.run("ethtool -G eth0 rx 128 tx 128");
        assert_ne!(status, 0, "rings can't be resized");
        if queues > 1 {
            let channels = guest.ok("ethtool -L eth0 combined 2; ethtool -l eth0");
            assert!(channels.matches("Combined:\t2").count() == 2, "{channels}");
        }
        guest.ok("ping -c 3 -s 56 10.7.0.1");
        guest.ok("ping -c 3 -s 8000 10.7.0.1");
        netns.ok("ping -c 3 -s 8000 10.7.0.2");
        tcp_is_exact(&mut guest, &netns);
        iperf_moves_bytes(&mut guest, &netns);
        offloads_are_switched_under_traffic(&mut guest, &netns, &daemon);
        for counter in [
            "ring_faults",
            "tx_drop_bad_vnet_header",
            "tx_drop_host_error",
        ] {
            assert_eq!(daemon.counter("net0", counter), 0, "{counter}");
        }
        assert!(daemon.counter("net0", "rx_frames") > 1000);
    }

    #[test]
    fn a_network_card_works_on_split_rings() {
        network_works(1, false);
    }

    #[test]
    fn a_network_card_with_two_queue_pairs_works_on_packed_rings() {
        network_works(2, true);
    }

    /// The number of queue pairs changes while four connections send and receive: nothing hangs,
    /// each pair in use carries frames, one that is not in use carries none, and nothing is lost
    /// but what waits in a pair that is left.
    #[test]
    fn queue_pairs_are_changed_under_load() {
        let (netns, dir) = (Netns::new(), TempDir::new("net"));
        let daemon = tap_daemon(&netns, &dir, 2, false);
        let mut guest = Guest::boot(&GuestConfig {
            nics: vec![nic(&dir, 2, false)],
            ..GuestConfig::default()
        });
        configure_nic(&mut guest);
        let mut servers = [
            iperf_server(&netns, 5201, &["-1"]),
            iperf_server(&netns, 5202, &[]),
        ];
        guest.ok("iperf3 -c 10.7.0.1 -t 120 -P 4 </dev/null >/tmp/load 2>&1 &");
        // Which pair an old connection is on is the guest's choice.
        let await_traffic = || {
            let before = carried(&daemon);
            wait_until("frames on the pairs in use", SOON, || {
                let now = carried(&daemon);
                let more =
                    |way: usize| -> u64 { (0..2).map(|p| now[p][way] - before[p][way]).sum() };
                (more(0) > 50 && more(1) > 0).then_some(())
            });
        };
        // What came before there was a guest.
        let lost = daemon.drops("net0");
        await_traffic();
        each_pair_carries(&mut guest, &daemon);
        assert_eq!(daemon.drops("net0"), lost, "nothing was changed yet");
        for lap in 0..3 {
            guest.ok("ethtool -L eth0 combined 1");
            let [_, left] = carried(&daemon);
            await_traffic();
            assert_eq!(carried(&daemon)[1], left, "the pair is left, lap {lap}");
            guest.ok("ethtool -L eth0 combined 2");
            await_traffic();
            each_pair_carries(&mut guest, &daemon);
        }
        guest.ok("killall iperf3");
        servers.iter_mut().for_each(Program::end);
        tcp_is_exact(&mut guest, &netns);
        assert_eq!(daemon.counter("net0", "ring_faults"), 0);
        // What waited on a pair that was left, either way, and what the kernel's queue had no room
        // for while the guest was slow.
        let may_be = ["rx_drop_peer_down=", "tx_drop_disabled=", "tap_rx_dropped="];
        let mut more = daemon.drops("net0");
        more.retain(|drop| !lost.contains(drop) && !may_be.iter().any(|n| drop.starts_with(n)));
        assert_eq!(more, [""; 0]);
        // A ring's worth each time.
        let given_back = daemon.counter("net0", "tx_drop_disabled");
        assert!(given_back <= 3 * 256, "{given_back}");
        guest.kill();
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    /// Past the stack of the host: one end of a cable is the guest's, the other has the address.
    #[test]
    fn a_guest_reaches_an_interface_through_af_xdp() {
        let (netns, dir) = (Netns::new(), TempDir::new("guestxdp"));
        // Nobody would finish the checksums that the other end leaves undone.
        netns.ok("ip link add xa type veth peer name vt0 && ethtool -K vt0 tx off");
        netns.ok("ip addr add 10.7.0.1/24 dev vt0 && ip link set vt0 up && ip link set xa up");
        let socket = dir.path("net0.sock").display().to_string();
        let net = format!("name=net0,socket={socket},link=xdp:xa");
        let args = ["run", "--core", "1", "--idle", "interrupt", "--net", &net];
        let daemon = Daemon::start_in(&netns, &args);
        let mut guest = Guest::boot(&GuestConfig {
            nics: vec![nic(&dir, 1, true)],
            ..GuestConfig::default()
        });
        configure_nic(&mut guest);
        guest.ok("ping -c 3 -s 8000 10.7.0.1");
        netns.ok("ping -c 3 -s 8000 10.7.0.2");
        tcp_is_exact(&mut guest, &netns);
        for counter in ["ring_faults", "tx_drop_host_error", "tx_drop_no_offload"] {
            assert_eq!(daemon.counter("net0", counter), 0, "{counter}");
        }
        // The guest leaves segmentation to us, and what it sent has arrived byte for byte.
        assert!(daemon.counter("net0", "tx_bytes") > 16 * MIB as u64);
        let large = daemon.queue_counter("net0", "tx", "size_1519_max_packets");
        assert!(large > 100, "{large} frames to be cut");
    }

    /// A daemon outside the namespace that connects to where QEMU listens, and the disk of which
    /// another daemon finds what this one wrote. The tap was there before: it outlives daemons.
    fn connecting_daemon(netns: &Netns, dir: &TempDir) -> Daemon {
        let net = format!(
            "name=net0,socket={},mode=client,link=tap:vt0,queues=2,netns={}",
            dir.path("net0.sock").display(),
            netns.name()
        );
        let blk = format!(
            "name=disk0,socket={},mode=client,path={}",
            dir.path("disk0.sock").display(),
            dir.path("disk.img").display()
        );
        Daemon::start(&["run", "--core", "1", "--net", &net, "--blk", &blk])
    }

    /// QEMU listens and serves the guest on with whoever connects next. On packed rings the guest
    /// has to be reset for that: how far they were worked on, only the one who is gone knew, and
    /// QEMU can't tell the next.
    fn a_listening_front_end_works(packed: bool) {
        let (netns, dir) = (Netns::new(), TempDir::new("listens"));
        let (image, _) = dir.random_file("disk.img", 16 * MIB, 17);
        netns.ok("ip tuntap add dev vt0 mode tap multi_queue && \
             ip addr add 10.7.0.1/24 dev vt0 && ip link set vt0 up");
        let mut daemon = connecting_daemon(&netns, &dir);
        let mut guest = Guest::boot(&GuestConfig {
            disks: vec![disk(&dir, "disk0", 1, packed)],
            nics: vec![nic(&dir, 2, packed)],
            listens: true,
            ..GuestConfig::default()
        });
        for life in 0..3 {
            if life > 0 {
                drop(daemon);
                daemon = connecting_daemon(&netns, &dir);
            }
            assert_negotiated(&daemon, "disk0", packed);
            assert_negotiated(&daemon, "net0", packed);
            if packed && life > 0 {
                guest.reset();
            }
            if packed || life == 0 {
                configure_nic(&mut guest);
            }
            for device in ["/sys/class/net/eth0/device", "/sys/block/vda/device"] {
                let features = guest.features(device);
                assert_eq!(features & PACKED != 0, packed, "{device}: {features:#x}");
            }
            tcp_is_exact(&mut guest, &netns);
            // Past the guest's page cache, which has what it read before.
            let read =
                guest.ok("dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | sha256sum");
            assert!(read.starts_with(&sha256(&image, 0, 8)), "{life}: {read}");
            let wrote = guest.ok("dd if=/dev/urandom of=/tmp/x bs=1M count=8 2>/dev/null && \
                 dd if=/tmp/x of=/dev/vda bs=64k oflag=direct conv=fsync 2>/dev/null && \
                 sha256sum </tmp/x");
            assert!(wrote.starts_with(&sha256(&image, 0, 8)), "{life}: {wrote}");
            for device in ["net0", "disk0"] {
                assert_eq!(daemon.counter(device, "ring_faults"), 0, "{device}, {life}");
            }
        }
        let said = guest.qemu_said();
        assert!(!said.contains("falling back"), "{said}");
        guest.kill();
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn a_front_end_that_listens_works_on_split_rings_and_outlives_daemons() {
        a_listening_front_end_works(false);
    }

    #[test]
    fn a_front_end_that_listens_works_on_packed_rings_and_outlives_daemons() {
        a_listening_front_end_works(true);
    }

    /// A driver from before VIRTIO 1.0, whose header has 10 bytes without mergeable buffers.
    #[test]
    fn a_legacy_guest_works_with_the_short_header_and_the_long_one() {
        for (mrg_rxbuf, properties) in [
            (false, ",disable-modern=on,disable-legacy=off,mrg_rxbuf=off"),
            (true, ",disable-modern=on,disable-legacy=off"),
        ] {
            let (netns, dir) = (Netns::new(), TempDir::new("legacy"));
            let daemon = tap_daemon(&netns, &dir, 1, true);
            let mut nic = nic(&dir, 1, false);
            nic.extra = properties;
            let mut disk = disk(&dir, "disk0", 1, false);
            disk.extra = ",disable-modern=on,disable-legacy=off";
            let mut guest = Guest::boot(&GuestConfig {
                disks: vec![disk],
                nics: vec![nic],
                ..GuestConfig::default()
            });
            both_work(&mut guest);
            let features = guest.features("/sys/class/net/eth0/device");
            assert_eq!(features & VERSION_1, 0, "{features:#x}");
            assert_eq!(features & (1 << 15) != 0, mrg_rxbuf, "{features:#x}");
            let features = guest.features("/sys/block/vda/device");
            assert_eq!(features & VERSION_1, 0, "{features:#x}");
            guest.ok("ping -c 3 -s 8000 10.7.0.1");
            tcp_is_exact(&mut guest, &netns);
            assert_eq!(daemon.counter("net0", "ring_faults"), 0);
            assert_eq!(daemon.counter("disk0", "ring_faults"), 0);
        }
    }

    /// A quick look at both devices of a guest.
    fn both_work(guest: &mut Guest) {
        let sums = guest.ok("dd if=/dev/urandom of=/tmp/x bs=256k count=4 2>/dev/null; \
             dd if=/tmp/x of=/dev/vda bs=64k oflag=direct 2>/dev/null; sha256sum </tmp/x; \
             dd if=/dev/vda bs=64k count=16 iflag=direct 2>/dev/null | sha256sum");
        let sums: Vec<_> = sums.lines().collect();
        assert_eq!(sums[0], sums[1]);
        configure_nic(guest);
    }

    #[test]
    fn reboot_rebind_and_pause_leave_both_devices_working() {
        let (netns, dir) = (Netns::new(), TempDir::new("reboot"));
        let daemon = tap_daemon(&netns, &dir, 2, true);
        let config = GuestConfig {
            disks: vec![disk(&dir, "disk0", 2, true)],
            nics: vec![nic(&dir, 2, true)],
            ..GuestConfig::default()
        };
        let mut guest = Guest::boot(&config);
        both_work(&mut guest);
        guest.reboot();
        both_work(&mut guest);
        guest.reset();
        both_work(&mut guest);
        guest.stop_and_continue();
        guest.ok("ping -c 2 10.7.0.1");
        guest.ok("ip link set eth0 down");
        let rebind = "cd /sys/bus/virtio/drivers; for d in virtio_blk virtio_net; do \
             for v in $d/virtio*; do n=${v##*/}; \
             echo $n >$d/unbind && echo $n >$d/bind || exit 1; done; done; \
             for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && exit 0; sleep 1; done; exit 1";
        guest.ok(rebind);
        both_work(&mut guest);
        assert_eq!(daemon.counter("disk0", "ring_faults"), 0);
        assert_eq!(daemon.counter("net0", "ring_faults"), 0);
        let used = daemon.cpu_share(Duration::from_secs(2));
        assert!(
            used < 0.05,
            "{:.1} % of a core for an idle guest",
            used * 100.0
        );
    }

    #[test]
    fn a_daemon_outlives_ten_guests_that_are_killed() {
        let (netns, dir) = (Netns::new(), TempDir::new("kill"));
        let daemon = tap_daemon(&netns, &dir, 1, true);
        for round in 0..10 {
            let packed = round % 2 == 1;
            let config = GuestConfig {
                disks: vec![disk(&dir, "disk0", 1, packed)],
                nics: vec![nic(&dir, 1, packed)],
                ..GuestConfig::default()
            };
            let mut guest = Guest::boot(&config);
            both_work(&mut guest);
            assert_negotiated(&daemon, "disk0", packed);
            assert_negotiated(&daemon, "net0", packed);
            guest.kill();
        }
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }
}
