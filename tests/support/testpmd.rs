//! Drives DPDK's `dpdk-testpmd`: a front-end (`net_virtio_user`), a yardstick (`net_vhost`).
//!
//! The program runs interactively: a command goes to its standard input, and what it prints up to
//! its next prompt is the answer. Every wait has a deadline, and a failure shows the whole
//! conversation. Nothing here knows vringd; `tests/testpmd.rs` and `benches/rings.rs` share it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several programs, each of which uses a part"
)]

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio, id};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// What testpmd prints when it is ready for the next command.
const PROMPT: &str = "testpmd> ";

/// The longest that any one command may take; hundreds of times what it does take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Megabytes that an instance takes.
const MEMORY: &str = "256";

/// Instances started by this process, to give each a prefix of its own.
static INSTANCES: AtomicU32 = AtomicU32::new(0);

/// The ten combinations of ring format and driver code that a DPDK front-end has, as numbered by
/// DPDK's own test plan for virtio-user loopback.
#[derive(Clone, Copy, Debug)]
pub struct RingPath {
    /// 1 to 10.
    pub number: u8,
    /// What the plan calls it.
    pub name: &'static str,
    /// The properties that a `net_virtio_user` device has on this path.
    pub suffix: &'static str,
    /// Asks for packed rings, else split.
    pub packed: bool,
    /// Asks for mergeable receive buffers.
    pub mergeable: bool,
    /// Asks for in-order use. A back-end that does not offer it is served without, in silence.
    pub in_order: bool,
    /// Runs the driver's SIMD code, which takes received frames four at a time.
    pub vectorized: bool,
}

/// Packed ring.
const PACKED: u8 = 1;
/// Mergeable receive buffers.
const MERGEABLE: u8 = 2;
/// Buffers used in order.
const IN_ORDER: u8 = 4;
/// SIMD code.
const VECTORIZED: u8 = 8;

const fn path(number: u8, name: &'static str, suffix: &'static str, is: u8) -> RingPath {
    RingPath {
        number,
        name,
        suffix,
        packed: is & PACKED != 0,
        mergeable: is & MERGEABLE != 0,
        in_order: is & IN_ORDER != 0,
        vectorized: is & VECTORIZED != 0,
    }
}

/// All ten ring paths, in order.
pub const RING_PATHS: [RingPath; 10] = [
    path(
        1,
        "packed mergeable",
        "packed_vq=1,mrg_rxbuf=1,in_order=0",
        PACKED | MERGEABLE,
    ),
    path(
        2,
        "packed non-mergeable",
        "packed_vq=1,mrg_rxbuf=0,in_order=0",
        PACKED,
    ),
    path(
        3,
        "packed in-order mergeable",
        "packed_vq=1,mrg_rxbuf=1,in_order=1",
        PACKED | MERGEABLE | IN_ORDER,
    ),
    path(
        4,
        "packed in-order non-mergeable",
        "packed_vq=1,mrg_rxbuf=0,in_order=1",
        PACKED | IN_ORDER,
    ),
    path(5, "split mergeable", "mrg_rxbuf=1,in_order=0", MERGEABLE),
    path(6, "split non-mergeable", "mrg_rxbuf=0,in_order=0", 0),
    path(
        7,
        "split vector-rx",
        "mrg_rxbuf=0,in_order=0,vectorized=1",
        VECTORIZED,
    ),
    path(
        8,
        "split in-order mergeable",
        "mrg_rxbuf=1,in_order=1",
        MERGEABLE | IN_ORDER,
    ),
    path(
        9,
        "split in-order non-mergeable",
        "mrg_rxbuf=0,in_order=1",
        IN_ORDER,
    ),
    path(
        10,
        "packed vectorized",
        "packed_vq=1,mrg_rxbuf=0,in_order=1,vectorized=1",
        PACKED | IN_ORDER | VECTORIZED,
    ),
];

impl RingPath {
    /// The path of that number.
    pub fn number(number: u8) -> Option<Self> {
        RING_PATHS.into_iter().find(|path| path.number == number)
    }

