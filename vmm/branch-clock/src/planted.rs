//! Breakpoint instructions in guest RAM, and what stands there for the guest.
//!
//! INT3 is one byte, and the instruction under it has more. Whoever decodes the code around it (the kernel
//! does, when it optimises the no-operations behind an instruction) must find its end where it was, so
//! that every byte but the first becomes a one-byte instruction which never executes.

use std::collections::BTreeMap;
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use reprise_machine::paging::is_ram;

use crate::guest_code::MAX_BYTES;
use crate::placed_kernel::PAGE_BYTES;
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

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct Place<K> {
    /// What stands there for the guest, as far as it is hidden.
    original: Vec<u8>,
    /// The whole instruction.
    code: Vec<u8>,
    pub(crate) kind: K,
}

impl<K> Place<K> {
    /// The instruction, in code of this operand size.
    pub(crate) fn instruction(&self, bitness: u32, rip: u64) -> Option<Instruction> {
        let mut decoder = Decoder::with_ip(bitness, &self.code, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        (!instruction.is_invalid()).then_some(instruction)
    }
}

impl<K: Copy> Planted<K> {
    pub(crate) fn new() -> Self {
        Self { places: BTreeMap::new() }
    }

    /// What stands at `address`, if a breakpoint does.
    pub(crate) fn at(&self, address: u64) -> Option<&Place<K>> {
        self.places.get(&address)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }

    /// Puts a breakpoint on the instruction `code`, whose bytes follow one another in RAM. Gives whether it is
    /// there: it is not where another one overlaps it.
    pub(crate) fn plant<V: Vcpu>(
        &mut self,
        vcpu: &mut V,
        address: u64,
        code: &[u8],
        kind: K,
    ) -> bool {
        let place = Place { original: code.to_vec(), code: code.to_vec(), kind };
        self.put_back(vcpu, address, place)
    }

    /// The same for an instruction of which only what lies in the first byte's page is known to follow it in
    /// RAM.
    pub(crate) fn plant_in_page<V: Vcpu>(
        &mut self,
        vcpu: &mut V,
        address: u64,
        code: &[u8],
        kind: K,
    ) -> bool {
        let in_page = (PAGE_BYTES - address % PAGE_BYTES) as usize;
        let original = code[..code.len().min(in_page)].to_vec();
        self.put_back(vcpu, address, Place { original, code: code.to_vec(), kind })
    }

    /// Takes a breakpoint away for a while.
    pub(crate) fn lift<V: Vcpu>(&mut self, vcpu: &mut V, address: u64) -> Option<Place<K>> {
        let place = self.places.remove(&address)?;
        write_bytes(vcpu, address, &place.original);
        Some(place)
    }

    /// Puts one that was lifted back. Gives whether it is there: it is not if the guest has written something
    /// else there, or another one overlaps it.
    pub(crate) fn put_back<V: Vcpu>(
        &mut self,
        vcpu: &mut V,
        address: u64,
        place: Place<K>,
    ) -> bool {
        let range = address..address + place.original.len() as u64;
        let mut found = vec![0; place.original.len()];
        if !is_ram(vcpu.ram(), address, found.len()) {
            return false;
        }
        vcpu.ram().read(address, &mut found);
        if found != place.original || self.overlapping(&range).next().is_some() {
            return false;
        }
        write_bytes(vcpu, address, &trap(found.len()));
        self.places.insert(address, place);
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
}

/// Writes RAM, within a page or not.
pub(crate) fn write_bytes<V: Vcpu>(vcpu: &mut V, address: u64, bytes: &[u8]) {
    for (at, byte) in (address..).zip(bytes) {
        vcpu.write_ram(at, &[*byte]);
    }
}

/// What stands in the place of an instruction of so many bytes.
pub(crate) fn trap(bytes: usize) -> Vec<u8> {
    let mut trap = vec![FILLER; bytes];
    trap[0] = BREAKPOINT;
    trap
}
