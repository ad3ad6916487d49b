//! Where the guest `positions` takes its interrupts, as an expansion of its recording shows it: the same
//! positions on simulated hardware and on this host's. (Kicks that enter nothing are in no recording;
//! `tests/simulated_hardware/positions.rs` looks at those, on a vCPU that is watched.)

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;
use std::io::Write;

use reprise_expand::Window;
use reprise_trace::instructions::{Delivery, Event, Observer, Run, TraceError, TraceReader};

use crate::hand_over::expand;
use crate::hosts::{Hosts, on_each_host};
use crate::{Session, assert_equal, replay};

/// So many recordings at most are made until every position has been met.
const RECORDINGS: u64 = 12;
/// As many at least, each replayed.
const REPLAYED: u64 = 2;
/// The longest instruction of these positions, and the longest distance behind one, in bytes.
const REACH: u64 = 8;

/// A place that is hard to find again.
struct Position {
    what: &'static str,
    /// The next instruction begins with one of these; anything, if there are none.
    at: &'static [&'static [u8]],
    /// These bytes end so many before it.
    behind: Option<(&'static [u8], u64)>,
    /// The instruction has made some of its accesses.
    amid: bool,
}

const fn at(what: &'static str, at: &'static [&'static [u8]]) -> Position {
    Position { what, at, behind: None, amid: false }
}

const fn behind(what: &'static str, code: &'static [u8], distance: u64) -> Position {
    Position { what, at: &[], behind: Some((code, distance)), amid: false }
}

const STI: &[u8] = &[0xfb];
const MOV_TO_SS: &[u8] = &[0x8e, 0xd1];
const POPF: &[u8] = &[0x9d];
const HLT: &[u8] = &[0xf4];
const REP_MOVSB: &[u8] = &[0xf3, 0xa4];
const UD2: &[u8] = &[0x0f, 0x0b];
const SYSCALL: &[u8] = &[0x0f, 0x05];
const INT_4: &[u8] = &[0xcd, 0x04];
/// ADD of an absolute address to RBX.
const ADD_FROM_REMOVED_PAGE: &[u8] = &[0x48, 0x03, 0x1c, 0x25];
/// XOR of EAX with itself, behind what gives RAX the number of the round.
const FORGETS_ROUND: &[u8] = &[0x31, 0xc0];
const JUMP_TO_ITSELF: &[u8] = &[0xeb, 0xfe];
/// The instructions of the loop without a conditional branch.
const STRAIGHT: &[&[u8]] =
    &[&[0x48, 0xff, 0xc0], &[0x48, 0x8d, 0x5c], &[0x48, 0x31, 0xda], &[0x52, 0x5e], &[0x5e, 0xeb]];
/// ADD of what the changed instruction has read.
const CHANGED_TOO: &[u8] = &[0x48, 0x83, 0xc6];
/// INC of a 64-bit register, which the guest has behind what opens a shadow.
const INC_BYTES: u64 = 3;

/// By scenario.
const SCENARIOS: &[(&str, &[Position])] = &[
    ("rep", &[Position { amid: true, ..at("amid a REP", &[REP_MOVSB]) }]),
    ("straight", &[at("in a loop without conditional branches", STRAIGHT)]),
    ("itself", &[at("in a jump to itself", &[JUMP_TO_ITSELF])]),
    ("memory", &[at("where a register tells the round", &[FORGETS_ROUND])]),
    (
        "shadow",
        &[
            behind("where STI's shadow ends", STI, INC_BYTES),
            behind("where MOV SS's shadow ends", MOV_TO_SS, INC_BYTES),
        ],
    ),
    ("hlt", &[behind("behind HLT", HLT, 0)]),
    ("fault", &[at("on UD2", &[UD2]), at("on what page-faults", &[ADD_FROM_REMOVED_PAGE])]),
    (
        "window",
        &[
            behind("where STI opens the window", STI, INC_BYTES),
            behind("where POPF opens the window", POPF, 0),
        ],
    ),
    (
        "user",
        &[
            at("on SYSCALL", &[SYSCALL]),
            behind("right behind SYSRET", SYSCALL, 0),
            at("on INT", &[INT_4]),
            behind("right behind IRET", INT_4, 0),
        ],
    ),
    ("code", &[at("on an instruction that was changed", &[CHANGED_TOO])]),
];

/// An external interrupt: its return address, and whether the instruction there had begun.
type Taken = (u64, bool);

/// What a trace tells of interrupts.
#[derive(Default)]
struct Interrupts {
    code: BTreeMap<u64, u8>,
    taken: Vec<Taken>,
    has_begun: bool,
}

impl Observer for Interrupts {
    fn run(&mut self, run: &Run<'_>) -> Result<(), TraceError> {
        let block = run.block();
        self.code.extend((block.linear()..).zip(block.bytes().iter().copied()));
        self.has_begun = run.unretired_accesses() > 0;
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), TraceError> {
        if let Event::Delivery { kind: Delivery::Interrupt, address, .. } = event {
            self.taken.push((*address, self.has_begun));
        }
        Ok(())
    }
}

impl Interrupts {
    fn of(session: &Session) -> Self {
        let (report, trace) = expand(session, Window::default(), 1);
        assert_eq!(report.verified, Some(true), "{report:#?}");
        let mut interrupts = Self::default();
        let mut reader = TraceReader::open(Cursor::new(&trace)).expect("a trace");
        reader.drive(&mut interrupts).expect("it is whole");
        interrupts
    }

    /// What is executed from there on, as far as it ever was.
    fn bytes(&self, from: u64) -> Vec<u8> {
        let bytes = (from..from + REACH).map_while(|address| self.code.get(&address).copied());
        bytes.collect()
    }

    fn meets(&self, position: &Position) -> bool {
        self.taken.iter().any(|&(address, has_begun)| {
            let here = self.bytes(address);
            let follows = |(code, distance): (&[u8], u64)| {
                self.bytes(address - distance - code.len() as u64).starts_with(code)
            };
            (position.at.is_empty() || position.at.iter().any(|code| here.starts_with(code)))
                && position.behind.is_none_or(follows)
                && has_begun >= position.amid
        })
    }
}

/// Gives the positions that were not met.
fn check(
    scenario: &str,
    positions: &'static [Position],
    hosts: &impl Hosts,
) -> BTreeSet<&'static str> {
    let mut unmet: BTreeSet<&str> = positions.iter().map(|position| position.what).collect();
    for run in 0..RECORDINGS {
        if run >= REPLAYED && unmet.is_empty() {
            break;
        }
        let command_line = format!("do={scenario} hz=20000 count=40");
        let mut session = Session::new("positions", &command_line);
        session.typed = "two at one moment";
        let recorded = session.record(&hosts.host(run));
        assert!(recorded.interrupts >= 40, "{recorded:#?}");
        if run < REPLAYED {
            for hardware in [hosts.host(100 + run), hosts.late(200 + run)] {
                let replayed = replay(&session.path(), &hardware);
                let replayed = replayed.unwrap_or_else(|error| panic!("run {run}: {error:#}"));
                assert_equal(&recorded, &replayed.report, run);
            }
        }
        let interrupts = Interrupts::of(&session);
        assert_eq!(interrupts.taken.len() as u64, recorded.interrupts, "run {run}");
        let met = positions.iter().filter(|position| interrupts.meets(position));
        for position in met {
            unmet.remove(position.what);
        }
    }
    // To whoever runs the tests, since a test that passes shows nothing of what it prints.
    for what in unmet.iter().filter(|_| !hosts.meets_all()) {
        let line = format!("not met on this host in {RECORDINGS} recordings: {scenario}, {what}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    assert!(unmet.len() < positions.len(), "{scenario}: no position was met");
    unmet
}

on_each_host!(hard_positions_replay, hard_positions_of_user_code_and_windows_replay);

fn hard_positions_replay(hosts: &impl Hosts) {
    check_all(hosts, &SCENARIOS[..5]);
}

fn hard_positions_of_user_code_and_windows_replay(hosts: &impl Hosts) {
    check_all(hosts, &SCENARIOS[5..]);
}

fn check_all(hosts: &impl Hosts, scenarios: &'static [(&str, &[Position])]) {
    for (scenario, positions) in scenarios {
        eprintln!("{scenario}");
        let unmet = check(scenario, positions, hosts);
        assert!(unmet.is_empty() || !hosts.meets_all(), "{scenario}: not met: {unmet:?}");
    }
}
