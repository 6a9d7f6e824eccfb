//! A private Open vSwitch with DPDK, whose `net_virtio_user` ports are front-ends of the daemon.
//!
//! It has its own database, run directory and network namespace; the kernel module is not used.
//! Stations are network namespaces of their own, each on a veth pair to a bridge.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{ChildStdout, Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use super::deadline::wait_until;
use super::netns::Netns;
use super::program::Program;
use super::tmp::{TempDir, random_bytes};

/// Longer than any step takes on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where Debian's openvswitch-switch-dpdk has its switch, whatever the alternatives say.
const SWITCH: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";

/// Megabytes of 2 MiB hugepages that DPDK takes at once, and may take.
const MEMORY: [&str; 2] = ["128", "480"];

/// What is chosen about a switch.
#[derive(Clone, Copy, Debug, Default)]
pub struct OvsConfig {
    /// A polling thread on both cores, else only on core 0.
    pub two_cores: bool,
    /// The polling thread is on this core instead, and never sleeps.
    pub alone_on: Option<usize>,
}

/// What is chosen about a port of it.
#[derive(Clone, Copy, Debug)]
pub struct PortConfig {
    /// Packed rings, else split.
    pub packed: bool,
    /// Queue pairs: one or two.
    pub queues: u16,
    /// The front-end listens at the socket.
    pub listens: bool,
    /// Longest IP packet.
    pub mtu: u16,
}

/// A running switch; killed when dropped.
pub struct Ovs {
    config: OvsConfig,
    switch: Program,
    /// Held until the end.
    database: Program,
    netns: Netns,
    dir: TempDir,
}

impl Ovs {
    /// An empty switch that takes commands.
    pub fn start(config: OvsConfig) -> Ovs {
        let dir = TempDir::new("ovs");
        let netns = Netns::new();
        let path = |name: &str| dir.path(name).display().to_string();
        let made = Command::new("ovsdb-tool")
            .args(["create", &path("conf.db"), SCHEMA])
            .output()
            .expect("ovsdb-tool (package openvswitch-switch-dpdk) runs");
        assert!(made.status.success(), "{made:?}");
        let mut command = netns.command("ovsdb-server");
        command.args([&path("conf.db"), "--no-chdir"]).args([
            format!("--remote=punix:{}", path("db.sock")),
            format!("--unixctl={}", path("db.ctl")),
        ]);
        let database = spawn(&mut command, &dir, "db.out");
        wait_for_file(&dir, "db.sock");
        must(set_up(&mut vsctl(&dir), config));
        let switch = spawn_switch(&netns, &dir);
        Ovs {
            config,
            switch,
            database,
            netns,
            dir,
        }
    }

    /// The process that moves frames.
    pub fn pid(&self) -> u32 {
        self.switch.0.id()
    }

