//! What 64-bit code never meets: real mode's formats, 16-bit stacks and addresses, null segments in
//! 32-bit code, instructions that address memory implicitly where segments are checked, and the
//! parts of the architecture that this CPU leaves out.

mod guest;

use guest::{
    Ended, Guest, KERNEL_CODE, KERNEL_DATA, KERNEL_SS, KERNEL_STACK, LEVEL_3, NT, SPARE, TASK, TSS,
    USER_DATA, segment, system_descriptor,
};
use reprise_machine::engine::{Access, Engine, Exit};
use reprise_trace::cpu_state::{DS, ES, FS, GS, RAX, RBX, RCX, RDI, RDX, RSI, RSP, SS, Segment};

const GP: u8 = 13;
/// Where a PC has video memory: nobody answers there.
const HOLE: u64 = 0xa_0000;
const CR0_PE: u64 = 1;
const IF: u64 = 1 << 9;
const VM: u64 = 1 << 17;

#[test]
fn pusha_onto_a_device_goes_on_where_it_was() {
    let mut engine = Guest::protected()
        .code(&[0x60, 0xf4])
        .with(|guest| {
            for register in 0..8 {
                guest.state.gpr[register] = 0x1111 * (register as u64 + 1);
            }
            guest.state.gpr[RSP] = HOLE + 12;
        })
        .engine();
    for place in 0..3 {
        let expected = Access::MmioWrite {
            address: HOLE + 8 - 4 * place,
            size: 4,
            value: 0x1111 * (u128::from(place) + 1),
        };
        assert_eq!(engine.run(10).expect("runs"), Exit::Access(expected), "push {place}");
        assert_eq!(engine.cpu_state().expect("state").gpr[RSP], HOLE + 12);
        engine.finish_access(0).expect("finishes");
    }
    assert_eq!(engine.run(10).expect("runs"), Exit::Halt);
    assert_eq!((engine.tick(), engine.cpu_state().expect("state").gpr[RSP]), (2, HOLE - 20));
    let mut pushed = [0; 8];
    engine.read_ram(HOLE - 8, &mut pushed);
    assert_eq!(u64::from_le_bytes(pushed), 0x4444 << 32 | (HOLE + 12));
}

/// A 16-bit stack of 64 KiB at the user's data.
fn narrow_stack() -> Segment {
    Segment { selector: KERNEL_SS, attributes: 0x93, limit: 0xffff, base: USER_DATA }
}

#[test]
fn pusha_wraps_with_its_stack() {
    let ended = Guest::protected()
        .code(&[0x66, 0x60])
        .with(|guest| {
            guest.state.segments[SS] = narrow_stack();
            guest.state.gpr[RAX] = 0x1234;
            guest.state.gpr[RDI] = 0x5678;
            guest.state.gpr[RSP] = 8;
        })
        .run_instructions(1);
    assert_eq!((ended.exit.clone(), ended.state.gpr[RSP]), (Exit::TickReached, 0xfff8));
    assert_eq!(ended.u64(USER_DATA + 6) & 0xffff, 0x1234);
    assert_eq!(ended.u64(USER_DATA + 0xfff8) & 0xffff, 0x5678);
}

