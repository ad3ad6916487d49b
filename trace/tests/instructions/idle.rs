//! What an idle guest does is left out, and nothing else: held against an account of random guests that
//! is divided at its HLTs afterwards.

use reprise_random::Random;
use reprise_trace::instructions::filter::{Filter, LeftOut, MAX_IDLE_INSTRUCTIONS, Selection};
use reprise_trace::instructions::{
    AccessKind, Batch, BlockDefinition, BlockEnd, CUT, Contents, Definition, Delivery, Direction,
    Event, Feed, InstructionDefinition, Marker, Mode, Observer, Position, RegisterWrite,
    StaticAccess,
};

use crate::account::Account;
use crate::synthetic::Entry;

const KERNEL: u64 = 0xffff_ffff_8100_0000;
const HALTING: usize = 0;
const HANDLER: usize = 1;
const USER: usize = 2;
const LONG: usize = 3;
const LONG_INSTRUCTIONS: u64 = 1111;
const SHORT: usize = 4;

fn one(bytes: &[u8]) -> InstructionDefinition {
    InstructionDefinition { bytes: bytes.to_vec(), ..InstructionDefinition::default() }
}

/// The guest's code, a block a line: STI and HLT; a handler with all kinds of accesses; a program.
fn blocks() -> Vec<BlockDefinition> {
    let accessing = |bytes: &[u8], kind, size_bytes, repeated| InstructionDefinition {
        accesses: vec![StaticAccess::plain(kind, size_bytes)],
        repeated,
        register_writes: vec![RegisterWrite { register: 4, words: 1 }],
        ..one(bytes)
    };
    let codes = [
        (Mode::KERNEL, vec![one(&[0xfb]), one(&[0xf4])]),
        (
            Mode::KERNEL,
            vec![
                accessing(&[0x53], AccessKind::Write, 8, false),
                accessing(&[0x01, 0x43, 0x20], AccessKind::ReadWrite, 4, false),
                accessing(&[0xf3, 0xaa], AccessKind::Write, 1, true),
                // Ends in the byte that HLT is.
                one(&[0xb0, 0xf4]),
            ],
        ),
        (Mode::USER, vec![one(&[0x90]), one(&[0x90])]),
        (Mode::KERNEL, vec![one(&[0x90]); LONG_INSTRUCTIONS as usize]),
        (Mode::KERNEL, vec![one(&[0x90])]),
    ];
    let define = |(number, (mode, instructions))| {
        let linear = if mode == Mode::USER { 0x40_0000 } else { KERNEL + 0x2000 * number as u64 };
        let (physical, end) = (linear & 0xff_ffff, BlockEnd::Other);
        BlockDefinition { linear, physical, next_page: None, mode, end, instructions }
    };
    codes.into_iter().enumerate().map(define).collect()
}

const EVERYTHING: Contents =
    Contents { physical: true, values: true, registers: true, page_walks: true };

/// Makes batches of these blocks; their numbers change.
struct Guest {
    random: Random,
    blocks: Vec<BlockDefinition>,
    first: usize,
    batch: Batch,
    ticks: u64,
}

impl Guest {
    fn new(seed: u64) -> Self {
        let mut guest = Self {
            random: Random::new(seed),
            blocks: blocks(),
            first: 0,
            batch: Batch::default(),
            ticks: 0,
        };
        guest.define(0);
        guest
    }

    /// Starts a batch that defines all blocks anew, beginning with `first`.
    fn define(&mut self, first: usize) {
        self.first = first;
        let count = self.blocks.len();
        let order = (0..count).map(|number| (number + first) % count);
        let define = |(id, number): (usize, usize)| Definition {
            id: id as u32,
            block: self.blocks[number].clone(),
        };
        let definitions = order.enumerate().map(define).collect();
        self.batch = Batch { restart: true, definitions, ..Batch::default() };
    }

    /// Runs a block, perhaps not all of it.
    fn run(&mut self, block: usize, cut: bool) {
        let count = self.blocks.len();
        self.batch.words.push(((block + count - self.first) % count) as u32);
        let instructions = self.blocks[block].instructions.clone();
        // A cut comes in the midst of the handler's REP, and before the HLT.
        let retired = if cut { instructions.len().min(3) - 1 } else { instructions.len() };
        let mut unretired = 0;
        for (number, instruction) in instructions.iter().enumerate().take(retired + 1) {
            let mut times = usize::from(number < retired);
            if instruction.repeated {
                times = 1 + self.random.below(4) as usize;
                if number < retired {
                    self.batch.counts.push(times as u32);
                } else {
                    unretired = times;
                }
            }
            for access in
                instruction.accesses.iter().cycle().take(times * instruction.accesses.len())
            {
                let address = self.random.below(1 << 40);
                self.batch.addresses.push(address);
                self.batch.physical.push(address & 0xffff);
                for _ in 0..access.value_words() {
                    self.batch.values.push(self.random.next());
                }
            }
            if number < retired {
                for _ in &instruction.register_writes {
                    self.batch.registers.push(self.random.next());
                }
            }
        }
        if cut {
            self.batch.words.extend([CUT | retired as u32, unretired as u32]);
        }
        self.ticks += retired as u64;
    }

