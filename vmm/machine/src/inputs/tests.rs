//! The boundary by itself: what is logged in a sleep, and what a replay makes of it.

use reprise_trace::cpu_state::CpuState;
use reprise_trace::event::{Event, Record};
use reprise_trace::log::{LogReader, LogWriter, MemorySink};

use super::*;
use crate::host::{Host, Wake};
use crate::ram::{GuestRam, MIN_RAM_MIB};
use crate::standing::Standing;

/// A host whose every answer is set by the test; a wait takes what it is told to take.
#[derive(Default)]
struct SetHost {
    now_ns: u64,
    typed: Vec<u8>,
    input_may_come: bool,
    /// How long the next waits last, and whether something comes then.
    waits: Vec<(u64, Wake)>,
    asked_timeouts_ns: Vec<Option<u64>>,
    flush_due: bool,
}

impl Host for SetHost {
    fn now_ns(&mut self) -> u64 {
        self.now_ns
    }
    fn take_console_input(&mut self, room: usize) -> Vec<u8> {
        let count = room.min(self.typed.len());
        self.typed.drain(..count).collect()
    }
    fn input_may_come(&mut self) -> bool {
        self.input_may_come
    }
    fn wait(&mut self, timeout_ns: Option<u64>) -> Wake {
        self.asked_timeouts_ns.push(timeout_ns);
        let (lasts_ns, wake) = self.waits.remove(0);
        self.now_ns += lasts_ns;
        wake
    }
    fn console_output(&mut self, _bytes: &[u8]) {}
    fn stop_requested(&mut self) -> Option<Ending> {
        None
    }
    fn flush_due(&mut self) -> bool {
        std::mem::take(&mut self.flush_due)
    }
    fn progress(&mut self, _tick: u64, _virtual_ns: u64) {}
}

/// A guest that sleeps at tick 500.
struct Sleep {
    engine: Standing,
    effects: Effects,
    now_ns: u64,
    deadline_ns: Option<u64>,
}

impl Sleep {
    fn new(now_ns: u64, deadline_ns: Option<u64>) -> Self {
        let ram = GuestRam::new(MIN_RAM_MIB).expect("the host has memory");
        let engine = Standing { tick: 500, state: CpuState::default(), ram };
        Self { engine, effects: Effects::default(), now_ns, deadline_ns }
    }

    fn here(&mut self) -> Boundary<'_, Standing> {
        Boundary {
            tick: self.engine.tick,
            engine: &mut self.engine,
            effects: &self.effects,
            now: VirtualTime::from_ns(self.now_ns),
            deadline: self.deadline_ns.map(VirtualTime::from_ns),
            console_room: 16,
            halted: true,
            entered: false,
            time: TimeSource::Ticks { ns_per_tick: 1 },
        }
    }

    /// What arrives, as events.
    fn arrivals(&mut self, inputs: &mut impl Inputs) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(arrival) = inputs.arrival(&mut self.here()).unwrap() {
            events.push(match arrival {
                Arrival::Time(ns) => {
                    self.now_ns = *ns.get();
                    Event::Time(ns.into_inner())
                }
                Arrival::Console(bytes) => Event::Console(bytes.into_inner()),
                Arrival::HandOver(_) => unreachable!("nobody planned one"),
                Arrival::Stop { ending, .. } => {
                    let effects = self.effects.digest();
                    events.push(Event::End { ending, effects, final_digest: None });
                    break;
                }
            });
        }
        events
    }

    fn idle(&mut self, inputs: &mut impl Inputs) -> Idle {
        inputs.idle(&mut self.here()).unwrap()
    }

    /// Moves time to the deadline; the next is `period_ns` later.
    fn jump(&mut self, inputs: &mut impl Inputs, period_ns: u64) {
        let deadline_ns = self.deadline_ns.expect("there is a deadline");
        assert_eq!(self.idle(inputs), Idle::Jump(VirtualTime::from_ns(deadline_ns)));
        self.now_ns = deadline_ns;
        self.deadline_ns = Some(deadline_ns + period_ns);
    }
}

fn recording(host: SetHost) -> Recording<SetHost, MemorySink> {
    Recording::new(host, LogWriter::new(MemorySink::default()))
}

fn replaying(events: &[Event]) -> Replaying {
    let stamp = Sleep::new(0, None).here().stamp().unwrap();
    let record = |event: &Event| Record {
        moment: stamp.moment,
        cpu_digest: stamp.cpu_digest,
        event: event.clone(),
    };
    let mut records: Vec<_> = events.iter().map(record).collect();
    // Something later, so that the log is not used up.
    let mut later = record(&Event::Time(1 << 40));
    later.moment.tick += 1;
    records.push(later);
    Replaying::new(LogReader::from_records(records))
}

#[test]
fn a_sleep_to_which_nobody_comes_jumps_and_logs_nothing() {
    let mut inputs = recording(SetHost { now_ns: 9_000, ..SetHost::default() });
    let mut sleep = Sleep::new(100, Some(1_100));
    for _ in 0..5 {
        assert_eq!(sleep.arrivals(&mut inputs), []);
        sleep.jump(&mut inputs, 1_000);
    }
    assert_eq!(inputs.events(), 0);
    assert_eq!(inputs.host().asked_timeouts_ns, []);
}

