//! Translated blocks: guest code as host code, instruction for instruction.
//!
//! A block that has run often enough is translated for its linear address and mode. Guest registers
//! live in host registers throughout (`registers.rs`), guest flags in the host's flags: everything
//! around an instruction leaves them alone. Memory goes through the software TLB in line
//! (`emission.rs`). Blocks lead into each other through exits (`site.rs`), whose targets are data, so
//! code once emitted never changes. What is rare, slow or system business calls the operation in Rust,
//! as the block loop would (`thunks.rs`).
#![allow(unsafe_code)]

mod assembler;
mod branch;
mod computation;
mod emission;
mod jump_cache;
mod registers;
pub(crate) mod site;
mod stack;
mod thunks;

use std::ptr::NonNull;

use iced_x86::InstructionInfoFactory;

use crate::cpu::{BUDGET, Cpu, LEFT_AT};
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::fault::Flow;
use crate::memory::physical::PAGE_BYTES;
use crate::mode::Mode;
use crate::native::code_buffer::CodeBuffer;
use crate::ops;
use assembler::Assembler;
use emission::{Emission, MAX_EXITS, PlannedExit, Surroundings};
use jump_cache::JumpCache;
use site::{Exit, LEFT_AFTER_BLOCK, LEFT_BY_EXIT, LEFT_WITHOUT_BUDGET, Site};
use thunks::Thunks;

/// Bytes of translated code, at most.
const CODE_BYTES: usize = 64 << 20;
/// Bytes of exits, at most.
const EXIT_BYTES: usize = 16 << 20;
/// No block's code is longer.
const MAX_BLOCK_CODE_BYTES: usize = 32 << 10;
/// A block is translated when it has run so often.
const HOT_RUNS: u32 = 16;
/// Instructions that translated code runs, at most, before it looks whether somebody kicks.
const SLICE: u64 = 200_000;

/// When blocks are translated. It makes no difference to what the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Translation {
    /// Never: each instruction is a call.
    Never,
    /// When a block has run often enough to be worth it.
    #[default]
    WhenHot,
    /// Before a block runs at all: for tests.
    AtOnce,
}

impl Translation {
    /// How often a block runs before it is translated.
    fn threshold(self) -> u32 {
        match self {
            Self::Never => u32::MAX,
            Self::WhenHot => HOT_RUNS,
            Self::AtOnce => 0,
        }
    }
}

/// What translated code was left for.
pub(crate) enum Left {
    /// The block at RIP is next. RIP and the count are set.
    ForNext,
    /// An operation did not simply retire: what the block loop does then.
    Stopped { block: NonNull<Block>, flow: Flow },
}

/// Everything that belongs to translated code.
pub(crate) struct Translator {
    buffer: CodeBuffer,
    thunks: Thunks,
    /// Code bytes of the thunks.
    thunk_bytes: usize,
    info: InstructionInfoFactory,
    used_exits: usize,
    sites: Vec<Box<[Site]>>,
    jumps: Vec<(Mode, JumpCache)>,
    /// Linked exits that leave their page, for the lower and the upper half apart.
    linked: [Vec<NonNull<Exit>>; 2],
    /// The block cache's generations and epoch that links and jump caches belong to.
    generations: [u64; 2],
    epoch: u64,
    /// The exit that translated code was last left by, to be linked if its target has code.
    to_link: Option<NonNull<Exit>>,
    /// Code was last left by a jump to an address not known before.
    jumped: bool,
    /// How often a block runs before it is translated.
    threshold: u32,
}

// SAFETY: the pointers lead into memory that moves with the CPU that owns all of it.
unsafe impl Send for Translator {}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator").field("blocks", &self.sites.len()).finish_non_exhaustive()
    }
}

impl Translator {
    /// `None` on a host without BMI2, whose shifts leave the flags alone.
    ///
    /// # Errors
    /// If the host refuses the memory.
    pub(crate) fn new() -> std::io::Result<Option<Self>> {
        if !std::arch::is_x86_feature_detected!("bmi2") {
            return Ok(None);
        }
        let mut buffer = CodeBuffer::new(CODE_BYTES, EXIT_BYTES)?;
        let thunks = Thunks::new(&mut buffer);
        Ok(Some(Self {
            thunk_bytes: buffer.used_bytes(),
            buffer,
            thunks,
            info: InstructionInfoFactory::new(),
            used_exits: 0,
            sites: Vec::new(),
            jumps: Vec::new(),
            linked: [Vec::new(), Vec::new()],
            generations: [0; 2],
            epoch: 0,
            to_link: None,
            jumped: false,
            threshold: Translation::default().threshold(),
        }))
    }

