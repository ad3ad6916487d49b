//! Exceptions and interrupts through the IDT: vectors, error codes, frames, stacks, double and
//! triple faults, and which instructions need which privilege.

mod guest;

use guest::{
    ABSENT, Guest, HANDLERS, IDT, IF, INNER_STACK, INTERRUPT_STACK, KERNEL_CODE, KERNEL_CS,
    KERNEL_SS, KERNEL_STACK, NT, RF, SPARE, TF, TSS, USER_CODE, USER_CS, USER_SS, USER_STACK,
};
use reprise_machine::engine::{Engine, Exit};
use reprise_trace::cpu_state::{CS, RAX, RBX, RCX, RDX, RSP, SS};

const DE: u8 = 0;
const DB: u8 = 1;
const BP: u8 = 3;
const UD: u8 = 6;
const DF: u8 = 8;
const TS: u8 = 10;
const NP: u8 = 11;
const STACK: u8 = 12;
const GP: u8 = 13;
const PF: u8 = 14;

/// A linear address that is not canonical.
const NOT_CANONICAL: u64 = 0x8000_0000_0000;
const ZERO: Option<u32> = Some(0);

/// An instruction at privilege level 0 or 3, with RBX and RAX as given, and what it raises.
struct Case {
    name: &'static str,
    code: &'static [u8],
    level: u8,
    rbx: u64,
    rax: u64,
    raises: (u8, Option<u32>),
}

