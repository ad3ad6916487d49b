//! An observer that writes down all it is shown, in the form of the synthetic machine's own account.

use std::io::Cursor;

use reprise_trace::header::CpuModelInfo;
use reprise_trace::instructions::{
    Contents, Ending, Event, Feed, Observer, Position, Run, SegmentOptions, TraceError,
    TraceHeader, TraceReader, TraceWriter,
};
use reprise_trace::moment::TickKind;

use crate::synthetic::{Accessed, Entry, Executed, Options, Synthetic};

/// All that an observer is shown.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) position: Option<Position>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) ended: bool,
}

impl Observer for Account {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        assert_eq!(self.position, None, "a trace begins once");
        self.position = Some(*position);
        Ok(())
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let mode = run.block().mode();
        let steps = run.steps().map(|step| {
            Entry::Instruction(Executed {
                linear: step.instruction.linear(),
                bytes: step.instruction.bytes().to_vec(),
                mode,
                retired: step.retired,
                accesses: step
                    .accesses()
                    .map(|access| Accessed {
                        address: access.address,
                        size_bytes: access.size_bytes,
                        kind: access.kind,
                        physical: access.physical,
                        values: access.values.to_vec(),
                    })
                    .collect(),
                registers: step.registers.to_vec(),
            })
        });
        let before = self.entries.len();
        self.entries.extend(steps);
        let unfinished = usize::from(run.unretired_accesses() > 0);
        assert_eq!(self.entries.len() - before, run.retired() + unfinished);
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.entries.push(Entry::Event(*event));
        Ok(())
    }

    fn end(&mut self) -> Result<(), TraceError> {
        assert!(!self.ended, "a trace ends once");
        self.ended = true;
        Ok(())
    }
}

pub(crate) fn header(contents: Contents) -> TraceHeader {
    TraceHeader {
        contents,
        tick: TickKind::Instruction,
        cpu_model: CpuModelInfo { name: "x86-64-v2".into(), version: 1 },
        recording: "00ff".into(),
        filters: vec!["none".into()],
        share: None,
    }
}

/// A synthetic trace as a file, and the machine's own account of it.
pub(crate) struct Sample {
    pub(crate) file: Vec<u8>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) contents: Contents,
    pub(crate) notes: Vec<String>,
}

/// Runs the machine into an observer, in batches of about so many instructions.
pub(crate) fn feed(
    options: Options,
    total: u64,
    batch: u64,
    observer: &mut dyn Observer,
) -> Vec<Entry> {
    let mut machine = Synthetic::new(options);
    let mut feed = Feed::new(options.contents);
    while machine.instructions < total {
        let batch = machine.advance(batch.min(total - machine.instructions));
        feed.push(&batch, observer).expect("the machine keeps the contract");
    }
    machine.entries
}

impl Sample {
    pub(crate) fn new(options: Options, total: u64, segment: u64) -> Self {
        let segments = SegmentOptions { instructions: segment, ..SegmentOptions::default() };
        let mut writer =
            TraceWriter::create(Vec::new(), &header(options.contents), segments).expect("writes");
        writer.begin(&Position::default()).expect("begins");
        let entries = feed(options, total, 777, &mut writer);
        let notes = vec!["left out: nothing".to_string()];
        let file = writer.finish(&notes).expect("finishes");
        Self { file, entries, contents: options.contents, notes }
    }
}

/// Reads a trace to its end, or to where that fails.
pub(crate) fn read(file: &[u8]) -> (Account, Result<Ending, TraceError>) {
    let mut account = Account::default();
    let ending = TraceReader::open(Cursor::new(file)).and_then(|mut one| one.drive(&mut account));
    (account, ending)
}
