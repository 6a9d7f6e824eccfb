//! The hot path allocates nothing: a counting allocator around frames that go from one guest's
//! transmit queue to another's receive queue, over both ring formats, and (`disk`) around requests
//! of disks; and what the workers of a whole daemon allocate (`daemon`).
//!
//! A binary of its own, because the allocator is the whole program's. It counts for each thread
//! apart: the tests do not see each other.

mod support;

#[cfg(test)]
#[path = "alloc"]
#[expect(unsafe_code, reason = "an allocator can't be written without")]
mod tests {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;
    use std::sync::Arc;

    use vringd::device::net::{QueueCounters, RxHandler, TxHandler, feature};
    use vringd::host::net::{FrameBurst, Verdict};
    use vringd::memory::{GuestRam, Segments};
    use vringd::ring::{ChainQueue, RingFormat, Virtqueue};
    use vringd::testing::driver::{
        Buf, Driver, PackedDriver, RingMemory, SplitDriver, read_guest, write_guest,
    };
    use vringd::testing::packets::Packet;

    mod daemon;
    mod disk;

    /// The system's allocator, with an eye on it.
    struct Counting;

    // Of this thread alone: the test harness has one of its own.
    thread_local!(static CALLS: Cell<u64> = const { Cell::new(0) });

    fn called() {
        CALLS.set(CALLS.get() + 1);
        daemon::called();
    }

    fn calls() -> u64 {
        CALLS.get()
    }

