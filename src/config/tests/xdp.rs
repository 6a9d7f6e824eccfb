//! Interfaces through AF_XDP: by name, and with descriptors that were passed.

use super::*;
use crate::sys::xdp::{PassedFd, PassedXdp, TxCsum, XdpPlace};

/// The interface of this name.
pub(super) fn named(name: &str) -> LinkConfig {
    LinkConfig::Xdp(XdpPlace {
        interface: name.to_owned(),
        passed: None,
        ..XdpPlace::default()
    })
}

fn passed(name: &str, sockets: &[i32], map: Option<i32>) -> LinkConfig {
    LinkConfig::Xdp(XdpPlace {
        interface: name.to_owned(),
        passed: Some(PassedXdp {
            sockets: sockets.iter().copied().map(PassedFd::Number).collect(),
            map: map.map(PassedFd::Number),
        }),
        ..XdpPlace::default()
    })
}

#[test]
fn an_interface_has_a_name_and_may_have_descriptors() {
    let read = |list: &str| {
        let net = net_flags(list).unwrap().nets.remove(0);
        (net.link, net.queues)
    };
    assert_eq!(read("socket=/n,link=xdp:eth1"), (named("eth1"), 1));
    assert_eq!(read("socket=/n,link=xdp:eth1,queues=4"), (named("eth1"), 4));
    let one = passed("eth1", &[5], None);
    assert_eq!(read("socket=/n,link=xdp:eth1:fd=5"), (one, 1));
    let two = passed("eth1", &[6, 5], Some(7));
    assert_eq!(
        read("socket=/n,link=xdp:eth1:fd=6+5:map=7"),
        (two.clone(), 2)
    );
    let given = read("socket=/n,link=xdp:eth1:fd=6+5:map=7,queues=2");
    assert_eq!(given, (two.clone(), 2));
    let LinkConfig::Xdp(place) = two else {
        panic!("another link")
    };
    assert_eq!(place.to_string(), "xdp:eth1:fd=6+5:map=7");
}

#[test]
fn what_no_interface_can_be_is_refused() {
    let fds = "expected file descriptors by number, as in xdp:eth1:fd=5+6:map=7, or by name, as in \
               xdp:eth1:fdname=A+B:mapname=M (the map may be left out)";
    let characters = "only A-Z a-z 0-9 _ . - @ are possible";
    for (link, message) in [
        (
            "xdp:",
            "link kind \"xdp\" needs an argument, as in \"xdp:eth1\"".to_owned(),
        ),
        ("xdp:a/b", format!("has '/', {characters}")),
        ("xdp:fd=5", format!("has '=', {characters}")),
        ("xdp::fd=5", "must not be empty".to_owned()),
        ("xdp:e:", fds.to_owned()),
        ("xdp:e:5", fds.to_owned()),
        ("xdp:e:fd=", fds.to_owned()),
        ("xdp:e:fd=x", fds.to_owned()),
        ("xdp:e:fd=5:", fds.to_owned()),
        ("xdp:e:fd=5:map=", fds.to_owned()),
        ("xdp:e:fd=5:map=6+7", fds.to_owned()),
        ("xdp:e:fd=5:map=6:map=7", fds.to_owned()),
        ("xdp:e:fd=2", "not in 3..=2147483647".to_owned()),
        ("xdp:e:fd=5:map=1", "not in 3..=2147483647".to_owned()),
        (
            "xdp:e:fd=5+5",
            "expected each descriptor once, 5 is there twice".to_owned(),
        ),
        (
            "xdp:e:fd=5+6:map=6",
            "expected each descriptor once, 6 is there twice".to_owned(),
        ),
    ] {
        let error = net_flags(&format!("socket=/n,link={link}")).unwrap_err();
        let expected = format!("--net net0: link = \"{link}\": {message}");
        assert_eq!(error.to_string(), expected);
    }
    let error = net_flags("socket=/n,link=xdp:e:fd=5+6,queues=1").unwrap_err();
    let message = "--net net0: queues = \"1\": the link has 2 file descriptors, one for each queue \
                   pair";
    assert_eq!(error.to_string(), message);
}