const fn case(
    name: &'static str,
    code: &'static [u8],
    level: u8,
    rbx: u64,
    raises: (u8, Option<u32>),
) -> Case {
    Case { name, code, level, rbx, rax: 0, raises }
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    case("ud2", &[0x0f, 0x0b], 0, 0, (UD, None)),
    case("ud2", &[0x0f, 0x0b], 3, 0, (UD, None)),
    case("rsm", &[0x0f, 0xaa], 0, 0, (UD, None)),
    case("mov cs, eax", &[0x8e, 0xc8], 0, 0, (UD, None)),
    case("mov cr1, rax", &[0x0f, 0x22, 0xc8], 0, 0, (UD, None)),
    case("xor ecx, ecx; div ecx", &[0x31, 0xc9, 0xf7, 0xf1], 3, 0, (DE, None)),
    case("int3", &[0xcc], 0, 0, (BP, None)),
    case("int1", &[0xf1], 3, 0, (DB, None)),
    case("int 0x80", &[0xcd, 0x80], 3, 0, (0x80, None)),
    case("int 0x7f", &[0xcd, 0x7f], 0, 0, (0x7f, None)),
    case("int 0x7f with a gate for level 0", &[0xcd, 0x7f], 3, 0, (GP, Some(0x7f * 8 + 2))),
    case("int3 with a gate for level 0", &[0xcc], 3, 0, (GP, Some(3 * 8 + 2))),
    case("mov rax, [rbx]", &[0x48, 0x8b, 0x03], 0, NOT_CANONICAL, (GP, ZERO)),
    case("mov rax, [rbx] over the edge", &[0x48, 0x8b, 0x03], 0, NOT_CANONICAL - 4, (GP, ZERO)),
    case("mov rax, [rsp]", &[0x48, 0x89, 0xdc, 0x48, 0x8b, 0x04, 0x24], 3, NOT_CANONICAL, (STACK, ZERO)),
    case("push rax", &[0x48, 0x89, 0xdc, 0x50], 3, NOT_CANONICAL + 64, (STACK, ZERO)),
    case("jmp rbx", &[0xff, 0xe3], 3, NOT_CANONICAL, (GP, ZERO)),
    case("movaps xmm0, [rbx]", &[0x0f, 0x28, 0x03], 0, KERNEL_STACK + 8, (GP, ZERO)),
    case("mov rax, [rbx]", &[0x48, 0x8b, 0x03], 0, ABSENT, (PF, ZERO)),
    case("mov [rbx], rax", &[0x48, 0x89, 0x03], 3, ABSENT, (PF, Some(6))),
    case("mov ss, eax: null at level 3", &[0x8e, 0xd0], 3, 0, (GP, ZERO)),
    case("mov fs, eax beyond the table", &[0xb8, 0xf8, 0xff, 0, 0, 0x8e, 0xe0], 0, 0, (GP, Some(0xfff8))),
    case("ltr ax: null", &[0x0f, 0x00, 0xd8], 0, 0, (GP, ZERO)),
    // Privileged instructions.
    case("hlt", &[0xf4], 3, 0, (GP, ZERO)),
    case("mov cr0, rax", &[0x0f, 0x22, 0xc0], 3, 0, (GP, ZERO)),
    case("mov rax, cr0", &[0x0f, 0x20, 0xc0], 3, 0, (GP, ZERO)),
    case("mov cr3, rax", &[0x0f, 0x22, 0xd8], 3, 0, (GP, ZERO)),
    case("mov cr4, rax", &[0x0f, 0x22, 0xe0], 3, 0, (GP, ZERO)),
    case("mov cr8, rax", &[0x44, 0x0f, 0x22, 0xc0], 3, 0, (GP, ZERO)),
    case("mov dr7, rax", &[0x0f, 0x23, 0xf8], 3, 0, (GP, ZERO)),
    case("mov rax, dr0", &[0x0f, 0x21, 0xc0], 3, 0, (GP, ZERO)),
    case("clts", &[0x0f, 0x06], 3, 0, (GP, ZERO)),
    case("lmsw ax", &[0x0f, 0x01, 0xf0], 3, 0, (GP, ZERO)),
    case("invlpg [rbx]", &[0x0f, 0x01, 0x3b], 3, 0, (GP, ZERO)),
    case("wbinvd", &[0x0f, 0x09], 3, 0, (GP, ZERO)),
    case("invd", &[0x0f, 0x08], 3, 0, (GP, ZERO)),
    case("lgdt [rbx]", &[0x0f, 0x01, 0x13], 3, USER_STACK, (GP, ZERO)),
    case("lidt [rbx]", &[0x0f, 0x01, 0x1b], 3, USER_STACK, (GP, ZERO)),
    case("lldt ax", &[0x0f, 0x00, 0xd0], 3, 0, (GP, ZERO)),
    case("ltr ax", &[0x0f, 0x00, 0xd8], 3, 0, (GP, ZERO)),
    case("rdmsr", &[0x0f, 0x32], 3, 0, (GP, ZERO)),
    case("wrmsr", &[0x0f, 0x30], 3, 0, (GP, ZERO)),
    case("swapgs", &[0x0f, 0x01, 0xf8], 3, 0, (GP, ZERO)),
    case("sysretq", &[0x48, 0x0f, 0x07], 3, 0, (GP, ZERO)),
    case("rdpmc", &[0x0f, 0x33], 3, 0, (GP, ZERO)),
    case("cli", &[0xfa], 3, 0, (GP, ZERO)),
    case("sti", &[0xfb], 3, 0, (GP, ZERO)),
    case("in al, dx", &[0xec], 3, 0, (GP, ZERO)),
    case("out dx, al", &[0xee], 3, 0, (GP, ZERO)),
    case("clac", &[0x0f, 0x01, 0xca], 3, 0, (UD, None)),
    case("stac", &[0x0f, 0x01, 0xcb], 3, 0, (UD, None)),
    // Values that control registers do not take.
    Case { rax: 1 << 31, ..case("mov cr0, rax: PG without PE", &[0x0f, 0x22, 0xc0], 0, 0, (GP, ZERO)) },
    Case { rax: 0x2000_0011, ..case("mov cr0, rax: NW without CD", &[0x0f, 0x22, 0xc0], 0, 0, (GP, ZERO)) },
    Case { rax: 1 << 32, ..case("mov cr0, rax: bit 32", &[0x0f, 0x22, 0xc0], 0, 0, (GP, ZERO)) },
    Case { rax: 0x33, ..case("mov cr0, rax: no paging in 64-bit code", &[0x0f, 0x22, 0xc0], 0, 0, (GP, ZERO)) },
    Case { rax: 0x600, ..case("mov cr4, rax: PAE off in long mode", &[0x0f, 0x22, 0xe0], 0, 0, (GP, ZERO)) },
    Case { rax: 0x2620, ..case("mov cr4, rax: VMX", &[0x0f, 0x22, 0xe0], 0, 0, (GP, ZERO)) },
    Case { rax: 0x4_0620, ..case("mov cr4, rax: XSAVE", &[0x0f, 0x22, 0xe0], 0, 0, (GP, ZERO)) },
    Case { rax: 1 << 40, ..case("mov cr3, rax: beyond physical memory", &[0x0f, 0x22, 0xd8], 0, 0, (GP, ZERO)) },
    Case { rax: 16, ..case("mov cr8, rax: 16", &[0x44, 0x0f, 0x22, 0xc0], 0, 0, (GP, ZERO)) },
    Case { rax: 1 << 32, ..case("mov dr7, rax: bit 32", &[0x0f, 0x23, 0xf8], 0, 0, (GP, ZERO)) },
];

