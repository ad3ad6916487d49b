//! Which event counts retired conditional branches, by microarchitecture.
//!
//! Events and skids are those that rr uses (`src/PerfCounters.cc`): a raw event is the number that goes
//! into the performance event select register, user and kernel bits included. Model numbers are those of
//! the Linux kernel (`arch/x86/include/asm/intel-family.h`). Which event is right is no matter of taste:
//! from Ice Lake on, 0x5101c4 counts only the branches that are taken, and looks healthy.

use std::arch::x86_64::__cpuid;

/// One microarchitecture's counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BranchEvent {
    /// For a person.
    pub(crate) microarchitecture: &'static str,
    vendor: Vendor,
    family: u32,
    /// CPUID models; empty for all of the family.
    models: &'static [u32],
    /// `config` of perf_event_open for a raw event.
    pub(crate) event: u64,
    /// Conditional branches by which an overflow may be late.
    pub(crate) skid: u64,
}

/// Who made the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
}

const TAKEN_AND_NOT: u64 = 0x5101c4;
const TAKEN_AND_NOT_ICE_LAKE: u64 = 0x5111c4;
const TAKEN_AND_NOT_LUNAR_LAKE: u64 = 0x100005111c4;
const TAKEN_AND_NOT_ATOM: u64 = 0x517ec4;
const TAKEN_AND_NOT_ZEN: u64 = 0x5100d1;

const fn intel(
    microarchitecture: &'static str,
    models: &'static [u32],
    event: u64,
    skid: u64,
) -> BranchEvent {
    BranchEvent { microarchitecture, vendor: Vendor::Intel, family: 6, models, event, skid }
}

const fn amd(microarchitecture: &'static str, family: u32) -> BranchEvent {
    // In practice without a bound.
    let skid = 10_000;
    let (vendor, event) = (Vendor::Amd, TAKEN_AND_NOT_ZEN);
    BranchEvent { microarchitecture, vendor, family, models: &[], event, skid }
}

static EVENTS: &[BranchEvent] = &[
    intel("Nehalem", &[0x1a, 0x1e, 0x1f, 0x2e], TAKEN_AND_NOT, 100),
    intel("Westmere", &[0x25, 0x2c, 0x2f], TAKEN_AND_NOT, 100),
    intel("Sandy Bridge", &[0x2a, 0x2d], TAKEN_AND_NOT, 100),
    intel("Ivy Bridge", &[0x3a, 0x3e], TAKEN_AND_NOT, 100),
    intel("Haswell", &[0x3c, 0x3f, 0x45, 0x46], TAKEN_AND_NOT, 100),
    intel("Broadwell", &[0x3d, 0x47, 0x4f, 0x56], TAKEN_AND_NOT, 100),
    intel("Skylake", &[0x4e, 0x55, 0x5e], TAKEN_AND_NOT, 100),
    intel("Kaby Lake, Coffee Lake", &[0x8e, 0x9e], TAKEN_AND_NOT, 100),
    intel("Comet Lake", &[0xa5, 0xa6], TAKEN_AND_NOT, 100),
    intel("Ice Lake", &[0x6a, 0x6c, 0x7d, 0x7e], TAKEN_AND_NOT_ICE_LAKE, 100),
    intel("Tiger Lake", &[0x8c, 0x8d], TAKEN_AND_NOT_ICE_LAKE, 100),
    intel("Rocket Lake", &[0xa7], TAKEN_AND_NOT_ICE_LAKE, 100),
    intel("Alder Lake (P-cores)", &[0x97, 0x9a], TAKEN_AND_NOT_ICE_LAKE, 125),
    intel("Raptor Lake (P-cores)", &[0xb7, 0xba, 0xbf], TAKEN_AND_NOT_ICE_LAKE, 125),
    intel("Meteor Lake (P-cores)", &[0xaa, 0xac], TAKEN_AND_NOT_ICE_LAKE, 125),
    intel("Sapphire Rapids", &[0x8f], TAKEN_AND_NOT_ICE_LAKE, 125),
    intel("Emerald Rapids", &[0xcf], TAKEN_AND_NOT_ICE_LAKE, 125),
    intel("Granite Rapids", &[0xad, 0xae], TAKEN_AND_NOT_ICE_LAKE, 125),
    intel("Lunar Lake (P-cores)", &[0xbd], TAKEN_AND_NOT_LUNAR_LAKE, 125),
    intel("Arrow Lake (P-cores)", &[0xb5, 0xc5, 0xc6], TAKEN_AND_NOT_LUNAR_LAKE, 125),
    intel(
        "Silvermont, Airmont",
        &[0x37, 0x4a, 0x4c, 0x4d, 0x5a, 0x5d, 0x75],
        TAKEN_AND_NOT_ATOM,
        100,
    ),
    intel("Goldmont", &[0x5c, 0x5f, 0x7a], TAKEN_AND_NOT_ATOM, 100),
    intel("Tremont", &[0x86, 0x96, 0x9c], TAKEN_AND_NOT_ATOM, 100),
    intel("Gracemont, Crestmont", &[0xaf, 0xb6, 0xbe], TAKEN_AND_NOT_ATOM, 100),
    amd("Zen, Zen+, Zen 2", 0x17),
    amd("Zen 3, Zen 4", 0x19),
    amd("Zen 5", 0x1a),
];

