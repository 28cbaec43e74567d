/* From a bitshuffled LZ4 payload to the cells of a frame, without the frame.
 *
 * A block of bitshuffled pixels is a stack of bit planes. They are reduced as they are: LZ4
 * fills a scratch that stays in the cache, its planes, masked, are put behind those of the block
 * before, and whenever the rows of a band of cells are complete the band is reduced by counting
 * and comparing bits, 256 pixels at a time. So the cost follows the planes in use, which are few
 * where counts are low, and memory traffic is the payload and the cells.
 *
 * The twin in planes.py gives the same integers and the same faults. Formats: see lz4.py.
 */

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are taken for eight bytes, the first lowest; the twin in numba serves here"
#endif

#define ALWAYS static inline __attribute__((always_inline))

/* Codes of FAULTS in payload.py. */
enum {
    NO_BLOCK_HEADER = 1,
    LONG_BLOCK = 2,
    CORRUPT_BLOCK = 3,
    SHORT_BLOCK = 4,
    BYTES_LEFT = 5,
    SHORT_TAIL = 6,
};

enum {
    PIECE_BYTES = 64, /* of the widest kernels */
    AHEAD = 2048,       /* bytes from those in use to those that are fetched meanwhile */
    READ_BEHIND = 64,   /* bytes that the LZ4 decoder may read behind a block */
    WRITE_BEHIND = 320, /* bytes that it may write behind its output */
    BAD_PLANE = 32,    /* pixels that are no measurement, beside the planes of 32 bits */
    PLANES = 33,
    LARGEST_FRAME_BYTES = 1 << 30,
    LARGEST_BLOCK_BYTES = 1 << 18,
};

/* By period below 16: which of its bytes stands at each of 16 places, and how many places whole
 * periods fill. Period 0 stands for none: each byte in its place.
 */
static uint8_t PERIODIC[16][16];
static size_t STEP[16];
/* The same for 64 places. */
static uint8_t PERIODIC64[64][64], STEP64[64];

struct frame {
    int64_t ny, nx;
    int bits, is_signed, has_error, negative_is_invalid, judge_all;
    int certain;       /* pixels without a one in this plane or above are measurements */
    int64_t high, error;
    int big_endian;
    const uint8_t *valid, *ones; /* a bit for each pixel; all ones for a block */

    /* Planes [same_from, same_to) of the block at hand are not written: they equal the one before
     * them. */
    int same_from, same_to;

    /* Planes of the pixels [base, filled), base a multiple of 8. */
    int64_t base, filled;
    uint8_t *plane[PLANES];
    uint8_t in_use[PLANES]; /* 0: no ones, and nothing written */
    int64_t first_one[PLANES], last_one[PLANES]; /* pixels outside of [first, last) have none */
    uint8_t *bad, *keep, *equal;

    /* The band at hand. */
    int rows;
    int64_t next_row;
    size_t row_byte[8];
    int row_shift[8];
    int used[32], used_count; /* planes with ones, the highest first */
    int is_sparse[32], first_row[32], end_row[32]; /* and which rows have some */
    uint32_t *field_maximum;
    uint64_t *field_total;
    uint8_t *field_lost;

    int64_t k, stride;
    uint32_t *maximum;
    uint64_t *total;
    uint16_t *count;
    const uint16_t *valid_count;
};

static size_t big_endian_u32(const uint8_t *s) {
    return (size_t)s[0] << 24 | (size_t)s[1] << 16 | (size_t)s[2] << 8 | s[3];
}

/* The band at the lower edge has fewer rows than the others: rows of zeros stand for the rest. */
static void add_empty_rows(struct frame *f, int present) {
    const size_t empty = (size_t)(f->filled - f->base + 7) / 8;
    for (int p = 0; p < PLANES; p++)
        if (f->in_use[p]) memset(f->plane[p] + empty, 0, (size_t)f->nx / 8 + 1 + PIECE_BYTES + 8);
    for (int r = present; r < f->rows; r++) {
        f->row_byte[r] = empty;
        f->row_shift[r] = 0;
    }
}

/* See which planes have ones in the band of rows [y, end), and in which of its rows. */
static void choose_planes(struct frame *f, int64_t y, int64_t end) {
    f->used_count = 0;
    for (int p = f->bits - 1; p >= 0; p--) {
        const int64_t first = f->first_one[p] - y * f->nx, last = f->last_one[p] - y * f->nx;
        if (!f->in_use[p] || last <= 0 || first >= (end - y) * f->nx) continue;
        const int n = f->used_count++;
        f->used[n] = p;
        f->first_row[n] = first > 0 ? (int)(first / f->nx) : 0;
        f->end_row[n] = last < (end - y) * f->nx ? (int)((last + f->nx - 1) / f->nx) : f->rows;
        f->is_sparse[n] = f->end_row[n] - f->first_row[n] < f->rows;
    }
}

