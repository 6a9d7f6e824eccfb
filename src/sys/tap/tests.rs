//! Taps of the running kernel, in a network namespace of the test's own.

use std::process::Command;

use super::*;
use crate::sys::testnet::{in_private_netns, ip};

mod place;

/// What `ip link` says about `name`; `None` when there is no such interface.
fn link(name: &str) -> Option<String> {
    let output = Command::new("ip")
        .args(["-d", "link", "show", name])
        .output()
        .unwrap();
    output
        .status
        .success()
        .then(|| String::from_utf8(output.stdout).unwrap())
}

/// A tap goes with its last descriptor, of which a process that another test is just starting has a
/// copy until it runs its program.
fn wait_until_gone(mut link: impl FnMut() -> Option<String>) {
    let begun = std::time::Instant::now();
    while let Some(text) = link() {
        assert!(begun.elapsed().as_secs() < 10, "still there: {text}");
    }
}

fn error(name: &str, queues: u16) -> String {
    Tap::open(name, queues, None).unwrap_err().to_string()
}

#[test]
fn a_created_tap_is_up_has_its_mtu_and_goes_with_its_last_queue() {
    in_private_netns(|| {
        let tap = Tap::open("new0", 2, Some(9000)).unwrap();
        assert!(tap.is_created());
        let text = link("new0").unwrap();
        for word in [
            "mtu 9000",
            ",UP",
            "multi_queue",
            "vnet_hdr on",
            "numqueues 2",
        ] {
            assert!(text.contains(word), "no `{word}` in {text}");
        }
        assert!(tap.queue(2).is_none());
        let queue = tap.queue(1).unwrap();
        drop(tap);
        assert!(link("new0").is_some());
        drop(queue);
        wait_until_gone(|| link("new0"));
    });
}

#[test]
fn an_existing_tap_is_attached_with_its_own_flags_and_left() {
    in_private_netns(|| {
        ip("tuntap add dev one0 mode tap");
        ip("tuntap add dev many0 mode tap multi_queue");
        for (name, queues) in [("one0", 1), ("many0", 1), ("many0", 4)] {
            let tap = Tap::open(name, queues, None).unwrap();
            assert!(!tap.is_created());
            assert_eq!(tap.queues(), usize::from(queues));
            assert!(!link(name).unwrap().contains(",UP"), "{name} was set up");
        }
        assert!(link("one0").is_some() && link("many0").is_some());
    });
}

#[test]
fn an_existing_tap_stays_as_persistent_as_it_was() {
    in_private_netns(|| {
        ip("tuntap add dev kept0 mode tap multi_queue");
        let lost = new_queue("lost0", true, libc::IFF_TUN_EXCL).unwrap();
        for (name, persist) in [("kept0", "persist on"), ("lost0", "persist off")] {
            let tap = Tap::open(name, 2, None).unwrap();
            assert!(!tap.is_created());
            assert!(link(name).unwrap().contains(persist), "{name}");
            drop(tap);
            assert!(link(name).unwrap().contains(persist), "{name}");
        }
        drop(lost);
        assert!(link("kept0").is_some());
        wait_until_gone(|| link("lost0"));
    });
}

#[test]
fn a_tap_that_is_made_to_stay_stays_and_is_used_again() {
    in_private_netns(|| {
        let open = |persist| {
            let source = TapSource::Name("stays0".into());
            let netns = None;
            let place = TapPlace {
                source,
                netns,
                persist,
            };
            Tap::open_at(&place, 2, None).unwrap()
        };
        let tap = open(true);
        assert!(tap.is_created());
        assert!(link("stays0").unwrap().contains("persist on"));
        drop(tap);
        assert!(link("stays0").unwrap().contains("persist on"));
        // Whoever made it: it is there now, and what is there stays as it is.
        let tap = open(false);
        assert!(!tap.is_created());
        assert_eq!(tap.queues(), 2);
        drop(tap);
        assert!(link("stays0").is_some());
    });
}

