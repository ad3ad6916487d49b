//! Whether a vCPU's counter is what the clock needs, found out by running a tiny guest on it.
//!
//! What is looked for has been met on real machines: an event that counts only taken branches, a counter
//! that also counts speculation past LOCK-prefixed instructions (Zen, unless bit 54 of MSR 0xc0011020 is
//! set; rr's authors say that a single thread may not show it, so a counter that passes is no proof), one
//! that counts the host as well, overflows that never come or come later than they should,
//! and debug registers that do nothing. All of it is tried at CPL0 in 32-bit code without paging.

use reprise_machine::engine::EngineError;
use reprise_trace::cpu_state::{CS, CpuState, DS, ES, RCX, SS, Segment};
use vm_memory::{Bytes, GuestAddress};

use crate::vcpu::{Vcpu, VcpuExit};

/// Where the guest's code lies; its counter of locked additions lies behind it.
const CODE: u64 = 0x1000;
/// What the software CPU counts must be counted, in each form, and nothing else: replays elsewhere rely on it.
const GUEST: [u8; 48] = [
    0xb9, 0, 0, 0, 0, // mov ecx, ROUNDS
    0x31, 0xc0, // xor eax, eax
    0xf0, 0xff, 0x05, 0x00, 0x20, 0, 0, // round: lock inc dword [0x2000]
    0x85, 0xc0, // test eax, eax
    0x75, 0x00, // jnz to the next: never taken
    0x75, 0x00, // again
    0x75, 0x00, // again
    0x89, 0xcb, // mov ebx, ecx
    0xb9, 2, 0, 0, 0, // mov ecx, 2
    0xe2, 0xfe, // loop to itself: taken once
    0xe3, 0x00, // jecxz to the next: taken
    0xbf, 0x10, 0x20, 0, 0, // mov edi, 0x2010
    0xb1, 0x03, // mov cl, 3
    0xf3, 0xaa, // rep stosb: no branch
    0x89, 0xd9, // mov ecx, ebx
    0x49, // dec ecx
    0x75, 0xd8, // jnz to the round: taken in every round but the last
    0xf4, // hlt
];
/// Where `dec ecx` lies.
const DECREMENT: u64 = CODE + 44;
const ROUNDS: u64 = 20_000;
/// Conditional branches of a round: JNZ four times, LOOP twice, JECXZ.
const PER_ROUND: u64 = 7;
/// Those of them that are taken, in every round but the last.
const TAKEN: u64 = 3;
/// Those of LOOP, and of JECXZ.
const LOOPS: u64 = 2;
const COUNTER_IS_ZERO: u64 = 1;
/// Times that everything is counted; each must give the same.
const COUNTS: u32 = 3;
/// Overflows that are tried, each after another number of branches.
const OVERFLOWS: u64 = 50;
/// Of those whose lateness has no bound, so many may not come before the guest ends, some 100,000 branches
/// later.
const MISSED_AT_MOST: u64 = OVERFLOWS / 10;
/// Exits for which nobody asked, in one run of the guest, before it counts as stuck.
const MAX_SIGNALS: u32 = 10_000;

/// What is wrong with a counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong {
    /// In a line for a person.
    pub text: String,
    /// It gave more than there was.
    pub counts_too_much: bool,
}

impl Wrong {
    fn otherwise(text: impl Into<String>) -> Self {
        Self { text: text.into(), counts_too_much: false }
    }
}

/// What is wrong with a counter; `Ok(None)` if nothing is. Overflows may be late
/// by `skid` branches; one later than that is reported if `bounded`. The vCPU's state and the first
/// 12 KiB of its RAM are overwritten.
///
/// # Errors
/// If the host fails.
pub fn what_is_wrong<V: Vcpu>(
    vcpu: &mut V,
    skid: u64,
    bounded: bool,
) -> Result<Option<Wrong>, EngineError> {
    for _ in 0..COUNTS {
        let count = match count(vcpu)? {
            Ok(count) => count,
            Err(reason) => return Ok(Some(Wrong::otherwise(reason))),
        };
        if count != ROUNDS * PER_ROUND {
            let counts_too_much = count > ROUNDS * PER_ROUND;
            return Ok(Some(Wrong { text: explain_count(count), counts_too_much }));
        }
    }
    let reason = match breakpoint(vcpu)? {
        None => overflows(vcpu, skid, bounded)?,
        wrong => wrong,
    };
    Ok(reason.map(Wrong::otherwise))
}

fn explain_count(count: u64) -> String {
    let right = ROUNDS * PER_ROUND;
    let without = |of_a_round: u64| right - ROUNDS * of_a_round;
    let cause = match count {
        0 => "it does not count this guest",
        _ if count.abs_diff(ROUNDS * TAKEN) <= 2 => {
            "it counts only the branches that are taken: its event is another CPU's"
        }
        _ if count == without(LOOPS) => "it leaves LOOP out",
        _ if count == without(COUNTER_IS_ZERO) => "it leaves JECXZ out",
        _ if count == without(LOOPS + COUNTER_IS_ZERO) => "it leaves LOOP and JECXZ out",
        _ if count < right => "it was not on the hardware all the time",
        _ => "it counts what is not retired, or the host too",
    };
    format!("the branch counter gave {count} where the guest made {right}: {cause}")
}