#[test]
fn instructions_raise_what_the_manual_says() {
    for Case { name, code, level, rbx, rax, raises } in CASES {
        let guest = if *level == 0 { Guest::long() } else { Guest::long().user() };
        let guest = guest.code(code).with(|guest| {
            guest.state.gpr[RBX] = *rbx;
            guest.state.gpr[RAX] = *rax;
        });
        let ended = guest.run();
        assert_eq!(ended.fault(), *raises, "{name} at level {level}");
    }
}

#[test]
fn a_fault_leaves_the_frame_that_lets_it_restart() {
    let rflags = 0x202;
    let ended = Guest::long()
        .user()
        .code(&[0x90, 0x48, 0x89, 0x03]) // nop; mov [rbx], rax
        .with(|guest| {
            guest.state.gpr[RBX] = ABSENT + 0x123;
            guest.state.rflags = rflags;
        })
        .run();
    let delivered = ended.delivered().expect("the handler ran");
    assert_eq!((delivered.vector, delivered.error_code), (PF, Some(6)));
    assert_eq!(ended.state.cr2, ABSENT + 0x123);
    assert_eq!((delivered.cs, delivered.rip), (USER_CS, USER_CODE + 1));
    assert_eq!(delivered.rflags, rflags | RF);
    assert_eq!(delivered.stack, Some((USER_SS, USER_STACK)));
    assert_eq!(ended.state.gpr[RSP], INNER_STACK - 48);
    assert_eq!(ended.state.segments[CS].selector, KERNEL_CS);
    assert_eq!((ended.state.segments[SS].selector, ended.state.segments[SS].attributes), (0, 0));
    assert_eq!(ended.state.rflags & (IF | TF | RF | NT), 0);
    // The faulting store did not retire: NOP and the handler's HLT did.
    assert_eq!(ended.engine.tick(), 2);
}

#[test]
fn a_trap_returns_behind_its_instruction() {
    let ended = Guest::long().user().code(&[0xcd, 0x80]).run();
    let delivered = ended.delivered().expect("the handler ran");
    assert_eq!((delivered.rip, delivered.rflags & RF), (USER_CODE + 2, 0));
    assert_eq!(ended.engine.tick(), 2);
}

#[test]
fn the_stack_is_aligned_at_the_same_level_too() {
    let ended = Guest::long().code(&[0xcc]).with(|guest| guest.state.gpr[RSP] -= 4).run();
    let delivered = ended.delivered().expect("the handler ran");
    assert_eq!(delivered.stack, Some((KERNEL_SS, KERNEL_STACK - 4)));
    assert_eq!(ended.state.gpr[RSP], KERNEL_STACK - 16 - 40);
}

