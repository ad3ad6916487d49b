//! User code (CPL3) under the clock `step`, where KVM runs it natively (pagetable-based KVM).
//!
//! There KVM's single-step sets TF in the hardware's flags, and what the instruction raises then, the #DB
//! behind it or a fault, goes to the guest instead of coming back. So while user code is stepped, the
//! guest has an interrupt descriptor table without entries. Nothing can be delivered: each step is a
//! triple fault, which leaves registers and memory as the instruction left them, and KVM still tells
//! which exception it was, with its error code. A #DB is an instruction that retired. Any other is
//! delivered here, through the guest's own table, with flags that show nothing of TF.
//!
//! What was tried on such a host:
//!
//! - The #DB comes after exactly one instruction, and after each iteration of a repeated one.
//! - PUSHF stores the TF: the stored word is corrected. POPF takes it away, and still raises the #DB.
//! - INT n but for 3 and 4 reaches the host's table, and SYSCALL the guest's kernel with the rights
//!   of user code; neither is executed natively here, nor is RDTSC, nor CPUID, which shows the host's.
//! - An instruction that KVM emulates, as IN, comes back with a debug exit behind it.
//!
//! What shows or changes the host's own descriptors, or is not in the CPU model, which hardware would
//! not know, ends the run with a reason.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, Register};
use kvm_ioctls::VcpuFd;
use reprise_devices::cpu_model::cpuid;
use reprise_machine::engine::{EngineError, Exit};
use reprise_trace::cpu_state::{CpuState, DescriptorTable, RAX, RBX, RCX, RDX, RSP};

use crate::KvmEngine;
use crate::error::KvmError;
use crate::self_test::steps_user_code;
use crate::step::{Begun, SELF_STEPPING};
use crate::system_call;
use crate::transfer::{Event, GENERAL_PROTECTION, deliver, software_interrupt};
use crate::vcpu::RawExit;
use reprise_branch_clock::guest_code::bitness;
use reprise_branch_clock::retired::time_stamp_retired;
use reprise_machine::paging::{Paging, is_ram, write_ram};
use reprise_trace::register_bits::*;

const DEBUG: u8 = 1;
const BREAKPOINT: u8 = 3;
const UNDEFINED: u8 = 6;
const PAGE_FAULT: u8 = 14;
const X87_FAULT: u8 = 16;
const ALIGNMENT: u8 = 17;
const SSE_FAULT: u8 = 19;

/// Vectors with an error code, as user code may raise them.
const WITH_ERROR_CODE: [u8; 5] = [11, 12, GENERAL_PROTECTION, PAGE_FAULT, ALIGNMENT];

/// Faults that a bit of CR0 or CR4 must allow: natively they are raised by the host's bits.
const NOT_WITHOUT: [(u8, u64, u64); 3] =
    [(X87_FAULT, CR0_NE, 0), (ALIGNMENT, CR0_AM, 0), (SSE_FAULT, 0, CR4_OSXMMEXCPT)];

/// What of the guest's state KVM does not hold while user code is stepped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hidden {
    pub(crate) idtr: DescriptorTable,
    /// Each #DB writes DR6.
    dr6: u64,
}

/// What an instruction of user code was when it began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UserStep {
    gpr: [u64; 16],
    rflags: u64,
    cr2: u64,
    /// It is PUSHF, of so many bytes.
    stores_flags: Option<usize>,
}

impl UserStep {
    pub(crate) fn of(view: &CpuState, instruction: Option<&Instruction>) -> Self {
        let stores_flags = match instruction.map(Instruction::code) {
            Some(Code::Pushfw) => Some(2),
            Some(Code::Pushfq) => Some(8),
            _ => None,
        };
        Self { gpr: view.gpr, rflags: view.rflags, cr2: view.cr2, stores_flags }
    }
}

/// What executing an instruction here comes to.
enum Done {
    Retired(CpuState),
    /// It raised an exception, which is delivered.
    Raised(CpuState),
}

