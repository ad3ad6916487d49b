//! Where the software CPU's time went, as people and checks read it.

use std::collections::BTreeMap;

use reprise_cpu::profile::Profile;
use serde::Serialize;

use crate::output::{grouped, table};

/// Operations that a person is shown, the most frequent ones.
const SHOWN_OPERATIONS: usize = 12;

/// Counts of a run on the software CPU.
#[derive(Clone, Debug, Serialize)]
pub struct ProfileReport {
    /// Units of blocks translated, in all modes and at all addresses.
    pub units_translated: u64,
    /// Times that all translated code was dropped because its memory was full.
    pub code_dropped: u64,
    /// Times that translated code was entered.
    pub entries: u64,
    /// Times that it was left for a known address to which nothing was linked.
    pub left_by_exit: u64,
    /// Times that it was left after an operation that ends a block was run in Rust.
    pub left_after_operation: u64,
    /// Times that it was left because it is longer than what was to run before the next event.
    pub left_for_budget: u64,
    /// Times that an operation stopped it: faults, accesses to devices, halts.
    pub stopped: u64,
    /// Instructions executed outside translated code.
    pub instructions_interpreted: u64,
    /// Times that a block was looked for by its guest-physical address.
    pub blocks_searched: u64,
    /// Walks of page tables: misses of the software TLB.
    pub page_walks: u64,
    /// Times that links between units were forgotten, in the lower and the upper half of the address
    /// space.
    pub links_forgotten: [u64; 2],
    /// Operations of translated code that were run in Rust, by mnemonic.
    pub operations_in_rust: BTreeMap<String, u64>,
}

impl From<&Profile> for ProfileReport {
    fn from(profile: &Profile) -> Self {
        Self {
            units_translated: profile.units_translated,
            code_dropped: profile.code_dropped,
            entries: profile.entries,
            left_by_exit: profile.left_by_exit,
            left_after_operation: profile.left_after_operation,
            left_for_budget: profile.left_for_budget,
            stopped: profile.stopped,
            instructions_interpreted: profile.interpreted,
            blocks_searched: profile.blocks_searched,
            page_walks: profile.page_walks,
            links_forgotten: profile.links_forgotten,
            operations_in_rust: profile.operations(),
        }
    }
}

impl ProfileReport {
    /// The report for a person; `instructions` are those of the whole run.
    pub fn to_table(&self, instructions: u64) -> String {
        let rate = |count: u64| match instructions.checked_div(count) {
            Some(each) => format!("{}, once in {} instructions", grouped(count), grouped(each)),
            None => grouped(count),
        };
        let [lower, upper] = self.links_forgotten;
        let mut rows = vec![
            ("interpreted", format!("{} instructions", grouped(self.instructions_interpreted))),
            ("units translated", grouped(self.units_translated)),
            ("code dropped", format!("{} times", grouped(self.code_dropped))),
            ("code entered", rate(self.entries)),
            ("  left: no link yet", rate(self.left_by_exit)),
            ("  left: system work", rate(self.left_after_operation)),
            ("  left: event is near", rate(self.left_for_budget)),
            ("  left: fault, device, halt", rate(self.stopped)),
            ("blocks searched", rate(self.blocks_searched)),
            ("page walks", rate(self.page_walks)),
            ("links forgotten", format!("{} user, {} kernel", grouped(lower), grouped(upper))),
            ("operations run in Rust", rate(self.operations_in_rust.values().sum())),
        ];
        let mut operations: Vec<_> = self.operations_in_rust.iter().collect();
        operations.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), *name));
        let shown = operations.iter().take(SHOWN_OPERATIONS);
        let named: Vec<String> =
            shown.map(|(name, count)| format!("{name} {}", grouped(**count))).collect();
        rows.push(("  most of them", named.join(", ")));
        format!("\nwhere the software CPU's time goes\n{}", table(&rows))
    }
}
