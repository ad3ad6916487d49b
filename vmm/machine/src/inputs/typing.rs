//! When typed bytes are handed to the guest: soon, but in as few records as its FIFO allows.

use reprise_devices::time::VirtualTime;

/// A guest that has just begun to listen may be in the middle of setting its serial port up, which
/// throws away what is in it. Typing begins when it has listened for this long, or sleeps.
const LISTENING_NS: u64 = 100_000;

/// A guest that stalls this often in a row never has the room that it once had.
const MAX_STALLS: u32 = 4;

/// How the guest takes what is typed. All of it is a matter of how soon bytes are logged, none of
/// correctness.
#[derive(Debug, Default)]
pub(super) struct Typing {
    /// The host may have more bytes than the guest had room for.
    bytes_wait: bool,
    /// Waiting bytes are given when there is this much room: as much as the guest was seen to have
    /// when it had read everything, so that bytes which it reads one by one do not make a record
    /// each.
    room_wanted: usize,
    /// The room when somebody last looked; `None` if bytes were given since.
    room_at_look: Option<usize>,
    /// How often in a row the guest was given bytes without having read everything.
    stalls: u32,
    /// Virtual time at which the guest was first seen to listen.
    listens_since: Option<VirtualTime>,
}

impl Typing {
    /// Whether to ask the host for bytes now. `looking`: somebody kicked, so there may be new ones.
    pub(super) fn is_due(
        &mut self,
        room: usize,
        now: VirtualTime,
        halted: bool,
        looking: bool,
    ) -> bool {
        let waited = self.bytes_wait;
        self.bytes_wait |= looking;
        if room == 0 {
            return false;
        }
        let since = *self.listens_since.get_or_insert(now);
        if halted {
            return true;
        }
        if now.ns.saturating_sub(since.ns) < LISTENING_NS {
            return false;
        }
        if !self.bytes_wait {
            return false;
        }
        if !waited || room >= self.room_wanted {
            self.stalls = 0;
            return true;
        }
        let stalled = looking && self.room_at_look.replace(room) == Some(room);
        if stalled {
            // It has read nothing between two kicks: it is busy, or has switched its FIFO off.
            self.stalls += 1;
            if self.stalls >= MAX_STALLS {
                self.room_wanted = room;
            }
        }
        stalled
    }

    /// Whether there may be bytes to give at this boundary, if nobody looks.
    pub(super) fn may_be_due(&self, room: usize) -> bool {
        self.bytes_wait && room > 0 && room >= self.room_wanted
    }

    /// The host had `count` bytes for this much room.
    pub(super) fn given(&mut self, count: usize, room: usize) {
        self.bytes_wait = count >= room;
        self.room_wanted = self.room_wanted.max(room);
        self.room_at_look = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATER: VirtualTime = VirtualTime { ns: 1_000_000 };

    /// A guest that has listened for long and was given 16 of many bytes.
    fn busy_typing() -> Typing {
        let mut typing = Typing::default();
        assert!(!typing.is_due(16, VirtualTime::from_ns(0), false, true), "it only just listens");
        assert!(typing.is_due(16, LATER, false, false), "without another kick");
        typing.given(16, 16);
        typing
    }

    #[test]
    fn a_guest_gets_more_when_it_has_read_everything() {
        let mut typing = busy_typing();
        for room in 1..16 {
            // Kicks strike where they like.
            assert!(!typing.is_due(room, LATER, false, room % 5 == 0), "room {room}");
        }
        assert!(typing.is_due(16, LATER, false, false));
    }

    #[test]
    fn a_guest_is_not_idle_for_being_looked_at_in_the_same_state_twice() {
        let mut typing = busy_typing();
        for _ in 0..5 {
            assert!(!typing.is_due(3, LATER, false, true));
            assert!(typing.is_due(16, LATER, false, false));
            typing.given(16, 16);
        }
    }

    #[test]
    fn a_busy_guest_gets_what_fits_and_then_as_before() {
        let mut typing = busy_typing();
        assert!(!typing.is_due(1, LATER, false, true));
        assert!(typing.is_due(1, LATER, false, true));
        typing.given(1, 1);
        assert!(!typing.is_due(1, LATER, false, false));
        assert!(typing.is_due(16, LATER, false, false));
    }

    #[test]
    fn a_guest_that_switched_its_fifo_off_is_served_byte_by_byte() {
        let mut typing = busy_typing();
        for _ in 0..MAX_STALLS {
            assert!(!typing.is_due(1, LATER, false, true));
            assert!(typing.is_due(1, LATER, false, true));
            typing.given(1, 1);
        }
        assert!(typing.is_due(1, LATER, false, false));
    }

    #[test]
    fn a_sleeping_guest_gets_what_fits() {
        let mut typing = busy_typing();
        assert!(typing.is_due(3, LATER, true, false));
        typing.given(3, 3);
        assert!(!typing.is_due(3, LATER, false, false), "and is not fed in threes from now on");
    }

    #[test]
    fn nothing_is_asked_for_before_somebody_looks() {
        let mut typing = busy_typing();
        assert!(typing.is_due(16, LATER, false, false));
        typing.given(2, 16);
        assert!(!typing.is_due(16, LATER, false, false), "the host had no more");
        assert!(typing.is_due(14, LATER, false, true), "new bytes are not kept waiting");
    }

    #[test]
    fn a_guest_without_room_gets_bytes_as_soon_as_it_has_some() {
        let mut typing = Typing::default();
        assert!(!typing.is_due(0, LATER, false, true));
        assert!(!typing.is_due(16, LATER, false, false), "it may be setting the port up");
        let later = VirtualTime::from_ns(LATER.ns + LISTENING_NS);
        assert!(typing.is_due(16, later, false, false));
    }
}
