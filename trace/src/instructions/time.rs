//! Where in a trace a guest time begins. Markers tell times; between two of them that differ by as many
//! nanoseconds as instructions each instruction lasted one, and elsewhere only the markers are known.

use super::TraceError;
use super::event::Event;
use super::run::{Observer, Position, Run};

/// The first instruction that is known to run at a time, or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimePlace {
    /// Its number.
    pub instruction: u64,
    /// Guest time there, in nanoseconds since the machine started.
    pub virtual_ns: u64,
    /// Instructions before it that may have run at that time as well: the trace does not tell. With 0 the
    /// place is exact.
    pub uncertain: u64,
}

/// Looks for a time in what it is shown.
#[derive(Clone, Debug)]
pub struct TimeSearch {
    asked_ns: u64,
    /// The first instruction that was shown.
    first: u64,
    position: Position,
    /// Instructions shown since the last marker.
    since_marker: u64,
    place: Option<TimePlace>,
}

impl TimeSearch {
    /// For so many nanoseconds of guest time.
    pub fn new(asked_ns: u64) -> Self {
        let position = Position::default();
        Self { asked_ns, first: 0, position, since_marker: 0, place: None }
    }

    /// Where it is, if that has been seen.
    pub fn place(&self) -> Option<TimePlace> {
        self.place
    }

    /// The last time that a marker told, in nanoseconds.
    pub fn last_ns(&self) -> u64 {
        self.position.marker.virtual_ns
    }

    /// A marker stands here that says this. The one before it said less than is asked for.
    fn meet(&self, virtual_ns: u64) -> TimePlace {
        let Position { instruction, marker_instruction, marker, .. } = self.position;
        let lasted_ns = virtual_ns.saturating_sub(marker.virtual_ns);
        if instruction.saturating_sub(marker_instruction) != lasted_ns {
            return TimePlace { instruction, virtual_ns, uncertain: self.since_marker };
        }
        let behind = self.asked_ns.saturating_sub(marker.virtual_ns);
        let instruction = marker_instruction.saturating_add(behind).max(self.first);
        let virtual_ns = marker.virtual_ns.saturating_add(instruction - marker_instruction);
        TimePlace { instruction, virtual_ns, uncertain: 0 }
    }
}

impl Observer for TimeSearch {
    fn begin(&mut self, position: &Position) -> Result<(), TraceError> {
        (self.position, self.first) = (*position, position.instruction);
        if position.marker.virtual_ns >= self.asked_ns {
            let (instruction, virtual_ns) = (position.instruction, position.marker.virtual_ns);
            self.place = Some(TimePlace { instruction, virtual_ns, uncertain: 0 });
        }
        Ok(())
    }

    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        self.position.pass_run(run);
        self.since_marker += run.retired() as u64;
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        if let Event::Marker(marker) = event {
            if self.place.is_none() && marker.virtual_ns >= self.asked_ns {
                self.place = Some(self.meet(marker.virtual_ns));
            }
            self.since_marker = 0;
        }
        self.position.pass_event(event);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instructions::event::Marker;

    /// Shows a search markers, each behind so many instructions of which some are not in the trace.
    fn search(asked_ns: u64, told: &[(u64, u64, u64)]) -> Option<TimePlace> {
        let mut search = TimeSearch::new(asked_ns);
        let marker = Marker { tick: 100, virtual_ns: 1_000 };
        let begin = Position { instruction: 150, marker, marker_instruction: 100, cr3: 0 };
        search.begin(&begin).expect("takes it");
        for (ran, left_out, virtual_ns) in told {
            // As runs do.
            search.position.instruction += ran;
            search.since_marker += ran;
            let skipped = Event::Skipped { instructions: *left_out, address: None };
            search.event(&skipped).expect("takes it");
            let marker = Marker { tick: 0, virtual_ns: *virtual_ns };
            search.event(&Event::Marker(marker)).expect("takes it");
        }
        search.place()
    }

    fn place(instruction: u64, virtual_ns: u64, uncertain: u64) -> Option<TimePlace> {
        Some(TimePlace { instruction, virtual_ns, uncertain })
    }

    #[test]
    fn between_markers_an_instruction_lasts_a_nanosecond_if_they_say_so() {
        let follows = [(50, 0, 1_100), (10, 20, 1_130)];
        assert_eq!(search(900, &follows), place(150, 1_000, 0), "before the trace");
        assert_eq!(search(1_020, &follows), place(150, 1_050, 0), "before its first instruction");
        assert_eq!(search(1_051, &follows), place(151, 1_051, 0));
        assert_eq!(search(1_100, &follows), place(200, 1_100, 0));
        assert_eq!(search(1_125, &follows), place(225, 1_125, 0), "a gap takes time as well");
        assert_eq!(search(1_131, &follows), None, "behind the last marker nobody knows");
    }

    #[test]
    fn a_jump_of_time_is_exact_where_it_is_marked_on_both_sides() {
        let marked = [(50, 0, 1_100), (0, 0, 9_000), (10, 0, 9_010)];
        assert_eq!(search(1_101, &marked), place(200, 9_000, 0));
        assert_eq!(search(9_003, &marked), place(203, 9_003, 0));
        let unmarked = [(50, 0, 9_000)];
        assert_eq!(search(1_051, &unmarked), place(200, 9_000, 50), "it was somewhere before");
    }
}
