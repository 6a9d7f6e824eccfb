//! From tables of keys to a [`Config`]: types, bounds, defaults, and what must not occur twice.
//!
//! The `Raw*` structures are the list of keys, the same for the command line and the file.
//! Everything that fails here fails before a socket, a thread or a disk exists.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::Deserialize;

use crate::sys::tap::TapSource;
use crate::sys::xdp::{PassedFd, PassedXdp};

use super::encrypt::RawEncrypt;
use super::error::{ConfigError, Problem};
use super::file;
use super::keyvalue::{Entry, Kind, Table};
use super::limits::RawDiskRates;
use super::size::parse_duration;
use super::values::{
    SERIAL_MAX, account_id, bounded, check_disk, check_name, check_serial, parse_backend,
    parse_block_size, parse_cache, parse_faults, parse_lock, parse_mode, parse_socket,
};
use super::{
    BlkBackend, BlkConfig, CallsConfig, Config, EngineConfig, Given, IdlePolicy, KeySource,
    LinkConfig, Machine, Placement, RingsConfig, SocketConfig, SocketSource,
};
use super::{encrypt, format, limits, net, sick, stations, switch, switches, uplink, uring, wires};

/// 128 pairs are the 256 vrings that a kick message can name.
pub(super) const QUEUES_MAX: u64 = 128;
pub(super) const QUEUES_DEFAULT: u64 = 16;
/// A call is not put off for more used buffers than the largest ring has.
const CALL_USED_MAX: u64 = 32768;
const CALL_US_MAX: u64 = 10_000;
/// Where only a number of buffers is given: what an interrupt may wait without being felt.
const CALL_US_DEFAULT: u64 = 50;
const STOP_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

const PLACEMENTS: &str = "spread, auto";
const IDLE_POLICIES: &str = "spin, adaptive, interrupt";

/// Text that may be written as a number too.
#[derive(Debug, Deserialize)]
pub(super) struct TextOrNumber(pub(super) String);

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
struct RawBlk {
    name: Option<String>,
    socket: Option<String>,
    mode: Option<String>,
    path: Option<String>,
    format: Option<String>,
    backing_dir: Option<String>,
    backend: Option<String>,
    queues: Option<u64>,
    read_only: Option<bool>,
    direct: Option<bool>,
    iopoll: Option<bool>,
    sqpoll: Option<bool>,
    fixed_buffers: Option<bool>,
    cache: Option<String>,
    lock: Option<String>,
    fault: Option<Vec<String>>,
    on_enospc: Option<String>,
    io_timeout: Option<TextOrNumber>,
    discard: Option<bool>,
    encrypt: Option<String>,
    encrypt_sector: Option<TextOrNumber>,
    key_file: Option<String>,
    key_fd: Option<u64>,
    serial: Option<String>,
    block_size: Option<TextOrNumber>,
    read_iops: Option<TextOrNumber>,
    write_iops: Option<TextOrNumber>,
    iops: Option<TextOrNumber>,
    read_bytes: Option<TextOrNumber>,
    write_bytes: Option<TextOrNumber>,
    bytes: Option<TextOrNumber>,
    rate_burst: Option<TextOrNumber>,
    group: Option<String>,
    cores: Option<Vec<u64>>,
    ring_reset: Option<bool>,
    memory_files: Option<bool>,
    call_max_used: Option<u64>,
    call_max_us: Option<u64>,
    socket_owner: Option<TextOrNumber>,
    socket_group: Option<TextOrNumber>,
    socket_mode: Option<String>,
}

