//! A kernel's ELF file, read by its sections.

use std::ops::Range;

use object::elf::{SHF_ALLOC, SHF_EXECINSTR};
use object::read::elf::{ElfFile64, ProgramHeader};
use object::{Endianness, Object, ObjectSection, SectionFlags};

use crate::alternatives::{self, Alternative};
use crate::sweep::{self, Found};
use crate::{Evidence, KernelText, Replaced, Site, SitesError, Text};

/// What stands where the kernel has not patched anything in: never executed.
const REPLACEMENTS: &str = ".altinstr_replacement";
/// The table that says what replaces what.
const ALTERNATIVES: &str = ".altinstructions";
/// Addresses of instructions, each as its distance from where it stands (`CONFIG_UNWINDER_ORC`).
const UNWIND_ADDRESSES: &str = ".orc_unwind_ip";
/// Embedded guests keep their user code there.
const USER: &str = ".user";
/// Text that the kernel gives up after it has started: names begin so.
const INITIAL: [&str; 3] = [".init", ".exit", ".altinstr_aux"];
/// Bytes at the entry by which the unpacked kernel is known.
const ENTRY_BYTES: u64 = 32;
/// No alternative is longer.
const MAX_ALTERNATIVE_BYTES: u64 = 255;

type File<'a> = ElfFile64<'a, Endianness>;

/// One section's place and content.
struct Section<'a> {
    name: &'a str,
    linear: Range<u64>,
    bytes: &'a [u8],
    executable: bool,
}

/// Reads all there is to know.
pub(crate) fn kernel_text(file: &[u8]) -> Result<KernelText, SitesError> {
    let elf = File::parse(file).map_err(|_| SitesError::NoSections)?;
    let sections = sections(&elf)?;
    let boundaries = unwind_addresses(&sections);
    let code = |section: &&Section<'_>| {
        section.executable && section.name != REPLACEMENTS && !section.name.starts_with(USER)
    };
    let mut kernel = KernelText { entry: elf.entry(), ..KernelText::default() };
    for section in sections.iter().filter(code) {
        let Range { start, end } = section.linear;
        let first = boundaries.partition_point(|address| *address < start);
        let last = boundaries.partition_point(|address| *address < end);
        let offsets: Vec<usize> =
            boundaries[first..last].iter().map(|address| (address - start) as usize).collect();
        let Found { instructions, mistakable } = sweep::search(section.bytes, &offsets);
        kernel.sites.extend(instructions.iter().map(|&(offset, bytes, instruction, known)| {
            let evidence = if known { Evidence::UnwindTable } else { Evidence::Section };
            Site { address: start + offset as u64, instruction, bytes, evidence }
        }));
        kernel.mistakable.extend(mistakable.iter().map(|offset| start + *offset as u64));
        kernel.text.push(Text {
            name: section.name.to_owned(),
            linear: section.linear.clone(),
            physical: physical_of(&elf, start),
            initial: is_initial(section.name).then(|| section.bytes.to_vec()),
        });
    }
    kernel.sites.sort_by_key(|site| site.address);
    (kernel.patched, kernel.replaced_behind) = patched(&sections, &kernel.text)?;
    kernel.entry_bytes = bytes_at_physical(&elf, file, kernel.entry);
    Ok(kernel)
}

fn sections<'a>(elf: &File<'a>) -> Result<Vec<Section<'a>>, SitesError> {
    let damaged = |_| SitesError::Damaged("ELF file");
    let mut sections = Vec::new();
    for section in elf.sections() {
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else { continue };
        let start = section.address();
        let (Some(end), true) = (start.checked_add(section.size()), sh_flags.contains(SHF_ALLOC))
        else {
            continue;
        };
        let bytes = section.data().map_err(damaged)?;
        let executable = sh_flags.contains(SHF_EXECINSTR);
        let name = section.name().map_err(damaged)?;
        sections.push(Section { name, linear: start..end, bytes, executable });
    }
    if sections.is_empty() { Err(SitesError::NoSections) } else { Ok(sections) }
}

