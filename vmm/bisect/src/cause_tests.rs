//! Each cause's test finds what it is for, and leaves what it is not for.

use iced_x86::{Decoder, DecoderOptions};
use reprise_devices::board::{Board, BoardConfig};
use reprise_machine::stepping::Surroundings;
use reprise_trace::checkpoint::HiddenState;
use reprise_trace::event::{EffectDigest, Event, Record};
use reprise_trace::moment::Moment;

use super::*;
use crate::input::{Numbered, Typed};
use crate::memory::TableEntry;

/// Everything owned, the same on both sides until a test changes it.
struct Scene {
    machines: Vec<String>,
    clocks_set: [u64; 2],
    start: bool,
    entering: bool,
    before: [Look; 2],
    entered: [Look; 2],
    after: [Look; 2],
    code: &'static [u8],
    pages: Vec<PageDifference>,
    input: Option<InputDifference>,
    typed: Option<TypedDifference>,
    other_clocks: bool,
    contradicted: bool,
    other_code: bool,
}

impl Scene {
    fn of(code: &'static [u8]) -> Self {
        let board = Board::new(&BoardConfig { ram_bytes: 64 << 20, rtc_start_s: 0 });
        let effects = EffectDigest { console_bytes: 0, console_digest: [0; 32] };
        let look = Look {
            instructions: 100,
            tick: 100,
            cpu: CpuState::default(),
            devices: board.save(),
            hidden: None,
            surroundings: Surroundings { virtual_ns: 100, effects, accesses: 0, interrupts: 3 },
            over: false,
        };
        let both = || [look.clone(), look.clone()];
        Self {
            machines: Vec::new(),
            clocks_set: [0; 2],
            start: false,
            entering: false,
            before: both(),
            entered: both(),
            after: both(),
            code,
            pages: Vec::new(),
            input: None,
            typed: None,
            other_clocks: false,
            contradicted: false,
            other_code: false,
        }
    }

    fn names(&self) -> Vec<&'static str> {
        let decoded = Decoder::with_ip(64, self.code, 0x1000, DecoderOptions::NONE).decode();
        let evidence = Evidence {
            names: ["first", "second"],
            machines: &self.machines,
            clocks_set: self.clocks_set,
            from_the_start: self.start,
            entering: self.entering,
            before: &self.before,
            entered: &self.entered,
            after: &self.after,
            instructions: [Some(decoded); 2],
            other_code: self.other_code,
            pages: &self.pages,
            more_pages: false,
            input: self.input.as_ref(),
            typed: self.typed.as_ref(),
            other_clocks: self.other_clocks,
            contradicted: self.contradicted.then_some(("second", "at tick 100")),
            other_engines: false,
        };
        let found = causes(&evidence);
        assert!(found.iter().all(|cause| !cause.next.is_empty()), "each says what to do next");
        found.into_iter().map(|cause| cause.name).collect()
    }
}

const NOP: &[u8] = &[0x90];
const IN_AL_DX: &[u8] = &[0xec];

fn typed(byte: u8) -> Option<Numbered> {
    let moment = Moment { tick: 90, rip: 0, rcx: 0 };
    let record = Record { moment, cpu_digest: 0, event: Event::Console(vec![byte]) };
    Some(Numbered { number: 4, record })
}

#[test]
fn machines_that_are_not_the_same_come_first() {
    let mut scene = Scene::of(NOP);
    scene.start = true;
    assert_eq!(scene.names(), ["other-start"]);
    scene.machines.push("guest.images".to_owned());
    assert_eq!(scene.names()[0], "other-machine");
}

#[test]
fn the_clock_that_was_set_otherwise_is_told_at_the_start_and_where_it_is_read() {
    let mut scene = Scene::of(IN_AL_DX);
    scene.clocks_set = [1, 2];
    scene.before.iter_mut().for_each(|look| look.cpu.gpr[2] = 0x71);
    assert_eq!(scene.names()[0], "clock-set");
    scene.before.iter_mut().for_each(|look| look.cpu.gpr[2] = 0x40);
    assert_eq!(scene.names()[0], "time-stamp");
    scene.start = true;
    assert_eq!(scene.names()[0], "clock-set");
}

#[test]
fn input_is_told_where_it_enters_and_where_it_is_read() {
    let mut scene = Scene::of(IN_AL_DX);
    scene.input = Some(InputDifference { a: typed(b'a'), b: typed(b'b') });
    // It came long before, and the devices are the same: it is something else.
    scene.after[0].cpu.gpr[0] = 0x61;
    assert!(!scene.names().contains(&"input"));
    let config = BoardConfig { ram_bytes: 64 << 20, rtc_start_s: 1 };
    scene.entered[1].devices = Board::new(&config).save();
    assert_eq!(scene.names()[0], "input");
    // Where the record is.
    let mut scene = Scene::of(NOP);
    scene.input = Some(InputDifference { a: typed(b'a'), b: typed(b'b') });
    scene.entering = true;
    scene.before.iter_mut().for_each(|look| look.tick = 90);
    assert_eq!(scene.names()[0], "input");
}

