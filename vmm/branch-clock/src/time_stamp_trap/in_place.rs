//! What the guest comes to at a breakpoint instruction, done in its place; and what is left to the CPU.

use reprise_machine::engine::EngineError;
use reprise_machine::paging::Paging;
use reprise_time_stamp_sites::Instruction;
use reprise_trace::cpu_state::{CpuState, SS};
use reprise_trace::register_bits::{CR4_BITS, CR4_PAE, CR4_TSD, EFER_LMA, RFLAGS_TF};

use super::{GENERAL_PROTECTION, Kind, TimeStampTrap, WENT_ON, fails};
use crate::candidates::is;
use crate::guest_code::{bitness, decode_at, handler_of, linear_of};
use crate::planted::Place;
use crate::retired::{Asking, before_fault, retired};
use crate::settle::Places;
use crate::vcpu::{MAX_BREAKPOINTS, Vcpu, VcpuExit};
use iced_x86::{Decoder, DecoderOptions, Instruction as Decoded, Mnemonic};
use reprise_machine::engine::Access;

use crate::guest_code::MAX_BYTES;

/// Why an instruction that is done for the guest ends the run where the guest steps itself: #DB behind it
/// would have to be raised as well.
fn steps_itself(rip: u64) -> VcpuExit {
    fails(&format!(
        "a debugger in the guest single-steps (TF) an instruction at rip {rip:#x} that is done in its place"
    ))
}

/// Interruptions of one instruction before it counts as one that leads nowhere known.
const MAX_INTERRUPTIONS: u32 = 10_000;

impl<V: Vcpu> TimeStampTrap<V> {
    /// INT3 of this trap came back: it stands at `place`.
    pub(super) fn at_breakpoint(
        &mut self,
        state: CpuState,
        place: u64,
    ) -> Result<VcpuExit, EngineError> {
        if self.fault_handler == Some(place)
            && let Some((before, bytes)) = self.user_time_stamp(&state)
        {
            if before.rflags & RFLAGS_TF != 0 {
                return Ok(steps_itself(before.rip));
            }
            self.counts.user += 1;
            self.vcpu.set_state(&before)?;
            self.asking = Some(Box::new(Asking { before, bytes }));
            return Ok(VcpuExit::Access(Access::TimeStamp));
        }
        let Some(found) = self.planted.at(place) else { return Ok(WENT_ON) };
        let decoded = found.instruction(bitness(&state), state.rip);
        match (found.kind, decoded) {
            (Kind::FaultHandler, decoded) => self.execute_under(&state, place, decoded),
            (Kind::Site(instruction), Some(decoded)) if is(instruction, &decoded) => {
                self.in_place_of(state, place, instruction, &decoded)
            }
            _ => Ok(fails(
                "the guest executes its kernel's text in another mode than it is made for",
            )),
        }
    }

    /// The user code's state before the RDTSC whose fault led to the guest's handler of #GP, which has just
    /// been entered, and that instruction's bytes.
    fn user_time_stamp(&self, state: &CpuState) -> Option<(CpuState, usize)> {
        let before = (!self.guest_tsd).then(|| before_fault(self.vcpu.ram(), state)).flatten()?;
        let decoded = decode_at(self.vcpu.ram(), &before, before.rip)?;
        (decoded.mnemonic() == Mnemonic::Rdtsc).then_some((before, decoded.len()))
    }

    /// Does an instruction of the kernel's text.
    fn in_place_of(
        &mut self,
        state: CpuState,
        place: u64,
        instruction: Instruction,
        decoded: &Decoded,
    ) -> Result<VcpuExit, EngineError> {
        if state.segments[SS].dpl() != 0 {
            return Ok(fails("user code executes the kernel's text"));
        }
        if state.rflags & RFLAGS_TF != 0 {
            return Ok(steps_itself(state.rip));
        }
        match instruction {
            Instruction::ReadTimeStamp => {
                self.counts.kernel += 1;
                self.asking = Some(Box::new(Asking { before: state, bytes: decoded.len() }));
                return Ok(VcpuExit::Access(Access::TimeStamp));
            }
            Instruction::ReadControl4 => {
                let value = state.cr4 & !CR4_TSD | self.guest_tsd_bit();
                let mut after = retired(&state, decoded.len());
                after.gpr[decoded.op0_register().number()] = value;
                self.vcpu.retire_instruction(&after)?;
            }
            _ => {
                let mut value = state.gpr[decoded.op1_register().number()];
                if bitness(&state) != 64 {
                    value &= 0xffff_ffff;
                }
                let leaves_long = state.efer & EFER_LMA != 0 && value & CR4_PAE == 0;
                if value & !CR4_BITS != 0 || leaves_long {
                    return self.fault_of_move(&state, place, decoded);
                }
                self.guest_tsd = value & CR4_TSD != 0;
                let after = CpuState { cr4: value | CR4_TSD, ..retired(&state, decoded.len()) };
                self.vcpu.set_state(&after)?;
            }
        }
        self.counts.control += 1;
        Ok(WENT_ON)
    }

    /// A MOV to CR4 that faults is left to the CPU, which raises #GP.
    fn fault_of_move(
        &mut self,
        state: &CpuState,
        place: u64,
        decoded: &Decoded,
    ) -> Result<VcpuExit, EngineError> {
        let exit = self.execute_under(state, place, Some(*decoded))?;
        if self.vcpu.state()?.cr4 != state.cr4 {
            return Ok(fails(
                "the host's CPU takes a CR4 that the guest's CPU model does not have",
            ));
        }
        Ok(exit)
    }

