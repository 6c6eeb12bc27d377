//! What the guest is told of its machine: command line, ACPI and MP tables, zero page, CPUID, for any declared state.

use arch::acpi::{self, Platform};
use arch::boot_params::{self, BootInfo};
use arch::cmdline::{self, RootDrive};
use arch::cpuid::{self, Topology};
use arch::kernel::LoadedKernel;
use arch::layout::{AddressMap, MmioDevice, Window, virtio_mmio_window};
use arch::mptable;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::input::Input;

fn devices(input: &mut Input<'_>) -> Vec<MmioDevice> {
    let count = input.u8() % 32;
    (0..u64::from(count))
        .map(|index| match input.u8() {
            0..0xF0 => {
                let window = virtio_mmio_window(index).expect("there are as many windows");
                MmioDevice { base: window.start, size: window.size, gsi: u32::from(input.u8()) }
            }
            _ => MmioDevice { base: GuestAddress(input.u64()), size: input.u64(), gsi: input.u32() },
        })
        .collect()
}

fn cpu_tables(input: &mut Input<'_>) {
    let (count, smt) = (input.u8(), input.flag());
    let Ok(topology) = Topology::new(count, smt) else { return };
    let entries: Vec<_> = (0..input.u8() % 80)
        .map(|_| kvm_cpuid_entry2 {
            function: if input.flag() { input.u32() } else { u32::from(input.u8() & 0x1F) },
            index: u32::from(input.u8() & 3),
            eax: input.u32(),
            ebx: input.u32(),
            ecx: input.u32(),
            edx: input.u32(),
            ..Default::default()
        })
        .collect();
    let Ok(supported) = CpuId::from_entries(&entries) else { return };
    let _ = cpuid::physical_address_bits(&supported);
    let _ = cpuid::for_vcpu(&supported, topology, input.u8());
}

/// All of it.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let devices = devices(&mut input);
    let cpus = input.u8();
    let pci = input.flag().then(|| Window { start: GuestAddress(input.u64()), size: input.u64() >> 16 });
    let max_cpus = if input.flag() { cpus.max(input.u8()) } else { cpus };
    let map = AddressMap::new(u64::from(input.u32()) << 12, input.u8());
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("the host has memory");
    let has_pci = pci.is_some();
    let platform = Platform { cpus, max_cpus, virtio_mmio: devices.clone(), pci };
    let rsdp = acpi::write_tables(&memory, &platform);
    let _ = mptable::write(&memory, cpus);
    cpu_tables(&mut input);
    let (partuuid, choice) = (String::from_utf8_lossy(input.short_bytes()), input.u8());
    let root = RootDrive { partuuid: (choice & 1 != 0).then_some(&partuuid), read_only: choice & 2 != 0 };
    let args = String::from_utf8_lossy(input.rest());
    let _ = cmdline::hides_pci(&args);
    let line = cmdline::build(
        (choice & 4 == 0).then_some(&args),
        (choice & 8 != 0).then_some(root),
        (!has_pci).then_some(&devices),
    );
    let (Ok(line), Ok(map), Ok(rsdp)) = (line, map, rsdp) else { return };
    assert!(line.as_cstring().expect("it was built").as_bytes().len() < cmdline::MAX_SIZE);
    let kernel =
        LoadedKernel { entry: GuestAddress(0x10_0000), setup_header: None, end: GuestAddress(0x11_0000) };
    let info = BootInfo { map: &map, kernel: &kernel, initrd: None, cmdline: &line, rsdp, pci: has_pci };
    boot_params::write(&memory, &info).expect("a command line that was built has its place");
}
