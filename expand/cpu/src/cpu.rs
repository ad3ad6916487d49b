//! The CPU's state while it executes, and the way in and out of its stored form.

use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Access, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, DS, DescriptorTable, ES, FS, GS, SS, Segment};
pub(crate) use reprise_trace::register_bits::{
    CR0_AM, CR0_EM, CR0_NE, CR0_PE, CR0_PG, CR0_TS, CR0_WP, CR4_DE, CR4_OSFXSR, CR4_OSXMMEXCPT,
    CR4_PAE, CR4_PGE, CR4_PSE, CR4_SMAP, CR4_SMEP, CR4_TSD, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE,
};

use crate::decode::block_cache::BlockCache;
use crate::fault::{Fault, Stop};
use crate::flags::{self, Arithmetic};
use crate::latitude_sites::LatitudeSites;
use crate::memory::Memory;
use crate::mode::Mode;
use crate::native::Native;
use crate::native::host_fpu::FpuImage;
use crate::other_maker::OtherMaker;
use crate::profile::Profile;
use crate::system::debug::DebugState;
use crate::system::deliver::ExceptionRun;
use crate::tracing::Tracer;
use crate::translate::Translator;

/// Index into [`Registers::gpr`] of a register that is always zero: an absent base or index.
pub(crate) const ZERO: u8 = 16;
/// Index into [`Registers::gpr`] of the running block's first RIP: the base of RIP-relative operands.
pub(crate) const BLOCK_RIP: u8 = 17;
/// Indices into [`Registers::gpr`] of what translated code keeps there: the number of instructions
/// that it may still run, all bits inverted, so that the sign says whether there are any; where it left from, and what an indirect call found.
pub(crate) const BUDGET: u8 = 18;
pub(crate) const LEFT_AT: u8 = 19;
pub(crate) const TEMPORARY: u8 = 20;
/// Indices into [`Registers::gpr`] of where translated code appends to a trace: block numbers, linear and
/// host addresses of accesses.
pub(crate) const TRACE_WORDS: u8 = 21;
pub(crate) const TRACE_ADDRESSES: u8 = 22;
pub(crate) const TRACE_PHYSICAL: u8 = 23;
/// RFLAGS.IF if an interrupt is asked for that waits until it is set, and zero otherwise.
pub(crate) const WAITING: u8 = 24;
/// Not zero if the last STI opened an interrupt shadow.
pub(crate) const SHADOWED: u8 = 25;
/// One while translated code has the guest's XMM registers in the host's; [`Registers::xmm`] is stale.
pub(crate) const VECTORS_LOADED: u8 = 26;
/// Conditional branches retired, where they are counted; in translated code, before the running unit.
pub(crate) const BRANCHES: u8 = 27;
/// Index into [`Registers::segment_base`] of a base that is always zero.
pub(crate) const NO_SEGMENT: u8 = 6;

/// Slots of [`Registers::gpr`]: a power of two, so that an index cut to it needs no check.
pub(crate) const GENERAL_SLOTS: usize = 32;

/// What native sequences load from and store to, by offset.
#[derive(Clone, Debug)]
#[repr(C, align(16))]
pub(crate) struct Registers {
    pub(crate) gpr: [u64; GENERAL_SLOTS],
    pub(crate) xmm: [u128; 16],
    pub(crate) arithmetic: Arithmetic,
    /// Bases of ES, CS, SS, DS, FS, GS as the current mode uses them.
    pub(crate) segment_base: [u64; 8],
    /// What linear addresses are cut to: 32 bits outside long mode.
    pub(crate) linear_mask: u64,
}

impl Registers {
    /// The general register in a slot that an operation names.
    #[inline(always)]
    pub(crate) fn general(&self, slot: u8) -> u64 {
        self.gpr[usize::from(slot) % GENERAL_SLOTS]
    }

    /// The same, to be written.
    #[inline(always)]
    pub(crate) fn general_mut(&mut self, slot: u8) -> &mut u64 {
        &mut self.gpr[usize::from(slot) % GENERAL_SLOTS]
    }
}

