//! The first *input* in which two logs differ. Marks are none: they say how far a recorder had come
//! when the host's clock told it to.

use std::collections::VecDeque;
use std::fmt::{self, Display, Formatter};

use reprise_trace::event::{Event, Record};
use reprise_trace::log::{LogError, LogReader};

/// A record and its number in its log, from 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// Its number.
    pub number: u64,
    /// The record.
    pub record: Record,
}

/// The first place where two logs do not hold the same input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputDifference {
    /// What the first log has; `None` if it ends before.
    pub a: Option<Numbered>,
    /// What the second log has.
    pub b: Option<Numbered>,
}

impl InputDifference {
    /// The tick before which both logs hold the same input.
    pub fn tick(&self) -> u64 {
        let ticks = [&self.a, &self.b].into_iter().flatten().map(|found| found.record.moment.tick);
        ticks.min().unwrap_or(0)
    }

    /// Whether the logs give their machines different things, and not only say that these were
    /// different already.
    pub fn is_of_input(&self) -> bool {
        match (&self.a, &self.b) {
            (Some(a), Some(b)) => {
                let (one, other) = (&a.record, &b.record);
                one.moment.tick != other.moment.tick || given(&one.event) != given(&other.event)
            }
            _ => true,
        }
    }
}

impl InputDifference {
    /// Both logs give their machines the same, and not at the same place: the two records.
    pub fn displaced(&self) -> Option<(&Record, &Record)> {
        let (one, other) = (&self.a.as_ref()?.record, &self.b.as_ref()?.record);
        let same = given(&one.event)? == given(&other.event)?;
        (same && one.moment != other.moment).then_some((one, other))
    }
}

/// A byte that was typed, and the tick at which it entered the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Typed {
    /// The byte.
    pub byte: u8,
    /// The tick.
    pub tick: u64,
}

/// The first byte that was not typed alike, whenever and in however many pieces it was: what two recordings
/// of different clocks have in common as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypedDifference {
    /// Bytes before it, which are the same.
    pub offset: u64,
    /// The byte on each side; `None` where nothing more was typed.
    pub bytes: [Option<Typed>; 2],
}

impl Display for TypedDifference {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let shown = |typed: Option<Typed>| match typed {
            Some(Typed { byte, tick }) => {
                format!("'{}' (entered at tick {tick})", char::from(byte).escape_default())
            }
            None => "not there".to_owned(),
        };
        let [a, b] = self.bytes.map(shown);
        write!(f, "byte {} is {a} in the first, and {b} in the second", self.offset)
    }
}

/// The console bytes of a log, one by one.
struct TypedBytes<'a> {
    log: &'a mut LogReader,
    numbered: u64,
    left: VecDeque<Typed>,
}

impl TypedBytes<'_> {
    fn next(&mut self) -> Result<Option<Typed>, LogError> {
        while self.left.is_empty() {
            let Some(found) = next(self.log, &mut self.numbered)? else { return Ok(None) };
            if let Event::Console(bytes) = found.record.event {
                let tick = found.record.moment.tick;
                self.left.extend(bytes.into_iter().map(|byte| Typed { byte, tick }));
            }
        }
        Ok(self.left.pop_front())
    }
}

/// Finds the first byte that was not typed alike; `None` if all were. A log that is damaged ends there.
///
/// # Errors
/// If a log cannot be read for another reason than damage.
pub fn first_typed_difference(
    a: &mut LogReader,
    b: &mut LogReader,
) -> Result<Option<TypedDifference>, LogError> {
    let [mut one, mut other] =
        [a, b].map(|log| TypedBytes { log, numbered: 0, left: VecDeque::new() });
    for offset in 0.. {
        let bytes = [one.next()?, other.next()?];
        match bytes {
            [None, None] => break,
            [Some(a), Some(b)] if a.byte == b.byte => {}
            _ => return Ok(Some(TypedDifference { offset, bytes })),
        }
    }
    Ok(None)
}

/// An event as far as the machine is given it.
fn given(event: &Event) -> Option<&Event> {
    let is_input = !matches!(event, Event::End { .. } | Event::Mark(_)) && !event.is_told();
    is_input.then_some(event)
}

impl Display for InputDifference {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let shown = |found: &Option<Numbered>| match found {
            Some(Numbered { number, record }) => {
                format!("record {number}, {} at tick {}", record.event, record.moment.tick)
            }
            None => "no more".to_owned(),
        };
        write!(f, "the first has {}; the second has {}", shown(&self.a), shown(&self.b))?;
        match self.is_of_input() {
            true => Ok(()),
            false => f.write_str(" (the same, to machines that were different already)"),
        }
    }
}

