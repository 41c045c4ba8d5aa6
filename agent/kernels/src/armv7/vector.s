@ Operations on sixteen lanes in memory, without anything that NEON rounds differently from VFP: conversions,
@ comparisons, and exp, whose intermediate numbers matter only where they are normal.

.syntax unified
.arm
.fpu neon-vfpv4
.text

.macro function name
.global millwright_armv7_\name
.hidden millwright_armv7_\name
.type millwright_armv7_\name, %function
.p2align 4
millwright_armv7_\name:
.endm

@ load_f16(const void *x, float *out)
function load_f16
    vld1.8      {d16-d19}, [r0]
    vcvt.f32.f16 q0, d16
    vcvt.f32.f16 q1, d17
    vcvt.f32.f16 q2, d18
    vcvt.f32.f16 q3, d19
    vstmia      r1, {d0-d7}
    bx          lr

@ store_f16(const float *x, uint16_t *out)
function store_f16
    vldmia      r0, {d0-d7}
    vcvt.f16.f32 d16, q0
    vcvt.f16.f32 d17, q1
    vcvt.f16.f32 d18, q2
    vcvt.f16.f32 d19, q3
    vst1.8      {d16-d19}, [r1]
    bx          lr

@ load_i8(const int8_t *x, float *out)
function load_i8
    vld1.8      {d16, d17}, [r0]
    vmovl.s8    q9, d16
    vmovl.s8    q10, d17
    vmovl.s16   q0, d18
    vmovl.s16   q1, d19
    vmovl.s16   q2, d20
    vmovl.s16   q3, d21
    vcvt.f32.s32 q0, q0
    vcvt.f32.s32 q1, q1
    vcvt.f32.s32 q2, q2
    vcvt.f32.s32 q3, q3
    vstmia      r1, {d0-d7}
    bx          lr

@ store_i8(const float *x, int8_t *out): whole numbers within a byte; their sum.
function store_i8
    vldmia      r0, {d0-d7}
    vcvt.s32.f32 q0, q0
    vcvt.s32.f32 q1, q1
    vcvt.s32.f32 q2, q2
    vcvt.s32.f32 q3, q3
    vmovn.i32   d0, q0
    vmovn.i32   d1, q1
    vmovn.i32   d2, q2
    vmovn.i32   d3, q3
    vadd.i16    q8, q0, q1
    vmovn.i16   d0, q0
    vmovn.i16   d1, q1
    vst1.8      {d0, d1}, [r1]
    vpaddl.s16  q8, q8
    vpaddl.s32  q8, q8
    vadd.i64    d16, d16, d17
    vmov.32     r0, d16[0]
    bx          lr

@ nan_to_zero(float *x)
function nan_to_zero
    vldmia      r0, {d0-d7}
    vceq.f32    q8, q0, q0
    vceq.f32    q9, q1, q1
    vceq.f32    q10, q2, q2
    vceq.f32    q11, q3, q3
    vand        q0, q0, q8
    vand        q1, q1, q9
    vand        q2, q2, q10
    vand        q3, q3, q11
    vstmia      r0, {d0-d7}
    bx          lr

@ max(const float *a, float *b): b = a where a > b.
function max
    vldmia      r0, {d0-d7}
    vldmia      r1, {d16-d23}
    vcgt.f32    q12, q0, q8
    vcgt.f32    q13, q1, q9
    vcgt.f32    q14, q2, q10
    vcgt.f32    q15, q3, q11
    vbit        q8, q0, q12
    vbit        q9, q1, q13
    vbit        q10, q2, q14
    vbit        q11, q3, q15
    vstmia      r1, {d16-d23}
    bx          lr

@ Four registers from one number at r1; r1 moves on.
.macro splat a0, a1, b0, b1, c0, c1, d0, d1
    vld1.32     {\a0[], \a1[]}, [r1]
    vld1.32     {\b0[], \b1[]}, [r1]
    vld1.32     {\c0[], \c1[]}, [r1]
    vld1.32     {\d0[], \d1[]}, [r1]!
