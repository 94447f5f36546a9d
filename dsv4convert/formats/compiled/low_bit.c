// Twins of ggml's quantisers of the types whose values are equally spaced: the bytes of its ggml_quantize_chunk, which
// takes one to four nanoseconds an element where reading, decoding and writing one take half a nanosecond.
//
// Q4_0, Q4_1, Q5_0 and Q5_1 without importance of columns; the others, which have no use for it, with and without.
// Values are finite. A block that is not ordinary (a scale or a minimum that float16 does not hold, or a scale without a
// finite inverse) leaves its chunk to ggml's library.

// ggml's numbers of the types.
enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, TQ1_0 = 34, TQ2_0 = 35, Q1_0 = 41, Q2_0 = 42 };

enum {
    Q4_0_BYTES = 18,
    Q4_1_BYTES = 20,
    Q5_0_BYTES = 22,
    Q5_1_BYTES = 24,
    Q1_0_ELEMENTS = 128,
    Q1_0_BYTES = 18,
    Q2_0_ELEMENTS = 64,
    Q2_0_BYTES = 18,
    TQ_ELEMENTS = 256,
    TQ1_0_BYTES = 54,
    TQ2_0_BYTES = 66,
    F16_BYTES = 2,
    BLOCKS_AT_ONCE = 16,
    SIDE_BY_SIDE = 8, // blocks of Q1_0
    TRITS = 5,        // that a byte holds: 3^5 = 243
};

// Returns whether float16 holds the value.
INLINE int write_f16(u8 *place, float value) {
    u32 magnitude = bits_of(value) & F32_MAGNITUDE;
    u32 half = rounded_f16(float_of(magnitude)) | (bits_of(value) & ~F32_MAGNITUDE) >> 16;
    place[0] = (u8)half;
    place[1] = (u8)(half >> 8);
    return magnitude < F16_OVERFLOW;
}

INLINE int is_finite(float value) { return (bits_of(value) & F32_INFINITY) != F32_INFINITY; }

