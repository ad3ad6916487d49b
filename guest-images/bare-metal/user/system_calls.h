/* The system calls of compute's kernel: INT 4, the number in RAX, arguments in RDI and RSI. */
#ifndef SYSTEM_CALLS_H
#define SYSTEM_CALLS_H

#define SYSTEM_CALL_EXIT 0 /* RDI: not zero if all results are right */
#define SYSTEM_CALL_WRITE 1 /* RDI: address, RSI: bytes */
#define SYSTEM_CALL_YIELD 2

#endif