/// MSRs, control and descriptor registers: what only system instructions touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SystemState {
    pub(crate) segments: [Segment; 6],
    pub(crate) ldtr: Segment,
    pub(crate) tr: Segment,
    pub(crate) gdtr: DescriptorTable,
    pub(crate) idtr: DescriptorTable,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) cr8: u64,
    pub(crate) dr: [u64; 4],
    pub(crate) dr6: u64,
    pub(crate) dr7: u64,
    pub(crate) efer: u64,
    pub(crate) star: u64,
    pub(crate) lstar: u64,
    pub(crate) cstar: u64,
    pub(crate) sfmask: u64,
    pub(crate) kernel_gs_base: u64,
    pub(crate) sysenter_cs: u64,
    pub(crate) sysenter_esp: u64,
    pub(crate) sysenter_eip: u64,
    pub(crate) pat: u64,
    pub(crate) tsc_offset: u64,
    pub(crate) tsc_aux: u64,
}

/// An access that the board answered for the instruction in progress.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AnsweredAccess {
    pub(crate) access: Access,
    pub(crate) value: u128,
}

/// Who answers RDTSC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimeStamps {
    /// The CPU itself, from virtual time.
    #[default]
    Computed,
    /// The machine, as an access: it has the answer in its log.
    Asked,
    /// The machine, and user code's comes to it as it does on hardware that cannot trap it otherwise: as
    /// a #GP whose handler is never run, so that only its frame is left below the handler's stack.
    AskedThroughFault,
}

/// What becomes of INT3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum BreakpointInstructions {
    /// It is the guest's.
    #[default]
    Passed,
    /// It comes back, not retired.
    Caught,
    /// It has come back.
    Stopped,
    /// The next one is the guest's.
    PassedOnce,
}

/// One x86-64 CPU with its RAM. `registers` comes first: generated code finds it at offset zero.
#[repr(C)]
pub struct Cpu {
    pub(crate) registers: Registers,
    /// The next instruction's offset in CS, at a block boundary.
    pub(crate) rip: u64,
    /// RFLAGS without the arithmetic flags.
    pub(crate) rflags_rest: u64,
    pub(crate) mode: Mode,
    /// Current privilege level.
    pub(crate) cpl: u8,
    /// STI, MOV SS or POP SS retired just before.
    pub(crate) interrupt_shadow: bool,
    /// TF, breakpoints or alignment checks: one instruction at a time, with checks around it.
    pub(crate) careful: bool,
    /// Instructions retired before the running block.
    pub(crate) tick: u64,
    /// The operation of the running block that did not simply retire.
    pub(crate) stopped_at: usize,
    pub(crate) time_base: TimeBase,
    pub(crate) memory: Memory,
    pub(crate) system: SystemState,
    /// x87 and SSE control state while it does not live in the host's registers; the XMM registers
    /// are in `registers`.
    pub(crate) fpu: FpuImage,
    pub(crate) pending_fault: Fault,
    pub(crate) pending_exit: Option<Exit>,
    /// Accesses of the instruction in progress that the board has answered already, in order.
    pub(crate) answered: Vec<AnsweredAccess>,
    /// How many of them the present attempt at the instruction has used.
    pub(crate) answered_used: usize,
    pub(crate) blocks: BlockCache,
    pub(crate) native: Native,
    /// None where the host cannot run translated code, or nobody wants it.
    pub(crate) translator: Option<Translator>,
    /// The trace, if anybody wants one.
    pub(crate) tracer: Option<Box<Tracer>>,
    /// Counts how often a trace's block numbers began again.
    pub(crate) trace_generation: u32,
    /// What is counted, if anybody wants to know.
    pub(crate) profile: Option<Box<Profile>>,
    /// The instruction count at which translated code's budget is used up.
    pub(crate) budget_end: u64,
    pub(crate) debug: DebugState,
    pub(crate) exceptions: ExceptionRun,
    /// #DB delivered, INT 1 aside (`counting.rs`).
    pub(crate) debug_exceptions: u64,
    /// Conditional branches are counted (`counting.rs`).
    pub(crate) counts_branches: bool,
    /// CPUID does not tell of the time-stamp counter.
    pub(crate) hides_time_stamp: bool,
    /// A repeated instruction stops after each element, though nothing traps (`counting.rs`).
    pub(crate) stops_between_elements: bool,
    /// Who answers RDTSC.
    pub(crate) time_stamps: TimeStamps,
    /// What becomes of INT3.
    pub(crate) breakpoints: BreakpointInstructions,
    /// Instructions that have run and whose results other CPUs may have otherwise.
    pub(crate) latitude_sites: LatitudeSites,
    /// How flags that are undefined are left.
    pub(crate) other_maker: OtherMaker,
    /// Flags that were undefined where the last trace ended.
    pub(crate) undefined_before: u64,
}