    /// Where the sockets of its ports are.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.path(&format!("{name}.sock"))
    }

    /// Runs `ovs-vsctl`, which must succeed and, as far as it waits, be obeyed.
    pub fn vsctl(&self, line: &str) -> String {
        must(vsctl(&self.dir).args(line.split_whitespace()))
    }

    /// Asks the switch something.
    pub fn appctl(&self, line: &str) -> String {
        let mut command = Command::new("ovs-appctl");
        command
            .arg("-t")
            .arg(self.dir.path("vs.ctl"))
            .args(line.split_whitespace());
        must(&mut command)
    }

    /// A bridge in user space, which learns addresses as any switch.
    pub fn add_bridge(&self, bridge: &str) {
        self.vsctl(&format!(
            "add-br {bridge} -- set bridge {bridge} datapath_type=netdev"
        ));
    }

    /// The port `vu-NAME` of a bridge: a front-end at the socket of that name.
    pub fn add_front_end(&self, bridge: &str, name: &str, port: &PortConfig) {
        let PortConfig { queues, mtu, .. } = *port;
        let socket = self.socket(name);
        let mut devargs = format!(
            "net_virtio_user_{name},path={},queue_size=1024,queues={queues},packed_vq={}",
            socket.display(),
            u8::from(port.packed)
        );
        if port.listens {
            // A socket that is left over from the session before can't be bound.
            let _ = std::fs::remove_file(socket);
            devargs += ",server=1";
        }
        let mut more = String::new();
        if self.config.two_cores {
            // The frames of each pair are counted by the polling thread of its core.
            more += " other_config:pmd-rxq-affinity=0:0,1:1 other_config:tx-steering=hash";
        }
        self.vsctl(&format!(
            "add-port {bridge} vu-{name} -- set Interface vu-{name} type=dpdk \
             options:dpdk-devargs={devargs:?} options:n_rxq={queues} \
             mtu_request={mtu}{more}"
        ));
        let error = self.vsctl(&format!("get Interface vu-{name} error"));
        assert_eq!(error.trim(), "[]", "port vu-{name}: {}", self.log());
    }

    /// The port `vb-NAME` of a bridge: a back-end, which connects to a front-end that listens at
    /// the socket of that name, now or later.
    pub fn add_back_end(&self, bridge: &str, name: &str) {
        let socket = self.socket(name);
        self.vsctl(&format!(
            "add-port {bridge} vb-{name} -- set Interface vb-{name} type=dpdkvhostuserclient \
             options:vhost-server-path={}",
            socket.display()
        ));
        let error = self.vsctl(&format!("get Interface vb-{name} error"));
        assert_eq!(error.trim(), "[]", "port vb-{name}: {}", self.log());
    }

    /// Gives these flows to a bridge, in place of all that it had.
    pub fn set_flows(&self, bridge: &str, flows: &[String]) {
        self.ofctl("del-flows", bridge, None);
        for flow in flows {
            self.ofctl("add-flow", bridge, Some(flow));
        }
    }

    /// Frames that the port `vu-NAME` of a bridge has given to its back-end.
    pub fn sent(&self, bridge: &str, name: &str) -> u64 {
        let answer = self.ofctl("dump-ports", bridge, Some(&format!("vu-{name}")));
        let sent = answer.split("tx pkts=").nth(1);
        let sent = sent.and_then(|rest| rest.split(',').next()?.parse().ok());
        sent.unwrap_or_else(|| panic!("no frames sent in {answer}"))
    }

    fn ofctl(&self, command: &str, bridge: &str, argument: Option<&str>) -> String {
        let control = self.dir.path(&format!("{bridge}.mgmt"));
        let mut ofctl = Command::new("ovs-ofctl");
        ofctl.args([command, &format!("unix:{}", control.display())]);
        must(ofctl.args(argument))
    }

    /// Removes a port.
    pub fn del_front_end(&self, name: &str) {
        self.vsctl(&format!("del-port vu-{name}"));
    }

    /// A station with an address, on a port of its own; with `vlan` in that VLAN of the bridge.
    pub fn add_station(&self, bridge: &str, address: &str, vlan: Option<u16>) -> Station {
        let netns = Netns::new();
        let port = format!("v{}", address.replace('.', ""));
        // The switch's end has nothing to say of its own (IPv6).
        self.netns.ok(&format!(
            "ip link add {port} type veth peer name eth0 netns {} && \
             ip link set {port} addrgenmode none up",
            netns.name()
        ));
        // The switch sends what it gets: checksums must be there. (OVS 3.1 has no offloads for
        // virtio-user: it wants one for IPv4 headers, which virtio-net does not have.)
        netns.ok("ethtool -K eth0 tx off");
        netns.ok(&format!(
            "ip addr add {address}/24 dev eth0 && ip link set eth0 up"
        ));
        let tag = vlan.map_or_else(String::new, |vlan| format!(" tag={vlan}"));
        self.vsctl(&format!("add-port {bridge} {port}{tag}"));
        Station {
            netns,
            port,
            address: address.to_owned(),
        }
    }

    /// The MTU of a station, and of the switch's end of its cable.
    pub fn set_station_mtu(&self, station: &Station, mtu: u16) {
        self.netns
            .ok(&format!("ip link set {} mtu {mtu}", station.port));
        station.netns.ok(&format!("ip link set eth0 mtu {mtu}"));
    }

    /// Frames that each polling thread received, in the order of their cores.
    pub fn received_by_core(&self) -> Vec<u64> {
        let answer = self.appctl("dpif-netdev/pmd-stats-show");
        let threads = answer.split("pmd thread").skip(1);
        threads
            .filter_map(|thread| {
                let (_, after) = thread.split_once("packets received:")?;
                after.split_whitespace().next()?.parse().ok()
            })
            .collect()
    }

    /// What the switch reports of a port.
    pub fn interface(&self, name: &str, column: &str) -> String {
        let value = self.vsctl(&format!("get Interface vu-{name} {column}"));
        value.trim().trim_matches('"').to_owned()
    }

    /// Kills the switch as a crash does and starts it again; its ports come back by themselves.
    /// `listening` are those that listen, whose sockets a crash leaves and a new switch can't bind.
    pub fn crash_and_restart(&mut self, listening: &[&str]) {
        self.switch.end();
        // A switch that was killed leaves its control socket.
        std::fs::remove_file(self.dir.path("vs.ctl")).expect("the control socket");
        for name in listening {
            std::fs::remove_file(self.socket(name)).expect("the socket of a port");
        }
        self.switch = spawn_switch(&self.netns, &self.dir);
    }

    /// What the switch logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path("vs.out")).unwrap_or_default()
    }
}

