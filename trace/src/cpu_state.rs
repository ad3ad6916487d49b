//! The architectural state of one x86-64 CPU, as stored, compared and handed between engines.

use serde::{Deserialize, Serialize};

/// Index into [`CpuState::gpr`]: the order of the instruction encoding.
pub const RAX: usize = 0;
/// See [`RAX`].
pub const RCX: usize = 1;
/// See [`RAX`].
pub const RDX: usize = 2;
/// See [`RAX`].
pub const RBX: usize = 3;
/// See [`RAX`].
pub const RSP: usize = 4;
/// See [`RAX`].
pub const RBP: usize = 5;
/// See [`RAX`].
pub const RSI: usize = 6;
/// See [`RAX`].
pub const RDI: usize = 7;

/// Index into [`CpuState::segments`]: the order of the instruction encoding.
pub const ES: usize = 0;
/// See [`ES`].
pub const CS: usize = 1;
/// See [`ES`].
pub const SS: usize = 2;
/// See [`ES`].
pub const DS: usize = 3;
/// See [`ES`].
pub const FS: usize = 4;
/// See [`ES`].
pub const GS: usize = 5;

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Attributes as in a descriptor's second dword, bits 8 to 23 shifted down by 8: type in bits
    /// 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15. Zero for a null (unusable) segment.
    pub attributes: u16,
    /// Last valid offset, in bytes (granularity already applied).
    pub limit: u32,
    /// Linear base.
    pub base: u64,
}

impl Segment {
    /// The segment's D/B bit: 32-bit default operands (CS) or stack (SS).
    pub fn default_32(&self) -> bool {
        self.attributes & (1 << 14) != 0
    }

    /// The L bit of a code segment: 64-bit mode, where EFER.LMA is set too.
    pub fn long(&self) -> bool {
        self.attributes & (1 << 13) != 0
    }

    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }

    /// Present, that is usable.
    pub fn present(&self) -> bool {
        self.attributes & (1 << 7) != 0
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base.
    pub base: u64,
    /// Last valid offset, in bytes.
    pub limit: u16,
}

/// x87, MMX and SSE state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FpuState {
    /// Control word.
    pub fcw: u16,
    /// Status word, TOP in bits 11-13.
    pub fsw: u16,
    /// Abridged tag byte as FXSAVE has it: bit n set if physical register n is not empty.
    pub ftw: u8,
    /// Last x87 opcode (11 bits).
    pub fop: u16,
    /// Last x87 instruction's address.
    pub fip: u64,
    /// Last x87 memory operand's address.
    pub fdp: u64,
    /// ST(0) to ST(7), in stack order, 80 bits each.
    pub st: [[u8; 10]; 8],
    /// SSE control and status.
    pub mxcsr: u32,
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
}

impl Default for FpuState {
    /// The state after FNINIT and reset: masked exceptions, empty stack.
    fn default() -> Self {
        Self {
            fcw: 0x37f,
            fsw: 0,
            ftw: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            st: [[0; 10]; 8],
            mxcsr: 0x1f80,
            xmm: [0; 16],
        }
    }
}

/// Everything that decides what the CPU does next, RAM and devices apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    /// The next instruction's offset in CS.
    pub rip: u64,
    /// All of RFLAGS; bit 1 is always set.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// Control register 0.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Task priority.
    pub cr8: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// Extended feature enable register.
    pub efer: u64,
    /// SYSCALL selectors.
    pub star: u64,
    /// SYSCALL target in 64-bit mode.
    pub lstar: u64,
    /// SYSCALL target in compatibility mode.
    pub cstar: u64,
    /// SYSCALL flag mask.
    pub sfmask: u64,
    /// What SWAPGS exchanges with GS.base.
    pub kernel_gs_base: u64,
    /// SYSENTER CS.
    pub sysenter_cs: u64,
    /// SYSENTER RSP.
    pub sysenter_esp: u64,
    /// SYSENTER RIP.
    pub sysenter_eip: u64,
    /// Page attribute table.
    pub pat: u64,
    /// What RDTSC adds to the counter that virtual time drives (WRMSR to the TSC sets it).
    pub tsc_offset: u64,
    /// What RDTSCP returns in ECX.
    pub tsc_aux: u64,
    /// x87, MMX and SSE.
    pub fpu: FpuState,
    /// The previous instruction was STI, MOV SS or POP SS: no interrupt before the next one retires.
    pub interrupt_shadow: bool,
    /// In HLT: nothing executes until an interrupt.
    pub halted: bool,
}

impl Default for CpuState {
    fn default() -> Self {
        Self {
            gpr: [0; 16],
            rip: 0,
            rflags: 2,
            segments: [Segment::default(); 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cr0: 0x10,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: 0x0007_0406_0007_0406,
            tsc_offset: 0,
            tsc_aux: 0,
            fpu: FpuState::default(),
            interrupt_shadow: false,
            halted: false,
        }
    }
}

impl CpuState {
    /// Current privilege level.
    pub fn cpl(&self) -> u8 {
        if self.cr0 & 1 == 0 {
            return 0;
        }
        (self.segments[SS].attributes >> 5 & 3) as u8
    }

    /// BLAKE3 over every field, in a fixed byte order.
    pub fn digest(&self) -> blake3::Hash {
        let bytes =
            postcard::to_allocvec(self).expect("CPU state has no type that can fail to encode");
        blake3::hash(&bytes)
    }

    /// The digest's first eight bytes, as each log record carries it.
    pub fn short_digest(&self) -> u64 {
        u64::from_le_bytes(self.digest().as_bytes()[..8].try_into().expect("eight bytes"))
    }
}
