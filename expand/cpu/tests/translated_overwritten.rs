//! Code that overwrites code which is hot: ahead and behind in the running block, in another block of
//! the same unit, in another page, across pages, by a string store. What is written runs at once.

mod guest;
mod lockstep;

use guest::{Guest, KERNEL_CODE, KERNEL_DATA};
use lockstep::{Code, Lockstep, lockstep};
use reprise_machine::engine::Exit;
use reprise_trace::cpu_state::{RAX, RBP, RBX, RCX, RDI, RDX, RSI};

const ROUNDS: u64 = 100;
/// Another page with code.
const OTHER: u64 = KERNEL_CODE + 0x1000;
/// dec rcx, to be followed by jnz.
const DEC_RCX: &[u8] = &[0x48, 0xff, 0xc9];
const JNZ: &[u8] = &[0x0f, 0x85];
const JMP: &[u8] = &[0xe9];
const CALL: &[u8] = &[0xe8];
const RET: u8 = 0xc3;
const HLT: &[u8] = &[0xf4];
const INC_EAX: &[u8] = &[0xff, 0xc0];
/// add eax, immediate byte; without the byte.
const ADD_EAX: &[u8] = &[0x83, 0xc0];
/// mov [rip + to], cl.
const STORE_CL: &[u8] = &[0x88, 0x0d];

/// Runs pieces of code, each at its address; the first starts. RCX counts rounds.
fn run(what: &str, pieces: &[Code], change: impl Fn(&mut Guest)) -> Lockstep {
    let ended = lockstep(what, || {
        Guest::long().with(|guest| {
            for piece in pieces {
                guest.write(piece.here() - piece.bytes.len() as u64, &piece.bytes);
            }
            guest.state.rip = pieces[0].here() - pieces[0].bytes.len() as u64;
            guest.state.gpr[RCX] = ROUNDS;
            guest.state.gpr[RAX] = 0;
            change(guest);
        })
    });
    assert_eq!(ended.exit, Exit::Halt, "{what}");
    ended
}

/// The sum of the rounds' numbers.
const SUM: u64 = ROUNDS * (ROUNDS + 1) / 2;
/// The same, where only rounds 96, 64 and 32 store their number and 32 rounds each see it.
const SELDOM_SUM: u64 = 32 * (96 + 64 + 32);

/// How CL is stored at an address.
type Store = fn(Code, u64) -> Code;

fn each_round(code: Code, target: u64) -> Code {
    code.to(STORE_CL, target)
}

/// Every 32nd round, and else to where it does no harm: so the code around it becomes hot.
fn seldom(code: Code, target: u64) -> Code {
    // mov rdi, rbp; test cl, 31; lea rsi, [target]; cmove rdi, rsi; mov [rdi], cl
    code.put(&[0x48, 0x89, 0xef, 0xf6, 0xc1, 0x1f])
        .to(&[0x48, 0x8d, 0x35], target)
        .put(&[0x48, 0x0f, 0x44, 0xfe, 0x88, 0x0f])
}

/// A loop that stores CL as the immediate of `add eax`, `ahead` of it or behind, with `between` in
/// between; what EAX is at the end.
fn immediate(what: &str, ahead: bool, store: Store, between: fn(Code) -> Code) -> u64 {
    let top = KERNEL_CODE + 0x10;
    let code = if ahead {
        // Both passes put the same lengths; the first finds the address.
        let until_add = |add| between(store(Code::at(top), add + 2));
        until_add(until_add(top).here()).put(ADD_EAX).put(&[0])
    } else {
        store(between(Code::at(top).put(ADD_EAX).put(&[0])), top + 2)
    };
    let code = code.put(DEC_RCX).to(JNZ, top).put(HLT);
    let ended = run(what, &[code], |guest| guest.state.gpr[RBP] = KERNEL_DATA);
    // Code that is overwritten each round is never hot; where blocks are translated at once, it is too.
    let changes_seldom = store(Code::at(top), top).bytes.len() > 6;
    assert_eq!(is_hot(&ended), changes_seldom, "{what}");
    ended.state.gpr[RAX]
}

fn is_hot(ended: &Lockstep) -> bool {
    ended.profile.units_translated > 0 && ended.profile.interpreted < ended.ticks / 4 * 3
}

fn straight(code: Code) -> Code {
    code.put(&[0x48, 0x8d, 0x1b])
}

fn to_another_block(code: Code) -> Code {
    let next = code.here() + 5;
    code.to(JMP, next)
}

/// So far that only the unit, which holds both blocks, knows of what is overwritten.
fn far_within_the_page(code: Code) -> Code {
    let far = code.here() + 0x200;
    code.to(JMP, far).up_to(far)
}

