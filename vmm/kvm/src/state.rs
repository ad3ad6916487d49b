//! [`CpuState`] to KVM's structures and back.
//!
//! KVM hands out what the hardware holds, which leaves room: a null segment keeps stale attributes,
//! an accessed bit is always set in a loaded descriptor's cache. Reading makes one of all such
//! variants, so that equal machines give equal digests under every engine:
//!
//! - a segment that is unusable or not present has attributes and limit zero, and base zero too,
//!   except FS and GS, whose base counts in 64-bit mode even if the selector is null;
//! - a usable code or data segment is accessed, a usable TSS busy;
//! - CR0.ET is set; RFLAGS bit 1 is set.
//!
//! The other way round, a null TR, which hardware cannot hold while it runs a guest, becomes an empty
//! TSS segment that no guest could load (selector zero, limit zero), and reads back as null.

use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use reprise_trace::cpu_state::{
    CS, CpuState, DS, DescriptorTable, ES, FS, FpuState, GS, SS, Segment,
};
use vmm_sys_util::errno::Error as Errno;

use crate::error::KvmError;
use reprise_trace::register_bits::RFLAGS_IF;

/// Attribute bits of [`Segment::attributes`].
const TYPE_MASK: u16 = 0xf;
const TYPE_ACCESSED: u16 = 1;
const TYPE_BUSY: u16 = 2;
const CODE_OR_DATA: u16 = 1 << 4;
const PRESENT: u16 = 1 << 7;

/// A present, busy 32/64-bit TSS.
const BUSY_TSS: u16 = PRESENT | 0xb;

/// Reads or writes one field of [`CpuState`] that KVM keeps in an MSR.
type MsrField = fn(&mut CpuState) -> &mut u64;

/// The MSRs that are part of a CPU's state. Numbers: AMD64 APM volume 2, appendix A.
const MSRS: [(u32, MsrField); 9] = [
    (0xc000_0081, |state| &mut state.star),
    (0xc000_0082, |state| &mut state.lstar),
    (0xc000_0083, |state| &mut state.cstar),
    (0xc000_0084, |state| &mut state.sfmask),
    (0xc000_0102, |state| &mut state.kernel_gs_base),
    (0x174, |state| &mut state.sysenter_cs),
    (0x175, |state| &mut state.sysenter_esp),
    (0x176, |state| &mut state.sysenter_eip),
    (0x277, |state| &mut state.pat),
];

/// Which member of `kvm_sregs` each of [`CpuState::segments`] is.
fn segment_members(sregs: &mut kvm_sregs) -> [(usize, &mut kvm_segment); 6] {
    [
        (ES, &mut sregs.es),
        (CS, &mut sregs.cs),
        (SS, &mut sregs.ss),
        (DS, &mut sregs.ds),
        (FS, &mut sregs.fs),
        (GS, &mut sregs.gs),
    ]
}

/// Reads the whole state. What KVM does not hold is left at its default: [`CpuState::halted`],
/// [`CpuState::tsc_offset`] and, because the CPU model has no RDTSCP, [`CpuState::tsc_aux`].
pub(crate) fn read(fd: &VcpuFd) -> Result<CpuState, KvmError> {
    let mut state = CpuState::default();
    let regs = fd.get_regs().map_err(|errno| KvmError::refused("KVM_GET_REGS", errno))?;
    read_regs(&regs, &mut state);
    let mut sregs = fd.get_sregs().map_err(|errno| KvmError::refused("KVM_GET_SREGS", errno))?;
    read_sregs(&mut sregs, &mut state);
    read_msrs(fd, &mut state)?;
    let debug =
        fd.get_debug_regs().map_err(|errno| KvmError::refused("KVM_GET_DEBUGREGS", errno))?;
    (state.dr, state.dr6, state.dr7) = (debug.db, debug.dr6, debug.dr7);
    state.fpu = read_fpu(fd)?;
    state.interrupt_shadow = read_events(fd)?.interrupt.shadow != 0;
    Ok(state)
}

