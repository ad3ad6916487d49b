//! The guest's CPU model: what CPUID says and which constant MSRs there are, the same under every
//! engine.
//!
//! The identity is a Nehalem's (family 6, model 26), the oldest Intel processor at the x86-64-v2
//! level, so that a guest looks for nothing newer. Numbers of leaves and bits are those of the Intel
//! 64 and IA-32 Architectures Software Developer's Manual: CPUID in volume 2A, MSRs in volume 4.
//! There is no APIC, MTRR, machine check, XSAVE, AVX, RDRAND, MONITOR, PCID or RDTSCP: the board has
//! no part for the first, and the others are state or values that a recording would have to carry.

#[cfg(test)]
mod tests;

/// The model's name, as a recording's header gives it.
pub const NAME: &str = "reprise-x86-64-v2";
/// The model's version: any change in this file that a guest can see raises it.
pub const VERSION: u32 = 2;
/// Counts of the time-stamp counter in a second: one a nanosecond of virtual time.
pub const TSC_HZ: u64 = 1_000_000_000;
/// Width of a guest-physical address, in bits.
pub const PHYSICAL_ADDRESS_BITS: u32 = 40;
/// Width of a linear address, in bits.
pub const LINEAR_ADDRESS_BITS: u32 = 48;

/// What CPUID answers for one leaf, or one subleaf of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub leaf: u32,
    /// ECX on entry; `None` where the answer does not depend on it.
    pub subleaf: Option<u32>,
    /// EAX on return.
    pub eax: u32,
    /// EBX on return.
    pub ebx: u32,
    /// ECX on return.
    pub ecx: u32,
    /// EDX on return.
    pub edx: u32,
}

/// Whether CPUID tells the guest of the time-stamp counter. A hypervisor that cannot trap RDTSC leaves it
/// out, so that a guest has no reason to read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeStampCounter {
    /// As the model says.
    Shown,
    /// There is none, and so none that is invariant.
    Hidden,
}

impl TimeStampCounter {
    /// The bits of EDX that this takes away from a leaf.
    pub const fn hidden_in_edx(self, leaf: u32) -> u32 {
        match (self, leaf) {
            (Self::Hidden, 1) => 1 << 4,
            (Self::Hidden, 0x8000_0007) => 1 << 8,
            _ => 0,
        }
    }
}

/// What becomes of a WRMSR to a constant MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrWrite {
    /// Nothing happens.
    Ignored,
    /// The guest takes #GP(0).
    Faults,
}

/// A model-specific register whose value never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msr {
    /// ECX of RDMSR.
    pub index: u32,
    /// What RDMSR gives.
    pub value: u64,
    /// What WRMSR does.
    pub write: MsrWrite,
}

/// The constant MSRs. Those with state (TSC, SYSCALL, SYSENTER, EFER, PAT, segment bases) are the
/// engine's; RDMSR and WRMSR of any other fault.
pub static MSRS: &[Msr] = &[
    // IA32_PLATFORM_ID: Linux's microcode loader asks.
    Msr { index: 0x17, value: 0, write: MsrWrite::Faults },
    // IA32_APIC_BASE: where an APIC would be, boot processor, not enabled.
    Msr { index: 0x1b, value: 0xfee0_0100, write: MsrWrite::Faults },
    // IA32_FEATURE_CONTROL: locked without VMX, or Linux would try to lock it.
    Msr { index: 0x3a, value: 1, write: MsrWrite::Faults },
    // IA32_BIOS_SIGN_ID: microcode revision 1. Linux writes zero before it reads.
    Msr { index: 0x8b, value: 1 << 32, write: MsrWrite::Ignored },
    // MSR_PLATFORM_INFO: no CPUID faulting.
    Msr { index: 0xce, value: 0, write: MsrWrite::Faults },
    // MSR_MISC_FEATURES_ENABLES: nothing to enable. Linux writes back what it read.
    Msr { index: 0x140, value: 0, write: MsrWrite::Ignored },
    // IA32_MISC_ENABLE: fast strings; no branch trace store, no PEBS; XD and all CPUID leaves stay
    // on. Without fast strings Linux copies in loops.
    Msr { index: 0x1a0, value: 0x1801, write: MsrWrite::Ignored },
    // IA32_DEBUGCTL: no last-branch record. Linux's #DB handler writes it.
    Msr { index: 0x1d9, value: 0, write: MsrWrite::Ignored },
];

/// The highest basic leaf.
const MAX_BASIC_LEAF: u32 = 7;
/// The highest extended leaf.
const MAX_EXTENDED_LEAF: u32 = 0x8000_0008;
/// The first hypervisor leaf, and the only one.
const HYPERVISOR_LEAF: u32 = 0x4000_0000;

/// Family 6, model 26 (1Ah), stepping 3.
const SIGNATURE: u32 = (1 << 16) | (6 << 8) | (0xa << 4) | 3;
/// CLFLUSH line, in bytes.
const CLFLUSH_BYTES: u32 = 64;

/// A register with these bits set.
const fn bits(positions: &[u32]) -> u32 {
    let mut value = 0;
    let mut index = 0;
    while index < positions.len() {
        value |= 1 << positions[index];
        index += 1;
    }
    value
}

/// Four bytes of a text, as CPUID returns it; zeros past its end.
const fn text(text: &str, offset: usize) -> u32 {
    let bytes = text.as_bytes();
    let mut value = 0;
    let mut index = 0;
    while index < 4 {
        if offset + index < bytes.len() {
            value |= (bytes[offset + index] as u32) << (8 * index);
        }
        index += 1;
    }
    value
}

