//! Interfaces through AF_XDP: the link `xdp:IFACE`, with descriptors or without.

use std::ffi::OsString;

use crate::sys::xdp::{PassedFd, PassedXdp, TxCsum, XdpPlace};

use super::LinkConfig;
use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::size::parse_digits;
use super::values::{bounded, check_fd_name, check_interface_name, parse_fd, parse_fds};

/// Microseconds of busy polling at most.
const BUSY_POLL_MAX: u64 = 10_000;
const EXPECTED: &str = "file descriptors by number, as in xdp:eth1:fd=5+6:map=7, or by name, as in \
                        xdp:eth1:fdname=A+B:mapname=M (the map may be left out)";

/// `eth1`, `eth1:fd=5+6` or `eth1:fd=5+6:map=7`; or names, `eth1:fdname=A+B:mapname=M`.
pub(super) fn parse(text: &str) -> Result<LinkConfig, Problem> {
    let (interface, passed) = match text.split_once(':') {
        None => (text, None),
        Some((interface, fds)) => (interface, Some(parse_passed(fds)?)),
    };
    Ok(LinkConfig::Xdp(XdpPlace {
        interface: check_interface_name(interface)?,
        passed,
        ..XdpPlace::default()
    }))
}

/// Keys that only these links have.
pub(super) struct RawXdp {
    pub(super) busy_poll: Option<u64>,
    pub(super) tx_csum: Option<String>,
}

/// The link with its keys, if they are given.
pub(super) fn with_keys(
    table: &Table,
    mut link: LinkConfig,
    raw: RawXdp,
) -> Result<LinkConfig, ConfigError> {
    let place = |key, link: LinkConfig| match link {
        LinkConfig::Xdp(place) => Ok(place),
        _ => Err(table.key_error(key, Problem::OnlyWith("link = \"xdp:IFACE\""))),
    };
    if let Some(micros) = raw.busy_poll {
        let micros = bounded(micros, 0, BUSY_POLL_MAX);
        link = LinkConfig::Xdp(XdpPlace {
            busy_poll: micros
                .map_err(|problem| table.key_error("busy_poll", problem))?
                .into(),
            ..place("busy_poll", link)?
        });
    }
    if let Some(text) = raw.tx_csum {
        link = LinkConfig::Xdp(XdpPlace {
            tx_csum: parse_csum(text).map_err(|problem| table.key_error("tx_csum", problem))?,
            ..place("tx_csum", link)?
        });
    }
    Ok(link)
}

fn parse_csum(text: String) -> Result<TxCsum, Problem> {
    match text.as_str() {
        "auto" => Ok(TxCsum::Auto),
        "offload" => Ok(TxCsum::Offload),
        "software" => Ok(TxCsum::Software),
        _ => Err(Problem::UnknownKind {
            what: "maker of checksums",
            given: text,
            known: "auto, offload, software",
        }),
    }
}

fn parse_passed(text: &str) -> Result<PassedXdp, Problem> {
    let wrong = || Problem::Expected(EXPECTED.to_owned());
    let (sockets, map) = match text.split_once(':') {
        None => (text, None),
        Some((sockets, map)) => (sockets, Some(map)),
    };
    let sockets: Vec<_> = match sockets.split_once('=').ok_or_else(wrong)? {
        ("fd", numbers) => {
            let numbers = parse_fds(numbers, EXPECTED)?;
            numbers.into_iter().map(PassedFd::Number).collect()
        }
        ("fdname", names) => parse_names(names)?,
        _ => return Err(wrong()),
    };
    let map = match map.map(|map| map.split_once('=').ok_or_else(wrong)) {
        None => None,
        Some(map) => Some(match map? {
            ("map", number) => PassedFd::Number(parse_fd(number, EXPECTED)?),
            ("mapname", name) => parse_name(name)?,
            _ => return Err(wrong()),
        }),
    };
    match map.as_ref().filter(|map| sockets.contains(map)) {
        None => Ok(PassedXdp { sockets, map }),
        Some(map) => Err(twice(map)),
    }
}

fn parse_names(text: &str) -> Result<Vec<PassedFd>, Problem> {
    let mut names = Vec::new();
    for name in text.split('+') {
        let name = parse_name(name)?;
        if names.contains(&name) {
            return Err(twice(&name));
        }
        names.push(name);
    }
    Ok(names)
}

/// A `+` stands between names.
fn parse_name(name: &str) -> Result<PassedFd, Problem> {
    match name.contains('+') {
        true => Err(Problem::Expected(EXPECTED.to_owned())),
        false => check_fd_name(name).map(|()| PassedFd::Name(name.to_owned())),
    }
}

fn twice(fd: &PassedFd) -> Problem {
    Problem::Expected(format!("each descriptor once, {fd} is there twice"))
}

/// What `vringd xdp-helper` was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HelperGiven {
    /// Links with descriptors, which are to be opened.
    pub links: Vec<String>,
    /// Who the command is to run as; `None`: as who we are.
    pub user: Option<String>,
    /// Microseconds of busy polling.
    pub busy_poll: Option<String>,
    /// The command and its arguments; not empty.
    pub command: Vec<OsString>,
}

impl HelperGiven {
    /// The interfaces and the numbers of their descriptors.
    ///
    /// # Errors
    /// The first link that has none, or those of another.
    pub fn places(&self) -> Result<Vec<XdpPlace>, ConfigError> {
        let refused = |flag, value: &String, problem| ConfigError::Flag {
            flag,
            value: value.clone(),
            problem: Box::new(problem),
        };
        let busy_poll = match &self.busy_poll {
            None => 0,
            Some(text) => parse_digits(text, "a number of microseconds")
                .and_then(|micros| bounded(micros, 0, BUSY_POLL_MAX))
                .map_err(|problem| refused("--busy-poll", text, problem))?,
        };
        let mut places: Vec<XdpPlace> = Vec::new();
        for link in &self.links {
            let refused = |problem| refused("--link", link, problem);
            let mut place = handed_over(link).map_err(refused)?;
            place.busy_poll = busy_poll.into();
            let shares = |other: &&XdpPlace| {
                other.interface == place.interface
                    || all(other).any(|fd| all(&place).any(|f| f == fd))
            };
            if let Some(other) = places.iter().find(shares) {
                return Err(refused(Problem::Duplicate(other.to_string())));
            }
            places.push(place);
        }
        Ok(places)
    }
}

fn all(place: &XdpPlace) -> impl Iterator<Item = &PassedFd> {
    place.passed.iter().flat_map(PassedXdp::all)
}

fn handed_over(link: &str) -> Result<XdpPlace, Problem> {
    let wrong = || Problem::Expected("a link such as xdp:eth1:fd=5+6:map=7".to_owned());
    match parse(link.strip_prefix("xdp:").ok_or_else(wrong)?)? {
        // Names are for who gets descriptors, not for who makes them.
        LinkConfig::Xdp(place)
            if place.passed.is_some()
                && all(&place).all(|fd| matches!(fd, PassedFd::Number(_))) =>
        {
            Ok(place)
        }
        _ => Err(wrong()),
    }
}
