@ One tile of sixteen rows times one or two tokens, all blocks: a function for each kind and number of tokens,
@ made from the macros below. packed.rs has the layout, ARITHMETIC.md the arithmetic, armv7.rs the arguments.
@
@ Four rows (a quad) are done at a time. Sixteen bytes of weights are four columns of a quad; products of two
@ columns' bytes fit 16 bits (2 * 128 * 127 < 32768) and are added in pairs into 32 bits, q12 and q13 for the first
@ token, q14 and q15 for the second. The f32 sums of the tile stay in memory: they are touched once per block.
@
@   r0 block            r3 its tokens' scales    r5 f32 sums of the quad    r8 scales of the quad
@   r1 blocks left      r4 its tokens' sums      r6 quads left              r9 weights of the quad
@   r2 activations      r7 64, from one column   r10, lr temporary          r12 what to fetch ahead
@                          quadruple to the next
@   q0-q3, q4-q7 a block's activations of either token, each four bytes twice; with 8-bit weights the second
@                token's lie on the stack instead, so that registers for products are left

.syntax unified
.arm
.fpu neon-vfpv4
.text

@ Bytes from one block of activations to the next; armv7.rs checks them.
.set Q_STRIDE, 256
.set SCALE_STRIDE, 32
.set SUMS_STRIDE, 160
.set HALF_STRIDE, 32

@ Thirty-two activations at \address into eight registers from \d0 on, by way of q8 and q9.
.macro activations address, d0, d1, d2, d3, d4, d5, d6, d7
    vld1.8      {d16-d19}, [\address]
    vdup.32     \d0, d16[0]
    vdup.32     \d1, d16[1]
    vdup.32     \d2, d17[0]
    vdup.32     \d3, d17[1]
    vdup.32     \d4, d18[0]
    vdup.32     \d5, d18[1]
    vdup.32     \d6, d19[0]
    vdup.32     \d7, d19[1]
.endm

@ Two column quadruples of 8-bit weights for two tokens; the second's activations lie at r10. \add is vpaddl for the
@ first. Each sum is left alone for four instructions: cores that keep the order would else wait for it.
.macro two_columns add, x0, x1
    vld1.8      {d16, d17}, [r9], r7
    vld1.8      {d18, d19}, [r9], r7
    vld1.8      {d8, d9}, [r10]!
    vmull.s8    q6, d16, \x0
    vmull.s8    q7, d17, \x0
    vmull.s8    q10, d16, d8
    vmull.s8    q11, d17, d8
    vmlal.s8    q6, d18, \x1
    vmlal.s8    q7, d19, \x1
    vmlal.s8    q10, d18, d9
    vmlal.s8    q11, d19, d9
    \add\().s16 q12, q6
    \add\().s16 q13, q7
    \add\().s16 q14, q10
    \add\().s16 q15, q11
.endm

@ Sixteen columns of 8-bit weights, \half 0 or 1 of the block. With one token q14 and q15 are more sums of its own.
.macro half_bytes add, tokens, half, x0, x1, x2, x3
    .if \tokens == 2
    add         r10, sp, #(32 * \half)
    two_columns \add, \x0, \x1
    two_columns vpadal, \x2, \x3
    .else
    quadruples
    vmull.s8    q8, d8, \x0
    vmull.s8    q9, d9, \x0
    vmull.s8    q10, d12, \x2
    vmull.s8    q11, d13, \x2
    vmlal.s8    q8, d10, \x1
    vmlal.s8    q9, d11, \x1
    vmlal.s8    q10, d14, \x3
    vmlal.s8    q11, d15, \x3
    \add\().s16 q12, q8
    \add\().s16 q13, q9
    \add\().s16 q14, q10
    \add\().s16 q15, q11
    .endif
.endm

@ Four column quadruples into q4-q7, which are free with one token.
.macro quadruples
    vld1.8      {d8, d9}, [r9], r7
    vld1.8      {d10, d11}, [r9], r7
    vld1.8      {d12, d13}, [r9], r7
    vld1.8      {d14, d15}, [r9], r7
.endm

@ One column quadruple of nibbles in q9 for two tokens; up to eight products of 15 * 127 fit 16 bits.
.macro nibbles multiply, x, y
    \multiply\().s8 q12, d18, \x
    \multiply\().s8 q13, d19, \x
    \multiply\().s8 q14, d18, \y
    \multiply\().s8 q15, d19, \y
