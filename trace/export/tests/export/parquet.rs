//! Parquet's tables, read back row by row, against the machine's account.

use std::fs::{self, File};
use std::path::Path;

use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::{Field, Row};
use reprise_export::formats::{Destination, ExportError, ExportOptions, Format};
use reprise_export::parquet::{Parquet, Summary, TABLES};
use reprise_trace::instructions::Event;

use crate::account::{retired, show};
use crate::synthetic::{Accessed, Entry, Executed, Options};

const FILE_INSTRUCTIONS: u64 = 3_000;

/// The rows of a table, file by file in the order of names, and those names.
fn rows(directory: &Path, table: &str) -> (Vec<Row>, Vec<String>) {
    let folder = fs::read_dir(directory.join(table)).expect("the table is there");
    let mut files: Vec<_> = folder.map(|file| file.expect("a file").path()).collect();
    files.sort();
    let mut rows = Vec::new();
    for path in &files {
        let reader = SerializedFileReader::new(File::open(path).expect("opens")).expect("Parquet");
        rows.extend(reader.get_row_iter(None).expect("rows").map(|row| row.expect("a row")));
    }
    let name = |path: &std::path::PathBuf| {
        path.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned()
    };
    (rows, files.iter().map(name).collect())
}

fn get(row: &Row, name: &str) -> Field {
    let found = row.get_column_iter().find(|(column, _)| column.as_str() == name);
    found.unwrap_or_else(|| panic!("no column {name}")).1.clone()
}

/// A number, whatever its type; nothing is none.
fn number(row: &Row, name: &str) -> Option<u64> {
    match get(row, name) {
        Field::Null => None,
        Field::Long(value) => Some(value.cast_unsigned()),
        Field::ULong(value) => Some(value),
        Field::Int(value) => Some(u64::try_from(value).expect("is not negative")),
        Field::Bool(value) => Some(u64::from(value)),
        other => panic!("{name} is {other:?}"),
    }
}

fn export(options: Options, path: &Path) -> (Vec<Entry>, Summary) {
    let mut exporter = Parquet::create(path, FILE_INSTRUCTIONS).expect("begins");
    let entries = show(options, 20_000, &mut exporter);
    assert!(!path.exists(), "it has no name yet");
    (entries, exporter.finish().expect("ends"))
}

/// What the rows of accesses should say: the instruction's number, which side, the access, its value.
fn sides(entries: &[Entry]) -> Vec<(u64, bool, &Executed, &Accessed, u64)> {
    let (mut number, mut sides) = (0, Vec::new());
    for entry in entries {
        let executed = match entry {
            Entry::Instruction(executed) => executed,
            Entry::Event(Event::Skipped { instructions, .. }) => {
                number += instructions;
                continue;
            }
            Entry::Event(_) => continue,
        };
        for one in &executed.accesses {
            if one.kind.reads() {
                sides.push((number, false, executed, one, one.values[0]));
            }
            if one.kind.writes() {
                let words = usize::from(one.size_bytes).div_ceil(8);
                let value = one.values[one.values.len() - words];
                sides.push((number, true, executed, one, value));
            }
        }
        number += u64::from(executed.retired);
    }
    sides
}

