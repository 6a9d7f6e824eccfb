//! Loom models of the rings: publish order of both formats, and the two notification races.
//!
//! The production code of `split.rs` and `packed.rs` runs over loom atomics (see `Area`), against
//! the few lines of a driver that matter. Size 2, one burst, one notification. Payload stands in a
//! relaxed atomic of its own: the buffer that the ring's ordering must protect.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering, fence};
use loom::thread;

use super::format::{Areas, RingConfig, RingFormat, VringBase};
use super::{ChainId, Packed, Single, Split};
use crate::memory::{Area, Segment};

const AVAIL_BIT: u64 = 1 << (48 + 7);
const USED_BIT: u64 = 1 << (48 + 15);

struct Shared {
    desc: Area,
    driver: Area,
    device: Area,
    payload: AtomicU64,
}

fn shared<F: RingFormat>() -> (Arc<Shared>, F) {
    shared_with(false)
}

fn shared_with<F: RingFormat>(in_order: bool) -> (Arc<Shared>, F) {
    let [desc, driver, device] = F::area_bytes(2).map(Area::for_loom);
    let areas = Areas {
        desc: desc.clone(),
        driver: driver.clone(),
        device: device.clone(),
    };
    let base = VringBase::fresh(F::PACKED);
    let config = RingConfig {
        size: 2,
        event_idx: true,
        indirect: false,
        in_order,
        readable_only: false,
        base,
    };
    let format = F::new(areas, &config).unwrap();
    (
        Arc::new(Shared {
            desc,
            driver,
            device,
            payload: AtomicU64::new(0),
        }),
        format,
    )
}

/// The device writes a buffer and publishes two used elements; a driver that sees an element sees
/// the buffer, and seeing the first it may go on to the second.
/// VIRTIO 1.3 §2.7.8.2: what was written and the elements come before `used.idx`.
#[test]
fn loom_split_publish_shows_buffers_and_elements() {
    loom::model(|| {
        let (shared, mut ring) = shared::<Split>();
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            let idx = guest.device.load16(2);
            fence(Ordering::Acquire);
            if idx != 0 {
                assert_eq!(idx, 2);
                assert_eq!(guest.payload.load(Ordering::Relaxed), 7, "the buffer");
                assert_eq!(guest.device.load32(4), 1, "id of the first element");
                assert_eq!(guest.device.load32(16), 9, "length of the second");
            }
        });
        shared.payload.store(7, Ordering::Relaxed);
        ring.put_used(&ChainId::new(1, 1), 8);
        ring.put_used(&ChainId::new(0, 1), 9);
        ring.publish();
        driver.join().unwrap();
    });
}

#[test]
fn loom_packed_publish_shows_buffers_and_elements() {
    loom::model(|| {
        let (shared, mut ring) = shared::<Packed>();
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            let first = guest.desc.load64(8);
            fence(Ordering::Acquire);
            if first & USED_BIT != 0 {
                assert_eq!(guest.payload.load(Ordering::Relaxed), 7, "the buffer");
                let second = guest.desc.load64(24);
                assert_eq!(second & USED_BIT, USED_BIT, "the second element is there");
                assert_eq!((second >> 32) & 0xffff, 1, "with its id");
            }
        });
        shared.payload.store(7, Ordering::Relaxed);
        ring.put_used(&ChainId::new(0, 1), 8);
        ring.put_used(&ChainId::new(1, 1), 9);
        ring.publish();
        driver.join().unwrap();
    });
}

/// With IN_ORDER the two chains share one element; a driver that sees it sees its id and that
/// nothing else of the ring was touched.
#[test]
fn loom_split_batch_is_whole_when_it_is_seen() {
    loom::model(|| {
        let (shared, mut ring) = shared_with::<Split>(true);
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            let idx = guest.device.load16(2);
            fence(Ordering::Acquire);
            assert!(idx == 0 || idx == 2, "the index moves by the whole batch");
            if idx == 2 {
                assert_eq!(
                    guest.payload.load(Ordering::Relaxed),
                    7,
                    "the buffer was read"
                );
                assert_eq!(guest.device.load32(4), 1, "the head of the last");
                assert_eq!(guest.device.load32(12), 0, "no second element");
            }
        });
        shared.payload.store(7, Ordering::Relaxed);
        ring.put_used_singles([(0, 0), (1, 0)].into_iter());
        ring.publish();
        driver.join().unwrap();
    });
}