.endm

@ Sixteen columns of nibbles in q8-q11 for one token, whose sums are again in four registers.
.macro half_nibbles multiply, x0, x1, x2, x3
    \multiply\().s8 q12, d16, \x0
    \multiply\().s8 q13, d17, \x0
    \multiply\().s8 q14, d18, \x1
    \multiply\().s8 q15, d19, \x1
    vmlal.s8    q12, d20, \x2
    vmlal.s8    q13, d21, \x2
    vmlal.s8    q14, d22, \x3
    vmlal.s8    q15, d23, \x3
.endm

@ Sixteen columns of 4-bit weights: the low halves of bytes against the first activations.
.macro low_nibbles tokens
    .if \tokens == 2
    vmov.i8     q10, #15
    vld1.8      {d16, d17}, [r9], r7
    vld1.8      {d22, d23}, [r9], r7
    vand        q9, q8, q10
    nibbles     vmull, d0, d8
    vld1.8      {d16, d17}, [r9], r7
    vand        q9, q11, q10
    nibbles     vmlal, d1, d9
    vld1.8      {d22, d23}, [r9], r7
    vand        q9, q8, q10
    nibbles     vmlal, d2, d10
    vand        q9, q11, q10
    nibbles     vmlal, d3, d11
    sub         r9, r9, #256
    .else
    quadruples
    vmov.i8     q11, #15
    vand        q8, q4, q11
    vand        q9, q5, q11
    vand        q10, q6, q11
    vand        q11, q7, q11
    half_nibbles vmull, d0, d1, d2, d3
    .endif
.endm

@ The high halves against the last. One token's bytes are still in registers.
.macro high_nibbles multiply, tokens
    .if \tokens == 2
    vld1.8      {d16, d17}, [r9], r7
    vld1.8      {d22, d23}, [r9], r7
    vshr.u8     q9, q8, #4
    nibbles     \multiply, d4, d12
    vld1.8      {d16, d17}, [r9], r7
    vshr.u8     q9, q11, #4
    nibbles     vmlal, d5, d13
    vld1.8      {d22, d23}, [r9], r7
    vshr.u8     q9, q8, #4
    nibbles     vmlal, d6, d14
    vshr.u8     q9, q11, #4
    nibbles     vmlal, d7, d15
    .else
    vshr.u8     q8, q4, #4
    vshr.u8     q9, q5, #4
    vshr.u8     q10, q6, #4
    vshr.u8     q11, q7, #4
    half_nibbles \multiply, d4, d5, d6, d7
    .endif
.endm

@ 16-bit sums of nibbles into 32 bits.
.macro widen
    vpaddl.s16  q12, q12
    vpaddl.s16  q13, q13
    vpaddl.s16  q14, q14
    vpaddl.s16  q15, q15
.endm

@ Four scales or minimums, \offset behind r8, into q8.
.macro numbers wide, offset
    add         r10, r8, #\offset
    .if \wide
    vld1.8      {d16, d17}, [r10]
    .else
    vld1.8      {d16}, [r10]
    vcvt.f32.f16 q8, d16
    .endif
.endm

@ The sums of group \group become f32 and go, with scales and minimums, to the tile's sums.
.macro finish affine, groups, wide, tokens, group
    .if \tokens == 1
    vadd.i32    q12, q12, q14
    vadd.i32    q13, q13, q15
    .endif
    vpadd.i32   d24, d24, d25
    vpadd.i32   d25, d26, d27
    .if \tokens == 2
    vpadd.i32   d28, d28, d29
    vpadd.i32   d29, d30, d31
    .endif
    numbers     \wide, (\group * (32 << \wide))
    vcvt.f32.s32 q12, q12
    vld1.8      {d22, d23}, [r5]
    vld1.32     {d18[], d19[]}, [r3]
    vmul.f32    q9, q8, q9
    vfma.f32    q11, q12, q9
    .if \tokens == 2
    vcvt.f32.s32 q14, q14
    add         lr, r3, #4
    add         r10, r5, #64
    vld1.32     {d18[], d19[]}, [lr]
    vld1.8      {d26, d27}, [r10]
    vmul.f32    q9, q8, q9
    vfma.f32    q13, q14, q9
    .endif
    .if \affine
    numbers     \wide, ((\groups + \group) * (32 << \wide))
    add         lr, r4, #(\group * HALF_STRIDE)
    vld1.32     {d18[], d19[]}, [lr]
    vfma.f32    q11, q8, q9
    .if \tokens == 2
    add         lr, lr, #4
    add         r10, r5, #64
    vld1.32     {d18[], d19[]}, [lr]
    vfma.f32    q13, q8, q9
    .endif
    .endif
    .if \tokens == 2
    vst1.8      {d26, d27}, [r10]
    .endif
    vst1.8      {d22, d23}, [r5]
