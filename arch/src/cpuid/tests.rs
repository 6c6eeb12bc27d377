use super::*;

fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = regs;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn vendor(name: &[u8; 12], max: u32) -> kvm_cpuid_entry2 {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    entry(0, 0, [max, word(0), word(8), word(4)])
}

/// Leaves that both vendors have, full of what must change.
fn common() -> Vec<kvm_cpuid_entry2> {
    vec![
        entry(1, 0, [0x906EA, 0x0710_0800, ECX_MONITOR | ECX_PDCM | 1, EDX_HTT | 2]),
        entry(5, 0, [0x40, 0x40, 3, 0x2020]),
        entry(6, 0, [0xFF, 2, 9, 0]),
        entry(7, 0, [1, EBX_SGX | 1, ECX_SGX_LC | 4, 8]),
        entry(7, 1, [0, EBX_SGX, 0, 0]),
        entry(0xA, 0, [0x0730_0805, 0, 0, 0x603]),
        entry(0xB, 0, [1, 2, 0x100, 77]),
        entry(0xB, 1, [4, 16, 0x201, 77]),
        entry(0x12, 0, [1, 0, 0, 0]),
        entry(0x4000_0000, 0, [0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D]),
        entry(0x4000_0001, 0, [0x0100_7EFB, 0, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_001F, 0, 0, 0]),
        entry(0x8000_0002, 0, [1, 2, 3, 4]),
        entry(0x8000_0008, 0, [0x3030, 5, 0xAB, 0]),
    ]
}

fn intel() -> CpuId {
    let mut entries = common();
    entries.push(vendor(b"GenuineIntel", 0x1F));
    // L1 data, L2, L3, the end; sharing and cores as on some big host.
    entries.push(entry(4, 0, [0xFC00_4121, 0x01C0_003F, 0x3F, 0]));
    entries.push(entry(4, 1, [0xFC00_4143, 0x00C0_003F, 0x3FF, 0]));
    entries.push(entry(4, 2, [0xFC07_C163, 0x03C0_003F, 0x2FFF, 6]));
    entries.push(entry(4, 3, [0; 4]));
    entries.push(entry(0x8000_0001, 0, [0, 0, 0x121, 0x2C10_0800]));
    CpuId::from_entries(&entries).unwrap()
}

fn amd() -> CpuId {
    let mut entries = common();
    entries.push(vendor(b"AuthenticAMD", 0x10));
    entries.push(entry(0x8000_0001, 0, [0, 0, ECX_TOPOEXT | 1, 0]));
    entries.push(entry(0x8000_001D, 0, [0x0000_4121, 0x01C0_003F, 0x3F, 0]));
    entries.push(entry(0x8000_001D, 1, [0x0003_C163, 0x03C0_003F, 0x7FFF, 1]));
    entries.push(entry(0x8000_001E, 0, [99, 0x01FF, 0x0303, 0]));
    CpuId::from_entries(&entries).unwrap()
}

fn regs(table: &CpuId, function: u32, index: u32) -> [u32; 4] {
    let found: Vec<_> =
        table.as_slice().iter().filter(|e| e.function == function && e.index == index).collect();
    assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
    [found[0].eax, found[0].ebx, found[0].ecx, found[0].edx]
}

fn of(supported: &CpuId, vcpus: u8, smt: bool, index: u8) -> CpuId {
    for_vcpu(supported, Topology::new(vcpus, smt).unwrap(), index).unwrap()
}

#[test]
fn features() {
    for supported in [intel(), amd()] {
        let table = of(&supported, 1, false, 0);
        let [eax, ebx, ecx, edx] = regs(&table, 1, 0);
        assert_eq!(eax, 0x906EA, "family and model stay");
        assert_eq!(ebx, 0x0001_0800, "APIC id 0, one vCPU, CLFLUSH size stays");
        assert_eq!(ecx, ECX_HYPERVISOR | ECX_TSC_DEADLINE | 1);
        assert_eq!(edx, 2, "no HTT with one vCPU");
        assert_eq!(regs(&table, 5, 0), [0; 4], "no MWAIT");
        assert_eq!(regs(&table, 6, 0), [EAX_ARAT, 0, 0, 0]);
        assert_eq!(regs(&table, 7, 0), [1, 1, 4, 8], "no SGX");
        assert_eq!(regs(&table, 7, 1), [0, EBX_SGX, 0, 0], "other subleaves have other bits");
        assert_eq!(regs(&table, 0xA, 0), [0; 4]);
        assert_eq!(regs(&table, 0x12, 0), [0; 4]);
        assert_eq!(regs(&table, 0x4000_0001, 0), [0x0100_7EFB, 0, 0, 0], "KVM's features stay");
        assert_eq!(regs(&table, 0x8000_0002, 0), [1, 2, 3, 4], "the brand stays");
    }
}