#[test]
fn what_was_typed_is_told_byte_by_byte_where_it_is_read() {
    let mut scene = Scene::of(IN_AL_DX);
    scene.before.iter_mut().for_each(|look| look.cpu.gpr[2] = 0x3f8);
    let config = BoardConfig { ram_bytes: 64 << 20, rtc_start_s: 1 };
    scene.entered[1].devices = Board::new(&config).save();
    scene.after[0].cpu.gpr[0] = 0x61;
    // Clocks that cannot be compared, so that no record can.
    scene.other_clocks = true;
    assert_eq!(scene.names(), ["input"]);
    let bytes = [Some(Typed { byte: b'a', tick: 90 }), None];
    scene.typed = Some(TypedDifference { offset: 7, bytes });
    assert_eq!(scene.names(), ["input"]);
    // The line-printer's port is another device.
    scene.before.iter_mut().for_each(|look| look.cpu.gpr[2] = 0x378);
    assert_eq!(scene.names(), [""; 0]);
}

#[test]
fn the_same_input_at_two_places_is_a_skid_or_two_runs() {
    let mut scene = Scene::of(NOP);
    let later = |by: u64| {
        typed(b'a').map(|mut found| {
            found.record.moment.tick += by;
            found
        })
    };
    scene.input = Some(InputDifference { a: typed(b'a'), b: later(1) });
    scene.entering = true;
    scene.before.iter_mut().for_each(|look| look.tick = 90);
    assert_eq!(scene.names()[0], "skid");
    assert!(!scene.names().contains(&"input"));
    // Other input is no skid, wherever it enters.
    scene.input = Some(InputDifference { a: typed(b'b'), b: later(1) });
    assert_eq!(scene.names()[0], "input");
    // Before it enters anywhere, it is no reason.
    scene.before.iter_mut().for_each(|look| look.tick = 80);
    scene.entering = false;
    scene.input = Some(InputDifference { a: typed(b'a'), b: later(1) });
    assert!(!scene.names().contains(&"skid"));
}

#[test]
fn under_two_clocks_only_what_the_guest_executes_is_compared() {
    // ADD gives two results though CPU and RAM were the same: that is nobody's time or device.
    let mut scene = Scene::of(&[0x01, 0xd8]);
    scene.other_clocks = true;
    (scene.entered[1].tick, scene.entered[1].surroundings.virtual_ns) = (7, 7);
    scene.after[1].cpu.gpr[0] = 1;
    assert_eq!(scene.names(), ["engine"]);
    // A device's answer is.
    let mut scene = Scene::of(IN_AL_DX);
    scene.other_clocks = true;
    scene.before.iter_mut().for_each(|look| look.cpu.gpr[2] = 0x40);
    scene.entered[1].surroundings.virtual_ns += 9;
    scene.after[1].cpu.gpr[0] = 1;
    assert_eq!(scene.names(), ["time-stamp"]);
}

#[test]
fn code_that_is_not_the_same_is_told() {
    let mut scene = Scene::of(NOP);
    scene.other_code = true;
    scene.after[1].cpu.rip = 7;
    assert_eq!(scene.names(), ["other-code"]);
    // What enters before it is not the code's doing.
    scene.entering = true;
    assert_eq!(scene.names(), [""; 0]);
}

#[test]
fn every_cause_is_met_by_a_test_here() {
    let tests = include_str!("cause_tests.rs");
    for (name, ..) in CAUSES {
        assert!(tests.contains(&format!("\"{name}\"")), "no test meets {name}");
    }
}

#[test]
fn an_interrupt_on_one_side_is_told() {
    let mut scene = Scene::of(NOP);
    scene.entering = true;
    scene.entered[1].surroundings.interrupts += 1;
    assert_eq!(scene.names(), ["interrupt-moment"]);
}

#[test]
fn reading_a_clock_is_told() {
    for (code, port) in [(&[0x0f, 0x31][..], 0), (&[0x0f, 0x01, 0xf9], 0), (IN_AL_DX, 0x40)] {
        let mut scene = Scene::of(code);
        scene.before.iter_mut().for_each(|look| look.cpu.gpr[2] = port);
        scene.entered[1].surroundings.virtual_ns += 5;
        scene.after[1].cpu.gpr[0] = 5;
        assert_eq!(scene.names()[0], "time-stamp", "{code:x?}");
    }
    let mut scene = Scene::of(IN_AL_DX);
    scene.before.iter_mut().for_each(|look| look.cpu.gpr[2] = 0x3f8);
    assert!(!scene.names().contains(&"time-stamp"));
}

fn table_page(only: bool) -> PageDifference {
    let (a, b) = (0x9003, 0x9023);
    let entry = TableEntry { level: 1, linear: 0x3000, a, b, only_accessed_or_dirty: only };
    let shown = String::new();
    PageDifference { address: 0x4018, bytes: 1, a: shown.clone(), b: shown, table: Some(entry) }
}

