//! Every row of the table of formats, through pipes, files and compression.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use reprise_export::background::Background;
use reprise_export::formats::{
    Destination, ExportError, ExportOptions, Exported, FORMATS, Format, SETTINGS, Setting,
    SettingRow, Shape,
};
use reprise_export::output::{COMPRESSIONS, Compression};
use reprise_trace::instructions::{Contents, Observer, Position, TraceError};

use crate::account::show;
use crate::synthetic::{Options, Synthetic};

const INSTRUCTIONS: u64 = 5_000;

/// A pipe whose other end the test holds.
#[derive(Clone, Default)]
struct Pipe(Arc<Mutex<Vec<u8>>>);

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panicked").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Options with an interval short enough that something comes out.
fn options(format: &Format) -> ExportOptions {
    let mut options = ExportOptions::default();
    if format.settings.contains(&Setting::Interval) {
        options.interval_instructions = Some(1_000);
    }
    options
}

fn export(format: &'static Format, to: Destination) -> Exported {
    let mut export = format.open(&options(format), to).expect(format.name);
    show(Options::new(1), INSTRUCTIONS, &mut export);
    export.finish().expect(format.name)
}

fn through_pipe(format: &'static Format) -> Vec<u8> {
    let pipe = Pipe::default();
    let exported = export(format, Destination::Pipe(Box::new(pipe.clone())));
    let bytes = pipe.0.lock().expect("nobody panicked").clone();
    assert_eq!(exported.bytes, bytes.len() as u64, "{}", format.name);
    bytes
}

fn decompress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    let mut plain = Vec::new();
    let mut reader: Box<dyn Read> = match compression {
        Compression::None => Box::new(bytes),
        Compression::Gzip => Box::new(flate2::read::GzDecoder::new(bytes)),
        Compression::Xz => Box::new(liblzma::read::XzDecoder::new(bytes)),
        Compression::Zstd => Box::new(zstd::Decoder::new(bytes).expect("begins")),
    };
    reader.read_to_end(&mut plain).expect("what was compressed can be read");
    plain
}

fn streams() -> impl Iterator<Item = &'static Format> {
    FORMATS.iter().filter(|format| format.shape == Shape::Stream)
}

#[test]
fn files_and_pipes_of_a_format_have_the_same_bytes_compressed_or_not() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for format in streams() {
        let plain = through_pipe(format);
        assert!(!plain.is_empty(), "{}", format.name);
        let none = [(Compression::None, "")];
        let known = COMPRESSIONS.iter().filter(|one| format.compressions.contains(&one.0));
        for (compression, ending) in none.iter().chain(known) {
            let dot = if ending.is_empty() { "" } else { "." };
            let path = directory.path().join(format!("t.{}{dot}{ending}", format.extension));
            assert_eq!(Format::of(&path).expect("its ending names it").name, format.name);
            let exported = export(format, Destination::Path(path.clone()));
            let bytes = fs::read(&path).expect("the file is there");
            assert_eq!(exported.bytes, bytes.len() as u64, "{}", format.name);
            assert!(decompress(&bytes, *compression) == plain, "{} {ending}", format.name);
            assert_eq!(bytes == plain, *compression == Compression::None, "{ending}");
        }
    }
}

#[test]
fn a_compression_that_readers_do_not_know_is_refused_and_leaves_nothing() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut refused = 0;
    for format in FORMATS {
        for (_, ending) in COMPRESSIONS.iter().filter(|one| !format.compressions.contains(&one.0)) {
            let path = directory.path().join(format!("t.{}.{ending}", format.extension));
            let opened = format.open(&ExportOptions::default(), Destination::Path(path));
            let error = opened.expect_err(format.name);
            assert!(matches!(error, ExportError::Compression { .. }), "{error}");
            assert!(!error.to_string().contains('\n'), "{error}");
            refused += 1;
        }
    }
    assert!(refused > 0);
    assert_eq!(fs::read_dir(directory.path()).expect("can be read").count(), 0);
}

