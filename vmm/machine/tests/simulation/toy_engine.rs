//! A CPU of a dozen instructions that keeps the engine's contract to the letter, and checks that the
//! machine keeps its side. It is kicked at random places, which no result may show.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reprise_machine::clock::TimeBase;
use reprise_machine::engine::{Access, Engine, EngineError, Exit, FlagKick, Kick};
use reprise_trace::checkpoint::EngineState;
use reprise_trace::cpu_state::{CS, CpuState, RCX};
use reprise_trace::moment::{Moment, TickKind};

use super::program::{Op, Program, STACK};
use reprise_random::Random;

const RAM_BYTES: usize = 64 << 10;
const INTERRUPT_FLAG: u64 = 1 << 9;

/// How the engine is disturbed: in ways that must not show, and in one that must.
#[derive(Clone, Debug)]
pub(crate) struct Disturbance {
    /// Chooses where kicks strike and which of two allowed exits is given.
    pub(crate) seed: u64,
    /// One kick in so many instructions; `None` for none.
    pub(crate) kick_every: Option<u64>,
    /// At this instruction a bit of RAM flips: outside data that went past the log.
    pub(crate) flip_at: Option<u64>,
    /// At this instruction the engine itself fails.
    pub(crate) fail_at: Option<u64>,
    /// A triple fault resets the CPU before anybody hears of it.
    pub(crate) resets: bool,
}

impl Disturbance {
    /// Kicks at random places.
    pub(crate) fn kicks(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let kick_every = [None, Some(2), Some(50), Some(700)][random.below(4) as usize];
        Self { seed: random.next(), kick_every, flip_at: None, fail_at: None, resets: false }
    }

    /// None at all.
    pub(crate) fn none() -> Self {
        Self { seed: 0, kick_every: None, flip_at: None, fail_at: None, resets: false }
    }
}

pub(crate) struct ToyEngine {
    kind: TickKind,
    program: Program,
    state: CpuState,
    ram: Vec<u8>,
    tick: u64,
    executed: u64,
    base: TimeBase,
    window_wanted: bool,
    /// Injected, but as on KVM not delivered before the guest runs.
    vector: Option<u8>,
    /// An access that waits for its answer.
    unanswered: Option<Access>,
    /// The second access of an instruction that has two.
    second: Option<Access>,
    kick: FlagKick,
    disturbance: Disturbance,
    random: Random,
}

impl ToyEngine {
    pub(crate) fn new(kind: TickKind, program: Program, disturbance: Disturbance) -> Self {
        let random = Random::new(disturbance.seed);
        Self {
            kind,
            program,
            state: CpuState::default(),
            ram: vec![0; RAM_BYTES],
            tick: 0,
            executed: 0,
            base: TimeBase { tick: 0, ns: 0, ns_per_tick: 0 },
            window_wanted: false,
            vector: None,
            unanswered: None,
            second: None,
            kick: FlagKick(Arc::new(AtomicBool::new(false))),
            disturbance,
            random,
        }
    }

    /// Puts a page of RAM where it lies.
    pub(crate) fn place(&mut self, address: u64, page: &[u8]) {
        self.ram[address as usize..][..page.len()].copy_from_slice(page);
    }

    fn op(&self) -> Op {
        self.program.ops[self.state.rip as usize]
    }

    fn open(&self) -> bool {
        self.state.rflags & INTERRUPT_FLAG != 0 && !self.state.interrupt_shadow
    }

    fn assert_boundary(&self) {
        assert!(self.unanswered.is_none(), "asked amid an access");
        assert!(self.second.is_none(), "asked amid an instruction");
        assert!(self.vector.is_none(), "asked amid an interrupt's delivery");
    }

    fn kicked(&mut self) -> bool {
        let random = self.disturbance.kick_every.is_some_and(|count| self.random.one_in(count));
        self.kick.0.swap(false, Ordering::Acquire) || random
    }

