//! Whether RDTSC can be trapped on this host's KVM with the clock `pmu`.

use std::sync::OnceLock;

use reprise_branch_clock::trap_probe::what_is_wrong;
use reprise_machine::engine::EngineError;
use reprise_machine::ram::{GuestRam, MIN_RAM_MIB};

use crate::PmuVcpu;
use crate::error::KvmError;
use crate::pmu::TIME_LIMIT;
use crate::report::Finding;

/// Whether RDTSC of a guest whose kernel's text is known can be trapped with the clock `pmu`, with or
/// without a counter, and why (not). Runs tiny guests, for some milliseconds, once.
pub fn time_stamp_trap() -> Finding {
    static ANSWER: OnceLock<Finding> = OnceLock::new();
    ANSWER.get_or_init(|| ask().unwrap_or_else(|error| Finding::no(error.to_string()))).clone()
}

fn ask() -> Result<Finding, EngineError> {
    let ram =
        GuestRam::new(MIN_RAM_MIB).map_err(|error| EngineError { what: error.to_string() })?;
    let mut vcpu = match PmuVcpu::without_counter(ram) {
        Ok(vcpu) => vcpu,
        Err(error @ (KvmError::Missing { .. } | KvmError::Permission { .. })) => {
            return Ok(Finding::failed(&error));
        }
        Err(error) => return Err(error.into()),
    };
    vcpu.watch(TIME_LIMIT);
    Ok(match what_is_wrong(&mut vcpu)? {
        Some(reason) => Finding::no(reason),
        None => Finding::yes("INT3, writes to text and #GP of user code come back"),
    })
}

#[cfg(test)]
#[path = "trap_tests.rs"]
mod tests;
