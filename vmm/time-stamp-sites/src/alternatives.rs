//! The kernel's table of alternatives: instructions that it replaces at boot as the CPU has features.
//!
//! An entry (`struct alt_instr`) holds two 32-bit distances, each from itself to what it names: the
//! instruction and its replacement; then the feature, then the two lengths. Between Linux 5 and 6 the
//! part between distances and lengths grew and shrank; which size this kernel has shows in its own
//! table, because with any other the distances lead nowhere.

use std::ops::Range;

/// Sizes of an entry, and where in it the two lengths lie.
const LAYOUTS: [(usize, usize); 3] = [
    // Linux 5.13 to 6.2: 16 bits of feature.
    (12, 10),
    // From 6.3 on: 32 bits of feature and flags.
    (14, 12),
    // Before 5.13: 16 bits of feature, and a third length.
    (13, 10),
];

/// One replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alternative {
    /// Linear address of what is replaced.
    pub(crate) address: u64,
    /// Bytes that are replaced.
    pub(crate) replaced: u8,
    /// Linear address of the replacement.
    pub(crate) replacement: u64,
    /// Its bytes.
    pub(crate) bytes: u8,
}

/// Reads the table, which lies at `start`; replacements lie in `replacements`, and what they replace in
/// one of `text`. `None` if it is none of the known layouts.
pub(crate) fn read(
    table: &[u8],
    start: u64,
    replacements: &Range<u64>,
    text: &[Range<u64>],
) -> Option<Vec<Alternative>> {
    LAYOUTS.iter().find_map(|&(entry_bytes, lengths_at)| {
        if !table.len().is_multiple_of(entry_bytes) {
            return None;
        }
        let entries = table.chunks_exact(entry_bytes).enumerate();
        entries
            .map(|(number, entry)| {
                let at = start + (number * entry_bytes) as u64;
                let distance = |offset: usize| {
                    let bytes = entry[offset..offset + 4].try_into().expect("four bytes");
                    let distance = i64::from(i32::from_le_bytes(bytes));
                    (at + offset as u64).wrapping_add_signed(distance)
                };
                let (address, replacement) = (distance(0), distance(4));
                let [replaced, bytes] = [entry[lengths_at], entry[lengths_at + 1]];
                let known = text.iter().any(|range| range.contains(&address));
                let end = replacement + u64::from(bytes);
                let there = bytes == 0 || replacements.contains(&replacement);
                let sound = known && there && end <= replacements.end && bytes <= replaced;
                sound.then_some(Alternative { address, replaced, replacement, bytes })
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table at 0x5000 whose one entry replaces 0x1010 by two bytes at 0x6000.
    fn table(entry_bytes: usize, lengths_at: usize) -> Vec<u8> {
        let mut entry = vec![0; entry_bytes];
        entry[..4].copy_from_slice(&(0x1010_i32 - 0x5000).to_le_bytes());
        entry[4..8].copy_from_slice(&(0x6000_i32 - 0x5004).to_le_bytes());
        entry[lengths_at] = 5;
        entry[lengths_at + 1] = 2;
        entry
    }

    #[test]
    fn each_layout_is_known_by_where_it_leads() {
        let expected = Alternative { address: 0x1010, replaced: 5, replacement: 0x6000, bytes: 2 };
        let text = 0x1000..0x2000;
        for (entry_bytes, lengths_at) in LAYOUTS {
            let table = table(entry_bytes, lengths_at);
            let found = read(&table, 0x5000, &(0x6000..0x6100), std::slice::from_ref(&text));
            assert_eq!(found, Some(vec![expected]), "{entry_bytes}");
        }
        let astray = read(&table(12, 10), 0x5001, &(0x6000..0x6001), &[text]);
        assert_eq!(astray, None);
    }
}
