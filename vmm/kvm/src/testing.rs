//! What the tests of this crate share: guests of a few bytes of machine code, started right in the
//! mode that they are written for.

use std::io::Write;

use reprise_machine::engine::{Engine, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::cpu_state::*;
use vm_memory::{Bytes, GuestAddress};

use crate::{KvmClock, KvmEngine};

/// Ends a test that this host cannot run, with a word on why.
macro_rules! require_kvm {
    () => {
        if let Err(reason) = $crate::vcpu::open($crate::vcpu::DEVICE) {
            $crate::testing::skipped(reason);
            return;
        }
    };
    (Step) => {
        require_kvm!();
        let finding = $crate::self_test::step_clock();
        if !finding.available {
            $crate::testing::skipped(finding);
            return;
        }
    };
}
pub(crate) use require_kvm;

/// Says that a test cannot be run here, past the harness, which keeps to itself what a test prints that passes.
pub(crate) fn skipped(reason: impl std::fmt::Display) {
    let thread = std::thread::current();
    let line = format!("skipped: {reason} ({})\n", thread.name().unwrap_or("a test"));
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Where a test's code starts.
pub(crate) const CODE: u64 = 0x1_0000;
/// Top of a test's stack.
pub(crate) const STACK_TOP: u64 = 0x2_0000;
/// The interrupt descriptor table.
pub(crate) const IDT: u64 = 0x4000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x5000;
/// The 64-bit code segment's selector.
pub(crate) const CODE_SELECTOR: u16 = 0x08;
/// The data segment's selector.
pub(crate) const DATA_SELECTOR: u16 = 0x10;
/// 32-bit code, flat.
pub(crate) const CODE32_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
const TSS: u64 = 0x6000;

const GDT_ENTRIES: [u64; 6] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_9b00_0000_ffff,
    // A 64-bit TSS at 0x6000, 0x67 bytes limit, busy.
    0x0000_8b00_6000_0067,
    0,
];

/// RAM with identity-mapped page tables, a GDT and `code` at [`CODE`].
pub(crate) fn ram_with(code: &[u8]) -> GuestRam {
    let ram = GuestRam::new(4).expect("4 MiB");
    let put = |address: u64, bytes: &[u8]| {
        ram.memory().write_slice(bytes, GuestAddress(address)).expect("RAM");
    };
    put(PML4, &(PDPT | 7).to_le_bytes());
    put(PDPT, &(PAGE_DIRECTORY | 7).to_le_bytes());
    for index in 0..512u64 {
        put(PAGE_DIRECTORY + 8 * index, &(index << 21 | 0x87).to_le_bytes());
    }
    for (index, entry) in (0u64..).zip(GDT_ENTRIES) {
        put(GDT + 8 * index, &entry.to_le_bytes());
    }
    put(CODE, code);
    ram
}

/// Writes guest RAM.
pub(crate) fn put(ram: &GuestRam, address: u64, bytes: &[u8]) {
    ram.memory().write_slice(bytes, GuestAddress(address)).expect("RAM");
}

/// A 64-bit interrupt gate.
pub(crate) fn put_gate(ram: &GuestRam, vector: u8, handler: u64) {
    let low = handler & 0xffff
        | u64::from(CODE_SELECTOR) << 16
        | 0x8e00 << 32
        | (handler >> 16 & 0xffff) << 48;
    put(ram, IDT + 16 * u64::from(vector), &low.to_le_bytes());
    put(ram, IDT + 16 * u64::from(vector) + 8, &(handler >> 32).to_le_bytes());
}

fn flat(selector: u16, attributes: u16) -> Segment {
    Segment { selector, attributes, limit: 0xffff_ffff, base: 0 }
}

/// CPL0 in 64-bit mode, at [`CODE`], interrupts off.
pub(crate) fn long_mode() -> CpuState {
    let data = flat(DATA_SELECTOR, 0xc093);
    let mut state = CpuState {
        rip: CODE,
        segments: [data; 6],
        tr: Segment { selector: TSS_SELECTOR, attributes: 0x8b, limit: 0x67, base: TSS },
        gdtr: DescriptorTable { base: GDT, limit: 8 * GDT_ENTRIES.len() as u16 - 1 },
        idtr: DescriptorTable { base: IDT, limit: 0xfff },
        cr0: 0x8001_0033,
        cr3: PML4,
        // PAE, OSFXSR, OSXMMEXCPT.
        cr4: 0x620,
        // SCE, LME, LMA, NXE.
        efer: 0xd01,
        ..CpuState::default()
    };
    state.segments[CS] = flat(CODE_SELECTOR, 0xa09b);
    state.gpr[RSP] = STACK_TOP;
    state
}

/// Flat 32-bit protected mode without paging, at [`CODE`].
pub(crate) fn protected_mode() -> CpuState {
    let mut state = CpuState { cr0: 0x11, cr3: 0, cr4: 0x600, efer: 0, ..long_mode() };
    state.segments[CS] = flat(CODE32_SELECTOR, 0xc09b);
    state
}

/// Real mode, at [`CODE`] as 0x1000:0.
pub(crate) fn real_mode() -> CpuState {
    let segment = |attributes, base: u64| Segment {
        selector: (base >> 4) as u16,
        attributes,
        limit: 0xffff,
        base,
    };
    let mut state = CpuState {
        rip: 0,
        segments: [segment(0x93, 0); 6],
        gdtr: DescriptorTable::default(),
        idtr: DescriptorTable { base: 0, limit: 0x3ff },
        tr: Segment::default(),
        cr0: 0x10,
        ..CpuState::default()
    };
    state.segments[CS] = segment(0x9b, CODE);
    state.gpr[RSP] = 0x8000;
    state
}

/// An engine at the start of `code`.
pub(crate) fn engine(clock: KvmClock, state: &CpuState, code: &[u8]) -> KvmEngine {
    engine_on(ram_with(code), clock, state)
}

/// An engine on RAM that a test has prepared.
pub(crate) fn engine_on(ram: GuestRam, clock: KvmClock, state: &CpuState) -> KvmEngine {
    let mut engine = KvmEngine::new(ram, clock).expect("KVM");
    engine.set_cpu_state(state).expect("a state that KVM takes");
    engine
}

/// Runs without a limit.
pub(crate) fn run(engine: &mut KvmEngine) -> Exit {
    engine.run(u64::MAX).expect("KVM runs")
}

/// Runs tick by tick and gives RIP at each; what is read from the board is 0x5a.
pub(crate) fn trace(engine: &mut KvmEngine, ticks: u64) -> Vec<u64> {
    (0..ticks)
        .map(|_| {
            let until = engine.tick() + 1;
            loop {
                match engine.run(until).expect("KVM runs") {
                    Exit::TickReached | Exit::Halt => break,
                    Exit::Access(_) => engine.finish_access(0x5a).expect("KVM takes the answer"),
                    exit => panic!("{exit:?}"),
                }
            }
            let moment = engine.moment().expect("KVM tells where it stands");
            assert_eq!((engine.tick(), moment.tick), (until, until));
            moment.rip
        })
        .collect()
}
