//! Ports of a switch: VLANs, filters, and which cores serve them.

use super::*;

fn load_nets(nets: &[&str]) -> Result<Config, String> {
    load(&flags(nets, &[]), &machine()).map_err(|error| error.to_string())
}

#[test]
fn keys_of_a_port_are_taken_from_flags_and_from_a_file() {
    let list = "socket=/n,link=switch:s,vlan=trunk:10+20-22,vlan_native=7,isolated=on,\
                flood_limit=100,allow_mac=52:54:00:00:00:01+52:54:00:00:00:02,\
                allow_ip=10.0.0.7+fd00::7,stations=52:54:00:00:00:03,mtu=1500";
    let text = "[[net]]\nsocket = \"/n\"\nlink = \"switch:s\"\nvlan = \"trunk:10+20-22\"\n\
                vlan_native = 7\nisolated = true\nflood_limit = 100\n\
                allow_mac = [\"52:54:00:00:00:01\", \"52:54:00:00:00:02\"]\n\
                allow_ip = [\"10.0.0.7\", \"fd00::7\"]\nstations = [\"52:54:00:00:00:03\"]\n\
                mtu = 1500\n";
    let from_flags = load_nets(&[list]).unwrap();
    let from_file = load_text(text, Given::default()).unwrap();
    assert_eq!(from_flags, from_file);
    let net = &from_flags.nets[0];
    assert_eq!(net.link, LinkConfig::Switch("s".into()));
    let VlanMode::Trunk { allowed, native } = &net.rules.vlan else {
        panic!("a trunk");
    };
    assert_eq!(allowed.iter().collect::<Vec<_>>(), [10, 20, 21, 22]);
    assert_eq!((*native, net.rules.isolated), (Some(7), true));
    assert_eq!(
        (net.rules.flood_limit, net.rules.mtu),
        (Some(100), Some(1500))
    );
    assert_eq!(net.rules.filter.mac.len(), 2);
    assert_eq!(net.rules.filter.ip.len(), 2);
    assert_eq!(net.rules.stations, [[0x52, 0x54, 0, 0, 0, 3]]);
}

#[test]
fn a_port_without_keys_is_in_vlan_1() {
    let config = load_nets(&["socket=/n,link=switch:s"]).unwrap();
    assert_eq!(config.nets[0].rules, PortRules::default());
    assert_eq!(PortRules::default().vlan, VlanMode::Access(1));
}

#[test]
fn refused_ports_name_key_and_value() {
    for (list, message) in [
        (
            "socket=/n,link=echo,vlan=5",
            r#"--net net0: vlan = "5": only has a meaning with link = "switch:…""#,
        ),
        (
            "socket=/n,link=switch:s,vlan=4095",
            r#"--net net0: vlan = "4095": not in 1..=4094"#,
        ),
        (
            "socket=/n,link=switch:s,vlan=trunk:9-5",
            "--net net0: vlan = \"trunk:9-5\": \
             expected a VLAN such as 10, or trunk:10+20-30",
        ),
        (
            "socket=/n,link=switch:s,vlan=5,vlan_native=6",
            r#"--net net0: vlan_native = "6": only has a meaning with vlan = "trunk:…""#,
        ),
        (
            "socket=/n,link=switch:s,allow_ip=10.0.0",
            "--net net0: allow_ip = \"10.0.0\": \
             expected addresses such as 10.0.0.7 or fd00::7",
        ),
        (
            "socket=/n,link=switch:s,allow_mac=52:54:00:00:00:01+x",
            "--net net0: allow_mac = \"52:54:00:00:00:01+x\": \
             expected an address such as 52:54:00:12:34:56",
        ),
    ] {
        assert_eq!(load_nets(&[list]).unwrap_err(), message);
    }
    let given = Given {
        cores: Some("0,1".to_owned()),
        ..flags(
            &["socket=/1,link=switch:s,cores=0", "socket=/2,link=switch:s"],
            &[],
        )
    };
    assert_eq!(
        load(&given, &machine()).unwrap_err().to_string(),
        "--net net1: the cores of port net0 of the same switch are others \
         (one worker serves a switch)"
    );
    let ports: Vec<_> = (0..65)
        .map(|at| format!("socket=/{at},link=switch:s"))
        .collect();
    let ports: Vec<_> = ports.iter().map(String::as_str).collect();
    assert_eq!(
        load_nets(&ports).unwrap_err(),
        r#"--net net64: link = "switch:s": a switch has at most 64 ports"#
    );
}

#[test]
fn an_uplink_has_a_host_and_no_socket() {
    let guest = "name=a,socket=/a,link=switch:lan";
    let config = load_nets(&[
        "name=up,link=switch:lan,host=tap:t0,netns=blue,vlan=trunk:1+5,mtu=9000,egress_bits=1G",
        guest,
        "link=switch:lan,host=xdp:eth1",
    ])
    .unwrap();
    assert_eq!((config.nets.len(), config.uplinks.len()), (1, 2));
    let up = &config.uplinks[0];
    assert_eq!((up.name.as_str(), up.switch.as_str()), ("up", "lan"));
    assert_eq!((up.mtu, up.rules.mtu), (Some(9000), Some(9000)));
    assert_eq!(up.rates.egress.size, Some(1_000_000_000));
    let LinkConfig::Tap(tap) = &up.host else {
        panic!("{:?}", up.host);
    };
    assert_eq!(tap.netns.as_deref(), Some("blue"));
    assert_eq!(config.uplinks[1].host, xdp::named("eth1"));
}

#[test]
fn refused_uplinks_name_key_and_value() {
    let guest = "name=a,socket=/a,link=switch:lan";
    for (uplink, message) in [
        (
            "name=up,link=switch:lan,host=tap:t0,socket=/up",
            "--net up: socket = \"/up\": only has a meaning with a guest, a port without host",
        ),
        (
            "name=up,link=switch:lan,host=echo",
            "--net up: host = \"echo\": expected tap:NAME, tap:fd=N, macvtap:NAME or xdp:IFACE",
        ),
        (
            "name=up,link=echo,host=tap:t0",
            "--net up: host = \"tap:t0\": only has a meaning with link = \"switch:…\"",
        ),
        (
            "name=up,link=switch:man,host=tap:t0",
            "--net up: link = \"switch:man\": no guest has a port at this switch",
        ),
        ("name=up,host=tap:t0", "--net up: link is missing"),
    ] {
        assert_eq!(load_nets(&[guest, uplink]).unwrap_err(), message);
    }
    let taken = [
        guest,
        "name=b,socket=/b,link=tap:t0",
        "link=switch:lan,host=tap:t0",
    ];
    assert_eq!(
        load_nets(&taken).unwrap_err(),
        "--net net0: host = \"tap:t0\": already used by net b"
    );
    let many: Vec<String> = (0..64)
        .map(|n| format!("socket=/s{n},link=switch:lan"))
        .collect();
    let mut many: Vec<&str> = many.iter().map(String::as_str).collect();
    many.push("name=up,link=switch:lan,host=tap:t0");
    assert_eq!(
        load_nets(&many).unwrap_err(),
        "--net up: link = \"switch:lan\": a switch has at most 64 ports"
    );
}
