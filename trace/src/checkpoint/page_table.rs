//! Which page of a file of checkpoints each page of guest RAM is.

use super::PAGE_BYTES;
use crate::varint::{TakeError, Taker, put, put_difference};

/// Guest RAM ends below 4 GiB on any machine that this format describes.
const MAX_PAGES: u64 = 1 << 20;

/// A page of guest RAM that is not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its number: guest-physical address divided by the page size.
    pub(super) page: u64,
    /// The number of the page in the file that it is.
    pub(super) id: u32,
}

impl Entry {
    pub(super) fn address(&self) -> u64 {
        self.page * PAGE_BYTES as u64
    }
}

/// Appends a table, whose entries are in the order of their pages. Each stretch of pages without a
/// gap: the pages left out before it, its length, and each one's id as the difference to the id that
/// follows the one before.
pub(super) fn encode(entries: &[Entry], out: &mut Vec<u8>) {
    put(out, entries.len() as u64);
    let (mut next_page, mut next_id) = (0, 0_u64);
    for stretch in entries.chunk_by(|one, next| next.page == one.page + 1) {
        put(out, stretch[0].page - next_page);
        put(out, stretch.len() as u64);
        next_page = stretch[0].page + stretch.len() as u64;
        for entry in stretch {
            put_difference(out, next_id, u64::from(entry.id));
            next_id = u64::from(entry.id) + 1;
        }
    }
}

/// From a table's bytes, every id of which is below `ids`; `None` if they are none.
pub(super) fn decode(taker: &mut Taker<'_>, ids: u64) -> Option<Vec<Entry>> {
    take(taker, ids).ok().flatten()
}

fn take(taker: &mut Taker<'_>, ids: u64) -> Result<Option<Vec<Entry>>, TakeError> {
    let count = taker.varint()?;
    if count > MAX_PAGES {
        return Ok(None);
    }
    let mut entries = Vec::new();
    let (mut next_page, mut next_id) = (0_u64, 0_u64);
    while (entries.len() as u64) < count {
        let (gap, length) = (taker.varint()?, taker.varint()?);
        let fits = gap <= MAX_PAGES
            && (1..=count - entries.len() as u64).contains(&length)
            && next_page + gap + length <= MAX_PAGES;
        if !fits {
            return Ok(None);
        }
        next_page += gap;
        for _ in 0..length {
            let id = taker.difference(next_id)?;
            if id >= ids {
                return Ok(None);
            }
            entries.push(Entry { page: next_page, id: id as u32 });
            (next_page, next_id) = (next_page + 1, id + 1);
        }
    }
    Ok((taker.remaining() == 0).then_some(entries))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_comes_back_from_its_bytes_and_from_no_others() {
        let entry = |page, id| Entry { page, id };
        for entries in [
            vec![],
            vec![entry(0, 0)],
            vec![entry(3, 7), entry(4, 8), entry(5, 2), entry(9, 2), entry(MAX_PAGES - 1, 99)],
        ] {
            let mut bytes = Vec::new();
            encode(&entries, &mut bytes);
            let decode = |bytes: &[u8], ids| decode(&mut Taker::new(bytes), ids);
            assert_eq!(decode(&bytes, 100), Some(entries.clone()));
            assert_eq!(decode(&bytes[..bytes.len() - 1], 100), None);
            assert_eq!(decode(&[&bytes[..], &[0]].concat(), 100), None);
            assert_eq!(decode(&bytes, 99).is_some(), entries.len() < 5, "an id beyond the file");
        }
        let mut forged = Vec::new();
        [1, MAX_PAGES, 1, 0].iter().for_each(|number| put(&mut forged, *number));
        assert_eq!(decode(&mut Taker::new(&forged), 100), None);
    }
}