#[test]
fn an_interrupt_stack_is_taken_at_any_level() {
    for user in [false, true] {
        let guest = if user { Guest::long().user() } else { Guest::long() };
        let ended = guest.code(&[0x0f, 0x0b]).with(|guest| guest.gate(UD, 0x8e, 1)).run();
        assert_eq!(ended.fault(), (UD, None));
        assert_eq!(ended.state.gpr[RSP], INTERRUPT_STACK - 40);
        let stack = ended.state.segments[SS].selector;
        assert_eq!(stack, if user { 0 } else { KERNEL_SS });
    }
}

#[test]
fn a_trap_gate_leaves_interrupts_open() {
    for (rights, open) in [(0xee, false), (0xef, true)] {
        let ended = Guest::long()
            .user()
            .code(&[0xcd, 0x80])
            .with(|guest| {
                guest.gate(0x80, rights, 0);
                guest.state.rflags |= IF | NT;
            })
            .run();
        assert_eq!(ended.state.rflags & (IF | NT), if open { IF } else { 0 });
    }
}

/// A spoiled gate, TSS or table, and what UD2 (or INT n) in user code then ends in.
struct Spoiled {
    name: &'static str,
    spoil: fn(&mut Guest),
    software: bool,
    raises: (u8, Option<u32>),
}

#[rustfmt::skip]
const SPOILED: &[Spoiled] = &[
    Spoiled { name: "gate not present", software: false, raises: (NP, Some(6 * 8 + 3)),
        spoil: |guest| guest.gate(UD, 0x0e, 0) },
    Spoiled { name: "gate not present, INT n", software: true, raises: (NP, Some(0x80 * 8 + 2)),
        spoil: |guest| guest.gate(0x80, 0x6e, 0) },
    Spoiled { name: "gate of no type", software: false, raises: (GP, Some(6 * 8 + 3)),
        spoil: |guest| guest.gate(UD, 0x8c, 0) },
    Spoiled { name: "16-bit gate in long mode", software: false, raises: (GP, Some(6 * 8 + 3)),
        spoil: |guest| guest.gate(UD, 0x86, 0) },
    Spoiled { name: "null code selector", software: false, raises: (GP, Some(1)),
        spoil: |guest| guest.gate_to(UD, 0x8e, 0, 0) },
    Spoiled { name: "code selector is data", software: false, raises: (GP, Some(KERNEL_SS as u32 | 1)),
        spoil: |guest| guest.gate_to(UD, 0x8e, 0, KERNEL_SS) },
    Spoiled { name: "code selector is data, INT n", software: true, raises: (GP, Some(KERNEL_SS as u32)),
        spoil: |guest| guest.gate_to(0x80, 0xee, 0, KERNEL_SS) },
    Spoiled { name: "code selector beyond the table", software: false, raises: (GP, Some(0x3f9)),
        spoil: |guest| guest.gate_to(UD, 0x8e, 0, 0x3f8) },
    Spoiled { name: "32-bit code", software: false, raises: (GP, Some(SPARE as u32 | 1)),
        spoil: |guest| {
            guest.descriptor(SPARE, guest::CODE_32);
            guest.gate_to(UD, 0x8e, 0, SPARE);
        } },
    Spoiled { name: "code not present", software: false, raises: (NP, Some(SPARE as u32 | 1)),
        spoil: |guest| {
            guest.descriptor(SPARE, guest::CODE_64 & !(1 << 47));
            guest.gate_to(UD, 0x8e, 0, SPARE);
        } },
    Spoiled { name: "TSS too short", software: false, raises: (TS, Some(guest::TASK as u32 | 1)),
        spoil: |guest| {
            guest.gate(UD, 0x8e, 2);
            guest.state.tr.limit = 0x2c + 6;
        } },
    Spoiled { name: "stack not canonical", software: false, raises: (STACK, Some(1)),
        spoil: |guest| guest.write(TSS + 4, &NOT_CANONICAL.to_le_bytes()) },
    Spoiled { name: "stack not there", software: false, raises: (PF, Some(2)),
        spoil: |guest| guest.write(TSS + 4, &(ABSENT + 0x800).to_le_bytes()) },
];

