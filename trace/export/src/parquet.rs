//! Apache Parquet, for DuckDB, Spark and data frames: a directory with a directory for each of three
//! tables. `instructions` has a row for each instruction that retired, `accesses` one for each read
//! and each write (an instruction that does both to one place has two), `events` one for whatever else
//! the trace tells. The column `instruction`, how many instructions retired before, joins them.
//!
//! A table is partitioned: each file holds the rows of so many instructions and is named by the first
//! of them, so a reader of a window opens few files, and directories of several shares of a trace can be
//! read as one. No file's rows depend on where the trace was cut into batches.

mod table;

use std::io;
use std::path::{Path, PathBuf};

use ::parquet::data_type::ByteArray;
use reprise_trace::instructions::{
    Delivery, Direction, Event, Observer, Position, Run, Step, TraceError, WalkCause,
};

use crate::instruction::{Branch, DecodedBlocks};
use crate::output::PendingDirectory;
use table::Cell::{Bytes, Flag, Name, Null, Number, Small, Unsigned};
use table::{Cell, Column, Kind, Table};

/// Instructions of each file, where the user gives none.
pub const DEFAULT_FILE_INSTRUCTIONS: u64 = 1 << 24;

const fn column(name: &'static str, kind: Kind, optional: bool) -> Column {
    Column { name, kind, optional }
}

/// Instructions that retired.
pub const INSTRUCTIONS: &[Column] = &[
    column("instruction", Kind::Count, false),
    column("virtual_ns", Kind::Count, false),
    column("cpl", Kind::Small, false),
    column("cr3", Kind::Number, false),
    column("address", Kind::Unsigned, false),
    column("physical", Kind::Number, false),
    column("mnemonic", Kind::Text, false),
    column("branch", Kind::Text, true),
    column("bytes", Kind::Bytes, false),
];

/// Reads and writes.
pub const ACCESSES: &[Column] = &[
    column("instruction", Kind::Count, false),
    column("retired", Kind::Flag, false),
    column("cpl", Kind::Small, false),
    column("cr3", Kind::Number, false),
    column("code_address", Kind::Unsigned, false),
    column("is_write", Kind::Flag, false),
    column("address", Kind::Unsigned, false),
    column("physical", Kind::Number, true),
    column("size", Kind::Small, false),
    column("value", Kind::Unsigned, true),
];

/// Whatever else a trace tells.
pub const EVENTS: &[Column] = &[
    column("instruction", Kind::Count, false),
    column("event", Kind::Text, false),
    column("cr3", Kind::Number, false),
    column("vector", Kind::Small, true),
    column("error_code", Kind::Number, true),
    column("address", Kind::Unsigned, true),
    column("fault_address", Kind::Unsigned, true),
    column("physical", Kind::Number, true),
    column("port", Kind::Small, true),
    column("is_write", Kind::Flag, true),
    column("size", Kind::Number, true),
    column("value", Kind::Unsigned, true),
    column("tick", Kind::Number, true),
    column("virtual_ns", Kind::Number, true),
];

/// A table's name and columns, by its place in [`Parquet::tables`].
pub const TABLES: [(&str, &[Column]); 3] =
    [("instructions", INSTRUCTIONS), ("accesses", ACCESSES), ("events", EVENTS)];
const INSTRUCTION_TABLE: usize = 0;
const ACCESS_TABLE: usize = 1;
const EVENT_TABLE: usize = 2;

/// What an export did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Rows written, by table.
    pub rows: [u64; TABLES.len()],
    /// Bytes of all files.
    pub bytes: u64,
}

/// What a row says of an instruction, whenever it runs.
struct Static {
    mnemonic: ByteArray,
    branch: Option<&'static str>,
    bytes: ByteArray,
    physical: u64,
}

/// Writes the tables.
pub struct Parquet {
    directory: PendingDirectory,
    tables: [Table; TABLES.len()],
    file_instructions: u64,
    /// The instruction at which the next file begins.
    next_file: u64,
    decoded: DecodedBlocks,
    blocks: Vec<Option<Box<[Static]>>>,
    position: Position,
}

impl std::fmt::Debug for Parquet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parquet").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// A branch's name in the tables.
fn branch_name(branch: Branch) -> Option<&'static str> {
    Some(match branch {
        Branch::None => return None,
        Branch::DirectJump => "direct-jump",
        Branch::IndirectJump => "indirect-jump",
        Branch::Conditional => "conditional",
        Branch::DirectCall => "direct-call",
        Branch::IndirectCall => "indirect-call",
        Branch::Return => "return",
        Branch::SystemCall => "system-call",
        Branch::SystemReturn => "system-return",
    })
}

