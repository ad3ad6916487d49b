//! A seeded machine that makes traces as a real one would: functions with loops, calls and branches,
//! objects and arrays, interrupts, faults, system calls, REP, two processes, and code that is written
//! over. Its instructions are real encodings, so that disassemblers agree with it. Beside the batches
//! it keeps its own account of what it did.

mod program;

use reprise_random::Random;
use std::collections::HashMap;

use program::Place::{Array, Global, Local, Object, Push, Strings, Table};
use program::{Code, End, Form, KERNEL_BASE, Piece, USER_BASES};
use reprise_trace::instructions::AccessKind::Write;
use reprise_trace::instructions::{
    AccessKind, Batch, BlockDefinition, BlockEnd, CUT, Contents, Definition, Delivery, Event,
    InstructionDefinition, Marker, Mode, StaticAccess,
};

/// An instruction of the account, or an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Instruction(Executed),
    Event(Event),
}

/// What an instruction did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Executed {
    pub(crate) linear: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) mode: Mode,
    pub(crate) retired: bool,
    pub(crate) accesses: Vec<Accessed>,
    pub(crate) registers: Vec<u64>,
}

/// What an access did. Without physical addresses or values those are empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Accessed {
    pub(crate) address: u64,
    pub(crate) size_bytes: u16,
    pub(crate) kind: AccessKind,
    pub(crate) physical: Option<u64>,
    pub(crate) values: Vec<u64>,
}

/// A number that looks like any other, always the same for `number`.
fn mix(number: u64) -> u64 {
    Random::new(number).next()
}

/// What to make.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options {
    pub(crate) seed: u64,
    pub(crate) contents: Contents,
    /// Functions of each program.
    pub(crate) functions: usize,
    /// About every so many blocks an interrupt or a fault comes.
    pub(crate) interrupt_period: u64,
    /// Keep an account.
    pub(crate) account: bool,
}

impl Options {
    pub(crate) fn new(seed: u64) -> Self {
        let contents = Contents::default();
        Self { seed, contents, functions: 30, interrupt_period: 400, account: true }
    }

    pub(crate) fn with_everything(seed: u64) -> Self {
        let contents = Contents { physical: true, values: true, registers: true, page_walks: true };
        Self { contents, ..Self::new(seed) }
    }
}

/// Which piece of which code, where, how often written over, and from which instruction on.
type BlockKey = (bool, usize, usize, u64, u64, usize);

/// The machine.
pub(crate) struct Synthetic {
    options: Options,
    random: Random,
    user: Code,
    kernel: Code,
    ids: HashMap<BlockKey, (u32, Vec<InstructionDefinition>)>,
    next_id: u32,
    versions: HashMap<(bool, usize, usize), u64>,
    /// The piece's times so far, for patterns.
    times: HashMap<(bool, usize, usize), u64>,
    process: usize,
    in_kernel: bool,
    handling: bool,
    user_stack: u64,
    kernel_stack: u64,
    object: u64,
    array: u64,
    index: u64,
    source: u64,
    destination: u64,
    pub(crate) batch: Batch,
    pub(crate) entries: Vec<Entry>,
    pub(crate) instructions: u64,
    last_marker: u64,
    target_instructions: u64,
}

impl Synthetic {
    pub(crate) fn new(options: Options) -> Self {
        let mut random = Random::new(options.seed);
        let user = Code::new(&mut random, options.functions, true);
        let kernel = Code::new(&mut random, options.functions, false);
        Self {
            options,
            random,
            user,
            kernel,
            ids: HashMap::new(),
            next_id: 0,
            versions: HashMap::new(),
            times: HashMap::new(),
            process: 0,
            in_kernel: false,
            handling: false,
            user_stack: 0x7fff_ffff_e000,
            kernel_stack: 0xffff_c900_0000_4000,
            object: 0x1000_0000,
            array: 0x2000_0000,
            index: 0,
            source: 0x3000_0000,
            destination: 0x3100_0000,
            batch: Batch::default(),
            entries: Vec::new(),
            instructions: 0,
            last_marker: 0,
            target_instructions: 0,
        }
    }

