//! `vmlinux`: an ELF executable whose physical addresses say where it goes.

use std::fs::File;

use linux_loader::elf::{self, Elf64_Ehdr, Elf64_Phdr};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{KernelError, LoadedKernel, check_in_file, check_in_ram, read_struct};
use crate::image::{ImagePlacement, place};
use crate::layout::HIMEM;

/// Kernels have about five program headers.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// linux-loader walks the notes one by one.
const MAX_NOTES: u64 = 64 << 10;

pub(super) fn load(
    mem: &GuestMemoryMmap,
    mut file: &File,
    size: u64,
    how: ImagePlacement,
) -> Result<LoadedKernel, KernelError> {
    let header: Elf64_Ehdr = read_struct(file, size, 0, "ELF header")?;
    check_header(&header)?;
    let segments = read_segments(file, size, &header)?;
    let end = check_segments(mem, &segments, header.e_entry)?;

    match how {
        ImagePlacement::Copy => {
            Elf::load(mem, None, &mut file, Some(HIMEM)).map_err(KernelError::Load)?;
        }
        ImagePlacement::MapPrivate => {
            for segment in &segments {
                place(mem, file, segment.p_offset, GuestAddress(segment.p_paddr), segment.p_filesz, how)
                    .map_err(KernelError::Place)?;
            }
        }
    }
    Ok(LoadedKernel { entry: GuestAddress(header.e_entry), setup_header: None, end: GuestAddress(end) })
}

fn check_header(header: &Elf64_Ehdr) -> Result<(), KernelError> {
    let wrong = |what: String| Err(KernelError::WrongMachine { what });
    if header.e_ident[elf::EI_CLASS] != elf::ELFCLASS64 {
        return wrong("32-bit machines".to_owned());
    }
    if header.e_ident[elf::EI_DATA] != elf::ELFDATA2LSB {
        return wrong("big-endian machines".to_owned());
    }
    if header.e_machine != elf::EM_X86_64 {
        return wrong(format!("machine number {}", header.e_machine));
    }
    if header.e_type != elf::ET_EXEC {
        return Err(KernelError::WrongType { e_type: header.e_type });
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(KernelError::Malformed { what: "the size of its ELF program headers" });
    }
    if header.e_phnum == 0 || header.e_phnum > MAX_PROGRAM_HEADERS {
        return Err(KernelError::Malformed { what: "the number of its ELF program headers" });
    }
    if header.e_phoff < size_of::<Elf64_Ehdr>() as u64 {
        return Err(KernelError::Malformed { what: "the place of its ELF program headers" });
    }
    Ok(())
}

/// The segments to load, each checked against the file.
fn read_segments(file: &File, size: u64, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, KernelError> {
    let mut segments = Vec::new();
    for index in 0..u64::from(header.e_phnum) {
        // Cannot overflow: at most 64 times 56 bytes beyond an offset that is checked first.
        check_in_file(header.e_phoff, 0, size, "ELF program headers")?;
        let offset = header.e_phoff + index * size_of::<Elf64_Phdr>() as u64;
        let segment: Elf64_Phdr = read_struct(file, size, offset, "ELF program headers")?;
        match segment.p_type {
            elf::PT_LOAD if segment.p_memsz > 0 || segment.p_filesz > 0 => {
                check_in_file(segment.p_offset, segment.p_filesz, size, "ELF segment")?;
                if segment.p_filesz > segment.p_memsz {
                    return Err(KernelError::Malformed {
                        what: "an ELF segment larger in file than in memory",
                    });
                }
                segments.push(segment);
            }
            elf::PT_NOTE => {
                check_in_file(segment.p_offset, segment.p_filesz, size, "ELF notes")?;
                if segment.p_filesz > MAX_NOTES {
                    return Err(KernelError::Malformed { what: "ELF notes larger than 64 KiB" });
                }
            }
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(KernelError::Malformed { what: "no ELF segment to load" });
    }
    Ok(segments)
}

/// Checks that every segment lies in RAM, that none overlaps another, and that the entry is in one; gives
/// the end of the last one.
fn check_segments(mem: &GuestMemoryMmap, segments: &[Elf64_Phdr], entry: u64) -> Result<u64, KernelError> {
    let mut ranges = segments
        .iter()
        .map(|s| Ok((s.p_paddr, check_in_ram(mem, s.p_paddr, s.p_memsz)?)))
        .collect::<Result<Vec<_>, KernelError>>()?;
    ranges.sort_unstable();
    let mut end = 0;
    for (start, segment_end) in &ranges {
        if *start < end {
            return Err(KernelError::Overlap { start: *start, with: "another of its segments" });
        }
        end = *segment_end;
    }
    if !ranges.iter().any(|(start, end)| (*start..*end).contains(&entry)) {
        return Err(KernelError::Malformed { what: "its entry point is in none of its segments" });
    }
    Ok(end)
}
