//! A machine's parts where a replay begins, and the machine made of them.

use reprise_boot::GuestSource;
use reprise_devices::board::{Board, BoardConfig};
use reprise_devices::cpu_model;
use reprise_host::host_info;
use reprise_machine::checkpoint;
use reprise_machine::clock::TimeSource;
use reprise_machine::digest::AccessedBits;
use reprise_machine::engine::{Engine, EngineError};
use reprise_machine::inputs::{Replaying, Verification};
use reprise_machine::lawful::{Lawful, explained};
use reprise_machine::machine::Machine;
use reprise_machine::ram::GuestRam;
use reprise_trace::checkpoint::{
    CheckpointDigest, CheckpointError, CheckpointInfo, Checkpoints, LastRecord, MachineState,
};
use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::HandOver;
use reprise_trace::header::{Header, HostInfo, ImageRole};
use reprise_trace::log::LogReader;
use reprise_trace::recording::Recording;
use reprise_trace::stretches::Course;

use crate::error::ReplayError;

/// Where a replay begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Before the guest's first instruction.
    Run,
    /// At the checkpoint of this number.
    Checkpoint(usize),
}

/// What the CPU and the rest begin with.
#[derive(Debug)]
enum At {
    Run(Box<CpuState>),
    Checkpoint(Box<MachineState>),
}

/// A machine's parts before there is an engine.
#[derive(Debug)]
pub struct Beginning {
    ram: GuestRam,
    board: BoardConfig,
    at: At,
    log: LogReader,
    on: HandOver,
    accessed_bits: AccessedBits,
}

impl Beginning {
    pub(crate) fn of_run(recording: &Recording, course: &Course) -> Result<Self, ReplayError> {
        let header = recording.header();
        let (ram, board) = ram_and_board(header)?;
        let image_of = |role| {
            let index = header.guest.images.iter().position(|image| image.role == role);
            index.map(|index| recording.read_image(index)).transpose()
        };
        let kernel = image_of(ImageRole::Kernel)?.ok_or(ReplayError::NoKernel)?;
        let initrd = image_of(ImageRole::Initrd)?;
        let source = GuestSource {
            kernel: &kernel,
            initrd: initrd.as_deref(),
            cmdline: &header.guest.command_line,
        };
        let at = At::Run(Box::new(reprise_boot::load(&source, &ram)?));
        let (log, on) = (recording.log(), course.at(0).on.clone());
        Ok(Self { ram, board, at, log, on, accessed_bits: accessed_bits(course, 0) })
    }

    pub(crate) fn of_checkpoint(
        recording: &Recording,
        course: &Course,
        checkpoints: &Checkpoints,
        index: usize,
    ) -> Result<Self, ReplayError> {
        let header = recording.header();
        let (mut ram, board) = ram_and_board(header)?;
        let loaded = checkpoints.load(index, &mut |address, page| ram.place(address, page))?;
        let state = loaded.state;
        let (log, last) = recording.log_behind(state.records)?;
        let last =
            last.map(|record| LastRecord { moment: record.moment, cpu_digest: record.cpu_digest });
        if last != state.last_record {
            return Err(CheckpointError::OtherRecording.into());
        }
        let on = course.at(state.records).on.clone();
        let accessed_bits = accessed_bits(course, state.records);
        let at = At::Checkpoint(Box::new(state));
        Ok(Self { ram, board, at, log, on, accessed_bits })
    }

    /// At a state that a machine of this recording was in, whose RAM is `ram`.
    pub(crate) fn of_state(
        recording: &Recording,
        course: &Course,
        state: MachineState,
        fill: &mut dyn FnMut(&mut GuestRam),
    ) -> Result<Self, ReplayError> {
        let header = recording.header();
        let (mut ram, board) = ram_and_board(header)?;
        fill(&mut ram);
        let (log, _) = recording.log_behind(state.records)?;
        let on = course.at(state.records).on.clone();
        let accessed_bits = accessed_bits(course, state.records);
        let at = At::Checkpoint(Box::new(state));
        Ok(Self { ram, board, at, log, on, accessed_bits })
    }

    /// The engine that executed the recording from there on.
    pub fn stretch(&self) -> &HandOver {
        &self.on
    }

    /// The tick at which the machine will stand.
    pub fn tick(&self) -> u64 {
        match &self.at {
            At::Run(_) => 0,
            At::Checkpoint(state) => state.moment.tick,
        }
    }