#[test]
fn more_queues_than_an_existing_tap_can_have_are_refused() {
    in_private_netns(|| {
        ip("tuntap add dev one0 mode tap");
        let message = error("one0", 3);
        assert!(
            message.contains("`one0`") && message.contains("3 queues"),
            "{message}"
        );
        assert!(message.contains("single queue"), "{message}");
        // In use as well, and still: that is what to be told.
        let _first = Tap::open("one0", 1, None).unwrap();
        assert!(error("one0", 3).contains("single queue"));
    });
}

#[test]
fn a_tap_in_use_is_refused() {
    in_private_netns(|| {
        let _first = Tap::open("one0", 1, None).unwrap();
        let second = Tap::open("one0", 1, None).unwrap_err();
        assert!(matches!(second, TapError::Busy { .. }), "{second}");
        assert!(second.to_string().contains("`one0`"), "{second}");
    });
}

#[test]
fn what_is_not_a_tap_is_refused_by_its_driver() {
    in_private_netns(|| {
        ip("link add veth0 type veth peer name veth1");
        ip("tuntap add dev tun0 mode tun");
        for (name, driver) in [("veth0", "`veth`"), ("tun0", "`tun`"), ("lo", "")] {
            let message = error(name, 1);
            assert!(
                message.contains("not a tap") && message.contains(driver),
                "{message}"
            );
            assert!(message.contains(&format!("`{name}`")), "{message}");
        }
    });
}

#[test]
fn names_that_no_interface_can_have_are_refused_before_the_kernel_sees_them() {
    for name in [
        "",
        "sixteen-letters-",
        "a/b",
        "tap%d",
        "a b",
        "a:b",
        "..",
        "nul\0",
        "\u{3000}xxxxxxxxxxxxx",
    ] {
        let error = Tap::open(name, 1, None).unwrap_err();
        assert!(matches!(error, TapError::Name { .. }), "{name:?}: {error}");
    }
    for queues in [0, 257] {
        let error = Tap::open("tap0", queues, None).unwrap_err();
        assert!(matches!(error, TapError::Queues { .. }), "{error}");
    }
}

#[test]
fn a_user_without_rights_is_told_so() {
    in_private_netns(|| {
        ip("tuntap add dev other0 mode tap user 12345");
        crate::sys::testnet::drop_capabilities();
        let create = Tap::open("new0", 1, None).unwrap_err();
        assert!(matches!(create, TapError::Permission { .. }), "{create}");
        assert!(create.to_string().contains("`new0`"), "{create}");
        let attach = Tap::open("other0", 1, None).unwrap_err();
        assert!(matches!(attach, TapError::Permission { .. }), "{attach}");
        assert!(link("new0").is_none());
    });
}

#[test]
fn detached_queues_can_be_attached_again_and_twice_is_no_error() {
    in_private_netns(|| {
        let tap = Tap::open("many0", 2, None).unwrap();
        for attached in [true, false, false, true, true] {
            tap.set_attached(1, attached).unwrap();
            let count = if attached {
                "numqueues 2"
            } else {
                "numqueues 1"
            };
            let text = link("many0").unwrap();
            assert!(text.contains(count), "no `{count}` in {text}");
        }
        let single = Tap::open("one0", 1, None).unwrap();
        single.set_attached(0, false).unwrap();
        single.set_attached(0, true).unwrap();
    });
}

#[test]
fn a_header_size_of_ours_replaces_what_was_set_before() {
    in_private_netns(|| {
        let first = Tap::open("many0", 2, None).unwrap();
        set_int(&first.fds[0], libc::TUNSETVNETHDRSZ, 20).unwrap();
        drop(first);
        let tap = Tap::open("many0", 2, None).unwrap();
        for fd in &tap.fds {
            let mut bytes: libc::c_int = 0;
            // SAFETY: TUNGETVNETHDRSZ writes one `int`.
            let answer =
                unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut bytes) };
            assert_eq!((answer, bytes), (0, 12));
        }
    });
}