/// Writes the whole state, and drops whatever event KVM was about to deliver.
pub(crate) fn write(fd: &VcpuFd, state: &CpuState) -> Result<(), KvmError> {
    let mut sregs = fd.get_sregs().map_err(|errno| KvmError::refused("KVM_GET_SREGS", errno))?;
    write_sregs(state, &mut sregs);
    fd.set_sregs(&sregs).map_err(|errno| {
        KvmError::refused("KVM_SET_SREGS, segments or control registers", errno)
    })?;
    fd.set_regs(&write_regs(state)).map_err(|errno| KvmError::refused("KVM_SET_REGS", errno))?;
    write_msrs(fd, state)?;
    let debug =
        kvm_debugregs { db: state.dr, dr6: state.dr6, dr7: state.dr7, ..Default::default() };
    fd.set_debug_regs(&debug).map_err(|errno| KvmError::refused("KVM_SET_DEBUGREGS", errno))?;
    write_fpu(fd, &state.fpu)?;
    let mut events = read_events(fd)?;
    write_events(state, &mut events);
    fd.set_vcpu_events(&events).map_err(|errno| KvmError::refused("KVM_SET_VCPU_EVENTS", errno))
}

/// Leads from the state that KVM holds to another, writing what differs, and drops whatever event KVM was
/// about to deliver. Each call into KVM that is spared makes an assist some tenth faster.
pub(crate) fn write_changes(
    fd: &VcpuFd,
    before: &CpuState,
    after: &CpuState,
) -> Result<(), KvmError> {
    let system = |state: &CpuState| {
        let tables = (state.ldtr, state.tr, state.gdtr, state.idtr);
        let control = [state.cr0, state.cr2, state.cr3, state.cr4, state.cr8, state.efer];
        (state.segments, tables, control)
    };
    let debug = |state: &CpuState| (state.dr, state.dr6, state.dr7);
    let specific = |state: &CpuState| MSRS.map(|(_, field)| *field(&mut state.clone()));
    if system(before) != system(after)
        || debug(before) != debug(after)
        || specific(before) != specific(after)
    {
        return write(fd, after);
    }
    fd.set_regs(&write_regs(after)).map_err(|errno| KvmError::refused("KVM_SET_REGS", errno))?;
    if before.fpu != after.fpu {
        write_fpu(fd, &after.fpu)?;
    }
    let mut events = kvm_vcpu_events::default();
    write_events(after, &mut events);
    fd.set_vcpu_events(&events).map_err(|errno| KvmError::refused("KVM_SET_VCPU_EVENTS", errno))
}

/// General registers, RIP and RFLAGS.
pub(crate) fn read_regs(regs: &kvm_regs, state: &mut CpuState) {
    state.gpr = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    state.rip = regs.rip;
    state.rflags = regs.rflags | 2;
}

/// General registers, RIP and RFLAGS.
pub(crate) fn write_regs(state: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    #[rustfmt::skip]
    let regs = kvm_regs {
        rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
        rip: state.rip,
        rflags: state.rflags | 2,
    };
    regs
}

/// Segments, descriptor tables and control registers.
pub(crate) fn read_sregs(sregs: &mut kvm_sregs, state: &mut CpuState) {
    for (index, member) in segment_members(sregs) {
        let mut segment = read_segment(member);
        if segment.attributes == 0 && (index == FS || index == GS) {
            segment.base = member.base;
        }
        state.segments[index] = segment;
    }
    state.ldtr = read_segment(&sregs.ldt);
    state.tr = match read_segment(&sregs.tr) {
        Segment { selector: 0, limit: 0, .. } => Segment::default(),
        tr => Segment { attributes: tr.attributes | TYPE_BUSY, ..tr },
    };
    state.gdtr = DescriptorTable { base: sregs.gdt.base, limit: sregs.gdt.limit };
    state.idtr = DescriptorTable { base: sregs.idt.base, limit: sregs.idt.limit };
    state.cr0 = sregs.cr0 | 0x10;
    state.cr2 = sregs.cr2;
    state.cr3 = sregs.cr3;
    state.cr4 = sregs.cr4;
    state.cr8 = sregs.cr8;
    state.efer = sregs.efer;
}

