//! Programs for the toy CPU: a PC's devices set up as a kernel does, then a random mix of what
//! guests do. Interrupt handlers hash the exact place where they struck.

use reprise_random::Random;

/// One instruction. Its address is its index in the program.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    Set(usize, u64),
    Add(usize, u64),
    /// Hashes the second register into the first.
    Mix(usize, usize),
    Jump(u64),
    JumpIfNotZero(usize, u64),
    JumpIfBitClear(usize, u64, u64),
    In(u16, usize),
    Out(u16, usize),
    OutValue(u16, u8),
    /// Two accesses in one instruction, as a REP OUTS gives.
    OutTwice(u16, u8, u8),
    Store(u64, usize),
    /// The address that the interrupt frame on top of the stack returns to.
    FrameRip(usize),
    /// Virtual time, as RDTSC under a clock that follows ticks.
    ReadTime(usize),
    Sti,
    Cli,
    Hlt,
    InterruptReturn,
    /// No IDT: the CPU shuts down.
    TripleFault,
    /// What the engine cannot execute.
    Unsupported,
}

/// A program and its interrupt handlers.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) ops: Vec<Op>,
    /// (vector, address).
    pub(crate) vectors: Vec<(u8, u64)>,
}

/// How a program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    DebugExit,
    Reset,
    PowerOff,
    TripleFault,
    IdleForever,
    /// The engine cannot go on.
    Unsupported,
    /// Computes without end and without an exit: somebody has to stop it.
    SpinForever,
    /// Reads the console until somebody stops it.
    ServeForever,
}

/// The finishes that a guest comes to by itself.
pub(crate) const FINISHES: [Finish; 6] = [
    Finish::DebugExit,
    Finish::Reset,
    Finish::PowerOff,
    Finish::TripleFault,
    Finish::IdleForever,
    Finish::Unsupported,
];

// Registers by their use. RSP is 4 and RCX 1, as on the real thing.
const HASH: usize = 0;
const COUNT: usize = 1;
const SCRATCH: usize = 2;
const ROUND: usize = 3;
pub(crate) const STACK: usize = 4;
const HANDLER_HASH: usize = 8;
const HANDLER_SCRATCH: usize = 9;
const HANDLER_COUNT: usize = 10;

const TIMER_VECTOR: u8 = 0x20;
const CONSOLE_VECTOR: u8 = 0x24;
/// What the PIC delivers when a request went away: nothing to acknowledge.
const SPURIOUS_VECTOR: u8 = 0x27;

struct Assembler {
    ops: Vec<Op>,
}

impl Assembler {
    fn here(&self) -> u64 {
        self.ops.len() as u64
    }

    fn out(&mut self, port: u16, value: u8) {
        self.ops.push(Op::OutValue(port, value));
    }

    fn push(&mut self, ops: &[Op]) {
        self.ops.extend_from_slice(ops);
    }

