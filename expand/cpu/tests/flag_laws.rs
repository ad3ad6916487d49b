//! The laws by which a measured CPU leaves undefined flags, held against that CPU: a software CPU on a host that
//! leaves them inverted comes to the same flags by the laws as one on the host itself.

mod guest;

use guest::{Guest, KERNEL_DATA};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use reprise_cpu::engine::SoftEngine;
use reprise_cpu::flag_laws::FlagLaws;
use reprise_cpu::latitude;
use reprise_cpu::translate::Translation;
use reprise_host::host_info;
use reprise_machine::engine::{Engine, Exit};
use reprise_random::Random;
use reprise_trace::cpu_state::{CpuState, RAX, RBX, RCX, RDI, RDX};

/// The laws of this host's CPU, which says so if it has none.
fn laws() -> Option<&'static FlagLaws> {
    let host = host_info();
    let laws = FlagLaws::of(&host.cpu_vendor, host.cpu_family, host.cpu_model);
    if laws.is_none() {
        eprintln!("skipped: {} was not measured", host.cpu_brand);
    }
    laws
}

/// Instructions of one size, and the same on words and quadwords.
const SIZED: [&[u8]; 46] = [
    &[0xf7, 0xe3],          // mul ebx
    &[0xf7, 0xeb],          // imul ebx
    &[0x0f, 0xaf, 0xc3],    // imul eax, ebx
    &[0x6b, 0xc3, 0x35],    // imul eax, ebx, 0x35
    &[0xf7, 0xf3],          // div ebx
    &[0xf7, 0xfb],          // idiv ebx
    &[0xf7, 0x37],          // div [rdi]
    &[0x21, 0xd8],          // and eax, ebx
    &[0x09, 0xd8],          // or eax, ebx
    &[0x31, 0xd8],          // xor eax, ebx
    &[0x85, 0xd8],          // test eax, ebx
    &[0x21, 0x1f],          // and [rdi], ebx
    &[0x83, 0xe0, 0xf0],    // and eax, -16
    &[0xd1, 0xe0],          // shl eax, 1
    &[0xd1, 0xe8],          // shr eax, 1
    &[0xc1, 0xe0, 5],       // shl eax, 5
    &[0xc1, 0xe8, 5],       // shr eax, 5
    &[0xc1, 0xf8, 5],       // sar eax, 5
    &[0xc1, 0xe0, 17],      // shl eax, 17
    &[0xc1, 0xe8, 16],      // shr eax, 16
    &[0xc1, 0xf8, 18],      // sar eax, 18
    &[0xc1, 0x27, 5],       // shl [rdi], 5
    &[0xc1, 0x3f, 5],       // sar [rdi], 5
    &[0xd3, 0xe0],          // shl eax, cl
    &[0xd3, 0xe8],          // shr eax, cl
    &[0xd3, 0xf8],          // sar eax, cl
    &[0xc1, 0xc0, 5],       // rol eax, 5
    &[0xc1, 0xc8, 5],       // ror eax, 5
    &[0xc1, 0xd0, 5],       // rcl eax, 5
    &[0xc1, 0xd8, 5],       // rcr eax, 5
    &[0xc1, 0xd0, 17],      // rcl eax, 17
    &[0xc1, 0xd8, 18],      // rcr eax, 18
    &[0xd3, 0xc0],          // rol eax, cl
    &[0xd3, 0xc8],          // ror eax, cl
    &[0xd3, 0xd0],          // rcl eax, cl
    &[0xd3, 0xd8],          // rcr eax, cl
    &[0x0f, 0xa4, 0xd8, 5], // shld eax, ebx, 5
    &[0x0f, 0xac, 0xd8, 5], // shrd eax, ebx, 5
    &[0x0f, 0xa3, 0xd8],    // bt eax, ebx
    &[0x0f, 0xab, 0xd8],    // bts eax, ebx
    &[0x0f, 0xba, 0xf0, 3], // btr eax, 3
    &[0x0f, 0xba, 0x3f, 3], // btc [rdi], 3
    &[0x0f, 0xbc, 0xc3],    // bsf eax, ebx
    &[0x0f, 0xbd, 0xc3],    // bsr eax, ebx
    &[0x0f, 0xbc, 0x07],    // bsf eax, [rdi]
    &[0x0f, 0xb3, 0xd8],    // btr eax, ebx
];

