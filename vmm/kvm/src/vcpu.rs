//! One virtual machine with one vCPU, and what KVM_RUN says in plain values.

use std::fmt;

use kvm_bindings::*;
use kvm_ioctls::{Kvm, VcpuFd};
use reprise_branch_clock::vcpu::MAX_BREAKPOINTS;
use reprise_machine::ram::GuestRam;
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use crate::error::KvmError;
use crate::memory::Memory;
use crate::model_specific;
use crate::time_stamp::{needs_host_refusal, refuse_to_this_thread};

/// Where KVM is reached.
pub(crate) const DEVICE: &str = "/dev/kvm";

/// #DB, the vector of a debug exit for single-step.
const DEBUG_EXCEPTION: u32 = 1;

/// The stable KVM interface, since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// The capabilities that are used: number, name, and whether the engine cannot do without.
pub(crate) const CAPABILITIES: [(u32, &str, bool); 11] = [
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", true),
    (KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID", true),
    (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS", true),
    (KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS", true),
    (KVM_CAP_XSAVE, "KVM_CAP_XSAVE", true),
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", true),
    (KVM_CAP_SYNC_REGS, "KVM_CAP_SYNC_REGS", true),
    (KVM_CAP_SET_GUEST_DEBUG2, "KVM_CAP_SET_GUEST_DEBUG2", false),
    (KVM_CAP_READONLY_MEM, "KVM_CAP_READONLY_MEM", false),
    (KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR", false),
    (KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER", false),
];

// kvm-ioctls has no wrapper for it: it queues an external interrupt where there is no in-kernel
// interrupt controller.
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

/// Why KVM_RUN came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RawExit {
    /// Port I/O: `count` elements of `size` bytes, in the data area of `kvm_run`.
    Port { port: u16, size: u8, count: u32, is_write: bool },
    /// A load or store outside RAM.
    Mmio { address: u64, size: u8, is_write: bool },
    /// HLT, RIP past it.
    Halt,
    /// Triple fault.
    Shutdown,
    /// RDMSR or WRMSR of one that KVM does not let pass; answered before anybody sees this.
    ModelSpecific { index: u32, is_write: bool },
    /// A debug event that userspace asked for: the exception's vector, and what DR6 says of #DB.
    Debug { vector: u32, dr6: u64 },
    /// The guest takes interrupts here, which was asked for.
    InterruptWindow,
    /// RDTSC at a place where it is trapped: the engine makes this of [`RawExit::Debug`].
    TimeStamp,
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// KVM's instruction emulator gave up.
    InternalError { suberror: u32 },
    /// The hardware refused the guest state.
    FailEntry { reason: u64 },
    /// The guest touched memory that the host cannot give.
    MemoryFault,
    /// Anything else: the KVM_EXIT number.
    Other { reason: u32 },
}

impl RawExit {
    /// Whether KVM's emulator does not know the instruction (KVM_INTERNAL_ERROR_EMULATION).
    pub(crate) fn is_refusal(self) -> bool {
        matches!(self, Self::InternalError { suberror: 1 })
    }
}

impl fmt::Display for RawExit {
    /// What it means, for the messages about exits that nobody asked for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => write!(f, "the guest took a triple fault"),
            exit if exit.is_refusal() => {
                write!(f, "KVM cannot emulate the instruction")
            }
            Self::InternalError { suberror } => {
                write!(f, "KVM gave up (internal error {suberror})")
            }
            Self::FailEntry { reason } => {
                write!(f, "the host's CPU refuses the guest's state (reason {reason:#x})")
            }
            Self::MemoryFault => write!(f, "KVM cannot reach the memory used"),
            exit => write!(f, "KVM came back with something unexpected ({exit:?})"),
        }
    }
}

/// Opens KVM and checks that it is what the engine needs.
pub(crate) fn open(path: &str) -> Result<Kvm, KvmError> {
    let unusable = |reason: String| KvmError::Unusable { path: path.into(), reason };
    let c_path = std::ffi::CString::new(path).map_err(|error| unusable(error.to_string()))?;
    let kvm = Kvm::new_with_path(&c_path).map_err(|errno| match errno.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Missing { path: path.into() },
        libc::EACCES | libc::EPERM => KvmError::Permission { path: path.into() },
        _ => unusable(errno.to_string()),
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        // Not a KVM device at all.
        version if version < 0 => Err(unusable("it is not KVM".into())),
        version => Err(KvmError::ApiVersion(version)),
    }
}

/// Fails with the first needed capability that is absent.
pub(crate) fn check_capabilities(kvm: &Kvm) -> Result<(), KvmError> {
    let absent = |&&(cap, _, needed): &&(u32, &str, bool)| {
        needed && kvm.check_extension_raw(u64::from(cap)) <= 0
    };
    match CAPABILITIES.iter().find(absent) {
        Some((_, name, _)) => Err(KvmError::Lacks(name)),
        None => Ok(()),
    }
}

/// A virtual machine with one vCPU. Fields drop in order: the vCPU before its machine.
pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    pub(crate) memory: Memory,
    /// Capabilities of KVM_SET_GUEST_DEBUG, as KVM_CAP_SET_GUEST_DEBUG2 gives them.
    guest_debug: u32,
    /// Every KVM_RUN steps.
    stepping: bool,
    /// This thread is refused RDTSC while the guest runs.
    refuses_time_stamps: bool,
}

impl Vcpu {
    /// A machine whose memory is `ram`.
    ///
    /// # Safety
    /// `ram` must outlive the vCPU.
    pub(crate) unsafe fn new(ram: &GuestRam, cpuid: &CpuId) -> Result<Self, KvmError> {
        let kvm = open(DEVICE)?;
        check_capabilities(&kvm)?;
        let vm = kvm.create_vm().map_err(|errno| KvmError::refused("KVM_CREATE_VM", errno))?;
        if needs_tss_page() {
            // Old Intel CPUs run real mode as VM86 and need three pages of guest-physical space.
            vm.set_tss_address(0xfffb_d000)
                .map_err(|errno| KvmError::refused("KVM_SET_TSS_ADDR", errno))?;
        }
        // SAFETY: the caller promises what this asks for.
        let memory = unsafe { Memory::map(vm, ram)? };
        let vm = memory.vm();
        model_specific::restrict(vm)?;
        let fd = vm.create_vcpu(0).map_err(|errno| KvmError::refused("KVM_CREATE_VCPU", errno))?;
        fd.set_cpuid2(cpuid).map_err(|errno| KvmError::refused("KVM_SET_CPUID2", errno))?;
        // Without the newer capability, only what has always been there.
        let guest_debug = vm.check_extension_raw(u64::from(KVM_CAP_SET_GUEST_DEBUG2)) as u32;
        Ok(Self {
            fd,
            memory,
            guest_debug,
            stepping: false,
            refuses_time_stamps: needs_host_refusal(),
        })
    }

    /// The guest's RDTSC is never executed, so that nobody need refuse it.
    pub(crate) fn allow_time_stamps(&mut self) {
        self.refuses_time_stamps = false;
    }

    /// Runs the guest until it exits.
    pub(crate) fn run(&mut self) -> Result<RawExit, KvmError> {
        loop {
            let exit = self.enter()?;
            let RawExit::ModelSpecific { index, is_write } = exit else { return Ok(exit) };
            let answer = model_specific::answer(index, is_write);
            self.answer_model_specific(answer);
            if self.stepping && answer.is_some() {
                // A plain KVM_RUN could step the next instruction as well.
                return Ok(match self.complete()? {
                    RawExit::Interrupted => RawExit::Debug { vector: DEBUG_EXCEPTION, dr6: 0 },
                    exit => exit,
                });
            }
        }
    }

    /// KVM_RUN, once.
    fn enter(&mut self) -> Result<RawExit, KvmError> {
        if self.refuses_time_stamps {
            refuse_to_this_thread(true);
        }
        let result = self.fd.run();
        if self.refuses_time_stamps {
            refuse_to_this_thread(false);
        }
        match result {
            Ok(kvm_ioctls::VcpuExit::MemoryFault { .. }) => return Ok(RawExit::MemoryFault),
            Ok(_) => {}
            Err(errno) => {
                return match errno.errno() {
                    libc::EINTR => Ok(RawExit::Interrupted),
                    libc::EFAULT => Ok(RawExit::MemoryFault),
                    _ => Err(KvmError::refused("KVM_RUN", errno)),
                };
            }
        }
        Ok(read_exit(self.fd.get_kvm_run()))
    }

    /// Completes an instruction whose exit is answered, and runs nothing else. Comes back with
    /// [`RawExit::Interrupted`], or with what else the same instruction wants.
    pub(crate) fn complete(&mut self) -> Result<RawExit, KvmError> {
        self.fd.set_kvm_immediate_exit(1);
        let exit = self.enter();
        self.fd.set_kvm_immediate_exit(0);
        exit
    }

    /// What the RDMSR gives or the WRMSR does that KVM_RUN came back with; `None` makes it fault.
    fn answer_model_specific(&mut self, answer: Option<u64>) {
        // SAFETY: called only after a KVM_EXIT_X86_RDMSR or _WRMSR, so the kernel filled this member
        // of the union.
        let msr = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.msr };
        msr.error = u8::from(answer.is_none());
        msr.data = answer.unwrap_or(0);
    }

    /// Queues an external interrupt, which the next KVM_RUN delivers before anything else.
    pub(crate) fn interrupt(&mut self, vector: u8) -> Result<(), KvmError> {
        let interrupt = kvm_interrupt { irq: u32::from(vector) };
        // SAFETY: the fd is a vCPU, and the kernel only reads the structure.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) };
        if result == 0 {
            return Ok(());
        }
        Err(KvmError::refused(format!("KVM_INTERRUPT {vector:#x}"), Errno::last()))
    }

    /// Asks for [`RawExit::InterruptWindow`], or no longer.
    pub(crate) fn request_interrupt_window(&mut self, wanted: bool) {
        self.fd.get_kvm_run().request_interrupt_window = u8::from(wanted);
    }

    /// The address of `immediate_exit`, valid while `self` lives.
    pub(crate) fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut self.fd.get_kvm_run().immediate_exit
    }

    /// Element `index` of the port exit that KVM_RUN came back with.
    pub(crate) fn port_data(&mut self, size: u8, index: u32) -> &mut [u8] {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: called only after a KVM_EXIT_IO, so the kernel filled this member of the union.
        let io = unsafe { (*run).__bindgen_anon_1.io };
        assert!(index < io.count && size == io.size, "the element belongs to the exit");
        let offset = io.data_offset as usize + usize::from(size) * index as usize;
        // SAFETY: the kernel says where in the mapping of `kvm_run` the elements lie, the element is
        // one of them, and the borrow of self keeps the mapping and excludes other users.
        unsafe { std::slice::from_raw_parts_mut(run.cast::<u8>().add(offset), usize::from(size)) }
    }

    /// The data of the MMIO exit that KVM_RUN came back with.
    pub(crate) fn mmio_data(&mut self) -> &mut [u8; 8] {
        // SAFETY: called only after a KVM_EXIT_MMIO, so the kernel filled this member of the union.
        unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio.data }
    }

    /// Makes every KVM_RUN step one instruction, and leave registers in `kvm_run`.
    pub(crate) fn single_step(&mut self) -> Result<(), KvmError> {
        self.set_debug(KVM_GUESTDBG_SINGLESTEP | self.guest_debug & KVM_GUESTDBG_BLOCKIRQ, [0; 8])?;
        self.fd.get_kvm_run().kvm_valid_regs = u64::from(KVM_SYNC_X86_VALID_FIELDS);
        Ok(())
    }

    /// Asks for debug exits, besides KVM_GUESTDBG_ENABLE as in `control`, with these debug registers.
    pub(crate) fn set_debug(&mut self, control: u32, debugreg: [u64; 8]) -> Result<(), KvmError> {
        self.stepping = control & KVM_GUESTDBG_SINGLESTEP != 0;
        let control = KVM_GUESTDBG_ENABLE | control;
        let arch = kvm_guest_debug_arch { debugreg };
        self.fd
            .set_guest_debug(&kvm_guest_debug { control, pad: 0, arch })
            .map_err(|errno| KvmError::refused("KVM_SET_GUEST_DEBUG", errno))
    }
}

