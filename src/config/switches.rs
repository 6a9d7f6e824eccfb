//! What is chosen about a whole switch: the tables `[[switch]]`.

use serde::Deserialize;

use crate::host::switch::AGEING;

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::values::check_name;
use super::{LinkConfig, NetConfig, SwitchConfig};

/// Seconds of the ageing time, as IEEE 802.1Q has them.
const AGEING_RANGE: (u64, u64) = (10, 1_000_000);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSwitch {
    name: Option<String>,
    ageing: Option<u64>,
}

/// A switch.
pub(super) fn switch(table: &Table) -> Result<SwitchConfig, ConfigError> {
    let raw: RawSwitch = table.deserialize()?;
    let name = raw.name;
    let name = name.ok_or_else(|| table.error(Problem::Missing("name")))?;
    check_name(&name).map_err(|problem| table.key_error("name", problem))?;
    let ageing = match raw.ageing.map(u32::try_from) {
        None => AGEING,
        Some(Ok(ageing)) if (AGEING_RANGE.0..=AGEING_RANGE.1).contains(&ageing.into()) => ageing,
        Some(_) => {
            let (min, max) = AGEING_RANGE;
            return Err(table.key_error("ageing", Problem::OutOfRange { min, max }));
        }
    };
    Ok(SwitchConfig { name, ageing })
}

/// Each has a port.
pub(super) fn check(
    tables: &[&Table],
    switches: &[SwitchConfig],
    nets: &[NetConfig],
) -> Result<(), ConfigError> {
    for (table, switch) in tables.iter().zip(switches) {
        let link = LinkConfig::Switch(switch.name.clone());
        if !nets.iter().any(|net| net.link == link) {
            return Err(table.key_error("name", Problem::NoGuestAtSwitch));
        }
    }
    Ok(())
}