/// Addresses where instructions begin, in order.
fn unwind_addresses(sections: &[Section<'_>]) -> Vec<u64> {
    let Some(table) = sections.iter().find(|section| section.name == UNWIND_ADDRESSES) else {
        return Vec::new();
    };
    let places = (table.linear.start..).step_by(4);
    let mut addresses: Vec<u64> = table
        .bytes
        .chunks_exact(4)
        .zip(places)
        .map(|(entry, place)| {
            let distance = i32::from_le_bytes(entry.try_into().expect("four bytes"));
            place.wrapping_add_signed(i64::from(distance))
        })
        .collect();
    addresses.sort_unstable();
    addresses
}

fn is_initial(name: &str) -> bool {
    INITIAL.iter().any(|initial| name.starts_with(initial))
}

/// Instructions that the kernel may patch in, and no-operations that it replaces behind the last of them.
fn patched(
    sections: &[Section<'_>],
    text: &[Text],
) -> Result<(Vec<Site>, Vec<Replaced>), SitesError> {
    let named = |name| sections.iter().find(|section| section.name == name);
    let (Some(table), Some(replacements)) = (named(ALTERNATIVES), named(REPLACEMENTS)) else {
        return Ok((Vec::new(), Vec::new()));
    };
    let text: Vec<Range<u64>> = text.iter().map(|text| text.linear.clone()).collect();
    let alternatives =
        alternatives::read(table.bytes, table.linear.start, &replacements.linear, &text)
            .ok_or(SitesError::Damaged("table of alternatives"))?;
    let (mut sites, mut behind) = (Vec::new(), 0);
    for (number, alternative) in alternatives.iter().enumerate() {
        let start = (alternative.replacement - replacements.linear.start) as usize;
        let bytes = replacements.bytes.get(start..start + usize::from(alternative.bytes));
        let found = sweep::search(bytes.unwrap_or_default(), &[]);
        if !found.instructions.is_empty() {
            behind = number + 1;
        }
        sites.extend(found.instructions.iter().map(|&(offset, bytes, instruction, _)| Site {
            address: alternative.address + offset as u64,
            instruction,
            bytes,
            evidence: Evidence::Alternative,
        }));
    }
    let near: Vec<u64> = sites.iter().map(|site| site.address).collect();
    let replaced = alternatives[behind..].iter().filter_map(|it| replaced(sections, it));
    let mut replaced: Vec<Replaced> = replaced
        .filter(|it| near.iter().all(|near| near.abs_diff(it.address) > MAX_ALTERNATIVE_BYTES))
        .collect();
    sites.sort_by_key(|site| site.address);
    replaced.sort_by_key(|replaced| replaced.address);
    replaced.dedup();
    Ok((sites, replaced))
}

/// What an alternative replaces, if those are no-operations in text that stays.
fn replaced(sections: &[Section<'_>], alternative: &Alternative) -> Option<Replaced> {
    let &Alternative { address, replaced, .. } = alternative;
    let section = sections.iter().find(|section| section.linear.contains(&address))?;
    let start = (address - section.linear.start) as usize;
    let bytes = section.bytes.get(start..start + usize::from(replaced))?;
    let idle = !bytes.is_empty() && sweep::is_idle(bytes) && !is_initial(section.name);
    idle.then(|| Replaced { address, bytes: bytes.to_vec() })
}

/// Where the file wants what is linked to `linear`.
fn physical_of(elf: &File<'_>, linear: u64) -> u64 {
    let endian = elf.endian();
    let headers = elf.elf_program_headers().iter();
    let offset =
        headers.filter(|header| header.p_type(endian) == object::elf::PT_LOAD).find_map(|header| {
            let offset = linear.checked_sub(header.p_vaddr(endian))?;
            (offset < header.p_memsz(endian)).then(|| offset + header.p_paddr(endian))
        });
    offset.unwrap_or(linear)
}

/// The first bytes that the file puts at a guest-physical address.
fn bytes_at_physical(elf: &File<'_>, file: &[u8], physical: u64) -> Vec<u8> {
    let endian = elf.endian();
    let headers = elf.elf_program_headers().iter();
    let bytes =
        headers.filter(|header| header.p_type(endian) == object::elf::PT_LOAD).find_map(|header| {
            let offset = physical.checked_sub(header.p_paddr(endian))?;
            let left = header.p_filesz(endian).checked_sub(offset)?.min(ENTRY_BYTES);
            let start = usize::try_from(header.p_offset(endian).checked_add(offset)?).ok()?;
            file.get(start..start + usize::try_from(left).ok()?)
        });
    bytes.unwrap_or_default().to_vec()
}
