//! Page walks: what the CPU reads of page tables to translate an address, as an event.

use crate::varint::{TakeError, Taker, put};

/// What wanted a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WalkCause {
    /// A load, also one by the CPU itself: of a descriptor, say.
    Read,
    /// A store, also one by the CPU itself: of an interrupt's frame, say.
    Write,
    /// An instruction fetch.
    Fetch,
}

const CAUSES: [WalkCause; 3] = [WalkCause::Read, WalkCause::Write, WalkCause::Fetch];

/// The most entries that a walk reads.
pub const MAX_WALK_ENTRIES: usize = 4;

/// A walk through the page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageWalk {
    /// What wanted the translation.
    pub cause: WalkCause,
    /// Of which linear address.
    pub linear: u64,
    /// The level of the first entry read, the root table's: 4 in long mode, 3 with PAE, else 2.
    pub root_level: u8,
    /// How many entries were read.
    pub entry_count: u8,
    /// Guest-physical addresses of the entries read, the root's first; zero behind them.
    pub entries: [u64; MAX_WALK_ENTRIES],
    /// In which of them the walk set an accessed or dirty bit: bit 0 is the root's.
    pub marked: u8,
    /// The guest-physical page, of 4 KiB, that it led to; `None` if it ended in a fault.
    pub page: Option<u64>,
}

/// An entry that a walk read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkEntry {
    /// The level of its table; 1 has the entries of pages of 4 KiB.
    pub level: u8,
    /// Guest-physical address.
    pub physical: u64,
    /// The walk set its accessed or dirty bit.
    pub marked: bool,
}

/// Bytes of the first byte: cause, levels, entries, and whether a page was found.
const CAUSE: u8 = 3;
const LEVEL_SHIFT: u32 = 2;
const COUNT_SHIFT: u32 = 4;
const FOUND: u8 = 1 << 7;

impl PageWalk {
    /// Bytes of each entry.
    pub fn entry_bytes(&self) -> u8 {
        if self.root_level == 2 { 4 } else { 8 }
    }

    /// The entries read, the root's first.
    pub fn reads(&self) -> impl Iterator<Item = WalkEntry> + use<> {
        let walk = *self;
        (0..walk.entry_count.min(MAX_WALK_ENTRIES as u8)).map(move |number| WalkEntry {
            level: walk.root_level.saturating_sub(number),
            physical: walk.entries[usize::from(number)],
            marked: walk.marked >> number & 1 != 0,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let found = if self.page.is_some() { FOUND } else { 0 };
        let (level, count) = (self.root_level.wrapping_sub(2) & 3, self.entry_count);
        out.push(self.cause as u8 | level << LEVEL_SHIFT | count << COUNT_SHIFT | found);
        out.push(self.marked);
        put(out, self.linear);
        self.entries[..usize::from(count)].iter().for_each(|entry| put(out, *entry));
        self.page.iter().for_each(|page| put(out, *page));
    }

    /// Takes a walk; `None` if the bytes are none.
    pub(super) fn take(taker: &mut Taker<'_>) -> Result<Option<Self>, TakeError> {
        let (first, marked) = (taker.byte()?, taker.byte()?);
        let linear = taker.varint()?;
        let root_level = (first >> LEVEL_SHIFT & 3) + 2;
        let entry_count = first >> COUNT_SHIFT & 7;
        let cause = CAUSES.get(usize::from(first & CAUSE)).copied();
        let Some(cause) = cause.filter(|_| root_level <= 4 && entry_count <= root_level) else {
            return Ok(None);
        };
        if u32::from(marked) >> entry_count != 0 {
            return Ok(None);
        }
        let mut entries = [0; MAX_WALK_ENTRIES];
        for entry in &mut entries[..usize::from(entry_count)] {
            *entry = taker.varint()?;
        }
        let page = if first & FOUND != 0 { Some(taker.varint()?) } else { None };
        Ok(Some(Self { cause, linear, root_level, entry_count, entries, marked, page }))
    }
}