INLINE u32 largest_magnitude(const u32_at *values, i64 size) {
    u32 largest = 0;
    for (i64 j = 0; j < size; j++) {
        u32 magnitude = values[j] & F32_MAGNITUDE;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// A number that is the larger the larger the float is; and back.
INLINE int32_t in_order(u32 bits) { return (int32_t)(bits ^ ((u32)((int32_t)bits >> 31) & F32_MAGNITUDE)); }

// The lowest bits of eight bytes, that of byte i as bit i.
INLINE u8 gathered(u64 bytes) { return (u8)(bytes * 0x0102040810204080 >> 56); }

// --- Q4_0, Q4_1, Q5_0, Q5_1 -------------------------------------------------------------------------------

// The value of the largest magnitude, the first of several.
INLINE float first_largest(const u32_at *restrict values) {
    u32 largest = largest_magnitude(values, GROUP), first = GROUP - 1;
    for (u32 j = 0; j < GROUP; j++) {
        u32 number = (values[j] & F32_MAGNITUDE) == largest ? j : GROUP - 1;
        first = number < first ? number : first;
    }
    return largest ? float_of(values[first]) : 0.0f;
}

// The smallest value, and the first of several zeros; returns how far the largest one is from it.
INLINE float range(const u32_at *restrict values, float *restrict smallest) {
    int32_t low = in_order(values[0]), high = low;
    for (int j = 1; j < GROUP; j++) {
        int32_t number = in_order(values[j]);
        low = number < low ? number : low;
        high = number > high ? number : high;
    }
    float base = float_of((u32)in_order((u32)low)), distance = float_of((u32)in_order((u32)high)) - base;
    if (base == 0)
        for (int j = GROUP - 1; j >= 0; j--)
            base = float_of(values[j]) == 0 ? float_of(values[j]) : base;
    *smallest = base;
    return distance;
}

// Blocks of 32: d, the minimum where there is one, the fifth bits of all codes, and four bits of codes j and j + 16 in
// byte j. Code 0 of a type without a minimum is the value of the largest magnitude, which d has the opposite sign of.
// The scales of some blocks are made at once, since those of a single one would be waited for.
INLINE int make_levels(const u32_at *restrict values, int count, u8 *restrict block, int bits, int has_minimum) {
    float half = (float)(1 << (bits - 1)), highest = 2 * half - 1, shift = has_minimum ? 0.5f : half + 0.5f;
    float d[BLOCKS_AT_ONCE], base[BLOCKS_AT_ONCE], inverse[BLOCKS_AT_ONCE];
    int ordinary = 1;
    for (int k = 0; k < count; k++) {
        base[k] = 0;
        d[k] = has_minimum ? range(values + k * GROUP, base + k) / highest : first_largest(values + k * GROUP) / -half;
    }
    for (int k = 0; k < count; k++) {
        inverse[k] = d[k] != 0 ? 1.0f / d[k] : 0.0f;
        ordinary &= is_finite(inverse[k]);
    }
    for (int k = 0; k < count; k++, values += GROUP) {
        u8 codes[GROUP];
        for (int j = 0; j < GROUP; j++) {
            float level = (float_of(values[j]) - base[k]) * inverse[k] + shift;
            codes[j] = (u8)(int32_t)(level < highest ? level : highest);
        }
        ordinary &= write_f16(block, d[k]);
        block += F16_BYTES;
        if (has_minimum) {
            ordinary &= write_f16(block, base[k]);
            block += F16_BYTES;
        }
        if (bits == 5) {
            for (int i = 0; i < GROUP / 8; i++)
                block[i] = gathered(((u64_at *)codes)[i] >> 4 & 0x0101010101010101);
            block += GROUP / 8;
        }
        KEEP_LOOP
        for (int j = 0; j < PACKED; j++)
            block[j] = (u8)((codes[j] & 0xF) | codes[PACKED + j] << 4);
        block += PACKED;
    }
    return ordinary;
}

// --- Q2_0, TQ1_0, TQ2_0 -----------------------------------------------------------------------------------

// Writes d, the largest magnitude, and the codes: 0, 1 and 2 for -d, 0 and d, whichever is nearest, half away from zero.
INLINE int make_ternary(const u32_at *restrict values, int size, u8 *restrict d, u8 *restrict codes) {
    u32 largest = largest_magnitude(values, size);
    float inverse = largest ? 1.0f / float_of(largest) : 0.0f;
    for (int j = 0; j < size; j++) {
        float relative = float_of(values[j]) * inverse;
        codes[j] = (u8)(1 + (relative >= 0.5f) - (relative <= -0.5f));
    }
    return write_f16(d, float_of(largest)) & is_finite(inverse);
}

// d, then codes of two bits, lowest first.
INLINE int make_q2_0(const u32_at *restrict values, u8 *restrict block) {
    u8 codes[Q2_0_ELEMENTS];
    int ordinary = make_ternary(values, Q2_0_ELEMENTS, block, codes);
    for (int j = 0; j < Q2_0_ELEMENTS / 4; j++) {
        u32 four = ((u32_at *)codes)[j];
        block[F16_BYTES + j] = (u8)(four | four >> 6 | four >> 12 | four >> 18);
    }
    return ordinary;
}

// Codes of two bits, lowest first, for each half of the block: elements 32 apart share a byte. Then d.
INLINE int make_tq2_0(const u32_at *restrict values, u8 *restrict block) {
    u8 codes[TQ_ELEMENTS];
    int ordinary = make_ternary(values, TQ_ELEMENTS, block + TQ2_0_BYTES - F16_BYTES, codes);
    for (int half = 0; half < 2; half++)
        for (int j = 0; j < GROUP; j++) {
            const u8 *first = codes + half * TQ_ELEMENTS / 2 + j;
            block[half * GROUP + j] =
                (u8)(first[0] | first[GROUP] << 2 | first[2 * GROUP] << 4 | first[3 * GROUP] << 6);
        }
    return ordinary;
}

// Bytes of the codes `bytes` apart, digits of a fraction to the base 3, the first one the highest: 256 times the
// fraction, rounded up.
INLINE void pack_trits(const u8 *restrict codes, int digits, int bytes, u8 *restrict out) {
    for (int j = 0; j < bytes; j++) {
        u32 number = 0;
        for (int digit = 0; digit < TRITS; digit++)
            number = 3 * number + (digit < digits ? codes[j + digit * bytes] : 0);
        out[j] = (u8)((number * 256 + 242) / 243);
    }
}

// 32 bytes of five codes, 16 bytes of five, 4 bytes of four; then d.
INLINE int make_tq1_0(const u32_at *restrict values, u8 *restrict block) {
    u8 codes[TQ_ELEMENTS];
    int ordinary = make_ternary(values, TQ_ELEMENTS, block + TQ1_0_BYTES - F16_BYTES, codes);
    pack_trits(codes, TRITS, 32, block);
    pack_trits(codes + 32 * TRITS, TRITS, 16, block + 32);
    pack_trits(codes + 48 * TRITS, TRITS - 1, 4, block + 48);
    return ordinary;
}

// --- Q1_0 -------------------------------------------------------------------------------------------------

// d, the mean magnitude, then a bit for each element, lowest first: whether it is 0 or more. Magnitudes are added one
// after the other, as by ggml; the sums of blocks side by side do not wait for each other.
INLINE int make_q1_0(const u32_at *restrict values, int count, u8 *restrict blocks) {
    int ordinary = 1;
    float sums[SIDE_BY_SIDE] = {};
    for (int j = 0; j < Q1_0_ELEMENTS; j++)
        _Pragma("clang loop vectorize(disable)") _Pragma("clang loop unroll(full)")
        for (int k = 0; k < count; k++)
            sums[k] += float_of(values[k * Q1_0_ELEMENTS + j] & F32_MAGNITUDE);
    for (int k = 0; k < count; k++) {
        u8 *block = blocks + k * Q1_0_BYTES, bits[Q1_0_ELEMENTS];
        ordinary &= write_f16(block, sums[k] / Q1_0_ELEMENTS);
        for (int j = 0; j < Q1_0_ELEMENTS; j++)
            bits[j] = values[k * Q1_0_ELEMENTS + j] <= ~F32_MAGNITUDE; // -0 is 0
        for (int j = 0; j < Q1_0_ELEMENTS / 8; j++)
            block[F16_BYTES + j] = gathered(((u64_at *)bits)[j]);
    }
    return ordinary;
}

// ----------------------------------------------------------------------------------------------------------

// A type whose `count` blocks of `size` elements are made at once, by a function that returns whether they are ordinary.
#define MADE(type, count, size, made)                          \
    case type:                                                 \
        elements = (count) * (size);                           \
        bytes = (count) * type##_BYTES;                        \
        ordinary = made;                                       \
        break

// Has the parameters of ggml_quantize_chunk. Returns the bytes of the blocks, 0 where they are not made here.
u64 quantise_here(int type, const float *values, void *out, i64 first, i64 rows, i64 columns, const float *weights) {
    const u32_at *source = (const u32_at *)(values + first);
    u8 *block = out;
    i64 elements = 0, bytes = 0;
    int ordinary = !weights || type >= TQ1_0;
    for (i64 left = rows * columns; ordinary && left > 0; left -= elements, source += elements, block += bytes) {
        int some = (int)smaller(left / GROUP, BLOCKS_AT_ONCE);
        int many = left >= SIDE_BY_SIDE * Q1_0_ELEMENTS;
        switch (type) {
            MADE(Q4_0, some, GROUP, make_levels(source, some, block, 4, 0));
            MADE(Q4_1, some, GROUP, make_levels(source, some, block, 4, 1));
            MADE(Q5_0, some, GROUP, make_levels(source, some, block, 5, 0));
            MADE(Q5_1, some, GROUP, make_levels(source, some, block, 5, 1));
            MADE(TQ1_0, 1, TQ_ELEMENTS, make_tq1_0(source, block));
            MADE(TQ2_0, 1, TQ_ELEMENTS, make_tq2_0(source, block));
            MADE(Q2_0, 1, Q2_0_ELEMENTS, make_q2_0(source, block));
            MADE(Q1_0, many ? SIDE_BY_SIDE : 1, Q1_0_ELEMENTS,
                 many ? make_q1_0(source, SIDE_BY_SIDE, block) : make_q1_0(source, 1, block));
        default:
            return 0;
        }
    }
    return ordinary ? (u64)(block - (u8 *)out) : 0;
}
