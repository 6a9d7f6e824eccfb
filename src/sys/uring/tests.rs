//! Operations on real files, and registered memory.

use super::*;
use crate::memory::{Access, GuestRam, Segments, copy};
use crate::sys::peer;
use vmm_sys_util::tempfile::TempFile;

fn segments(ram: &GuestRam, at: u64, len: u32) -> Segments {
    let mut list = Segments::with_capacity(4);
    ram.translate(at, len, Access::Write, &mut list).unwrap();
    list
}

fn finish(ring: &mut Uring, client: ClientId) -> (u64, i32) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        ring.enter();
        if let Some(done) = ring.reap(client) {
            return done;
        }
        assert!(Instant::now() < deadline, "nothing completes");
    }
}

#[test]
fn two_clients_get_their_own_completions() {
    let ram = GuestRam::for_test(&[(0, 65536)]);
    let file = TempFile::new().unwrap();
    let mut ring = Uring::new().unwrap();
    let (a, b) = (ring.add_client(8), ring.add_client(8));
    let place = ring.add_file(file.as_file()).unwrap();
    let out = segments(&ram, 0, 4096);
    copy::write(out.as_slice(), 0, &[7; 4096]);
    let write = UringOp::Write {
        file: place,
        offset: 4096,
        segments: out.as_slice(),
        durable: true,
    };
    assert!(ring.submit(a, 11, write));
    assert_eq!(finish(&mut ring, a), (11, 4096));
    let back = segments(&ram, 8192, 4096);
    let read = UringOp::Read {
        file: place,
        offset: 4096,
        segments: back.as_slice(),
    };
    assert!(ring.submit(a, 12, UringOp::Sync { file: place }));
    assert!(ring.submit(b, 13, read));
    assert_eq!(finish(&mut ring, b), (13, 4096));
    assert_eq!(finish(&mut ring, a), (12, 0));
    let mut bytes = [0; 4096];
    copy::read(back.as_slice(), 0, &mut bytes);
    assert_eq!(bytes, [7; 4096]);
    let past = UringOp::Read {
        file: place,
        offset: 1 << 20,
        segments: back.as_slice(),
    };
    assert!(ring.submit(b, 14, past));
    assert_eq!(finish(&mut ring, b), (14, 0), "end of file");
    ring.remove_file(place);
    ring.remove_client(a);
    ring.remove_client(b);
}

#[test]
fn a_sleeper_is_woken_by_a_completion() {
    let ram = GuestRam::for_test(&[(0, 65536)]);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut ring = Uring::new().unwrap();
    let client = ring.add_client(1);
    let place = ring.add_file(&ours).unwrap();
    let buffer = segments(&ram, 0, 4);
    // Not ready yet: the read waits in the kernel.
    let read = UringOp::Read {
        file: place,
        offset: u64::MAX,
        segments: buffer.as_slice(),
    };
    assert!(ring.submit(client, 1, read));
    ring.enter();
    assert_eq!(ring.reap(client), None);
    io::Write::write_all(&mut &theirs, b"wake").unwrap();
    let never = std::os::unix::net::UnixStream::pair().unwrap();
    let arrivals = peer::Arrivals::new(&never.0).unwrap();
    assert_eq!(arrivals.wait(&ring).unwrap(), peer::Ready::Exit);
    assert!(ring.has_work());
    assert_eq!(finish(&mut ring, client), (1, 4));
}

#[test]
fn a_dropped_ring_cancels_what_would_never_end() {
    let ram = GuestRam::for_test(&[(0, 65536)]);
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut ring = Uring::new().unwrap();
    let client = ring.add_client(1);
    let place = ring.add_file(&ours).unwrap();
    let buffer = segments(&ram, 0, 4);
    let read = UringOp::Read {
        file: place,
        offset: u64::MAX,
        segments: buffer.as_slice(),
    };
    assert!(ring.submit(client, 1, read));
    ring.enter();
    assert_eq!(ring.reap(client), None);
    assert!(ring.quiesce(Duration::from_secs(10)), "still in flight");
    assert_eq!(ring.reap(client), Some((1, -libc::ECANCELED)));
}

#[test]
fn lists_of_segments_take_no_memory_and_a_full_ring_says_so() {
    let ram = GuestRam::for_test(&[(0, 1 << 20)]);
    let file = TempFile::new().unwrap();
    let mut ring = Uring::new().unwrap();
    let client = ring.add_client(IN_FLIGHT_MAX);
    let place = ring.add_file(file.as_file()).unwrap();
    let mut list = Segments::with_capacity(2 * SEGMENTS_PER_OPERATION);
    for at in 0..2 * SEGMENTS_PER_OPERATION as u64 {
        ram.translate(at * 8, 8, Access::Write, &mut list).unwrap();
    }
    let bytes: Vec<u8> = (0..16384).map(|i| u8::try_from(i % 251).unwrap()).collect();
    copy::write(list.as_slice(), 0, &bytes);
    let storage = ring.lists.as_ptr();
    // The kernel has 64 of these before it tells of one, so that what comes then stays queued.
    const OTHERS: u64 = 64;
    for other in 0..OTHERS {
        assert!(ring.submit(client, 100 + other, UringOp::Nothing));
    }
    let mut queued = 0;
    while ring.submit(
        client,
        queued,
        UringOp::Write {
            file: place,
            offset: queued * 8192,
            segments: list.as_slice(),
            durable: false,
        },
    ) {
        queued += 1;
        assert!(queued <= 16, "more than there is room for");
    }
    assert_eq!(queued, 16);
    // Longer than one writev: the first 1024 segments are written, each time.
    for _ in 0..queued + OTHERS {
        let (tag, result) = finish(&mut ring, client);
        assert_eq!(result, if tag < 100 { 8192 } else { 0 });
    }
    let written = std::fs::read(file.as_path()).unwrap();
    assert!(
        written == bytes[..8192].repeat(16),
        "other bytes on the file"
    );
    assert_eq!(ring.lists.as_ptr(), storage);
    let again = UringOp::Sync { file: place };
    assert!(ring.submit(client, 99, again) && ring.lists.is_empty());
    assert_eq!(finish(&mut ring, client), (99, 0));
}

