//! What kind of KVM this host has, on which processor.

use std::arch::x86_64::__cpuid;
use std::path::Path;

/// How a KVM runs its guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmKind {
    /// Intel's hardware virtualisation (module `kvm_intel`).
    Vmx,
    /// AMD's hardware virtualisation (module `kvm_amd`).
    Svm,
    /// No hardware virtualisation: user code runs natively, the guest's kernel is interpreted (module
    /// `kvm_pvm`).
    PagetableBased,
    /// None of the known modules is loaded.
    Unknown,
}

impl KvmKind {
    /// Modules, most special first: a host that loads `kvm_pvm` does so because it lacks the others.
    const MODULES: [(&'static str, KvmKind); 3] = [
        ("kvm_pvm", KvmKind::PagetableBased),
        ("kvm_intel", KvmKind::Vmx),
        ("kvm_amd", KvmKind::Svm),
    ];

    /// Looks at the modules that the kernel has loaded or built in.
    pub fn of_this_host() -> Self {
        let loaded = |name: &str| Path::new("/sys/module").join(name).exists();
        let found = Self::MODULES.iter().find(|(name, _)| loaded(name));
        found.map_or(Self::Unknown, |(_, kind)| *kind)
    }

    /// Its name, and what that means, in a few words.
    pub fn description(self) -> &'static str {
        match self {
            Self::Vmx => "hardware virtualisation (kvm_intel)",
            Self::Svm => "hardware virtualisation (kvm_amd)",
            Self::PagetableBased => {
                "pagetable-based (kvm_pvm): user code runs natively, kernel code is interpreted"
            }
            Self::Unknown => "unknown: none of kvm_intel, kvm_amd, kvm_pvm is loaded",
        }
    }
}

/// The processor that this program runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpu {
    /// Twelve characters, as `GenuineIntel`.
    pub vendor: String,
    /// Family, the extended part added.
    pub family: u32,
    /// Model, the extended part included.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
    /// The brand string, trimmed; empty where there is none.
    pub brand: String,
}

impl HostCpu {
    /// Asks CPUID.
    pub fn of_this_host() -> Self {
        let leaf = __cpuid(0);
        let vendor = text(&[leaf.ebx, leaf.edx, leaf.ecx]);
        let (family, model, stepping) = decode_signature(__cpuid(1).eax);
        let brand = match __cpuid(0x8000_0000).eax {
            0x8000_0004.. => {
                let words = (0x8000_0002..=0x8000_0004).flat_map(|leaf| {
                    let registers = __cpuid(leaf);
                    [registers.eax, registers.ebx, registers.ecx, registers.edx]
                });
                text(&words.collect::<Vec<_>>())
            }
            _ => String::new(),
        };
        Self { vendor, family, model, stepping, brand }
    }
}

/// Family, model and stepping from EAX of CPUID leaf 1.
fn decode_signature(signature: u32) -> (u32, u32, u32) {
    let base_family = signature >> 8 & 0xf;
    let base_model = signature >> 4 & 0xf;
    let family = match base_family {
        0xf => base_family + (signature >> 20 & 0xff),
        _ => base_family,
    };
    let model = match base_family {
        6 | 0xf => base_model | (signature >> 16 & 0xf) << 4,
        _ => base_model,
    };
    (family, model, signature & 0xf)
}

/// Registers as the text that CPUID packs into them.
fn text(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_decode_as_the_manuals_say() {
        // Nehalem; Zen 3; Pentium 4; 486.
        assert_eq!(decode_signature(0x106a3), (6, 26, 3));
        assert_eq!(decode_signature(0xa0_0f11), (25, 1, 1));
        assert_eq!(decode_signature(0xf29), (15, 2, 9));
        assert_eq!(decode_signature(0x435), (4, 3, 5));
    }

    #[test]
    fn text_ends_at_its_padding() {
        assert_eq!(text(&[0x756e_6547, 0x4965_6e69, 0x6c65_746e]), "GenuineIntel");
        assert_eq!(text(&[0x2020_4142, 0]), "BA");
    }
}