    fn event(&mut self, event: Event) {
        self.batch.push_event(event);
    }

    fn port(&mut self, port: u16) {
        self.event(Event::Port { direction: Direction::Out, port, size_bytes: 1, value: 0x20 });
    }

    /// From a HLT to the next, with seldom anything but the interrupt controller accessed.
    fn stretch(&mut self) {
        if self.random.one_in(4) {
            let marker = Marker { tick: self.ticks, virtual_ns: 3 * self.ticks };
            self.event(Event::Marker(marker));
        }
        if self.random.one_in(20) {
            self.event(Event::Dma { direction: Direction::In, physical: 0x1000, bytes: 512 });
        }
        let (kind, address) = (Delivery::Interrupt, KERNEL + 2);
        let delivery =
            Event::Delivery { kind, vector: 32, error_code: None, address, fault_address: None };
        self.event(delivery);
        for _ in 0..self.random.below(4) {
            let cut = self.random.one_in(3);
            self.run(HANDLER, cut);
            match self.random.below(30) {
                0 => self.port(0x3f8),
                1 => self.event(Event::Mmio {
                    direction: Direction::In,
                    physical: 0xb8000,
                    size_bytes: 2,
                    value: 1,
                }),
                2 => self.event(Event::Skipped { instructions: 5, address: None }),
                3 => self.event(Event::AddressSpace { cr3: 0x5000 }),
                4..15 => self.port(0x20),
                _ => {}
            }
        }
        if self.random.one_in(10) {
            self.run(USER, false);
        }
        self.event(Event::Return { address: KERNEL });
        if self.random.one_in(10) {
            self.run(HALTING, true);
        }
        self.run(HALTING, false);
        match self.random.below(12) {
            0 => self.port(0x3f8),
            1 => self.port(0x20),
            2 => self.event(Event::AddressSpace { cr3: 0x6000 }),
            _ => {}
        }
    }

    /// What it has made since it was last asked; then, sometimes, block numbers change.
    fn take(&mut self) -> Batch {
        let batch = std::mem::take(&mut self.batch);
        if self.random.one_in(3) {
            let first = self.random.below(self.blocks.len() as u64) as usize;
            self.define(first);
        }
        batch
    }
}

/// What an account should be without idle stretches, and what was left out.
fn expected(entries: &[Entry]) -> (Vec<Entry>, LeftOut) {
    let mut stretches: Vec<Vec<Entry>> = vec![Vec::new()];
    let mut has_halted = false;
    for entry in entries {
        let begins = match entry {
            Entry::Instruction(_) => true,
            Entry::Event(event) => {
                matches!(event, Event::Delivery { .. } | Event::Dma { .. } | Event::Skipped { .. })
            }
        };
        if has_halted && begins {
            has_halted = false;
            stretches.push(Vec::new());
        }
        stretches.last_mut().expect("there is one").push(entry.clone());
        has_halted |= is_halt(entry);
    }
    let (mut kept, mut left_out) = (Vec::new(), LeftOut::default());
    let (mut skipped, mut from) = (0, None);
    for (number, stretch) in stretches.iter().enumerate() {
        let is_idle = number > 0 && is_idle(stretch);
        for entry in stretch {
            let stays = match entry {
                Entry::Instruction(_) => false,
                Entry::Event(event) => {
                    matches!(event, Event::Marker(_) | Event::AddressSpace { .. })
                }
            };
            if !is_idle || stays {
                if skipped > 0 {
                    let (instructions, address) = (skipped, from.take());
                    kept.push(Entry::Event(Event::Skipped { instructions, address }));
                    skipped = 0;
                }
                kept.push(entry.clone());
                continue;
            }
            match entry {
                Entry::Instruction(one) => {
                    from = from.or(Some(one.linear));
                    skipped += u64::from(one.retired);
                    left_out.idle += u64::from(one.retired);
                }
                Entry::Event(event) => {
                    left_out.events += 1;
                    if let Event::Delivery { address, .. } = event {
                        from = from.or(Some(*address));
                    }
                }
            }
        }
    }
    if let Some(address) = from {
        kept.push(Entry::Event(Event::Skipped { instructions: skipped, address: Some(address) }));
    }
    (kept, left_out)
}

fn is_halt(entry: &Entry) -> bool {
    matches!(entry, Entry::Instruction(one) if one.retired && one.bytes == [0xf4])
}

