//! What CPUID tells a vCPU: KVM's supported set with this VM's topology in it, and without what we cannot
//! provide (SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst).

use std::arch::x86_64::{__cpuid_count, CpuidResult};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

#[cfg(test)]
mod tests;

/// Most vCPUs of a VM.
pub const MAX_VCPUS: u8 = 32;

// Leaf 1
const ECX_MONITOR: u32 = 1 << 3;
const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
// Leaf 6
const EAX_ARAT: u32 = 1 << 2;
// Leaf 7, subleaf 0
const EBX_SGX: u32 = 1 << 2;
const ECX_SGX_LC: u32 = 1 << 30;
// Leaf 0x8000_0001
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_TOPOEXT: u32 = 1 << 22;

const LEAF_EXTENDED: u32 = 0x8000_0000;
const LEAF_ADDRESS_BITS: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001D;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001E;

/// Levels of leaves 0xB and 0x1F.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// How the vCPUs of a VM are arranged: one package, one or two threads a core; APIC ids are vCPU indices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    vcpus: u8,
    threads_per_core: u8,
}

/// Why there is no CPUID for a vCPU.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuidError {
    /// No VM has that many.
    #[error("{vcpus} vCPUs are not possible: give 1 to {MAX_VCPUS}")]
    Vcpus {
        /// vCPUs asked for.
        vcpus: u8,
    },
    /// Pairs of threads need an even number.
    #[error("{vcpus} vCPUs cannot be paired to cores: give 1 or an even number, or switch SMT off")]
    OddWithSmt {
        /// vCPUs asked for.
        vcpus: u8,
    },
    /// The index is not one of the topology's.
    #[error("there is no vCPU {index} among {vcpus}")]
    Index {
        /// The index.
        index: u8,
        /// vCPUs of the topology.
        vcpus: u8,
    },
    /// KVM takes no more entries.
    #[error("the CPUID table has {count} entries, more than KVM takes")]
    TooMany {
        /// Entries.
        count: usize,
    },
}

impl Topology {
    /// `vcpus` that there may be, those to be plugged in included; with `smt` two of them share a core.
    ///
    /// # Errors
    /// None or too many vCPUs, or an odd number above 1 with `smt`.
    pub fn new(vcpus: u8, smt: bool) -> Result<Self, CpuidError> {
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(CpuidError::Vcpus { vcpus });
        }
        if smt && vcpus > 1 && !vcpus.is_multiple_of(2) {
            return Err(CpuidError::OddWithSmt { vcpus });
        }
        Ok(Self { vcpus, threads_per_core: if smt && vcpus > 1 { 2 } else { 1 } })
    }

    fn vcpus(self) -> u32 {
        u32::from(self.vcpus)
    }

    fn threads_per_core(self) -> u32 {
        u32::from(self.threads_per_core)
    }

    fn cores(self) -> u32 {
        self.vcpus() / self.threads_per_core()
    }

    /// Bits of the APIC id that tell vCPUs apart.
    fn id_bits(self) -> u32 {
        self.vcpus().next_power_of_two().ilog2()
    }

    /// Bits of the APIC id that tell threads of a core apart.
    fn thread_bits(self) -> u32 {
        self.threads_per_core().ilog2()
    }

    /// APIC ids that may share a cache, less one: those of a core, or of the package from level 3 on.
    fn sharing(self, cache_level: u32) -> u32 {
        let ids = if cache_level >= 3 { self.vcpus().next_power_of_two() } else { self.threads_per_core() };
        ids - 1
    }
}

/// The physical address bits that the guest will see, from KVM's supported set (leaf 0x8000_0008); 36, what
/// every x86_64 processor has, if it does not say.
#[must_use]
pub fn physical_address_bits(supported: &CpuId) -> u8 {
    const FALLBACK: u8 = 36;
    supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == LEAF_ADDRESS_BITS)
        .map_or(FALLBACK, |entry| entry.eax.to_le_bytes()[0])
}

