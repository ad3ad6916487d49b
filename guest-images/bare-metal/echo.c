/* echo: console input comes by interrupt, the processor halts between bytes, and everything typed
 * is echoed. Two hashes tell it all: one of the bytes in their order, which hangs on the input
 * alone, and one of the positions that the interrupts landed on. A line `quit`, or the byte 04,
 * prints both and ends. */

#include "machine.h"

#define RING_BYTES 256
#define END_OF_TRANSMISSION 0x04
#define LAST_WORD "quit"
#define LAST_WORD_BYTES 4

static struct {
    uint8_t bytes[RING_BYTES];
    volatile uint32_t taken, put; /* running counts */
    volatile bool stalled; /* the ring was full, the UART may hold more */
} ring;

static uint64_t position_hash;

/* From the UART into the ring; interrupts are closed. */
static void receive(void)
{
    while (ring.put - ring.taken < RING_BYTES) {
        int byte = console_take();
        if (byte < 0)
            return;
        ring.bytes[ring.put % RING_BYTES] = (uint8_t)byte;
        ring.put++;
    }
    ring.stalled = true;
}

void irq_handler(unsigned irq, struct frame *frame)
{
    if (irq != IRQ_CONSOLE)
        return;
    /* The compiler's code leaves flags undefined here and there, so no status flag is mixed. */
    position_hash = hash_position(position_hash, frame, RFLAGS_CONTROL);
    receive();
}

void system_call_handler(struct frame *frame)
{
    exception_end(frame);
}

/* The next byte typed; waits for it. Comes and goes with interrupts open. */
static uint8_t next_byte(void)
{
    for (;;) {
        interrupts_close();
        if (ring.stalled && ring.put == ring.taken) {
            ring.stalled = false;
            receive(); /* the UART raises no new edge for what it already announced */
        }
        if (ring.put != ring.taken)
            break;
        interrupts_wait();
    }
    uint8_t byte = ring.bytes[ring.taken % RING_BYTES];
    ring.taken++;
    interrupts_open();
    return byte;
}

/* Echoes until the last word; returns the hash of the input. */
static uint64_t echo(uint32_t *count)
{
    uint64_t input_hash = 0;
    unsigned matched = 0; /* bytes of this line that are the last word's */
    bool may_match = true;
    for (;;) {
        uint8_t byte = next_byte();
        input_hash = hash_mix(input_hash, (uint64_t)(*count)++ << 8 | byte);
        if (byte == END_OF_TRANSMISSION)
            return input_hash;
        if (byte != '\r' && byte != '\n') {
            console_write((const char *)&byte, 1);
            may_match = may_match && matched < LAST_WORD_BYTES && byte == LAST_WORD[matched];
            matched += may_match;
            continue;
        }
        if (may_match && matched == LAST_WORD_BYTES)
            return input_hash;
        matched = 0;
        may_match = true;
        print("\r\n> ");
    }
}

void kernel_main(const char *command_line)
{
    command_line_set(command_line);
    console_start();
    interrupts_start();
    irq_unmask(IRQ_CONSOLE);
    console_receive_interrupt_on();
    interrupts_open();
    print("echo: type, and end with a line \"quit\"\r\n> ");
    uint32_t count = 0;
    uint64_t input_hash = echo(&count);
    interrupts_close();
    print("\r\necho: ");
    print_decimal(count);
    print(" bytes, input hash ");
    print_hexadecimal(input_hash, 16);
    print(", position hash ");
    print_hexadecimal(position_hash, 16);
    print("\r\n");
    machine_end();
}
