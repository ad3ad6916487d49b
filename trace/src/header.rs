//! A recording's header: what was recorded, on what, and by what. Stored with serde and postcard
//! behind a schema id and version, because it changes more often than the file around it.

use serde::{Deserialize, Serialize};

use crate::frame::MAX_FRAME_BYTES;
use crate::moment::TickKind;

/// What a header's bytes start with: the schema's name, then its version, little-endian.
const SCHEMA_ID: [u8; 4] = *b"rrHD";
const SCHEMA_VERSION: u16 = 2;
/// The schema before, which has no precautions.
const SCHEMA_VERSION_1: u16 = 1;

/// The most images that a recording embeds.
pub const MAX_IMAGES: usize = 16;
/// The largest image that a recording embeds, in bytes: 1 GiB, above what a 3 GiB machine boots.
pub const MAX_IMAGE_BYTES: u64 = 1 << 30;

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Guest RAM, in MiB.
    pub ram_mib: u64,
    /// What the guest's real-time clock shows when the machine starts: seconds since 1970, UTC.
    pub rtc_start_s: u64,
}

/// The guest CPU model, which decides what the guest's code does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModelInfo {
    /// For example `x86-64-v2`.
    pub name: String,
    /// Raised whenever the model changes in a way that a guest can see.
    pub version: u32,
}

/// The host that recorded. It decides nothing by itself, but flags and results that the
/// architecture leaves undefined differ between CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// CPUID's vendor string.
    pub cpu_vendor: String,
    /// CPU family, extended family added.
    pub cpu_family: u32,
    /// CPU model, extended model added.
    pub cpu_model: u32,
    /// CPU stepping.
    pub cpu_stepping: u32,
    /// CPUID's brand string.
    pub cpu_brand: String,
    /// The host kernel's release, as uname gives it.
    pub kernel_release: String,
}

/// What an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageRole {
    /// What the machine starts.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

/// An image that the recording embeds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// What it is for.
    pub role: ImageRole,
    /// Its file's name, without a directory.
    pub name: String,
    /// Its length, in bytes.
    pub bytes: u64,
    /// BLAKE3 of its bytes.
    pub blake3: [u8; 32],
}

impl ImageInfo {
    /// Describes `bytes`.
    pub fn of(role: ImageRole, name: impl Into<String>, bytes: &[u8]) -> Self {
        Self {
            role,
            name: name.into(),
            bytes: bytes.len() as u64,
            blake3: *blake3::hash(bytes).as_bytes(),
        }
    }

    /// Whether this describes `bytes`.
    pub fn describes(&self, bytes: &[u8]) -> bool {
        self.bytes == bytes.len() as u64 && self.blake3 == *blake3::hash(bytes).as_bytes()
    }
}

/// The guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// The embedded guest's name, or the kernel's file name.
    pub name: String,
    /// The kernel's command line.
    pub command_line: String,
    /// The images, in the order in which they are embedded.
    pub images: Vec<ImageInfo>,
}

/// Whether a guest could have an instruction's answer that no log has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Treatment {
    /// The answer followed from the machine's state, or came from the log.
    Closed,
    /// It may have been the host's: a replay may differ.
    Open,
}

/// How an instruction whose answers only a CPU knows was dealt with while recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Precaution {
    /// Its mnemonic, and the code that executes it, for example `RDTSC, user code`.
    pub what: String,
    /// Whether it was dealt with.
    pub treatment: Treatment,
    /// How, in a few words.
    pub how: String,
}

/// What a recording says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The machine.
    pub machine: MachineInfo,
    /// Its CPU model.
    pub cpu_model: CpuModelInfo,
    /// What one tick is.
    pub tick_kind: TickKind,
    /// Nanoseconds of guest time in one tick; zero where virtual time is the host's clock, logged.
    pub ns_per_tick: u64,
    /// The engine that recorded: `kvm` or `soft`.
    pub engine: String,
    /// How it counted ticks: `instructions`, `sync`, `step` or `pmu`.
    pub clock: String,
    /// The host that recorded.
    pub host: HostInfo,
    /// The guest.
    pub guest: GuestInfo,
    /// When recording began: seconds since 1970, UTC.
    pub created_unix_s: u64,
    /// The version of Reprise that recorded.
    pub reprise_version: String,
    /// How instructions were dealt with whose answers only a CPU knows; empty where the recording does
    /// not say. Stored behind the other fields, from schema 2 on.
    #[serde(skip)]
    pub precautions: Vec<Precaution>,
}

/// Why bytes are no header that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Written under another schema version.
    #[error(
        "its header has schema version {found}, and this Reprise reads up to {SCHEMA_VERSION}: use the Reprise that recorded it"
    )]
    Version {
        /// The version in the file.
        found: u16,
    },
    /// Not a header.
    #[error("its header does not decode: take another copy of the recording")]
    Malformed,
    /// More text than a header may hold.
    #[error("its header is longer than {MAX_FRAME_BYTES} bytes: give a shorter command line")]
    TooLarge,
    /// More or larger images than a recording may embed.
    #[error(
        "its images are too many or too large: at most {MAX_IMAGES} of at most {MAX_IMAGE_BYTES} bytes each are embedded"
    )]
    Images,
}

impl Precaution {
    /// [`Precaution::what`] of RDTSC in the guest's kernel.
    pub const KERNEL_TIME_STAMPS: &str = "RDTSC, kernel code";
    /// [`Precaution::what`] of RDTSC in its programs.
    pub const USER_TIME_STAMPS: &str = "RDTSC, user code";
    /// [`Precaution::what`] of a recording by conditional branches whose CPUID has a time-stamp counter.
    pub const SHOWN_TIME_STAMP_COUNTER: &str = "CPUID, time-stamp counter";
    /// [`Precaution::what`] of one that has a mark before each RDTSC of any code.
    pub const MARKED_TIME_STAMPS: &str = "RDTSC, marked";
}