/// Puts the guest at its start.
fn start<V: Vcpu>(vcpu: &mut V) -> Result<(), EngineError> {
    let mut code = GUEST;
    code[1..5].copy_from_slice(&(ROUNDS as u32).to_le_bytes());
    vcpu.ram().memory().write_slice(&code, GuestAddress(CODE)).expect("every machine has 4 MiB");
    // Protected mode without paging, flat.
    let segment = |attributes| Segment { selector: 8, attributes, limit: u32::MAX, base: 0 };
    let mut state = CpuState { rip: CODE, cr0: 0x11, ..CpuState::default() };
    state.segments = [segment(0xc093); 6];
    state.segments[CS] = segment(0xc09b);
    for data in [DS, ES, SS] {
        state.segments[data].selector = 16;
    }
    state.tr = Segment { selector: 0, attributes: 0x8b, limit: 0xffff, base: 0 };
    state.ldtr = Segment { selector: 0, attributes: 0x82, limit: 0xffff, base: 0 };
    vcpu.set_breakpoints(&[])?;
    vcpu.set_overflow(None)?;
    vcpu.set_state(&state)
}

/// Runs until the guest halts or stands at a breakpoint.
fn run<V: Vcpu>(vcpu: &mut V) -> Result<Result<VcpuExit, String>, EngineError> {
    for _ in 0..MAX_SIGNALS {
        match vcpu.enter()? {
            VcpuExit::Interrupted { .. } => {}
            exit @ (VcpuExit::Halt | VcpuExit::Breakpoint) => return Ok(Ok(exit)),
            exit => return Ok(Err(format!("the guest that tries the counter exited: {exit:?}"))),
        }
    }
    Ok(Err("the guest that tries the counter does not come to its end".to_owned()))
}

fn count<V: Vcpu>(vcpu: &mut V) -> Result<Result<u64, String>, EngineError> {
    start(vcpu)?;
    let before = vcpu.conditional_branches()?;
    Ok(match run(vcpu)? {
        Ok(_) => Ok(vcpu.conditional_branches()? - before),
        Err(reason) => Err(reason),
    })
}

/// A breakpoint hits each time, with the count that belongs there.
fn breakpoint<V: Vcpu>(vcpu: &mut V) -> Result<Option<String>, EngineError> {
    start(vcpu)?;
    let before = vcpu.conditional_branches()?;
    for round in 0..8 {
        vcpu.set_breakpoints(&[DECREMENT])?;
        if round > 0 {
            vcpu.step_off()?;
        }
        match run(vcpu)? {
            Ok(VcpuExit::Breakpoint) => {}
            Ok(_) => return Ok(Some("breakpoints in debug registers do nothing".to_owned())),
            Err(reason) => return Ok(Some(reason)),
        }
        let count = vcpu.conditional_branches()? - before;
        let state = vcpu.state()?;
        if count != PER_ROUND * (round + 1) - 1 || state.gpr[RCX] != ROUNDS - round {
            let place = format!("round {round}, RCX {:#x}", state.gpr[RCX]);
            return Ok(Some(format!("a breakpoint hit after {count} branches in {place}")));
        }
    }
    vcpu.set_breakpoints(&[])?;
    Ok(None)
}

/// Overflows come, and not later than they may.
fn overflows<V: Vcpu>(
    vcpu: &mut V,
    skid: u64,
    bounded: bool,
) -> Result<Option<String>, EngineError> {
    let mut missed = 0;
    for number in 0..OVERFLOWS {
        start(vcpu)?;
        let before = vcpu.conditional_branches()?;
        let asked = 500 + 97 * number;
        vcpu.set_overflow(Some(asked))?;
        let mut stopped = None;
        for _ in 0..MAX_SIGNALS {
            match vcpu.enter()? {
                VcpuExit::Interrupted { .. } => {
                    let count = vcpu.conditional_branches()? - before;
                    if count >= asked {
                        stopped = Some(count - asked);
                        break;
                    }
                }
                _ => break,
            }
        }
        match stopped {
            Some(late) if late > skid && bounded => {
                return Ok(Some(format!(
                    "the branch counter interrupted {late} branches late, where {skid} is the most \
                     that this CPU should"
                )));
            }
            Some(_) => {}
            None if bounded => {
                return Ok(Some(format!(
                    "the branch counter did not interrupt after {asked} branches"
                )));
            }
            None => missed += 1,
        }
    }
    Ok((missed > MISSED_AT_MOST).then(|| {
        format!("the branch counter did not interrupt {missed} of {OVERFLOWS} times that it was to")
    }))
}