#[test]
fn a_fault_amid_a_delivery_is_delivered_instead() {
    for Spoiled { name, spoil, software, raises } in SPOILED {
        let code: &[u8] = if *software { &[0xcd, 0x80] } else { &[0x0f, 0x0b] };
        // The second exception has an interrupt stack, which is good whatever the first found.
        let ended = Guest::long()
            .user()
            .code(code)
            .with(|guest| {
                for vector in [TS, NP, STACK, GP, PF] {
                    guest.gate(vector, 0x8e, 1);
                }
                spoil(guest);
            })
            .run();
        assert_eq!(ended.fault(), *raises, "{name}");
        let delivered = ended.delivered().expect("the handler ran");
        assert_eq!(delivered.rip, USER_CODE, "{name}: the first instruction restarts");
        assert_eq!(delivered.stack, Some((USER_SS, USER_STACK)), "{name}");
    }
}

/// Pairs of exceptions: the first's gate or stack is bad so that the second follows.
#[test]
fn contributory_pairs_become_double_faults() {
    // (code, vector whose gate is missing, what is delivered)
    let page_fault: &[u8] = &[0x48, 0x8b, 0x03]; // mov rax, [rbx]
    let general_protection: &[u8] = &[0x0f, 0x22, 0xc8 - 8]; // mov cr0, rax with a bad RAX
    let undefined: &[u8] = &[0x0f, 0x0b];
    let cases: [(&str, &[u8], u8, u8); 3] = [
        ("#PF then #NP", page_fault, PF, DF),
        ("#GP then #NP", general_protection, GP, DF),
        ("#UD then #NP", undefined, UD, NP),
    ];
    for (name, code, missing, delivered) in cases {
        let ended = Guest::long()
            .code(code)
            .with(|guest| {
                guest.gate(missing, 0x0e, 0);
                guest.state.gpr[RBX] = ABSENT;
                guest.state.gpr[RAX] = 1 << 40;
            })
            .run();
        let event = ended.delivered().unwrap_or_else(|| panic!("{name}: {:?}", ended.exit));
        assert_eq!(event.vector, delivered, "{name}");
        assert_eq!(event.rip, KERNEL_CODE, "{name}");
        if delivered == DF {
            assert_eq!(event.error_code, Some(0), "{name}");
        }
    }
}

#[test]
fn a_page_fault_on_the_way_to_a_contributory_exception_is_a_page_fault() {
    // #GP from user code, whose handler's stack is absent: #PF, which has an interrupt stack.
    let ended = Guest::long()
        .user()
        .code(&[0xf4])
        .with(|guest| {
            guest.write(TSS + 4, &(ABSENT + 0x800).to_le_bytes());
            guest.gate(PF, 0x8e, 1);
        })
        .run();
    assert_eq!(ended.fault(), (PF, Some(2)));
    assert_eq!(ended.state.cr2, ABSENT + 0x800 - 48);
}

#[test]
fn a_double_fault_that_cannot_be_delivered_is_a_triple_fault() {
    let ended = Guest::long()
        .code(&[0x48, 0x8b, 0x03])
        .with(|guest| {
            guest.state.idtr.limit = 0;
            guest.state.gpr[RBX] = ABSENT;
        })
        .run();
    assert_eq!(ended.exit, Exit::TripleFault);
    assert_eq!(ended.state.rip, KERNEL_CODE);
    assert_eq!(ended.engine.tick(), 0);
}

#[test]
fn a_stack_fault_of_a_stack_that_is_gone_is_a_triple_fault() {
    let ended =
        Guest::long().with(|guest| guest.state.gpr[RSP] = ABSENT + 0x800).code(&[0x50]).run();
    assert_eq!(ended.exit, Exit::TripleFault);
}

/// Runs to the first boundary where an interrupt can be taken, with IF as the code leaves it.
fn window(code: &[u8], change: impl FnOnce(&mut Guest)) -> u64 {
    let mut engine = Guest::long().code(code).with(change).engine();
    engine.set_interrupt_request(true);
    assert_eq!(engine.run(100).expect("runs"), Exit::InterruptWindow);
    engine.tick()
}

