//! `DeviceSession`: what the messages of one front-end do to one device.
//!
//! Plain `&mut self` methods without a lock of their own, called by the `vhost` crate's parser and
//! by the front door. A method's error is answered as a refusal where the front-end asked for an
//! answer; the session goes on. vhost-user: "Message types".

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vhost::vhost_user::Error as VhostError;
use vmm_sys_util::eventfd::EventFd;

use crate::device::{DeviceKind, DeviceModel};
use crate::engine::{EngineError, VringAddr, VringRunner, VringSetup};
use crate::memory::{GuestRam, RegionInfo, RegionSpec};
use crate::sys::{eventfd, peer};

use super::names;
use super::state::{
    PROTOCOL_FEATURES_BIT, SessionFds, SessionState, VringFds, VringState, VringStatus,
};

/// Memory regions at most; what QEMU asks of a back-end with CONFIGURE_MEM_SLOTS.
pub(super) const MEM_SLOTS: u64 = 509;

pub(super) mod proto {
    //! The protocol features that we offer (vhost-user: "Protocol features").
    pub(in super::super) const MQ: u64 = 1;
    pub(in super::super) const REPLY_ACK: u64 = 1 << 3;
    pub(in super::super) const BACKEND_REQ: u64 = 1 << 5;
    pub(in super::super) const CONFIG: u64 = 1 << 9;
    pub(in super::super) const RESET_DEVICE: u64 = 1 << 13;
    pub(in super::super) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub(in super::super) const STATUS: u64 = 1 << 16;
    /// Of every device; BACKEND_REQ only where there is something to be told over it.
    pub(in super::super) const ALWAYS: u64 =
        MQ | REPLY_ACK | CONFIG | RESET_DEVICE | CONFIGURE_MEM_SLOTS | STATUS;
}

/// What a message asked for and can't have; the text names the thing and the value.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refused(pub(super) String);

impl From<Refused> for VhostError {
    fn from(refused: Refused) -> VhostError {
        VhostError::ReqHandlerError(io::Error::other(refused))
    }
}

/// Makes a [`Refused`] of any error.
pub(super) fn refuse(error: impl core::fmt::Display) -> Refused {
    Refused(error.to_string())
}

pub(super) type Answer<T> = Result<T, Refused>;

/// What the parser holds as acknowledged. It keeps what we refuse, too, and answers by it.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    pub(super) features: u64,
    pub(super) protocol_features: u64,
}

/// One front-end's session with one device.
pub(super) struct DeviceSession {
    pub(super) device: Arc<dyn DeviceModel>,
    pub(super) runner: Arc<dyn VringRunner>,
    pub(super) state: SessionState,
    pub(super) fds: SessionFds,
    ram: Arc<GuestRam>,
    /// The connection, which is over when the front-end's memory is not there any more.
    socket: Option<OwnedFd>,
    /// Config space has changed, and was not read since.
    unread: bool,
    /// The features of the last `negotiated` line, so that it comes once per negotiation.
    logged: Option<u64>,
    /// The parser called one of our methods for the message at hand.
    pub(super) called: bool,
    /// As the parser knows them.
    pub(super) parsed: Parsed,
    /// Why a vring could not be stopped. The session ends then, whatever asked for the stop: the
    /// vring still uses guest memory, and where it will stand is not known.
    pub(super) stop_failed: Option<String>,
}

impl Drop for DeviceSession {
    fn drop(&mut self) {
        self.ram.ends(None);
    }
}

impl DeviceSession {
    pub(super) fn new(device: Arc<dyn DeviceModel>, runner: Arc<dyn VringRunner>) -> DeviceSession {
        let vrings = device.vrings_max();
        DeviceSession {
            device,
            runner,
            state: SessionState::new(vrings),
            fds: SessionFds {
                vrings: (0..vrings).map(|_| VringFds::default()).collect(),
                ..SessionFds::default()
            },
            ram: Arc::new(GuestRam::empty()),
            socket: None,
            unread: false,
            logged: None,
            called: false,
            parsed: Parsed::default(),
            stop_failed: None,
        }
    }

