//! Frames through a switch without rings: which ports get them, and in which form.

use std::sync::Arc;

use super::super::net::{Cast, FrameBurst, VnetHeader};
use super::*;
use crate::memory::{Access, GuestRam};

mod undone;

const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
const ALL: [u8; 6] = [0xff; 6];

fn ethernet(to: [u8; 6], from: [u8; 6], vlan: Option<u16>, payload: usize) -> Vec<u8> {
    let mut bytes = [to, from].concat();
    if let Some(vlan) = vlan {
        bytes.extend([0x81, 0]);
        bytes.extend(vlan.to_be_bytes());
    }
    bytes.extend([0x08, 0x00]);
    bytes.extend((0..payload).map(|at| (at * 7).to_le_bytes()[0]));
    bytes
}

/// A switch and what it was given.
struct Bench {
    switch: Switch,
    ram: Arc<GuestRam>,
    ways: Ways,
    /// What ports were not given of the last frame.
    refused: Vec<(u16, DropReason)>,
    now: u32,
}

impl Bench {
    fn new(ports: Vec<PortRules>) -> Bench {
        Bench {
            ways: Ways::new(ports.len()),
            refused: Vec::new(),
            switch: Switch::new(ports, AGEING),
            ram: GuestRam::for_test(&[(0, 1 << 20)]),
            now: 1,
        }
    }

    /// What each port gets of one frame, cut after `cut` bytes; or why it is dropped.
    fn send(
        &mut self,
        port: u16,
        bytes: &[u8],
        cut: u32,
    ) -> Result<Vec<(u16, Vec<u8>)>, DropReason> {
        let mut burst = FrameBurst::new();
        let len = u32::try_from(bytes.len()).unwrap();
        let cut = cut.min(len);
        for (at, len) in [(0, cut), (0x8000, len - cut)] {
            if len > 0 {
                let segments = &mut burst.segments;
                self.ram
                    .translate(at, len, Access::Write, segments)
                    .unwrap();
            }
        }
        copy::write(burst.segments.as_slice(), 0, bytes);
        burst.frames.push(Frame {
            header: VnetHeader {
                flags: 1,
                csum_start: 34,
                csum_offset: 6,
                hdr_len: 54,
                ..VnetHeader::PLAIN
            },
            first: 0,
            count: u32::try_from(burst.segments.len()).unwrap(),
            bytes: len,
            verdict: Verdict::Retry,
            cast: Cast::Unicast,
        });
        let FrameBurst {
            frames, segments, ..
        } = &mut burst;
        self.switch
            .route(port, self.now, frames, segments, &mut self.ways);
        if let Verdict::Dropped(reason) = frames[0].verdict {
            assert_eq!((self.ways.ports, self.ways.whole), (0, None));
            return Err(reason);
        }
        let mut given = Vec::new();
        if let Some(port) = self.ways.whole {
            assert_eq!((self.ways.ports, frames[0].verdict), (0, Verdict::Retry));
            given.push((port, frames[0]));
        }
        self.refused.clear();
        for port in 0..self.switch.ports() {
            let is_refused = self.ways.is_refused(port);
            let share = self.ways.share(port);
            assert_eq!(share.len(), usize::from(!share.is_empty()));
            for &frame in &*share {
                let port = u16::try_from(port).unwrap();
                match frame.verdict {
                    Verdict::Dropped(reason) => self.refused.push((port, reason)),
                    _ => given.push((port, frame)),
                }
            }
            assert_eq!(
                is_refused,
                self.refused.iter().any(|(to, _)| usize::from(*to) == port)
            );
            assert_eq!(share.is_empty(), self.ways.ports & 1 << port == 0);
        }
        let got = |(port, frame): (u16, Frame)| {
            let mut got = vec![0; frame.bytes as usize];
            assert_eq!(copy::read(frame.payload(segments), 0, &mut got), got.len());
            // The checksum begins where it began: after what was put in or taken out.
            let moved = i64::from(frame.header.csum_start) - 34;
            assert_eq!(
                moved,
                i64::try_from(got.len()).unwrap() - i64::try_from(bytes.len()).unwrap()
            );
            assert_eq!(frame.verdict, Verdict::Retry);
            (port, got)
        };
        Ok(given.into_iter().map(got).collect())
    }

