//! What is understood and what is refused, with the exact message: the same for flags and file.

use std::fs;
use std::io;
use std::path::Path;

use vmm_sys_util::tempdir::TempDir;

use super::*;

mod blk;
mod files;
mod limits;
mod links;
mod rates;
mod stations;
mod switch;
mod switches;
mod taps;
mod uring;
mod wires;
mod xdp;

fn machine() -> Machine {
    let user_id: AccountLookup = |name| match name {
        "qemu" => Ok(Some(64055)),
        "broken" => Err(io::Error::from(io::ErrorKind::TimedOut)),
        _ => Ok(None),
    };
    let group_id: AccountLookup = |name| Ok((name == "kvm").then_some(107));
    Machine {
        online_cores: vec![0, 1, 2, 5],
        user_id,
        group_id,
    }
}

fn flags(nets: &[&str], blks: &[&str]) -> Given {
    let owned = |lists: &[&str]| lists.iter().map(|list| (*list).to_owned()).collect();
    Given {
        nets: owned(nets),
        blks: owned(blks),
        ..Given::default()
    }
}

fn net_flags(list: &str) -> Result<Config, ConfigError> {
    load(&flags(&[list], &[]), &machine())
}

fn blk_flags(list: &str) -> Result<Config, ConfigError> {
    load(&flags(&[], &[list]), &machine())
}

/// Loads a file with this text; its path in messages is replaced by FILE.
fn load_text(text: &str, given: Given) -> Result<Config, String> {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("vringd.toml");
    fs::write(&path, text).unwrap();
    let given = Given {
        file: Some(path.clone()),
        ..given
    };
    load(&given, &machine())
        .map_err(|error| error.to_string().replace(path.to_str().unwrap(), "FILE"))
}

fn socket_at(path: &str) -> SocketConfig {
    SocketConfig {
        source: SocketSource::Path(PathBuf::from(path)),
        owner: None,
        group: None,
        mode: None,
        client: false,
    }
}

