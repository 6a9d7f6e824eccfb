//! What IEEE 802.1Q says about a frame that comes into a port, and which ports the tests have.

/// A port: what the daemon is told, and the same for the model.
pub struct Port {
    pub option: &'static str,
    /// VLANs whose frames have a tag here.
    pub tagged: &'static [u16],
    /// The VLAN of frames without one.
    pub untagged: Option<u16>,
}

pub const PORTS: [Port; 8] = [
    port("vlan=10", &[], Some(10)),
    port("vlan=10", &[], Some(10)),
    port("vlan=20", &[], Some(20)),
    // No word of VLANs is VLAN 1.
    port("mtu=9000", &[], Some(1)),
    port("vlan=trunk:10+20", &[10, 20], None),
    port("vlan=trunk:20-22", &[20, 21, 22], None),
    port(
        "vlan=trunk:20+22+30,vlan_native=10",
        &[20, 22, 30],
        Some(10),
    ),
    port("vlan=trunk:1+4094,vlan_native=20", &[1, 4094], Some(20)),
];

pub const fn port(option: &'static str, tagged: &'static [u16], untagged: Option<u16>) -> Port {
    Port {
        option,
        tagged,
        untagged,
    }
}

/// VLAN and priority.
pub type Tag = (u16, u16);
/// From the outside in.
pub type Tags = Vec<Tag>;

/// Every kind of frame that a port may be sent.
pub fn kinds() -> Vec<Tags> {
    let mut kinds = vec![vec![], vec![(0, 5)]];
    kinds.extend([1, 10, 20, 21, 22, 30, 4094, 4095].map(|vlan| vec![(vlan, 3)]));
    // A second tag, which must not become the first on the way.
    for outer in [0, 1, 10, 20, 30] {
        kinds.extend([10, 20].map(|inner| vec![(outer, 0), (inner, 0)]));
    }
    kinds
}

/// VLAN and priority of a frame with these tags that comes into a port, and the tags behind.
pub fn taken<'a>(port: &Port, tags: &'a [Tag]) -> Option<(u16, u16, &'a [Tag])> {
    match tags {
        [] => port.untagged.map(|vlan| (vlan, 0, tags)),
        [(0, priority), rest @ ..] => port.untagged.map(|vlan| (vlan, *priority, rest)),
        [(vlan, priority), rest @ ..] => {
            let known = port.tagged.contains(vlan);
            known.then_some((*vlan, *priority, rest))
        }
    }
}

/// The tags with which it comes out of a port, if it does.
pub fn given(port: &Port, vlan: u16, priority: u16, rest: &[Tag]) -> Option<Tags> {
    if port.untagged == Some(vlan) {
        // What is behind would say that it is of another VLAN.
        return rest.is_empty().then(Vec::new);
    }
    let tag = port.tagged.contains(&vlan).then_some((vlan, priority))?;
    Some([&[tag], rest].concat())
}