impl Cpu {
    /// Counts something, if anybody wants to know.
    #[inline(always)]
    pub(crate) fn count(&mut self, what: impl FnOnce(&mut Profile)) {
        if let Some(profile) = &mut self.profile {
            what(profile);
        }
    }

    /// A CPU in the state of [`CpuState::default`] that owns `ram`.
    ///
    /// # Errors
    /// If the host refuses the memory for generated code.
    pub fn new(ram: GuestRam) -> std::io::Result<Box<Self>> {
        let mut cpu = Box::new(Self {
            registers: Registers {
                gpr: [0; GENERAL_SLOTS],
                xmm: [0; 16],
                arithmetic: Arithmetic::default(),
                segment_base: [0; 8],
                linear_mask: 0xffff_ffff,
            },
            rip: 0,
            rflags_rest: 2,
            mode: Mode::default(),
            cpl: 0,
            interrupt_shadow: false,
            careful: false,
            tick: 0,
            stopped_at: 0,
            time_base: TimeBase { tick: 0, ns: 0, ns_per_tick: 1 },
            memory: Memory::new(ram)?,
            system: SystemState::from_stored(&CpuState::default()),
            fpu: FpuImage::from_state(&CpuState::default().fpu),
            pending_fault: Fault::UD,
            pending_exit: None,
            answered: Vec::new(),
            answered_used: 0,
            blocks: BlockCache::new(),
            native: Native::new()?,
            translator: Translator::new()?,
            tracer: None,
            trace_generation: 0,
            profile: None,
            budget_end: 0,
            debug: DebugState::default(),
            exceptions: ExceptionRun::NONE,
            debug_exceptions: 0,
            counts_branches: false,
            hides_time_stamp: false,
            stops_between_elements: false,
            time_stamps: TimeStamps::default(),
            breakpoints: BreakpointInstructions::default(),
            latitude_sites: LatitudeSites::default(),
            other_maker: OtherMaker::default(),
            undefined_before: 0,
        });
        cpu.set_state(&CpuState::default());
        Ok(cpu)
    }

    /// All of RFLAGS.
    pub(crate) fn rflags(&self) -> u64 {
        self.rflags_rest | self.registers.arithmetic.to_rflags()
    }

    /// Sets all of RFLAGS; bits that do not exist are dropped.
    pub(crate) fn set_rflags(&mut self, rflags: u64) {
        self.registers.arithmetic = Arithmetic::from_rflags(rflags);
        self.rflags_rest = rflags & flags::KNOWN & !flags::ARITHMETIC | 2;
        self.update_careful();
        self.update_memory_mode();
        self.update_direction();
    }

    /// Raises `fault` from the instruction in progress.
    #[inline]
    pub(crate) fn fault<T>(&mut self, fault: Fault) -> Result<T, Stop> {
        self.pending_fault = fault;
        Err(Stop::Fault)
    }

    /// Whether EFER.LMA is set.
    #[inline]
    pub(crate) fn long_mode(&self) -> bool {
        self.mode.has(Mode::LONG)
    }

    /// Whether CS is a 64-bit segment.
    #[inline]
    pub(crate) fn mode_64(&self) -> bool {
        self.mode.has(Mode::CODE_64)
    }

