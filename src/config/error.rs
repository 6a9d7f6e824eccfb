//! What can be wrong with what the operator asked for, and where it was written.
//!
//! One line per error: the place (flag, or file and line), the device, the key, the value as it
//! was written, and the problem. Problems are separate so that a table test can hold each.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::size::DURATION_MAX;

/// A configuration that is refused; the daemon prints it and exits with status 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file can't be read; the source says why.
    #[error("--config {path:?}: cannot be read")]
    Read {
        /// The file that was named on the command line.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The configuration file is not TOML.
    #[error("{place}: {message}")]
    Syntax {
        /// The file and the line.
        place: Place,
        /// The TOML parser's own words, on one line.
        message: String,
    },
    /// A key's value is refused.
    #[error("{place}{key} = {value}: {problem}")]
    Value {
        /// Where the key is, with a separator after it unless empty.
        place: String,
        /// The key.
        key: String,
        /// The value as it was written.
        value: String,
        /// What is wrong with it.
        problem: Box<Problem>,
    },
    /// A flag that sets one engine key is refused.
    #[error("{flag} {value:?}: {problem}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// The value as it was written.
        value: String,
        /// What is wrong with it.
        problem: Box<Problem>,
    },
    /// A device or a table is refused as a whole.
    #[error("{place}: {problem}")]
    Device {
        /// Which one.
        place: String,
        /// What is wrong with it.
        problem: Box<Problem>,
    },
    /// There is nothing to serve.
    #[error("no device: give at least one --net or --blk, or [[net]] or [[blk]] in the file")]
    NoDevice,
}

/// Where something was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the command line.
    Flag,
    /// In a configuration file.
    File {
        /// The file as it was named.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("command line"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
        }
    }
}

