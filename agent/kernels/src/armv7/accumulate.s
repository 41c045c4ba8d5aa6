@ sums[query][lane] = fma(x[query][i], row i [lane], sums[query][lane]), i ascending: both products of attention. Rows
@ are f16 or bytes. A function for each, for one to four queries and 8 or (one and two queries) 16 lanes.
@
@   r1 row    r2 bytes from row to row    r3 rows left    r4-r7 x of each query    r0 the arguments, at the sums
@   q0-q3 a row as f32    q4-q7 x of each query, four times    q8-q15 sums

.syntax unified
.arm
.fpu neon-vfpv4
.text

@ Calls \operation with r8 at the sums of each query and the first registers of these.
.macro each_sum operation, queries, quads
    .if \quads == 4
    ldr         r8, [r0]
    \operation  {d16-d19}
    \operation  {d20-d23}
    .if \queries == 2
    ldr         r8, [r0, #4]
    \operation  {d24-d27}
    \operation  {d28-d31}
    .endif
    .else
    ldr         r8, [r0]
    \operation  {d16-d19}
    .if \queries >= 2
    ldr         r8, [r0, #4]
    \operation  {d20-d23}
    .endif
    .if \queries >= 3
    ldr         r8, [r0, #8]
    \operation  {d24-d27}
    .endif
    .if \queries >= 4
    ldr         r8, [r0, #12]
    \operation  {d28-d31}
    .endif
    .endif
.endm

.macro load registers:vararg
    vld1.8      \registers, [r8]!
.endm

.macro store registers:vararg
    vst1.8      \registers, [r8]!
.endm

.macro row_f16 quads
    .if \quads == 4
    vld1.8      {d4-d7}, [r1], r2
    vcvt.f32.f16 q0, d4
    vcvt.f32.f16 q1, d5
    vcvt.f32.f16 q2, d6
    vcvt.f32.f16 q3, d7
    .else
    vld1.8      {d2, d3}, [r1], r2
    vcvt.f32.f16 q0, d2
    vcvt.f32.f16 q1, d3
    .endif
.endm

.macro row_i8 quads
    .if \quads == 4
    vld1.8      {d6, d7}, [r1], r2
    vmovl.s8    q1, d6
    vmovl.s8    q3, d7
    vmovl.s16   q0, d2
    vmovl.s16   q1, d3
    vmovl.s16   q2, d6
    vmovl.s16   q3, d7
    vcvt.f32.s32 q2, q2
    vcvt.f32.s32 q3, q3
    .else
    vld1.8      {d2}, [r1], r2
    vmovl.s8    q1, d2
    vmovl.s16   q0, d2
    vmovl.s16   q1, d3
    .endif
    vcvt.f32.s32 q0, q0
    vcvt.f32.s32 q1, q1
.endm

@ One query's \quads sums from \s0 on take x times the row.
.macro add_row quads, x, s0, s1, s2, s3
    vfma.f32    \s0, q0, \x
    vfma.f32    \s1, q1, \x
    .if \quads == 4
    vfma.f32    \s2, q2, \x
    vfma.f32    \s3, q3, \x
    .endif
.endm

@ millwright_armv7_accumulate_ELEMENT_QUERIES_LANES(const Accumulate *), one row at least.
.macro accumulate element, queries, quads, lanes
.global millwright_armv7_accumulate_\element\()_\queries\()_\lanes
.hidden millwright_armv7_accumulate_\element\()_\queries\()_\lanes
.type millwright_armv7_accumulate_\element\()_\queries\()_\lanes, %function
.p2align 4
millwright_armv7_accumulate_\element\()_\queries\()_\lanes:
    push        {r4-r8, lr}
    vpush       {d8-d15}
    ldm         r0!, {r1-r7}
    each_sum    load, \queries, \quads
1:  row_\element \quads
    vld1.32     {d8[], d9[]}, [r4]!
    .if \queries >= 2
    vld1.32     {d10[], d11[]}, [r5]!
    .endif
    .if \queries >= 3
    vld1.32     {d12[], d13[]}, [r6]!
    .endif
    .if \queries >= 4
    vld1.32     {d14[], d15[]}, [r7]!
    .endif
    subs        r3, r3, #1
    .if \quads == 4
    add_row     4, q4, q8, q9, q10, q11
    .if \queries == 2
    add_row     4, q5, q12, q13, q14, q15
    .endif
    .else
    add_row     2, q4, q8, q9
    .if \queries >= 2
    add_row     2, q5, q10, q11
    .endif
    .if \queries >= 3
    add_row     2, q6, q12, q13
    .endif
    .if \queries >= 4
    add_row     2, q7, q14, q15
    .endif
    .endif
    bne         1b
    each_sum    store, \queries, \quads
    vpop        {d8-d15}
    pop         {r4-r8, pc}
.size millwright_armv7_accumulate_\element\()_\queries\()_\lanes, . - millwright_armv7_accumulate_\element\()_\queries\()_\lanes
.endm

.macro element name
    accumulate  \name, 1, 2, 8
    accumulate  \name, 2, 2, 8
    accumulate  \name, 3, 2, 8
    accumulate  \name, 4, 2, 8
    accumulate  \name, 1, 4, 16
    accumulate  \name, 2, 4, 16
.endm

    element     f16
    element     i8
