//! What a net device tells its guest of the link behind it.

use crate::sys::tap::{TapPlace, TapSource};

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{Duplex, LinkConfig, LinkFollows, LinkTold, SocketConfig, SocketSource};

const FOLLOWS: &str = "off, session";
const LINKS: &str = "link = \"tap:NAME\", \"macvtap:NAME\", \"xdp:IFACE\" or \"wire:PORT\"";

/// VIRTIO 1.3 §5.1.4: more is none that a driver takes.
const SPEED_MAX: u32 = 0x7fff_ffff;

/// The keys, as given.
pub(super) struct RawLinkTold {
    pub(super) follows: Option<String>,
    pub(super) speed: Option<u64>,
    pub(super) duplex: Option<String>,
}

/// What is told of the link of a port.
pub(super) fn told(
    table: &Table,
    raw: RawLinkTold,
    link: &LinkConfig,
    socket: &SocketConfig,
) -> Result<LinkTold, ConfigError> {
    let speed = |given: u64| match u32::try_from(given) {
        Ok(speed) if (1..=SPEED_MAX).contains(&speed) => Ok(speed),
        _ => {
            let (min, max) = (1, u64::from(SPEED_MAX));
            Err(table.key_error("speed", Problem::OutOfRange { min, max }))
        }
    };
    let duplex = match raw.duplex.as_deref() {
        None => None,
        Some("half") => Some(Duplex::Half),
        Some("full") => Some(Duplex::Full),
        Some(other) => {
            let problem = Problem::UnknownKind {
                what: "duplex",
                given: other.to_owned(),
                known: "half, full",
            };
            return Err(table.key_error("duplex", problem));
        }
    };
    Ok(LinkTold {
        follows: follows(table, raw.follows.as_deref(), link, socket)?,
        speed: raw.speed.map(speed).transpose()?,
        duplex,
    })
}

fn follows(
    table: &Table,
    given: Option<&str>,
    link: &LinkConfig,
    socket: &SocketConfig,
) -> Result<LinkFollows, ConfigError> {
    let error = |problem| Err(table.key_error("link_follows", problem));
    match given {
        None | Some("off") => return Ok(LinkFollows::Off),
        Some("session") => {}
        Some(other) => {
            return error(Problem::UnknownKind {
                what: "follower",
                given: other.to_owned(),
                known: FOLLOWS,
            });
        }
    }
    // What somebody else listens on can't be closed here.
    if !matches!(socket.source, SocketSource::Path(_)) {
        return error(Problem::OnlyWith("a socket path"));
    }
    match link {
        LinkConfig::Xdp(_) | LinkConfig::Wire(_) => Ok(LinkFollows::Session),
        // The interface of a descriptor may be in any namespace.
        LinkConfig::Tap(TapPlace { source, .. }) if !matches!(source, TapSource::Fds(_)) => {
            Ok(LinkFollows::Session)
        }
        _ => error(Problem::OnlyWith(LINKS)),
    }
}
