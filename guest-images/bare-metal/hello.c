/* hello: prints one line and ends. */

#include "machine.h"

void kernel_main(const char *command_line)
{
    command_line_set(command_line);
    console_start();
    print("Hello from a bare-metal guest.\r\n");
    machine_end();
}
