//! Where a recording's log frames lie. Derived data: a scan of the frames gives the same.

use crate::varint::{TakeError, Taker, put};

/// The most entries kept. When they are used up every other one is dropped, so the index stays small
/// however long the recording: entries then stand for several frames each.
const MAX_ENTRIES: usize = 4096;

/// One log frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    /// The frame's file offset.
    pub(crate) offset: u64,
    /// Records in the frames before it.
    pub(crate) records_before: u64,
}

/// The log frames numbered `0`, `stride`, `2 * stride` and so on, each with what else its reader wants
/// to know of it, which no file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SeekIndex<P = ()> {
    stride: u64,
    frame_count: u64,
    entries: Vec<(IndexEntry, P)>,
}

impl<P> Default for SeekIndex<P> {
    fn default() -> Self {
        Self { stride: 1, frame_count: 0, entries: Vec::new() }
    }
}

impl<P> SeekIndex<P> {
    /// Takes the next log frame into account.
    pub(crate) fn push(&mut self, entry: IndexEntry, place: P) {
        if self.frame_count.is_multiple_of(self.stride) {
            if self.entries.len() == MAX_ENTRIES {
                let mut number = 0;
                self.entries.retain(|_| {
                    number += 1;
                    number % 2 == 1
                });
                self.stride *= 2;
            }
            // After a drop, this frame's number is a multiple of the doubled stride as well.
            self.entries.push((entry, place));
        }
        self.frame_count += 1;
    }

    /// How many log frames there are.
    pub(crate) fn frame_count(&self) -> u64 {
        self.frame_count
    }

    /// The last frame here that begins at or before the record of this number.
    pub(crate) fn before_record(&self, record: u64) -> Option<&(IndexEntry, P)> {
        let behind = self.entries.partition_point(|(entry, _)| entry.records_before <= record);
        self.entries.get(behind.checked_sub(1)?)
    }

    /// The index's bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put(&mut bytes, self.stride);
        put(&mut bytes, self.frame_count);
        put(&mut bytes, self.entries.len() as u64);
        let mut previous = IndexEntry { offset: 0, records_before: 0 };
        for (entry, _) in &self.entries {
            put(&mut bytes, entry.offset - previous.offset);
            put(&mut bytes, entry.records_before - previous.records_before);
            previous = *entry;
        }
        bytes
    }
}

impl SeekIndex {
    /// From an index's bytes; `None` if they are none.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        Self::take(&mut Taker::new(bytes)).ok().flatten()
    }

    fn take(taker: &mut Taker<'_>) -> Result<Option<Self>, TakeError> {
        let (stride, frame_count, entry_count) =
            (taker.varint()?, taker.varint()?, taker.varint()?);
        if entry_count > MAX_ENTRIES as u64 {
            return Ok(None);
        }
        let mut entries = Vec::new();
        let mut previous = IndexEntry { offset: 0, records_before: 0 };
        for _ in 0..entry_count {
            previous.offset = previous.offset.wrapping_add(taker.varint()?);
            previous.records_before = previous.records_before.wrapping_add(taker.varint()?);
            entries.push((previous, ()));
        }
        Ok((taker.remaining() == 0).then_some(Self { stride, frame_count, entries }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index_of(frame_count: u64) -> SeekIndex {
        let mut index = SeekIndex::default();
        for number in 0..frame_count {
            index.push(IndexEntry { offset: 100 + number * 37, records_before: number * 3 }, ());
        }
        index
    }

    #[test]
    fn entries_stand_for_every_stride_th_frame_however_many_there_are() {
        for frame_count in [0, 1, 2, 4095, 4096, 4097, 8191, 8192, 8193, 50_000] {
            let index = index_of(frame_count);
            assert!(index.entries.len() <= MAX_ENTRIES);
            assert_eq!(index.frame_count(), frame_count);
            assert_eq!(index.entries.len() as u64, frame_count.div_ceil(index.stride));
            for (position, (entry, ())) in index.entries.iter().enumerate() {
                assert_eq!(entry.records_before, position as u64 * index.stride * 3);
            }
        }
    }

    #[test]
    fn comes_back_from_its_bytes_and_from_no_others() {
        for frame_count in [0, 1, 300, 10_000] {
            let index = index_of(frame_count);
            let bytes = index.encode();
            assert_eq!(SeekIndex::decode(&bytes), Some(index));
            assert_eq!(SeekIndex::decode(&bytes[..bytes.len() - 1]), None);
            assert_eq!(SeekIndex::decode(&[&bytes[..], &[0]].concat()), None);
        }
    }

    #[test]
    fn a_record_is_searched_from_the_last_frame_listed_before_it() {
        for frame_count in [1, 300, 10_000] {
            let index = index_of(frame_count);
            for record in [0, 1, 2, 3, 4, 500, frame_count * 3 - 1, frame_count * 3 + 9] {
                let (entry, ()) = index.before_record(record).expect("the first frame is listed");
                assert!(entry.records_before <= record, "record {record}");
                let frames_away = (record - entry.records_before) / 3;
                let behind_the_last = record >= frame_count * 3;
                assert!(frames_away < index.stride || behind_the_last, "record {record}");
            }
        }
        assert_eq!(SeekIndex::<()>::default().before_record(0), None);
    }
}