    /// What tests compare with: CR3 of the process that runs.
    pub(crate) fn cr3(&self) -> u64 {
        0x10_0000 + 0x1000 * self.process as u64
    }

    /// Goes on until about so many more instructions have retired; the batch has them.
    pub(crate) fn advance(&mut self, instructions: u64) -> Batch {
        self.target_instructions = self.instructions + instructions;
        while self.instructions < self.target_instructions {
            if self.random.one_in(8) {
                self.process ^= 1;
                let cr3 = self.cr3();
                self.event(Event::AddressSpace { cr3 });
            }
            let function = 1 + self.random.below(self.options.functions as u64 / 4) as usize;
            self.call(false, function);
            if self.random.one_in(16) {
                self.restart_blocks();
            }
        }
        std::mem::take(&mut self.batch)
    }

    /// A code cache that fills up is emptied, which ends a batch; here only an empty one restarts.
    fn restart_blocks(&mut self) {
        if self.batch.is_empty() {
            self.batch.restart = true;
            self.ids.clear();
            self.next_id = 0;
        }
    }

    fn event(&mut self, event: Event) {
        self.batch.push_event(event);
        if self.options.account {
            self.entries.push(Entry::Event(event));
        }
    }

    fn stack(&mut self) -> &mut u64 {
        if self.in_kernel { &mut self.kernel_stack } else { &mut self.user_stack }
    }

    fn mode(&self) -> Mode {
        if self.in_kernel { Mode::KERNEL } else { Mode::USER }
    }

    fn base(&self) -> u64 {
        if self.in_kernel { KERNEL_BASE } else { USER_BASES[self.process] }
    }

    fn physical(&self, linear: u64) -> u64 {
        let page = linear >> 12;
        let frame = if linear >> 63 == 1 {
            page & 0xf_ffff
        } else {
            mix(page + self.process as u64 * 77) & 0xf_ffff
        };
        frame << 12 | linear & 0xfff
    }

    fn call(&mut self, in_kernel: bool, function: usize) {
        let before = std::mem::replace(&mut self.in_kernel, in_kernel);
        self.object = 0x1000_0000 + 256 * (mix(self.random.below(1 << 10)) % (1 << 14));
        self.array = 0x2000_0000 + 0x10_0000 * (function as u64 % 7);
        let code = if in_kernel { &self.kernel } else { &self.user };
        let count = code.functions[function].len();
        let mut number = 0;
        while number < count {
            let code = if in_kernel { &self.kernel } else { &self.user };
            let piece = code.functions[function][number].clone();
            let place = (in_kernel, function, number);
            let ended = self.instructions >= self.target_instructions;
            match &piece.end {
                End::Loop(times) => {
                    for _ in 0..if ended { 1 } else { *times } {
                        self.index += 1;
                        self.execute(place, &piece, 0);
                    }
                }
                End::If { period } => {
                    self.execute(place, &piece, 0);
                    let times = self.times.entry(place).or_insert(0);
                    *times += 1;
                    let taken = match period {
                        0 => self.random.one_in(3),
                        period => times.is_multiple_of(*period),
                    };
                    number += usize::from(taken && number + 2 < count);
                }
                End::Call(targets) => {
                    let target = targets[self.random.below(targets.len() as u64) as usize];
                    if !ended || function == 0 {
                        self.execute(place, &piece, 0);
                        self.call(in_kernel, target);
                    } else {
                        // Nothing deeper: leaves out the rest of the function, and says so.
                        let address = Some(self.base() + piece.offset);
                        self.event(Event::Skipped { instructions: 0, address });
                        number = count - 2;
                    }
                }
                End::Syscall => {
                    self.execute(place, &piece, 0);
                    let bytes: usize = piece.forms.iter().map(|form| form.bytes.len()).sum();
                    self.handle(self.base() + piece.offset + bytes as u64 + piece.end.length());
                }
                End::Return | End::InterruptReturn => self.execute(place, &piece, 0),
            }
            number += 1;
        }
        self.in_kernel = before;
    }