/// The command that sets DPDK up before the switch starts.
fn set_up(set: &mut Command, config: OvsConfig) -> &mut Command {
    let [memory, limit] = MEMORY;
    let dpdk = format!(
        "--no-pci --in-memory --single-file-segments --no-telemetry -m {memory} \
         --socket-limit={limit}"
    );
    let cores = match config.alone_on {
        Some(core) => 1_u32 << core,
        None if config.two_cores => 0b11,
        None => 0b1,
    };
    set.args(["--no-wait", "init", "--", "set", "Open_vSwitch", "."])
        .arg("other_config:dpdk-init=true")
        .arg("other_config:dpdk-lcore-mask=0x1")
        // Else the first pool of buffers takes nearly all memory.
        .arg("other_config:per-port-memory=true")
        .arg(format!("other_config:dpdk-extra={dpdk:?}"))
        .arg(format!("other_config:pmd-cpu-mask={cores:#x}"));
    if config.alone_on.is_none() {
        // Polling threads may sleep: the daemon and the stations need the cores too. The second
        // name is that of OVS 3.2 and later.
        set.args([
            "other_config:pmd-maxsleep=100",
            "other_config:pmd-sleep-max=100",
        ]);
    }
    set
}

impl Drop for Ovs {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let from = log.lines().count().saturating_sub(40);
            eprintln!("--- the end of what OVS said:");
            log.lines()
                .skip(from)
                .for_each(|line| eprintln!("{line:.300}"));
        }
    }
}

fn spawn(command: &mut Command, dir: &TempDir, log: &str) -> Program {
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.path(log))
        .expect("a log file");
    let child = command
        .env("OVS_RUNDIR", dir.path(""))
        .env("OVS_DBDIR", dir.path(""))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second descriptor"))
        .stderr(log)
        .spawn()
        .expect("it can be run");
    Program(child)
}

/// The switch, ready for commands and with the ports that its database names.
fn spawn_switch(netns: &Netns, dir: &TempDir) -> Program {
    let mut command = netns.command(SWITCH);
    command
        .arg(format!("unix:{}", dir.path("db.sock").display()))
        .arg("--no-chdir")
        .arg(format!("--unixctl={}", dir.path("vs.ctl").display()));
    let child = spawn(&mut command, dir, "vs.out");
    wait_for_file(dir, "vs.ctl");
    // Returns when the switch has done what the database says.
    must(vsctl(dir).args(["set", "Open_vSwitch", ".", "external_ids:started=true"]));
    child
}

fn wait_for_file(dir: &TempDir, name: &str) {
    wait_until(name, PATIENCE, || dir.path(name).exists().then_some(()));
}

fn vsctl(dir: &TempDir) -> Command {
    let mut command = Command::new("ovs-vsctl");
    let database = dir.path("db.sock");
    // The socket is there before anyone listens at it.
    command.arg("--retry").args([
        format!("--db=unix:{}", database.display()),
        format!("--timeout={}", PATIENCE.as_secs()),
    ]);
    command
}

