//! What must be equal between two outcomes of a case.

use std::ops::Range;

use iced_x86::{Instruction, Mnemonic, Register};
use reprise_kvm::KvmKind;
use reprise_kvm::user_oracle::{DATA_ADDRESS, UserOutcome};
use reprise_trace::cpu_state::CpuState;

use crate::case::Case;
use crate::lawful;
use crate::preparation::stores_pointers;
use crate::soft::Soft;

/// How much must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strictness {
    /// All: both ran on the same kind of host CPU.
    Everything,
    /// What the manuals define: the real CPU was another.
    Defined,
}

/// What came of a comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Comparison {
    /// All agreed.
    Same,
    /// A difference that is as it should be, and why.
    SetAside(&'static str),
    /// Differences, the most telling first.
    Different(Vec<String>),
}

impl Comparison {
    fn of(found: Vec<String>) -> Self {
        if found.is_empty() { Self::Same } else { Self::Different(found) }
    }
}

const STATUS_FLAGS: u64 = 0x8d5;
/// C0, C2 and C3 of the x87 status word, which most instructions leave undefined.
const CONDITION_CODES: u16 = 0x4500;
const ALIGNMENT_CHECK: u64 = 1 << 18;
const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// The differences between the real CPU's outcome and the soft one's, most telling first; none where
/// they agree as they should. `kvm` is what ran the real one.
pub(crate) fn differences(
    case: &Case,
    real: &UserOutcome,
    soft: &UserOutcome,
    strictness: Strictness,
    kvm: KvmKind,
    runner: &mut Soft,
) -> Comparison {
    let mut masks = Masks { rflags: u64::MAX, fsw: u16::MAX };
    if strictness == Strictness::Defined {
        if case.input.rflags & ALIGNMENT_CHECK != 0 {
            return Comparison::SetAside("CPUs check the alignment of large operands differently");
        }
        match defined_flags(case) {
            Some(defined) => masks = Masks { rflags: defined, fsw: !CONDITION_CODES },
            None => return Comparison::SetAside("an undefined flag or value was used"),
        }
    }
    if agree(real, soft, masks) {
        return Comparison::Same;
    }
    // Only now is it worth finding out what was executed, and where.
    let trace = runner.trace(&case.input);
    if let Some(reason) = lawful::reason(case, &trace, real, soft, kvm) {
        return Comparison::SetAside(reason);
    }
    let pointers = pointer_bytes(case, &trace);
    Comparison::of(raw_differences(case, real, soft, masks, &pointers))
}

/// Which bits count.
#[derive(Clone, Copy)]
struct Masks {
    rflags: u64,
    fsw: u16,
}

/// Whether all is equal, found quickly. The x87 pointers do not count: AMD CPUs keep them only for
/// unmasked exceptions, and KVM carries them as it likes.
fn agree(real: &UserOutcome, soft: &UserOutcome, masks: Masks) -> bool {
    let (a, b) = (&real.fpu, &soft.fpu);
    real.exception == soft.exception
        && real.rip == soft.rip
        && (real.rflags ^ soft.rflags) & masks.rflags == 0
        && real.gpr == soft.gpr
        && (a.fcw, a.ftw, a.mxcsr) == (b.fcw, b.ftw, b.mxcsr)
        && (a.fsw ^ b.fsw) & masks.fsw == 0
        && a.st == b.st
        && a.xmm == b.xmm
        && real.data == soft.data
}