#[test]
fn what_is_not_finished_leaves_nothing() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    for format in FORMATS {
        let path = directory.path().join("t");
        let opened = format.open(&options(format), Destination::Path(path));
        let mut export = opened.expect(format.name);
        show(Options::new(1), INSTRUCTIONS, &mut export);
        drop(export);
    }
    assert_eq!(fs::read_dir(directory.path()).expect("can be read").count(), 0);
}

#[test]
fn names_endings_and_flags_are_each_of_one_row() {
    for (number, format) in FORMATS.iter().enumerate() {
        assert_eq!(Format::named(format.name).expect("is there").name, format.name);
        for other in &FORMATS[..number] {
            assert_ne!(format.name, other.name);
            assert_ne!(format.extension, other.extension);
        }
        for setting in format.settings {
            assert_eq!(SETTINGS.iter().filter(|row| row.setting == *setting).count(), 1);
        }
    }
    let error = Format::named("vcd").expect_err("there is none").to_string();
    assert!(FORMATS.iter().all(|format| error.contains(format.name)), "{error}");
    assert!(Format::of(Path::new("trace.unknown.gz")).is_none());
}

#[test]
fn a_setting_that_a_format_does_not_know_is_refused() {
    let set = [
        (Setting::Interval, ExportOptions { interval_instructions: Some(1), ..Default::default() }),
        (Setting::Cpu, ExportOptions { cpu: Some(1), ..Default::default() }),
        (
            Setting::FileInstructions,
            ExportOptions { file_instructions: Some(1), ..Default::default() },
        ),
    ];
    assert_eq!(set.len(), SETTINGS.len());
    for (setting, options) in set {
        let row = SETTINGS.iter().find(|row| row.setting == setting).expect("has a row");
        for format in FORMATS.iter().filter(|format| format.shape == Shape::Stream) {
            let opened = format.open(&options, Destination::Pipe(Box::new(io::sink())));
            assert_eq!(opened.is_ok(), format.settings.contains(&setting), "{}", format.name);
            if let Err(error) = opened {
                let error = error.to_string();
                assert!(error.contains(row.flag) && error.contains(format.name), "{error}");
            }
        }
    }
}

/// A pipe that nobody reads.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_closed_pipe_ends_an_export_on_its_thread() {
    for format in streams() {
        let to = Destination::Pipe(Box::new(Closed));
        let mut export = format.open(&options(format), to).expect(format.name);
        export.begin(&Position::default()).expect("nothing is written yet");
        let mut thread = Background::start(Contents::default(), export).expect("starts");
        let mut machine = Synthetic::new(Options::new(1));
        for _ in 0..10 {
            thread.exchange(&mut machine.advance(1_000));
        }
        let (_, ended) = thread.finish().expect("ends");
        let closed = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
        assert!(
            matches!(&ended, Err(TraceError::Write(error)) if closed(error)),
            "{}: {ended:?}",
            format.name
        );
    }
}

#[test]
fn the_documentation_lists_the_table() {
    let documented = include_str!("../../../EXPORTS.md");
    for format in FORMATS {
        let known = COMPRESSIONS.iter().filter(|one| format.compressions.contains(&one.0));
        let endings: Vec<String> = known.map(|(_, ending)| format!(".{ending}")).collect();
        let flags = SETTINGS.iter().filter(|row| format.settings.contains(&row.setting));
        let flags: Vec<String> = flags.map(|row| format!("`{}`", row.flag)).collect();
        let row = format!(
            "| `{}` | {} | {} | {} | {} |",
            format.name,
            match format.shape {
                Shape::Stream => format!(".{}", format.extension),
                Shape::Directory => format!(".{} (a directory)", format.extension),
            },
            endings.join(", "),
            flags.join(", "),
            format.summary
        );
        assert!(documented.lines().any(|line| line == row), "EXPORTS.md lacks this line:\n{row}");
    }
    for SettingRow { flag, summary, .. } in SETTINGS {
        let row = format!("| `{flag}` | {summary} |");
        assert!(documented.lines().any(|line| line == row), "EXPORTS.md lacks this line:\n{row}");
    }
}
