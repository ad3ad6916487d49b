//! A small guest for the tests of system semantics: page tables, descriptor tables, a handler for
//! every vector that halts at an address of its own, and code that the test brings.
#![allow(dead_code)] // Each test file uses a part of it.

use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Engine, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::{CS, CpuState, DS, DescriptorTable, ES, FS, GS, RSP, SS, Segment};
use vm_memory::{Bytes, GuestAddress};

const RAM_MIB: u64 = 4;
/// Page tables: the root, two levels below it, and the last, which maps the low 2 MiB page by page.
const ROOT: u64 = 0x1000;
const PAGES: u64 = 0x4000;
pub(crate) const GDT: u64 = 0x5000;
pub(crate) const IDT: u64 = 0x6000;
pub(crate) const TSS: u64 = 0x7000;
pub(crate) const LDT: u64 = 0x8000;
/// Vector n's handler, a HLT, is at `HANDLERS + 16 * n`.
pub(crate) const HANDLERS: u64 = 0x9000;
pub(crate) const KERNEL_CODE: u64 = 0x1_0000;
/// Where call gates, SYSCALL and SYSENTER lead: a HLT.
pub(crate) const ENTRY: u64 = 0x1_8000;
pub(crate) const KERNEL_DATA: u64 = 0x1_a000;
pub(crate) const KERNEL_STACK: u64 = 0x2_0000;
/// The top of the stack that the TSS gives for privilege level 0.
pub(crate) const INNER_STACK: u64 = 0x2_2000;
/// The top of the first interrupt stack.
pub(crate) const INTERRUPT_STACK: u64 = 0x2_4000;
/// Pages from here to `USER_END` are the user's.
pub(crate) const USER_CODE: u64 = 0x4_0000;
pub(crate) const USER_DATA: u64 = 0x4_8000;
pub(crate) const USER_STACK: u64 = 0x5_0000;
pub(crate) const USER_END: u64 = 0x6_0000;
/// An address whose page is not present.
pub(crate) const ABSENT: u64 = 0x7_0000;

pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 2;
pub(crate) const USER: u64 = 4;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;

/// Selectors.
pub(crate) const KERNEL_CS: u16 = 0x08;
pub(crate) const KERNEL_SS: u16 = 0x10;
pub(crate) const USER_CS_32: u16 = 0x18 | 3;
pub(crate) const USER_SS: u16 = 0x20 | 3;
pub(crate) const USER_CS: u16 = 0x28 | 3;
pub(crate) const TASK: u16 = 0x30;
pub(crate) const LOCAL: u16 = 0x40;
/// The first selector that tests may fill as they like.
pub(crate) const SPARE: u16 = 0x50;

/// Descriptors.
pub(crate) const CODE_64: u64 = 0x00af_9b00_0000_ffff;
pub(crate) const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
pub(crate) const DATA: u64 = 0x00cf_9300_0000_ffff;
pub(crate) const LEVEL_3: u64 = 3 << 45;

pub(crate) const CR0: u64 = 0x8001_0033;
pub(crate) const CR0_WP: u64 = 1 << 16;
pub(crate) const CR4: u64 = 0x620;
pub(crate) const CR4_SMEP: u64 = 1 << 20;
pub(crate) const CR4_SMAP: u64 = 1 << 21;
pub(crate) const EFER: u64 = 0xd01;

pub(crate) const CF: u64 = 1;
pub(crate) const TF: u64 = 1 << 8;
pub(crate) const IF: u64 = 1 << 9;
pub(crate) const NT: u64 = 1 << 14;
pub(crate) const RF: u64 = 1 << 16;
pub(crate) const AC: u64 = 1 << 18;

pub(crate) struct Guest {
    ram: GuestRam,
    pub(crate) state: CpuState,
    code: u64,
    long: bool,
}

/// A guest that has been run.
pub(crate) struct Ended {
    pub(crate) engine: SoftEngine,
    pub(crate) exit: Exit,
    pub(crate) state: CpuState,
    long: bool,
}

/// What a handler found on its stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Delivered {
    pub(crate) vector: u8,
    pub(crate) error_code: Option<u32>,
    pub(crate) rip: u64,
    pub(crate) cs: u16,
    pub(crate) rflags: u64,
    /// The interrupted stack, where the frame has it.
    pub(crate) stack: Option<(u16, u64)>,
}

impl Guest {
    /// 64-bit code at privilege level 0, about to run what [`Guest::code`] gets.
    pub(crate) fn long() -> Self {
        let mut guest = Self::new(true);
        guest.state.segments[CS] = segment(KERNEL_CS, CODE_64);
        guest
    }

    /// 32-bit protected mode with flat segments, no paging, at privilege level 0.
    pub(crate) fn protected() -> Self {
        let mut guest = Self::new(false);
        guest.state.cr0 = 0x33;
        guest.state.cr4 = 0x600;
        guest.state.efer = 0;
        guest.state.segments[CS] = segment(KERNEL_CS, CODE_32);
        guest
    }

