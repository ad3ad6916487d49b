//! Outcomes recorded from a real CPU, so that hosts without KVM compare too.
//!
//! The file holds, zstd-compressed: the CPU's vendor and family, then for each case its seed, a
//! fingerprint of its input (the generator may have changed since), and the outcome as the bytes by
//! which it differs from the input.

use std::fs;
use std::path::PathBuf;

use reprise_kvm::user_oracle::{DATA_BYTES, UserException, UserInput, UserOutcome};
use reprise_trace::cpu_state::FpuState;

use crate::case::Case;

/// A recorded outcome.
pub(crate) struct Fixture {
    pub(crate) seed: u64,
    pub(crate) fingerprint: u64,
    /// See [`apply`].
    difference: Vec<u8>,
}

/// The file's content.
pub(crate) struct Fixtures {
    /// The CPU that the outcomes come from.
    pub(crate) cpu: String,
    pub(crate) cases: Vec<Fixture>,
}

const MAX_FILE_BYTES: usize = 64 << 20;

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("differential/fixtures.bin")
}

/// The host CPU's vendor and family, from the kernel's own words.
pub(crate) fn host_cpu() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).map_or("unknown", |(_, value)| value).to_owned()
    };
    format!("{} family {}", field("vendor_id"), field("cpu family"))
}

impl Fixture {
    pub(crate) fn new(case: &Case, outcome: &UserOutcome) -> Self {
        let difference = difference(&flat_input(&case.input), &flat_outcome(outcome));
        Self { seed: case.seed, fingerprint: fingerprint(case), difference }
    }

    /// The outcome that was recorded for `case`.
    pub(crate) fn outcome(&self, case: &Case) -> UserOutcome {
        let mut bytes = flat_input(&case.input);
        apply(&mut bytes, &self.difference);
        unflatten(&bytes)
    }
}

/// Changes with anything that a case starts from.
pub(crate) fn fingerprint(case: &Case) -> u64 {
    // FNV-1a over the parts; its constants are published.
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let input = &case.input;
    for byte in input.code.iter().chain(&flat_input(input)).chain(&input.read_only) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    hash
}

impl Fixtures {
    /// # Panics
    /// If the file cannot be read.
    pub(crate) fn read() -> Self {
        let packed = fs::read(path()).expect("fixtures.bin can be read");
        let bytes = zstd::bulk::decompress(&packed, MAX_FILE_BYTES).expect("fixtures.bin is zstd");
        let mut rest = &bytes[..];
        let cpu = String::from_utf8(take_block(&mut rest)).expect("the CPU's name is text");
        let mut cases = Vec::new();
        while !rest.is_empty() {
            let seed = take_u64(&mut rest);
            let fingerprint = take_u64(&mut rest);
            cases.push(Fixture { seed, fingerprint, difference: take_block(&mut rest) });
        }
        Self { cpu, cases }
    }

    /// # Panics
    /// If the file cannot be written.
    pub(crate) fn write(&self) {
        let mut bytes = Vec::new();
        put_block(&mut bytes, self.cpu.as_bytes());
        for case in &self.cases {
            bytes.extend(case.seed.to_le_bytes());
            bytes.extend(case.fingerprint.to_le_bytes());
            put_block(&mut bytes, &case.difference);
        }
        let packed = zstd::bulk::compress(&bytes, 19).expect("memory compresses");
        fs::write(path(), packed).expect("fixtures.bin can be written");
    }
}

fn put_block(bytes: &mut Vec<u8>, block: &[u8]) {
    bytes.extend((block.len() as u32).to_le_bytes());
    bytes.extend(block);
}

fn take<'a>(rest: &mut &'a [u8], size: usize) -> &'a [u8] {
    let (head, tail) = rest.split_at(size);
    *rest = tail;
    head
}

fn take_u64(rest: &mut &[u8]) -> u64 {
    u64::from_le_bytes(take(rest, 8).try_into().expect("eight bytes"))
}

fn take_block(rest: &mut &[u8]) -> Vec<u8> {
    let size = u32::from_le_bytes(take(rest, 4).try_into().expect("four bytes"));
    take(rest, size as usize).to_vec()
}

