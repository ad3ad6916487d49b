//! Batches that break the contract are refused, whatever is wrong with them.

use reprise_random::Random;
use reprise_trace::instructions::{
    AccessKind, Batch, BlockDefinition, BlockEnd, Blocks, CUT, Contents, Definition, EVENT, Event,
    Feed, InstructionDefinition, MAX_RUN_ACCESSES, Mode, SegmentOptions, StaticAccess, TraceError,
    TraceWriter,
};

use crate::account::{Account, header};
use crate::synthetic::{Options, Synthetic};

/// The same trace in batches of about so many words; no run is divided.
pub(crate) fn divide(whole: &Batch, words: usize, contents: Contents) -> Vec<Batch> {
    let mut blocks = Blocks::default();
    let first = Batch { definitions: whole.definitions.clone(), ..Batch::default() };
    for definition in &whole.definitions {
        blocks.define(&definition.block).expect("can be");
    }
    let mut batches = vec![first, Batch::default()];
    let (mut addresses, mut physical) = (whole.addresses.iter(), whole.physical.iter());
    let (mut values, mut registers) = (whole.values.iter(), whole.registers.iter());
    let (mut counts, mut events) = (whole.counts.iter(), whole.events.iter());
    let mut rest = &whole.words[..];
    while let [word, behind @ ..] = rest {
        let batch = batches.last_mut().expect("there is one");
        batch.words.push(*word);
        rest = behind;
        if *word == EVENT {
            batch.events.extend(events.next());
            continue;
        }
        let block = blocks.get(*word).expect("is defined");
        let (mut retired, mut unretired) = (block.instruction_count(), 0);
        if let [cut, accesses, behind @ ..] = rest
            && *cut >= CUT
            && *cut != EVENT
        {
            batch.words.extend([cut, accesses]);
            (retired, unretired) = ((cut & !CUT) as usize, *accesses as usize);
            rest = behind;
        }
        for (number, instruction) in block.instructions().enumerate().take(retired + 1) {
            let list = instruction.accesses();
            let total = if number == retired {
                unretired
            } else if instruction.is_repeated() {
                let count = *counts.next().expect("a count");
                batch.counts.push(count);
                count as usize * list.len()
            } else {
                list.len()
            };
            batch.addresses.extend(addresses.by_ref().take(total));
            batch.physical.extend(physical.by_ref().take(total));
            if contents.values {
                let words = list.iter().cycle().take(total).map(StaticAccess::value_words).sum();
                batch.values.extend(values.by_ref().take(words));
            }
            if contents.registers && number < retired {
                let words = instruction.register_writes().iter().map(|one| usize::from(one.words));
                batch.registers.extend(registers.by_ref().take(words.sum()));
            }
        }
        if batch.words.len() >= words {
            batches.push(Batch::default());
        }
    }
    batches
}

fn nop() -> InstructionDefinition {
    InstructionDefinition { bytes: vec![0x90], ..InstructionDefinition::default() }
}

fn rep() -> InstructionDefinition {
    let accesses = vec![StaticAccess::plain(AccessKind::Write, 1)];
    InstructionDefinition { bytes: vec![0xf3, 0xaa], accesses, repeated: true, ..nop() }
}

fn block(instructions: Vec<InstructionDefinition>) -> BlockDefinition {
    BlockDefinition {
        linear: 0x1000,
        physical: 0x5000,
        next_page: None,
        mode: Mode::KERNEL,
        end: BlockEnd::Other,
        instructions,
    }
}

fn batch(block: BlockDefinition, words: &[u32]) -> Batch {
    let definitions = vec![Definition { id: 0, block }];
    Batch { definitions, words: words.to_vec(), ..Batch::default() }
}

#[test]
fn what_the_words_do_not_say_is_refused() {
    let load =
        InstructionDefinition { accesses: vec![StaticAccess::plain(AccessKind::Read, 8)], ..nop() };
    let two = || block(vec![nop(), load.clone()]);
    let with = |words: &[u32], addresses: usize| Batch {
        addresses: vec![8; addresses],
        ..batch(two(), words)
    };
    let cases: [(&str, Batch); 12] = [
        ("an unknown block", with(&[1], 0)),
        ("a missing address", with(&[0], 0)),
        ("too many addresses", with(&[0], 2)),
        ("a cut without a run", with(&[CUT, 0], 0)),
        ("a cut that cuts nothing", with(&[0, CUT | 2, 0], 1)),
        ("half a cut", with(&[0, CUT | 1], 0)),
        ("more accesses than the instruction has", with(&[0, CUT | 1, 2], 2)),
        ("accesses of an instruction without any", with(&[0, CUT, 1], 1)),
        ("a missing event", with(&[EVENT], 0)),
        ("a count too many", Batch { counts: vec![1], ..with(&[0], 1) }),
        ("a missing count", batch(block(vec![rep()]), &[0])),
        (
            "another number",
            Batch { definitions: vec![Definition { id: 1, block: two() }], ..Batch::default() },
        ),
    ];
    for (what, batch) in cases {
        let pushed = Feed::new(Contents::default()).push(&batch, &mut Account::default());
        assert!(matches!(pushed, Err(TraceError::Contract(_))), "{what}: {pushed:?}");
    }
    Feed::new(Contents::default()).push(&with(&[0], 1), &mut Account::default()).expect("fits");
}