/// Debug registers, as KVM_SET_GUEST_DEBUG takes them, with breakpoints at these addresses, four at most.
pub(crate) fn breakpoint_registers(addresses: &[u64]) -> [u64; 8] {
    /// DR7: the bit that always reads one.
    const DR7_FIXED: u64 = 0x400;
    let mut registers = [0; 8];
    let mut enabled = 0;
    for (number, address) in addresses.iter().take(MAX_BREAKPOINTS).enumerate() {
        registers[number] = *address;
        // L and G of this breakpoint; type and length zero stand for execution.
        enabled |= 3 << (2 * number);
    }
    registers[7] = DR7_FIXED | enabled;
    registers
}

fn read_exit(run: &kvm_run) -> RawExit {
    let detail = &run.__bindgen_anon_1;
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the exit reason says that the kernel filled this member of the union.
            let io = unsafe { detail.io };
            RawExit::Port {
                port: io.port,
                size: io.size,
                count: io.count,
                is_write: u32::from(io.direction) == KVM_EXIT_IO_OUT,
            }
        }
        KVM_EXIT_MMIO => {
            // SAFETY: as above.
            let mmio = unsafe { detail.mmio };
            RawExit::Mmio {
                address: mmio.phys_addr,
                size: mmio.len.min(8) as u8,
                is_write: mmio.is_write != 0,
            }
        }
        KVM_EXIT_HLT => RawExit::Halt,
        KVM_EXIT_SHUTDOWN => RawExit::Shutdown,
        KVM_EXIT_DEBUG => {
            // SAFETY: as above.
            let debug = unsafe { detail.debug };
            RawExit::Debug { vector: debug.arch.exception, dr6: debug.arch.dr6 }
        }
        KVM_EXIT_INTR => RawExit::Interrupted,
        KVM_EXIT_IRQ_WINDOW_OPEN => RawExit::InterruptWindow,
        reason @ (KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR) => {
            // SAFETY: as above.
            let msr = unsafe { detail.msr };
            RawExit::ModelSpecific { index: msr.index, is_write: reason == KVM_EXIT_X86_WRMSR }
        }
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: as above.
            let internal = unsafe { detail.internal };
            RawExit::InternalError { suberror: internal.suberror }
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let fail = unsafe { detail.fail_entry };
            RawExit::FailEntry { reason: fail.hardware_entry_failure_reason }
        }
        reason => RawExit::Other { reason },
    }
}

/// Intel CPUs without "unrestricted guest" cannot run real mode directly.
fn needs_tss_page() -> bool {
    std::fs::read_to_string("/sys/module/kvm_intel/parameters/unrestricted_guest")
        .is_ok_and(|value| value.trim() == "N")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kvm_is_told_apart_in_one_line() {
        let reason = |path: &str| open(path).map(|_| ()).unwrap_err().to_string();
        assert!(reason("/dev/absent-kvm").contains("does not exist"));
        assert!(reason("/dev/null").contains("cannot be used"));
        assert!(reason("/dev").contains("cannot be used"));
        for error in [
            KvmError::Permission { path: DEVICE.into() },
            KvmError::ApiVersion(11),
            KvmError::Lacks("KVM_CAP_XSAVE"),
            KvmError::CannotStep("no".into()),
            KvmError::refused("KVM_RUN", Errno::new(libc::EIO)),
        ] {
            let message = error.to_string();
            assert!(message.contains("--engine soft") && !message.contains('\n'), "{message}");
        }
    }
}
