/* Entry of the 64-bit guests. A loader enters in 32-bit protected mode without paging, by one of
 * two protocols:
 *   PVH (the Xen "x86/HVM direct boot ABI"): EBX holds the start info, found by an ELF note;
 *   multiboot 1 (guests assembled with MULTIBOOT defined): EAX holds the magic number, EBX the
 *   information structure.
 * From there to long mode with page tables of our own, and into kernel_main(command line). */

#define PVH_MAGIC 0x336ec578
#define PVH_COMMAND_LINE 24
#define MULTIBOOT_HEADER_MAGIC 0x1badb002
#define MULTIBOOT_LOADER_MAGIC 0x2badb002
#define MULTIBOOT_HAS_COMMAND_LINE 0x4
#define MULTIBOOT_COMMAND_LINE 16
/* Bit 16: the header's addresses say what to load where (a 64-bit ELF is not multiboot's own). */
#define MULTIBOOT_FLAGS 0x10000

#define CR0_SET 0x80010023 /* PG, WP, NE, MP, PE */
#define CR0_CLEAR 0xc /* TS, EM */
#define CR4_SET 0x620 /* OSXMMEXCPT, OSFXSR, PAE */
#define MSR_EFER 0xc0000080
#define EFER_LME 0x100

#define KERNEL_CODE 0x10
#define KERNEL_DATA 0x18
#define TASK_STATE 0x40

    .section .note.pvh, "a", @note
    .balign 4
    .long 4 /* name's length */
    .long 4 /* value's length */
    .long 18 /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long pvh_entry

#ifdef MULTIBOOT
    .section .multiboot, "a"
    .balign 4
multiboot_header:
    .long MULTIBOOT_HEADER_MAGIC
    .long MULTIBOOT_FLAGS
    .long -(MULTIBOOT_HEADER_MAGIC + MULTIBOOT_FLAGS)
    .long multiboot_header
    .long kernel_start
    .long kernel_file_end
    .long kernel_end
    .long pvh_entry
#endif

    .text
    .code32
    .globl pvh_entry
pvh_entry:
    cld
    xor %edi, %edi
    cmp $MULTIBOOT_LOADER_MAGIC, %eax
    je from_multiboot
    cmpl $PVH_MAGIC, (%ebx)
    jne enter_long_mode
    mov PVH_COMMAND_LINE(%ebx), %edi
    jmp enter_long_mode
from_multiboot:
    testl $MULTIBOOT_HAS_COMMAND_LINE, (%ebx)
    jz enter_long_mode
    mov MULTIBOOT_COMMAND_LINE(%ebx), %edi
enter_long_mode:
    mov %cr4, %eax
    or $CR4_SET, %eax
    mov %eax, %cr4
    mov $page_map_level_4, %eax
    mov %eax, %cr3
    mov $MSR_EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov %cr0, %eax
    and $~CR0_CLEAR, %eax
    or $CR0_SET, %eax
    mov %eax, %cr0
    lgdt descriptor_table_pointer
    ljmp $KERNEL_CODE, $long_mode

    .code64
long_mode:
    mov $KERNEL_DATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov $kernel_stack_end, %esp

    /* The descriptor of the task state segment holds its address in three pieces. */
    mov $task_state, %eax
    mov %ax, task_state_descriptor + 2(%rip)
    shr $16, %eax
    mov %al, task_state_descriptor + 4(%rip)
    mov %ah, task_state_descriptor + 7(%rip)
    mov $TASK_STATE, %eax
    ltr %ax

    xor %ebp, %ebp
    mov %edi, %edi
    call kernel_main
    call machine_end

/* Identity map in 2 MiB pages: the first GiB, and the page of the (absent) local APIC. All levels
 * but the last allow CPL3; user.c opens the last one for user pages. */
#define TABLE 0x7 /* user, writable, present */
#define PAGE 0x83 /* 2 MiB, writable, present */
#define APIC_PAGE 0xfee00000

    .section .tables, "aw"
    .balign 4096
page_map_level_4:
    .quad page_directory_pointers + TABLE
    .skip 511 * 8
page_directory_pointers:
    .quad page_directory_first_gib + TABLE
    .skip 2 * 8
    .quad page_directory_fourth_gib + TABLE
    .skip 508 * 8
    .globl page_directory_first_gib
page_directory_first_gib:
    .set address, 0
    .rept 512
    .quad address + PAGE
    .set address, address + 0x200000
    .endr
page_directory_fourth_gib:
    .skip ((APIC_PAGE - 0xc0000000) / 0x200000) * 8
    .quad APIC_PAGE + PAGE
    .balign 4096

/* Selectors as Linux lays them out: hypervisors that run CPL3 natively know these best. */
descriptor_table:
    .quad 0
    .quad 0
    .quad 0x00af9b000000ffff /* 0x10 kernel code */
    .quad 0x00cf93000000ffff /* 0x18 kernel data */
    .quad 0x00cffb000000ffff /* 0x20 user code, 32 bit (unused) */
    .quad 0x00cff3000000ffff /* 0x28 user data */
    .quad 0x00affb000000ffff /* 0x30 user code */
    .quad 0
task_state_descriptor: /* 0x40 */
    .quad 0x0000890000000067
    .quad 0
descriptor_table_end:

    .balign 8
descriptor_table_pointer:
    .word descriptor_table_end - descriptor_table - 1
    .long descriptor_table
    .long 0

    .balign 16
task_state:
    .long 0
    .quad interrupt_stack_end /* RSP0: from CPL3 */
    .quad 0, 0
    .quad 0
    .quad double_fault_stack_end /* IST1 */
    .quad 0, 0, 0, 0, 0, 0
    .quad 0
    .word 0
    .word 104 /* no I/O permission map */

    .bss
    .balign 16
    .skip 16384
kernel_stack_end:
    .skip 16384
interrupt_stack_end:
    .skip 4096
double_fault_stack_end:

    .section .note.GNU-stack, "", @progbits
