//! Runs a guest under a trace and keeps the trace.
#![allow(dead_code)] // Each test file uses a part of it.

use std::sync::mpsc::{Receiver, Sender, channel};

use reprise_cpu::engine::SoftEngine;
use reprise_cpu::tracing::BatchSink;
use reprise_trace::instructions::{Batch, Contents, Event, Feed, Observer, Run, TraceError};

/// What is traced.
const CONTENTS: Contents =
    Contents { physical: true, values: false, registers: false, page_walks: true };

struct Collect(Sender<Batch>);

impl BatchSink for Collect {
    fn exchange(&mut self, batch: Batch, _tick: u64) -> Option<Batch> {
        self.0.send(batch).ok().map(|()| Batch::default())
    }
}

/// A piece of a trace.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Item {
    /// A run: where, how many instructions retired, what they accessed, and how many accesses of one
    /// that did not retire are among them.
    Run {
        linear: u64,
        cpl: u8,
        bytes: Vec<u8>,
        retired: usize,
        addresses: Vec<u64>,
        physical: Vec<u64>,
        unretired: usize,
    },
    Event(Event),
}

/// A trace as its observers see it.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Trace {
    pub(crate) items: Vec<Item>,
    pub(crate) retired: u64,
}

impl Observer for Trace {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let block = run.block();
        self.retired += run.retired() as u64;
        self.items.push(Item::Run {
            linear: run.linear(),
            cpl: block.mode().cpl,
            bytes: block.instructions().flat_map(|one| one.bytes().to_vec()).collect(),
            retired: run.retired(),
            addresses: run.addresses().to_vec(),
            physical: run.steps().flat_map(|step| step.physical.to_vec()).collect(),
            unretired: run.unretired_accesses(),
        });
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.items.push(Item::Event(*event));
        Ok(())
    }
}

/// A trace under way.
pub(crate) struct Pending(Receiver<Batch>);

/// Traces what `engine` does from here on.
pub(crate) fn start(engine: &mut SoftEngine) -> Pending {
    let (send, receive) = channel();
    engine.start_trace(Box::new(Collect(send)), CONTENTS);
    Pending(receive)
}

impl Pending {
    /// The trace up to here.
    pub(crate) fn finish(self, engine: &mut SoftEngine) -> Trace {
        engine.stop_trace();
        let mut trace = Trace::default();
        let mut feed = Feed::new(CONTENTS);
        for batch in self.0 {
            feed.push(&batch, &mut trace).expect("the batch keeps the contract");
        }
        trace
    }
}