    /// A session that goes on where `state` was taken: maps the memory again and starts the vrings
    /// that ran.
    pub(super) fn resume(
        device: Arc<dyn DeviceModel>,
        runner: Arc<dyn VringRunner>,
        state: SessionState,
        fds: SessionFds,
    ) -> Answer<DeviceSession> {
        let mut session = DeviceSession::new(device, runner);
        if state.vrings.len() != session.state.vrings.len()
            || fds.vrings.len() != state.vrings.len()
            || fds.regions.len() != state.regions.len()
        {
            return Err(Refused(format!(
                "saved session of {} vrings and {} regions, fds for {} and {}, does not fit {}",
                state.vrings.len(),
                state.regions.len(),
                fds.vrings.len(),
                fds.regions.len(),
                session.device.name()
            )));
        }
        let specs = state
            .regions
            .iter()
            .zip(&fds.regions)
            .map(|(info, file)| RegionSpec {
                gpa: info.gpa,
                size: info.size,
                uva: info.uva,
                mmap_offset: info.mmap_offset,
                file: Arc::clone(file),
            });
        let specs: Vec<_> = specs.collect();
        session.check_files(&specs)?;
        session.ram = Arc::new(GuestRam::map(specs, None).map_err(refuse)?);
        session.state = state;
        session.fds = fds;
        for vring in &mut session.state.vrings {
            vring.status = VringStatus::Unset;
        }
        if let Some(features) = session.state.features {
            session.runner.negotiated(features).map_err(refuse)?;
        }
        (0..session.state.vrings.len()).for_each(|at| session.try_start(at));
        Ok(session)
    }

    fn vring(&mut self, index: u32) -> Answer<(usize, &mut VringState)> {
        let max = self.state.vrings.len();
        let name = self.device.name();
        let at = usize::try_from(index)
            .ok()
            .filter(|at| *at < max)
            .ok_or_else(|| {
                Refused(format!(
                    "vring index {index}: {name} has vrings 0 to {}",
                    max - 1
                ))
            })?;
        Ok((at, &mut self.state.vrings[at]))
    }

    /// The vring, which must not be started: its set-up can't change under a worker.
    fn stopped_vring(&mut self, index: u32, what: &str) -> Answer<&mut VringState> {
        let (_, vring) = self.vring(index)?;
        if vring.is_started() {
            return Err(Refused(format!(
                "{what} for vring {index} while it is started"
            )));
        }
        Ok(vring)
    }

    pub(super) fn set_features(&mut self, features: u64) -> Answer<()> {
        let offered = self.device.features() | PROTOCOL_FEATURES_BIT;
        let foreign = features & !offered;
        if foreign != 0 {
            let names = names::virtio(self.device.kind(), foreign);
            return Err(Refused(format!(
                "SET_FEATURES with bits that were not offered: {names}"
            )));
        }
        let started = self.state.vrings.iter().any(VringState::is_started);
        if started && self.state.features.is_some_and(|old| old != features) {
            return Err(Refused(format!(
                "SET_FEATURES {features:#x} while vrings are started"
            )));
        }
        self.runner.negotiated(features).map_err(refuse)?;
        self.device.negotiated(features);
        // QEMU sends its features twice; nothing new can start then.
        if self.state.features.replace(features) == Some(features) {
            return Ok(());
        }
        self.update_all()
    }

    /// The protocol features that the device offers.
    pub(super) fn protocol_offered(&self) -> u64 {
        if self.device.config_changes() {
            proto::ALWAYS | proto::BACKEND_REQ
        } else {
            proto::ALWAYS
        }
    }

    /// SET_BACKEND_REQ_FD.
    pub(super) fn set_channel(&mut self, file: Option<File>) -> Answer<()> {
        if self.state.protocol_features & proto::BACKEND_REQ == 0 {
            return Err(Refused("its feature was not negotiated".into()));
        }
        let file = file.ok_or_else(|| Refused("it comes without a descriptor".into()))?;
        self.fds.channel = Some(peer::adopt(file).map_err(refuse)?);
        Ok(())
    }