    // SAFETY: every call goes to the system's allocator as it came.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            called();
            // SAFETY: the caller keeps the rules of `alloc`.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
            called();
            // SAFETY: the caller keeps the rules of `dealloc`.
            unsafe { System.dealloc(at, layout) }
        }

        unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
            called();
            // SAFETY: the caller keeps the rules of `realloc`.
            unsafe { System.realloc(at, layout, bytes) }
        }
    }

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    const SIZE: u16 = 256;
    const TX: u64 = 0x10_0000;
    const RX: u64 = 0x20_0000;
    const TABLES: u64 = 0x30_0000;
    /// Where two regions meet, behind the tables.
    const SEAM: u64 = 0x38_0000;
    const RAM: u64 = 0x40_0000;
    const BUFFER: u64 = 0x800;

    /// A guest that sends to itself.
    struct Echo<D: Driver> {
        ram: Arc<GuestRam>,
        tx_driver: D,
        rx_driver: D,
        tx_vq: Virtqueue<D::Format>,
        rx_vq: Virtqueue<D::Format>,
        tx: TxHandler,
        rx: RxHandler,
        burst: FrameBurst,
    }

    /// How the driver lays its frames out.
    #[derive(Debug, Clone, Copy)]
    enum Frames {
        /// Header and frame in one buffer.
        Single,
        /// The header apart, and the frame in two pieces.
        Chained,
        /// The same in an indirect table.
        Indirect,
        /// In a table of which an entry lies in two regions.
        Spanning,
        /// Larger than a receive buffer.
        Merged,
        /// To be cut in two, which the receiver did not acknowledge.
        Cut,
    }

    impl<D: Driver> Echo<D> {
        fn new(more: u64) -> Echo<D> {
            let ram = GuestRam::for_test(&[(0, SEAM), (SEAM, RAM - SEAM)]);
            let tx = RingMemory::new::<D::Format>(&ram, 0, SIZE);
            let at = tx.end::<D::Format>().next_multiple_of(4096);
            let rx = RingMemory::new::<D::Format>(&ram, at, SIZE);
            let features = feature::MRG_RXBUF | feature::CSUM | more;
            let counters = Arc::new(QueueCounters::default());
            Echo {
                tx_driver: D::new(&tx, true),
                rx_driver: D::new(&rx, true),
                tx_vq: tx.device::<D::Format>(true),
                rx_vq: rx.device::<D::Format>(true),
                tx: TxHandler::new(features, 1, Arc::clone(&counters)),
                rx: RxHandler::new(features, SIZE, counters),
                burst: FrameBurst::new(),
                ram,
            }
        }

        /// The driver posts frames to send, and buffers to receive them in. Returns how many.
        fn post(&mut self, frames: Frames, count: u64) {
            for number in 0..count {
                let at = TX + number * 0x1000;
                write_guest(&self.ram, at, &[0; 12]);
                let pieces = [
                    Buf::readable(at, 12),
                    Buf::readable(at + 12, 20),
                    Buf::readable(at + 32, 200),
                ];
                let added = match frames {
                    Frames::Single => self.tx_driver.add(&[Buf::readable(at, 232)]),
                    Frames::Chained => self.tx_driver.add(&pieces),
                    Frames::Indirect => {
                        let table = TABLES + number * 64;
                        self.tx_driver.add_indirect(&pieces, table)
                    }
                    // The second of its three entries.
                    Frames::Spanning => self.tx_driver.add_indirect(&pieces, SEAM - 24),
                    Frames::Merged => self.tx_driver.add(&[Buf::readable(at, 0x1000)]),
                    Frames::Cut => {
                        let packet = Packet::new(false, false, 2800);
                        write_guest(&self.ram, at, &packet.vnet(1400, false));
                        let frame = packet.unfinished();
                        write_guest(&self.ram, at + 12, &frame);
                        let len = 12 + u32::try_from(frame.len()).unwrap();
                        self.tx_driver.add(&[Buf::readable(at, len)])
                    }
                };
                added.unwrap();
                let buffers = if matches!(frames, Frames::Merged | Frames::Cut) {
                    2
                } else {
                    1
                };
                for half in 0..buffers {
                    let at = RX + (number * 2 + half) * BUFFER;
                    let buf = Buf::writable(at, u32::try_from(BUFFER).unwrap());
                    self.rx_driver.add(&[buf]).unwrap();
                }
            }
            self.tx_driver.publish();
            self.rx_driver.publish();
        }

        /// What a worker does for an echo link in one turn.
        fn turn(&mut self) -> usize {
            let count = self.tx.receive(&mut self.tx_vq, &mut self.burst).unwrap();
            let FrameBurst {
                frames, segments, ..
            } = &mut self.burst;
            self.rx.transmit(&mut self.rx_vq, frames, segments).unwrap();
            let sent = |frame: &&_| {
                matches!(
                    frame,
                    &&vringd::host::net::Frame {
                        verdict: Verdict::Sent,
                        ..
                    }
                )
            };
            let sent = self.burst.frames.iter().filter(sent).count();
            assert_eq!(sent, count);
            self.tx.complete(&mut self.tx_vq, &mut self.burst);
            self.tx_vq.publish();
            self.rx_vq.publish();
            self.tx_vq.set_kicks(false);
            self.tx_vq.set_kicks(true);
            count
        }

        fn reap(&mut self) {
            while self.tx_driver.used().is_some() {}
            while self.rx_driver.used().is_some() {}
        }

        fn bursts(&mut self, frames: Frames) {
            // One burst more than enough for every list to have its size.
            let mut moved = 0;
            for burst in 0..50 {
                self.post(frames, 1 + burst % 40);
                let before = calls();
                while self.turn() > 0 {
                    moved += 1;
                }
                let calls = calls() - before;
                if burst > 0 {
                    assert_eq!(calls, 0, "{frames:?}, burst {burst}");
                }
                self.reap();
            }
            assert!(moved >= 50);
            assert_ne!(read_guest(&self.ram, RX + 10, 2), [0; 2], "num_buffers");
            assert_eq!((self.tx_vq.in_flight(), self.rx_vq.in_flight()), (0, 0));
        }
    }

    fn all_frames<D: Driver>() {
        let mut echo = Echo::<D>::new(feature::GUEST_CSUM);
        for frames in [
            Frames::Single,
            Frames::Chained,
            Frames::Indirect,
            Frames::Spanning,
            Frames::Merged,
        ] {
            echo.bursts(frames);
        }
        Echo::<D>::new(feature::HOST_TSO4).bursts(Frames::Cut);
        // A ring on its own: pop, give back, pop again, use.
        let mut segments = Segments::with_capacity(64);
        echo.post(Frames::Chained, 10);
        let before = calls();
        for _ in 0..10 {
            for give_back in [true, false] {
                segments.clear();
                let Ok(vringd::ring::Popped::Chain(chain)) = echo.tx_vq.pop(&mut segments) else {
                    panic!("a chain is there");
                };
                if give_back {
                    echo.tx_vq.unpop(chain.id);
                } else {
                    echo.tx_vq.put_used(chain.id, 0, &[]);
                }
            }
        }
        echo.tx_vq.publish();
        assert_eq!(calls(), before, "{}", D::Format::PACKED);
    }

    #[test]
    fn the_hot_path_allocates_nothing_after_its_first_burst() {
        let before = calls();
        drop(std::hint::black_box(vec![1]));
        assert_eq!(calls() - before, 2, "it counts");
        all_frames::<SplitDriver>();
        all_frames::<PackedDriver>();
    }
}
