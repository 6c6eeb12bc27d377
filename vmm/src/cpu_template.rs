//! `cpu-config`: changes of what CPUID and MSRs tell the guest.

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use resources::{CpuConfig, CpuidModifier, MsrModifier, Register};

/// Why a CPU template cannot be applied on this host.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A capability is missing.
    #[error(
        "cpu-config.kvm_capabilities: this host's KVM lacks capability {0}; remove it, or use another host"
    )]
    Capability(u32),
    /// There is no such leaf.
    #[error(
        "cpu-config.cpuid_modifiers: on this host the guest has no CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, with \
         flags {flags}; remove the modifier"
    )]
    Leaf {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
        /// KVM's flags.
        flags: u32,
    },
    /// There is no such MSR, or not such a value.
    #[error("cpu-config.msr_modifiers: KVM refused to {doing} MSR {index:#x}; remove the modifier")]
    Msr {
        /// `read` or `write`.
        doing: &'static str,
        /// Which one.
        index: u32,
        /// What the host said; none when it only skipped the MSR.
        source: Option<kvm_ioctls::Error>,
    },
}

/// Whether the host has every capability that the template needs. One with `!` is not needed.
pub fn check_capabilities(config: &CpuConfig, kvm: &Kvm) -> Result<(), TemplateError> {
    let needed = config.kvm_capabilities.iter().filter_map(|text| text.parse::<u32>().ok());
    for number in needed {
        if kvm.check_extension_raw(number.into()) <= 0 {
            return Err(TemplateError::Capability(number));
        }
    }
    Ok(())
}

/// Changes the leaves that the template names.
pub fn apply_cpuid(config: &CpuConfig, cpuid: &mut CpuId) -> Result<(), TemplateError> {
    for modifier in &config.cpuid_modifiers {
        let CpuidModifier { leaf, subleaf, flags, modifiers } = modifier;
        let entry = cpuid
            .as_mut_slice()
            .iter_mut()
            .find(|entry| (entry.function, entry.index, entry.flags) == (leaf.0, subleaf.0, *flags))
            .ok_or(TemplateError::Leaf { leaf: leaf.0, subleaf: subleaf.0, flags: *flags })?;
        for change in modifiers {
            let register = register(entry, change.register);
            *register = *register & !change.bitmap.filter | change.bitmap.value;
        }
    }
    Ok(())
}

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

/// Changes the MSRs that the template names.
pub fn apply_msrs(config: &CpuConfig, vcpu: &VcpuFd) -> Result<(), TemplateError> {
    for MsrModifier { addr, bitmap } in &config.msr_modifiers {
        let index = addr.0;
        let failed = |doing| move |source| TemplateError::Msr { doing, index, source };
        let entry = kvm_msr_entry { index, ..Default::default() };
        // One entry always fits.
        let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| failed("read")(None))?;
        match vcpu.get_msrs(&mut msrs) {
            Ok(1) => {}
            Ok(_) => return Err(failed("read")(None)),
            Err(error) => return Err(failed("read")(Some(error))),
        }
        for entry in msrs.as_mut_slice() {
            entry.data = entry.data & !bitmap.filter | bitmap.value;
        }
        match vcpu.set_msrs(&msrs) {
            Ok(1) => {}
            Ok(_) => return Err(failed("write")(None)),
            Err(error) => return Err(failed("write")(Some(error))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_bits_that_are_named_change() {
        let config: CpuConfig = serde_json::from_str(
            r#"{ "cpuid_modifiers": [ { "leaf": "0x1", "subleaf": "0x0", "flags": 0,
                 "modifiers": [ { "register": "ecx", "bitmap": "0b01x" } ] } ] }"#,
        )
        .unwrap();
        let entry = kvm_cpuid_entry2 { function: 1, ecx: 0b1101, edx: 7, ..Default::default() };
        let mut cpuid = CpuId::from_entries(&[entry]).unwrap();
        apply_cpuid(&config, &mut cpuid).unwrap();
        assert_eq!((cpuid.as_slice()[0].ecx, cpuid.as_slice()[0].edx), (0b1011, 7));
        let mut none = CpuId::from_entries(&[]).unwrap();
        assert!(matches!(apply_cpuid(&config, &mut none), Err(TemplateError::Leaf { leaf: 1, .. })));
    }
}
