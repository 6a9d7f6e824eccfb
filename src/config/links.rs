//! What a net device tells its guest of the link behind it.

use crate::sys::tap::{TapPlace, TapSource};

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{LinkConfig, LinkFollows, SocketConfig, SocketSource};

const FOLLOWS: &str = "off, session";
const LINKS: &str = "link = \"tap:NAME\", \"macvtap:NAME\", \"xdp:IFACE\" or \"wire:PORT\"";

/// What follows the link of a port.
pub(super) fn follows(
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