    /// Chooses when blocks are translated from now on.
    pub(crate) fn set_translation(&mut self, translation: Translation) {
        self.threshold = translation.threshold();
    }

    /// Forgets all code. Whoever keeps pointers to it forgets them too.
    pub(crate) fn clear(&mut self) {
        self.buffer.truncate(self.thunk_bytes);
        self.used_exits = 0;
        self.sites.clear();
        for half in 0..2 {
            self.linked[half].clear();
            self.jumps.iter_mut().for_each(|(_, jumps)| jumps.forget_half(half));
        }
        self.to_link = None;
    }

    fn has_room(&self) -> bool {
        self.buffer.free_bytes() >= MAX_BLOCK_CODE_BYTES
            && (self.used_exits + MAX_EXITS) * size_of::<Exit>() <= EXIT_BYTES
    }

    /// Where the next exits go.
    fn next_exits(&self) -> [*mut Exit; MAX_EXITS] {
        let exits = self.buffer.data().0.cast::<Exit>();
        std::array::from_fn(|number| exits.wrapping_add(self.used_exits + number))
    }

    /// The jump cache of `mode`, by number.
    fn jumps(&mut self, mode: Mode) -> Option<usize> {
        if let Some(found) = self.jumps.iter().position(|(other, _)| *other == mode) {
            return Some(found);
        }
        self.jumps.push((mode, JumpCache::new().ok()?));
        Some(self.jumps.len() - 1)
    }

    /// Forgets the links and jumps to a half of the address space.
    fn forget_half(&mut self, half: usize) {
        for mut exit in self.linked[half].drain(..) {
            // SAFETY: exits live until `clear`, and nobody else holds a reference to one.
            unsafe { exit.as_mut() }.unlink();
        }
        self.jumps.iter_mut().for_each(|(_, jumps)| jumps.forget_half(half));
    }
}

impl Cpu {
    /// The code of `block`, which lies at `linear`, translated now if it has become worth it.
    #[inline]
    pub(crate) fn translation(&mut self, block: &Block, linear: u64) -> Option<*const u8> {
        let code = match block.translation(linear, self.mode) {
            Some(code) => code,
            None => self.translate_if_hot(block, linear)?,
        };
        let translator = self.translator.as_mut()?;
        let generations = self.blocks.generations();
        if translator.generations != generations {
            let before = std::mem::replace(&mut translator.generations, generations);
            for half in [0, 1].into_iter().filter(|&half| before[half] != generations[half]) {
                translator.forget_half(half);
            }
        }
        if translator.epoch != self.blocks.epoch() {
            translator.epoch = self.blocks.epoch();
            translator.to_link = None;
        }
        if block.second_page.is_none() {
            self.link(linear, code);
        }
        Some(code)
    }

    /// Remembers that the way by which translated code was left leads to `code`.
    #[inline]
    fn link(&mut self, linear: u64, code: *const u8) {
        let mode = self.mode;
        let Some(translator) = &mut self.translator else { return };
        if let Some(mut exit) = translator.to_link.take() {
            // SAFETY: exits live until the translator is cleared, which forgets this one.
            let exit_data = unsafe { exit.as_mut() };
            if exit_data.linear == linear && exit_data.mode == mode {
                exit_data.target = code;
                if !exit_data.within_page {
                    translator.linked[(linear >> 63) as usize].push(exit);
                }
            }
        }
        if std::mem::take(&mut translator.jumped)
            && let Some(number) = translator.jumps(mode)
        {
            translator.jumps[number].1.insert(linear, code);
        }
    }

    #[cold]
    #[inline(never)]
    fn translate_if_hot(&mut self, block: &Block, linear: u64) -> Option<*const u8> {
        let runs = block.runs.get().saturating_add(1);
        block.runs.set(runs);
        let translator = self.translator.as_ref()?;
        if runs <= translator.threshold || !self.mode_64() || block.second_page.is_some() {
            return None;
        }
        if !translator.has_room() {
            self.blocks.forget_translations();
            self.translator.as_mut()?.clear();
        }
        let physical = self.memory.fetch_address(linear).ok()?;
        if !self.memory.physical.is_ram(physical) {
            return None;
        }
        let code = self.translate_block(block, linear, physical)?;
        block.set_translation(linear, self.mode, code);
        Some(code)
    }

