//! The block loop: runs pre-decoded operations and keeps the instruction count exact.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use reprise_machine::engine::Exit;

use crate::cpu::{BLOCK_RIP, Cpu, WAITING};
use crate::decode::block_cache::Block;
use crate::fault::{Flow, Stop};
use crate::flags;
use crate::intervention::keeps_shadow;
use crate::translate::Left;

/// The guest took an exception while it was being delivered a double fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TripleFault;

/// Translated code is longer than what is still to run.
struct ForLess;

impl Cpu {
    /// Runs until `until` instructions have retired since the machine started, or an earlier exit.
    pub(crate) fn execute(
        &mut self,
        until: u64,
        kick: &AtomicBool,
        interrupt_requested: bool,
    ) -> Exit {
        self.registers.gpr[usize::from(WAITING)] = if interrupt_requested { flags::IF } else { 0 };
        // The block that ran last, and the epoch in which it was found.
        let mut last: Option<(NonNull<Block>, u64)> = None;
        // Translated code has more instructions than are still to run.
        let mut for_less = false;
        loop {
            // Behind any instruction or frame, whichever way it came about.
            if self.memory.physical.has_watched_writes() {
                return Exit::Kicked;
            }
            if let Some(exit) = self.due_exit(until, kick, interrupt_requested) {
                return exit;
            }
            if !self.keep_trace_moving() {
                return Exit::Kicked;
            }
            if self.careful || self.interrupt_shadow && interrupt_requested {
                last = None;
                if let Some(exit) = self.execute_carefully() {
                    return exit;
                }
                continue;
            }
            // Where nothing waits to interrupt, nothing tells whether there is a shadow.
            let shadowed = std::mem::take(&mut self.interrupt_shadow).then_some(self.tick);
            let Ok(block) = self.next_block(last) else {
                last = None;
                if let Some(exit) = self.take_fault() {
                    return exit;
                }
                continue;
            };
            last = Some((block, self.blocks.epoch()));
            // SAFETY: a block lives until the cache drops it, which happens only in
            // `drop_overwritten_code` and in `current_block`; running operations calls neither.
            let block = unsafe { block.as_ref() };
            let left = until - self.tick;
            let translated = if !for_less && block.ops.len() as u64 <= left {
                self.translation(block, self.code_address())
            } else {
                None
            };
            let exit = match translated {
                Some(code) => {
                    last = None;
                    let exit = self.run_unit(code, until);
                    for_less = exit.is_err();
                    exit.unwrap_or(None)
                }
                None => self.interpret(block, left as usize),
            };
            // Before an exit too: an instruction that starts again is what its bytes now say.
            if self.memory.physical.code_was_written() {
                self.drop_overwritten_code();
            }
            if let Some(exit) = exit {
                self.interrupt_shadow |= keeps_shadow(&exit) && shadowed == Some(self.tick);
                return exit;
            }
        }
    }

    /// The exit that is due where the guest stands.
    #[inline(always)]
    fn due_exit(
        &mut self,
        until: u64,
        kick: &AtomicBool,
        interrupt_requested: bool,
    ) -> Option<Exit> {
        if kick.load(Ordering::Relaxed) && !self.amid_exceptions() {
            kick.store(false, Ordering::Release);
            return Some(Exit::Kicked);
        }
        if self.tick == until {
            return Some(Exit::TickReached);
        }
        (interrupt_requested && self.interruptible()).then_some(Exit::InterruptWindow)
    }

    /// Runs translated code until it is left, with the exit if that is why.
    #[inline(always)]
    fn run_unit(&mut self, code: *const u8, until: u64) -> Result<Option<Exit>, ForLess> {
        match self.run_translated(code, until) {
            Left::ForNext => Ok(None),
            Left::ForLess => Err(ForLess),
            Left::Stopped { block, flow } => {
                // SAFETY: as in `execute`.
                let block = unsafe { block.as_ref() };
                Ok(self.finish_stopped(block, flow))
            }
        }
    }

    /// The block at RIP, by way of the one that ran before if that led here already.
    #[inline(always)]
    fn next_block(&mut self, last: Option<(NonNull<Block>, u64)>) -> Result<NonNull<Block>, Stop> {
        let linear = self.code_address();
        let key = self.blocks.key(linear, self.mode);
        let epoch = self.blocks.epoch();
        let Some((last, _)) = last.filter(|&(_, found_in)| found_in == epoch) else {
            return self.current_block(linear);
        };
        // SAFETY: no block has been dropped since `last` was found: the epoch is the same.
        if let Some(block) = unsafe { last.as_ref() }.linked(linear, key) {
            return Ok(block);
        }
        let block = self.current_block(linear)?;
        if self.blocks.epoch() == epoch {
            // SAFETY: as above; finding `block` has dropped none either.
            unsafe { last.as_ref() }.link(linear, key, block);
        }
        Ok(block)
    }

    /// Runs operations of `block`, at most `budget`, each a call.
    #[inline(always)]
    fn interpret(&mut self, block: &Block, budget: usize) -> Option<Exit> {
        let before = self.tick;
        let flow = self.run_ops(block, budget);
        let exit = if flow == Flow::NEXT { None } else { self.finish_stopped(block, flow) };
        let ran = self.tick - before;
        self.count(|profile| profile.interpreted += ran);
        exit
    }

    /// Whether an external interrupt would be taken now.
    #[inline]
    pub(crate) fn interruptible(&self) -> bool {
        self.rflags_rest & flags::IF != 0 && !self.interrupt_shadow
    }

