//! What `expand` takes.

use std::ops::Range;
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use reprise_export::{ExportOptions, FORMATS};
use reprise_trace::instructions::filter::{Privilege, Sample, Selection};

use super::{SoftArgs, parse_moment};
use crate::session::replay::At;

const EXPAND_HELP: &str = "\
Without -o nothing is kept: instructions and accesses are counted. The recording is verified on the \
way, up to where the expansion ends. Ctrl-C ends it early; what there is by then is a whole, shorter \
trace.";

/// What `--format` takes.
pub(super) fn format_help() -> String {
    let names: Vec<_> = FORMATS.iter().map(|format| format.name).collect();
    let names = names.join(", ");
    format!("The trace's format: reprise, {names}; without it the ending of OUT says, else reprise")
}

/// `expand`.
#[derive(Debug, Args)]
#[command(after_help = EXPAND_HELP)]
pub struct ExpandArgs {
    /// The recording
    #[arg(value_name = "FILE.rr")]
    pub(crate) file: PathBuf,
    /// Where the trace goes; "-" for standard output
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: Option<PathBuf>,
    #[arg(long, value_name = "NAME", help = format_help())]
    pub(crate) format: Option<String>,
    /// Begin at this moment: a tick, or seconds of guest time ("2.5s")
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment, allow_negative_numbers = true)]
    pub(crate) from: Option<At>,
    /// End at this moment
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment, allow_negative_numbers = true)]
    pub(crate) to: Option<At>,
    /// Threads: pieces between checkpoints are expanded at the same time. The trace is the same [default:
    /// the host's CPUs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) jobs: Option<u32>,
    /// Expand only share I of N, for array jobs; `reprise trace concat` joins them
    #[arg(long, value_name = "I/N", value_parser = parse_segment)]
    pub(crate) segment: Option<(u32, u32)>,
    /// Leave out the guest-physical addresses of accesses
    #[arg(long)]
    pub(crate) no_physical: bool,
    /// Also trace the value of each access, and what the CPU writes by itself: instruction by
    /// instruction, which takes longer
    #[arg(long)]
    pub(crate) values: bool,
    /// Also trace the value of each register that is written
    #[arg(long)]
    pub(crate) registers: bool,
    /// All of that: what `trace check --against` needs
    #[arg(long, conflicts_with = "no_physical")]
    pub(crate) full: bool,
    /// Have the page walks of the software TLB in the trace, as events
    #[arg(long)]
    pub(crate) page_walks: bool,
    /// Overwrite OUT if it exists; of directories only one that the format parquet made
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) export: ExportArgs,
    #[command(flatten)]
    pub(crate) filters: FilterArgs,
    #[command(flatten)]
    pub(crate) soft: SoftArgs,
}

/// What some formats let one set.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Instructions of an interval (format bbv) [default: 100000000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    interval: Option<u64>,
    /// Number of the CPU that the trace is shown as (drmemtrace, gem5, perf-script) [default: 0]
    #[arg(long, value_name = "N")]
    cpu: Option<u32>,
    /// Instructions whose rows go into one file (format parquet) [default: 16777216]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    file_instructions: Option<u64>,
}

impl ExportArgs {
    /// As the formats want them.
    pub(crate) fn options(&self) -> ExportOptions {
        ExportOptions {
            interval_instructions: self.interval,
            cpu: self.cpu,
            file_instructions: self.file_instructions,
        }
    }
}

/// What to keep of a trace.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("privilege").args(["user", "kernel"]))]
pub(crate) struct FilterArgs {
    /// Only code at privilege level 3
    #[arg(long)]
    user: bool,
    /// Only code at privilege levels 0 to 2
    #[arg(long)]
    kernel: bool,
    /// Only the address space whose page tables begin there (CR3, in hexadecimal)
    #[arg(long, value_name = "HEX", value_parser = parse_address)]
    cr3: Option<u64>,
    /// Only instructions at these linear addresses (hexadecimal, HI not included)
    #[arg(long, value_name = "LO-HI", value_parser = parse_range)]
    range: Option<Range<u64>>,
    /// Only the first LENGTH of every PERIOD instructions
    #[arg(long, value_name = "PERIOD:LENGTH", value_parser = parse_sample)]
    sample: Option<Sample>,
    /// Leave out what an idle guest does from one HLT to the next
    #[arg(long)]
    skip_idle: bool,
}

