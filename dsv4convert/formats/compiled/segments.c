// Makes whole segments of an output without the interpreter: reads a tile's operands, converts, writes, and takes the
// checksum. `segments.py` describes a segment; what it may ask for is listed in `making`.
//
// Nothing here reports an error. A tile that cannot be made, for whatever reason (an element that a codec leaves to
// numpy, a read or a write that fails, a source that ends), ends the work before that tile: the caller makes the same
// tile again its own way, and finds the reason there. Counts and checksum are of the tiles that were written.

#include "codecs.c"
#include "xxh3.c"
#include "low_bit.c"

// --- system calls -----------------------------------------------------------------------------------------

// The library has no libc: so there is neither errno nor cancellation. A failure is a negative number.
enum { INTERRUPTED = -4 };

#if defined(__x86_64__)
enum {
    PREAD = 17,
    PWRITE = 18,
    MADVISE = 28,
    GETPID = 39,
    FSTATFS = 138,
    FADVISE = 221,
    SYNC_FILE_RANGE = 277,
    PROCESS_VM_WRITEV = 311,
    COPY_FILE_RANGE = 326,
};

static i64 system_call(i64 number, i64 a, i64 b, i64 c, i64 d, i64 e, i64 f) {
    register i64 r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    i64 result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}
#elif defined(__aarch64__)
enum {
    FSTATFS = 44,
    PREAD = 67,
    PWRITE = 68,
    SYNC_FILE_RANGE = 84,
    GETPID = 172,
    FADVISE = 223,
    MADVISE = 233,
    PROCESS_VM_WRITEV = 271,
    COPY_FILE_RANGE = 285,
};

static i64 system_call(i64 number, i64 a, i64 b, i64 c, i64 d, i64 e, i64 f) {
    register i64 x8 __asm__("x8") = number, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c,
                 x3 __asm__("x3") = d, x4 __asm__("x4") = e, x5 __asm__("x5") = f;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}
#endif

// Moves all bytes between memory and a place in a file; returns whether that went well.
static int transfer(i64 call, i64 descriptor, u8 *data, i64 size, i64 offset) {
    while (size > 0) {
        i64 moved = system_call(call, descriptor, (i64)data, size, offset, 0, 0);
        if (moved == INTERRUPTED)
            continue;
        if (moved <= 0)
            return 0;
        data += moved;
        size -= moved;
        offset += moved;
    }
    return 1;
}

// Copies in the kernel; returns whether it took that on and did all of it.
static int copy_in_kernel(i64 source, i64 begin, i64 output, i64 offset, i64 size) {
    while (size > 0) {
        i64 moved = system_call(COPY_FILE_RANGE, source, (i64)&begin, output, (i64)&offset, size, 0);
        if (moved == INTERRUPTED)
            continue;
        if (moved <= 0)
            return 0;
        size -= moved; // the kernel moves the offsets
    }
    return 1;
}

// --- the page cache ---------------------------------------------------------------------------------------

enum {
    DONTNEED = 4,        // of fadvise, and of madvise
    START_WRITING = 2,   // of sync_file_range
    AT_ONCE = 1 << 22,   // bytes between two calls
    BEHIND = 1 << 24,    // bytes of an output that may still be on their way to the disk
    LOOK_BACK = 1 << 26, // bytes before these that are dropped
};

// Has the disk begin with what was written. Otherwise it idles until the kernel's limit for such pages, and all that is
// below it is waited for at the end. Returns without waiting.
static void start_writing(i64 descriptor, i64 offset, i64 size) {
    system_call(SYNC_FILE_RANGE, descriptor, offset, size, START_WRITING, 0, 0);
}

// Drops pages that are on the disk from the page cache.
static void drop(i64 descriptor, i64 offset, i64 size) { system_call(FADVISE, descriptor, offset, size, DONTNEED, 0, 0); }

// --- files in memory --------------------------------------------------------------------------------------

enum { LARGEST_PAGE = 1 << 16, STATFS_WORDS = 64 };
#define TMPFS 0x01021994

// Whether a file lies in a tmpfs.
i64 lies_in_memory(i64 descriptor) {
    i64 status[STATFS_WORDS]; // starts with the kind of file system
    return system_call(FSTATFS, descriptor, (i64)status, 0, 0, 0, 0) == 0 && status[0] == TMPFS;
}

