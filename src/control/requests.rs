//! The `vhost` crate's handler trait, spelled out over [`DeviceSession`].
//!
//! Only conversions stand here; what a message does is in `handler.rs`. Messages for features that
//! we don't offer are refused by name.

use std::fs::File;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::engine::VringAddr;
use crate::memory::RegionSpec;

use super::handler::{DeviceSession, MEM_SLOTS, refuse};
use super::state::PROTOCOL_FEATURES_BIT;

fn unsupported<T>(message: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(message))
}

impl VhostUserBackendReqHandlerMut for DeviceSession {
    fn set_owner(&mut self) -> Result<()> {
        self.called = true;
        self.state.owned = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.called = true;
        // Deprecated: to be ignored, or to disable all rings. Front-ends that negotiate no protocol
        // features could not enable them again.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.called = true;
        Ok(DeviceSession::reset_device(self)?)
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features() | PROTOCOL_FEATURES_BIT)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.called = true;
        self.parsed.features = features;
        Ok(DeviceSession::set_features(self, features)?)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.called = true;
        let spec = |(region, file): (&VhostUserMemoryRegion, File)| RegionSpec {
            gpa: region.guest_phys_addr,
            size: region.memory_size,
            uva: region.user_addr,
            mmap_offset: region.mmap_offset,
            file: Arc::new(file),
        };
        DeviceSession::set_mem_table(self, regions.iter().zip(files).map(spec).collect())?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        tracing::debug!("SET_VRING_NUM vring={index} num={num}");
        self.called = true;
        Ok(DeviceSession::set_vring_num(self, index, num)?)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        tracing::debug!(
            "SET_VRING_ADDR vring={index} desc={descriptor:#x} used={used:#x} avail={available:#x}"
        );
        self.called = true;
        let addr = VringAddr {
            desc: descriptor,
            driver: available,
            device: used,
        };
        Ok(DeviceSession::set_vring_addr(self, index, addr)?)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        tracing::debug!("SET_VRING_BASE vring={index} base={base:#x}");
        self.called = true;
        Ok(DeviceSession::set_vring_base(self, index, base)?)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        tracing::debug!("GET_VRING_BASE vring={index}");
        let base = DeviceSession::get_vring_base(self, index)?;
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        tracing::debug!("SET_VRING_KICK vring={index} fd={}", fd.is_some());
        self.called = true;
        Ok(DeviceSession::set_vring_kick(self, u32::from(index), fd)?)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        tracing::debug!("SET_VRING_CALL vring={index} fd={}", fd.is_some());
        self.called = true;
        Ok(DeviceSession::set_vring_call(self, u32::from(index), fd)?)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.called = true;
        Ok(DeviceSession::set_vring_err(self, u32::from(index), fd)?)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_truncate(
            self.protocol_offered(),
        ))
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.called = true;
        self.parsed.protocol_features = features;
        Ok(DeviceSession::set_protocol_features(self, features)?)
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.device.queues_max()))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        tracing::debug!("SET_VRING_ENABLE vring={index} enable={enable}");
        self.called = true;
        Ok(DeviceSession::set_vring_enable(self, index, enable)?)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.config(offset, size)?)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        self.called = true;
        Ok(self.device.write_config(offset, buf).map_err(refuse)?)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        self.called = true;
        unsupported("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("GET_SHARED_OBJECT")
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported("GET_INFLIGHT_FD")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        self.called = true;
        unsupported("SET_INFLIGHT_FD")
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEM_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.called = true;
        self.add_region(RegionSpec {
            gpa: region.guest_phys_addr,
            size: region.memory_size,
            uva: region.user_addr,
            mmap_offset: region.mmap_offset,
            file: Arc::new(fd),
        })?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.called = true;
        let (gpa, size) = (region.guest_phys_addr, region.memory_size);
        Ok(self.remove_region(gpa, size, region.user_addr)?)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        self.called = true;
        unsupported("SET_DEVICE_STATE_FD")
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.called = true;
        unsupported("CHECK_DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("GET_SHMEM_CONFIG")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        self.called = true;
        unsupported("SET_LOG_BASE")
    }
}
