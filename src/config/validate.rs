//! From tables of keys to a [`Config`]: types, bounds, defaults, and what must not occur twice.
//!
//! The `Raw*` structures are the list of keys, the same for the command line and the file.
//! Everything that fails here fails before a socket, a thread or a disk exists.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;

use super::encrypt::RawEncrypt;
use super::error::{ConfigError, Problem};
use super::file;
use super::keyvalue::{Entry, Kind, Table};
use super::size::parse_duration;
use super::values::{
    SERIAL_MAX, account_id, bounded, check_disk, check_name, check_serial, parse_backend,
    parse_block_size, parse_cache, parse_link, parse_mac, parse_mode, parse_socket,
};
use super::{
    BlkBackend, BlkConfig, CallsConfig, Config, EngineConfig, Given, IdlePolicy, KeySource,
    LinkConfig, Machine, NetConfig, Placement, RingsConfig, SocketConfig, SocketSource,
};
use super::{encrypt, switch, wires};

/// 128 pairs are the 256 vrings that a kick message can name.
const QUEUES_MAX: u64 = 128;
const QUEUES_DEFAULT: u64 = 16;
/// VIRTIO 1.3 §5.1.4.1: the MTU is between 68 and 65535.
const MTU: (u64, u64) = (68, 65535);
/// A call is not put off for more used buffers than the largest ring has.
const CALL_USED_MAX: u64 = 32768;
const CALL_US_MAX: u64 = 10_000;
/// Where only a number of buffers is given: what an interrupt may wait without being felt.
const CALL_US_DEFAULT: u64 = 50;
/// What a receiver that is only late takes to post buffers.
const HOLD_US_DEFAULT: u64 = 100;
const HOLD_US_MAX: u64 = 50_000;
const STOP_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

const PLACEMENTS: &str = "spread, auto";
const IDLE_POLICIES: &str = "spin, adaptive, interrupt";

