//! Where in a kernel's text an instruction is that has to be trapped, or may come to be.

use reprise_time_stamp_sites::{Instruction, KernelText, Site};

use crate::guest_code::MAX_BYTES;

/// One place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) physical: u64,
    pub(crate) bytes: u8,
    pub(crate) instruction: Instruction,
    /// It is not there before the kernel patches it in.
    pub(crate) patched: bool,
    /// The kernel reads it when it applies its alternatives.
    pub(crate) read: bool,
}

/// How far the kernel is with its alternatives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alternatives {
    /// Not every site has been patched.
    Waiting,
    /// All have, the last of them here; it may still be read.
    Patched { last: u64 },
    /// Something else has been patched since.
    Passed,
    /// They are applied, or there are none.
    Applied,
}

/// Whether an instruction is trapped; the others are hidden by the CPU model, and fault.
pub(crate) fn is_trapped(instruction: Instruction) -> bool {
    use Instruction::{ReadControl4, ReadTimeStamp, WriteControl4};
    matches!(instruction, ReadTimeStamp | ReadControl4 | WriteControl4)
}

/// All places of a kernel in the order of their addresses, and how far it is at its start.
pub(crate) fn candidates_of(kernel: &KernelText) -> (Vec<Candidate>, Alternatives) {
    let physical_of = |site: &Site| {
        let text = kernel.text.iter().find(|text| text.linear.contains(&site.address))?;
        Some(site.address - text.linear.start + text.physical)
    };
    let sites = kernel.sites.iter().map(|site| (site, false));
    let mut candidates: Vec<Candidate> = sites
        .chain(kernel.patched.iter().map(|site| (site, true)))
        .filter(|(site, _)| is_trapped(site.instruction))
        .filter_map(|(site, patched)| {
            let physical = physical_of(site)?;
            let Site { instruction, bytes, .. } = *site;
            Some(Candidate { physical, bytes, instruction, patched, read: patched })
        })
        .collect();
    candidates.sort_by_key(|candidate| candidate.physical);
    let replaced: Vec<u64> = kernel.patched.iter().filter_map(physical_of).collect();
    for candidate in &mut candidates {
        let near = candidate.physical..candidate.physical + MAX_BYTES as u64;
        candidate.read |= replaced.iter().any(|replaced| near.contains(replaced));
    }
    let alternatives = match replaced.is_empty() {
        true => Alternatives::Applied,
        false => Alternatives::Waiting,
    };
    (candidates, alternatives)
}