    fn ports(&mut self, port: u16, bytes: &[u8]) -> Result<Vec<u16>, DropReason> {
        let got = self.send(port, bytes, u32::MAX)?;
        Ok(got.into_iter().map(|(port, _)| port).collect())
    }
}

fn access(vlan: u16) -> PortRules {
    PortRules {
        vlan: VlanMode::Access(vlan),
        ..PortRules::default()
    }
}

fn trunk(vlans: &[u16], native: Option<u16>) -> PortRules {
    let mut allowed = VlanSet::new();
    vlans.iter().for_each(|&vlan| allowed.insert(vlan));
    PortRules {
        vlan: VlanMode::Trunk { allowed, native },
        ..PortRules::default()
    }
}

#[test]
fn it_floods_learns_and_forgets() {
    let mut bench = Bench::new(vec![PortRules::default(); 3]);
    let hello = ethernet(B, A, None, 50);
    assert_eq!(bench.ports(0, &hello), Ok(vec![1, 2]), "B is not known");
    let answer = ethernet(A, B, None, 50);
    assert_eq!(bench.ports(2, &answer), Ok(vec![0]), "A was seen");
    assert_eq!(bench.ports(0, &hello), Ok(vec![2]));
    assert_eq!(
        bench.ports(2, &hello),
        Err(DropReason::NoPort),
        "B is on the port it came from; A moves here"
    );
    assert_eq!(
        bench.ports(1, &ethernet(ALL, B, None, 50)),
        Ok(vec![0, 2]),
        "B moves"
    );
    assert_eq!(bench.ports(0, &hello), Ok(vec![1]));
    bench.now += 300;
    assert_eq!(
        bench.ports(0, &hello),
        Ok(vec![1, 2]),
        "B was not seen for long"
    );
    assert_eq!(bench.ports(0, &[0; 13]), Err(DropReason::BadFrame));
}

#[test]
fn stations_are_forgotten_after_the_ageing_time_of_their_switch() {
    let mut ports = vec![PortRules::default(); 3];
    ports[2].stations.push([2, 0, 0, 0, 0, 0xc]);
    let mut bench = Bench::new(ports.clone());
    bench.switch = Switch::new(ports, 10);
    let to_a = ethernet(A, B, None, 50);
    assert_eq!(bench.ports(1, &ethernet(ALL, A, None, 50)), Ok(vec![0, 2]));
    bench.now += 9;
    assert_eq!(bench.ports(0, &to_a), Ok(vec![1]), "nearly too long ago");
    bench.now += 1;
    assert_eq!(
        bench.ports(0, &to_a),
        Ok(vec![1, 2]),
        "A was not seen for 10 s"
    );
    assert_eq!(
        bench.ports(1, &ethernet(B, A, None, 50)),
        Ok(vec![0]),
        "B was"
    );
    // Who goes on sending stays known, and who is there for good does.
    for _ in 0..30 {
        bench.now += 1;
        assert_eq!(bench.ports(0, &to_a), Ok(vec![1]));
        assert_eq!(bench.ports(1, &ethernet(B, A, None, 50)), Ok(vec![0]));
    }
    let fixed = ethernet([2, 0, 0, 0, 0, 0xc], A, None, 50);
    assert_eq!(bench.ports(1, &fixed), Ok(vec![2]));
}

#[test]
fn tags_are_put_in_and_taken_out_wherever_the_frame_is_cut() {
    let mut bench = Bench::new(vec![access(10), access(10), trunk(&[10, 20], None)]);
    let (plain, tagged) = (ethernet(ALL, A, None, 80), ethernet(ALL, B, Some(10), 80));
    for cut in 0..40 {
        let got = bench.send(0, &plain, cut).unwrap();
        assert_eq!(
            got,
            [(1, plain.clone()), (2, ethernet(ALL, A, Some(10), 80))],
            "cut {cut}"
        );
        let got = bench.send(2, &tagged, cut).unwrap();
        let out = ethernet(ALL, B, None, 80);
        assert_eq!(got, [(0, out.clone()), (1, out)], "cut {cut}");
    }
}

