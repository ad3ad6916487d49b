//! `reprise doctor`: what this host can do, each finding with its reason, and what would give more.

mod advice;
mod text;

use anyhow::Result;
use reprise_cpu::engine::SoftEngine;
use reprise_devices::cpu_model;
use reprise_host::host_info;
use reprise_kvm::{
    ByLevel, Finding, KvmClock, KvmReport, Precaution, precautions, probe, time_stamp_trap,
};
use reprise_machine::ram::{GuestRam, MIN_RAM_MIB};
use reprise_trace::header::HostInfo;
use serde::Serialize;

use crate::output::Output;
use crate::session::automatic;
use crate::session::choice::{self, ClockArg, EngineArg, EngineKind, Running};
use crate::session::trial::{self, Trial};

use advice::Advice;

/// What this host can do.
#[derive(Debug, Serialize)]
struct DoctorReport {
    host: HostInfo,
    /// The host is a virtual machine itself.
    virtual_machine: bool,
    guest_cpu_model: String,
    /// What `--engine auto` takes.
    engine: &'static str,
    clock: &'static str,
    engine_reason: Option<String>,
    /// Each engine with each clock.
    engines: Vec<EngineReport>,
    /// What would give more, likeliest first.
    advice: Vec<Advice>,
    kvm_kind: &'static str,
    kvm_api_version: Option<i32>,
    kvm_capabilities: Vec<CapabilityReport>,
    /// How this CPU counts conditional branches, whether or not the counter can be had.
    branch_counter: Option<BranchCounterReport>,
    findings: Vec<FindingReport>,
}

/// An engine with a clock.
#[derive(Debug, Serialize)]
struct EngineReport {
    engine: &'static str,
    clock: &'static str,
    /// The options that ask for it.
    options: String,
    /// What it gives.
    gives: String,
    available: bool,
    reason: String,
    remedy: Option<String>,
    /// A short recording and its replay; null where the engine cannot be had.
    trial: Option<Trial>,
}

#[derive(Debug, Serialize)]
struct CapabilityReport {
    name: &'static str,
    needed: bool,
    present: bool,
}

#[derive(Debug, Serialize)]
struct BranchCounterReport {
    microarchitecture: &'static str,
    event_name: &'static str,
    event: String,
    skid_branches: u64,
    source: String,
    caveats: Vec<&'static str>,
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
    // What the probe found is remembered for `--engine auto`, which so has the same opinion.
    automatic::remember(&kvm.pmu_clock);
    let mut engines: Vec<EngineReport> = EngineKind::ALL
        .into_iter()
        .map(|kind| try_out(kind, finding_of(kind, &soft, &kvm), output))
        .collect();
    // What can be used comes first, and stays in the order of its worth.
    engines.sort_by_key(|engine| !engine.available);
    let can_run = engines.iter().any(|engine| engine.available);
    let report = DoctorReport::of(engines, &soft, &kvm)?;
    output.result(&report, text::of(&report))?;
    Ok(u8::from(!can_run))
}

/// Whether the software CPU works here.
fn soft_engine() -> Finding {
    let engine = GuestRam::new(MIN_RAM_MIB)
        .map_err(|error| error.to_string())
        .and_then(|ram| SoftEngine::new(ram).map_err(|error| error.to_string()));
    let (available, reason) = match engine {
        Ok(_) => (true, "generated code runs here; every instruction is counted".to_owned()),
        Err(reason) => (false, reason),
    };
    Finding { available, reason, remedy: None }
}

fn finding_of<'a>(kind: EngineKind, soft: &'a Finding, kvm: &'a KvmReport) -> &'a Finding {
    match kind {
        EngineKind::Soft => soft,
        EngineKind::Pmu => &kvm.pmu_clock,
        EngineKind::Kvm(KvmClock::Sync) => &kvm.sync_clock,
        EngineKind::Kvm(KvmClock::Step) => &kvm.step_clock,
    }
}

