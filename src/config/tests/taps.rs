//! Taps: by name, by descriptor, macvtaps, and in which namespace.

use super::*;
use crate::sys::tap::{TapPlace, TapSource};

fn place(source: TapSource, netns: Option<&str>) -> LinkConfig {
    LinkConfig::Tap(TapPlace {
        source,
        netns: netns.map(ToOwned::to_owned),
        persist: false,
    })
}

/// The tap of this name in our own namespace.
pub(super) fn named(name: &str) -> LinkConfig {
    place(TapSource::Name(name.to_owned()), None)
}

#[test]
fn every_kind_of_tap_is_told_apart() {
    let read = |list: &str| {
        let net = net_flags(list).unwrap().nets.remove(0);
        (net.link, net.queues)
    };
    let tap0 = || TapSource::Name("tap0".to_owned());
    let mv0 = || TapSource::Macvtap("mv0".to_owned());
    assert_eq!(read("socket=/n,link=tap:tap0"), (named("tap0"), 16));
    let blue = place(tap0(), Some("blue"));
    assert_eq!(read("socket=/n,link=tap:tap0,netns=blue"), (blue, 16));
    let path = place(tap0(), Some("/proc/1/ns/net"));
    assert_eq!(
        read("socket=/n,link=tap:tap0,netns=/proc/1/ns/net"),
        (path, 16)
    );
    assert_eq!(
        read("socket=/n,link=macvtap:mv0,queues=1"),
        (place(mv0(), None), 1)
    );
    let LinkConfig::Tap(place_of_tap0) = named("tap0") else {
        unreachable!("it is a tap");
    };
    let stays = LinkConfig::Tap(TapPlace {
        persist: true,
        ..place_of_tap0
    });
    assert_eq!(read("socket=/n,link=tap:tap0,persist=true"), (stays, 16));
    let both = place(mv0(), Some("blue"));
    assert_eq!(read("socket=/n,link=macvtap:mv0,netns=blue"), (both, 16));
    // As many queues as descriptors.
    let fds = |fds: &[i32]| place(TapSource::Fds(fds.to_vec()), None);
    assert_eq!(read("socket=/n,link=tap:fd=3"), (fds(&[3]), 1));
    assert_eq!(read("socket=/n,link=tap:fd=7+3+5"), (fds(&[7, 3, 5]), 3));
    assert_eq!(
        read("socket=/n,link=tap:fd=7+3,queues=2"),
        (fds(&[7, 3]), 2)
    );
}

#[test]
fn what_no_tap_can_be_is_refused() {
    let only = "only has a meaning with link = \"tap:NAME\" or \"macvtap:NAME\"";
    let name = "expected the name of a network namespace, or a path";
    let fds = "expected fd= and numbers of file descriptors, as in tap:fd=3+4";
    for (list, message) in [
        ("link=tap:fd=", format!("link = \"tap:fd=\": {fds}")),
        ("link=tap:fd=x", format!("link = \"tap:fd=x\": {fds}")),
        ("link=tap:fd=3+", format!("link = \"tap:fd=3+\": {fds}")),
        (
            "link=tap:fd=2",
            "link = \"tap:fd=2\": not in 3..=2147483647".to_owned(),
        ),
        (
            "link=tap:fd=4+4",
            "link = \"tap:fd=4+4\": expected each descriptor once, 4 is there twice".to_owned(),
        ),
        (
            "link=tap:fd=3+4,queues=3",
            "queues = \"3\": the link has 2 file descriptors, one for each queue pair".to_owned(),
        ),
        (
            "link=macvtap:",
            "link = \"macvtap:\": link kind \"macvtap\" needs an argument, as in \
             \"macvtap:macvtap0\""
                .to_owned(),
        ),
        (
            "link=macvtap:a/b",
            "link = \"macvtap:a/b\": has '/', only A-Z a-z 0-9 _ . - @ are possible".to_owned(),
        ),
        ("link=echo,netns=blue", format!("netns = \"blue\": {only}")),
        (
            "link=tap:fd=3,netns=blue",
            format!("netns = \"blue\": {only}"),
        ),
        ("link=tap:t,netns=a/b", format!("netns = \"a/b\": {name}")),
        ("link=tap:t,netns=..", format!("netns = \"..\": {name}")),
        (
            "link=macvtap:t,persist=true",
            "persist = \"true\": only has a meaning with link = \"tap:NAME\"".to_owned(),
        ),
    ] {
        let error = net_flags(&format!("socket=/n,{list}")).unwrap_err();
        assert_eq!(error.to_string(), format!("--net net0: {message}"));
    }
}

#[test]
fn one_tap_is_one_port_in_each_namespace() {
    let load = |lists: [&str; 2]| load(&flags(&lists, &[]), &machine()).map_err(|e| e.to_string());
    let apart = [
        "socket=/1,link=tap:t,netns=a",
        "socket=/2,link=tap:t,netns=b",
    ];
    assert_eq!(load(apart).unwrap().nets.len(), 2);
    for (lists, link) in [
        (
            [
                "socket=/1,link=tap:t,netns=a",
                "socket=/2,link=tap:t,netns=a",
            ],
            "tap:t",
        ),
        (
            ["socket=/1,link=macvtap:m", "socket=/2,link=macvtap:m"],
            "macvtap:m",
        ),
        (["socket=/1,link=tap:i", "socket=/2,link=xdp:i"], "xdp:i"),
        (
            ["socket=/1,link=xdp:i", "socket=/2,link=macvtap:i"],
            "macvtap:i",
        ),
        (
            ["socket=/1,link=tap:fd=3+4", "socket=/2,link=tap:fd=5+3"],
            "tap:fd=5+3",
        ),
    ] {
        let message = format!("--net net1: link = \"{link}\": already used by net net0");
        assert_eq!(load(lists).unwrap_err(), message);
    }
}