/// Text that may be written as a number too.
#[derive(Debug, Deserialize)]
struct TextOrNumber(String);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEngine {
    cores: Option<Vec<u64>>,
    idle: Option<String>,
    placement: Option<String>,
    stop_timeout: Option<TextOrNumber>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNet {
    name: Option<String>,
    socket: Option<String>,
    mode: Option<String>,
    link: Option<String>,
    queues: Option<u64>,
    mac: Option<String>,
    mtu: Option<u64>,
    hold_us: Option<u64>,
    vlan: Option<TextOrNumber>,
    vlan_native: Option<u64>,
    isolated: Option<bool>,
    flood_limit: Option<u64>,
    allow_mac: Option<Vec<String>>,
    allow_ip: Option<Vec<String>>,
    stations: Option<Vec<String>>,
    cores: Option<Vec<u64>>,
    ring_reset: Option<bool>,
    call_max_used: Option<u64>,
    call_max_us: Option<u64>,
    socket_owner: Option<TextOrNumber>,
    socket_group: Option<TextOrNumber>,
    socket_mode: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBlk {
    name: Option<String>,
    socket: Option<String>,
    mode: Option<String>,
    path: Option<String>,
    backend: Option<String>,
    queues: Option<u64>,
    read_only: Option<bool>,
    direct: Option<bool>,
    cache: Option<String>,
    discard: Option<bool>,
    encrypt: Option<String>,
    encrypt_sector: Option<TextOrNumber>,
    key_file: Option<String>,
    key_fd: Option<u64>,
    serial: Option<String>,
    block_size: Option<TextOrNumber>,
    cores: Option<Vec<u64>>,
    ring_reset: Option<bool>,
    call_max_used: Option<u64>,
    call_max_us: Option<u64>,
    socket_owner: Option<TextOrNumber>,
    socket_group: Option<TextOrNumber>,
    socket_mode: Option<String>,
}

/// The keys about the socket, which are those of both kinds of device.
struct RawSocket {
    socket: Option<String>,
    owner: Option<TextOrNumber>,
    group: Option<TextOrNumber>,
    permissions: Option<String>,
    mode: Option<String>,
}

/// Reads the file, if one is given, adds the flags, and checks the whole.
///
/// # Errors
/// The first thing that is wrong, in the order engine, then the devices as given.
pub fn load(given: &Given, machine: &Machine) -> Result<Config, ConfigError> {
    let tables = match &given.file {
        Some(path) => file::read(path)?,
        None => Vec::new(),
    };
    load_tables(tables, given, machine)
}

/// As [`load`], with the text of the file.
///
/// # Errors
/// As [`load`].
#[cfg(any(test, fuzzing, feature = "testing"))]
pub fn load_text(text: &str, given: &Given, machine: &Machine) -> Result<Config, ConfigError> {
    load_tables(file::parse("FILE".as_ref(), text)?, given, machine)
}

fn load_tables(
    mut tables: Vec<Table>,
    given: &Given,
    machine: &Machine,
) -> Result<Config, ConfigError> {
    for list in &given.nets {
        tables.push(Table::from_list(Kind::Net, list)?);
    }
    for list in &given.blks {
        tables.push(Table::from_list(Kind::Blk, list)?);
    }
    assign_names(&mut tables);
    let engine = engine(engine_table(&tables, given), machine)?;
    let mut config = Config {
        engine,
        nets: Vec::new(),
        blks: Vec::new(),
    };
    let mut taken = Taken::default();
    for table in &tables {
        match table.kind {
            Kind::Engine => {}
            Kind::Net => {
                let net = net(table, machine, &config.engine)?;
                taken.claim(table, "name", &net.name)?;
                taken.claim_socket(table, &net.socket.source)?;
                if let LinkConfig::Tap(tap) = &net.link {
                    taken.claim(table, "link", tap)?;
                }
                config.nets.push(net);
            }
            Kind::Blk => {
                let blk = blk(table, machine, &config.engine)?;
                taken.claim(table, "name", &blk.name)?;
                taken.claim_socket(table, &blk.socket.source)?;
                if let Some(KeySource::Fd(fd)) = blk.encrypt.as_ref().map(|how| &how.key) {
                    taken.claim(table, "key_fd", &fd.to_string())?;
                }
                config.blks.push(blk);
            }
        }
    }
    if config.nets.is_empty() && config.blks.is_empty() {
        return Err(ConfigError::NoDevice);
    }
    let nets = tables.iter().filter(|table| table.kind == Kind::Net);
    let nets: Vec<_> = nets.collect();
    wires::join(&nets, &mut config.nets)?;
    switch::check(&nets, &config.nets)?;
    Ok(config)
}

/// The file's engine keys, each replaced by its flag where that is given.
fn engine_table(tables: &[Table], given: &Given) -> Table {
    let in_file = tables.iter().find(|table| table.kind == Kind::Engine);
    let mut engine = in_file
        .cloned()
        .unwrap_or_else(|| Table::empty(Kind::Engine));
    let flags = [
        ("cores", &given.cores),
        ("idle", &given.idle),
        ("placement", &given.placement),
        ("stop_timeout", &given.stop_timeout),
    ];
    for (key, value) in flags {
        if let Some(value) = value {
            engine.entries.retain(|entry| entry.key != key);
            engine.entries.push(Entry::from_flag(key, value));
        }
    }
    engine
}

/// Gives each table its name; those without one get the first free of net0, net1 … or disk0 ….
fn assign_names(tables: &mut [Table]) {
    let mut used: BTreeSet<String> = tables
        .iter()
        .filter_map(|table| table.given_name().map(str::to_owned))
        .collect();
    for table in tables.iter_mut() {
        let prefix = match table.kind {
            Kind::Engine => continue,
            Kind::Net => "net",
            Kind::Blk => "disk",
        };
        let mut free = (0..).map(|number| format!("{prefix}{number}"));
        table.name = match table.given_name() {
            Some(name) => name.to_owned(),
            None => free
                .find(|name| !used.contains(name))
                .expect("numbers outnumber devices"),
        };
        used.insert(table.name.clone());
    }
}

fn engine(table: Table, machine: &Machine) -> Result<EngineConfig, ConfigError> {
    let raw: RawEngine = table.deserialize()?;
    let cores = match raw.cores {
        None => default_cores(&machine.online_cores),
        Some(cores) => cores_online(&cores, &machine.online_cores)
            .map_err(|problem| table.key_error("cores", problem))?,
    };
    let idle = match raw.idle.as_deref() {
        None | Some("adaptive") => IdlePolicy::Adaptive,
        Some("spin") => IdlePolicy::Spin,
        Some("interrupt") => IdlePolicy::Interrupt,
        Some(other) => {
            let given = other.to_owned();
            let known = IDLE_POLICIES;
            let problem = Problem::UnknownKind {
                what: "idle policy",
                given,
                known,
            };
            return Err(table.key_error("idle", problem));
        }
    };
    let placement = match raw.placement.as_deref() {
        None | Some("spread") => Placement::Spread,
        Some("auto") => Placement::Auto,
        Some(other) => {
            let given = other.to_owned();
            let known = PLACEMENTS;
            let problem = Problem::UnknownKind {
                what: "placement",
                given,
                known,
            };
            return Err(table.key_error("placement", problem));
        }
    };
    let stop_timeout = match raw.stop_timeout {
        None => STOP_TIMEOUT_DEFAULT,
        Some(TextOrNumber(text)) => {
            parse_duration(&text).map_err(|problem| table.key_error("stop_timeout", problem))?
        }
    };
    Ok(EngineConfig {
        cores,
        idle,
        stop_timeout,
        placement,
    })
}

/// The last core: core 0 is the one that usually serves the host's interrupts.
fn default_cores(online: &[usize]) -> Vec<usize> {
    vec![online.last().copied().unwrap_or(0)]
}

fn cores_online(cores: &[u64], online: &[usize]) -> Result<Vec<usize>, Problem> {
    if cores.is_empty() {
        return Err(Problem::Empty);
    }
    let mut found = Vec::with_capacity(cores.len());
    for &core in cores {
        let known = usize::try_from(core)
            .ok()
            .filter(|core| online.contains(core));
        match known {
            Some(known) if found.contains(&known) => {
                return Err(Problem::Duplicate(format!("another worker, core {core}")));
            }
            Some(known) => found.push(known),
            None => {
                return Err(Problem::NoSuchCore {
                    core,
                    online: ranges(online),
                });
            }
        }
    }
    Ok(found)
}

/// `[0, 1, 2, 5]` as `0-2,5`.
fn ranges(cores: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &core in cores {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == core => *last = core,
            _ => parts.push((core, core)),
        }
    }
    let text = parts.iter().map(|(first, last)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    });
    text.collect::<Vec<_>>().join(",")
}

