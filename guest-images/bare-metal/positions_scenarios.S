/* The loops of `positions`, each endless: the last interrupt leads to scenario_end. They are assembly
 * so that where an interrupt may land does not hang on the compiler. */

#define SMALL_PAGES 0x1000000
#define PAGE_BYTES 0x1000
#define USER_CODE 0x33
#define USER_DATA 0x2b
#define RFLAGS_OPEN 0x202
#define PAGE_ACCESSED 0x20
/* Large pages from here on lie behind what the guest uses. */
#define FIRST_UNUSED 16

    .text
    .globl scenario_end, page_fault_entry, undefined_entry, system_call_entry

/* Saves what a C caller wants back, and clears what the loops count in. */
.macro begin name
    .globl scenario_\name
scenario_\name:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, scenario_stack(%rip)
    xor %eax, %eax
    xor %ebx, %ebx
    xor %ecx, %ecx
    xor %edx, %edx
    xor %esi, %esi
    xor %edi, %edi
    xor %ebp, %ebp
.endm

scenario_end:
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

/* A REP MOVS over pages that are not there, on both sides. */
    begin rep
    sti
1:  mov $1, %edi
    call page_remove
    mov $9, %edi
    call page_remove
    mov $SMALL_PAGES + 0xfc0, %esi
    mov $SMALL_PAGES + 0x8f80, %edi
    mov $PAGE_BYTES + 0x140, %ecx
    rep movsb
    inc %rbx
    mov $SMALL_PAGES + 0x20f0, %edi
    mov $700, %ecx
    mov %rbx, %rax
    rep stosq
    jmp 1b

/* No conditional branch; registers tell the rounds apart. */
    begin straight
    sti
1:  inc %rax
    lea 3(%rax, %rbx, 2), %rbx
    xor %rbx, %rdx
    push %rdx
    pop %rsi
    jmp 1b

/* The shortest loop. */
    begin itself
    sti
1:  jmp 1b

/* No conditional branch, and only memory tells the rounds apart. */
    begin memory
    sti
1:  mov $1, %eax
    lock xadd %rax, rounds(%rip)
    xor %eax, %eax
    jmp 1b

/* Interrupt shadows. */
    begin shadow
1:  cli
    inc %rax
    sti
    inc %rbx
    mov %ss, %ecx
    mov %ecx, %ss
    inc %rdx
    cli
    mov %ecx, %ss
    sti
    mov %ecx, %ss
    add %rax, %rbx
    test $3, %al
    jnz 1b
    sti
    sti
    inc %rsi
    jmp 1b

/* HLT, right behind STI and alone. */
    begin hlt
1:  cli
    inc %rax
    sti
    hlt
    inc %rbx
    hlt
    add %rax, %rbx
    jmp 1b

/* Instructions that fault, and start again or are passed over. */
    begin fault
    sti
1:  mov $3, %edi
    call page_remove
    inc %rbx
    add SMALL_PAGES + 0x3008, %rbx
    ud2
    inc %rbp
    mov %rbx, SMALL_PAGES + 0x3008
    ud2
    inc %rbp
    ud2
    inc %rbp
    jmp 1b

/* Interrupts are closed most of the time, so that each waits for its window. */
    begin window
1:  cli
    mov $3000, %ecx
2:  lea 1(%rax, %rax, 2), %rax
    dec %ecx
    jnz 2b
    sti
    inc %rbx
    inc %rbx
    cli
    pushf
    orl $0x200, (%rsp)
    inc %rdx
    popf
    inc %rdx
    jmp 1b

/* Back and forth between CPL3 and CPL0. */
    begin user
    push $USER_DATA
    mov $user_stack_end, %eax
    push %rax
    push $RFLAGS_OPEN
    push $USER_CODE
    mov $user_code, %eax
    push %rax
    xor %eax, %eax
    iretq
user_code:
    inc %rbx
    syscall
    inc %rbp
    int $4
    test $7, %bl
    jnz user_code
    ud2
    push %rbx
    pop %r12
    jmp user_code
system_call_entry:
    inc %r13
    mov %rsp, %r14
    mov $system_call_stack_end, %esp
    push %rcx
    add %r11, (%rsp)
    pop %r15
    mov %r14, %rsp
    sysretq

/* Code that changes right before it runs. */
    begin code
    sti
1:  mov %al, changed + 1(%rip)
changed:
    mov $0, %dl
    movzx %dl, %ecx
    add %rcx, %rbx
    inc %al
    test $15, %al
    jnz 1b
    mov %bl, changed_too + 3(%rip)
    jmp changed_too
changed_too:
    add $0, %rsi
    jmp 1b

/* String instructions on ports: the UART's bytes, its line status, and the port that does nothing. Both
 * pages of the buffer are there. */
    begin ports
    sti
1:  inc %rbx
    mov $0x3f8, %edx
    mov $SMALL_PAGES + 0x4ffa, %edi
    mov $12, %ecx
    rep insb
    mov $0x3fd, %edx
    mov $SMALL_PAGES + 0x5ff8, %edi
    mov $20, %ecx
    rep insb
    mov $0x80, %edx
    mov $SMALL_PAGES + 0x4ff0, %esi
    mov $30, %ecx
    rep outsb
    mov $5, %ecx
    rep outsw
    std
    mov $SMALL_PAGES + 0x6002, %edi
    mov $0x3fd, %edx
    mov $9, %ecx
    rep insb
    cld
    jmp 1b

/* Accessed bits of pages that nothing here uses, seen and cleared: where one is set, the CPU went ahead of the
 * program. */
    begin accessed
    sti
1:  mov $page_directory_first_gib + FIRST_UNUSED * 8, %edi
    mov $512 - FIRST_UNUSED, %ecx
2:  testb $PAGE_ACCESSED, (%rdi)
    jz 3f
    andb $~PAGE_ACCESSED, (%rdi)
    add %rdi, %rbx
3:  add $8, %rdi
    dec %ecx
    jnz 2b
    jmp 1b

/* #PF: the page is made present, everything else is left as it was. */
page_fault_entry:
    push %rax
    push %rcx
    push %rdx
    push %rbx
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    call page_fault_handler
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rbx
    pop %rdx
    pop %rcx
    pop %rax
    add $8, %rsp
    iretq

/* #UD: passes over the UD2. */
undefined_entry:
    addq $2, (%rsp)
    iretq

    .data
    .balign 8
rounds:
    .quad 0

    .bss
    .balign 16
    .skip 1024
user_stack_end:
    .skip 1024
system_call_stack_end:

    .section .note.GNU-stack, "", @progbits
