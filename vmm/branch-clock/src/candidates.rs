//! Where in a kernel's text an instruction is that has to be trapped, or may come to be.

use iced_x86::{Instruction as Decoded, Mnemonic, Register};
use reprise_machine::ram::GuestRam;
use reprise_time_stamp_sites::{Instruction, KernelText, Site};

use crate::guest_code::MAX_BYTES;
use reprise_machine::paging::is_ram;

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

impl Candidate {
    /// The bytes there, if they are the instruction.
    pub(crate) fn code_in(&self, ram: &GuestRam) -> Option<Vec<u8>> {
        let mut found = vec![0; usize::from(self.bytes)];
        if !is_ram(ram, self.physical, found.len()) {
            return None;
        }
        ram.read(self.physical, &mut found);
        (Instruction::at_start_of(&found) == Some(self.instruction)).then_some(found)
    }

    /// Whether the bytes there are the instruction.
    pub(crate) fn is_in(&self, ram: &GuestRam) -> bool {
        self.code_in(ram).is_some()
    }
}

/// Whether an instruction is trapped; the others are hidden by the CPU model, and fault.
pub(crate) fn is_trapped(instruction: Instruction) -> bool {
    use Instruction::{ReadControl4, ReadTimeStamp, WriteControl4};
    matches!(instruction, ReadTimeStamp | ReadControl4 | WriteControl4)
}

/// Whether the CPU, in the mode that it was `decoded` for, sees one that is trapped.
pub(crate) fn is(instruction: Instruction, decoded: &Decoded) -> bool {
    let moves = decoded.mnemonic() == Mnemonic::Mov;
    match instruction {
        Instruction::ReadTimeStamp => decoded.mnemonic() == Mnemonic::Rdtsc,
        Instruction::ReadControl4 => moves && decoded.op1_register() == Register::CR4,
        Instruction::WriteControl4 => moves && decoded.op0_register() == Register::CR4,
        _ => false,
    }
}

/// All places of a kernel, which `physical_of` finds by their linear addresses, in order.
pub(crate) fn candidates_of(
    kernel: &KernelText,
    physical_of: impl Fn(u64) -> Option<u64>,
) -> Vec<Candidate> {
    let physical_of = |site: &Site| physical_of(site.address);
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
        let near = candidate.physical..candidate.physical.saturating_add(MAX_BYTES as u64);
        candidate.read |= replaced.iter().any(|replaced| near.contains(replaced));
    }
    candidates
}