    fn new(long: bool) -> Self {
        let ram = GuestRam::new(RAM_MIB).expect("RAM");
        let state = CpuState {
            rip: KERNEL_CODE,
            cr0: CR0,
            cr3: ROOT,
            cr4: CR4,
            efer: EFER,
            gdtr: DescriptorTable { base: GDT, limit: 0xff },
            idtr: DescriptorTable { base: IDT, limit: 0xfff },
            tr: Segment { selector: TASK, attributes: 0x8b, limit: 0xfff, base: TSS },
            star: 0x0018_0008 << 32,
            lstar: ENTRY,
            ..CpuState::default()
        };
        let mut guest = Self { ram, state, code: KERNEL_CODE, long };
        for index in [ES, SS, DS, FS, GS] {
            guest.state.segments[index] = segment(KERNEL_SS, DATA);
        }
        guest.state.gpr[RSP] = KERNEL_STACK;
        guest.make_page_tables();
        guest.make_descriptor_tables();
        guest.write(ENTRY, &[0xf4]);
        guest
    }

    fn make_page_tables(&mut self) {
        for level in 0..3 {
            let table = ROOT + level * 0x1000;
            self.write(table, &((table + 0x1000) | PRESENT | WRITABLE | USER).to_le_bytes());
        }
        for page in (0..0x20_0000).step_by(0x1000) {
            let user = if (USER_CODE..USER_END).contains(&page) { USER } else { 0 };
            let present = if page == ABSENT { 0 } else { PRESENT };
            self.page(page, present | WRITABLE | ACCESSED | DIRTY | user);
        }
    }

    fn make_descriptor_tables(&mut self) {
        self.descriptor(KERNEL_CS, if self.long { CODE_64 } else { CODE_32 });
        self.descriptor(KERNEL_SS, DATA);
        self.descriptor(USER_CS_32, CODE_32 | LEVEL_3);
        self.descriptor(USER_SS, DATA | LEVEL_3);
        self.descriptor(USER_CS, if self.long { CODE_64 } else { CODE_32 } | LEVEL_3);
        self.descriptor(TASK, system_descriptor(TSS, 0xfff, 0x89));
        self.descriptor(LOCAL, system_descriptor(LDT, 0xff, 0x82));
        for vector in 0..=255u8 {
            // Vectors from 128 on may be called by user code.
            self.gate(vector, if vector >= 128 { 0xee } else { 0x8e }, 0);
            self.write(HANDLERS + 16 * u64::from(vector), &[0xf4]);
        }
        if self.long {
            self.write(TSS + 4, &INNER_STACK.to_le_bytes());
            self.write(TSS + 0x24, &INTERRUPT_STACK.to_le_bytes());
        } else {
            self.write(TSS + 4, &(INNER_STACK as u32).to_le_bytes());
            self.write(TSS + 8, &KERNEL_SS.to_le_bytes());
        }
        // The I/O permission bitmap begins at 0x68: every port closed.
        self.write(TSS + 0x66, &0x68u16.to_le_bytes());
        self.write(TSS + 0x68, &[0xff; 0x80]);
    }

    /// Writes an IDT gate to the vector's handler; `rights` is the type byte, with P and DPL.
    pub(crate) fn gate(&mut self, vector: u8, rights: u8, interrupt_stack: u8) {
        self.gate_to(vector, rights, interrupt_stack, KERNEL_CS);
    }