#[test]
fn a_thread_of_the_kernel_takes_what_is_queued_awake_or_asleep() {
    let ram = GuestRam::for_test(&[(0, 65536)]);
    let file = TempFile::new().unwrap();
    let mut ring = Uring::with_thread().unwrap();
    let client = ring.add_client(64);
    let place = ring.add_file(file.as_file()).unwrap();
    for round in 0..3u8 {
        let out = segments(&ram, 0, 4096);
        copy::write(out.as_slice(), 0, &[round; 4096]);
        for number in 0..32 {
            let write = UringOp::Write {
                file: place,
                offset: number * 4096,
                segments: out.as_slice(),
                durable: number % 2 == 0,
            };
            assert!(ring.submit(client, number, write));
        }
        for _ in 0..32 {
            assert_eq!(finish(&mut ring, client).1, 4096);
        }
        let written = std::fs::read(file.as_path()).unwrap();
        assert!(written == vec![round; 32 * 4096], "round {round}");
        if round == 1 && ring.has_thread {
            let deadline = Instant::now() + Duration::from_secs(60);
            while !ring.ring.submission().need_wakeup() {
                assert!(Instant::now() < deadline, "the thread never sleeps");
                std::thread::yield_now();
            }
        }
    }
    assert!(
        ring.lists.len() <= 64,
        "lists are given up when they are taken"
    );
}

#[test]
fn registered_memory_moves_the_same_bytes_also_while_it_is_taken_out() {
    let ram = GuestRam::for_test(&[(0, 1 << 20), (1 << 20, 1 << 20)]);
    let file = TempFile::new().unwrap();
    let mut ring = Uring::new().unwrap();
    let client = ring.add_client(64);
    let place = ring.add_file(file.as_file()).unwrap();
    ring.add_memory(&ram.memory()).unwrap();
    assert_eq!(ring.buffers.len(), 2);
    for (round, registered) in [true, true, false].into_iter().enumerate() {
        let round = u8::try_from(round).unwrap();
        let out = segments(&ram, 4097, 8192);
        assert_eq!(ring.buffers.find(&out.as_slice()[0]).is_some(), registered);
        copy::write(out.as_slice(), 0, &[round + 1; 8192]);
        let write = UringOp::Write {
            file: place,
            offset: 8192,
            segments: out.as_slice(),
            durable: round == 1,
        };
        assert!(ring.submit(client, 1, write));
        if round == 1 {
            // The kernel has it, or has it not yet: both must end well.
            ring.remove_memory(&ram.memory());
        }
        let moved = finish(&mut ring, client).1;
        // What was only queued when its memory was taken out is told so, and nothing is written.
        assert!(
            moved == 8192 || round == 1 && moved == -libc::EFAULT,
            "{moved}"
        );
        if moved < 0 {
            continue;
        }
        // Across two regions, which are no one piece.
        let mut back = segments(&ram, (1 << 20) - 4096, 8192);
        if round == 0 {
            back = segments(&ram, 65536, 8192);
        }
        let read = UringOp::Read {
            file: place,
            offset: 8192,
            segments: back.as_slice(),
        };
        assert!(ring.submit(client, 2, read));
        assert_eq!(finish(&mut ring, client), (2, 8192));
        let mut bytes = [0; 8192];
        copy::read(back.as_slice(), 0, &mut bytes);
        assert_eq!(bytes, [round + 1; 8192]);
    }
}

#[test]
fn a_kernel_with_little_to_do_gets_the_first_operations_before_the_turn_ends() {
    let mut ring = Uring::new().unwrap();
    let client = ring.add_client(64);
    let mut left = |count| -> Vec<usize> {
        let submit = |tag| {
            assert!(ring.submit(client, tag, UringOp::Nothing));
            ring.ring.submission().len()
        };
        (0..count).map(submit).collect()
    };
    // Two at once, then as many as it has already.
    assert_eq!(left(9), [1, 0, 1, 0, 1, 2, 3, 0, 1]);
    let tags: Vec<u64> = (0..9).map(|_| finish(&mut ring, client).0).collect();
    assert_eq!(tags, [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    assert!(!ring.is_waiting());
}
