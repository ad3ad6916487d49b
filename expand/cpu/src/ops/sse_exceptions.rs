//! To be written.
use crate::decode::op::Op;
use crate::mode::Mode;

pub(super) fn wrap_native(_op: &mut Op, _mode: Mode) {}
