//! Recordings of the clock `pmu`, made on simulated hardware.

use std::path::PathBuf;

use reprise::session::assembly::SoftOptions;
use reprise::session::checkpoints::CheckpointArg;
use reprise::session::choice::{Choice, EngineKind};
use reprise::session::guest::Guest;
use reprise::session::record::{RecordTo, RunPlan, record_on};
use reprise_host::{ConsoleSink, HostOptions, InputSource};

use reprise_tests::hardware::Simulated;

use crate::recordings::Workplace;

impl Workplace {
    /// Records a guest on such a machine.
    pub(crate) fn record_branches(
        &self,
        name: &str,
        (image, cmdline, typed): (&str, &str, &str),
        hardware: &Simulated,
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