#[test]
fn descriptors_may_have_names() {
    let read = |link: &str| {
        let net = net_flags(&format!("socket=/n,link={link}"));
        let net = net.map_err(|error| error.to_string())?.nets.remove(0);
        match net.link {
            LinkConfig::Xdp(place) => Ok::<_, String>((place, net.queues)),
            other => panic!("{other:?}"),
        }
    };
    let name = |name: &str| PassedFd::Name(name.to_owned());
    let (place, queues) = read("xdp:e:fdname=q0+q1:mapname=the map").unwrap();
    let passed = place.passed.clone().unwrap();
    assert_eq!(passed.sockets, [name("q0"), name("q1")]);
    assert_eq!((passed.map, queues), (Some(name("the map")), 2));
    assert_eq!(place.to_string(), "xdp:e:fdname=q0+q1:mapname=the map");
    let passed = read("xdp:e:fdname=7:map=7").unwrap().0.passed.unwrap();
    assert_eq!(passed.sockets, [name("7")]);
    assert_eq!(passed.map, Some(PassedFd::Number(7)));
    let fds = "expected file descriptors by number, as in xdp:eth1:fd=5+6:map=7, or by name, as in \
               xdp:eth1:fdname=A+B:mapname=M (the map may be left out)";
    let twice = "expected each descriptor once, a is there twice";
    let characters = "only printable ASCII characters except the colon are possible";
    for (link, message) in [
        ("xdp:e:fdname=", "must not be empty"),
        ("xdp:e:fdname=a+", "must not be empty"),
        ("xdp:e:fdname=a:mapname=", "must not be empty"),
        ("xdp:e:fdname=a+a", twice),
        ("xdp:e:fdname=a:mapname=a", twice),
        ("xdp:e:fdname=a:mapname=b+c", fds),
        ("xdp:e:fdname=a:fdname=b", fds),
        ("xdp:e:name=a", fds),
        ("xdp:e:fdname=a:b", fds),
        (
            "xdp:e:fdname=\u{e9}",
            &format!("has '\u{e9}', {characters}"),
        ),
        (
            "xdp:e:fdname=a:mapname=b:c",
            &format!("has ':', {characters}"),
        ),
    ] {
        let expected = format!("--net net0: link = \"{link}\": {message}");
        assert_eq!(read(link).unwrap_err(), expected);
    }
    let lists = [
        "socket=/1,link=xdp:a:fdname=x",
        "socket=/2,link=xdp:b:fd=5:mapname=x",
    ];
    let error = load(&flags(&lists, &[]), &machine()).unwrap_err();
    let message = "--net net1: link = \"xdp:b:fd=5:mapname=x\": already used by net net0";
    assert_eq!(error.to_string(), message);
}

#[test]
fn a_descriptor_is_that_of_one_port_and_an_uplink_has_one() {
    let load = |lists: [&str; 2]| load(&flags(&lists, &[]), &machine()).map_err(|e| e.to_string());
    for (lists, message) in [
        (
            [
                "socket=/1,link=xdp:a:fd=5+6",
                "socket=/2,link=xdp:b:fd=7:map=6",
            ],
            "link = \"xdp:b:fd=7:map=6\": already used by net net0",
        ),
        (
            ["socket=/1,link=tap:fd=5", "socket=/2,link=xdp:b:fd=5"],
            "link = \"xdp:b:fd=5\": already used by net net0",
        ),
        (
            ["socket=/1,link=xdp:a:fd=5", "socket=/2,link=xdp:a"],
            "link = \"xdp:a\": already used by net net0",
        ),
        (
            ["socket=/1,link=switch:s", "link=switch:s,host=xdp:a:fd=5+6"],
            "host = \"xdp:a:fd=5+6\": expected one socket, as an uplink has one queue",
        ),
    ] {
        assert_eq!(load(lists).unwrap_err(), format!("--net net1: {message}"));
    }
    let uplink = [
        "socket=/1,link=switch:s",
        "link=switch:s,host=xdp:a:fd=5:map=6",
    ];
    let host = load(uplink).unwrap().uplinks.remove(0).host;
    assert_eq!(host, passed("a", &[5], Some(6)));
}

