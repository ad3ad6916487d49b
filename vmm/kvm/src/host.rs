//! What kind of KVM this host has.

use std::path::Path;

use crate::branch_events::HostCpu;

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

/// How a host without `/dev/kvm` gets one, as half a sentence.
pub(crate) fn how_to_get_kvm() -> &'static str {
    let cpu = HostCpu::of_this_host();
    how_to_get_kvm_on(HostCpu::has_virtualisation(), HostCpu::is_virtual(), cpu.is_amd())
}

fn how_to_get_kvm_on(has_virtualisation: bool, in_vm: bool, is_amd: bool) -> &'static str {
    match (has_virtualisation, in_vm, is_amd) {
        (true, _, true) => "load its module: `sudo modprobe kvm_amd`",
        (true, _, false) => "load its module: `sudo modprobe kvm_intel`",
        (false, true, _) => {
            "leave this VM for bare metal, have its hypervisor allow nested virtualisation, or load \
             pagetable-based KVM (module kvm_pvm, a kernel that has it)"
        }
        (false, false, _) => "switch on virtualisation (VT-x, SVM) in the firmware's setup",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_without_kvm_depends_on_the_host() {
        assert!(how_to_get_kvm_on(true, false, false).contains("kvm_intel"));
        assert!(how_to_get_kvm_on(true, true, true).contains("kvm_amd"));
        assert!(how_to_get_kvm_on(false, true, false).contains("leave this VM"));
        assert!(how_to_get_kvm_on(false, false, true).contains("firmware"));
    }
}