    /// Runs the kernel's handler, which returns to `address`.
    fn handle(&mut self, address: u64) {
        let (before, object) = (std::mem::replace(&mut self.handling, true), self.object);
        self.call(true, 0);
        self.handling = before;
        self.object = object;
        self.event(Event::Return { address });
    }

    /// Runs a piece from one of its instructions on, with whatever comes between.
    fn execute(&mut self, place: (bool, usize, usize), piece: &Piece, first: usize) {
        self.maybe_marker();
        let overwritten = piece.forms.iter().any(|form| form.bytes[0] == 0xb8);
        if overwritten && self.random.one_in(60) {
            *self.versions.entry(place).or_insert(0) += 1;
        }
        let version = self.versions.get(&place).copied().unwrap_or(0);
        let key = (place.0, place.1, place.2, self.base(), version, first);
        if !self.ids.contains_key(&key) {
            let definition = self.define(piece, version, first);
            self.ids.insert(key, (self.next_id, definition.instructions.clone()));
            self.batch.definitions.push(Definition { id: self.next_id, block: definition });
            self.next_id += 1;
        }
        let (id, instructions) = self.ids[&key].clone();
        let linear = self.base() + piece.offset;
        let offset: usize = piece.forms[..first].iter().map(|form| form.bytes.len()).sum();
        // A REP takes long, so it is often what an interrupt meets.
        let rep = instructions.iter().position(|one| one.repeated);
        let period = self.options.interrupt_period;
        let period = if rep.is_some() { period.min(20) } else { period };
        let interrupted = !self.handling && self.random.one_in(period);
        let anywhere = self.random.below(instructions.len() as u64) as usize;
        let cut = interrupted.then(|| rep.unwrap_or(anywhere));
        self.batch.words.push(id);
        let mut at = linear + offset as u64;
        for (number, instruction) in instructions.iter().enumerate() {
            let form = piece.forms.get(first + number);
            let repeats = form.is_some_and(|form| matches!(form.place, Some((Strings, ..))));
            if cut == Some(number) {
                let unfinished = if repeats { self.random.below(5) as usize } else { 0 };
                self.instruction(at, instruction, form, Some(unfinished), 0);
                let accesses = unfinished as u32;
                self.batch.words.extend([CUT | number as u32, accesses]);
                self.deliver(at, !repeats && !instruction.accesses.is_empty());
                return self.execute(place, piece, first + number);
            }
            let repetitions = if repeats { self.random.below(20) as u32 } else { 1 };
            self.instruction(at, instruction, form, None, repetitions);
            at += instruction.bytes.len() as u64;
        }
    }

    fn maybe_marker(&mut self) {
        if self.instructions >= self.last_marker + 5000 {
            self.last_marker = self.instructions;
            let tick = self.instructions;
            self.event(Event::Marker(Marker { tick, virtual_ns: tick * 2 }));
        }
    }

    fn deliver(&mut self, address: u64, may_fault: bool) {
        let is_fault = may_fault && self.random.one_in(2);
        let event = if is_fault {
            let fault_address = Some(self.object);
            let (kind, error_code) = (Delivery::Exception, Some(6));
            Event::Delivery { kind, vector: 14, error_code, address, fault_address }
        } else {
            let (kind, error_code) = (Delivery::Interrupt, None);
            Event::Delivery { kind, vector: 32, error_code, address, fault_address: None }
        };
        self.event(event);
        self.handle(address);
    }

