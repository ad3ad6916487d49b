//! Recordings of the clock `pmu`, replayed and expanded on the software CPU, which counts every instruction.

use reprise::session::choice::EngineArg;
use reprise::session::replay::{ReplayOptions, open_replayable, replay_on};
use reprise_expand::Window;

use crate::Session;
use crate::hand_over::expand;
use crate::hosts::{Hosts, on_each_host};
use reprise_tests::hardware::Refusing;

/// How often each guest is recorded.
const TIMES: u64 = 10;
/// How often `compute` is, which takes long in simulation.
const TIMES_COMPUTE: u64 = 2;

on_each_host!(
    ticks_is_expanded_ten_times_of_ten,
    echo_is_expanded_ten_times_of_ten,
    compute_is_expanded,
);

/// Where it was recorded is not asked for anything.
fn expands(session: &Session, hosts: &impl Hosts, times: u64) {
    for run in 0..times {
        let recorded = session.record(&hosts.host(run));
        let replayable = open_replayable(&session.path()).expect("it is a recording");
        let options = ReplayOptions { engine: EngineArg::Soft, ..ReplayOptions::default() };
        let replayed = replay_on(&Refusing, &replayable, options).expect("it replays").report;
        assert_eq!(replayed.verified, Some(true), "run {run}: {replayed:#?}");
        assert_eq!(replayed.verification, Some("across-engines"));
        assert!(recorded.final_digest.is_some(), "the end is an exact moment");
        assert_eq!(replayed.final_digest, recorded.final_digest, "run {run}");
        assert_eq!(replayed.console_digest, recorded.console_digest, "run {run}");
        assert_eq!((replayed.ticks, replayed.events), (recorded.ticks, recorded.events));
        assert_eq!(replayed.interrupts, recorded.interrupts, "run {run}");
        let (expanded, trace) = expand(session, Window::default(), 1);
        assert_eq!(expanded.verified, Some(true), "run {run}: {expanded:#?}");
        assert_eq!(expanded.final_digest, recorded.final_digest, "run {run}");
        assert_eq!(Some(expanded.instructions), replayed.instructions, "run {run}");
        assert!(expanded.instructions > recorded.ticks && !trace.is_empty(), "{expanded:#?}");
        std::fs::remove_file(session.path()).expect("for the next");
    }
}

fn ticks_is_expanded_ten_times_of_ten(hosts: &impl Hosts) {
    expands(&Session::new("ticks", "hz=2000 count=20"), hosts, TIMES);
}

fn echo_is_expanded_ten_times_of_ten(hosts: &impl Hosts) {
    let mut session = Session::new("echo", "");
    session.typed = "one line\rquit\r";
    expands(&session, hosts, TIMES);
}

/// User code reads the time-stamp counter, and what it read is in the trace.
fn compute_is_expanded(hosts: &impl Hosts) {
    if hosts.traps() {
        let mut session = Session::new("compute", "scale=0 timing=1");
        session.memory_mib = 32;
        expands(&session, hosts, TIMES_COMPUTE);
    }
}