/// Every VLAN at every port: a frame comes out where its VLAN is, in that port's form, and nowhere
/// else.
#[test]
fn no_vlan_leaks_into_another() {
    let rules = [
        access(10),
        access(20),
        trunk(&[10, 20], None),
        trunk(&[20, 30], Some(10)),
        trunk(&[30], None),
    ];
    for from in 0..rules.len() {
        for tag in [
            None,
            Some(0),
            Some(10),
            Some(20),
            Some(30),
            Some(40),
            Some(4095),
        ] {
            for to in [ALL, B] {
                let mut bench = Bench::new(rules.to_vec());
                let bytes = ethernet(to, A, tag, 46);
                let vlan = rules[from].vlan.ingress(tag);
                let got = bench.send(u16::try_from(from).unwrap(), &bytes, 20);
                let Some(vlan) = vlan else {
                    assert_eq!(got, Err(DropReason::Vlan));
                    continue;
                };
                let mut want = Vec::new();
                for (port, other) in (0..).zip(&rules) {
                    if usize::from(port) != from
                        && let Some(tagged) = other.vlan.egress(vlan)
                    {
                        // A frame with a priority and no VLAN keeps its form among ports without
                        // tags, and is given its VLAN where there are tags.
                        let tag = match (tagged, tag) {
                            (true, _) => Some(vlan),
                            (false, _) => None,
                        };
                        want.push((port, ethernet(to, A, tag, 46)));
                    }
                }
                assert_eq!(got.unwrap(), want, "from {from}, tag {tag:?}");
            }
        }
    }
}

#[test]
fn isolated_ports_reach_only_the_others() {
    let isolated = PortRules {
        isolated: true,
        ..PortRules::default()
    };
    let mut bench = Bench::new(vec![isolated.clone(), isolated, PortRules::default()]);
    assert_eq!(bench.ports(0, &ethernet(ALL, A, None, 50)), Ok(vec![2]));
    assert_eq!(bench.refused, [(1, DropReason::Isolated)]);
    assert_eq!(
        bench.ports(1, &ethernet(A, B, None, 50)),
        Err(DropReason::Isolated)
    );
    assert_eq!(bench.ports(2, &ethernet(A, B, None, 50)), Ok(vec![0]));
}

#[test]
fn floods_have_a_limit_and_known_stations_none() {
    let mut ports = vec![PortRules::default(); 2];
    ports[0].flood_limit = Some(3);
    ports[1].stations = vec![B];
    let mut bench = Bench::new(ports);
    let broadcast = ethernet(ALL, A, None, 50);
    for _ in 0..2 {
        for _ in 0..3 {
            assert_eq!(bench.ports(0, &broadcast), Ok(vec![1]));
        }
        assert_eq!(bench.ports(0, &broadcast), Err(DropReason::Storm));
        assert_eq!(bench.ports(0, &ethernet(B, A, None, 50)), Ok(vec![1]));
        bench.now += 1;
    }
}

#[test]
fn a_port_is_given_nothing_longer_than_its_mtu() {
    let mut ports = vec![PortRules::default(); 3];
    ports[1].mtu = Some(1500);
    let mut bench = Bench::new(ports);
    assert_eq!(
        bench.ports(0, &ethernet(ALL, A, None, 1500)),
        Ok(vec![1, 2])
    );
    assert_eq!(bench.ports(0, &ethernet(ALL, A, None, 1501)), Ok(vec![2]));
    assert_eq!(bench.refused, [(1, DropReason::Mtu)]);
    bench.ports(1, &ethernet(ALL, B, None, 50)).unwrap();
    assert_eq!(
        bench.ports(0, &ethernet(B, A, None, 1501)),
        Err(DropReason::Mtu)
    );
}

#[test]
fn who_claims_another_address_is_not_heard() {
    let mut ports = vec![PortRules::default(); 2];
    ports[0].filter.mac = vec![A];
    let mut bench = Bench::new(ports);
    assert_eq!(
        bench.ports(0, &ethernet(ALL, B, None, 50)),
        Err(DropReason::Spoofed)
    );
    let own = ethernet(ALL, A, None, 50);
    assert_eq!(bench.ports(0, &own[..13]), Err(DropReason::BadFrame));
    assert_eq!(bench.ports(0, &own[..14]), Ok(vec![1]));
    assert_eq!(
        bench.ports(1, &ethernet(B, A, None, 50)),
        Ok(vec![0]),
        "B was not learned"
    );
}