/// Runs of changed bytes: offset and length, two bytes each, then the new bytes.
fn difference(before: &[u8], after: &[u8]) -> Vec<u8> {
    /// Runs closer than this are one.
    const GAP: usize = 4;
    let changed: Vec<usize> = (0..after.len()).filter(|&at| before[at] != after[at]).collect();
    let mut bytes = Vec::new();
    for run in changed.chunk_by(|one, next| next - one <= GAP) {
        let (start, end) = (run[0], run[run.len() - 1] + 1);
        bytes.extend((start as u16).to_le_bytes());
        bytes.extend(((end - start) as u16).to_le_bytes());
        bytes.extend(&after[start..end]);
    }
    bytes
}

fn apply(bytes: &mut [u8], mut difference: &[u8]) {
    while !difference.is_empty() {
        let mut half = || {
            let half = take(&mut difference, 2);
            usize::from(u16::from_le_bytes([half[0], half[1]]))
        };
        let (start, size) = (half(), half());
        bytes[start..start + size].copy_from_slice(take(&mut difference, size));
    }
}

/// What an outcome would be if nothing happened, as bytes.
fn flat_input(input: &UserInput) -> Vec<u8> {
    let mut data = input.data.clone();
    data.resize(DATA_BYTES, 0);
    let exception = UserException { vector: 3, error_code: None, cr2: None };
    flat_outcome(&UserOutcome {
        gpr: input.gpr,
        rip: reprise_kvm::user_oracle::CODE_ADDRESS,
        rflags: input.rflags,
        fpu: input.fpu.clone(),
        data,
        exception,
    })
}

fn flat_outcome(outcome: &UserOutcome) -> Vec<u8> {
    let mut bytes = Vec::new();
    let exception = &outcome.exception;
    let code = exception.error_code.map_or(u64::MAX, u64::from);
    bytes.push(exception.vector);
    bytes.push(u8::from(exception.cr2.is_some()));
    for word in [code, exception.cr2.unwrap_or(0), outcome.rip, outcome.rflags] {
        bytes.extend(word.to_le_bytes());
    }
    outcome.gpr.iter().for_each(|register| bytes.extend(register.to_le_bytes()));
    let fpu = &outcome.fpu;
    bytes.extend(fpu.fcw.to_le_bytes());
    bytes.extend(fpu.fsw.to_le_bytes());
    bytes.push(fpu.ftw);
    bytes.extend(fpu.mxcsr.to_le_bytes());
    fpu.st.iter().for_each(|register| bytes.extend(register));
    fpu.xmm.iter().for_each(|register| bytes.extend(register.to_le_bytes()));
    bytes.extend(&outcome.data);
    bytes
}

fn unflatten(bytes: &[u8]) -> UserOutcome {
    let mut rest = bytes;
    let vector = take(&mut rest, 1)[0];
    let has_cr2 = take(&mut rest, 1)[0] != 0;
    let code = take_u64(&mut rest);
    let cr2 = take_u64(&mut rest);
    let (rip, rflags) = (take_u64(&mut rest), take_u64(&mut rest));
    let gpr = std::array::from_fn(|_| take_u64(&mut rest));
    let half = |rest: &mut &[u8]| u16::from_le_bytes(take(rest, 2).try_into().expect("two bytes"));
    let (fcw, fsw) = (half(&mut rest), half(&mut rest));
    let ftw = take(&mut rest, 1)[0];
    let mxcsr = u32::from_le_bytes(take(&mut rest, 4).try_into().expect("four bytes"));
    let st = std::array::from_fn(|_| take(&mut rest, 10).try_into().expect("ten bytes"));
    let xmm = std::array::from_fn(|_| {
        u128::from_le_bytes(take(&mut rest, 16).try_into().expect("sixteen bytes"))
    });
    let fpu = FpuState { fcw, fsw, ftw, mxcsr, st, xmm, ..FpuState::default() };
    let exception =
        UserException { vector, error_code: u32::try_from(code).ok(), cr2: has_cr2.then_some(cr2) };
    UserOutcome { gpr, rip, rflags, fpu, data: rest.to_vec(), exception }
}