    /// A front-end on this path, on core 0, with one queue of 1024 on the socket at `socket`.
    pub fn front_end(&self, socket: &Path) -> TestpmdConfig {
        self.front_end_with(socket, 1024, 1)
    }

    /// The same with a queue size and a number of queues.
    pub fn front_end_with(&self, socket: &Path, size: u16, queues: u16) -> TestpmdConfig {
        let mut config = TestpmdConfig {
            descriptors: size,
            queues,
            mbufs: mbufs_for(queues),
            ..TestpmdConfig::new(0)
        };
        let socket = socket.display();
        let suffix = self.suffix;
        config.vdevs.push(format!(
            "net_virtio_user0,mac=00:01:02:03:04:05,path={socket},queue_size={size},\
             queues={queues},{suffix}"
        ));
        // What picks the code of the driver: the log line that tells, and 512-bit SIMD for path 10.
        config.eal("--log-level=pmd.net.virtio.*:info");
        if self.vectorized && self.packed {
            config.eal("--force-max-simd-bitwidth=512");
        }
        if self.number == 6 {
            config.app("--tx-offloads=0x0");
        }
        config
    }

    /// Bursts of 32 frames that fill a ring of 1024.
    ///
    /// SIMD code fills receive rings late, up to 32 buffers behind: filled half, their ring has a
    /// buffer for every frame, and a frame that is missing in the end was lost.
    pub fn bursts(&self) -> u32 {
        if self.vectorized { 16 } else { 32 }
    }

    /// What the driver says it receives with, given whether in-order use was negotiated.
    ///
    /// Without it, path 10 falls back to scalar code, and 8 and 9 to that of 5 and 6; packed rings
    /// have no receive code of their own for in-order use. Path 10 needs AVX-512 as well.
    pub fn receives_with(&self, in_order_negotiated: bool) -> &'static str {
        let in_order = self.in_order && in_order_negotiated;
        match (self.packed, self.mergeable) {
            (true, false) if self.vectorized && in_order && cpu_has_avx512() => {
                "packed ring vectorized Rx path"
            }
            (true, true) => "packed ring mergeable buffer Rx path",
            (true, false) => "packed ring standard Rx path",
            (false, false) if self.vectorized => "using vectorized Rx path",
            (false, _) if in_order => "using inorder Rx path",
            (false, true) => "using mergeable buffer Rx path",
            (false, false) => "using standard Rx path",
        }
    }
}

/// Whether the processor has what DPDK asks of it for SIMD on packed rings.
fn cpu_has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// How to start one testpmd.
#[derive(Clone, Debug)]
pub struct TestpmdConfig {
    /// The core of its forwarding threads; its control thread is on the same.
    pub core: usize,
    /// How many threads forward, each from some of the ports.
    pub threads: usize,
    /// Devices, which become the ports 0, 1 and so on, in this order.
    pub vdevs: Vec<String>,
    /// Queues of each port.
    pub queues: u16,
    /// Descriptors of each queue.
    pub descriptors: u16,
    /// What happens to frames received.
    pub forward_mode: &'static str,
    /// Packet buffers of 2 KiB.
    pub mbufs: u32,
    /// Memory in pages of 4 KiB, else of 2 MiB.
    pub small_pages: bool,
    /// Further options of DPDK's environment.
    pub more_eal: Vec<String>,
    /// Further options of testpmd itself.
    pub more_app: Vec<String>,
    /// The network namespace it runs in, if not this program's.
    pub netns: Option<String>,
}

impl TestpmdConfig {
    /// No device, one queue, frames forwarded untouched.
    pub fn new(core: usize) -> Self {
        Self {
            core,
            threads: 1,
            vdevs: Vec::new(),
            queues: 1,
            descriptors: 1024,
            forward_mode: "io",
            mbufs: mbufs_for(1),
            small_pages: false,
            more_eal: Vec::new(),
            more_app: Vec::new(),
            netns: None,
        }
    }

    /// DPDK's own back-end on `socket`, which sends every frame back; forwarding once started.
    pub fn vhost_echo(core: usize, socket: &Path, queues: u16) -> Self {
        let mut config = Self {
            queues,
            mbufs: mbufs_for(queues),
            ..Self::new(core)
        };
        let socket = socket.display();
        config
            .vdevs
            .push(format!("net_vhost0,iface={socket},queues={queues}"));
        config.app("--auto-start");
        config
    }