impl KvmEngine {
    /// As `execute_here`, for user code.
    pub(crate) fn execute_user_here(
        &mut self,
        instruction: Option<&Instruction>,
    ) -> Result<Option<Option<Exit>>, EngineError> {
        if let Some(what) = self.obstacle(instruction) {
            return Ok(Some(self.cannot_step(what)?));
        }
        if let Some(instruction) = instruction.filter(|found| self.can_be_fetched(found)) {
            match self.done_here(instruction)? {
                None => {}
                Some(None) => {
                    let what = "an exception of user code that has no plain way to its handler";
                    return Ok(Some(self.cannot_step(what)?));
                }
                Some(Some(Done::Retired(after))) => {
                    self.replace(after)?;
                    self.count();
                    return Ok(Some(None));
                }
                Some(Some(Done::Raised(after))) => {
                    self.replace(after)?;
                    self.stepper.amid_exception = true;
                    return Ok(Some(None));
                }
            }
        }
        if self.hide()? {
            return Ok(None);
        }
        let what = "user code under breakpoints of the guest's own (DR7)";
        Ok(Some(self.cannot_step(what)?))
    }

    /// What is not run natively; the inner `None` is an exception that cannot be delivered.
    fn done_here(&self, instruction: &Instruction) -> Result<Option<Option<Done>>, KvmError> {
        let view = &self.stepper.view;
        let next = instruction.next_ip();
        let raised = |vector, error_code| {
            deliver(&self.ram, view, &Event::fault(view, vector, error_code)).map(Done::Raised)
        };
        let interrupt = |vector| {
            let (retired, after) = software_interrupt(&self.ram, view, vector, next)?;
            Some(if retired { Done::Retired(after) } else { Done::Raised(after) })
        };
        Ok(Some(match instruction.code() {
            Code::Int_imm8 => interrupt(instruction.immediate8()),
            Code::Int3 => interrupt(BREAKPOINT),
            Code::Int1 => {
                deliver(&self.ram, view, &Event::software(view, DEBUG, next)).map(Done::Retired)
            }
            Code::Syscall if view.efer & EFER_SCE == 0 => raised(UNDEFINED, None),
            Code::Syscall => {
                let state = self.with_system_call_registers()?;
                Some(Done::Retired(system_call::enter(&state, next)))
            }
            Code::Rdtsc if view.cr4 & CR4_TSD != 0 => raised(GENERAL_PROTECTION, Some(0)),
            Code::Rdtsc => {
                let ns = self.time_base.at(self.tick).ns;
                let state = CpuState { tsc_offset: self.tsc[0], ..view.clone() };
                Some(Done::Retired(time_stamp_retired(&state, instruction.len(), ns)))
            }
            Code::Cpuid => Some(Done::Retired(identified(view, next))),
            _ => return Ok(None),
        }))
    }