#[test]
fn loom_packed_run_is_whole_when_it_is_seen() {
    loom::model(|| {
        let (shared, mut ring) = shared_with::<Packed>(true);
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            let first = guest.desc.load64(8);
            fence(Ordering::Acquire);
            if first & USED_BIT != 0 {
                assert_eq!(
                    guest.payload.load(Ordering::Relaxed),
                    7,
                    "the buffer was read"
                );
                assert_eq!((first >> 32) & 0xffff, 1, "the id of the last");
                assert_eq!(guest.desc.load64(24), 0, "no second descriptor");
            }
        });
        shared.payload.store(7, Ordering::Relaxed);
        ring.put_used_singles([(0, 0), (1, 0)].into_iter());
        ring.publish();
        driver.join().unwrap();
    });
}

/// A chain that the device sees is whole.
/// VIRTIO 1.3 §2.7.13.3: `avail.idx` is read before the descriptors.
#[test]
fn loom_split_pop_sees_what_the_driver_wrote() {
    loom::model(|| {
        let (shared, mut ring) = shared::<Split>();
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            guest.payload.store(7, Ordering::Relaxed);
            guest.desc.store64(16, 0x1000);
            guest.driver.store16(4, 1);
            guest.driver.store16_release(2, 1);
        });
        if let Some(head) = ring.peek().unwrap() {
            assert_eq!((head.slot, head.desc.addr), (1, 0x1000));
            assert_eq!(shared.payload.load(Ordering::Relaxed), 7);
        }
        driver.join().unwrap();
    });
}

#[test]
fn loom_packed_pop_sees_what_the_driver_wrote() {
    loom::model(|| {
        let (shared, mut ring) = shared::<Packed>();
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            guest.payload.store(7, Ordering::Relaxed);
            guest.desc.store64(0, 0x1000);
            guest.desc.store64_release(8, AVAIL_BIT | 64);
        });
        if let Some(head) = ring.peek().unwrap() {
            assert_eq!((head.desc.addr, head.desc.len), (0x1000, 64));
            assert_eq!(shared.payload.load(Ordering::Relaxed), 7);
        }
        driver.join().unwrap();
    });
}

/// What the device takes of two chains at once is whole, whether it is one of them or both.
fn singles_are_whole<F: RingFormat>(show: fn(&Shared)) {
    loom::model(move || {
        let (shared, mut ring) = shared::<F>();
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            guest.payload.store(7, Ordering::Relaxed);
            show(&guest);
        });
        let mut out = [Single::EMPTY, Single::EMPTY];
        let mut at = 0;
        let taken = ring.take_singles(false, &mut out, |id, desc| {
            at += 1;
            assert_eq!((desc.addr, desc.len), (0x1000 * at, 64), "chain {at}");
            assert_eq!(shared.payload.load(Ordering::Relaxed), 7);
            Some(Single::new(id, Segment::EMPTY))
        });
        assert_eq!(taken as u64, at);
        driver.join().unwrap();
    });
}

#[test]
fn loom_split_singles_are_whole_when_they_are_seen() {
    singles_are_whole::<Split>(|guest| {
        for (slot, at) in [(0, 0x1000), (1, 0x2000)] {
            guest.desc.store64(16 * slot, at);
            guest.desc.store64(16 * slot + 8, 64);
        }
        guest.driver.store16(4, 0);
        guest.driver.store16(6, 1);
        guest.driver.store16_release(2, 2);
    });
}

/// Each by itself: the driver shows the second after the first.
#[test]
fn loom_packed_singles_are_whole_when_they_are_seen() {
    singles_are_whole::<Packed>(|guest| {
        for (slot, at) in [(0, 0x1000), (1, 0x2000)] {
            guest.desc.store64(16 * slot, at);
            guest.desc.store64_release(16 * slot + 8, AVAIL_BIT | 64);
        }
    });
}

/// As `loom_packed_publish_shows_buffers_and_elements`, where the elements behind the first are
/// stored straight into the ring.
#[test]
fn loom_packed_singles_are_shown_with_the_first() {
    loom::model(|| {
        let (shared, mut ring) = shared::<Packed>();
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            let first = guest.desc.load64(8);
            fence(Ordering::Acquire);
            if first & USED_BIT != 0 {
                assert_eq!(guest.payload.load(Ordering::Relaxed), 7, "the buffer");
                let second = guest.desc.load64(24);
                assert_eq!(second & USED_BIT, USED_BIT, "the second element is there");
                assert_eq!(second & 0xffff, 9, "with its length");
            }
        });
        shared.payload.store(7, Ordering::Relaxed);
        ring.put_used_singles([(0, 8), (1, 9)].into_iter());
        ring.publish();
        driver.join().unwrap();
    });
}