/// Finds the first difference; `None` if both logs hold the same to their ends. A log that is damaged
/// ends there.
///
/// # Errors
/// If a log cannot be read for another reason than damage.
pub fn first_input_difference(
    a: &mut LogReader,
    b: &mut LogReader,
) -> Result<Option<InputDifference>, LogError> {
    let (mut in_a, mut in_b) = (0, 0);
    loop {
        let (one, other) = (next(a, &mut in_a)?, next(b, &mut in_b)?);
        match (&one, &other) {
            (None, None) => return Ok(None),
            (Some(a), Some(b)) if a.record == b.record => {}
            _ => return Ok(Some(InputDifference { a: one, b: other })),
        }
    }
}

fn next(log: &mut LogReader, number: &mut u64) -> Result<Option<Numbered>, LogError> {
    loop {
        let record = match log.next_record() {
            Ok(Some(record)) => record.into_inner(),
            Ok(None) | Err(LogError::Damaged(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        *number += 1;
        if !matches!(record.event, Event::Mark(_)) && !record.event.is_told() {
            return Ok(Some(Numbered { number: *number - 1, record }));
        }
    }
}

#[cfg(test)]
mod tests {
    use reprise_trace::event::MarkDigest;
    use reprise_trace::moment::Moment;

    use super::*;

    fn record(tick: u64, event: Event) -> Record {
        Record { moment: Moment { tick, rip: 0x1000, rcx: 0 }, cpu_digest: tick, event }
    }

    fn mark(tick: u64) -> Record {
        record(tick, Event::Mark(MarkDigest { console_bytes: 0, console_digest_prefix: 0 }))
    }

    fn found(a: Vec<Record>, b: Vec<Record>) -> Option<InputDifference> {
        let (mut a, mut b) = (LogReader::from_records(a), LogReader::from_records(b));
        first_input_difference(&mut a, &mut b).expect("both logs are sound")
    }

    #[test]
    fn marks_are_no_input() {
        let typed = record(5, Event::Console(b"a".to_vec()));
        let (one, other) = (vec![mark(1), typed.clone(), mark(9)], vec![typed, mark(6), mark(7)]);
        assert_eq!(found(one, other), None);
    }

    #[test]
    fn bytes_are_compared_however_they_were_split() {
        let typed = |tick: u64, bytes: &str| record(tick, Event::Console(bytes.into()));
        let found = |a: Vec<Record>, b: Vec<Record>| {
            let (mut a, mut b) = (LogReader::from_records(a), LogReader::from_records(b));
            first_typed_difference(&mut a, &mut b).expect("both logs are sound")
        };
        let split = || vec![typed(3, "o"), mark(5), typed(9, "ne")];
        assert_eq!(found(vec![typed(70, "one")], split()), None);
        let difference = found(vec![typed(70, "onto")], split()).expect("they differ");
        let bytes = [Some(Typed { byte: b't', tick: 70 }), Some(Typed { byte: b'e', tick: 9 })];
        assert_eq!(difference, TypedDifference { offset: 2, bytes });
        assert!(
            difference.to_string().contains("byte 2 is 't' (entered at tick 70)"),
            "{difference}"
        );
        let difference = found(split(), vec![]).expect("nothing was typed");
        assert_eq!((difference.offset, difference.bytes[1]), (0, None));
    }

    #[test]
    fn the_same_input_at_another_place_is_displaced() {
        let typed = |tick: u64, byte: u8| record(tick, Event::Console(vec![byte]));
        let of = |a, b| found(vec![a], vec![b]).expect("they differ");
        assert!(of(typed(5, b'a'), typed(6, b'a')).displaced().is_some());
        assert!(of(typed(5, b'a'), typed(6, b'b')).displaced().is_none());
        let elsewhere = Record { cpu_digest: 9, ..typed(5, b'a') };
        assert!(of(typed(5, b'a'), elsewhere).displaced().is_none(), "it is the same place");
    }

    #[test]
    fn the_first_input_that_differs_is_told_with_both_numbers() {
        let typed = |byte: u8| record(5, Event::Console(vec![byte]));
        let difference =
            found(vec![mark(1), typed(b'a')], vec![typed(b'b'), mark(6)]).expect("they differ");
        assert_eq!((difference.tick(), difference.is_of_input()), (5, true));
        let numbers = [&difference.a, &difference.b].map(|one| one.as_ref().map(|one| one.number));
        assert_eq!(numbers, [Some(1), Some(0)]);
        let difference = found(vec![typed(b'a')], vec![]).expect("one ends");
        assert!(difference.to_string().contains("the second has no more"), "{difference}");
        // The same input to machines that are different already.
        let other = Record { cpu_digest: 7, ..typed(b'a') };
        let difference = found(vec![typed(b'a')], vec![other]).expect("digests differ");
        assert!(!difference.is_of_input());
        assert!(difference.to_string().ends_with("different already)"), "{difference}");
    }
}