// Copies into a shared mapping of a file: the file's lock, which lets one writer in at a time, is not taken. By a system
// call, which fails where a plain store would end the process with SIGBUS: no room, or the file was cut. The pages leave
// the mapping again, for they would count as this process's memory; a mapping starts with a page of the file.
static int store_in_mapping(u8 *mapping, i64 offset, const u8 *data, i64 size) {
    struct {
        const u8 *start;
        i64 size;
    } from = {data, size}, into = {mapping + offset, size};
    i64 own = system_call(GETPID, 0, 0, 0, 0, 0, 0);
    i64 moved = system_call(PROCESS_VM_WRITEV, own, (i64)&from, 1, (i64)&into, 1, 0);
    i64 before = offset % LARGEST_PAGE;
    system_call(MADVISE, (i64)mapping + offset - before, size + before, DONTNEED, 0, 0, 0);
    return moved == size;
}

// --- segments ---------------------------------------------------------------------------------------------

// What is made of the operands' rows, numbered as in `segments.py`.
enum making {
    COPY_BYTES,
    COLUMNS_OF_ROWS,
    JOIN_ROWS,
    FP8_TO_F32,
    FP8_TO_BF16,
    FP8_TO_F16,
    FP8_TO_Q8_0,
    FP8_TO_MXFP4,
    FP4_TO_F32,
    FP4_TO_BF16,
    FP4_TO_F16,
    FP4_TO_Q8_0,
    FP4_TO_MXFP4,
    FP4_TO_FP8_CODES,
    FP4_TO_FP8_SCALES,
    BF16_TO_F32,
    BF16_TO_F16,
    BF16_TO_Q8_0,
    BF16_TO_MXFP4,
    F16_TO_F32,
    F16_TO_BF16,
    F32_TO_BF16,
    F32_TO_F16,
    F32_TO_Q8_0,
    F32_TO_MXFP4,
    FP4_TO_NVFP4_CODES,
    FP4_TO_NVFP4_SCALES,
    BF16_TO_FP8_CODES,
    BF16_TO_FP8_SCALES,
    BF16_TO_FP4_CODES,
    BF16_TO_FP4_SCALES,
    F32_TO_FP8_CODES,
    F32_TO_FP8_SCALES,
    F32_TO_FP4_CODES,
    F32_TO_FP4_SCALES,
    FP8_TO_GGML,
    FP4_TO_GGML,
    BF16_TO_GGML,
    F16_TO_GGML,
    F32_TO_GGML,
};

enum { NAN_COUNT, OVERFLOW_COUNT, UNDERFLOW_COUNT, CHANGED_COUNT, COUNTS };

// The bytes of elements that are looked at, and the bits of one that is not finite; or 0.
typedef struct {
    i64 bytes, not_finite;
} elements;

// A matrix in a source, whose rows serve `rows_per` rows of the output each, and room for a tile of it.
typedef struct {
    i64 descriptor, offset, row_bytes, rows_per;
    u8 *tile;
    elements holds;
    i64 held_from, held_to; // the rows that lie in the tile
} operand;

// ggml_quantize_chunk: a type's number, values, room for blocks, 0, rows, columns, a weight for each column or NULL;
// returns the bytes of the blocks.
typedef u64 quantise_chunk(int type, const float *values, void *blocks, i64 first, i64 rows, i64 columns,
                           const float *weights);

// What a worker shares with the thread that watches it.
typedef struct {
    i64 stopped, done_bytes;
} control;

