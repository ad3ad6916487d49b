//! What kind of KVM this host has.

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
