//! Two replays that part, made so on purpose: the first instruction after which they differ must be
//! named exactly, with the cause. What is exact is found out by stepping both machines one by one.

mod broken;
mod clocks;
mod hardware;
mod narrowing;
mod recordings;
mod stale;
mod starts;

use std::sync::Arc;

use broken::{Broken, Wrong};
use iced_x86::Mnemonic;
use recordings::{Workplace, open, reprise, text};
use reprise_bisect::input::first_input_difference;
use reprise_bisect::{BisectError, Compared, Kind, Question, Side, Unwatched, Watch, compare};
use reprise_branch_clock::guest_code::decode_at;
use reprise_cpu::translate::Translation;
use reprise_machine::engine::Engine;
use reprise_machine::ram::GuestRam;
use reprise_replay::{RecordedClock, Replayable, Start};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Event;

/// RFLAGS.AF.
const AUXILIARY_FLAG: u64 = 1 << 4;
/// RFLAGS.SF.
const SIGN_FLAG: u64 = 1 << 7;

fn question(until: u64) -> Question<'static> {
    Question { starts: [Start::Run; 2], until, input: None, typed: None, symbols: Arc::default() }
}

fn last_tick(recording: &Replayable) -> u64 {
    recording.recording().summary().last_moment.expect("it has records").tick
}

/// The recording on a sound CPU and on a broken one.
fn compare_with_broken(recording: &Replayable, wrong: Wrong) -> Compared {
    let sides = [
        Side::soft("sound", recording, Translation::default()),
        Side::with_engine("broken", recording, move |ram, _| Broken::new(ram, wrong)),
    ];
    compare(&sides, &question(last_tick(recording)), &mut Unwatched).expect("it runs")
}

fn cause(compared: &Compared) -> &'static str {
    let finding = compared.finding.as_ref().expect("they differ");
    finding.causes.first().map_or("none", |cause| cause.name)
}

/// CPU states of a replay at each tick from `first` on, and what is executed there.
fn walk(
    recording: &Replayable,
    ticks: std::ops::Range<u64>,
    mut see: impl FnMut(u64, &CpuState, &GuestRam),
) {
    let mut machine = recording.soft_machine(Start::Run).expect("a machine");
    for tick in ticks {
        if machine.advance_to(tick).expect("it runs").is_some() {
            return;
        }
        let mut ram = GuestRam::new(recording.recording().header().machine.ram_mib).expect("RAM");
        let state = machine.engine().cpu_state().expect("a state");
        // Code and its tables are all that is looked at.
        let page = state.rip & !0xfff;
        let mut bytes = [0; 4096];
        machine.engine().read_ram(page, &mut bytes);
        assert!(ram.place(page, &bytes));
        see(tick, &state, &ram);
    }
}

/// The first tick behind `from` at which a replay is about to execute what `wanted` says.
fn first_tick_of(
    recording: &Replayable,
    from: u64,
    wanted: impl Fn(Mnemonic, &CpuState) -> bool,
) -> u64 {
    let mut found = None;
    walk(recording, from..from + 3000, |tick, state, ram| {
        // The embedded guests map their code where it lies.
        let flat = CpuState { cr0: state.cr0 & !(1 << 31), ..state.clone() };
        let decoded = decode_at(ram, &flat, state.rip);
        if decoded.is_some_and(|one| wanted(one.mnemonic(), state)) {
            found.get_or_insert(tick);
        }
    });
    found.expect("the guest executes it")
}

/// The first tick at which the CPUs of two replays differ, each instruction looked at.
fn first_differing_tick(a: &Replayable, b: &Replayable, from: u64) -> u64 {
    let mut machines = [a, b].map(|one| one.soft_machine(Start::Run).expect("a machine"));
    for tick in from.. {
        let [one, other] = &mut machines;
        assert!(one.advance_to(tick).expect("it runs").is_none());
        assert!(other.advance_to(tick).expect("it runs").is_none());
        let state = |machine: &mut reprise_machine::machine::Machine<_, _>| {
            let machine: &mut reprise_machine::machine::Machine<
                RecordedClock,
                reprise_machine::inputs::Replaying,
            > = machine;
            machine.engine().cpu_state().expect("a state")
        };
        if state(one) != state(other) {
            return tick;
        }
    }
    unreachable!("ticks do not end")
}

