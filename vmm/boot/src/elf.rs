//! ELF32 and ELF64 executables for x86: headers, loadable segments, the PVH note.
//!
//! linux-loader's ELF loader reads ELF64 only and reports every fault alike; kernels of the
//! multiboot and PVH protocols are often ELF32, and each fault deserves its own line.

use super::error::BootError;
use super::placement::Placement;

const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const ET_REL: u16 = 1;
const ET_CORE: u16 = 4;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
/// The note's type that holds the 32-bit PVH entry point; its name is `Xen`.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

const FORMAT: &str = "ELF";

/// One program header.
#[derive(Clone, Copy, Debug)]
struct ProgramHeader {
    kind: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

/// A parsed file, whose every segment lies within it.
#[derive(Debug)]
pub(super) struct Elf<'a> {
    file: &'a [u8],
    class_64: bool,
    entry: u64,
    headers: Vec<ProgramHeader>,
}

/// Where the headers of one class keep what is needed.
struct Layout {
    entry: usize,
    header_offset: usize,
    header_size_field: usize,
    header_bytes: u64,
}

const LAYOUT_32: Layout =
    Layout { entry: 24, header_offset: 28, header_size_field: 42, header_bytes: 32 };
const LAYOUT_64: Layout =
    Layout { entry: 24, header_offset: 32, header_size_field: 54, header_bytes: 56 };

/// Whether the file says that it is an ELF.
pub(super) fn has_magic(file: &[u8]) -> bool {
    file.starts_with(b"\x7fELF")
}

fn malformed(what: &'static str) -> BootError {
    BootError::Malformed { format: FORMAT, what }
}

fn foreign(found: &'static str, advice: &'static str) -> BootError {
    BootError::Foreign { what: "kernel", found, advice }
}

/// Little-endian fields of a file, whose absence means that it is truncated.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, offset: usize) -> Result<[u8; N], BootError> {
        offset
            .checked_add(N)
            .and_then(|end| self.0.get(offset..end))
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(BootError::Truncated {
                format: FORMAT,
                needed_bytes: (offset as u64).saturating_add(N as u64),
                file_bytes: self.0.len() as u64,
            })
    }

    fn u16(&self, offset: usize) -> Result<u16, BootError> {
        self.bytes(offset).map(u16::from_le_bytes)
    }

    fn u32(&self, offset: usize) -> Result<u32, BootError> {
        self.bytes(offset).map(u32::from_le_bytes)
    }

    fn u64(&self, offset: usize) -> Result<u64, BootError> {
        self.bytes(offset).map(u64::from_le_bytes)
    }

    /// An address-sized field.
    fn word(&self, class_64: bool, offset: usize) -> Result<u64, BootError> {
        if class_64 { self.u64(offset) } else { self.u32(offset).map(u64::from) }
    }
}

