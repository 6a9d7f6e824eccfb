//! The link behind a port, as its front-end sees it: with the real daemon and real interfaces.

mod support;

#[cfg(test)]
mod tests {
    use std::io::{self, Read};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::Path;
    use std::time::Duration;

    use vhost::VhostBackend;
    use vhost::vhost_user::message::{
        VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
    };
    use vhost::vhost_user::{Frontend, VhostUserFrontend};

    use crate::support::daemon::Daemon;
    use crate::support::deadline::wait_until;
    use crate::support::guest::{Guest, GuestConfig, Nic};
    use crate::support::netns::Netns;
    use crate::support::tmp::TempDir;

    const PATIENCE: Duration = Duration::from_secs(20);
    const DOWN: &str = "net n: link is down: no front-end can connect";
    const UP: &str = "net n: link is up: front-ends can connect";

    /// A connection on which the device answers.
    fn session(socket: UnixStream) -> (Frontend, UnixStream) {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let ours = socket.try_clone().unwrap();
        let front = Frontend::from_stream(socket, 2);
        front.set_owner().unwrap();
        assert_ne!(front.get_features().unwrap() & 1 << 32, 0, "VERSION_1");
        (front, ours)
    }

    fn connect(path: &Path) -> (Frontend, UnixStream) {
        session(wait_until("a session", PATIENCE, || {
            UnixStream::connect(path).ok()
        }))
    }

    /// Waits until the back-end closes the connection.
    fn assert_ended(mut session: (Frontend, UnixStream)) {
        let read = session.1.read(&mut [0; 16]);
        assert_eq!(read.expect("an end in time"), 0, "not closed");
    }

