//! The real CPU as the judge of the software one: runs a short sequence of user code (CPL3) in a guest
//! and says what came of it.
//!
//! Under KVM a guest's user code executes natively, so registers, flags, memory and faults after it are
//! the hardware's own. [`build_image`] lays out a tiny machine in guest RAM: page tables, descriptor
//! tables and a handler for each vector which is one HLT, and gives the CPU state that starts the
//! sequence. The same RAM and state loaded into any [`Engine`] make it run the same sequence, and
//! [`outcome`] reads what came of it from any engine that has halted.
//!
//! The linear address space of the sequence:
//!
//! | pages | content |
//! | --- | --- |
//! | [`CODE_ADDRESS`], one page | the sequence, then INT3 up to the end; user, not writable |
//! | [`DATA_ADDRESS`], two pages | [`UserInput::data`]; user, writable, not executable |
//! | [`READ_ONLY_ADDRESS`], one page | [`UserInput::read_only`]; user, not writable, not executable |
//! | [`SUPERVISOR_ADDRESS`], one page | zeros; supervisor only |
//!
//! The pages before and behind each of these are not mapped. The machine's own structures lie in the
//! first 2 MiB, which is supervisor memory.
//!
//! RFLAGS.IF is always set and IOPL is zero, as in any user program. Instructions that show the
//! machine below have no place in a sequence, because what they do depends on the kind of KVM: CPUID,
//! RDTSC, SGDT and its like, selectors of CS and SS, loads of segment
//! registers, INT n but for 3 and 4, SYSCALL and SYSENTER, port I/O, and whatever the CPU model lacks.

use std::time::Duration;

use kvm_bindings::{KVM_SYNC_X86_VALID_FIELDS, kvm_sregs, kvm_sync_regs, kvm_vcpu_events};
use reprise_machine::engine::{Engine, EngineError, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, DescriptorTable, FpuState, RSP, SS, Segment};
use vm_memory::{Bytes, GuestAddress};

use crate::error::KvmError;
use crate::state::{read_fpu, read_regs, read_sregs, write_events, write_fpu, write_regs};
use crate::watchdog::Watchdog;
use crate::{KvmClock, KvmEngine};

const PAGE_BYTES: usize = 0x1000;

/// Linear address of the sequence's first byte.
pub const CODE_ADDRESS: u64 = 0x40_0000;
/// The longest sequence, in bytes: at least one INT3 stands behind it.
pub const MAX_CODE_BYTES: usize = PAGE_BYTES - 1;
/// Linear address of the writable data.
pub const DATA_ADDRESS: u64 = 0x41_0000;
/// Size of the writable data.
pub const DATA_BYTES: usize = 2 * PAGE_BYTES;
/// Linear address of the data that may only be read.
pub const READ_ONLY_ADDRESS: u64 = 0x41_4000;
/// Size of the data that may only be read.
pub const READ_ONLY_BYTES: usize = PAGE_BYTES;
/// Linear address of a page that user code may not touch.
pub const SUPERVISOR_ADDRESS: u64 = 0x41_6000;
/// RAM that the image needs, in MiB.
pub const RAM_MIB: u64 = 4;

/// RFLAGS bits that an input may set: status flags, TF, DF, AC, ID.
pub const INPUT_FLAGS: u64 = 0x24_0dd5;
/// RFLAGS bits that are always set: bit 1 and IF.
const FIXED_FLAGS: u64 = 0x202;

// Guest-physical layout.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const PAGE_TABLE: u64 = 0x4000;
const GDT: u64 = 0x5000;
const TSS: u64 = 0x5800;
const IDT: u64 = 0x6000;
const HANDLERS: u64 = 0x7000;
const HANDLER_BYTES: u64 = 16;
const KERNEL_STACK_TOP: u64 = 0xa000;
const CODE_PAGE: u64 = 0x20_0000;
const DATA_PAGES: u64 = 0x20_1000;
const READ_ONLY_PAGE: u64 = 0x20_3000;
const SUPERVISOR_PAGE: u64 = 0x20_4000;

const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const USER_DATA: u16 = 0x18 | 3;
const USER_CODE: u16 = 0x20 | 3;
const TSS_SELECTOR: u16 = 0x28;
const TSS_LIMIT: u32 = 0x67;

/// The vectors that user code may raise by INT3 and INT n.
const USER_GATES: [u8; 2] = [3, 4];

/// Null, kernel code, kernel data, user data, user code, and a TSS of two entries.
const GDT_ENTRIES: [u64; 7] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    (TSS & 0xff_ffff) << 16 | 0x8b << 40 | TSS_LIMIT as u64,
    0,
];

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 0x80;
const NO_EXECUTE: u64 = 1 << 63;