/// Segments, descriptor tables and control registers; what else `sregs` holds stays.
pub(crate) fn write_sregs(state: &CpuState, sregs: &mut kvm_sregs) {
    for (index, member) in segment_members(sregs) {
        *member = write_segment(&state.segments[index]);
    }
    sregs.ldt = write_segment(&state.ldtr);
    sregs.tr = match state.tr.present() {
        true => write_segment(&state.tr),
        false => write_segment(&Segment { attributes: BUSY_TSS, ..Segment::default() }),
    };
    sregs.gdt = kvm_dtable { base: state.gdtr.base, limit: state.gdtr.limit, padding: [0; 3] };
    sregs.idt = kvm_dtable { base: state.idtr.base, limit: state.idtr.limit, padding: [0; 3] };
    sregs.cr0 = state.cr0;
    sregs.cr2 = state.cr2;
    sregs.cr3 = state.cr3;
    sregs.cr4 = state.cr4;
    sregs.cr8 = state.cr8;
    sregs.efer = state.efer;
    sregs.interrupt_bitmap = [0; 4];
}

fn read_segment(segment: &kvm_segment) -> Segment {
    if segment.unusable != 0 || segment.present == 0 {
        return Segment { selector: segment.selector, ..Segment::default() };
    }
    let bit = |flag: u8, at: u32| u16::from(flag & 1) << at;
    let mut attributes = u16::from(segment.type_) & TYPE_MASK
        | bit(segment.s, 4)
        | u16::from(segment.dpl & 3) << 5
        | PRESENT
        | bit(segment.avl, 12)
        | bit(segment.l, 13)
        | bit(segment.db, 14)
        | bit(segment.g, 15);
    if attributes & CODE_OR_DATA != 0 {
        attributes |= TYPE_ACCESSED;
    }
    Segment { selector: segment.selector, attributes, limit: segment.limit, base: segment.base }
}

fn write_segment(segment: &Segment) -> kvm_segment {
    let bit = |at: u32| (segment.attributes >> at & 1) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (segment.attributes & TYPE_MASK) as u8,
        present: bit(7),
        dpl: segment.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(!segment.present()),
        padding: 0,
    }
}

fn msr_list(state: &mut CpuState) -> Result<Msrs, KvmError> {
    let entries = MSRS.map(|(index, field)| kvm_msr_entry {
        index,
        data: *field(state),
        ..Default::default()
    });
    Msrs::from_entries(&entries)
        .map_err(|_| KvmError::refused("the list of MSRs", Errno::new(libc::E2BIG)))
}

/// KVM stops at the first MSR that it does not have.
fn all_msrs(what: &str, done: Result<usize, Errno>) -> Result<(), KvmError> {
    match done {
        Ok(count) if count == MSRS.len() => Ok(()),
        Ok(count) => Err(KvmError::refused(
            format!("{what} of MSR {:#x}", MSRS[count].0),
            Errno::new(libc::EINVAL),
        )),
        Err(errno) => Err(KvmError::refused(what, errno)),
    }
}

fn read_msrs(fd: &VcpuFd, state: &mut CpuState) -> Result<(), KvmError> {
    let mut list = msr_list(state)?;
    all_msrs("KVM_GET_MSRS", fd.get_msrs(&mut list))?;
    for ((_, field), entry) in MSRS.iter().zip(list.as_slice()) {
        *field(state) = entry.data;
    }
    Ok(())
}

fn write_msrs(fd: &VcpuFd, state: &CpuState) -> Result<(), KvmError> {
    let list = msr_list(&mut state.clone())?;
    all_msrs("KVM_SET_MSRS", fd.set_msrs(&list))
}

pub(crate) fn read_events(fd: &VcpuFd) -> Result<kvm_vcpu_events, KvmError> {
    fd.get_vcpu_events().map_err(|errno| KvmError::refused("KVM_GET_VCPU_EVENTS", errno))
}