/// The driver asks for a call and looks once more before it sleeps; the device publishes and asks
/// whether a call is wanted. Never both: asleep, and no call.
#[test]
fn loom_split_call_is_never_lost() {
    loom::model(|| {
        let (shared, mut ring) = shared::<Split>();
        // An event index that was passed long ago: calls are off.
        shared.driver.store16(8, 0x8000);
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            guest.driver.store16(8, 0);
            fence(Ordering::SeqCst);
            guest.device.load16(2) == 0
        });
        ring.put_used(&ChainId::new(0, 1), 0);
        ring.publish();
        let call = ring.wants_call();
        let sleeps = driver.join().unwrap();
        assert!(call || !sleeps, "the driver sleeps on a published element");
    });
}

#[test]
fn loom_packed_call_is_never_lost() {
    loom::model(|| {
        let (shared, mut ring) = shared::<Packed>();
        shared.driver.store32(0, 1 << 16);
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            // Ask at slot 0 of the first lap.
            guest.driver.store32(0, (2 << 16) | 0x8000);
            fence(Ordering::SeqCst);
            guest.desc.load64(8) & USED_BIT == 0
        });
        ring.put_used(&ChainId::new(0, 1), 0);
        ring.publish();
        let call = ring.wants_call();
        let sleeps = driver.join().unwrap();
        assert!(call || !sleeps, "the driver sleeps on a published element");
    });
}

/// As above, where one element stands for two chains: the driver may ask for either.
#[test]
fn loom_split_call_for_a_batch_is_never_lost() {
    for event in [0, 1] {
        loom::model(move || split_call_for_a_batch(event));
    }
}

fn split_call_for_a_batch(event: u16) {
    let (shared, mut ring) = shared_with::<Split>(true);
    shared.driver.store16(8, 0x8000);
    let guest = Arc::clone(&shared);
    let driver = thread::spawn(move || {
        guest.driver.store16(8, event);
        fence(Ordering::SeqCst);
        guest.device.load16(2) == 0
    });
    ring.put_used(&ChainId::new(0, 1), 0);
    ring.put_used(&ChainId::new(1, 1), 0);
    ring.publish();
    let call = ring.wants_call();
    let sleeps = driver.join().unwrap();
    assert!(call || !sleeps, "the driver sleeps on a published batch");
}

#[test]
fn loom_packed_call_for_a_run_is_never_lost() {
    for slot in [0, 1] {
        loom::model(move || packed_call_for_a_run(slot));
    }
}

fn packed_call_for_a_run(slot: u32) {
    let (shared, mut ring) = shared_with::<Packed>(true);
    shared.driver.store32(0, 1 << 16);
    let guest = Arc::clone(&shared);
    let driver = thread::spawn(move || {
        // Ask at this slot of the first lap.
        guest.driver.store32(0, (2 << 16) | 0x8000 | slot);
        fence(Ordering::SeqCst);
        guest.desc.load64(8) & USED_BIT == 0
    });
    ring.put_used(&ChainId::new(0, 1), 0);
    ring.put_used(&ChainId::new(1, 1), 0);
    ring.publish();
    let call = ring.wants_call();
    let sleeps = driver.join().unwrap();
    assert!(call || !sleeps, "the driver sleeps on a published run");
}

/// The device asks for kicks and looks once more before it sleeps; the driver adds a chain and asks
/// whether a kick is wanted. Never both: asleep, and no kick.
#[test]
fn loom_split_kick_is_never_lost() {
    loom::model(|| {
        let (shared, mut ring) = shared::<Split>();
        shared.device.store16(20, 0x8000);
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            guest.driver.store16_release(2, 1);
            fence(Ordering::SeqCst);
            guest.device.load16(20) == 0
        });
        let sleeps = !ring.set_kicks(true);
        let kicked = driver.join().unwrap();
        assert!(kicked || !sleeps, "asleep on an available chain");
    });
}

#[test]
fn loom_packed_kick_is_never_lost() {
    loom::model(|| {
        let (shared, mut ring) = shared::<Packed>();
        shared.device.store32(0, 1 << 16);
        let guest = Arc::clone(&shared);
        let driver = thread::spawn(move || {
            guest.desc.store64_release(8, AVAIL_BIT | 64);
            fence(Ordering::SeqCst);
            (guest.device.load32(0) >> 16) & 3 != 1
        });
        let sleeps = !ring.set_kicks(true);
        let kicked = driver.join().unwrap();
        assert!(kicked || !sleeps, "asleep on an available chain");
    });
}
