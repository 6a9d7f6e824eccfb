//! Each key's value: from text to its type, or to the problem with it.
//!
//! Nothing here knows where the value was written or what other keys say; `validate` does.

use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::Duration;

use super::error::Problem;
use super::size::{parse_digits, parse_size};
use super::xdp;
use super::{AccountLookup, BlkBackend, FaultPlan, LinkConfig, SocketSource};
use crate::sys::tap::{TapPlace, TapSource};

const NAME_MAX: usize = 64;
/// `sun_path` is 108 bytes with its final NUL.
const SOCKET_PATH_MAX: usize = 107;
/// IFNAMSIZ less its final NUL.
const INTERFACE_NAME_MAX: usize = 15;
/// Bytes of the name of a namespace, or its path.
const NETNS_MAX: usize = 255;
/// VIRTIO 1.3 §5.2.6: the device ID string has 20 bytes.
pub(super) const SERIAL_MAX: usize = 20;

const TAP_FDS: &str = "fd= and numbers of file descriptors, as in tap:fd=3+4";
const LINKS: &str = "tap, macvtap, xdp, wire, switch, echo, sink";
const BACKENDS: &str = "ram, null; a file or a device is given by path";
const FAULTS: &str = "eio, enospc, eintr, eagain, short, delay_us, reorder, drop_flush";

pub(super) fn bounded(value: u64, min: u64, max: u64) -> Result<u16, Problem> {
    match u16::try_from(value) {
        Ok(number) if (min..=max).contains(&value) => Ok(number),
        _ => Err(Problem::OutOfRange { min, max }),
    }
}

fn check_length(text: &str, max: usize) -> Result<(), Problem> {
    match text.len() {
        0 => Err(Problem::Empty),
        length if length > max => Err(Problem::Longer { length, max }),
        _ => Ok(()),
    }
}

fn check_characters(
    text: &str,
    allowed: &'static str,
    is_allowed: impl Fn(char) -> bool,
) -> Result<(), Problem> {
    match text.chars().find(|character| !is_allowed(*character)) {
        Some(character) => Err(Problem::Character { character, allowed }),
        None => Ok(()),
    }
}

pub(super) fn check_name(name: &str) -> Result<(), Problem> {
    check_length(name, NAME_MAX)?;
    check_characters(name, "A-Z a-z 0-9 _ . -", |character| {
        character.is_ascii_alphanumeric() || "_.-".contains(character)
    })
}

pub(super) fn check_serial(serial: String) -> Result<String, Problem> {
    check_characters(&serial, "printable ASCII characters", |character| {
        character.is_ascii_graphic() || character == ' '
    })?;
    check_length(&serial, SERIAL_MAX)?;
    Ok(serial)
}

pub(super) fn parse_socket(text: &str) -> Result<SocketSource, Problem> {
    if let Some(number) = text.strip_prefix("fd:") {
        let fd = parse_fd(number, "fd: and the number of a file descriptor")?;
        return Ok(SocketSource::Fd(fd));
    }
    if let Some(name) = text.strip_prefix("systemd:") {
        check_fd_name(name)?;
        return Ok(SocketSource::Systemd(name.to_owned()));
    }
    check_length(text, SOCKET_PATH_MAX)?;
    check_characters(text, "characters other than NUL", |character| {
        character != '\0'
    })?;
    Ok(SocketSource::Path(PathBuf::from(text)))
}

/// systemd.socket(5), FileDescriptorName=: no control characters, no colon, at most 255.
pub(super) fn check_fd_name(name: &str) -> Result<(), Problem> {
    check_length(name, 255)?;
    check_characters(
        name,
        "printable ASCII characters except the colon",
        |character| (character.is_ascii_graphic() || character == ' ') && character != ':',
    )
}

pub(super) fn parse_mode(text: &str) -> Result<u32, Problem> {
    let octal = text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    match u32::from_str_radix(text, 8) {
        Ok(mode) if octal && mode <= 0o777 => Ok(mode),
        _ => Err(Problem::Expected(
            "an octal mode such as \"0660\", at most 0777".to_owned(),
        )),
    }
}

pub(super) fn account_id(
    text: &str,
    what: &'static str,
    lookup: AccountLookup,
) -> Result<u32, Problem> {
    check_length(text, 256)?;
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        // The greatest number means "no change" to chown.
        return match text.parse::<u32>() {
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(Problem::OutOfRange {
                min: 0,
                max: u64::from(u32::MAX) - 1,
            }),
        };
    }
    match lookup(text) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(Problem::NoSuchAccount(what)),
        Err(error) => Err(Problem::AccountLookup {
            what,
            message: error.to_string(),
        }),
    }
}