    pub(crate) fn gate_to(&mut self, vector: u8, rights: u8, interrupt_stack: u8, selector: u16) {
        let handler = HANDLERS + 16 * u64::from(vector);
        let low = handler & 0xffff
            | u64::from(selector) << 16
            | u64::from(interrupt_stack) << 32
            | u64::from(rights) << 40
            | handler >> 16 << 48;
        let entry_bytes = if self.long { 16 } else { 8 };
        self.write(IDT + entry_bytes * u64::from(vector), &low.to_le_bytes());
    }

    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(address)).expect("lies in RAM");
    }

    /// Sets a descriptor of the GDT, or of the LDT for selectors with the table bit.
    pub(crate) fn descriptor(&mut self, selector: u16, raw: u64) {
        let table = if selector & 4 == 0 { GDT } else { LDT };
        self.write(table + u64::from(selector & !7), &raw.to_le_bytes());
    }

    /// Sets the flags of the page at `address`, which maps to itself.
    pub(crate) fn page(&mut self, address: u64, flags: u64) {
        let page = address & !0xfff;
        self.write(PAGES + page / 0x1000 * 8, &(page | flags).to_le_bytes());
    }

    /// Puts code where the guest starts, or behind the code put there before.
    pub(crate) fn code(mut self, bytes: &[u8]) -> Self {
        self.write(self.code, bytes);
        self.code += bytes.len() as u64;
        self
    }

    /// Starts at privilege level 3 in 64-bit code (32-bit code outside long mode).
    pub(crate) fn user(self) -> Self {
        let code = if self.long { CODE_64 } else { CODE_32 };
        self.user_in(USER_CS, code)
    }

    /// Starts at privilege level 3 in compatibility mode.
    pub(crate) fn compatibility(self) -> Self {
        self.user_in(USER_CS_32, CODE_32)
    }

    fn user_in(mut self, selector: u16, code: u64) -> Self {
        self.state.segments[CS] = segment(selector, code | LEVEL_3);
        for index in [ES, SS, DS, FS, GS] {
            self.state.segments[index] = segment(USER_SS, DATA | LEVEL_3);
        }
        self.state.gpr[RSP] = USER_STACK;
        self.state.rip = USER_CODE;
        self.code = USER_CODE;
        self
    }

    /// Changes whatever the test wants changed.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub(crate) fn engine(self) -> SoftEngine {
        let mut engine = SoftEngine::new(self.ram).expect("memory for generated code");
        engine.set_cpu_state(&self.state).expect("state");
        engine
    }

    /// Runs until the guest halts, at most 1000 instructions.
    pub(crate) fn run(self) -> Ended {
        self.run_instructions(1000)
    }

    /// Runs so many instructions, unless the guest halts before: with and without translation, which
    /// must come to the same.
    pub(crate) fn run_instructions(self, count: u64) -> Ended {
        let plain = self.twin().run_with(Translation::Never, count);
        let without_loop = self.twin().run_with(Translation::AtOnceWithoutLoop, count);
        let ended = self.run_with(Translation::AtOnce, count);
        for (other, what) in [(plain, "not translated"), (without_loop, "without LOOP")] {
            assert_eq!(ended.exit, other.exit, "{what}");
            assert_eq!(ended.engine.tick(), other.engine.tick(), "{what}");
            assert_eq!(ended.state, other.state, "{what}");
            assert!(ended.ram() == other.ram(), "RAM is the same, {what}");
        }
        ended
    }

    fn run_with(self, translation: Translation, count: u64) -> Ended {
        let long = self.long;
        let mut engine = self.engine();
        engine.set_translation(translation);
        let exit = engine.run(count).expect("the engine runs");
        let state = engine.cpu_state().expect("state");
        Ended { engine, exit, state, long }
    }

    /// The same guest in RAM of its own.
    fn twin(&self) -> Self {
        let ram = GuestRam::new(RAM_MIB).expect("RAM");
        self.ram.visit(&mut |address, bytes| {
            ram.memory().write_slice(bytes, GuestAddress(address)).expect("the same RAM");
        });
        Self { ram, state: self.state.clone(), code: self.code, long: self.long }
    }
}

impl Ended {
    fn ram(&self) -> Vec<(u64, Vec<u8>)> {
        let mut ram = Vec::new();
        self.engine.visit_ram(&mut |address, bytes| ram.push((address, bytes.to_vec())));
        ram
    }
}

impl Ended {
    /// The event whose handler the guest halted in.
    pub(crate) fn delivered(&self) -> Option<Delivered> {
        let handler = self.state.rip.checked_sub(HANDLERS + 1)?;
        if self.exit != Exit::Halt || !handler.is_multiple_of(16) || handler >= 16 * 256 {
            return None;
        }
        let vector = (handler / 16) as u8;
        let mut at = self.state.gpr[RSP];
        let mut next = || {
            let value = if self.long { self.u64(at) } else { u64::from(self.u64(at) as u32) };
            at += if self.long { 8 } else { 4 };
            value
        };
        let has_code = matches!(vector, 8 | 10..=14 | 17);
        let error_code = has_code.then(|| next() as u32);
        let (rip, cs, rflags) = (next(), next() as u16, next());
        let level_changed = cs & 3 != self.state.segments[CS].selector & 3;
        let stack = (self.long || level_changed).then(|| {
            let pointer = next();
            (next() as u16, pointer)
        });
        Some(Delivered { vector, error_code, rip, cs, rflags, stack })
    }

    /// The event's vector and error code.
    ///
    /// # Panics
    /// If the guest did not halt in a handler.
    pub(crate) fn fault(&self) -> (u8, Option<u32>) {
        match self.delivered() {
            Some(delivered) => (delivered.vector, delivered.error_code),
            None => panic!("no handler ran: {:?} at {:#x}", self.exit, self.state.rip),
        }
    }

    /// Reads guest RAM as the guest left it.
    pub(crate) fn engine_read(&self, address: u64, bytes: &mut [u8]) {
        self.engine.read_ram(address, bytes);
    }

    pub(crate) fn u64(&self, address: u64) -> u64 {
        let mut bytes = [0; 8];
        self.engine.read_ram(address, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

/// A segment register as loading a descriptor at address zero's base makes it.
pub(crate) fn segment(selector: u16, raw: u64) -> Segment {
    let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
    Segment {
        selector,
        attributes: (raw >> 40) as u16 & 0xf0ff,
        limit: if raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit },
        base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
    }
}

/// A descriptor of an LDT or TSS, or of a segment with a base.
pub(crate) fn system_descriptor(base: u64, limit: u64, rights: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | rights << 40
        | (limit >> 16 & 0xf) << 48
        | (base >> 24 & 0xff) << 56
}
