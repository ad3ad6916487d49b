//! A software CPU that goes on from a saved state does what the one would have done that saved it,
//! down to translations that page tables no longer give.

mod guest;

use guest::{ACCESSED, DIRTY, Guest, PRESENT, USER, USER_DATA, WRITABLE};
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::translate::Translation;
use reprise_machine::engine::{Engine, Exit};
use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::{EngineState, HiddenState};
use reprise_trace::cpu_state::{RAX, RBX, RCX, RDI, RDX, RSI};

const RAM_MIB: u64 = 4;
/// The page whose translation goes stale, and where its page-table entry lies.
const STALE: u64 = USER_DATA;
const STALE_ENTRY: u64 = 0x4000 + STALE / 0x1000 * 8;
/// Where the page is moved to.
const MOVED: u64 = USER_DATA + 0x3000;

/// Reads the page at RBX; gives it another place in its page-table entry (at RDI, to be RDX) without a
/// flush; reads it, writes it, calls into it and reads the entry again.
const CODE: &[u8] = &[
    0x48, 0x8b, 0x03, // mov rax, [rbx]
    0x48, 0x89, 0x43, 0x10, // mov [rbx+16], rax
    0xff, 0xd3, // call rbx
    0x48, 0x89, 0x17, // mov [rdi], rdx
    0x90, // nop
    0x48, 0x8b, 0x33, // mov rsi, [rbx]
    0x48, 0xff, 0x43, 0x10, // inc qword [rbx+16]
    0xff, 0xd3, // call rbx
    0x48, 0x8b, 0x0f, // mov rcx, [rdi]
    0xf4, // hlt
];
/// Instructions of `CODE` and of the two calls.
const INSTRUCTIONS: u64 = 14;

/// At both places of the page: a number whose first bytes are `inc r8` or `inc r9`, and `ret`.
fn stale_guest() -> Guest {
    Guest::long().code(CODE).with(|guest| {
        guest.write(STALE, &[0x49, 0xff, 0xc0, 0xc3, 0x11, 0x11, 0x11, 0x11]);
        guest.write(MOVED, &[0x49, 0xff, 0xc1, 0xc3, 0x22, 0x22, 0x22, 0x22]);
        guest.state.gpr[RBX] = STALE;
        guest.state.gpr[RDI] = STALE_ENTRY;
        guest.state.gpr[RDX] = MOVED | PRESENT | WRITABLE | USER;
    })
}

/// Another engine in the same state, with RAM of its own.
fn moved(engine: &mut SoftEngine, change: impl FnOnce(&mut EngineState)) -> SoftEngine {
    let saved = engine.save().expect("saves").expect("stands between instructions");
    let mut state = saved.clone();
    change(&mut state);
    let mut ram = GuestRam::new(RAM_MIB).expect("RAM");
    engine.visit_ram(&mut |address, bytes| assert!(ram.place(address, bytes)));
    let mut other = SoftEngine::new(ram).expect("an engine");
    other.restore(&state).expect("takes the state");
    if state == saved {
        assert_eq!(other.save().expect("saves").expect("stands"), saved, "what was saved is there");
    }
    other
}

fn ram_of(engine: &SoftEngine) -> Vec<(u64, Vec<u8>)> {
    let mut pages = Vec::new();
    engine.visit_ram(&mut |address, bytes| {
        for (address, page) in (address..).step_by(4096).zip(bytes.chunks(4096)) {
            if page.iter().any(|byte| *byte != 0) {
                pages.push((address, page.to_vec()));
            }
        }
    });
    pages
}

#[test]
fn a_stale_translation_outlives_a_move_at_any_instruction() {
    for translation in [Translation::Never, Translation::AtOnce] {
        let start = || {
            let mut engine = stale_guest().engine();
            engine.set_translation(translation);
            engine
        };
        let mut straight = start();
        assert_eq!(straight.run(1000).expect("runs"), Exit::Halt);
        let end = straight.save().expect("saves").expect("stands");
        let gpr = &end.cpu.gpr;
        assert_eq!((gpr[8], gpr[9]), (2, 0), "both calls went to where the page was");
        assert_eq!(gpr[RSI], gpr[RAX], "and so did the second read");
        assert_eq!(gpr[RCX] & (ACCESSED | DIRTY), 0, "no walk has set the new entry's bits");
        assert_eq!(straight.tick(), INSTRUCTIONS);
        for tick in 0..INSTRUCTIONS {
            let mut engine = start();
            engine.run(tick).expect("runs");
            let mut other = moved(&mut engine, |_| ());
            other.set_translation(translation);
            assert_eq!(other.run(1000).expect("runs"), Exit::Halt, "moved at {tick}");
            assert_eq!(other.save().expect("saves").expect("stands"), end, "moved at {tick}");
            assert!(ram_of(&other) == ram_of(&straight), "RAM, moved at {tick}");
        }
    }
}

#[test]
fn without_its_translations_the_guest_would_tell() {
    let mut engine = stale_guest().engine();
    engine.run(8).expect("runs");
    let mut other = moved(&mut engine, |state| state.hidden = HiddenState::default());
    assert_eq!(other.run(1000).expect("runs"), Exit::Halt);
    let state = other.cpu_state().expect("state");
    assert_eq!((state.gpr[8], state.gpr[9]), (1, 1), "the second call went to the new place");
    assert_eq!(state.gpr[RCX] & ACCESSED, ACCESSED);
}

#[test]
fn a_forged_state_is_refused_in_one_line() {
    let mut engine = stale_guest().engine();
    engine.run(8).expect("runs");
    let saved = engine.save().expect("saves").expect("stands");
    let refuses = |state: &EngineState| {
        let mut other = stale_guest().engine();
        other.restore(state).err().map(|error| error.what)
    };
    let mut version = saved.clone();
    version.hidden.version += 1;
    assert!(refuses(&version).is_some_and(|what| what.contains("state version 2")));
    let bytes = &saved.hidden.bytes;
    for length in (0..bytes.len()).step_by(11) {
        let mut cut = saved.clone();
        cut.hidden.bytes.truncate(length);
        assert!(refuses(&cut).is_some_and(|what| what.contains("never reaches")), "{length}");
    }
    for at in 0..bytes.len() {
        let mut changed = saved.clone();
        changed.hidden.bytes[at] ^= 1 << (at * 3 % 8);
        let mut other = stale_guest().engine();
        // Taken or not: nothing of it may make the CPU fail.
        if other.restore(&changed).is_ok() {
            other.run(changed.tick + 100).expect("runs");
        }
    }
}

#[test]
fn a_capture_is_ram_as_it_was_whatever_the_guest_does_meanwhile() {
    let mut engine = stale_guest().engine();
    let mut copy = std::collections::BTreeMap::new();
    for tick in 0..INSTRUCTIONS {
        engine.run(tick).expect("runs");
        let then = ram_of(&engine);
        let mut shown = 0;
        let mut take = |address: u64, page: &[u8]| {
            shown += 1;
            if page.iter().all(|byte| *byte == 0) {
                copy.remove(&address);
            } else {
                copy.insert(address, page.to_vec());
            }
        };
        engine.start_capture(&mut take);
        // Half before and half after the guest has gone on, so that it writes what is still to come.
        engine.continue_capture(usize::from(tick % 2 == 0), &mut take);
        engine.run(tick + 1).expect("runs");
        while !engine.continue_capture(1, &mut take) {}
        assert!(tick == 0 || shown < 10, "{shown} pages at {tick}: only those that were written");
        let copied: Vec<_> = copy.iter().map(|(address, page)| (*address, page.clone())).collect();
        assert!(copied == then, "at {tick}");
    }
}