    /// Tells a front-end that wants to know it that config space has changed. It reads what it
    /// wants of it then. One that does not is told again when a vring starts: QEMU takes no notice
    /// while its guest's device is stopped.
    pub(super) fn config_changed(&mut self) {
        self.unread = true;
        self.tell_config();
    }

    fn tell_config(&self) {
        /// CONFIG_CHANGE_MSG of version 1, without a body or a reply.
        const MESSAGE: [u32; 3] = [2, 1, 0];
        let reads = self.state.protocol_features & proto::CONFIG != 0;
        let (true, Some(channel)) = (reads, &self.fds.channel) else {
            return;
        };
        let bytes = MESSAGE.map(u32::to_ne_bytes).concat();
        if let Err(error) = peer::send_now(channel, &bytes) {
            tracing::warn!(
                "{} {}: the front-end can't be told that config space has changed: {error}",
                self.kind(),
                self.device.name()
            );
        }
    }

    pub(super) fn set_protocol_features(&mut self, features: u64) -> Answer<()> {
        let foreign = features & !self.protocol_offered();
        if foreign != 0 {
            let names = names::protocol(foreign);
            return Err(Refused(format!(
                "SET_PROTOCOL_FEATURES with bits that were not offered: {names}"
            )));
        }
        self.state.protocol_features = features;
        Ok(())
    }

    /// Exchanges the whole memory table.
    pub(super) fn set_mem_table(&mut self, specs: Vec<RegionSpec>) -> Answer<()> {
        self.check_files(&specs)?;
        let ram = GuestRam::map(specs, Some(&self.ram)).map_err(refuse)?;
        self.state.repeated_regions.clear();
        self.use_memory(ram)
    }

    /// Memory that may wait for a disk is taken only where the operator wants it: a worker that
    /// touches it waits, too, with all devices that it serves.
    fn check_files(&self, specs: &[RegionSpec]) -> Answer<()> {
        if self.device.ring_options().memory_files {
            return Ok(());
        }
        let mut each = specs.iter();
        each.try_for_each(RegionSpec::stays_in_memory)
            .map_err(refuse)
    }

    /// The connection on which the front-end shows its memory.
    pub(super) fn connected(&mut self, socket: OwnedFd) {
        let socket = self.socket.insert(socket);
        self.ram.ends(Some(socket.as_fd()));
    }

    /// A region whose file has become shorter than it was, which ends the session.
    pub(super) fn torn(&self) -> Option<RegionInfo> {
        self.ram.torn()
    }

    pub(super) fn add_region(&mut self, spec: RegionSpec) -> Answer<()> {
        // QEMU 7.2 sends each region once for every queue pair, and removes it as often. That takes
        // no slot, but it is remembered, so it has its bound.
        let repeats = &mut self.state.repeated_regions;
        if self.ram.holds(&spec) {
            let max = MEM_SLOTS * self.state.vrings.len() as u64;
            if repeats.len() as u64 >= max {
                let gpa = spec.gpa;
                return Err(Refused(format!(
                    "ADD_MEM_REG: region at gpa {gpa:#x} again, after {max} repeated regions"
                )));
            }
            repeats.push(spec.info());
            return Ok(());
        }
        if self.ram.len() as u64 >= MEM_SLOTS {
            return Err(Refused(format!(
                "ADD_MEM_REG: all {MEM_SLOTS} memory slots are in use"
            )));
        }
        self.check_files(core::slice::from_ref(&spec))?;
        let ram = self.ram.with_region(spec).map_err(refuse)?;
        self.use_memory(ram)
    }

    pub(super) fn remove_region(&mut self, gpa: u64, size: u64, uva: u64) -> Answer<()> {
        let same = |info: &RegionInfo| (info.gpa, info.size, info.uva) == (gpa, size, uva);
        if let Some(at) = self.state.repeated_regions.iter().position(same) {
            self.state.repeated_regions.swap_remove(at);
            return Ok(());
        }
        let ram = self.ram.without_region(gpa, size, uva).map_err(refuse)?;
        self.use_memory(ram)
    }