/* Enter the fields of the band that begins at row y into their cells. */
static void fold_band(struct frame *f, int64_t y) {
    const int64_t field = f->k < 8 ? f->k : 8, fields = (f->nx + field - 1) / field;
    const int64_t cell = y / f->k * f->stride;
    const size_t row = (size_t)f->stride, used = (size_t)fields;
    uint32_t *const maximum = f->maximum + cell;
    uint64_t *const total = f->total + cell;
    uint16_t *const count = f->count + cell;
    if (y % f->k == 0) memcpy(count, f->valid_count + cell, row * sizeof *count);
    if (f->k <= 8) {
        memcpy(maximum, f->field_maximum, used * sizeof *maximum);
        memcpy(total, f->field_total, used * sizeof *total);
        memset(maximum + used, 0, (row - used) * sizeof *maximum);
        memset(total + used, 0, (row - used) * sizeof *total);
    } else {
        const int64_t share = f->k / 8;
        if (y % f->k == 0) {
            memset(maximum, 0, row * sizeof *maximum);
            memset(total, 0, row * sizeof *total);
        }
        for (int64_t i = 0, c = 0; i < fields; c++) {
            const int64_t end = i + share < fields ? i + share : fields;
            uint32_t largest = maximum[c];
            uint64_t sum = total[c];
            for (; i < end; i++) {
                if (f->field_maximum[i] > largest) largest = f->field_maximum[i];
                sum += f->field_total[i];
            }
            maximum[c] = largest;
            total[c] = sum;
        }
    }
    if (f->in_use[BAD_PLANE])
        for (int64_t i = 0; i < fields; i++) count[i * field / f->k] -= f->field_lost[i];
}

/* The raw pixels behind the last whole eight, as planes of one byte in the order of a block. */
static void planes_of_tail(const struct frame *f, const uint8_t *pixels, int n, uint8_t *planes) {
    memset(planes, 0, (size_t)f->bits);
    for (int i = 0; i < n; i++)
        for (int bit = 0; bit < f->bits; bit++) {
            const uint8_t byte = pixels[i * (f->bits / 8) + bit / 8];
            planes[bit] |= (uint8_t)((byte >> bit % 8 & 1) << i);
        }
}

/* Put the planes of big-endian pixels in the order of their bits. */
static void turn_bytes(const struct frame *f, uint8_t *planes, size_t bytes) {
    const size_t byte = 8 * bytes;
    for (size_t low = 0, high = (size_t)f->bits / 8 - 1; low < high; low++, high--)
        for (size_t i = 0; i < byte; i++) {
            const uint8_t one = planes[low * byte + i];
            planes[low * byte + i] = planes[high * byte + i];
            planes[high * byte + i] = one;
        }
}

#define PIECE 32
#define NAME(x) x##_plain
#include "_reduce_kernels.h"
#undef NAME

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_AVX 1
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2")
#define NAME(x) x##_avx2
#include "_reduce_kernels.h"
#undef NAME
#pragma GCC pop_options
/* Registers stay 256 bits wide: 32 of them and three-way logic are what is gained, and the first
 * processors with AVX-512 slow down by wider ones.
 */
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=256")
#define NAME(x) x##_avx512
#include "_reduce_kernels.h"
#undef NAME
#pragma GCC pop_options
#undef PIECE
/* Later ones do not, and count, move and shift bytes and bits in one instruction. */
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#pragma GCC target("avx512vbmi,avx512vbmi2,avx512bitalg")
#define PIECE 64
#define NAME(x) x##_bitalg
#include "_reduce_kernels.h"
#undef NAME
#undef PIECE
#pragma GCC pop_options
#else
#define HAS_AVX 0
#endif

typedef int (*reduce_frame_t)(struct frame *, const uint8_t *, const uint8_t *, int64_t, uint8_t *,
                              uint8_t *);

/* The kernels that this processor runs, the widest last. */
static struct {
    const char *processor;
    reduce_frame_t reduce_frame;
} KINDS[4] = {{"plain", reduce_frame_plain}};
static int kinds = 1;