    fn define(&self, piece: &Piece, version: u64, first: usize) -> BlockDefinition {
        let mut linear = self.base() + piece.offset;
        linear += piece.forms[..first].iter().map(|form| form.bytes.len() as u64).sum::<u64>();
        let mut instructions: Vec<_> =
            piece.forms[first..].iter().map(|form| form.define(version)).collect();
        let bytes: usize =
            instructions.iter().map(|one: &InstructionDefinition| one.bytes.len()).sum();
        let jump_at = linear + bytes as u64;
        instructions.push(piece.end.define(jump_at, self.base() + piece.target));
        let end = linear + instructions.iter().map(|one| one.bytes.len() as u64).sum::<u64>();
        let next_page = (linear & !0xfff) + 0x1000;
        BlockDefinition {
            linear,
            physical: self.physical(linear),
            next_page: (end > next_page).then(|| self.physical(next_page)),
            mode: self.mode(),
            end: match piece.end {
                End::Call(_) => BlockEnd::Call,
                End::Return => BlockEnd::Return,
                _ => BlockEnd::Other,
            },
            instructions,
        }
    }

    /// One instruction: its accesses, or, if it does not retire, so many of them.
    fn instruction(
        &mut self,
        linear: u64,
        instruction: &InstructionDefinition,
        form: Option<&Form>,
        unfinished: Option<usize>,
        repetitions: u32,
    ) {
        let retired = unfinished.is_none();
        let count = unfinished.unwrap_or(instruction.accesses.len() * repetitions as usize);
        if retired && instruction.repeated {
            self.batch.counts.push(repetitions);
        }
        let mut accesses = Vec::new();
        for (number, access) in instruction.accesses.iter().cycle().take(count).enumerate() {
            accesses.push(self.access(linear, access, form, number));
        }
        let mut registers = Vec::new();
        if retired && self.options.contents.registers {
            let words = instruction.register_writes.iter().map(|write| u64::from(write.words));
            registers.extend((0..words.sum()).map(|word| self.instructions * 3 + word));
        }
        self.batch.registers.extend(&registers);
        self.instructions += u64::from(retired);
        if self.options.account && (retired || count > 0) {
            let (bytes, mode) = (instruction.bytes.clone(), self.mode());
            let executed = Executed { linear, bytes, mode, retired, accesses, registers };
            self.entries.push(Entry::Instruction(executed));
        }
    }

    fn access(
        &mut self,
        linear: u64,
        access: &StaticAccess,
        form: Option<&Form>,
        number: usize,
    ) -> Accessed {
        let place = form.and_then(|form| form.place).map(|(place, ..)| place);
        let address = match place {
            Some(Object(displacement)) => self.object + u64::from(displacement),
            Some(Local(displacement)) => {
                let frame = *self.stack() & !0xff;
                frame - u64::from(displacement)
            }
            Some(Array) => self.array + 8 * (self.index % 4096),
            Some(Global) => linear.wrapping_add(0x1006),
            Some(Table) => 0x4000_0000 + 8 * self.random.below(1 << 17),
            Some(Strings) if number.is_multiple_of(2) => {
                self.source = 0x3000_0000 + (self.source + 8) % 0x8000;
                self.source
            }
            Some(Strings) => {
                self.destination = 0x3100_0000 + (self.destination + 8) % 0x8000;
                self.destination
            }
            Some(Push) => {
                *self.stack() -= 8;
                *self.stack()
            }
            _ if access.kind == Write => {
                *self.stack() -= 8;
                *self.stack()
            }
            // POP, RET, IRETQ.
            _ => {
                *self.stack() += 8;
                *self.stack() - 8
            }
        };
        let Contents { physical, values, .. } = self.options.contents;
        let physical = physical.then(|| self.physical(address));
        let mut words = Vec::new();
        if values {
            let words_each = usize::from(access.size_bytes).div_ceil(8);
            words.extend((0..access.value_words()).map(|word| {
                let value = mix(address + self.instructions + word as u64);
                let bytes = usize::from(access.size_bytes) - 8 * (word % words_each);
                if bytes >= 8 { value } else { value & ((1 << (8 * bytes)) - 1) }
            }));
        }
        self.batch.addresses.push(address);
        self.batch.physical.extend(physical);
        self.batch.values.extend(&words);
        let (size_bytes, kind) = (access.size_bytes, access.kind);
        Accessed { address, size_bytes, kind, physical, values: words }
    }
}