    /// Runs one instruction, the one that the board has just answered.
    pub(crate) fn execute_one(&mut self) -> Option<Exit> {
        if self.careful || self.interrupt_shadow {
            return self.execute_carefully();
        }
        let Ok(block) = self.current_block(self.code_address()) else { return self.take_fault() };
        // SAFETY: as in `execute`.
        let block = unsafe { block.as_ref() };
        let exit = self.interpret(block, 1);
        if self.memory.physical.code_was_written() {
            self.drop_overwritten_code();
        }
        exit
    }

    /// Runs operations of `block`, at most `budget`, until one does not simply retire. Leaves RIP and
    /// the count behind the last that did.
    #[inline(always)]
    fn run_ops(&mut self, block: &Block, budget: usize) -> Flow {
        if self.tracer.is_some() {
            self.run_ops_of::<true>(block, budget)
        } else {
            self.run_ops_of::<false>(block, budget)
        }
    }

    #[inline(always)]
    fn run_ops_of<const TRACED: bool>(&mut self, block: &Block, budget: usize) -> Flow {
        self.registers.gpr[usize::from(BLOCK_RIP)] = self.rip;
        if TRACED {
            self.trace_run(block);
        }
        let ops = &block.ops[..block.ops.len().min(budget)];
        for (number, op) in ops.iter().enumerate() {
            let flow = if TRACED {
                self.run_traced(block, op)
            } else {
                // SAFETY: the handler is a function of this crate or a native sequence, made for this
                // operation by `ops::select`; the block outlives this call.
                unsafe { (op.handler)(self, op) }
            };
            if flow != Flow::NEXT {
                self.stopped_at = number;
                return flow;
            }
        }
        if TRACED {
            self.trace_part(block, ops.len());
        }
        self.tick += ops.len() as u64;
        if ops.len() < block.ops.len() {
            self.rip = block.ops[ops.len()].rip(self);
        } else if !block.ends_in_branch {
            self.rip = block.ops[ops.len() - 1].next_rip(self);
        }
        if !self.answered.is_empty() {
            self.forget_answers();
        }
        Flow::NEXT
    }

    #[cold]
    #[inline(never)]
    fn finish_stopped(&mut self, block: &Block, flow: Flow) -> Option<Exit> {
        let number = self.stopped_at;
        let op = &block.ops[number];
        self.trace_stop(block, number, flow);
        self.tick += number as u64;
        let exit = match flow {
            Flow::FAULT => {
                self.rip = op.rip(self);
                self.take_fault()
            }
            Flow::EXIT => {
                self.rip = op.rip(self);
                self.answered_used = 0;
                return self.pending_exit.take();
            }
            Flow::REPEATS => {
                self.rip = op.rip(self);
                None
            }
            _ => {
                self.tick += 1;
                let branched = block.ends_in_branch && number + 1 == block.ops.len();
                if !branched {
                    self.rip = op.next_rip(self);
                }
                if flow == Flow::RETIRED_EXIT { self.pending_exit.take() } else { None }
            }
        };
        self.forget_answers();
        exit
    }

    /// Runs one instruction with everything around it that the block loop leaves out: the interrupt
    /// shadow, breakpoints, the trap flag, the resume flag.
    #[cold]
    #[inline(never)]
    fn execute_carefully(&mut self) -> Option<Exit> {
        let shadow = std::mem::take(&mut self.interrupt_shadow);
        let trap = self.rflags_rest & flags::TF != 0;
        if self.check_instruction_breakpoint(shadow).is_err() {
            return self.take_fault();
        }
        let resume = self.rflags_rest & flags::RF != 0;
        let Ok(block) = self.current_block(self.code_address()) else { return self.take_fault() };
        // SAFETY: as in `execute`.
        let block = unsafe { block.as_ref() };
        let before = self.tick;
        let flow = self.run_ops(block, 1);
        if flow == Flow::EXIT {
            self.interrupt_shadow = shadow;
        }
        let faulted = flow == Flow::FAULT;
        let exit = if flow == Flow::NEXT { None } else { self.finish_stopped(block, flow) };
        let retired = self.tick != before && !faulted;
        self.count(|profile| profile.interpreted += u64::from(retired));
        if flow == Flow::REPEATS
            && let Err(TripleFault) = self.after_repetition(trap)
        {
            return Some(self.undeliverable());
        }
        if retired {
            if resume {
                self.clear_resume_flag(&block.ops[0]);
            }
            if let Err(TripleFault) = self.after_instruction(trap) {
                return Some(self.undeliverable());
            }
        }
        if self.memory.physical.code_was_written() {
            self.drop_overwritten_code();
        }
        exit
    }

    /// Delivers the pending fault; RIP is the faulting instruction's.
    fn take_fault(&mut self) -> Option<Exit> {
        let fault = self.pending_fault;
        self.forget_answers();
        self.interrupt_shadow = false;
        match self.deliver_exception(fault) {
            Ok(()) => None,
            Err(TripleFault) => Some(self.undeliverable()),
        }
    }

    /// Why an event could not be delivered, where that is not the guest's own triple fault.
    fn undeliverable(&mut self) -> Exit {
        self.pending_exit.take().unwrap_or(Exit::TripleFault)
    }

    /// The instruction that they were for is over.
    pub(crate) fn forget_answers(&mut self) {
        self.trace_answers();
        self.answered.clear();
        self.answered_used = 0;
    }

    /// Drops the blocks whose code was overwritten.
    #[cold]
    pub(crate) fn drop_overwritten_code(&mut self) {
        for (page, chunks) in self.memory.physical.take_code_written() {
            let left = self.blocks.invalidate(page, chunks);
            self.memory.physical.set_code(page, left);
        }
    }
}