/// What a sequence starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserInput {
    /// General registers, in the order of [`CpuState::gpr`].
    pub gpr: [u64; 16],
    /// Flags; only [`INPUT_FLAGS`] are taken.
    pub rflags: u64,
    /// x87, MMX and SSE.
    pub fpu: FpuState,
    /// The sequence, at most [`MAX_CODE_BYTES`].
    pub code: Vec<u8>,
    /// What stands at [`DATA_ADDRESS`]; at most [`DATA_BYTES`], zeros behind it.
    pub data: Vec<u8>,
    /// What stands at [`READ_ONLY_ADDRESS`]; at most [`READ_ONLY_BYTES`], zeros behind it.
    pub read_only: Vec<u8>,
}

impl Default for UserInput {
    /// Nothing but INT3; RSP in the middle of the data.
    fn default() -> Self {
        let mut gpr = [0; 16];
        gpr[RSP] = DATA_ADDRESS + DATA_BYTES as u64 / 2;
        Self {
            gpr,
            rflags: 0,
            fpu: FpuState::default(),
            code: Vec::new(),
            data: Vec::new(),
            read_only: Vec::new(),
        }
    }
}

/// The exception that ended a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserException {
    /// Its vector; 3 where the sequence ran to its end.
    pub vector: u8,
    /// The error code, for the vectors that have one.
    pub error_code: Option<u32>,
    /// The faulting address, for a page fault.
    pub cr2: Option<u64>,
}

/// What came of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserOutcome {
    /// General registers as the exception found them.
    pub gpr: [u64; 16],
    /// Where the exception would return to: past an INT3, at a faulting instruction.
    pub rip: u64,
    /// Flags as the exception saved them.
    pub rflags: u64,
    /// x87, MMX and SSE. The last instruction's pointers (FOP, FIP, FDP) are what the host saves: AMD
    /// does so only for an exception that is pending.
    pub fpu: FpuState,
    /// What stands at [`DATA_ADDRESS`], all of it.
    pub data: Vec<u8>,
    /// What ended the sequence.
    pub exception: UserException,
}

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// KVM cannot be used.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// KVM refuses something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The sequence did not end by itself.
    #[error("the sequence still ran after {TIME_LIMIT_MS} ms: give one that ends")]
    TimedOut,
    /// The machine stopped for something other than the handlers' HLT.
    #[error("the sequence ended the guest ({0:?}): leave out the instruction that does so")]
    Unexpected(Exit),
    /// Not an input.
    #[error("{0} is longer than its pages: shorten it")]
    TooLong(&'static str),
    /// The engine does not stand in one of the image's handlers.
    #[error("the engine is not halted in a handler of the image: run it until it halts")]
    NotFinished,
}

/// Lays the machine and the input out in `ram` and gives the state that starts the sequence.
///
/// # Errors
/// [`OracleError::TooLong`] if a part of the input does not fit its pages.
///
/// # Panics
/// If `ram` is smaller than [`RAM_MIB`].
pub fn build_image(ram: &GuestRam, input: &UserInput) -> Result<CpuState, OracleError> {
    build_machine(ram);
    fill_pages(ram, input)?;
    Ok(start_state(input))
}

/// What came of the sequence, read from an engine that has halted in a handler.
///
/// # Errors
/// [`OracleError::NotFinished`] if it stands elsewhere; [`OracleError::Engine`] if the engine fails.
pub fn outcome<E: Engine>(engine: &mut E) -> Result<UserOutcome, OracleError> {
    let state = engine.cpu_state()?;
    outcome_in(engine, state)
}