fn must(command: &mut Command) -> String {
    let output: Output = command.output().expect("it can be run");
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A host with one network interface.
pub struct Station {
    pub netns: Netns,
    pub address: String,
    /// The switch's end of its cable.
    port: String,
}

impl Station {
    /// Three pings, each of which must be answered; the first few may be lost while switches and
    /// the stations learn of each other.
    pub fn pings(&self, other: &Station, options: &str) {
        self.reaches(other);
        let line = format!("ping -q -c 3 -i 0.05 -W 2 {options} {}", other.address);
        self.netns.ok(&line);
    }

    /// Waits until an answer comes.
    pub fn reaches(&self, other: &Station) {
        let line = format!("ping -q -c 1 -W 0.3 {}", other.address);
        wait_until(&line, PATIENCE, || {
            self.netns.run(&line).status.success().then_some(())
        });
    }

    /// Whether one ping is answered at once.
    pub fn is_answered(&self, other: &Station) -> bool {
        let line = format!("ping -q -c 1 -W 0.3 {}", other.address);
        self.netns.run(&line).status.success()
    }

    /// An iperf3 server for one client, which listens already.
    pub fn serve_iperf(&self) -> (Program, ChildStdout) {
        let mut server = self.netns.command("iperf3");
        server.args(["-s", "-1", "--forceflush"]);
        let mut server = server.stdout(Stdio::piped()).spawn().expect("iperf3 runs");
        let mut said = server.stdout.take().expect("a pipe");
        let mut text = Vec::new();
        while !text.ends_with(b"listening") {
            let mut byte = [0];
            said.read_exact(&mut byte).expect("iperf3 listens");
            text.push(byte[0]);
        }
        (Program(server), said)
    }

    /// Sends so many MiB to `other` by iperf3 with so many streams; all of it must arrive.
    pub fn iperf(&self, other: &Station, mib: u64, streams: u64) {
        let (mut server, mut said) = other.serve_iperf();
        // The client ends when it has written everything: what the server has not read by then is
        // at most what small socket buffers hold.
        let client = self.netns.run(&format!(
            "timeout 60 iperf3 -c {} -n {mib}M -P {streams} -w 256K --json",
            other.address
        ));
        let report = String::from_utf8_lossy(&client.stdout).into_owned();
        if !client.status.success() {
            server.end();
        }
        let mut rest = Vec::new();
        said.read_to_end(&mut rest).expect("iperf3 ends");
        server.wait();
        assert!(client.status.success(), "{client:?}");
        let received = report.split("\"sum_received\"").nth(1).and_then(|sum| {
            let (_, after) = sum.split_once("\"bytes\":")?;
            after.split(',').next()?.trim().parse::<u64>().ok()
        });
        let received = received.unwrap_or_else(|| panic!("no sum in {report}"));
        assert!(
            received > (mib << 20) / 4 * 3,
            "{received} bytes in {report}"
        );
    }

    /// All that the first who connects to `port` says.
    pub fn receive_once(&self, port: u16) -> JoinHandle<Vec<u8>> {
        let address = format!("{}:{port}", self.address);
        let listener = self.netns.spawn(move || TcpListener::bind(address));
        let listener = listener.join().expect("no panic").expect("a listener");
        std::thread::spawn(move || {
            listener.set_nonblocking(true).expect("non-blocking");
            let accepted = wait_until("a client", PATIENCE, || listener.accept().ok());
            let mut stream = accepted.0;
            stream.set_nonblocking(false).expect("blocking");
            stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
            let mut said = Vec::new();
            stream.read_to_end(&mut said).expect("the client ends");
            said
        })
    }

    /// A TCP connection to `other`, which sends everything back.
    pub fn connect(&self, other: &Station) -> Conversation {
        const PORT: u16 = 7;
        let address = format!("{}:{PORT}", other.address);
        let bound = address.clone();
        let listener = other.netns.spawn(move || TcpListener::bind(bound));
        let listener = listener.join().expect("no panic").expect("a listener");
        std::thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            drop(listener);
            stream.set_nodelay(true)?;
            let mut buffer = vec![0; 1 << 16];
            loop {
                let length = stream.read(&mut buffer)?;
                if length == 0 {
                    return Ok(());
                }
                stream.write_all(&buffer[..length])?;
            }
        });
        let stream = self.netns.spawn(move || TcpStream::connect(address));
        let stream = stream.join().expect("no panic").expect("a connection");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        stream.set_write_timeout(Some(PATIENCE)).expect("a limit");
        Conversation { stream, said: 0 }
    }
}

/// A connection to a station that sends everything back.
pub struct Conversation {
    stream: TcpStream,
    said: u64,
}

impl Conversation {
    /// Sends random bytes and compares what comes back.
    pub fn exchange(&mut self, bytes: usize) {
        self.said += 1;
        let sent = random_bytes(self.said, bytes);
        let mut stream = self.stream.try_clone().expect("a second descriptor");
        let back = std::thread::scope(|scope| {
            scope.spawn(|| self.stream.write_all(&sent).expect("it is taken in time"));
            let mut back = vec![0; bytes];
            stream.read_exact(&mut back).expect("it comes back in time");
            back
        });
        assert!(back == sent, "exchange {} differs", self.said);
    }
}