impl<'a> Elf<'a> {
    /// Parses a file that [`has_magic`].
    ///
    /// # Errors
    /// Truncated, damaged, or for another machine or purpose.
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, BootError> {
        let fields = Fields(file);
        let [class, data] = fields.bytes(4)?;
        let class_64 = match class {
            1 => false,
            2 => true,
            _ => return Err(malformed("its class is neither 32 nor 64 bits")),
        };
        if data != 1 {
            return Err(foreign("a big-endian ELF", "give a kernel for x86-64"));
        }
        match fields.u16(16)? {
            ET_REL => {
                return Err(foreign("an object file or a kernel module", "link it into a kernel"));
            }
            ET_CORE => return Err(foreign("a core dump", "give a kernel")),
            _ => {}
        }
        if !matches!(fields.u16(18)?, EM_386 | EM_X86_64) {
            return Err(foreign("an ELF for another CPU", "give a kernel for x86-64"));
        }
        let layout = if class_64 { LAYOUT_64 } else { LAYOUT_32 };
        let entry = fields.word(class_64, layout.entry)?;
        let header_offset = fields.word(class_64, layout.header_offset)?;
        let header_bytes = u64::from(fields.u16(layout.header_size_field)?);
        let header_count = u64::from(fields.u16(layout.header_size_field + 2)?);
        if header_count == 0 {
            return Err(malformed("it has no program headers"));
        }
        if header_bytes < layout.header_bytes {
            return Err(malformed("its program headers are too short"));
        }
        let headers = (0..header_count)
            .map(|index| {
                let at = header_offset.saturating_add(index * header_bytes);
                program_header(&fields, class_64, usize::try_from(at).unwrap_or(usize::MAX))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let elf = Self { file, class_64, entry, headers };
        elf.check_segments()?;
        Ok(elf)
    }

    fn check_segments(&self) -> Result<(), BootError> {
        if self.headers.iter().any(|header| header.kind == PT_INTERP) {
            return Err(foreign("a program for an operating system", "give a kernel"));
        }
        for header in self.loadable() {
            let needed_bytes = header.offset.saturating_add(header.file_bytes);
            let file_bytes = self.file.len() as u64;
            if needed_bytes > file_bytes {
                return Err(BootError::Truncated { format: FORMAT, needed_bytes, file_bytes });
            }
            if header.memory_bytes < header.file_bytes {
                return Err(malformed("a segment is larger in the file than in memory"));
            }
        }
        if self.loadable().next().is_none() {
            return Err(malformed("it has nothing to load"));
        }
        Ok(())
    }

    /// ELF64, as opposed to ELF32.
    pub(super) fn is_64_bit(&self) -> bool {
        self.class_64
    }

    /// The physical address of the entry point.
    ///
    /// # Errors
    /// The entry point lies in no segment.
    pub(super) fn entry(&self) -> Result<u64, BootError> {
        let within = |start: u64, header: &ProgramHeader| {
            self.entry.checked_sub(start).filter(|offset| *offset < header.memory_bytes)
        };
        if self.loadable().any(|header| within(header.physical_address, header).is_some()) {
            return Ok(self.entry);
        }
        self.loadable()
            .find_map(|header| {
                let offset = within(header.virtual_address, header)?;
                header.physical_address.checked_add(offset)
            })
            .ok_or(malformed("its entry point lies in none of its segments"))
    }

    /// The PVH entry point, if the file has one.
    ///
    /// # Errors
    /// The note is there and damaged.
    pub(super) fn pvh_entry(&self) -> Result<Option<u32>, BootError> {
        for header in self.headers.iter().filter(|header| header.kind == PT_NOTE) {
            let notes = usize::try_from(header.offset)
                .ok()
                .and_then(|start| self.file.get(start..))
                .map(|rest| &rest[..rest.len().min(header.file_bytes as usize)]);
            if let Some(entry) = notes.map(find_pvh_note).transpose()?.flatten() {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// Copies every segment to its physical address.
    ///
    /// # Errors
    /// A segment lies outside RAM.
    pub(super) fn load(&self, placement: &mut Placement<'_>) -> Result<(), BootError> {
        for header in self.loadable() {
            placement.claim("kernel", header.physical_address, header.memory_bytes)?;
            // `check_segments` has seen that the file holds this range.
            let start = header.offset as usize;
            let bytes = &self.file[start..start + header.file_bytes as usize];
            placement.write(header.physical_address, bytes);
        }
        Ok(())
    }

    fn loadable(&self) -> impl Iterator<Item = &ProgramHeader> {
        self.headers.iter().filter(|header| header.kind == PT_LOAD && header.memory_bytes > 0)
    }
}

fn program_header(
    fields: &Fields<'_>,
    class_64: bool,
    at: usize,
) -> Result<ProgramHeader, BootError> {
    let word = |index: usize| {
        let offset = if class_64 { 8 * (index + 1) } else { 4 * (index + 1) };
        fields.word(class_64, at.saturating_add(offset))
    };
    // Both classes have type, then offset, virtual and physical address, file and memory size in
    // this order; ELF64 keeps its flags beside the type.
    Ok(ProgramHeader {
        kind: fields.u32(at)?,
        offset: word(0)?,
        virtual_address: word(1)?,
        physical_address: word(2)?,
        file_bytes: word(3)?,
        memory_bytes: word(4)?,
    })
}

/// Looks through a note segment for the PVH entry point.
fn find_pvh_note(notes: &[u8]) -> Result<Option<u32>, BootError> {
    let fields = Fields(notes);
    let mut at = 0;
    while at + 12 <= notes.len() {
        let name_bytes = fields.u32(at)? as usize;
        let value_bytes = fields.u32(at + 4)? as usize;
        let kind = fields.u32(at + 8)?;
        let name_at = at + 12;
        let value_at = name_at + name_bytes.next_multiple_of(4);
        let is_xen = name_bytes == 4 && notes.get(name_at..name_at + 4) == Some(b"Xen\0");
        if is_xen && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            if value_bytes < 4 {
                return Err(malformed("its PVH note is too short"));
            }
            return fields
                .u32(value_at)
                .map(Some)
                .map_err(|_| malformed("its PVH note is cut off"));
        }
        at = value_at + value_bytes.next_multiple_of(4);
    }
    Ok(None)
}
