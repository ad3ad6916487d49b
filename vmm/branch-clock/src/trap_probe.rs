//! Whether a vCPU can do what [`crate::time_stamp_trap`] asks of it, found out by running tiny guests on it.
//!
//! The kernel of each is a few instructions in 64-bit mode; 2 MiB are mapped one to one, for user code as
//! well.

use reprise_machine::engine::EngineError;
use reprise_trace::cpu_state::{CS, CpuState, DescriptorTable, RAX, RCX, RSP, SS, Segment};
use reprise_trace::register_bits::{CR4_TSD, RFLAGS_IF, RFLAGS_RF};

use crate::retired::retired;
use crate::vcpu::{Vcpu, VcpuExit};

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
/// Kernel code that a question is about.
const CODE: u64 = 0x8000;
const USER_CODE: u64 = 0x9000;
/// Handlers of #BP and #GP.
const BREAKPOINT_HANDLER: u64 = 0xa000;
const FAULT_HANDLER: u64 = 0xa100;
const STACK_TOP: u64 = 0xc000;
/// What is written to.
const DATA: u64 = 0xd000;

/// Null, kernel code and data, user data and code, and the TSS in two entries.
const GDT_ENTRIES: [u64; 7] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x0000_8b00_6000_0067,
    0,
];
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_DATA: u16 = 0x1b;
const USER_CODE_SELECTOR: u16 = 0x23;
const TSS_SELECTOR: u16 = 0x28;

const INT3: u8 = 0xcc;
const HLT: u8 = 0xf4;
const RDTSC: [u8; 2] = [0x0f, 0x31];
/// mov [rax], rcx
const STORE: [u8; 3] = [0x48, 0x89, 0x08];
/// Any number that is nowhere else.
const VALUE: u64 = 0x0123_4567_89ab_cdef;
/// Exits for which nobody asked before a guest counts as stuck.
const MAX_SIGNALS: u32 = 10_000;

/// What is wrong with it, in a line for a person; `Ok(None)` if nothing is. The vCPU's state and the first
/// 64 KiB of its RAM are overwritten, and INT3 is caught afterwards.
///
/// # Errors
/// If the host fails or refuses.
pub fn what_is_wrong<V: Vcpu>(vcpu: &mut V) -> Result<Option<String>, EngineError> {
    let questions = [caught, passed_on, watched, refused_to_user];
    vcpu.catch_breakpoint_instructions(true)?;
    vcpu.set_breakpoints(&[])?;
    for question in questions {
        if let Some(reason) = question(vcpu)? {
            return Ok(Some(reason));
        }
    }
    Ok(None)
}

/// INT3 comes back, and an instruction done in its place retires.
fn caught<V: Vcpu>(vcpu: &mut V) -> Result<Option<String>, EngineError> {
    let state = kernel(vcpu, &[INT3, HLT]);
    vcpu.set_state(&state)?;
    if let Some(reason) = comes_back_at(vcpu, CODE, "INT3 in kernel code")? {
        return Ok(Some(reason));
    }
    let mut after = retired(&vcpu.state()?, 1);
    after.gpr[RAX] = VALUE;
    vcpu.retire_instruction(&after)?;
    let exit = run(vcpu)?;
    let state = vcpu.state()?;
    let right = exit == VcpuExit::Halt && state.rip == CODE + 2 && state.gpr[RAX] == VALUE;
    let wrong = || format!("an instruction that was done for the guest led to {exit:?}");
    Ok((!right).then(wrong))
}

/// INT3 reaches the guest, as a trap.
fn passed_on<V: Vcpu>(vcpu: &mut V) -> Result<Option<String>, EngineError> {
    let state = kernel(vcpu, &[INT3, HLT]);
    vcpu.set_state(&state)?;
    if let Some(reason) = comes_back_at(vcpu, CODE, "INT3 in kernel code")? {
        return Ok(Some(reason));
    }
    let before = vcpu.state()?.rflags;
    vcpu.pass_breakpoint_instruction()?;
    let exit = run(vcpu)?;
    let state = vcpu.state()?;
    if exit != VcpuExit::Halt || state.rip != BREAKPOINT_HANDLER + 1 {
        return Ok(Some(format!("INT3 that is passed on to the guest led to {exit:?}")));
    }
    let [rip, _, flags] = stack_words(vcpu, &state);
    let wrong = || {
        format!(
            "INT3 at {CODE:#x} that is passed on to the guest returns to {rip:#x} with RFLAGS {flags:#x}"
        )
    };
    Ok(([rip, flags] != [CODE + 1, before]).then(wrong))
}

/// A write to watched RAM comes back, done, and once.
fn watched<V: Vcpu>(vcpu: &mut V) -> Result<Option<String>, EngineError> {
    let mut state = kernel(vcpu, &[&STORE[..], &[HLT]].concat());
    (state.gpr[RAX], state.gpr[RCX]) = (DATA, VALUE);
    vcpu.set_state(&state)?;
    vcpu.watch_writes(DATA..DATA + 1, true)?;
    let exit = run(vcpu)?;
    let after = CODE + STORE.len() as u64;
    let written = DATA..DATA + 8;
    let right = exit == VcpuExit::WatchedWrite(Vec::from([written]))
        && vcpu.state()?.rip == after
        && word_at(vcpu, DATA) == VALUE;
    if !right {
        return Ok(Some(format!("a write to RAM that is watched led to {exit:?}")));
    }
    vcpu.watch_writes(DATA..DATA + 1, false)?;
    let exit = run(vcpu)?;
    let wrong = || format!("behind a write to RAM that is watched the guest came to {exit:?}");
    Ok((exit != VcpuExit::Halt).then(wrong))
}