#[test]
fn an_interface_is_polled_busily_when_asked() {
    let busy = |link: LinkConfig| match link {
        LinkConfig::Xdp(place) => place.busy_poll,
        other => panic!("{other:?}"),
    };
    let read = |list: &str| busy(net_flags(list).unwrap().nets.remove(0).link);
    assert_eq!(read("socket=/n,link=xdp:e,busy_poll=20"), 20);
    assert_eq!(read("socket=/n,link=xdp:e:fd=5,busy_poll=10000"), 10_000);
    assert_eq!(read("socket=/n,link=xdp:e,busy_poll=0"), 0);
    let lists = [
        "socket=/1,link=switch:s",
        "link=switch:s,host=xdp:a,busy_poll=7",
    ];
    let mut config = load(&flags(&lists, &[]), &machine()).unwrap();
    assert_eq!(busy(config.uplinks.remove(0).host), 7);
    for (list, message) in [
        ("link=xdp:e,busy_poll=10001", "\"10001\": not in 0..=10000"),
        (
            "link=tap:t,busy_poll=20",
            "\"20\": only has a meaning with link = \"xdp:IFACE\"",
        ),
    ] {
        let error = net_flags(&format!("socket=/n,{list}")).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("--net net0: busy_poll = {message}")
        );
    }
    let helper = |busy_poll: &str| HelperGiven {
        links: vec!["xdp:a:fd=5".to_owned()],
        busy_poll: Some(busy_poll.to_owned()),
        ..HelperGiven::default()
    };
    assert_eq!(helper("20").places().unwrap()[0].busy_poll, 20);
    let error = helper("10001").places().unwrap_err();
    assert_eq!(error.to_string(), "--busy-poll \"10001\": not in 0..=10000");
}

#[test]
fn an_interface_makes_checksums_or_not() {
    let csum = |link: LinkConfig| match link {
        LinkConfig::Xdp(place) => place.tx_csum,
        other => panic!("{other:?}"),
    };
    let read = |list: &str| csum(net_flags(list).unwrap().nets.remove(0).link);
    assert_eq!(read("socket=/n,link=xdp:e"), TxCsum::Auto);
    assert_eq!(read("socket=/n,link=xdp:e,tx_csum=auto"), TxCsum::Auto);
    let both = "socket=/n,link=xdp:e:fd=5,tx_csum=offload,busy_poll=3";
    assert_eq!(read(both), TxCsum::Offload);
    let lists = [
        "socket=/1,link=switch:s",
        "link=switch:s,host=xdp:a,tx_csum=software",
    ];
    let mut config = load(&flags(&lists, &[]), &machine()).unwrap();
    assert_eq!(csum(config.uplinks.remove(0).host), TxCsum::Software);
    for (list, message) in [
        (
            "link=xdp:e,tx_csum=on",
            "\"on\": unknown maker of checksums \"on\" (known: auto, offload, software)",
        ),
        (
            "link=tap:t,tx_csum=auto",
            "\"auto\": only has a meaning with link = \"xdp:IFACE\"",
        ),
    ] {
        let error = net_flags(&format!("socket=/n,{list}")).unwrap_err();
        let expected = format!("--net net0: tx_csum = {message}");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn the_helper_is_given_links_with_descriptors() {
    let places = |links: &[&str]| {
        let given = HelperGiven {
            links: links.iter().map(ToString::to_string).collect(),
            ..HelperGiven::default()
        };
        given.places().map_err(|error| error.to_string())
    };
    let both = places(&["xdp:a:fd=5+6:map=7", "xdp:b:fd=8"]).unwrap();
    let both: Vec<_> = both.into_iter().map(LinkConfig::Xdp).collect();
    let expected = [passed("a", &[5, 6], Some(7)), passed("b", &[8], None)];
    assert_eq!(both, expected);
    let wrong = "expected a link such as xdp:eth1:fd=5+6:map=7";
    for (links, message) in [
        (&["tap:fd=5"][..], format!("\"tap:fd=5\": {wrong}")),
        (&["xdp:a"], format!("\"xdp:a\": {wrong}")),
        (&["xdp:a:fdname=x"], format!("\"xdp:a:fdname=x\": {wrong}")),
        (
            &["xdp:a:fd=5:mapname=x"],
            format!("\"xdp:a:fd=5:mapname=x\": {wrong}"),
        ),
        (
            &["xdp:a:fd=2"],
            "\"xdp:a:fd=2\": not in 3..=2147483647".to_owned(),
        ),
        (
            &["xdp:a:fd=5", "xdp:b:fd=6:map=5"],
            "\"xdp:b:fd=6:map=5\": already used by xdp:a:fd=5".to_owned(),
        ),
        (
            &["xdp:a:fd=5", "xdp:a:fd=6"],
            "\"xdp:a:fd=6\": already used by xdp:a:fd=5".to_owned(),
        ),
    ] {
        assert_eq!(places(links).unwrap_err(), format!("--link {message}"));
    }
}
