//! What an x86_64 microVM looks like to its guest.
//!
//! The crate knows formats and addresses: where memory and devices are ([`layout`]), how a kernel and an
//! initrd get into memory ([`kernel`], [`initrd`]), what is written beside them for the kernel to read
//! ([`cmdline`], [`boot_params`], [`acpi`], [`mptable`]), and what a vCPU is told about itself and starts
//! with ([`cpuid`], [`msr`], [`regs`]). It opens nothing, spawns nothing and creates no VM: guest memory,
//! files and vCPUs come from the caller.
//!
//! The order for a boot:
//! 1. [`layout::AddressMap::new`], then guest memory made from its `ram`;
//! 2. [`kernel::load`], [`initrd::load`];
//! 3. [`cmdline::build`], [`acpi::write_tables`], [`mptable::write`], [`boot_params::write`],
//!    [`regs::write_boot_tables`];
//! 4. for each vCPU [`cpuid::for_vcpu`] (KVM_SET_CPUID2) and [`msr::set_boot_msrs`]; for vCPU 0 also
//!    [`regs::set_boot_state`].

pub mod acpi;
pub mod boot_params;
pub mod cmdline;
pub mod cpuid;
mod image;
pub mod initrd;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod regs;
