//! Where hardware lawfully keeps another CPU state than the software CPU, and how a digest still tells.
//!
//! A record holds a digest, of which nothing can be left out afterwards. But the ways in which hardware
//! may differ are few: the state at hand is given each of them, and if one has the recorded digest, that
//! difference, and no other, is what there is. What was set aside is counted and told, never silent.

use reprise_trace::cpu_state::CpuState;
use reprise_trace::moment::Moment;

/// A part of the CPU's state in which engines lawfully differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lawful {
    /// The x87 unit's last instruction: FOP, FIP and FDP. AMD keeps them only behind an unmasked
    /// exception (AMD64 Architecture Programmer's Manual, volume 2, 11.4.4: FXSAVE), newer Intel
    /// processors FDP (CPUID leaf 7, FDP_EXCPTN_ONLY) and all of them FOP likewise (Intel 64 and IA-32
    /// Architectures Software Developer's Manual, volume 1, 8.1.8 and 8.1.9).
    X87LastInstruction,
    /// Accessed bits in the tables that CR3 leads to (`accessed_bits.rs`).
    AccessedBits,
}

impl std::fmt::Display for Lawful {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::X87LastInstruction => "the x87 unit's last instruction (FOP, FIP, FDP)",
            Self::AccessedBits => "accessed bits of the guest's page tables",
        })
    }
}

/// What a comparison left out, because hardware may lawfully differ there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// What.
    pub what: Lawful,
    /// Records at which it did.
    pub records: u64,
    /// The first of them.
    pub first: Moment,
}

impl SetAside {
    /// Adds one more record at `moment`.
    pub(crate) fn note(all: &mut Vec<Self>, what: Lawful, moment: Moment) {
        Self::add(all, Self { what, records: 1, first: moment });
    }

    /// Adds what a later part of the comparison left out.
    pub fn add(all: &mut Vec<Self>, more: Self) {
        match all.iter_mut().find(|known| known.what == more.what) {
            Some(known) => known.records += more.records,
            None => all.push(more),
        }
    }
}

/// The state as hardware may have it instead, if it then has the digest of a record; and what differs.
pub fn explained(state: &CpuState, recorded: u64) -> Option<(Lawful, CpuState)> {
    // What hardware does not keep reads as zero.
    let kept =
        [(false, true, true), (true, true, false), (false, true, false), (false, false, false)];
    kept.into_iter().find_map(|(opcode, instruction, data)| {
        let mut there = state.clone();
        let fpu = &mut there.fpu;
        fpu.fop = if opcode { fpu.fop } else { 0 };
        fpu.fip = if instruction { fpu.fip } else { 0 };
        fpu.fdp = if data { fpu.fdp } else { 0 };
        let differs = there.fpu != state.fpu && there.short_digest() == recorded;
        differs.then_some((Lawful::X87LastInstruction, there))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn behind_an_x87_instruction() -> CpuState {
        let mut state = CpuState::default();
        (state.fpu.fop, state.fpu.fip, state.fpu.fdp) = (0x1c1, 0x40_1000, 0x60_2000);
        state
    }

    #[test]
    fn what_hardware_does_not_keep_explains_a_digest() {
        let state = behind_an_x87_instruction();
        let mut there = state.clone();
        there.fpu.fdp = 0;
        let explanation = explained(&state, there.short_digest());
        assert_eq!(explanation, Some((Lawful::X87LastInstruction, there)));
        assert_eq!(explained(&state, state.short_digest()), None, "nothing differs");
    }

    #[test]
    fn another_difference_is_not_explained() {
        let state = behind_an_x87_instruction();
        let mut there = state.clone();
        there.fpu.fdp = 0;
        there.gpr[3] = 1;
        assert_eq!(explained(&state, there.short_digest()), None);
        let mut there = state.clone();
        there.fpu.fip += 1;
        assert_eq!(explained(&state, there.short_digest()), None);
    }

    #[test]
    fn what_is_set_aside_is_counted_from_the_first_on() {
        let at = |tick| Moment { tick, rip: 0, rcx: 0 };
        let mut all = Vec::new();
        for tick in [5, 7, 9] {
            SetAside::note(&mut all, Lawful::X87LastInstruction, at(tick));
        }
        let first = SetAside { what: Lawful::X87LastInstruction, records: 3, first: at(5) };
        assert_eq!(all, [first]);
    }
}
