//! Transfers between segments and privilege levels in long mode: IRETQ, SYSCALL and SYSRET,
//! SYSENTER and SYSEXIT, far jumps, calls and returns, call gates, SWAPGS.

mod guest;

use guest::{
    AC, CF, CODE_32, CODE_64, DATA, ENTRY, Ended, Guest, IF, INNER_STACK, KERNEL_CODE, KERNEL_CS,
    KERNEL_DATA, KERNEL_SS, KERNEL_STACK, LEVEL_3, NT, RF, SPARE, TF, USER_CODE, USER_CS,
    USER_CS_32, USER_DATA, USER_SS, USER_STACK,
};
use reprise_machine::engine::Exit;
use reprise_trace::cpu_state::{CS, DS, ES, FS, GS, RAX, RBX, RCX, RDX, RSP, SS, Segment};

const UD: u8 = 6;
const NP: u8 = 11;
const STACK: u8 = 12;
const GP: u8 = 13;
const R11: usize = 11;
const NOT_CANONICAL: u64 = 0x8000_0000_0000;
const NOT_PRESENT: u64 = 1 << 47;
const CONFORMING: u64 = 1 << 42;

/// Where the tests' frames are.
const FRAME: u64 = KERNEL_STACK - 0x100;
const USER_FRAME: u64 = USER_STACK - 0x100;

/// What IRETQ pops: RIP, CS, RFLAGS, RSP, SS.
type Image = [u64; 5];

/// To user code, well formed.
const TO_USER: Image = [USER_CODE, USER_CS as u64, IF | 2, USER_STACK, USER_SS as u64];

fn image(change: fn(&mut Image)) -> Image {
    let mut image = TO_USER;
    change(&mut image);
    image
}

fn write_image(guest: &mut Guest, address: u64, image: &[u64]) {
    for (index, value) in image.iter().enumerate() {
        guest.write(address + 8 * index as u64, &value.to_le_bytes());
    }
    guest.state.gpr[RSP] = address;
}

/// Descriptors that go wrong in one way each.
fn spare_descriptors(guest: &mut Guest) {
    guest.descriptor(SPARE, (CODE_64 | LEVEL_3) & !NOT_PRESENT);
    guest.descriptor(SPARE + 8, (DATA | LEVEL_3) & !NOT_PRESENT);
    guest.descriptor(SPARE + 16, CODE_64 | CONFORMING);
    guest.descriptor(SPARE + 24, CODE_64 | LEVEL_3 | 1 << 54);
    guest.descriptor(SPARE + 32, CODE_32);
}
const NOT_PRESENT_CODE: u64 = SPARE as u64 | 3;
const NOT_PRESENT_DATA: u64 = (SPARE as u64 + 8) | 3;
const CONFORMING_CODE: u64 = SPARE as u64 + 16;
const AMBIGUOUS_CODE: u64 = (SPARE as u64 + 24) | 3;
const COMPATIBILITY_CODE: u64 = SPARE as u64 + 32;

#[test]
fn iretq_goes_wherever_the_image_may_lead() {
    let images: [(&str, Image); 6] = [
        ("user", TO_USER),
        ("compatibility mode", image(|image| image[1] = USER_CS_32.into())),
        ("same level", [ENTRY, KERNEL_CS.into(), 2, KERNEL_STACK - 8, KERNEL_SS.into()]),
        ("null stack", [ENTRY, KERNEL_CS.into(), 2, KERNEL_STACK - 3, 0]),
        ("conforming, for users", image(|image| image[1] = CONFORMING_CODE | 3)),
        ("kernel compatibility mode", [ENTRY, COMPATIBILITY_CODE, 2, 0x1_ffff, KERNEL_SS.into()]),
    ];
    for (name, image) in images {
        let ended = Guest::long()
            .code(&[0x48, 0xcf])
            .with(|guest| {
                spare_descriptors(guest);
                write_image(guest, FRAME, &image);
            })
            .run_instructions(1);
        let [rip, cs, rflags, rsp, ss] = image;
        let state = &ended.state;
        assert_eq!(ended.exit, Exit::TickReached, "{name}");
        assert_eq!((state.rip, state.gpr[RSP]), (rip, rsp), "{name}");
        assert_eq!(u64::from(state.segments[CS].selector), cs, "{name}");
        assert_eq!(u64::from(state.segments[SS].selector), ss, "{name}");
        assert_eq!(state.rflags, rflags, "{name}");
        assert_eq!(u64::from(state.cpl()), cs & 3, "{name}");
    }
}

