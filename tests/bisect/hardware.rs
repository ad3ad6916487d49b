//! Recordings of the clock `pmu`, made on simulated hardware.

use std::path::PathBuf;

use reprise::session::assembly::SoftOptions;
use reprise::session::automatic::Verdict;
use reprise::session::checkpoints::CheckpointArg;
use reprise::session::choice::{Choice, EngineKind};
use reprise::session::guest::Guest;
use reprise::session::hardware::BranchHardware;
use reprise::session::record::{RecordTo, RunPlan, record_on};
use reprise_branch_clock::engine::{BranchClock, Parameters};
use reprise_host::{ConsoleSink, HostOptions, InputSource};
use reprise_kvm::Finding;
use reprise_machine::engine::EngineError;
use reprise_machine::ram::GuestRam;
use reprise_simulated_hardware::{Disturbance, SimulatedVcpu};

use crate::recordings::Workplace;

/// Conditional branches by which Intel's counters are late at most.
const SKID: u64 = 100;

/// A machine with a counter that nobody has tried.
#[derive(Clone)]
pub(crate) struct Untried(pub(crate) Disturbance);

impl Untried {
    /// Kicked by its host alone.
    pub(crate) fn intel(seed: u64) -> Self {
        Self(Disturbance { kick_every: None, ..Disturbance::intel(seed) })
    }
}

impl BranchHardware for Untried {
    type Vcpu = SimulatedVcpu;

    fn is_there(&self) -> bool {
        true
    }

    fn verdict(&self) -> Verdict {
        Verdict { finding: self.try_anew(), remembered: false }
    }

    fn try_anew(&self) -> Finding {
        Finding { available: true, reason: "nobody tries it".to_owned(), remedy: None }
    }

    fn time_stamp_trap(&self) -> Finding {
        Finding { available: false, reason: "nobody tries it".to_owned(), remedy: None }
    }

    fn engine(&self, ram: GuestRam) -> Result<BranchClock<SimulatedVcpu>, EngineError> {
        let mut vcpu = SimulatedVcpu::new(ram, self.0)?;
        vcpu.hide_time_stamp_counter();
        BranchClock::new(vcpu, Parameters::with_skid(SKID))
    }
}

impl Workplace {
    /// Records a guest on such a machine.
    pub(crate) fn record_branches(
        &self,
        name: &str,
        (image, cmdline, typed): (&str, &str, &str),
        hardware: &Untried,
    ) -> PathBuf {
        let mut guest = Guest::embedded(image).expect("it is listed");
        cmdline.clone_into(&mut guest.cmdline);
        let console = std::fs::File::create(self.path("console")).expect("a console file");
        let host = HostOptions {
            input: InputSource::Bytes(typed.as_bytes().to_vec()),
            console: ConsoleSink::File(console),
            ..HostOptions::default()
        };
        let (choice, soft) = (Choice::of(EngineKind::Pmu), SoftOptions::default());
        let plan = RunPlan { guest: &guest, choice, plan: Vec::new(), memory_mib: 8, soft, host };
        let path = self.path(name);
        let checkpoints = CheckpointArg::default();
        let to = RecordTo { path: path.clone(), force: false, checkpoints };
        let report = record_on(hardware, plan, &to).expect("it records");
        eprintln!("{image}: {} ticks, {} events", report.ticks, report.events);
        path
    }
}