pub(super) fn parse_link(text: &str) -> Result<LinkConfig, Problem> {
    let (kind, argument) = match text.split_once(':') {
        Some((kind, argument)) => (kind, Some(argument)),
        None => (text, None),
    };
    let what = "link kind";
    let given = kind.to_owned();
    match (kind, argument) {
        ("echo", None) => Ok(LinkConfig::Echo),
        ("sink", None) => Ok(LinkConfig::Sink),
        ("tap", Some(name)) if !name.is_empty() => {
            let source = match name.strip_prefix("fd=") {
                Some(fds) => TapSource::Fds(parse_fds(fds, TAP_FDS)?),
                None => TapSource::Name(check_interface_name(name)?),
            };
            Ok(tap(source))
        }
        ("macvtap", Some(name)) if !name.is_empty() => {
            Ok(tap(TapSource::Macvtap(check_interface_name(name)?)))
        }
        ("macvtap", _) => Err(Problem::NeedsArgument {
            what,
            given,
            example: "macvtap:macvtap0",
        }),
        ("tap", _) => Err(Problem::NeedsArgument {
            what,
            given,
            example: "tap:tap0",
        }),
        ("xdp", Some(name)) if !name.is_empty() => xdp::parse(name),
        ("xdp", _) => Err(Problem::NeedsArgument {
            what,
            given,
            example: "xdp:eth1",
        }),
        ("wire", Some(peer)) if !peer.is_empty() => Ok(LinkConfig::Wire(peer.to_owned())),
        ("switch", Some(name)) if !name.is_empty() => {
            check_name(name)?;
            Ok(LinkConfig::Switch(name.to_owned()))
        }
        ("switch", _) => Err(Problem::NeedsArgument {
            what,
            given,
            example: "switch:sw0",
        }),
        ("wire", _) => Err(Problem::NeedsArgument {
            what,
            given,
            example: "wire:net1",
        }),
        ("echo" | "sink", Some(_)) => Err(Problem::TakesNoArgument { what, given }),
        _ => Err(Problem::UnknownKind {
            what,
            given,
            known: LINKS,
        }),
    }
}

fn tap(source: TapSource) -> LinkConfig {
    LinkConfig::Tap(TapPlace {
        source,
        netns: None,
        persist: false,
    })
}

/// Numbers of descriptors, one for each queue.
pub(super) fn parse_fds(text: &str, expected: &'static str) -> Result<Vec<i32>, Problem> {
    let mut fds = Vec::new();
    for number in text.split('+') {
        let fd = parse_fd(number, expected)?;
        if fds.contains(&fd) {
            return Err(Problem::Expected(format!(
                "each descriptor once, {fd} is there twice"
            )));
        }
        fds.push(fd);
    }
    Ok(fds)
}

/// 0 to 2 are the standard streams.
pub(super) fn parse_fd(number: &str, expected: &'static str) -> Result<i32, Problem> {
    let (min, max) = (3, u64::from(i32::MAX.unsigned_abs()));
    match i32::try_from(parse_digits(number, expected)?) {
        Ok(fd) if fd >= 3 => Ok(fd),
        _ => Err(Problem::OutOfRange { min, max }),
    }
}

/// A name that `ip netns` knows, or the path to a namespace.
pub(super) fn check_netns(name: String) -> Result<String, Problem> {
    check_length(&name, NETNS_MAX)?;
    let is_path = name.starts_with('/');
    if name == "." || name == ".." || name.contains('\0') || (!is_path && name.contains('/')) {
        return Err(Problem::Expected(
            "the name of a network namespace, or a path".to_owned(),
        ));
    }
    Ok(name)
}

/// The kernel takes more, but makes a pattern of `%` and refuses blanks, `/` and `:`.
pub(super) fn check_interface_name(name: &str) -> Result<String, Problem> {
    check_length(name, INTERFACE_NAME_MAX)?;
    check_characters(name, "A-Z a-z 0-9 _ . - @", |character| {
        character.is_ascii_alphanumeric() || "_.-@".contains(character)
    })?;
    if name == "." || name == ".." {
        return Err(Problem::Expected("the name of an interface".to_owned()));
    }
    Ok(name.to_owned())
}