#[test]
fn flags_and_file_give_the_same_settings() {
    let directory = TempDir::new().unwrap();
    let disk = directory.as_path().join("disk,1.img");
    fs::write(&disk, [0; 512]).unwrap();
    let disk = disk.to_str().unwrap();
    let text = format!(
        r#"
        [engine]
        cores = [1, 5]
        idle = "spin"
        stop_timeout = "500ms"
        placement = "auto"

        [[net]]
        name = "uplink"
        socket = "/run/n0"
        link = "tap:tap0"
        queues = 2
        mac = "52:54:00:12:34:5f"
        mtu = 9000
        socket_owner = "qemu"
        socket_group = 36
        socket_mode = "0660"

        [[blk]]
        name = "root"
        socket = "systemd:root"
        path = "{disk}"
        queues = 4
        read_only = true
        direct = false
        discard = false
        cache = "writethrough"
        lock = "off"
        on_enospc = "hold"
        io_timeout = "off"
        serial = "A 1"
        block_size = 4096

        [[blk]]
        socket = "fd:7"
        backend = "ram:1M"
        fault = ["eio=7", "delay_us=20", "drop_flush"]
        "#
    );
    let from_file = load_text(&text, Given::default()).unwrap();
    let given = Given {
        cores: Some("1,5".to_owned()),
        idle: Some("spin".to_owned()),
        stop_timeout: Some("500ms".to_owned()),
        placement: Some("auto".to_owned()),
        ..flags(
            &[
                "name=uplink,socket=/run/n0,link=tap:tap0,queues=2,mac=52:54:00:12:34:5f,mtu=9000,\
               socket_owner=qemu,socket_group=36,socket_mode=0660",
            ],
            &[
                &format!(
                    "name=root,socket=systemd:root,path={},queues=4,read_only=true,direct=off,\
                     discard=off,cache=writethrough,lock=off,on_enospc=hold,\
                     io_timeout=off,serial=A 1,block_size=4K",
                    disk.replace(',', ",,")
                ),
                "socket=fd:7,backend=ram:1M,fault=eio=7+delay_us=20+drop_flush",
            ],
        )
    };
    let from_flags = load(&given, &machine()).unwrap();
    assert_eq!(from_file, from_flags);
    let expected = Config {
        uplinks: Vec::new(),
        switches: Vec::new(),
        groups: Vec::new(),
        engine: EngineConfig {
            cores: vec![1, 5],
            idle: IdlePolicy::Spin,
            stop_timeout: Duration::from_millis(500),
            placement: Placement::Auto,
        },
        nets: vec![NetConfig {
            rings: RingsConfig::default(),
            name: "uplink".to_owned(),
            socket: SocketConfig {
                owner: Some(64055),
                group: Some(36),
                mode: Some(0o660),
                ..socket_at("/run/n0")
            },
            link: taps::named("tap0"),
            queues: 2,
            mac: Some([0x52, 0x54, 0, 0x12, 0x34, 0x5f]),
            told: LinkTold::default(),
            mtu: Some(9000),
            hold: Duration::from_micros(100),
            rates: PortRates::default(),
            rules: PortRules::default(),
            cores: vec![1, 5],
        }],
        blks: vec![
            BlkConfig {
                rings: RingsConfig::default(),
                name: "root".to_owned(),
                socket: SocketConfig {
                    source: SocketSource::Systemd("root".to_owned()),
                    ..socket_at("")
                },
                backend: BlkBackend::Path(PathBuf::from(disk)),
                queues: 4,
                encrypt: None,
                read_only: true,
                direct: Some(false),
                format: ImageFormat::default(),
                io: IoOptions::default(),
                fault: None,
                sick: SickConfig {
                    hold: true,
                    io_timeout: None,
                },
                lock: false,
                write_through: true,
                discard: false,
                serial: "A 1".to_owned(),
                block_size: 4096,
                limits: BlkLimits::default(),
                cores: vec![1, 5],
            },
            BlkConfig {
                rings: RingsConfig::default(),
                name: "disk0".to_owned(),
                socket: SocketConfig {
                    source: SocketSource::Fd(7),
                    ..socket_at("")
                },
                backend: BlkBackend::Ram(1 << 20),
                queues: 16,
                encrypt: None,
                read_only: false,
                direct: None,
                format: ImageFormat::default(),
                io: IoOptions::default(),
                fault: Some(FaultPlan {
                    eio: 7,
                    delay: Duration::from_micros(20),
                    drop_flush: true,
                    ..FaultPlan::default()
                }),
                sick: SickConfig {
                    hold: false,
                    io_timeout: Some(Duration::from_secs(30)),
                },
                lock: true,
                write_through: false,
                discard: true,
                serial: "disk0".to_owned(),
                block_size: 512,
                limits: BlkLimits::default(),
                cores: vec![1, 5],
            },
        ],
    };
    assert_eq!(from_file, expected);
}

#[test]
fn defaults_are_as_documented() {
    let config = load(
        &flags(&["socket=/n,link=echo", "socket=/m,link=sink"], &[]),
        &machine(),
    );
    let config = config.unwrap();
    let engine = EngineConfig {
        cores: vec![5],
        idle: IdlePolicy::Adaptive,
        stop_timeout: Duration::from_secs(10),
        placement: Placement::Spread,
    };
    assert_eq!(config.engine, engine);
    let net = NetConfig {
        rings: RingsConfig::default(),
        name: "net0".to_owned(),
        socket: socket_at("/n"),
        link: LinkConfig::Echo,
        queues: 16,
        mac: None,
        told: LinkTold::default(),
        mtu: None,
        hold: Duration::from_micros(100),
        rates: PortRates::default(),
        rules: PortRules::default(),
        cores: vec![5],
    };
    assert_eq!(config.nets[0], net);
    assert_eq!(
        (&*config.nets[1].name, &config.nets[1].link),
        ("net1", &LinkConfig::Sink)
    );
}

#[test]
fn default_names_avoid_given_ones_and_serials_are_cut() {
    let long = "a-name-that-is-longer-than-a-serial";
    let config = load(
        &flags(
            &["socket=/1,link=echo", "socket=/2,link=echo,name=net0"],
            &[
                "socket=/3,backend=null:1G",
                &format!("socket=/4,backend=null:1G,name={long}"),
            ],
        ),
        &machine(),
    );
    let config = config.unwrap();
    assert_eq!(config.nets[0].name, "net1");
    assert_eq!(config.nets[1].name, "net0");
    assert_eq!(config.blks[0].name, "disk0");
    assert_eq!(config.blks[1].serial, long[..20]);
}