#[test]
fn one_typed_byte_is_followed_to_the_instruction_that_reads_it() {
    let workplace = Workplace::new();
    let a = workplace.record("a.rr", "echo", "same\rone\rquit\r", &[]);
    let b = workplace.record("b.rr", "echo", "same\rtwo\rquit\r", &[]);
    let (first, second) = (open(&a), open(&b));
    let input = first_input_difference(&mut first.recording().log(), &mut second.recording().log())
        .expect("sound logs")
        .expect("other input");
    let exact = first_differing_tick(&first, &second, input.tick());
    let ran = reprise(&["--json", "diff", text(&a), text(&b)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    let finding = &report["bisection"]["finding"];
    assert_eq!(finding["instructions"], exact - 1, "{finding:#}");
    assert_eq!(finding["kind"], "instruction");
    assert!(finding["instruction"].as_str().is_some_and(|text| text.starts_with("in ")));
    assert_eq!(finding["causes"][0]["name"], "input", "{finding:#}");
    let rax = &finding["cpu"][0];
    assert_eq!(
        (&rax["name"], &rax["a"], &rax["b"]),
        (&"RAX".into(), &"0x6f".into(), &"0x74".into())
    );
    let shown = reprise(&["diff", text(&a), text(&b)]).stdout;
    assert!(shown.starts_with(&format!("they part at instruction {}: `in ", exact - 1)), "{shown}");
    for part in ["likely cause: the guest reads", "next: ", "RAX", "0x6f", "0x74", "CR3", "CPL 0"] {
        assert!(shown.contains(part), "no {part:?} in\n{shown}");
    }
    // Where the byte entered is told as well, or that the clocks were set otherwise when recording began.
    let origin = &report["bisection"]["origin"];
    assert!(
        origin["instructions"] == input.tick() || origin["causes"][0]["name"] == "clock-set",
        "{origin:#}"
    );
}

#[test]
fn an_altered_record_is_followed_and_its_replay_narrowed() {
    let workplace = Workplace::new();
    let a = workplace.record("a.rr", "echo", "same\rone\rquit\r", &[]);
    let b = workplace.altered("b.rr", &a, |records| {
        let typed = records.iter_mut().find_map(|record| match &mut record.event {
            Event::Console(bytes) => Some(bytes),
            _ => None,
        });
        typed.expect("something was typed")[5] ^= 1;
    });
    let record =
        open(&a).recording().log().next_record().expect("sound").expect("one").into_inner();
    let exact = first_differing_tick(&open(&a), &open(&b), record.moment.tick);
    let report = reprise(&["--json", "diff", text(&a), text(&b)]).json();
    let compared = &report["bisection"];
    assert_eq!(compared["finding"]["instructions"], exact - 1, "{compared:#}");
    assert_eq!(compared["origin"]["instructions"], record.moment.tick, "{compared:#}");
    assert_eq!(compared["origin"]["kind"], "entering", "{compared:#}");
    // The altered copy alone: its replay differs, offers to narrow that, and does.
    let replayed = reprise(&["replay", text(&b)]);
    assert_eq!(replayed.code, 1, "{}", replayed.stderr);
    assert!(replayed.stderr.contains("--bisect"), "{}", replayed.stderr);
    let narrowed = reprise(&["--json", "replay", "--bisect", text(&b)]);
    assert_eq!(narrowed.code, 1, "{}", narrowed.stderr);
    let narrowed = &narrowed.json()["bisection"];
    assert_eq!(narrowed["from"], narrowed["agreed"]["tick"], "{narrowed:#}");
    assert_eq!(narrowed["causes"][0]["name"], "altered", "{narrowed:#}");
    assert!(narrowed["ran"]["first"].as_array().is_some_and(|lines| !lines.is_empty()));
    assert!(narrowed["engines"]["finding"].is_null(), "{narrowed:#}");
}

#[test]
fn an_altered_end_is_a_recording_that_is_not_what_its_machine_did() {
    let workplace = Workplace::new();
    let a = workplace.record("a.rr", "hello", "", &[]);
    let b = workplace.altered("b.rr", &a, |records| {
        let Some(Event::End { final_digest: Some(digest), .. }) =
            records.last_mut().map(|record| &mut record.event)
        else {
            panic!("it has an end");
        };
        digest[0] ^= 1;
    });
    let ran = reprise(&["diff", text(&a), text(&b)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for part in
        ["the same machine", "at least one recording is not what its machine did", "second replay"]
    {
        assert!(ran.stdout.contains(part), "no {part:?} in {}", ran.stdout);
    }
}

#[test]
fn a_broken_instruction_is_named_exactly_wherever_it_is() {
    let workplace = Workplace::new();
    let file = workplace.record("a.rr", "ticks", "", &["--cmdline", "hz=2000 count=4 poll=100"]);
    let recording = open(&file);
    let last = last_tick(&recording);
    let spoil: fn(&mut CpuState) = |cpu| cpu.gpr[12] ^= 1 << 40;
    // Early, late, and somewhere between.
    for tick in [17, last / 3, last / 2 + 1, last - 50] {
        let compared = compare_with_broken(&recording, Wrong::Cpu { tick, change: spoil });
        let finding = compared.finding.as_ref().expect("they differ");
        assert_eq!((finding.instructions, finding.kind), (tick, Kind::Instruction), "{finding}");
        assert_eq!(finding.cpu.len(), 1, "{finding}");
        assert_eq!(finding.cpu[0].name, "R12", "{finding}");
        assert_eq!(cause(&compared), "engine", "{finding}");
        assert_eq!(compared.comparison.equal_until, tick);
        // What ran before, the instruction, and what follows.
        assert_eq!(finding.behind[0][0].number, tick, "{finding}");
        let before = finding.before.last().expect("it is listed");
        assert_eq!(before.number, tick - 1, "{finding}");
    }
}

#[test]
fn a_flag_that_is_left_undefined_is_told_from_one_that_is_not() {
    let workplace = Workplace::new();
    let file = workplace.record("a.rr", "echo", "x\rquit\r", &[]);
    let recording = open(&file);
    let flip: fn(&mut CpuState) = |cpu| cpu.rflags ^= AUXILIARY_FLAG;
    let undefined = [Mnemonic::And, Mnemonic::Test, Mnemonic::Xor, Mnemonic::Or];
    for (mnemonics, name) in [(&undefined[..], "undefined-flag"), (&[Mnemonic::Add][..], "engine")]
    {
        let tick = first_tick_of(&recording, 20, |found, _| mnemonics.contains(&found));
        let compared = compare_with_broken(&recording, Wrong::Cpu { tick, change: flip });
        let finding = compared.finding.as_ref().expect("they differ");
        assert_eq!(finding.instructions, tick, "{finding}");
        assert_eq!(finding.cpu[0].name, "RFLAGS", "{finding}");
        assert_eq!(cause(&compared), name, "{finding}");
    }
}

/// Where a page-directory entry of the embedded guests lies that maps what nobody accesses: its tables
/// begin at CR3, and the third of them maps 2 MiB a piece.
fn unused_entry(recording: &Replayable) -> u64 {
    let mut machine = recording.soft_machine(Start::Run).expect("a machine");
    assert!(machine.advance_to(500).expect("it runs").is_none());
    let mut table = machine.engine().cpu_state().expect("a state").cr3 & !0xfff;
    let entry_at = |machine: &mut reprise_machine::machine::Machine<_, _>, at: u64| {
        let machine: &mut reprise_machine::machine::Machine<
            RecordedClock,
            reprise_machine::inputs::Replaying,
        > = machine;
        let mut word = [0; 8];
        machine.engine().read_ram(at, &mut word);
        u64::from_le_bytes(word)
    };
    for _ in 0..2 {
        table = entry_at(&mut machine, table) & 0x000f_ffff_ffff_f000;
    }
    let places = (0..512).map(|index| table + index * 8);
    let mut unused = places.filter(|at| entry_at(&mut machine, *at) & 0x21 == 1);
    unused.next().expect("an entry that is present and was not accessed")
}

#[test]
fn an_accessed_bit_is_told_with_its_entry() {
    let workplace = Workplace::new();
    let file = workplace.record("a.rr", "echo", "x\rquit\r", &[]);
    let recording = open(&file);
    let address = unused_entry(&recording);
    let wrong = Wrong::Memory { tick: 1000, address, bits: 0x20 };
    let compared = compare_with_broken(&recording, wrong);
    let finding = compared.finding.as_ref().expect("they differ");
    assert_eq!((finding.instructions, finding.pages), (1000, 1), "{finding}");
    assert_eq!(finding.memory[0].address, address, "{finding}");
    assert_eq!(cause(&compared), "accessed-bit", "{finding}");
    let entry = finding.memory[0].table.as_ref().expect("a page table");
    assert_eq!((entry.a ^ entry.b, entry.level), (0x20, 2), "{finding}");
}

#[test]
fn a_checkpoint_with_another_accessed_bit_is_found() {
    let workplace = Workplace::new();
    let typed = "one\rtwo\rthree\rquit\r";
    let file = workplace.record("a.rr", "echo", typed, &["--checkpoint-every", "2000"]);
    let recording = open(&file);
    let address = unused_entry(&recording);
    assert!(recording.checkpoints().len() >= 2, "{:?}", recording.checkpoints());
    let tick = recording.checkpoints()[1].moment.tick;
    workplace.alter_checkpoint(&file, 1, (address, 0x20));
    let ran = reprise(&["--json", "replay", "--bisect", text(&file)]);
    let report = ran.json();
    let narrowed = &report["bisection"];
    let checked = narrowed["checkpoints"].as_array().expect("a list");
    assert_eq!(checked[0]["differs_in"], serde_json::Value::Null, "{narrowed:#}");
    assert_eq!((&checked[1]["tick"], &checked[1]["differs_in"]), (&tick.into(), &"RAM".into()));
    let memory = &narrowed["at_checkpoint"]["memory"][0];
    assert_eq!(memory["address"], address, "{narrowed:#}");
    let causes: Vec<&str> = narrowed["causes"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|cause| cause["name"].as_str())
        .collect();
    assert!(
        causes.contains(&"checkpoint-altered") && causes.contains(&"accessed-bit"),
        "{causes:?}"
    );
}

#[test]
fn shut_interrupts_are_told_before_one_stays_out() {
    let workplace = Workplace::new();
    let file = workplace.record("a.rr", "ticks", "", &["--cmdline", "hz=2000 count=4 poll=100"]);
    let recording = open(&file);
    // Interrupts stay shut behind some instruction of the loop: the next one is not taken.
    let shut: fn(&mut CpuState) = |cpu| cpu.rflags &= !(1 << 9);
    let tick = last_tick(&recording) / 2;
    let compared = compare_with_broken(&recording, Wrong::Cpu { tick, change: shut });
    let finding = compared.finding.as_ref().expect("they differ");
    assert_eq!((finding.kind, finding.instructions), (Kind::Instruction, tick), "{finding}");
    assert_eq!(finding.cpu[0].name, "RFLAGS", "{finding}");
}

#[test]
fn both_ways_of_executing_are_alike() {
    let workplace = Workplace::new();
    let file = workplace.record("a.rr", "ticks", "", &["--cmdline", "hz=2000 count=4 poll=100"]);
    let recording = open(&file);
    let sides = [
        Side::soft("translated", &recording, Translation::default()),
        Side::soft("interpreted", &recording, Translation::Never),
    ];
    let until = last_tick(&recording) + 1;
    let compared = compare(&sides, &question(until), &mut Unwatched).expect("it runs");
    assert!(compared.finding.is_none(), "{}", compared.finding.expect("checked"));
    assert!(compared.comparison.endings.iter().all(Option::is_some), "{:?}", compared.comparison);
    assert!(compared.comparison.times > 60, "{:?}", compared.comparison);
}

/// Asks to stop at once.
struct Impatient;

impl Watch for Impatient {
    fn progress(&mut self, _side: usize, _tick: u64, _until: u64) {}

    fn is_stopped(&self) -> bool {
        true
    }
}

#[test]
fn a_search_that_is_stopped_says_how_far_it_came() {
    let workplace = Workplace::new();
    let recording = open(&workplace.record("a.rr", "hello", "", &[]));
    let sides = [(); 2].map(|()| Side::soft("one", &recording, Translation::default()));
    let stopped = compare(&sides, &question(100), &mut Impatient).expect_err("it is stopped");
    assert!(matches!(stopped, BisectError::Stopped { equal_until: 0 }), "{stopped}");
}

#[test]
fn other_guests_and_the_same_recording_are_one_line() {
    let workplace = Workplace::new();
    let hello = workplace.record("hello.rr", "hello", "", &[]);
    let echo = workplace.record("echo.rr", "echo", "quit\r", &[]);
    let copy = workplace.path("copy.rr");
    std::fs::copy(&hello, &copy).expect("a copy");
    let same = reprise(&["diff", text(&hello), text(&copy)]);
    assert_eq!((same.code, same.stdout.lines().count()), (0, 1), "{}", same.stdout);
    assert!(same.stdout.contains("identical"), "{}", same.stdout);
    let other = reprise(&["diff", text(&hello), text(&echo)]);
    assert_eq!(other.code, 0, "{}", other.stderr);
    assert!(other.stdout.contains("not the same machine or guest"), "{}", other.stdout);
    let report = reprise(&["--json", "diff", text(&hello), text(&echo)]).json();
    assert!(report["bisection"].is_null() && report["not_bisected"].is_string(), "{report:#}");
    let absent = reprise(&["diff", text(&hello), text(&workplace.path("absent.rr"))]);
    assert_eq!((absent.code, absent.stderr.lines().count()), (1, 1), "{}", absent.stderr);
}
