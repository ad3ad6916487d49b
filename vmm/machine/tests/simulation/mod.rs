//! Simulated hardware and a simulated world outside.

mod checkpoints;
pub(crate) mod program;
pub(crate) mod sim_host;
pub(crate) mod toy_engine;

use reprise_devices::board::{Board, BoardConfig};
use reprise_machine::clock::TimeSource;
use reprise_machine::inputs::{Recording, Replaying};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{MachineError, Outcome};
use reprise_trace::event::Record;
use reprise_trace::log::{FrameSink, LogReader, LogWriter, MemorySink};
use reprise_trace::moment::TickKind;

use self::program::Program;
use self::sim_host::{SimHost, World};
use self::toy_engine::{Disturbance, ToyEngine};

/// A machine to be: what its ticks are and where its time comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    pub(crate) kind: TickKind,
    pub(crate) time: TimeSource,
}

/// Instructions or exits, time from ticks or from the host.
pub(crate) const CLOCKS: [Clock; 4] = [
    Clock { kind: TickKind::Instruction, time: TimeSource::Ticks { ns_per_tick: 100 } },
    Clock { kind: TickKind::Exit, time: TimeSource::Host },
    Clock { kind: TickKind::Instruction, time: TimeSource::Host },
    Clock { kind: TickKind::Exit, time: TimeSource::Ticks { ns_per_tick: 3000 } },
];

/// What a recording left behind.
pub(crate) struct Recorded {
    pub(crate) result: Result<Outcome, MachineError>,
    pub(crate) records: Vec<Record>,
    /// What the guest wrote, as the host saw it.
    pub(crate) output: Vec<u8>,
}

impl Recorded {
    pub(crate) fn outcome(&self) -> &Outcome {
        self.result.as_ref().expect("the run ends")
    }
}

fn board() -> Board {
    Board::new(&BoardConfig { ram_bytes: 64 << 10, rtc_start_s: 1_700_000_000 })
}

pub(crate) fn record(
    clock: Clock,
    program: &Program,
    world: &World,
    disturbance: Disturbance,
) -> Recorded {
    let (result, output, sink) =
        record_into(clock, program, world, disturbance, MemorySink::default());
    Recorded { result, output, records: records_of(sink.expect("the log is closed").into_reader()) }
}

/// A machine that records.
pub(crate) fn recording<S: FrameSink>(
    clock: Clock,
    program: &Program,
    world: &World,
    disturbance: Disturbance,
    sink: S,
) -> Machine<ToyEngine, Recording<SimHost, S>> {
    let engine = ToyEngine::new(clock.kind, program.clone(), disturbance);
    let inputs = Recording::new(SimHost::new(world), LogWriter::new(sink));
    Machine::new(engine, board(), inputs, clock.time)
}

pub(crate) fn record_into<S: FrameSink>(
    clock: Clock,
    program: &Program,
    world: &World,
    disturbance: Disturbance,
    sink: S,
) -> (Result<Outcome, MachineError>, Vec<u8>, Option<S>) {
    let mut machine = recording(clock, program, world, disturbance, sink);
    let result = machine.run();
    let (_, _, inputs) = machine.into_parts();
    let (host, sink) = inputs.into_parts();
    (result, host.output, sink)
}

pub(crate) fn records_of(mut log: LogReader) -> Vec<Record> {
    let mut records = Vec::new();
    while let Some(record) = log.next_record().expect("the log is sound") {
        records.push(record.into_inner());
    }
    records
}

pub(crate) fn replaying(
    clock: Clock,
    program: &Program,
    records: &[Record],
    disturbance: Disturbance,
) -> Machine<ToyEngine, Replaying> {
    let engine = ToyEngine::new(clock.kind, program.clone(), disturbance);
    let inputs = Replaying::new(LogReader::from_records(records.to_vec()));
    Machine::new(engine, board(), inputs, clock.time)
}

pub(crate) fn replay(
    clock: Clock,
    program: &Program,
    records: &[Record],
    disturbance: Disturbance,
) -> Outcome {
    replaying(clock, program, records, disturbance).run().expect("the replay comes to an outcome")
}
