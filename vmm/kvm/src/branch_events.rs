//! Which event counts retired conditional branches, by microarchitecture.
//!
//! A raw event is the number that goes into the performance event select register; of its upper bits the
//! kernel keeps those of the event and sets those of the privilege itself. Each row says where it comes
//! from: rr (`src/PerfCounters.cc`, `src/PerfCounters_x86.h`) has events and skids, and the Linux kernel
//! (`arch/x86/events/intel/core.c`) which other models count the same events. Names of events are their
//! makers' (Intel's perfmon event lists; AMD's Processor Programming References), model numbers the
//! kernel's (`arch/x86/include/asm/intel-family.h`). Which event is right is no matter of taste: from Ice
//! Lake on, 0x5101c4 counts only the branches that are taken, and looks healthy.

use std::arch::x86_64::__cpuid;

/// An event, and where its number comes from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RawBranchEvent {
    /// `config` of perf_event_open for a raw event.
    config: u64,
    /// As the CPU's maker calls it.
    name: &'static str,
}

/// What is to be known beside event and skid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caveat {
    /// Zen counts branches past a LOCK-prefixed instruction that it speculated on and took back, unless
    /// a bit of an undocumented register (SpecLockMap) switches that off.
    SpeculatesPastLocks,
    /// Zen's overflows come at any time after they are due.
    UnboundedSkid,
    /// Only the performance cores of a hybrid CPU have the event.
    PerformanceCoresOnly,
    /// The firmware's branches in system management mode count too, unless the counters are frozen
    /// there.
    CountsInSmm,
}

impl Caveat {
    /// One line for a person.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::SpeculatesPastLocks => {
                "counts too much around LOCK prefixes, where several threads contend, unless bit 54 of MSR 0xc0011020 (SpecLockMap) is \
                 set on each CPU, as zen_workaround.py of rr does; sleep clears it"
            }
            Self::UnboundedSkid => {
                "overflows may come very late: a replay that was stopped behind its moment goes back to \
                 a checkpoint"
            }
            Self::PerformanceCoresOnly => "the guest is kept to the performance cores",
            Self::CountsInSmm => {
                "system management interrupts are counted unless /sys/devices/cpu/freeze_on_smi is 1"
            }
        }
    }
}

/// Where a row has its event and skid from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// rr has them, for all models of the row.
    Rr,
    /// rr has them for other models of the row; in the kernel these count the same events.
    RrButFor(&'static [u32]),
    /// rr has none of the row's models; in the kernel they count the events of this microarchitecture.
    KernelAs(&'static str),
    /// rr has them for the models of the family that it lists.
    RrForSomeOfFamily,
}

impl Source {
    /// A few words for a person, about a model of the row.
    fn text(self, model: u32) -> String {
        match self {
            Self::RrButFor(others) if others.contains(&model) => {
                "Linux, in which this model counts the events that rr has for others of its kind"
                    .into()
            }
            Self::Rr | Self::RrButFor(_) => "rr".into(),
            Self::KernelAs(other) => format!("rr's for {other}, whose events Linux counts here"),
            Self::RrForSomeOfFamily => "rr, for the models of this family that it lists".into(),
        }
    }
}

/// One microarchitecture's counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BranchEvent {
    /// For a person.
    pub(crate) microarchitecture: &'static str,
    vendor: Vendor,
    family: u32,
    /// CPUID models; empty for all of the family.
    models: &'static [u32],
    event: &'static RawBranchEvent,
    /// Conditional branches by which an overflow may be late, as rr has found it.
    pub(crate) skid: u64,
    source: Source,
    pub(crate) caveats: &'static [Caveat],
}

impl BranchEvent {
    /// `config` of perf_event_open for a raw event.
    pub(crate) fn config(&self) -> u64 {
        self.event.config
    }

    /// As the CPU's maker calls the event.
    pub(crate) fn event_name(&self) -> &'static str {
        self.event.name
    }

    /// Whether no overflow is later than the skid.
    pub(crate) fn skid_is_bounded(&self) -> bool {
        !self.caveats.contains(&Caveat::UnboundedSkid)
    }
}

/// Who made the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
}

static NEHALEM: RawBranchEvent =
    RawBranchEvent { config: 0x5101c4, name: "BR_INST_RETIRED.CONDITIONAL" };
static ICE_LAKE: RawBranchEvent = RawBranchEvent { config: 0x5111c4, name: "BR_INST_RETIRED.COND" };
static LUNAR_LAKE: RawBranchEvent =
    RawBranchEvent { config: 0x100005111c4, name: "BR_INST_RETIRED.COND" };