fn raw_differences(
    case: &Case,
    real: &UserOutcome,
    soft: &UserOutcome,
    masks: Masks,
    ignored: &[Range<usize>],
) -> Vec<String> {
    let mut found = Vec::new();
    let mut note = |what: &str, real: String, soft: String| {
        if real != soft {
            found.push(format!("{what}: real {real}, soft {soft}"));
        }
    };
    let hex = |value: u64| format!("{value:#x}");
    note("exception", format!("{:x?}", real.exception), format!("{:x?}", soft.exception));
    note("rip", hex(real.rip), hex(soft.rip));
    note("rflags", hex(real.rflags & masks.rflags), hex(soft.rflags & masks.rflags));
    for (index, name) in NAMES.iter().enumerate() {
        note(name, hex(real.gpr[index]), hex(soft.gpr[index]));
    }
    let (a, b) = (&real.fpu, &soft.fpu);
    note("fcw", hex(a.fcw.into()), hex(b.fcw.into()));
    note("fsw", hex((a.fsw & masks.fsw).into()), hex((b.fsw & masks.fsw).into()));
    note("ftw", hex(a.ftw.into()), hex(b.ftw.into()));
    note("mxcsr", hex(a.mxcsr.into()), hex(b.mxcsr.into()));
    let wide = |bytes: &[u8; 10]| {
        let mut all = [0; 16];
        all[..10].copy_from_slice(bytes);
        format!("{:#x}", u128::from_le_bytes(all))
    };
    for index in 0..8 {
        note(&format!("st{index}"), wide(&a.st[index]), wide(&b.st[index]));
    }
    for index in 0..16 {
        note(
            &format!("xmm{index}"),
            format!("{:#x}", a.xmm[index]),
            format!("{:#x}", b.xmm[index]),
        );
    }
    for offset in 0..real.data.len() {
        if real.data[offset] != soft.data[offset]
            && !ignored.iter().any(|range| range.contains(&offset))
        {
            let end = real.data.len().min(offset + 16);
            let before = case.input.data.get(offset..end).unwrap_or_default();
            note(
                &format!("data at {:#x}, {before:02x?} before", DATA_ADDRESS + offset as u64),
                format!("{:02x?}", &real.data[offset..end]),
                format!("{:02x?}", &soft.data[offset..end]),
            );
            break;
        }
    }
    found
}

/// Where in the data the sequence stored x87 pointers and what else CPUs keep differently: offsets.
fn pointer_bytes(case: &Case, trace: &[CpuState]) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    for state in trace {
        let Some((instruction, _)) = lawful::executed(case, state) else { continue };
        if !stores_pointers(instruction.mnemonic()) {
            continue;
        }
        let Some(address) = lawful::memory_address(&instruction, 0, state) else { continue };
        let fields: &[(u64, u64)] = match instruction.mnemonic() {
            // FOP, FIP, FDP; which bits MXCSR has.
            Mnemonic::Fxsave | Mnemonic::Fxsave64 => &[(6, 24), (28, 32)],
            _ if instruction.memory_size().size() % 14 == 0
                && instruction.memory_size().size() < 20
                || instruction.memory_size().size() == 94 =>
            {
                &[(6, 14)]
            }
            _ => &[(12, 28)],
        };
        for (first, end) in fields {
            let start = address.wrapping_add(*first).wrapping_sub(DATA_ADDRESS) as usize;
            ranges.push(start..start.saturating_add((end - first) as usize));
        }
    }
    ranges
}

/// The flags that the manuals define after the sequence; `None` if an undefined one was looked at, or
/// an undefined value made, on the way.
fn defined_flags(case: &Case) -> Option<u64> {
    let mut undefined = 0;
    for instruction in case.instructions() {
        if instruction.is_invalid() || has_undefined_result(&instruction) {
            return None;
        }
        if rflags(instruction.rflags_read()) & undefined != 0 {
            return None;
        }
        // A branch may go past what follows; then more counts as undefined than is.
        let sets = rflags(
            instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set(),
        );
        undefined = undefined & !sets | rflags(instruction.rflags_undefined());
    }
    Some(!(undefined & STATUS_FLAGS))
}

/// The decoder's flag bits as RFLAGS has them.
fn rflags(bits: u32) -> u64 {
    use iced_x86::RflagsBits as Bits;
    const PLACES: [(u32, u64); 6] = [
        (Bits::CF, 1 << 0),
        (Bits::PF, 1 << 2),
        (Bits::AF, 1 << 4),
        (Bits::ZF, 1 << 6),
        (Bits::SF, 1 << 7),
        (Bits::OF, 1 << 11),
    ];
    PLACES.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, flag)| flag).sum()
}

/// Instructions whose result vendors choose, sometimes or always.
fn has_undefined_result(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let approximate = matches!(
        instruction.mnemonic(),
        Rcpps
            | Rcpss
            | Rsqrtps
            | Rsqrtss
            | F2xm1
            | Fcos
            | Fsin
            | Fsincos
            | Fptan
            | Fpatan
            | Fyl2x
            | Fyl2xp1
    );
    let undefined = match instruction.mnemonic() {
        // Those of the status word among them.
        Bsf | Bsr | Fnstsw => true,
        Shld | Shrd | Bswap => {
            instruction.op0_register().size() == 2 || instruction.op0_register() == Register::None
        }
        _ => false,
    };
    approximate || undefined || stores_pointers(instruction.mnemonic())
}
