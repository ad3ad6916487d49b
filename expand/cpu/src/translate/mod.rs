//! Translated blocks: guest code as host code, instruction for instruction.
//!
//! A block that has run often enough is translated for its linear address and mode. Guest registers
//! live in host registers throughout (`registers.rs`), guest flags in the host's flags: everything
//! around an instruction leaves them alone. Memory goes through the software TLB in line
//! (`emission/`). Blocks lead into each other through exits (`site.rs`), whose targets are data, so
//! code once emitted never changes. What is rare, slow or system business calls the operation in Rust,
//! as the block loop would (`thunks.rs`).
#![allow(unsafe_code)]

mod assembler;
mod bit_string;
mod branch;
mod computation;
mod division;
mod emission;
mod jump_cache;
mod registers;
pub(crate) mod site;
mod stack;
mod string;
mod system;
#[cfg(test)]
mod tests;
mod thunks;

use std::ptr::NonNull;

use iced_x86::{InstructionInfoFactory, Mnemonic};

use crate::cpu::{Cpu, LEFT_AT};
use crate::decode::block_cache::Block;
use crate::decode::op::Op;
use crate::fault::Flow;
use crate::memory::physical::PAGE_BYTES;
use crate::mode::Mode;
use crate::native::code_buffer::{CodeBuffer, Region};
use crate::ops;
use crate::tracing::{self, Ahead};
use branch::Next;
use emission::{Emission, Finished, PlannedExit, Surroundings};
use jump_cache::JumpCache;
use site::{Exit, LEFT_AFTER_BLOCK, LEFT_BY_EXIT, LEFT_WITHOUT_BUDGET, Site};
use thunks::Thunks;

/// Bytes of translated code, at most: what runs often, and what is out of its way.
const HOT_BYTES: usize = 64 << 20;
const COLD_BYTES: usize = 32 << 20;
/// Bytes of exits, at most.
const EXIT_BYTES: usize = 16 << 20;
/// Blocks that are translated as one unit, at most, and their instructions.
const MAX_UNIT_BLOCKS: usize = 8;
const MAX_UNIT_INSTRUCTIONS: usize = 64;
/// A unit's exits, at most: one for each block that may go elsewhere, and one at its end.
const MAX_UNIT_EXITS: usize = MAX_UNIT_BLOCKS + 1;
/// No unit's code is longer.
const MAX_UNIT_CODE_BYTES: usize = 32 << 10;
/// Units whose sites are freed for each one that is translated after all code was forgotten.
const RETIRED_AT_ONCE: usize = 4;
/// Modes in which code is translated: systems use a handful, and each takes a jump cache.
const MAX_MODES: usize = 16;
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
    /// Before a block runs at all, by LOOP, as hosts do whose LOOP is fast: for tests.
    AtOnce,
    /// The same without LOOP, as other hosts do: for tests.
    AtOnceWithoutLoop,
}

impl Translation {
    /// How often a block runs before it is translated.
    fn threshold(self) -> u32 {
        match self {
            Self::Never => u32::MAX,
            Self::WhenHot => HOT_RUNS,
            Self::AtOnce | Self::AtOnceWithoutLoop => 0,
        }
    }

    /// Whether generated code uses LOOP. Either way it runs everywhere.
    fn fast_loop(self) -> bool {
        match self {
            Self::Never | Self::WhenHot => host_is_amd(),
            Self::AtOnce => true,
            Self::AtOnceWithoutLoop => false,
        }
    }
}

/// What translated code was left for.
pub(crate) enum Left {
    /// The block at RIP is next. RIP and the count are set.
    ForNext,
    /// The same, but translated code is longer than what is still to run.
    ForLess,
    /// An operation did not simply retire: what the block loop does then.
    Stopped { block: NonNull<Block>, flow: Flow },
}