/// What an engine with a clock gives.
fn gives(kind: EngineKind) -> String {
    match kind {
        EngineKind::Soft => {
            "the software CPU: exact whatever the guest does, hundreds of MIPS".to_owned()
        }
        EngineKind::Pmu => {
            let trap = time_stamp_trap();
            let traps = match trap.available {
                true => "RDTSC is trapped where the kernel's text is known".to_owned(),
                false => format!("RDTSC is not trapped here ({})", trap.reason),
            };
            format!("the speed of hardware, with interrupts at exact places; {traps}")
        }
        EngineKind::Kvm(KvmClock::Sync) => {
            "the speed of KVM; interrupts arrive only when the guest exits".to_owned()
        }
        EngineKind::Kvm(KvmClock::Step) => {
            "interrupts at exact places by stepping, about 0.1 MIPS".to_owned()
        }
    }
}

/// Records and replays for a moment, where the engine can be had at all.
fn try_out(kind: EngineKind, finding: &Finding, output: Output) -> EngineReport {
    let options = match kind {
        EngineKind::Soft => "--engine soft".to_owned(),
        _ => format!("--engine kvm --clock {}", kind.clock_name()),
    };
    let trial = finding.available.then(|| {
        let bar = output.bar(&format!("trying {options}"), None);
        bar.tick();
        trial::attempt(kind)
    });
    let failure = trial.as_ref().and_then(|trial| trial.failure.clone());
    EngineReport {
        engine: kind.engine_name(),
        clock: kind.clock_name(),
        options,
        gives: gives(kind),
        available: trial.as_ref().is_some_and(|trial| trial.equal),
        reason: failure.unwrap_or_else(|| finding.reason.clone()),
        remedy: finding.remedy.clone(),
        trial,
    }
}

impl DoctorReport {
    fn of(engines: Vec<EngineReport>, soft: &Finding, kvm: &KvmReport) -> Result<Self> {
        let running = Running::AnyKnownText;
        let auto = choice::for_new_run(EngineArg::Auto, ClockArg::Auto, running)?;
        let capabilities = kvm.capabilities.iter().map(|capability| CapabilityReport {
            name: capability.name,
            needed: capability.needed,
            present: capability.present,
        });
        let counter = kvm.counter_of_cpu.as_ref().map(|counter| BranchCounterReport {
            microarchitecture: counter.microarchitecture,
            event_name: counter.event_name,
            event: format!("{:#x}", counter.event),
            skid_branches: counter.skid,
            source: counter.source.clone(),
            caveats: counter.caveats.clone(),
        });
        Ok(Self {
            host: host_info(),
            virtual_machine: kvm.in_vm,
            guest_cpu_model: format!("{} version {}", cpu_model::NAME, cpu_model::VERSION),
            engine: auto.kind.engine_name(),
            clock: auto.kind.clock_name(),
            engine_reason: auto.reason,
            advice: advice::of(&engines, kvm),
            engines,
            kvm_kind: kvm.kind.description(),
            kvm_api_version: kvm.api_version,
            kvm_capabilities: capabilities.collect(),
            branch_counter: counter,
            findings: findings(soft, kvm),
        })
    }
}

/// What was asked of the host, one by one.
fn findings(soft: &Finding, kvm: &KvmReport) -> Vec<FindingReport> {
    let row = |topic: &str, finding: &Finding| FindingReport {
        topic: topic.to_owned(),
        available: finding.available,
        reason: finding.reason.clone(),
    };
    let mut rows = vec![
        row("engine soft", soft),
        row("/dev/kvm", &kvm.device),
        row("engine kvm, clock sync", &kvm.sync_clock),
        row("engine kvm, clock step", &kvm.step_clock),
        row("engine kvm, clock pmu", &kvm.pmu_clock),
        row("RDTSC trapped with the clock pmu", &time_stamp_trap()),
        row("counter for the clock pmu", &kvm.conditional_branch_counter),
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
    // Without KVM, or where it refuses, the rows above say so.
    let instructions = precautions().unwrap_or_default();
    for Precaution { instruction, closed: ByLevel { kernel, user } } in instructions {
        let topics = match instruction {
            // What becomes of a guest's own hangs on its kernel: a recording says it.
            &"RDTSC" => ["RDTSC trapped with the clock sync", "RDTSC refused under CR4.TSD"]
                .map(str::to_owned),
            _ => ["kernel", "user"].map(|who| format!("{instruction} closed, {who} code")),
        };
        rows.extend(topics.iter().zip([kernel, user]).map(|(topic, finding)| row(topic, finding)));
    }
    rows
}