/// A branch never taken, a branch always taken, and a call.
fn through_three_blocks(code: Code) -> Code {
    let never = code.here() + 2 * 6 + 3 + 5 + 4;
    let code = code.put(&[0x48, 0x85, 0xc9]).to(&[0x0f, 0x84], never);
    let next = code.here() + 6;
    let code = code.to(JNZ, next);
    let next = code.here() + 5;
    code.to(CALL, next).put(&[0x48, 0x83, 0xc4, 0x08])
}

/// (the way from the store to what it overwrites, in words)
const WAYS: [(&str, fn(Code) -> Code); 4] = [
    ("the same block", straight),
    ("the next block", to_another_block),
    ("some blocks on", through_three_blocks),
    ("elsewhere in the page", far_within_the_page),
];

#[test]
fn what_is_written_ahead_runs_at_once() {
    for (what, between) in WAYS {
        assert_eq!(immediate(what, true, each_round, between), SUM, "{what}");
        assert_eq!(immediate(what, true, seldom, between), SELDOM_SUM, "{what}, seldom");
    }
}

#[test]
fn what_is_written_behind_runs_the_next_time() {
    for (what, between) in WAYS {
        // The first round adds the zero that was there, and what the last one stores adds nothing.
        assert_eq!(immediate(what, false, each_round, between), SUM - 1, "{what}");
        assert_eq!(immediate(what, false, seldom, between), SELDOM_SUM - 32, "{what}, seldom");
    }
}

#[test]
fn what_is_written_in_another_page_runs_at_once() {
    let function = |at| Code::at(at).put(ADD_EAX).put(&[0, RET]);
    let calls: [(&str, fn(Code, u64) -> Code); 3] = [
        ("called", |code, at| code.to(CALL, at)),
        // call rbx
        ("called through a register", |code, _| code.put(&[0xff, 0xd3])),
        // lea rdx, [behind]; push rdx; push rbx; ret: a return that nothing was called for.
        ("returned to", |code, _| {
            let behind = code.here() + 10;
            code.to(&[0x48, 0x8d, 0x15], behind).put(&[0x52, 0x53, RET])
        }),
    ];
    let stores: [(Store, u64); 2] = [(each_round, SUM), (seldom, SELDOM_SUM)];
    for (what, call) in calls {
        for (store, sum) in stores {
            let top = KERNEL_CODE;
            let code = call(store(Code::at(top), OTHER + 2), OTHER);
            let code = code.put(DEC_RCX).to(JNZ, top).put(HLT);
            let ended = run(what, &[code, function(OTHER)], |guest| {
                guest.state.gpr[RBX] = OTHER;
                guest.state.gpr[RBP] = KERNEL_DATA;
            });
            assert!(is_hot(&ended), "{what}");
            assert_eq!(ended.state.gpr[RAX], sum, "{what}");
        }
    }
}

#[test]
fn a_string_store_overwrites_a_function() {
    // mov esi, [the source in turn]; mov edi, OTHER; push rcx; mov ecx, 6; rep movsb; pop rcx
    let one = [0x83, 0xc0, 0x01, RET, 0x90, 0x90];
    let two = [0x05, 0x00, 0x01, 0x00, 0x00, RET];
    let top = KERNEL_CODE;
    let code = Code::at(top)
        .put(&[0x48, 0x87, 0xda]) // xchg rdx, rbx
        .put(&[0x48, 0x89, 0xde]) // mov rsi, rbx
        .put(&[0x4c, 0x89, 0xc7, 0x51, 0xb9, 6, 0, 0, 0, 0xf3, 0xa4, 0x59])
        .to(CALL, OTHER)
        .to(CALL, OTHER)
        .put(DEC_RCX)
        .to(JNZ, top)
        .put(HLT);
    let ended = run("rep movsb", &[code, Code::at(OTHER).put(&one)], |guest| {
        guest.write(KERNEL_DATA, &one);
        guest.write(KERNEL_DATA + 0x10, &two);
        guest.state.gpr[RBX] = KERNEL_DATA;
        guest.state.gpr[RDX] = KERNEL_DATA + 0x10;
        guest.state.gpr[8] = OTHER;
    });
    assert_eq!(ended.state.gpr[RAX], ROUNDS * (1 + 0x100));
}

