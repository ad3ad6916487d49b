//! What CPUs of other makers may do otherwise: the instructions of a run whose results the architecture
//! leaves to them, and what a replay on another CPU has to say of it.

use reprise_cpu::latitude::Latitude;
use reprise_cpu::latitude_sites::Sites;
use reprise_host::host_info;
use reprise_replay::{laws_of, recorded_here};
use reprise_trace::header::Header;
use serde::Serialize;

use crate::output::{counted, grouped};

/// An instruction in the code that ran whose result other CPUs may have otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MakerDependentReport {
    /// Its name.
    pub instruction: String,
    /// What of it is left to makers: `approximation` or `undefined destination`.
    pub what: &'static str,
    /// Places in the code, as linear addresses.
    pub sites: usize,
    /// The first that came to run.
    pub first_address: u64,
    /// Instructions executed before its block, since the machine started.
    pub first_instruction: u64,
}

impl MakerDependentReport {
    /// All of a run's.
    pub fn of(sites: &[Sites]) -> Vec<Self> {
        let report = |sites: &Sites| Self {
            instruction: sites.mnemonic.clone(),
            what: sites.latitude.name(),
            sites: sites.addresses.len(),
            first_address: sites.first.0,
            first_instruction: sites.first.1,
        };
        sites.iter().map(report).collect()
    }

    fn to_text(&self) -> String {
        let sites = counted(self.sites as u64, "site");
        let at = grouped(self.first_instruction);
        let address = self.first_address;
        format!("{} ({sites}, first at {address:#x} by instruction {at})", self.instruction)
    }
}

/// What there is to say of a replay on another CPU than the recording's; nothing on the same.
/// `sites` is what the software CPU found in the code that ran, if it was that which ran it.
pub fn note(header: &Header, sites: Option<&[Sites]>) -> Option<String> {
    if recorded_here(header) {
        return None;
    }
    let (there, here) = (&header.host.cpu_brand, host_info().cpu_brand);
    let differ = match sites {
        None => "flags and results that the architecture leaves undefined may differ".to_owned(),
        Some(sites) => {
            let texts = |latitude| -> Vec<String> {
                let of_kind = sites.iter().filter(|sites| sites.latitude == latitude);
                let of_kind: Vec<_> = of_kind.cloned().collect();
                MakerDependentReport::of(&of_kind).iter().map(|it| it.to_text()).collect()
            };
            let approximations = match &texts(Latitude::Approximation)[..] {
                [] => "the code that ran has no instruction with an approximate result".to_owned(),
                texts => format!("results may differ of {}", texts.join(", ")),
            };
            let destinations = match &texts(Latitude::Destination)[..] {
                [] => String::new(),
                texts => format!("; for operands without a result, of {}", texts.join(", ")),
            };
            let flags = match laws_of(header) {
                Some(_) => "undefined flags are left as the CPU that recorded leaves them",
                None => {
                    "undefined flags may differ, and stay so in memory where the guest saved them"
                }
            };
            format!("{approximations}{destinations}; {flags}")
        }
    };
    Some(format!("recorded on {there:?}, replayed on {here:?}: {differ}"))
}

#[cfg(test)]
mod tests {
    use reprise_trace::moment::TickKind;

    use super::*;

    fn sites(latitude: Latitude, mnemonic: &str) -> Sites {
        let addresses = [0x1000, 0x2000].into_iter().collect();
        Sites { latitude, mnemonic: mnemonic.to_owned(), addresses, first: (0x2000, 77_000) }
    }

    #[test]
    fn only_another_cpu_is_worth_a_note_which_names_what_ran() {
        let bare = Header::bare("soft", "instructions", TickKind::Instruction);
        let mut header = Header { host: host_info(), ..bare };
        assert_eq!(note(&header, Some(&[])), None);
        header.host.cpu_vendor = "OtherMaker".to_owned();
        let none = note(&header, Some(&[])).expect("another maker");
        assert!(none.contains("no instruction with an approximate result"), "{none}");
        let held = [sites(Latitude::Approximation, "fsin"), sites(Latitude::Destination, "bsf")];
        let some = note(&header, Some(&held)).expect("another maker");
        assert!(some.contains("fsin (2 sites, first at 0x2000 by instruction 77,000)"), "{some}");
        assert!(some.contains("of bsf (2 sites"), "{some}");
    }
}
