//! A far transfer to another privilege level accesses more than one that stays, and another stack: a
//! trace has all of it.

mod guest;
mod traced;

use guest::{
    ENTRY, Guest, INNER_STACK, KERNEL_CS, KERNEL_STACK, SPARE, USER_CODE, USER_CS, USER_DATA,
    USER_SS, USER_STACK,
};
use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Engine, Exit};
use reprise_trace::cpu_state::{RBX, RSP};
use reprise_trace::instructions::Event;
use traced::{Item, Trace};

/// Where frames are popped from.
const FRAME: u64 = KERNEL_STACK - 0x100;

fn trace(guest: Guest, instructions: u64, translation: Translation) -> Trace {
    let mut engine = guest.engine();
    engine.set_translation(translation);
    let pending = traced::start(&mut engine);
    while engine.tick() < instructions {
        assert_eq!(engine.run(instructions).expect("it runs"), Exit::TickReached);
    }
    pending.finish(&mut engine)
}

/// Of each run: privilege level, how many instructions retired, and addresses.
fn runs(trace: &Trace) -> Vec<(u8, usize, Vec<u64>)> {
    let runs = trace.items.iter().filter_map(|item| match item {
        Item::Run { cpl, retired, addresses, physical, .. } => {
            // Memory is mapped to itself, or not at all.
            assert_eq!(addresses, physical);
            Some((*cpl, *retired, addresses.clone()))
        }
        Item::Event(_) => None,
    });
    runs.collect()
}

fn words(values: &[u64], size: usize) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()[..size].to_vec()).collect()
}

fn four(start: u64) -> impl Iterator<Item = u64> {
    (start..).step_by(4)
}

/// An IRETD of 32-bit code, behind a NOP or not, to a code segment.
fn iretd(code: &[u8], selector: u16) -> Trace {
    let image = [USER_CODE, selector.into(), 2, USER_STACK, USER_SS.into()];
    let guest = Guest::protected().code(code).with(|guest| {
        guest.write(FRAME, &words(&image, 4));
        guest.state.gpr[RSP] = FRAME;
    });
    trace(guest, code.len() as u64, Translation::AtOnce)
}

#[test]
fn iretd_to_users_pops_five_values() {
    let five: Vec<u64> = four(FRAME).take(5).collect();
    let behind = iretd(&[0x90, 0xcf], USER_CS);
    assert_eq!(runs(&behind), [(0, 1, vec![]), (0, 1, five.clone())]);
    let returned = Item::Event(Event::Return { address: USER_CODE });
    let is_marker = |item: &&Item| matches!(item, Item::Event(Event::Marker(_)));
    let last = behind.items.iter().rev().find(|item| !is_marker(item));
    assert_eq!(last, Some(&returned), "it stands behind its run");
    assert_eq!(runs(&iretd(&[0xcf], USER_CS)), [(0, 1, five)]);
    let three = four(FRAME).take(3).collect();
    assert_eq!(runs(&iretd(&[0x90, 0xcf], KERNEL_CS)), [(0, 2, three)]);
}

/// CALL FAR [RBX], through a gate.
const CALL: &[u8] = &[0xff, 0x1b];

#[test]
fn a_call_through_a_gate_of_32_bits_pushes_its_frame_on_the_inner_stack() {
    let guest = Guest::protected().user().code(CALL).with(|guest| {
        let rights = 0xec;
        let parameters = 1;
        let gate = ENTRY & 0xffff
            | u64::from(KERNEL_CS) << 16
            | parameters << 32
            | rights << 40
            | (ENTRY >> 16) << 48;
        guest.descriptor(SPARE, gate);
        guest.write(USER_DATA + 4, &(SPARE | 3).to_le_bytes());
        guest.write(ENTRY, &[0xca, 4, 0]); // retf 4
        guest.state.gpr[RBX] = USER_DATA;
        guest.state.gpr[RSP] = USER_STACK - 0x40;
    });
    let trace = trace(guest, 2, Translation::AtOnce);
    let mut called = vec![USER_DATA, USER_STACK - 0x40];
    called.extend(four(INNER_STACK - 20).take(5).collect::<Vec<_>>().iter().rev());
    let returned = [20, 16, 8, 4].map(|below| INNER_STACK - below).to_vec();
    assert_eq!(runs(&trace), [(3, 1, called), (0, 1, returned)]);
}

#[test]
fn a_call_through_a_gate_of_64_bits_and_its_return_have_all_accesses() {
    for translation in [Translation::Never, Translation::AtOnce] {
        let guest = Guest::long().user().code(&[0x90]).code(CALL).with(|guest| {
            let gate = ENTRY & 0xffff | u64::from(KERNEL_CS) << 16 | 0xec << 40;
            guest.descriptor(SPARE, gate | (ENTRY >> 16 & 0xffff) << 48);
            guest.descriptor(SPARE + 8, ENTRY >> 32);
            guest.write(USER_DATA + 4, &SPARE.to_le_bytes());
            guest.write(ENTRY, &[0x48, 0xcb]); // retfq
            guest.state.gpr[RBX] = USER_DATA;
        });
        let trace = trace(guest, 3, translation);
        let frame = [8, 16, 24, 32].map(|below| INNER_STACK - below);
        let called = [&[USER_DATA][..], &frame].concat();
        let returned = frame.into_iter().rev().collect();
        let expected = [(3, 1, vec![]), (3, 1, called), (0, 1, returned)];
        assert_eq!(runs(&trace), expected, "{translation:?}");
    }
}