    /// Adds a device before the others, so that it is port 0.
    pub fn first_vdev(&mut self, vdev: String) -> &mut Self {
        self.vdevs.insert(0, vdev);
        self
    }

    /// Adds an option of DPDK's environment.
    pub fn eal(&mut self, option: &str) -> &mut Self {
        self.more_eal.push(option.to_owned());
        self
    }

    /// Adds an option of testpmd.
    pub fn app(&mut self, option: &str) -> &mut Self {
        self.more_app.push(option.to_owned());
        self
    }

    /// All options. The file prefix keeps instances apart, of other programs too.
    fn arguments(&self, prefix: &str) -> Vec<String> {
        let lcores = (0..=self.threads).map(|lcore| format!("{lcore}@{}", self.core));
        let lcores: Vec<_> = lcores.collect();
        let mut all = vec![format!("--lcores={}", lcores.join(","))];
        let mut add = |options: &[&str]| all.extend(options.iter().map(|&o| o.to_owned()));
        add(&["--main-lcore=0", "--no-pci", "--no-telemetry", "-m", MEMORY]);
        if self.small_pages {
            // Without hugepages memory is one memfd, which --in-memory does not go with.
            add(&["--no-huge", "--no-shconf"]);
        } else {
            add(&["--in-memory", "--single-file-segments"]);
        }
        all.push(format!("--file-prefix={prefix}"));
        all.extend(self.vdevs.iter().map(|vdev| format!("--vdev={vdev}")));
        all.extend(self.more_eal.iter().cloned());
        all.extend(["--", "--interactive"].map(str::to_owned));
        all.extend([
            format!("--nb-cores={}", self.threads),
            format!("--forward-mode={}", self.forward_mode),
            format!("--total-num-mbufs={}", self.mbufs),
            format!("--rxq={}", self.queues),
            format!("--txq={}", self.queues),
            format!("--rxd={}", self.descriptors),
            format!("--txd={}", self.descriptors),
        ]);
        all.extend(self.more_app.iter().cloned());
        all
    }
}

/// Buffers that fill the rings of so many queues, with as many again on their way.
fn mbufs_for(queues: u16) -> u32 {
    8192 + 8192 * u32::from(queues)
}

/// What a port counted, and its rate since it was asked before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortStats {
    /// Frames received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames that arrived with nowhere to put them.
    pub rx_missed: u64,
    /// Frames received damaged.
    pub rx_errors: u64,
    /// Receive buffers that could not be had.
    pub rx_nombuf: u64,
    /// Frames sent: those that the ring took.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames that could not be sent.
    pub tx_errors: u64,
    /// Frames received per second, since the question before.
    pub rx_pps: u64,
    /// Frames sent per second, since the question before.
    pub tx_pps: u64,
}

impl PortStats {
    /// Reads the answer to `show port stats N`.
    fn parse(answer: &str) -> Option<Self> {
        let value = |key: &str| -> Option<u64> {
            let (_, after) = answer.split_once(&format!("{key}:"))?;
            after.split_whitespace().next()?.parse().ok()
        };
        Some(Self {
            rx_packets: value("RX-packets")?,
            rx_bytes: value("RX-bytes")?,
            rx_missed: value("RX-missed")?,
            rx_errors: value("RX-errors")?,
            rx_nombuf: value("RX-nombuf")?,
            tx_packets: value("TX-packets")?,
            tx_bytes: value("TX-bytes")?,
            tx_errors: value("TX-errors")?,
            rx_pps: value("Rx-pps")?,
            tx_pps: value("Tx-pps")?,
        })
    }

    /// Frames that were lost or damaged on the way in.
    pub fn rx_faults(&self) -> u64 {
        self.rx_missed + self.rx_errors + self.rx_nombuf
    }
}

/// A running testpmd; killed when dropped.
#[derive(Debug)]
pub struct Testpmd {
    child: Child,
    stdin: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// Everything printed so far.
    transcript: String,
    prefix: String,
}

