//! What a checkpoint holds beside guest RAM, and the digest of both.

use serde::{Deserialize, Serialize};

use super::PAGE_BYTES;
use crate::cpu_state::CpuState;
use crate::moment::Moment;

/// What a state's bytes start with: the schema's name, then its version, little-endian.
const SCHEMA_ID: [u8; 4] = *b"rrCP";
const SCHEMA_VERSION: u16 = 1;

/// What decides what the guest sees next and is neither in [`CpuState`] nor in RAM: an engine's own
/// affair.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HiddenState {
    /// The engine that saved it, `soft` or `kvm`; another engine takes nothing from it.
    pub engine: String,
    /// Raised by any change of what the bytes mean.
    pub version: u32,
    /// As that engine encodes it.
    pub bytes: Vec<u8>,
}

impl HiddenState {
    /// KVM's, which is nothing: what the host's TLB holds nobody can ask for, and there stale translations
    /// are the host's affair in a recording and in its replay alike.
    pub fn of_kvm() -> Self {
        Self { engine: "kvm".to_owned(), version: 1, bytes: Vec::new() }
    }

    /// That of the clock `pmu`, which is nothing either, whatever hardware it runs on: what it traps
    /// follows from CPU and RAM.
    pub fn of_branch_clock() -> Self {
        Self { engine: "branch clock".to_owned(), version: 1, bytes: Vec::new() }
    }

    /// The part of a checkpoint's digest that stands for it.
    pub fn digest(&self) -> [u8; 32] {
        hash_of(self)
    }
}

/// An engine at an instruction boundary, RAM apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineState {
    /// Ticks since the machine started.
    pub tick: u64,
    /// The CPU.
    pub cpu: CpuState,
    /// What the engine keeps beside it.
    pub hidden: HiddenState,
}

/// The running BLAKE3 hash of what the guest wrote to its console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Bytes hashed.
    pub bytes: u64,
    /// Chaining values of the hash tree's complete subtrees, the largest and first one first.
    pub subtrees: Vec<[u8; 32]>,
    /// The bytes behind them, at most one chunk of the hash.
    pub tail: Vec<u8>,
}

/// A record of the log, by what any two runs that differ would have otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastRecord {
    /// Its moment.
    pub moment: Moment,
    /// As in [`crate::event::Record`].
    pub cpu_digest: u64,
}

/// Everything but RAM that a machine needs to go on exactly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// Where the machine stands. Nothing has entered it at this tick yet.
    pub moment: Moment,
    /// Virtual time, in nanoseconds since the machine started.
    pub virtual_ns: u64,
    /// Records of the log before this moment.
    pub records: u64,
    /// The last of them.
    pub last_record: Option<LastRecord>,
    /// The engine.
    pub engine: EngineState,
    /// The board's saved state, in postcard's encoding.
    pub devices: Vec<u8>,
    /// The tick of the last jump of virtual time.
    pub base_tick: u64,
    /// Virtual time at that tick, in nanoseconds.
    pub base_ns: u64,
    /// What has left the machine.
    pub console: ConsoleState,
    /// Accesses to the board so far.
    pub accesses: u64,
    /// Interrupts delivered so far.
    pub interrupts: u64,
}

impl MachineState {
    /// The digest of the machine, whose RAM has the digest `ram`.
    pub fn digest(&self, ram: [u8; 32]) -> CheckpointDigest {
        let rest = (
            (self.moment, self.engine.tick, self.virtual_ns, self.records, &self.last_record),
            (self.base_tick, self.base_ns, &self.console, self.accesses, self.interrupts),
        );
        CheckpointDigest {
            cpu: *self.engine.cpu.digest().as_bytes(),
            devices: *blake3::hash(&self.devices).as_bytes(),
            ram,
            engine: self.engine.hidden.digest(),
            rest: hash_of(&rest),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = SCHEMA_ID.to_vec();
        bytes.extend(SCHEMA_VERSION.to_le_bytes());
        postcard::to_extend(self, bytes).expect("no type of it can fail to encode")
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, StateFault> {
        let bytes = bytes.strip_prefix(&SCHEMA_ID).ok_or(StateFault::Malformed)?;
        let (version, bytes) = bytes.split_first_chunk().ok_or(StateFault::Malformed)?;
        let found = u16::from_le_bytes(*version);
        if found != SCHEMA_VERSION {
            return Err(StateFault::Version(found));
        }
        match postcard::take_from_bytes::<Self>(bytes) {
            Ok((state, [])) => Ok(state),
            _ => Err(StateFault::Malformed),
        }
    }
}

/// Why bytes are no state.
pub(super) enum StateFault {
    /// Of another schema version.
    Version(u16),
    Malformed,
}

fn hash_of(value: &impl Serialize) -> [u8; 32] {
    let bytes = postcard::to_allocvec(value).expect("no type of it can fail to encode");
    *blake3::hash(&bytes).as_bytes()
}

/// BLAKE3 digests of a whole machine at a moment, in parts, so that two that differ say where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDigest {
    /// Over the CPU state, as [`CpuState::digest`].
    pub cpu: [u8; 32],
    /// Over the board's saved state.
    pub devices: [u8; 32],
    /// Over guest RAM: a [`RamDigest`].
    pub ram: [u8; 32],
    /// Over what the engine keeps beside the CPU state; differs between engines.
    pub engine: [u8; 32],
    /// Over position, time, what has left the machine, and counters.
    pub rest: [u8; 32],
}

impl CheckpointDigest {
    /// The digest over all parts.
    pub fn whole(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for part in [&self.cpu, &self.devices, &self.ram, &self.engine, &self.rest] {
            hasher.update(part);
        }
        *hasher.finalize().as_bytes()
    }

    /// Which parts `other` has otherwise, for a person; `None` if none.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let parts = [
            ("CPU", self.cpu != other.cpu),
            ("devices", self.devices != other.devices),
            ("RAM", self.ram != other.ram),
            ("TLB and the like", self.engine != other.engine),
            ("time, position or console", self.rest != other.rest),
        ];
        let differing: Vec<_> = parts.iter().filter(|(_, differs)| *differs).collect();
        let names: Vec<_> = differing.iter().map(|(name, _)| *name).collect();
        (!names.is_empty()).then(|| names.join(", "))
    }
}

/// The digest of guest RAM, made of the digests of its pages so that a page that has not changed need
/// not be looked at again.
#[derive(Clone, Debug, Default)]
pub struct RamDigest(blake3::Hasher);

impl RamDigest {
    /// Takes the next page that is not all zero, in the order of guest-physical addresses.
    pub fn page(&mut self, address: u64, digest: &[u8; 32]) {
        self.0.update(&address.to_le_bytes()).update(digest);
    }

    /// The digest.
    pub fn finish(&self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

/// A page's digest; `None` for a page of zeros, which no [`RamDigest`] counts.
pub fn page_digest(page: &[u8]) -> Option<[u8; 32]> {
    const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    (*page != ZEROS[..page.len()]).then(|| *blake3::hash(page).as_bytes())
}
