//! A host's counters as a test wants them.

use std::cell::RefCell;
use std::rc::Rc;

use vmm_sys_util::errno::Error as Errno;

use crate::branch_events::HostCpu;
use crate::counters::{RawEvent, Reading};
use crate::perf_host::{HostFacts, PerfCounter, PerfHost};

/// Leaf 1's EAX of a Skylake.
const SKYLAKE: u32 = 0x0005_0654;

/// What was asked of the host, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Open { event_type: u32, config: u64, period: u64 },
    KeepTo(usize),
    Signal(libc::pid_t),
    Period(u64),
}

type Read = Rc<RefCell<dyn FnMut() -> Option<Reading>>>;

/// A host whose counter opens, or is refused with an errno.
pub(crate) struct FakePerfHost {
    pub(crate) facts: HostFacts,
    pub(crate) open: Result<(), i32>,
    pub(crate) keep_to: Result<(), i32>,
    pub(crate) set_period: Result<(), i32>,
    read: Read,
    pub(crate) asked: Rc<RefCell<Vec<Asked>>>,
}

/// A counter that was on the hardware all the time.
pub(crate) fn counted(count: u64) -> Reading {
    Reading { count, enabled_ns: 5_000, running_ns: 5_000 }
}

impl FakePerfHost {
    /// A Skylake whose counter reads what `read` says.
    pub(crate) fn reading(read: impl FnMut() -> Option<Reading> + 'static) -> Self {
        let cpu = HostCpu::new(*b"GenuineIntel", SKYLAKE);
        let paranoid_level = Some("1".to_owned());
        Self {
            facts: HostFacts { cpu, paranoid_level, ..HostFacts::default() },
            open: Ok(()),
            keep_to: Ok(()),
            set_period: Ok(()),
            read: Rc::new(RefCell::new(read)),
            asked: Rc::default(),
        }
    }

    /// A Skylake whose counter stands still.
    pub(crate) fn new() -> Self {
        Self::reading(|| Some(counted(0)))
    }

    /// A Skylake that refuses counters.
    pub(crate) fn refusing(errno: i32) -> Self {
        Self { open: Err(errno), ..Self::new() }
    }
}

impl PerfHost for FakePerfHost {
    fn facts(&self) -> HostFacts {
        self.facts.clone()
    }

    fn open(&self, event: RawEvent) -> Result<Box<dyn PerfCounter>, Errno> {
        let RawEvent { event_type, config, period } = event;
        self.asked.borrow_mut().push(Asked::Open { event_type, config, period });
        self.open.map_err(Errno::new)?;
        let (read, asked) = (self.read.clone(), self.asked.clone());
        Ok(Box::new(FakeCounter { read, asked, set_period: self.set_period }))
    }

    fn keep_to(&self, cpus: &[usize]) -> Result<(), Errno> {
        self.asked.borrow_mut().extend(cpus.iter().map(|cpu| Asked::KeepTo(*cpu)));
        self.keep_to.map_err(Errno::new)
    }
}

struct FakeCounter {
    read: Read,
    asked: Rc<RefCell<Vec<Asked>>>,
    set_period: Result<(), i32>,
}

impl PerfCounter for FakeCounter {
    fn read(&mut self) -> Option<Reading> {
        (self.read.borrow_mut())()
    }

    fn set_period(&mut self, period: u64) -> Result<(), Errno> {
        self.asked.borrow_mut().push(Asked::Period(period));
        self.set_period.map_err(Errno::new)
    }

    fn signal_thread(&mut self, id: libc::pid_t) -> Result<(), Errno> {
        self.asked.borrow_mut().push(Asked::Signal(id));
        Ok(())
    }
}
