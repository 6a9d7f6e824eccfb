//! On which memory node a page lies.

use super::{Area, GuestRam};

/// From the kernel's `mempolicy.h`, which libc does not carry: the answer is a node, that of the
/// page at the address.
const MPOL_F_NODE: libc::c_ulong = 1;
const MPOL_F_ADDR: libc::c_ulong = 2;

impl GuestRam {
    /// The memory node of the page at front-end address `uva`; `None` when it is not in the table,
    /// or where the kernel knows no nodes.
    pub fn node_of(self: &std::sync::Arc<Self>, uva: u64) -> Option<usize> {
        let area: Area = self.area(uva & !1, 2, 2).ok()?;
        let mut node: libc::c_int = -1;
        // SAFETY: the kernel writes one int to `node`; no mask is given, and the address is only
        // looked up.
        let status = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &raw mut node,
                core::ptr::null_mut::<libc::c_ulong>(),
                0 as libc::c_ulong,
                area.base(),
                MPOL_F_NODE | MPOL_F_ADDR,
            )
        };
        if status < 0 {
            return None;
        }
        usize::try_from(node).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_in_the_table_has_a_node_and_others_have_none() {
        let ram = GuestRam::for_test(&[(0, 4096)]);
        let first = 1 << 40;
        // Where the kernel was built without nodes it says nothing of any page.
        let known = std::path::Path::new("/sys/devices/system/node/node0").exists();
        assert_eq!(ram.node_of(first).is_some(), known);
        assert_eq!(ram.node_of(first + 4096), None);
    }
}