/// What is wrong with a value or a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The key is not one of this table's.
    #[error("unknown key (known: {0})")]
    UnknownKey(String),
    /// The key is there twice.
    #[error("given twice")]
    Repeated,
    /// The value has the wrong type or form.
    #[error("expected {0}")]
    Expected(String),
    /// An item of a `key=value` list has no `=`.
    #[error("{0:?} is not of the form key=value")]
    NotKeyValue(String),
    /// A number that does not fit 64 bits.
    #[error("too large")]
    TooLarge,
    /// A duration beyond the limit.
    #[error("longer than {} seconds", DURATION_MAX.as_secs())]
    TooLong,
    /// A number outside its bounds.
    #[error("not in {min}..={max}")]
    OutOfRange {
        /// Least value taken.
        min: u64,
        /// Greatest value taken.
        max: u64,
    },
    /// A word that is none of the known ones.
    #[error("unknown {what} {given:?} (known: {known})")]
    UnknownKind {
        /// What the word should have named.
        what: &'static str,
        /// The word.
        given: String,
        /// The words that are taken.
        known: &'static str,
    },
    /// Something that needs an argument has none.
    #[error("{what} {given:?} needs an argument, as in {example:?}")]
    NeedsArgument {
        /// What the word names.
        what: &'static str,
        /// The word.
        given: String,
        /// How it could look.
        example: &'static str,
    },
    /// Something that takes no argument has one.
    #[error("{what} {given:?} takes no argument")]
    TakesNoArgument {
        /// What the word names.
        what: &'static str,
        /// The word.
        given: String,
    },
    /// A required key is absent.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// Two keys that exclude each other.
    #[error("{0} and {1} exclude each other")]
    Exclusive(&'static str, &'static str),
    /// A key that has a meaning only beside another.
    #[error("only has a meaning with {0}")]
    OnlyWith(&'static str),
    /// Each end of a wire waits for the other.
    #[error("so does that of {0}, the other end of the wire: no front-end could come first")]
    FollowEachOther(String),
    /// Another number of queue pairs than descriptors.
    #[error("the link has {0} file descriptors, one for each queue pair")]
    FdQueues(usize),
    /// A name or text that is empty.
    #[error("must not be empty")]
    Empty,
    /// A name or text beyond its limit.
    #[error("{length} bytes long, at most {max} are possible")]
    Longer {
        /// Length of the value.
        length: usize,
        /// The limit.
        max: usize,
    },
    /// A character that the value can't have.
    #[error("has {character:?}, only {allowed} are possible")]
    Character {
        /// The first such character.
        character: char,
        /// Which ones are taken.
        allowed: &'static str,
    },
    /// A size that is no multiple of the block size.
    #[error("{size} bytes are not a multiple of the block size {block_size}")]
    NotAMultiple {
        /// The size, in bytes.
        size: u64,
        /// The block size, in bytes.
        block_size: u32,
    },
    /// A core that isn't there or is offline.
    #[error("core {core} does not exist or is offline (online: {online})")]
    NoSuchCore {
        /// The core.
        core: u64,
        /// The ones that exist, as a list of ranges.
        online: String,
    },
    /// A user or group that the system does not know.
    #[error("unknown {0}")]
    NoSuchAccount(&'static str),
    /// The system's account data can't be read.
    #[error("{what} cannot be looked up: {message}")]
    AccountLookup {
        /// User or group.
        what: &'static str,
        /// The system's answer.
        message: String,
    },
    /// A core that the engine has no worker on.
    #[error("core {core} has no worker (engine.cores: {cores})")]
    NoWorker {
        /// The core.
        core: u64,
        /// The cores that have one, as a list of ranges.
        cores: String,
    },
    /// The end of a wire that is no port.
    #[error("there is no port {0:?}")]
    NoSuchPort(String),
    /// The group of a disk that is not there.
    #[error("there is no group {0:?}")]
    NoSuchGroup(String),
    /// A wire from a port to itself.
    #[error("a wire joins two ports (to get its own frames back, a port has link = \"echo\")")]
    WireToItself,
    /// A port that is the end of a wire and has another link.
    #[error("port {peer} has {link} (give the wire on one side, or the same on both)")]
    WireTaken {
        /// The other port.
        peer: String,
        /// Its link.
        link: String,
    },
    /// A switch with more ports than it can have.
    #[error("a switch has at most {0} ports")]
    TooManyPorts(usize),
    /// A switch with uplinks only.
    #[error("no guest has a port at this switch")]
    NoGuestAtSwitch,
    /// A station that stays at another port.
    #[error("{mac} is at port {port} in VLAN {vlan} already")]
    StationTaken {
        /// Its address.
        mac: String,
        /// The other port.
        port: String,
        /// A VLAN that both ports have.
        vlan: u16,
    },
    /// More stations than a switch has room for.
    #[error(
        "with {stations} in {vlans} VLANs here, the stations of the switch take {entries} \
         entries: there are {max}"
    )]
    TooManyStations {
        /// Stations of the port.
        stations: usize,
        /// VLANs of the port.
        vlans: usize,
        /// Entries that all ports so far take.
        entries: usize,
        /// The most that there are.
        max: usize,
    },
    /// Ports of one switch that different workers would serve.
    #[error("the cores of port {0} of the same switch are others (one worker serves a switch)")]
    OtherCores(String),
    /// A value that another device has already.
    #[error("already used by {0}")]
    Duplicate(String),
    /// A MAC address that no station can have.
    #[error("not the address of a single station")]
    NotUnicast,
    /// A path that isn't there or can't be examined.
    #[error("{0}")]
    Path(String),
    /// A path that is neither file nor block device.
    #[error("neither a file nor a block device")]
    NotADisk,
    /// The name of a qcow2 image, and nothing says whether it is one.
    #[error("say format = \"qcow2\", or \"raw\" to serve the file as it is")]
    SayFormat,
    /// What serde says of a value, where no other variant fits.
    #[error("{0}")]
    Malformed(String),
}