    /// Records of the log before.
    pub fn records(&self) -> u64 {
        match &self.at {
            At::Run(_) => 0,
            At::Checkpoint(state) => state.records,
        }
    }

    /// Bytes that the guest has written to its console before.
    pub fn console_bytes(&self) -> u64 {
        match &self.at {
            At::Run(_) => 0,
            At::Checkpoint(state) => state.console.bytes,
        }
    }

    /// Gives the parts to the engine that `make_engine` makes, and the log to inputs that `set_up`
    /// completes.
    ///
    /// # Errors
    /// The engine cannot be had, or does not take the state.
    pub fn into_machine<E: Engine>(
        self,
        make_engine: impl FnOnce(GuestRam) -> Result<E, EngineError>,
        set_up: impl FnOnce(Replaying) -> Replaying,
    ) -> Result<Machine<E, Replaying>, ReplayError> {
        let Self { ram, board, at, log, on, accessed_bits } = self;
        let time = TimeSource::of(on.ns_per_tick);
        let (mut engine, board) = (make_engine(ram)?, Board::new(&board));
        let inputs = set_up(Replaying::new(log));
        let machine = match at {
            At::Run(state) => {
                engine.set_cpu_state(&state)?;
                Machine::new(engine, board, inputs, time)
            }
            At::Checkpoint(state) => Machine::resume(engine, board, inputs, time, &state)?,
        };
        Ok(machine.with_accessed_bits(accessed_bits))
    }
}

fn ram_and_board(header: &Header) -> Result<(GuestRam, BoardConfig), ReplayError> {
    let named = |name: &str, version| format!("{name} version {version}");
    let found = named(&header.cpu_model.name, header.cpu_model.version);
    let known = named(cpu_model::NAME, cpu_model::VERSION);
    if found != known {
        return Err(ReplayError::CpuModel { found, known });
    }
    let ram = GuestRam::new(header.machine.ram_mib)?;
    let rtc_start_s = header.machine.rtc_start_s;
    let board = BoardConfig { ram_bytes: ram.ram_bytes(), rtc_start_s };
    Ok((ram, board))
}

/// How the recording's virtual time came about at its beginning.
pub fn time_source(header: &Header) -> TimeSource {
    TimeSource::of(header.ns_per_tick)
}

/// Whether the digest of a machine with so many records behind it counts accessed bits: not once hardware
/// ran the guest, which may set them early.
pub fn accessed_bits(course: &Course, records: u64) -> AccessedBits {
    let mut before = course.stretches.iter().filter(|stretch| stretch.records_before <= records);
    match course.counts_accessed_bits || before.all(|stretch| stretch.on.engine == "soft") {
        true => AccessedBits::Exact,
        false => AccessedBits::SetAside,
    }
}

/// How much of a recording a replay by this engine alone can compare.
pub fn verification(header: &Header, course: &Course, engine: &str) -> Verification {
    let own = course.stretches.iter().all(|stretch| stretch.on.engine == engine);
    if own && recorded_here(header) { Verification::Exact } else { Verification::AcrossEngines }
}

/// Whether a recording was made on a CPU like this host's: of the same maker, family and model. One that
/// does not say was.
pub fn recorded_here(header: &Header) -> bool {
    let of = |host: &HostInfo| (host.cpu_vendor.clone(), host.cpu_family, host.cpu_model);
    header.host.cpu_vendor.is_empty() || of(&header.host) == of(&host_info())
}

/// Compares a machine that stands at a checkpoint's tick with the checkpoint. Gives what differs, in
/// words; `None` if nothing does. Costs a pass over the guest RAM that was ever touched.
///
/// # Errors
/// The machine does not stand where checkpoints can be taken (see [`Machine::consistent`]), or the
/// engine fails.
pub fn compare<E: Engine>(
    machine: &mut Machine<E, Replaying>,
    checkpoint: &CheckpointInfo,
) -> Result<Option<String>, ReplayError> {
    leave_lawful_flags(machine, checkpoint)?;
    Ok(checkpoint.digest.difference(&digest(machine)?))
}

/// Gives flags that are undefined here the values that they have in a checkpoint that another CPU made.
fn leave_lawful_flags<E: Engine>(
    machine: &mut Machine<E, Replaying>,
    checkpoint: &CheckpointInfo,
) -> Result<(), ReplayError> {
    let [a, b, c, d, e, f, g, h, ..] = checkpoint.digest.cpu;
    let there = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let engine = machine.engine();
    let (state, undefined) = (engine.cpu_state()?, engine.undefined_flags());
    if undefined != 0
        && let Some(explained) = explained(&state, there, undefined)
        && explained.what == [Lawful::UndefinedFlags]
    {
        engine.set_undefined_flags(explained.state.rflags)?;
    }
    Ok(())
}