/// Frames of one burst, each 128 bytes after the one before.
fn burst(bench: &Bench, frames: &[Vec<u8>]) -> FrameBurst {
    let mut burst = FrameBurst::new();
    for (at, bytes) in (0..).step_by(128).zip(frames) {
        let len = u32::try_from(bytes.len()).unwrap();
        let first = u32::try_from(burst.segments.len()).unwrap();
        let segments = &mut burst.segments;
        bench
            .ram
            .translate(at, len, Access::Write, segments)
            .unwrap();
        copy::write(&segments.as_slice()[first as usize..], 0, bytes);
        burst.frames.push(Frame {
            header: VnetHeader::PLAIN,
            first,
            count: 1,
            bytes: len,
            verdict: Verdict::Retry,
            cast: Cast::Unicast,
        });
    }
    burst
}

/// What the ports are given of a burst.
fn given(bench: &mut Bench, burst: &FrameBurst) -> Vec<(u16, Vec<u8>)> {
    let mut all = Vec::new();
    for port in 0..u16::try_from(bench.switch.ports()).unwrap() {
        let share = match bench.ways.whole {
            Some(whole) if whole == port => &burst.frames[..],
            _ => bench.ways.share(port.into()),
        };
        let is_given = |frame: &&Frame| !matches!(frame.verdict, Verdict::Dropped(_));
        for frame in (*share).iter().filter(is_given) {
            let mut got = vec![0; frame.bytes as usize];
            copy::read(frame.payload(&burst.segments), 0, &mut got);
            all.push((port, got));
        }
    }
    all
}

/// A burst is given out as its frames are one by one, whether they all go the same way or the ways
/// part at the first, in the middle or at the last.
#[test]
fn a_burst_goes_where_its_frames_go() {
    let to_b = ethernet(B, A, None, 50);
    let others = [
        ethernet(B, [2, 0, 0, 0, 0, 0xc], None, 46),
        ethernet([2, 0, 0, 0, 0, 0xd], A, None, 46),
        ethernet(ALL, A, None, 46),
        ethernet([2, 0, 0, 0, 0, 0xe], A, None, 46),
        ethernet(B, A, Some(9), 46),
        ethernet(A, A, None, 46),
        vec![1; 13],
    ];
    let prepared = || {
        let mut bench = Bench::new(vec![access(1), access(1), access(1)]);
        bench
            .send(1, &ethernet(ALL, B, None, 46), u32::MAX)
            .unwrap();
        let d = [2, 0, 0, 0, 0, 0xd];
        bench
            .send(2, &ethernet(ALL, d, None, 46), u32::MAX)
            .unwrap();
        bench
            .send(0, &ethernet(ALL, A, None, 46), u32::MAX)
            .unwrap();
        bench
    };
    let mut whole = 0;
    for other in &others {
        for place in 0..20 {
            let mut frames = vec![to_b.clone(); 20];
            frames[place] = other.clone();
            let mut bench = prepared();
            let mut wanted = Vec::new();
            for frame in &frames {
                wanted.extend(bench.send(0, frame, u32::MAX).unwrap_or_default());
            }
            wanted.sort_by_key(|(port, _)| *port);
            let mut bench = prepared();
            let mut burst = burst(&bench, &frames);
            let FrameBurst {
                frames, segments, ..
            } = &mut burst;
            bench.switch.route(0, 1, frames, segments, &mut bench.ways);
            whole += usize::from(bench.ways.whole.is_some());
            assert_eq!(given(&mut bench, &burst), wanted, "{other:x?} at {place}");
        }
    }
    assert_eq!(whole, 20, "all go to B where only the sender differs");
}