#[test]
fn string_indices_wrap_amid_a_page() {
    // rep movsb es:[di], fs:[si]; hlt, with 16-bit addresses
    const BASE: u64 = 0x2_0800;
    let ended = Guest::protected()
        .code(&[0xf3, 0x64, 0x67, 0xa4, 0xf4])
        .with(|guest| {
            guest.state.segments[FS].base = BASE;
            guest.write(BASE, &[5, 6, 7, 8]);
            guest.write(BASE + 0xfffc, &[1, 2, 3, 4, 0xee, 0xee, 0xee, 0xee]);
            guest.state.gpr[RSI] = 0xfffc;
            guest.state.gpr[RDI] = 0x8800;
            guest.state.gpr[RCX] = 8;
        })
        .run();
    assert_eq!(ended.u64(0x8800).to_le_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(ended.state.gpr[RSI], 4);
}

/// Runs one instruction at level 3 in 32-bit code, with `index` replaced by `loaded`.
fn with_segment(code: &[u8], index: usize, loaded: Segment, change: fn(&mut Guest)) -> Ended {
    Guest::protected()
        .user()
        .code(code)
        .with(|guest| {
            guest.state.segments[index] = loaded;
            guest.write(USER_DATA, &[0x5a; 64]);
            for register in [RBX, RSI, RDI] {
                guest.state.gpr[register] = USER_DATA;
            }
            guest.state.gpr[RCX] = 1;
            guest.state.gpr[RDX] = 1;
            change(guest);
        })
        .run_instructions(1)
}

#[test]
fn null_segments_are_refused_where_they_are_named() {
    let null = Segment::default();
    let cases: [(&str, &[u8], usize, bool); 14] = [
        ("mov eax, fs:[ebx]", &[0x64, 0x8b, 0x03], FS, false),
        ("mov eax, [ebx]", &[0x8b, 0x03], FS, true),
        ("add fs:[ebx], eax", &[0x64, 0x01, 0x03], FS, false),
        ("add gs:[ebx], eax", &[0x65, 0x01, 0x03], FS, true),
        ("push gs:[ebx]", &[0x65, 0xff, 0x33], GS, false),
        ("pop gs:[ebx]", &[0x65, 0x8f, 0x03], GS, false),
        ("call gs:[ebx]", &[0x65, 0xff, 0x13], GS, false),
        ("mov eax, [ebx] without DS", &[0x8b, 0x03], DS, false),
        ("mov eax, [esp] without DS", &[0x8b, 0x04, 0x24], DS, true),
        ("lodsb fs:", &[0x64, 0xac], FS, false),
        ("rep movsb from fs:", &[0xf3, 0x64, 0xa4], FS, false),
        ("stosb without DS", &[0xaa], DS, true),
        ("xlat without DS", &[0xd7], DS, false),
        ("bts fs:[ebx], edx", &[0x64, 0x0f, 0xab, 0x13], FS, false),
    ];
    for (name, code, index, allowed) in cases {
        let ended = with_segment(code, index, null, |_| ());
        if allowed {
            assert_eq!(ended.exit, Exit::TickReached, "{name}");
            assert_eq!(ended.state.cpl(), 3, "{name}");
        } else {
            assert_eq!(ended.fault(), (GP, Some(0)), "{name}");
            assert_eq!(ended.state.gpr[RCX], 1, "{name}: nothing has moved");
        }
    }
}

#[test]
fn null_segments_take_effect_and_end_at_once() {
    // mov fs, eax; mov ecx, fs:[ebx]: first with a selector, then with null.
    for (selector, faults) in [(u64::from(KERNEL_SS), false), (0, true), (3, true)] {
        let ended = Guest::protected()
            .code(&[0x8e, 0xe0, 0x64, 0x8b, 0x0b, 0xf4])
            .with(|guest| {
                guest.state.segments[FS] = Segment::default();
                guest.state.gpr[RAX] = selector;
                guest.state.gpr[RBX] = KERNEL_DATA;
                guest.write(KERNEL_DATA, &7u32.to_le_bytes());
            })
            .run();
        match faults {
            true => assert_eq!(ended.fault(), (GP, Some(0))),
            false => assert_eq!(ended.state.gpr[RCX], 7),
        }
    }
}

#[test]
fn implicit_operands_are_checked_where_they_lie() {
    // A data segment from 4 KiB up, and one of 4 KiB, at the user's data.
    let up = segment(SPARE | 3, 0x0040_9704_8000_0fff | LEVEL_3);
    let small = segment(SPARE | 3, 0x0040_9304_8000_0fff | LEVEL_3);
    type Change = fn(&mut Guest);
    let cases: [(&str, &[u8], usize, Segment, Change, bool); 9] = [
        ("lodsb above", &[0xac], DS, up, |guest| guest.state.gpr[RSI] = 0x1000, true),
        ("lodsb below", &[0xac], DS, up, |guest| guest.state.gpr[RSI] = 0xfff, false),
        (
            "rep stosb, no elements",
            &[0xf3, 0xaa],
            ES,
            small,
            |guest| {
                guest.state.gpr[RDI] = 0x1000;
                guest.state.gpr[RCX] = 0;
            },
            true,
        ),
        ("stosb beyond", &[0xaa], ES, small, |guest| guest.state.gpr[RDI] = 0x1000, false),
        (
            "xlat inside",
            &[0xd7],
            DS,
            small,
            |guest| {
                guest.state.gpr[RBX] = 0xff0;
                guest.state.gpr[RAX] = 0x1234_560f;
            },
            true,
        ),
        (
            "xlat beyond",
            &[0xd7],
            DS,
            small,
            |guest| {
                guest.state.gpr[RBX] = 0xff0;
                guest.state.gpr[RAX] = 0x10;
            },
            false,
        ),
        // bt [ebx], edx
        (
            "bit inside",
            &[0x0f, 0xa3, 0x13],
            DS,
            small,
            |guest| {
                guest.state.gpr[RBX] = 0x1100;
                guest.state.gpr[RDX] = 0u32.wrapping_sub(0x800 * 8).into();
            },
            true,
        ),
        (
            "bit beyond",
            &[0x0f, 0xa3, 0x13],
            DS,
            small,
            |guest| {
                guest.state.gpr[RBX] = 0;
                guest.state.gpr[RDX] = 0x8000;
            },
            false,
        ),
        (
            "bit below",
            &[0x0f, 0xa3, 0x13],
            DS,
            small,
            |guest| {
                guest.state.gpr[RBX] = 0;
                guest.state.gpr[RDX] = 0xffff_ffff;
            },
            false,
        ),
    ];
    for (name, code, index, loaded, change, allowed) in cases {
        let ended = with_segment(code, index, loaded, change);
        if allowed {
            assert_eq!((ended.exit.clone(), ended.state.cpl()), (Exit::TickReached, 3), "{name}");
        } else {
            assert_eq!(ended.fault(), (GP, Some(0)), "{name}");
        }
    }
}

/// The reason why the run ended.
fn unsupported(ended: &Ended) -> &str {
    match &ended.exit {
        Exit::Unsupported(reason) => reason,
        exit => panic!("{exit:?} at {:#x}", ended.state.rip),
    }
}

#[test]
fn task_switches_and_virtual_8086_mode_end_with_a_reason() {
    let task_gate = u64::from(TASK) << 16 | 0x85 << 40;
    type Change = fn(&mut Guest);
    let cases: [(&str, &[u8], Change); 5] = [
        // jmp far SPARE:0 and call far [ebx]
        ("jump to a TSS", &[0xea, 0, 0, 0, 0, SPARE as u8, 0], |guest| {
            guest.descriptor(SPARE, system_descriptor(TSS, 0x67, 0x89));
        }),
        ("call through a task gate", &[0x9a, 0, 0, 0, 0, SPARE as u8 + 8, 0], |_| ()),
        ("INT through a task gate", &[0xcd, 0x40], |_| ()),
        ("IRET to another task", &[0xcf], |guest| guest.state.rflags |= NT),
        ("IRET to virtual-8086 mode", &[0xcf], |guest| {
            let image = [0x100u32, 0x1000, VM as u32 | 2, 0, 0, 0, 0, 0, 0];
            for (index, value) in image.iter().enumerate() {
                guest.write(KERNEL_STACK - 64 + 4 * index as u64, &value.to_le_bytes());
            }
            guest.state.gpr[RSP] = KERNEL_STACK - 64;
        }),
    ];
    for (name, code, change) in cases {
        let ended = Guest::protected()
            .code(code)
            .with(|guest| {
                guest.descriptor(SPARE + 8, task_gate);
                guest.write(guest::IDT + 8 * 0x40, &task_gate.to_le_bytes());
                change(guest);
            })
            .run();
        let reason = unsupported(&ended);
        assert!(reason.contains("run a guest that does not"), "{name}: {reason}");
        assert!(!reason.contains('\n'), "{name}");
        assert_eq!((ended.state.rip, ended.engine.tick()), (KERNEL_CODE, 0), "{name}");
    }
}

#[test]
fn an_interrupt_through_a_task_gate_ends_with_a_reason() {
    let task_gate = u64::from(TASK) << 16 | 0x85 << 40;
    let mut engine = Guest::protected()
        .code(&[0x90])
        .with(|guest| {
            guest.write(guest::IDT + 8 * 0x40, &task_gate.to_le_bytes());
            guest.state.rflags |= IF;
        })
        .engine();
    engine.inject(0x40).expect("injects");
    let exit = engine.run(10).expect("runs");
    assert!(matches!(&exit, Exit::Unsupported(reason) if reason.contains("task")), "{exit:?}");
}

#[test]
fn task_switches_are_checked_before_they_are_refused() {
    let tss = system_descriptor(TSS, 0x67, 0x89);
    for (name, raw, selector, raises) in [
        ("busy", tss | 1 << 41, SPARE, (GP, SPARE)),
        ("not present", tss & !(1 << 47), SPARE, (11, SPARE)),
        ("privileged", tss, SPARE | 3, (GP, SPARE)),
    ] {
        let ended = Guest::protected()
            .code(&[0xff, 0x2b])
            .with(|guest| {
                guest.descriptor(SPARE, raw);
                guest.write(KERNEL_DATA + 4, &selector.to_le_bytes());
                guest.state.gpr[RBX] = KERNEL_DATA;
            })
            .run();
        assert_eq!(ended.fault(), (raises.0, Some(raises.1.into())), "{name}");
    }
}

/// Real mode with 32-bit code and flat segments, as firmware makes it.
fn real() -> Guest {
    Guest::protected().with(|guest| guest.state.cr0 &= !CR0_PE)
}

#[test]
fn the_x87_environment_has_another_format_in_real_mode() {
    // fld dword [ebx]; fnstenv [ecx] (or its 16-bit form); hlt
    for (code, expected) in [
        (&[0xd9, 0x03, 0xd9, 0x31, 0xf4][..], &[0xffff_0000, 0x1000, 0xffff_a000, 0x1000][..]),
        (&[0xd9, 0x03, 0x66, 0xd9, 0x31, 0xf4], &[0x1000_0000, 0x1000_a000]),
    ] {
        let narrow = expected.len() == 2;
        let ended = real()
            .code(code)
            .with(|guest| {
                guest.state.gpr[RBX] = KERNEL_DATA;
                guest.state.gpr[RCX] = KERNEL_DATA + 0x100;
            })
            .run();
        assert_eq!(ended.exit, Exit::Halt);
        let pointers = KERNEL_DATA + 0x100 + if narrow { 6 } else { 12 };
        for (index, &word) in expected.iter().enumerate() {
            let stored = ended.u64(pointers + 4 * index as u64) as u32;
            assert_eq!(stored, word, "{narrow} {index}: {stored:#x}");
        }
    }
}

#[test]
fn x87_pointers_come_back_from_real_mode_formats() {
    const FIP: u64 = 0x1_2345;
    const FDP: u64 = 0xa_bcde;
    const FOP: u64 = 0x5a5;
    let wide =
        [0x37f, 0, 0xffff, FIP & 0xffff, FIP >> 16 << 12 | FOP, FDP & 0xffff, FDP >> 16 << 12];
    // fldenv [ebx], its 16-bit form; frstor [ebx], its 16-bit form
    let cases: [(&[u8], usize); 4] = [
        (&[0xd9, 0x23, 0xf4], 4),
        (&[0x66, 0xd9, 0x23, 0xf4], 2),
        (&[0xdd, 0x23, 0xf4], 4),
        (&[0x66, 0xdd, 0x23, 0xf4], 2),
    ];
    for (code, bytes) in cases {
        let fpu = real()
            .code(code)
            .with(|guest| {
                for (index, word) in wide.iter().enumerate() {
                    let at = KERNEL_DATA + (bytes * index) as u64;
                    guest.write(at, &word.to_le_bytes()[..bytes]);
                }
                guest.state.gpr[RBX] = KERNEL_DATA;
            })
            .run()
            .state
            .fpu;
        assert_eq!((fpu.fip, fpu.fdp, u64::from(fpu.fop)), (FIP, FDP, FOP), "{code:x?}");
    }
    // fnsave [ecx]; frstor [ecx]; hlt
    let mut guest = real().code(&[0xdd, 0x31, 0xdd, 0x21, 0xf4]);
    guest.state.gpr[RCX] = KERNEL_DATA;
    (guest.state.fpu.fip, guest.state.fpu.fdp, guest.state.fpu.fop) = (FIP, FDP, FOP as u16);
    let fpu = guest.run().state.fpu;
    assert_eq!((fpu.fip, fpu.fdp, u64::from(fpu.fop)), (FIP, FDP, FOP));
}
