//! The guest's x87, MMX and MXCSR state in the host's own registers while the guest runs.
//!
//! Rust code uses no x87 instruction, so the guest's x87 registers can stay in the host's x87 unit
//! for as long as the guest runs; guest XMM registers, which Rust code does use, lie in the CPU's
//! registers. Whatever the guest asks for, the host's control words mask every exception: which ones
//! the guest has unmasked is known to [`FpuImage`], and `ops` checks for those. The FPU's instruction
//! and operand pointers are the guest's too and never come from the host.
#![allow(unsafe_code)]

use std::arch::asm;

use reprise_trace::cpu_state::FpuState;

use crate::cpu::Cpu;

/// The exception flags of the x87 status word and MXCSR, and the masks of the x87 control word.
pub(crate) const EXCEPTIONS: u16 = 0x3f;
/// Status word: an exception flag or the stack-fault flag is set.
const STICKY: u16 = 0x7f;
/// Status word: ES and B, which follow from the flags and the masks.
const SUMMARY: u16 = 0x8080;
/// Control word: bits that can be written (masks, precision, rounding, infinity control).
const CONTROL_WRITABLE: u16 = 0x1f3f;
/// Control word: the reserved bit that is always set.
const CONTROL_FIXED: u16 = 0x40;
/// The control word after FNINIT.
pub(crate) const CONTROL_INITIAL: u16 = 0x37f;
/// The MXCSR bits that the CPU model has (DAZ among them), as FXSAVE reports them.
pub(crate) const MXCSR_MASK: u32 = 0xffff;
/// MXCSR: the exception masks.
const MXCSR_MASKS: u32 = 0x1f80;
/// MXCSR: underflow is masked.
const MXCSR_UNDERFLOW_MASK: u32 = 1 << 11;
/// MXCSR: flush results to zero, which only a masked underflow does.
const MXCSR_FLUSH: u32 = 1 << 15;

/// FXSAVE's memory layout: where its fields lie, in bytes.
pub(crate) mod fxsave {
    /// All of it.
    pub(crate) const BYTES: usize = 512;
    /// Control word.
    pub(crate) const FCW: usize = 0;
    /// Status word.
    pub(crate) const FSW: usize = 2;
    /// Abridged tags, one byte.
    pub(crate) const FTW: usize = 4;
    /// Last opcode.
    pub(crate) const FOP: usize = 6;
    /// Last instruction.
    pub(crate) const FIP: usize = 8;
    /// Last operand.
    pub(crate) const FDP: usize = 16;
    /// MXCSR and, after it, its writable bits.
    pub(crate) const MXCSR: usize = 24;
    /// ST(0) to ST(7), 16 bytes apart.
    pub(crate) const ST: usize = 32;
    /// XMM0 and on.
    pub(crate) const XMM: usize = 160;
}

/// FXSAVE's memory area.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(crate) struct Area(pub(crate) [u8; fxsave::BYTES]);

impl Area {
    pub(crate) const fn zeroed() -> Self {
        Self([0; fxsave::BYTES])
    }

