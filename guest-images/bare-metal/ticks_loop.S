/* The loop that the timer interrupts. It is assembly so that its instructions, and with them the
 * positions that can be told apart, do not hang on the compiler. Every flag that the manual leaves
 * undefined is kept out of sight: AF is never mixed, and between the labels flags_undefined and
 * flags_defined, where DIV leaves them all undefined, no status flag is. */

    .text
    .globl ticks_loop, flags_undefined, flags_defined

/* ticks_loop(poll: EDI, remaining: RSI): counts until *remaining is zero, and writes PORT_DELAY
 * every `poll` rounds. Returns the number of rounds. */
ticks_loop:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %edi, %r14d /* rounds between polls */
    mov %edi, %ebp /* rounds until the next poll */
    mov %rsi, %r15
    xor %edx, %edx
    xor %r8d, %r8d /* rounds */
    xor %r9d, %r9d /* accumulators */
    xor %r10d, %r10d
    mov $1, %r11d
    mov $0x5bd1e995, %r12d
    xor %r13d, %r13d

round:
    add $1, %r8
    lea 1(%r9, %r9, 4), %r9
    add %r8, %r9
    adc $0, %r10

    /* Memory: one cell of the table is read and changed. */
    mov %r9d, %eax
    and $0x1f8, %eax
    add %r11, table(%rax)
    mov table(%rax), %rbx
    sub %r8, %rbx

    /* A branch that goes both ways, and a conditional move. */
    test $4, %r9b
    jz even
    sub %rbx, %r11
    inc %r13
    jmp joined
even:
    add %r10, %r11
    neg %r11
joined:
    cmp %r12, %r11
    cmovb %rbx, %r12

    /* A string instruction, seventeen times interruptible. */
    mov $source, %esi
    mov $copy, %edi
    mov $17, %ecx
    rep movsb
    mov copy(%rip), %rbx
    add %rbx, source(%rip)
    push %r11
    add %r9, (%rsp)
    pop %r11

    /* A division; whatever it leaves in the flags is overwritten by the ADD behind it. */
    mov %r9d, %eax
    mov $97, %ecx
    and $1, %edx
    div %ecx
flags_undefined:
    lea (%rdx, %rax), %rbx
    add %rbx, %r10
flags_defined:

    dec %ebp
    jnz no_poll
    mov %r14d, %ebp
    out %al, $0x80
no_poll:
    cmpl $0, (%r15)
    jne round

    mov %r8, %rax
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .data
    .balign 8
source:
    .ascii "position position"
    .balign 8

    .bss
    .balign 8
copy:
    .skip 24
    .balign 8
table:
    .skip 64 * 8

    .section .note.GNU-stack, "", @progbits
