//! The command line: what there is to say, and who does it.

mod expand;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Args, Parser, Subcommand};
use reprise_machine::ram::{MAX_RAM_MIB, MIN_RAM_MIB};

use crate::commands;
use crate::defect;
use crate::output::Output;
use crate::session::assembly::SoftOptions;
use crate::session::checkpoints::{CheckpointArg, parse_seconds};
use crate::session::choice::{ChoiceError, ClockArg, EngineArg, EngineKind};
use crate::session::guest::GuestChoice;
use crate::session::replay::At;
use crate::session::stretches::{PlanError, ThenArg};
use crate::session::trace_target::WrongUse;
use reprise_cpu::translate::Translation;

pub use expand::ExpandArgs;
pub use trace::{
    CheckArgs, ConcatArgs, ConvertArgs, DumpArgs, StatsArgs, SymbolFile, TraceArgs, WindowArgs,
};
pub(crate) use trace::{SymbolArgs, TraceAction};

/// Exit status of a command that failed.
pub(crate) const FAILED: u8 = 1;
/// Exit status of wrong use, as clap has it.
const WRONG_USE: u8 = 2;

/// Where `--json` stands in each command's help: behind the command's own options.
const LAST: usize = 100;

/// Records a whole machine while it runs, and replays it exactly.
#[derive(Debug, Parser)]
#[command(name = "reprise", version, arg_required_else_help = true, after_help = FIRST_STEPS)]
struct Arguments {
    /// Print one JSON object on standard output and nothing else there
    #[arg(long, global = true, display_order = LAST)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot Linux, record it, replay it, verify, and show what it cost
    Demo,
    /// List the images, or build one
    Images(ImagesArgs),
    /// Run a guest without recording it
    Run(RunArgs),
    /// Run a guest and record it
    Record(RecordArgs),
    /// Replay a recording and verify it
    Replay(ReplayArgs),
    /// Write down every instruction of a recording, or of a part of it
    Expand(ExpandArgs),
    /// Look at traces, check them, join them, and convert them
    Trace(TraceArgs),
    /// Show what a recording or a trace holds
    Info(InfoArgs),
    /// Add checkpoints to a recording by replaying it
    Checkpoint(CheckpointArgs),
    /// Find the first record and the first instruction where two recordings part
    Diff(DiffArgs),
    /// Show what this host can do, and why
    Doctor,
}

/// Which guest.
#[derive(Debug, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("guest").args(["image", "kernel"]).required(true))]
pub struct GuestArgs {
    /// An embedded guest, or "linux" (see `reprise images`)
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
    /// A bzImage, ELF64 vmlinux, PVH ELF or multiboot v1 kernel
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// The initial RAM disk of --kernel
    #[arg(long, value_name = "PATH", requires = "kernel", conflicts_with = "image")]
    initrd: Option<PathBuf>,
    /// The guest's command line, in place of the image's own
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
}

impl GuestArgs {
    /// The guest that was named.
    pub fn choice(&self) -> GuestChoice {
        match (&self.kernel, &self.image) {
            (Some(kernel), _) => {
                GuestChoice::Kernel { kernel: kernel.clone(), initrd: self.initrd.clone() }
            }
            (None, image) => GuestChoice::Image(image.clone().unwrap_or_default()),
        }
    }
}

/// Which machine.
#[derive(Debug, Args)]
pub struct MachineArgs {
    /// What executes the guest
    #[arg(long, value_enum, default_value_t)]
    pub engine: EngineArg,
    /// How the engine counts
    #[arg(long, value_enum, default_value_t)]
    pub clock: ClockArg,
    /// Stop the run at this moment, a tick or seconds of guest time ("2.5s"); with --then, hand over to
    /// another engine there. Repeatable
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment, allow_negative_numbers = true)]
    pub until: Vec<At>,
    /// What executes the guest from --until on: soft, kvm (clock sync), kvm:step or kvm:pmu
    #[arg(long, value_name = "ENGINE", requires = "until")]
    pub then: Vec<ThenArg>,
    /// Guest memory in MiB [default: 64 for embedded guests, 512 for others]
    #[arg(long, value_name = "MIB", value_parser = parse_memory, allow_negative_numbers = true)]
    pub memory: Option<u64>,
    /// Type this file into the console; "-" is standard input, not as a terminal
    #[arg(long, value_name = "FILE|-")]
    pub input: Option<PathBuf>,
    /// Write console output to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    pub console: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) soft: SoftArgs,
}

