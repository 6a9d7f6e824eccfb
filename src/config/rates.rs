//! How much may pass in a second: `100M`, `2500`.
//!
//! Suffixes of rates are decimal (k = 1000), as for links and disks everywhere.

use std::time::Duration;

use crate::host::limit::{BURST_DEFAULT, Rates};

use super::PortRates;
use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::size::{parse_digits, parse_duration};

const RATE: &str = "a rate in a second such as 2500, 100k, 100M or 10G";
/// Time that a burst may stand for.
const BURST: [Duration; 2] = [Duration::from_millis(1), Duration::from_secs(1)];

/// Parses digits with an optional k, M or G (either case); at least 1.
pub(super) fn parse_rate(text: &str) -> Result<u64, Problem> {
    let (digits, factor) = match text.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 1_000),
        Some('M') => (&text[..text.len() - 1], 1_000_000),
        Some('G') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    match parse_digits(digits, RATE)?.checked_mul(factor) {
        Some(0) => Err(Problem::Expected(RATE.to_owned())),
        Some(rate) => Ok(rate),
        None => Err(Problem::TooLarge),
    }
}

/// The rate under `key`, if there is one.
pub(super) fn rate(
    table: &Table,
    key: &'static str,
    text: Option<String>,
) -> Result<Option<u64>, ConfigError> {
    let parsed = text.map(|text| parse_rate(&text)).transpose();
    parsed.map_err(|problem| table.key_error(key, problem))
}

/// The duration under `rate_burst`.
pub(super) fn burst(table: &Table, text: Option<String>) -> Result<Duration, ConfigError> {
    let Some(text) = text else {
        return Ok(BURST_DEFAULT);
    };
    let parsed = parse_duration(&text).and_then(|burst| {
        if burst < BURST[0] || burst > BURST[1] {
            Err(Problem::Expected("a duration from 1ms to 1s".to_owned()))
        } else {
            Ok(burst)
        }
    });
    parsed.map_err(|problem| table.key_error("rate_burst", problem))
}

/// The keys of a port as they were written.
#[derive(Debug, Default)]
pub(super) struct RawPortRates {
    pub(super) ingress_bits: Option<String>,
    pub(super) ingress_frames: Option<String>,
    pub(super) egress_bits: Option<String>,
    pub(super) egress_frames: Option<String>,
    pub(super) rate_burst: Option<String>,
}

/// What a port may send and receive.
pub(super) fn port_rates(table: &Table, raw: RawPortRates) -> Result<PortRates, ConfigError> {
    let burst = burst(table, raw.rate_burst)?;
    Ok(PortRates {
        ingress: Rates {
            count: rate(table, "ingress_frames", raw.ingress_frames)?,
            size: rate(table, "ingress_bits", raw.ingress_bits)?,
            burst,
        },
        egress: Rates {
            count: rate(table, "egress_frames", raw.egress_frames)?,
            size: rate(table, "egress_bits", raw.egress_bits)?,
            burst,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_take_decimal_suffixes() {
        for (text, rate) in [
            ("1", 1),
            ("2500", 2500),
            ("100k", 100_000),
            ("100K", 100_000),
            ("10M", 10_000_000),
            ("400G", 400_000_000_000),
        ] {
            assert_eq!(parse_rate(text).ok(), Some(rate), "{text}");
        }
        for text in ["", "0", "0M", "k", "-1", "1.5G", "10 M", "99999999999G"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}
