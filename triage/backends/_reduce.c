/* From a bitshuffled LZ4 payload to the cells of a frame, without the frame.
 *
 * A block of bitshuffled pixels is a stack of bit planes. They are reduced as they are: LZ4
 * fills a scratch that stays in the cache, its planes, masked, are put behind those of the block
 * before, and whenever the rows of a band of cells are complete the band is reduced by counting
 * and comparing bits, 256 pixels at a time. So the cost follows the planes in use, which are few
 * where counts are low, and memory traffic is the payload and the cells.
 *
 * The twin in lz4.py and cpu.py gives the same integers and the same faults. Formats: see there.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
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
    PIECE_BYTES = 32,
    READ_BEHIND = 32,  /* bytes that the LZ4 decoder may read behind a block */
    WRITE_BEHIND = 96, /* bytes that it may write behind its output */
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

struct frame {
    int64_t ny, nx;
    int bits, is_signed, has_error, negative_is_invalid, judge_all;
    int certain;       /* pixels without a one in this plane or above are measurements */
    int64_t high, error;
    int big_endian;
    const uint8_t *valid, *ones; /* a bit for each pixel; all ones for a block */

    /* Planes of the pixels [base, filled), base a multiple of 8. */
    int64_t base, filled;
    uint8_t *plane[PLANES];
    uint8_t in_use[PLANES]; /* 0: no ones, and nothing written */
    uint8_t *bad, *keep, *equal;

    /* The band at hand. */
    int rows;
    int64_t next_row;
    size_t row_byte[8];
    int row_shift[8];
    int used[32], used_count;
    uint32_t *field_maximum;
    uint64_t *field_total;
    uint8_t *field_lost;

    int64_t k, stride;
    uint32_t *maximum;
    uint64_t *total;
    uint16_t *count;
};

static size_t big_endian_u32(const uint8_t *s) {
    return (size_t)s[0] << 24 | (size_t)s[1] << 16 | (size_t)s[2] << 8 | s[3];
}

/* The band at the lower edge has fewer rows than the others: rows of zeros stand for the rest. */
static void add_empty_rows(struct frame *f, int present) {
    const size_t empty = (size_t)(f->filled - f->base + 7) / 8;
    for (int p = 0; p < PLANES; p++)
        if (f->in_use[p]) memset(f->plane[p] + empty, 0, (size_t)f->nx / 8 + 1 + PIECE_BYTES);
    for (int r = present; r < f->rows; r++) {
        f->row_byte[r] = empty;
        f->row_shift[r] = 0;
    }
}