#[test]
fn apic_ids_and_levels() {
    // vCPUs, SMT, vCPU, then bits and threads of a core, bits of the package.
    for (vcpus, smt, index, thread_bits, threads, bits) in [
        (1, false, 0, 0, 1, 0),
        (1, true, 0, 0, 1, 0),
        (2, false, 1, 0, 1, 1),
        (2, true, 1, 1, 2, 1),
        (8, false, 7, 0, 1, 3),
        (8, true, 5, 1, 2, 3),
        (6, true, 4, 1, 2, 3),
        (32, true, 31, 1, 2, 5),
    ] {
        let table = of(&intel(), vcpus, smt, index);
        let (id, count) = (u32::from(index), u32::from(vcpus));
        let [_, ebx, _, edx] = regs(&table, 1, 0);
        assert_eq!((ebx >> 24, (ebx >> 16) & 0xFF), (id, count));
        assert_eq!(edx & EDX_HTT != 0, vcpus > 1);
        for function in [0xB, 0x1F] {
            assert_eq!(regs(&table, function, 0), [thread_bits, threads, 0x100, id]);
            assert_eq!(regs(&table, function, 1), [bits, count, 0x201, id]);
            assert_eq!(regs(&table, function, 2), [0, 0, 2, id]);
        }
        let leaf = table.as_slice().iter().find(|e| e.function == 0xB).unwrap();
        assert_eq!(leaf.flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
    }
    let table = of(&amd(), 2, false, 0);
    assert!(!table.as_slice().iter().any(|e| e.function == 0x1F), "beyond the highest leaf");
}

#[test]
fn intel_caches() {
    // Sharing in bits 14 to 25, cores in 26 to 31, each less one.
    let of = |vcpus, smt| {
        let table = of(&intel(), vcpus, smt, 0);
        assert_eq!(regs(&table, 4, 3), [0; 4]);
        assert_eq!(regs(&table, 4, 2)[1..], [0x03C0_003F, 0x2FFF, 6], "geometry stays");
        [0, 1, 2].map(|i| {
            let eax = regs(&table, 4, i)[0];
            (eax & 0x3FFF, (eax >> 14) & 0xFFF, eax >> 26)
        })
    };
    assert_eq!(of(1, false), [(0x121, 0, 0), (0x143, 0, 0), (0x163, 0, 0)]);
    assert_eq!(of(8, false), [(0x121, 0, 7), (0x143, 0, 7), (0x163, 7, 7)]);
    assert_eq!(of(8, true), [(0x121, 1, 3), (0x143, 1, 3), (0x163, 7, 3)]);
    assert_eq!(of(6, false), [(0x121, 0, 7), (0x143, 0, 7), (0x163, 7, 7)], "powers of two");
}

#[test]
fn amd_topology() {
    let table = of(&amd(), 8, true, 5);
    assert_eq!(regs(&table, 0x8000_0001, 0)[2], ECX_TOPOEXT | ECX_CMP_LEGACY | 1);
    assert_eq!(regs(&table, 0x8000_0008, 0), [0x3030, 5, 0x3007, 0]);
    assert_eq!(regs(&table, 0x8000_001E, 0), [5, 0x0102, 0, 0], "core 2, two threads, one node");
    assert_eq!(regs(&table, 0x8000_001D, 0)[0], 0x121 | (1 << 14));
    assert_eq!(regs(&table, 0x8000_001D, 1)[0], 0x163 | (7 << 14));

    let table = of(&amd(), 1, false, 0);
    assert_eq!(regs(&table, 0x8000_0001, 0)[2], ECX_TOPOEXT | 1);
    assert_eq!(regs(&table, 0x8000_0008, 0)[2], 0);
    assert_eq!(regs(&table, 0x8000_001E, 0), [0; 4]);

    let table = of(&intel(), 8, true, 5);
    assert_eq!(regs(&table, 0x8000_0008, 0)[2], 0xAB, "not on Intel");
}

#[test]
fn amd_caches_that_kvm_leaves_out() {
    let entries: Vec<_> = amd().as_slice().iter().filter(|e| e.function != 0x8000_001D).copied().collect();
    let table = of(&CpuId::from_entries(&entries).unwrap(), 8, false, 0);
    let leaves: Vec<_> = table.as_slice().iter().filter(|e| e.function == 0x8000_001D).collect();
    // What is there depends on the processor that runs the test; it ends with an empty entry.
    let (last, caches) = leaves.split_last().unwrap();
    assert_eq!(last.eax & 0x1F, 0);
    for cache in caches {
        let expected = if (cache.eax >> 5) & 7 >= 3 { 7 } else { 0 };
        assert_eq!((cache.eax >> 14) & 0xFFF, expected);
    }
}

#[test]
fn small_processors_get_no_leaves_beyond_their_last() {
    let entries = [vendor(b"GenuineIntel", 1), entry(1, 0, [0; 4])];
    let table = of(&CpuId::from_entries(&entries).unwrap(), 2, false, 1);
    assert_eq!(table.as_slice().len(), 2);
    assert_eq!(of(&CpuId::from_entries(&[]).unwrap(), 1, false, 0).as_slice().len(), 0);
}

#[test]
fn impossible_topologies() {
    assert_eq!(Topology::new(0, false), Err(CpuidError::Vcpus { vcpus: 0 }));
    assert_eq!(Topology::new(33, false), Err(CpuidError::Vcpus { vcpus: 33 }));
    assert_eq!(Topology::new(3, true), Err(CpuidError::OddWithSmt { vcpus: 3 }));
    let topology = Topology::new(2, false).unwrap();
    assert_eq!(for_vcpu(&intel(), topology, 2).unwrap_err(), CpuidError::Index { index: 2, vcpus: 2 });
    let full = vec![entry(0x8000_0001, 0, [0; 4]); 255];
    let mut entries = vec![vendor(b"GenuineIntel", 0x1F)];
    entries.extend(full);
    let full = CpuId::from_entries(&entries).unwrap();
    assert!(matches!(for_vcpu(&full, topology, 0), Err(CpuidError::TooMany { .. })));
}

#[test]
fn address_bits() {
    assert_eq!(physical_address_bits(&intel()), 0x30);
    assert_eq!(physical_address_bits(&CpuId::from_entries(&[]).unwrap()), 36);
}