fn is_idle(stretch: &[Entry]) -> bool {
    let is_work = |entry: &Entry| match entry {
        Entry::Instruction(one) => one.mode == Mode::USER,
        Entry::Event(Event::Port { port, .. }) => *port != 0x20,
        Entry::Event(event) => {
            matches!(event, Event::Mmio { .. } | Event::Dma { .. } | Event::Skipped { .. })
        }
    };
    let retired = |entry: &&Entry| matches!(entry, Entry::Instruction(one) if one.retired);
    stretch.iter().any(is_halt)
        && !stretch.iter().any(is_work)
        && stretch.iter().filter(retired).count() as u64 <= MAX_IDLE_INSTRUCTIONS
}

fn skipping() -> Selection {
    Selection { skip_idle: true, ..Selection::default() }
}

/// What a filter hands on of these batches, and what it left out; and all that there is.
fn filtered(selection: Selection, batches: &[Batch]) -> (Vec<Entry>, LeftOut, Vec<Entry>) {
    let (mut filter, mut all) = (Filter::new(selection, Account::default()), Account::default());
    filter.begin(&Position::default()).expect("begins");
    let (mut feed, mut other) = (Feed::new(EVERYTHING), Feed::new(EVERYTHING));
    for batch in batches {
        feed.push(batch, &mut filter).expect("keeps the contract");
        other.push(batch, &mut all).expect("keeps the contract");
    }
    filter.end().expect("ends");
    let left_out = filter.left_out();
    (filter.into_observer().entries, left_out, all.entries)
}

#[test]
fn what_an_idle_guest_does_is_left_out_and_nothing_else() {
    let (mut idle, mut all_instructions) = (0, 0);
    for seed in 0..300 {
        let mut guest = Guest::new(seed);
        let mut batches = Vec::new();
        for _ in 0..40 {
            guest.stretch();
            if guest.random.one_in(3) {
                // In the midst of a stretch.
                guest.run(HANDLER, false);
                batches.push(guest.take());
            }
        }
        batches.push(guest.take());
        let (kept, left_out, all) = filtered(skipping(), &batches);
        let (wanted, counted) = expected(&all);
        assert_eq!(left_out, counted, "seed {seed}");
        let differs = kept.iter().zip(&wanted).position(|(kept, wanted)| kept != wanted);
        assert_eq!(differs, None, "seed {seed}: kept other things");
        assert_eq!(kept.len(), wanted.len(), "seed {seed}");
        idle += left_out.idle;
        all_instructions += guest.ticks;
        let (whole, nothing, _) = filtered(Selection::default(), &batches);
        assert!(whole == all && nothing == LeftOut::default(), "seed {seed}: without the filter");
    }
    assert!(all_instructions / 4 < idle && idle < all_instructions, "{idle} of {all_instructions}");
}

#[test]
fn a_stretch_of_many_instructions_is_work() {
    // With the HLT's own two the first has just as many as an idle stretch may have.
    for (short, idle) in [(8, MAX_IDLE_INSTRUCTIONS), (9, 0)] {
        let mut guest = Guest::new(1);
        guest.run(HALTING, false);
        (0..90).for_each(|_| guest.run(LONG, false));
        (0..short).for_each(|_| guest.run(SHORT, false));
        guest.run(HALTING, false);
        assert_eq!(guest.ticks, 2 + 90 * LONG_INSTRUCTIONS + short + 2);
        let (kept, left_out, all) = filtered(skipping(), &[guest.take()]);
        assert_eq!(left_out.idle, idle, "{short}");
        assert_eq!(left_out.instructions(), idle, "{short}");
        assert!((kept == all) == (idle == 0), "{short}");
    }
}

#[test]
fn other_filters_see_what_idle_stretches_leave() {
    let mut guest = Guest::new(2);
    (0..60).for_each(|_| guest.stretch());
    let batches = [guest.take()];
    let (_, alone, all) = filtered(skipping(), &batches);
    let window = Some(20..guest.ticks - 20);
    let selection = Selection { instructions: window, ..skipping() };
    let (kept, left_out, _) = filtered(selection, &batches);
    assert_eq!(left_out.idle, alone.idle);
    assert!(left_out.outside_window > 0);
    // Numbers go on behind what was skipped: by them nothing is lost.
    let account = |entries: &[Entry]| {
        entries.iter().fold((0, 0), |(retired, told), entry| match entry {
            Entry::Instruction(one) => (retired + u64::from(one.retired), told),
            Entry::Event(Event::Skipped { instructions, .. }) => (retired, told + instructions),
            Entry::Event(_) => (retired, told),
        })
    };
    let ((kept, told), (retired, before)) = (account(&kept), account(&all));
    assert_eq!(kept + told, retired + before);
    assert_eq!(told - before, left_out.instructions());
}

#[test]
fn notes_name_idle_guests() {
    let left_out = LeftOut { idle: 7, ..LeftOut::default() };
    assert_eq!(left_out.notes(), ["left out: 7 instructions of an idle guest"]);
    let mut read = LeftOut::default();
    assert!(read.add_note(&left_out.notes()[0]));
    assert_eq!(read, left_out);
}