.endm

.macro four operation, a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3
    \operation  \a0, \b0, \c0
    \operation  \a1, \b1, \c1
    \operation  \a2, \b2, \c2
    \operation  \a3, \b3, \c3
.endm

@ p = next coefficient + p * r, from q4-q7 to q12-q15 and back.
.macro horner_there
    splat       d24, d25, d26, d27, d28, d29, d30, d31
    four        vfma.f32, q12, q13, q14, q15, q4, q5, q6, q7, q0, q1, q2, q3
.endm

.macro horner_back
    splat       d8, d9, d10, d11, d12, d13, d14, d15
    four        vfma.f32, q4, q5, q6, q7, q12, q13, q14, q15, q0, q1, q2, q3
.endm

@ exp(float *x, const float *constants): math::exp, step by step; see EXP in armv7.rs.
function exp
    vpush       {d8-d15}
    vldmia      r0, {d0-d7}
    @ n, rounded by adding and subtracting what leaves no room for a fraction
    splat       d24, d25, d26, d27, d28, d29, d30, d31
    four        vmul.f32, q8, q9, q10, q11, q0, q1, q2, q3, q12, q13, q14, q15
    splat       d24, d25, d26, d27, d28, d29, d30, d31
    four        vadd.f32, q8, q9, q10, q11, q8, q9, q10, q11, q12, q13, q14, q15
    four        vsub.f32, q8, q9, q10, q11, q8, q9, q10, q11, q12, q13, q14, q15
    @ r in q0-q3
    splat       d24, d25, d26, d27, d28, d29, d30, d31
    four        vfma.f32, q0, q1, q2, q3, q8, q9, q10, q11, q12, q13, q14, q15
    splat       d24, d25, d26, d27, d28, d29, d30, d31
    four        vfma.f32, q0, q1, q2, q3, q8, q9, q10, q11, q12, q13, q14, q15
    @ p
    splat       d8, d9, d10, d11, d12, d13, d14, d15
    horner_there
    horner_back
    horner_there
    horner_back
    horner_there
    @ y
    four        vmul.f32, q4, q5, q6, q7, q0, q1, q2, q3, q0, q1, q2, q3
    four        vfma.f32, q0, q1, q2, q3, q4, q5, q6, q7, q12, q13, q14, q15
    vmov.f32    q4, #1.0
    four        vadd.f32, q0, q1, q2, q3, q0, q1, q2, q3, q4, q4, q4, q4
    @ times 2 to the n
    vcvt.s32.f32 q8, q8
    vcvt.s32.f32 q9, q9
    vcvt.s32.f32 q10, q10
    vcvt.s32.f32 q11, q11
    vmov.i32    q4, #127
    four        vadd.i32, q8, q9, q10, q11, q8, q9, q10, q11, q4, q4, q4, q4
    vshl.i32    q8, q8, #23
    vshl.i32    q9, q9, #23
    vshl.i32    q10, q10, #23
    vshl.i32    q11, q11, #23
    four        vmul.f32, q0, q1, q2, q3, q0, q1, q2, q3, q8, q9, q10, q11
    @ the ends
    vldmia      r0, {d16-d23}
    vld1.32     {d8[], d9[]}, [r1]!
    vld1.32     {d10[], d11[]}, [r1]!
    vld1.32     {d12[], d13[]}, [r1]!
    four        vcgt.f32, q12, q13, q14, q15, q8, q9, q10, q11, q4, q4, q4, q4
    four        vbit, q0, q1, q2, q3, q5, q5, q5, q5, q12, q13, q14, q15
    four        vcgt.f32, q12, q13, q14, q15, q6, q6, q6, q6, q8, q9, q10, q11
    four        vbic, q0, q1, q2, q3, q0, q1, q2, q3, q12, q13, q14, q15
    vstmia      r0, {d0-d7}
    vpop        {d8-d15}
    bx          lr