impl FilterArgs {
    /// As the filter wants them.
    pub(crate) fn selection(&self) -> Selection {
        let privilege = match (self.user, self.kernel) {
            (true, _) => Some(Privilege::User),
            (_, true) => Some(Privilege::Kernel),
            _ => None,
        };
        Selection {
            privilege,
            cr3: self.cr3,
            linear: self.range.clone(),
            sample: self.sample,
            skip_idle: self.skip_idle,
            ..Selection::default()
        }
    }

    /// As the user gave them.
    pub(crate) fn as_given(&self) -> Vec<String> {
        let flag = |given: bool, text: &str| given.then(|| text.to_owned());
        let all = [
            flag(self.user, "--user"),
            flag(self.kernel, "--kernel"),
            self.cr3.map(|cr3| format!("--cr3 {cr3:#x}")),
            self.range.as_ref().map(|range| format!("--range {:#x}-{:#x}", range.start, range.end)),
            self.sample.map(|sample| format!("--sample {}:{}", sample.period, sample.length)),
            flag(self.skip_idle, "--skip-idle"),
        ];
        all.into_iter().flatten().collect()
    }
}

fn parse_address(text: &str) -> Result<u64, String> {
    let digits = text.trim().trim_start_matches("0x").replace('_', "");
    u64::from_str_radix(&digits, 16).map_err(|_| "give an address in hexadecimal".to_owned())
}

fn parse_range(text: &str) -> Result<Range<u64>, String> {
    let wanted = || "give two addresses in hexadecimal, such as 400000-401000".to_owned();
    let (low, high) = text.split_once('-').ok_or_else(wanted)?;
    let range = parse_address(low)?..parse_address(high)?;
    if range.is_empty() { Err(wanted()) } else { Ok(range) }
}

fn parse_segment(text: &str) -> Result<(u32, u32), String> {
    let wanted = || "give a share and their number, such as 1/8 to 8/8".to_owned();
    let (number, count) = text.split_once('/').ok_or_else(wanted)?;
    let (number, count) =
        (number.parse().map_err(|_| wanted())?, count.parse().map_err(|_| wanted())?);
    if (1..=count).contains(&number) { Ok((number, count)) } else { Err(wanted()) }
}

fn parse_sample(text: &str) -> Result<Sample, String> {
    let wanted =
        || "give a period and a shorter length in instructions, such as 1000000:10000".to_owned();
    let (period, length) = text.split_once(':').ok_or_else(wanted)?;
    let number = |text: &str| text.replace('_', "").parse::<u64>().map_err(|_| wanted());
    let sample = Sample { period: number(period)?, length: number(length)? };
    if sample.length == 0 || sample.period < sample.length { Err(wanted()) } else { Ok(sample) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_tells_what_holds_where_nothing_is_set() {
        use clap::CommandFactory;
        let help = crate::cli::Arguments::command()
            .find_subcommand_mut("expand")
            .expect("it is there")
            .render_help()
            .to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for format in FORMATS {
            assert!(help.contains(format.name), "{}", format.name);
        }
        for setting in reprise_export::SETTINGS {
            let default =
                setting.summary.split_whitespace().find(|word| word.parse::<u64>().is_ok());
            let default = default.expect("the table has it");
            assert!(help.contains(&format!("[default: {default}]")), "{}: {help}", setting.flag);
        }
    }

    #[test]
    fn filters_are_read_as_they_are_meant() {
        assert_eq!(parse_range("0x400000-401000"), Ok(0x40_0000..0x40_1000));
        assert!(parse_range("5-5").is_err() && parse_range("5").is_err());
        assert_eq!(parse_sample("1_000:10"), Ok(Sample { period: 1000, length: 10 }));
        assert!(parse_sample("10:1000").is_err() && parse_sample("10:0").is_err());
        assert_eq!(parse_segment("3/8"), Ok((3, 8)));
        assert!(["0/8", "9/8", "8", "1/0"].iter().all(|wrong| parse_segment(wrong).is_err()));
        assert_eq!(parse_address("0xffff_8000"), Ok(0xffff_8000));
    }
}
