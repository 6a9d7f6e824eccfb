//! What the operator asked for, as plain validated settings.
//!
//! The command line and the TOML file have the same keys and go through the same structures
//! (`keyvalue`); here are the results, in which everything is checked that can be checked before
//! the first resource is taken. No type of the command line parser appears, nothing is opened.
//! Where a socket comes from is [`SocketConfig`], defined beside the code that makes listeners, and
//! [`KeySource`] stands beside the code that reads keys.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::sys::tap::TapPlace;
use crate::sys::xdp::XdpPlace;

mod bench;
mod encrypt;
mod error;
mod file;
mod format;
mod keyvalue;
mod limits;
mod links;
mod net;
mod rates;
mod sick;
mod size;
mod stations;
mod switch;
mod switches;
#[cfg(test)]
mod tests;
mod uplink;
mod uring;
mod validate;
mod values;
mod wires;
mod xdp;

pub use crate::host::fault::FaultPlan;
pub use crate::host::limit::{DiskRates, Rates};
pub use crate::host::switch::{Filter, PortRules, VLAN_MAX, VlanMode, VlanSet};
pub use crate::sys::disk::IoOptions;
pub use crate::sys::key::KeySource;
pub use crate::sys::listen::{SocketConfig, SocketSource};
pub use bench::{BenchBlkConfig, BenchBlkGiven, Chains, Rw, RwKind, Span, load_bench_blk};
pub use bench::{BenchMode, BenchNetConfig, BenchNetGiven, FrameSize, load_bench_net};
pub use error::{ConfigError, Place, Problem};
pub use size::DURATION_MAX;
pub use validate::load;
#[cfg(any(test, fuzzing, feature = "testing"))]
pub use validate::load_text;
pub use xdp::HelperGiven;

/// Everything that the daemon is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Threads and how they wait.
    pub engine: EngineConfig,
    /// The network ports, in the order given; names are unique over ports and disks.
    pub nets: Vec<NetConfig>,
    /// Ports of switches with an interface of the host behind them, in the order given.
    pub uplinks: Vec<UplinkConfig>,
    /// The disks, in the order given.
    pub blks: Vec<BlkConfig>,
    /// Limits that disks share, in the order given; names are unique among groups.
    pub groups: Vec<GroupConfig>,
    /// What is chosen about switches, of which others have the defaults; names are unique.
    pub switches: Vec<SwitchConfig>,
}

/// Limits that disks share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupConfig {
    /// What disks call it.
    pub name: String,
    /// How much they may do together.
    pub rates: DiskRates,
}

/// How much a disk may do.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct BlkLimits {
    /// By itself.
    pub rates: DiskRates,
    /// The name of the group whose limits it shares.
    pub group: Option<String>,
}

/// A port of a switch with an interface of the host behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkConfig {
    /// Names the port in logs and errors.
    pub name: String,
    /// The interface: a tap or one for AF_XDP.
    pub host: LinkConfig,
    /// The name of the switch.
    pub switch: String,
    /// What is chosen about the port.
    pub rules: PortRules,
    /// How much it may send into the switch (`ingress`) and is given.
    pub rates: PortRates,
    /// The MTU that the interface gets.
    pub mtu: Option<u16>,
}

/// Threads and how they wait.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// One pinned worker for each; not empty, no core twice, all of them online.
    pub cores: Vec<usize>,
    /// What a worker does when there is nothing to do.
    pub idle: IdlePolicy,
    /// How long a shutdown waits for requests in flight.
    pub stop_timeout: Duration,
    /// How workers are chosen.
    pub placement: Placement,
}

/// How workers are chosen for queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// One after the other.
    Spread,
    /// Near to the guest's memory.
    Auto,
}

/// What a worker does when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Polls for ever; never blocks.
    Spin,
    /// Polls for a while, then sleeps until it is kicked.
    Adaptive,
    /// Sleeps as soon as there is nothing to do.
    Interrupt,
}

/// One virtio-net device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Names the device in logs and errors.
    pub name: String,
    /// Where front-ends connect.
    pub socket: SocketConfig,
    /// Where frames go.
    pub link: LinkConfig,
    /// What it tells of its link.
    pub told: LinkTold,
    /// Queue pairs that a front-end may use at most, 1..=128.
    pub queues: u16,
    /// The device's address; without it the front-end or the driver chooses one.
    pub mac: Option<[u8; 6]>,
    /// The MTU that the driver is told, 68..=65535.
    pub mtu: Option<u16>,
    /// How long frames on a wire wait for a receiver without buffers, at most 50 ms.
    pub hold: Duration,
    /// What is chosen about it as the port of a switch.
    pub rules: PortRules,
    /// How much it may send and receive.
    pub rates: PortRates,
    /// The cores that serve its queues, among those of the engine; not empty.
    pub cores: Vec<usize>,
    /// What is chosen about its virtqueues.
    pub rings: RingsConfig,
}

/// What is chosen about a whole switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchConfig {
    /// Its name, as its ports have it.
    pub name: String,
    /// Seconds after which it forgets a station that it has not seen.
    pub ageing: u32,
}

/// What front-ends and drivers are told of the link behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LinkTold {
    /// What follows it.
    pub follows: LinkFollows,
    /// Its speed in Mbit/s, 1..=2^31-1.
    pub speed: Option<u32>,
    /// Whether both ends may send at a time.
    pub duplex: Option<Duplex>,
}

