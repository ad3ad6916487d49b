//! A recording's stretches: which engine executed what part of it.

use crate::event::{Assists, Event, HandOver};
use crate::header::{Header, Precaution};
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
    /// What the run found open, as the recording's end says.
    pub left_open: Vec<Precaution>,
    /// What its final digest sets aside where hardware ran the guest.
    pub final_digest: FinalDigest,
}

/// How a final digest counts accessed bits of page tables where hardware ran the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinalDigest {
    /// As they are: version 1 of the format, but for conditional branches.
    CountsAccessedBits,
    /// As set in the tables that CR3 leads to: version 2, and version 1 otherwise.
    SetsAsideCurrentTables,
    /// As set in those of all processes.
    SetsAsideAllTables,
}

impl FinalDigest {
    fn of_version(format_version: u32, ticks: TickKind) -> Self {
        match format_version {
            1 if ticks != TickKind::ConditionalBranch => Self::CountsAccessedBits,
            1 | 2 => Self::SetsAsideCurrentTables,
            _ => Self::SetsAsideAllTables,
        }
    }
}

impl Course {
    /// Of a recording of this version of the format: reads `log`, from its beginning, as far as it can be
    /// read. Version 1 has no hand-overs, and is not read.
    pub fn of(format_version: u32, header: &Header, mut log: LogReader) -> Self {
        let first = Stretch { from: None, records_before: 0, on: header.first_stretch() };
        let final_digest = FinalDigest::of_version(format_version, header.tick_kind);
        let mut course = Self {
            stretches: vec![first],
            assists: Assists::new(),
            left_open: Vec::new(),
            final_digest,
        };
        if format_version == 1 {
            return course;
        }
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
                Event::LeftOpen(left) => course.left_open = left,
                _ => {}
            }
        }
        course
    }

    /// How instructions were dealt with whose answers only a CPU knows: as the header says, but for what the
    /// run found open.
    pub fn precautions(&self, header: &Header) -> Vec<Precaution> {
        let mut all = header.precautions.clone();
        for left in &self.left_open {
            match all.iter_mut().find(|precaution| precaution.what == left.what) {
                Some(precaution) => precaution.clone_from(left),
                None => all.push(left.clone()),
            }
        }
        all
    }

    /// Whether ticks are the run's instructions where a machine has so many records behind it: in this stretch
    /// and all before it.
    pub fn ticks_are_instructions(&self, records: u64) -> bool {
        let mut before = self.stretches.iter().filter(|stretch| stretch.records_before <= records);
        before.all(|stretch| stretch.on.tick_kind == TickKind::Instruction)
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
