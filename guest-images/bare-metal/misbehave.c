/* misbehave: does one of the things that a machine must take in its stride. Command line:
 * do=NAME; without one it prints the names. */

#include "machine.h"

#define UNMAPPED 0x123456789000 /* canonical, in no page table */
#define VIDEO_HOLE 0xa0000 /* nothing answers between 640 KiB and 768 KiB */
#define LOCAL_APIC 0xfee00000 /* mapped by start.S, absent from the machine */
#define LAST_PAGE_BELOW_4_GIB 0xfffff000
#define DEBUG_EXIT_VALUE 0x10
#define IDLE_HZ 100

void irq_handler(unsigned irq, struct frame *frame)
{
    (void)irq;
    (void)frame;
}

void system_call_handler(struct frame *frame)
{
    exception_end(frame);
}

static void forget_idt(void)
{
    static const struct __attribute__((packed)) {
        uint16_t limit;
        uint64_t base;
    } nothing = { 0, 0 };
    __asm__ volatile("lidt %0" : : "m"(nothing));
}

static void jump(uint64_t address)
{
    __asm__ volatile("jmp *%0" : : "r"(address));
}

static void triple_fault(void)
{
    forget_idt();
    __asm__ volatile("ud2");
}

static void double_fault(void)
{
    /* The page fault that the PUSH takes finds no stack either; the double fault has its own. */
    __asm__ volatile("mov %0, %%rsp; push %%rax" : : "r"((uint64_t)UNMAPPED));
}

static void divide(void)
{
    uint32_t low = 1, high = 0, divisor = 0;
    __asm__ volatile("div %2" : "+a"(low), "+d"(high) : "r"(divisor) : "cc");
}

static void wild_jump(void)
{
    jump(UNMAPPED);
}

static void wild_jump_no_idt(void)
{
    forget_idt();
    jump(UNMAPPED);
}

static void wild_jump_device(void)
{
    jump(LOCAL_APIC);
}

static void wild_page_tables(void)
{
    __asm__ volatile("mov %0, %%cr3" : : "r"((uint64_t)LAST_PAGE_BELOW_4_GIB) : "memory");
}

static void absent_ports(void)
{
    static const uint16_t ports[] = { 0x10, 0x170, 0x1f0, 0x2f8, 0x300, 0x3c0, 0xcfc, 0xffff };
    for (unsigned at = 0; at < sizeof ports / sizeof ports[0]; at++) {
        uint16_t port = ports[at];
        uint8_t byte;
        uint16_t word;
        uint32_t doubleword;
        __asm__ volatile("inb %1, %0" : "=a"(byte) : "Nd"(port));
        __asm__ volatile("inw %1, %0" : "=a"(word) : "Nd"(port));
        __asm__ volatile("inl %1, %0" : "=a"(doubleword) : "Nd"(port));
        print("port ");
        print_hexadecimal(port, 4);
        print(": ");
        print_hexadecimal(byte, 2);
        print(" ");
        print_hexadecimal(word, 4);
        print(" ");
        print_hexadecimal(doubleword, 8);
        print("\r\n");
        __asm__ volatile("outb %0, %1" : : "a"(byte), "Nd"(port));
        __asm__ volatile("outw %0, %1" : : "a"(word), "Nd"(port));
        __asm__ volatile("outl %0, %1" : : "a"(doubleword), "Nd"(port));
    }
    uint8_t buffer[8] = { 0 };
    void *place = buffer;
    uint64_t count = sizeof buffer;
    __asm__ volatile("rep insb" : "+D"(place), "+c"(count) : "d"(0x300) : "memory");
    place = buffer;
    count = sizeof buffer;
    __asm__ volatile("rep outsb" : "+S"(place), "+c"(count) : "d"(0x300) : "memory");
}

static void absent_memory(uint64_t address)
{
    volatile uint8_t *bytes = (volatile uint8_t *)address;
    print("memory ");
    print_hexadecimal(address, 8);
    print(": ");
    print_hexadecimal(*bytes, 2);
    print(" ");
    print_hexadecimal(*(volatile uint16_t *)(bytes + 2), 4);
    print(" ");
    print_hexadecimal(*(volatile uint32_t *)(bytes + 4), 8);
    print(" ");
    print_hexadecimal(*(volatile uint64_t *)(bytes + 8), 16);
    print(" ");
    *bytes = 0x5a;
    *(volatile uint16_t *)(bytes + 2) = 0x5a5a;
    *(volatile uint32_t *)(bytes + 4) = 0x5a5a5a5a;
    *(volatile uint64_t *)(bytes + 8) = 0x5a5a5a5a5a5a5a5a;
    *(volatile uint32_t *)(bytes + 0xffe) = 0x5a5a5a5a; /* across two pages */
    __asm__ volatile("addl $1, %0" : "+m"(*(volatile uint32_t *)(bytes + 32)) : : "cc");
    void *place = (void *)(address + 64);
    uint64_t count = 16;
    __asm__ volatile("rep stosb" : "+D"(place), "+c"(count) : "a"(0x5a) : "memory");
    uint8_t buffer[16];
    void *from = (void *)(address + 64);
    place = buffer;
    count = sizeof buffer;
    __asm__ volatile("rep movsb" : "+S"(from), "+D"(place), "+c"(count) : : "memory");
    print_hexadecimal(*(volatile uint32_t *)(bytes + 4), 8);
    print("\r\n");
}

static void absent(void)
{
    absent_ports();
    absent_memory(VIDEO_HOLE);
    absent_memory(LOCAL_APIC);
    print("absent: done\r\n");
}

static void spin(void)
{
    for (;;)
        ;
}

static void halt(void)
{
    __asm__ volatile("cli; hlt");
}

static void idle(void)
{
    timer_start(IDLE_HZ);
    for (;;)
        interrupts_wait();
}

static void flood(void)
{
    for (uint32_t line = 0;; line++) {
        print("flood ");
        print_decimal(line);
        print("\r\n");
    }
}

static void debug_exit(void)
{
    port_write(PORT_DEBUG_EXIT, DEBUG_EXIT_VALUE);
}

static const struct {
    const char *name;
    void (*act)(void);
} deeds[] = {
    { "absent", absent },
    { "debug-exit", debug_exit },
    { "divide", divide },
    { "double-fault", double_fault },
    { "flood", flood },
    { "halt", halt },
    { "idle", idle },
    { "spin", spin },
    { "triple-fault", triple_fault },
    { "wild-jump", wild_jump },
    { "wild-jump-device", wild_jump_device },
    { "wild-jump-no-idt", wild_jump_no_idt },
    { "wild-page-tables", wild_page_tables },
};

void kernel_main(const char *command_line)
{
    command_line_set(command_line);
    console_start();
    interrupts_start();
    for (unsigned at = 0; at < sizeof deeds / sizeof deeds[0]; at++) {
        if (!command_line_is("do", deeds[at].name))
            continue;
        print("misbehave: ");
        print(deeds[at].name);
        print("\r\n");
        deeds[at].act();
        machine_end();
    }
    print("misbehave: give do= and one of these\r\n");
    for (unsigned at = 0; at < sizeof deeds / sizeof deeds[0]; at++) {
        print(deeds[at].name);
        print("\r\n");
    }
    machine_end();
}