fn net(table: &Table, machine: &Machine, engine: &EngineConfig) -> Result<NetConfig, ConfigError> {
    let raw: RawNet = table.deserialize()?;
    let name = raw.name.unwrap_or_else(|| table.name.clone());
    check_name(&name).map_err(|problem| table.key_error("name", problem))?;
    let socket = RawSocket {
        socket: raw.socket,
        owner: raw.socket_owner,
        group: raw.socket_group,
        permissions: raw.socket_mode,
        mode: raw.mode,
    };
    let in_key = |key: &'static str| move |problem| table.key_error(key, problem);
    // Without a key it must be the other end of a wire, which is seen when all are known.
    let link = match raw.link.as_deref() {
        Some(link) => parse_link(link).map_err(in_key("link"))?,
        None => LinkConfig::Wire(String::new()),
    };
    let mtu = raw.mtu.map(|mtu| bounded(mtu, MTU.0, MTU.1));
    let mtu = mtu.transpose().map_err(in_key("mtu"))?;
    let port = switch::RawSwitchPort {
        vlan: raw.vlan.map(|TextOrNumber(text)| text),
        vlan_native: raw.vlan_native,
        isolated: raw.isolated,
        flood_limit: raw.flood_limit,
        allow_mac: raw.allow_mac,
        allow_ip: raw.allow_ip,
        stations: raw.stations,
    };
    let is_port = matches!(link, LinkConfig::Switch(_));
    Ok(NetConfig {
        name,
        socket: socket_config(table, socket, machine)?,
        link,
        rules: switch::rules(table, port, mtu, is_port)?,
        hold: Duration::from_micros(u64::from(
            bounded(raw.hold_us.unwrap_or(HOLD_US_DEFAULT), 0, HOLD_US_MAX)
                .map_err(in_key("hold_us"))?,
        )),
        cores: device_cores(table, raw.cores.as_deref(), engine)?,
        queues: bounded(raw.queues.unwrap_or(QUEUES_DEFAULT), 1, QUEUES_MAX)
            .map_err(in_key("queues"))?,
        mac: raw
            .mac
            .as_deref()
            .map(parse_mac)
            .transpose()
            .map_err(in_key("mac"))?,
        mtu,
        rings: ring_options(table, raw.ring_reset, [raw.call_max_used, raw.call_max_us])?,
    })
}

