//! The daemon beside a disk on the `vhost-user-backend` crate: the same stream of requests, sound
//! and unsound, goes to both through the same front-end, and status, used length, data and disk
//! must be the same.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
#[expect(
    clippy::disallowed_types,
    reason = "the crate wants its back-end behind a lock"
)]
use std::sync::Mutex;
use std::thread::JoinHandle;

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

use super::front_end::{F_DISCARD, F_FLUSH, F_WRITE_ZEROES, Framing, FrontEnd, range};
use super::served::{DISK, SECTOR, Served, assert_same, image};
use crate::support::reference::{DISCARD, FLUSH, GET_ID, IN, OUT, ReferenceDisk, WRITE_ZEROES};
use crate::support::tmp::{TempDir, random_bytes};

const F_INDIRECT: u64 = 1 << 28;
const F_PROTOCOL: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;
const DISK_FEATURES: u64 = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
const REQUESTS: usize = 1500;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
#[expect(
    clippy::disallowed_types,
    reason = "the crate wants its back-end behind a lock"
)]
type Locked = Mutex<Backend>;

/// What the crate asks of a device.
struct Backend {
    disk: ReferenceDisk,
    memory: Memory,
}

impl VhostUserBackendMut for Backend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        DISK_FEATURES | F_INDIRECT | F_PROTOCOL | F_VERSION_1
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    /// Ends the crate's thread when the daemon is dropped.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.memory();
        let mut vring = vrings[0].get_mut();
        while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(memory.clone()) {
            let head = chain.head_index();
            let used = self.disk.answer(&*memory, chain);
            vring.add_used(head, used).map_err(io::Error::other)?;
        }
        vring.signal_used_queue()
    }
}

/// Serves one front-end on `socket` until it goes; the disk's bytes are what is left then.
fn serve(socket: &Path, disk: ReferenceDisk) -> JoinHandle<Vec<u8>> {
    let memory = Memory::new(GuestMemoryMmap::new());
    let backend = Backend {
        disk,
        memory: memory.clone(),
    };
    let backend = Arc::new(Locked::new(backend));
    let device = Arc::clone(&backend);
    let mut daemon = VhostUserDaemon::new("reference".into(), device, memory).unwrap();
    // Before the thread: who connects next finds it.
    let mut listener = Listener::new(socket, true).unwrap();
    std::thread::spawn(move || {
        daemon.start(&mut listener).unwrap();
        // How a session ends is no concern of this test.
        let _ = daemon.wait();
        drop(daemon);
        backend.lock().unwrap().disk.bytes.clone()
    })
}

/// A request of the stream.
struct Request {
    kind: u32,
    sector: u64,
    out: Vec<u8>,
    data_in: usize,
    framing: Framing,
}

/// The numbers that decide on request `number`.
struct Dice(Vec<u8>);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        let rest = self.0.split_off(8);
        let bytes = std::mem::replace(&mut self.0, rest);
        u64::from_le_bytes(bytes.try_into().unwrap()) % end
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    /// A length: mostly of whole sectors.
    fn length(&mut self) -> usize {
        let bytes = match self.below(10) {
            0 => 0,
            1 => self.below(3000),
            2 => 4096 * self.below(40),
            _ => 512 * (1 + self.below(16)),
        };
        usize::try_from(bytes).unwrap()
    }

    fn sector(&mut self) -> u64 {
        let sectors = (DISK / SECTOR) as u64;
        match self.below(30) {
            0 => sectors - self.below(4),
            1 => u64::MAX - self.below(4),
            2 => self.below(u64::MAX),
            _ => self.below(sectors - 400),
        }
    }

    fn cuts(&mut self, bytes: usize) -> Vec<u32> {
        let count = self.below(6);
        let end = bytes as u64 + 20;
        let cut = |_| u32::try_from(self.below(end)).unwrap();
        (0..count).map(cut).collect()
    }

    /// Ranges for DISCARD and WRITE_ZEROES, with the odd wrong flag.
    fn ranges(&mut self) -> Vec<u8> {
        let count = 1 + self.below(4) * self.below(4);
        let mut bytes = Vec::new();
        for _ in 0..count {
            let flags = u32::from(self.one_in(3)) + 2 * u32::from(self.one_in(60));
            let sectors = u32::try_from(self.below(64)).unwrap();
            bytes.extend(range(self.sector(), sectors, flags));
        }
        if self.one_in(12) {
            bytes.truncate(bytes.len() - 7);
        }
        bytes
    }
}