/* Enter the fields of the band that begins at row y into their cells. */
static void fold_band(struct frame *f, int64_t y) {
    const int64_t field = f->k < 8 ? f->k : 8, fields = (f->nx + field - 1) / field;
    const int64_t cell = y / f->k * f->stride;
    uint32_t *const maximum = f->maximum + cell;
    uint64_t *const total = f->total + cell;
    uint16_t *const count = f->count + cell;
    if (f->k <= 8) {
        memcpy(maximum, f->field_maximum, (size_t)fields * sizeof *maximum);
        memcpy(total, f->field_total, (size_t)fields * sizeof *total);
    } else {
        const int64_t share = f->k / 8;
        for (int64_t i = 0; i < fields; i++) {
            const int64_t c = i / share;
            if (f->field_maximum[i] > maximum[c]) maximum[c] = f->field_maximum[i];
            total[c] += f->field_total[i];
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
/* Registers stay 256 bits wide: 32 of them and three-way logic are what is gained. */
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=256")
#define NAME(x) x##_avx512
#include "_reduce_kernels.h"
#undef NAME
#pragma GCC pop_options
#else
#define HAS_AVX 0
#endif

typedef int (*reduce_frame_t)(struct frame *, const uint8_t *, const uint8_t *, int64_t, uint8_t *,
                              uint8_t *);
static reduce_frame_t reduce_frame = reduce_frame_plain;
static const char *processor = "plain";

static void choose_processor(void) {
#if HAS_AVX
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) {
        reduce_frame = reduce_frame_avx2;
        processor = "avx2";
    }
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        reduce_frame = reduce_frame_avx512;
        processor = "avx512";
    }
#endif
    for (int period = 0; period < 16; period++) {
        for (int i = 0; i < 16; i++) PERIODIC[period][i] = (uint8_t)(period ? i % period : i);
        STEP[period] = (size_t)(period ? 16 - 16 % period : 16);
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

/* Put the numbers of a call into a frame; 0 and an exception when they contradict each other. */
static int describe(struct frame *f, int64_t block_bytes, int big_endian) {
    const int64_t item = f->bits / 8;
    if ((f->bits != 8 && f->bits != 16 && f->bits != 32) || f->ny < 1 || f->nx < 1 ||
        f->ny > LARGEST_FRAME_BYTES / f->nx / item) {
        PyErr_SetString(PyExc_ValueError, "reduce(): no frame of 8, 16 or 32 bits a pixel and at "
                                          "most 2^30 bytes");
        return 0;
    }
    if (block_bytes < 8 * item || block_bytes % (8 * item) || block_bytes > LARGEST_BLOCK_BYTES) {
        PyErr_SetString(PyExc_ValueError, "reduce(): blocks are whole eights of pixels, at most "
                                          "LARGEST_BLOCK_BYTES");
        return 0;
    }
    if (f->k != 2 && f->k != 4 && f->k != 8 && f->k != 16 && f->k != 32) {
        PyErr_SetString(PyExc_ValueError, "reduce(): k is 2, 4, 8, 16 or 32");
        return 0;
    }
    f->rows = f->k < 8 ? (int)f->k : 8;
    f->big_endian = big_endian;
    return 1;
}

PyDoc_STRVAR(workspace_bytes_doc,
             "workspace_bytes(bits, nx, k, block_bytes)\n--\n\n"
             "Bytes of the workspace that reduce() needs for frames nx pixels wide.");

static PyObject *workspace_bytes(PyObject *self, PyObject *args) {
    struct frame f = {.ny = 1};
    long long nx, k, block_bytes;
    uint8_t *unused;
    if (!PyArg_ParseTuple(args, "iLLL", &f.bits, &nx, &k, &block_bytes)) return 0;
    f.nx = nx;
    f.k = k;
    if (!describe(&f, block_bytes, 0)) return 0;
    return PyLong_FromSize_t(lay_out(&f, (size_t)block_bytes, 0, &unused, &unused));
}

PyDoc_STRVAR(
    reduce_doc,
    "reduce(payload, at, bits, is_signed, big_endian, ny, nx, block_bytes, k, high, error, "
    "negative_is_invalid, valid, workspace, maximum, total, count, plain=False)\n--\n\n"
    "Reduce a bitshuffled LZ4 frame to cells of k x k pixels; 0, or a code of FAULTS.\n\n"
    "payload from byte `at` on: blocks of block_bytes, then the raw tail. valid: a bit for each\n"
    "pixel, the first lowest, 1 where the mask lets it through, and 64 bytes more; None: all.\n"
    "A pixel counts when it is at most `high`, not `error` (None: no such value) and, where\n"
    "negative_is_invalid, not negative; a negative one that counts is 0.\n"
    "maximum uint32, total uint64, count uint16: ceil(ny / k) rows of cells. maximum and total\n"
    "are zero before; count holds the pixels that the mask lets through, and those that are\n"
    "no measurement are taken off. After a fault they hold nothing of use.\n"
    "plain: without the instructions that only some processors have.");

static PyObject *reduce(PyObject *self, PyObject *args) {
    struct frame f = {0};
    Py_buffer payload, work, maximum, total, count, valid = {0};
    PyObject *valid_or_none, *error_or_none, *result = 0;
    Py_ssize_t at;
    long long ny, nx, block_bytes, k, high;
    int big_endian, plain = 0;
    uint8_t *scratch, *spare;
    if (!PyArg_ParseTuple(args, "y*nippLLLLLOpOw*w*w*w*|p", &payload, &at, &f.bits, &f.is_signed,
                          &big_endian, &ny, &nx, &block_bytes, &k, &high, &error_or_none,
                          &f.negative_is_invalid, &valid_or_none, &work, &maximum, &total, &count,
                          &plain))
        return 0;
    f.ny = ny;
    f.nx = nx;
    f.k = k;
    f.high = high;
    if (!describe(&f, block_bytes, big_endian)) goto done;
    const int64_t rows = (ny + k - 1) / k;
    f.stride = count.len / 2 / rows;
    if (f.stride < (nx + k - 1) / k || count.len != rows * f.stride * 2 ||
        maximum.len != rows * f.stride * 4 || total.len != rows * f.stride * 8) {
        PyErr_Format(PyExc_ValueError,
                     "reduce(): cells of %zd, %zd and %zd bytes; expected 4, 8 and 2 bytes for each "
                     "of %lld rows of at least %lld cells",
                     maximum.len, total.len, count.len, (long long)rows, (nx + k - 1) / k);
        goto done;
    }
    if (at < 0 || at > payload.len) {
        PyErr_SetString(PyExc_ValueError, "reduce(): `at` lies outside of the payload");
        goto done;
    }
    if (valid_or_none != Py_None) {
        if (PyObject_GetBuffer(valid_or_none, &valid, PyBUF_SIMPLE)) goto done;
        if (valid.len < (ny * nx + 7) / 8 + 64) {
            PyErr_SetString(PyExc_ValueError, "reduce(): valid is too short for the frame");
            goto done;
        }
        f.valid = valid.buf;
    }
    const int64_t lowest = f.is_signed ? -(INT64_C(1) << (f.bits - 1)) : 0;
    const int64_t highest = (INT64_C(1) << (f.bits - f.is_signed)) - 1;
    if (f.high < lowest || f.high > highest) {
        PyErr_SetString(PyExc_ValueError, "reduce(): high is no value of the pixel type");
        goto done;
    }
    if (error_or_none != Py_None) {
        f.error = PyLong_AsLongLong(error_or_none);
        if (f.error == -1 && PyErr_Occurred()) goto done;
        f.has_error = f.error >= lowest && f.error <= highest;
    }
    while (f.high >= 0 && (INT64_C(2) << f.certain) - 1 <= f.high) f.certain++;
    f.judge_all = f.high < 0 || (f.has_error && f.error >= 0 && f.error >> f.certain == 0);
    if ((size_t)work.len < lay_out(&f, (size_t)block_bytes, 0, &scratch, &spare)) {
        PyErr_SetString(PyExc_ValueError, "reduce(): workspace is shorter than workspace_bytes()");
        goto done;
    }
    f.maximum = maximum.buf;
    f.total = total.buf;
    f.count = count.buf;
    int fault;
    Py_BEGIN_ALLOW_THREADS;
    lay_out(&f, (size_t)block_bytes, work.buf, &scratch, &spare);
    const uint8_t *const bytes = payload.buf;
    fault = (plain ? reduce_frame_plain : reduce_frame)(
        &f, bytes + at, bytes + payload.len, block_bytes / (f.bits / 8), scratch, spare);
    Py_END_ALLOW_THREADS;
    result = PyLong_FromLong(fault);
done:
    if (valid.obj) PyBuffer_Release(&valid);
    PyBuffer_Release(&payload);
    PyBuffer_Release(&work);
    PyBuffer_Release(&maximum);
    PyBuffer_Release(&total);
    PyBuffer_Release(&count);
    return result;
}

static PyMethodDef methods[] = {
    {"workspace_bytes", workspace_bytes, METH_VARARGS, workspace_bytes_doc},
    {"reduce", reduce, METH_VARARGS, reduce_doc},
    {0, 0, 0, 0},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "triage.backends._reduce",
    .m_doc = "Reduces a frame straight from its compressed bytes.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__reduce(void) {
    PyObject *m = PyModule_Create(&module);
    choose_processor();
    if (m && (PyModule_AddStringConstant(m, "PROCESSOR", processor) ||
              PyModule_AddIntConstant(m, "LARGEST_BLOCK_BYTES", LARGEST_BLOCK_BYTES))) {
        Py_DECREF(m);
        return 0;
    }
    return m;
}
