/*
 * A plugin for QEMU's translator that makes what an expansion makes: which block ran, and the address of
 * every access, into a buffer that is then forgotten. The declarations are those of QEMU's plugin interface,
 * version 1, as far as they are used here.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef uint64_t plugin_id;

extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
extern void qemu_plugin_register_atexit_cb(plugin_id, void (*)(plugin_id, void *), void *);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int flags,
                                                 void *);
extern void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *,
                                             void (*)(unsigned, uint32_t, uint64_t, void *), int flags,
                                             int read_write, void *);

enum { NO_REGISTERS = 0, READS_AND_WRITES = 3, ENTRIES = 1 << 16 };

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t trace[ENTRIES];
static uint64_t appended;

static void append(uint64_t value)
{
    trace[appended++ % ENTRIES] = value;
}

static void block_runs(unsigned vcpu, void *address)
{
    (void)vcpu;
    append((uint64_t)address);
}

static void accesses(unsigned vcpu, uint32_t kind, uint64_t address, void *unused)
{
    (void)vcpu;
    (void)kind;
    (void)unused;
    append(address);
}

static void translated(plugin_id id, struct qemu_plugin_tb *block)
{
    (void)id;
    void *address = (void *)qemu_plugin_tb_vaddr(block);
    qemu_plugin_register_vcpu_tb_exec_cb(block, block_runs, NO_REGISTERS, address);
    for (size_t number = 0; number < qemu_plugin_tb_n_insns(block); number++)
        qemu_plugin_register_vcpu_mem_cb(qemu_plugin_tb_get_insn(block, number), accesses, NO_REGISTERS,
                                         READS_AND_WRITES, NULL);
}

static void ended(plugin_id id, void *unused)
{
    (void)id;
    (void)unused;
    fprintf(stderr, "traced: %llu blocks and accesses\n", (unsigned long long)appended);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int count,
                                                               char **arguments)
{
    (void)info;
    (void)count;
    (void)arguments;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
