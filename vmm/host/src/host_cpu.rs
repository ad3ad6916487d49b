//! What this host is, for a recording's header.

use std::arch::x86_64::{__cpuid, CpuidResult};

use reprise_trace::header::HostInfo;

/// This host's CPU and kernel.
pub fn host_info() -> HostInfo {
    let (vendor, highest_leaf) = vendor();
    let signature = if highest_leaf >= 1 { __cpuid(1).eax } else { 0 };
    let (cpu_family, cpu_model, cpu_stepping) = decode_signature(signature);
    let kernel_release = std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".to_owned(), |release| release.trim().to_owned());
    HostInfo {
        cpu_vendor: vendor,
        cpu_family,
        cpu_model,
        cpu_stepping,
        cpu_brand: brand(),
        kernel_release,
    }
}

/// Leaf 0: the vendor in EBX, EDX, ECX, and the highest leaf.
fn vendor() -> (String, u32) {
    let CpuidResult { eax, ebx, ecx, edx } = __cpuid(0);
    (text(&[ebx, edx, ecx]), eax)
}

/// Leaves 0x80000002 to 0x80000004: 48 characters.
fn brand() -> String {
    if __cpuid(0x8000_0000).eax < 0x8000_0004 {
        return "unknown".to_owned();
    }
    let words: Vec<u32> = (0x8000_0002..=0x8000_0004)
        .flat_map(|leaf| {
            let CpuidResult { eax, ebx, ecx, edx } = __cpuid(leaf);
            [eax, ebx, ecx, edx]
        })
        .collect();
    text(&words)
}

fn text(words: &[u32]) -> String {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_owned()
}

/// Leaf 1's EAX as (family, model, stepping): the extended family counts from family 15, the
/// extended model in families 6 and 15.
fn decode_signature(eax: u32) -> (u32, u32, u32) {
    let base_family = eax >> 8 & 0xf;
    let family = if base_family == 15 { base_family + (eax >> 20 & 0xff) } else { base_family };
    let base_model = eax >> 4 & 0xf;
    let has_extended_model = base_family == 6 || base_family == 15;
    let model = if has_extended_model { base_model | (eax >> 12 & 0xf0) } else { base_model };
    (family, model, eax & 0xf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_decode_with_extended_fields() {
        // Intel Sapphire Rapids, AMD Zen 4, Intel Pentium 4, Pentium III and 486.
        assert_eq!(decode_signature(0x000806f8), (6, 0x8f, 8));
        assert_eq!(decode_signature(0x00a60f12), (0x19, 0x61, 2));
        assert_eq!(decode_signature(0x00000f29), (15, 2, 9));
        assert_eq!(decode_signature(0x00000683), (6, 8, 3));
        assert_eq!(decode_signature(0x00000435), (4, 3, 5));
    }

    #[test]
    fn this_host_has_a_name() {
        let host = host_info();
        assert!(!host.cpu_vendor.is_empty() && !host.kernel_release.is_empty(), "{host:?}");
    }
}
