//! The host executing single instructions directly, on a whole set of registers: for tests that
//! compare with it.
#![allow(unsafe_code)]

use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use iced_x86::{Code, Encoder, IcedError, Instruction, MemoryOperand, Register};

use super::host_fpu::Area;
use super::trapping::{install, recover};

/// Where the operands lie.
pub(super) const BUFFER: u64 = 0x2000_0000;
const BUFFER_BYTES: usize = 2 << 20;
/// A page of the buffer that may not be touched.
pub(super) const GUARD: u64 = BUFFER + 0x4_0000;
/// Room for the code around an instruction.
const CODE_BYTES: usize = 4096;
/// What the calling convention asks to keep.
const SAVED: [Register; 6] =
    [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];
/// The general registers, by number.
const GENERAL: std::ops::Range<usize> = 0..16;

/// What the direct execution loads and stores. Its code addresses it relative to RIP.
#[repr(C, align(64))]
#[derive(Clone)]
pub(super) struct Machinery {
    pub(super) fpu: Area,
    host_fpu: Area,
    pub(super) gpr: [u64; 16],
    pub(super) rflags: u64,
    host_rsp: u64,
}

/// The host executing single instructions on a whole set of registers.
pub(super) struct Host {
    /// Code, and after a page of it the [`Machinery`].
    code: *mut u8,
    handlers_before: [libc::sigaction; 2],
    /// The buffer's address is fixed, and signal handlers are the process's.
    _alone: MutexGuard<'static, ()>,
}

static ALONE: Mutex<()> = Mutex::new(());
/// What an instruction under test may raise: an exception, or a touch of the guard page.
const SIGNALS: [libc::c_int; 2] = [libc::SIGFPE, libc::SIGSEGV];

/// The instruction under test raised a signal.
static FAULTED: AtomicBool = AtomicBool::new(false);
/// Where execution goes on after that.
static RESUME: AtomicU64 = AtomicU64::new(0);

/// Goes on behind the instruction that raised a signal.
extern "C" fn skip_faulting_instruction(
    _signal: libc::c_int,
    _information: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes the interrupted context.
    if unsafe { recover(context) } {
        return; // Not from here, but from a sequence under the guest's exception masks.
    }
    FAULTED.store(true, Ordering::Relaxed);
    let resume = RESUME.load(Ordering::Relaxed) as i64;
    // SAFETY: the kernel passes the interrupted context, and takes it back as this leaves it.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        context.uc_mcontext.gregs[libc::REG_RIP as usize] = resume;
    }
}