#[test]
fn a_run_has_a_bounded_number_of_accesses() {
    for (count, fits) in [(MAX_RUN_ACCESSES, true), (MAX_RUN_ACCESSES + 1, false)] {
        let batch = Batch {
            counts: vec![count as u32],
            addresses: vec![8; count],
            ..batch(block(vec![rep()]), &[0])
        };
        let pushed = Feed::new(Contents::default()).push(&batch, &mut Account::default());
        assert_eq!(pushed.is_ok(), fits);
    }
}

#[test]
fn blocks_that_cannot_be_are_refused() {
    let long = InstructionDefinition { bytes: vec![0x90; 16], ..nop() };
    let no_size = StaticAccess::plain(AccessKind::Read, 0);
    let no_register = StaticAccess { base: 17, ..StaticAccess::plain(AccessKind::Read, 1) };
    let with = |access| InstructionDefinition { accesses: vec![access], ..nop() };
    let at_end = |next_page| BlockDefinition {
        linear: 0x1fff,
        physical: 0x5fff,
        next_page,
        ..block(vec![nop(), nop()])
    };
    let cases = [
        block(vec![]),
        block(vec![long]),
        block(vec![InstructionDefinition::default()]),
        block(vec![nop(); 4097]),
        block(vec![with(no_size)]),
        block(vec![with(no_register)]),
        BlockDefinition { physical: 0x5001, ..block(vec![nop()]) },
        BlockDefinition { next_page: Some(0x6000), ..block(vec![nop()]) },
        BlockDefinition { mode: Mode { cpl: 4, ..Mode::USER }, ..block(vec![nop()]) },
        at_end(None),
        at_end(Some(0x6001)),
    ];
    for case in cases {
        assert!(Blocks::default().define(&case).is_err(), "{case:?}");
    }
    let last = block(vec![nop(); 4096]);
    Blocks::default().define(&last).expect("a page of instructions");
    Blocks::default().define(&at_end(Some(0x6000))).expect("reaches into the next page");
}

#[test]
fn a_run_is_cut_after_the_fact() {
    let event = Event::AddressSpace { cr3: 1 };
    let mut batch = batch(block(vec![rep(), nop()]), &[]);
    assert!(!batch.cut_last_run(0, 0), "there is no run");
    batch.words.push(0);
    batch.push_event(event);
    assert!(batch.cut_last_run(0, 3));
    assert_eq!(batch.words, [0, CUT, 3, EVENT]);
    assert!(!batch.cut_last_run(0, 3), "it is cut already");
    batch.addresses = vec![1, 2, 3];
    let mut account = Account::default();
    Feed::new(Contents::default()).push(&batch, &mut account).expect("keeps the contract");
    assert_eq!(account.entries.len(), 2);
}

#[test]
fn random_batches_end_in_a_value() {
    let contents = Contents { physical: true, values: true, registers: true, page_walks: true };
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let mut whole = Synthetic::new(Options::with_everything(1)).advance(300);
        for _ in 0..=random.below(3) {
            let position = random.below(whole.words.len() as u64) as usize;
            match random.below(5) {
                0 => whole.words[position] = random.next() as u32,
                1 => whole.words[position] = CUT | random.below(4) as u32,
                2 => drop(whole.words.remove(position)),
                3 => drop(whole.addresses.pop()),
                _ => whole.counts.push(random.next() as u32),
            }
        }
        let segments = SegmentOptions::default();
        let mut writer =
            TraceWriter::create(Vec::new(), &header(contents), segments).expect("writes");
        let pushed = Feed::new(contents).push(&whole, &mut writer);
        if let Err(error) = pushed {
            assert!(matches!(error, TraceError::Contract(_)), "seed {seed}: {error}");
        }
    }
}