#[test]
fn sti_and_stack_loads_hold_interrupts_off_for_one_instruction() {
    let nop = 0x90;
    assert_eq!(window(&[0xfb, nop, nop, nop], |_| ()), 2, "sti");
    // STI with IF set already casts no shadow.
    assert_eq!(window(&[0xfb, nop, nop], |guest| guest.state.rflags |= IF), 0, "sti, IF set");
    // cli; mov eax, ss; sti; mov ss, eax; nop: each shadow begins anew.
    assert_eq!(window(&[0xfa, 0x8c, 0xd0, 0xfb, 0x8e, 0xd0, nop, nop], |_| ()), 5, "mov ss");
    // mov eax, ss; mov ss, eax; sti; nop.
    assert_eq!(window(&[0x8c, 0xd0, 0x8e, 0xd0, 0xfb, nop, nop], |_| ()), 4, "mov ss; sti");
    // lss esp, [rbx] casts none (here in that of STI): it loads the stack pointer itself.
    let far_pointer = |guest: &mut Guest| {
        guest.write(guest::KERNEL_DATA, &(KERNEL_STACK as u32).to_le_bytes());
        guest.write(guest::KERNEL_DATA + 4, &KERNEL_SS.to_le_bytes());
        guest.state.gpr[RBX] = guest::KERNEL_DATA;
    };
    assert_eq!(window(&[0xfb, 0x0f, 0xb2, 0x23, nop, nop], far_pointer), 2, "lss");
}

#[test]
fn the_shadow_is_part_of_the_state() {
    let mut engine = Guest::long().code(&[0xfb, 0x90, 0x90]).engine();
    engine.run(1).expect("runs");
    assert!(engine.cpu_state().expect("state").interrupt_shadow);
    assert!(!engine.interruptible().expect("asks"));
    engine.run(2).expect("runs");
    assert!(!engine.cpu_state().expect("state").interrupt_shadow);
    assert!(engine.interruptible().expect("asks"));
}

#[test]
fn an_interrupt_comes_between_instructions() {
    let mut engine =
        Guest::long().user().code(&[0x90; 8]).with(|guest| guest.state.rflags |= IF).engine();
    engine.run(3).expect("runs");
    engine.inject(0x20).expect("injects");
    let state = engine.cpu_state().expect("state");
    assert_eq!((state.rip, engine.tick()), (HANDLERS + 0x200, 3));
    assert_eq!(state.rflags & IF, 0);
    let mut bytes = [0; 8];
    engine.read_ram(state.gpr[RSP], &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), USER_CODE + 3);
    assert_eq!(engine.run(10).expect("runs"), Exit::Halt);
}

#[test]
fn an_interrupt_wakes_from_hlt_behind_it() {
    let mut engine = Guest::long().code(&[0xfb, 0xf4, 0x90]).engine();
    assert_eq!(engine.run(10).expect("runs"), Exit::Halt);
    assert!(engine.cpu_state().expect("state").halted);
    engine.inject(0x20).expect("injects");
    let state = engine.cpu_state().expect("state");
    assert!(!state.halted);
    let mut bytes = [0; 8];
    engine.read_ram(state.gpr[RSP], &mut bytes);
    assert_eq!(u64::from_le_bytes(bytes), KERNEL_CODE + 2);
}

#[test]
fn the_table_is_read_at_each_event() {
    // mov byte [IDT + 16 * 6 + 5], 0x0e: the gate of #UD is no longer present; ud2.
    let address = (IDT + 16 * 6 + 5) as u32;
    let mut code = vec![0xc6, 0x04, 0x25];
    code.extend(address.to_le_bytes());
    code.extend([0x0e, 0x0f, 0x0b]);
    assert_eq!(Guest::long().code(&code).run().fault(), (NP, Some(6 * 8 + 3)));
}