    /// Recomputes everything that is derived from system state. Called after each change of a
    /// control register, EFER or a segment.
    pub(crate) fn update_mode(&mut self) {
        let system = &self.system;
        let mut mode = 0;
        let long = system.efer & EFER_LMA != 0;
        let code = &system.segments[CS];
        if long {
            mode |= Mode::LONG;
        }
        if long && code.long() {
            mode |= Mode::CODE_64;
        } else if code.default_32() {
            mode |= Mode::CODE_32;
        }
        if mode & Mode::CODE_64 == 0 {
            if system.segments[SS].default_32() {
                mode |= Mode::STACK_32;
            }
            if !segments_are_flat(&system.segments) {
                mode |= Mode::SEGMENTED;
            }
            for index in [ES, DS, FS, GS] {
                mode |= if system.segments[index].present() { 0 } else { Mode::UNUSABLE[index] };
            }
        }
        if system.cr0 & (CR0_EM | CR0_TS) != 0 {
            mode |= Mode::X87_TRAPS;
        }
        if system.cr0 & CR0_TS != 0 {
            mode |= Mode::SSE_TRAPS;
        }
        if system.cr0 & CR0_EM != 0 || system.cr4 & CR4_OSFXSR == 0 {
            mode |= Mode::SSE_UNDEFINED;
        }
        if self.fpu.x87_unmasked() {
            mode |= Mode::X87_UNMASKED;
        }
        if self.fpu.sse_unmasked() {
            mode |= Mode::SSE_UNMASKED;
        }
        mode |= match self.cpl {
            0 => 0,
            3 => Mode::USER,
            _ => Mode::INNER,
        };
        self.mode = Mode(mode);
        self.registers.linear_mask = if long { u64::MAX } else { 0xffff_ffff };
        let flat_base = self.mode.has(Mode::CODE_64);
        for (index, segment) in system.segments.iter().enumerate() {
            let ignored = flat_base && matches!(index, ES | CS | SS | DS);
            self.registers.segment_base[index] = if ignored { 0 } else { segment.base };
        }
        self.update_careful();
        self.update_memory_mode();
        self.update_direction();
    }

    /// Recomputes whether instructions run one at a time with checks.
    pub(crate) fn update_careful(&mut self) {
        let alignment =
            self.cpl == 3 && self.system.cr0 & CR0_AM != 0 && self.rflags_rest & flags::AC != 0;
        let breakpoints = self.system.dr7 & 0xff != 0;
        // RF holds for one instruction, after which it must go.
        let one_step = self.rflags_rest & (flags::TF | flags::RF) != 0;
        self.careful = one_step || breakpoints || alignment;
        self.memory.set_checks(alignment, breakpoints);
    }

    /// Takes over RFLAGS.DF into the mode.
    pub(crate) fn update_direction(&mut self) {
        self.mode.set(Mode::DOWNWARDS, self.rflags_rest & flags::DF != 0);
    }

    /// Tells the memory side which rights apply from now on.
    pub(crate) fn update_memory_mode(&mut self) {
        let (user, overridden) = (self.cpl == 3, self.rflags_rest & flags::AC != 0);
        let smap = !user && self.system.cr4 & CR4_SMAP != 0;
        self.mode.set(Mode::USER_PAGES_FORBIDDEN, smap && !overridden);
        self.mode.set(Mode::ACCESS_OVERRIDDEN, smap && overridden);
        self.memory.set_rights(user, overridden);
    }