typedef struct {
    i64 making;
    operand *operands;
    i64 operand_count;
    i64 output, offset;        // the output's descriptor, and where the segment starts there
    u8 *mapping;               // of the whole output, or NULL
    i64 rows, row_bytes, step; // of the output; rows of a tile
    u8 *tile;
    i64 columns;       // elements of a row; bytes for copies, FP4 scales of a row for FP4_TO_FP8_SCALES
    i64 height, width; // of a block that shares a scale; for COLUMNS_OF_ROWS the first column, and one behind the last
    i64 scales_are_f32;
    i64 drops;           // whether what was read and written leaves the page cache
    u8 *spare;           // for scales as bytes, or for scales that are not wanted
    const void *tables[2]; // multipliers and d of Q8_0, for the scale bytes from `first` to `last`
    i64 first, last;
    i64 largest;    // of the scales that rows share, or UNKNOWN
    quantise_chunk *quantise; // for types of ggml's library
    i64 type;                 // its number
    const float *weights;     // of the columns, or NULL
    u32_at *wide;             // room for `wide_rows` rows as float32
    i64 wide_rows;
    u8 *scales;     // all scales of the segment, which come with its codes; or NULL, where they are not wanted
    elements holds; // of the output
    i64 counts[COUNTS];
    i64 zeros; // a bit for each operand: every byte of it is zero, as far as it was read
    xxh3 *checksum; // or NULL, where it is known
    control *control;
} segment;

enum { UNKNOWN = -1 };

// Counts the elements that have all bits of `mask`; `any` tells quickly, as a rule, that there are none.
#define DEFINE_COUNT_NOT_FINITE(name, element, any)                                                                    \
    static i64 name(const element *values, i64 size, i64 mask) {                                                       \
        i64 count = 0;                                                                                                 \
        if (any(values, size, mask))                                                                                   \
            for (i64 i = 0; i < size; i++)                                                                             \
                count += (values[i] & mask) == mask;                                                                   \
        return count;                                                                                                  \
    }

DEFINE_COUNT_NOT_FINITE(count_not_finite_8, u8, any_u8)
DEFINE_COUNT_NOT_FINITE(count_not_finite_16, u16_at, any_u16)
DEFINE_COUNT_NOT_FINITE(count_not_finite_32, u32_at, any_u32)

static i64 count_not_finite(elements holds, const u8 *bytes, i64 size) {
    switch (holds.bytes) {
    case 1:
        return count_not_finite_8(bytes, size, holds.not_finite);
    case 2:
        return count_not_finite_16((const u16_at *)bytes, size / 2, holds.not_finite);
    case 4:
        return count_not_finite_32((const u32_at *)bytes, size / 4, holds.not_finite);
    default:
        return 0;
    }
}

// Whether every byte is zero; the first ones tell, as a rule, that not.
static int is_zero(const u8 *bytes, i64 size) {
    u8 any = 0;
    for (i64 start = 0; start < size && !any; start += CHUNK)
        for (i64 i = start; i < smaller(start + CHUNK, size); i++)
            any |= bytes[i];
    return !any;
}

// F32 scales as e8m0 bytes; returns whether all are normal powers of two.
static int scale_bytes(const u32_at *restrict scales, u8 *restrict bytes, i64 size) {
    u32 others = 0;
    for (i64 i = 0; i < size; i++) {
        u32 exponent = scales[i] >> 23;
        others |= (scales[i] & F32_MANTISSA) | (exponent - 1 > 0xFD);
        bytes[i] = (u8)exponent;
    }
    return !others;
}

INLINE i64 operand_rows(const operand *o, i64 rows) { return (rows + o->rows_per - 1) / o->rows_per; }

static void join_rows(const segment *s, i64 rows) {
    u8 *out = s->tile;
    for (i64 row = 0; row < rows; row++)
        for (i64 k = 0; k < s->operand_count; k++) {
            i64 size = s->operands[k].row_bytes;
            copy_bytes(out, s->operands[k].tile + row * size, size);
            out += size;
        }
}

static void columns_of_rows(const segment *s, i64 rows) {
    for (i64 row = 0; row < rows; row++)
        copy_bytes(s->tile + row * s->row_bytes, s->operands[0].tile + row * s->operands[0].row_bytes + s->height,
                   s->row_bytes);
}

// Notes the largest e8m0 scale of the operands from number `first` on; returns whether none is NaN.
static int find_largest(segment *s, i64 first) {
    if (s->largest == UNKNOWN) {
        u8 largest = 0;
        for (i64 k = first; k < s->operand_count; k++) {
            const operand *o = &s->operands[k];
            for (i64 i = 0; i < (o->held_to - o->held_from) * o->row_bytes; i++)
                largest = o->tile[i] > largest ? o->tile[i] : largest;
        }
        s->largest = largest;
    }
    return s->largest != 0xFF;
}

