//! The first place where two recordings part.

use std::fmt::{self, Debug, Display, Formatter};

use crate::event::{Event, Record};
use crate::header::{CpuModelInfo, GuestInfo, Header, HostInfo, MachineInfo, Precaution};
use crate::log::{LogError, LogReader};

/// What a person sees where a recording has no more records.
const NO_RECORD: &str = "its log ends";

/// A place where two logs differ: everything before it is equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The record's number in both logs, from 0.
    pub record: u64,
    /// The first recording's record; `None` if its log ends here.
    pub a: Option<Record>,
    /// The second recording's record; `None` if its log ends here.
    pub b: Option<Record>,
}

impl Difference {
    /// The parts of the record that differ; empty where one log ends.
    pub fn parts(&self) -> Vec<&'static str> {
        let (Some(a), Some(b)) = (&self.a, &self.b) else {
            return Vec::new();
        };
        let same_kind = std::mem::discriminant(&a.event) == std::mem::discriminant(&b.event);
        let same_final_digest = match (&a.event, &b.event) {
            (Event::End { final_digest: a, .. }, Event::End { final_digest: b, .. }) => a == b,
            _ => true,
        };
        let parts = [
            ("tick", a.moment.tick == b.moment.tick),
            ("rip", a.moment.rip == b.moment.rip),
            ("rcx", a.moment.rcx == b.moment.rcx),
            ("CPU state", a.cpu_digest == b.cpu_digest),
            ("kind of event", same_kind),
            ("event", !same_kind || a.event == b.event),
            ("final digest", same_final_digest),
        ];
        parts.iter().filter(|(_, same)| !same).map(|(part, _)| *part).collect()
    }
}

impl Display for Difference {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let show = |record: &Option<Record>| {
            record.as_ref().map_or_else(|| NO_RECORD.to_owned(), ToString::to_string)
        };
        write!(f, "record {}: first: {}; second: {}", self.record, show(&self.a), show(&self.b))?;
        match self.parts()[..] {
            [] => Ok(()),
            ref parts => write!(f, " (they differ in: {})", parts.join(", ")),
        }
    }
}

/// Why two logs could not be compared to a difference or to their ends: up to here they are equal.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// The first recording.
    #[error("equal as far as the first recording can be read: {0}")]
    First(LogError),
    /// The second recording.
    #[error("equal as far as the second recording can be read: {0}")]
    Second(LogError),
}

/// Finds the first record that is not the same in both logs; `None` if they are equal to their ends.
///
/// # Errors
/// If either log cannot be read any further before a difference is found.
pub fn first_difference(
    a: &mut LogReader,
    b: &mut LogReader,
) -> Result<Option<Difference>, DiffError> {
    for record in 0.. {
        let in_a = a.peek().map_err(DiffError::First)?;
        let in_b = b.peek().map_err(DiffError::Second)?;
        if in_a != in_b {
            return Ok(Some(Difference { record, a: in_a.cloned(), b: in_b.cloned() }));
        }
        if in_a.is_none() {
            return Ok(None);
        }
        a.next_record().map_err(DiffError::First)?;
        b.next_record().map_err(DiffError::Second)?;
    }
    Ok(None)
}

/// A field in which two headers differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderDifference {
    /// The field's path, as in `guest.command_line`.
    pub field: &'static str,
    /// What the first recording has.
    pub a: String,
    /// What the second recording has.
    pub b: String,
}

/// The fields in which two headers differ, in the header's order.
pub fn header_differences(a: &Header, b: &Header) -> Vec<HeaderDifference> {
    // Named one by one, so that a new field cannot be forgotten here.
    let Header {
        machine,
        cpu_model,
        tick_kind,
        ns_per_tick,
        engine,
        clock,
        host,
        guest,
        created_unix_s,
        reprise_version,
        precautions,
    } = a;
    let mut list = HeaderDifferences::default();
    let MachineInfo { ram_mib, rtc_start_s } = machine;
    list.compare("machine.ram_mib", ram_mib, &b.machine.ram_mib);
    list.compare("machine.rtc_start_s", rtc_start_s, &b.machine.rtc_start_s);
    let CpuModelInfo { name, version } = cpu_model;
    list.compare("cpu_model.name", name, &b.cpu_model.name);
    list.compare("cpu_model.version", version, &b.cpu_model.version);
    list.compare("tick_kind", tick_kind, &b.tick_kind);
    list.compare("ns_per_tick", ns_per_tick, &b.ns_per_tick);
    list.compare("engine", engine, &b.engine);
    list.compare("clock", clock, &b.clock);
    list.compare_hosts(host, &b.host);
    list.compare("guest.name", &guest.name, &b.guest.name);
    list.compare("guest.command_line", &guest.command_line, &b.guest.command_line);
    list.compare("guest.images", &image_list(guest), &image_list(&b.guest));
    list.compare("created_unix_s", created_unix_s, &b.created_unix_s);
    list.compare("reprise_version", reprise_version, &b.reprise_version);
    list.compare("precautions", &rows(precautions), &rows(&b.precautions));
    list.0
}

