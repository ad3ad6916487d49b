//! A recording's stretches: which engine executed what part of it.

use crate::event::{Assists, Event, HandOver};
use crate::header::Header;
use crate::log::LogReader;
use crate::moment::{Moment, TickKind};

/// A part of a recording that one engine executed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Where it begins; `None` for the first, which begins with the run.
    pub from: Option<Moment>,
    /// Records of the log before it; the hand-over is one of them.
    pub records_before: u64,
    /// The engine, and how it counts.
    pub on: HandOver,
}

/// What only a pass over the whole log tells of a recording.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Course {
    /// In their order; never empty.
    pub stretches: Vec<Stretch>,
    /// As the recording's end says.
    pub assists: Assists,
    /// Its final digest counts accessed bits as they are, whatever engine recorded: so did version 1 of
    /// the format, but for conditional branches.
    pub counts_accessed_bits: bool,
}

impl Course {
    /// Of a recording of version 1 of the format, which has no hand-overs.
    pub fn of_version_1(header: &Header) -> Self {
        let counts_accessed_bits = header.tick_kind != TickKind::ConditionalBranch;
        Self { counts_accessed_bits, ..Self::beginning(header) }
    }

    fn beginning(header: &Header) -> Self {
        let first = Stretch { from: None, records_before: 0, on: header.first_stretch() };
        Self { stretches: vec![first], assists: Assists::new(), counts_accessed_bits: false }
    }

    /// Reads `log`, from its beginning, as far as it can be read.
    pub fn of(header: &Header, mut log: LogReader) -> Self {
        let mut course = Self::beginning(header);
        let mut records_before = 0;
        while let Ok(Some(record)) = log.next_record() {
            let record = record.into_inner();
            records_before += 1;
            match record.event {
                Event::HandOver(on) => {
                    let from = Some(record.moment);
                    course.stretches.push(Stretch { from, records_before, on });
                }
                Event::Assists(assists) => course.assists = assists,
                _ => {}
            }
        }
        course
    }

    /// The stretch that a machine is in that has so many records behind it.
    pub fn at(&self, records: u64) -> &Stretch {
        &self.ahead(records)[0]
    }

    /// That stretch, and those that follow it.
    pub fn ahead(&self, records: u64) -> &[Stretch] {
        let behind = self.stretches.partition_point(|stretch| stretch.records_before <= records);
        &self.stretches[behind.saturating_sub(1)..]
    }
}

impl Header {
    /// The header that a recording of the stretch alone would have.
    #[must_use]
    pub fn of_stretch(&self, on: &HandOver) -> Self {
        Self {
            engine: on.engine.clone(),
            clock: on.clock.clone(),
            tick_kind: on.tick_kind,
            ns_per_tick: on.ns_per_tick,
            ..self.clone()
        }
    }

    /// What the recording begins on.
    pub fn first_stretch(&self) -> HandOver {
        HandOver {
            engine: self.engine.clone(),
            clock: self.clock.clone(),
            tick_kind: self.tick_kind,
            ns_per_tick: self.ns_per_tick,
        }
    }
}