    /// Started vrings go over to `ram` at a burst boundary. One whose ring is not in it is stopped,
    /// and starts again when a later table holds it. The table is taken either way: what a vring
    /// lacks is no reason to refuse memory.
    fn use_memory(&mut self, ram: GuestRam) -> Answer<()> {
        let ram = Arc::new(ram);
        self.ram.ends(None);
        ram.ends(self.socket.as_ref().map(AsFd::as_fd));
        self.ram = Arc::clone(&ram);
        let specs = ram.specs();
        self.state.regions = specs.iter().map(RegionSpec::info).collect();
        self.fds.regions = specs.into_iter().map(|spec| spec.file).collect();
        for at in 0..self.state.vrings.len() {
            let vring = &self.state.vrings[at];
            if let (true, Some(addr)) = (vring.is_started(), vring.addr) {
                if let Err(error) = self.runner.swap(index_of(at), Arc::clone(&ram), addr) {
                    tracing::warn!("{}: {error}; stopped", self.device.name());
                    self.stop_at(at)?;
                }
            } else {
                self.try_start(at);
            }
        }
        Ok(())
    }

    /// Starts what can be started. What can't waits for the message that makes it possible.
    fn try_start(&mut self, at: usize) {
        if let Err(error) = self.update(at) {
            tracing::warn!("{}: {error}; not started", self.device.name());
        }
    }

    pub(super) fn set_vring_num(&mut self, index: u32, num: u32) -> Answer<()> {
        let packed = self.is_packed();
        let vring = self.stopped_vring(index, "SET_VRING_NUM")?;
        let legal = (1..=32768).contains(&num) && (packed != Some(false) || num.is_power_of_two());
        let size = u16::try_from(num).ok().filter(|_| legal);
        vring.size = Some(size.ok_or_else(|| {
            Refused(format!(
                "SET_VRING_NUM for vring {index}: {num} is no ring size"
            ))
        })?);
        self.update(index as usize)
    }

    /// Whether the ring format is packed; `None` before SET_FEATURES.
    fn is_packed(&self) -> Option<bool> {
        self.state
            .features
            .map(|features| features & (1 << 34) != 0)
    }

    pub(super) fn set_vring_addr(&mut self, index: u32, addr: VringAddr) -> Answer<()> {
        let (_, vring) = self.vring(index)?;
        if vring.addr == Some(addr) {
            return Ok(());
        }
        self.stopped_vring(index, "SET_VRING_ADDR")?.addr = Some(addr);
        self.update(index as usize)
    }

    pub(super) fn set_vring_base(&mut self, index: u32, base: u32) -> Answer<()> {
        self.stopped_vring(index, "SET_VRING_BASE")?.base = Some(base);
        Ok(())
    }

    /// Stops the vring and says where it stands.
    pub(super) fn get_vring_base(&mut self, index: u32) -> Answer<u32> {
        let (at, _) = self.vring(index)?;
        self.stop_at(at)?;
        let vring = &mut self.state.vrings[at];
        // It starts again only when it is set up again.
        vring.kick_known = false;
        self.fds.vrings[at].kick = None;
        let stands = vring.base.or(vring.stood);
        Ok(stands.unwrap_or(if self.is_packed() == Some(true) {
            0x8000_8000
        } else {
            0
        }))
    }

    pub(super) fn set_vring_kick(&mut self, index: u32, file: Option<File>) -> Answer<()> {
        let kick = adopt(file)?;
        let (at, vring) = self.vring(index)?;
        if vring.is_started() {
            // Another kick fd for a started vring: over a stop, at the same base.
            self.stop_at(at)?;
        }
        self.fds.vrings[at].kick = kick;
        self.state.vrings[at].kick_known = true;
        self.update(at)
    }

