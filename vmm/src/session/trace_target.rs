//! What a trace is written as, by what the user gave: known before anything is read or made.

use std::io::{self, ErrorKind};
use std::path::Path;

use anyhow::{Error, anyhow};
use reprise_expand::ExpandError;
use reprise_export::output::{COMPRESSIONS, Compression};
use reprise_export::{ExportError, ExportOptions, FORMATS, Format, foreign_setting};
use reprise_trace::instructions::TraceError;

/// What `--format` calls that.
const NATIVE: &str = "reprise";

/// Arguments that do not go together, or mean nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WrongUse(pub String);

impl WrongUse {
    fn of(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// The format that `--format` or else the output's ending asks for, with these options; `None` is Reprise's
/// own.
///
/// # Errors
/// There is no such format, or it does not go with the options or the output.
pub fn format_of(
    name: Option<&str>,
    path: &Path,
    options: &ExportOptions,
    json: bool,
) -> Result<Option<&'static Format>, WrongUse> {
    let is_pipe = path == Path::new("-");
    if is_pipe && json {
        let what = "--json prints on standard output, where -o - puts the trace: give a file to -o";
        return Err(WrongUse(what.to_owned()));
    }
    let format = match name {
        Some(NATIVE) => None,
        Some(name) => Some(Format::named(name).map_err(WrongUse::of)?),
        None => Format::of(path),
    };
    match format {
        Some(format) => format.check(options, (!is_pipe).then_some(path)).map_err(WrongUse::of)?,
        None => {
            if let Some(flag) = foreign_setting(options, &[]) {
                let what = format!("{flag} has no effect on the format {NATIVE}: leave it out");
                return Err(WrongUse(what));
            }
            check_native(path, name.is_some())?;
        }
    }
    Ok(format)
}

/// Whether a trace in Reprise's own format may have this name, for which that was asked or not.
fn check_native(path: &Path, is_asked_for: bool) -> Result<(), WrongUse> {
    let ending = path.extension().unwrap_or_default().to_string_lossy().into_owned();
    if Compression::of(path) != Compression::None {
        return Err(WrongUse(format!(
            "{} would be no .{ending} file: Reprise's own format is compressed already and is for names \
             without .{ending}; other formats have their endings before it, as .csv.gz",
            path.display()
        )));
    }
    // Any other name is the user's own affair; one that nearly says a format was meant to.
    let before = Path::new(path.file_stem().unwrap_or_default()).extension().unwrap_or_default();
    if is_asked_for || !(nearly_names(&ending) || nearly_names(&before.to_string_lossy())) {
        return Ok(());
    }
    let endings = FORMATS.iter().map(|format| format!(".{}", format.extension));
    let compressed = COMPRESSIONS.iter().map(|(_, ending)| format!(".{ending}"));
    Err(WrongUse(format!(
        "{}: no format's files end with .{ending}: take {}, with {} behind that; or say --format, {NATIVE} for \
         Reprise's own",
        path.display(),
        endings.collect::<Vec<_>>().join(", "),
        compressed.collect::<Vec<_>>().join(", ")
    )))
}

/// Whether an ending is a format's or a compression's but for the case of its letters.
fn nearly_names(ending: &str) -> bool {
    let formats = FORMATS.iter().map(|format| format.extension);
    let mut known = formats.chain(COMPRESSIONS.iter().map(|(_, ending)| *ending));
    known.any(|known| known.eq_ignore_ascii_case(ending))
}

/// Why there can be no such file, and what to do.
pub fn cannot_be_made(path: &Path, error: &io::Error) -> Error {
    let shown = path.display();
    match error.kind() {
        ErrorKind::IsADirectory => anyhow!("{shown} is a directory: give the name of a file in it"),
        ErrorKind::NotFound => {
            let parent = path.parent().unwrap_or(Path::new("")).display();
            anyhow!("there is no directory {parent}: make it, or give another path")
        }
        ErrorKind::AlreadyExists => anyhow!("{shown} exists: delete it, or give another name"),
        _ => {
            anyhow!("{shown} cannot be made: {error}; check its permissions, or give another path")
        }
    }
}

/// What the system said, if that is what an error comes from.
fn of_system<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    if let Some(error) = cause.downcast_ref::<io::Error>() {
        return Some(error);
    }
    if let Some(ExpandError::Trace(error)) = cause.downcast_ref::<ExpandError>() {
        return of_system(error);
    }
    if let Some(TraceError::Write(error)) = cause.downcast_ref::<TraceError>() {
        return Some(error);
    }
    match cause.downcast_ref::<ExportError>() {
        Some(ExportError::Create(error) | ExportError::Finish(error)) => Some(error),
        _ => None,
    }
}

/// The same error; of a full disk with what to do about it.
pub fn with_remedy(error: Error) -> Error {
    let full = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge];
    let is_full = error.chain().filter_map(of_system).any(|error| full.contains(&error.kind()));
    if is_full { anyhow!("{error:#}; make room, or give another path") } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: Option<&str>, path: &str) -> Result<Option<&'static str>, WrongUse> {
        let format = format_of(name, Path::new(path), &ExportOptions::default(), false)?;
        Ok(format.map(|format| format.name))
    }

    #[test]
    fn an_ending_that_nearly_means_a_format_is_refused() {
        for own in ["a.trace", "a", "a.b/c", "boot.trace.12", "-", "/dev/null", ".hidden", "a.bin"]
        {
            assert_eq!(of(None, own), Ok(None), "{own}");
        }
        for (path, name) in
            [("a.csv", "csv"), ("a.trace.champsim.xz", "champsim"), ("a.b.din", "dinero")]
        {
            assert_eq!(of(None, path), Ok(Some(name)), "{path}");
        }
        for wrong in ["a.CSV", "a.csv.bz2", "a.gz", "a.trace.gz", "a.champsim.zst", "a.DIN"] {
            assert!(of(None, wrong).is_err(), "{wrong}");
        }
        assert_eq!(of(Some("reprise"), "a.json"), Ok(None));
        assert_eq!(of(Some("csv"), "a.json"), Ok(Some("csv")));
        assert!(of(Some("reprise"), "a.gz").is_err());
        assert!(of(Some("parquet"), "-").is_err() && of(Some("vcd"), "a").is_err());
    }

    #[test]
    fn what_has_no_effect_is_refused() {
        let options = ExportOptions { interval_instructions: Some(1), ..ExportOptions::default() };
        for (path, fits) in [("a.bb", true), ("a.csv", false), ("a.trace", false)] {
            assert_eq!(format_of(None, Path::new(path), &options, false).is_ok(), fits, "{path}");
        }
        let none = ExportOptions::default();
        assert!(format_of(Some("csv"), Path::new("-"), &none, true).is_err(), "one stream for two");
    }
}