    /// Why user code cannot be stepped here.
    fn obstacle(&self, instruction: Option<&Instruction>) -> Option<&'static str> {
        let view = &self.stepper.view;
        if !steps_user_code() {
            return Some("user code (CPL3)");
        }
        if bitness(view) != 64 {
            return Some("user code that is not 64-bit");
        }
        // What cannot be decoded faults natively as well.
        let instruction = instruction?;
        let loads_flags = matches!(instruction.mnemonic(), Mnemonic::Popf | Mnemonic::Popfq);
        if loads_flags && self.loads_trap_flag(instruction) {
            return Some(SELF_STEPPING);
        }
        let changes_interrupt_flag =
            loads_flags || matches!(instruction.mnemonic(), Mnemonic::Cli | Mnemonic::Sti);
        if changes_interrupt_flag && view.rflags & RFLAGS_IOPL == RFLAGS_IOPL {
            return Some("user code that closes interrupts (IOPL 3)");
        }
        if uses_unit(instruction)
            && (view.cr0 & (CR0_EM | CR0_TS) != 0 || view.cr4 & CR4_OSFXSR == 0)
        {
            return Some("x87 or SSE code of a guest that has switched them off");
        }
        if !is_native(instruction) {
            return Some("an instruction of user code that would show the host's CPU");
        }
        None
    }

    /// Whether fetching the instruction does not fault.
    fn can_be_fetched(&self, instruction: &Instruction) -> bool {
        let paging = Paging::from(&self.stepper.view);
        let ends = [instruction.ip(), instruction.next_ip().wrapping_sub(1)];
        ends.into_iter().all(|end| {
            paging.walk(&self.ram, end).is_some_and(|found| found.user && !found.no_execute)
        })
    }

    /// What a step of user code came back with; `None` for what all code has in common.
    pub(crate) fn user_exit(
        &mut self,
        exit: RawExit,
        step: &UserStep,
    ) -> Result<Option<Option<Exit>>, EngineError> {
        match exit {
            RawExit::Shutdown => {
                let exception = self.vcpu.fd.sync_regs().events.exception;
                if exception.nr == DEBUG {
                    return self.retire_begun().map(Some);
                }
                self.raise(exception.nr, exception.error_code, step).map(Some)
            }
            // The instruction has not begun, or what it raised waits in KVM: hardware takes a #DB
            // before an interrupt of the host.
            RawExit::Interrupted => {
                self.vcpu.fd.set_kvm_immediate_exit(0);
                Ok(Some(None))
            }
            _ => Ok(None),
        }
    }

    fn retire_begun(&mut self) -> Result<Option<Exit>, EngineError> {
        match self.stepper.begun {
            Some(begun @ Begun { user: Some(user), .. }) => self.retire_user(&begun, &user),
            _ => Ok(None),
        }
    }

    /// Delivers the fault that a step came to.
    fn raise(
        &mut self,
        vector: u8,
        error_code: u32,
        step: &UserStep,
    ) -> Result<Option<Exit>, EngineError> {
        let view = &self.stepper.view;
        let rip = self.stepper.begun.map(|begun| begun.rip);
        // Natively, faults set RF.
        let unchanged = view.gpr == step.gpr
            && Some(view.rip) == rip
            && (view.rflags ^ step.rflags) & !(RFLAGS_RF | RFLAGS_TF) == 0;
        let lawful = NOT_WITHOUT.iter().all(|(other, cr0, cr4)| {
            *other != vector || view.cr0 & cr0 == *cr0 && view.cr4 & cr4 == *cr4
        });
        if !unchanged || !lawful {
            let what = format!("exception {vector} as this user code raises it");
            return Ok(self.cannot_step(&what)?);
        }
        let cr2 = if vector == PAGE_FAULT { view.cr2 } else { step.cr2 };
        let state = CpuState { rflags: step.rflags, cr2, ..view.clone() };
        let error_code = WITH_ERROR_CODE.contains(&vector).then_some(error_code);
        let event = Event::fault(&state, vector, error_code);
        let Some(after) = deliver(&self.ram, &state, &event) else {
            let what =
                format!("exception {vector} of user code, which has no plain way to its handler");
            return Ok(self.cannot_step(&what)?);
        };
        self.replace(after)?;
        self.stepper.begun = None;
        self.stepper.amid_exception = true;
        Ok(None)
    }

    /// An instruction of user code has been stepped.
    pub(crate) fn retire_user(
        &mut self,
        begun: &Begun,
        step: &UserStep,
    ) -> Result<Option<Exit>, EngineError> {
        // KVM drops TF where it has emulated the instruction.
        self.stepper.armed = false;
        let view = &self.stepper.view;
        if !begun.successors.contain(view.rip) {
            return self.unexplained(begun);
        }
        if begun.repeats && view.rip == begun.rip {
            let user = Some(UserStep { gpr: view.gpr, ..*step });
            self.stepper.begun = Some(Begun { user, ..*begun });
            return Ok(None);
        }
        if let Some(bytes) = step.stores_flags
            && !self.correct_stored_flags(step.rflags, bytes)
        {
            return Ok(self.cannot_step("PUSHF of user code to what is not RAM")?);
        }
        self.count();
        Ok(None)
    }

    /// Makes what PUSHF has stored the guest's own flags; false where it is not RAM.
    fn correct_stored_flags(&self, rflags: u64, bytes: usize) -> bool {
        let view = &self.stepper.view;
        let paging = Paging::from(view);
        let stored = (rflags & !(RFLAGS_RF | RFLAGS_VM)).to_le_bytes();
        (0u64..).zip(&stored[..bytes]).all(|(offset, byte)| {
            let place = paging.walk(&self.ram, view.gpr[RSP].wrapping_add(offset));
            let place = place.filter(|place| is_ram(&self.ram, place.physical, 1));
            if let Some(place) = place {
                write_ram(&self.ram, place.physical, &[*byte]);
            }
            place.is_some()
        })
    }

    /// Gives KVM a table without entries, and keeps the guest's. False if the guest has breakpoints.
    fn hide(&mut self) -> Result<bool, KvmError> {
        const ENABLED: u64 = 0xff;
        if self.stepper.hidden.is_some() {
            return Ok(true);
        }
        let fd = &self.vcpu.fd;
        let debug =
            fd.get_debug_regs().map_err(|errno| KvmError::refused("KVM_GET_DEBUGREGS", errno))?;
        if debug.dr7 & ENABLED != 0 {
            return Ok(false);
        }
        set_interrupt_table_limit(fd, 0)?;
        self.stepper.hidden = Some(Hidden { idtr: self.stepper.view.idtr, dr6: debug.dr6 });
        self.stepper.armed = false;
        Ok(true)
    }

    /// Gives KVM back what is the guest's.
    pub(crate) fn show_hidden(&mut self) -> Result<(), KvmError> {
        let Some(hidden) = self.stepper.hidden.take() else { return Ok(()) };
        let fd = &self.vcpu.fd;
        set_interrupt_table_limit(fd, hidden.idtr.limit)?;
        let mut debug =
            fd.get_debug_regs().map_err(|errno| KvmError::refused("KVM_GET_DEBUGREGS", errno))?;
        debug.dr6 = hidden.dr6;
        fd.set_debug_regs(&debug).map_err(|errno| KvmError::refused("KVM_SET_DEBUGREGS", errno))?;
        self.stepper.armed = false;
        Ok(())
    }
}