    /// The state as stored. Only at an instruction boundary, outside [`Cpu::execute`].
    pub fn state(&self) -> CpuState {
        let system = &self.system;
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.registers.gpr[..16]);
        CpuState {
            gpr,
            rip: self.rip,
            rflags: self.rflags(),
            segments: system.segments,
            ldtr: system.ldtr,
            tr: system.tr,
            gdtr: system.gdtr,
            idtr: system.idtr,
            cr0: system.cr0,
            cr2: system.cr2,
            cr3: system.cr3,
            cr4: system.cr4,
            cr8: system.cr8,
            dr: system.dr,
            dr6: system.dr6,
            dr7: system.dr7,
            efer: system.efer,
            star: system.star,
            lstar: system.lstar,
            cstar: system.cstar,
            sfmask: system.sfmask,
            kernel_gs_base: system.kernel_gs_base,
            sysenter_cs: system.sysenter_cs,
            sysenter_esp: system.sysenter_esp,
            sysenter_eip: system.sysenter_eip,
            pat: system.pat,
            tsc_offset: system.tsc_offset,
            tsc_aux: system.tsc_aux,
            fpu: self.fpu.to_state(&self.registers.xmm),
            interrupt_shadow: self.interrupt_shadow,
            halted: false,
        }
    }

    /// Takes over a stored state; ticks are not touched.
    pub fn set_state(&mut self, state: &CpuState) {
        self.registers.gpr[..16].copy_from_slice(&state.gpr);
        self.registers.gpr[ZERO as usize] = 0;
        self.registers.xmm = state.fpu.xmm;
        self.rip = state.rip;
        self.system = SystemState::from_stored(state);
        self.fpu = FpuImage::from_state(&state.fpu);
        self.interrupt_shadow = state.interrupt_shadow;
        self.debug = DebugState::default();
        self.exceptions = ExceptionRun::NONE;
        self.cpl = state.cpl();
        self.set_rflags(state.rflags);
        self.update_mode();
        self.flush_translations();
    }

    /// Takes over CR3: forgets every cached translation that is not global.
    pub(crate) fn change_address_space(&mut self) {
        let upper_code_moves = self.memory.set_root(self.system.cr3);
        self.blocks.forget_half(0);
        if upper_code_moves {
            self.blocks.forget_half(u64::MAX);
        }
    }

    /// Forgets every cached translation: CR0, CR4 or EFER changed.
    pub(crate) fn flush_translations(&mut self) {
        let system = &self.system;
        self.memory.set_paging(system.cr0, system.cr3, system.cr4, system.efer);
        self.blocks.forget_addresses();
    }
}

impl SystemState {
    fn from_stored(state: &CpuState) -> Self {
        Self {
            segments: state.segments,
            ldtr: state.ldtr,
            tr: state.tr,
            gdtr: state.gdtr,
            idtr: state.idtr,
            cr0: state.cr0,
            cr2: state.cr2,
            cr3: state.cr3,
            cr4: state.cr4,
            cr8: state.cr8,
            dr: state.dr,
            dr6: state.dr6,
            dr7: state.dr7,
            efer: state.efer,
            star: state.star,
            lstar: state.lstar,
            cstar: state.cstar,
            sfmask: state.sfmask,
            kernel_gs_base: state.kernel_gs_base,
            sysenter_cs: state.sysenter_cs,
            sysenter_esp: state.sysenter_esp,
            sysenter_eip: state.sysenter_eip,
            pat: state.pat,
            tsc_offset: state.tsc_offset,
            tsc_aux: state.tsc_aux,
        }
    }
}

/// Whether every segment that data can go through is a writable or readable one over the whole
/// 32-bit space, so that checking limits could find nothing. FS and GS may have any base, and what is
/// null is left to [`Mode::UNUSABLE`].
fn segments_are_flat(segments: &[Segment; 6]) -> bool {
    let whole = |segment: &Segment| segment.present() && segment.limit == u32::MAX;
    let writable = |segment: &Segment| segment.attributes & 0b1110 == 0b0010;
    let any_base = |index: usize| {
        let segment = &segments[index];
        !segment.present() || whole(segment) && writable(segment)
    };
    let flat = |index: usize| segments[index].base == 0 && any_base(index);
    let code = &segments[CS];
    flat(ES)
        && flat(DS)
        && flat(SS)
        && segments[SS].present()
        && any_base(FS)
        && any_base(GS)
        && whole(code)
        && code.base == 0
        && code.attributes & 0b1010 == 0b1010
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu")
            .field("tick", &self.tick)
            .field("rip", &self.rip)
            .finish_non_exhaustive()
    }
}