/// How the software CPU runs.
#[derive(Debug, Args)]
pub struct SoftArgs {
    /// Software CPU: run each instruction by itself instead of translating blocks (slow; the guest
    /// does the same)
    #[arg(long)]
    no_translate: bool,
    /// Software CPU: report where its time goes
    #[arg(long)]
    profile: bool,
}

impl SoftArgs {
    /// What to say if these engines, which execute a run `in_turn` or as one, are none that these concern.
    pub fn without_effect_on(&self, engines: &[EngineKind], in_turn: bool) -> Option<&'static str> {
        let on_soft = engines.contains(&EngineKind::Soft);
        match (self.no_translate && !on_soft, self.profile && (in_turn || !on_soft)) {
            (false, false) => None,
            (true, false) => Some("--no-translate is for engine soft: no effect here"),
            (false, true) => {
                Some("--profile is for runs on engine soft from start to end: no effect here")
            }
            (true, true) => {
                Some("--no-translate and --profile are for engine soft: no effect here")
            }
        }
    }

    /// As the session wants them.
    pub fn options(&self) -> SoftOptions {
        let translation =
            if self.no_translate { Translation::Never } else { Translation::default() };
        SoftOptions { translation, profile: self.profile }
    }
}

/// `run`.
#[derive(Debug, Args)]
#[command(after_help = CONSOLE_HELP)]
pub struct RunArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// `record`.
#[derive(Debug, Args)]
#[command(after_help = CONSOLE_HELP)]
pub struct RecordArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
    /// The recording
    #[arg(short, long, value_name = "FILE.rr")]
    pub(crate) output: PathBuf,
    /// Overwrite the file if it exists
    #[arg(long)]
    pub(crate) force: bool,
    /// Keep a checkpoint in FILE.rr.checkpoints after so many ticks, or seconds of guest execution
    /// ("2s"); "never" for none [default: 2000000000 ticks on the software CPU, never on KVM]
    #[arg(long, value_name = "EVERY", default_value = "default", hide_default_value = true)]
    #[arg(value_parser = parse_every, allow_negative_numbers = true)]
    pub(crate) checkpoint_every: CheckpointArg,
}

const FIRST_STEPS: &str = "\
First steps: `reprise demo`, or

  reprise record --image linux -o boot.rr    a live console; Ctrl-] stops
  reprise replay boot.rr --show-console
  reprise info boot.rr";

const CONSOLE_HELP: &str = "\
At a terminal without --input and --json the guest's console is live: every key goes to the guest, \
and Ctrl-] stops the run. Elsewhere Ctrl-C stops it; a recording is closed either way. Without a \
terminal and without --input nobody types. With --json the console's output is discarded, unless \
--console is given.

Exit status: 0 when the guest resets, powers off or triple-faults, or the run is stopped; \
(V << 1) | 1 when the guest writes V to the debug-exit port 0xf4; 1 when something fails; 2 on \
wrong use.";

/// `replay`.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// The recording
    #[arg(value_name = "FILE.rr")]
    pub(crate) file: PathBuf,
    /// What executes the guest
    #[arg(long, value_enum, default_value_t)]
    pub(crate) engine: EngineArg,
    /// How the engine counts: as the recording says, or "pmu" for one that counts instructions, which is
    /// then rewritten for that clock first
    #[arg(long, value_enum, default_value_t)]
    pub(crate) clock: ClockArg,
    /// Keep the recording that was rewritten for --clock pmu
    #[arg(long, value_name = "FILE.rr")]
    pub(crate) rewritten: Option<PathBuf>,
    /// Begin at the last checkpoint before this moment, a tick or seconds of guest time ("2.5s"), and
    /// replay from there
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment, allow_negative_numbers = true)]
    pub(crate) from: Option<At>,
    /// Stop at this moment: a tick, as `info` and divergences give it, or seconds of guest time
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment, allow_negative_numbers = true)]
    pub(crate) until: Option<At>,
    /// Write the console output, from --from on, to standard output (with --json: to standard error)
    #[arg(long)]
    pub(crate) show_console: bool,
    /// Where the replay differs from the recording, narrow that down to as few instructions as the
    /// recording's digests and checkpoints allow
    #[arg(long, conflicts_with_all = ["from", "until"])]
    pub(crate) bisect: bool,
    #[command(flatten)]
    pub(crate) symbols: SymbolArgs,
    #[command(flatten)]
    pub(crate) soft: SoftArgs,
}