pub(super) fn parse_mac(text: &str) -> Result<[u8; 6], Problem> {
    let malformed = || Problem::Expected("an address such as 52:54:00:12:34:56".to_owned());
    let mut mac = [0; 6];
    let mut octets = text.split(':');
    for byte in &mut mac {
        let octet = octets
            .next()
            .filter(|octet| octet.len() == 2)
            .ok_or_else(malformed)?;
        if !octet.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(malformed());
        }
        *byte = u8::from_str_radix(octet, 16).map_err(|_| malformed())?;
    }
    if octets.next().is_some() {
        return Err(malformed());
    }
    let is_group = mac[0] & 1 == 1;
    if is_group || mac == [0; 6] {
        Err(Problem::NotUnicast)
    } else {
        Ok(mac)
    }
}

pub(super) fn parse_block_size(text: &str) -> Result<u32, Problem> {
    match parse_size(text)? {
        512 => Ok(512),
        4096 => Ok(4096),
        _ => Err(Problem::Expected("512 or 4096".to_owned())),
    }
}

/// Whether writes go through: the value of `cache`.
pub(super) fn parse_cache(text: Option<&str>) -> Result<bool, Problem> {
    match text {
        None | Some("writeback") => Ok(false),
        Some("writethrough") => Ok(true),
        Some(other) => Err(Problem::UnknownKind {
            what: "cache",
            given: other.to_owned(),
            known: "writeback, writethrough",
        }),
    }
}

/// Whether images are locked: the value of `lock`.
pub(super) fn parse_lock(text: Option<&str>) -> Result<bool, Problem> {
    match text {
        None | Some("auto") => Ok(true),
        Some("off") => Ok(false),
        Some(other) => Err(Problem::UnknownKind {
            what: "lock",
            given: other.to_owned(),
            known: "auto, off",
        }),
    }
}

/// What goes wrong on purpose: the value of `fault`.
pub(super) fn parse_faults(items: Option<&[String]>) -> Result<Option<FaultPlan>, Problem> {
    let Some(items) = items else {
        return Ok(None);
    };
    let mut plan = FaultPlan::default();
    for item in items {
        if item == "drop_flush" {
            plan.drop_flush = true;
            continue;
        }
        let (name, number) = item.split_once('=').unwrap_or((item, ""));
        // What is tried again at once must succeed some time.
        let (min, max) = match name {
            "eio" | "enospc" | "short" => (1, 1 << 30),
            "eintr" | "eagain" => (2, 1 << 30),
            "reorder" => (2, 256),
            "delay_us" => (1, 60_000_000),
            _ => {
                return Err(Problem::UnknownKind {
                    what: "fault",
                    given: name.to_owned(),
                    known: FAULTS,
                });
            }
        };
        let number = parse_digits(number, "a fault and a number, such as eio=100")?;
        let number = u32::try_from(number).ok();
        let number = number.filter(|number| (min..=max).contains(number));
        let number = number.ok_or(Problem::OutOfRange {
            min: min.into(),
            max: max.into(),
        })?;
        match name {
            "eio" => plan.eio = number,
            "enospc" => plan.enospc = number,
            "short" => plan.short = number,
            "eintr" => plan.eintr = number,
            "eagain" => plan.eagain = number,
            "reorder" => plan.reorder = number,
            _ => plan.delay = Duration::from_micros(number.into()),
        }
    }
    Ok(Some(plan))
}

pub(super) fn parse_backend(text: &str, block_size: u32) -> Result<BlkBackend, Problem> {
    let (kind, argument) = match text.split_once(':') {
        Some((kind, argument)) => (kind, Some(argument)),
        None => (text, None),
    };
    let what = "backend";
    let given = kind.to_owned();
    let (make, example): (fn(u64) -> BlkBackend, _) = match kind {
        "ram" => (BlkBackend::Ram, "ram:1G"),
        "null" => (BlkBackend::Null, "null:1G"),
        _ => {
            return Err(Problem::UnknownKind {
                what,
                given,
                known: BACKENDS,
            });
        }
    };
    let argument = argument.ok_or(Problem::NeedsArgument {
        what,
        given,
        example,
    })?;
    let size = parse_size(argument)?;
    if size == 0 {
        return Err(Problem::Expected("a size above zero".to_owned()));
    }
    if size % u64::from(block_size) != 0 {
        return Err(Problem::NotAMultiple { size, block_size });
    }
    Ok(make(size))
}

/// Looks at the disk without opening it; the size is the business of who opens it.
pub(super) fn check_disk(path: String) -> Result<BlkBackend, Problem> {
    if path.is_empty() {
        return Err(Problem::Empty);
    }
    let path = PathBuf::from(path);
    match std::fs::metadata(&path) {
        Ok(found) if found.is_file() || found.file_type().is_block_device() => {
            Ok(BlkBackend::Path(path))
        }
        Ok(_) => Err(Problem::NotADisk),
        Err(error) => Err(Problem::Path(error.to_string())),
    }
}
