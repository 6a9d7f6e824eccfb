//! How much disks may do in a second, each and in groups: `read_iops`, `bytes`, `[[group]]`.

use std::time::Duration;

use serde::Deserialize;

use crate::host::limit::{BURST_DISK, DiskRates, Rates};

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::rates::{burst, rate};
use super::validate::TextOrNumber;
use super::values::check_name;
use super::{BlkConfig, BlkLimits, GroupConfig};

/// Time that a burst may stand for.
const BURST: [Duration; 2] = [Duration::from_millis(1), Duration::from_secs(3600)];
const BURST_RANGE: &str = "a duration from 1ms to 3600s";

/// The keys of a disk or a group as they were written.
#[derive(Debug, Default)]
pub(super) struct RawDiskRates {
    pub(super) iops: [Option<TextOrNumber>; 3],
    pub(super) bytes: [Option<TextOrNumber>; 3],
    pub(super) rate_burst: Option<TextOrNumber>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGroup {
    name: Option<String>,
    read_iops: Option<TextOrNumber>,
    write_iops: Option<TextOrNumber>,
    iops: Option<TextOrNumber>,
    read_bytes: Option<TextOrNumber>,
    write_bytes: Option<TextOrNumber>,
    bytes: Option<TextOrNumber>,
    rate_burst: Option<TextOrNumber>,
}

fn text(raw: Option<TextOrNumber>) -> Option<String> {
    raw.map(|TextOrNumber(text)| text)
}

/// What a disk or a group may do.
pub(super) fn disk_rates(table: &Table, raw: RawDiskRates) -> Result<DiskRates, ConfigError> {
    let in_key = |problem| table.key_error("rate_burst", problem);
    let burst = match text(raw.rate_burst) {
        None => BURST_DISK,
        Some(text) => burst(&text, BURST, BURST_RANGE).map_err(in_key)?,
    };
    let [read_iops, write_iops, iops] = raw.iops.map(text);
    let [read_bytes, write_bytes, bytes] = raw.bytes.map(text);
    let rates = |keys: [&'static str; 2], iops, bytes| -> Result<Rates, ConfigError> {
        Ok(Rates {
            count: rate(table, keys[0], iops)?,
            size: rate(table, keys[1], bytes)?,
            burst,
        })
    };
    Ok(DiskRates {
        read: rates(["read_iops", "read_bytes"], read_iops, read_bytes)?,
        write: rates(["write_iops", "write_bytes"], write_iops, write_bytes)?,
        total: rates(["iops", "bytes"], iops, bytes)?,
    })
}

/// The limits of a disk.
pub(super) fn blk_limits(
    table: &Table,
    raw: RawDiskRates,
    group: Option<String>,
) -> Result<BlkLimits, ConfigError> {
    Ok(BlkLimits {
        rates: disk_rates(table, raw)?,
        group,
    })
}

/// A group of disks.
pub(super) fn group(table: &Table) -> Result<GroupConfig, ConfigError> {
    let raw: RawGroup = table.deserialize()?;
    let name = raw.name;
    let name = name.ok_or_else(|| table.error(Problem::Missing("name")))?;
    check_name(&name).map_err(|problem| table.key_error("name", problem))?;
    let rates = RawDiskRates {
        iops: [raw.read_iops, raw.write_iops, raw.iops],
        bytes: [raw.read_bytes, raw.write_bytes, raw.bytes],
        rate_burst: raw.rate_burst,
    };
    Ok(GroupConfig {
        name,
        rates: disk_rates(table, rates)?,
    })
}

/// The groups that disks name are there.
pub(super) fn check(
    tables: &[&Table],
    blks: &[BlkConfig],
    groups: &[GroupConfig],
) -> Result<(), ConfigError> {
    for (table, blk) in tables.iter().zip(blks) {
        if let Some(name) = &blk.limits.group
            && !groups.iter().any(|group| group.name == *name)
        {
            return Err(table.key_error("group", Problem::NoSuchGroup(name.clone())));
        }
    }
    Ok(())
}