/// The table for KVM_SET_CPUID2 of vCPU `index`, from what KVM_GET_SUPPORTED_CPUID gave.
///
/// # Errors
/// `index` is not in `topology`, or the table got too long for KVM.
pub fn for_vcpu(supported: &CpuId, topology: Topology, index: u8) -> Result<CpuId, CpuidError> {
    if index >= topology.vcpus {
        return Err(CpuidError::Index { index, vcpus: topology.vcpus });
    }
    let mut table = Table { entries: supported.as_slice().to_vec(), topology, apic_id: u32::from(index) };
    table.features();
    table.topology_leaves();
    table.intel_caches();
    if table.is_amd() {
        table.amd();
    }
    CpuId::from_entries(&table.entries).map_err(|_| CpuidError::TooMany { count: table.entries.len() })
}

/// Whether leaf 0 names AMD, or Hygon, whose processors are AMD's.
pub(crate) fn is_amd(leaf: CpuidResult) -> bool {
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    vendor == b"AuthenticAMD" || vendor == b"HygonGenuine"
}

struct Table {
    entries: Vec<kvm_cpuid_entry2>,
    topology: Topology,
    apic_id: u32,
}

impl Table {
    fn get(&self, function: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|entry| entry.function == function)
    }

    /// All subleaves of a leaf.
    fn leaf(&mut self, function: u32) -> impl Iterator<Item = &mut kvm_cpuid_entry2> {
        self.entries.iter_mut().filter(move |entry| entry.function == function)
    }

    /// Replaces a leaf by these subleaves, given as EAX to EDX.
    fn replace(&mut self, function: u32, subleaves: &[[u32; 4]]) {
        self.entries.retain(|entry| entry.function != function);
        for (index, [eax, ebx, ecx, edx]) in (0..).zip(subleaves) {
            self.entries.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: *eax,
                ebx: *ebx,
                ecx: *ecx,
                edx: *edx,
                ..Default::default()
            });
        }
    }

    /// Zeroes a leaf that may be there.
    fn clear(&mut self, function: u32) {
        for entry in self.leaf(function) {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
    }

    /// The highest leaf of the range that starts at `base` (0 or 0x8000_0000).
    fn max_leaf(&self, base: u32) -> u32 {
        self.get(base).map_or(base, |entry| entry.eax)
    }

    fn is_amd(&self) -> bool {
        self.get(0).is_some_and(|entry| {
            is_amd(CpuidResult { eax: entry.eax, ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx })
        })
    }

    /// Feature bits that do not depend on the vendor.
    fn features(&mut self) {
        let Topology { vcpus, .. } = self.topology;
        let apic_id = self.apic_id;
        for entry in self.leaf(1) {
            // CLFLUSH size and brand index stay; then the vCPUs of the package and the APIC id.
            entry.ebx = (entry.ebx & 0xFFFF) | (u32::from(vcpus) << 16) | (apic_id << 24);
            // There is no PIT: the guest's clock events come from the local APIC, by TSC deadline.
            entry.ecx |= ECX_HYPERVISOR | ECX_TSC_DEADLINE;
            entry.ecx &= !(ECX_MONITOR | ECX_PDCM);
            entry.edx = if vcpus > 1 { entry.edx | EDX_HTT } else { entry.edx & !EDX_HTT };
        }
        // No MWAIT.
        self.clear(5);
        // KVM's APIC timer always runs; nothing else of power management is there. The entry has no
        // subleaves, so it is not made by `replace`.
        if self.max_leaf(0) >= 6 {
            self.entries.retain(|entry| entry.function != 6);
            self.entries.push(kvm_cpuid_entry2 { function: 6, eax: EAX_ARAT, ..Default::default() });
        }
        // No enclaves: their memory would need sections of its own.
        for entry in self.leaf(7).filter(|entry| entry.index == 0) {
            entry.ebx &= !EBX_SGX;
            entry.ecx &= !ECX_SGX_LC;
        }
        self.clear(0x12);
        // No architectural performance counters.
        self.clear(0xA);
        self.clear(0x23);
    }

    /// Leaves 0xB and 0x1F: threads, then cores, then an end mark; EDX is the x2APIC id.
    fn topology_leaves(&mut self) {
        let topology = self.topology;
        let threads = [topology.thread_bits(), topology.threads_per_core(), LEVEL_SMT << 8, self.apic_id];
        let cores = [topology.id_bits(), topology.vcpus(), 1 | (LEVEL_CORE << 8), self.apic_id];
        let levels = [threads, cores, [0, 0, 2, self.apic_id]];
        for function in [0xB, 0x1F] {
            let there = self.max_leaf(0) >= function;
            self.replace(function, if there { &levels } else { &[] });
        }
    }

    /// Leaf 4: who shares each cache, and the cores of the package.
    fn intel_caches(&mut self) {
        let topology = self.topology;
        for entry in self.leaf(4).filter(|entry| entry.eax & 0x1F != 0) {
            let level = (entry.eax >> 5) & 0b111;
            let cores = topology.cores().next_power_of_two() - 1;
            entry.eax = (entry.eax & 0x3FFF) | (topology.sharing(level) << 14) | (cores << 26);
        }
    }

    fn amd(&mut self) {
        let topology = self.topology;
        let apic_id = self.apic_id;
        let mut topoext = false;
        for entry in self.leaf(LEAF_EXTENDED + 1) {
            topoext = entry.ecx & ECX_TOPOEXT != 0;
            let several = if topology.vcpus > 1 { ECX_CMP_LEGACY } else { 0 };
            entry.ecx = (entry.ecx & !ECX_CMP_LEGACY) | several;
        }
        for entry in self.leaf(LEAF_ADDRESS_BITS) {
            // Threads of the package less one, and the bits of an APIC id that tell them apart.
            entry.ecx = (topology.vcpus() - 1) | (topology.id_bits() << 12);
        }
        if !topoext {
            return;
        }
        if self.max_leaf(LEAF_EXTENDED) >= LEAF_AMD_TOPOLOGY {
            let core = (apic_id >> topology.thread_bits()) | ((topology.threads_per_core() - 1) << 8);
            // One node.
            self.entries.retain(|entry| entry.function != LEAF_AMD_TOPOLOGY);
            self.entries.push(kvm_cpuid_entry2 {
                function: LEAF_AMD_TOPOLOGY,
                eax: apic_id,
                ebx: core,
                ..Default::default()
            });
            self.amd_caches();
        }
    }

    /// Leaf 0x8000_001D. KVM leaves it empty, so the caches are those of the processor that we run on,
    /// shared as this VM's vCPUs share them.
    fn amd_caches(&mut self) {
        const MAX_CACHES: u32 = 8;
        let empty = self.get(LEAF_AMD_CACHES).is_none_or(|entry| entry.eax & 0x1F == 0);
        if empty {
            let caches: Vec<_> = (0..MAX_CACHES)
                .map(|index| host_leaf(LEAF_AMD_CACHES, index))
                .take_while(|[eax, ..]| eax & 0x1F != 0)
                .chain([[0; 4]])
                .collect();
            self.replace(LEAF_AMD_CACHES, &caches);
        }
        let topology = self.topology;
        for entry in self.leaf(LEAF_AMD_CACHES).filter(|entry| entry.eax & 0x1F != 0) {
            let level = (entry.eax >> 5) & 0b111;
            entry.eax = (entry.eax & 0x3FFF) | (topology.sharing(level) << 14);
        }
    }
}

/// A leaf of the processor that we run on; zeroes if it has no such leaf.
fn host_leaf(function: u32, index: u32) -> [u32; 4] {
    if __cpuid_count(LEAF_EXTENDED, 0).eax < function {
        return [0; 4];
    }
    let leaf = __cpuid_count(function, index);
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}
