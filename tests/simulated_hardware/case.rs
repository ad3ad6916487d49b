//! One guest, recorded and replayed on simulated hardware.

use std::fs::File;
use std::path::Path;

use reprise::boot::{self, GuestSource};
use reprise_branch_clock::engine::{BranchClock, Counts, Parameters};
use reprise_branch_clock::settle::Stand;
use reprise_branch_clock::vcpu::Vcpu;
use reprise_devices::board::{Board, BoardConfig};
use reprise_devices::cpu_model;
use reprise_expand::{Control, Counting, Threads, Window, expand};
use reprise_machine::clock::TimeSource;
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::inputs::{Recording, Replaying};
use reprise_machine::machine::Machine;
use reprise_machine::outcome::{Conclusion, MachineError, Outcome};
use reprise_machine::ram::GuestRam;
use reprise_replay::{OnSoftware, RecordedClock};
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::Record;
use reprise_trace::header::{
    CpuModelInfo, GuestInfo, Header, HostInfo, ImageInfo, ImageRole, MachineInfo,
};
use reprise_trace::instructions::Contents;
use reprise_trace::log::{LogWriter, MemorySink};
use reprise_trace::moment::TickKind;
use reprise_trace::recording::RecordingWriter;

use crate::world::SeededWorld;

/// Where the real-time clock starts: any time will do, as long as it is always the same.
pub(crate) const RTC_START_S: u64 = 1_700_000_000;

/// A guest, and what is typed to it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case<'a> {
    pub(crate) source: GuestSource<'a>,
    pub(crate) ram_mib: u64,
    pub(crate) typed: &'a str,
    /// The longest pause in typing it.
    pub(crate) longest_pause_ns: u64,
    /// When somebody stops the guest, unless it ends by itself.
    pub(crate) stops_ns: Option<u64>,
}

/// The hardware, and how the clock deals with it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hardware {
    pub(crate) disturbance: Disturbance,
    /// Conditional branches by which an overflow may be late, as the clock believes.
    pub(crate) skid: u64,
    pub(crate) stand: Stand,
}

impl Hardware {
    pub(crate) fn intel(seed: u64) -> Self {
        Self { disturbance: Disturbance::intel(seed), skid: 100, stand: Stand::default() }
    }

    pub(crate) fn zen(seed: u64) -> Self {
        Self { disturbance: Disturbance::zen(seed), skid: 10_000, stand: Stand::default() }
    }
}

/// Hardware, and what is done to RDTSC on it.
pub(crate) trait Clocked: Clone {
    /// Its vCPU.
    type Vcpu: Vcpu;

    /// The hardware.
    fn hardware(&self) -> &Hardware;

    /// The same done to other hardware.
    fn on_hardware(&self, hardware: Hardware) -> Self;

    /// The same of another seed.
    fn with_seed_added(&self, seed: u64) -> Self {
        let mut other = *self.hardware();
        other.disturbance.seed += seed;
        self.on_hardware(other)
    }

    /// The same, which spares what accessed bits it would set early.
    fn sparing_accessed_bits(&self) -> Self {
        let mut other = *self.hardware();
        other.disturbance.spares_accessed_bits = true;
        self.on_hardware(other)
    }

    /// The clock on it.
    fn engine(&self, ram: GuestRam) -> Result<BranchClock<Self::Vcpu>, EngineError>;

    /// The simulation within.
    fn simulated(engine: &BranchClock<Self::Vcpu>) -> &SimulatedVcpu;

    /// What is written at the head of a recording made on it.
    fn header(&self, case: &Case<'_>) -> Header;
}

/// RDTSC is not trapped.
impl Clocked for Hardware {
    type Vcpu = SimulatedVcpu;

    fn hardware(&self) -> &Hardware {
        self
    }

    fn on_hardware(&self, hardware: Hardware) -> Self {
        hardware
    }

    fn engine(&self, ram: GuestRam) -> Result<BranchClock<SimulatedVcpu>, EngineError> {
        let mut vcpu = SimulatedVcpu::new(ram, self.disturbance)?;
        vcpu.hide_time_stamp_counter();
        BranchClock::new(vcpu, Parameters { skid: self.skid, stand: self.stand })
    }

    fn simulated(engine: &BranchClock<SimulatedVcpu>) -> &SimulatedVcpu {
        engine.vcpu()
    }