fn request(number: usize) -> Request {
    let mut dice = Dice(random_bytes(number as u64, 1024));
    let kind = match dice.below(40) {
        0..12 => IN,
        12..26 => OUT,
        26..29 => DISCARD,
        29..33 => WRITE_ZEROES,
        33..36 => FLUSH,
        36..39 => GET_ID,
        _ => [2, 10, 14, 77, u32::MAX][usize::try_from(dice.below(5)).unwrap()],
    };
    // Now and then there is data in the direction that the request has no use for.
    let odd = dice.one_in(10);
    let out = match kind {
        OUT => random_bytes(!(number as u64), dice.length()),
        DISCARD | WRITE_ZEROES => dice.ranges(),
        _ if odd => vec![7; dice.length()],
        _ => Vec::new(),
    };
    let data_in = match kind {
        IN => dice.length(),
        GET_ID if !odd => 20,
        _ if odd => dice.length(),
        _ => 0,
    };
    Request {
        kind,
        sector: dice.sector(),
        framing: Framing {
            readable: dice.cuts(out.len()),
            writable: dice.cuts(data_in),
            indirect: dice.one_in(2),
        },
        out,
        data_in,
    }
}

/// The whole disk, read in pieces.
fn read_all<D: Driver>(front: &mut FrontEnd<D>) -> Vec<u8> {
    const PIECE: usize = 1 << 20;
    let piece = |at: usize| front.run(IN, (at / SECTOR) as u64, &[], PIECE).data;
    (0..DISK).step_by(PIECE).flat_map(piece).collect()
}

fn compare<D: Driver>(backing: &str, bytes: Vec<u8>, served: &Served) {
    let dir = TempDir::new("reference");
    let socket = dir.path("reference.sock");
    let mut serial = [0; 20];
    serial[..9].copy_from_slice(b"same-disk");
    let disk = ReferenceDisk {
        bytes,
        block: 512,
        read_only: false,
        discard_zeroes: true,
        serial,
        ranges_max: 16,
    };
    let thread = serve(&socket, disk);
    let mut theirs = FrontEnd::<SplitDriver>::open(&socket, DISK_FEATURES);
    let mut ours = served.open::<D>(DISK_FEATURES);
    let all = [F_FLUSH, F_DISCARD, F_WRITE_ZEROES];
    assert!(all.iter().all(|f| ours.has(*f) && theirs.has(*f)));
    let mut statuses = BTreeSet::new();
    for number in 0..REQUESTS {
        let Request {
            kind,
            sector,
            out,
            data_in,
            framing,
        } = request(number);
        let [our, their] = [
            ours.run_framed(kind, sector, &out, data_in, &framing),
            theirs.run_framed(kind, sector, &out, data_in, &framing),
        ];
        let what = format!(
            "{backing}: request {number}, type {kind} at sector {sector}, {} bytes out, {data_in} \
             in, {framing:?}",
            out.len()
        );
        assert_eq!((our.status, our.used), (their.status, their.used), "{what}");
        assert_same(&what, &our.data, &their.data);
        statuses.insert(our.status);
    }
    assert_eq!(
        statuses,
        BTreeSet::from([0, 1, 2]),
        "the stream has all sorts"
    );
    let disk = read_all(&mut ours);
    drop(theirs);
    assert_same(backing, &disk, &thread.join().unwrap());
    assert_eq!(served.daemon.counter("disk0", "ring_faults"), 0);
}

#[test]
fn a_disk_in_memory_does_what_one_on_vhost_user_backend_does() {
    for packed in [false, true] {
        let keys = "backend=ram:8M,serial=same-disk";
        let served = Served::start(TempDir::new("blk"), keys);
        if packed {
            compare::<PackedDriver>("ram", vec![0; DISK], &served);
        } else {
            compare::<SplitDriver>("ram", vec![0; DISK], &served);
        }
    }
}

#[test]
fn a_file_does_what_one_on_vhost_user_backend_does() {
    for packed in [false, true] {
        let dir = TempDir::new("blk");
        let (path, bytes) = image(&dir);
        let keys = format!("path={},serial=same-disk", path.display());
        let served = Served::start(dir, &keys);
        if packed {
            compare::<PackedDriver>("file", bytes, &served);
        } else {
            compare::<SplitDriver>("file", bytes, &served);
        }
    }
}