/// Precautions in a form that a person can compare: those that hold decide what is trapped and what CPUID
/// says, as much as those that do not.
fn rows(precautions: &[Precaution]) -> Vec<String> {
    let row =
        |Precaution { what, treatment, how }: &Precaution| format!("{treatment:?}: {what}: {how}");
    precautions.iter().map(row).collect()
}

/// Images in a form that a person can compare.
fn image_list(guest: &GuestInfo) -> Vec<String> {
    let images = guest.images.iter();
    images
        .map(|image| {
            let digest = blake3::Hash::from_bytes(image.blake3).to_hex();
            format!("{:?} {} {} bytes {digest}", image.role, image.name, image.bytes)
        })
        .collect()
}

#[derive(Default)]
struct HeaderDifferences(Vec<HeaderDifference>);

impl HeaderDifferences {
    fn compare_hosts(&mut self, a: &HostInfo, b: &HostInfo) {
        let HostInfo { cpu_vendor, cpu_family, cpu_model, cpu_stepping, cpu_brand, kernel_release } =
            a;
        self.compare("host.cpu_vendor", cpu_vendor, &b.cpu_vendor);
        self.compare("host.cpu_family", cpu_family, &b.cpu_family);
        self.compare("host.cpu_model", cpu_model, &b.cpu_model);
        self.compare("host.cpu_stepping", cpu_stepping, &b.cpu_stepping);
        self.compare("host.cpu_brand", cpu_brand, &b.cpu_brand);
        self.compare("host.kernel_release", kernel_release, &b.kernel_release);
    }

    fn compare<T: PartialEq + Debug>(&mut self, field: &'static str, a: &T, b: &T) {
        if a != b {
            self.0.push(HeaderDifference { field, a: format!("{a:?}"), b: format!("{b:?}") });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{EffectDigest, Ending};
    use crate::header::Treatment;
    use crate::moment::{Moment, TickKind};

    fn record(tick: u64, event: Event) -> Record {
        Record { moment: Moment { tick, rip: 0x1000, rcx: 0 }, cpu_digest: 7, event }
    }

    fn end(final_byte: u8) -> Record {
        let effects = EffectDigest { console_bytes: 3, console_digest: [1; 32] };
        let final_digest = Some([final_byte; 32]);
        record(9, Event::End { ending: Ending::PowerOff, effects, final_digest })
    }

    fn base() -> Vec<Record> {
        vec![record(1, Event::Time(5)), record(2, Event::Console(b"ls".to_vec())), end(1)]
    }

    fn difference(a: Vec<Record>, b: Vec<Record>) -> Option<Difference> {
        let (mut a, mut b) = (LogReader::from_records(a), LogReader::from_records(b));
        first_difference(&mut a, &mut b).expect("both logs are sound")
    }

    #[test]
    fn equal_logs_have_no_difference() {
        assert_eq!(difference(base(), base()), None);
        assert_eq!(difference(Vec::new(), Vec::new()), None);
    }

    #[test]
    fn the_first_record_that_differs_is_named_with_what_differs() {
        let cases: [(usize, Record, &[&str]); 5] = [
            (0, record(1, Event::Time(6)), &["event"]),
            (0, record(2, Event::Time(5)), &["tick"]),
            (1, record(2, Event::ClockRead(5)), &["kind of event"]),
            (1, Record { cpu_digest: 8, ..base()[1].clone() }, &["CPU state"]),
            (2, end(2), &["event", "final digest"]),
        ];
        for (position, other, parts) in cases {
            let mut b = base();
            b[position] = other.clone();
            let found = difference(base(), b).expect("they differ");
            assert_eq!(found.record, position as u64);
            assert_eq!(found.a.as_ref(), Some(&base()[position]));
            assert_eq!(found.b.as_ref(), Some(&other));
            assert_eq!(found.parts(), parts);
            assert!(!found.to_string().contains('\n'));
        }
    }

    #[test]
    fn a_log_that_ends_early_differs_there() {
        let found = difference(base(), base()[..2].to_vec()).expect("they differ");
        assert_eq!((found.record, &found.a, &found.b), (2, &Some(end(1)), &None));
        assert!(found.to_string().contains(NO_RECORD), "{found}");
    }

    #[test]
    fn what_decides_about_traps_differs_whatever_is_open() {
        let closed = |how: &str| Precaution {
            what: Precaution::KERNEL_TIME_STAMPS.to_owned(),
            treatment: Treatment::Closed,
            how: how.to_owned(),
        };
        let bare = Header::bare("kvm", "sync", TickKind::Exit);
        let header = |precautions| Header { precautions, ..bare.clone() };
        let one = header(vec![closed("trapped at 2 places")]);
        assert_eq!(header_differences(&one, &one), []);
        for other in [Vec::new(), vec![closed("none in the kernel's text")]] {
            let found = header_differences(&one, &header(other));
            assert_eq!(found.iter().map(|it| it.field).collect::<Vec<_>>(), ["precautions"]);
        }
    }
}