    /// PIC to vectors 0x20 and 0x28, IRQ 0 and 4 open; PIT channel 0 as a rate generator; UART with
    /// FIFO and receive interrupts.
    fn set_up_devices(&mut self, timer_count: u16) {
        let pic = [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0xa0, 0x11), (0xa1, 0x28)];
        for (port, value) in pic {
            self.out(port, value);
        }
        let [low, high] = timer_count.to_le_bytes();
        let rest = [(0xa1, 2), (0xa1, 1), (0x21, 0xee), (0xa1, 0xff), (0x43, 0x34)];
        for (port, value) in rest {
            self.out(port, value);
        }
        for (port, value) in [(0x40, low), (0x40, high), (0x3fa, 7), (0x3fc, 0x0b), (0x3f9, 1)] {
            self.out(port, value);
        }
    }

    /// Some handlers let others in: at once, after computing, or never.
    fn open_up(&mut self, random: &mut Random) {
        match random.below(4) {
            0 => self.push(&[Op::Sti]),
            1 => self.compute(HANDLER_COUNT, 1 + random.below(40)),
            2 => {
                self.push(&[Op::Sti]);
                self.compute(HANDLER_COUNT, 1 + random.below(40));
                self.push(&[Op::Cli]);
            }
            _ => {}
        }
    }

    /// A handler hashes where it struck, does `work`, and ends the interrupt.
    fn handler(&mut self, random: &mut Random, work: &[Op]) -> u64 {
        let start = self.here();
        self.open_up(random);
        self.push(&[
            Op::FrameRip(HANDLER_SCRATCH),
            Op::Mix(HANDLER_HASH, HANDLER_SCRATCH),
            Op::Mix(HANDLER_HASH, COUNT),
            Op::Mix(HANDLER_HASH, HASH),
        ]);
        self.push(work);
        self.out(0x20, 0x20);
        self.push(&[Op::InterruptReturn]);
        start
    }

    /// Reads every byte that the UART has, hashing each.
    fn console_handler(&mut self, random: &mut Random) -> u64 {
        let start = self.here();
        self.open_up(random);
        let entry = self.here();
        self.push(&[
            Op::FrameRip(HANDLER_SCRATCH),
            Op::Mix(HANDLER_HASH, HANDLER_SCRATCH),
            Op::In(0x3fd, HANDLER_SCRATCH),
            Op::JumpIfBitClear(HANDLER_SCRATCH, 0, entry + 8),
            Op::In(0x3f8, HANDLER_SCRATCH),
            Op::Mix(HANDLER_HASH, HANDLER_SCRATCH),
            Op::Out(0x3f8, HANDLER_SCRATCH),
            Op::Jump(entry + 2),
        ]);
        self.out(0x20, 0x20);
        self.push(&[Op::InterruptReturn]);
        start
    }

    /// One thing that guests do.
    fn segment(&mut self, random: &mut Random) {
        match random.below(12) {
            0..4 => self.compute(COUNT, 10 + random.below(400)),
            4 => {
                self.push(&[Op::Cli]);
                self.compute(COUNT, 1 + random.below(300));
                self.push(&[Op::Sti]);
            }
            5 => {
                // The timer's count: latch, low, high.
                self.out(0x43, 0);
                for _ in 0..2 {
                    self.push(&[Op::In(0x40, SCRATCH), Op::Mix(HASH, SCRATCH)]);
                }
            }
            6 => self.push(&[Op::ReadTime(SCRATCH), Op::Mix(HASH, SCRATCH)]),
            7 => self.push(&[Op::Out(0x3f8, HASH), Op::OutTwice(0x3f8, b'-', b'\n')]),
            8 => self.push(&[Op::Sti, Op::Hlt]),
            9 => self.push(&[Op::Hlt, Op::Hlt]),
            10 => self.push(&[Op::Cli, Op::Sti, Op::Store(random.below(0x4000) & !7, HASH)]),
            // Masked for a while, so that requests wait or sleep goes on past deadlines.
            _ => {
                self.out(0x21, 0xff);
                self.compute(COUNT, random.below(200) + 1);
                self.out(0x21, 0xee);
            }
        }
    }

    fn compute(&mut self, counter: usize, times: u64) {
        self.push(&[Op::Set(counter, times)]);
        let top = self.here();
        self.push(&[
            Op::Mix(HASH, counter),
            Op::Add(counter, u64::MAX),
            Op::JumpIfNotZero(counter, top),
        ]);
    }

    fn finish(&mut self, finish: Finish) {
        self.push(&[Op::Out(0x3f8, HASH), Op::Out(0x3f8, HANDLER_HASH)]);
        match finish {
            Finish::DebugExit => self.push(&[Op::Out(0xf4, HANDLER_HASH)]),
            Finish::Reset => self.out(0xcf9, 0x06),
            Finish::PowerOff => self.push(&[Op::Cli, Op::Hlt]),
            Finish::TripleFault => self.push(&[Op::TripleFault]),
            Finish::Unsupported => self.push(&[Op::Unsupported]),
            Finish::IdleForever => {
                self.out(0x21, 0xff);
                let top = self.here();
                self.push(&[Op::Sti, Op::Hlt, Op::Jump(top)]);
            }
            Finish::SpinForever => {
                let top = self.here();
                self.push(&[Op::Mix(HASH, COUNT), Op::Add(COUNT, 1), Op::Jump(top)]);
            }
            Finish::ServeForever => {
                let top = self.here();
                self.push(&[Op::Mix(HASH, COUNT), Op::Sti, Op::Hlt, Op::Jump(top)]);
            }
        }
    }
}

impl Program {
    /// A random program: the same for the same seed and finish.
    pub(crate) fn random(seed: u64, finish: Finish) -> Self {
        let mut random = Random::new(seed ^ 0x0070_726f_6772_616d);
        let mut assembler = Assembler { ops: vec![Op::Jump(0)] };
        let timer = assembler.handler(&mut random, &[Op::Store(0x5000, HANDLER_HASH)]);
        let console = assembler.console_handler(&mut random);
        let spurious = assembler.here();
        assembler.push(&[Op::InterruptReturn]);
        assembler.ops[0] = Op::Jump(assembler.here());
        assembler.push(&[Op::Set(STACK, 0x8000)]);
        // Longer than any handler, or the guest would do nothing else.
        assembler.set_up_devices(250 + random.below(200) as u16);
        assembler.push(&[Op::Sti, Op::Set(ROUND, 1 + random.below(5))]);
        let top = assembler.here();
        for _ in 0..3 + random.below(12) {
            assembler.segment(&mut random);
        }
        assembler.push(&[Op::Sti, Op::Add(ROUND, u64::MAX), Op::JumpIfNotZero(ROUND, top)]);
        assembler.finish(finish);
        let vectors =
            vec![(TIMER_VECTOR, timer), (CONSOLE_VECTOR, console), (SPURIOUS_VECTOR, spurious)];
        Self { ops: assembler.ops, vectors }
    }

    /// Where `vector` goes.
    pub(crate) fn handler_of(&self, vector: u8) -> u64 {
        let handler = self.vectors.iter().find(|(known, _)| *known == vector);
        handler.unwrap_or_else(|| panic!("no handler for vector {vector:#x}")).1
    }
}
