//! The block loop: runs pre-decoded operations and keeps the instruction count exact.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

use reprise_machine::engine::Exit;

use crate::cpu::{BLOCK_RIP, Cpu};
use crate::decode::block_cache::Block;
use crate::fault::{Flow, Stop};
use crate::flags;

/// The guest took an exception while it was being delivered a double fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TripleFault;

impl Cpu {
    /// Runs until `until` instructions have retired since the machine started, or an earlier exit.
    pub(crate) fn execute(
        &mut self,
        until: u64,
        kick: &AtomicBool,
        interrupt_requested: bool,
    ) -> Exit {
        loop {
            if kick.load(Ordering::Relaxed) {
                kick.store(false, Ordering::Release);
                return Exit::Kicked;
            }
            if self.tick == until {
                return Exit::TickReached;
            }
            if interrupt_requested && self.interruptible() {
                return Exit::InterruptWindow;
            }
            if let Some(exit) = self.execute_block(until - self.tick) {
                return exit;
            }
        }
    }

    /// Whether an external interrupt would be taken now.
    #[inline]
    pub(crate) fn interruptible(&self) -> bool {
        self.rflags_rest & flags::IF != 0 && !self.interrupt_shadow
    }

    /// Runs at most `budget` instructions of the block at RIP.
    #[inline]
    pub(crate) fn execute_block(&mut self, budget: u64) -> Option<Exit> {
        if self.careful || self.interrupt_shadow {
            return self.execute_carefully();
        }
        match self.current_block() {
            Ok(block) => {
                // SAFETY: a block lives until the cache drops it, which happens only in
                // `drop_overwritten_code` and in `find_block`; running operations calls neither.
                let block = unsafe { block.as_ref() };
                let (number, flow) = self.run_ops(block, budget as usize);
                let exit = self.finish_ops(block, number, flow);
                if self.memory.physical.code_was_written() {
                    self.drop_overwritten_code();
                }
                exit
            }
            Err(_) => self.take_fault(),
        }
    }

    /// Runs operations of `block` until one does not simply retire; how many did, and the flow of
    /// the one that did not.
    #[inline(always)]
    fn run_ops(&mut self, block: &Block, budget: usize) -> (usize, Flow) {
        self.registers.gpr[usize::from(BLOCK_RIP)] = self.rip;
        let ops = &block.ops[..block.ops.len().min(budget)];
        for (number, op) in ops.iter().enumerate() {
            // SAFETY: the handler is a function of this crate or a native sequence, made for this
            // operation by `ops::select`; the block is kept alive by `block`.
            let flow = unsafe { (op.handler)(self, op) };
            if flow != Flow::NEXT {
                return (number, flow);
            }
        }
        (ops.len(), Flow::NEXT)
    }

    #[inline(always)]
    fn finish_ops(&mut self, block: &Block, number: usize, flow: Flow) -> Option<Exit> {
        if flow == Flow::NEXT {
            self.tick += number as u64;
            if number < block.ops.len() {
                self.rip = block.ops[number].rip(self);
            } else if !block.ends_in_branch {
                self.rip = block.ops[number - 1].next_rip(self);
            }
            if !self.answered.is_empty() {
                self.forget_answers();
            }
            return None;
        }
        self.finish_stopped(block, number, flow)
    }

    #[cold]
    #[inline(never)]
    fn finish_stopped(&mut self, block: &Block, number: usize, flow: Flow) -> Option<Exit> {
        let op = &block.ops[number];
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
        let block = match self.current_block() {
            // SAFETY: as in `execute_block`.
            Ok(block) => unsafe { block.as_ref() },
            Err(Stop::Fault | Stop::Exit | Stop::EndBlock | Stop::RetiredExit) => {
                return self.take_fault();
            }
        };
        let before = self.tick;
        let (number, flow) = self.run_ops(block, 1);
        if flow == Flow::EXIT {
            self.interrupt_shadow = shadow;
        }
        let faulted = flow == Flow::FAULT;
        let exit = self.finish_ops(block, number, flow);
        let retired = self.tick != before && !faulted;
        if retired {
            if resume {
                self.clear_resume_flag(&block.ops[0]);
            }
            if let Err(TripleFault) = self.after_instruction(trap) {
                return Some(Exit::TripleFault);
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
            Err(TripleFault) => Some(Exit::TripleFault),
        }
    }

    fn forget_answers(&mut self) {
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