#[test]
fn somebody_who_may_type_is_waited_for_in_real_time() {
    let waits = vec![(1_003, Wake::Timeout), (400, Wake::Look)];
    let mut inputs =
        recording(SetHost { now_ns: 9_000, input_may_come: true, waits, ..SetHost::default() });
    let mut sleep = Sleep::new(100, Some(1_100));
    assert_eq!(sleep.arrivals(&mut inputs), []);
    sleep.jump(&mut inputs, 1_000);
    assert_eq!(sleep.arrivals(&mut inputs), []);
    // The next wait is shorter by what the last one took too long.
    assert_eq!(sleep.idle(&mut inputs), Idle::Look);
    assert_eq!(inputs.host().asked_timeouts_ns, [Some(1_000), Some(997)]);
    inputs.host.typed = b"ls\n".to_vec();
    let events = [Event::Time(100 + 1_403), Event::Console(b"ls\n".to_vec())];
    assert_eq!(sleep.arrivals(&mut inputs), events);
    // A replay moves to the deadline first, since the time behind it does not fit before.
    let mut replay = replaying(&events);
    let mut sleep = Sleep::new(100, Some(1_100));
    assert_eq!(sleep.arrivals(&mut replay), []);
    sleep.jump(&mut replay, 1_000);
    assert_eq!(sleep.arrivals(&mut replay), events);
}

#[test]
fn what_comes_after_the_deadline_comes_at_the_deadline() {
    let waits = vec![(5_000, Wake::Look)];
    let mut inputs = recording(SetHost { input_may_come: true, waits, ..SetHost::default() });
    let mut sleep = Sleep::new(100, Some(1_100));
    assert_eq!(sleep.arrivals(&mut inputs), []);
    assert_eq!(sleep.idle(&mut inputs), Idle::Look);
    inputs.host.typed = b"a".to_vec();
    let events = [Event::Time(1_100), Event::Console(b"a".to_vec())];
    assert_eq!(sleep.arrivals(&mut inputs), events);
}

#[test]
fn whatever_follows_an_unlogged_jump_says_the_time() {
    // Input that is there at once, without any wait; and a mark.
    for typed in [b"a".to_vec(), Vec::new()] {
        let mut inputs = recording(SetHost::default());
        let mut sleep = Sleep::new(100, Some(1_100));
        assert_eq!(sleep.arrivals(&mut inputs), []);
        sleep.jump(&mut inputs, 1_000);
        let mark = typed.is_empty();
        inputs.host.typed = typed;
        inputs.host.flush_due = mark;
        assert_eq!(sleep.arrivals(&mut inputs).first(), Some(&Event::Time(1_100)));
        assert_eq!(inputs.events(), 2, "time, and what it is there for");
    }
}

#[test]
fn a_sleep_that_nothing_can_end_ends_the_run_and_says_when() {
    let mut inputs = recording(SetHost::default());
    let mut sleep = Sleep::new(100, Some(1_100));
    assert_eq!(sleep.arrivals(&mut inputs), []);
    sleep.jump(&mut inputs, 1_000);
    sleep.deadline_ns = None;
    assert_eq!(sleep.arrivals(&mut inputs), []);
    assert_eq!(sleep.idle(&mut inputs), Idle::Look);
    let events = sleep.arrivals(&mut inputs);
    assert_eq!(events[0], Event::Time(1_100));
    assert!(matches!(&events[1], Event::End { ending: Ending::IdleForever, .. }));
    assert_eq!(events.len(), 2);
    // The replay ends there too, not before the jump.
    let mut replay = replaying(&events);
    let mut sleep = Sleep::new(100, Some(900));
    assert_eq!(sleep.arrivals(&mut replay), []);
    sleep.jump(&mut replay, 1_000);
    assert_eq!(sleep.arrivals(&mut replay), events);
}

#[test]
fn a_masked_timer_is_no_reason_to_sleep_without_end() {
    let mut inputs = recording(SetHost::default());
    let mut sleep = Sleep::new(0, Some(10));
    let (mut jumps, mut times) = (0_u64, 0);
    loop {
        for event in sleep.arrivals(&mut inputs) {
            match event {
                Event::Time(_) => times += 1,
                Event::End { ending: Ending::IdleForever, .. } => {
                    assert_eq!((jumps, times), (1 << 24, 16));
                    return;
                }
                event => panic!("{event:?}"),
            }
        }
        match sleep.idle(&mut inputs) {
            Idle::Look => {}
            Idle::Jump(deadline) => {
                jumps += 1;
                (sleep.now_ns, sleep.deadline_ns) = (deadline.ns, Some(deadline.ns + 10));
            }
        }
    }
}

#[test]
fn a_replay_does_not_jump_without_end() {
    let mut replay = replaying(&[]);
    let mut sleep = Sleep::new(0, Some(10));
    for _ in 0..MAX_UNLOGGED_JUMPS {
        sleep.jump(&mut replay, 10);
    }
    let stop = replay.idle(&mut sleep.here()).unwrap_err();
    assert!(matches!(stop, Stop::Diverged(_)));
}

#[test]
fn records_go_out_before_a_long_sleep() {
    let waits = vec![(500_000_000, Wake::Timeout), (1, Wake::Look)];
    let mut inputs = recording(SetHost { input_may_come: true, waits, ..SetHost::default() });
    let mut sleep = Sleep::new(100, None);
    assert_eq!(sleep.arrivals(&mut inputs), []);
    assert_eq!(sleep.idle(&mut inputs), Idle::Look);
    assert_eq!(sleep.arrivals(&mut inputs), [], "a mark is no arrival");
    assert_eq!(inputs.events(), 1);
    assert_eq!(inputs.confirmed_until().map(|moment| moment.tick), Some(500));
    assert_eq!(sleep.idle(&mut inputs), Idle::Look);
    assert_eq!(inputs.host().asked_timeouts_ns, [Some(500_000_000), None]);
}