/// The keys about the socket, which are those of both kinds of device.
pub(super) struct RawSocket {
    pub(super) socket: Option<String>,
    pub(super) owner: Option<TextOrNumber>,
    pub(super) group: Option<TextOrNumber>,
    pub(super) permissions: Option<String>,
    pub(super) mode: Option<String>,
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
    for list in &given.groups {
        tables.push(Table::from_list(Kind::Group, list)?);
    }
    for list in &given.switches {
        tables.push(Table::from_list(Kind::Switch, list)?);
    }
    assign_names(&mut tables);
    let engine = engine(engine_table(&tables, given), machine)?;
    let mut config = Config {
        engine,
        nets: Vec::new(),
        uplinks: Vec::new(),
        blks: Vec::new(),
        groups: Vec::new(),
        switches: Vec::new(),
    };
    let mut taken = Taken::default();
    for table in &tables {
        match table.kind {
            Kind::Engine => {}
            Kind::Net if table.entry("host").is_some() => {
                let uplink = net::uplink(table)?;
                taken.claim(table, "name", &uplink.name)?;
                taken.claim_interface(table, &uplink.host)?;
                config.uplinks.push(uplink);
            }
            Kind::Net => {
                let net = net::net(table, machine, &config.engine)?;
                taken.claim(table, "name", &net.name)?;
                taken.claim_socket(table, &net.socket.source)?;
                taken.claim_interface(table, &net.link)?;
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
            Kind::Group => {
                let group = limits::group(table)?;
                taken.claim_as(table, ["group", "name"], &group.name)?;
                config.groups.push(group);
            }
            Kind::Switch => {
                let switch = switches::switch(table)?;
                taken.claim_as(table, ["switch", "name"], &switch.name)?;
                config.switches.push(switch);
            }
        }
    }
    if config.nets.is_empty() && config.blks.is_empty() {
        return Err(ConfigError::NoDevice);
    }
    check_together(&tables, &mut config)?;
    Ok(config)
}

/// What only shows when all tables are known.
fn check_together(tables: &[Table], config: &mut Config) -> Result<(), ConfigError> {
    let ports = tables.iter().filter(|table| table.kind == Kind::Net);
    let (uplinks, nets): (Vec<_>, Vec<_>) = ports.partition(|t| t.entry("host").is_some());
    wires::join(&nets, &mut config.nets)?;
    switch::check(&nets, &config.nets)?;
    uplink::check(&uplinks, &config.uplinks, &config.nets)?;
    stations::check([&nets, &uplinks], &config.nets, &config.uplinks)?;
    let switches: Vec<_> = tables.iter().filter(|t| t.kind == Kind::Switch).collect();
    switches::check(&switches, &config.switches, &config.nets)?;
    let disks: Vec<_> = tables.iter().filter(|t| t.kind == Kind::Blk).collect();
    limits::check(&disks, &config.blks, &config.groups)
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
            Kind::Group => "group",
            Kind::Switch => "switch",
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

/// The cores that serve a device: all of the engine's unless it says which.
pub(super) fn device_cores(
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

/// The keys about virtqueues and their memory; `switches` are `ring_reset` and `memory_files`,
/// `calls` are `call_max_used` and `call_max_us`.
pub(super) fn ring_options(
    table: &Table,
    switches: [Option<bool>; 2],
    calls: [Option<u64>; 2],
) -> Result<RingsConfig, ConfigError> {
    let in_key = |key: &'static str| move |problem| table.key_error(key, problem);
    let [ring_reset, memory_files] = switches;
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
        memory_files: memory_files.unwrap_or(false),
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
    let of_files = raw.direct.map(|_| "direct");
    let of_files = of_files.or(raw.lock.as_ref().map(|_| "lock"));
    if let Some(key) = of_files.filter(|_| !matches!(backend, BlkBackend::Path(_))) {
        return Err(table.key_error(key, Problem::OnlyWith("path")));
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
    let rates = RawDiskRates {
        iops: [raw.read_iops, raw.write_iops, raw.iops],
        bytes: [raw.read_bytes, raw.write_bytes, raw.bytes],
        rate_burst: raw.rate_burst,
    };
    let encrypt = encrypt::check(table, encrypt, &backend, block_size)?;
    let format = (raw.format.as_deref(), raw.backing_dir);
    let io = [raw.iopoll, raw.sqpoll, raw.fixed_buffers];
    let calls = [raw.call_max_used, raw.call_max_us];
    Ok(BlkConfig {
        name,
        socket: socket_config(table, socket, machine)?,
        io: uring::check(table, io, &backend, raw.direct, encrypt.as_ref())?,
        format: format::check(table, format, &backend, encrypt.as_ref())?,
        encrypt,
        backend,
        queues: bounded(raw.queues.unwrap_or(QUEUES_DEFAULT), 1, QUEUES_MAX)
            .map_err(in_key("queues"))?,
        read_only: raw.read_only.unwrap_or(false),
        direct: raw.direct,
        fault: parse_faults(raw.fault.as_deref()).map_err(in_key("fault"))?,
        sick: sick::check(table, raw.on_enospc.as_deref(), raw.io_timeout)?,
        lock: parse_lock(raw.lock.as_deref()).map_err(in_key("lock"))?,
        write_through: parse_cache(raw.cache.as_deref()).map_err(in_key("cache"))?,
        discard: raw.discard.unwrap_or(true),
        serial,
        block_size,
        limits: limits::blk_limits(table, rates, raw.group)?,
        cores: device_cores(table, raw.cores.as_deref(), engine)?,
        rings: ring_options(table, [raw.ring_reset, raw.memory_files], calls)?,
    })
}

pub(super) fn socket_config(
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
    /// Takes `value` under `key`, unless another table has it.
    fn claim(&mut self, table: &Table, key: &'static str, value: &str) -> Result<(), ConfigError> {
        self.claim_as(table, [key, key], value)
    }

    /// The same for a key that shares its values with others: with those of `space`.
    fn claim_as(
        &mut self,
        table: &Table,
        [space, key]: [&'static str; 2],
        value: &str,
    ) -> Result<(), ConfigError> {
        let same = |(other, known, _): &&(&str, String, String)| *other == space && known == value;
        if let Some((_, _, by)) = self.0.iter().find(same) {
            return Err(table.key_error(key, Problem::Duplicate(by.clone())));
        }
        self.0.push((space, value.to_owned(), table.described()));
        Ok(())
    }

    /// An interface is that of its namespace, however it is used; a descriptor is a queue on its
    /// own.
    fn claim_interface(&mut self, table: &Table, link: &LinkConfig) -> Result<(), ConfigError> {
        let key = match table.entry("host") {
            Some(_) => ["link", "host"],
            None => ["link", "link"],
        };
        match link {
            LinkConfig::Tap(tap) => match (&tap.source, &tap.netns) {
                (TapSource::Fds(fds), _) => fds
                    .iter()
                    .try_for_each(|fd| self.claim_as(table, key, &format!("fd={fd}"))),
                (TapSource::Name(name) | TapSource::Macvtap(name), netns) => {
                    let name = match netns {
                        Some(netns) => format!("{netns}/{name}"),
                        None => name.clone(),
                    };
                    self.claim_as(table, key, &name)
                }
            },
            LinkConfig::Xdp(place) => {
                let mut fds = place.passed.iter().flat_map(PassedXdp::all);
                self.claim_as(table, key, &place.interface)?;
                fds.try_for_each(|fd| match fd {
                    PassedFd::Number(fd) => self.claim_as(table, key, &format!("fd={fd}")),
                    PassedFd::Name(name) => self.claim_as(table, key, &format!("fdname={name}")),
                })
            }
            _ => Ok(()),
        }
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