#[test]
fn iretq_checks_its_image() {
    let cases: [(&str, Image, (u8, u64)); 12] = [
        ("null CS", image(|image| image[1] = 0), (GP, 0)),
        ("CS is data", image(|image| image[1] = USER_SS.into()), (GP, 0x20)),
        ("CS beyond the table", image(|image| image[1] = 0x1003), (GP, 0x1000)),
        ("CS for another level", image(|image| image[1] = 0x0b), (GP, 0x08)),
        ("CS not present", image(|image| image[1] = NOT_PRESENT_CODE), (NP, 0x50)),
        ("CS both 64-bit and 32-bit", image(|image| image[1] = AMBIGUOUS_CODE), (GP, 0x68)),
        ("null SS for users", image(|image| image[4] = 0), (GP, 0)),
        ("SS for another level", image(|image| image[4] = KERNEL_SS.into()), (GP, 0x10)),
        ("SS is code", image(|image| image[4] = USER_CS.into()), (GP, 0x28)),
        ("SS not present", image(|image| image[4] = NOT_PRESENT_DATA), (STACK, 0x58)),
        ("RIP not canonical", image(|image| image[0] = NOT_CANONICAL), (GP, 0)),
        (
            "RIP beyond 32 bits in compatibility mode",
            image(|image| (image[0], image[1]) = (1 << 32, USER_CS_32.into())),
            (GP, 0),
        ),
    ];
    for (name, image, (vector, code)) in cases {
        let ended = Guest::long()
            .code(&[0x48, 0xcf])
            .with(|guest| {
                spare_descriptors(guest);
                write_image(guest, FRAME, &image);
            })
            .run();
        assert_eq!(ended.fault(), (vector, Some(code as u32)), "{name}");
        let delivered = ended.delivered().expect("the handler ran");
        assert_eq!((delivered.rip, delivered.cs), (KERNEL_CODE, KERNEL_CS), "{name}");
        assert_eq!(delivered.stack, Some((KERNEL_SS, FRAME)), "{name}");
    }
}

#[test]
fn iretq_with_nested_task_set_faults() {
    let ended = Guest::long()
        .code(&[0x48, 0xcf])
        .with(|guest| {
            write_image(guest, FRAME, &TO_USER);
            guest.state.rflags |= NT;
        })
        .run();
    assert_eq!(ended.fault(), (GP, Some(0)));
}

#[test]
fn user_code_returns_to_users_only_and_keeps_its_interrupt_flag() {
    let run = |image: Image, rflags: u64| {
        Guest::long()
            .user()
            .code(&[0x48, 0xcf])
            .with(|guest| {
                guest.state.rflags = rflags;
                write_image(guest, USER_FRAME, &image);
            })
            .run_instructions(1)
    };
    let flags = [0, IF, 3 << 12, CF | AC | RF | NT];
    for set in flags {
        let ended =
            run([USER_CODE + 64, USER_CS.into(), set | 2, USER_STACK, USER_SS.into()], IF | 2);
        let writable = CF | AC | RF | NT;
        assert_eq!(ended.state.rflags, IF | 2 | set & writable, "{set:#x}");
    }
    let ended = run([KERNEL_CODE, KERNEL_CS.into(), 2, USER_STACK, USER_SS.into()], 2);
    assert_eq!(ended.fault(), (GP, Some(KERNEL_CS.into())));
}

