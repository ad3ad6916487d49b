/* One entry point a vector, 16 bytes apart; each makes the same frame (struct frame of machine.h)
 * and calls interrupt_handler. */

#define ENTRY_BYTES 16
#define VECTORS_WITH_ERROR_CODE 0x60227d00 /* 8, 10 to 14, 17, 21, 29, 30 */

    .text
    .balign ENTRY_BYTES
    .globl interrupt_entries
interrupt_entries:
    .set vector, 0
    .rept 48
    .balign ENTRY_BYTES
    .if (vector >= 32) || (((VECTORS_WITH_ERROR_CODE >> vector) & 1) == 0)
    push $0
    .endif
    push $vector
    jmp interrupt_common
    .set vector, vector + 1
    .endr

    .balign 16
interrupt_common:
    push %rax
    push %rcx
    push %rdx
    push %rbx
    push %rbp
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    cld
    mov %rsp, %rdi
    call interrupt_handler
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rbp
    pop %rbx
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

    .section .note.GNU-stack, "", @progbits
