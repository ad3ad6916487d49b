//! One recording whose replay parts from it: what its digests alone can tell.

use iced_x86::Mnemonic;
use reprise_machine::engine::Engine;
use reprise_replay::Start;
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::{Event, Record};
use serde_json::Value;

use crate::recordings::{Workplace, open, reprise, text};
use crate::{AUXILIARY_FLAG, SIGN_FLAG, first_tick_of};

/// A mark that says what a replay of the recording is at a tick, with a change to the CPU.
fn mark_at(file: &std::path::Path, tick: u64, change: fn(&mut CpuState)) -> Record {
    let mut machine = open(file).soft_machine(Start::Run).expect("a machine");
    assert!(machine.advance_to(tick).expect("it runs").is_none());
    let mark = machine.surroundings().effects.mark();
    let mut cpu = machine.engine().cpu_state().expect("a state");
    let moment = machine.engine().moment().expect("a place");
    change(&mut cpu);
    Record { moment, cpu_digest: cpu.short_digest(), event: Event::Mark(mark) }
}

/// What narrowing says of a copy with such a mark in it.
fn narrowed_with(file: &std::path::Path, tick: u64, change: fn(&mut CpuState)) -> Value {
    let workplace = Workplace::new();
    let mark = mark_at(file, tick, change);
    let altered = workplace.altered("altered.rr", file, |records| {
        let place = records.partition_point(|record| record.moment.tick <= tick);
        records.insert(place, mark);
    });
    let ran = reprise(&["--json", "replay", "--bisect", text(&altered)]);
    assert_eq!(ran.code, 1, "{} {}", ran.stdout, ran.stderr);
    let shown = reprise(&["replay", "--bisect", text(&altered)]).stdout;
    for part in ["replay and recording part behind tick ", "\nlikely cause: ", "\nnext: ", "\n  > "]
    {
        assert!(shown.contains(part), "no {part:?} in\n{shown}");
    }
    ran.json()["bisection"].clone()
}

#[test]
fn a_flag_that_the_last_instruction_leaves_undefined_is_found_by_its_digest() {
    let workplace = Workplace::new();
    let file = workplace.record("a.rr", "echo", "x\rquit\r", &[]);
    let recording = open(&file);
    let undefined = [Mnemonic::And, Mnemonic::Test, Mnemonic::Xor, Mnemonic::Or];
    for (mnemonics, told) in [(&undefined[..], true), (&[Mnemonic::Add, Mnemonic::Cmp][..], false)]
    {
        let tick = first_tick_of(&recording, 20, |found, _| mnemonics.contains(&found));
        let narrowed = narrowed_with(&file, tick + 1, |cpu| cpu.rflags ^= AUXILIARY_FLAG);
        assert_eq!(narrowed["around"]["flags"], AUXILIARY_FLAG, "{narrowed:#}");
        let first = &narrowed["causes"][0];
        assert_eq!(first["name"] == "undefined-flag", told, "{narrowed:#}");
        let wanted = format!("at instruction {tick} leaves undefined");
        assert_eq!(first["text"].as_str().is_some_and(|text| text.contains(&wanted)), told);
    }
}

#[test]
fn a_defined_flag_beside_an_undefined_one_is_not_lawful() {
    let workplace = Workplace::new();
    let file = workplace.record("a.rr", "echo", "x\rquit\r", &[]);
    let tick = first_tick_of(&open(&file), 20, |found, _| found == Mnemonic::Xor);
    let both = AUXILIARY_FLAG | SIGN_FLAG;
    let narrowed = narrowed_with(&file, tick + 1, |cpu| cpu.rflags ^= AUXILIARY_FLAG | SIGN_FLAG);
    assert_eq!(narrowed["around"]["flags"], both, "{narrowed:#}");
    let causes = narrowed["causes"].as_array().expect("a list");
    assert!(causes.iter().all(|cause| cause["name"] != "undefined-flag"), "{narrowed:#}");
}

#[test]
fn a_register_that_is_not_as_recorded_has_no_such_explanation() {
    let workplace = Workplace::new();
    let file = workplace.record("a.rr", "echo", "x\rquit\r", &[]);
    let narrowed = narrowed_with(&file, 100, |cpu| cpu.gpr[12] ^= 1 << 40);
    let around = &narrowed["around"];
    assert!(around["flags"].is_null() && around["elsewhere"].is_null(), "{around:#}");
    assert_eq!(around["next"]["number"], 100, "{around:#}");
    assert_eq!(narrowed["causes"][0]["name"], "altered", "{narrowed:#}");
}