/// The store is of no length while the loop gets hot, and then overwrites what follows it.
#[test]
fn a_string_store_overwrites_what_follows_it() {
    for (prefixed, units) in [(&[0xf3, 0xaa][..], 1), (&[0xf3, 0x48, 0xab], 8)] {
        let top = KERNEL_CODE;
        // push rcx; push rax; xor edx, edx; cmp ecx, 3; mov ecx, 0; cmove ecx, ebx (the length);
        // mov rax, 0x9090...; rep stos; pop rax; then the target
        let prelude = |target: u64| {
            Code::at(top)
                .put(&[0x51, 0x50, 0x83, 0xf9, 3, 0xb9, 0, 0, 0, 0, 0x0f, 0x44, 0xcb])
                .to(&[0x48, 0x8d, 0x3d], target)
                .put(&[0x48, 0xc7, 0xc0, 0x90, 0x90, 0x90, 0x90, 0x48, 0x89, 0x44, 0x24, 0xf0])
                .put(&[0x89, 0x44, 0x24, 0xf4, 0x48, 0x8b, 0x44, 0x24, 0xf0])
                .put(prefixed)
                .put(&[0x58])
        };
        let target = prelude(0).here();
        let code = prelude(target).put(&INC_EAX.repeat(4)).put(&[0x59]);
        let code = code.put(DEC_RCX).to(JNZ, top).put(HLT);
        let ended = run("rep stos", &[code], |guest| guest.state.gpr[RBX] = 8 / units);
        assert!(is_hot(&ended));
        // Rounds down to 4 count four times each.
        assert_eq!(ended.state.gpr[RAX], 4 * (ROUNDS - 3));
        assert_eq!(ended.state.gpr[RDI], target, "the last stores were of no length");
    }
}

#[test]
fn a_hot_loop_is_overwritten() {
    // An inner loop of 50 rounds; in between, its INC becomes DEC and INC again.
    let outer = KERNEL_CODE;
    for apart in [0x40, 0x1000] {
        let inner = outer + apart;
        let code = Code::at(outer).put(&[0xba, 50, 0, 0, 0]).to(JMP, inner);
        // inc eax; dec edx; jnz; xor byte [inner + 1], 8; dec rcx; jnz outer
        let body = Code::at(inner)
            .put(INC_EAX)
            .put(&[0xff, 0xca])
            .to(JNZ, inner)
            .put(&[0x80, 0x35])
            .put(&((inner + 1).wrapping_sub(inner + 10 + 7) as u32).to_le_bytes())
            .put(&[8])
            .put(DEC_RCX)
            .to(JNZ, outer)
            .put(HLT);
        let ended = run("a hot loop", &[code, body], |guest| guest.state.gpr[RCX] = 5);
        assert!(is_hot(&ended));
        assert_eq!(ended.state.gpr[RAX], 50, "three times up, twice down");
    }
}

#[test]
fn a_hot_loop_is_overwritten_from_another_page() {
    let (outer, inner) = (OTHER, KERNEL_CODE);
    let body = Code::at(inner).put(INC_EAX).put(&[0xff, 0xca]).to(JNZ, inner).put(&[RET]);
    let code = Code::at(outer)
        .put(&[0xba, 50, 0, 0, 0])
        .to(CALL, inner)
        // xor byte [rsi], 8
        .put(&[0x80, 0x36, 8])
        .put(DEC_RCX)
        .to(JNZ, outer)
        .put(HLT);
    let ended = run("from another page", &[code, body], |guest| {
        guest.state.gpr[RCX] = 5;
        guest.state.gpr[RSI] = inner + 1;
    });
    assert!(is_hot(&ended));
    assert_eq!(ended.state.gpr[RAX], 50);
}

/// An instruction across two pages, its parts overwritten while it is hot, and loads and stores across
/// pages next to it.
#[test]
fn code_and_data_across_pages() {
    let stores: [(Store, u64); 2] = [(each_round, SUM), (seldom, SELDOM_SUM)];
    for (before, (store, sum)) in (1..6).flat_map(|before| stores.map(|store| (before, store))) {
        // `add eax, imm32`, `before` bytes of it in the first page.
        let add = OTHER - before;
        let top = add - 0x20;
        // mov [r9], rcx; add rbx, [r9]
        let code = Code::at(top).put(&[0x49, 0x89, 0x09, 0x49, 0x03, 0x19]);
        let code = store(code, add + 1)
            .up_to(add)
            .put(&[0x05, 0, 0, 0, 0])
            .put(DEC_RCX)
            .to(JNZ, top)
            .put(HLT);
        let what = format!("{before} bytes before");
        let ended = run(&what, &[code], |guest| {
            guest.state.gpr[9] = KERNEL_DATA + 0xffd;
            guest.state.gpr[RBP] = KERNEL_DATA;
            guest.state.gpr[RBX] = 0;
        });
        assert_eq!(ended.state.gpr[RAX], sum, "{what}");
        assert_eq!(ended.state.gpr[RBX], SUM, "{what}");
    }
}
