//! The links behind ports, of which sessions tell their front-ends.

use std::io;
use std::sync::Arc;

use crate::config::{self, Config, LinkConfig, LinkFollows, NetConfig, SwitchConfig};
use crate::control::session::Link;
use crate::device::net::{Duplex, LinkInfo};
use crate::sys::link::{LinkWatch, Presence};
use crate::sys::tap::{TapPlace, TapSource};

use super::DaemonError;

/// Watches the link of a port whose interface is there. That it can't be is an error only where the
/// session is to follow it.
pub(super) fn watch(net: &NetConfig) -> Result<Option<LinkWatch>, DaemonError> {
    let watch = match &net.link {
        LinkConfig::Tap(TapPlace { source, netns, .. }) => match source {
            TapSource::Name(name) | TapSource::Macvtap(name) => {
                LinkWatch::interface(name, netns.as_deref())
            }
            TapSource::Fds(_) => return Ok(None),
        },
        LinkConfig::Xdp(place) => LinkWatch::interface(&place.interface, None),
        _ => return Ok(None),
    };
    let name = net.name.clone();
    match (watch, net.told.follows) {
        (Ok(watch), _) => Ok(Some(watch)),
        (Err(source), LinkFollows::Session) => Err(DaemonError::Link { name, source }),
        (Err(error), LinkFollows::Off) => {
            tracing::warn!("net {name}: guests are told nothing of the link: {error}");
            Ok(None)
        }
    }
}

/// What the session of each of `nets` knows of its link, which `watches` watch.
pub(super) fn join(nets: &[NetConfig], watches: Vec<Option<LinkWatch>>) -> io::Result<Vec<Link>> {
    let link = |(net, watch): (&NetConfig, _)| Link {
        watch,
        ends_session: net.told.follows == LinkFollows::Session,
        tells: None,
    };
    let mut links: Vec<Link> = nets.iter().zip(watches).map(link).collect();
    for (at, net) in nets.iter().enumerate() {
        let LinkConfig::Wire(peer) = &net.link else {
            continue;
        };
        let peer = nets.iter().position(|other| other.name == *peer);
        if let (Some(peer), LinkFollows::Session) = (peer, net.told.follows) {
            let presence = Arc::new(Presence::new()?);
            links[peer].tells = Some(Arc::clone(&presence));
            links[at].watch = Some(LinkWatch::peer(presence));
        }
    }
    Ok(links)
}

/// The ageing times of switches, each by the number of its first port.
pub(super) fn ageing(config: &Config) -> Vec<(usize, u32)> {
    let of_first = |switch: &SwitchConfig| {
        let link = LinkConfig::Switch(switch.name.clone());
        let first = config.nets.iter().position(|net| net.link == link);
        first.map(|first| (first, switch.ageing))
    };
    config.switches.iter().filter_map(of_first).collect()
}

/// What the guest of `net` is told of its link.
pub(super) fn info(net: &NetConfig, watched: bool) -> LinkInfo {
    LinkInfo {
        has_status: watched,
        speed: net.told.speed,
        duplex: net.told.duplex.map(|duplex| match duplex {
            config::Duplex::Half => Duplex::Half,
            config::Duplex::Full => Duplex::Full,
        }),
    }
}