/// The host's CPU, as CPUID names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostCpu {
    vendor: [u8; 12],
    family: u32,
    model: u32,
}

impl HostCpu {
    pub(crate) fn of_this_host() -> Self {
        let (zero, one) = (__cpuid(0), __cpuid(1));
        let mut vendor = [0; 12];
        for (at, register) in [zero.ebx, zero.edx, zero.ecx].into_iter().enumerate() {
            vendor[4 * at..4 * at + 4].copy_from_slice(&register.to_le_bytes());
        }
        Self::new(vendor, one.eax)
    }

    /// From leaf 0's vendor and leaf 1's EAX (Intel SDM volume 2A, CPUID).
    fn new(vendor: [u8; 12], signature: u32) -> Self {
        let base = signature >> 8 & 0xf;
        let family = if base == 0xf { base + (signature >> 20 & 0xff) } else { base };
        let extended = matches!(base, 6 | 0xf);
        let high = if extended { signature >> 16 & 0xf } else { 0 };
        Self { vendor, family, model: signature >> 4 & 0xf | high << 4 }
    }

    /// The event of this CPU; why there is none.
    pub(crate) fn branch_event(&self) -> Result<&'static BranchEvent, String> {
        let vendor = match &self.vendor {
            b"GenuineIntel" => Some(Vendor::Intel),
            b"AuthenticAMD" => Some(Vendor::Amd),
            _ => None,
        };
        let fits = |event: &&BranchEvent| {
            Some(event.vendor) == vendor
                && event.family == self.family
                && (event.models.is_empty() || event.models.contains(&self.model))
        };
        EVENTS.iter().find(fits).ok_or_else(|| {
            format!(
                "no event is known that counts conditional branches on this CPU ({}, family {:#x}, \
                 model {:#x})",
                String::from_utf8_lossy(&self.vendor),
                self.family,
                self.model
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cpu_has_one_event_at_most() {
        for (at, event) in EVENTS.iter().enumerate() {
            for other in &EVENTS[at + 1..] {
                let both = event.vendor == other.vendor && event.family == other.family;
                let shared = event.models.iter().any(|model| other.models.contains(model));
                assert!(!both || !shared, "{event:?} and {other:?}");
            }
        }
    }

    #[test]
    fn signatures_lead_to_their_rows() {
        // (vendor, leaf 1's EAX, microarchitecture, event, skid)
        let cases: &[(&[u8; 12], u32, &str, u64, u64)] = &[
            (b"GenuineIntel", 0x0001_06a5, "Nehalem", 0x5101c4, 100),
            (b"GenuineIntel", 0x0005_0654, "Skylake", 0x5101c4, 100),
            (b"GenuineIntel", 0x0006_06a6, "Ice Lake", 0x5111c4, 100),
            (b"GenuineIntel", 0x0008_06f8, "Sapphire Rapids", 0x5111c4, 125),
            (b"GenuineIntel", 0x000b_0650, "Arrow Lake (P-cores)", 0x100005111c4, 125),
            (b"AuthenticAMD", 0x0080_0f11, "Zen, Zen+, Zen 2", 0x5100d1, 10_000),
            (b"AuthenticAMD", 0x00b4_0f40, "Zen 5", 0x5100d1, 10_000),
        ];
        for &(vendor, signature, microarchitecture, event, skid) in cases {
            let found = HostCpu::new(*vendor, signature).branch_event().expect("it is listed");
            assert_eq!(found.microarchitecture, microarchitecture, "{signature:#x}");
            assert_eq!((found.event, found.skid), (event, skid), "{signature:#x}");
        }
    }

    #[test]
    fn an_unknown_cpu_is_named() {
        let reason = HostCpu::new(*b"GenuineIntel", 0x0f00_0f00).branch_event().unwrap_err();
        assert!(reason.contains("GenuineIntel") && !reason.contains('\n'), "{reason}");
    }
}
