//! One table: rows are gathered by column, and go out as row groups of files.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::PathBuf;
use std::sync::Arc;

use ::parquet::basic::{
    Compression, Encoding, LogicalType, Repetition, Type as Physical, ZstdLevel,
};
use ::parquet::column::writer::ColumnWriter;
use ::parquet::data_type::ByteArray;
use ::parquet::errors::ParquetError;
use ::parquet::file::properties::{WriterProperties, WriterPropertiesPtr};
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::types::{ColumnPath, Type, TypePtr};

/// Rows of a row group: as many as DuckDB makes, and some megabytes of memory.
const GROUP_ROWS: usize = 1 << 17;
/// Fast, and dictionaries have done most of the work before.
const ZSTD_LEVEL: i32 = 1;
/// Who wrote a file.
const CREATOR: &str = concat!("reprise version ", env!("CARGO_PKG_VERSION"));

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Numbers that grow with the rows.
    Count,
    /// Numbers below 2^63.
    Number,
    /// Numbers of 64 bits, for linear addresses and values.
    Unsigned,
    /// Numbers of 32 bits.
    Small,
    /// Yes or no.
    Flag,
    /// UTF-8.
    Text,
    /// Bytes.
    Bytes,
}

/// A column of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// It may hold nothing.
    pub optional: bool,
}

/// What a row has in a column. It must fit the column's kind.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cell<'a> {
    Null,
    Number(u64),
    Unsigned(u64),
    Small(i32),
    Flag(bool),
    Name(&'static str),
    Bytes(&'a ByteArray),
}

/// A column's part of the row group under construction.
enum Values {
    Long(Vec<i64>),
    Int(Vec<i32>),
    Flag(Vec<bool>),
    Bytes(Vec<ByteArray>),
}

struct Gathered {
    column: Column,
    values: Values,
    /// 1 for a row that has a value, of optional columns.
    levels: Vec<i16>,
}

impl Gathered {
    fn new(column: Column) -> Self {
        let values = match column.kind {
            Kind::Count | Kind::Number | Kind::Unsigned => Values::Long(Vec::new()),
            Kind::Small => Values::Int(Vec::new()),
            Kind::Flag => Values::Flag(Vec::new()),
            Kind::Text | Kind::Bytes => Values::Bytes(Vec::new()),
        };
        Self { column, values, levels: Vec::new() }
    }

    fn put(&mut self, cell: Cell<'_>) -> io::Result<()> {
        if self.column.optional {
            self.levels.push(i16::from(!matches!(cell, Cell::Null)));
        }
        match (&mut self.values, cell) {
            (Values::Long(all), Cell::Number(value) | Cell::Unsigned(value)) => {
                // Parquet's unsigned numbers are the bits of signed ones.
                all.push(value.cast_signed());
            }
            (Values::Int(all), Cell::Small(value)) => all.push(value),
            (Values::Flag(all), Cell::Flag(value)) => all.push(value),
            (Values::Bytes(all), Cell::Name(name)) => all.push(ByteArray::from(name)),
            (Values::Bytes(all), Cell::Bytes(bytes)) => all.push(bytes.clone()),
            (_, Cell::Null) if self.column.optional => {}
            _ => return Err(io::Error::other("a cell does not fit its column; report this")),
        }
        Ok(())
    }

    fn write(&mut self, writer: &mut ColumnWriter<'_>) -> Result<(), ParquetError> {
        let levels = self.column.optional.then_some(self.levels.as_slice());
        match (&mut self.values, writer) {
            (Values::Long(all), ColumnWriter::Int64ColumnWriter(out)) => {
                out.write_batch(all, levels, None)?;
                all.clear();
            }
            (Values::Int(all), ColumnWriter::Int32ColumnWriter(out)) => {
                out.write_batch(all, levels, None)?;
                all.clear();
            }
            (Values::Flag(all), ColumnWriter::BoolColumnWriter(out)) => {
                out.write_batch(all, levels, None)?;
                all.clear();
            }
            (Values::Bytes(all), ColumnWriter::ByteArrayColumnWriter(out)) => {
                out.write_batch(all, levels, None)?;
                all.clear();
            }
            _ => return Err(ParquetError::General("a column is not of its kind".to_owned())),
        }
        self.levels.clear();
        Ok(())
    }
}

fn schema(columns: &[Column]) -> Result<TypePtr, ParquetError> {
    let field = |column: &Column| {
        let (physical, logical) = match column.kind {
            Kind::Count | Kind::Number => (Physical::INT64, None),
            Kind::Unsigned => (Physical::INT64, Some(LogicalType::integer(64, false))),
            Kind::Small => (Physical::INT32, None),
            Kind::Flag => (Physical::BOOLEAN, None),
            Kind::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
            Kind::Bytes => (Physical::BYTE_ARRAY, None),
        };
        let repetition = if column.optional { Repetition::OPTIONAL } else { Repetition::REQUIRED };
        Type::primitive_type_builder(column.name, physical)
            .with_logical_type(logical)
            .with_repetition(repetition)
            .build()
            .map(Arc::new)
    };
    let fields = columns.iter().map(field).collect::<Result<Vec<_>, _>>()?;
    Type::group_type_builder("row").with_fields(fields).build().map(Arc::new)
}

fn properties(columns: &[Column]) -> Result<WriterPropertiesPtr, ParquetError> {
    let mut properties = WriterProperties::builder()
        .set_created_by(CREATOR.to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(ZSTD_LEVEL)?));
    for column in columns.iter().filter(|column| column.kind == Kind::Count) {
        // No two rows are alike, but each is near the one before.
        let path = ColumnPath::from(column.name);
        properties = properties
            .set_column_dictionary_enabled(path.clone(), false)
            .set_column_encoding(path, Encoding::DELTA_BINARY_PACKED);
    }
    Ok(Arc::new(properties.build()))
}

