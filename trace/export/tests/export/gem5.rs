//! gem5's messages, taken apart by a reader of protocol buffers that knows nothing of the writer.

use reprise_export::gem5::{Gem5, Summary};

use crate::account::{retired, show, show_user};
use crate::synthetic::{Entry, Executed, Options};

/// A field's value.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
}

impl Value {
    fn number(&self) -> u64 {
        let Self::Number(number) = self else { panic!("{self:?} is no number") };
        *number
    }

    fn bytes(&self) -> &[u8] {
        let Self::Bytes(bytes) = self else { panic!("{self:?} is a number") };
        bytes
    }
}

fn split<'a>(from: &mut &'a [u8], bytes: usize) -> &'a [u8] {
    let (first, rest) = from.split_at(bytes);
    *from = rest;
    first
}

fn varint(from: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = split(from, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return value;
        }
    }
    panic!("a number of more than 64 bits");
}

/// The fields of a message, by number, in order.
fn fields(mut bytes: &[u8]) -> Vec<(u64, Value)> {
    let from = &mut bytes;
    let mut fields = Vec::new();
    while !from.is_empty() {
        let key = varint(from);
        let value = match key & 7 {
            0 => Value::Number(varint(from)),
            1 => Value::Number(u64::from_le_bytes(split(from, 8).try_into().expect("eight"))),
            2 => {
                let length = varint(from) as usize;
                Value::Bytes(split(from, length).to_vec())
            }
            other => panic!("wire type {other}"),
        };
        fields.push((key >> 3, value));
    }
    fields
}

/// The messages of a stream.
fn messages(mut bytes: &[u8]) -> Vec<Vec<(u64, Value)>> {
    let from = &mut bytes;
    assert_eq!(split(from, 4), b"gem5");
    let mut messages = Vec::new();
    while !from.is_empty() {
        let length = varint(from) as usize;
        messages.push(fields(split(from, length)));
    }
    messages
}

/// The only value of a field.
fn only(message: &[(u64, Value)], field: u64) -> &Value {
    let mut values = message.iter().filter(|(number, _)| *number == field);
    let (_, value) = values.next().expect("the field is there");
    assert!(values.next().is_none(), "field {field} is there once");
    value
}

fn check(message: &[(u64, Value)], executed: &Executed) {
    assert!(message.iter().all(|(field, _)| [1, 4, 5, 6, 8, 9].contains(field)));
    assert_eq!(only(message, 1).number(), executed.linear);
    assert_eq!(only(message, 4).number(), 3);
    assert_eq!(only(message, 9).bytes(), executed.bytes);
    let writes = executed.accesses.iter().any(|one| one.kind.writes());
    match only(message, 6).number() {
        30 => assert!(!writes, "{executed:x?}"),
        // REP MOVS is there to write, even if it was interrupted before it did.
        31 => assert!(executed.bytes[0] == 0xf3 || writes, "{executed:x?}"),
        1 | 2 => assert!(executed.accesses.is_empty(), "{executed:x?}"),
        other => panic!("class {other} of {executed:x?}"),
    }
    let accesses = message.iter().filter(|(field, _)| *field == 8);
    let accesses: Vec<_> = accesses.map(|(_, value)| fields(value.bytes())).collect();
    let flags = if executed.mode.cpl == 3 { 0 } else { 0x8000 };
    let expected = executed.accesses.iter().map(|one| {
        let size = u64::from(one.size_bytes);
        [(1, one.address), (2, size), (3, flags)]
            .map(|(field, value)| (field, Value::Number(value)))
    });
    assert!(accesses.iter().eq(expected.collect::<Vec<_>>().iter()), "{executed:x?}");
}

#[test]
fn each_instruction_is_a_message() {
    for seed in 1..4 {
        let mut exporter = Gem5::new(Vec::new(), 3);
        let entries = show(Options::new(seed), 20_000, &mut exporter);
        let (bytes, summary) = exporter.into_parts();
        let messages = messages(&bytes);
        let header = &messages[0];
        let expected = [
            (1, Value::Bytes(b"reprise".to_vec())),
            (3, Value::Number(1_000_000_000)),
            (4, Value::Number(1)),
        ];
        assert_eq!(header[..], expected);
        // A REP that was interrupted has a message too.
        let executed: Vec<&Executed> = entries
            .iter()
            .filter_map(|entry| match entry {
                Entry::Instruction(executed) => Some(executed),
                Entry::Event(_) => None,
            })
            .collect();
        assert_eq!(messages.len() - 1, executed.len(), "seed {seed}");
        assert_eq!(summary, Summary { messages: executed.len() as u64, accesses_left_out: 0 });
        assert!(executed.len() > retired(&entries).len(), "seed {seed}: some REP is interrupted");
        for (message, executed) in messages[1..].iter().zip(executed) {
            check(message, executed);
        }
        let ticks = messages[1..].iter().map(|message| only(message, 5).number());
        assert!(ticks.clone().is_sorted() && ticks.max() >= Some(20_000), "seed {seed}");
    }
}

#[test]
fn an_empty_trace_has_its_header() {
    let exporter = show_user(1, 0, Gem5::new(Vec::new(), 0));
    assert_eq!(messages(&exporter.into_parts().0).len(), 1);
}