#[test]
fn tables_hold_what_the_machine_did() {
    for seed in 1..4 {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("t.parquet");
        let (entries, summary) = export(Options::with_everything(seed), &path);
        let (instructions, files) = rows(&path, "instructions");
        let executed = retired(&entries);
        assert_eq!(instructions.len(), executed.len(), "seed {seed}");
        for (count, (row, executed)) in instructions.iter().zip(&executed).enumerate() {
            assert_eq!(number(row, "instruction"), Some(count as u64), "seed {seed}");
            assert_eq!(number(row, "cpl"), Some(u64::from(executed.mode.cpl)));
            assert_eq!(number(row, "address"), Some(executed.linear), "seed {seed}");
            assert_eq!(number(row, "physical").map(|at| at & 0xfff), Some(executed.linear & 0xfff));
            let Field::Bytes(bytes) = get(row, "bytes") else { panic!("bytes are bytes") };
            assert_eq!(bytes.data(), executed.bytes, "seed {seed}");
            let name = get(row, "branch");
            let is_return = name == Field::Str("return".to_owned());
            assert_eq!(is_return, executed.bytes == [0xc3], "seed {seed}: {name:?}");
        }
        let (accesses, _) = rows(&path, "accesses");
        let sides = sides(&entries);
        assert_eq!(accesses.len(), sides.len(), "seed {seed}");
        for (row, (instruction, is_write, executed, accessed, value)) in accesses.iter().zip(sides)
        {
            assert_eq!(number(row, "instruction"), Some(instruction), "seed {seed}");
            assert_eq!(number(row, "retired"), Some(u64::from(executed.retired)));
            assert_eq!(number(row, "code_address"), Some(executed.linear));
            assert_eq!(number(row, "is_write"), Some(u64::from(is_write)));
            assert_eq!(number(row, "address"), Some(accessed.address));
            assert_eq!(number(row, "physical"), accessed.physical);
            assert_eq!(number(row, "size"), Some(u64::from(accessed.size_bytes)));
            assert_eq!(number(row, "value"), Some(value), "seed {seed}: {accessed:x?}");
        }
        let (events, _) = rows(&path, "events");
        let happened: Vec<&Event> = entries
            .iter()
            .filter_map(|entry| match entry {
                Entry::Event(event) => Some(event),
                Entry::Instruction(_) => None,
            })
            .collect();
        assert_eq!(events.len(), happened.len(), "seed {seed}");
        for (row, event) in events.iter().zip(happened) {
            if let Event::Delivery { vector, address, fault_address, .. } = *event {
                assert_eq!(number(row, "vector"), Some(u64::from(vector)));
                assert_eq!(number(row, "address"), Some(address));
                assert_eq!(number(row, "fault_address"), fault_address);
            }
        }
        let counts = [instructions.len(), accesses.len(), events.len()];
        assert_eq!(summary.rows, counts.map(|count| count as u64));
        let expected = (0..=executed.len()).step_by(FILE_INSTRUCTIONS as usize);
        let expected: Vec<String> = expected.map(|first| format!("{first:015}")).collect();
        assert_eq!(files, expected, "a file is named by its first instruction");
    }
}

#[test]
fn the_same_trace_gives_the_same_files() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let paths = ["one", "other"].map(|name| directory.path().join(name));
    for path in &paths {
        export(Options::new(7), path);
    }
    for (table, _) in TABLES {
        let files = paths.each_ref().map(|path| {
            let folder = fs::read_dir(path.join(table)).expect("the table is there");
            let mut files: Vec<_> = folder.map(|file| file.expect("a file").path()).collect();
            files.sort();
            files.iter().map(|file| fs::read(file).expect("can be read")).collect::<Vec<_>>()
        });
        assert!(!files[0].is_empty());
        assert!(files[0] == files[1], "{table}");
    }
}

#[test]
fn a_directory_goes_into_no_pipe_and_replaces_nothing() {
    let format = Format::named("parquet").expect("is there");
    let options = ExportOptions::default();
    let piped = format.open(&options, Destination::Pipe(Box::new(std::io::sink())));
    assert!(matches!(piped, Err(ExportError::NoPipe { .. })));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("t.parquet");
    fs::write(&path, "mine").expect("can be written");
    let opened = format.open(&options, Destination::Path(path.clone()));
    assert!(matches!(opened, Err(ExportError::Create(_))));
    assert_eq!(fs::read(&path).expect("is still there"), b"mine");
    assert_eq!(fs::read_dir(directory.path()).expect("can be read").count(), 1);
}

#[test]
fn the_documentation_lists_the_columns() {
    let documented = include_str!("../../../EXPORTS.md");
    for (table, columns) in TABLES {
        let names: Vec<String> = columns
            .iter()
            .map(|column| format!("`{}`{}", column.name, if column.optional { "?" } else { "" }))
            .collect();
        let row = format!("| `{table}` | {} |", names.join(", "));
        assert!(documented.lines().any(|line| line == row), "EXPORTS.md lacks this line:\n{row}");
    }
}