#[test]
fn flags_override_the_file_and_add_devices() {
    let text = "[engine]\ncores = [99]\nidle = \"spin\"\n[[net]]\nsocket = \"/n\"\nlink = \"echo\"";
    let given = Given {
        cores: Some("0".to_owned()),
        ..flags(&["socket=/m,link=sink"], &["socket=/b,backend=null:512"])
    };
    let config = load_text(text, given).unwrap();
    assert_eq!(config.engine.cores, [0]);
    assert_eq!(config.engine.idle, IdlePolicy::Spin);
    let names: Vec<_> = config.nets.iter().map(|net| net.name.as_str()).collect();
    assert_eq!(names, ["net0", "net1"]);
    assert_eq!(config.blks.len(), 1);
}

/// Settings that are not devices' own: each with its message.
#[test]
fn refused_engine_flags_name_flag_and_value() {
    let engine = |cores: Option<&str>, idle: Option<&str>, stop: Option<&str>| {
        let given = Given {
            cores: cores.map(str::to_owned),
            idle: idle.map(str::to_owned),
            stop_timeout: stop.map(str::to_owned),
            ..flags(&["socket=/n,link=echo"], &[])
        };
        load(&given, &machine()).unwrap_err().to_string()
    };
    for (core, message) in [
        (
            "9",
            r#"--core "9": core 9 does not exist or is offline (online: 0-2,5)"#,
        ),
        (
            "1,3",
            r#"--core "1,3": core 3 does not exist or is offline (online: 0-2,5)"#,
        ),
        (
            "1,1",
            r#"--core "1,1": already used by another worker, core 1"#,
        ),
        ("", r#"--core "": expected a whole number"#),
        ("1,", r#"--core "1,": expected a whole number"#),
        ("-1", r#"--core "-1": expected a whole number"#),
        (
            "18446744073709551616",
            r#"--core "18446744073709551616": too large"#,
        ),
    ] {
        assert_eq!(engine(Some(core), None, None), message);
    }
    assert_eq!(
        engine(None, Some("lazy"), None),
        r#"--idle "lazy": unknown idle policy "lazy" (known: spin, adaptive, interrupt)"#
    );
    let given = Given {
        placement: Some("near".to_owned()),
        ..flags(&["socket=/n,link=echo"], &[])
    };
    assert_eq!(
        load(&given, &machine()).unwrap_err().to_string(),
        r#"--placement "near": unknown placement "near" (known: spread, auto)"#
    );
    for (stop, message) in [
        (
            "soon",
            r#"--stop-timeout "soon": expected a duration such as 10s, 500ms or 10 (seconds)"#,
        ),
        (
            "90000",
            r#"--stop-timeout "90000": longer than 86400 seconds"#,
        ),
    ] {
        assert_eq!(engine(None, None, Some(stop)), message);
    }
}

/// Among them an MTU that no device may have (VIRTIO 1.3 §5.1.4.1).
#[test]
fn refused_net_flags_name_key_and_value() {
    for (list, message) in [
        (
            "socket=/n,link=tpa:tap0",
            "--net net0: link = \"tpa:tap0\": \
             unknown link kind \"tpa\" (known: tap, macvtap, xdp, wire, switch, echo, sink)",
        ),
        (
            "socket=/n,link=xdp",
            "--net net0: link = \"xdp\": \
             link kind \"xdp\" needs an argument, as in \"xdp:eth1\"",
        ),
        (
            "socket=/n,link=wire",
            "--net net0: link = \"wire\": \
             link kind \"wire\" needs an argument, as in \"wire:net1\"",
        ),
        (
            "socket=/n,link=switch",
            "--net net0: link = \"switch\": \
             link kind \"switch\" needs an argument, as in \"switch:sw0\"",
        ),
        (
            "socket=/n,link=tap",
            r#"--net net0: link = "tap": link kind "tap" needs an argument, as in "tap:tap0""#,
        ),
        (
            "socket=/n,link=tap:",
            r#"--net net0: link = "tap:": link kind "tap" needs an argument, as in "tap:tap0""#,
        ),
        (
            "socket=/n,link=echo:1",
            r#"--net net0: link = "echo:1": link kind "echo" takes no argument"#,
        ),
        (
            "socket=/n,link=tap:sixteen-letters-",
            r#"--net net0: link = "tap:sixteen-letters-": 16 bytes long, at most 15 are possible"#,
        ),
        (
            "socket=/n,link=tap:a/b",
            r#"--net net0: link = "tap:a/b": has '/', only A-Z a-z 0-9 _ . - @ are possible"#,
        ),
        (
            "socket=/n,link=tap:..",
            r#"--net net0: link = "tap:..": expected the name of an interface"#,
        ),
        ("link=echo", "--net net0: socket is missing"),
        ("socket=/n", "--net net0: link is missing"),
        ("", "--net \"\": \"\" is not of the form key=value"),
        (
            "socket=/n,echo",
            "--net \"socket=/n,echo\": \"echo\" is not of the form key=value",
        ),
        (
            "link=echo,link=sink",
            "--net net0: link = \"sink\": given twice",
        ),
        (
            "socket=/n,link=echo,queues=0",
            "--net net0: queues = \"0\": not in 1..=128",
        ),
        (
            "socket=/n,link=echo,queues=129",
            "--net net0: queues = \"129\": not in 1..=128",
        ),
        (
            "socket=/n,link=echo,queues=65537",
            "--net net0: queues = \"65537\": not in 1..=128",
        ),
        (
            "socket=/n,link=echo,queues=two",
            "--net net0: queues = \"two\": expected a whole number",
        ),
        (
            "socket=/n,link=echo,mtu=67",
            "--net net0: mtu = \"67\": not in 68..=65535",
        ),
        (
            "socket=/n,link=echo,mtu=65536",
            "--net net0: mtu = \"65536\": not in 68..=65535",
        ),
        (
            "socket=/n,link=echo,mac=52:54:00",
            "--net net0: mac = \"52:54:00\": expected an address such as 52:54:00:12:34:56",
        ),
        (
            "socket=/n,link=echo,mac=5:2:5:4:0:0",
            "--net net0: mac = \"5:2:5:4:0:0\": expected an address such as 52:54:00:12:34:56",
        ),
        (
            "socket=/n,link=echo,mac=01:00:5e:00:00:01",
            "--net net0: mac = \"01:00:5e:00:00:01\": not the address of a single station",
        ),
        (
            "socket=/n,link=echo,ring_reset=maybe",
            "--net net0: ring_reset = \"maybe\": expected true or false",
        ),
        (
            "socket=/n,link=echo,call_max_used=0",
            "--net net0: call_max_used = \"0\": not in 1..=32768",
        ),
        (
            "socket=/n,link=echo,call_max_us=10001",
            "--net net0: call_max_us = \"10001\": not in 1..=10000",
        ),
        (
            "name=,socket=/n,link=echo",
            "--net \"\": name = \"\": must not be empty",
        ),
        (
            "name=a b,socket=/n,link=echo",
            "--net a b: name = \"a b\": has ' ', only A-Z a-z 0-9 _ . - are possible",
        ),
    ] {
        assert_eq!(net_flags(list).unwrap_err().to_string(), message, "{list}");
    }
}

#[test]
fn refused_sockets_name_key_and_value() {
    let long = format!("/{}", "s".repeat(107));
    for (keys, message) in [
        (
            "socket=/s,mode=both",
            "mode = \"both\": unknown mode \"both\" (known: server, client)".to_owned(),
        ),
        (
            "socket=fd:5,mode=client",
            "mode = \"client\": only has a meaning with a socket path".to_owned(),
        ),
        (
            "socket=/s,mode=client,socket_mode=0600",
            "socket_mode = \"0600\": only has a meaning with mode = \"server\"".to_owned(),
        ),
        ("socket=", "socket = \"\": must not be empty".to_owned()),
        (
            &format!("socket={long}"),
            format!("socket = \"{long}\": 108 bytes long, at most 107 are possible"),
        ),
        (
            "socket=fd:2",
            "socket = \"fd:2\": not in 3..=2147483647".to_owned(),
        ),
        (
            "socket=fd:2147483648",
            "socket = \"fd:2147483648\": not in 3..=2147483647".to_owned(),
        ),
        (
            "socket=fd:x",
            "socket = \"fd:x\": expected fd: and the number of a file descriptor".to_owned(),
        ),
        (
            "socket=systemd:",
            "socket = \"systemd:\": must not be empty".to_owned(),
        ),
        (
            "socket=systemd:a:b",
            "socket = \"systemd:a:b\": has ':', only printable ASCII characters except the colon \
             are possible"
                .to_owned(),
        ),
        (
            "socket=fd:3,socket_mode=0660",
            "socket_mode = \"0660\": only has a meaning with a socket path".to_owned(),
        ),
        (
            "socket=/n,socket_mode=0888",
            "socket_mode = \"0888\": expected an octal mode such as \"0660\", at most 0777"
                .to_owned(),
        ),
        (
            "socket=/n,socket_mode=4755",
            "socket_mode = \"4755\": expected an octal mode such as \"0660\", at most 0777"
                .to_owned(),
        ),
        (
            "socket=/n,socket_mode=+660",
            "socket_mode = \"+660\": expected an octal mode such as \"0660\", at most 0777"
                .to_owned(),
        ),
        (
            "socket=/n,socket_owner=qmeu",
            "socket_owner = \"qmeu\": unknown user".to_owned(),
        ),
        (
            "socket=/n,socket_group=vkm",
            "socket_group = \"vkm\": unknown group".to_owned(),
        ),
        (
            "socket=/n,socket_owner=broken",
            "socket_owner = \"broken\": user cannot be looked up: timed out".to_owned(),
        ),
        (
            "socket=/n,socket_owner=4294967295",
            "socket_owner = \"4294967295\": not in 0..=4294967294".to_owned(),
        ),
    ] {
        let error = net_flags(&format!("link=echo,{keys}"))
            .unwrap_err()
            .to_string();
        assert_eq!(error, format!("--net net0: {message}"), "{keys}");
    }
    let longest = format!("/{}", "s".repeat(106));
    net_flags(&format!("link=echo,socket={longest}")).unwrap();
}

#[test]
fn what_two_devices_want_only_one_gets() {
    for (nets, blks, message) in [
        (
            &["socket=/n,link=echo,name=a"][..],
            &["socket=/b,backend=null:1G,name=a"][..],
            "--blk a: name = \"a\": already used by net a",
        ),
        (
            &["socket=/n,link=echo", "socket=/./n,link=echo"],
            &[],
            "--net net1: socket = \"/./n\": already used by net net0",
        ),
        (
            &["socket=fd:3,link=echo"],
            &["socket=fd:03,backend=null:1G"],
            "--blk disk0: socket = \"fd:03\": already used by net net0",
        ),
        (
            &["socket=/n,link=tap:t", "socket=/m,link=tap:t"],
            &[],
            "--net net1: link = \"tap:t\": already used by net net0",
        ),
        (
            &[],
            &[],
            "no device: give at least one --net or --blk, or [[net]] or [[blk]] in the file",
        ),
    ] {
        let error = load(&flags(nets, blks), &machine()).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
}

proptest::proptest! {
    #[test]
    fn no_list_and_no_file_panics(text in ".{0,200}") {
        let _ = net_flags(&text);
        let _ = blk_flags(&text);
        let _ = file::parse(Path::new("FILE"), &text);
    }

    #[test]
    fn no_value_of_a_known_key_panics(key in 0usize..16, value in "[^,]{0,40}") {
        let keys = ["name", "socket", "link", "queues", "mac", "mtu", "socket_owner",
                    "socket_mode", "backend", "serial", "block_size", "read_only", "discard",
                    "cache", "lock", "fault"];
        let list = format!("{}={value}", keys[key]);
        let _ = net_flags(&format!("{list},socket=/n,link=echo"));
        let _ = net_flags(&list);
        let _ = blk_flags(&list);
    }
}

#[test]
fn calls_are_put_off_where_a_limit_is_given() {
    let rings = |list: &str| net_flags(list).unwrap().nets[0].rings;
    assert_eq!(rings("socket=/n,link=echo"), RingsConfig::default());
    let calls = |list: &str| {
        rings(list)
            .calls
            .map(|c| (c.max_used, c.max_wait.as_micros()))
    };
    assert_eq!(calls("socket=/n,link=echo,call_max_used=8"), Some((8, 50)));
    assert_eq!(
        calls("socket=/n,link=echo,call_max_us=20"),
        Some((32768, 20))
    );
    assert_eq!(
        calls("socket=/n,link=echo,call_max_us=1,call_max_used=2"),
        Some((2, 1))
    );
    assert!(rings("socket=/n,link=echo,ring_reset=true").ring_reset);
    assert!(rings("socket=/n,link=echo,memory_files=true").memory_files);
    let disk = blk_flags("socket=/b,backend=null:1M,memory_files=true").unwrap();
    assert!(disk.blks[0].rings.memory_files && !disk.blks[0].rings.ring_reset);
}
