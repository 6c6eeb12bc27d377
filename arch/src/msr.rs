//! Model-specific registers that a vCPU starts with.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::cpuid::is_amd;

// Indices and bits from SDM volume 4, chapter 2.
const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1A0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
const IA32_STAR: u32 = 0xC000_0081;
const IA32_LSTAR: u32 = 0xC000_0082;
const CSTAR: u32 = 0xC000_0083;
const IA32_FMASK: u32 = 0xC000_0084;
const IA32_KERNEL_GS_BASE: u32 = 0xC000_0102;
const AMD_HWCR: u32 = 0xC001_0015;

/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
/// MTRRs on, everything write-back: what firmware would have left, but without ranges, which guests with
/// page attributes do not need.
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

const BOOT_MSRS: [(u32, u64); 11] = [
    (IA32_SYSENTER_CS, 0),
    (IA32_SYSENTER_ESP, 0),
    (IA32_SYSENTER_EIP, 0),
    (IA32_STAR, 0),
    (CSTAR, 0),
    (IA32_KERNEL_GS_BASE, 0),
    (IA32_FMASK, 0),
    (IA32_LSTAR, 0),
    (IA32_TSC, 0),
    (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (IA32_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
];

/// AMD's `TscFreqSel`: the TSC counts at the P0 frequency. Linux calls its absence a firmware bug.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;

/// Why the registers could not be set.
#[derive(Debug, thiserror::Error)]
pub enum MsrError {
    /// The list could not be made.
    #[error("cannot make the list of {count} MSRs for KVM")]
    List {
        /// Registers in it.
        count: usize,
    },
    /// KVM refused the call.
    #[error("KVM cannot set the boot MSRs of a vCPU")]
    Set(#[source] kvm_ioctls::Error),
    /// KVM refused one register.
    #[error("KVM refused to set MSR {index:#x} to {value:#x}")]
    Refused {
        /// Which one.
        index: u32,
        /// The value.
        value: u64,
    },
}

/// Sets the registers that every vCPU starts with.
///
/// # Errors
/// KVM refused a register, which is named.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), MsrError> {
    let entries = BOOT_MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| MsrError::List { count: entries.len() })?;
    let set = vcpu.set_msrs(&msrs).map_err(MsrError::Set)?;
    // KVM stops at the first that it refuses.
    if let Some((index, value)) = BOOT_MSRS.get(set) {
        return Err(MsrError::Refused { index: *index, value: *value });
    }
    if is_amd(__cpuid(0)) {
        // Refused by kernels before 6.8; the guest then prints a line about it, and that is all.
        let hwcr = kvm_msr_entry { index: AMD_HWCR, data: HWCR_TSC_FREQ_SEL, ..Default::default() };
        let msrs = Msrs::from_entries(&[hwcr]).map_err(|_| MsrError::List { count: 1 })?;
        vcpu.set_msrs(&msrs).map_err(MsrError::Set)?;
    }
    Ok(())
}