fn outcome_in<E: Engine>(engine: &E, state: CpuState) -> Result<UserOutcome, OracleError> {
    // The handlers' HLT is one byte long.
    let offset = state.rip.wrapping_sub(HANDLERS + 1);
    let vector = u8::try_from(offset / HANDLER_BYTES).map_err(|_| OracleError::NotFinished)?;
    let frame_bytes = KERNEL_STACK_TOP.wrapping_sub(state.gpr[RSP]);
    if !offset.is_multiple_of(HANDLER_BYTES) || !matches!(frame_bytes, 40 | 48) {
        return Err(OracleError::NotFinished);
    }
    let read = |address: u64| {
        let mut bytes = [0; 8];
        engine.read_ram(address, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    let frame = KERNEL_STACK_TOP - 40;
    let error_code = (frame_bytes == 48).then(|| read(frame - 8) as u32);
    let (rip, rflags, rsp) = (read(frame), read(frame + 16), read(frame + 24));
    let mut gpr = state.gpr;
    gpr[RSP] = rsp;
    let mut data = vec![0; DATA_BYTES];
    engine.read_ram(DATA_PAGES, &mut data);
    let cr2 = (vector == 14).then_some(state.cr2);
    let exception = UserException { vector, error_code, cr2 };
    Ok(UserOutcome { gpr, rip, rflags, fpu: state.fpu, data, exception })
}

fn put(ram: &GuestRam, address: u64, bytes: &[u8]) {
    ram.memory().write_slice(bytes, GuestAddress(address)).expect("the image fits 4 MiB");
}

fn put_words(ram: &GuestRam, address: u64, words: &[u64]) {
    for (word, at) in words.iter().zip((address..).step_by(8)) {
        put(ram, at, &word.to_le_bytes());
    }
}

/// Everything that does not depend on the input.
fn build_machine(ram: &GuestRam) {
    put_words(ram, PML4, &[PDPT | PRESENT | WRITABLE | USER]);
    put_words(ram, PDPT, &[PAGE_DIRECTORY | PRESENT | WRITABLE | USER]);
    // The first 2 MiB one to one, then a hole, then the sequence's pages.
    let table = PAGE_TABLE | PRESENT | WRITABLE | USER;
    put_words(ram, PAGE_DIRECTORY, &[PRESENT | WRITABLE | LARGE, 0, table]);
    let second_data_page = DATA_ADDRESS + PAGE_BYTES as u64;
    let second_data_frame = DATA_PAGES + PAGE_BYTES as u64;
    for (linear, physical, rights) in [
        (CODE_ADDRESS, CODE_PAGE, USER),
        (DATA_ADDRESS, DATA_PAGES, USER | WRITABLE | NO_EXECUTE),
        (second_data_page, second_data_frame, USER | WRITABLE | NO_EXECUTE),
        (READ_ONLY_ADDRESS, READ_ONLY_PAGE, USER | NO_EXECUTE),
        (SUPERVISOR_ADDRESS, SUPERVISOR_PAGE, WRITABLE | NO_EXECUTE),
    ] {
        let index = linear >> 12 & 0x1ff;
        put_words(ram, PAGE_TABLE + 8 * index, &[physical | PRESENT | rights]);
    }
    put_words(ram, GDT, &GDT_ENTRIES);
    // RSP0 stands at offset 4.
    put(ram, TSS + 4, &KERNEL_STACK_TOP.to_le_bytes());
    for vector in 0..=255u8 {
        let handler = handler_address(vector);
        const HLT: u8 = 0xf4;
        put(ram, handler, &[HLT]);
        let attributes = if USER_GATES.contains(&vector) { 0xee00 } else { 0x8e00u64 };
        let gate = handler & 0xffff
            | u64::from(KERNEL_CODE) << 16
            | attributes << 32
            | handler >> 16 << 48;
        put_words(ram, IDT + 16 * u64::from(vector), &[gate, 0]);
    }
}

fn fill_pages(ram: &GuestRam, input: &UserInput) -> Result<(), OracleError> {
    const INT3: u8 = 0xcc;
    if input.code.len() > MAX_CODE_BYTES {
        return Err(OracleError::TooLong("the sequence"));
    }
    put_padded(ram, CODE_PAGE, &input.code, PAGE_BYTES, INT3);
    for (name, address, bytes, size) in [
        ("the data", DATA_PAGES, &input.data, DATA_BYTES),
        ("the read-only data", READ_ONLY_PAGE, &input.read_only, READ_ONLY_BYTES),
    ] {
        if bytes.len() > size {
            return Err(OracleError::TooLong(name));
        }
        put_padded(ram, address, bytes, size, 0);
    }
    Ok(())
}

fn put_padded(ram: &GuestRam, address: u64, bytes: &[u8], size: usize, padding: u8) {
    let mut whole = [padding; DATA_BYTES];
    whole[..bytes.len()].copy_from_slice(bytes);
    put(ram, address, &whole[..size]);
}

/// The handler of `vector`.
pub(crate) fn handler_address(vector: u8) -> u64 {
    HANDLERS + HANDLER_BYTES * u64::from(vector)
}

/// Makes a state that starts a sequence start it at CPL0 instead, on the kernel's stack.
pub(crate) fn into_kernel_state(state: &mut CpuState) {
    let user_level = 3 << 5;
    for segment in &mut state.segments {
        segment.selector = KERNEL_DATA;
        segment.attributes &= !user_level;
    }
    state.segments[CS].selector = KERNEL_CODE;
    state.gpr[RSP] = KERNEL_STACK_TOP;
}

fn start_state(input: &UserInput) -> CpuState {
    let flat = |selector, attributes| Segment { selector, attributes, limit: 0xffff_ffff, base: 0 };
    let data = flat(USER_DATA, 0xc0f3);
    let mut state = CpuState {
        gpr: input.gpr,
        rip: CODE_ADDRESS,
        rflags: input.rflags & INPUT_FLAGS | FIXED_FLAGS,
        segments: [data; 6],
        tr: Segment { selector: TSS_SELECTOR, attributes: 0x8b, limit: TSS_LIMIT, base: TSS },
        gdtr: DescriptorTable { base: GDT, limit: 8 * GDT_ENTRIES.len() as u16 - 1 },
        idtr: DescriptorTable { base: IDT, limit: 0xfff },
        // PG, AM, WP, NE, ET, MP, PE.
        cr0: 0x8005_0033,
        cr3: PML4,
        // PAE, OSFXSR, OSXMMEXCPT.
        cr4: 0x620,
        // SCE, LME, LMA, NXE.
        efer: 0xd01,
        fpu: input.fpu.clone(),
        ..CpuState::default()
    };
    state.segments[CS] = flat(USER_CODE, 0xa0fb);
    state.segments[SS] = data;
    state
}

/// After this long a sequence is taken not to end.
const TIME_LIMIT_MS: u64 = 1000;

/// A guest that runs sequences on the real CPU, one after the other.
pub struct UserOracle {
    engine: KvmEngine,
    watchdog: Watchdog,
    /// Segments, descriptor tables and control registers, which every sequence starts from.
    sregs: kvm_sregs,
}

impl UserOracle {
    /// A guest of its own.
    ///
    /// # Errors
    /// Says in one line why KVM cannot be used.
    pub fn new() -> Result<Self, EngineError> {
        let ram =
            GuestRam::new(RAM_MIB).map_err(|error| EngineError { what: error.to_string() })?;
        build_machine(&ram);
        let mut engine = KvmEngine::new(ram, KvmClock::Sync)?;
        engine.set_cpu_state(&start_state(&UserInput::default()))?;
        let sregs = engine
            .vcpu
            .fd
            .get_sregs()
            .map_err(|errno| KvmError::refused("KVM_GET_SREGS", errno))?;
        let watchdog = Watchdog::start(engine.kicker(), Duration::from_millis(TIME_LIMIT_MS));
        Ok(Self { engine, watchdog, sregs })
    }

    /// Runs one sequence. The oracle can be used on after any error but
    /// [`OracleError::Engine`] and [`OracleError::Kvm`].
    ///
    /// # Errors
    /// See [`OracleError`].
    pub fn run(&mut self, input: &UserInput) -> Result<UserOutcome, OracleError> {
        fill_pages(&self.engine.ram, input)?;
        self.start(input)?;
        self.watchdog.begin();
        let exit = loop {
            match self.engine.run(u64::MAX) {
                // A kick that was meant for the run before.
                Ok(Exit::Kicked) if !self.watchdog.expired() => {}
                exit => break exit,
            }
        };
        let timed_out = self.watchdog.expired();
        self.watchdog.end();
        match exit? {
            Exit::Halt => {
                let state = self.end_state()?;
                outcome_in(&self.engine, state)
            }
            Exit::Kicked if timed_out => Err(OracleError::TimedOut),
            exit => {
                // The machine's answer, if one is awaited, does not matter.
                if let Exit::Access(_) = exit {
                    self.engine.finish_access(0)?;
                }
                Err(OracleError::Unexpected(exit))
            }
        }
    }

    /// Sets what a sequence starts from and can change. Every ioctl costs tens of microseconds on some
    /// hosts, so all but x87 and SSE state goes by way of the next KVM_RUN.
    fn start(&mut self, input: &UserInput) -> Result<(), OracleError> {
        let state = start_state(input);
        self.engine.restart()?;
        write_fpu(&self.engine.vcpu.fd, &state.fpu)?;
        let fields = u64::from(KVM_SYNC_X86_VALID_FIELDS);
        let mut events = kvm_vcpu_events::default();
        write_events(&state, &mut events);
        let fd = &mut self.engine.vcpu.fd;
        *fd.sync_regs_mut() = kvm_sync_regs { regs: write_regs(&state), sregs: self.sregs, events };
        let run = fd.get_kvm_run();
        (run.kvm_valid_regs, run.kvm_dirty_regs) = (fields, fields);
        Ok(())
    }

    /// The state that the last KVM_RUN left, as far as an outcome needs it.
    fn end_state(&self) -> Result<CpuState, OracleError> {
        let fd = &self.engine.vcpu.fd;
        let kvm_sync_regs { regs, mut sregs, .. } = fd.sync_regs();
        let mut state = CpuState { fpu: read_fpu(fd)?, ..CpuState::default() };
        read_regs(&regs, &mut state);
        read_sregs(&mut sregs, &mut state);
        Ok(state)
    }
}

#[cfg(test)]
#[path = "user_oracle_tests.rs"]
mod tests;