const fn leaf(leaf: u32, registers: [u32; 4]) -> CpuidLeaf {
    let [eax, ebx, ecx, edx] = registers;
    CpuidLeaf { leaf, subleaf: None, eax, ebx, ecx, edx }
}

const fn subleaf(leaf: u32, subleaf: u32, registers: [u32; 4]) -> CpuidLeaf {
    let [eax, ebx, ecx, edx] = registers;
    CpuidLeaf { leaf, subleaf: Some(subleaf), eax, ebx, ecx, edx }
}

/// The cache kinds of leaf 4.
const DATA: u32 = 1;
const INSTRUCTION: u32 = 2;
const UNIFIED: u32 = 3;

/// A cache of leaf 4, used by one thread of one core.
const fn cache(index: u32, kind: u32, level: u32, ways: u32, sets: u32, edx: u32) -> CpuidLeaf {
    const SELF_INITIALIZING: u32 = 1 << 8;
    let eax = kind | (level << 5) | SELF_INITIALIZING;
    subleaf(4, index, [eax, ((ways - 1) << 22) | (CLFLUSH_BYTES - 1), sets - 1, edx])
}

const VENDOR: &str = "GenuineIntel";
const HYPERVISOR: &str = "RepriseVMM";
const BRAND: &str = "Reprise x86-64-v2";

/// A third of the brand string.
const fn brand(number: u32) -> CpuidLeaf {
    let offset = number as usize * 16;
    let registers = [
        text(BRAND, offset),
        text(BRAND, offset + 4),
        text(BRAND, offset + 8),
        text(BRAND, offset + 12),
    ];
    leaf(0x8000_0002 + number, registers)
}

/// Every leaf, ordered. A leaf or subleaf that is not here, but below its range's highest, is zeros.
pub static LEAVES: &[CpuidLeaf] = &[
    leaf(0, [MAX_BASIC_LEAF, text(VENDOR, 0), text(VENDOR, 8), text(VENDOR, 4)]),
    leaf(
        1,
        [
            SIGNATURE,
            (CLFLUSH_BYTES / 8) << 8,
            // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT, hypervisor present.
            bits(&[0, 9, 13, 19, 20, 23, 31]),
            // FPU, DE, PSE, TSC, MSR, PAE, CMPXCHG8B, SYSENTER, PGE, CMOV, PAT, CLFLUSH, MMX,
            // FXSR, SSE, SSE2.
            bits(&[0, 2, 3, 4, 5, 6, 8, 11, 13, 15, 16, 19, 23, 24, 25, 26]),
        ],
    ),
    // TLBs and caches as descriptors: those of a Core i7-900, which agree with leaf 4.
    leaf(2, [0x5503_5a01, 0x00f0_b2e4, 0, 0x09ca_212c]),
    cache(0, DATA, 1, 8, 64, 0),
    cache(1, INSTRUCTION, 1, 4, 128, 0),
    cache(2, UNIFIED, 2, 8, 512, 0),
    // Inclusive of the caches below it.
    cache(3, UNIFIED, 3, 16, 8192, 2),
    // SMEP; the selectors of the x87 pointers (FCS, FDS) read as zeros; SMAP.
    subleaf(7, 0, [0, bits(&[7, 13, 20]), 0, 0]),
    leaf(
        HYPERVISOR_LEAF,
        [HYPERVISOR_LEAF, text(HYPERVISOR, 0), text(HYPERVISOR, 4), text(HYPERVISOR, 8)],
    ),
    leaf(0x8000_0000, [MAX_EXTENDED_LEAF, 0, 0, 0]),
    // LAHF in 64-bit mode; SYSCALL, NX, long mode.
    leaf(0x8000_0001, [0, 0, bits(&[0]), bits(&[11, 20, 29])]),
    brand(0),
    brand(1),
    brand(2),
    // L2: 256 KiB, 8 ways (code 6), line size.
    leaf(0x8000_0006, [0, 0, (256 << 16) | (6 << 12) | CLFLUSH_BYTES, 0]),
    // Invariant TSC: virtual time does not stop in HLT.
    leaf(0x8000_0007, [0, 0, 0, bits(&[8])]),
    leaf(0x8000_0008, [PHYSICAL_ADDRESS_BITS | (LINEAR_ADDRESS_BITS << 8), 0, 0, 0]),
];

/// What is in the table, or zeros.
fn lookup(leaf: u32, subleaf: u32) -> [u32; 4] {
    LEAVES
        .iter()
        .find(|entry| entry.leaf == leaf && entry.subleaf.is_none_or(|wanted| wanted == subleaf))
        .map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

/// Executes CPUID: EAX, EBX, ECX, EDX for EAX = `leaf` and ECX = `subleaf` on entry.
///
/// A leaf above the highest of its range, basic, hypervisor or extended, gives the highest basic
/// leaf's data. That is what Intel documents, and what KVM does with the same table.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let in_range = match leaf {
        0..HYPERVISOR_LEAF => leaf <= MAX_BASIC_LEAF,
        HYPERVISOR_LEAF..0x8000_0000 => leaf == HYPERVISOR_LEAF,
        0x8000_0000.. => leaf <= MAX_EXTENDED_LEAF,
    };
    lookup(if in_range { leaf } else { MAX_BASIC_LEAF }, subleaf)
}

/// The constant MSR with this index.
pub fn msr(index: u32) -> Option<&'static Msr> {
    MSRS.iter().find(|msr| msr.index == index)
}