#[test]
fn protected_mode_pushes_32_bit_frames() {
    let same_level = Guest::protected().code(&[0xcc]).run();
    let delivered = same_level.delivered().expect("the handler ran");
    assert_eq!((delivered.vector, delivered.rip, delivered.stack), (BP, KERNEL_CODE + 1, None));
    assert_eq!(same_level.state.gpr[RSP], KERNEL_STACK - 12);

    let outer = Guest::protected().user().code(&[0xf4]).run();
    let delivered = outer.delivered().expect("the handler ran");
    assert_eq!((delivered.vector, delivered.error_code), (GP, ZERO));
    assert_eq!((delivered.rip, delivered.cs), (USER_CODE, USER_CS));
    assert_eq!(delivered.stack, Some((USER_SS, USER_STACK)));
    assert_eq!(outer.state.gpr[RSP], INNER_STACK - 24);
    assert_eq!(outer.state.segments[SS].selector, KERNEL_SS);
}

#[test]
fn protected_mode_checks_the_inner_stack() {
    type Spoil = fn(&mut Guest);
    let cases: [(&str, Spoil, (u8, Option<u32>)); 4] = [
        ("null", |guest| guest.write(TSS + 8, &[0, 0]), (TS, Some(1))),
        ("wrong level", |guest| guest.write(TSS + 8, &USER_SS.to_le_bytes()), (TS, Some(0x21))),
        ("code", |guest| guest.write(TSS + 8, &KERNEL_CS.to_le_bytes()), (TS, Some(0x09))),
        (
            "not present",
            |guest| {
                guest.write(TSS + 8, &SPARE.to_le_bytes());
                guest.descriptor(SPARE, guest::DATA & !(1 << 47));
            },
            (STACK, Some(u32::from(SPARE) | 1)),
        ),
    ];
    for (name, spoil, raises) in cases {
        // The second event stays at level 3, on the user's stack: its gate has conforming code.
        // Its handler is a jump to itself, since HLT is privileged.
        let ended = Guest::protected()
            .user()
            .code(&[0x0f, 0x0b])
            .with(|guest| {
                guest.descriptor(SPARE + 8, guest::CODE_32 | 1 << 42);
                for vector in [TS, STACK] {
                    guest.gate_to(vector, 0x8e, 0, SPARE + 8);
                    guest.write(HANDLERS + 16 * u64::from(vector), &[0xeb, 0xfe]);
                }
                spoil(guest);
            })
            .run_instructions(3);
        assert_eq!(ended.state.rip, HANDLERS + 16 * u64::from(raises.0), "{name}: vector");
        let frame = USER_STACK - 16;
        assert_eq!(ended.state.gpr[RSP], frame, "{name}: stack");
        assert_eq!(Some(ended.u64(frame) as u32), raises.1, "{name}: error code");
        assert_eq!(ended.u64(frame + 4) as u32, USER_CODE as u32, "{name}: RIP");
    }
}

#[test]
fn ports_open_by_the_bitmap_or_by_iopl() {
    let run = |iopl: u64, bitmap: u16, port: u64, wide: bool| {
        let code: &[u8] = if wide { &[0x66, 0xed] } else { &[0xec] };
        let mut engine = Guest::long()
            .user()
            .code(code)
            .with(|guest| {
                guest.state.rflags |= iopl << 12;
                guest.state.gpr[RDX] = port;
                guest.state.gpr[RCX] = 0;
                guest.write(TSS + 0x68 + 0x60 / 8, &bitmap.to_le_bytes());
            })
            .engine();
        matches!(engine.run(1).expect("runs"), Exit::Access(_))
    };
    assert!(!run(0, 0xffff, 0x60, false), "closed");
    assert!(run(3, 0xffff, 0x60, false), "IOPL");
    assert!(run(0, 0xfffe, 0x60, false), "one bit open");
    assert!(!run(0, 0xfffe, 0x61, false), "its neighbour closed");
    assert!(!run(0, 0xfffe, 0x60, true), "a wider access needs both");
    assert!(run(0, 0xfffc, 0x60, true), "both open");
    assert!(!run(0, 0, 0xffff, false), "beyond the TSS");
}
