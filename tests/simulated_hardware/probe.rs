//! What the start-up probe makes of counters that are right and of such that are not.

use reprise_branch_clock::probe::{Wrong, what_is_wrong};
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu, Skid};

/// The probe's complaint about this hardware, if it has one.
fn complaint(disturbance: Disturbance, skid: u64, bounded: bool) -> Option<Wrong> {
    let ram = GuestRam::new(4).expect("the host has 4 MiB");
    let mut vcpu = SimulatedVcpu::new(ram, disturbance).expect("the host has memory");
    let wrong = what_is_wrong(&mut vcpu, skid, bounded);
    wrong.expect("the simulation does not fail")
}

#[test]
fn right_counters_pass() {
    assert_eq!(complaint(Disturbance::none(), 1, true), None);
    for seed in 0..5 {
        assert_eq!(complaint(Disturbance::intel(seed), 100, true), None, "seed {seed}");
        assert_eq!(complaint(Disturbance::zen(seed), 10_000, false), None, "seed {seed}");
    }
}

#[test]
fn a_counter_that_overcounts_is_refused() {
    for seed in 0..5 {
        let hardware = Disturbance { overcount_every: Some(20_000), ..Disturbance::zen(seed) };
        let wrong = complaint(hardware, 10_000, false).expect("it is noticed");
        assert!(wrong.counts_too_much && !wrong.text.contains('\n'), "seed {seed}: {wrong:?}");
    }
}

#[test]
fn a_counter_that_is_later_than_it_should_be_is_refused() {
    for seed in 0..5 {
        let hardware = Disturbance { skid: Skid::UpTo(1_000), ..Disturbance::intel(seed) };
        let wrong = complaint(hardware, 100, true).expect("it is noticed");
        let told = wrong.text.contains("late") && !wrong.counts_too_much;
        assert!(told, "seed {seed}: {wrong:?}");
    }
}

#[test]
fn overflows_that_do_not_come_are_noticed_where_they_may_be_late() {
    for seed in 0..5 {
        let skid = Skid::Unbounded { usual: 1_000_000, seldom: 2 };
        // Nothing else stops the guest.
        let zen = Disturbance { kick_every: None, signal_every: None, ..Disturbance::zen(seed) };
        let hardware = Disturbance { skid, ..zen };
        let wrong = complaint(hardware, 10_000, false).expect("it is noticed");
        assert!(wrong.text.contains("did not interrupt"), "seed {seed}: {wrong:?}");
    }
}