// As float32: 32768. What is smaller has scales that float16 holds, in all types; of the rest Python counts those without.
#define SCALE_MAY_OVERFLOW 0x47000000u

// Has ggml's library quantise a few rows at a time, which stay in the processor's cache once they are decoded.
static i64 quantise_rows(const segment *s, const u8 *scales, i64 rows) {
    i64 columns = s->columns, groups = columns / GROUP, blocks = (columns + s->width - 1) / s->width;
    for (i64 row = 0, some; row < rows; row += some) {
        some = smaller(s->wide_rows, rows - row);
        const u8 *values = s->operands[0].tile + row * s->operands[0].row_bytes;
        const u32_at *wide = s->wide;
        i64 made = 0;
        switch ((enum making)s->making) {
        case FP8_TO_GGML:
            some = smaller(some, s->height - row % s->height); // no rows of two blocks
            made = fp8_to_f32(values, scales + row / s->height * blocks, s->wide, some, columns, s->height, s->width);
            break;
        case FP4_TO_GGML:
            made = fp4_to_f32(values, scales + row * groups, s->wide, some * groups);
            break;
        case BF16_TO_GGML:
            made = bf16_to_f32((const u16_at *)values, s->wide, some * columns);
            break;
        case F16_TO_GGML:
            made = f16_to_f32((const u16_at *)values, s->wide, some * columns);
            break;
        default: // F32_TO_GGML
            wide = (const u32_at *)values;
        }
        if (made == NEEDS_FALLBACK || largest_magnitude(wide, some * columns) >= SCALE_MAY_OVERFLOW ||
            __atomic_load_n(&s->control->stopped, __ATOMIC_RELAXED))
            return NEEDS_FALLBACK;
        i64 size = some * s->row_bytes;
        u8 *out = s->tile + row * s->row_bytes;
        if (s->quantise((int)s->type, (const float *)wide, out, 0, some, columns, s->weights) != (u64)size)
            return NEEDS_FALLBACK;
    }
    return 0;
}

