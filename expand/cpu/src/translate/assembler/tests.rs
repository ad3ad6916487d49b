//! What the assembler emits, read by a disassembler that is not its own.

use iced_x86::{Decoder, Formatter, GasFormatter};

use super::*;

fn text(emit: impl FnOnce(&mut Assembler)) -> String {
    let mut assembler = Assembler::new(0x1000);
    emit(&mut assembler);
    let bytes = assembler.finish();
    let mut out = String::new();
    for instruction in &mut Decoder::with_ip(64, &bytes, 0x1000, 0) {
        let mut line = String::new();
        GasFormatter::new().format(&instruction, &mut line);
        out += &line;
        out += ";";
    }
    out
}

#[test]
fn every_instruction_is_what_its_name_says() {
    let forward = |code: &mut Assembler, jump: Jump| {
        code.copy(RAX, RDX);
        code.land(jump);
    };
    for (emit, expected) in [
        (
            &(|code: &mut Assembler| code.load(R15, at(RBP, -128))) as &dyn Fn(&mut Assembler),
            "mov -0x80(%rbp),%r15;",
        ),
        (&|code| code.load(RAX, at(R12, 0)), "mov (%r12),%rax;"),
        (&|code| code.load(RAX, at(R13, 0)), "mov (%r13),%rax;"),
        (&|code| code.store(at(RSP, 0x1234), R9), "mov %r9,0x1234(%rsp);"),
        (&|code| code.store_immediate(at(R15, 0), -2), "movq $0xFFFFFFFFFFFFFFFE,(%r15);"),
        (&|code| code.store_16(at(RBP, 0x200), RAX), "mov %ax,0x200(%rbp);"),
        (&|code| code.load_16(RAX, at(RBP, 0x200)), "movzwl 0x200(%rbp),%eax;"),
        (&|code| code.lea(R15, indexed(R13, RDI, 3, 7)), "lea 7(%r13,%rdi,8),%r15;"),
        (
            &|code| {
                let place = Place { base: None, index: Some((R14, 3)), displacement: 0x4000_0000 };
                code.load(RCX, place);
            },
            "mov 0x40000000(,%r14,8),%rcx;",
        ),
        (
            &|code| code.load(RCX, Place { base: None, index: None, displacement: 16 }),
            "mov 0x10,%rcx;",
        ),
        (&|code| code.copy(R8, RBX), "mov %rbx,%r8;"),
        (&|code| code.zero_extend_16(R14, R14), "movzwl %r14w,%r14d;"),
        (&|code| code.zero_extend_16(RCX, RDX), "movzwl %dx,%ecx;"),
        (&|code| code.zero_extend_32(R15, R15), "mov %r15d,%r15d;"),
        (&|code| code.immediate(R10, 12), "mov $0xC,%r10d;"),
        (&|code| code.immediate(RCX, u64::MAX), "mov $0xFFFFFFFFFFFFFFFF,%rcx;"),
        (&|code| code.immediate(R14, 1 << 40), "movabs $0x10000000000,%r14;"),
        (&|code| code.rotate_right(R14, R15, 12), "rorx $0xC,%r15,%r14;"),
        (&|code| code.shift_right(RCX, R14, R10), "shrx %r10,%r14,%rcx;"),
        (&|code| code.shift_left(R14, RDX, RCX), "shlx %rcx,%rdx,%r14;"),
        (&|code| code.load_vector(3, at(RBP, 0x80)), "movaps 0x80(%rbp),%xmm3;"),
        (&|code| code.store_vector(at(RBP, 0x100), 12), "movaps %xmm12,0x100(%rbp);"),
        (&|code| code.flags_to_ax(), "lahf;seto %al;"),
        (&|code| code.flags_from_ax(), "add $0x7F,%al;sahf;"),
        (&|code| code.test_eax(), "test %eax,%eax;"),
        (&|code| code.release_stack(8), "add $8,%rsp;"),
        (&|code| code.reserve_stack(8), "sub $8,%rsp;"),
        (&|code| code.push(R12), "push %r12;"),
        (&|code| code.pop(RBX), "pop %rbx;"),
        (&|code| code.ret(), "ret;"),
        (&|code| code.jump_register(R14), "jmp *%r14;"),
        (&|code| code.jump_indirect(at(R14, 8)), "jmpq *8(%r14);"),
        (&|code| code.jump_through(0x2000), "jmpq *0x2000;"),
        (&|code| code.call_register(RAX), "call *%rax;"),
        (&|code| code.jump_to(0x800), "jmp 0x0000000000000800;"),
        (&|code| code.call_to(0x3000), "call 0x0000000000003000;"),
        (
            &|code| {
                let jump = code.jump_near_unless_rcx_one();
                forward(code, jump);
            },
            "loop 0x0000000000001005;mov %rdx,%rax;",
        ),
        (
            &|code| {
                let jump = code.jump_near();
                forward(code, jump);
            },
            "jmp 0x0000000000001005;mov %rdx,%rax;",
        ),
        (
            &|code| {
                let room = code.room_for_jump();
                let start = code.fill_room(room);
                code.land_on(room, 0x1000);
                let jump = code.jump_near_if_rcx_zero();
                code.land_at(jump, start);
            },
            "jmp 0x0000000000001000;jrcxz 0x0000000000001000;",
        ),
        (
            &|code| {
                let jump = code.jump_forward();
                forward(code, jump);
            },
            "jmp 0x0000000000001008;mov %rdx,%rax;",
        ),
        (
            &|code| {
                let jump = code.jump_forward_if(5);
                forward(code, jump);
            },
            "jne 0x0000000000001009;mov %rdx,%rax;",
        ),
        (
            &|code| {
                let jump = code.jump_near_if_rcx_zero();
                forward(code, jump);
            },
            "jrcxz 0x0000000000001005;mov %rdx,%rax;",
        ),
    ] {
        assert_eq!(text(emit), expected);
    }
}
