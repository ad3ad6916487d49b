//! A counter of the guest's conditional branches that interrupts the vCPU's thread.
//!
//! It counts guest mode only, follows its thread from CPU to CPU, and holds its place on the hardware
//! (`pinned`); should it lose it all the same, reading it fails. On a hybrid CPU only one kind of core has
//! the event, so the thread is kept to those.

use crate::branch_events::BranchEvent;
use crate::counter_refusal::CounterRefusal;
use crate::counters::{RawEvent, Reading};
use crate::error::KvmError;
use crate::perf_host::{HostFacts, PerfCounter, PerfHost, this_thread};

/// perf_event_open(2): a raw event of the CPU's own counters.
const TYPE_RAW: u32 = 4;
/// "No overflow": a counter cannot change between counting and sampling, so it samples never.
const NEVER: u64 = 1 << 60;
/// The counter takes no period below this many branches, which some CPUs refuse: an overflow asked for
/// earlier is late by as many.
pub(crate) const SHORTEST_PERIOD: u64 = 32;
/// The kernel stops, without a word and until its next timer tick, a counter that interrupts more often
/// than it allows (100000 times a second unless told otherwise). A replay of interrupts as frequent as
/// a PC's timer makes them stays below this.
const MIN_INTERRUPTS_PER_SECOND: u64 = 20_000;

/// The counter.
pub(crate) struct BranchCounter {
    counter: Box<dyn PerfCounter>,
    event: &'static BranchEvent,
    /// The thread that is counted, and that overflows interrupt.
    thread: libc::pid_t,
    period: u64,
}

impl BranchCounter {
    /// A counter of what the calling thread's guests retire.
    ///
    /// # Errors
    /// Says in one line why this host has none.
    pub(crate) fn open(host: &dyn PerfHost) -> Result<Self, CounterRefusal> {
        let facts = host.facts();
        let event = facts.cpu.branch_event().map_err(CounterRefusal::UnknownCpu)?;
        if let Some(per_second) =
            facts.max_interrupts_per_second.filter(|rate| *rate < MIN_INTERRUPTS_PER_SECOND)
        {
            return Err(CounterRefusal::FewInterrupts { per_second });
        }
        let event_type = performance_cores(host, &facts)?.unwrap_or(TYPE_RAW);
        let raw = RawEvent { event_type, config: event.config(), period: NEVER };
        let refused =
            |errno| CounterRefusal::of(errno, facts.paranoid_level.as_deref(), facts.in_vm);
        let mut counter = host.open(raw).map_err(refused)?;
        let thread = this_thread();
        counter.signal_thread(thread).map_err(CounterRefusal::Other)?;
        let mut counter = Self { counter, event, thread, period: NEVER };
        counter.count()?;
        Ok(counter)
    }

    /// What is counted.
    pub(crate) fn event(&self) -> &'static BranchEvent {
        self.event
    }

    /// Conditional branches by which an overflow may be late, from when it is asked for.
    pub(crate) fn skid(&self) -> u64 {
        self.event.skid + SHORTEST_PERIOD
    }

    /// Branches so far.
    pub(crate) fn read(&mut self) -> Result<u64, KvmError> {
        self.count().map_err(KvmError::CounterFailed)
    }

    fn count(&mut self) -> Result<u64, CounterRefusal> {
        if this_thread() != self.thread {
            return Err(CounterRefusal::OtherThread);
        }
        let Some(Reading { count, enabled_ns, running_ns }) = self.counter.read() else {
            return Err(CounterRefusal::Taken);
        };
        if enabled_ns != running_ns {
            return Err(CounterRefusal::Multiplexed { enabled_ns, running_ns });
        }
        Ok(count)
    }

    /// Has the thread interrupted after so many more branches, or some more than that. To be asked anew before
    /// each entry behind an overflow: a new period starts a counter that the kernel has stopped for overflowing
    /// too often, whose time enabled goes on being its time running.
    pub(crate) fn interrupt_after(&mut self, branches: Option<u64>) -> Result<(), KvmError> {
        let period = branches.unwrap_or(NEVER).clamp(SHORTEST_PERIOD, NEVER);
        if period == NEVER && self.period == NEVER {
            return Ok(());
        }
        let set = self.counter.set_period(period);
        set.map_err(|errno| KvmError::refused("PERF_EVENT_IOC_PERIOD", errno))?;
        self.period = period;
        Ok(())
    }
}

/// On a hybrid CPU, keeps this thread to the performance cores and gives their type of event.
fn performance_cores(
    host: &dyn PerfHost,
    facts: &HostFacts,
) -> Result<Option<u32>, CounterRefusal> {
    let Some((event_type, cpus)) = &facts.performance_cores else { return Ok(None) };
    let (Ok(event_type), Some(cpus)) = (event_type.parse(), cpus_of_list(cpus)) else {
        return Err(CounterRefusal::UnknownCores);
    };
    host.keep_to(&cpus).map_err(CounterRefusal::NoPerformanceCore)?;
    Ok(Some(event_type))
}

/// The CPUs of a list such as `0-7,16`; `None` if it is none.
fn cpus_of_list(list: &str) -> Option<Vec<usize>> {
    /// More than a kernel can have.
    const MAX_CPUS: usize = 1 << 16;
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if last >= MAX_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
#[path = "branch_counter_tests.rs"]
mod tests;