static void find_kernels(void) {
    kinds = 1;
#if HAS_AVX
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) {
        KINDS[kinds].processor = "avx2";
        KINDS[kinds++].reduce_frame = reduce_frame_avx2;
    }
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        KINDS[kinds].processor = "avx512";
        KINDS[kinds++].reduce_frame = reduce_frame_avx512;
    }
    if (kinds == 3 && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg")) {
        KINDS[kinds].processor = "avx512bitalg";
        KINDS[kinds++].reduce_frame = reduce_frame_bitalg;
    }
#endif
    for (int period = 0; period < 16; period++) {
        for (int i = 0; i < 16; i++) PERIODIC[period][i] = (uint8_t)(period ? i % period : i);
        STEP[period] = (size_t)(period ? 16 - 16 % period : 16);
    }
    for (int i = 0; i < 64; i++) PERIODIC64[0][i] = (uint8_t)i;
    for (int period = 1; period < 64; period++) {
        for (int i = 0; i < 64; i++) PERIODIC64[period][i] = (uint8_t)(i % period);
        STEP64[period] = (uint8_t)(64 - 64 % period);
    }
}

/* Where the parts of the workspace begin; the whole length comes back. */
static size_t lay_out(struct frame *f, size_t block_bytes, uint8_t *work, uint8_t **scratch,
                      uint8_t **spare) {
    const size_t plane_bytes = block_bytes / (size_t)(f->bits / 8) / 8;
    const size_t row_bytes = (size_t)f->nx / 8 + 1;
    const size_t band_bytes = (size_t)f->rows * row_bytes + plane_bytes + row_bytes + 128;
    const size_t fields = (row_bytes / PIECE_BYTES + 1) * PIECE_BYTES * (8 / (f->rows));
    size_t at = 0;
#define PART(pointer, type, length)                          \
    do {                                                     \
        if (work) pointer = (type *)(void *)(work + at);     \
        at += ((length) * sizeof(type) + 63) / 64 * 64;      \
    } while (0)
    uint8_t *ones = 0;
    PART(*scratch, uint8_t, block_bytes + WRITE_BEHIND);
    PART(*spare, uint8_t, 2 * block_bytes + 16 + READ_BEHIND);
    PART(ones, uint8_t, plane_bytes + 1);
    PART(f->bad, uint8_t, plane_bytes + 1);
    PART(f->keep, uint8_t, plane_bytes + 1);
    PART(f->equal, uint8_t, plane_bytes + 1);
    PART(f->field_maximum, uint32_t, fields);
    PART(f->field_total, uint64_t, fields);
    PART(f->field_lost, uint8_t, fields);
    for (int p = 0; p < f->bits; p++) PART(f->plane[p], uint8_t, band_bytes);
    PART(f->plane[BAD_PLANE], uint8_t, band_bytes);
#undef PART
    if (work) {
        memset(ones, 0xff, plane_bytes + 1);
        f->ones = ones;
    }
    return at;
}

/* What contradicts itself in the numbers of a frame, or 0. Fills what follows from them. */
static const char *describe(struct frame *f, int64_t block_bytes) {
    const int64_t item = f->bits / 8;
    if (f->bits != 8 && f->bits != 16 && f->bits != 32) return "a pixel has 8, 16 or 32 bits";
    if (f->ny < 1 || f->nx < 1 || f->ny > LARGEST_FRAME_BYTES / f->nx / item)
        return "a frame has 1 to 2^30 bytes";
    if (block_bytes < 8 * item || block_bytes % (8 * item) || block_bytes > LARGEST_BLOCK_BYTES)
        return "a block is whole eights of pixels, at most LARGEST_BLOCK_BYTES";
    if (f->k != 2 && f->k != 4 && f->k != 8 && f->k != 16 && f->k != 32)
        return "k is 2, 4, 8, 16 or 32";
    const int64_t lowest = f->is_signed ? -(INT64_C(1) << (f->bits - 1)) : 0;
    const int64_t highest = (INT64_C(1) << (f->bits - f->is_signed)) - 1;
    if (f->high < lowest || f->high > highest) return "high is no value of the pixel type";
    f->rows = f->k < 8 ? (int)f->k : 8;
    f->has_error = f->has_error && f->error >= lowest && f->error <= highest;
    while (f->high >= 0 && (INT64_C(2) << f->certain) - 1 <= f->high) f->certain++;
    f->judge_all = f->high < 0 || (f->has_error && f->error >= 0 && f->error >> f->certain == 0);
    return 0;
}