/// Whether there is a directory with the directories of all tables, of Parquet files alone, and nothing else.
fn holds_tables(path: &Path) -> io::Result<bool> {
    if !path.symlink_metadata()?.is_dir() {
        return Ok(false);
    }
    let mut tables = 0;
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let is_table = TABLES.iter().any(|(name, _)| entry.file_name() == *name);
        if !is_table || !entry.file_type()?.is_dir() {
            return Ok(false);
        }
        for file in std::fs::read_dir(entry.path())? {
            let file = file?;
            let is_ours = file.path().extension().is_some_and(|ending| ending == "parquet");
            if !is_ours || !file.file_type()?.is_file() {
                return Ok(false);
            }
        }
        tables += 1;
    }
    Ok(tables == TABLES.len())
}

impl Parquet {
    /// Starts a directory that is to be `path`, with files of so many instructions each.
    ///
    /// # Errors
    /// If no directory can be made there, or there is something of that name already.
    pub fn create(path: &Path, file_instructions: u64) -> io::Result<Self> {
        Self::begin(PendingDirectory::create(path)?, file_instructions)
    }

    /// The same, in place of a directory that has such tables and nothing else.
    ///
    /// # Errors
    /// If no directory can be made there, or there is something else of that name already.
    pub fn create_over(path: &Path, file_instructions: u64) -> io::Result<Self> {
        let directory = match path.symlink_metadata() {
            Ok(_) if holds_tables(path)? => PendingDirectory::create_over(path)?,
            _ => PendingDirectory::create(path)?,
        };
        Self::begin(directory, file_instructions)
    }

    fn begin(directory: PendingDirectory, file_instructions: u64) -> io::Result<Self> {
        let mut tables = Vec::with_capacity(TABLES.len());
        for (name, columns) in TABLES {
            let folder: PathBuf = directory.temporary().join(name);
            std::fs::create_dir(&folder)?;
            tables.push(Table::new(folder, columns).map_err(io::Error::other)?);
        }
        let tables = tables.try_into().map_err(|_| io::Error::other("as many tables as TABLES"))?;
        Ok(Self {
            directory,
            tables,
            file_instructions: file_instructions.max(1),
            next_file: 0,
            decoded: DecodedBlocks::default(),
            blocks: Vec::new(),
            position: Position::default(),
        })
    }

    /// Gives the directory its final name.
    ///
    /// # Errors
    /// If that fails; it is removed then.
    pub fn finish(self) -> io::Result<Summary> {
        let mut summary = Summary::default();
        for (table, rows) in self.tables.iter().zip(&mut summary.rows) {
            *rows = table.rows();
            summary.bytes += table.bytes();
        }
        self.directory.finish()?;
        Ok(summary)
    }

    fn put(&mut self, table: usize, row: &[Cell<'_>]) -> Result<(), TraceError> {
        self.tables[table].put(row).map_err(TraceError::Write)
    }

    /// Before the row of this instruction: begins new files where it is time.
    fn reach(&mut self, instruction: u64) -> Result<(), TraceError> {
        if instruction < self.next_file {
            return Ok(());
        }
        let first = instruction - instruction % self.file_instructions;
        for table in &mut self.tables {
            table.next_file(first).map_err(TraceError::Write)?;
        }
        self.next_file = first.saturating_add(self.file_instructions);
        Ok(())
    }

    /// Sees to it that `self.blocks` has the run's block.
    fn learn(&mut self, run: &Run<'_>) {
        let (id, block) = (run.id() as usize, run.block());
        if id >= self.blocks.len() {
            self.blocks.resize_with(id + 1, || None);
        }
        if self.blocks[id].is_some() {
            return;
        }
        let decoded = self.decoded.get(run.id(), block);
        let all = block.instructions().zip(decoded.iter()).map(|(instruction, decoded)| Static {
            mnemonic: ByteArray::from(format!("{:?}", decoded.mnemonic).to_lowercase().as_str()),
            branch: branch_name(decoded.branch),
            bytes: ByteArray::from(instruction.bytes().to_vec()),
            physical: block.physical_at(instruction.offset()),
        });
        self.blocks[id] = Some(all.collect());
    }

    fn put_instruction(
        &mut self,
        run: &Run<'_>,
        step: &Step<'_>,
        position: &Position,
    ) -> Result<(), TraceError> {
        let known = self.blocks[run.id() as usize].as_ref().and_then(|all| all.get(step.index));
        let Some(known) = known else { return Ok(()) };
        let row = [
            Number(position.instruction),
            Number(position.virtual_ns()),
            Small(i32::from(run.block().mode().cpl)),
            Number(position.cr3),
            Unsigned(step.instruction.linear()),
            Number(known.physical),
            Bytes(&known.mnemonic),
            known.branch.map_or(Null, Name),
            Bytes(&known.bytes),
        ];
        self.tables[INSTRUCTION_TABLE].put(&row).map_err(TraceError::Write)
    }

    fn put_accesses(
        &mut self,
        run: &Run<'_>,
        step: &Step<'_>,
        position: &Position,
    ) -> Result<(), TraceError> {
        for access in step.accesses() {
            let kind = access.kind;
            let sides = [(kind.reads(), false), (kind.writes(), true)];
            for (_, is_write) in sides.into_iter().filter(|(does, _)| *does) {
                // Of an access that does both, what it read comes first and what it wrote behind.
                let both = kind.reads() && is_write;
                let first = if both { access.values.len() / 2 } else { 0 };
                let row = [
                    Number(position.instruction),
                    Flag(step.retired),
                    Small(i32::from(run.block().mode().cpl)),
                    Number(position.cr3),
                    Unsigned(step.instruction.linear()),
                    Flag(is_write),
                    Unsigned(access.address),
                    access.physical.map_or(Null, Number),
                    Small(i32::from(access.size_bytes)),
                    access.values.get(first).map_or(Null, |value| Unsigned(*value)),
                ];
                self.put(ACCESS_TABLE, &row)?;
            }
        }
        Ok(())
    }
}

fn is_write(direction: Direction) -> Cell<'static> {
    Flag(direction == Direction::Out)
}

