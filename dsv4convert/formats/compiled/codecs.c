// Compiled twins of the numpy codecs in the parent folder: the same bytes and the same counts.
//
// Each function does one ordinary tile in plain loops, which the compiler turns into vector instructions. A tile
// that is not ordinary (NaN, infinity, a scale at the ends of the range) makes it return NEEDS_FALLBACK, and the
// numpy codec does the whole tile again, so that rare cases are written once. The bit layouts and the reasons are
// in the spec blocks of e4m3.py, e2m1.py, mxfp4.py, q8_0.py and bf16.py.
//
// Arrays are flat, contiguous and little-endian; inputs and outputs do not overlap. `twins.py` checks shapes and types.
// Compile without -ffast-math and with -ffp-contract=off: every operation rounds as numpy's.

#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef int64_t i64;
// Elements of arrays, which may lie at any address: a tensor in a file starts where it starts.
typedef u16 __attribute__((aligned(1), may_alias)) u16_at;
typedef u32 __attribute__((aligned(1), may_alias)) u32_at;

// The elements of a group, where a loop over bytes would be done in wider integers.
typedef u8 lanes __attribute__((vector_size(32)));
typedef u8 lanes_at __attribute__((vector_size(32), aligned(1), may_alias));
// The same of 16 bits, as they are and as pairs, and a group's bytes in packed FP4.
typedef u16 halves __attribute__((vector_size(64)));
typedef u16 halves_at __attribute__((vector_size(64), aligned(1), may_alias));
typedef u32 pairs __attribute__((vector_size(64)));
typedef _Bool flags __attribute__((ext_vector_type(32)));
typedef u8 packed_lanes __attribute__((vector_size(16)));
typedef u8 packed_lanes_at __attribute__((vector_size(16), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
// Before a short loop over bytes: unrolled early, it would be taken for single bytes to be gathered into vectors.
#define KEEP_LOOP _Pragma("clang loop unroll(disable)")
// Before a loop over groups with little to do for each: its speed then depends less on the address that it lies at.
#define FOUR_AT_ONCE _Pragma("clang loop unroll_count(4)")
// Before a loop that is as quick as the memory: more vectors in flight make it slower.
#define TWO_VECTORS _Pragma("clang loop interleave_count(2)")

enum {
    NEEDS_FALLBACK = -1,
    GROUP = 32,       // elements that share a scale along a row
    PACKED = 16,      // their bytes in packed FP4
    MXFP4_BYTES = 17, // e8m0 scale, 16 bytes of codes
    Q8_0_BYTES = 34,  // float16 d, 32 int8
    FP8_TILE = 128,   // rows and columns that share a scale once FP4 is FP8
    TILE_GROUPS = FP8_TILE / GROUP,
    E4M3_BIAS = 7,
    E4M3_FIRST_NORMAL = 8, // code of 2^-6
    CHUNK = 1 << 14, // elements that 32-bit counters count before they are added up
};

enum { F32, BF16, F16 };

#define F32_MAGNITUDE 0x7FFFFFFFu
#define F32_INFINITY 0x7F800000u
#define F32_MANTISSA 0x007FFFFFu
#define F32_MIN_NORMAL 0x00800000u
#define PUBLISHED_AMAX 0x38D1B717u // 1e-4: the published quantiser takes no smaller one
#define BF16_OVERFLOW 0x7F7F8000u // as float32: rounds to infinity
#define F16_INFINITY 0x7C00u
#define F16_MIN_NORMAL (113u << 23) // as float32: 2^-14
#define F16_OVERFLOW 0x477FF000u    // as float32: 65520, rounds to infinity
#define F16_REBIAS (112u << 10)     // 127 - 15, at a float16's exponent
#define TO_INTEGER 0x1p23f          // a float32 this large has no places behind the point

INLINE float float_of(u32 bits) {
    union { u32 bits; float value; } both = {bits};
    return both.value;
}

INLINE u32 bits_of(float value) {
    union { float value; u32 bits; } both = {value};
    return both.bits;
}

INLINE lanes splat(u8 value) { return (lanes){} + value; }

INLINE lanes where(lanes condition, lanes yes, lanes no) { return (condition & yes) | (~condition & no); }

INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

INLINE int all_within(const u8 *restrict bytes, i64 size, u8 first, u8 last) {
    u8 smallest = 0xFF, largest = 0;
    for (i64 i = 0; i < size; i++) {
        smallest = bytes[i] < smallest ? bytes[i] : smallest;
        largest = bytes[i] > largest ? bytes[i] : largest;
    }
    return smallest >= first && largest <= last;
}

// --- one element ------------------------------------------------------------------------------------------

// A thread may flush subnormal numbers to zero; results would then not be exact, and the numpy codec says so.
INLINE int flushes_subnormals(void) {
    volatile float smallest_normal = 0x1p-126f;
    return smallest_normal * 0.5f == 0.0f;
}

// e8m0: 2^(byte - 127). Byte 0 (a float32 subnormal) and 255 (NaN) are for numpy.
INLINE float e8m0(u8 byte) { return float_of((u32)byte << 23); }

// A group of packed FP4: element 2i in the low nibble of byte i, 2i + 1 in the high one.
INLINE void unpack(const u8 *packed, u8 *codes) {
    KEEP_LOOP
    for (int i = 0; i < PACKED; i++) {
        codes[2 * i] = packed[i] & 0xF;
        codes[2 * i + 1] = packed[i] >> 4;
    }
}

// float16 without the sign: the bits for a magnitude below 65520, rounded to nearest even; the bits for a magnitude that
// it holds exactly; the value of bits. A processor that converts float16 itself does so whatever the thread does with
// subnormals.
#ifdef __F16C__
typedef union { u16 bits; _Float16 value; } f16_parts;

INLINE u32 rounded_f16(float magnitude) { return ((f16_parts){.value = (_Float16)magnitude}).bits; }

INLINE u32 exact_f16(float magnitude) { return rounded_f16(magnitude); }

INLINE float f16(u32 bits) { return (float)((f16_parts){.bits = (u16)bits}).value; }
#else
INLINE u32 rounded_f16(float magnitude) {
    u32 bits = bits_of(magnitude);
    u32 normal = ((bits + 0xFFF + ((bits >> 13) & 1)) >> 13) - F16_REBIAS;
    u32 subnormal = bits_of(magnitude * 0x1p24f + TO_INTEGER) & F32_MANTISSA;
    return bits < F16_MIN_NORMAL ? subnormal : normal;
}

INLINE u32 exact_f16(float magnitude) {
    u32 normal = (bits_of(magnitude) >> 13) - F16_REBIAS;
    u32 subnormal = (u32)(int32_t)(magnitude * 0x1p24f);
    return bits_of(magnitude) < F16_MIN_NORMAL ? subnormal : normal;
}

INLINE float f16(u32 magnitude) {
    float subnormal = (float)(int32_t)magnitude * 0x1p-24f;
    float normal = float_of((magnitude << 13) + (112u << 23));
    float value = magnitude < 0x400 ? subnormal : normal;
    return magnitude == F16_INFINITY ? float_of(F32_INFINITY) : value;
}
#endif

// e4m3 without the sign: eeee mmm, bias 7; NaN reads as 480. Touches no float32 subnormal. Moved to where float16 has its
// exponent and mantissa, the bits are a number 2^8 times smaller, for the bias there is 15.
INLINE float e4m3(u32 magnitude) {
#ifdef __F16C__
    return f16(magnitude << 7) * 0x1p8f;
#else
    float subnormal = (float)(int32_t)magnitude * 0x1p-9f;
    float normal = float_of((magnitude << 20) + ((127u - E4M3_BIAS) << 23));
    return magnitude < E4M3_FIRST_NORMAL ? subnormal : normal;
#endif
}

// e2m1 without the sign: 0, .5, 1, 1.5, 2, 3, 4, 6. Code 2 is 1.0; code 1, the only subnormal, the exponent below. As
// float16, see e4m3, 2^14 times smaller.
INLINE float e2m1(u32 magnitude) {
#ifdef __F16C__
    return f16(magnitude << 9) * 0x1p14f;
#else
    u32 bits = ((magnitude - (magnitude == 1)) << 22) + (126u << 23);
    return float_of(magnitude == 0 ? 0 : bits);
#endif
}

// The bits of a magnitude that the type holds exactly, with a sign (bit 31).
INLINE u32 as_type(int type, float magnitude, u32 sign) {
    if (type == F16)
        return exact_f16(magnitude) | sign >> 16;
    u32 bits = bits_of(magnitude) | sign;
    return type == BF16 ? bits >> 16 : bits;
}

// Reads float32 bits, or bfloat16 bits widened.
INLINE u32 load(const void *values, i64 i, int type) {
    return type == F32 ? ((const u32_at *)values)[i] : (u32)((const u16_at *)values)[i] << 16;
}

// --- FP8 to F32, BF16, F16 --------------------------------------------------------------------------------

// An e4m3 code times a scale. The code as float16, see e4m3, is multiplied by 2^8 and the scale in one go; without
// float16, the scale is a number added to the exponent.
INLINE u32 fp8_as(int type, u8 code, u8 scale) {
#ifdef __F16C__
    // With its sign: copied upwards, it stays in the highest of sixteen bits.
    return as_type(type, f16((u32)(int8_t)code << 7 & 0xBFFF) * (0x1p8f * e8m0(scale)), 0);
#else
    u32 magnitude = code & 0x7F;
    float subnormal = (float)(int32_t)magnitude * (0x1p-9f * e8m0(scale));
    float normal = float_of((magnitude << 20) + ((u32)(scale - E4M3_BIAS) << 23));
    return as_type(type, magnitude < E4M3_FIRST_NORMAL ? subnormal : normal, (u32)code >> 7 << 31);
#endif
}

INLINE int has_nan(const u8 *restrict codes, i64 size) {
    u8 largest = 0;
    for (i64 i = 0; i < size; i++) {
        u8 magnitude = codes[i] & 0x7F;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest == 0x7F;
}

// Codes [rows, columns], one scale per block of height x width; with scales from `first` to `last` all products are
// exact, and none is a float32 subnormal.
INLINE i64 fp8_to(int type, u8 first, u8 last, const u8 *restrict weight, const u8 *restrict scale, void *restrict out,
                  i64 rows, i64 columns, i64 height, i64 width) {
    i64 block_columns = (columns + width - 1) / width;
    for (i64 row = 0; row < rows; row++) {
        const u8 *row_scale = scale + row / height * block_columns;
        if (has_nan(weight + row * columns, columns))
            return NEEDS_FALLBACK;
        for (i64 block = 0; block < block_columns; block++) {
            u8 block_scale = row_scale[block];
            if (block_scale < first || block_scale > last)
                return NEEDS_FALLBACK;
            i64 stop = row * columns + smaller((block + 1) * width, columns);
            for (i64 i = row * columns + block * width; i < stop; i++) {
                u32 bits = fp8_as(type, weight[i], block_scale);
                if (type == F32)
                    ((u32_at *)out)[i] = bits;
                else
                    ((u16_at *)out)[i] = (u16)bits;
            }
        }
    }
    return 0;
}

// 2^-9 * 2^(10 - 127) = 2^-126, and 448 * 2^(246 - 127) < 2^128.
i64 fp8_to_f32(const u8 *restrict weight, const u8 *restrict scale, u32_at *restrict out, i64 rows, i64 columns,
               i64 height, i64 width) {
    return fp8_to(F32, 10, 246, weight, scale, out, rows, columns, height, width);
}

i64 fp8_to_bf16(const u8 *restrict weight, const u8 *restrict scale, u16_at *restrict out, i64 rows, i64 columns,
                i64 height, i64 width) {
    return fp8_to(BF16, 10, 246, weight, scale, out, rows, columns, height, width);
}

// 2^-9 * 2^(112 - 127) = 2^-24, and 448 * 2^(134 - 127) < 65520.
i64 fp8_to_f16(const u8 *restrict weight, const u8 *restrict scale, u16_at *restrict out, i64 rows, i64 columns,
               i64 height, i64 width) {
    return fp8_to(F16, 112, 134, weight, scale, out, rows, columns, height, width);
}

// --- FP4 to F32, BF16, F16 --------------------------------------------------------------------------------

INLINE i64 fp4_to(int type, u8 first_byte, u8 last_byte, const u8 *restrict packed, const u8 *restrict scale,
                  u32_at *restrict out, i64 groups) {
    if (flushes_subnormals() || !all_within(scale, groups, first_byte, last_byte))
        return NEEDS_FALLBACK;
    for (i64 group = 0; group < groups; group++) {
        float factor = e8m0(scale[group]);
        for (int j = 0; j < PACKED; j++) {
            i64 i = group * PACKED + j;
            u32 low = packed[i] & 0xF, high = packed[i] >> 4;
            u32 first = as_type(type, e2m1(low & 7) * factor, low >> 3 << 31);
            u32 second = as_type(type, e2m1(high & 7) * factor, high >> 3 << 31);
            if (type == F32) {
                out[2 * i] = first;
                out[2 * i + 1] = second;
            } else {
                out[i] = first | second << 16; // both elements of a byte stay in its lane
            }
        }
    }
    return 0;
}

// 6 * 2^(252 - 127) < 2^128.
i64 fp4_to_f32(const u8 *restrict packed, const u8 *restrict scale, u32_at *restrict out, i64 groups) {
    return fp4_to(F32, 1, 252, packed, scale, out, groups);
}

i64 fp4_to_bf16(const u8 *restrict packed, const u8 *restrict scale, u32_at *restrict out, i64 groups) {
    return fp4_to(BF16, 1, 252, packed, scale, out, groups);
}

// 0.5 * 2^(104 - 127) = 2^-24, and 6 * 2^(140 - 127) < 65520.
i64 fp4_to_f16(const u8 *restrict packed, const u8 *restrict scale, u32_at *restrict out, i64 groups) {
    return fp4_to(F16, 104, 140, packed, scale, out, groups);
}

// --- FP4 to MXFP4 and to FP8 ------------------------------------------------------------------------------

// Moves bits only. Returns how many scales are NaN.
i64 fp4_to_mxfp4(const u8 *restrict packed, const u8 *restrict scale, u8 *restrict out, i64 groups) {
    i64 nan = 0;
    if (!all_within(scale, groups, 0, 0xFE))
        for (i64 group = 0; group < groups; group++)
            nan += scale[group] == 0xFF;
    FOUR_AT_ONCE
    for (i64 group = 0; group < groups; group++) {
        const u8 *first = packed + group * PACKED, *second = first + PACKED / 2; // elements 0 to 15, 16 to 31
        u8 *block = out + group * MXFP4_BYTES;
        block[0] = scale[group];
        KEEP_LOOP
        for (int j = 0; j < PACKED / 2; j++) {
            block[1 + 2 * j] = (u8)((first[j] & 0x0F) | second[j] << 4);
            block[2 + 2 * j] = (u8)(first[j] >> 4 | (second[j] & 0xF0));
        }
    }
    return nan;
}

// --- FP4 to NVFP4 -----------------------------------------------------------------------------------------

enum { EXACT_SPAN = 17 }; // e4m3 has the powers of two from 2^8 down to 2^-9

INLINE i64 largest_allows(const u8 *restrict scale, i64 groups, i64 largest) {
    i64 lowest = largest > EXACT_SPAN ? largest - EXACT_SPAN : 0;
    return all_within(scale, groups, (u8)lowest, (u8)largest);
}

// Codes move unchanged where every scale has its power of two in e4m3.
i64 fp4_to_nvfp4(const u8 *restrict packed, const u8 *restrict scale, u8 *restrict out, i64 groups, i64 largest) {
    if (!largest_allows(scale, groups, largest))
        return NEEDS_FALLBACK;
    for (i64 i = 0; i < groups * PACKED; i++)
        out[i] = packed[i];
    return 0;
}

// The e4m3 code of 2^(scale - largest + 8), twice.
i64 fp4_to_nvfp4_scales(const u8 *restrict scale, u16_at *restrict out, i64 groups, i64 largest) {
    if (!largest_allows(scale, groups, largest))
        return NEEDS_FALLBACK;
    for (i64 group = 0; group < groups; group++) {
        u16 below = (u16)(largest - scale[group]);
        u16 normal = (u16)((15 - below) << 3), subnormal = (u16)(below == 15 ? 4 : below == 16 ? 2 : 1);
        u16 code = below < 15 ? normal : subnormal;
        out[group] = (u16)(code | code << 8);
    }
    return 0;
}

enum { RUN = 16, RUNS = 4, NVFP4_BYTES = 36 }; // of ggml's block of 64: elements under a scale, such runs, bytes

// Four scales, then of each run byte k with elements k and k + 8. A scale that ggml lacks is for numpy to refuse.
i64 nvfp4_to_ggml(const u8 *restrict packed, const u8 *restrict scale, u8 *restrict out, i64 blocks) {
    if (!all_within(scale, blocks * RUNS, 0, 0x7E))
        return NEEDS_FALLBACK;
    for (i64 number = 0; number < blocks; number++) {
        u8 *block = out + number * NVFP4_BYTES;
        for (int run = 0; run < RUNS; run++) {
            const u8 *first = packed + (number * RUNS + run) * (RUN / 2), *second = first + RUN / 4;
            u8 *codes = block + RUNS + run * (RUN / 2);
            block[run] = scale[number * RUNS + run];
            for (int i = 0; i < RUN / 4; i++) {
                codes[2 * i] = (u8)((first[i] & 0x0F) | second[i] << 4);
                codes[2 * i + 1] = (u8)(first[i] >> 4 | (second[i] & 0xF0));
            }
        }
    }
    return 0;
}

// Scales [rows, groups] to one per tile: the largest / 2^6, at least 2^-127. Returns the smallest exponent of a scale
// relative to its tile's, or SCALE_IS_NAN, below any.
enum { SCALE_IS_NAN = -1024, TILES_AT_ONCE = 64 };

INLINE i64 tile_scales(const u8 *restrict scale, u8 *restrict tiles, i64 rows, i64 groups) {
    i64 lowest = 0;
    for (i64 top = 0; top < rows; top += FP8_TILE) {
        for (i64 left = 0; left < groups; left += TILES_AT_ONCE * TILE_GROUPS) {
            u8 low[TILES_AT_ONCE * TILE_GROUPS], high[TILES_AT_ONCE * TILE_GROUPS];
            i64 wide = smaller(groups - left, TILES_AT_ONCE * TILE_GROUPS);
            for (i64 g = 0; g < wide; g++)
                low[g] = high[g] = scale[top * groups + left + g];
            for (i64 row = top + 1; row < smaller(top + FP8_TILE, rows); row++) {
                const u8 *here = scale + row * groups + left;
                for (i64 g = 0; g < wide; g++) {
                    low[g] = here[g] < low[g] ? here[g] : low[g];
                    high[g] = here[g] > high[g] ? here[g] : high[g];
                }
            }
            for (i64 g = 0; g < wide; g += TILE_GROUPS) {
                u8 smallest = low[g], largest = high[g];
                for (i64 k = g + 1; k < smaller(g + TILE_GROUPS, wide); k++) {
                    smallest = low[k] < smallest ? low[k] : smallest;
                    largest = high[k] > largest ? high[k] : largest;
                }
                if (largest == 0xFF)
                    return SCALE_IS_NAN;
                u8 tile = largest > 6 ? largest - 6 : 0;
                *tiles++ = tile;
                lowest = smaller(lowest, (i64)smallest - tile);
            }
        }
    }
    return lowest;
}

i64 fp4_to_fp8_scales(const u8 *restrict scale, u8 *restrict tiles, i64 rows, i64 groups) {
    return tile_scales(scale, tiles, rows, groups) == SCALE_IS_NAN ? NEEDS_FALLBACK : 0;
}

// Exponents of the e2m1 codes are counted from a base for each group. A relative scale of 2^-5 and more makes every
// product zero or a normal e4m3 number: 0.5 * 2^-5 = 2^-6.
i64 fp4_to_fp8(const u8 *restrict packed, const u8 *restrict scale, u8 *restrict out, u8 *restrict tiles, i64 rows,
               i64 groups) {
    if (tile_scales(scale, tiles, rows, groups) < -5)
        return NEEDS_FALLBACK;
    i64 tile_columns = (groups + TILE_GROUPS - 1) / TILE_GROUPS;
    for (i64 row = 0; row < rows; row++) {
        const u8 *row_tiles = tiles + row / FP8_TILE * tile_columns;
        FOUR_AT_ONCE
        for (i64 g = 0; g < groups; g++) {
            i64 group = row * groups + g;
            // Code 2 is 1.0, exponent 7 in e4m3; its own bits, shifted into place, bring 1 of it.
            u8 base = (u8)((scale[group] - row_tiles[g / TILE_GROUPS] + 6) << 3);
            u8 codes[GROUP];
            unpack(packed + group * PACKED, codes);
            for (int j = 0; j < GROUP; j++) {
                u8 magnitude = codes[j] & 7;
                u8 bits = (u8)((magnitude > 0 ? base : 0) + (magnitude > 1 ? magnitude << 2 : 0));
                out[group * GROUP + j] = (u8)(bits | (codes[j] & 8) << 4);
            }
        }
    }
    return 0;
}

// --- to Q8_0 ----------------------------------------------------------------------------------------------

// Writes d; returns whether it is NaN, infinite, or has vanished.
INLINE int store_d(u8 *block, u32 d, u32 largest) {
    block[0] = (u8)d;
    block[1] = (u8)(d >> 8);
    return d >= F16_INFINITY || (d == 0 && largest != 0);
}

// One multiplier per largest magnitude makes q of every magnitude: trunc(magnitude * multiplier + 1/2). `d` holds d for
// (largest magnitude, scale byte). Both come from q8_0.py, which says from and to which scale byte they hold.
i64 fp8_to_q8_0(const u8 *restrict weight, const u8 *restrict scale, const u32_at *restrict multipliers,
                const u16_at *restrict d, u8 *restrict out, i64 rows, i64 columns, i64 height, i64 width, i64 first,
                i64 last) {
    i64 block_columns = (columns + width - 1) / width;
    for (i64 row = 0; row < rows; row++) {
        const u8 *row_scale = scale + row / height * block_columns;
        for (i64 column_block = 0; column_block < block_columns; column_block++) {
            u8 byte = row_scale[column_block];
            if (byte < first || byte > last)
                return NEEDS_FALLBACK;
            i64 stop = row * columns + smaller((column_block + 1) * width, columns);
            for (i64 start = row * columns + column_block * width; start < stop; start += GROUP) {
                const u8 *codes = weight + start;
                u8 *block = out + start / GROUP * Q8_0_BYTES;
                u8 largest = 0;
                for (int j = 0; j < GROUP; j++) {
                    u8 magnitude = codes[j] & 0x7F;
                    largest = magnitude > largest ? magnitude : largest;
                }
                if (store_d(block, d[largest << 8 | byte], largest))
                    return NEEDS_FALLBACK;
                float multiplier = float_of(multipliers[largest]);
                for (int j = 0; j < GROUP; j++) {
                    int32_t level = (int32_t)(e4m3(codes[j] & 0x7F) * multiplier + 0.5f);
                    block[2 + j] = (u8)(codes[j] & 0x80 ? -level : level);
                }
            }
        }
    }
    return 0;
}

i64 fp4_to_q8_0(const u8 *restrict packed, const u8 *restrict scale, const u32_at *restrict multipliers,
                const u16_at *restrict d, u8 *restrict out, i64 groups, i64 first, i64 last) {
    for (i64 group = 0; group < groups; group++) {
        u8 codes[GROUP], largest = 0;
        u8 *block = out + group * Q8_0_BYTES;
        unpack(packed + group * PACKED, codes);
        for (int j = 0; j < GROUP; j++) {
            u8 magnitude = codes[j] & 7;
            largest = magnitude > largest ? magnitude : largest;
        }
        u8 byte = scale[group];
        if (byte < first || byte > last || store_d(block, d[largest << 8 | byte], largest))
            return NEEDS_FALLBACK;
        float multiplier = float_of(multipliers[largest]);
        for (int j = 0; j < GROUP; j++) {
            int32_t level = (int32_t)(e2m1(codes[j] & 7) * multiplier + 0.5f);
            block[2 + j] = (u8)(codes[j] & 8 ? -level : level);
        }
    }
    return 0;
}

// The largest magnitude of a group, as float32 bits.
INLINE u32 largest_in_group(int type, const void *restrict values, i64 group) {
    u32 largest = 0;
    for (int j = 0; j < GROUP; j++) {
        u32 magnitude = load(values, group * GROUP + j, type) & F32_MAGNITUDE;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

// To the nearest integer, half away from zero: the float below 1/2, added, is too little to carry what lies below a half.
INLINE int32_t nearest(float value) {
    float below_half = float_of(bits_of(0x1.FFFFFEp-2f) | (bits_of(value) & ~F32_MAGNITUDE));
    return (int32_t)(value + below_half);
}

// llama.cpp's formula in float32: d = amax / 127, q = x * (1/d), half away from zero. The scales of some groups are made
// at once, since the divisions of a single one would be waited for.
INLINE i64 float_to_q8_0(int type, const void *restrict values, u8 *restrict out, i64 groups) {
    enum { AT_ONCE = 64 };
    for (i64 first = 0; first < groups; first += AT_ONCE) {
        u32 largest[AT_ONCE], d_bits[AT_ONCE], needs_fallback = 0;
        float inverses[AT_ONCE];
        i64 count = smaller(AT_ONCE, groups - first);
        for (i64 g = 0; g < count; g++)
            largest[g] = largest_in_group(type, values, first + g);
        for (i64 g = 0; g < count; g++) {
            float d = float_of(largest[g]) / 127.0f;
            inverses[g] = d == 0.0f ? 0.0f : 1.0f / d;
            d_bits[g] = rounded_f16(d);
            u32 too_large = largest[g] >= F32_INFINITY || bits_of(d) >= F16_OVERFLOW;
            u32 too_small = bits_of(inverses[g]) >= F32_INFINITY || (d_bits[g] == 0 && largest[g] != 0);
            needs_fallback |= too_large | too_small;
        }
        if (needs_fallback)
            return NEEDS_FALLBACK;
        for (i64 g = 0; g < count; g++) {
            u8 *block = out + (first + g) * Q8_0_BYTES;
            block[0] = (u8)d_bits[g];
            block[1] = (u8)(d_bits[g] >> 8);
            for (int j = 0; j < GROUP; j++)
                block[2 + j] = (u8)nearest(float_of(load(values, (first + g) * GROUP + j, type)) * inverses[g]);
        }
    }
    return 0;
}

i64 f32_to_q8_0(const u32_at *restrict values, u8 *restrict out, i64 groups) {
    return float_to_q8_0(F32, values, out, groups);
}

i64 bf16_to_q8_0(const u16_at *restrict values, u8 *restrict out, i64 groups) {
    return float_to_q8_0(BF16, values, out, groups);
}

// --- to MXFP4 by rounding ---------------------------------------------------------------------------------

// Rounds 32 values * 2^(127 - scale) to e2m1 codes, ties to even. A code is k + 2e for a magnitude in [2^e, 2^(e+1)),
// e = 0 below 1, where k counts steps of 2^(e-1). Adding 2^(22+e), whose last place is such a step, makes the
// processor round and leaves k in the lowest bits. Returns how many values were rounded.
INLINE u32 encode_mxfp4(int type, const void *restrict values, i64 start, u32 scale, u8 *restrict codes) {
    float inverse = float_of((254 - scale) << 23);
    u32 rounded = 0;
    for (int j = 0; j < GROUP; j++) {
        u32 source = load(values, start + j, type);
        float y = float_of(source & F32_MAGNITUDE) * inverse;
        u32 exponent = bits_of(y) & F32_INFINITY;
        exponent = exponent > 127u << 23 ? exponent : 127u << 23;
        float magic = float_of(exponent + (22u << 23));
        float lifted = y + magic;
        rounded += lifted - magic != y;
        u32 magnitude = (bits_of(lifted) & 7) + (exponent >> 22) - 2 * 127;
        codes[j] = (u8)(magnitude | (source >> 28 & 8));
    }
    return rounded;
}

// Whether twice the scale lacks one of the codes: 0.5 and 1.5 have no half.
INLINE int needs_scale(const u8 *codes) {
    int odd = 0;
    for (int j = 0; j < GROUP; j++)
        odd |= (codes[j] & 7) == 1 || (codes[j] & 7) == 3;
    return odd;
}

INLINE void store_mxfp4(u8 *block, u8 scale, const u8 *restrict codes) {
    block[0] = scale;
    KEEP_LOOP
    for (int j = 0; j < PACKED; j++)
        block[1 + j] = (u8)(codes[j] | codes[PACKED + j] << 4);
}

// Returns how many values were rounded.
INLINE i64 float_to_mxfp4(int type, const void *restrict values, u8 *restrict out, i64 groups) {
    i64 changed = 0;
    if (flushes_subnormals())
        return NEEDS_FALLBACK;
    for (i64 group = 0; group < groups; group++) {
        u8 *block = out + group * MXFP4_BYTES, codes[GROUP];
        u32 largest = largest_in_group(type, values, group);
        // 6 = 1.5 * 2^2: a largest 1.m * 2^k takes the scale 2^(k-2), or 2^(k-1) once 1.m passes 1.5.
        u32 mantissa = largest & F32_MANTISSA;
        int32_t scale = (int32_t)(largest >> 23) - 2 + (mantissa > 0x400000);
        if (scale > 127 || (scale < 2 && largest != 0))
            return NEEDS_FALLBACK;
        scale = scale < 1 ? 1 : scale; // a block of zeros
        u32 rounded = encode_mxfp4(type, values, group * GROUP, (u32)scale, codes);
        changed += rounded;
        // Exact, with a 6, and no code that twice the scale lacks: that scale is preferred.
        if (mantissa == 0x400000 && rounded == 0 && !needs_scale(codes)) {
            scale++;
            encode_mxfp4(type, values, group * GROUP, (u32)scale, codes);
        }
        store_mxfp4(block, (u8)scale, codes);
    }
    return changed;
}

i64 f32_to_mxfp4(const u32_at *restrict values, u8 *restrict out, i64 groups) {
    return float_to_mxfp4(F32, values, out, groups);
}

i64 bf16_to_mxfp4(const u16_at *restrict values, u8 *restrict out, i64 groups) {
    return float_to_mxfp4(BF16, values, out, groups);
}

// A group of FP8 to MXFP4 in e4m3's own codes, which are ordered as their magnitudes are. Where the group's scale S is
// the code `one`, what lies below S becomes 0, 0.5 or 1 by comparison with S/4 and 3/4 S, and the rest loses the lower
// two of three bits of its mantissa, ties to even; a carry runs into the exponent, as it should. Returns how many were
// rounded, or NEEDS_FALLBACK. From 10 to 246, FP8 times its scale is a normal float32; see fp8_to_f32.
INLINE int fp8_group_to_mxfp4(const u8 *restrict group, u8 byte, u8 *restrict block) {
    lanes codes = *(const lanes_at *)group, magnitudes = codes & 0x7F;
    u8 largest = __builtin_reduce_max(magnitudes);
    // As in float_to_mxfp4: S is a quarter of the largest, or half of it past 1.5 times a power of two.
    int32_t exponent = (largest >> 3) - 2 + ((largest & 7) > 4);
    int32_t scale = byte + exponent - E4M3_BIAS;
    if (largest == 0)
        exponent = scale = 1;
    if (largest == 0x7F || byte < 10 || byte > 246 || exponent < 1 || (scale < 2 && largest != 0))
        return NEEDS_FALLBACK;
    u8 one = (u8)(exponent << 3), half = exponent > 1 ? one - 8 : 4;
    u8 quarter = exponent > 2 ? one - 16 : (u8)(2 * exponent), three_quarters = half + (exponent > 1 ? 4 : 2);
    u8 below = (u8)(2 * exponent - 2); // the code of S is 2
    lanes made = ((magnitudes + 1 + (magnitudes >> 2 & 1)) >> 2) - below;
    made = where(magnitudes < one, splat(2), made);
    made = where(magnitudes < three_quarters, splat(1), made);
    made = where(magnitudes <= quarter, splat(0), made);
    lanes back = where(made == 1, splat(half), where(made == 0, splat(0), (made + below) << 2));
    int rounded = __builtin_reduce_add((lanes)(back != magnitudes) & 1);
    if ((largest & 7) == 4 && rounded == 0 && !__builtin_reduce_or((lanes)(made == 1 | made == 3))) {
        scale++;
        made = where(made > 2, made - 2, made >> 1);
    }
    made |= codes >> 4 & 8;
    store_mxfp4(block, (u8)scale, (const u8 *)&made);
    return rounded;
}

// Returns how many values were rounded.
i64 fp8_to_mxfp4(const u8 *restrict weight, const u8 *restrict scale, u8 *restrict out, i64 rows, i64 columns,
                 i64 height, i64 width) {
    i64 block_columns = (columns + width - 1) / width, changed = 0;
    for (i64 row = 0; row < rows; row++) {
        const u8 *row_scale = scale + row / height * block_columns;
        for (i64 column_block = 0; column_block < block_columns; column_block++) {
            i64 stop = row * columns + smaller((column_block + 1) * width, columns);
            for (i64 start = row * columns + column_block * width; start < stop; start += GROUP) {
                int rounded =
                    fp8_group_to_mxfp4(weight + start, row_scale[column_block], out + start / GROUP * MXFP4_BYTES);
                if (rounded == NEEDS_FALLBACK)
                    return NEEDS_FALLBACK;
                changed += rounded;
            }
        }
    }
    return changed;
}

// --- to FP8 and FP4 with scales, as the published quantiser ------------------------------------------------

// The largest magnitude of a block, as float32 bits.
INLINE u32 largest_of(const u32_at *restrict values, i64 rows, i64 columns, i64 stride) {
    u32 largest = 0;
    for (i64 row = 0; row < rows; row++)
        for (i64 i = 0; i < columns; i++) {
            u32 magnitude = values[row * stride + i] & F32_MAGNITUDE;
            largest = magnitude > largest ? magnitude : largest;
        }
    return largest;
}

// 448 = 1.75 * 2^8: a largest 1.m * 2^k takes the scale 2^(k-8), or 2^(k-7) once 1.m passes 1.75.
INLINE u32 fp8_scale_of(u32 largest) {
    u32 amax = largest > PUBLISHED_AMAX ? largest : PUBLISHED_AMAX;
    return (amax >> 23) - 8 + ((amax & F32_MANTISSA) > 0x600000);
}

// Adds to counts: values rounded among e4m3's normal numbers, and below them.
INLINE void fp8_row(const u32_at *restrict values, u8 *restrict out, i64 columns, float inverse, i64 *restrict counts) {
    u32 inexact = 0, tiny = 0;
    for (i64 i = 0; i < columns; i++) {
        u32 source = values[i], magnitude = source & F32_MAGNITUDE;
        float y = float_of(magnitude) * inverse;
        u32 subnormal = bits_of(y * 0x1p9f + TO_INTEGER) & 0xF;
        u32 normal = ((bits_of(y) + 0x7FFFF + (bits_of(y) >> 20 & 1)) >> 20) - ((127 - E4M3_BIAS) << 3);
        u32 is_small = y < 0x1p-6f;
        u32 code = is_small ? subnormal : normal;
        u32 lost = (e4m3(code) != y) | ((code == 0) & (magnitude != 0));
        inexact += lost;
        tiny += lost & is_small;
        out[i] = (u8)(code | (source >> 24 & 0x80));
    }
    counts[0] += inexact - tiny;
    counts[1] += tiny;
}

i64 f32_to_fp8(const u32_at *restrict values, u8 *restrict out, i64 *restrict counts, i64 rows, i64 columns,
               i64 height, i64 width) {
    counts[0] = counts[1] = 0;
    if (flushes_subnormals())
        return NEEDS_FALLBACK;
    for (i64 top = 0; top < rows; top += height)
        for (i64 left = 0; left < columns; left += width) {
            i64 high = smaller(height, rows - top), wide = smaller(width, columns - left);
            u32 largest = largest_of(values + top * columns + left, high, wide, columns);
            if (largest >= F32_INFINITY)
                return NEEDS_FALLBACK;
            float inverse = float_of((254 - fp8_scale_of(largest)) << 23);
            for (i64 row = top; row < top + high; row++)
                fp8_row(values + row * columns + left, out + row * columns + left, wide, inverse, counts);
        }
    return 0;
}

i64 f32_to_fp8_scales(const u32_at *restrict values, u8 *restrict out, i64 rows, i64 columns, i64 height, i64 width) {
    for (i64 top = 0; top < rows; top += height)
        for (i64 left = 0; left < columns; left += width) {
            i64 high = smaller(height, rows - top), wide = smaller(width, columns - left);
            u32 largest = largest_of(values + top * columns + left, high, wide, columns);
            if (largest >= F32_INFINITY)
                return NEEDS_FALLBACK;
            *out++ = (u8)fp8_scale_of(largest);
        }
    return 0;
}

// 6 = 1.5 * 2^2; 2^-126 is the smallest scale.
INLINE int32_t fp4_scale_of(u32 largest) {
    int32_t scale = (int32_t)(largest >> 23) - 2 + ((largest & F32_MANTISSA) > 0x400000);
    return scale < 1 ? 1 : scale;
}

// Returns how many values were rounded.
i64 f32_to_fp4(const u32_at *restrict values, u8 *restrict out, i64 groups) {
    i64 changed = 0;
    if (flushes_subnormals())
        return NEEDS_FALLBACK;
    for (i64 group = 0; group < groups; group++) {
        u8 codes[GROUP];
        u32 largest = largest_of(values + group * GROUP, 1, GROUP, GROUP);
        int32_t scale = fp4_scale_of(largest);
        // Past a scale of 1, what is divided by it may vanish.
        if (scale > 127 || largest >= F32_INFINITY)
            return NEEDS_FALLBACK;
        changed += encode_mxfp4(F32, values, group * GROUP, (u32)scale, codes);
        for (int j = 0; j < PACKED; j++)
            out[group * PACKED + j] = (u8)(codes[2 * j] | codes[2 * j + 1] << 4);
    }
    return changed;
}

i64 f32_to_fp4_scales(const u32_at *restrict values, u8 *restrict out, i64 groups) {
    for (i64 group = 0; group < groups; group++) {
        u32 largest = largest_of(values + group * GROUP, 1, GROUP, GROUP);
        if (largest >= F32_INFINITY)
            return NEEDS_FALLBACK;
        out[group] = (u8)fp4_scale_of(largest);
    }
    return 0;
}

// --- bfloat16 to FP8 and FP4 with scales -------------------------------------------------------------------

// The same as above in integers of 16 bits: bits of floats are ordered as their magnitudes are, and all values halfway
// between two codes times a scale have a few bits of mantissa.

enum { BF16_MAGNITUDE = 0x7FFF, BF16_INFINITY = 0x7F80, BF16_MANTISSA_BITS = 7, GROUPS_AT_ONCE = 64 };

// bfloat16 bits of 2^(exponent - 127) * (1 + mantissa / 2^7).
INLINE u16 bf16_of(u32 exponent, u32 mantissa) { return (u16)(exponent << BF16_MANTISSA_BITS | mantissa); }

// How many elements are not zero. A comparison's bits are counted at once, where the processor gathers them.
INLINE i64 count_of(halves elements) {
#ifdef __aarch64__
    return __builtin_reduce_add(-(halves)(elements != 0));
#else
    union { flags each; u32 together; } is_set = {__builtin_convertvector(elements != 0, flags)};
    return __builtin_popcount(is_set.together);
#endif
}

// Elements of a row; zeros behind them, where less than a group is left.
INLINE halves group_at(const u16_at *values, i64 left) {
    if (left >= GROUP)
        return *(const halves_at *)values;
    halves group = {};
    for (i64 i = 0; i < left; i++)
        group[i] = values[i];
    return group;
}

INLINE u32 largest_bf16(const u16_at *restrict values, i64 rows, i64 columns, i64 stride) {
    halves largest = {};
    for (i64 row = 0; row < rows; row++)
        for (i64 i = 0; i < columns; i += GROUP)
            largest = __builtin_elementwise_max(largest, group_at(values + row * stride + i, columns - i) & BF16_MAGNITUDE);
    return (u32)__builtin_reduce_max(largest) << 16;
}

// Codes below 2^-6 count steps of 2^-9: the values halfway between two are from 1/2 to 15/2 steps, ties go to even.
// Whole steps are 0, 1, 2, 3, and from 4 on what has two bits of mantissa.
INLINE halves subnormal_steps(halves magnitude, u32 scale, halves *whole) {
    halves steps = -(halves)(magnitude > bf16_of(scale - 10, 0)) - (halves)(magnitude >= bf16_of(scale - 9, 0x40)) -
                   (halves)(magnitude > bf16_of(scale - 8, 0x20)) - (halves)(magnitude >= bf16_of(scale - 8, 0x60)) -
                   (halves)(magnitude > bf16_of(scale - 7, 0x10)) - (halves)(magnitude >= bf16_of(scale - 7, 0x30)) -
                   (halves)(magnitude > bf16_of(scale - 7, 0x50)) - (halves)(magnitude >= bf16_of(scale - 7, 0x70));
    *whole = (halves)(magnitude == 0) | (halves)(magnitude == bf16_of(scale - 9, 0)) |
             (halves)(magnitude == bf16_of(scale - 8, 0)) | (halves)(magnitude == bf16_of(scale - 8, 0x40)) |
             ((halves)(magnitude >= bf16_of(scale - 7, 0)) & (halves)((magnitude & 0x1F) == 0));
    return steps;
}

// The codes of a group; adds to the counts: values rounded, and those of them below e4m3's normal numbers. Normal codes
// keep the upper three bits of the mantissa, ties to even; a carry runs into the exponent.
INLINE lanes bf16_group_to_fp8(halves bits, u32 scale, i64 *restrict rounded, i64 *restrict below) {
    halves magnitude = bits & BF16_MAGNITUDE;
    u16 code_0 = bf16_of(scale - E4M3_BIAS, 0); // were it a normal number
    halves code = ((magnitude | (magnitude >> 4 & 1)) - (u16)(code_0 - 7)) >> 4;
    halves lost = magnitude & 0xF, small = (halves)(magnitude < bf16_of(scale - 6, 0));
    if (__builtin_reduce_or(small)) { // seldom
        halves whole, steps = subnormal_steps(magnitude, scale, &whole);
        code = (small & steps) | (~small & code);
        lost = (small & ~whole) | (~small & lost);
        *below += count_of(lost & small);
    }
    *rounded += count_of(lost);
    return __builtin_convertvector(code | (bits >> 8 & 0x80), lanes);
}

// Codes and, unless `scales` is NULL, the scales. counts: values rounded among e4m3's normal numbers, and below them.
INLINE i64 bf16_to_fp8_and_scales(const u16_at *restrict values, u8 *restrict out, u8 *restrict scales,
                                  i64 *restrict counts, i64 rows, i64 columns, i64 height, i64 width) {
    i64 rounded = 0, below = 0;
    for (i64 top = 0; top < rows; top += height)
        for (i64 left = 0; left < columns; left += width) {
            i64 high = smaller(height, rows - top), wide = smaller(width, columns - left), whole = wide / GROUP * GROUP;
            const u16_at *source = values + top * columns + left;
            u8 *made = out + top * columns + left;
            u32 largest = largest_bf16(source, high, wide, columns), scale = fp8_scale_of(largest);
            if (largest >= F32_INFINITY)
                return NEEDS_FALLBACK;
            if (scales)
                *scales++ = (u8)scale;
            for (i64 row = 0; row < high; row++, source += columns, made += columns) {
                for (i64 i = 0; i < whole; i += GROUP)
                    *(lanes_at *)(made + i) =
                        bf16_group_to_fp8(*(const halves_at *)(source + i), scale, &rounded, &below);
                if (whole < wide) {
                    lanes codes = bf16_group_to_fp8(group_at(source + whole, wide - whole), scale, &rounded, &below);
                    for (i64 k = 0; k < wide - whole; k++)
                        made[whole + k] = codes[k];
                }
            }
        }
    counts[0] = rounded - below;
    counts[1] = below;
    return 0;
}

i64 bf16_to_fp8(const u16_at *restrict values, u8 *restrict out, i64 *restrict counts, i64 rows, i64 columns,
                i64 height, i64 width) {
    return bf16_to_fp8_and_scales(values, out, 0, counts, rows, columns, height, width);
}

i64 bf16_to_fp8_scales(const u16_at *restrict values, u8 *restrict out, i64 rows, i64 columns, i64 height, i64 width) {
    for (i64 top = 0; top < rows; top += height)
        for (i64 left = 0; left < columns; left += width) {
            i64 high = smaller(height, rows - top), wide = smaller(width, columns - left);
            u32 largest = largest_bf16(values + top * columns + left, high, wide, columns);
            if (largest >= F32_INFINITY)
                return NEEDS_FALLBACK;
            *out++ = (u8)fp8_scale_of(largest);
        }
    return 0;
}

// A group's codes; what is left in `lost` is not zero where a value was rounded. From 1 on codes keep one bit of the
// mantissa; below, 0.25 and 0.75 are the values halfway. For the smallest two scales these are subnormal.
INLINE halves fp4_codes(halves magnitude, u32 scale, halves *lost) {
    u16 one = bf16_of(scale, 0), half = scale > 1 ? bf16_of(scale - 1, 0) : 0x40;
    u16 quarter = scale > 2 ? bf16_of(scale - 2, 0) : half / 2;
    u16 three_quarters = scale > 1 ? bf16_of(scale - 1, 0x40) : 0x60;
    halves code = ((magnitude + 0x1F + (magnitude >> 6 & 1)) >> 6) - (u16)(2 * scale - 2);
    halves small = (halves)(magnitude < one);
    halves steps = -(halves)(magnitude > quarter) - (halves)(magnitude >= three_quarters);
    *lost = (small & (halves)(magnitude != 0) & (halves)(magnitude != half)) | (~small & magnitude & 0x3F);
    return (small & steps) | (~small & code);
}

#ifdef __AVX512BW__
// The same from tables, for scales with no subnormal values halfway. Between a power of two and the next are four steps,
// from 0.25 (0) to 6 (18); values are rounded up to a step, and further where a tie goes to the code above. For each step
// its code, and the bits of which any makes the value another one than the code's.
enum { ALL = BF16_MAGNITUDE, LOW = 0x3F };
static const u16 STEP_CODES[GROUP] = {0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
static const u16 STEP_LOST[GROUP] = {ALL, ALL, ALL, ALL, LOW, ALL, ALL, ALL, LOW, LOW,
                                     LOW, LOW, LOW, LOW, LOW, LOW, LOW, LOW, LOW, LOW};

INLINE halves quick_fp4_codes(halves magnitude, u32 scale, halves *lost) {
    halves quarter = (halves){} + bf16_of(scale - 2, 0);
    halves steps = __builtin_elementwise_sub_sat(magnitude | (magnitude >> 6 & 1), quarter - 0x1F) >> 5;
    *lost = magnitude & __builtin_shufflevector(*(const halves_at *)STEP_LOST, steps);
    return __builtin_shufflevector(*(const halves_at *)STEP_CODES, steps);
}
#else
#define quick_fp4_codes fp4_codes
#endif

// A group in packed FP4; adds to a count of values rounded.
INLINE packed_lanes bf16_group_to_fp4(halves bits, u32 scale, i64 *restrict rounded) {
    halves magnitude = bits & BF16_MAGNITUDE, lost;
    halves codes = scale > 2 ? quick_fp4_codes(magnitude, scale, &lost) : fp4_codes(magnitude, scale, &lost);
    *rounded += count_of(lost);
    pairs of_codes = (pairs)(codes | (bits >> 12 & 8));
    return __builtin_convertvector(of_codes | of_codes >> 12, packed_lanes);
}

// Returns whether all are finite.
INLINE int bf16_fp4_scales(const u16_at *restrict values, u8 *restrict out, i64 groups) {
    u16 largest[GROUPS_AT_ONCE], all = 0;
    for (i64 first = 0; first < groups; first += GROUPS_AT_ONCE) {
        i64 some = smaller(GROUPS_AT_ONCE, groups - first);
        for (i64 i = 0; i < some; i++)
            largest[i] = __builtin_reduce_max(*(const halves_at *)(values + (first + i) * GROUP) & BF16_MAGNITUDE);
        for (i64 i = 0; i < some; i++) {
            all = largest[i] > all ? largest[i] : all;
            u16 scale = (largest[i] + 0x3F) >> 7;
            out[first + i] = (u8)(scale < 3 ? 1 : scale - 2);
        }
    }
    return all < BF16_INFINITY;
}

// Codes and, unless `scales` is NULL, the scales. Returns how many values were rounded.
INLINE i64 bf16_to_fp4_and_scales(const u16_at *restrict values, u8 *restrict out, u8 *restrict scales, i64 groups) {
    i64 changed = 0;
    for (i64 first = 0; first < groups; first += GROUPS_AT_ONCE) {
        u8 here[GROUPS_AT_ONCE];
        i64 some = smaller(GROUPS_AT_ONCE, groups - first);
        u8 *scale = scales ? scales + first : here;
        if (!bf16_fp4_scales(values + first * GROUP, scale, some))
            return NEEDS_FALLBACK;
        for (i64 i = 0; i < some; i++) {
            const halves_at *group = (const halves_at *)(values + (first + i) * GROUP);
            *(packed_lanes_at *)(out + (first + i) * PACKED) = bf16_group_to_fp4(*group, scale[i], &changed);
        }
    }
    return changed;
}

i64 bf16_to_fp4(const u16_at *restrict values, u8 *restrict out, i64 groups) {
    return bf16_to_fp4_and_scales(values, out, 0, groups);
}

i64 bf16_to_fp4_scales(const u16_at *restrict values, u8 *restrict out, i64 groups) {
    return bf16_fp4_scales(values, out, groups) ? 0 : NEEDS_FALLBACK;
}

// --- floats ---------------------------------------------------------------------------------------------

// counts: values rounded in the normal range, and below it. One comparison tells that a chunk has neither zeros and
// subnormals, which wrap round, nor what overflows; any other is read again.
i64 f32_to_bf16(const u32_at *restrict values, u16_at *restrict out, i64 *restrict counts, i64 size) {
    counts[0] = counts[1] = 0;
    for (i64 start = 0; start < size; start += CHUNK) {
        i64 stop = smaller(start + CHUNK, size);
        u32 largest = 0, inexact = 0, tiny = 0;
        TWO_VECTORS
        for (i64 i = start; i < stop; i++) {
            u32 bits = values[i], above_subnormals = (bits << 1) - (F32_MIN_NORMAL << 1);
            largest = above_subnormals > largest ? above_subnormals : largest;
            inexact += (bits & 0xFFFF) != 0;
            out[i] = (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
        }
        if (largest >= (BF16_OVERFLOW - F32_MIN_NORMAL) << 1)
            for (i64 i = start; i < stop; i++) {
                u32 magnitude = values[i] & F32_MAGNITUDE;
                if (magnitude >= BF16_OVERFLOW)
                    return NEEDS_FALLBACK;
                tiny += magnitude < F32_MIN_NORMAL && (magnitude & 0xFFFF) != 0;
            }
        counts[0] += inexact - tiny;
        counts[1] += tiny;
    }
    return 0;
}

INLINE i64 to_f16(int type, const void *restrict values, u16_at *restrict out, i64 *restrict counts, i64 size) {
    counts[0] = counts[1] = 0;
    if (flushes_subnormals())
        return NEEDS_FALLBACK;
    for (i64 start = 0; start < size; start += CHUNK) {
        u32 largest = 0, inexact = 0, tiny = 0;
        for (i64 i = start; i < smaller(start + CHUNK, size); i++) {
            u32 bits = load(values, i, type), magnitude = bits & F32_MAGNITUDE;
            u32 half = rounded_f16(float_of(magnitude));
            u32 lost = f16(half) != float_of(magnitude);
            largest = magnitude > largest ? magnitude : largest;
            inexact += lost;
            tiny += lost & (magnitude < F16_MIN_NORMAL);
            out[i] = (u16)(half | (bits >> 16 & 0x8000));
        }
        if (largest >= F16_OVERFLOW)
            return NEEDS_FALLBACK;
        counts[0] += inexact - tiny;
        counts[1] += tiny;
    }
    return 0;
}

i64 f32_to_f16(const u32_at *restrict values, u16_at *restrict out, i64 *restrict counts, i64 size) {
    return to_f16(F32, values, out, counts, size);
}

i64 bf16_to_f16(const u16_at *restrict values, u16_at *restrict out, i64 *restrict counts, i64 size) {
    return to_f16(BF16, values, out, counts, size);
}

i64 bf16_to_f32(const u16_at *restrict values, u32_at *restrict out, i64 size) {
    u16 largest = 0;
    for (i64 i = 0; i < size; i++) {
        u16 magnitude = values[i] & 0x7FFF;
        largest = magnitude > largest ? magnitude : largest;
        out[i] = (u32)values[i] << 16;
    }
    return largest > 0x7F80 ? NEEDS_FALLBACK : 0;
}

i64 f16_to_f32(const u16_at *restrict values, u32_at *restrict out, i64 size) {
    u16 largest = 0;
    for (i64 i = 0; i < size; i++) {
        u16 magnitude = values[i] & 0x7FFF;
        largest = magnitude > largest ? magnitude : largest;
        out[i] = bits_of(f16(magnitude)) | (u32)(values[i] & 0x8000) << 16;
    }
    return largest > F16_INFINITY ? NEEDS_FALLBACK : 0;
}

// Returns how many values were rounded; none is too large or too small.
i64 f16_to_bf16(const u16_at *restrict values, u16_at *restrict out, i64 size) {
    i64 changed = 0;
    for (i64 start = 0; start < size; start += CHUNK) {
        u32 largest = 0, inexact = 0;
        for (i64 i = start; i < smaller(start + CHUNK, size); i++) {
            u32 magnitude = values[i] & 0x7FFF, bits = bits_of(f16(magnitude));
            largest = magnitude > largest ? magnitude : largest;
            inexact += (bits & 0xFFFF) != 0;
            out[i] = (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 | (values[i] & 0x8000));
        }
        if (largest > F16_INFINITY)
            return NEEDS_FALLBACK;
        changed += inexact;
    }
    return changed;
}

// --- values that are not finite ----------------------------------------------------------------------------

// Return whether any of ``size`` elements has all bits of ``mask``: those of the exponent of NaN and infinity, or of the
// only codes that are NaN. The table in not_finite.py has the masks.

#define DEFINE_ANY(name, array, element)                                                                               \
    i64 name(const array *values, i64 size, i64 mask) {                                                                \
        element bits = (element)mask, largest = 0;                                                                     \
        for (i64 i = 0; i < size; i++) {                                                                               \
            element held = values[i] & bits;                                                                           \
            largest = held > largest ? held : largest;                                                                 \
        }                                                                                                              \
        return largest == bits;                                                                                        \
    }

DEFINE_ANY(any_u8, u8, u8)
DEFINE_ANY(any_u16, u16_at, u16)
DEFINE_ANY(any_u32, u32_at, u32)
