//! Breakpoint instructions in guest RAM, and what stands there for the guest.
//!
//! INT3 is one byte, and the instruction under it has more. Whoever decodes the code around it (the kernel
//! does, when it optimises the no-operations behind an instruction) must find its end where it was, so
//! that every byte but the first becomes a one-byte instruction which never executes.

use std::collections::BTreeMap;
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, Instruction};

use crate::guest_code::MAX_BYTES;
use crate::vcpu::Vcpu;

/// INT3.
const BREAKPOINT: u8 = 0xcc;
/// CLC.
const FILLER: u8 = 0xf8;

/// Breakpoint instructions by guest-physical address, each with what it is for.
#[derive(Clone, Debug)]
pub(crate) struct Planted<K> {
    places: BTreeMap<u64, Place<K>>,
}

#[derive(Clone, Debug)]
struct Place<K> {
    original: Vec<u8>,
    kind: K,
}

impl<K: Copy> Planted<K> {
    pub(crate) fn new() -> Self {
        Self { places: BTreeMap::new() }
    }

    /// What stands at `address`, if a breakpoint does: what for, and the guest's own bytes.
    pub(crate) fn at(&self, address: u64) -> Option<(K, &[u8])> {
        self.places.get(&address).map(|place| (place.kind, &place.original[..]))
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// Puts a breakpoint on an instruction of so many bytes, unless one overlaps it already or it does not
    /// lie within a page. Gives whether it is there.
    pub(crate) fn plant<V: Vcpu>(
        &mut self,
        vcpu: &mut V,
        address: u64,
        bytes: usize,
        kind: K,
    ) -> bool {
        let range = address..address + bytes as u64;
        let within_page = range.start >> 12 == (range.end - 1) >> 12;
        if !within_page || self.overlapping(&range).next().is_some() {
            return false;
        }
        let mut original = vec![0; bytes];
        vcpu.ram().read(address, &mut original);
        vcpu.write_ram(address, &trap(bytes));
        self.places.insert(address, Place { original, kind });
        true
    }

    /// Takes a breakpoint away again, except for what was `written` over.
    pub(crate) fn remove<V: Vcpu>(&mut self, vcpu: &mut V, address: u64, written: &[Range<u64>]) {
        let Some(place) = self.places.remove(&address) else { return };
        for (at, byte) in (address..).zip(place.original) {
            if !written.iter().any(|range| range.contains(&at)) {
                vcpu.write_ram(at, &[byte]);
            }
        }
    }

    /// The addresses of those that overlap a range.
    pub(crate) fn overlapping(&self, range: &Range<u64>) -> impl Iterator<Item = u64> + use<'_, K> {
        let Range { start, end } = *range;
        let from = start.saturating_sub(MAX_BYTES as u64);
        self.places
            .range(from..end)
            .filter(move |(address, place)| *address + place.original.len() as u64 > start)
            .map(|(address, _)| *address)
    }

    /// Whether a breakpoint that the guest wrote over is still whole: it wrote what it had read.
    pub(crate) fn is_whole<V: Vcpu>(&self, vcpu: &V, address: u64) -> bool {
        let Some(place) = self.places.get(&address) else { return false };
        let mut found = vec![0; place.original.len()];
        vcpu.ram().read(address, &mut found);
        found == trap(found.len())
    }

    /// Puts the guest's own bytes into a copy of RAM that starts at `start`.
    pub(crate) fn hide(&self, start: u64, copy: &mut [u8]) {
        let range = start..start + copy.len() as u64;
        for address in self.overlapping(&range) {
            for (at, byte) in (address..).zip(&self.places[&address].original) {
                if range.contains(&at) {
                    copy[(at - start) as usize] = *byte;
                }
            }
        }
    }

    /// The instruction under a breakpoint.
    pub(crate) fn instruction(&self, address: u64, bitness: u32, rip: u64) -> Option<Instruction> {
        let (_, original) = self.at(address)?;
        let instruction = Decoder::with_ip(bitness, original, rip, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }
}

/// What stands in the place of an instruction of so many bytes.
pub(crate) fn trap(bytes: usize) -> Vec<u8> {
    let mut trap = vec![FILLER; bytes];
    trap[0] = BREAKPOINT;
    trap
}