    pub(super) fn set_vring_call(&mut self, index: u32, file: Option<File>) -> Answer<()> {
        let call = adopt(file)?;
        let (at, _) = self.vring(index)?;
        self.fds.vrings[at].call = call;
        self.pass_calls(at)
    }

    pub(super) fn set_vring_err(&mut self, index: u32, file: Option<File>) -> Answer<()> {
        let err = adopt(file)?;
        let (at, _) = self.vring(index)?;
        self.fds.vrings[at].err = err;
        self.pass_calls(at)
    }

    fn pass_calls(&mut self, at: usize) -> Answer<()> {
        if self.state.vrings[at].is_started() {
            let (call, err) = self.fds.vrings[at].call_and_err().map_err(refuse)?;
            self.runner
                .set_call(index_of(at), call, err)
                .map_err(refuse)?;
        }
        Ok(())
    }

    pub(super) fn set_vring_enable(&mut self, index: u32, enable: bool) -> Answer<()> {
        let (at, vring) = self.vring(index)?;
        vring.enable = Some(enable);
        let paused = vring.status == VringStatus::Paused;
        if vring.is_started() && paused == enable {
            self.runner.pause(index_of(at), !enable).map_err(refuse)?;
            self.state.vrings[at].status = if enable {
                VringStatus::Running
            } else {
                VringStatus::Paused
            };
        }
        self.update(at)
    }

    /// RESET_DEVICE: as after SET_OWNER, but for the memory table and the call fds, which the
    /// front-end does not send again.
    pub(super) fn reset_device(&mut self) -> Answer<()> {
        self.stop_all()?;
        for (vring, fds) in self.state.vrings.iter_mut().zip(&mut self.fds.vrings) {
            *vring = VringState::default();
            fds.kick = None;
        }
        self.state.status = 0;
        Ok(())
    }

    /// SET_STATUS (VIRTIO 1.3 §2.1); 0 resets the device.
    pub(super) fn set_status(&mut self, status: u8) -> Answer<()> {
        if status == 0 {
            self.stop_all()?;
            for (vring, fds) in self.state.vrings.iter_mut().zip(&mut self.fds.vrings) {
                // QEMU may have sent its only SET_VRING_ENABLE for the next start already. QEMU 7.2
                // asks vrings of other queue pairs for their bases only after this.
                *vring = VringState {
                    enable: vring.enable,
                    stood: vring.base.or(vring.stood),
                    ..VringState::default()
                };
                fds.kick = None;
            }
        } else {
            // The driver begins anew.
            self.state.vrings.iter_mut().for_each(|v| v.stood = None);
        }
        self.state.status = status;
        Ok(())
    }

    /// Stops every vring; afterwards nothing of this session touches guest memory.
    ///
    /// # Errors
    /// When one can't be stopped, now or before. The others are stopped all the same.
    pub(super) fn stop_all(&mut self) -> Answer<()> {
        let mut stopping = Vec::new();
        let mut errors = Vec::new();
        for at in 0..self.state.vrings.len() {
            match self.begin_stop(at) {
                Ok(true) => stopping.push(index_of(at)),
                Ok(false) => {}
                Err(error) => errors.push(error),
            }
        }
        let bases = self.runner.stop_all(&stopping);
        for (index, base) in stopping.into_iter().zip(bases) {
            errors.extend(self.end_stop(index, base).err());
        }
        for error in &errors {
            tracing::error!("{}: {error}", self.device.name());
        }
        errors.pop().map_or(Ok(()), Err)
    }

    fn stop_at(&mut self, at: usize) -> Answer<()> {
        if self.begin_stop(at)? {
            let index = index_of(at);
            self.end_stop(index, self.runner.stop(index))?;
        }
        Ok(())
    }

    /// Whether the vring has to be stopped; it is being stopped from now on.
    fn begin_stop(&mut self, at: usize) -> Answer<bool> {
        let vring = &mut self.state.vrings[at];
        if vring.status == VringStatus::Draining {
            // Its time is up; waiting for it once more would only delay the end.
            let index = index_of(at);
            return Err(Refused(format!("vring {index} is still being stopped")));
        }
        let is_started = vring.is_started();
        if is_started {
            vring.status = VringStatus::Draining;
        }
        Ok(is_started)
    }

