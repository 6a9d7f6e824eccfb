//! Listening sockets of every source, with real files and real connections.

use std::io::{Read, Write};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

use super::*;

fn at(path: &Path) -> SocketConfig {
    SocketConfig {
        source: SocketSource::Path(path.to_owned()),
        owner: None,
        group: None,
        mode: None,
        client: false,
    }
}

fn inherited(fd: RawFd) -> SocketConfig {
    SocketConfig {
        source: SocketSource::Fd(fd),
        owner: None,
        group: None,
        mode: None,
        client: false,
    }
}

fn mode_of(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn refusal(config: &SocketConfig) -> String {
    Listener::open(config).unwrap_err().to_string()
}

/// Connects, accepts, and sends a byte through, to see that the two ends belong together.
fn serves(listener: &Listener, path: &Path) {
    let exit = EventFd::new(0).unwrap();
    let mut front_end = UnixStream::connect(path).unwrap();
    let mut accepted = listener.accept_or_exit(&exit).unwrap().unwrap();
    front_end.write_all(b"x").unwrap();
    let mut byte = [0];
    accepted.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn a_socket_listens_and_goes_with_its_listener() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let listener = Listener::open(&at(&path)).unwrap();
    serves(&listener, &path);
    serves(&listener, &path);
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn permissions_are_tight_unless_told_otherwise() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    // Any group that this process may give files to.
    let group = Some(fs::metadata(directory.as_path()).unwrap().gid());
    for (group, mode, expected) in [
        (None, None, 0o600),
        (group, None, 0o660),
        (group, Some(0o600), 0o600),
        (None, Some(0o666), 0o666),
        (None, Some(0o770), 0o770),
    ] {
        let _listener = Listener::open(&SocketConfig {
            group,
            mode,
            ..at(&path)
        })
        .unwrap();
        assert_eq!(mode_of(&path), expected, "{group:?} {mode:?}");
    }
}

#[test]
fn nobody_else_can_connect_between_bind_and_chmod() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let _socket = bind_private(&path).unwrap();
    assert_eq!(mode_of(&path), 0o600);
}

#[test]
fn owner_and_group_are_as_configured_or_an_error() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let config = SocketConfig {
        owner: Some(12345),
        group: Some(23456),
        ..at(&path)
    };
    // Only root may give files away; anybody else gets a message and no socket.
    match Listener::open(&config) {
        Ok(_listener) => {
            let found = fs::symlink_metadata(&path).unwrap();
            assert_eq!((found.uid(), found.gid()), (12345, 23456));
        }
        Err(error) => {
            assert!(error.to_string().contains("owner or group"), "{error}");
            assert!(!path.exists());
        }
    }
}

#[test]
fn a_stale_socket_is_replaced() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "std leaves the file behind");
    let listener = Listener::open(&at(&path)).unwrap();
    serves(&listener, &path);
}

#[test]
fn a_socket_in_use_is_refused_and_left_alone() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let first = Listener::open(&at(&path)).unwrap();
    let expected = format!(
        "socket = \"{}\": in use, something answers on it",
        path.display()
    );
    assert_eq!(refusal(&at(&path)), expected);
    // The probe connected; a real front-end comes after it.
    let exit = EventFd::new(0).unwrap();
    assert!(first.accept_or_exit(&exit).unwrap().is_some());
    serves(&first, &path);
}

#[test]
fn a_datagram_socket_of_somebody_else_is_in_use() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let _other = UnixDatagram::bind(&path).unwrap();
    assert!(refusal(&at(&path)).ends_with("in use, something answers on it"));
}

#[test]
fn other_files_are_never_removed() {
    let directory = TempDir::new().unwrap();
    let file = directory.as_path().join("file");
    fs::write(&file, "kept").unwrap();
    let link = directory.as_path().join("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    for path in [&file, &link, &directory.as_path().to_owned()] {
        let expected = format!(
            "socket = \"{}\": exists and is not a socket",
            path.display()
        );
        assert_eq!(refusal(&at(path)), expected);
    }
    assert_eq!(fs::read_to_string(&link).unwrap(), "kept");
}

#[test]
fn a_missing_directory_is_named() {
    let directory = TempDir::new().unwrap();
    let missing = directory.as_path().join("missing");
    let path = missing.join("s");
    let expected = format!(
        "socket = \"{}\": the directory {missing:?} does not exist",
        path.display()
    );
    assert_eq!(refusal(&at(&path)), expected);
}

