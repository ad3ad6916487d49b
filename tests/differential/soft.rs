//! The soft engine on the oracle's machine.

use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_kvm::user_oracle::{self, CODE_ADDRESS, RAM_MIB, UserInput, UserOutcome};
use reprise_machine::engine::{Engine, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::CpuState;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGE_BYTES: u64 = 0x1000;
/// RAM of an engine: besides the image, a fresh page of code for each case, since the engine must
/// not be surprised by code that changes behind its back.
const ENGINE_RAM_MIB: u64 = 64;
/// An endless loop is given up after this many instructions.
const MAX_INSTRUCTIONS: u64 = 20_000;
/// Where an entry of a page table has the page's address.
const ENTRY_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Runs cases on the soft engine, one after the other.
pub(crate) struct Soft {
    /// Where each case's machine is laid out first.
    layout: GuestRam,
    engine: SoftEngine,
    /// The engine's RAM, which a test may write between runs.
    memory: GuestMemoryMmap,
    /// The next case's page of code.
    next_code_page: u64,
    translation: Translation,
}

/// The RAM that the oracle's image takes.
const IMAGE_BYTES: u64 = RAM_MIB << 20;
/// RAM between the hole for video memory and the oracle's pages is empty.
const LOW_IMAGE_BYTES: u64 = 0xa000;
/// Where the oracle's pages of code and data lie, found through the page tables; so many of them.
const CASE_PAGES: u64 = 5;

impl Soft {
    pub(crate) fn new(translation: Translation) -> Self {
        let layout = GuestRam::new(RAM_MIB).expect("memory");
        let (engine, memory) = fresh_engine(translation);
        Self { layout, engine, memory, next_code_page: IMAGE_BYTES, translation }
    }

    /// Runs a sequence to its end; the reason if it has none.
    pub(crate) fn run(&mut self, input: &UserInput) -> Result<UserOutcome, String> {
        self.start(input);
        let until = self.engine.tick() + MAX_INSTRUCTIONS;
        let reason = match self.engine.run(until) {
            Ok(Exit::Halt) => {
                return user_oracle::outcome(&mut self.engine).map_err(|error| error.to_string());
            }
            Ok(exit) => format!("{exit:?}"),
            Err(error) => error.to_string(),
        };
        // It may wait for something now that no case gives it.
        self.begin_afresh();
        Err(reason)
    }

    /// The state before each instruction that a sequence executes, the handler's HLT included.
    pub(crate) fn trace(&mut self, input: &UserInput) -> Vec<CpuState> {
        self.start(input);
        let mut states = Vec::new();
        for _ in 0..MAX_INSTRUCTIONS {
            states.push(self.engine.cpu_state().expect("state"));
            let until = self.engine.tick() + 1;
            match self.engine.run(until) {
                Ok(Exit::TickReached) => {}
                _ => break,
            }
        }
        states
    }

    fn start(&mut self, input: &UserInput) {
        if self.next_code_page >= ENGINE_RAM_MIB << 20 {
            self.begin_afresh();
        }
        let state = user_oracle::build_image(&self.layout, input).expect("a case fits its pages");
        if self.next_code_page == IMAGE_BYTES {
            self.copy(0, 0, LOW_IMAGE_BYTES);
        }
        let entry = self.leaf_entry(state.cr3, CODE_ADDRESS);
        let code_page = self.read(entry) & ENTRY_ADDRESS;
        self.copy(code_page, code_page, CASE_PAGES * PAGE_BYTES);
        self.copy(code_page, self.next_code_page, PAGE_BYTES);
        let rights = self.read(entry) & !ENTRY_ADDRESS;
        self.write(entry, &(self.next_code_page | rights).to_le_bytes());
        self.next_code_page += PAGE_BYTES;
        self.engine.set_cpu_state(&state).expect("state");
    }

    fn begin_afresh(&mut self) {
        (self.engine, self.memory) = fresh_engine(self.translation);
        self.next_code_page = IMAGE_BYTES;
    }

    /// Where the page tables of the layout have the entry of a page.
    fn leaf_entry(&self, root: u64, linear: u64) -> u64 {
        let mut table = root;
        for level in (1..4).rev() {
            let index = linear >> (12 + 9 * level) & 0x1ff;
            table = self.read(table + 8 * index) & ENTRY_ADDRESS;
        }
        table + 8 * (linear >> 12 & 0x1ff)
    }

    fn read(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.layout.read(address, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Copies from the layout to the engine's RAM.
    fn copy(&self, from: u64, to: u64, size_bytes: u64) {
        let mut bytes = vec![0; size_bytes as usize];
        self.layout.read(from, &mut bytes);
        self.write(to, &bytes);
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).expect("lies in RAM");
    }
}

fn fresh_engine(translation: Translation) -> (SoftEngine, GuestMemoryMmap) {
    let ram = GuestRam::new(ENGINE_RAM_MIB).expect("memory");
    let memory = ram.memory().clone();
    let mut engine = SoftEngine::new(ram).expect("memory for generated code");
    engine.set_translation(translation);
    (engine, memory)
}