// Makes the tile of the rows from `first` on of the operands' tiles; returns NEEDS_FALLBACK where it cannot.
static i64 make_tile(segment *s, i64 first, i64 rows, i64 *counts) {
    const u8 *a = s->operands[0].tile, *b = s->operand_count > 1 ? s->operands[1].tile : 0;
    void *out = s->tile;
    i64 columns = s->columns, height = s->height, width = s->width, size = rows * columns, groups = size / GROUP;
    i64 made = 0;
    // A row of them is for `height` rows of codes.
    u8 *scales = s->scales ? s->scales + first / height * ((columns + width - 1) / width) : 0;
    if (s->scales_are_f32) {
        i64 scales = operand_rows(&s->operands[1], rows) * s->operands[1].row_bytes / (i64)sizeof(float);
        if (!scale_bytes((const u32_at *)b, s->spare, scales))
            return NEEDS_FALLBACK;
        b = s->spare;
    }
    switch ((enum making)s->making) {
    case COPY_BYTES:
        return 0;
    case COLUMNS_OF_ROWS:
        columns_of_rows(s, rows);
        return 0;
    case JOIN_ROWS:
        join_rows(s, rows);
        return 0;
    case FP8_TO_F32:
        return fp8_to_f32(a, b, out, rows, columns, height, width);
    case FP8_TO_BF16:
        return fp8_to_bf16(a, b, out, rows, columns, height, width);
    case FP8_TO_F16:
        return fp8_to_f16(a, b, out, rows, columns, height, width);
    case FP8_TO_Q8_0:
        return fp8_to_q8_0(a, b, s->tables[0], s->tables[1], out, rows, columns, height, width, s->first, s->last);
    case FP8_TO_MXFP4:
        return counts[CHANGED_COUNT] = fp8_to_mxfp4(a, b, out, rows, columns, height, width);
    case FP4_TO_F32:
        return fp4_to_f32(a, b, out, groups);
    case FP4_TO_BF16:
        return fp4_to_bf16(a, b, out, groups);
    case FP4_TO_F16:
        return fp4_to_f16(a, b, out, groups);
    case FP4_TO_Q8_0:
        return fp4_to_q8_0(a, b, s->tables[0], s->tables[1], out, groups, s->first, s->last);
    case FP4_TO_MXFP4:
        counts[NAN_COUNT] = GROUP * fp4_to_mxfp4(a, b, out, groups);
        return 0;
    case FP4_TO_FP8_CODES:
        return fp4_to_fp8(a, b, out, s->spare, rows, columns / GROUP);
    case FP4_TO_FP8_SCALES:
        return fp4_to_fp8_scales(a, out, rows * s->operands[0].row_bytes / columns, columns);
    case BF16_TO_F32:
        return bf16_to_f32((const u16_at *)a, out, size);
    case BF16_TO_F16:
        made = bf16_to_f16((const u16_at *)a, out, counts + UNDERFLOW_COUNT, size);
        break;
    case BF16_TO_Q8_0:
        return bf16_to_q8_0((const u16_at *)a, out, groups);
    case BF16_TO_MXFP4:
        return counts[CHANGED_COUNT] = bf16_to_mxfp4((const u16_at *)a, out, groups);
    case F16_TO_F32:
        return f16_to_f32((const u16_at *)a, out, size);
    case F16_TO_BF16:
        return counts[CHANGED_COUNT] = f16_to_bf16((const u16_at *)a, out, size);
    case F32_TO_BF16:
        made = f32_to_bf16((const u32_at *)a, out, counts + UNDERFLOW_COUNT, size);
        break;
    case F32_TO_F16:
        made = f32_to_f16((const u32_at *)a, out, counts + UNDERFLOW_COUNT, size);
        break;
    case F32_TO_Q8_0:
        return f32_to_q8_0((const u32_at *)a, out, groups);
    case F32_TO_MXFP4:
        return counts[CHANGED_COUNT] = f32_to_mxfp4((const u32_at *)a, out, groups);
    case FP4_TO_NVFP4_CODES: // the tile is that of the operand
        return find_largest(s, 2) && largest_allows(b, groups, s->largest) ? 0 : NEEDS_FALLBACK;
    case FP4_TO_NVFP4_SCALES:
        return find_largest(s, 1) ? fp4_to_nvfp4_scales(a, out, groups, s->largest) : NEEDS_FALLBACK;
    case BF16_TO_FP8_CODES:
        made = bf16_to_fp8_and_scales((const u16_at *)a, out, scales, counts + UNDERFLOW_COUNT, rows, columns, height,
                                      width);
        break;
    case BF16_TO_FP8_SCALES:
        return bf16_to_fp8_scales((const u16_at *)a, out, rows * height, columns, height, width);
    case BF16_TO_FP4_CODES:
        return counts[CHANGED_COUNT] = bf16_to_fp4_and_scales((const u16_at *)a, out, scales, groups);
    case BF16_TO_FP4_SCALES:
        return bf16_to_fp4_scales((const u16_at *)a, out, groups);
    case F32_TO_FP8_CODES:
        made = f32_to_fp8((const u32_at *)a, out, counts + UNDERFLOW_COUNT, rows, columns, height, width);
        if (scales && made != NEEDS_FALLBACK)
            f32_to_fp8_scales((const u32_at *)a, scales, rows, columns, height, width);
        break;
    case F32_TO_FP8_SCALES:
        return f32_to_fp8_scales((const u32_at *)a, out, rows * height, columns, height, width);
    case F32_TO_FP4_CODES:
        made = f32_to_fp4((const u32_at *)a, out, groups);
        if (scales && made != NEEDS_FALLBACK)
            f32_to_fp4_scales((const u32_at *)a, scales, groups);
        return counts[CHANGED_COUNT] = made;
    case F32_TO_FP4_SCALES:
        return f32_to_fp4_scales((const u32_at *)a, out, groups);
    case FP8_TO_GGML:
    case FP4_TO_GGML:
    case BF16_TO_GGML:
    case F16_TO_GGML:
    case F32_TO_GGML:
        return quantise_rows(s, b, rows);
    default:
        return NEEDS_FALLBACK;
    }
    // The last two counts came the other way round.
    i64 changed = counts[UNDERFLOW_COUNT];
    counts[UNDERFLOW_COUNT] = counts[CHANGED_COUNT];
    counts[CHANGED_COUNT] = changed;
    return made;
}

