//! System state: segments, exceptions and interrupts, far transfers, control registers, MSRs.

pub(crate) mod debug;
pub(crate) mod deliver;
pub(crate) mod segment;

use crate::decode::op::Op;
use crate::mode::Mode;
use crate::ops::BlockEnd;

pub(crate) fn select(_op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    None
}
