//! Replays of recordings by instruction counts on hardware that counts branches: the recording is first
//! rewritten for that clock, by one replay on the software CPU.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use reprise_machine::engine::Engine;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::Conclusion;
use reprise_machine::ram::{GuestRam, MIN_RAM_MIB};
use reprise_replay::{Replayable, Rewritten};
use reprise_trace::header::Header;
use reprise_trace::moment::TickKind;

use super::choice::{ChoiceError, ClockArg, EngineArg};
use super::hardware::BranchHardware;
use super::replay::{At, RegularKicks, ReplayOptions, TickObserver};
use crate::output::grouped;

/// Whether a replay that is asked for so needs its recording rewritten.
///
/// # Errors
/// A clock that this recording does not have, and cannot get.
pub fn is_asked_for(
    engine: EngineArg,
    clock: ClockArg,
    header: &Header,
) -> Result<bool, ChoiceError> {
    let own = match header.clock.as_str() {
        "pmu" => ClockArg::Pmu,
        "step" => ClockArg::Step,
        "sync" => ClockArg::Sync,
        _ => ClockArg::Auto,
    };
    let by_instructions = header.tick_kind == TickKind::Instruction;
    match (engine, clock) {
        (_, ClockArg::Auto) => Ok(false),
        (EngineArg::Soft, _) => Err(ChoiceError::SoftHasOneClock),
        (_, ClockArg::Pmu) if by_instructions => Ok(true),
        (_, ClockArg::Step) if by_instructions => Ok(false),
        (_, clock) if clock == own => Ok(false),
        _ => Err(ChoiceError::OtherClock { clock: header.clock.clone() }),
    }
}

/// A file that goes when nobody needs it any more, whatever becomes of this process, or that stays where
/// the user wants it.
enum Place {
    Kept(PathBuf),
    /// Has a name only until it is open for reading.
    Passing(PathBuf),
}

impl Place {
    fn of(wanted: Option<&Path>) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        match wanted {
            Some(path) => Self::Kept(path.to_owned()),
            None => {
                let number = NUMBER.fetch_add(1, Ordering::Relaxed);
                let name = format!("reprise-{}-{number}.rr", std::process::id());
                Self::Passing(std::env::temp_dir().join(name))
            }
        }
    }

    fn path(&self) -> &Path {
        let (Self::Kept(path) | Self::Passing(path)) = self;
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Self::Passing(path) = self {
            let _ = fs::remove_file(path);
        }
    }
}

/// A recording rewritten for the clock `pmu`, and what a person should know of it.
pub struct ForBranches {
    /// It.
    pub replayable: Replayable,
    /// In a line each.
    pub notes: Vec<String>,
}

/// Rewrites a recording for the clock `pmu` of this hardware, which is tried out first.
///
/// # Errors
/// The hardware does not count, the recording cannot be rewritten, or there is no room for it.
pub fn for_branches(
    hardware: &impl BranchHardware,
    replayable: &Replayable,
    options: &mut ReplayOptions,
) -> Result<ForBranches> {
    for at in [options.from, options.until].into_iter().flatten() {
        if let At::Tick(tick) = at {
            bail!(
                "instruction {tick} is no tick of the clock pmu: give --from and --until in seconds of guest \
                 time, such as 2.5s"
            );
        }
    }
    // Before it costs anybody time.
    drop(hardware.engine(GuestRam::new(MIN_RAM_MIB)?)?);
    let place = Place::of(options.rewritten.as_deref());
    let shown = place.path().display().to_string();
    let out = File::create_new(place.path()).map_err(|error| {
        anyhow!("cannot create {shown}: {error}; give another --rewritten FILE.rr")
    })?;
    let progress = options.rewriting.take();
    let result = rewrite(replayable, out, progress);
    if result.is_err() {
        let _ = fs::remove_file(place.path());
    }
    let result = result.context("the recording cannot be rewritten for the clock pmu")?;
    let rewritten = Replayable::open(place.path())?;
    let notes = notes(&result, &rewritten);
    Ok(ForBranches { replayable: rewritten, notes })
}

fn rewrite(
    replayable: &Replayable,
    out: File,
    progress: Option<TickObserver>,
) -> Result<Rewritten> {
    let shows = progress.is_some();
    let (_, result) = replayable.rewrite(
        out,
        |inputs| match progress {
            Some(mut progress) => inputs.on_progress(move |tick, _| progress(tick)),
            None => inputs,
        },
        |machine: &mut Machine<_, _>| {
            let _kicks = shows.then(|| RegularKicks::start(machine.engine().kicker()));
            machine.run()
        },
    )?;
    Ok(result)
}

fn notes(result: &Rewritten, rewritten: &Replayable) -> Vec<String> {
    let (outcome, records) = (&result.outcome, rewritten.recording().summary().record_count);
    let mut notes = vec![format!(
        "rewritten for the clock pmu: {} instructions on the software CPU, as recorded, gave {} records",
        grouped(outcome.ticks),
        grouped(records)
    )];
    if result.end_is_open {
        notes.push(
            "the recording was stopped where no breakpoint finds it: the state there is not compared"
                .to_owned(),
        );
    }
    if matches!(outcome.conclusion, Conclusion::CutShort { .. }) {
        notes.push("the recording has no end, so neither has what was made of it".to_owned());
    }
    notes
}

#[cfg(test)]
mod tests {
    use reprise_trace::header::{CpuModelInfo, GuestInfo, HostInfo, MachineInfo};

    use super::*;

    fn recorded(engine: &str, clock: &str, tick_kind: TickKind) -> Header {
        Header {
            machine: MachineInfo { ram_mib: 4, rtc_start_s: 0 },
            cpu_model: CpuModelInfo { name: String::new(), version: 1 },
            tick_kind,
            ns_per_tick: 0,
            engine: engine.to_owned(),
            clock: clock.to_owned(),
            host: HostInfo::default(),
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

    #[test]
    fn only_instruction_counts_are_rewritten() {
        use ClockArg::{Auto, Pmu, Step, Sync};
        let soft = recorded("soft", "instructions", TickKind::Instruction);
        let step = recorded("kvm", "step", TickKind::Instruction);
        let sync = recorded("kvm", "sync", TickKind::Exit);
        let pmu = recorded("kvm", "pmu", TickKind::ConditionalBranch);
        let asked = |clock, header| is_asked_for(EngineArg::Kvm, clock, header);
        for header in [&soft, &step] {
            assert_eq!(asked(Pmu, header), Ok(true));
            assert_eq!(asked(Step, header), Ok(false));
            assert!(asked(Sync, header).is_err());
        }
        for (header, own, other) in [(&sync, Sync, Pmu), (&pmu, Pmu, Sync)] {
            assert_eq!((asked(own, header), asked(Auto, header)), (Ok(false), Ok(false)));
            assert!(asked(other, header).is_err() && asked(Step, header).is_err());
        }
        assert!(is_asked_for(EngineArg::Soft, Pmu, &soft).is_err());
    }
}