/// The digest that a checkpoint of the machine has here.
fn digest<E: Engine>(machine: &mut Machine<E, Replaying>) -> Result<CheckpointDigest, ReplayError> {
    let tick = machine.engine().tick();
    let consistent = machine.consistent()?.ok_or(ReplayError::NotConsistent { tick })?;
    Ok(checkpoint::digest(consistent)?)
}

#[cfg(test)]
mod tests {
    use reprise_trace::event::Assists;
    use reprise_trace::header::{CpuModelInfo, GuestInfo, MachineInfo};
    use reprise_trace::moment::{Moment, TickKind};
    use reprise_trace::stretches::Stretch;

    use super::*;

    fn header(host: HostInfo) -> Header {
        Header {
            machine: MachineInfo { ram_mib: 4, rtc_start_s: 0 },
            cpu_model: CpuModelInfo { name: String::new(), version: 1 },
            tick_kind: TickKind::Instruction,
            ns_per_tick: 1,
            engine: "soft".to_owned(),
            clock: "instructions".to_owned(),
            host,
            guest: GuestInfo {
                name: String::new(),
                command_line: String::new(),
                images: Vec::new(),
            },
            created_unix_s: 0,
            reprise_version: String::new(),
            precautions: Vec::new(),
        }
    }

    /// A course over engines, each from so many records on.
    fn course(engines: &[(&str, u64)]) -> Course {
        let stretch = |&(engine, records_before): &(&str, u64)| Stretch {
            from: (records_before > 0).then_some(Moment { tick: records_before, rip: 0, rcx: 0 }),
            records_before,
            on: HandOver {
                engine: engine.to_owned(),
                clock: String::new(),
                tick_kind: TickKind::Instruction,
                ns_per_tick: 1,
            },
        };
        let stretches = engines.iter().map(stretch).collect();
        Course { stretches, assists: Assists::new(), counts_accessed_bits: false }
    }

    #[test]
    fn a_cpu_is_known_by_maker_family_and_model() {
        let here = host_info();
        let others: [fn(&mut HostInfo); 3] = [
            |host| host.cpu_vendor.push('x'),
            |host| host.cpu_family += 1,
            |host| host.cpu_model += 1,
        ];
        for change in others {
            let mut host = here.clone();
            change(&mut host);
            assert!(!recorded_here(&header(host.clone())), "{host:?}");
        }
        // What no instruction depends on.
        let other = HostInfo {
            cpu_stepping: here.cpu_stepping + 1,
            kernel_release: "another".to_owned(),
            ..here.clone()
        };
        assert!(recorded_here(&header(other)) && recorded_here(&header(here)));
        assert!(recorded_here(&header(HostInfo::default())), "it does not say");
    }

    #[test]
    fn all_is_compared_on_the_engine_and_the_cpu_that_recorded() {
        let (here, mut there) = (host_info(), host_info());
        there.cpu_model += 1;
        let of = |host: &HostInfo, engines: &[(&str, u64)]| {
            verification(&header(host.clone()), &course(engines), "soft")
        };
        assert_eq!(of(&here, &[("soft", 0), ("soft", 5)]), Verification::Exact);
        assert_eq!(of(&here, &[("soft", 0), ("kvm", 5)]), Verification::AcrossEngines);
        assert_eq!(of(&here, &[("kvm", 0)]), Verification::AcrossEngines);
        assert_eq!(of(&there, &[("soft", 0)]), Verification::AcrossEngines);
    }

    #[test]
    fn accessed_bits_count_until_hardware_ran_the_guest() {
        let moving = course(&[("soft", 0), ("kvm", 5), ("soft", 9)]);
        for (records, expected) in [
            (0, AccessedBits::Exact),
            (4, AccessedBits::Exact),
            (5, AccessedBits::SetAside),
            (100, AccessedBits::SetAside),
        ] {
            assert_eq!(accessed_bits(&moving, records), expected, "behind {records} records");
        }
        let of_version_1 = Course { counts_accessed_bits: true, ..moving };
        assert_eq!(accessed_bits(&of_version_1, 100), AccessedBits::Exact);
    }
}
