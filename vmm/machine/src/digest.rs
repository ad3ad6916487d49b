//! The digest of a machine's whole state: CPU, devices and RAM.

use reprise_devices::board::Board;

use crate::accessed_bits::PageTables;
use crate::engine::{Engine, EngineError};
use crate::touched::PAGE_BYTES;

/// What is skipped where it is all zero.
const ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];

/// Whether accessed bits of the guest's page tables count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessedBits {
    /// As every other bit of RAM.
    Exact,
    /// Not in page tables: hardware that runs freely may set them early
    /// (`accessed_bits.rs`).
    SetAside,
    /// Not in the tables that CR3 leads to, and in every other page: so did recordings up to version 2 of
    /// the format.
    SetAsideInCurrent,
}

/// BLAKE3 digests of a machine's state, in parts, so that two that differ say where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateDigest {
    /// Over the CPU state, as [`reprise_trace::cpu_state::CpuState::digest`].
    pub cpu: [u8; 32],
    /// Over the board's saved state.
    pub devices: [u8; 32],
    /// Over guest RAM: its pages that are not all zero, and where they lie.
    pub ram: [u8; 32],
}

impl StateDigest {
    /// Takes the digest. Costs a pass over the guest RAM that was ever touched.
    pub(crate) fn of<E: Engine>(
        engine: &mut E,
        board: &Board,
        accessed_bits: AccessedBits,
    ) -> Result<Self, EngineError> {
        let tables = match accessed_bits {
            AccessedBits::Exact => PageTables::none(),
            AccessedBits::SetAside => PageTables::of(engine, false)?,
            AccessedBits::SetAsideInCurrent => PageTables::of(engine, true)?,
        };
        let devices = postcard::to_allocvec(&board.save())
            .expect("device state has no type that can fail to encode");
        Ok(Self {
            cpu: *engine.cpu_state()?.digest().as_bytes(),
            devices: *blake3::hash(&devices).as_bytes(),
            ram: ram_digest(engine, &tables),
        })
    }

    /// The digest over all parts: what a recording's end carries.
    pub fn whole(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.cpu).update(&self.devices).update(&self.ram);
        *hasher.finalize().as_bytes()
    }

    /// The first eight bytes of the CPU's digest, as each log record carries it.
    pub(crate) fn cpu_short(&self) -> u64 {
        let prefix = self.cpu.first_chunk().expect("a digest has 32 bytes");
        u64::from_le_bytes(*prefix)
    }
}

/// Over the pages of RAM that are not all zero. Independent of the pieces in which an engine shows
/// its RAM, as long as they are whole pages.
fn ram_digest<E: Engine>(engine: &E, tables: &PageTables) -> [u8; 32] {
    let mut addresses = blake3::Hasher::new();
    let mut contents = blake3::Hasher::new();
    let mut room = [0; PAGE_BYTES];
    engine.visit_ram(&mut |start, piece| {
        let mut run_start = 0;
        let mut offset = 0;
        for page in piece.chunks(PAGE_BYTES) {
            let address = start + offset as u64;
            let counted = tables.as_counted(address, page, &mut room);
            let is_zero = *page == ZERO_PAGE[..page.len()];
            if !is_zero {
                addresses.update(&address.to_le_bytes());
            }
            if is_zero || !std::ptr::eq(counted, page) {
                contents.update(&piece[run_start..offset]);
                run_start = offset + page.len();
            }
            if !is_zero && !std::ptr::eq(counted, page) {
                contents.update(counted);
            }
            offset += page.len();
        }
        contents.update(&piece[run_start..]);
    });
    let mut ram = blake3::Hasher::new();
    ram.update(addresses.finalize().as_bytes()).update(contents.finalize().as_bytes());
    *ram.finalize().as_bytes()
}