#[test]
fn a_return_to_users_takes_privileged_segments_away() {
    let ended = Guest::long()
        .code(&[0x48, 0xcf])
        .with(|guest| {
            write_image(guest, FRAME, &TO_USER);
            guest.state.segments[ES] = guest::segment(USER_SS, DATA | LEVEL_3);
            guest.state.segments[FS] = Segment { base: 0x1234, ..guest::segment(KERNEL_SS, DATA) };
        })
        .run_instructions(1);
    let segments = &ended.state.segments;
    assert_eq!(segments[ES], guest::segment(USER_SS, DATA | LEVEL_3));
    assert_eq!(segments[DS], Segment::default());
    assert_eq!(segments[FS], Segment { base: 0x1234, ..Segment::default() });
    assert_eq!(segments[GS], Segment::default());
}

#[test]
fn syscall_and_sysretq() {
    // syscall | ENTRY: sysretq
    let run = |instructions| {
        Guest::long()
            .user()
            .code(&[0x0f, 0x05])
            .with(|guest| {
                guest.write(ENTRY, &[0x48, 0x0f, 0x07]);
                guest.state.sfmask = IF | TF | CF;
                guest.state.rflags = IF | CF | AC | 2;
            })
            .run_instructions(instructions)
    };
    let entered = run(1).state;
    assert_eq!(entered.rip, ENTRY);
    assert_eq!((entered.gpr[RCX], entered.gpr[R11]), (USER_CODE + 2, IF | CF | AC | 2));
    assert_eq!(entered.rflags, AC | 2);
    assert_eq!(entered.segments[CS], guest::segment(KERNEL_CS, CODE_64));
    assert_eq!(entered.segments[SS], guest::segment(KERNEL_SS, DATA));
    assert_eq!(entered.gpr[RSP], USER_STACK);
    assert_eq!(entered.cpl(), 0);
    let returned = run(2).state;
    assert_eq!(returned.rip, USER_CODE + 2);
    assert_eq!(returned.rflags, IF | CF | AC | 2);
    assert_eq!(returned.segments[CS], guest::segment(USER_CS, CODE_64 | LEVEL_3));
    assert_eq!(returned.segments[SS], guest::segment(USER_SS, DATA | LEVEL_3));
    assert_eq!(returned.cpl(), 3);
}

#[test]
fn sysret_leads_to_compatibility_mode_too() {
    let state = Guest::long()
        .code(&[0x0f, 0x07])
        .with(|guest| {
            guest.state.gpr[RCX] = 0xffff_ffff_0000_0000 | USER_CODE;
            guest.state.gpr[R11] = RF | NT | IF;
        })
        .run_instructions(1)
        .state;
    assert_eq!(state.rip, USER_CODE);
    assert_eq!(state.segments[CS], guest::segment(USER_CS_32, CODE_32 | LEVEL_3));
    assert_eq!(state.rflags, NT | IF | 2);
}

#[test]
fn system_calls_have_their_conditions() {
    type Change = fn(&mut Guest);
    let cases: [(&str, Guest, &[u8], Change, (u8, Option<u32>)); 6] = [
        (
            "syscall, SCE clear",
            Guest::long(),
            &[0x0f, 0x05],
            |guest| guest.state.efer &= !1,
            (UD, None),
        ),
        (
            "sysret, SCE clear",
            Guest::long(),
            &[0x48, 0x0f, 0x07],
            |guest| guest.state.efer &= !1,
            (UD, None),
        ),
        (
            "syscall in compatibility mode",
            Guest::long().compatibility(),
            &[0x0f, 0x05],
            |_| (),
            (UD, None),
        ),
        (
            "sysretq, RCX not canonical",
            Guest::long(),
            &[0x48, 0x0f, 0x07],
            |guest| guest.state.gpr[RCX] = NOT_CANONICAL,
            (GP, Some(0)),
        ),
        ("sysenter, null selector", Guest::long().user(), &[0x0f, 0x34], |_| (), (GP, Some(0))),
        (
            "sysexitq, RDX not canonical",
            Guest::long(),
            &[0x48, 0x0f, 0x35],
            |guest| {
                guest.state.sysenter_cs = KERNEL_CS.into();
                guest.state.gpr[RDX] = NOT_CANONICAL;
            },
            (GP, Some(0)),
        ),
    ];
    for (name, guest, code, change, raises) in cases {
        assert_eq!(guest.code(code).with(change).run().fault(), raises, "{name}");
    }
}