/// Everything that belongs to translated code.
pub(crate) struct Translator {
    buffer: CodeBuffer,
    thunks: Thunks,
    /// Where the code behind the thunks begins.
    after_thunks: usize,
    /// Where the cold code begins.
    cold_start: usize,
    /// The host runs LOOP as fast as any other jump.
    fast_loop: bool,
    info: InstructionInfoFactory,
    used_exits: usize,
    sites: Vec<Box<[Site]>>,
    /// Sites of code that is no more.
    retired: Vec<Box<[Site]>>,
    jumps: Vec<(Mode, JumpCache)>,
    /// Linked exits that leave their page, for the lower and the upper half apart.
    linked: [Vec<NonNull<Exit>>; 2],
    /// The block cache's generations and epoch that links and jump caches belong to.
    generations: [u64; 2],
    epoch: u64,
    /// The exit that translated code was last left by, and the instruction count then: it may be linked
    /// to the code of its target as long as nothing else has run.
    to_link: Option<(NonNull<Exit>, u64)>,
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
        Self::with_room(HOT_BYTES, COLD_BYTES, EXIT_BYTES)
    }

    /// The same, for so many bytes of code and exits.
    fn with_room(hot: usize, cold: usize, exits: usize) -> std::io::Result<Option<Self>> {
        if !std::arch::is_x86_feature_detected!("bmi2") {
            return Ok(None);
        }
        let mut buffer = CodeBuffer::new(hot, cold, exits)?;
        let thunks = Thunks::new(&mut buffer);
        Ok(Some(Self {
            after_thunks: buffer.mark(Region::Hot),
            cold_start: buffer.mark(Region::Cold),
            fast_loop: Translation::default().fast_loop(),
            buffer,
            thunks,
            info: InstructionInfoFactory::new(),
            used_exits: 0,
            sites: Vec::new(),
            retired: Vec::new(),
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
        self.fast_loop = translation.fast_loop();
    }

    /// Forgets all code. Whoever keeps pointers to it forgets them too.
    pub(crate) fn clear(&mut self) {
        self.buffer.truncate(Region::Hot, self.after_thunks);
        self.buffer.truncate(Region::Cold, self.cold_start);
        self.used_exits = 0;
        // Freeing them all takes long: that is done as new ones come.
        self.retired.append(&mut self.sites);
        for half in 0..2 {
            self.linked[half].clear();
            self.jumps.iter_mut().for_each(|(_, jumps)| jumps.forget_half(half));
        }
        self.to_link = None;
    }

    fn has_room(&self) -> bool {
        let fits = |region| self.buffer.free_bytes(region) >= MAX_UNIT_CODE_BYTES;
        let exits = (self.used_exits + MAX_UNIT_EXITS) * size_of::<Exit>();
        fits(Region::Hot) && fits(Region::Cold) && exits <= self.buffer.data().1
    }

    /// The jump cache of `mode`, by number.
    fn jumps(&mut self, mode: Mode) -> Option<usize> {
        if let Some(found) = self.jumps.iter().position(|(other, _)| *other == mode) {
            return Some(found);
        }
        if self.jumps.len() == MAX_MODES {
            return None;
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

/// Whether the host's LOOP is fast, as AMD's is and Intel's is not.
fn host_is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
    matches!(&name[..], b"AuthenticAMD" | b"HygonGenuine")
}

impl Cpu {
    /// The code of `block`, which lies at `linear`, translated now if it has become worth it.
    #[inline]
    pub(crate) fn translation(&mut self, block: &Block, linear: u64) -> Option<*const u8> {
        let code = match block.translation(linear, self.mode, self.blocks.code_epoch()) {
            Some(code) => code,
            None => self.translate_if_hot(block, linear)?,
        };
        let translator = self.translator.as_mut()?;
        let generations = self.blocks.generations();
        if translator.generations != generations {
            let before = std::mem::replace(&mut translator.generations, generations);
            translator.to_link = None;
            for half in [0, 1].into_iter().filter(|&half| before[half] != generations[half]) {
                translator.forget_half(half);
                if let Some(profile) = &mut self.profile {
                    profile.links_forgotten[half] += 1;
                }
            }
        }
        if translator.epoch != self.blocks.epoch() {
            translator.epoch = self.blocks.epoch();
            translator.to_link = None;
        }
        if let (None, Some(physical)) = (block.second_page, block.physical) {
            self.link(linear, code, physical & !(PAGE_BYTES - 1));
        }
        Some(code)
    }

    /// Remembers that the way by which translated code was left leads to `code`, whose block lies in
    /// `physical_page`.
    #[inline]
    fn link(&mut self, linear: u64, code: *const u8, physical_page: u64) {
        let mode = self.mode;
        let Some(translator) = &mut self.translator else { return };
        if let Some((mut exit, tick)) = translator.to_link.take() {
            // SAFETY: exits live until the translator is cleared, which forgets this one.
            let exit_data = unsafe { exit.as_mut() };
            if exit_data.linear == linear && exit_data.mode == mode && tick == self.tick {
                exit_data.target = code;
                // Where a page leads within itself holds as long as its code does. (Page tables may have
                // changed since the exit was taken: then this is another page at the same address.)
                if !exit_data.within_page || exit_data.physical_page != physical_page {
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
        let inner = self.mode.has(Mode::INNER);
        if runs <= translator.threshold || !self.mode_64() || inner || block.second_page.is_some() {
            return None;
        }
        // Not where the page tables lead now: who changes them and forgets nothing runs on what is
        // cached, and a unit lies in one page.
        let physical = block.physical?;
        if !translator.has_room() {
            self.blocks.forget_translations();
            self.translator.as_mut()?.clear();
            self.count(|profile| profile.code_dropped += 1);
        }
        let code = self.translate_block(block, linear, physical)?;
        block.set_translation(linear, self.mode, self.blocks.code_epoch(), code);
        self.count(|profile| profile.units_translated += 1);
        Some(code)
    }

    fn translate_block(&mut self, block: &Block, linear: u64, physical: u64) -> Option<*const u8> {
        let mode = self.mode;
        let mut unit = self.unit(block, linear, physical);
        let (traced, traced_physical) = (self.tracer.is_some(), self.traces_physical());
        if traced {
            for part in &mut unit {
                part.trace_id = Some(self.trace_id(part.block(), part.linear));
            }
        }
        let translator = self.translator.as_mut()?;
        let other_mode = mode.with_access(!mode.has(Mode::ACCESS_OVERRIDDEN));
        let jumps = translator.jumps(mode)?;
        let other_jumps = other_mode.and_then(|mode| translator.jumps(mode));
        let surroundings = |mode: Mode, jumps: usize| Surroundings {
            mode,
            thunks: translator.thunks,
            jumps: &translator.jumps[jumps].1,
            read_table: self.memory.table_address(mode, false),
            write_table: self.memory.table_address(mode, true),
            fast_loop: translator.fast_loop,
            traced,
            traced_physical,
            counts_branches: self.counts_branches,
        };
        let other = other_mode.zip(other_jumps).map(|(mode, jumps)| surroundings(mode, jumps));
        let surroundings = surroundings(mode, jumps);
        let sites = sites(&unit, traced);
        let mut emission = Emission::new(
            translator.buffer.next_address(Region::Hot),
            &mut translator.info,
            &surroundings,
            other.as_ref(),
            &sites,
            translator.buffer.data().0.cast::<Exit>().wrapping_add(translator.used_exits),
        );
        let entry = emit_unit(&mut emission, &unit);
        let Finished { hot, cold, exits } =
            emission.finish(translator.buffer.next_address(Region::Cold));
        assert!(hot.len() <= MAX_UNIT_CODE_BYTES && cold.len() <= MAX_UNIT_CODE_BYTES);
        assert!(exits.len() <= MAX_UNIT_EXITS, "a unit has a way out for each block, and one more");
        translator.buffer.append(Region::Hot, &hot)?;
        translator.buffer.append(Region::Cold, &cold)?;
        translator.used_exits += exits.len();
        let page = linear & !(PAGE_BYTES - 1);
        for &PlannedExit { linear, mode, exit, stub } in &exits {
            let stub = stub as *const u8;
            let within_page = linear & !(PAGE_BYTES - 1) == page;
            let physical_page = physical & !(PAGE_BYTES - 1);
            let planned = Exit { target: stub, stub, linear, mode, physical_page, within_page };
            // SAFETY: the place is in the buffer's data, aligned, and nobody's yet.
            unsafe { exit.write(planned) };
        }
        translator.sites.push(sites);
        translator.retired.truncate(translator.retired.len().saturating_sub(RETIRED_AT_ONCE));
        let exits = exits.iter().filter_map(|planned| NonNull::new(planned.exit));
        self.blocks.note_exits(physical, exits);
        Some(entry as *const u8)
    }

    /// The blocks that are translated with `block`: those that run after it within its page, as far as
    /// they have run before.
    fn unit(&self, block: &Block, linear: u64, physical: u64) -> Vec<Part> {
        let mode = self.mode.of_decoding();
        let mut unit = vec![Part { block: NonNull::from(block), linear, trace_id: None }];
        let mut instructions = block.ops.len();
        while unit.len() < MAX_UNIT_BLOCKS {
            let last = &unit[unit.len() - 1];
            let Some(next) = branch::goes_on(last.block(), last.linear) else { break };
            let page = PAGE_BYTES - 1;
            let address = (physical & !page) | (next & page);
            let seen = unit.iter().any(|part| part.linear == next);
            if seen || next & !page != linear & !page {
                break;
            }
            let Some(block) = self.blocks.by_physical(address, mode) else { break };
            let part = Part { block, linear: next, trace_id: None };
            instructions += part.block().ops.len();
            if part.block().second_page.is_some() || instructions > MAX_UNIT_INSTRUCTIONS {
                break;
            }
            unit.push(part);
        }
        unit
    }

    /// Runs translated code from `code`, the block at RIP's, until it leaves, but not past `until`.
    pub(crate) fn run_translated(&mut self, code: *const u8, until: u64) -> Left {
        let slice = if self.tracer.is_some() { tracing::SLICE } else { SLICE };
        self.set_budget(until.min(self.tick + slice));
        self.lend_trace(Ahead::default());
        let translator = self.translator.as_ref().expect("there is code, so there is a translator");
        // SAFETY: the thunk was made to be called so.
        let enter: unsafe extern "sysv64" fn(*mut Cpu, *const u8) -> u32 =
            unsafe { std::mem::transmute(translator.thunks.enter) };
        // SAFETY: `code` was made for the CPU's present mode, of a block in the cache.
        let reason = unsafe { enter(&raw mut *self, code) };
        self.count(|profile| profile.note_leaving(reason));
        let left_at = self.registers.gpr[usize::from(LEFT_AT)];
        let tick = self.tick_at_budget();
        if matches!(reason, LEFT_BY_EXIT | LEFT_WITHOUT_BUDGET) {
            self.take_trace_back(Ahead::default());
        }
        let translator = self.translator.as_mut().expect("as before");
        match reason {
            LEFT_BY_EXIT => {
                let exit = NonNull::new(left_at as *mut Exit).expect("the exit that it left by");
                // SAFETY: exits live until the translator is cleared.
                self.rip = unsafe { exit.as_ref() }.linear;
                translator.to_link = Some((exit, tick));
                self.tick = tick;
                Left::ForNext
            }
            LEFT_AFTER_BLOCK => {
                translator.jumped = true;
                Left::ForNext
            }
            LEFT_WITHOUT_BUDGET => {
                // SAFETY: sites live until the translator is cleared.
                self.rip = unsafe { &*(left_at as *const Site) }.block_rip;
                self.tick = tick;
                if self.budget_end == until { Left::ForLess } else { Left::ForNext }
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

/// A block of a unit, at its linear address.
struct Part {
    block: NonNull<Block>,
    linear: u64,
    /// Its number in the trace, if there is one.
    trace_id: Option<u32>,
}

impl Part {
    fn block(&self) -> &Block {
        // SAFETY: a unit is put together and translated while the CPU is borrowed, and the cache drops
        // no block meanwhile.
        unsafe { self.block.as_ref() }
    }
}

/// The sites of a unit's operations.
fn sites(unit: &[Part], traced: bool) -> Box<[Site]> {
    let mut before_block = 0;
    let mut ahead = Ahead::default();
    let mut behind_sti = false;
    let mut branches = 0;
    let mut sites = Vec::new();
    for part in unit {
        let ops = &part.block().ops;
        ahead.words += 1;
        for op in ops {
            sites.push(Site {
                op: NonNull::from(op),
                block: part.block,
                block_rip: part.linear,
                before_block,
                branches,
                behind_sti,
                traced: ahead,
            });
            behind_sti = false;
            if traced {
                ahead = ahead.past(part.block(), op);
            }
        }
        behind_sti = ops.last().is_some_and(|op| op.instruction.mnemonic() == Mnemonic::Sti);
        before_block += ops.len() as u64;
        branches = sites.last().map_or(0, Site::branches_past);
    }
    sites.into_boxed_slice()
}

/// Emits a unit; where it is entered.
fn emit_unit(emission: &mut Emission<'_>, unit: &[Part]) -> u64 {
    let entry = emission.enter();
    let mut number = 0;
    for (index, part) in unit.iter().enumerate() {
        let block = part.block();
        emission.linear = part.linear;
        if let Some(id) = part.trace_id {
            emission.trace_block(number, id);
        }
        let follower = unit.get(index + 1).map(|part| part.linear);
        let next = emit_block(emission, block, number, follower.is_some());
        number += block.ops.len();
        match next {
            Next::At(linear) if follower == Some(linear) => {}
            Next::At(linear) => emission.exit_to(linear),
            Next::Out => break,
        }
    }
    entry
}

/// Emits a block, whose first operation is the unit's `first`, and behind which the unit goes on or
/// ends; where it goes on.
fn emit_block(emission: &mut Emission<'_>, block: &Block, first: usize, goes_on: bool) -> Next {
    let (last, others) = block.ops.split_last().expect("a block has an instruction");
    for (number, op) in others.iter().enumerate() {
        emission.begin(first + number);
        match emit_operation(emission, op) {
            Some(()) => emission.end(),
            None => emission.run_operation(),
        }
    }
    emission.begin(first + others.len());
    if !block.ends_in_branch && system::emit_ending(emission, last, goes_on).is_some() {
        emission.end_last();
        return Next::At(branch::following(last, emission.linear));
    }
    let next = if block.ends_in_branch {
        branch::emit(emission, last)
    } else {
        emit_operation(emission, last).map(|()| Next::At(branch::following(last, emission.linear)))
    };
    match next {
        Some(Next::Out) => emission.end_last(),
        Some(Next::At(_)) => emission.end(),
        None => emission.run_last_operation(),
    }
    next.unwrap_or(Next::Out)
}

/// Emits an operation in line; `None`, with nothing emitted, if it must be run in Rust.
fn emit_operation(emission: &mut Emission<'_>, op: &Op) -> Option<()> {
    if ops::does_nothing(op) {
        // A prefetch does nothing either, but a trace has its address.
        return if emission.names_address() { None } else { Some(()) };
    }
    if op.instruction.own.is_some() {
        return None;
    }
    if op.instruction.inline {
        return computation::emit_lea(emission, op).or_else(|| computation::emit(emission, op));
    }
    const KINDS: [fn(&mut Emission<'_>, &Op) -> Option<()>; 5] =
        [stack::emit, system::emit, string::emit, division::emit, bit_string::emit];
    KINDS.iter().find_map(|emit| emit(emission, op))
}
