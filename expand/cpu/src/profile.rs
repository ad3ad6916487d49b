//! Where the software CPU's time goes: what translated code leaves to Rust, and how often.

use std::collections::BTreeMap;

use iced_x86::Mnemonic;

use crate::translate::site::{LEFT_AFTER_BLOCK, LEFT_BY_EXIT, LEFT_WITHOUT_BUDGET};

/// Counts of one run.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Units of blocks translated, in all modes and at all addresses.
    pub units_translated: u64,
    /// Times that all translated code was dropped since its memory was full.
    pub code_dropped: u64,
    /// Times that translated code was entered.
    pub entries: u64,
    /// Times that it was left for a known address which no code was linked to.
    pub left_by_exit: u64,
    /// Times that it was left after a block whose last operation was run in Rust.
    pub left_after_operation: u64,
    /// Times that it was left since a block was longer than the instructions still to run.
    pub left_for_budget: u64,
    /// Times that an operation stopped it: faults, accesses that the board answers, HLT.
    pub stopped: u64,
    /// Instructions executed one call each, outside translated code.
    pub interpreted: u64,
    /// Times that a block's code was looked for by its guest-physical address.
    pub blocks_searched: u64,
    /// Times that a linear address was translated by walking page tables.
    pub page_walks: u64,
    /// Times that links between blocks were forgotten, in the lower and in the upper half of the
    /// address space: its translations changed, or code was overwritten.
    pub links_forgotten: [u64; 2],
    operations: Vec<u64>,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            units_translated: 0,
            code_dropped: 0,
            entries: 0,
            left_by_exit: 0,
            left_after_operation: 0,
            left_for_budget: 0,
            stopped: 0,
            interpreted: 0,
            blocks_searched: 0,
            page_walks: 0,
            links_forgotten: [0; 2],
            operations: vec![0; Mnemonic::values().len()],
        }
    }
}

impl Profile {
    /// Counts that translated code was left.
    pub(crate) fn note_leaving(&mut self, reason: u32) {
        self.entries += 1;
        match reason {
            LEFT_BY_EXIT => self.left_by_exit += 1,
            LEFT_AFTER_BLOCK => self.left_after_operation += 1,
            LEFT_WITHOUT_BUDGET => self.left_for_budget += 1,
            _ => self.stopped += 1,
        }
    }

    /// Counts an operation of translated code that Rust ran.
    pub(crate) fn note_operation(&mut self, mnemonic: Mnemonic) {
        self.operations[mnemonic as usize] += 1;
    }

    /// Operations of translated code that Rust ran, by mnemonic.
    pub fn operations(&self) -> BTreeMap<String, u64> {
        let counted = Mnemonic::values().zip(&self.operations).filter(|(_, count)| **count > 0);
        counted.map(|(mnemonic, count)| (format!("{mnemonic:?}").to_lowercase(), *count)).collect()
    }
}