.endm

@ The sums of one quad over one block. Leaves r9 where it was.
.macro quad four, affine, groups, wide, tokens
    .if \four
    low_nibbles \tokens
    .if \groups == 2
    widen
    finish      \affine, 2, \wide, \tokens, 0
    high_nibbles vmull, \tokens
    .else
    high_nibbles vmlal, \tokens
    .endif
    widen
    sub         r9, r9, #256
    .else
    half_bytes  vpaddl, \tokens, 0, d0, d1, d2, d3
    .if \groups == 2
    finish      \affine, 2, \wide, \tokens, 0
    half_bytes  vpaddl, \tokens, 1, d4, d5, d6, d7
    .else
    half_bytes  vpadal, \tokens, 1, d4, d5, d6, d7
    .endif
    sub         r9, r9, #512
    .endif
    finish      \affine, \groups, \wide, \tokens, (\groups - 1)
.endm

@ millwright_armv7_linear_CODE_TOKENS(const Step *): CODE is the kind's.
.macro linear code, four, affine, groups, wide, tokens
.global millwright_armv7_linear_\code\()_\tokens
.hidden millwright_armv7_linear_\code\()_\tokens
.type millwright_armv7_linear_\code\()_\tokens, %function
.p2align 4
millwright_armv7_linear_\code\()_\tokens:
    push        {r4-r10, lr}
    vpush       {d8-d15}
    sub         sp, sp, #64
    mov         r10, r0
    ldm         r10, {r0-r5}
    mov         r7, #64
1:  activations r2, d0, d1, d2, d3, d4, d5, d6, d7
    .if \tokens == 2
    add         r9, r2, #32
    activations r9, d8, d9, d10, d11, d12, d13, d14, d15
    .if \four == 0
    vstmia      sp, {d8-d15}
    .endif
    .endif
    mov         r8, r0
    add         r9, r0, #((32 << \wide) * \groups * (1 + \affine))
    add         r12, r9, #1024
    mov         r6, #4
2:  pld         [r12]
    pld         [r12, #64]
    .if \four == 0
    pld         [r12, #128]
    .endif
    quad        \four, \affine, \groups, \wide, \tokens
    add         r12, r12, #(192 >> \four)
    add         r5, r5, #16
    add         r8, r8, #(8 << \wide)
    add         r9, r9, #16
    subs        r6, r6, #1
    bne         2b
    add         r0, r9, #((512 >> \four) - 64)
    sub         r5, r5, #64
    add         r2, r2, #Q_STRIDE
    add         r3, r3, #SCALE_STRIDE
    add         r4, r4, #SUMS_STRIDE
    subs        r1, r1, #1
    bne         1b
    add         sp, sp, #64
    vpop        {d8-d15}
    pop         {r4-r10, pc}
.size millwright_armv7_linear_\code\()_\tokens, . - millwright_armv7_linear_\code\()_\tokens
.endm

.macro kind code, four, affine, groups, wide
    linear      \code, \four, \affine, \groups, \wide, 1
    linear      \code, \four, \affine, \groups, \wide, 2
.endm

    kind        0, 0, 0, 1, 0
    kind        2, 0, 1, 1, 0
    kind        3, 1, 1, 1, 0
    kind        4, 0, 0, 2, 0
    kind        6, 0, 1, 2, 0
    kind        7, 1, 1, 2, 0
    kind        8, 0, 0, 1, 1
    kind        10, 0, 1, 1, 1
    kind        11, 1, 1, 1, 1
    kind        12, 0, 0, 2, 1
    kind        14, 0, 1, 2, 1
    kind        15, 1, 1, 2, 1
