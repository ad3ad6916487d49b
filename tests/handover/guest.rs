//! An embedded guest, recorded and replayed in this process on whatever engine a test makes.

use std::time::Instant;

use reprise::boot::{self, GuestSource};
use reprise_devices::board::{Board, BoardConfig};
use reprise_guest_images::embedded;
use reprise_machine::clock::TimeSource;
use reprise_machine::digest::AccessedBits;
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::host::{Host, Wake};
use reprise_machine::inputs::{Planned, Recording, Replaying};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, Outcome};
use reprise_machine::ram::GuestRam;
use reprise_trace::event::{Ending, HandOver, Record};
use reprise_trace::log::{LogReader, LogWriter, MemorySink};
use reprise_trace::moment::TickKind;

/// Any time will do, as long as it is always the same.
const RTC_START_S: u64 = 1_700_000_000;

/// Virtual time on the software CPU.
pub(crate) const SOFT_TIME: TimeSource = TimeSource::Ticks { ns_per_tick: 1 };

/// A run that goes through KVM counts none of them; one that does not is compared with it.
const ACCESSED_BITS: AccessedBits = AccessedBits::SetAside;

/// A guest, and what is typed to it.
#[derive(Clone, Copy)]
pub(crate) struct Guest<'a> {
    pub(crate) name: &'a str,
    pub(crate) cmdline: &'a str,
    pub(crate) typed: &'a str,
}

/// What a recording left behind.
pub(crate) struct Recorded {
    pub(crate) outcome: Outcome,
    pub(crate) records: Vec<Record>,
}

/// A host that types all it has at once and whose clock is the real one.
struct TypingHost {
    started: Instant,
    typed: Vec<u8>,
}

impl Host for TypingHost {
    fn now_ns(&mut self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }
    fn take_console_input(&mut self, room: usize) -> Vec<u8> {
        let count = room.min(self.typed.len());
        self.typed.drain(..count).collect()
    }
    fn input_may_come(&mut self) -> bool {
        !self.typed.is_empty()
    }
    fn wait(&mut self, timeout_ns: Option<u64>) -> Wake {
        if let Some(ns) = timeout_ns {
            std::thread::sleep(std::time::Duration::from_nanos(ns));
        }
        Wake::Timeout
    }
    fn console_output(&mut self, _bytes: &[u8]) {}
    fn stop_requested(&mut self) -> Option<Ending> {
        None
    }
    fn flush_due(&mut self) -> bool {
        false
    }
    fn progress(&mut self, _tick: u64, _virtual_ns: u64) {}
}

impl Guest<'_> {
    /// The guest before its first instruction, on the engine that `make` makes.
    fn start<E: Engine>(
        &self,
        make: impl FnOnce(GuestRam) -> Result<E, EngineError>,
    ) -> (E, Board) {
        let ram = GuestRam::new(32).expect("the host has RAM");
        let config = BoardConfig { ram_bytes: ram.ram_bytes(), rtc_start_s: RTC_START_S };
        let kernel = embedded(self.name).expect("it is listed").image;
        let source = GuestSource { kernel, initrd: None, cmdline: self.cmdline };
        let state = boot::load(&source, &ram).expect("it boots");
        let mut engine = make(ram).expect("the host has the engine");
        engine.set_cpu_state(&state).expect("a first state");
        (engine, Board::new(&config))
    }

    pub(crate) fn record<E: Engine>(
        &self,
        time: TimeSource,
        plan: Vec<Planned>,
        make: impl FnOnce(GuestRam) -> Result<E, EngineError>,
    ) -> Recorded {
        let (engine, board) = self.start(make);
        let host = TypingHost { started: Instant::now(), typed: self.typed.into() };
        let inputs = Recording::new(host, LogWriter::new(MemorySink::default())).with_plan(plan);
        let mut machine =
            Machine::new(engine, board, inputs, time).with_accessed_bits(ACCESSED_BITS);
        let outcome = machine.run().expect("the machine runs");
        let (_, sink) = machine.into_parts().2.into_parts();
        let mut log = sink.expect("the log is closed").into_reader();
        let next = || log.next_record().expect("the log is whole");
        let records = std::iter::from_fn(next).map(|record| record.get().clone()).collect();
        Recorded { outcome, records }
    }

    pub(crate) fn replay<E: Engine>(
        &self,
        time: TimeSource,
        records: &[Record],
        make: impl FnOnce(GuestRam) -> Result<E, EngineError>,
    ) -> Outcome {
        let (engine, board) = self.start(make);
        let inputs = Replaying::new(LogReader::from_records(records.to_vec()));
        let machine = Machine::new(engine, board, inputs, time);
        machine.with_accessed_bits(ACCESSED_BITS).run().expect("the machine runs")
    }
}

/// The same run, to the last bit of its state.
#[track_caller]
pub(crate) fn assert_same_run(one: &Outcome, other: &Outcome, what: &str) {
    let (Conclusion::Ended(first), Conclusion::Ended(second)) =
        (&one.conclusion, &other.conclusion)
    else {
        panic!("{what}: {:?}, then {:?}", one.conclusion, other.conclusion);
    };
    assert_eq!(first, second, "{what}");
    assert_eq!(one.effects, other.effects, "{what}: the console");
    assert_eq!(one.state, other.state, "{what}: the final state");
    assert_eq!(one.moment, other.moment, "{what}");
    assert_eq!(one.virtual_ns, other.virtual_ns, "{what}");
    assert_eq!(one.interrupts, other.interrupts, "{what}");
    assert!(one.state.is_some(), "{what}: the end is an exact moment");
}

/// A hand-over to an engine that counts instructions.
pub(crate) fn to_instructions(engine: &str) -> HandOver {
    HandOver {
        engine: engine.to_owned(),
        clock: "instructions".to_owned(),
        tick_kind: TickKind::Instruction,
        ns_per_tick: 1,
    }
}