/// Instructions on bytes.
const BYTES: [&[u8]; 19] = [
    &[0xf6, 0xe3],     // mul bl
    &[0xf6, 0xeb],     // imul bl
    &[0xf6, 0xf3],     // div bl
    &[0xf6, 0xfb],     // idiv bl
    &[0x20, 0xd8],     // and al, bl
    &[0x84, 0xdc],     // test ah, bl
    &[0xc0, 0xe0, 3],  // shl al, 3
    &[0xc0, 0xe8, 8],  // shr al, 8
    &[0xc0, 0xe0, 8],  // shl al, 8
    &[0xc0, 0xe4, 9],  // shl ah, 9
    &[0xc0, 0xf8, 9],  // sar al, 9
    &[0xd2, 0xe0],     // shl al, cl
    &[0xd2, 0xe8],     // shr al, cl
    &[0xd2, 0xcc],     // ror ah, cl
    &[0xd2, 0xd0],     // rcl al, cl
    &[0xd2, 0xdb],     // rcr bl, cl
    &[0xc0, 0xd0, 9],  // rcl al, 9
    &[0xc0, 0xd3, 10], // rcl bl, 10
    &[0xc0, 0xd8, 18], // rcr al, 18
];

/// Small and large numbers, and now and then zero.
fn operand(random: &mut Random) -> u64 {
    let shift = random.below(70) as u32;
    random.next().checked_shr(shift).unwrap_or(0)
}

struct Pair {
    own: SoftEngine,
    by_law: SoftEngine,
    first: CpuState,
}

impl Pair {
    fn of(code: &[u8], laws: &'static FlagLaws) -> Self {
        let engine = || {
            let mut engine = Guest::long().code(&[code, &[0xf4]].concat()).engine();
            engine.set_translation(Translation::Never);
            engine
        };
        let (mut own, mut by_law) = (engine(), engine());
        by_law.invert_undefined_flags(u64::MAX);
        by_law.leave_flags_by(laws);
        let first = own.cpu_state().expect("a state");
        Self { own, by_law, first }
    }

    /// The same from random operands.
    fn run(&mut self, random: &mut Random) -> [CpuState; 2] {
        const ARITHMETIC: u64 = 0x8d5;
        let mut state = self.first.clone();
        for register in [RAX, RBX, RCX, RDX] {
            state.gpr[register] = operand(random);
        }
        if random.one_in(2) {
            // So that more divisions have a quotient.
            state.gpr[RDX] = 0;
        }
        state.gpr[RDI] = KERNEL_DATA;
        state.rflags = 2 | random.next() & ARITHMETIC;
        let data = operand(random).to_le_bytes();
        [&mut self.own, &mut self.by_law].map(|engine| {
            engine.write_ram(KERNEL_DATA, &data);
            engine.set_cpu_state(&state).expect("a state");
            let exit = engine.run(engine.tick() + 1).expect("it runs");
            assert!(matches!(exit, Exit::TickReached | Exit::Halt), "{exit:?}");
            engine.cpu_state().expect("a state")
        })
    }
}

