//! What follows the link of a port, and which ports have a link to follow.

use super::*;

#[test]
fn a_session_follows_the_link_where_there_is_one() {
    let follows = |list: &str| net_flags(list).unwrap().nets.remove(0).told.follows;
    assert_eq!(follows("socket=/n,link=tap:t0"), LinkFollows::Off);
    assert_eq!(
        follows("socket=/n,link=tap:t0,link_follows=off"),
        LinkFollows::Off
    );
    for link in [
        "tap:t0",
        "tap:t0,netns=blue",
        "macvtap:m0",
        "xdp:eth1",
        "tap:t0,mode=client",
    ] {
        let list = format!("socket=/n,link={link},link_follows=session");
        assert_eq!(follows(&list), LinkFollows::Session, "{link}");
    }
    let nets = [
        "socket=/1,name=a,link=wire:b,link_follows=session",
        "socket=/2,name=b",
    ];
    let config = load(&flags(&nets, &[]), &machine()).unwrap();
    let both = [0, 1].map(|net| config.nets[net].told.follows);
    assert_eq!(both, [LinkFollows::Session, LinkFollows::Off]);
}

#[test]
fn what_cannot_follow_a_link_is_refused() {
    let only = "only has a meaning with link = \"tap:NAME\", \"macvtap:NAME\", \"xdp:IFACE\" or \
                \"wire:PORT\"";
    for (list, message) in [
        ("socket=/n,link=echo", only),
        ("socket=/n,link=sink", only),
        ("socket=/n,link=switch:s", only),
        ("socket=/n,link=tap:fd=3", only),
        (
            "socket=fd:3,link=tap:t0",
            "only has a meaning with a socket path",
        ),
    ] {
        let error = net_flags(&format!("{list},link_follows=session"))
            .unwrap_err()
            .to_string();
        let wanted = format!("--net net0: link_follows = \"session\": {message}");
        assert_eq!(error, wanted, "{list}");
    }
    assert_eq!(
        net_flags("socket=/n,link=tap:t0,link_follows=yes")
            .unwrap_err()
            .to_string(),
        "--net net0: link_follows = \"yes\": unknown follower \"yes\" (known: off, session)"
    );
    let nets = [
        "socket=/1,name=a,link=wire:b,link_follows=session",
        "socket=/2,name=b,link_follows=session",
    ];
    assert_eq!(
        load(&flags(&nets, &[]), &machine())
            .unwrap_err()
            .to_string(),
        "--net a: link_follows = \"session\": so does that of b, the other end of the wire: no \
         front-end could come first"
    );
}

/// VIRTIO 1.3 §5.1.4.
#[test]
fn speed_and_duplex_are_what_virtio_has_room_for() {
    let told = |list: &str| net_flags(list).map(|config| config.nets[0].told);
    let net = "socket=/n,link=echo";
    let both = told(&format!("{net},speed=40000,duplex=full")).unwrap();
    assert_eq!((both.speed, both.duplex), (Some(40000), Some(Duplex::Full)));
    let half = told(&format!("{net},duplex=half")).unwrap();
    assert_eq!((half.speed, half.duplex), (None, Some(Duplex::Half)));
    for (keys, message) in [
        ("speed=0", "speed = \"0\": not in 1..=2147483647"),
        (
            "speed=2147483648",
            "speed = \"2147483648\": not in 1..=2147483647",
        ),
        (
            "duplex=both",
            "duplex = \"both\": unknown duplex \"both\" (known: half, full)",
        ),
    ] {
        let error = told(&format!("{net},{keys}")).unwrap_err().to_string();
        assert_eq!(error, format!("--net net0: {message}"));
    }
}