static ATOM: RawBranchEvent = RawBranchEvent { config: 0x517ec4, name: "BR_INST_RETIRED.JCC" };
static ZEN: RawBranchEvent = RawBranchEvent { config: 0x5100d1, name: "ExRetCond" };

const SMM: &[Caveat] = &[Caveat::CountsInSmm];
const HYBRID: &[Caveat] = &[Caveat::PerformanceCoresOnly, Caveat::CountsInSmm];
const ZENS: &[Caveat] = &[Caveat::SpeculatesPastLocks, Caveat::UnboundedSkid];

const fn intel(
    microarchitecture: &'static str,
    models: &'static [u32],
    event: &'static RawBranchEvent,
    skid: u64,
    source: Source,
    caveats: &'static [Caveat],
) -> BranchEvent {
    let (vendor, family) = (Vendor::Intel, 6);
    BranchEvent { microarchitecture, vendor, family, models, event, skid, source, caveats }
}

const fn amd(microarchitecture: &'static str, family: u32) -> BranchEvent {
    let (vendor, event, skid) = (Vendor::Amd, &ZEN, 10_000);
    let source = Source::RrForSomeOfFamily;
    BranchEvent {
        microarchitecture,
        vendor,
        family,
        models: &[],
        event,
        skid,
        source,
        caveats: ZENS,
    }
}

use Source::{KernelAs, Rr, RrButFor};

static EVENTS: &[BranchEvent] = &[
    intel("Nehalem", &[0x1a, 0x1e, 0x1f, 0x2e], &NEHALEM, 100, RrButFor(&[0x1f]), SMM),
    intel("Westmere", &[0x25, 0x2c, 0x2f], &NEHALEM, 100, Rr, SMM),
    intel("Sandy Bridge", &[0x2a, 0x2d], &NEHALEM, 100, Rr, SMM),
    intel("Ivy Bridge", &[0x3a, 0x3e], &NEHALEM, 100, Rr, SMM),
    intel("Haswell", &[0x3c, 0x3f, 0x45, 0x46], &NEHALEM, 100, Rr, SMM),
    intel("Broadwell", &[0x3d, 0x47, 0x4f, 0x56], &NEHALEM, 100, Rr, SMM),
    intel("Skylake", &[0x4e, 0x55, 0x5e], &NEHALEM, 100, Rr, SMM),
    intel("Kaby Lake, Coffee Lake", &[0x8e, 0x9e], &NEHALEM, 100, Rr, SMM),
    intel("Comet Lake", &[0xa5, 0xa6], &NEHALEM, 100, Rr, SMM),
    intel("Ice Lake", &[0x6a, 0x6c, 0x7d, 0x7e], &ICE_LAKE, 100, RrButFor(&[0x6c, 0x7d]), SMM),
    intel("Tiger Lake", &[0x8c, 0x8d], &ICE_LAKE, 100, Rr, SMM),
    intel("Rocket Lake", &[0xa7], &ICE_LAKE, 100, Rr, SMM),
    intel("Alder Lake (P-cores)", &[0x97, 0x9a], &ICE_LAKE, 125, Rr, HYBRID),
    intel("Raptor Lake (P-cores)", &[0xb7, 0xba, 0xbf], &ICE_LAKE, 125, Rr, HYBRID),
    intel(
        "Meteor Lake, Arrow Lake-U (P-cores)",
        &[0xaa, 0xac, 0xb5],
        &ICE_LAKE,
        125,
        RrButFor(&[0xac, 0xb5]),
        HYBRID,
    ),
    intel("Sapphire Rapids", &[0x8f], &ICE_LAKE, 125, Rr, SMM),
    intel("Emerald Rapids", &[0xcf], &ICE_LAKE, 125, Rr, SMM),
    intel("Granite Rapids", &[0xad, 0xae], &ICE_LAKE, 125, KernelAs("Sapphire Rapids"), SMM),
    intel("Lunar Lake (P-cores)", &[0xbd], &LUNAR_LAKE, 125, Rr, HYBRID),
    intel("Arrow Lake (P-cores)", &[0xc5, 0xc6], &LUNAR_LAKE, 125, RrButFor(&[0xc5]), HYBRID),
    intel(
        "Silvermont, Airmont",
        &[0x37, 0x4a, 0x4c, 0x4d, 0x5a, 0x5d, 0x75],
        &ATOM,
        100,
        RrButFor(&[0x4a, 0x4d, 0x5a, 0x5d, 0x75]),
        SMM,
    ),
    intel("Goldmont", &[0x5c, 0x5f, 0x7a], &ATOM, 100, Rr, SMM),
    intel("Tremont", &[0x86, 0x96, 0x9c], &ATOM, 100, RrButFor(&[0x86, 0x96]), SMM),
    intel("Gracemont, Crestmont", &[0xaf, 0xb6, 0xbe], &ATOM, 100, KernelAs("Tremont"), SMM),
    amd("Zen, Zen+, Zen 2", 0x17),
    amd("Zen 3, Zen 4", 0x19),
    amd("Zen 5", 0x1a),
];