#[test]
fn sysenter_and_sysexit() {
    for compatibility in [false, true] {
        let guest =
            if compatibility { Guest::long().compatibility() } else { Guest::long().user() };
        let entered = guest
            .code(&[0x0f, 0x34])
            .with(|guest| {
                guest.state.sysenter_cs = KERNEL_CS.into();
                guest.state.sysenter_eip = ENTRY;
                guest.state.sysenter_esp = INNER_STACK;
                guest.state.rflags = IF | TF | 2;
                guest.state.rflags &= !TF;
            })
            .run_instructions(1)
            .state;
        assert_eq!((entered.rip, entered.gpr[RSP]), (ENTRY, INNER_STACK));
        assert_eq!(entered.segments[CS], guest::segment(KERNEL_CS, CODE_64));
        assert_eq!(entered.segments[SS], guest::segment(KERNEL_SS, DATA));
        assert_eq!(entered.rflags, 2);
    }
    for (code, selector, descriptor) in
        [(&[0x0f, 0x35][..], 0x18, CODE_32), (&[0x48, 0x0f, 0x35], 0x28, CODE_64)]
    {
        let left = Guest::long()
            .code(code)
            .with(|guest| {
                guest.state.sysenter_cs = KERNEL_CS.into();
                guest.state.gpr[RDX] = USER_CODE;
                guest.state.gpr[RCX] = USER_STACK;
            })
            .run_instructions(1)
            .state;
        assert_eq!((left.rip, left.gpr[RSP]), (USER_CODE, USER_STACK));
        assert_eq!(left.segments[CS], guest::segment(selector | 3, descriptor | LEVEL_3));
        assert_eq!(left.segments[SS].selector, (selector + 8) | 3);
        assert_eq!(left.cpl(), 3);
    }
}

#[test]
fn swapgs_exchanges_bases() {
    // mov eax, gs:[0]; swapgs; mov ecx, gs:[0]; hlt
    let code = &[
        0x65, 0x8b, 0x04, 0x25, 0, 0, 0, 0, 0x0f, 0x01, 0xf8, 0x65, 0x8b, 0x0c, 0x25, 0, 0, 0, 0,
        0xf4,
    ];
    let state = Guest::long()
        .code(code)
        .with(|guest| {
            guest.write(KERNEL_DATA, &1u32.to_le_bytes());
            guest.write(USER_DATA, &2u32.to_le_bytes());
            guest.state.segments[GS].base = USER_DATA;
            guest.state.kernel_gs_base = KERNEL_DATA;
        })
        .run()
        .state;
    assert_eq!((state.gpr[RAX], state.gpr[RCX]), (2, 1));
    assert_eq!((state.segments[GS].base, state.kernel_gs_base), (KERNEL_DATA, USER_DATA));
}

/// Runs one far transfer through `[rbx]`, a pointer of 32:16.
fn far(guest: Guest, code: &[u8], offset: u64, selector: u64) -> Ended {
    guest
        .code(code)
        .with(|guest| {
            spare_descriptors(guest);
            let at = if guest.state.cpl() == 0 { KERNEL_DATA } else { USER_DATA };
            guest.write(at, &(offset as u32).to_le_bytes());
            guest.write(at + 4, &(selector as u16).to_le_bytes());
            guest.state.gpr[RBX] = at;
        })
        .run_instructions(1)
}

