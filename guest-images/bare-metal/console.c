/* The console (a 16550A as National Semiconductor's PC16550D data sheet has it) and the way out of
 * the machine. Free of anything 64-bit: hello32 is made of it too. */

#include "machine.h"

#define UART 0x3f8
#define UART_DATA (UART + 0)
#define UART_INTERRUPT_ENABLE (UART + 1)
#define UART_FIFO_CONTROL (UART + 2)
#define UART_LINE_CONTROL (UART + 3)
#define UART_MODEM_CONTROL (UART + 4)
#define UART_LINE_STATUS (UART + 5)

#define LINE_8N1 0x03
#define LINE_DIVISOR_LATCH 0x80
#define FIFO_ENABLE_AND_CLEAR 0x07 /* receive trigger at one byte */
#define FIFO_BYTES 16
#define MODEM_DTR_RTS_OUT2 0x0b /* OUT2 gates the interrupt line on a PC */
#define STATUS_DATA_READY 0x01
#define STATUS_TRANSMIT_ROOM 0x20
#define STATUS_TRANSMITTER_IDLE 0x40
#define INTERRUPT_ON_RECEIVE 0x01

#define KEYBOARD_COMMAND 0x64
#define KEYBOARD_INPUT_FULL 0x02
#define KEYBOARD_RESET 0xfe

void console_start(void)
{
    port_write(UART_INTERRUPT_ENABLE, 0);
    port_write(UART_LINE_CONTROL, LINE_8N1 | LINE_DIVISOR_LATCH);
    port_write(UART_DATA, 1); /* 115200 baud */
    port_write(UART_INTERRUPT_ENABLE, 0);
    port_write(UART_LINE_CONTROL, LINE_8N1);
    port_write(UART_FIFO_CONTROL, FIFO_ENABLE_AND_CLEAR);
    port_write(UART_MODEM_CONTROL, MODEM_DTR_RTS_OUT2);
}

void console_receive_interrupt_on(void)
{
    port_write(UART_INTERRUPT_ENABLE, INTERRUPT_ON_RECEIVE);
}

int console_take(void)
{
    if ((port_read(UART_LINE_STATUS) & STATUS_DATA_READY) == 0)
        return -1;
    return port_read(UART_DATA);
}

/* Fills the transmit FIFO whenever it is empty: one status read for sixteen bytes. */
void console_write(const char *bytes, size_t count)
{
    size_t at = 0;
    while (at < count) {
        while ((port_read(UART_LINE_STATUS) & STATUS_TRANSMIT_ROOM) == 0)
            ;
        for (unsigned room = FIFO_BYTES; room > 0 && at < count; room--)
            port_write(UART_DATA, (uint8_t)bytes[at++]);
    }
}

void print(const char *text)
{
    size_t count = 0;
    while (text[count] != 0)
        count++;
    console_write(text, count);
}

void print_decimal(uint32_t value)
{
    char digits[10];
    unsigned at = sizeof digits;
    do {
        digits[--at] = (char)('0' + value % 10);
        value /= 10;
    } while (value != 0);
    console_write(digits + at, sizeof digits - at);
}

void print_hexadecimal(uint64_t value, unsigned digits)
{
    char text[16];
    for (unsigned at = 0; at < digits; at++)
        text[at] = "0123456789abcdef"[value >> (4 * (digits - 1 - at)) & 15];
    console_write(text, digits);
}

_Noreturn void machine_end(void)
{
    /* The reset clears the UART as well: let what was printed out first. */
    while ((port_read(UART_LINE_STATUS) & STATUS_TRANSMITTER_IDLE) == 0)
        ;
    for (unsigned tries = 1000; tries > 0; tries--) {
        if ((port_read(KEYBOARD_COMMAND) & KEYBOARD_INPUT_FULL) == 0)
            break;
    }
    port_write(KEYBOARD_COMMAND, KEYBOARD_RESET);
    for (;;)
        __asm__ volatile("cli; hlt");
}
