//! What `trace` and its commands take.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use reprise_trace::instructions::filter::Selection;

use super::expand::{ExportArgs, FilterArgs, format_help};
use crate::session::trace_file::{Bounds, TraceMoment};

/// `trace`.
#[derive(Debug, Args)]
pub struct TraceArgs {
    #[command(subcommand)]
    pub(crate) action: TraceAction,
}

/// What to do with a trace.
#[derive(Debug, Subcommand)]
pub(crate) enum TraceAction {
    /// List instructions with what they accessed, and events
    Dump(DumpArgs),
    /// Count: privileges, kinds, branches, busiest code, working set
    Stats(StatsArgs),
    /// Verify the whole file, and that a CPU can have done what it says
    Check(CheckArgs),
    /// Join the shares of one expansion
    Concat(ConcatArgs),
    /// Write it in another format, or a part of it in its own
    Convert(ConvertArgs),
}

/// `trace dump`.
#[derive(Debug, Args)]
pub struct DumpArgs {
    /// The trace
    #[arg(value_name = "TRACE")]
    pub(crate) file: PathBuf,
    /// Stop after so many instructions
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<u64>,
    #[command(flatten)]
    pub(crate) symbols: SymbolArgs,
    #[command(flatten)]
    pub(crate) window: WindowArgs,
}

/// `trace stats`.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The trace
    #[arg(value_name = "TRACE")]
    pub(crate) file: PathBuf,
    /// Write a page with plots for a browser, too
    #[arg(long, value_name = "OUT.html")]
    pub(crate) html: Option<PathBuf>,
    /// Overwrite the page if it exists
    #[arg(long, requires = "html")]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) symbols: SymbolArgs,
    #[command(flatten)]
    pub(crate) window: WindowArgs,
}

/// `trace check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The trace
    #[arg(value_name = "TRACE")]
    pub(crate) file: PathBuf,
    /// Carry out the trace's writes alone, and compare: loads with RAM on the way, RAM and CPU with each
    /// checkpoint of this recording and with its replay at the end. For traces made with --full
    #[arg(long, value_name = "FILE.rr")]
    pub(crate) against: Option<PathBuf>,
}

/// `trace concat`.
#[derive(Debug, Args)]
pub struct ConcatArgs {
    /// All shares, in order
    #[arg(value_name = "SHARE", required = true)]
    pub(crate) shares: Vec<PathBuf>,
    /// The whole trace; "-" for standard output
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// Overwrite the file if it exists
    #[arg(long)]
    pub(crate) force: bool,
}

/// `trace convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// The trace
    #[arg(value_name = "TRACE")]
    pub(crate) file: PathBuf,
    /// Where it goes; "-" for standard output
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: PathBuf,
    #[arg(long, value_name = "NAME", help = format_help())]
    pub(crate) format: Option<String>,
    #[command(flatten)]
    pub(crate) export: ExportArgs,
    /// Overwrite the output if it exists
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) window: WindowArgs,
}

/// Names for addresses.
#[derive(Debug, Args)]
pub(crate) struct SymbolArgs {
    /// Names for addresses: an ELF file, a System.map, or a guest's /proc/kallsyms; @OFFSET (in
    /// hexadecimal) says how far above the file's addresses the guest had it, as KASLR and PIE do.
    /// May be given more than once
    #[arg(long = "symbols", value_name = "FILE[@OFFSET]", value_parser = parse_symbol_file)]
    pub(crate) files: Vec<SymbolFile>,
}

/// A file with symbols.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SymbolFile {
    /// Where it is.
    pub path: PathBuf,
    /// What is added to its addresses.
    pub offset: u64,
}

/// Which part of a trace.
#[derive(Debug, Args)]
pub struct WindowArgs {
    /// Begin at this instruction (as dump numbers them) or guest time, such as 2.5s
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment, allow_negative_numbers = true)]
    from: Option<TraceMoment>,
    /// End before this instruction or guest time
    #[arg(long, value_name = "MOMENT", value_parser = parse_moment, allow_negative_numbers = true)]
    to: Option<TraceMoment>,
    #[command(flatten)]
    filters: FilterArgs,
}