    fn header(&self, case: &Case<'_>) -> Header {
        case.header()
    }
}

/// What a recording left behind.
pub(crate) struct Recorded {
    pub(crate) outcome: Outcome,
    pub(crate) records: Vec<Record>,
    pub(crate) console: String,
    pub(crate) counts: Counts,
}

impl Case<'_> {
    pub(crate) fn load(&self) -> (GuestRam, CpuState, Board) {
        let ram = GuestRam::new(self.ram_mib).expect("the host has RAM");
        let config = BoardConfig { ram_bytes: ram.ram_bytes(), rtc_start_s: RTC_START_S };
        let state = boot::load(&self.source, &ram).expect("it boots");
        (ram, state, Board::new(&config))
    }

    pub(crate) fn start<C: Clocked>(&self, hardware: &C) -> (BranchClock<C::Vcpu>, Board) {
        let (ram, state, board) = self.load();
        let mut engine = hardware.engine(ram).expect("the host has memory");
        engine.set_cpu_state(&state).expect("a first state");
        (engine, board)
    }

    /// Replays a recording on the software CPU, which finds every moment by itself. Gives how many
    /// instructions it executed.
    pub(crate) fn replay_on_software(&self, recorded: &Recorded) -> u64 {
        self.replay_on_software_as(recorded, &self.header())
    }

    /// As [`Case::replay_on_software`], of a recording with this header.
    pub(crate) fn replay_on_software_as(&self, recorded: &Recorded, header: &Header) -> u64 {
        let mut machine = self.on_software(recorded, header);
        let outcome = machine.run().expect("the machine runs");
        assert_equal(&recorded.outcome, &outcome, 0);
        machine.engine().instructions_executed()
    }

    /// Expands a recording with this header, every instruction shown to an observer. Gives how many those
    /// were.
    pub(crate) fn expand(&self, recorded: &Recorded, header: &Header) -> u64 {
        let mut machine = self.on_software(recorded, header);
        let (window, contents) = (Window::default(), Contents::default());
        let (counting, control) = (Counting::default(), Control::default());
        let expanded = expand(&mut machine, window, counting, contents, Threads::Two, &control);
        let expanded = expanded.expect("it is expanded");
        assert_equal(&recorded.outcome, &expanded.outcome.expect("it came to its end"), 0);
        assert_eq!(machine.engine().instructions_executed(), expanded.instructions);
        assert_eq!(expanded.observer.instructions, expanded.instructions, "each was shown");
        expanded.instructions
    }

    /// The software CPU, about to replay a recording with this header.
    pub(crate) fn on_software(
        &self,
        recorded: &Recorded,
        header: &Header,
    ) -> Machine<RecordedClock, Replaying> {
        let (ram, state, board) = self.load();
        let mut engine = RecordedClock::new(ram, header).expect("the host has memory");
        // As on the hardware: virtual time is not what Linux's RDTSC read there.
        engine.software().stop_time_stamp_counter();
        engine.set_cpu_state(&state).expect("a first state");
        let inputs = Replaying::new(log_of(&recorded.records));
        Machine::new(engine, board, inputs, TimeSource::Host)
    }

    /// What a host with a PMU writes at the head of such a recording.
    pub(crate) fn header(&self) -> Header {
        let kernel = ImageInfo::of(ImageRole::Kernel, "kernel", self.source.kernel);
        let initrd = self.source.initrd.map(|it| ImageInfo::of(ImageRole::Initrd, "initrd", it));
        Header {
            machine: MachineInfo { ram_mib: self.ram_mib, rtc_start_s: RTC_START_S },
            cpu_model: CpuModelInfo {
                name: cpu_model::NAME.to_owned(),
                version: cpu_model::VERSION,
            },
            tick_kind: TickKind::ConditionalBranch,
            ns_per_tick: 0,
            engine: "kvm".to_owned(),
            clock: "pmu".to_owned(),
            host: HostInfo::default(),
            guest: GuestInfo {
                name: "simulated".to_owned(),
                command_line: self.source.cmdline.to_owned(),
                images: [Some(kernel), initrd].into_iter().flatten().collect(),
            },
            created_unix_s: RTC_START_S,
            reprise_version: "0".to_owned(),
            precautions: Vec::new(),
        }
    }

    /// Writes the recording's file.
    pub(crate) fn write(&self, recorded: &Recorded, path: &Path) {
        self.write_as(recorded, path, &self.header());
    }

