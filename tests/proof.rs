//! Proofs on disks in real guests: what a power cut leaves, what fio and file systems find again,
//! what dm-crypt reads of an encrypted image, what an NVMe disk is polled for,
//! and what a device does to others that stands still or fails.
//!
//! Needs what scripts/guest-image --tools needs. `VRINGD_SOAK=60` (scripts/soak) makes each load
//! last 60 seconds; without it the runs are short.

mod support;

#[cfg(test)]
#[allow(unreachable_pub, reason = "helpers of the modules beside them")]
#[path = "proof"]
mod proof {
    /// Seconds that each load lasts, if somebody asked for more than a short run.
    pub fn soak() -> Option<u32> {
        let seconds = std::env::var("VRINGD_SOAK").ok()?;
        let parsed = seconds.parse();
        Some(parsed.unwrap_or_else(|_| panic!("VRINGD_SOAK={seconds} is no number of seconds")))
    }

    mod driver;
    mod image;
    mod inside;
    mod journal;
    mod log_writes;

    mod load;
    mod plain;
    mod polled;
    mod power_cut;
    mod sick;
}