    fn end_stop(&mut self, index: u16, base: Result<u32, EngineError>) -> Answer<()> {
        let base = base.map_err(refuse);
        let base = base.inspect_err(|error| self.stop_failed = Some(error.0.clone()))?;
        let vring = &mut self.state.vrings[usize::from(index)];
        vring.status = VringStatus::Unset;
        vring.base = Some(base);
        Ok(())
    }

    /// Starts every vring that has all it needs and is not started. One that can't start keeps no
    /// other from it.
    fn update_all(&mut self) -> Answer<()> {
        let mut first = Ok(());
        for at in 0..self.state.vrings.len() {
            first = first.and(self.update(at));
        }
        first
    }

    /// Starts the vring if it has all it needs and is not started.
    fn update(&mut self, at: usize) -> Answer<()> {
        let enabled = self.state.is_enabled(at);
        let Some(features) = self.state.features else {
            return Ok(());
        };
        let vring = &mut self.state.vrings[at];
        if vring.is_started() || vring.status == VringStatus::Draining {
            return Ok(());
        }
        let (Some(size), Some(addr), true) = (vring.size, vring.addr, vring.kick_known) else {
            vring.status = VringStatus::Unset;
            return Ok(());
        };
        vring.status = VringStatus::Ready;
        if !enabled || self.ram.is_empty() {
            return Ok(());
        }
        let base = vring.base;
        let (call, err) = self.fds.vrings[at].call_and_err().map_err(refuse)?;
        let kick = self.fds.vrings[at].kick.as_ref().map(EventFd::try_clone);
        let setup = VringSetup {
            index: index_of(at),
            size,
            features: features & !PROTOCOL_FEATURES_BIT,
            base,
            addr,
            ram: Arc::clone(&self.ram),
            kick: kick.transpose().map_err(refuse)?,
            call,
            err,
        };
        self.log_negotiated(features);
        self.runner.start(setup).map_err(refuse)?;
        self.state.vrings[at].status = VringStatus::Running;
        if self.unread {
            self.tell_config();
        }
        Ok(())
    }

    /// One line per negotiation, when its first vring starts.
    fn log_negotiated(&mut self, features: u64) {
        if self.logged == Some(features) {
            return;
        }
        self.logged = Some(features);
        let format = if features & (1 << 34) != 0 {
            "packed"
        } else {
            "split"
        };
        tracing::info!(
            "negotiated device={} rings={format} virtio={} protocol={}",
            self.device.name(),
            names::virtio(self.device.kind(), features),
            names::protocol(self.state.protocol_features),
        );
        let unseen = self.device.only_in_config();
        if self.state.protocol_features & proto::CONFIG == 0 && !unseen.is_empty() {
            tracing::info!(
                "{} {}: this front-end does not read the config space, which has {}: give it to \
                 the front-end",
                self.kind(),
                self.device.name(),
                unseen.join(", ")
            );
        }
    }

    pub(super) fn config(&mut self, offset: u32, size: u32) -> Answer<Vec<u8>> {
        // Front-ends ask for the largest layout that they know; what we don't have reads as zero.
        let mut bytes = self.device.config();
        let (from, len) = (offset as usize, size as usize);
        if from.saturating_add(len) > 4096 {
            return Err(Refused(format!(
                "GET_CONFIG of {size} bytes at {offset}: beyond 4096"
            )));
        }
        bytes.resize(bytes.len().max(from + len), 0);
        self.unread = false;
        Ok(bytes[from..from + len].to_vec())
    }

    pub(super) fn kind(&self) -> DeviceKind {
        self.device.kind()
    }
}

fn adopt(file: Option<File>) -> Answer<Option<EventFd>> {
    file.map(eventfd::adopt).transpose().map_err(refuse)
}

fn index_of(at: usize) -> u16 {
    u16::try_from(at).unwrap_or(u16::MAX)
}