#[test]
fn a_socket_that_another_has_put_there_stays() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let ours = Listener::open(&at(&path)).unwrap();
    // The other is made first, so that it can't get the inode of ours.
    let elsewhere = directory.as_path().join("t");
    let _theirs = UnixListener::bind(&elsewhere).unwrap();
    fs::rename(&elsewhere, &path).unwrap();
    drop(ours);
    assert!(path.exists());
    UnixStream::connect(&path).unwrap();
}

#[test]
fn exit_ends_a_wait_and_all_later_ones() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let listener = Listener::open(&at(&path)).unwrap();
    let exit = EventFd::new(0).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| listener.accept_or_exit(&exit));
        exit.write(1).unwrap();
        assert!(waiting.join().unwrap().unwrap().is_none());
    });
    let _front_end = UnixStream::connect(&path).unwrap();
    assert!(listener.accept_or_exit(&exit).unwrap().is_none());
}

#[test]
fn accepted_connections_block_and_close_on_exec() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let listener = Listener::open(&at(&path)).unwrap();
    let exit = EventFd::new(0).unwrap();
    let _front_end = UnixStream::connect(&path).unwrap();
    let accepted = listener.accept_or_exit(&exit).unwrap().unwrap();
    for fd in [listener.as_raw_fd(), accepted.as_raw_fd()] {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let flags = info
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .unwrap();
        let flags = u32::from_str_radix(flags.trim(), 8).unwrap();
        // O_CLOEXEC and O_NONBLOCK, as /proc writes them.
        assert_eq!(flags & 0o2_000_000, 0o2_000_000, "{flags:o}");
        assert_eq!(
            flags & 0o4_000 != 0,
            fd == listener.as_raw_fd(),
            "{flags:o}"
        );
    }
}

#[test]
fn an_inherited_listener_serves_and_its_file_stays() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let theirs = UnixListener::bind(&path).unwrap();
    socket::pass_on(&theirs).unwrap();
    let listener = Listener::open(&inherited(theirs.as_raw_fd())).unwrap();
    serves(&listener, &path);
    drop(listener);
    assert!(path.exists());
}

#[test]
fn descriptors_that_are_no_listeners_are_refused() {
    let directory = TempDir::new().unwrap();
    let file = File::create(directory.as_path().join("file")).unwrap();
    let (stream, _other) = UnixStream::pair().unwrap();
    let datagram = UnixDatagram::unbound().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let not_listening = socket::create().unwrap();
    let wrong = [
        file.as_raw_fd(),
        stream.as_raw_fd(),
        datagram.as_raw_fd(),
        tcp.as_raw_fd(),
    ];
    for fd in wrong.into_iter().chain([not_listening.as_raw_fd()]) {
        socket::pass_on(&fd).unwrap();
        let expected = format!(
            "socket = \"fd:{fd}\": the file descriptor {fd} is not a listening Unix stream socket"
        );
        assert_eq!(refusal(&inherited(fd)), expected);
    }
    let expected = "socket = \"fd:1000000\": the file descriptor 1000000 is not open";
    assert_eq!(refusal(&inherited(1_000_000)), expected);
}

#[test]
fn descriptors_of_our_own_and_of_another_device_are_refused() {
    let directory = TempDir::new().unwrap();
    let ours = Listener::open(&at(&directory.as_path().join("s"))).unwrap();
    let passed = UnixListener::bind(directory.as_path().join("t")).unwrap();
    socket::pass_on(&passed).unwrap();
    let _first = Listener::open(&inherited(passed.as_raw_fd())).unwrap();
    for fd in [ours.as_raw_fd(), passed.as_raw_fd()] {
        let expected = format!(
            "socket = \"fd:{fd}\": \
             the file descriptor {fd} was not passed to this process, or is in use already"
        );
        assert_eq!(refusal(&inherited(fd)), expected);
    }
}

#[test]
fn without_systemd_there_is_no_systemd_socket() {
    let source = SocketSource::Systemd("net0".to_owned());
    let expected = "socket = \"systemd:net0\": \
                    systemd passed no sockets to this process (LISTEN_PID and LISTEN_FDS)";
    assert_eq!(
        refusal(&SocketConfig {
            source,
            owner: None,
            group: None,
            mode: None,
            client: false,
        }),
        expected
    );
}

#[test]
fn a_full_backlog_counts_as_in_use_without_waiting() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let _listener = Listener::open(&at(&path)).unwrap();
    let mut pending = Vec::new();
    loop {
        let probe = socket::create().unwrap();
        if socket::connect(probe.as_fd(), &path).is_err() {
            break;
        }
        pending.push(probe);
        assert!(pending.len() < 100_000, "the backlog has an end");
    }
    let start = Instant::now();
    assert!(refusal(&at(&path)).ends_with("in use, something answers on it"));
    assert!(start.elapsed() < Duration::from_secs(30));
}
