//! Replays of recordings by instruction counts on hardware that counts branches: the recording is first
//! rewritten for that clock, by one replay on the software CPU.

use std::fs::File;
use std::io::{self, BufReader, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use reprise_devices::cpu_model::TimeStampCounter;
use reprise_export::output::PendingFile;
use reprise_machine::engine::Engine;
use reprise_machine::lawful::SetAside;
use reprise_machine::machine::Machine;
use reprise_machine::outcome::Conclusion;
use reprise_machine::ram::{GuestRam, MIN_RAM_MIB};
use reprise_replay::{Replayable, Rewritten};
use reprise_trace::header::Header;
use reprise_trace::moment::TickKind;
use reprise_trace::recording::Recording;

use super::choice::{ChoiceError, ClockArg, EngineArg};
use super::drive::RegularKicks;
use super::hardware::BranchHardware;
use super::replay::{At, ReplayOptions, TickObserver};
use crate::output::grouped;

/// Whether a replay that is asked for so needs its recording rewritten.
///
/// # Errors
/// A clock that this recording does not have, and cannot get.
pub fn is_asked_for(
    engine: EngineArg,
    clock: ClockArg,
    (header, stretches): (&Header, usize),
) -> Result<bool, ChoiceError> {
    if clock != ClockArg::Auto && stretches > 1 {
        return Err(ChoiceError::SeveralClocks);
    }
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

/// Where the rewritten recording goes.
enum Place {
    /// A file without a name, which goes with this process whatever becomes of it.
    Passing(File),
    /// Gets the name that the user wants when it is whole.
    Kept(PendingFile, PathBuf),
}

impl Place {
    fn of(wanted: Option<&Path>) -> Result<Self> {
        let Some(path) = wanted else {
            let file = tempfile::tempfile().with_context(|| {
                format!("no room for the rewritten recording in {}", std::env::temp_dir().display())
            })?;
            return Ok(Self::Passing(file));
        };
        not_there(path)?;
        let file = PendingFile::create(path).map_err(|error| cannot_create(path, &error))?;
        Ok(Self::Kept(file, path.to_owned()))
    }

    /// What was written, to be replayed.
    fn finish(self) -> Result<Replayable> {
        match self {
            Self::Passing(mut file) => {
                file.rewind()?;
                Ok(Replayable::without_checkpoints(Recording::open(BufReader::new(file))?))
            }
            Self::Kept(file, path) => {
                file.finish_new().map_err(|error| cannot_create(&path, &error))?;
                Ok(Replayable::open(&path)?)
            }
        }
    }
}

impl Write for Place {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Passing(file) => file.write(bytes),
            Self::Kept(file, _) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Passing(file) => file.flush(),
            Self::Kept(file, _) => file.flush(),
        }
    }
}

/// Nobody's file is overwritten.
fn not_there(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Ok(_) => Err(cannot_create(path, &io::ErrorKind::AlreadyExists.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(cannot_create(path, &error)),
    }
}

fn cannot_create(path: &Path, error: &io::Error) -> anyhow::Error {
    anyhow!("cannot create {}: {error}; give another --rewritten FILE.rr", path.display())
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
    drop(hardware.engine(GuestRam::new(MIN_RAM_MIB)?, TimeStampCounter::Shown)?);
    let place = Place::of(options.rewritten.as_deref())?;
    let progress = options.rewriting.take();
    let (place, result) = rewrite(replayable, place, progress)
        .context("the recording cannot be rewritten for the clock pmu")?;
    let rewritten = place.finish()?;
    let notes = notes(&result, &rewritten);
    Ok(ForBranches { replayable: rewritten, notes })
}

fn rewrite<W: Write>(
    replayable: &Replayable,
    out: W,
    progress: Option<TickObserver>,
) -> Result<(W, Rewritten)> {
    let shows = progress.is_some();
    let rewritten = replayable.rewrite(
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
    Ok(rewritten)
}

fn notes(result: &Rewritten, rewritten: &Replayable) -> Vec<String> {
    let (outcome, records) = (&result.outcome, rewritten.recording().summary().record_count);
    let mut notes = vec![format!(
        "rewritten for the clock pmu: {} instructions on the software CPU, as recorded, gave {} records",
        grouped(outcome.ticks),
        grouped(records)
    )];
    for SetAside { what, records, first } in &outcome.set_aside {
        notes.push(format!(
            "set aside while it was rewritten: {what}, at {} records, the first at tick {}",
            grouped(*records),
            grouped(first.tick)
        ));
    }
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
    use super::*;

    #[test]
    fn what_is_not_kept_has_no_name_and_what_is_kept_gets_it_at_the_end() {
        use std::os::unix::fs::MetadataExt;

        let Place::Passing(file) = Place::of(None).expect("a file") else {
            panic!("not asked for")
        };
        assert_eq!(file.metadata().expect("its metadata").nlink(), 0);
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("kept.rr");
        let kept = Place::of(Some(&path)).expect("a file");
        assert!(!path.exists());
        drop(kept);
        let left = std::fs::read_dir(directory.path()).expect("readable").count();
        assert_eq!(left, 0, "of what did not become whole");
        std::fs::write(&path, "somebody's").expect("a file");
        assert!(Place::of(Some(&path)).is_err());
    }

    #[test]
    fn only_instruction_counts_are_rewritten() {
        use ClockArg::{Auto, Pmu, Step, Sync};
        let soft = Header::bare("soft", "instructions", TickKind::Instruction);
        let step = Header::bare("kvm", "step", TickKind::Instruction);
        let sync = Header::bare("kvm", "sync", TickKind::Exit);
        let pmu = Header::bare("kvm", "pmu", TickKind::ConditionalBranch);
        let asked = |clock, header| is_asked_for(EngineArg::Kvm, clock, (header, 1));
        for header in [&soft, &step] {
            assert_eq!(asked(Pmu, header), Ok(true));
            assert_eq!(asked(Step, header), Ok(false));
            assert!(asked(Sync, header).is_err());
        }
        for (header, own, other) in [(&sync, Sync, Pmu), (&pmu, Pmu, Sync)] {
            assert_eq!((asked(own, header), asked(Auto, header)), (Ok(false), Ok(false)));
            assert!(asked(other, header).is_err() && asked(Step, header).is_err());
        }
        assert!(is_asked_for(EngineArg::Soft, Pmu, (&soft, 1)).is_err());
    }
}