/// The cores that serve a device: all of the engine's unless it says which.
fn device_cores(
    table: &Table,
    cores: Option<&[u64]>,
    engine: &EngineConfig,
) -> Result<Vec<usize>, ConfigError> {
    let Some(cores) = cores else {
        return Ok(engine.cores.clone());
    };
    cores_online(cores, &engine.cores).map_err(|problem| {
        let problem = match problem {
            Problem::NoSuchCore { core, online } => Problem::NoWorker {
                core,
                cores: online,
            },
            other => other,
        };
        table.key_error("cores", problem)
    })
}

/// The keys about virtqueues; `calls` are `call_max_used` and `call_max_us`.
fn ring_options(
    table: &Table,
    ring_reset: Option<bool>,
    calls: [Option<u64>; 2],
) -> Result<RingsConfig, ConfigError> {
    let in_key = |key: &'static str| move |problem| table.key_error(key, problem);
    let [used, micros] = calls;
    let limits = CallsConfig {
        max_used: bounded(used.unwrap_or(CALL_USED_MAX), 1, CALL_USED_MAX)
            .map_err(in_key("call_max_used"))?,
        max_wait: Duration::from_micros(u64::from(
            bounded(micros.unwrap_or(CALL_US_DEFAULT), 1, CALL_US_MAX)
                .map_err(in_key("call_max_us"))?,
        )),
    };
    Ok(RingsConfig {
        ring_reset: ring_reset.unwrap_or(false),
        calls: (used.is_some() || micros.is_some()).then_some(limits),
    })
}

fn blk(table: &Table, machine: &Machine, engine: &EngineConfig) -> Result<BlkConfig, ConfigError> {
    let raw: RawBlk = table.deserialize()?;
    let name = raw.name.unwrap_or_else(|| table.name.clone());
    check_name(&name).map_err(|problem| table.key_error("name", problem))?;
    let in_key = |key: &'static str| move |problem| table.key_error(key, problem);
    let block_size = match raw.block_size {
        None => 512,
        Some(TextOrNumber(text)) => parse_block_size(&text).map_err(in_key("block_size"))?,
    };
    let backend = match (raw.path, raw.backend) {
        (Some(_), Some(_)) => return Err(table.error(Problem::Exclusive("path", "backend"))),
        (None, None) => return Err(table.error(Problem::Missing("path (or backend)"))),
        (Some(path), None) => check_disk(path).map_err(in_key("path"))?,
        (None, Some(backend)) => parse_backend(&backend, block_size).map_err(in_key("backend"))?,
    };
    if raw.direct.is_some() && !matches!(backend, BlkBackend::Path(_)) {
        return Err(table.key_error("direct", Problem::OnlyWith("path")));
    }
    let serial = match raw.serial {
        None => name.chars().take(SERIAL_MAX).collect(),
        Some(serial) => check_serial(serial).map_err(in_key("serial"))?,
    };
    let sector = raw.encrypt_sector;
    let sector = sector.map(|TextOrNumber(text)| parse_block_size(&text));
    let encrypt = RawEncrypt {
        cipher: raw.encrypt,
        key_file: raw.key_file,
        key_fd: raw.key_fd,
        sector: sector.transpose().map_err(in_key("encrypt_sector"))?,
    };
    let socket = RawSocket {
        socket: raw.socket,
        owner: raw.socket_owner,
        group: raw.socket_group,
        permissions: raw.socket_mode,
        mode: raw.mode,
    };
    Ok(BlkConfig {
        name,
        socket: socket_config(table, socket, machine)?,
        encrypt: encrypt::check(table, encrypt, &backend, block_size)?,
        backend,
        queues: bounded(raw.queues.unwrap_or(QUEUES_DEFAULT), 1, QUEUES_MAX)
            .map_err(in_key("queues"))?,
        read_only: raw.read_only.unwrap_or(false),
        direct: raw.direct,
        write_through: parse_cache(raw.cache.as_deref()).map_err(in_key("cache"))?,
        discard: raw.discard.unwrap_or(true),
        serial,
        block_size,
        cores: device_cores(table, raw.cores.as_deref(), engine)?,
        rings: ring_options(table, raw.ring_reset, [raw.call_max_used, raw.call_max_us])?,
    })
}

