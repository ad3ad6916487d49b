//! To be written.

use super::BlockEnd;
use crate::decode::op::Op;
use crate::mode::Mode;

pub(super) fn select(_op: &mut Op, _mode: Mode) -> Option<BlockEnd> {
    None
}