    /// Has the CPU execute the one instruction under a breakpoint.
    fn execute_under(
        &mut self,
        state: &CpuState,
        place: u64,
        decoded: Option<Decoded>,
    ) -> Result<VcpuExit, EngineError> {
        let here = linear_of(state, state.rip);
        let mut next =
            Places::after(self.vcpu.ram(), state, decoded.as_ref(), MAX_BREAKPOINTS + 1).all;
        // One that leads to itself need not be stopped.
        next.retain(|linear| *linear != here);
        next.truncate(MAX_BREAKPOINTS);
        let lifted = self.planted.lift(&mut self.vcpu, place);
        let (Some(lifted), false) = (lifted, next.is_empty()) else {
            return Ok(fails("where the guest's handler of #GP goes cannot be said"));
        };
        self.vcpu.set_breakpoints(&next)?;
        let mut kicked = false;
        let exit = self.leave(place, &mut kicked)?;
        self.put_back(place, lifted);
        self.set_own_breakpoints()?;
        Ok(match exit {
            Some(exit) => {
                if kicked {
                    // Not lost: the next entry tells.
                    self.vcpu.kicker().kick();
                }
                exit
            }
            None => VcpuExit::Interrupted { kicked },
        })
    }

    /// Runs until the guest has left `place` and stands at a breakpoint, or was interrupted before it has; or
    /// gives what else it exits for.
    fn leave(&mut self, place: u64, kicked: &mut bool) -> Result<Option<VcpuExit>, EngineError> {
        for _ in 0..MAX_INTERRUPTIONS {
            match self.vcpu.enter()? {
                VcpuExit::Breakpoint => return Ok(None),
                VcpuExit::Interrupted { kicked: now } => {
                    *kicked |= now;
                    let state = self.vcpu.state()?;
                    if self.code_at(&state) == Some(place) {
                        return Ok(None);
                    }
                }
                VcpuExit::WatchedWrite(ranges) => self.written(&ranges)?,
                VcpuExit::BreakpointInstruction => {
                    let state = self.vcpu.state()?;
                    if self.code_at(&state).is_some_and(|place| self.planted.at(place).is_some()) {
                        // One of ours: the next entry comes to it again.
                        return Ok(None);
                    }
                    self.vcpu.pass_breakpoint_instruction()?;
                }
                VcpuExit::Access(_) => {
                    let what = "the guest's handler of #GP begins with an access to a device";
                    return Ok(Some(fails(what)));
                }
                exit => return Ok(Some(exit)),
            }
        }
        Ok(Some(fails(
            "the guest does not come out of the first instruction of its handler of #GP",
        )))
    }

    fn put_back(&mut self, place: u64, lifted: Place<Kind>) {
        let kind = lifted.kind;
        let there = self.planted.put_back(&mut self.vcpu, place, lifted);
        if !there && kind == Kind::FaultHandler {
            // What stands there is something else now: it is looked for anew.
            self.fault_handler = None;
        }
    }

    /// Looks whether the guest has set up another handler of #GP, and has a breakpoint at its entry.
    pub(super) fn look_for_fault_handler(&mut self) -> Result<(), EngineError> {
        let Some(placed) = &self.placed else { return Ok(()) };
        let state = self.vcpu.state()?;
        let user = state.segments[SS].dpl() == 3;
        if !self.applied || state.efer & EFER_LMA == 0 {
            self.counts.unguarded += u64::from(user && !self.guest_tsd);
            return Ok(());
        }
        let ram = self.vcpu.ram();
        let paging = Paging::from(&state);
        let Some(handler) = handler_of(ram, &state, GENERAL_PROTECTION) else { return Ok(()) };
        // Whatever code the guest is in, its handlers are 64-bit code.
        let Some(place) = paging.walk(ram, handler).map(|mapping| mapping.physical) else {
            return Ok(());
        };
        let known = self.fault_handler == Some(place) && self.planted.at(place).is_some();
        let stays = placed.text_at(place).is_some_and(|text| !text.is_initial());
        if known || !stays {
            self.counts.unguarded += u64::from(user && !self.guest_tsd && !known);
            return Ok(());
        }
        let mut code = [0; MAX_BYTES];
        let count = paging.read_prefix(ram, handler, &mut code);
        self.hide(place, &mut code[..count.min((0x1000 - place % 0x1000) as usize)]);
        if let Some(before) = self.fault_handler.take()
            && self.planted.at(before).is_some_and(|found| found.kind == Kind::FaultHandler)
        {
            self.planted.remove(&mut self.vcpu, before, &[]);
        }
        let first = Decoder::with_ip(64, &code[..count], handler, DecoderOptions::NONE).decode();
        // A breakpoint that is there for what the handler begins with serves as well.
        let planted = self.planted.at(place).is_some() || {
            let code = &code[..first.len().max(1)];
            self.planted.plant_in_page(&mut self.vcpu, place, code, Kind::FaultHandler)
        };
        if planted {
            self.fault_handler = Some(place);
        } else {
            self.refusal =
                Some("the guest's handler of #GP overlaps what is trapped in its kernel");
        }
        Ok(())
    }
}