/// The row of an event, beside where it happened: from `vector` on.
fn event_cells(event: &Event) -> (&'static str, [Cell<'static>; 11]) {
    let mut cells = [Null; 11];
    let [vector, error, address, fault, physical, port, write, size, value, tick, time] =
        &mut cells;
    let name = match *event {
        Event::Delivery { kind, vector: number, error_code, address: at, fault_address } => {
            *vector = Small(i32::from(number));
            *error = error_code.map_or(Null, |code| Number(u64::from(code)));
            *address = Unsigned(at);
            *fault = fault_address.map_or(Null, Unsigned);
            match kind {
                Delivery::Exception => "exception",
                Delivery::Interrupt => "interrupt",
                Delivery::NonMaskable => "non-maskable-interrupt",
                Delivery::Software => "software-interrupt",
            }
        }
        Event::Return { address: at } => {
            *address = Unsigned(at);
            "return"
        }
        Event::AddressSpace { .. } => "address-space",
        Event::Port { direction, port: number, size_bytes, value: what } => {
            (*port, *write) = (Small(i32::from(number)), is_write(direction));
            (*size, *value) = (Number(u64::from(size_bytes)), Unsigned(u64::from(what)));
            "port"
        }
        Event::Mmio { direction, physical: at, size_bytes, value: what } => {
            (*physical, *write) = (Number(at), is_write(direction));
            (*size, *value) = (Number(u64::from(size_bytes)), Unsigned(what));
            "mmio"
        }
        Event::Dma { direction, physical: at, bytes } => {
            // A device that brings data in writes memory.
            (*physical, *write) = (Number(at), Flag(direction == Direction::In));
            *size = Number(bytes);
            "dma"
        }
        Event::SystemAccess { linear, physical: at, size_bytes, .. } => {
            *address = linear.map_or(Null, Unsigned);
            (*physical, *size) = (Number(at), Number(u64::from(size_bytes)));
            "system-access"
        }
        Event::MemoryWrite { linear, physical: at, size_bytes, value: what, .. } => {
            *address = linear.map_or(Null, Unsigned);
            (*physical, *write) = (Number(at), Flag(true));
            (*size, *value) = (Number(u64::from(size_bytes)), Unsigned(what));
            "memory-write"
        }
        Event::SecondPage { physical: at, .. } => {
            *physical = Number(at);
            "second-page"
        }
        Event::Register { register, value: [low, _] } => {
            (*vector, *value) = (Small(i32::from(register)), Unsigned(low));
            "register"
        }
        Event::PageWalk(walk) => {
            (*address, *size) = (Unsigned(walk.linear), Number(u64::from(walk.entry_count)));
            (*physical, *write) =
                (walk.page.map_or(Null, Number), Flag(walk.cause == WalkCause::Write));
            "page-walk"
        }
        Event::Marker(marker) => {
            (*tick, *time) = (Number(marker.tick), Number(marker.virtual_ns));
            "marker"
        }
        Event::Skipped { instructions, address: at } => {
            *size = Number(instructions);
            *address = at.map_or(Null, Unsigned);
            "skipped"
        }
    };
    (name, cells)
}

impl Observer for Parquet {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        self.position = *position;
        Ok(())
    }

    fn new_blocks(&mut self) {
        self.decoded.clear();
        self.blocks.clear();
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.learn(run);
        let mut position = self.position;
        for step in run.steps() {
            self.reach(position.instruction)?;
            if step.retired {
                self.put_instruction(run, &step, &position)?;
            }
            self.put_accesses(run, &step, &position)?;
            position.instruction += u64::from(step.retired);
        }
        self.position.pass_run(run);
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        self.reach(self.position.instruction)?;
        let instruction = self.position.instruction;
        self.position.pass_event(event);
        let (name, cells) = event_cells(event);
        let mut row = vec![Number(instruction), Name(name), Number(self.position.cr3)];
        row.extend(cells);
        self.put(EVENT_TABLE, &row)
    }

    fn end(&mut self) -> Result<(), TraceError> {
        // Even an empty trace has tables, with their columns.
        self.reach(self.position.instruction)?;
        self.tables.iter_mut().try_for_each(|table| table.end_file().map_err(TraceError::Write))
    }
}