/// Sets the size of the interrupt descriptor table, in bytes less one.
pub(crate) fn set_interrupt_table_limit(fd: &VcpuFd, limit: u16) -> Result<(), KvmError> {
    let mut sregs = fd.get_sregs().map_err(|errno| KvmError::refused("KVM_GET_SREGS", errno))?;
    sregs.idt.limit = limit;
    fd.set_sregs(&sregs).map_err(|errno| KvmError::refused("KVM_SET_SREGS", errno))
}

/// The state after CPUID.
fn identified(view: &CpuState, next_rip: u64) -> CpuState {
    let answers = cpuid(view.gpr[RAX] as u32, view.gpr[RCX] as u32);
    let rflags = view.rflags & !RFLAGS_RF;
    let mut after = CpuState { rip: next_rip, rflags, interrupt_shadow: false, ..view.clone() };
    for (index, answer) in [RAX, RBX, RCX, RDX].into_iter().zip(answers) {
        after.gpr[index] = u64::from(answer);
    }
    after
}

/// Features whose instructions may run natively: the host's CPU does with them what the model's does.
const NATIVE: [CpuidFeature; 27] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CLFSH,
    CpuidFeature::CMOV,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::CPUID,
    CpuidFeature::CX8,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::FXSR,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::POPCNT,
    CpuidFeature::SYSCALL,
    CpuidFeature::TSC,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
];

/// Whether the x87 or SSE unit executes the instruction.
fn uses_unit(instruction: &Instruction) -> bool {
    use CpuidFeature::*;
    let features = [FPU, FPU287, FPU387, FXSR, MMX, SSE, SSE2, SSE3, SSSE3, SSE4_1, SSE4_2];
    instruction.cpuid_features().iter().any(|feature| features.contains(feature))
}

/// Whether running the instruction natively does what the guest's CPU would do, or what is done here
/// takes its place.
fn is_native(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    // What they load or store are the host's descriptors, or its machine status word.
    let of_the_host = matches!(
        instruction.mnemonic(),
        Sgdt | Sidt
            | Sldt
            | Str
            | Smsw
            | Lar
            | Lsl
            | Verr
            | Verw
            | Lss
            | Lfs
            | Lgs
            | Retf
            | Iretq
            | Iretd
            | Iret
            | Sysenter
    );
    let far = instruction.is_jmp_far()
        || instruction.is_jmp_far_indirect()
        || instruction.is_call_far()
        || instruction.is_call_far_indirect();
    let selector = |register: Register| register.is_segment_register();
    let moves_selector = matches!(instruction.mnemonic(), Mov | Push | Pop)
        && (selector(instruction.op0_register()) || selector(instruction.op1_register()));
    let known = instruction.cpuid_features().iter().all(|feature| NATIVE.contains(feature));
    let hint = matches!(instruction.mnemonic(), Endbr64 | Endbr32);
    let legacy = instruction.encoding() == EncodingKind::Legacy;
    legacy && (known || hint) && !of_the_host && !far && !moves_selector
}

#[cfg(test)]
#[path = "user_step_tests.rs"]
mod tests;