impl Host {
    pub(super) fn new() -> Self {
        install();
        let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let map = |address: u64, size: usize, flags| {
            // SAFETY: a new anonymous mapping; MAP_FIXED_NOREPLACE leaves others alone.
            let mapped = unsafe {
                libc::mmap(
                    address as *mut libc::c_void,
                    size,
                    libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
                    -1,
                    0,
                )
            };
            assert_ne!(mapped, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            mapped.cast::<u8>()
        };
        let buffer = map(BUFFER, BUFFER_BYTES, libc::MAP_FIXED_NOREPLACE);
        assert_eq!(buffer as u64, BUFFER);
        // SAFETY: the handler touches atomics and its argument; no other test raises these signals.
        let handlers_before = SIGNALS.map(|signal| unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = skip_faulting_instruction as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(signal, &action, &mut before), 0);
            before
        });
        // SAFETY: the page lies in the mapping just made.
        let guarded = unsafe { libc::mprotect(GUARD as *mut libc::c_void, 4096, libc::PROT_NONE) };
        assert_eq!(guarded, 0);
        Self { code: map(0, 2 * CODE_BYTES, 0), handlers_before, _alone: alone }
    }

    pub(super) fn machinery(&mut self) -> &mut Machinery {
        // SAFETY: the second page of the mapping is for it alone; all bit patterns are values.
        unsafe { &mut *self.code.add(CODE_BYTES).cast::<Machinery>() }
    }

    fn slot(&self, offset: usize) -> MemoryOperand {
        let address = self.code as usize + CODE_BYTES + offset;
        MemoryOperand::with_base_displ(Register::RIP, address as i64)
    }

    /// Executes `instruction` between loading and storing everything; whether it raised a signal.
    pub(super) fn execute(&mut self, instruction: &[u8]) -> bool {
        let mut bytes = Vec::new();
        self.encode(&mut bytes, self.load_everything());
        bytes.extend_from_slice(instruction);
        RESUME.store(self.code as u64 + bytes.len() as u64, Ordering::Relaxed);
        self.encode(&mut bytes, self.store_everything());
        assert!(bytes.len() <= CODE_BYTES);
        FAULTED.store(false, Ordering::Relaxed);
        // SAFETY: the code lies in its page, keeps what the calling convention asks for, and touches
        // the machinery and the operand buffer only: the instruction under test computes.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code, bytes.len());
            let call: extern "sysv64" fn() = std::mem::transmute(self.code);
            call();
        }
        FAULTED.load(Ordering::Relaxed)
    }

    fn encode(&self, bytes: &mut Vec<u8>, steps: Vec<Result<Instruction, IcedError>>) {
        for step in steps {
            let mut encoder = Encoder::new(64);
            let address = self.code as u64 + bytes.len() as u64;
            encoder.encode(&step.expect("a valid instruction"), address).expect("can be encoded");
            bytes.extend(encoder.take_buffer());
        }
    }

    fn load_everything(&self) -> Vec<Result<Instruction, IcedError>> {
        let slot = |offset| self.slot(offset);
        let host_rsp = slot(offset_of!(Machinery, host_rsp));
        let mut steps: Vec<_> =
            SAVED.map(|register| Instruction::with1(Code::Push_r64, register)).into();
        steps.extend([
            Instruction::with2(Code::Mov_rm64_r64, host_rsp, Register::RSP),
            Instruction::with1(Code::Fxsave64_m512byte, slot(offset_of!(Machinery, host_fpu))),
            Instruction::with1(Code::Fxrstor64_m512byte, slot(offset_of!(Machinery, fpu))),
            Instruction::with1(Code::Push_rm64, slot(offset_of!(Machinery, rflags))),
            Ok(Instruction::with(Code::Popfq)),
        ]);
        steps.extend(GENERAL.map(|number| {
            let gpr = slot(offset_of!(Machinery, gpr) + number * 8);
            Instruction::with2(Code::Mov_r64_rm64, Register::RAX + number as u32, gpr)
        }));
        steps
    }

    fn store_everything(&self) -> Vec<Result<Instruction, IcedError>> {
        let slot = |offset| self.slot(offset);
        let host_rsp = slot(offset_of!(Machinery, host_rsp));
        let mut steps: Vec<_> = GENERAL
            .map(|number| {
                let gpr = slot(offset_of!(Machinery, gpr) + number * 8);
                Instruction::with2(Code::Mov_rm64_r64, gpr, Register::RAX + number as u32)
            })
            .collect();
        steps.extend([
            Instruction::with2(Code::Mov_r64_rm64, Register::RSP, host_rsp),
            Ok(Instruction::with(Code::Pushfq)),
            Instruction::with1(Code::Pop_rm64, slot(offset_of!(Machinery, rflags))),
            Instruction::with1(Code::Fxsave64_m512byte, slot(offset_of!(Machinery, fpu))),
            Instruction::with1(Code::Fxrstor64_m512byte, slot(offset_of!(Machinery, host_fpu))),
        ]);
        let restored = SAVED.into_iter().rev();
        steps.extend(restored.map(|register| Instruction::with1(Code::Pop_r64, register)));
        steps.push(Ok(Instruction::with(Code::Retnq)));
        steps
    }

    pub(super) fn write(&mut self, address: u64, bytes: &[u8]) {
        // SAFETY: callers pass ranges of the operand buffer.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
    }

    pub(super) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), N) };
        bytes
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: both mappings were made in `new` with these sizes, and nothing refers to them.
        unsafe {
            libc::munmap(BUFFER as *mut libc::c_void, BUFFER_BYTES);
            libc::munmap(self.code.cast(), 2 * CODE_BYTES);
        }
        for (signal, before) in SIGNALS.iter().zip(&self.handlers_before) {
            // SAFETY: this is what `new` found there.
            unsafe { libc::sigaction(*signal, before, std::ptr::null_mut()) };
        }
    }
}
