//! Segmentation in 32-bit protected mode: loading segment registers, limits and rights of accesses,
//! descriptor tables, and what looks at descriptors. Also what 64-bit mode keeps of it.

mod guest;

use guest::{
    CODE_32, DATA, ENTRY, GDT, Guest, INNER_STACK, KERNEL_CS, KERNEL_DATA, KERNEL_SS, KERNEL_STACK,
    LDT, LEVEL_3, LOCAL, SPARE, TASK, USER_CODE, USER_CS, USER_DATA, USER_SS, USER_STACK, segment,
    system_descriptor,
};
use reprise_machine::engine::Exit;
use reprise_trace::cpu_state::{CS, DS, ES, FS, GS, RAX, RBX, RCX, RDX, RSI, RSP, SS, Segment};

const BR: u8 = 5;
const OF: u8 = 4;
const NP: u8 = 11;
const STACK: u8 = 12;
const GP: u8 = 13;
const PRESENT: u64 = 1 << 47;
const LEVEL_1: u64 = 1 << 45;
const CONFORMING: u64 = 1 << 42;
const READABLE: u64 = 1 << 41;
const WRITABLE: u64 = 1 << 41;
const EXPAND_DOWN: u64 = 1 << 42;
const ACCESSED: u64 = 1 << 40;
const BIG: u64 = 1 << 54;

/// A data segment of 4 KiB at the user's data, writable.
const SMALL: u64 = 0x0040_9304_8000_0fff;