fn socket_config(
    table: &Table,
    raw: RawSocket,
    machine: &Machine,
) -> Result<SocketConfig, ConfigError> {
    let in_key = |key: &'static str| move |problem| table.key_error(key, problem);
    let socket = raw
        .socket
        .ok_or_else(|| table.error(Problem::Missing("socket")))?;
    let source = parse_socket(&socket).map_err(in_key("socket"))?;
    let client = match raw.mode.as_deref() {
        None | Some("server") => false,
        Some("client") if matches!(source, SocketSource::Path(_)) => true,
        Some("client") => return Err(in_key("mode")(Problem::OnlyWith("a socket path"))),
        Some(other) => {
            return Err(in_key("mode")(Problem::UnknownKind {
                what: "mode",
                given: other.to_owned(),
                known: "server, client",
            }));
        }
    };
    if client || !matches!(source, SocketSource::Path(_)) {
        let keys = [
            ("socket_owner", raw.owner.is_some()),
            ("socket_group", raw.group.is_some()),
            ("socket_mode", raw.permissions.is_some()),
        ];
        if let Some((key, _)) = keys.into_iter().find(|(_, given)| *given) {
            let with = if client {
                "mode = \"server\""
            } else {
                "a socket path"
            };
            return Err(table.key_error(key, Problem::OnlyWith(with)));
        }
    }
    let account = |given: Option<TextOrNumber>, what, lookup| {
        given
            .map(|TextOrNumber(text)| account_id(&text, what, lookup))
            .transpose()
    };
    Ok(SocketConfig {
        source,
        owner: account(raw.owner, "user", machine.user_id).map_err(in_key("socket_owner"))?,
        group: account(raw.group, "group", machine.group_id).map_err(in_key("socket_group"))?,
        client,
        mode: raw
            .permissions
            .as_deref()
            .map(parse_mode)
            .transpose()
            .map_err(in_key("socket_mode"))?,
    })
}

/// What devices have claimed so far: the thing claimed, and by whom.
#[derive(Default)]
struct Taken(Vec<(&'static str, String, String)>);

impl Taken {
    fn claim(&mut self, table: &Table, key: &'static str, value: &str) -> Result<(), ConfigError> {
        let earlier = self
            .0
            .iter()
            .find(|(what, taken, _)| *what == key && taken == value);
        if let Some((_, _, by)) = earlier {
            return Err(table.key_error(key, Problem::Duplicate(by.clone())));
        }
        self.0.push((key, value.to_owned(), table.described()));
        Ok(())
    }

    fn claim_socket(&mut self, table: &Table, source: &SocketSource) -> Result<(), ConfigError> {
        let claimed = match source {
            SocketSource::Path(path) => {
                let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                absolute.display().to_string()
            }
            other => other.to_string(),
        };
        self.claim(table, "socket", &claimed)
    }
}