/// CR4.TSD keeps user code from reading the counter, and the fault's handler can be caught.
fn refused_to_user<V: Vcpu>(vcpu: &mut V) -> Result<Option<String>, EngineError> {
    let state = kernel(vcpu, &[]);
    vcpu.write_ram(USER_CODE, &RDTSC);
    vcpu.write_ram(FAULT_HANDLER, &[INT3, HLT]);
    let mut user = CpuState { rip: USER_CODE, rflags: 2 | RFLAGS_IF, ..state };
    user.segments = [segment(USER_DATA, 0xc0f3); 6];
    user.segments[CS] = segment(USER_CODE_SELECTOR, 0xa0fb);
    user.cr4 |= CR4_TSD;
    vcpu.set_state(&user)?;
    let what = "RDTSC of user code under CR4.TSD";
    if let Some(reason) = comes_back_at(vcpu, FAULT_HANDLER, what)? {
        return Ok(Some(reason));
    }
    let state = vcpu.state()?;
    let frame: [u64; 6] = stack_words(vcpu, &state);
    let (code, stack) = (USER_CODE_SELECTOR.into(), user.segments[SS].selector.into());
    // A fault's frame has RF set.
    let flags = user.rflags | RFLAGS_RF;
    let expected = [0, USER_CODE, code, flags, user.gpr[RSP], stack];
    let wrong = || format!("{what} has a frame that is not one of #GP: {frame:x?}");
    Ok((frame != expected).then(wrong))
}

/// Runs the guest; what is wrong if it does not come back for INT3 at `rip`.
fn comes_back_at<V: Vcpu>(
    vcpu: &mut V,
    rip: u64,
    what: &str,
) -> Result<Option<String>, EngineError> {
    let exit = run(vcpu)?;
    let found = vcpu.state()?.rip;
    let right = exit == VcpuExit::BreakpointInstruction && found == rip;
    let wrong = || match exit {
        VcpuExit::Unsupported(reason) => format!("{what} does not come back: {reason}"),
        exit => format!("{what} does not come back: {exit:?} at {found:#x}"),
    };
    Ok((!right).then(wrong))
}

/// Runs until there is an exit that the guest caused.
fn run<V: Vcpu>(vcpu: &mut V) -> Result<VcpuExit, EngineError> {
    for _ in 0..MAX_SIGNALS {
        match vcpu.enter()? {
            VcpuExit::Interrupted { .. } => {}
            exit => return Ok(exit),
        }
    }
    let what = "the guest that tries the trap of RDTSC does not come back: use --engine soft";
    Err(EngineError { what: what.to_owned() })
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { selector, attributes, limit: u32::MAX, base: 0 }
}

/// Lays out the guest, and gives its state at the start of `code`. #BP and #GP lead to a HLT.
fn kernel<V: Vcpu>(vcpu: &mut V, code: &[u8]) -> CpuState {
    let mut put = |address: u64, words: &[u64]| {
        for (at, word) in (address..).step_by(8).zip(words) {
            vcpu.write_ram(at, &word.to_le_bytes());
        }
    };
    // Present, writable, for user code; the last one 2 MiB.
    put(PML4, &[PDPT | 7]);
    put(PDPT, &[PAGE_DIRECTORY | 7]);
    put(PAGE_DIRECTORY, &[0x87]);
    put(GDT, &GDT_ENTRIES);
    for (vector, handler) in [(3, BREAKPOINT_HANDLER), (13, FAULT_HANDLER)] {
        let low = handler & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e00 << 32;
        put(IDT + 16 * vector, &[low | (handler >> 16 & 0xffff) << 48, handler >> 32]);
    }
    // RSP0.
    put(TSS + 4, &[STACK_TOP]);
    for handler in [BREAKPOINT_HANDLER, FAULT_HANDLER] {
        vcpu.write_ram(handler, &[HLT]);
    }
    vcpu.write_ram(CODE, code);
    let mut state = CpuState {
        rip: CODE,
        segments: [segment(KERNEL_DATA, 0xc093); 6],
        tr: Segment { selector: TSS_SELECTOR, attributes: 0x8b, limit: 0x67, base: TSS },
        gdtr: DescriptorTable { base: GDT, limit: 8 * GDT_ENTRIES.len() as u16 - 1 },
        idtr: DescriptorTable { base: IDT, limit: 0xfff },
        cr0: 0x8001_0033,
        cr3: PML4,
        // PAE, OSFXSR, OSXMMEXCPT.
        cr4: 0x620,
        // SCE, LME, LMA, NXE.
        efer: 0xd01,
        ..CpuState::default()
    };
    state.segments[CS] = segment(KERNEL_CODE, 0xa09b);
    state.gpr[RSP] = STACK_TOP;
    state
}

fn word_at<V: Vcpu>(vcpu: &V, address: u64) -> u64 {
    let mut word = [0; 8];
    vcpu.ram().read(address, &mut word);
    u64::from_le_bytes(word)
}

/// The words from the top of the stack on.
fn stack_words<V: Vcpu, const COUNT: usize>(vcpu: &V, state: &CpuState) -> [u64; COUNT] {
    let top = state.gpr[RSP];
    let lies = top <= STACK_TOP;
    std::array::from_fn(|index| if lies { word_at(vcpu, top + 8 * index as u64) } else { 0 })
}