/// `checkpoint`.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// The recording; its checkpoints lie in FILE.rr.checkpoints
    #[arg(value_name = "FILE.rr")]
    pub(crate) file: PathBuf,
    /// Take one after so many ticks, or seconds of guest execution ("2s") [default: 1000000000 ticks]
    #[arg(long, value_name = "EVERY", default_value = "default", hide_default_value = true)]
    #[arg(value_parser = parse_every, allow_negative_numbers = true)]
    pub(crate) every: CheckpointArg,
    #[command(flatten)]
    pub(crate) soft: SoftArgs,
}

/// `images`.
#[derive(Debug, Args)]
pub struct ImagesArgs {
    #[command(subcommand)]
    pub(crate) action: Option<ImagesAction>,
}

/// What to do with an image.
#[derive(Debug, Subcommand)]
pub enum ImagesAction {
    /// Build an image anew, with the newest packages
    Build {
        /// The image's name
        name: String,
    },
}

/// `info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// The recording, or the trace
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
}

/// `diff`.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// One recording
    #[arg(value_name = "A.rr")]
    pub(crate) a: PathBuf,
    /// The other
    #[arg(value_name = "B.rr")]
    pub(crate) b: PathBuf,
    /// Compare the records alone: replay neither, and look for no instruction
    #[arg(long)]
    pub(crate) records_only: bool,
    #[command(flatten)]
    pub(crate) symbols: SymbolArgs,
}

/// A moment: a tick, or seconds of guest time.
fn parse_moment(text: &str) -> Result<At, String> {
    if let Some(ns) = parse_seconds(text) {
        return Ok(At::Time(ns));
    }
    parse_tick(text).map(At::Tick)
}

/// How often checkpoints are taken.
fn parse_every(text: &str) -> Result<CheckpointArg, String> {
    if text == "default" { Ok(CheckpointArg::Default) } else { text.parse() }
}

/// A tick count; digits may be grouped, and `tick 12 (...)`, as moments are printed, is understood.
fn parse_tick(text: &str) -> Result<u64, String> {
    let text = text.trim().trim_start_matches("tick").trim_start();
    // As it is printed: `tick 12 (rip ...)`.
    let (number, _) = text.split_once(" (").unwrap_or((text, ""));
    let digits: String = number.chars().filter(|c| !matches!(c, ',' | '_')).collect();
    digits
        .parse()
        .map_err(|_| "give a number of ticks, such as 1000000, or seconds, such as 2.5s".to_owned())
}

/// A size of guest memory, in MiB.
fn parse_memory(text: &str) -> Result<u64, String> {
    let wanted = || format!("give a number of MiB from {MIN_RAM_MIB} to {MAX_RAM_MIB}");
    let mib = text.parse().map_err(|_| wanted())?;
    if (MIN_RAM_MIB..=MAX_RAM_MIB).contains(&mib) { Ok(mib) } else { Err(wanted()) }
}