    /// As [`Case::write`], with this header.
    pub(crate) fn write_as(&self, recorded: &Recorded, path: &Path, header: &Header) {
        let file = File::create(path).expect("a file");
        let mut writer = RecordingWriter::create(file, header).expect("a header");
        let images = [Some(self.source.kernel), self.source.initrd];
        for (index, image) in images.into_iter().flatten().enumerate() {
            writer.write_image(index, image).expect("an image");
        }
        let mut log = LogWriter::new(writer);
        for record in &recorded.records {
            log.append(record.clone()).expect("a record");
        }
        log.finish().expect("a log").finish().expect("an end");
    }

    pub(crate) fn record(&self, hardware: &Hardware) -> Recorded {
        self.record_on(hardware).1
    }

    /// Records, and gives the engine as well.
    pub(crate) fn record_on<C: Clocked>(&self, hardware: &C) -> (BranchClock<C::Vcpu>, Recorded) {
        let (engine, board) = self.start(hardware);
        let world_clock_ns = C::simulated(&engine).world_clock_ns();
        let seed = hardware.hardware().disturbance.seed;
        let world = SeededWorld::new(seed, self.typed, world_clock_ns)
            .typing_within(self.longest_pause_ns)
            .stopping_at(self.stops_ns);
        let inputs = Recording::new(world, LogWriter::new(MemorySink::default()));
        let mut machine = Machine::new(engine, board, inputs, TimeSource::Host);
        let outcome = machine.run().expect("the machine runs");
        let (engine, _, inputs) = machine.into_parts();
        let (world, sink) = inputs.into_parts();
        let mut log = sink.expect("the log is closed").into_reader();
        let next = || log.next_record().expect("the log is whole");
        let records = std::iter::from_fn(next).map(|record| record.get().clone()).collect();
        let console = String::from_utf8_lossy(&world.console).into_owned();
        let counts = engine.counts();
        (engine, Recorded { outcome, records, console, counts })
    }

    pub(crate) fn replay<C: Clocked>(
        &self,
        records: &[Record],
        hardware: &C,
    ) -> (Result<Outcome, MachineError>, Counts) {
        let (outcome, engine) = self.replay_on(records, hardware);
        (outcome, engine.counts())
    }

    /// Replays, and gives the engine as well.
    pub(crate) fn replay_on<C: Clocked>(
        &self,
        records: &[Record],
        hardware: &C,
    ) -> (Result<Outcome, MachineError>, BranchClock<C::Vcpu>) {
        let (engine, board) = self.start(hardware);
        let inputs = Replaying::new(log_of(records));
        let mut machine = Machine::new(engine, board, inputs, TimeSource::Host);
        let outcome = machine.run();
        (outcome, machine.into_parts().0)
    }
}

/// A log of these records.
pub(crate) fn log_of(records: &[Record]) -> reprise_trace::log::LogReader {
    let mut writer = LogWriter::new(MemorySink::default());
    for record in records {
        writer.append(record.clone()).expect("memory takes it");
    }
    writer.finish().expect("memory takes it").into_reader()
}

/// Holds a replay to its recording.
#[track_caller]
pub(crate) fn assert_equal(recording: &Outcome, replay: &Outcome, seed: u64) {
    assert_same_end(recording, replay, seed);
    assert_eq!(recording.moment, replay.moment, "seed {seed}");
    assert_eq!(recording.ticks, replay.ticks, "seed {seed}");
}

#[track_caller]
fn assert_same_end(recording: &Outcome, replay: &Outcome, seed: u64) {
    let (Conclusion::Ended(recorded), Conclusion::Ended(replayed)) =
        (&recording.conclusion, &replay.conclusion)
    else {
        panic!(
            "seed {seed}: recorded {:?}, replayed {:?}",
            recording.conclusion, replay.conclusion
        );
    };
    assert_eq!(recorded, replayed, "seed {seed}");
    assert_eq!(recording.effects, replay.effects, "seed {seed}");
    assert_eq!(recording.state, replay.state, "seed {seed}");
    assert_eq!(recording.events, replay.events, "seed {seed}");
    assert_eq!(recording.virtual_ns, replay.virtual_ns, "seed {seed}");
    assert_eq!(recording.interrupts, replay.interrupts, "seed {seed}");
    assert!(recording.state.is_some(), "the end is an exact moment");
}