    fn translate_block(&mut self, block: &Block, linear: u64, physical: u64) -> Option<*const u8> {
        let mode = self.mode;
        let translator = self.translator.as_mut()?;
        let jumps = translator.jumps(mode)?;
        let surroundings = Surroundings {
            thunks: translator.thunks,
            jumps: &translator.jumps[jumps].1,
            read_table: self.memory.table_address(false),
            write_table: self.memory.table_address(true),
        };
        let free_exits = translator.next_exits();
        let sites: Box<[Site]> = block
            .ops
            .iter()
            .map(|op| Site {
                op: NonNull::from(op),
                block: NonNull::from(block),
                block_rip: linear,
                block_length: block.ops.len() as u64,
            })
            .collect();
        let mut emission = Emission::new(
            Assembler::new(translator.buffer.next_address()),
            &mut translator.info,
            &surroundings,
            linear,
            &sites,
            free_exits,
        );
        emit_block(&mut emission, block);
        let (code, exits) = emission.finish();
        assert!(code.len() <= MAX_BLOCK_CODE_BYTES, "a block's code has a bound");
        let entry = translator.buffer.append(&code)?;
        translator.used_exits += exits.len();
        let page = linear & !(PAGE_BYTES - 1);
        for &PlannedExit { linear, exit, stub } in &exits {
            let stub = stub as *const u8;
            let within_page = linear & !(PAGE_BYTES - 1) == page;
            // SAFETY: the place is in the buffer's data, aligned, and nobody's yet.
            unsafe { exit.write(Exit { target: stub, stub, linear, mode, within_page }) };
        }
        translator.sites.push(sites);
        let exits = exits.iter().filter_map(|planned| NonNull::new(planned.exit));
        self.blocks.note_exits(physical, exits);
        Some(entry)
    }

    /// Runs translated code from `code`, the block at RIP's, until it leaves, but not past `until`.
    pub(crate) fn run_translated(&mut self, code: *const u8, until: u64) -> Left {
        let budget = (until - self.tick).min(SLICE);
        self.budget_end = self.tick + budget;
        self.registers.gpr[usize::from(BUDGET)] = budget;
        let translator = self.translator.as_ref().expect("there is code, so there is a translator");
        // SAFETY: the thunk was made to be called so.
        let enter: unsafe extern "sysv64" fn(*mut Cpu, *const u8) -> u32 =
            unsafe { std::mem::transmute(translator.thunks.enter) };
        // SAFETY: `code` was made for the CPU's present mode, of a block in the cache.
        let reason = unsafe { enter(&raw mut *self, code) };
        let left_at = self.registers.gpr[usize::from(LEFT_AT)];
        let translator = self.translator.as_mut().expect("as before");
        match reason {
            LEFT_BY_EXIT => {
                let exit = NonNull::new(left_at as *mut Exit).expect("the exit that it left by");
                // SAFETY: exits live until the translator is cleared.
                self.rip = unsafe { exit.as_ref() }.linear;
                translator.to_link = Some(exit);
                self.tick = self.tick_at_budget();
                Left::ForNext
            }
            LEFT_AFTER_BLOCK => {
                translator.jumped = true;
                Left::ForNext
            }
            LEFT_WITHOUT_BUDGET => {
                // SAFETY: sites live until the translator is cleared.
                let site = unsafe { &*(left_at as *const Site) };
                self.rip = site.block_rip;
                self.tick = self.tick_at_budget().wrapping_sub(site.block_length);
                Left::ForNext
            }
            flow => {
                // SAFETY: as above.
                let site = unsafe { &*(left_at as *const Site) };
                // SAFETY: no block has been dropped while translated code ran.
                self.stopped_at = usize::from(unsafe { site.op.as_ref() }.number);
                Left::Stopped { block: site.block, flow: Flow(flow) }
            }
        }
    }
}

fn emit_block(emission: &mut Emission<'_>, block: &Block) {
    emission.take_budget();
    let last = block.ops.len() - 1;
    for (number, op) in block.ops.iter().enumerate() {
        if number == last && block.ends_in_branch {
            match branch::emit(emission, op) {
                Some(()) => emission.end_last_instruction(number),
                None => emission.run_last_operation(number),
            }
        } else if emit_operation(emission, op).is_some() {
            emission.end_instruction(number);
            if number == last {
                let next = u64::from(op.offset) + u64::from(op.length);
                emission.exit_to(emission.linear.wrapping_add(next));
            }
        } else if number == last {
            emission.run_last_operation(number);
        } else {
            emission.run_operation(number);
        }
    }
}

/// Emits an operation in line; `None`, with nothing emitted, if it must be run in Rust.
fn emit_operation(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    if ops::does_nothing(op) {
        return Some(());
    }
    if op.instruction.inline {
        return computation::emit_lea(emission, op).or_else(|| computation::emit(emission, op));
    }
    stack::emit(emission, op)
}
