//! The links behind ports, which their sessions follow.

use std::sync::Arc;

use crate::config::{LinkConfig, LinkFollows, NetConfig};
use crate::control::session::Link;
use crate::sys::link::{LinkError, LinkWatch, Presence};
use crate::sys::tap::{TapPlace, TapSource};

use super::DaemonError;

/// What each of `nets` follows, and whom it tells of its own front-end. Their interfaces are there.
pub(super) fn watch(nets: &[NetConfig]) -> Result<Vec<Link>, DaemonError> {
    let mut links: Vec<Link> = nets.iter().map(|_| Link::default()).collect();
    for (at, net) in nets.iter().enumerate() {
        if net.link_follows == LinkFollows::Off {
            continue;
        }
        let named = |source| DaemonError::Link {
            name: net.name.clone(),
            source,
        };
        links[at].follows = match &net.link {
            LinkConfig::Tap(place) => interface_of(place).map_err(named)?,
            LinkConfig::Xdp(interface) => {
                Some(LinkWatch::interface(interface, None).map_err(named)?)
            }
            LinkConfig::Wire(peer) => {
                let presence = Presence::new().map_err(|source| DaemonError::Start {
                    what: "eventfd".into(),
                    source,
                })?;
                let presence = Arc::new(presence);
                if let Some(peer) = nets.iter().position(|other| other.name == *peer) {
                    links[peer].tells = Some(Arc::clone(&presence));
                }
                Some(LinkWatch::peer(presence))
            }
            _ => None,
        };
    }
    Ok(links)
}

fn interface_of(place: &TapPlace) -> Result<Option<LinkWatch>, LinkError> {
    match &place.source {
        TapSource::Name(name) | TapSource::Macvtap(name) => {
            LinkWatch::interface(name, place.netns.as_deref()).map(Some)
        }
        TapSource::Fds(_) => Ok(None),
    }
}
