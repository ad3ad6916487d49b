//! A synthetic trace, shown to an observer, and the machine's own account of it.

use reprise_trace::instructions::filter::{Filter, Privilege, Selection};
use reprise_trace::instructions::{Contents, Event, Feed, Observer, Position};

use crate::synthetic::{Entry, Executed, Options, Synthetic};

/// Shows an observer a trace of about so many instructions.
pub(crate) fn show(options: Options, instructions: u64, observer: &mut dyn Observer) -> Vec<Entry> {
    let mut machine = Synthetic::new(options);
    let mut feed = Feed::new(options.contents);
    observer.begin(&Position::default()).expect("begins");
    while machine.instructions < instructions {
        let batch = machine.advance(1_000);
        feed.push(&batch, observer).expect("the machine keeps the contract");
    }
    observer.end().expect("ends");
    machine.entries
}

/// The same, with only the user's code.
pub(crate) fn show_user<O: Observer>(seed: u64, instructions: u64, observer: O) -> O {
    let selection = Selection { privilege: Some(Privilege::User), ..Selection::default() };
    let mut filter = Filter::new(selection, observer);
    show(Options::new(seed), instructions, &mut filter);
    filter.into_observer()
}

/// What retired.
pub(crate) fn retired(entries: &[Entry]) -> Vec<&Executed> {
    let retired = entries.iter().filter_map(|entry| match entry {
        Entry::Instruction(executed) if executed.retired => Some(executed),
        _ => None,
    });
    retired.collect()
}

/// Interrupts and exceptions.
pub(crate) fn deliveries(entries: &[Entry]) -> usize {
    entries.iter().filter(|entry| matches!(entry, Entry::Event(Event::Delivery { .. }))).count()
}

/// Places where the machine leaves something out.
pub(crate) fn gaps(entries: &[Entry]) -> usize {
    entries.iter().filter(|entry| matches!(entry, Entry::Event(Event::Skipped { .. }))).count()
}

/// With physical addresses.
pub(crate) fn with_physical(seed: u64) -> Options {
    let contents = Contents { physical: true, ..Contents::default() };
    Options { contents, ..Options::new(seed) }
}