    pub(crate) fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    pub(crate) fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    pub(crate) fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }

    pub(crate) fn bytes<const N: usize>(&self, offset: usize) -> [u8; N] {
        std::array::from_fn(|index| self.0[offset + index])
    }

    /// MMX register `number`: it is the significand of the x87 register of that number, whatever TOP.
    pub(crate) fn mmx(&self, number: u8) -> u64 {
        let top = self.u16(fxsave::FSW) >> 11 & 7;
        let from_top = usize::from((u16::from(number) + 8 - top) & 7);
        self.u64(fxsave::ST + from_top * 16)
    }

    pub(crate) fn set(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// The x87 state with MXCSR, and the guest's own control words and pointers.
#[derive(Clone, Debug)]
pub(crate) struct FpuImage {
    /// As the host loads and saves it; stale while the guest runs.
    area: Area,
    /// The guest's control word.
    fcw: u16,
    /// The guest's MXCSR; its exception flags are stale while the guest runs.
    mxcsr: u32,
    /// Opcode of the last x87 instruction that raised an unmasked exception, 11 bits. (CPUs since
    /// the Pentium 4 track it for no other.)
    pub(crate) fop: u16,
    /// The last x87 instruction that is not a control instruction: its offset in CS.
    pub(crate) fip: u64,
    /// The last x87 memory operand: its offset in its segment.
    pub(crate) fdp: u64,
}

impl FpuImage {
    /// Where the guest's control word lies, for generated code.
    pub(crate) const CONTROL_OFFSET: usize = std::mem::offset_of!(Self, fcw);

    pub(crate) fn from_state(state: &FpuState) -> Self {
        let mut image = Self {
            area: Area::zeroed(),
            fcw: control_word(state.fcw),
            mxcsr: state.mxcsr & MXCSR_MASK,
            fop: state.fop & 0x7ff,
            fip: state.fip,
            fdp: state.fdp,
        };
        image.area.set(fxsave::FCW, &host_control(image.fcw).to_le_bytes());
        image.area.set(fxsave::FSW, &(state.fsw & !SUMMARY).to_le_bytes());
        image.area.0[fxsave::FTW] = state.ftw;
        image.area.set(fxsave::MXCSR, &host_mxcsr(image.mxcsr).to_le_bytes());
        for (index, register) in state.st.iter().enumerate() {
            image.area.set(fxsave::ST + index * 16, register);
        }
        image
    }

    /// The state as stored. Only while the guest does not run.
    pub(crate) fn to_state(&self, xmm: &[u128; 16]) -> FpuState {
        FpuState {
            fcw: self.fcw,
            fsw: self.with_summary(self.area.u16(fxsave::FSW)),
            ftw: self.area.0[fxsave::FTW],
            fop: self.fop,
            fip: self.fip,
            fdp: self.fdp,
            st: std::array::from_fn(|index| self.area.bytes(fxsave::ST + index * 16)),
            mxcsr: self.mxcsr,
            xmm: *xmm,
        }
    }

    /// Whether an x87 exception is unmasked.
    pub(crate) fn x87_unmasked(&self) -> bool {
        self.fcw & EXCEPTIONS != EXCEPTIONS
    }

    /// Whether an SSE exception is unmasked.
    pub(crate) fn sse_unmasked(&self) -> bool {
        self.mxcsr & MXCSR_MASKS != MXCSR_MASKS
    }

    /// The guest's control word.
    pub(crate) fn control(&self) -> u16 {
        self.fcw
    }

    /// A status word with ES and B as the guest's masks make them.
    pub(crate) fn with_summary(&self, fsw: u16) -> u16 {
        let pending = fsw & !self.fcw & EXCEPTIONS != 0;
        fsw & !SUMMARY | if pending { SUMMARY } else { 0 }
    }
}

/// What follows is only right while the guest runs: its state is the host's.
impl FpuImage {
    /// The guest's status word.
    pub(crate) fn live_status(&self) -> u16 {
        self.with_summary(host::status())
    }

    /// Whether an unmasked x87 exception waits to be raised.
    pub(crate) fn live_pending(&self) -> bool {
        host::status() & !self.fcw & EXCEPTIONS != 0
    }

    /// FLDCW.
    pub(crate) fn set_live_control(&mut self, fcw: u16) {
        self.fcw = control_word(fcw);
        host::set_control(host_control(self.fcw));
    }

    /// FNINIT.
    pub(crate) fn live_init(&mut self) {
        self.fcw = CONTROL_INITIAL;
        self.fop = 0;
        self.fip = 0;
        self.fdp = 0;
        host::init();
    }

    /// The guest's MXCSR.
    pub(crate) fn live_mxcsr(&self) -> u32 {
        let flags = u32::from(EXCEPTIONS);
        self.mxcsr & !flags | host::mxcsr() & flags
    }

    /// LDMXCSR of a value without reserved bits.
    pub(crate) fn set_live_mxcsr(&mut self, mxcsr: u32) {
        self.mxcsr = mxcsr & MXCSR_MASK;
        host::set_mxcsr(host_mxcsr(self.mxcsr));
    }

    /// The x87 part of an FXSAVE image as the guest sees it, pointers and MXCSR included; the XMM
    /// part is undefined.
    pub(crate) fn live_area(&self) -> Area {
        let mut area = Area::zeroed();
        host::fxsave(&mut area);
        let fsw = self.with_summary(area.u16(fxsave::FSW));
        area.set(fxsave::FCW, &self.fcw.to_le_bytes());
        area.set(fxsave::FSW, &fsw.to_le_bytes());
        area.set(fxsave::FOP, &self.fop.to_le_bytes());
        area.set(fxsave::FIP, &self.fip.to_le_bytes());
        area.set(fxsave::FDP, &self.fdp.to_le_bytes());
        area.set(fxsave::MXCSR, &self.live_mxcsr().to_le_bytes());
        area.set(fxsave::MXCSR + 4, &MXCSR_MASK.to_le_bytes());
        area
    }

    /// The state as stored, with these XMM registers.
    pub(crate) fn live_state(&self, xmm: &[u128; 16]) -> FpuState {
        let area = self.live_area();
        FpuState {
            fcw: area.u16(fxsave::FCW),
            fsw: area.u16(fxsave::FSW),
            ftw: area.0[fxsave::FTW],
            fop: area.u16(fxsave::FOP),
            fip: area.u64(fxsave::FIP),
            fdp: area.u64(fxsave::FDP),
            st: std::array::from_fn(|index| area.bytes(fxsave::ST + index * 16)),
            mxcsr: area.u32(fxsave::MXCSR),
            xmm: *xmm,
        }
    }

    /// Takes over the x87 part of an FXSAVE image that the guest made, MXCSR included.
    pub(crate) fn set_live_area(&mut self, mut area: Area) {
        self.fcw = control_word(area.u16(fxsave::FCW));
        self.mxcsr = area.u32(fxsave::MXCSR) & MXCSR_MASK;
        self.fop = area.u16(fxsave::FOP) & 0x7ff;
        self.fip = area.u64(fxsave::FIP);
        self.fdp = area.u64(fxsave::FDP);
        let fsw = area.u16(fxsave::FSW) & !SUMMARY;
        area.set(fxsave::FCW, &host_control(self.fcw).to_le_bytes());
        area.set(fxsave::FSW, &fsw.to_le_bytes());
        area.set(fxsave::FOP, &[0; fxsave::MXCSR - fxsave::FOP]);
        area.set(fxsave::MXCSR, &host_mxcsr(self.mxcsr).to_le_bytes());
        host::fxrstor(&area);
    }

    /// The x87 environment as the guest sees it, in FNSTENV's 32-bit format.
    pub(crate) fn live_environment(&self) -> [u8; 28] {
        let mut environment = host::environment();
        self.show_to_guest(&mut environment);
        environment
    }

    /// Puts the guest's control and status words and pointers into the environment that the host
    /// gave; its tags are right.
    fn show_to_guest(&self, environment: &mut [u8]) {
        let fsw = self.with_summary(u16::from_le_bytes([environment[4], environment[5]]));
        let mut set = |offset: usize, value: u32| {
            environment[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        };
        // Reserved halves read as ones; the selectors as zeros, as CPUs that deprecate them do.
        const RESERVED: u32 = 0xffff_0000;
        set(0, RESERVED | u32::from(self.fcw));
        set(4, RESERVED | u32::from(fsw));
        set(12, self.fip as u32);
        set(16, u32::from(self.fop) << 16);
        set(20, self.fdp as u32);
        set(24, RESERVED);
    }

    /// Takes over an environment in FLDENV's 32-bit format.
    pub(crate) fn set_live_environment(&mut self, mut environment: [u8; 28]) {
        self.take_from_guest(&mut environment);
        host::set_environment(&environment);
    }

    fn take_from_guest(&mut self, environment: &mut [u8]) {
        let word =
            |offset: usize| u16::from_le_bytes([environment[offset], environment[offset + 1]]);
        let long = |offset: usize| u64::from(word(offset)) | u64::from(word(offset + 2)) << 16;
        let (fcw, fsw) = (word(0), word(4));
        self.fcw = control_word(fcw);
        self.fip = long(12);
        self.fop = word(18) & 0x7ff;
        self.fdp = long(20);
        environment[0..2].copy_from_slice(&host_control(self.fcw).to_le_bytes());
        environment[4..6].copy_from_slice(&(fsw & !SUMMARY).to_le_bytes());
        environment[12..28].fill(0);
    }

    /// Environment and registers as the guest sees them, in FNSAVE's 32-bit format.
    pub(crate) fn live_save(&self) -> [u8; 108] {
        let mut all = host::save();
        self.show_to_guest(&mut all[..28]);
        all
    }

    /// Takes over environment and registers in FRSTOR's 32-bit format.
    pub(crate) fn set_live_save(&mut self, mut all: [u8; 108]) {
        self.take_from_guest(&mut all[..28]);
        host::restore(&all);
    }

    /// Hands the host the guest's own masks with no exception pending, so that the next x87
    /// instruction does just what the guest's masks ask for; the exception flags before. The next
    /// x87 call must be [`FpuImage::take_back_masks`].
    pub(crate) fn lend_masks(&self) -> u16 {
        let mut environment = host::environment();
        let fsw = u16::from_le_bytes([environment[4], environment[5]]);
        environment[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        environment[4..6].copy_from_slice(&(fsw & !(SUMMARY | STICKY)).to_le_bytes());
        host::set_environment(&environment);
        fsw & STICKY
    }

    /// Masks every exception again and puts back the flags of before; the flags raised meanwhile.
    pub(crate) fn take_back_masks(&self, before: u16) -> u16 {
        let mut environment = host::environment();
        let fsw = u16::from_le_bytes([environment[4], environment[5]]);
        let merged = fsw & !SUMMARY | before;
        environment[0..2].copy_from_slice(&host_control(self.fcw).to_le_bytes());
        environment[4..6].copy_from_slice(&merged.to_le_bytes());
        host::set_environment(&environment);
        fsw & STICKY
    }
}

/// A control word as the register holds it.
fn control_word(fcw: u16) -> u16 {
    fcw & CONTROL_WRITABLE | CONTROL_FIXED
}

/// The control word that the host runs with for the guest's.
fn host_control(fcw: u16) -> u16 {
    fcw | EXCEPTIONS
}

/// The MXCSR that the host runs with for the guest's. Unmasked underflow takes precedence over
/// flushing to zero, and the host is not to see it unmasked.
fn host_mxcsr(mxcsr: u32) -> u32 {
    let flush = if mxcsr & MXCSR_UNDERFLOW_MASK == 0 { MXCSR_FLUSH } else { 0 };
    (mxcsr | MXCSR_MASKS) & !flush
}

/// Runs `body` with the guest's x87 state and MXCSR in the host's registers. Should `body` panic, the
/// host has its own back, and the guest's are lost.
pub(crate) fn with_guest_fpu<T>(cpu: &mut Cpu, body: impl FnOnce(&mut Cpu) -> T) -> T {
    let host = HostControl::new();
    host::fxrstor(&cpu.fpu.area);
    let result = body(cpu);
    let image = &mut cpu.fpu;
    host::fxsave(&mut image.area);
    let flags = u32::from(EXCEPTIONS);
    image.mxcsr = image.mxcsr & !flags | image.area.u32(fxsave::MXCSR) & flags;
    drop(host);
    result
}

/// What the calling convention makes the host keep of its FPU: control words, and the x87 stack
/// empty. Dropping it gives them back.
struct HostControl {
    fcw: u16,
    mxcsr: u32,
}

impl HostControl {
    fn new() -> Self {
        Self { fcw: host::control(), mxcsr: host::mxcsr() }
    }
}

impl Drop for HostControl {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Masks may be lent, and an exception of the guest's pending.
            host::init();
        }
        host::empty_stack();
        host::set_control(self.fcw);
        host::set_mxcsr(self.mxcsr);
    }
}

/// The host's instructions. The compiler assumes that nobody changes the x87 stack or MXCSR under
/// its code; that code neither uses the x87 unit nor, between [`HostControl::new`] and its drop,
/// floating-point arithmetic, so no code of its can tell.
pub(crate) mod host {
    use super::{Area, asm};

    /// FNSTSW.
    #[inline(always)]
    pub(crate) fn status() -> u16 {
        let status: u16;
        // SAFETY: reads a register.
        unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
        status
    }

    /// FNSTCW.
    #[inline(always)]
    pub(crate) fn control() -> u16 {
        let mut control = 0u16;
        // SAFETY: stores two bytes where they belong.
        unsafe {
            asm!("fnstcw [{}]", in(reg) &raw mut control, options(nostack, preserves_flags));
        }
        control
    }

    /// FLDCW.
    #[inline(always)]
    pub(crate) fn set_control(control: u16) {
        // SAFETY: every exception is masked or none is pending, so this cannot fault; see the module.
        unsafe {
            asm!("fldcw [{}]", in(reg) &raw const control, options(readonly, nostack, preserves_flags));
        }
    }

    /// FNINIT.
    #[inline(always)]
    pub(crate) fn init() {
        // SAFETY: see the module.
        unsafe { asm!("fninit", options(nomem, nostack, preserves_flags)) };
    }

    /// EMMS, a fraction of FNINIT's time: what else the registers hold means nothing to the host.
    #[inline(always)]
    pub(crate) fn empty_stack() {
        // SAFETY: no unmasked exception is pending; see the module.
        unsafe { asm!("emms", options(nomem, nostack, preserves_flags)) };
    }

    /// FNCLEX.
    #[inline(always)]
    pub(crate) fn clear_exceptions() {
        // SAFETY: see the module.
        unsafe { asm!("fnclex", options(nomem, nostack, preserves_flags)) };
    }

    /// STMXCSR.
    #[inline(always)]
    pub(crate) fn mxcsr() -> u32 {
        let mut mxcsr = 0u32;
        // SAFETY: stores four bytes where they belong.
        unsafe {
            asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack, preserves_flags));
        }
        mxcsr
    }

    /// LDMXCSR.
    #[inline(always)]
    pub(crate) fn set_mxcsr(mxcsr: u32) {
        // SAFETY: the callers pass no reserved bit, so this cannot fault; see the module.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr, options(readonly, nostack, preserves_flags));
        }
    }

    /// FXSAVE64.
    #[inline(always)]
    pub(crate) fn fxsave(area: &mut Area) {
        // SAFETY: the area is aligned and has the size that the instruction writes.
        unsafe { asm!("fxsave64 [{}]", in(reg) area, options(nostack, preserves_flags)) };
    }

    /// FXRSTOR64.
    #[inline(always)]
    pub(crate) fn fxrstor(area: &Area) {
        // SAFETY: the area is aligned, its MXCSR has no reserved bit, and the XMM registers that this
        // overwrites are declared; see the module for the rest.
        unsafe {
            asm!(
                "fxrstor64 [{}]", in(reg) area,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(readonly, nostack, preserves_flags)
            );
        }
    }

    /// What every MMX instruction does to the x87 unit: TOP is 0, and no register is empty.
    #[inline(always)]
    pub(crate) fn enter_mmx() {
        // SAFETY: reads a register; see the module.
        unsafe { asm!("movd {:e}, mm0", out(reg) _, options(nomem, nostack, preserves_flags)) };
    }

    /// FNSTENV, which masks every exception.
    pub(crate) fn environment() -> [u8; 28] {
        let mut environment = [0; 28];
        // SAFETY: in 64-bit mode this stores 28 bytes.
        unsafe {
            asm!("fnstenv [{}]", in(reg) &raw mut environment, options(nostack, preserves_flags));
        }
        environment
    }

    /// FLDENV.
    pub(crate) fn set_environment(environment: &[u8; 28]) {
        // SAFETY: in 64-bit mode this loads 28 bytes; callers leave no unmasked exception pending.
        unsafe {
            asm!("fldenv [{}]", in(reg) environment, options(readonly, nostack, preserves_flags));
        }
    }

    /// FNSAVE and FRSTOR of the same, so that nothing changes.
    pub(crate) fn save() -> [u8; 108] {
        let mut all = [0; 108];
        // SAFETY: in 64-bit mode these store and load 108 bytes; every exception is masked.
        unsafe {
            asm!("fnsave [{0}]", "frstor [{0}]", in(reg) &raw mut all,
                options(nostack, preserves_flags));
        }
        all
    }

    /// FRSTOR.
    pub(crate) fn restore(all: &[u8; 108]) {
        // SAFETY: in 64-bit mode this loads 108 bytes; callers leave no unmasked exception pending.
        unsafe { asm!("frstor [{}]", in(reg) all, options(readonly, nostack, preserves_flags)) };
    }
}
