//! Filters keep exactly what they are asked for, say what they left out, and lose no count.

use reprise_trace::instructions::filter::{Filter, Privilege, Sample as Sampling, Selection};
use reprise_trace::instructions::{
    Contents, Delivery, Event, Observer, PlainRuns, Position, Run, SegmentOptions, TraceError,
    TraceWriter,
};

use crate::account::{Account, feed, header, read};
use crate::synthetic::{Entry, Executed, Options};

/// An instruction of the account with its number and its address space.
struct Placed<'a> {
    number: u64,
    cr3: u64,
    executed: &'a Executed,
}

/// What the machine did, each instruction with where it stands.
fn placed(entries: &[Entry]) -> Vec<Placed<'_>> {
    let mut position = Position { cr3: 0x10_0000, ..Position::default() };
    let mut all = Vec::new();
    for entry in entries {
        match entry {
            Entry::Event(event) => position.pass_event(event),
            Entry::Instruction(executed) => {
                let (number, cr3) = (position.instruction, position.cr3);
                all.push(Placed { number, cr3, executed });
                position.instruction += u64::from(executed.retired);
            }
        }
    }
    all
}

/// A selection, and what it means for one instruction.
type Case = (Selection, fn(&Placed<'_>) -> bool);

fn cases() -> Vec<Case> {
    let none = Selection::default;
    let range = 0x0040_0f80..0x0040_1400;
    vec![
        (none(), |_| true),
        (Selection { instructions: Some(5_001..9_003), ..none() }, |one| {
            (5_001..9_003).contains(&one.number)
        }),
        (Selection { privilege: Some(Privilege::User), ..none() }, |one| {
            one.executed.mode.cpl == 3
        }),
        (Selection { privilege: Some(Privilege::Kernel), ..none() }, |one| {
            one.executed.mode.cpl == 0
        }),
        (Selection { cr3: Some(0x10_1fff), ..none() }, |one| one.cr3 == 0x10_1000),
        (Selection { linear: Some(range), ..none() }, |one| {
            (0x0040_0f80..0x0040_1400).contains(&one.executed.linear)
        }),
        (Selection { sample: Some(Sampling { period: 7, length: 2 }), ..none() }, |one| {
            one.number % 7 < 2
        }),
        (
            Selection {
                instructions: Some(1_000..15_000),
                privilege: Some(Privilege::User),
                sample: Some(Sampling { period: 1_000, length: 100 }),
                ..none()
            },
            |one| {
                (1_000..15_000).contains(&one.number)
                    && one.executed.mode.cpl == 3
                    && one.number % 1_000 < 100
            },
        ),
    ]
}

fn instructions(entries: &[Entry]) -> Vec<&Executed> {
    let retired = entries.iter().filter_map(|entry| match entry {
        Entry::Instruction(executed) if executed.retired => Some(executed),
        _ => None,
    });
    retired.collect()
}

#[test]
fn a_filter_keeps_exactly_what_was_asked_for() {
    for (number, (selection, keeps)) in cases().into_iter().enumerate() {
        let options = Options::with_everything(11);
        let mut filter = Filter::new(selection.clone(), Account::default());
        let start = Position { cr3: 0x10_0000, ..Position::default() };
        filter.begin(&start).expect("begins");
        let entries = feed(options, 20_000, 900, &mut filter);
        filter.end().expect("ends");
        let all = placed(&entries);
        let expected: Vec<&Executed> = all
            .iter()
            .filter(|one| one.executed.retired && keeps(one))
            .map(|one| one.executed)
            .collect();
        assert!(!expected.is_empty(), "case {number} keeps something");
        let kept = instructions(&filter.observer().entries);
        assert_eq!(kept.len(), expected.len(), "case {number}");
        assert!(kept == expected, "case {number}");
        let retired = instructions(&entries).len() as u64;
        let left_out = filter.left_out();
        assert_eq!(left_out.instructions() + kept.len() as u64, retired, "case {number}");
        let notes = left_out.notes().len();
        assert_eq!(notes > 0, left_out.instructions() > 0, "case {number}");
        let told: u64 = filter.observer().entries.iter().map(skipped).sum();
        assert_eq!(told, left_out.instructions(), "case {number}: skips are told");
    }
}

fn skipped(entry: &Entry) -> u64 {
    match entry {
        Entry::Event(Event::Skipped { instructions, .. }) => *instructions,
        _ => 0,
    }
}

#[test]
fn a_skip_names_where_control_went() {
    let user = Selection { privilege: Some(Privilege::User), ..Selection::default() };
    let mut filter = Filter::new(user, Account::default());
    let entries = feed(Options::new(12), 20_000, 900, &mut filter);
    filter.end().expect("ends");
    let kept = &filter.observer().entries;
    let interrupted: Vec<u64> = entries
        .iter()
        .filter_map(|entry| match entry {
            Entry::Event(Event::Delivery { address, .. }) => Some(*address),
            _ => None,
        })
        .filter(|address| address >> 63 == 0)
        .collect();
    assert!(!interrupted.is_empty());
    let skips: Vec<u64> = kept
        .iter()
        .filter_map(|entry| match entry {
            Entry::Event(Event::Skipped { address, .. }) => *address,
            _ => None,
        })
        .collect();
    let found = interrupted.iter().filter(|address| skips.contains(address)).count();
    assert_eq!(found, interrupted.len(), "a skip begins at the interrupted instruction");
    let deliveries = kept.iter().filter(|entry| {
        matches!(entry, Entry::Event(Event::Delivery { kind: Delivery::Interrupt, .. }))
    });
    assert_eq!(deliveries.count(), 0, "deliveries go with the handler");
}

#[test]
fn a_filtered_trace_goes_into_the_native_format_and_back() {
    for (number, (selection, _)) in cases().into_iter().enumerate() {
        let options = Options::with_everything(13);
        let segments = SegmentOptions { instructions: 3_000, ..SegmentOptions::default() };
        let writer =
            TraceWriter::create(Vec::new(), &header(options.contents), segments).expect("writes");
        let mut filter = Filter::new(selection, (writer, Account::default()));
        filter.begin(&Position::default()).expect("begins");
        feed(options, 20_000, 900, &mut filter);
        filter.end().expect("ends");
        let notes = filter.left_out().notes();
        let (writer, account) = filter.into_observer();
        let (read, ending) = read(&writer.finish(&notes).expect("finishes"));
        ending.expect("reads");
        assert_eq!(read.entries, account.entries, "case {number}");
    }
}

#[test]
fn a_filter_knows_when_nothing_can_follow() {
    let early = Selection { instructions: Some(0..1_000), ..Selection::default() };
    let mut filter = Filter::new(early, Account::default());
    feed(Options::new(14), 900, 900, &mut filter);
    assert_eq!(filter.is_past_window(), filter.left_out().outside_window > 0);
    feed(Options::new(14), 3_000, 900, &mut filter);
    assert!(filter.is_past_window());
}

#[test]
fn samples_of_nothing_and_of_everything_come_to_an_end() {
    for (period, length, keeps_all) in [(0, 0, false), (0, 1, true), (5, 0, false), (5, 9, true)] {
        let sample = Some(Sampling { period, length });
        let selection = Selection { sample, ..Selection::default() };
        let mut filter = Filter::new(selection, Account::default());
        let entries = feed(Options::new(15), 2_000, 900, &mut filter);
        let (kept, all) = (instructions(&filter.observer().entries), instructions(&entries));
        assert_eq!(kept.len(), if keeps_all { all.len() } else { 0 }, "{length} of {period}");
    }
}

/// Hands on run after run, never many at once.
struct OneByOne<O>(O);

impl<O: Observer> Observer for OneByOne<O> {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.0.begin(position)
    }

    fn new_blocks(&mut self) {
        self.0.new_blocks();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.0.run(run)
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.0.event(event)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        self.0.end()
    }
}

/// Counts how many runs come at once.
#[derive(Default)]
struct AtOnce {
    account: Account,
    runs: usize,
    handed: usize,
}

impl Observer for AtOnce {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.account.run(run)
    }

    fn runs(&mut self, runs: &mut PlainRuns<'_>) -> Result<(), TraceError> {
        self.handed += 1;
        for run in runs {
            self.runs += 1;
            self.account.run(&run)?;
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.account.event(event)
    }
}

#[test]
fn many_runs_at_once_are_filtered_as_one_after_the_other() {
    const SEED: u64 = 12;
    let long =
        Selection { sample: Some(Sampling { period: 900, length: 300 }), ..Selection::default() };
    let outside = Selection {
        linear: Some(0x0040_0f83..0x0040_1401),
        privilege: Some(Privilege::User),
        ..Selection::default()
    };
    let selections = cases().into_iter().map(|(selection, _)| selection);
    for (number, selection) in selections.chain([long, outside]).enumerate() {
        let physical = number % 2 == 0;
        let contents = Contents { physical, ..Contents::default() };
        let options = Options { contents, ..Options::new(SEED) };
        let start = Position { cr3: 0x10_0000, ..Position::default() };
        let mut one_by_one = OneByOne(Filter::new(selection.clone(), Account::default()));
        let mut at_once = Filter::new(selection.clone(), AtOnce::default());
        one_by_one.begin(&start).expect("begins");
        at_once.begin(&start).expect("begins");
        feed(options, 16_000, 900, &mut one_by_one);
        feed(options, 16_000, 900, &mut at_once);
        one_by_one.end().expect("ends");
        at_once.end().expect("ends");
        let what = format!("seed {SEED}, case {number}, physical {physical}");
        let all = at_once.observer();
        assert_eq!(one_by_one.0.left_out(), at_once.left_out(), "{what}");
        assert!(one_by_one.0.observer().entries == all.account.entries, "{what}");
        // A sample of two instructions is seldom a whole run.
        let is_fine = selection.sample.is_some_and(|sample| sample.length < 10);
        let together = all.runs > all.handed;
        assert!(is_fine || together, "{what}: {} in {} pieces", all.runs, all.handed);
    }
}