impl Testpmd {
    /// Starts testpmd and waits until it takes commands.
    pub fn start(config: &TestpmdConfig) -> Self {
        let instance = INSTANCES.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("vringd-{}-{instance}", id());
        let (reader, writer) = io::pipe().expect("a pipe");
        // The prompt is written at once but all else through stdio, which would hold lines back.
        let mut command = match &config.netns {
            None => Command::new("stdbuf"),
            Some(netns) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", netns, "stdbuf"]);
                command
            }
        };
        command
            .args(["-oL", "dpdk-testpmd"])
            .args(config.arguments(&prefix))
            .stdin(Stdio::piped())
            .stdout(writer.try_clone().expect("a second end of the pipe"))
            .stderr(writer);
        let mut child = command.spawn().expect("stdbuf (coreutils) can be run");
        // Ends the copies of the pipe's writing end in this process.
        drop(command);
        let stdin = child.stdin.take().expect("stdin is a pipe");
        let mut testpmd = Self {
            child,
            stdin,
            output: read_in_background(reader),
            transcript: String::new(),
            prefix,
        };
        testpmd.read_until_prompt(0, "start");
        testpmd
    }

    /// Its process: whatever was started first has become testpmd by now.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything printed so far, as far as it was waited for.
    pub fn transcript(&self) -> &str {
        &self.transcript
    }

    /// Runs a command and returns what it printed.
    pub fn cmd(&mut self, command: &str) -> String {
        let from = self.transcript.len();
        if let Err(error) = writeln!(self.stdin, "{command}") {
            self.fail(command, &error.to_string());
        }
        let end = self.read_until_prompt(from, command);
        let answer = &self.transcript[from..end];
        if let Some(line) = answer.lines().find(|line| refuses(line)) {
            let line = line.to_owned();
            self.fail(command, &line);
        }
        self.transcript[from..end].to_owned()
    }

    /// The counters of a port.
    pub fn stats(&mut self, port: usize) -> PortStats {
        let answer = self.cmd(&format!("show port stats {port}"));
        match PortStats::parse(&answer) {
            Some(stats) => stats,
            None => self.fail("show port stats", &answer),
        }
    }

    /// Asks for the counters of a port until they satisfy a condition.
    pub fn wait_stats(
        &mut self,
        what: &str,
        port: usize,
        holds: impl Fn(&PortStats) -> bool,
    ) -> PortStats {
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        loop {
            let stats = self.stats(port);
            if holds(&stats) {
                return stats;
            }
            if Instant::now() > deadline {
                self.fail(what, &format!("does not hold in time: {stats:?}"));
            }
        }
    }

    /// Forwards, after sending that many bursts of 32 frames of a size on each queue.
    ///
    /// Several sizes, `2000,2000`, are one frame of several buffers.
    pub fn start_traffic(&mut self, frame: &str, bursts: u32) {
        self.cmd("set fwd io");
        self.cmd(&format!("set txpkts {frame}"));
        self.cmd(&format!("start tx_first {bursts}"));
    }

    /// The same with so many frames; in bursts of 32, or of all where there are fewer.
    pub fn start_frames(&mut self, frame: &str, frames: u32) {
        let burst = frames.min(32);
        self.cmd(&format!("set burst {burst}"));
        self.start_traffic(frame, frames / burst);
    }

    /// Stops forwarding; the frames that this program itself dropped for want of room to send.
    pub fn stop(&mut self) -> u64 {
        let answer = self.cmd("stop");
        let totals = answer.split("Accumulated forward statistics").nth(1);
        let dropped = totals.and_then(|totals| {
            let (_, after) = totals.split_once("TX-dropped:")?;
            after.split_whitespace().next()?.parse().ok()
        });
        match dropped {
            Some(dropped) => dropped,
            None => self.fail("stop", "no forward statistics in the answer"),
        }
    }

    /// With forwarding stopped: receives what is still under way, until nothing sent is missing.
    pub fn drain(&mut self, port: usize) -> PortStats {
        self.cmd("set fwd rxonly");
        self.cmd("start");
        let all_back = |stats: &PortStats| stats.rx_packets >= stats.tx_packets;
        self.wait_stats("all frames come back", port, all_back);
        self.stop();
        self.stats(port)
    }

    /// Forwards on port 0, where every frame comes back, until `frames` have come; checks that none
    /// was lost, damaged or cut.
    pub fn forwards(&mut self, frame: &str, bursts: u32, frames: u64) {
        self.cmd("clear port stats all");
        self.start_traffic(frame, bursts);
        self.wait_stats("frames keep coming", 0, |stats| stats.rx_packets > frames);
        assert_eq!(self.stop(), 0, "testpmd had no room for frames it got");
        let stats = self.drain(0);
        let size = |size: &str| size.parse::<u64>().expect("a size");
        let bytes: u64 = frame.split(',').map(size).sum();
        assert_eq!(stats.rx_packets, stats.tx_packets, "{stats:?}");
        assert_eq!(stats.rx_bytes, stats.rx_packets * bytes, "{stats:?}");
        assert_eq!((stats.rx_faults(), stats.tx_errors), (0, 0), "{stats:?}");
    }

    /// Frames received and sent by each queue of a port.
    pub fn queue_packets(&mut self, port: usize, queues: u16) -> Vec<(u64, u64)> {
        let answer = self.cmd(&format!("show port xstats {port}"));
        let value = |key: String| -> u64 {
            let count = answer.lines().find_map(|line| line.strip_prefix(&key));
            let count = count.unwrap_or_else(|| panic!("no {key:?} in {answer}"));
            count.trim().parse().expect("a count")
        };
        let both = |queue| {
            (
                value(format!("rx_q{queue}_good_packets: ")),
                value(format!("tx_q{queue}_good_packets: ")),
            )
        };
        (0..queues).map(both).collect()
    }

    /// The extended statistics of a port, by name.
    pub fn xstats(&mut self, port: usize) -> Vec<(String, u64)> {
        let answer = self.cmd(&format!("show port xstats {port}"));
        let pair = |line: &str| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        };
        answer.lines().filter_map(pair).collect()
    }

    /// Ends testpmd in order: ports are closed and capture files complete when this returns.
    pub fn quit(mut self) {
        if let Err(error) = writeln!(self.stdin, "quit") {
            self.fail("quit", &error.to_string());
        }
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        while self.read_some("quit", deadline) {}
        let status = self.child.wait().expect("our own child");
        if !status.success() {
            self.fail("quit", &status.to_string());
        }
    }

    /// Reads up to the prompt, and returns where it begins.
    fn read_until_prompt(&mut self, from: usize, what: &str) -> usize {
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        loop {
            if let Some(at) = self.transcript[from..].find(PROMPT) {
                return from + at;
            }
            if !self.read_some(what, deadline) {
                let status = self.child.wait().expect("our own child");
                self.fail(what, &format!("it ended, {status}"));
            }
        }
    }

    /// Reads what there is, at least something; false at the end of all output.
    fn read_some(&mut self, what: &str, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.output.recv_timeout(left) {
            Ok(bytes) => {
                self.transcript += &String::from_utf8_lossy(&bytes);
                true
            }
            Err(RecvTimeoutError::Disconnected) => false,
            Err(RecvTimeoutError::Timeout) => self.fail(what, "no answer in time"),
        }
    }

    fn fail(&self, what: &str, why: &str) -> ! {
        panic!(
            "testpmd: {what}: {why}\n(dpdk-testpmd is in Debian's package dpdk-dev; an instance \
             takes {MEMORY} MB of 2 MiB hugepages)\n--- testpmd printed ---\n{}",
            self.transcript
        )
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        // Both fail when it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let runtime = PathBuf::from("/var/run/dpdk").join(&self.prefix);
        let _ = std::fs::remove_dir_all(runtime);
    }
}

/// The lines with which testpmd refuses a command; it has no status to tell by.
fn refuses(line: &str) -> bool {
    ["Bad arguments", "Command not found", "Ambiguous command"]
        .iter()
        .any(|refusal| line.starts_with(refusal))
}

/// Passes on what a pipe holds, so that it can be waited for with a time limit.
fn read_in_background(mut pipe: io::PipeReader) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            if sender.send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}