/// No event pending; the interrupt shadow as in `state`.
pub(crate) fn write_events(state: &CpuState, events: &mut kvm_vcpu_events) {
    *events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
    if state.interrupt_shadow {
        // Hardware refuses to enter a guest with STI's shadow and IF clear.
        let kind = match state.rflags & RFLAGS_IF != 0 {
            true => KVM_X86_SHADOW_INT_STI,
            false => KVM_X86_SHADOW_INT_MOV_SS,
        };
        events.interrupt.shadow = kind as u8;
    }
}

// Byte offsets in the legacy area of XSAVE, which is FXSAVE's 64-bit form (AMD64 APM volume 2,
// "FXSAVE and FXRSTOR"): the abridged tag byte by physical register, ST(i) in stack order.
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const MXCSR: usize = 24;
const ST: usize = 32;
const XMM: usize = 160;
const LEGACY_BYTES: usize = 512;
/// Index of XSTATE_BV's low half in [`kvm_xsave::region`].
const XSTATE_BV: usize = LEGACY_BYTES / 4;
/// x87 and SSE.
const XSTATE_LEGACY: u32 = 3;

/// x87, MMX and SSE state.
pub(crate) fn read_fpu(fd: &VcpuFd) -> Result<FpuState, KvmError> {
    let xsave = fd.get_xsave().map_err(|errno| KvmError::refused("KVM_GET_XSAVE", errno))?;
    Ok(unpack_fpu(&xsave))
}

fn unpack_fpu(xsave: &kvm_xsave) -> FpuState {
    let mut area = [0u8; LEGACY_BYTES];
    for (bytes, word) in area.chunks_exact_mut(4).zip(&xsave.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let half = |at: usize| u16::from_le_bytes([area[at], area[at + 1]]);
    let long = |at: usize| u64::from_le_bytes(*area[at..].first_chunk().expect("inside the area"));
    FpuState {
        fcw: half(FCW),
        fsw: half(FSW),
        ftw: area[FTW],
        fop: half(FOP) & 0x7ff,
        fip: long(FIP),
        fdp: long(FDP),
        st: std::array::from_fn(|index| {
            *area[ST + 16 * index..].first_chunk().expect("inside the area")
        }),
        mxcsr: long(MXCSR) as u32,
        xmm: std::array::from_fn(|index| {
            let at = XMM + 16 * index;
            u128::from_le_bytes(*area[at..].first_chunk().expect("inside the area"))
        }),
    }
}

/// x87, MMX and SSE state. Goes through XSAVE because KVM_SET_FPU leaves XSTATE_BV alone: where the kernel noted the state
/// as initial, it would be ignored.
pub(crate) fn write_fpu(fd: &VcpuFd, fpu: &FpuState) -> Result<(), KvmError> {
    let mut area = [0u8; LEGACY_BYTES];
    let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
    put(FCW, &fpu.fcw.to_le_bytes());
    put(FSW, &fpu.fsw.to_le_bytes());
    put(FTW, &[fpu.ftw]);
    put(FOP, &fpu.fop.to_le_bytes());
    put(FIP, &fpu.fip.to_le_bytes());
    put(FDP, &fpu.fdp.to_le_bytes());
    put(MXCSR, &fpu.mxcsr.to_le_bytes());
    for (index, st) in fpu.st.iter().enumerate() {
        put(ST + 16 * index, st);
    }
    for (index, xmm) in fpu.xmm.iter().enumerate() {
        put(XMM + 16 * index, &xmm.to_le_bytes());
    }
    let mut xsave = kvm_xsave::default();
    for (word, bytes) in xsave.region.iter_mut().zip(area.chunks_exact(4)) {
        *word = u32::from_le_bytes(*bytes.first_chunk().expect("four bytes"));
    }
    xsave.region[XSTATE_BV] = XSTATE_LEGACY;
    // SAFETY: the guest can enable no state component beyond the structure's 4 KiB: its CPUID has no
    // XSAVE, and nobody asks arch_prctl for a larger one.
    unsafe { fd.set_xsave(&xsave) }
        .map_err(|errno| KvmError::refused("KVM_SET_XSAVE, x87 and SSE state", errno))
}