/// Runs the command that the process was given.
pub fn run() -> ExitCode {
    defect::end_with_one_line(false);
    let arguments = Arguments::parse();
    defect::end_with_one_line(arguments.json);
    let output = Output { json: arguments.json };
    ExitCode::from(dispatch(arguments.command, output).unwrap_or_else(|error| {
        let wrong_clock = matches!(
            error.downcast_ref(),
            Some(
                ChoiceError::SoftHasOneClock
                    | ChoiceError::OtherClock { .. }
                    | ChoiceError::SeveralClocks
                    | ChoiceError::NothingRewritten
            )
        );
        let is_wrong_use = wrong_clock || error.is::<PlanError>() || error.is::<WrongUse>();
        // As where the grammar of the arguments refuses them, there is no report.
        let output = Output { json: output.json && !is_wrong_use };
        output.failure(&format!("{error:#}"));
        if is_wrong_use { WRONG_USE } else { FAILED }
    }))
}

fn dispatch(command: Command, output: Output) -> anyhow::Result<u8> {
    match command {
        Command::Demo => commands::demo::run(output),
        Command::Images(arguments) => commands::images::run(&arguments, output),
        Command::Run(arguments) => commands::run::run(&arguments, output),
        Command::Record(arguments) => commands::record::run(&arguments, output),
        Command::Replay(arguments) => commands::replay::run(&arguments, output),
        Command::Expand(arguments) => commands::expand::run(&arguments, output),
        Command::Trace(arguments) => commands::trace::run(&arguments, output),
        Command::Info(arguments) => commands::info::run(&arguments, output),
        Command::Checkpoint(arguments) => commands::checkpoint::run(&arguments, output),
        Command::Diff(arguments) => commands::diff::run(&arguments, output),
        Command::Doctor => commands::doctor::run(output),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn wrong_use_is_refused() {
        for wrong in [
            &["reprise", "run"][..],
            &["reprise", "run", "--image", "hello", "--kernel", "x"],
            &["reprise", "run", "--image", "hello", "--initrd", "x"],
            &["reprise", "record", "--image", "hello"],
            &["reprise", "replay", "x.rr", "--until", "soon"],
            &["reprise", "run", "--image", "hello", "--engine", "qemu"],
            &["reprise", "run", "--image", "hello", "--memory", "1"],
        ] {
            let error = Arguments::try_parse_from(wrong).expect_err("wrong use");
            assert_eq!(error.exit_code(), 2, "{wrong:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_in_words_of_use() {
        let hello = ["reprise", "run", "--image", "hello"];
        for (wrong, said) in [
            (&["reprise", "run"][..], "--image <NAME>|--kernel <PATH>"),
            (&[&hello[..], &["--memory", "1"]].concat(), "from 4 to 3072"),
            (&[&hello[..], &["--memory", "much"]].concat(), "from 4 to 3072"),
            (&[&hello[..], &["--memory", "-1"]].concat(), "from 4 to 3072"),
            (&["reprise", "replay", "x.rr", "--until", "-5"], "a number of ticks"),
        ] {
            let error = Arguments::try_parse_from(wrong).expect_err("wrong use").to_string();
            assert!(error.contains(said), "{wrong:?}: {error}");
        }
    }

    #[test]
    fn what_an_option_does_not_do_is_told() {
        let soft = |no_translate, profile| SoftArgs { no_translate, profile };
        let said = |soft: SoftArgs, engines: &[EngineKind], in_turn| {
            soft.without_effect_on(engines, in_turn).unwrap_or_default()
        };
        const MIXED: [EngineKind; 2] = [EngineKind::Pmu, EngineKind::Soft];
        assert_eq!(said(soft(true, true), &[EngineKind::Soft], false), "");
        assert_eq!(said(soft(true, false), &MIXED, true), "");
        assert!(said(soft(true, true), &MIXED, true).starts_with("--profile is"));
        assert!(said(soft(true, true), &MIXED[..1], false).contains("--no-translate and"));
        assert!(said(soft(true, false), &MIXED[..1], false).starts_with("--no-translate is"));
    }

    #[test]
    fn a_moment_is_read_as_it_is_printed() {
        for text in ["1234", "1_234", "1,234", "tick 1234 (rip 0x1000, rcx 0x0)"] {
            assert_eq!(parse_tick(text), Ok(1234), "{text}");
        }
        for text in ["", "0x10", "1 s", "1 ms", "10 000", "5 garbage"] {
            assert!(parse_tick(text).is_err(), "{text}");
        }
    }
}
