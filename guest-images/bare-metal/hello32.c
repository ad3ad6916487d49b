/* hello32: a 32-bit multiboot 1 kernel; prints how it was started, and ends. */

#include "machine.h"

#define MULTIBOOT_LOADER_MAGIC 0x2badb002
#define HAS_MEMORY 0x1
#define HAS_COMMAND_LINE 0x4

struct multiboot_information {
    uint32_t flags;
    uint32_t lower_memory_kib; /* below 1 MiB */
    uint32_t upper_memory_kib; /* from 1 MiB to the first hole */
    uint32_t boot_device;
    uint32_t command_line;
};

void kernel_main(uint32_t magic, const struct multiboot_information *information)
{
    console_start();
    print("Hello from a 32-bit guest");
    if (magic != MULTIBOOT_LOADER_MAGIC) {
        print(", not started by multiboot.\r\n");
        machine_end();
    }
    if ((information->flags & HAS_MEMORY) != 0) {
        print(", upper memory ");
        print_decimal(information->upper_memory_kib);
        print(" KiB");
    }
    if ((information->flags & HAS_COMMAND_LINE) != 0) {
        print(", command line \"");
        print((const char *)information->command_line);
        print("\"");
    }
    print(".\r\n");
    machine_end();
}
