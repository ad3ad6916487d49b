/* Entry of hello32, a multiboot 1 kernel that stays in 32-bit protected mode: EAX holds the
 * loader's magic number, EBX the information structure. */

    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002
    .long 0
    .long -0x1badb002

    .text
    .globl multiboot_entry
multiboot_entry:
    mov $stack_end, %esp
    push %ebx
    push %eax
    call kernel_main
1:  cli
    hlt
    jmp 1b

    .bss
    .balign 16
    .skip 4096
stack_end:

    .section .note.GNU-stack, "", @progbits