    fn assert_refused(path: &Path) {
        let error = UnixStream::connect(path).expect_err("nobody listens");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    /// Ends and begins sessions twice; `down` and `up` are what is done to the link.
    fn follows(daemon: &Daemon, path: &Path, down: &dyn Fn(), up: &dyn Fn()) {
        let mut open = connect(path);
        for _ in 0..2 {
            let mark = daemon.log().len();
            down();
            assert_ended(open);
            daemon.wait_log_after(mark, "net n: session ended: link is down", PATIENCE);
            daemon.wait_log_after(mark, DOWN, PATIENCE);
            wait_until("the socket is gone", PATIENCE, || {
                (!path.exists()).then_some(())
            });
            assert_refused(path);
            up();
            daemon.wait_log_after(mark, UP, PATIENCE);
            open = connect(path);
        }
        // The daemon ends while the link is down, too.
        down();
        assert_ended(open);
    }

    #[test]
    fn a_session_ends_with_the_link_of_its_tap_and_begins_again() {
        let (dir, netns) = (TempDir::new("link"), Netns::new());
        let path = dir.path("n.sock");
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues=2,link_follows=session",
            path.display()
        );
        let daemon = Daemon::start_in(&netns, &["run", "--net", &net]);
        let set = |state: &str| drop(netns.ok(&format!("ip link set vt0 {state}")));
        follows(&daemon, &path, &|| set("down"), &|| set("up"));
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn a_tap_of_another_namespace_and_the_carrier_of_an_interface_are_followed() {
        let (dir, netns) = (TempDir::new("link"), Netns::new());
        let path = dir.path("n.sock");
        netns.ok("ip tuntap add vt0 mode tap");
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues=1,netns={},link_follows=session",
            path.display(),
            netns.name()
        );
        let daemon = Daemon::start(&["run", "--net", &net]);
        // It was down from the start.
        daemon.wait_log(DOWN, PATIENCE);
        let set = |state: &str| drop(netns.ok(&format!("ip link set vt0 {state}")));
        set("up");
        follows(&daemon, &path, &|| set("down"), &|| set("up"));
        // Gone for good.
        set("up");
        let open = connect(&path);
        netns.ok("ip link del vt0");
        assert_ended(open);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");

        netns.ok("ip link add xa type veth peer name xb && ip link set xa up");
        let net = format!(
            "name=n,socket={},link=xdp:xa,link_follows=session",
            path.display()
        );
        let daemon = Daemon::start_in(&netns, &["run", "--net", &net]);
        daemon.wait_log(DOWN, PATIENCE);
        let set = |state: &str| drop(netns.ok(&format!("ip link set xb {state}")));
        set("up");
        follows(&daemon, &path, &|| set("down"), &|| set("up"));
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn a_session_ends_with_the_link_of_its_macvtap_and_with_that_of_the_interface_below() {
        let (dir, netns) = (TempDir::new("link"), Netns::new());
        let path = dir.path("n.sock");
        // Its device in /dev has the number of no other interface here.
        let index = 3_000_000 + std::process::id() % 1_000_000;
        netns.ok(&format!(
            "ip link add v0 type veth peer name v1 && ip link set v0 up && ip link set v1 up && \
             ip link add link v0 name mv0 index {index} type macvtap mode bridge"
        ));
        let net = format!(
            "name=n,socket={},link=macvtap:mv0,queues=1,netns={},link_follows=session",
            path.display(),
            netns.name()
        );
        let daemon = Daemon::start(&["run", "--net", &net]);
        // It was down from the start.
        daemon.wait_log(DOWN, PATIENCE);
        let set =
            |which: &str, state: &str| drop(netns.ok(&format!("ip link set {which} {state}")));
        set("mv0", "up");
        let own = || set("mv0", "down");
        follows(&daemon, &path, &own, &|| set("mv0", "up"));
        // The cable below it is cut.
        set("mv0", "up");
        follows(&daemon, &path, &|| set("v1", "down"), &|| set("v1", "up"));
        set("v1", "up");
        let open = connect(&path);
        netns.ok("ip link del mv0");
        assert_ended(open);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn a_port_of_a_wire_follows_the_front_end_of_the_other() {
        let dir = TempDir::new("link");
        let (path, peer) = (dir.path("n.sock"), dir.path("m.sock"));
        let nets = [
            format!(
                "name=n,socket={},link=wire:m,link_follows=session",
                path.display()
            ),
            format!("name=m,socket={}", peer.display()),
        ];
        let daemon = Daemon::start(&["run", "--net", &nets[0], "--net", &nets[1]]);
        daemon.wait_log(DOWN, PATIENCE);
        let other = std::cell::RefCell::new(Some(connect(&peer)));
        let down = || drop(other.take());
        let up = || drop(other.replace(Some(connect(&peer))));
        follows(&daemon, &path, &down, &up);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn a_front_end_that_listens_is_left_alone_while_the_link_is_down() {
        let (dir, netns) = (TempDir::new("link"), Netns::new());
        let path = dir.path("n.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let net = format!(
            "name=n,socket={},mode=client,link=tap:vt0,queues=1,link_follows=session",
            path.display()
        );
        let daemon = Daemon::start_in(&netns, &["run", "--net", &net]);
        for _ in 0..2 {
            let open = session(listener.accept().unwrap().0);
            let mark = daemon.log().len();
            netns.ok("ip link set vt0 down");
            assert_ended(open);
            daemon.wait_log_after(mark, DOWN, PATIENCE);
            listener.set_nonblocking(true).unwrap();
            let early = listener.accept().expect_err("no connection");
            assert_eq!(early.kind(), io::ErrorKind::WouldBlock);
            listener.set_nonblocking(false).unwrap();
            netns.ok("ip link set vt0 up");
            daemon.wait_log_after(mark, UP, PATIENCE);
        }
        drop(session(listener.accept().unwrap().0));
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    /// VHOST_USER_F_PROTOCOL_FEATURES and VIRTIO_F_VERSION_1.
    const FEATURES: u64 = 1 << 30 | 1 << 32;
    /// VIRTIO_NET_F_STATUS, VIRTIO_NET_F_SPEED_DUPLEX.
    const LINK_FEATURES: u64 = 1 << 16 | 1 << 63;

    /// A connection that is told of changes to config space, and the channel on which it is.
    fn told(path: &Path) -> (Frontend, UnixStream) {
        let mut front = Frontend::from_stream(UnixStream::connect(path).unwrap(), 2);
        front.set_owner().unwrap();
        let features = front.get_features().unwrap();
        assert_eq!(features & LINK_FEATURES, LINK_FEATURES);
        front.set_features(FEATURES | LINK_FEATURES).unwrap();
        let wanted = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ;
        assert!(front.get_protocol_features().unwrap().contains(wanted));
        front.set_protocol_features(wanted).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let (ours, theirs) = UnixStream::pair().unwrap();
        front.set_backend_request_fd(&theirs).unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        (front, ours)
    }

    /// The config space of virtio-net up to duplex.
    fn config(front: &mut Frontend) -> Vec<u8> {
        let flags = VhostUserConfigFlags::WRITABLE;
        front.get_config(0, 17, flags, &[0; 17]).unwrap().1
    }

    #[test]
    fn config_space_tells_of_the_link_and_every_change_is_announced() {
        let (dir, netns) = (TempDir::new("link"), Netns::new());
        let path = dir.path("n.sock");
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues=1,mac=52:54:00:00:00:07,speed=40000,duplex=full",
            path.display()
        );
        let daemon = Daemon::start_in(&netns, &["run", "--net", &net]);
        let (mut front, mut channel) = told(&path);
        let wanted = |up: u8| {
            let mac = [0x52, 0x54, 0, 0, 0, 7];
            [
                &mac[..],
                &[up, 0, 1, 0, 0, 0],
                &40_000u32.to_le_bytes(),
                &[1],
            ]
            .concat()
        };
        for _ in 0..2 {
            assert_eq!(config(&mut front), wanted(1));
            for (state, up) in [("down", 0), ("up", 1)] {
                let mark = daemon.log().len();
                netns.ok(&format!("ip link set vt0 {state}"));
                let mut message = [0; 12];
                channel.read_exact(&mut message).expect("in time");
                // CONFIG_CHANGE_MSG, version 1, no body.
                let words = [2u32, 1, 0].map(u32::to_ne_bytes).concat();
                assert_eq!(message[..], words);
                assert_eq!(config(&mut front), wanted(up));
                daemon.wait_log_after(mark, &format!("net n: link is {state}"), PATIENCE);
            }
        }
        assert!(!daemon.log().contains("does not read the config space"));
        // What nobody reads is given up, and the session goes on.
        drop(channel);
        netns.ok("ip link set vt0 down");
        daemon.wait_log(
            "the front-end can't be told that config space has changed",
            PATIENCE,
        );
        assert_eq!(config(&mut front), wanted(0));
        drop(front);
        // Down between two sessions.
        netns.ok("ip link set vt0 up");
        daemon.wait_log("net n: link is up", PATIENCE);
        let (mut front, _channel) = told(&path);
        assert_eq!(config(&mut front), wanted(1));
        drop(front);
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn a_channel_is_taken_only_as_what_it_must_be() {
        let (dir, netns) = (TempDir::new("link"), Netns::new());
        let (path, echo) = (dir.path("n.sock"), dir.path("e.sock"));
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues=1,speed=1000",
            path.display()
        );
        let other = format!("name=e,socket={},link=echo", echo.display());
        let daemon = Daemon::start_in(&netns, &["run", "--net", &net, "--net", &other]);
        let (mut front, _channel) = told(&path);
        let file = std::fs::File::open("/dev/null").unwrap();
        front.set_backend_request_fd(&file).expect_err("no socket");
        let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
        front
            .set_backend_request_fd(&datagrams)
            .expect_err("no stream");
        daemon.wait_log(
            "refused SET_BACKEND_REQ_FD: it is no Unix stream socket",
            PATIENCE,
        );
        assert_eq!(config(&mut front)[6], 1, "the session goes on");
        // Without a link that may go there is nothing to be told.
        let mut plain = Frontend::from_stream(UnixStream::connect(&echo).unwrap(), 2);
        plain.set_owner().unwrap();
        assert_eq!(plain.get_features().unwrap() & LINK_FEATURES, 0);
        plain.set_features(FEATURES).unwrap();
        let offered = plain.get_protocol_features().unwrap();
        assert!(!offered.contains(VhostUserProtocolFeatures::BACKEND_REQ));
        drop((front, plain));
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }

    #[test]
    fn a_guest_of_qemu_sees_the_link_go_and_come() {
        let (dir, netns) = (TempDir::new("link"), Netns::new());
        let socket = dir.path("n.sock");
        let net = format!(
            "name=n,socket={},link=tap:vt0,queues=1,link_follows=session,mac=52:54:00:00:00:07",
            socket.display()
        );
        let daemon = Daemon::start_in(&netns, &["run", "--net", &net]);
        netns.ok("ip addr add 10.7.0.1/24 dev vt0");
        let mut guest = Guest::boot(&GuestConfig {
            nics: vec![Nic {
                socket,
                queues: 1,
                packed: false,
                mac: "52:54:00:12:34:56",
                extra: "",
            }],
            ..GuestConfig::default()
        });
        guest.ok("ip addr add 10.7.0.2/24 dev eth0 && ip link set eth0 up");
        guest.ok("ping -c 3 -W 5 10.7.0.1");
        // QEMU shows its own address.
        let unseen = "this front-end does not read the config space, which has mac \
                      52:54:00:00:00:07: give it to the front-end";
        assert_eq!(daemon.log().matches(unseen).count(), 1);
        let carrier = |guest: &mut Guest, value: &str| {
            wait_until("the guest's carrier", PATIENCE, || {
                (guest.ok("cat /sys/class/net/eth0/carrier").trim() == value).then_some(())
            });
        };
        for _ in 0..2 {
            carrier(&mut guest, "1");
            netns.ok("ip link set vt0 down");
            carrier(&mut guest, "0");
            netns.ok("ip link set vt0 up");
            carrier(&mut guest, "1");
            guest.ok("ping -c 3 -W 5 10.7.0.1");
        }
        assert!(daemon.queue_counter("n", "rx", "good_packets") > 0);
        guest.kill();
        let (status, log) = daemon.stop();
        assert!(status.success(), "{log}");
    }
}