    fn push(&mut self, value: u64) {
        let address = self.state.gpr[STACK] - 8;
        self.state.gpr[STACK] = address;
        self.ram[address as usize..][..8].copy_from_slice(&value.to_le_bytes());
    }

    fn load(&self, address: u64) -> u64 {
        let bytes = self.ram[address as usize..][..8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    }

    fn deliver(&mut self) {
        if let Some(vector) = self.vector.take() {
            let (flags, rip) = (self.state.rflags, self.state.rip);
            self.push(flags);
            self.push(rip);
            self.state.rflags &= !INTERRUPT_FLAG;
            self.state.rip = self.program.handler_of(vector);
            self.state.halted = false;
        }
    }

    fn retire(&mut self) {
        self.state.interrupt_shadow = false;
        if self.kind == TickKind::Instruction {
            self.tick += 1;
        }
    }

    fn disturb(&mut self) -> Result<(), EngineError> {
        self.executed += 1;
        if self.disturbance.flip_at == Some(self.executed) {
            self.ram[0x9000] ^= 1;
        }
        match self.disturbance.fail_at == Some(self.executed) {
            true => Err(EngineError { what: "the toy broke: mend it".to_owned() }),
            false => Ok(()),
        }
    }

    /// Executes one instruction. Gives an exit if it does not retire by itself.
    fn execute(&mut self) -> Option<Exit> {
        let frame_rip = self.load(self.state.gpr[STACK]);
        let gpr = &mut self.state.gpr;
        let mut next = self.state.rip + 1;
        let mut opens_late = false;
        match self.program.ops[self.state.rip as usize] {
            Op::Set(register, value) => gpr[register] = value,
            Op::Add(register, value) => gpr[register] = gpr[register].wrapping_add(value),
            Op::Mix(to, from) => {
                gpr[to] = (gpr[to].rotate_left(7) ^ gpr[from]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            }
            Op::Jump(target) => next = target,
            Op::JumpIfNotZero(register, target) if gpr[register] != 0 => next = target,
            Op::JumpIfBitClear(register, bit, target) if gpr[register] >> bit & 1 == 0 => {
                next = target;
            }
            Op::JumpIfNotZero(..) | Op::JumpIfBitClear(..) => {}
            Op::Store(address, register) => {
                self.ram[address as usize..][..8].copy_from_slice(&gpr[register].to_le_bytes());
            }
            Op::FrameRip(register) => gpr[register] = frame_rip,
            Op::ReadTime(register) => gpr[register] = self.base.at(self.tick).ns,
            Op::Sti => {
                opens_late = self.state.rflags & INTERRUPT_FLAG == 0;
                self.state.rflags |= INTERRUPT_FLAG;
            }
            Op::Cli => self.state.rflags &= !INTERRUPT_FLAG,
            Op::InterruptReturn => {
                let stack = self.state.gpr[STACK];
                next = self.load(stack);
                self.state.rflags = self.load(stack + 8);
                self.state.gpr[STACK] = stack + 16;
            }
            Op::Hlt => return Some(self.halt()),
            Op::TripleFault => {
                if self.disturbance.resets {
                    self.state = CpuState { rip: 0xfff0, ..CpuState::default() };
                    self.state.segments[CS].base = 0xffff_0000;
                }
                return Some(Exit::TripleFault);
            }
            Op::Unsupported => return Some(Exit::Unsupported("no such toy".to_owned())),
            Op::In(..) | Op::Out(..) | Op::OutValue(..) | Op::OutTwice(..) => {
                return Some(self.access());
            }
        }
        self.state.rip = next;
        self.retire();
        self.state.interrupt_shadow = opens_late;
        None
    }

    fn halt(&mut self) -> Exit {
        self.state.rip += 1;
        self.state.halted = true;
        self.retire();
        if self.kind == TickKind::Exit {
            self.tick += 1;
        }
        Exit::Halt
    }

    fn access(&mut self) -> Exit {
        let write = |port, value| Access::PortWrite { port, size: 1, value: u32::from(value) };
        let access = match self.op() {
            Op::In(port, _) => Access::PortRead { port, size: 1 },
            Op::Out(port, register) => write(port, self.state.gpr[register] as u8),
            Op::OutValue(port, value) => write(port, value),
            Op::OutTwice(port, first, second) => {
                self.second = Some(write(port, second));
                write(port, first)
            }
            other => unreachable!("{other:?} accesses nothing"),
        };
        self.unanswered = Some(access);
        Exit::Access(access)
    }
}

impl Engine for ToyEngine {
    fn tick_kind(&self) -> TickKind {
        self.kind
    }

    fn tick(&self) -> u64 {
        self.tick
    }

    fn run(&mut self, until: u64) -> Result<Exit, EngineError> {
        assert!(until >= self.tick, "asked to run into the past");
        assert!(self.unanswered.is_none(), "the last access was not finished");
        if let Some(second) = self.second.take() {
            self.unanswered = Some(second);
            return Ok(Exit::Access(second));
        }
        loop {
            if self.kicked() {
                return Ok(Exit::Kicked);
            }
            self.deliver();
            let counts = self.kind == TickKind::Instruction;
            if counts && self.tick == until && self.random.one_in(2) {
                return Ok(Exit::TickReached);
            }
            if counts && self.window_wanted && self.open() {
                return Ok(Exit::InterruptWindow);
            }
            if counts && self.tick == until && !self.state.halted {
                return Ok(Exit::TickReached);
            }
            if self.state.halted {
                return Ok(Exit::Halt);
            }
            self.disturb()?;
            match self.execute() {
                // A HLT that retires with the last tick may be told as either.
                Some(Exit::Halt) if counts && self.tick == until => {}
                Some(exit) => return Ok(exit),
                None => {}
            }
        }
    }

    fn finish_access(&mut self, value: u128) -> Result<(), EngineError> {
        self.unanswered.take().expect("an access waits for its answer");
        if self.kind == TickKind::Exit {
            self.tick += 1;
        }
        if self.second.is_some() {
            return Ok(());
        }
        if let Op::In(_, register) = self.op() {
            self.state.gpr[register] = value as u64 & 0xff;
        }
        self.state.rip += 1;
        self.retire();
        Ok(())
    }

    fn amid_accesses(&mut self) -> Result<bool, EngineError> {
        Ok(self.second.is_some())
    }

    fn interruptible(&mut self) -> Result<bool, EngineError> {
        Ok(self.vector.is_none() && self.second.is_none() && self.open())
    }

    fn set_interrupt_request(&mut self, wanted: bool) {
        self.window_wanted = wanted;
    }

    fn inject(&mut self, vector: u8) -> Result<(), EngineError> {
        self.assert_boundary();
        assert!(
            self.open() && self.second.is_none(),
            "injected while the guest is not interruptible"
        );
        self.vector = Some(vector);
        Ok(())
    }

    fn set_time_base(&mut self, base: TimeBase) {
        self.base = base;
    }

    fn moment(&mut self) -> Result<Moment, EngineError> {
        self.assert_boundary();
        Ok(Moment { tick: self.tick, rip: self.state.rip, rcx: self.state.gpr[RCX] })
    }

    fn cpu_state(&mut self) -> Result<CpuState, EngineError> {
        self.assert_boundary();
        Ok(self.state.clone())
    }

    fn set_cpu_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.state = state.clone();
        Ok(())
    }

    fn read_ram(&self, address: u64, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.ram[address as usize..][..bytes.len()]);
    }

    fn visit_ram(&self, visit: &mut dyn FnMut(u64, &[u8])) {
        visit(0, &self.ram);
    }

    fn save(&mut self) -> Result<Option<EngineState>, EngineError> {
        if self.unanswered.is_some() || self.second.is_some() || self.vector.is_some() {
            return Ok(None);
        }
        let cpu = self.state.clone();
        Ok(Some(EngineState { tick: self.tick, cpu, ..EngineState::default() }))
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.state = state.cpu.clone();
        self.tick = state.tick;
        Ok(())
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(self.kick.clone())
    }
}
