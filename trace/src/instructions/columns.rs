//! The columns of a segment: byte streams, each compressed by itself.

use zstd::bulk::{Compressor, Decompressor};

use super::TraceError;
use super::event::Event;
use crate::varint::{TakeError, Taker, put};

/// The most bytes that the columns of a segment have together, decompressed. A reader checks it
/// before it allocates anything.
pub(crate) const MAX_COLUMN_BYTES: u64 = 96 << 20;

/// What a column holds; the number is its place in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// Blocks: addresses, mode, counts.
    Blocks,
    /// Their instructions: lengths and flags.
    Instructions,
    /// The accesses that they make.
    StaticAccesses,
    /// The registers that they write.
    RegisterWrites,
    /// Their bytes.
    Code,
    /// How many blocks came as expected, between surprises.
    BlockHits,
    /// What a surprising block is.
    BlockCodes,
    /// Numbers of blocks.
    BlockNumbers,
    /// How many addresses came as expected, between surprises.
    AddressHits,
    /// What a surprising address is.
    AddressCodes,
    /// Differences of addresses.
    AddressBytes,
    /// How often repeated instructions made their accesses.
    Counts,
    /// Cuts and events.
    Marks,
    /// Guest-physical pages.
    Physical,
    /// Values of accesses.
    Values,
    /// Values of registers.
    Registers,
}

/// How many columns there are.
pub(crate) const COLUMNS: usize = Column::Registers as usize + 1;

/// All columns of a segment under construction.
#[derive(Debug, Default)]
pub(crate) struct Columns([Vec<u8>; COLUMNS]);

impl Columns {
    #[inline(always)]
    pub(crate) fn get(&mut self, column: Column) -> &mut Vec<u8> {
        &mut self.0[column as usize]
    }

    /// Bytes in all of them.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|column| column.len() as u64).sum()
    }

    pub(crate) fn clear(&mut self) {
        self.0.iter_mut().for_each(Vec::clear);
    }

    /// Appends the columns: for each its length and the bytes that it takes compressed, then all of
    /// them. One that does not get shorter is stored as it is, with both numbers the same.
    pub(crate) fn store(
        &self,
        compressor: &mut Compressor<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), TraceError> {
        let mut bodies = Vec::new();
        for column in &self.0 {
            let before = bodies.len();
            let compressed = compressor.compress(column).map_err(TraceError::Write)?;
            let shorter = compressed.len() < column.len();
            bodies.extend_from_slice(if shorter { &compressed } else { column });
            put(out, column.len() as u64);
            put(out, (bodies.len() - before) as u64);
        }
        out.extend_from_slice(&bodies);
        Ok(())
    }
}

/// A column that is being read.
#[derive(Debug, Default)]
pub(crate) struct ColumnReader {
    bytes: Vec<u8>,
    at: usize,
}

impl ColumnReader {
    #[inline(always)]
    fn take<'a, T>(
        &'a mut self,
        take: impl FnOnce(&mut Taker<'a>) -> Result<T, TakeError>,
    ) -> Result<T, TakeError> {
        let mut taker = Taker::new(&self.bytes[self.at..]);
        let taken = take(&mut taker);
        self.at = self.bytes.len() - taker.remaining();
        taken
    }

    pub(crate) fn byte(&mut self) -> Result<u8, TakeError> {
        self.take(Taker::byte)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&[u8], TakeError> {
        self.take(|taker| taker.bytes(count as u64))
    }

    pub(crate) fn varint(&mut self) -> Result<u64, TakeError> {
        self.take(Taker::varint)
    }

    pub(crate) fn difference(&mut self, previous: u64) -> Result<u64, TakeError> {
        self.take(|taker| taker.difference(previous))
    }

    pub(crate) fn event(&mut self, tag: u8) -> Result<Option<Event>, TakeError> {
        self.take(|taker| Event::take(tag, taker))
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.at == self.bytes.len()
    }
}

/// All columns of a segment that is being read.
#[derive(Debug, Default)]
pub(crate) struct ColumnReaders([ColumnReader; COLUMNS]);

impl ColumnReaders {
    #[inline(always)]
    pub(crate) fn get(&mut self, column: Column) -> &mut ColumnReader {
        &mut self.0[column as usize]
    }

    /// A column's bytes, to be read at once.
    pub(crate) fn whole(&self, column: Column) -> &[u8] {
        &self.0[column as usize].bytes
    }

    /// Whether every column from `first` on was used up.
    pub(crate) fn are_at_end(&self, first: Column) -> bool {
        self.0[first as usize..].iter().all(ColumnReader::is_at_end)
    }

    /// Takes columns; `None` if the bytes hold none.
    pub(crate) fn load(taker: &mut Taker<'_>) -> Result<Option<Self>, TakeError> {
        let mut lengths = [(0, 0); COLUMNS];
        for length in &mut lengths {
            *length = (taker.varint()?, taker.varint()?);
        }
        let mut total: u64 = 0;
        for (raw, stored) in lengths {
            total = total.saturating_add(raw);
            if stored > raw || total > MAX_COLUMN_BYTES {
                return Ok(None);
            }
        }
        let Ok(mut decompressor) = Decompressor::new() else { return Ok(None) };
        let mut columns = Self::default();
        for (column, (raw, stored)) in columns.0.iter_mut().zip(lengths) {
            let bytes = taker.bytes(stored)?;
            column.bytes = if stored == raw {
                bytes.to_vec()
            } else {
                match decompressor.decompress(bytes, raw as usize) {
                    Ok(column) if column.len() as u64 == raw => column,
                    _ => return Ok(None),
                }
            };
        }
        Ok((taker.remaining() == 0).then_some(columns))
    }
}
