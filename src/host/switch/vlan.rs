//! VLANs of a port: which it takes and gives, and with which tags (IEEE 802.1Q).

/// Highest VLAN number that a frame may belong to.
pub const VLAN_MAX: u16 = 4094;

/// A set of VLANs.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl VlanSet {
    /// No VLAN.
    pub fn new() -> VlanSet {
        VlanSet(Box::new([0; 64]))
    }

    /// Adds `vlan`, at most [`VLAN_MAX`].
    pub fn insert(&mut self, vlan: u16) {
        if vlan <= VLAN_MAX {
            self.0[usize::from(vlan / 64)] |= 1 << (vlan % 64);
        }
    }

    /// Whether `vlan` is in it.
    #[inline]
    pub fn contains(&self, vlan: u16) -> bool {
        let word = self.0.get(usize::from(vlan / 64));
        word.is_some_and(|word| word & (1 << (vlan % 64)) != 0)
    }

    /// Its VLANs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> {
        (0..=VLAN_MAX).filter(|&vlan| self.contains(vlan))
    }
}

impl Default for VlanSet {
    fn default() -> VlanSet {
        VlanSet::new()
    }
}

impl core::fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// The VLANs of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VlanMode {
    /// One VLAN, whose frames have no tag here. A frame with a tag is refused, but for one that
    /// carries a priority only.
    Access(u16),
    /// Several VLANs, whose frames have their tag here, but for those of the native one.
    Trunk {
        /// Those that may pass.
        allowed: VlanSet,
        /// Where frames without a tag belong; without it they are refused.
        native: Option<u16>,
    },
}

impl Default for VlanMode {
    fn default() -> VlanMode {
        VlanMode::Access(1)
    }
}

impl VlanMode {
    /// The VLAN of a frame that comes in with this tag (0 counts as none); `None` refuses it.
    #[inline]
    pub(super) fn ingress(&self, tag: Option<u16>) -> Option<u16> {
        let tag = tag.filter(|&vlan| vlan != 0);
        match (self, tag) {
            (VlanMode::Access(vlan), None) => Some(*vlan),
            (VlanMode::Access(_), Some(_)) => None,
            (VlanMode::Trunk { native, .. }, None) => *native,
            (VlanMode::Trunk { allowed, .. }, Some(vlan)) => allowed.contains(vlan).then_some(vlan),
        }
    }

    /// Whether a frame of `vlan` may go out, and with a tag.
    #[inline]
    pub(super) fn egress(&self, vlan: u16) -> Option<bool> {
        match self {
            VlanMode::Access(own) => (*own == vlan).then_some(false),
            VlanMode::Trunk { native, .. } if *native == Some(vlan) => Some(false),
            VlanMode::Trunk { allowed, .. } => allowed.contains(vlan).then_some(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tag_at_every_kind_of_port() {
        let mut allowed = VlanSet::new();
        allowed.insert(10);
        allowed.insert(4094);
        allowed.insert(4095);
        assert_eq!(allowed.iter().collect::<Vec<_>>(), [10, 4094]);
        let access = VlanMode::Access(5);
        let trunk = |native| VlanMode::Trunk {
            allowed: allowed.clone(),
            native,
        };
        for (mode, tag, vlan) in [
            (&access, None, Some(5)),
            (&access, Some(0), Some(5)),
            (&access, Some(5), None),
            (&access, Some(6), None),
            (&trunk(None), None, None),
            (&trunk(None), Some(10), Some(10)),
            (&trunk(None), Some(11), None),
            (&trunk(None), Some(4095), None),
            (&trunk(Some(7)), None, Some(7)),
            (&trunk(Some(7)), Some(0), Some(7)),
            (&trunk(Some(7)), Some(7), None),
        ] {
            assert_eq!(mode.ingress(tag), vlan, "{mode:?} {tag:?}");
        }
        for (mode, vlan, tagged) in [
            (&access, 5, Some(false)),
            (&access, 10, None),
            (&trunk(None), 10, Some(true)),
            (&trunk(None), 7, None),
            (&trunk(Some(7)), 7, Some(false)),
        ] {
            assert_eq!(mode.egress(vlan), tagged, "{mode:?} {vlan}");
        }
    }
}