/// A table under construction.
pub(super) struct Table {
    folder: PathBuf,
    schema: TypePtr,
    properties: WriterPropertiesPtr,
    columns: Vec<Gathered>,
    gathered_rows: usize,
    file: Option<SerializedFileWriter<BufWriter<File>>>,
    rows: u64,
    bytes: u64,
}

impl Table {
    /// A table with these columns, whose files go into `folder`.
    pub(super) fn new(folder: PathBuf, columns: &[Column]) -> Result<Self, ParquetError> {
        Ok(Self {
            folder,
            schema: schema(columns)?,
            properties: properties(columns)?,
            columns: columns.iter().map(|column| Gathered::new(*column)).collect(),
            gathered_rows: 0,
            file: None,
            rows: 0,
            bytes: 0,
        })
    }

    /// Rows so far.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// Bytes of all files that are whole.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Begins the file of the instructions from this one on.
    pub(super) fn next_file(&mut self, first: u64) -> io::Result<()> {
        self.end_file()?;
        // Names sort as numbers do.
        let path = self.folder.join(format!("{first:015}.parquet"));
        let out = BufWriter::new(File::create(path)?);
        let (schema, properties) = (Arc::clone(&self.schema), Arc::clone(&self.properties));
        self.file = Some(SerializedFileWriter::new(out, schema, properties).map_err(to_io)?);
        Ok(())
    }

    /// Appends a row to the file.
    pub(super) fn put(&mut self, row: &[Cell<'_>]) -> io::Result<()> {
        if row.len() != self.columns.len() {
            return Err(io::Error::other("a row does not fit its table; report this"));
        }
        for (column, cell) in self.columns.iter_mut().zip(row) {
            column.put(*cell)?;
        }
        self.rows += 1;
        self.gathered_rows += 1;
        if self.gathered_rows == GROUP_ROWS { self.put_group() } else { Ok(()) }
    }

    fn put_group(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        if self.gathered_rows == 0 {
            return Ok(());
        }
        let mut write = || -> Result<(), ParquetError> {
            let mut group = file.next_row_group()?;
            for column in &mut self.columns {
                let writer = group.next_column()?;
                let mut writer = writer
                    .ok_or_else(|| ParquetError::General("a column is missing".to_owned()))?;
                column.write(writer.untyped())?;
                writer.close()?;
            }
            group.close().map(|_| ())
        };
        write().map_err(to_io)?;
        self.gathered_rows = 0;
        Ok(())
    }

    /// Makes the file whole.
    pub(super) fn end_file(&mut self) -> io::Result<()> {
        self.put_group()?;
        if let Some(file) = self.file.take() {
            let out = file.into_inner().map_err(to_io)?;
            let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
            self.bytes += file.metadata()?.len();
            file.sync_all()?;
        }
        Ok(())
    }
}

/// What the disk said is told as it was.
fn to_io(error: ParquetError) -> io::Error {
    match error {
        ParquetError::External(inner) => match inner.downcast::<io::Error>() {
            Ok(error) => *error,
            Err(other) => io::Error::other(other),
        },
        other => io::Error::other(other),
    }
}