// Writes the tile of the rows from `first` on, with its checksum and counts; returns whether it is done.
static int write_tile(segment *s, i64 first, i64 rows) {
    i64 counts[COUNTS] = {0, 0, 0, 0}, size = rows * s->row_bytes, offset = s->offset + first * s->row_bytes;
    i64 not_finite = 0;
    if (s->making == COPY_BYTES && !s->checksum && !s->mapping &&
        copy_in_kernel(s->operands[0].descriptor, s->operands[0].offset + first, s->output, offset, size))
        return 1;
    for (i64 k = 0; k < s->operand_count; k++) {
        operand *o = &s->operands[k];
        i64 begin = first / o->rows_per, end = operand_rows(o, first + rows);
        if (begin == o->held_from && end == o->held_to)
            continue; // a row that serves several tiles
        o->held_to = 0;
        if (!transfer(PREAD, o->descriptor, o->tile, (end - begin) * o->row_bytes, o->offset + begin * o->row_bytes))
            return 0;
        if (s->zeros >> k & 1 && !is_zero(o->tile, (end - begin) * o->row_bytes))
            s->zeros ^= (i64)1 << k;
        not_finite += count_not_finite(o->holds, o->tile, (end - begin) * o->row_bytes);
        o->held_from = begin;
        o->held_to = end;
        if (o->rows_per > 1)
            s->largest = UNKNOWN;
    }
    if (make_tile(s, first, rows, counts) == NEEDS_FALLBACK)
        return 0;
    if (!(s->mapping && store_in_mapping(s->mapping, offset, s->tile, size)) &&
        !transfer(PWRITE, s->output, s->tile, size, offset))
        return 0;
    if (s->checksum) {
        xxh3_update(s->checksum, s->tile, size);
        not_finite += count_not_finite(s->holds, s->tile, size);
    }
    counts[NAN_COUNT] += not_finite;
    for (int i = 0; i < COUNTS; i++)
        s->counts[i] += counts[i];
    return 1;
}

// Lets go of rows that are written: to the disk, and out of the page cache where that is wanted.
static void leave(const segment *s, i64 begin, i64 end) {
    if (s->mapping)
        return;
    i64 offset = s->offset + begin * s->row_bytes;
    start_writing(s->output, offset, (end - begin) * s->row_bytes);
    if (!s->drops)
        return;
    // Columns are read by several outputs, from the same rows.
    for (i64 k = 0; k < s->operand_count && s->making != COLUMNS_OF_ROWS; k++) {
        const operand *o = &s->operands[k];
        i64 from = begin / o->rows_per;
        drop(o->descriptor, o->offset + from * o->row_bytes, (operand_rows(o, end) - from) * o->row_bytes);
    }
    if (offset > BEHIND)
        drop(s->output, offset > LOOK_BACK ? offset - LOOK_BACK : 0, smaller(offset, LOOK_BACK) - BEHIND);
}

// Makes the tiles from row `first` on; returns the first row that is not made, `rows` when all are. Ends early when the
// worker is stopped.
i64 make_segment(segment *s, i64 first) {
    i64 left = first;
    s->largest = UNKNOWN;
    for (i64 k = 0; k < s->operand_count; k++) // others have had the tiles meanwhile
        s->operands[k].held_from = s->operands[k].held_to = 0;
    while (first < s->rows && !__atomic_load_n(&s->control->stopped, __ATOMIC_RELAXED)) {
        i64 rows = smaller(s->step, s->rows - first);
        if (!write_tile(s, first, rows))
            break;
        first += rows;
        // Nobody else writes it.
        __atomic_store_n(&s->control->done_bytes, s->control->done_bytes + rows * s->row_bytes, __ATOMIC_RELAXED);
        if ((first - left) * s->row_bytes >= AT_ONCE) {
            leave(s, left, first);
            left = first;
        }
    }
    if (s->drops && first > left)
        leave(s, left, first);
    return first;
}

// --- the library ------------------------------------------------------------------------------------------

#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST ""
#endif

// SHA-256 of the sources, in hexadecimal: a library that is older than they are is found out.
const char source_digest[] = SOURCE_DIGEST;
