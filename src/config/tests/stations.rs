//! Stations that are at a port for good: one port each, and room for all of them.

use super::*;

fn refusal(nets: &[&str]) -> String {
    let config = load(&flags(nets, &[]), &machine());
    config.unwrap_err().to_string()
}

#[test]
fn a_station_is_at_one_port_of_a_vlan() {
    const MAC: &str = "52:54:00:00:00:03";
    let port = |name: &str, keys: &str| format!("name={name},socket=/{name},{keys}");
    let at = |name: &str, vlan: &str| {
        let keys = format!("link=switch:s,vlan={vlan},stations=52:54:00:00:00:09+{MAC}");
        port(name, &keys)
    };
    let one = port("a", &format!("link=switch:s,vlan=trunk:5-9,stations={MAC}"));
    let value = format!("52:54:00:00:00:09+{MAC}");
    for (other, vlan) in [("7", 7), ("trunk:1-4094", 5), ("trunk:1+9", 9)] {
        assert_eq!(
            refusal(&[&one, &at("b", other)]),
            format!("--net b: stations = {value:?}: {MAC} is at port a in VLAN {vlan} already")
        );
    }
    let native = format!("{},vlan_native=9", at("b", "trunk:10-20"));
    assert_eq!(
        refusal(&[&one, &native]),
        format!("--net b: stations = {value:?}: {MAC} is at port a in VLAN 9 already")
    );
    let uplink = format!("name=up,link=switch:s,host=tap:t0,vlan=8,stations={MAC}");
    assert_eq!(
        refusal(&[&one, &uplink]),
        format!("--net up: stations = {MAC:?}: {MAC} is at port a in VLAN 8 already")
    );
    // Another VLAN, another switch, and twice the same.
    let elsewhere = port("c", &format!("link=switch:t,vlan=7,stations={MAC}+{MAC}"));
    let nets: [&str; 3] = [&one, &at("b", "10"), &elsewhere];
    load(&flags(&nets, &[]), &machine()).unwrap();
}

#[test]
fn a_switch_has_room_for_so_many_stations_that_stay() {
    let macs = |first: usize, count: usize| {
        let macs: Vec<_> = (first..first + count)
            .map(|number| format!("52:54:00:00:00:{number:02x}"))
            .collect();
        macs.join("+")
    };
    let port = |name: &str, first: usize, count: usize| {
        let macs = macs(first, count);
        format!("name={name},socket=/{name},link=switch:s,vlan=trunk:1-4094,stations={macs}")
    };
    // Five of them are more than are learned at a time.
    let (a, b, c) = (port("a", 0, 5), port("b", 5, 11), port("c", 16, 1));
    load(&flags(&[&a, &b], &[]), &machine()).unwrap();
    assert_eq!(
        refusal(&[&a, &b, &c]),
        "--net c: stations = \"52:54:00:00:00:10\": with 1 in 4094 VLANs here, the stations of \
         the switch take 69598 entries: there are 65536"
    );
    assert_eq!(
        refusal(&[&port("d", 0, 17)]),
        format!(
            "--net d: stations = {:?}: with 17 in 4094 VLANs here, the stations of the switch \
             take 69598 entries: there are 65536",
            macs(0, 17)
        )
    );
}