const JUMP: &[u8] = &[0xff, 0x2b];
const CALL: &[u8] = &[0xff, 0x1b];

#[test]
fn far_jumps_and_calls_stay_at_their_level() {
    let jumped = far(Guest::long(), JUMP, ENTRY, COMPATIBILITY_CODE).state;
    assert_eq!((jumped.rip, jumped.segments[CS].selector), (ENTRY, SPARE + 32));
    let jumped = far(Guest::long().user(), JUMP, USER_CODE + 99, CONFORMING_CODE).state;
    assert_eq!((jumped.rip, jumped.segments[CS].selector), (USER_CODE + 99, (SPARE + 16) | 3));
    assert_eq!(jumped.cpl(), 3);
    let called = far(Guest::long(), CALL, ENTRY, KERNEL_CS.into());
    assert_eq!((called.state.rip, called.state.gpr[RSP]), (ENTRY, KERNEL_STACK - 8));
    let pushed = called.u64(KERNEL_STACK - 8);
    assert_eq!(pushed, (u64::from(KERNEL_CS) << 32) | (KERNEL_CODE + 2));
}

#[test]
fn far_jumps_check_their_target() {
    let cases = [
        ("null", Guest::long(), 0, (GP, 0)),
        ("data", Guest::long(), KERNEL_SS.into(), (GP, 0x10)),
        ("TSS", Guest::long(), guest::TASK.into(), (GP, 0x30)),
        ("less privileged", Guest::long(), USER_CS.into(), (GP, 0x28)),
        ("more privileged", Guest::long().user(), KERNEL_CS.into(), (GP, 0x08)),
        ("not present", Guest::long().user(), NOT_PRESENT_CODE, (NP, 0x50)),
        ("RPL above the level", Guest::long(), u64::from(KERNEL_CS) | 3, (GP, 0x08)),
        ("beyond the table", Guest::long(), 0xff8, (GP, 0xff8)),
        ("null LDT", Guest::long(), 0x0c, (GP, 0x0c)),
    ];
    for (name, guest, selector, (vector, code)) in cases {
        let user = guest.state.cpl() == 3;
        for instruction in [JUMP, CALL] {
            let start = if user { Guest::long().user() } else { Guest::long() };
            let ended = far(start, instruction, ENTRY, selector);
            let state = &ended.state;
            assert_eq!(state.rip, guest::HANDLERS + 16 * u64::from(vector) + 1, "{name}");
            assert_eq!(ended.u64(state.gpr[RSP]), code, "{name}");
        }
    }
}

/// A 64-bit call gate at SPARE + 0x30.
fn call_gate(guest: &mut Guest, selector: u16, rights: u64) {
    let low =
        ENTRY & 0xffff | u64::from(selector) << 16 | rights << 40 | (ENTRY >> 16 & 0xffff) << 48;
    guest.descriptor(SPARE + 0x30, low);
    guest.descriptor(SPARE + 0x38, ENTRY >> 32);
}

#[test]
fn a_call_gate_leads_inwards_and_a_far_return_back() {
    let run = |instructions| {
        Guest::long()
            .user()
            .code(CALL)
            .with(|guest| {
                call_gate(guest, KERNEL_CS, 0xec);
                guest.write(USER_DATA + 4, &(SPARE + 0x30).to_le_bytes());
                guest.write(ENTRY, &[0x48, 0xcb]); // retfq
                guest.state.gpr[RBX] = USER_DATA;
            })
            .run_instructions(instructions)
    };
    let inside = run(1);
    assert_eq!((inside.state.rip, inside.state.cpl()), (ENTRY, 0));
    assert_eq!(inside.state.gpr[RSP], INNER_STACK - 32);
    assert_eq!(inside.state.segments[SS].selector, 0);
    let frame = [0, 8, 16, 24].map(|offset| inside.u64(INNER_STACK - 32 + offset));
    assert_eq!(frame, [USER_CODE + 2, USER_CS.into(), USER_STACK, USER_SS.into()]);
    let back = run(2).state;
    assert_eq!((back.rip, back.cpl(), back.gpr[RSP]), (USER_CODE + 2, 3, USER_STACK));
    assert_eq!(back.segments[SS].selector, USER_SS);
}

