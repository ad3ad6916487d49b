//! The embedded guests' kernels, which have no unwind table.

use reprise_guest_images::{EMBEDDED, embedded};
use reprise_time_stamp_sites::{Evidence, Instruction, KernelText, SitesError};

#[test]
fn computes_kernel_reads_it_once_and_its_user_code_is_left_out() {
    let image = embedded("compute").expect("it is listed").image;
    let kernel = KernelText::of_image(image).expect("it has sections");
    let sites: Vec<_> = kernel.sites_of(Instruction::ReadTimeStamp).collect();
    assert_eq!(sites.len(), 1, "{sites:x?}");
    assert_eq!(sites[0].evidence, Evidence::Section);
    // Its boot code writes CR4 once, and its kernel once more.
    assert_eq!(kernel.sites_of(Instruction::WriteControl4).count(), 2);
    assert!(kernel.text.iter().all(|text| !text.name.starts_with(".user")));
    let text = &kernel.text[0];
    assert!(text.linear.contains(&sites[0].address));
    assert_eq!(text.physical, text.linear.start, "it is mapped where it lies");
    assert_eq!(kernel.entry_bytes.len(), 32);
}

#[test]
fn the_others_read_it_nowhere() {
    for guest in EMBEDDED.iter().filter(|guest| !["compute", "hello32"].contains(&guest.name)) {
        let kernel = KernelText::of_image(guest.image).expect(guest.name);
        assert_eq!(kernel.sites_of(Instruction::ReadTimeStamp).count(), 0, "{}", guest.name);
        assert!(kernel.patched.is_empty());
    }
}

#[test]
fn what_is_no_kernel_is_told_in_one_line() {
    let image = embedded("compute").expect("it is listed").image;
    assert_eq!(KernelText::of_image(&[]), Err(SitesError::NoSections));
    assert_eq!(KernelText::of_image(b"\x7fELF"), Err(SitesError::NoSections));
    for length in (0..image.len()).step_by(97) {
        // Whatever comes of it, it comes without a panic.
        let _ = KernelText::of_image(&image[..length]);
    }
    let mut packed = vec![0; 0x1000];
    packed[0x1f1] = 1;
    packed[0x202..0x206].copy_from_slice(b"HdrS");
    packed[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    packed[0x24c] = 0x20;
    packed[0x400..0x403].copy_from_slice(b"BZh");
    assert_eq!(KernelText::of_image(&packed), Err(SitesError::Packing("bzip2")));
    packed[0x400..0x403].copy_from_slice(&[0x1f, 0x8b, 8]);
    assert_eq!(KernelText::of_image(&packed), Err(SitesError::Damaged("packed payload")));
    packed[0x24e] = 0xff;
    assert_eq!(KernelText::of_image(&packed), Err(SitesError::Damaged("setup header")));
}