/// A sender that writes over its frame after it was looked at changes nothing of what decided.
#[test]
fn what_was_looked_at_is_what_is_given() {
    let own = PortRules {
        filter: Filter {
            mac: vec![A],
            ip: vec![],
        },
        ..access(1)
    };
    for (from, to, tag) in [
        (own, access(1), None),
        (trunk(&[10], None), trunk(&[10, 20], None), Some(10)),
        (access(5), trunk(&[5, 20], None), None),
        (access(5), trunk(&[20], Some(5)), None),
    ] {
        for station in [B, ALL] {
            let mut bench = Bench::new(vec![from.clone(), to.clone()]);
            let vlan = tag.or(Some(5).filter(
                |_| matches!(&to.vlan, VlanMode::Trunk { native, .. } if native.is_none()),
            ));
            bench
                .send(1, &ethernet(ALL, B, vlan, 46), u32::MAX)
                .unwrap();
            let sent = ethernet(station, A, tag, 50);
            let mut burst = burst(&bench, &vec![sent.clone(); 3]);
            let FrameBurst {
                frames, segments, ..
            } = &mut burst;
            bench.switch.route(0, 1, frames, segments, &mut bench.ways);
            // The guest changes its mind: another's address, and VLAN 20.
            for at in [0, 128, 256] {
                let mut there = Segments::with_capacity(1);
                bench
                    .ram
                    .translate(at, 18, Access::Write, &mut there)
                    .unwrap();
                let lie = [&[2, 0, 0, 0, 0, 0x66].repeat(2)[..], &[0x81, 0, 0, 20]].concat();
                copy::write(there.as_slice(), 0, &lie);
            }
            let got = given(&mut bench, &burst);
            assert_eq!(got.len(), 3);
            for (port, got) in got {
                assert_eq!((port, &got[..12]), (1, &sent[..12]));
                let tagged = got[12..14] == [0x81, 0];
                assert_eq!(
                    tagged,
                    to.vlan.egress(tag.unwrap_or(match from.vlan {
                        VlanMode::Access(vlan) => vlan,
                        VlanMode::Trunk { .. } => 0,
                    })) == Some(true)
                );
                assert!(!tagged || got[15] != 20, "VLAN 20 was never allowed");
            }
        }
    }
}

/// Who sends from many addresses sees nothing of what others send each other.
#[test]
fn what_is_for_a_station_stays_private_whoever_sends_from_many_addresses() {
    const C: [u8; 6] = [2, 0, 0, 0, 0, 0xc];
    let mut bench = Bench::new(vec![access(1), access(1), access(1)]);
    let talk = |bench: &mut Bench| {
        let to_b = bench.ports(2, &ethernet(B, C, None, 46));
        let to_c = bench.ports(1, &ethernet(C, B, None, 46));
        [to_b, to_c]
    };
    talk(&mut bench)[1].clone().unwrap();
    for number in 0..100_000u32 {
        let [a, b, c, d] = number.to_be_bytes();
        let sent = ethernet(B, [6, 1, a, b, c, d], None, 46);
        assert_eq!(bench.ports(0, &sent), Ok(vec![1]), "after {number}");
        if number % 25_000 == 24_999 {
            bench.now += 3;
            assert_eq!(
                talk(&mut bench),
                [Ok(vec![1]), Ok(vec![2])],
                "after {number}"
            );
        }
    }
}

#[test]
fn a_second_tag_never_becomes_the_first() {
    let mut bench = Bench::new(vec![
        access(10),
        access(10),
        trunk(&[10, 20], None),
        trunk(&[20], Some(10)),
    ]);
    for inner in [[0x81, 0x00], [0x88, 0xa8]] {
        // VLAN 20 hidden behind a tag that is taken out at an access port or for a native VLAN.
        let hide = |outer: u16| {
            let mut bytes = ethernet(ALL, A, Some(outer), 60);
            bytes[16..18].copy_from_slice(&inner);
            bytes[18..20].copy_from_slice(&20_u16.to_be_bytes());
            bytes
        };
        assert_eq!(bench.ports(0, &hide(0)), Ok(vec![2]), "a priority first");
        assert_eq!(bench.ports(2, &hide(10)), Ok(vec![]));
        assert_eq!(
            bench.refused,
            [0, 1, 3].map(|port| (port, DropReason::Vlan))
        );
        assert_eq!(bench.ports(2, &hide(20)), Ok(vec![3]), "both tags stay");
        // A station that was learned is no way round it.
        bench.send(3, &ethernet(ALL, B, None, 60), 64).unwrap();
        let mut known = hide(10);
        known[..6].copy_from_slice(&B);
        assert_eq!(bench.ports(2, &known), Err(DropReason::Vlan));
    }
    for len in 14..18 {
        let cut = &ethernet(ALL, A, Some(0), 60)[..len];
        assert_eq!(bench.ports(0, cut), Err(DropReason::BadFrame), "{len}");
    }
}

#[test]
fn the_priority_of_a_tag_stays() {
    let mut bench = Bench::new(vec![access(10), trunk(&[10], None)]);
    for (tag, out) in [(0x0000, 10), (0xb000, 0xb00a), (0x1000, 0x100a)] {
        let got = bench.send(0, &ethernet(ALL, A, Some(tag), 60), 15);
        assert_eq!(got, Ok(vec![(1, ethernet(ALL, A, Some(out), 60))]));
    }
}