impl WindowArgs {
    /// What to keep of the window, and where that begins and ends.
    pub(crate) fn selection(&self) -> (Selection, Bounds) {
        (self.filters.selection(), [self.from, self.to])
    }

    /// As the user gave it.
    pub(crate) fn as_given(&self) -> Vec<String> {
        let moment = |name: &str, moment: Option<TraceMoment>| {
            moment.map(|moment| match moment {
                TraceMoment::Instruction(number) => format!("--{name} {number}"),
                TraceMoment::VirtualNs(ns) => format!("--{name} {ns}ns"),
            })
        };
        let window = [moment("from", self.from), moment("to", self.to)];
        window.into_iter().flatten().chain(self.filters.as_given()).collect()
    }
}

/// An instruction's number, or a time with its unit.
fn parse_moment(text: &str) -> Result<TraceMoment, String> {
    let wanted =
        || "give an instruction's number, such as 1000000, or a time, such as 2.5s".to_owned();
    let text: String = text.trim().chars().filter(|c| !matches!(c, ',' | '_')).collect();
    let units = [("ns", 0), ("us", 3), ("ms", 6), ("s", 9)];
    let timed = units.iter().find_map(|(unit, zeros)| Some((text.strip_suffix(unit)?, *zeros)));
    let Some((number, zeros)) = timed else {
        return text.parse().map(TraceMoment::Instruction).map_err(|_| wanted());
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty()
        || fraction.len() > zeros
        || !fraction.bytes().all(|digit| digit.is_ascii_digit())
    {
        return Err(wanted());
    }
    let digits = format!("{whole}{fraction:0<zeros$}");
    digits.parse().map(TraceMoment::VirtualNs).map_err(|_| wanted())
}

/// A file's name, behind which `@` and an offset may stand.
fn parse_symbol_file(text: &str) -> Result<SymbolFile, String> {
    let whole = SymbolFile { path: text.into(), offset: 0 };
    let Some((path, offset)) = text.rsplit_once('@') else { return Ok(whole) };
    if whole.path.exists() {
        return Ok(whole);
    }
    let (digits, is_negative) = match offset.strip_prefix('-') {
        Some(digits) => (digits, true),
        None => (offset, false),
    };
    let digits = digits.trim_start_matches("0x").replace('_', "");
    let offset = u64::from_str_radix(&digits, 16).map_err(|_| {
        "give the offset behind @ in hexadecimal, such as vmlinux@1c000000".to_owned()
    })?;
    let offset = if is_negative { offset.wrapping_neg() } else { offset };
    Ok(SymbolFile { path: path.into(), offset })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_numbers_or_times() {
        for (text, moment) in [
            ("1_000", TraceMoment::Instruction(1000)),
            ("1,000", TraceMoment::Instruction(1000)),
            ("2.5s", TraceMoment::VirtualNs(2_500_000_000)),
            ("12ms", TraceMoment::VirtualNs(12_000_000)),
            ("0.001us", TraceMoment::VirtualNs(1)),
            ("7ns", TraceMoment::VirtualNs(7)),
        ] {
            assert_eq!(parse_moment(text), Ok(moment), "{text}");
        }
        for wrong in ["", "s", "soon", "-5", "2.5", "0.5ns", "1.-5s", "99999999999999999999s"] {
            assert!(parse_moment(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn symbols_may_lie_elsewhere_than_their_file_says() {
        for (text, path, offset) in [
            ("vmlinux", "vmlinux", 0),
            ("vmlinux@0x1c00_0000", "vmlinux", 0x1c00_0000),
            ("a@b@10", "a@b", 0x10),
            ("vmlinux@-1000", "vmlinux", 0x1000_u64.wrapping_neg()),
        ] {
            let expected = SymbolFile { path: path.into(), offset };
            assert_eq!(parse_symbol_file(text), Ok(expected), "{text}");
        }
        assert!(parse_symbol_file("vmlinux@auto").is_err());
    }
}
