//! A CPU with a few bytes of code, for unit tests that run single instructions.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, Segment};
use vm_memory::{Bytes, GuestAddress};

use crate::cpu::{
    BLOCK_RIP, CR0_NE, CR0_PE, CR0_PG, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_PAE, Cpu, EFER_LMA, EFER_LME,
};
use crate::decode::block_cache::Block;
use crate::fault::{Fault, Flow};
use crate::native::host_fpu::with_guest_fpu;

/// Where the code lies.
pub(crate) const CODE: u64 = 0x10_0000;
/// Zeroed memory for operands, 2 MiB of it.
pub(crate) const DATA: u64 = 0x20_0000;
/// Past the end of RAM, but mapped.
pub(crate) const DEVICE: u64 = 0x100_0000;

/// A CPU about to run its code at CPL 0, with the whole FPU on and exceptions masked.
pub(crate) struct Machine {
    pub(crate) cpu: Box<Cpu>,
}

impl Machine {
    /// In 32-bit protected mode without paging.
    pub(crate) fn flat_32(code: &[u8]) -> Self {
        let mut state = CpuState { cr0: CR0_PE | CR0_NE, ..CpuState::default() };
        state.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT;
        Self::new(code, state, 0xc09b)
    }

    /// In 64-bit mode, the first GiB mapped to itself but for the page at linear 0.
    pub(crate) fn long_64(code: &[u8]) -> Self {
        let mut state = CpuState { cr0: CR0_PE | CR0_NE | CR0_PG, ..CpuState::default() };
        state.cr3 = 0x1000;
        state.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_PAE;
        state.efer = EFER_LME | EFER_LMA;
        Self::new(code, state, 0xa09b)
    }

    fn new(code: &[u8], mut state: CpuState, code_attributes: u16) -> Self {
        let ram = GuestRam::new(16).expect("16 MiB");
        let write = |address: u64, bytes: &[u8]| {
            ram.memory().write_slice(bytes, GuestAddress(address)).expect("lies in RAM");
        };
        write(CODE, code);
        write(0x1000, &0x2007u64.to_le_bytes());
        write(0x2000, &0x3007u64.to_le_bytes());
        for index in 1..512u64 {
            write(0x3000 + index * 8, &(index << 21 | 0x87).to_le_bytes());
        }
        // The first 2 MiB in small pages, to have one that is absent.
        write(0x3000, &0x4007u64.to_le_bytes());
        for index in 1..512u64 {
            write(0x4000 + index * 8, &(index << 12 | 7).to_le_bytes());
        }
        let data = Segment { selector: 16, attributes: 0xc093, limit: u32::MAX, base: 0 };
        state.segments = [data; 6];
        state.segments[CS] =
            Segment { selector: 8, attributes: code_attributes, limit: u32::MAX, base: 0 };
        state.rip = CODE;
        state.gpr[4] = 0x8000;
        let mut cpu = Cpu::new(ram).expect("memory for generated code");
        cpu.set_state(&state);
        Self { cpu }
    }

    /// The block at RIP.
    pub(crate) fn block(&mut self) -> NonNull<Block> {
        let linear = self.cpu.code_address();
        self.cpu.current_block(linear).expect("code can be fetched")
    }

    /// Bytes of the block at RIP.
    pub(crate) fn block_bytes(&mut self) -> u64 {
        // SAFETY: the block has just been found.
        u64::from(unsafe { self.block().as_ref() }.size_bytes)
    }

    /// Translates the block at RIP; whether that could be done.
    pub(crate) fn translate(&mut self) -> bool {
        let (block, linear) = (self.block(), self.cpu.code_address());
        // SAFETY: as above; translating drops no block.
        self.cpu.translation(unsafe { block.as_ref() }, linear).is_some()
    }

    /// Runs the first instruction of a block over and over: RIP stays.
    pub(crate) fn run(&mut self, block: NonNull<Block>) -> Flow {
        self.cpu.registers.gpr[usize::from(BLOCK_RIP)] = self.cpu.rip;
        // SAFETY: no block is dropped before this function returns, and the handler was made for the
        // operation.
        with_guest_fpu(&mut self.cpu, |cpu| unsafe {
            let op = &block.as_ref().ops[0];
            (op.handler)(cpu, op)
        })
    }

    /// Runs one instruction; the fault if it faults.
    ///
    /// # Panics
    /// If it leaves for the board.
    pub(crate) fn step(&mut self) -> Result<(), Fault> {
        let block = self.block();
        match self.run(block) {
            Flow::FAULT => Err(self.cpu.pending_fault),
            Flow::EXIT => panic!("leaves for the board: {:?}", self.cpu.pending_exit),
            _ => {
                // SAFETY: as in `run`.
                self.cpu.rip = unsafe { block.as_ref() }.ops[0].next_rip(&self.cpu);
                Ok(())
            }
        }
    }

    /// Runs `count` instructions, none of which may fault.
    pub(crate) fn steps(&mut self, count: usize) {
        for number in 0..count {
            assert_eq!(self.step(), Ok(()), "instruction {number}");
        }
    }

    /// Puts other code where execution began.
    pub(crate) fn replace_code(&mut self, code: &[u8]) {
        for (page, bytes) in (CODE..).step_by(0x1000).zip(code.chunks(0x1000)) {
            self.cpu.memory.physical.write(page, bytes);
        }
        self.cpu.drop_overwritten_code();
    }

    /// Writes guest memory before code that uses it runs.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        let ram = self.cpu.memory.physical.ram();
        ram.memory().write_slice(bytes, GuestAddress(address)).expect("lies in RAM");
    }

    /// Reads guest memory.
    pub(crate) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.cpu.memory.physical.ram().read(address, &mut bytes);
        bytes
    }
}
