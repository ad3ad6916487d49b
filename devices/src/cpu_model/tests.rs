//! What a guest reads, register by register.

use alloc::vec::Vec;

use super::*;

fn bytes(registers: &[u32]) -> Vec<u8> {
    registers.iter().flat_map(|register| register.to_le_bytes()).collect()
}

#[test]
fn the_texts_read_right() {
    let [max, ebx, ecx, edx] = cpuid(0, 0);
    assert_eq!((max, &bytes(&[ebx, edx, ecx])[..]), (7, &b"GenuineIntel"[..]));
    let [max, ebx, ecx, edx] = cpuid(0x4000_0000, 0);
    assert_eq!((max, &bytes(&[ebx, ecx, edx])[..]), (0x4000_0000, &b"RepriseVMM\0\0"[..]));
    let brand: Vec<u8> =
        (0x8000_0002..=0x8000_0004).flat_map(|leaf| bytes(&cpuid(leaf, 0))).collect();
    let mut expected = b"Reprise x86-64-v2".to_vec();
    expected.resize(48, 0);
    assert_eq!(brand, expected);
}

#[test]
fn family_model_and_features_are_as_the_name_says() {
    let [signature, ebx, ecx, edx] = cpuid(1, 0);
    assert_eq!(signature, 0x0001_06a3);
    assert_eq!(ebx, 0x0000_0800);
    let has = |register: u32, bit: u32| register & (1 << bit) != 0;
    // x86-64-v2: SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT; then what is left out: PCLMUL, MONITOR,
    // PCID, x2APIC, AES, XSAVE, OSXSAVE, AVX, RDRAND.
    assert!([0, 9, 13, 19, 20, 23].iter().all(|&bit| has(ecx, bit)));
    assert!(![1, 3, 17, 21, 25, 26, 27, 28, 30].iter().any(|&bit| has(ecx, bit)));
    assert!(has(ecx, 31), "a hypervisor");
    // VME, MCE, APIC, MTRR, MCA.
    assert!(![1, 7, 9, 12, 14].iter().any(|&bit| has(edx, bit)));
    assert!([0, 4, 5, 6, 8, 15, 24, 25, 26].iter().all(|&bit| has(edx, bit)));
    assert_eq!(cpuid(7, 0), [0, 1 << 7 | 1 << 13 | 1 << 20, 0, 0]);
    assert_eq!(cpuid(0x8000_0001, 0), [0, 0, 1, 1 << 11 | 1 << 20 | 1 << 29]);
    assert_eq!(cpuid(0x8000_0008, 0)[0], 0x3028);
}

#[test]
fn subleaves_count_only_where_they_do() {
    assert_eq!(cpuid(1, 5), cpuid(1, 0));
    assert_eq!(cpuid(7, 1), [0; 4]);
    let kinds: Vec<u32> = (0..5).map(|index| cpuid(4, index)[0] & 0xff).collect();
    assert_eq!(kinds, [0x21, 0x22, 0x43, 0x63, 0x00]);
    let sizes_kib: Vec<u32> = (0..4)
        .map(|index| {
            let [_, ebx, ecx, _] = cpuid(4, index);
            ((ebx >> 22) + 1) * ((ebx & 0xfff) + 1) * (ecx + 1) / 1024
        })
        .collect();
    assert_eq!(sizes_kib, [32, 32, 256, 8192]);
}

#[test]
fn leaves_out_of_range_give_the_highest_basic_one() {
    for leaf in [8, 0xb, 0x15, 0x3fff_ffff, 0x4000_0001, 0x4000_0100, 0x8000_0009, u32::MAX] {
        assert_eq!(cpuid(leaf, 0), cpuid(7, 0), "{leaf:x}");
        assert_eq!(cpuid(leaf, 1), [0; 4], "{leaf:x}");
    }
    for leaf in [3, 5, 6, 0x8000_0005] {
        assert_eq!(cpuid(leaf, 0), [0; 4], "{leaf:x}");
    }
}

#[test]
fn the_tables_are_ordered() {
    assert!(LEAVES.is_sorted_by(|a, b| (a.leaf, a.subleaf) < (b.leaf, b.subleaf)));
    assert!(MSRS.is_sorted_by(|a, b| a.index < b.index));
    assert_eq!(msr(0x1a0).map(|msr| msr.value & 1), Some(1));
    assert_eq!(msr(0x1a1), None);
}