#[test]
fn a_measured_cpu_keeps_its_laws() {
    const ROUNDS: u64 = 300;
    let Some(laws) = laws() else { return };
    let words = SIZED.map(|code| [&[0x66], code].concat());
    let quadwords = SIZED.map(|code| [&[0x48], code].concat());
    let forms = SIZED.iter().chain(&BYTES).map(|code| code.to_vec());
    let mut broken = Vec::new();
    for (seed, code) in forms.chain(words).chain(quadwords).enumerate() {
        let mut random = Random::new(seed as u64);
        let mut pair = Pair::of(&code, laws);
        let mut differing = 0;
        for round in 0..ROUNDS {
            let [own, by_law] = pair.run(&mut random);
            differing |= own.rflags ^ by_law.rflags;
            let rflags = own.rflags;
            assert_eq!(own, CpuState { rflags, ..by_law }, "{code:02x?}, round {round}");
        }
        if differing != 0 {
            broken.push(format!("{code:02x?}: {}", latitude::names(differing)));
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const ALL: u64 = CF | PF | AF | ZF | SF | OF;

/// Flags that an instruction defines and those that it leaves undefined, by the pages of Intel's manual, volume 2,
/// and AMD's, volume 3, without the table that is held against it; the others it leaves alone.
fn by_the_manuals(instruction: &Instruction, cl: u8) -> [u64; 2] {
    use Mnemonic::{
        And, Bsf, Bsr, Bt, Btc, Btr, Bts, Div, Idiv, Imul, Mul, Or, Rcl, Rcr, Rol, Ror, Sal, Sar,
        Shl, Shld, Shr, Shrd, Test, Xor,
    };
    let size = instruction.op0_register().size().max(instruction.memory_size().size());
    let bits = 8 * size as u32;
    let last = instruction.op_count() - 1;
    let count = match instruction.op_kind(last) {
        OpKind::Immediate8 => u32::from(instruction.immediate8()),
        _ => u32::from(cl),
    };
    let count = count & if bits == 64 { 63 } else { 31 };
    let overflow = if count == 1 { OF } else { 0 };
    let carry_if = |defined: bool| if defined { CF } else { 0 };
    let (changed, defined) = match instruction.mnemonic() {
        Mul | Imul => (ALL, CF | OF),
        Div | Idiv => (ALL, 0),
        And | Or | Xor | Test => (ALL, ALL & !AF),
        Shl | Sal | Shr | Sar | Shld | Shrd | Rol | Ror | Rcl | Rcr if count == 0 => (0, 0),
        Shl | Sal | Shr => (ALL, SF | ZF | PF | overflow | carry_if(count < bits)),
        Sar => (ALL, SF | ZF | PF | CF | overflow),
        Shld | Shrd if count > bits => (ALL, 0),
        Shld | Shrd => (ALL, SF | ZF | PF | CF | overflow),
        // Whole rounds through CF leave it alone.
        Rcl | Rcr if count % (bits + 1) == 0 => (OF, overflow),
        Rcl | Rcr => (CF | OF, CF | overflow),
        Rol | Ror => (CF | OF, CF | overflow),
        // AMD's has ZF undefined as well.
        Bt | Btc | Btr | Bts => (ALL, CF),
        Bsf | Bsr => (ALL, ZF),
        other => panic!("{other:?} has no row"),
    };
    [defined, changed & !defined]
}

#[test]
fn flags_are_defined_and_undefined_by_the_manuals() {
    let words = SIZED.map(|code| [&[0x66], code].concat());
    let quadwords = SIZED.map(|code| [&[0x48], code].concat());
    let forms = SIZED.iter().chain(&BYTES).map(|code| code.to_vec());
    let mut broken = Vec::new();
    for code in forms.chain(words).chain(quadwords) {
        let instruction = Decoder::new(64, &code, DecoderOptions::NONE).decode();
        for cl in 0..=u8::MAX {
            let manuals = by_the_manuals(&instruction, cl);
            let found = [
                latitude::defined_flags_for(&instruction, cl),
                latitude::undefined_flags_for(&instruction, cl),
            ];
            if found != manuals {
                let [found, manuals] = [found, manuals].map(|flags| flags.map(latitude::names));
                broken.push(format!("{instruction}, CL {cl}: {found:?}, not {manuals:?}"));
            }
            // What is undefined for any count is among what is without a known one.
            let [_, undefined] = manuals;
            assert_eq!(
                undefined & !latitude::undefined_flags(&instruction),
                0,
                "{instruction}, CL {cl}"
            );
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}
