//! `reprise doctor`: what this host can do, each finding with its reason.

use anyhow::Result;
use reprise_cpu::engine::SoftEngine;
use reprise_devices::cpu_model;
use reprise_host::host_info;
use reprise_kvm::{ByLevel, Finding, KvmReport, probe};
use reprise_machine::ram::{GuestRam, MIN_RAM_MIB};
use reprise_trace::header::HostInfo;
use serde::Serialize;

use crate::output::{Output, table};
use crate::session::choice::{self, ClockArg, EngineArg};

/// What this host can do.
#[derive(Debug, Serialize)]
struct DoctorReport {
    host: HostInfo,
    guest_cpu_model: String,
    /// What `--engine auto` takes.
    engine: &'static str,
    clock: &'static str,
    engine_reason: Option<&'static str>,
    kvm_kind: &'static str,
    kvm_api_version: Option<i32>,
    kvm_capabilities: Vec<CapabilityReport>,
    findings: Vec<FindingReport>,
}

#[derive(Debug, Serialize)]
struct CapabilityReport {
    name: &'static str,
    needed: bool,
    present: bool,
}

#[derive(Debug, Serialize)]
struct FindingReport {
    topic: String,
    available: bool,
    reason: String,
}

/// Shows what this host can do. The exit status says whether a guest can run at all.
///
/// # Errors
/// None of its own.
pub fn run(output: Output) -> Result<u8> {
    let soft = soft_engine();
    let kvm = probe();
    let can_run = soft.available || kvm.sync_clock.available;
    let report = DoctorReport::of(soft, &kvm)?;
    output.result(&report, report.to_text());
    Ok(u8::from(!can_run))
}

/// Whether the software CPU works here.
fn soft_engine() -> Finding {
    let engine = GuestRam::new(MIN_RAM_MIB)
        .map_err(|error| error.to_string())
        .and_then(|ram| SoftEngine::new(ram).map_err(|error| error.to_string()));
    match engine {
        Ok(_) => Finding {
            available: true,
            reason: "generated code runs here; every instruction is counted".to_owned(),
        },
        Err(reason) => Finding { available: false, reason },
    }
}

impl DoctorReport {
    fn of(soft: Finding, kvm: &KvmReport) -> Result<Self> {
        let auto = choice::for_new_run(EngineArg::Auto, ClockArg::Auto)?;
        let capabilities = kvm.capabilities.iter().map(|capability| CapabilityReport {
            name: capability.name,
            needed: capability.needed,
            present: capability.present,
        });
        Ok(Self {
            host: host_info(),
            guest_cpu_model: format!("{} version {}", cpu_model::NAME, cpu_model::VERSION),
            engine: auto.kind.engine_name(),
            clock: auto.kind.clock_name(),
            engine_reason: auto.reason,
            kvm_kind: kvm.kind.description(),
            kvm_api_version: kvm.api_version,
            kvm_capabilities: capabilities.collect(),
            findings: findings(soft, kvm),
        })
    }

    fn to_text(&self) -> String {
        let host = &self.host;
        let cpu = format!(
            "{} {}, family {} model {} stepping {}",
            host.cpu_vendor, host.cpu_brand, host.cpu_family, host.cpu_model, host.cpu_stepping
        );
        let auto = format!(
            "{}, clock {}: {}",
            self.engine,
            self.clock,
            self.engine_reason.unwrap_or("as asked")
        );
        let missing: Vec<&str> = self
            .kvm_capabilities
            .iter()
            .filter(|capability| !capability.present)
            .map(|capability| capability.name)
            .collect();
        let capabilities = match (self.kvm_capabilities.len(), &missing[..]) {
            (0, _) => "unknown: there is no KVM to ask".to_owned(),
            (_, []) => "all that Reprise uses".to_owned(),
            (_, missing) => format!("missing {}", missing.join(", ")),
        };
        let rows = [
            ("host CPU", cpu),
            ("host kernel", host.kernel_release.clone()),
            ("guest CPU model", self.guest_cpu_model.clone()),
            ("kind of KVM", self.kvm_kind.to_owned()),
            ("KVM capabilities", capabilities),
            ("--engine auto", auto),
        ];
        let findings: Vec<(&str, String)> = self
            .findings
            .iter()
            .map(|finding| {
                let word = if finding.available { "yes" } else { "no " };
                (finding.topic.as_str(), format!("{word}  {}", finding.reason))
            })
            .collect();
        format!("{}\n{}", table(&rows), table(&findings))
    }
}

fn findings(soft: Finding, kvm: &KvmReport) -> Vec<FindingReport> {
    let row = |topic: &str, finding: &Finding| FindingReport {
        topic: topic.to_owned(),
        available: finding.available,
        reason: finding.reason.clone(),
    };
    let mut rows = vec![
        row("engine soft", &soft),
        row("/dev/kvm", &kvm.device),
        row("engine kvm, clock sync", &kvm.sync_clock),
        row("engine kvm, clock step", &kvm.step_clock),
        FindingReport {
            topic: "engine kvm, clock pmu".to_owned(),
            available: false,
            reason: "not in this version, whatever the counters below say".to_owned(),
        },
        row("counter of instructions", &kvm.instruction_counter),
        row("counter of branches", &kvm.branch_counter),
    ];
    let by_level: [(&str, &ByLevel); 4] = [
        ("single-step", &kvm.single_step),
        ("hardware breakpoint", &kvm.hardware_breakpoint),
        ("software breakpoint", &kvm.software_breakpoint),
        ("guest CPU model", &kvm.cpu_model),
    ];
    for (topic, ByLevel { kernel, user }) in by_level {
        rows.push(row(&format!("{topic}, kernel code"), kernel));
        rows.push(row(&format!("{topic}, user code"), user));
    }
    rows
}
