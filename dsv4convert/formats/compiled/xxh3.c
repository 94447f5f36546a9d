// XXH3-128 with seed 0 of more than 240 bytes, a piece at a time: the checksum of segments, as the xxhash package has it.
//
// The format is that of https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. Eight lanes take stripes of 64
// bytes, each with a key that moves by 8 bytes along the secret; after 16 stripes the lanes are scrambled. The last 64
// bytes are a stripe of their own, which overlaps the one before, so a stripe is taken only once a byte follows it.

typedef uint64_t u64;
typedef unsigned __int128 u128;
typedef u64 stripe __attribute__((vector_size(64)));
typedef u64 stripe_at __attribute__((vector_size(64), aligned(1), may_alias));
typedef u64 __attribute__((aligned(1), may_alias)) u64_at;

enum {
    STRIPE = sizeof(stripe),
    STRIPES_OF_BLOCK = 16,
    SECRET_BYTES = 192,
    SCRAMBLE_KEY = SECRET_BYTES - STRIPE, // where in the secret these keys start
    LAST_KEY = SECRET_BYTES - STRIPE - 7,
    LOW_KEY = 11,
    HIGH_KEY = SECRET_BYTES - STRIPE - 11,
    DIGEST_BYTES = 16,
};

#define PRIME32_1 0x9E3779B1ull
#define PRIME32_2 0x85EBCA77ull
#define PRIME32_3 0xC2B2AE3Dull
#define PRIME64_1 0x9E3779B185EBCA87ull
#define PRIME64_2 0xC2B2AE3D27D4EB4Full
#define PRIME64_3 0x165667B19E3779F9ull
#define PRIME64_4 0x85EBCA77C2B2AE63ull
#define PRIME64_5 0x27D4EB2F165667C5ull
#define PRIME_MX1 0x165667919E3779F9ull

static const u8 SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

// `recent` holds the stripe that was taken last, then `waiting` bytes that were not taken yet.
typedef struct {
    u64 lanes[STRIPE / sizeof(u64)];
    u8 recent[2 * STRIPE];
    i64 waiting, stripes, total;
} xxh3;

void xxh3_begin(xxh3 *state) {
    static const u64 first[] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    for (int i = 0; i < 8; i++)
        state->lanes[i] = first[i];
    state->waiting = state->stripes = state->total = 0;
}

enum { AHEAD = 512 }; // bytes to ask the cache for before they are needed

INLINE stripe take_stripe(stripe sums, const u8 *data, const u8 *key) {
    __builtin_prefetch(data + AHEAD);
    stripe input = *(const stripe_at *)data, keyed = input ^ *(const stripe_at *)key;
    sums += __builtin_shufflevector(input, input, 1, 0, 3, 2, 5, 4, 7, 6);
    return sums + (keyed & 0xFFFFFFFF) * (keyed >> 32);
}

static void take_stripes(xxh3 *state, const u8 *data, i64 count) {
    stripe sums = *(stripe_at *)state->lanes;
    while (count > 0) {
        i64 end = smaller(state->stripes + count, STRIPES_OF_BLOCK);
        count -= end - state->stripes;
        for (i64 number = state->stripes; number < end; number++, data += STRIPE)
            sums = take_stripe(sums, data, SECRET + sizeof(u64) * number);
        state->stripes = end % STRIPES_OF_BLOCK;
        if (end == STRIPES_OF_BLOCK)
            sums = (sums ^ sums >> 47 ^ *(const stripe_at *)(SECRET + SCRAMBLE_KEY)) * PRIME32_1;
    }
    *(stripe_at *)state->lanes = sums;
}

INLINE void copy_bytes(u8 *restrict to, const u8 *restrict from, i64 size) {
    for (i64 i = 0; i < size; i++)
        to[i] = from[i];
}

void xxh3_update(xxh3 *state, const u8 *data, i64 size) {
    u8 *waiting = state->recent + STRIPE;
    state->total += size;
    while (size > 0) {
        if (state->waiting == STRIPE) {
            take_stripes(state, waiting, 1);
            copy_bytes(state->recent, waiting, STRIPE);
            state->waiting = 0;
        }
        if (state->waiting == 0 && size > STRIPE) {
            i64 count = (size - 1) / STRIPE;
            take_stripes(state, data, count);
            data += count * STRIPE;
            size -= count * STRIPE;
            copy_bytes(state->recent, data - STRIPE, STRIPE);
        }
        i64 more = smaller(size, STRIPE - state->waiting);
        copy_bytes(waiting + state->waiting, data, more);
        state->waiting += more;
        data += more;
        size -= more;
    }
}

INLINE u64 fold_product(u64 a, u64 b) {
    u128 product = (u128)a * b;
    return (u64)product ^ (u64)(product >> 64);
}

INLINE u64 merged(const u64 *sums, const u8 *key, u64 start) {
    for (int i = 0; i < 4; i++)
        start += fold_product(sums[2 * i] ^ ((const u64_at *)key)[2 * i], sums[2 * i + 1] ^ ((const u64_at *)key)[2 * i + 1]);
    start = (start ^ start >> 37) * PRIME_MX1;
    return start ^ start >> 32;
}

// Writes the digest in its canonical order, the high half first and big-endian. The state may go on.
void xxh3_digest(const xxh3 *state, u8 *digest) {
    u64 sums[STRIPE / sizeof(u64)], total = (u64)state->total;
    *(stripe_at *)sums =
        take_stripe(*(const stripe_at *)state->lanes, state->recent + state->waiting, SECRET + LAST_KEY);
    u64 halves[] = {merged(sums, SECRET + HIGH_KEY, ~(total * PRIME64_2)), merged(sums, SECRET + LOW_KEY, total * PRIME64_1)};
    for (int i = 0; i < DIGEST_BYTES; i++)
        digest[i] = (u8)(halves[i / 8] >> 8 * (7 - i % 8));
}