#[test]
fn call_gates_check_their_callers() {
    let cases = [
        ("gate for level 0", KERNEL_CS, 0x8c, (GP, SPARE + 0x30)),
        ("not present", KERNEL_CS, 0x6c, (NP, SPARE + 0x30)),
        ("32-bit code", SPARE + 32, 0xec, (GP, SPARE + 32)),
        ("data", KERNEL_SS, 0xec, (GP, KERNEL_SS)),
        ("null", 0, 0xec, (GP, 0)),
        ("16-bit gate", KERNEL_CS, 0xe4, (GP, SPARE + 0x30)),
    ];
    for (name, selector, rights, (vector, code)) in cases {
        let ended = Guest::long()
            .user()
            .code(CALL)
            .with(|guest| {
                spare_descriptors(guest);
                call_gate(guest, selector, rights);
                guest.write(USER_DATA + 4, &(SPARE + 0x30).to_le_bytes());
                guest.state.gpr[RBX] = USER_DATA;
            })
            .run();
        assert_eq!(ended.fault(), (vector, Some(u32::from(code))), "{name}");
    }
}

#[test]
fn a_far_return_releases_parameters() {
    // retfq 16, at the same level and to users.
    let same = Guest::long()
        .code(&[0x48, 0xca, 16, 0])
        .with(|guest| write_image(guest, FRAME, &[ENTRY, KERNEL_CS.into()]))
        .run_instructions(1)
        .state;
    assert_eq!((same.rip, same.gpr[RSP]), (ENTRY, FRAME + 32));
    let outer = Guest::long()
        .code(&[0x48, 0xca, 16, 0])
        .with(|guest| {
            let user_stack = USER_STACK - 64;
            let frame = [USER_CODE, USER_CS.into(), 7, 7, user_stack, USER_SS.into()];
            write_image(guest, FRAME, &frame);
        })
        .run_instructions(1)
        .state;
    assert_eq!((outer.rip, outer.gpr[RSP], outer.cpl()), (USER_CODE, USER_STACK - 48, 3));
}

#[test]
fn interrupts_from_compatibility_mode_enter_64_bit_code() {
    let ended = Guest::long().compatibility().code(&[0xcd, 0x80]).run();
    let delivered = ended.delivered().expect("the handler ran");
    assert_eq!((delivered.cs, delivered.rip), (USER_CS_32, USER_CODE + 2));
    assert_eq!(ended.state.gpr[RSP], INNER_STACK - 40);
    assert_eq!(ended.state.segments[CS].selector, KERNEL_CS);
}

/// CALL pushes its return address onto the very code that it calls.
#[test]
fn a_call_that_overwrites_its_target_runs_what_it_wrote() {
    /// RET and seven NOPs, which become ADD [RAX], AL and the like; then HLT.
    const F: u64 = KERNEL_CODE + 0x80;
    let ended = Guest::long()
        .code(&[0xe8, 0x7b, 0, 0, 0]) // call F
        .code(&[0x48, 0xc7, 0xc4]) // mov rsp, F + 8
        .code(&((F + 8) as u32).to_le_bytes())
        .code(&[0xe8, 0x6f, 0, 0, 0]) // call F
        .code(&[0xb9, 7, 0, 0, 0, 0xf4]) // mov ecx, 7; hlt
        .with(|guest| {
            guest.write(F, &[0xc3, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xf4]);
            guest.state.gpr[RAX] = KERNEL_DATA;
        })
        .run();
    assert_eq!((ended.exit.clone(), ended.state.gpr[RCX]), (Exit::Halt, 0));
    assert_eq!(ended.state.rip, F + 9);
}