/// The host's CPU, as CPUID names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

    /// Whether CPUID tells of a hypervisor below.
    pub(crate) fn is_virtual() -> bool {
        __cpuid(1).ecx >> 31 != 0
    }

    /// Whether CPUID tells of VMX or SVM.
    pub(crate) fn has_virtualisation() -> bool {
        let vmx = __cpuid(1).ecx >> 5 & 1 != 0;
        let svm = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx >> 2 & 1 != 0;
        vmx || svm
    }

    /// From leaf 0's vendor and leaf 1's EAX (Intel SDM volume 2A, CPUID).
    pub(crate) fn new(vendor: [u8; 12], signature: u32) -> Self {
        let base = signature >> 8 & 0xf;
        let family = if base == 0xf { base + (signature >> 20 & 0xff) } else { base };
        let extended = matches!(base, 6 | 0xf);
        let high = if extended { signature >> 16 & 0xf } else { 0 };
        Self { vendor, family, model: signature >> 4 & 0xf | high << 4 }
    }

    /// Whether it is AMD's.
    pub(crate) fn is_amd(&self) -> bool {
        &self.vendor == b"AuthenticAMD"
    }

    /// Where the row of its event has it from.
    pub(crate) fn source(&self, event: &BranchEvent) -> String {
        event.source.text(self.model)
    }

    /// The event of this CPU; its name if there is none.
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
            let vendor = String::from_utf8_lossy(&self.vendor);
            let vendor = vendor.trim_matches(|c: char| c.is_control() || c == ' ');
            format!("{vendor}, family {:#x}, model {:#x}", self.family, self.model)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &[u8; 12] = b"GenuineIntel";
    const AMD: &[u8; 12] = b"AuthenticAMD";

    #[test]
    fn each_cpu_has_one_event_at_most() {
        for (at, event) in EVENTS.iter().enumerate() {
            for other in &EVENTS[at + 1..] {
                let both = event.vendor == other.vendor && event.family == other.family;
                let every = event.models.is_empty() || other.models.is_empty();
                let shared = event.models.iter().any(|model| other.models.contains(model));
                assert!(!both || !(shared || every), "{event:?} and {other:?}");
            }
        }
    }

    /// What the number of an event must be, from its parts: event select in bits 0-7, unit mask in bits
    /// 8-15 (and 40-47 from Lunar Lake on), user mode, interrupt and enable in bits 16, 20 and 22 as rr
    /// has them, and none of edge, invert and counter mask, which would count something else.
    #[test]
    fn events_are_made_of_select_and_unit_mask() {
        let parts = [
            (&NEHALEM, 0xc4, 0x01),
            (&ICE_LAKE, 0xc4, 0x11),
            (&LUNAR_LAKE, 0xc4, 0x111),
            (&ATOM, 0xc4, 0x7e),
            (&ZEN, 0xd1, 0x00),
        ];
        for (event, select, mask) in parts {
            let config =
                select | (mask & 0xff) << 8 | (mask >> 8) << 40 | 1 << 16 | 1 << 20 | 1 << 22;
            assert_eq!(event.config, config, "{event:?}");
        }
    }

    #[test]
    fn every_row_has_its_makers_event_and_caveats() {
        for row in EVENTS {
            let zen = row.vendor == Vendor::Amd;
            assert_eq!(*row.event == ZEN, zen, "{row:?}");
            assert_eq!(row.caveats.contains(&Caveat::SpeculatesPastLocks), zen, "{row:?}");
            assert_eq!(row.skid_is_bounded(), !zen, "{row:?}");
            let hybrid = row.microarchitecture.contains("P-cores");
            assert_eq!(row.caveats.contains(&Caveat::PerformanceCoresOnly), hybrid, "{row:?}");
            assert!(matches!(row.skid, 100 | 125 | 10_000), "{row:?}");
            assert_eq!(row.skid == 10_000, zen, "{row:?}");
            assert!(row.models.is_sorted() && zen == row.models.is_empty(), "{row:?}");
            for text in row.caveats.iter().map(|caveat| caveat.text()) {
                assert!(!text.contains('\n') && !text.is_empty());
            }
        }
    }

    #[test]
    fn every_row_says_where_it_is_from() {
        let from = |vendor: &[u8; 12], signature| {
            let cpu = HostCpu::new(*vendor, signature);
            cpu.source(cpu.branch_event().expect("it is listed"))
        };
        // A Nehalem of two that rr lists one of, a CPU that it does not list, and one of a family.
        assert_eq!(from(INTEL, 0x0001_06a5), "rr");
        assert!(from(INTEL, 0x0001_06f0).contains("Linux"));
        assert!(from(INTEL, 0x000a_06d1).contains("Sapphire Rapids"));
        assert!(from(AMD, 0x00b4_0f40).contains("family"));
        for row in EVENTS {
            match row.source {
                Source::Rr => {}
                Source::RrButFor(others) => {
                    let some = others.iter().all(|model| row.models.contains(model));
                    assert!(some && others.len() < row.models.len(), "{row:?}");
                }
                Source::KernelAs(other) => {
                    let as_there = |it: &&BranchEvent| it.microarchitecture == other;
                    let there = EVENTS.iter().find(as_there).expect("a row of the table");
                    assert_eq!((there.event, there.skid), (row.event, row.skid), "{row:?}");
                    assert!(!matches!(there.source, Source::KernelAs(_)), "{row:?}");
                }
                Source::RrForSomeOfFamily => assert!(row.models.is_empty(), "{row:?}"),
            }
        }
    }

    /// From Ice Lake on the old event looks healthy and is wrong.
    #[test]
    fn no_cpu_from_ice_lake_on_has_the_old_event() {
        let old: Vec<u32> = EVENTS
            .iter()
            .filter(|row| *row.event == NEHALEM)
            .flat_map(|row| row.models.iter().copied())
            .collect();
        for model in [0x6a, 0x6c, 0x7d, 0x7e, 0x8c, 0x8d, 0x8f, 0x97, 0x9a, 0xa7, 0xb7, 0xcf] {
            assert!(!old.contains(&model), "{model:#x}");
        }
    }

    /// Leaf 1's EAX of a CPU of each row.
    fn signature(row: &BranchEvent, model: u32) -> u32 {
        let extended_family = row.family.saturating_sub(0xf);
        let base_family = row.family.min(0xf);
        extended_family << 20 | (model >> 4) << 16 | base_family << 8 | (model & 0xf) << 4 | 3
    }

    #[test]
    fn every_signature_leads_to_its_row() {
        for row in EVENTS {
            let vendor = if row.vendor == Vendor::Intel { INTEL } else { AMD };
            let any: &[u32] = &[0x01, 0x71, 0xff];
            let models = if row.models.is_empty() { any } else { row.models };
            for model in models {
                let found = HostCpu::new(*vendor, signature(row, *model)).branch_event();
                assert_eq!(found, Ok(row), "model {model:#x}");
            }
        }
    }

    #[test]
    fn signatures_of_known_cpus_lead_to_known_numbers() {
        // (vendor, leaf 1's EAX, microarchitecture, event, skid)
        let cases: &[(&[u8; 12], u32, &str, u64, u64)] = &[
            (INTEL, 0x0001_06a5, "Nehalem", 0x5101c4, 100),
            (INTEL, 0x0005_0654, "Skylake", 0x5101c4, 100),
            (INTEL, 0x0006_06a6, "Ice Lake", 0x5111c4, 100),
            (INTEL, 0x0008_06f8, "Sapphire Rapids", 0x5111c4, 125),
            (INTEL, 0x000b_0650, "Meteor Lake, Arrow Lake-U (P-cores)", 0x5111c4, 125),
            (INTEL, 0x000c_0660, "Arrow Lake (P-cores)", 0x100005111c4, 125),
            (INTEL, 0x0003_0678, "Silvermont, Airmont", 0x517ec4, 100),
            (AMD, 0x0080_0f11, "Zen, Zen+, Zen 2", 0x5100d1, 10_000),
            (AMD, 0x00a0_0f11, "Zen 3, Zen 4", 0x5100d1, 10_000),
            (AMD, 0x00b4_0f40, "Zen 5", 0x5100d1, 10_000),
        ];
        for &(vendor, signature, microarchitecture, event, skid) in cases {
            let found = HostCpu::new(*vendor, signature).branch_event().expect("it is listed");
            assert_eq!(found.microarchitecture, microarchitecture, "{signature:#x}");
            assert_eq!((found.config(), found.skid), (event, skid), "{signature:#x}");
        }
    }

    #[test]
    fn an_unknown_cpu_is_named() {
        // A Pentium 4, an AMD K8, and a maker that nobody knows, of a family that somebody has.
        let cases = [(INTEL, 0x0000_0f29), (AMD, 0x0000_0f4a), (b"Vendor\n\x1b[0m ", 0x0005_0654)];
        for (vendor, signature) in cases {
            let name = HostCpu::new(*vendor, signature).branch_event().unwrap_err();
            assert!(name.contains("family"), "{name}");
        }
    }
}