/// A descriptor loaded into a segment register, and what comes of it.
type Load = (&'static str, u8, u64, u16, Result<(), (u8, u16)>);

/// Runs `code`, which loads the selector in EAX.
fn load(level: u8, code: &[u8], raw: u64, selector: u16) -> guest::Ended {
    let guest = if level == 0 { Guest::protected() } else { Guest::protected().user() };
    guest
        .code(code)
        .with(|guest| {
            guest.descriptor(SPARE, raw);
            guest.state.gpr[RAX] = selector.into();
        })
        .run_instructions(1)
}

fn check_loads(code: &[u8], index: usize, cases: &[Load]) {
    for &(name, level, raw, selector, result) in cases {
        let ended = load(level, code, raw, selector);
        match result {
            Ok(()) => {
                assert_eq!(ended.exit, Exit::TickReached, "{name}");
                let loaded = ended.state.segments[index];
                if selector & !3 == 0 {
                    assert_eq!(loaded, Segment { selector, ..Segment::default() }, "{name}");
                } else {
                    assert_eq!(loaded, segment(selector, raw | ACCESSED), "{name}");
                    let descriptor = ended.u64(GDT + u64::from(selector & !7));
                    assert_eq!(descriptor, raw | ACCESSED, "{name}: accessed bit");
                }
            }
            Err((vector, code)) => {
                assert_eq!(ended.fault(), (vector, Some(code.into())), "{name}");
            }
        }
    }
}

#[test]
fn data_segments_are_checked_when_loaded() {
    let readable = CODE_32 & !ACCESSED;
    #[rustfmt::skip]
    let cases: &[Load] = &[
        ("data", 0, DATA & !ACCESSED, SPARE, Ok(())),
        ("read-only data", 0, DATA & !WRITABLE, SPARE, Ok(())),
        ("small data with a base", 0, SMALL, SPARE, Ok(())),
        ("null", 0, 0, 0, Ok(())),
        ("null with a privilege level", 3, 0, 3, Ok(())),
        ("readable code", 0, readable, SPARE, Ok(())),
        ("execute-only code", 0, readable & !READABLE, SPARE, Err((GP, SPARE))),
        ("system segment", 0, system_descriptor(0, 0xff, 0x82), SPARE, Err((GP, SPARE))),
        ("beyond the table", 0, 0, 0x1000, Err((GP, 0x1000))),
        ("no LDT", 0, 0, 0x0c, Err((GP, 0x0c))),
        ("not present", 0, DATA & !PRESENT, SPARE, Err((NP, SPARE))),
        ("privileged data", 3, DATA, SPARE, Err((GP, SPARE))),
        ("data of level 1", 3, DATA | LEVEL_1, SPARE, Err((GP, SPARE))),
        ("user data", 3, DATA | LEVEL_3, SPARE | 3, Ok(())),
        ("user data by the kernel", 0, DATA | LEVEL_3, SPARE, Ok(())),
        ("RPL above DPL", 0, DATA, SPARE | 3, Err((GP, SPARE))),
        ("conforming code of level 0", 3, readable | CONFORMING, SPARE | 3, Ok(())),
        ("privileged code", 3, readable, SPARE | 3, Err((GP, SPARE))),
    ];
    check_loads(&[0x8e, 0xc0], ES, cases);
    check_loads(&[0x8e, 0xe8], GS, cases);
}

#[test]
fn the_stack_segment_is_checked_when_loaded() {
    #[rustfmt::skip]
    let cases: &[Load] = &[
        ("data", 0, DATA & !ACCESSED, SPARE, Ok(())),
        ("user data", 3, DATA | LEVEL_3, SPARE | 3, Ok(())),
        ("null", 0, 0, 0, Err((GP, 0))),
        ("read-only data", 0, DATA & !WRITABLE, SPARE, Err((GP, SPARE))),
        ("code", 0, CODE_32, SPARE, Err((GP, SPARE))),
        ("wrong RPL", 0, DATA, SPARE | 1, Err((GP, SPARE))),
        ("wrong level", 0, DATA | LEVEL_3, SPARE, Err((GP, SPARE))),
        ("not present", 0, DATA & !PRESENT, SPARE, Err((STACK, SPARE))),
        ("beyond the table", 0, 0, 0x1000, Err((GP, 0x1000))),
    ];
    check_loads(&[0x8e, 0xd0], SS, cases);
}

#[test]
fn accesses_respect_limits_and_rights() {
    let down = SMALL | EXPAND_DOWN;
    let small_code = SMALL & !(0xf << 40) | 0xa << 40;
    // (name, descriptor, offset, write, allowed); each access has four bytes.
    #[rustfmt::skip]
    let cases: &[(&str, u64, u64, bool, bool)] = &[
        ("last four bytes", SMALL, 0xffc, true, true),
        ("one byte beyond", SMALL, 0xffd, false, false),
        ("far beyond", SMALL, 0x8000_0000, false, false),
        ("wrapping", SMALL, 0xffff_fffe, false, false),
        ("read-only, read", SMALL & !WRITABLE, 0, false, true),
        ("read-only, written", SMALL & !WRITABLE, 0, true, false),
        ("code, read", small_code, 0, false, true),
        ("code, written", small_code, 0, true, false),
        ("expand-down, below", down, 0xfff, false, false),
        ("expand-down, first", down, 0x1000, true, true),
        ("expand-down, 64 KiB", down & !BIG, 0xfffc, true, true),
        ("expand-down, over 64 KiB", down & !BIG, 0xfffd, true, false),
        ("expand-down, big", down, 0x1_fffd, true, true),
        ("pages", DATA, 0x4_8000, true, true),
    ];
    for &(name, raw, offset, write, allowed) in cases {
        // mov es, eax; mov es:[ebx], ecx (or mov ecx, es:[ebx])
        let code = [0x8e, 0xc0, 0x26, if write { 0x89 } else { 0x8b }, 0x0b];
        let ended = Guest::protected()
            .code(&code)
            .with(|guest| {
                guest.descriptor(SPARE, raw);
                guest.state.gpr[RAX] = SPARE.into();
                guest.state.gpr[RBX] = offset;
                guest.state.gpr[RCX] = 0x1234_5678;
                if !write {
                    let base = segment(SPARE, raw).base;
                    if offset < 0x10_0000 {
                        guest.write(base + offset, &0x7654_3210u32.to_le_bytes());
                    }
                }
            })
            .run_instructions(2);
        if !allowed {
            assert_eq!(ended.fault(), (GP, Some(0)), "{name}");
            continue;
        }
        assert_eq!(ended.exit, Exit::TickReached, "{name}");
        if write {
            let base = segment(SPARE, raw).base;
            assert_eq!(ended.u64(base + offset) as u32, 0x1234_5678, "{name}");
        } else {
            assert_eq!(ended.state.gpr[RCX], 0x7654_3210, "{name}");
        }
    }
}

#[test]
fn null_and_stack_segments_have_their_own_faults() {
    // (code, register, descriptor for it, RSP, raises)
    let cases: [(&str, &[u8], Segment, usize, (u8, Option<u32>)); 5] = [
        ("null, read", &[0x64, 0x8b, 0x0b], Segment::default(), FS, (GP, Some(0))),
        ("null, written", &[0x64, 0x89, 0x0b], Segment::default(), FS, (GP, Some(0))),
        ("stack limit", &[0x36, 0x8b, 0x0b], segment(SPARE, SMALL), SS, (STACK, Some(0))),
        (
            "push below a segment",
            &[0x50],
            segment(SPARE, SMALL | EXPAND_DOWN),
            SS,
            (STACK, Some(0)),
        ),
        ("string", &[0xf3, 0xa4], Segment::default(), ES, (GP, Some(0))),
    ];
    for (name, code, loaded, index, raises) in cases {
        // The handler needs a good stack, so it runs one level further in.
        let ended = Guest::protected()
            .user()
            .code(code)
            .with(|guest| {
                guest.state.segments[index] = loaded;
                if index == SS {
                    guest.state.segments[SS].attributes |= 3 << 5;
                }
                guest.state.gpr[RSP] = 0x800;
                guest.state.gpr[RBX] = 0xfff;
                guest.state.gpr[RCX] = 1;
            })
            .run();
        assert_eq!(ended.fault(), raises, "{name}");
    }
}

#[test]
fn push_and_pop_of_segment_registers() {
    // push fs; pop gs: a 32-bit push writes 16 bits only.
    let ended = Guest::protected()
        .code(&[0x0f, 0xa0, 0x0f, 0xa9])
        .with(|guest| {
            guest.descriptor(SPARE, SMALL);
            guest.state.segments[FS] = segment(SPARE, SMALL);
            guest.write(KERNEL_STACK - 4, &[0xaa; 4]);
        })
        .run_instructions(2);
    assert_eq!(ended.state.segments[GS], segment(SPARE, SMALL));
    assert_eq!(ended.u64(KERNEL_STACK - 4) as u32, 0xaaaa_0000 | u32::from(SPARE));
    assert_eq!(ended.state.gpr[RSP], KERNEL_STACK);
    // A POP that faults leaves ESP.
    let ended = Guest::protected()
        .code(&[0x0f, 0xa9])
        .with(|guest| guest.write(KERNEL_STACK, &0x1000u32.to_le_bytes()))
        .run();
    assert_eq!(ended.fault(), (GP, Some(0x1000)));
    assert_eq!(ended.state.gpr[RSP], KERNEL_STACK - 16);
}

#[test]
fn far_pointers_load_register_and_segment_or_neither() {
    for selector in [SPARE, SPARE + 8] {
        let ended = Guest::protected()
            .code(&[0x0f, 0xb5, 0x13]) // lgs edx, [ebx]
            .with(|guest| {
                guest.descriptor(SPARE, SMALL);
                guest.write(KERNEL_DATA, &0x1234_5678u32.to_le_bytes());
                guest.write(KERNEL_DATA + 4, &selector.to_le_bytes());
                guest.state.gpr[RBX] = KERNEL_DATA;
            })
            .run_instructions(1);
        if selector == SPARE {
            assert_eq!(ended.state.gpr[RDX], 0x1234_5678);
            assert_eq!(ended.state.segments[GS], segment(SPARE, SMALL));
        } else {
            assert_eq!(ended.fault(), (GP, Some(selector.into())));
            assert_eq!(ended.state.gpr[RDX], 0);
        }
    }
}

#[test]
fn instructions_that_look_at_descriptors_tell_by_zf() {
    // verr ax; setz cl; verw ax; setz ch; hlt and lar ecx, eax; setz dl; lsl esi, eax; setz dh; hlt
    let verify = [0x0f, 0, 0xe0, 0x0f, 0x94, 0xc1, 0x0f, 0, 0xe8, 0x0f, 0x94, 0xc5, 0xf4];
    let inspect = [0x0f, 2, 0xc8, 0x0f, 0x94, 0xc2, 0x0f, 3, 0xf0, 0x0f, 0x94, 0xc6, 0xf4];
    // (name, descriptor, selector, readable, writable, visible to LAR, to LSL)
    #[rustfmt::skip]
    let cases: &[(&str, u64, u16, [bool; 4])] = &[
        ("data", DATA, SPARE, [true, true, true, true]),
        ("read-only data", DATA & !WRITABLE, SPARE, [true, false, true, true]),
        ("code", CODE_32, SPARE, [true, false, true, true]),
        ("execute-only code", CODE_32 & !READABLE, SPARE, [false, false, true, true]),
        ("data, RPL too high", DATA, SPARE | 3, [false; 4]),
        ("conforming code, any RPL", CODE_32 | CONFORMING, SPARE | 3, [true, false, true, true]),
        ("TSS", system_descriptor(0, 0xff, 0x89), SPARE, [false, false, true, true]),
        ("call gate", system_descriptor(0, 0xff, 0x8c), SPARE, [false, false, true, false]),
        ("interrupt gate", system_descriptor(0, 0xff, 0x8e), SPARE, [false; 4]),
        ("null", 0, 0, [false; 4]),
        ("beyond the table", 0, 0x1000, [false; 4]),
    ];
    for &(name, raw, selector, expected) in cases {
        let run = |code: &[u8]| {
            Guest::protected()
                .code(code)
                .with(|guest| {
                    guest.descriptor(SPARE, raw);
                    guest.state.gpr[RAX] = selector.into();
                    guest.state.gpr[RSI] = 0x7777;
                })
                .run()
                .state
        };
        let verified = run(&verify).gpr[RCX];
        let inspected = run(&inspect);
        let found = [
            verified & 1 != 0,
            verified & 0x100 != 0,
            inspected.gpr[RDX] & 1 != 0,
            inspected.gpr[RDX] & 0x100 != 0,
        ];
        assert_eq!(found, expected, "{name}");
        if expected[2] {
            assert_eq!(inspected.gpr[RCX], raw >> 32 & 0xf0_ff00, "{name}: LAR");
        }
        let limit = if expected[3] { u64::from(segment(0, raw).limit) } else { 0x7777 };
        assert_eq!(inspected.gpr[RSI], limit, "{name}: LSL");
    }
}

#[test]
fn arpl_raises_a_requested_level() {
    for (selector, caller, raised) in [(0x10u64, 3u64, true), (0x13, 3, false), (0x13, 0, false)] {
        let state = Guest::protected()
            .code(&[0x63, 0xc8, 0x0f, 0x94, 0xc2, 0xf4]) // arpl ax, cx; setz dl; hlt
            .with(|guest| {
                guest.state.gpr[RAX] = selector;
                guest.state.gpr[RCX] = caller;
            })
            .run()
            .state;
        let expected = if raised { selector | caller } else { selector };
        assert_eq!((state.gpr[RAX], state.gpr[RDX]), (expected, u64::from(raised)));
    }
}

#[test]
fn the_local_table_and_the_task_register() {
    // lldt ax; mov es, ecx; ltr dx
    let ended = Guest::protected()
        .code(&[0x0f, 0, 0xd0, 0x8e, 0xc1, 0x0f, 0, 0xda])
        .with(|guest| {
            guest.descriptor(0x0c, SMALL);
            guest.state.tr = Segment::default();
            guest.state.gpr[RAX] = LOCAL.into();
            guest.state.gpr[RCX] = 0x0c;
            guest.state.gpr[RDX] = TASK.into();
        })
        .run_instructions(3);
    let state = &ended.state;
    assert_eq!(state.ldtr, Segment { selector: LOCAL, attributes: 0x82, limit: 0xff, base: LDT });
    assert_eq!(state.segments[ES], segment(0x0c, SMALL));
    assert_eq!(
        state.tr,
        Segment { selector: TASK, attributes: 0x8b, limit: 0xfff, base: guest::TSS }
    );
    let busy = system_descriptor(guest::TSS, 0xfff, 0x8b);
    assert_eq!(ended.u64(GDT + u64::from(TASK)), busy);

    type Bad = (&'static str, &'static [u8], u64, u16, (u8, u16));
    let bad: [Bad; 7] = [
        ("busy TSS", &[0x0f, 0, 0xd8], system_descriptor(0, 0xff, 0x8b), SPARE, (GP, SPARE)),
        ("TSS not present", &[0x0f, 0, 0xd8], system_descriptor(0, 0xff, 0x09), SPARE, (NP, SPARE)),
        ("no TSS", &[0x0f, 0, 0xd8], DATA, SPARE, (GP, SPARE)),
        ("TSS in the LDT", &[0x0f, 0, 0xd8], 0, 0x0c, (GP, 0x0c)),
        ("no LDT", &[0x0f, 0, 0xd0], system_descriptor(0, 0xff, 0x89), SPARE, (GP, SPARE)),
        ("LDT not present", &[0x0f, 0, 0xd0], system_descriptor(0, 0xff, 2), SPARE, (NP, SPARE)),
        ("LDT in the LDT", &[0x0f, 0, 0xd0], 0, 0x0c, (GP, 0x0c)),
    ];
    for (name, code, raw, selector, (vector, error_code)) in bad {
        let ended = load(0, code, raw, selector);
        assert_eq!(ended.fault(), (vector, Some(error_code.into())), "{name}");
    }
}

#[test]
fn table_registers_are_stored_as_they_are() {
    // sgdt [ebx]; sidt [ebx+8]; lgdt [ebx+16]; hlt
    let code = [0x0f, 1, 3, 0x0f, 1, 0x4b, 8, 0x0f, 1, 0x53, 16, 0xf4];
    let ended = Guest::protected()
        .code(&code)
        .with(|guest| {
            guest.state.gpr[RBX] = KERNEL_DATA;
            guest.write(KERNEL_DATA + 16, &[0x77, 0x01, 0x78, 0x56, 0x34, 0x12]);
        })
        .run();
    assert_eq!(ended.u64(KERNEL_DATA), GDT << 16 | 0xff);
    assert_eq!(ended.u64(KERNEL_DATA + 8), guest::IDT << 16 | 0xfff);
    assert_eq!((ended.state.gdtr.base, ended.state.gdtr.limit), (0x1234_5678, 0x177));
}

#[test]
fn code_ends_at_its_limit() {
    // mov eax, 5; jmp $+0x20, in a code segment that ends before the target.
    let ended = Guest::protected()
        .code(&[0xb8, 5, 0, 0, 0, 0xeb, 0x20])
        .with(|guest| guest.state.segments[CS].limit = guest::KERNEL_CODE as u32 + 0x10)
        .run();
    assert_eq!(ended.fault(), (GP, Some(0)));
    assert_eq!(ended.delivered().map(|delivered| delivered.rip), Some(guest::KERNEL_CODE + 5));
}

#[test]
fn bounds_and_overflow() {
    for (index, raises) in [(4u64, None), (7, None), (3, Some(BR)), (8, Some(BR))] {
        let ended = Guest::protected()
            .code(&[0x62, 0x03, 0xf4]) // bound eax, [ebx]; hlt
            .with(|guest| {
                guest.write(KERNEL_DATA, &[4, 0, 0, 0, 7, 0, 0, 0]);
                guest.state.gpr[RBX] = KERNEL_DATA;
                guest.state.gpr[RAX] = index;
            })
            .run();
        assert_eq!(ended.delivered().map(|delivered| delivered.vector), raises, "{index}");
    }
    for (rflags, raises) in [(2, None), (2 | 1 << 11, Some(OF))] {
        let ended = Guest::protected()
            .code(&[0xce, 0xf4]) // into; hlt
            .with(|guest| guest.state.rflags = rflags)
            .run();
        assert_eq!(ended.delivered().map(|delivered| delivered.vector), raises);
    }
}

#[test]
fn a_call_gate_copies_parameters_and_a_far_return_releases_them() {
    // push 0x11; push 0x22; call 0x50:0 | ENTRY: retf 8
    let run = |instructions| {
        Guest::protected()
            .user()
            .code(&[0x6a, 0x11, 0x6a, 0x22, 0x9a, 0, 0, 0, 0, 0x50, 0])
            .with(|guest| {
                let gate = ENTRY & 0xffff
                    | u64::from(KERNEL_CS) << 16
                    | 2 << 32
                    | 0xec << 40
                    | (ENTRY >> 16) << 48;
                guest.descriptor(SPARE, gate);
                guest.write(ENTRY, &[0xca, 8, 0]);
                guest.state.segments[DS] = segment(KERNEL_SS, DATA);
            })
            .run_instructions(instructions)
    };
    let inside = run(3);
    assert_eq!((inside.state.rip, inside.state.cpl()), (ENTRY, 0));
    assert_eq!(inside.state.gpr[RSP], INNER_STACK - 24);
    let frame: Vec<u64> =
        (0..6).map(|word| inside.u64(INNER_STACK - 24 + 4 * word) & 0xffff_ffff).collect();
    let user_stack = USER_STACK - 8;
    let expected = [USER_CODE + 11, USER_CS.into(), 0x22, 0x11, user_stack, USER_SS.into()];
    assert_eq!(frame, expected);
    let back = run(4).state;
    assert_eq!((back.rip, back.cpl(), back.gpr[RSP]), (USER_CODE + 11, 3, USER_STACK));
    assert_eq!(back.segments[DS], Segment::default(), "the kernel's data went");
    assert_eq!(back.segments[ES], segment(USER_SS, DATA | LEVEL_3));
}

#[test]
fn iretd_goes_back_to_users() {
    let ended = Guest::protected()
        .code(&[0xcf])
        .with(|guest| {
            let frame = [USER_CODE, USER_CS.into(), 0x202, USER_STACK, USER_SS.into()];
            for (index, value) in frame.iter().enumerate() {
                let bytes = &value.to_le_bytes()[..4];
                guest.write(KERNEL_STACK - 64 + 4 * index as u64, bytes);
            }
            guest.state.gpr[RSP] = KERNEL_STACK - 64;
        })
        .run_instructions(1);
    let state = &ended.state;
    assert_eq!((state.rip, state.cpl(), state.gpr[RSP]), (USER_CODE, 3, USER_STACK));
    assert_eq!(state.rflags, 0x202);
}

#[test]
fn what_the_cpu_does_not_do_ends_with_a_reason() {
    // iretd to virtual-8086 mode, and with NT set.
    for (image, rflags) in [(0x2_0002u32, 2), (2, 0x4002)] {
        let ended = Guest::protected()
            .code(&[0xcf])
            .with(|guest| {
                guest.write(KERNEL_STACK - 64 + 8, &image.to_le_bytes());
                guest.state.gpr[RSP] = KERNEL_STACK - 64;
                guest.state.rflags = rflags;
            })
            .run();
        let Exit::Unsupported(reason) = &ended.exit else { panic!("{:?}", ended.exit) };
        assert!(reason.contains("the guest uses"), "{reason}");
    }
}

#[test]
fn long_mode_ignores_all_but_the_bases_of_fs_and_gs() {
    // mov es, eax; mov fs, eax; mov ecx, es:[rbx] (base ignored); mov edx, fs:[rbx]; hlt
    let code = [0x8e, 0xc0, 0x8e, 0xe0, 0x26, 0x8b, 0x0b, 0x64, 0x8b, 0x13, 0xf4];
    let ended = Guest::long()
        .code(&code)
        .with(|guest| {
            guest.descriptor(SPARE, SMALL);
            guest.write(KERNEL_DATA, &1u32.to_le_bytes());
            guest.write(USER_DATA + KERNEL_DATA, &2u32.to_le_bytes());
            guest.state.gpr[RAX] = SPARE.into();
            guest.state.gpr[RBX] = KERNEL_DATA;
        })
        .run();
    assert_eq!(ended.exit, Exit::Halt);
    assert_eq!((ended.state.gpr[RCX], ended.state.gpr[RDX]), (1, 2));
    // A null selector clears the base of FS and GS.
    let ended = Guest::long()
        .code(&[0x8e, 0xe0, 0xf4])
        .with(|guest| guest.state.segments[FS].base = 0x1234)
        .run();
    assert_eq!(ended.state.segments[FS], Segment::default());
}

#[test]
fn compatibility_mode_checks_limits() {
    // mov es, eax; mov ecx, es:[ebx]
    let ended = Guest::long()
        .compatibility()
        .code(&[0x8e, 0xc0, 0x26, 0x8b, 0x0b])
        .with(|guest| {
            guest.descriptor(SPARE, SMALL | LEVEL_3);
            guest.state.gpr[RAX] = u64::from(SPARE) | 3;
            guest.state.gpr[RBX] = 0xffd;
        })
        .run();
    assert_eq!(ended.fault(), (GP, Some(0)));
    assert_eq!(ended.delivered().map(|delivered| delivered.rip), Some(USER_CODE + 2));
}

/// Real mode, about to run 16-bit code at 0x1000:0; interrupts lead to ENTRY.
fn real_mode(code: &[u8]) -> Guest {
    Guest::protected().code(code).with(|guest| {
        let paragraph = |selector: u16| Segment {
            selector,
            attributes: 0x93,
            limit: 0xffff,
            base: u64::from(selector) << 4,
        };
        guest.state.cr0 = 0x10;
        guest.state.segments = [paragraph(0); 6];
        guest.state.segments[CS] = paragraph(0x1000);
        guest.state.segments[SS] = paragraph(0x1a00);
        guest.state.rip = 0;
        guest.state.gpr[RSP] = 0x1_0800;
        guest.state.idtr.base = 0;
        guest.state.idtr.limit = 0x3ff;
        guest.write(4 * 0x20, &[0, 0, 0x00, 0x18]);
        guest.write(4 * 13, &[0, 0, 0x00, 0x18]);
    })
}

#[test]
fn real_mode_has_paragraphs_and_vectors() {
    // mov ax, 0x1a00; mov ds, ax; mov [0x34], al; int 0x20
    let ended = real_mode(&[0xb8, 0x5a, 0x1a, 0x8e, 0xd8, 0xa2, 0x34, 0, 0xcd, 0x20]).run();
    assert_eq!((ended.exit.clone(), ended.state.rip), (Exit::Halt, 1));
    assert_eq!(ended.state.segments[CS].base, ENTRY);
    assert_eq!(ended.state.segments[DS].base, 0x1_a5a0);
    assert_eq!(ended.u64(0x1_a5a0 + 0x34) & 0xff, 0x5a);
    assert_eq!(ended.u64(0x1_a7fa) & 0xffff_ffff_ffff, 0x0002_1000_000a, "IP, CS, FLAGS");
    assert_eq!(ended.state.gpr[RSP], 0x1_07fa, "16 bits of ESP move");
}

#[test]
fn real_mode_returns_and_ends_at_64_kib() {
    // int 0x20 | iret at ENTRY; mov [0xffff], ax
    let ended = real_mode(&[0xcd, 0x20, 0xa3, 0xff, 0xff])
        .with(|guest| {
            guest.write(ENTRY, &[0xcf]);
            guest.write(4 * 13, &[1, 0, 0x00, 0x18]);
            guest.write(ENTRY + 1, &[0xf4]);
        })
        .run();
    assert_eq!((ended.exit.clone(), ended.state.rip), (Exit::Halt, 2));
    assert_eq!(ended.u64(0x1_a7fa) & 0xffff, 2, "the address of the store");
}