#[test]
fn an_accessed_bit_is_told_only_if_it_is_all_that_differs() {
    let mut scene = Scene::of(NOP);
    scene.pages = vec![table_page(true)];
    assert_eq!(scene.names()[0], "accessed-bit");
    scene.pages.push(PageDifference { table: None, ..table_page(true) });
    assert!(!scene.names().contains(&"accessed-bit"));
    scene.pages = vec![table_page(false)];
    assert!(!scene.names().contains(&"accessed-bit"));
}

#[test]
fn flags_are_undefined_only_where_the_manual_leaves_them_so() {
    const AF: u64 = 1 << 4;
    // AND leaves AF undefined, ADD does not.
    for (code, name) in [(&[0x21, 0xd8][..], "undefined-flag"), (&[0x01, 0xd8], "engine")] {
        let mut scene = Scene::of(code);
        scene.after[1].cpu.rflags ^= AF;
        assert_eq!(scene.names(), [name], "{code:x?}");
    }
    let mut scene = Scene::of(&[0x21, 0xd8]);
    scene.after[1].cpu.rflags ^= AF;
    scene.after[1].cpu.gpr[0] = 1;
    assert_eq!(scene.names(), ["engine"]);
}

#[test]
fn results_that_processors_give_differently_are_told() {
    // RCPPS and RSQRTPS XMM0, XMM1.
    for code in [&[0x0f, 0x53, 0xc1][..], &[0x0f, 0x52, 0xc1]] {
        let mut scene = Scene::of(code);
        scene.after[1].cpu.fpu.xmm[0] = 1;
        assert_eq!(scene.names(), ["approximation"], "{code:x?}");
    }
    // FSIN, FCOS, FPTAN, FPATAN, F2XM1, FYL2X.
    for last in [0xfe, 0xff, 0xf2, 0xf3, 0xf0, 0xf1] {
        let code: &'static [u8] = Box::leak(Box::new([0xd9, last]));
        let mut scene = Scene::of(code);
        scene.after[1].cpu.fpu.st[0][0] = 1;
        assert_eq!(scene.names(), ["approximation"], "{code:x?}");
    }
    // FADD ST, ST(1) and ADDPS are exact.
    let mut scene = Scene::of(&[0xd8, 0xc1]);
    scene.after[1].cpu.fpu.st[0][0] = 1;
    assert_eq!(scene.names(), ["engine"]);
    // An approximation that jumps elsewhere is none.
    let mut scene = Scene::of(&[0x0f, 0x53, 0xc1]);
    (scene.after[1].cpu.fpu.xmm[0], scene.after[1].cpu.gpr[0]) = (1, 1);
    assert!(!scene.names().contains(&"approximation"));
    let mut scene = Scene::of(&[0x0f, 0xa2]);
    scene.after[1].cpu.gpr[0] = 1;
    assert_eq!(scene.names(), ["host-dependent"]);
}

#[test]
fn a_fault_or_another_tlb_on_one_side_is_a_stale_translation() {
    // MOV EAX, [RBX].
    const LOAD: &[u8] = &[0x8b, 0x03];
    let mut scene = Scene::of(LOAD);
    scene.after[1].cpu.cr2 = 0x5000;
    scene.after[1].cpu.rip = 0x9000;
    assert_eq!(scene.names()[0], "stale-translation");
    // The TLBs are not alike, and it reads memory, or does not.
    let knows = |byte| HiddenState { engine: String::new(), version: 1, bytes: vec![byte] };
    // ADD EAX, EBX; POP RAX; MOV EAX at a fixed address; LODSB; LEA EAX, [RBX].
    let fixed: &[u8] = &[0x8b, 0x04, 0x25, 0, 0x50, 0, 0];
    for (code, told) in [
        (LOAD, true),
        (&[0x01, 0xd8], false),
        (&[0x58], true),
        (fixed, true),
        (&[0xac], true),
        (&[0x8d, 0x03], false),
    ] {
        let mut scene = Scene::of(code);
        scene.entered[0].hidden = Some(knows(1));
        scene.entered[1].hidden = Some(knows(2));
        scene.after[1].cpu.gpr[0] = 1;
        assert_eq!(scene.names().contains(&"stale-translation"), told, "{code:x?}");
    }
}

#[test]
fn a_recording_that_contradicts_itself_is_told() {
    let mut scene = Scene::of(NOP);
    scene.contradicted = true;
    assert_eq!(scene.names(), ["contradiction"]);
}

#[test]
fn a_result_without_a_reason_is_the_engine_s() {
    let mut scene = Scene::of(&[0x01, 0xd8]);
    scene.after[1].cpu.gpr[0] = 1;
    assert_eq!(scene.names(), ["engine"]);
    scene.entered[0].surroundings.virtual_ns += 1;
    assert_eq!(scene.names(), [""; 0]);
}
