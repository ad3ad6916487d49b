//! A breakpoint instruction on the last jump of a boot stub.
//!
//! The stub moves itself to a place that only it knows, before it unpacks the kernel. The breakpoint stands
//! in the stub as it was loaded, and moves with it. So it is not known by its place, but by the code around
//! it, in which RAM is searched whenever somebody looks.

use reprise_machine::ram::GuestRam;
use reprise_time_stamp_sites::LastJump;

use crate::planted::trap;
use reprise_machine::paging::is_ram;

/// The stub's last jump, as it is and with a breakpoint.
#[derive(Debug)]
pub(crate) struct StubTrap {
    original: Vec<u8>,
    trapped: Vec<u8>,
    /// Where in that code the jump is.
    offset: usize,
}

impl StubTrap {
    pub(crate) fn new(jump: &LastJump) -> Self {
        let (original, offset) = (jump.code.clone(), jump.offset);
        let mut trapped = original.clone();
        trapped[offset..offset + LastJump::BYTES].copy_from_slice(&trap(LastJump::BYTES));
        Self { original, trapped, offset }
    }

    /// The jump.
    pub(crate) fn jump(&self) -> &[u8] {
        &self.original[self.offset..self.offset + LastJump::BYTES]
    }

    /// Where jumps without a breakpoint are.
    pub(crate) fn jumps(&self, ram: &GuestRam) -> Vec<u64> {
        self.places(&self.original, ram)
    }

    /// Where those with a breakpoint are.
    pub(crate) fn breakpoints(&self, ram: &GuestRam) -> Vec<u64> {
        self.places(&self.trapped, ram)
    }

    /// Whether there is one.
    pub(crate) fn is_at(&self, ram: &GuestRam, place: u64) -> bool {
        let start = place.wrapping_sub(self.offset as u64);
        let mut found = vec![0; self.trapped.len()];
        if !is_ram(ram, start, found.len()) {
            return false;
        }
        ram.read(start, &mut found);
        found == self.trapped
    }

    /// Puts the jumps into a copy of RAM that begins at `start`.
    pub(crate) fn hide(&self, ram: &GuestRam, start: u64, copy: &mut [u8]) {
        let trapped = trap(LastJump::BYTES);
        for (address, byte) in (start..).zip(copy) {
            for (offset, (trapped, own)) in trapped.iter().zip(self.jump()).enumerate() {
                if *byte == *trapped && self.is_at(ram, address.wrapping_sub(offset as u64)) {
                    *byte = *own;
                }
            }
        }
    }

    fn places(&self, code: &[u8], ram: &GuestRam) -> Vec<u64> {
        let mut places = Vec::new();
        // What the last piece ended with, and where the next one would go on.
        let (mut before, mut next): (Vec<u8>, u64) = (Vec::new(), 0);
        ram.visit(&mut |start, piece| {
            if start != next {
                before.clear();
            }
            let from = start - before.len() as u64;
            before.extend_from_slice(piece);
            let starts = before.windows(code.len()).enumerate();
            let found = starts.filter(|(_, window)| window[self.offset] == code[self.offset]);
            let found = found.filter(|(_, window)| *window == code);
            places.extend(found.map(|(at, _)| from + (at + self.offset) as u64));
            before.drain(..before.len() + 1 - code.len());
            next = start + piece.len() as u64;
        });
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reprise_machine::paging::write_ram;

    #[test]
    fn it_is_found_and_hidden_wherever_it_was_moved() {
        let code: Vec<u8> = (1..27).collect();
        let stub = StubTrap::new(&LastJump { code: code.clone(), offset: 16 });
        let ram = GuestRam::new(4).expect("4 MiB");
        // Within a page, across two, and across two pieces in which RAM is shown.
        let jumps = [0x10_0040, 0x20_0ffc, 0x30_0000 - 1];
        for jump in jumps {
            write_ram(&ram, jump - 16, &code);
        }
        assert_eq!(stub.jumps(&ram), jumps);
        write_ram(&ram, jumps[1], &trap(2));
        write_ram(&ram, jumps[2], &trap(2));
        // INT3 of the guest's own.
        write_ram(&ram, 0x20_0800, &trap(2));
        assert_eq!(
            (stub.jumps(&ram), stub.breakpoints(&ram)),
            (jumps[..1].into(), jumps[1..].into())
        );
        assert!(stub.is_at(&ram, jumps[1]) && !stub.is_at(&ram, jumps[0]));
        let hidden = |start: u64, bytes: usize| {
            let mut copy = vec![0; bytes];
            ram.read(start, &mut copy);
            stub.hide(&ram, start, &mut copy);
            copy
        };
        assert_eq!(hidden(jumps[1] - 16, code.len()), code);
        assert_eq!(hidden(jumps[2] - 1, 2), [16, 17], "the first byte alone is in the copy");
        assert_eq!(hidden(jumps[2] + 1, 2), [18, 19], "and the last");
        assert_eq!(hidden(0x20_0800, 2), trap(2));
    }
}
