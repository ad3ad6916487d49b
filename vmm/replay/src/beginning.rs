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
use reprise_machine::lawful::{Lawful, Permitted, SetAside, explained};
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
use reprise_trace::stretches::{Course, FinalDigest};

use crate::error::ReplayError;
use crate::recorded_clock::{check_of_file, kept_by_software};

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
    /// `None` if no file holds it.
    start: Option<Start>,
    ram: GuestRam,
    board: BoardConfig,
    at: At,
    log: LogReader,
    on: HandOver,
    /// There, and behind the recording's last hand-over.
    accessed_bits: [AccessedBits; 2],
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
        let (start, accessed_bits) = (Some(Start::Run), accessed_bits_from(course, 0));
        Ok(Self { start, ram, board, at, log, on, accessed_bits })
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
        check_of_file(&state.engine)?;
        let (log, last) = recording.log_behind(state.records)?;
        let last =
            last.map(|record| LastRecord { moment: record.moment, cpu_digest: record.cpu_digest });
        if last != state.last_record {
            return Err(CheckpointError::OtherRecording.into());
        }
        let on = course.at(state.records).on.clone();
        let accessed_bits = accessed_bits_from(course, state.records);
        let at = At::Checkpoint(Box::new(state));
        let start = Some(Start::Checkpoint(index));
        Ok(Self { start, ram, board, at, log, on, accessed_bits })
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
        let accessed_bits = accessed_bits_from(course, state.records);
        let at = At::Checkpoint(Box::new(state));
        Ok(Self { start: None, ram, board, at, log, on, accessed_bits })
    }

    /// Where that is in the recording; `None` if no file holds it.
    pub fn start(&self) -> Option<Start> {
        self.start
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

    /// For engines that each execute a stretch: of a checkpoint's state, what the software CPU keeps if it is
    /// alone.
    #[must_use]
    pub fn for_relay(mut self) -> Self {
        if let At::Checkpoint(state) = &mut self.at {
            let hidden = std::mem::take(&mut state.engine.hidden);
            state.engine.hidden = kept_by_software(hidden);
        }
        self
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
        let Self { start: _, ram, board, at, log, on, accessed_bits } = self;
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
        let [there, at_last] = accessed_bits;
        Ok(machine.with_accessed_bits(there).with_accessed_bits_of_hardware(at_last))
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

fn accessed_bits_from(course: &Course, records: u64) -> [AccessedBits; 2] {
    [records, u64::MAX].map(|records| accessed_bits(course, records))
}

/// Whether the digest of a machine with so many records behind it counts accessed bits: not once hardware
/// ran the guest, which may set them early.
pub fn accessed_bits(course: &Course, records: u64) -> AccessedBits {
    let mut before = course.stretches.iter().filter(|stretch| stretch.records_before <= records);
    if before.all(|stretch| stretch.on.engine == "soft") {
        return AccessedBits::Exact;
    }
    match course.final_digest {
        FinalDigest::CountsAccessedBits => AccessedBits::Exact,
        FinalDigest::SetsAsideCurrentTables => AccessedBits::SetAsideInCurrent,
        FinalDigest::SetsAsideAllTables => AccessedBits::SetAside,
    }
}

/// How much of a recording a replay by this engine alone can compare.
pub fn verification(header: &Header, course: &Course, engine: &str) -> Verification {
    let own = course.stretches.iter().all(|stretch| stretch.on.engine == engine);
    Verification {
        other_engine: !own,
        other_cpu: !recorded_here(header),
        on_hardware: engine != "soft",
    }
}

/// Whether a recording was made on a CPU like this host's: of the same maker, family and model. One that
/// does not say was.
pub fn recorded_here(header: &Header) -> bool {
    let of = |host: &HostInfo| (host.cpu_vendor.clone(), host.cpu_family, host.cpu_model);
    header.host.cpu_vendor.is_empty() || of(&header.host) == of(&host_info())
}

/// What a machine that came to a checkpoint's tick found there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Met {
    /// What differs, in words; `None` if nothing does that may not.
    pub difference: Option<String>,
    /// What was set aside.
    pub set_aside: Vec<SetAside>,
}

/// Compares a machine that stands at a checkpoint's tick with the checkpoint. Where another CPU made that, flags
/// that are undefined here become what they were there, so that the machine goes on as that one did. Costs a pass
/// over the guest RAM that was ever touched.
///
/// # Errors
/// The machine does not stand where checkpoints can be taken (see [`Machine::consistent`]), or the
/// engine fails.
pub fn meet_checkpoint<E: Engine>(
    machine: &mut Machine<E, Replaying>,
    checkpoint: &CheckpointInfo,
    verification: Verification,
) -> Result<Met, ReplayError> {
    let set_aside = follow_lawful_flags(machine, checkpoint, verification)?;
    let difference = checkpoint.digest.difference(&digest(machine)?);
    Ok(Met { difference, set_aside })
}

/// Gives flags that are undefined here the values that they have in a checkpoint that another CPU made.
fn follow_lawful_flags<E: Engine>(
    machine: &mut Machine<E, Replaying>,
    checkpoint: &CheckpointInfo,
    verification: Verification,
) -> Result<Vec<SetAside>, ReplayError> {
    let [a, b, c, d, e, f, g, h, ..] = checkpoint.digest.cpu;
    let there = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
    let mut set_aside = Vec::new();
    let engine = machine.engine();
    let state = engine.cpu_state()?;
    if !verification.other_cpu || state.short_digest() == there {
        return Ok(set_aside);
    }
    let undefined_flags = engine.undefined_flags();
    // The software CPU made the checkpoint, as it is the one that meets it.
    let permitted = Permitted { undefined_flags, x87_last_instruction: false };
    if let Some(explained) = explained(&state, there, permitted) {
        engine.set_undefined_flags(explained.state.rflags)?;
        SetAside::note(&mut set_aside, Lawful::UndefinedFlags, checkpoint.moment);
    }
    Ok(set_aside)
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
    use reprise_trace::moment::{Moment, TickKind};
    use reprise_trace::stretches::Stretch;

    use super::*;

    fn header(host: HostInfo) -> Header {
        Header { host, ..Header::bare("soft", "instructions", TickKind::Instruction) }
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
        Course {
            stretches,
            assists: Assists::new(),
            left_open: Vec::new(),
            final_digest: FinalDigest::SetsAsideAllTables,
        }
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
        let exact = Verification::default();
        let other_engine = Verification { other_engine: true, ..exact };
        assert_eq!(of(&here, &[("soft", 0), ("soft", 5)]), exact);
        assert_eq!(of(&here, &[("soft", 0), ("kvm", 5)]), other_engine);
        assert_eq!(of(&here, &[("kvm", 0)]), other_engine);
        assert_eq!(of(&there, &[("soft", 0)]), Verification { other_cpu: true, ..exact });
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
        let of_version_1 = Course { final_digest: FinalDigest::CountsAccessedBits, ..moving };
        assert_eq!(accessed_bits(&of_version_1, 100), AccessedBits::Exact);
    }
}
