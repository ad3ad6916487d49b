//! Whether a vCPU's counter is what the clock needs, found out by running a tiny guest on it.
//!
//! What is looked for has been met on real machines: an event that counts only taken branches, a counter
//! that also counts speculation past LOCK-prefixed instructions (Zen, unless bit 54 of MSR 0xc0011020 is
//! set), one that counts the host as well, overflows that never come or come later than they should,
//! and debug registers that do nothing.

use reprise_machine::engine::EngineError;
use reprise_trace::cpu_state::{CS, CpuState, DS, ES, RCX, SS, Segment};
use vm_memory::{Bytes, GuestAddress};

use crate::vcpu::{Vcpu, VcpuExit};

/// Where the guest's code lies; its counter of locked additions lies behind it.
const CODE: u64 = 0x1000;
/// mov ecx, ROUNDS; xor eax, eax
/// loop: lock inc dword [0x2000]; test eax, eax; jnz +0; dec ecx; jnz loop; hlt
const GUEST: [u8; 24] = [
    0xb9, 0, 0, 0, 0, // mov ecx, ROUNDS
    0x31, 0xc0, // xor eax, eax
    0xf0, 0xff, 0x05, 0x00, 0x20, 0, 0, // lock inc dword [0x2000]
    0x85, 0xc0, // test eax, eax
    0x75, 0x00, // jnz to the next: never taken
    0x49, // dec ecx
    0x75, 0xf2, // jnz to the LOCK: taken in every round but the last
    0xf4, // hlt
    0x90, 0x90,
];
/// Where `dec ecx` lies.
const DECREMENT: u64 = CODE + 18;
const ROUNDS: u64 = 20_000;
/// Conditional branches of a round.
const PER_ROUND: u64 = 2;
/// Times that everything is counted; each must give the same.
const COUNTS: u32 = 3;
/// Overflows that are tried, each after another number of branches.
const OVERFLOWS: u64 = 50;
/// Exits for which nobody asked, in one run of the guest, before it counts as stuck.
const MAX_SIGNALS: u32 = 10_000;

/// What is wrong with a counter, in a line for a person; `Ok(None)` if nothing is. Overflows may be late
/// by `skid` branches; one later than that is reported if `bounded`. The vCPU's state and the first
/// 12 KiB of its RAM are overwritten.
///
/// # Errors
/// If the host fails.
pub fn what_is_wrong<V: Vcpu>(
    vcpu: &mut V,
    skid: u64,
    bounded: bool,
) -> Result<Option<String>, EngineError> {
    for _ in 0..COUNTS {
        let count = match count(vcpu)? {
            Ok(count) => count,
            Err(reason) => return Ok(Some(reason)),
        };
        if count != ROUNDS * PER_ROUND {
            return Ok(Some(explain_count(count)));
        }
    }
    if let Some(reason) = breakpoint(vcpu)? {
        return Ok(Some(reason));
    }
    overflows(vcpu, skid, bounded)
}

fn explain_count(count: u64) -> String {
    let right = ROUNDS * PER_ROUND;
    let cause = match count {
        0 => "it does not count this guest",
        _ if count.abs_diff(right / PER_ROUND) <= 2 => {
            "it counts only the branches that are taken: its event is another CPU's"
        }
        _ if count < right => "it was not on the hardware all the time",
        _ => {
            "it counts what is not retired, or the host too (on AMD's Zen, set bit 54 of MSR \
             0xc0011020 on each CPU, as zen_workaround.py of rr does)"
        }
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
        if count != PER_ROUND * round + 1 || state.gpr[RCX] != ROUNDS - round {
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
            None => {}
        }
    }
    Ok(None)
}
