//! What the kernel counts of the host's side of a port, by name. Control asks it, never a worker.

use crate::sync::Counter;
use crate::sys::tap::Tap;
use crate::sys::xdp::{SendCounters, Xdp};

/// Of a tap.
pub(super) fn of_tap(tap: &Tap) -> Vec<(&'static str, u64)> {
    let dropped = tap.dropped().map(|count| ("tap_rx_dropped", count));
    dropped.into_iter().collect()
}

/// Of an interface.
pub(super) fn of_xdp(xdp: &Xdp) -> Vec<(&'static str, u64)> {
    let all = xdp.statistics();
    let sum =
        |of: fn(&SendCounters) -> &Counter| xdp.counters().iter().map(|one| of(one).get()).sum();
    let mut counted = vec![
        ("xdp_tx_offloaded_csum", sum(|one| &one.offloaded_csum)),
        ("xdp_tx_software_csum", sum(|one| &one.software_csum)),
        (
            "xdp_tx_software_segments",
            sum(|one| &one.software_segments),
        ),
        ("xdp_rx_dropped", all.rx_dropped),
        ("xdp_rx_ring_full", all.rx_ring_full),
        ("xdp_fill_ring_empty", all.fill_ring_empty),
        ("xdp_tx_invalid", all.tx_invalid),
        ("xdp_tx_dropped", sum(|one| &one.kernel_dropped)),
    ];
    counted.extend(xdp.unserved().map(|count| ("xdp_rx_unserved", count)));
    counted
}