impl Header {
    /// A header that tells of the ticks and leaves host, guest and precautions open: for a recording that a
    /// test makes, on 4 MiB of guest RAM.
    pub fn bare(engine: &str, clock: &str, tick_kind: TickKind) -> Self {
        let none = String::new;
        Self {
            machine: MachineInfo { ram_mib: 4, rtc_start_s: 0 },
            cpu_model: CpuModelInfo { name: none(), version: 1 },
            tick_kind,
            ns_per_tick: u64::from(tick_kind == TickKind::Instruction),
            engine: engine.to_owned(),
            clock: clock.to_owned(),
            host: HostInfo::default(),
            guest: GuestInfo { name: none(), command_line: none(), images: Vec::new() },
            created_unix_s: 0,
            reprise_version: none(),
            precautions: Vec::new(),
        }
    }

    /// Whether RDTSC was trapped in the guest's kernel and answered from the log, or from what follows from
    /// it.
    pub fn logs_time_stamps(&self) -> bool {
        self.closes(Precaution::KERNEL_TIME_STAMPS)
    }

    /// Whether each RDTSC has a mark where it is about to execute, by which hardware finds it, and leaves
    /// nothing behind but what it reads.
    pub fn marks_time_stamps(&self) -> bool {
        self.closes(Precaution::MARKED_TIME_STAMPS)
    }

    fn closes(&self, what: &str) -> bool {
        let closed = |it: &Precaution| it.what == what && it.treatment == Treatment::Closed;
        self.precautions.iter().any(closed)
    }

    /// Whether CPUID tells the guest of a time-stamp counter. Hardware that counts branches hides it, but for
    /// a guest that has seen it already.
    pub fn shows_time_stamp_counter(&self) -> bool {
        let shown = |it: &Precaution| it.what == Precaution::SHOWN_TIME_STAMP_COUNTER;
        self.tick_kind != TickKind::ConditionalBranch || self.precautions.iter().any(shown)
    }

    /// The header's bytes.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        self.check_images()?;
        let mut bytes = SCHEMA_ID.to_vec();
        bytes.extend_from_slice(&SCHEMA_VERSION.to_le_bytes());
        postcard::to_extend(self, bytes)
            .and_then(|bytes| postcard::to_extend(&self.precautions, bytes))
            .map_err(|_| HeaderError::Malformed)
    }

    /// From a header's bytes.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let bytes = bytes.strip_prefix(&SCHEMA_ID).ok_or(HeaderError::Malformed)?;
        let (version, bytes) = bytes.split_first_chunk().ok_or(HeaderError::Malformed)?;
        let found = u16::from_le_bytes(*version);
        if !(SCHEMA_VERSION_1..=SCHEMA_VERSION).contains(&found) {
            return Err(HeaderError::Version { found });
        }
        let (mut header, mut rest) =
            postcard::take_from_bytes::<Self>(bytes).map_err(|_| HeaderError::Malformed)?;
        if found > SCHEMA_VERSION_1 {
            (header.precautions, rest) =
                postcard::take_from_bytes(rest).map_err(|_| HeaderError::Malformed)?;
        }
        if !rest.is_empty() {
            return Err(HeaderError::Malformed);
        }
        header.check_images()?;
        Ok(header)
    }

    fn check_images(&self) -> Result<(), HeaderError> {
        let images = &self.guest.images;
        let all_fit = images.iter().all(|image| image.bytes <= MAX_IMAGE_BYTES);
        if images.len() > MAX_IMAGES || !all_fit { Err(HeaderError::Images) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            machine: MachineInfo { ram_mib: 64, rtc_start_s: 1 },
            cpu_model: CpuModelInfo { name: "model".to_owned(), version: 2 },
            tick_kind: TickKind::Exit,
            ns_per_tick: 0,
            engine: "kvm".to_owned(),
            clock: "sync".to_owned(),
            host: HostInfo::default(),
            guest: GuestInfo {
                name: "compute".to_owned(),
                command_line: String::new(),
                images: Vec::new(),
            },
            created_unix_s: 3,
            reprise_version: "0".to_owned(),
            precautions: vec![Precaution {
                what: "RDTSC".to_owned(),
                treatment: Treatment::Closed,
                how: "trapped".to_owned(),
            }],
        }
    }

    #[test]
    fn a_header_of_schema_1_reads_without_precautions() {
        let header = header();
        let bytes = header.encode().expect("it fits");
        assert_eq!(Header::decode(&bytes), Ok(header.clone()));
        // What schema 1 had: the same, without what stands behind the fields.
        let behind = postcard::to_allocvec(&header.precautions).expect("it encodes").len();
        let mut old = bytes[..bytes.len() - behind].to_vec();
        old[4] = 1;
        assert_eq!(Header::decode(&old), Ok(Header { precautions: Vec::new(), ..header }));
        // Nor may anything stand there under schema 1, or be missing under schema 2.
        old.push(0);
        assert_eq!(Header::decode(&old), Err(HeaderError::Malformed));
        assert_eq!(Header::decode(&bytes[..bytes.len() - behind]), Err(HeaderError::Malformed));
        let mut newer = bytes;
        newer[4] = 3;
        assert_eq!(Header::decode(&newer), Err(HeaderError::Version { found: 3 }));
    }
}