/// Whether both ends of a link may send at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duplex {
    /// One of them.
    Half,
    /// Both.
    Full,
}

/// What follows the link behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LinkFollows {
    /// Nothing.
    #[default]
    Off,
    /// While the link is down there is no session with a front-end.
    Session,
}

/// How much a port may send and receive: frames, and bits of Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PortRates {
    /// What the guest sends.
    pub ingress: Rates,
    /// What the guest receives.
    pub egress: Rates,
}

/// What is chosen about the virtqueues of a device, and their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RingsConfig {
    /// The driver may reset single virtqueues.
    pub ring_reset: bool,
    /// Calls to the driver are put off.
    pub calls: Option<CallsConfig>,
    /// Guest memory may be in files that are not kept in memory.
    pub memory_files: bool,
}

/// How long calls to the driver are put off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallsConfig {
    /// Used buffers since the last call, 1..=32768.
    pub max_used: u16,
    /// How long the oldest of them may wait, 1 µs to 10 ms.
    pub max_wait: Duration,
}

/// Where the frames of a port go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkConfig {
    /// Back to the sender, unchanged.
    Echo,
    /// Nowhere.
    Sink,
    /// To and from a tap or macvtap of the host.
    Tap(TapPlace),
    /// To and from an interface of the host, past the host's own stack.
    Xdp(XdpPlace),
    /// To and from the other port of this name, whose link is a wire to this one.
    Wire(String),
    /// A port of the switch of this name.
    Switch(String),
}

/// One virtio-blk device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkConfig {
    /// Names the device in logs and errors.
    pub name: String,
    /// Where front-ends connect.
    pub socket: SocketConfig,
    /// Where the blocks are.
    pub backend: BlkBackend,
    /// Virtqueues that a front-end may use at most, 1..=128.
    pub queues: u16,
    /// What the file is; only with a path.
    pub format: ImageFormat,
    /// How what is on it is encrypted, if it is; only with a path.
    pub encrypt: Option<EncryptConfig>,
    /// What it asks of io_uring beside the usual; only with a path.
    pub io: IoOptions,
    /// Writes are refused and the device says so.
    pub read_only: bool,
    /// Bypass the page cache: always, never, or (`None`) where the file system allows it.
    pub direct: Option<bool>,
    /// What goes wrong on purpose.
    pub fault: Option<FaultPlan>,
    /// Images are locked against other users.
    pub lock: bool,
    /// A write is acknowledged when it is durable, until the driver says otherwise.
    pub write_through: bool,
    /// What is done when it is full or slow.
    pub sick: SickConfig,
    /// The guest may give space back.
    pub discard: bool,
    /// What GET_ID answers: ASCII, at most 20 bytes; by default the start of the name.
    pub serial: String,
    /// 512 or 4096.
    pub block_size: u32,
    /// How much it may do.
    pub limits: BlkLimits,
    /// The cores that serve its queues, among those of the engine; not empty.
    pub cores: Vec<usize>,
    /// What is chosen about its virtqueues.
    pub rings: RingsConfig,
}

/// What is done about a disk that is full or slow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SickConfig {
    /// What finds no space waits for it, and does not fail.
    pub hold: bool,
    /// Requests that take longer are told of; `None`: none are.
    pub io_timeout: Option<Duration>,
}

/// How a disk is encrypted: with AES-256-XTS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncryptConfig {
    /// Where the key is.
    pub key: KeySource,
    /// Bytes that are encrypted as one, 512 or 4096; no more than the block size.
    pub sector: u32,
}

/// What a disk's file is. Never guessed from what is in it: its guest may have written that.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ImageFormat {
    /// The disk as it is, as nothing else was said.
    #[default]
    Plain,
    /// The disk as it is, as was said.
    Raw,
    /// A qcow2 image.
    Qcow2 {
        /// Where files may be that it stands on; `None`: it may stand on none.
        backing_dir: Option<PathBuf>,
    },
}

/// Where the blocks of a disk are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlkBackend {
    /// A file or a block device.
    Path(PathBuf),
    /// Memory of the daemon, so many bytes.
    Ram(u64),
    /// Nowhere: reads leave the buffers as they are, writes are dropped; so many bytes.
    Null(u64),
}

/// What the operator gave, before it is understood: the command line's share of the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// A TOML file.
    pub file: Option<PathBuf>,
    /// The list of `--core`; overrides the file's `engine.cores`.
    pub cores: Option<String>,
    /// Overrides the file's `engine.idle`.
    pub idle: Option<String>,
    /// Overrides the file's `engine.placement`.
    pub placement: Option<String>,
    /// Overrides the file's `engine.stop_timeout`.
    pub stop_timeout: Option<String>,
    /// `key=value` lists, after the file's `[[net]]`.
    pub nets: Vec<String>,
    /// `key=value` lists, after the file's `[[blk]]`.
    pub blks: Vec<String>,
    /// `key=value` lists, after the file's `[[group]]`.
    pub groups: Vec<String>,
    /// `key=value` lists, after the file's `[[switch]]`.
    pub switches: Vec<String>,
}

/// Looks up the number of a user or group; `None` when there is none of that name.
pub type AccountLookup = fn(&str) -> io::Result<Option<u32>>;

/// What of the machine the settings are checked against.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The cores that are online, ascending.
    pub online_cores: Vec<usize>,
    /// Finds users.
    pub user_id: AccountLookup,
    /// Finds groups.
    pub group_id: AccountLookup,
}
