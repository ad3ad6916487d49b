//! Where the code that ran leaves results to makers of CPUs: noted when code is decoded, so that running
//! it costs nothing.

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::Mnemonic;

use crate::cpu::Cpu;
use crate::decode::block_cache::Block;
use crate::latitude::{self, Latitude};

/// Places of one instruction that are told apart.
const MAX_SITES: usize = 4096;

/// An instruction whose result is left to makers, and where the code has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sites {
    /// What is left to them.
    pub latitude: Latitude,
    /// The instruction, as a disassembly has it.
    pub mnemonic: String,
    /// Linear addresses, up to some thousand.
    pub addresses: BTreeSet<u64>,
    /// The first that came to run, and the instruction count up to its block.
    pub first: (u64, u64),
}

impl Sites {
    /// Adds what another machine has found of the same run.
    pub fn merge(all: &mut Vec<Self>, more: Vec<Self>) {
        for more in more {
            match all.iter_mut().find(|known| known.mnemonic == more.mnemonic) {
                Some(known) => {
                    known.addresses.extend(more.addresses);
                    known.first = std::cmp::min_by_key(known.first, more.first, |(_, tick)| *tick);
                }
                None => all.push(more),
            }
        }
    }
}

/// All of them, by instruction.
#[derive(Debug, Default)]
pub(crate) struct LatitudeSites(BTreeMap<(Latitude, Mnemonic), Sites>);

impl LatitudeSites {
    /// As a table.
    pub(crate) fn to_vec(&self) -> Vec<Sites> {
        self.0.values().cloned().collect()
    }
}

impl Cpu {
    /// Notes what a block that is about to run at a linear address holds.
    pub(crate) fn note_latitude(&mut self, block: &Block, linear: u64) {
        for op in &block.ops {
            let Some(latitude) = latitude::of_result(&op.instruction) else { continue };
            let (mnemonic, tick) = (op.instruction.mnemonic(), self.tick);
            let address = linear.wrapping_add(u64::from(op.offset));
            let sites =
                self.latitude_sites.0.entry((latitude, mnemonic)).or_insert_with(|| Sites {
                    latitude,
                    mnemonic: format!("{mnemonic:?}").to_lowercase(),
                    addresses: BTreeSet::new(),
                    first: (address, tick),
                });
            if sites.addresses.len() < MAX_SITES {
                sites.addresses.insert(address);
            }
        }
    }
}
