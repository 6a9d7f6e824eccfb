//! Wires: which two ports each of them joins.
//!
//! Naming the peer on one side suffices. What contradicts that is an error at the side that named
//! it.

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{LinkConfig, LinkFollows, NetConfig};

/// Completes the links of `nets`, which `tables` describe in the same order: a port without a link
/// is the other end of a wire.
pub(super) fn join(tables: &[&Table], nets: &mut [NetConfig]) -> Result<(), ConfigError> {
    for at in 0..nets.len() {
        let LinkConfig::Wire(peer) = nets[at].link.clone() else {
            if tables[at].entry("hold_us").is_some() {
                return Err(tables[at].key_error("hold_us", Problem::OnlyWith("link = \"wire:…\"")));
            }
            continue;
        };
        if peer.is_empty() {
            continue;
        }
        let own = nets[at].name.clone();
        let error = |problem| Err(tables[at].key_error("link", problem));
        let Some(other) = nets.iter().position(|net| net.name == peer) else {
            return error(Problem::NoSuchPort(peer));
        };
        if other == at {
            return error(Problem::WireToItself);
        }
        match &nets[other].link {
            LinkConfig::Wire(back) if back.is_empty() => {
                nets[other].link = LinkConfig::Wire(own);
                if tables[other].entry("hold_us").is_none() {
                    nets[other].hold = nets[at].hold;
                }
            }
            LinkConfig::Wire(back) if *back == own => {}
            _ => {
                let link = tables[other]
                    .entry("link")
                    .map(|entry| entry.written.clone());
                let link = match (link, &nets[other].link) {
                    (Some(written), _) => format!("link = {written}"),
                    (None, LinkConfig::Wire(back)) => format!("a wire to {back} already"),
                    (None, _) => String::new(),
                };
                return error(Problem::WireTaken { peer, link });
            }
        }
    }
    for (at, net) in nets.iter().enumerate() {
        let both = |other: &&NetConfig| {
            net.link == LinkConfig::Wire(other.name.clone())
                && [net, other].map(|end| end.told.follows) == [LinkFollows::Session; 2]
        };
        if let Some(peer) = nets.iter().find(both) {
            let problem = Problem::FollowEachOther(peer.name.clone());
            return Err(tables[at].key_error("link_follows", problem));
        }
    }
    let open = |net: &NetConfig| net.link == LinkConfig::Wire(String::new());
    match nets.iter().position(open) {
        Some(at) => Err(tables[at].error(Problem::Missing("link"))),
        None => Ok(()),
    }
}
