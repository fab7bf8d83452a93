/*
 * A firmware for QEMU, of 64 KiB at 0xf0000: vCPU 0 counts at 0x7000 as fast as it can, or once a tick if REST is defined;
 * and at 0x46c, as a PC's does, the ticks of the PIT. The other vCPUs halt, or go round in a loop if SPIN is defined. It
 * starts within milliseconds, where SeaBIOS takes seconds on hosts that emulate real mode.
 */
.code16
.text
start:
    cli
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $0x7000, %sp

    /* A segment that reaches the local APIC: %es keeps its limit when protected mode is left again. */
    lgdtl %cs:gdtr
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    mov $8, %bx
    mov %bx, %es
    and $0xfe, %al
    mov %eax, %cr0

    mov $0xfee00000, %edi
    addr32 movl $0x1ff, %es:0xf0(%edi)  /* enable it; */
    addr32 movl $0x700, %es:0x350(%edi) /* the interrupt controller's interrupts come through it. */
#ifdef SPIN
    movl $0xfeeb, 0x1000                /* For the other vCPUs: again: jmp again */
#else
    movl $0xfdebf4, 0x1000              /* For the other vCPUs: again: hlt; jmp again */
#endif
    addr32 movl $0xc4500, %es:0x300(%edi) /* INIT, then start at 0x1000 */
    addr32 movl $0xc4601, %es:0x300(%edi)

    /* Interrupt 8 every 65536 periods of the PIT, and no other. */
    movw $tick, 4 * 8
    movw $0xf000, 4 * 8 + 2
    mov $0x11, %al
    out %al, $0x20
    mov $8, %al
    out %al, $0x21
    mov $4, %al
    out %al, $0x21
    mov $1, %al
    out %al, $0x21
    mov $0xfe, %al
    out %al, $0x21
    mov $0x34, %al
    out %al, $0x43
    xor %al, %al
    out %al, $0x40
    out %al, $0x40
    sti

count:
    incl 0x7000
#ifdef REST
    hlt
#endif
    jmp count

tick:
    incl 0x46c
    push %ax
    mov $0x20, %al
    out %al, $0x20
    pop %ax
    iret

.balign 8
gdt:
    .quad 0
    .quad 0x00cf93000000ffff /* data, 4 GiB */
gdtr:
    .word . - gdt - 1
    .long 0xf0000 + gdt

.org 0xfff0
    ljmp $0xf000, $start
.org 0x10000
