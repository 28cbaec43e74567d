/* The fast exit's maps, counts and candidates of one frame: triagenet.evidence for CPUs.
 *
 * _evidence_lanes.h is the program, in vectors; it is compiled for vectors of 4 (any processor),
 * 8 (AVX2) and 16 (AVX-512), and the module's LANES says which of them this processor runs.
 * Compilers without GNU C's vectors fail here, and the twin in triage.nets.evidence serves.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "_lanes.h"

enum {
    MAPS = 11,
    THRESHOLDS = 9,
    COUNTS = MAPS * THRESHOLDS + 6,
    CANDIDATES = 512,
    SEEN = MAPS + 1 + 9 * 3, /* numbers about a candidate */
    STEP = 32,               /* sides of an overview are multiples of it */
    WIDEST = 16,             /* cells of a vector */
    PAD = 32,                /* zeros on both sides of a scratch row */
    LISTED = 2048,
};

/* Sums in fixed point are exact: what left a window leaves nothing behind. 17 x 17 cells of at
 * most 6 sigma fit a signed integer. */
#define FIXED 1048576.0f

typedef struct {
    const char *overview; /* (3, height, width) */
    Py_ssize_t plane_bytes, row_bytes;
    float *planes; /* (12, rows, columns) */
    Py_ssize_t rows, columns;
    Py_ssize_t height, width; /* of the corner that holds every cell with a share, at least */
    float pixels; /* of a cell */
    float chance; /* sigma by which chance puts the brightest pixel over the cell */
    float floors[THRESHOLDS];
} Frame;

/* Sums over the frame; middle, near and far of excess, rest and whole. */
typedef struct {
    double cells, brightness, middle[3], near[3], far[3];
} Sums;

/* Rings of rows, by row modulo their length, and single rows. */
typedef struct {
    float *ordinary[9], *inverse[5], *whole[5], *local[5], *column, *column2, *far, *none;
    int32_t *excess[17], *rest[17], *sum_cells, *sum_excess, *sum_rest;
    int32_t *near_cells, *near_excess, *near_rest, *fours;
} Rows;

enum { ROWS = 9 + 5 + 5 + 5 + 4 + 2 * 17 + 3 + 3 + 1 };

/* Cells by how far they stand out, as keys that ascend from the strongest, of equals from the
 * first in the frame. */
typedef struct {
    float floor;
    Py_ssize_t n;
    uint64_t keys[LISTED], spare[LISTED];
} List;

static inline const float *input(const Frame *f, int channel, Py_ssize_t y)
{
    return (const float *)(f->overview + channel * f->plane_bytes + y * f->row_bytes);
}

static inline float *plane(const Frame *f, int map, Py_ssize_t y)
{
    return f->planes + (map * f->rows + y) * f->columns;
}

static inline const float *input_or_none(const Frame *f, const Rows *r, int channel, Py_ssize_t y)
{
    return y < 0 || y >= f->height ? r->none : input(f, channel, y);
}

static inline const float *plane_or_none(const Frame *f, const Rows *r, int map, Py_ssize_t y)
{
    return y < 0 || y >= f->height ? r->none : plane(f, map, y);
}

/* Leave out rows at the lower edge and columns at the right one where no cell has a share, columns
 * in whole vectors. Nothing is seen there. */
static void leave_out_the_empty(Frame *f)
{
    static const float none[WIDEST];
    while (f->height > 1) {
        const float *row = input(f, 2, f->height - 1);
        Py_ssize_t x = 0;
        while (x < f->width && !memcmp(row + x, none, sizeof none)) x += WIDEST;
        if (x < f->width) break;
        f->height--;
    }
    while (f->width > WIDEST) {
        Py_ssize_t y = 0;
        while (y < f->height && !memcmp(input(f, 2, y) + f->width - WIDEST, none, sizeof none)) y++;
        if (y < f->height) break;
        f->width -= WIDEST;
    }
}

/* Zeros to all planes where leave_out_the_empty() found nothing. */
static void blank_the_rest(const Frame *f)
{
    const size_t behind = (size_t)(f->columns - f->width) * sizeof(float);
    const size_t below = (size_t)((f->rows - f->height) * f->columns) * sizeof(float);
    for (int map = 0; map <= MAPS; map++) {
        for (Py_ssize_t y = 0; behind && y < f->height; y++) memset(plane(f, map, y) + f->width, 0, behind);
        memset(plane(f, map, 0) + f->height * f->columns, 0, below);
    }
}

static uint32_t descending(float value)
{
    uint32_t bits;
    value += 0.0f; /* -0 equals 0 */
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

static float ascended(uint32_t key)
{
    uint32_t bits = key & 0x80000000u ? key : ~key & 0x7fffffffu;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Cells come in the frame's order, and stay in it where they stand out equally: radix sort by the
 * upper half of the keys. Leaves the strongest. */
static void sort(List *list)
{
    uint32_t starts[4][256] = {0};
    uint64_t *from = list->keys, *to = list->spare;
    for (Py_ssize_t i = 0; i < list->n; i++)
        for (int byte = 0; byte < 4; byte++) starts[byte][from[i] >> (32 + 8 * byte) & 255]++;
    for (int byte = 0; byte < 4; byte++) {
        const int shift = 32 + 8 * byte;
        if (list->n && starts[byte][from[0] >> shift & 255] == list->n) continue;
        uint32_t start = 0;
        for (int i = 0; i < 256; i++) {
            uint32_t many = starts[byte][i];
            starts[byte][i] = start;
            start += many;
        }
        for (Py_ssize_t i = 0; i < list->n; i++)
            to[starts[byte][from[i] >> shift & 255]++] = from[i];
        uint64_t *filled = to;
        to = from;
        from = filled;
    }
    if (from != list->keys) memcpy(list->keys, from, (size_t)list->n * sizeof *from);
    if (list->n > CANDIDATES) list->n = CANDIDATES;
}

/* A later cell that equals the floor is behind it. */
static void keep(List *list, float peak, uint32_t at)
{
    list->keys[list->n++] = (uint64_t)descending(peak) << 32 | at;
    if (list->n == LISTED) {
        sort(list);
        list->floor = ascended((uint32_t)(list->keys[CANDIDATES - 1] >> 32));
    }
}

#define NAME_(a, b) a##_##b
#define NAME_OF(a, b) NAME_(a, b)
#define NAME(x) NAME_OF(x, LANES)
#define ALWAYS inline __attribute__((always_inline))

/* Four lanes, in GNU C. */

typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

static ALWAYS V4 load4(const float *p) { V4 v; memcpy(&v, p, sizeof v); return v; }
static ALWAYS I4 iload4(const int32_t *p) { I4 v; memcpy(&v, p, sizeof v); return v; }
static ALWAYS V4 chosen4(I4 mask, V4 yes, V4 no) { return (V4)((mask & (I4)yes) | (~mask & (I4)no)); }
#if defined(__x86_64__)
static ALWAYS V4 root4(V4 v) { return _mm_sqrt_ps(v); }
#elif defined(__aarch64__)
static ALWAYS V4 root4(V4 v) { return (V4)vsqrtq_f32((float32x4_t)v); }
#else
static ALWAYS V4 root4(V4 v) { return (V4){sqrtf(v[0]), sqrtf(v[1]), sqrtf(v[2]), sqrtf(v[3])}; }
#endif

#define LANES 4
#define ON
#define V V4
#define M I4
#define I I4
#define LOAD(p) load4(p)
#define STORE(p, v) do { V4 stored = (v); memcpy((p), &stored, sizeof stored); } while (0)
#define SET(a) ((V4){(a), (a), (a), (a)})
#define ADD(a, b) ((a) + (b))
#define SUB(a, b) ((a) - (b))
#define MUL(a, b) ((a) * (b))
#define LESS(c, a, b) ((c) - (a) * (b))
#define MIN(a, b) min4(a, b)
#define MAX(a, b) max4(a, b)
#define GUESS_INVERSE(a) (SET(1.0f) / (a))
#define ROOT(a) root4(a)
#define GUESS_INVERSE_ROOT(a) (SET(1.0f) / root4(a))
#define ABS(a) ((V4)((I4)(a) & 0x7fffffff))
#define WITH_SIGN(a, of) ((V4)((I4)(a) | ((I4)(of) & (int32_t)0x80000000)))
#define ABOVE(a, b) ((I4)((a) > (b)))
#define KEEP(m, a) ((V4)((m) & (I4)(a)))
#define BITS(m) bits4(m)
#define PACK(p, m, v) pack4(p, m, v)
#define ILOAD(p) iload4(p)
#define ISTORE(p, v) do { I4 stored = (v); memcpy((p), &stored, sizeof stored); } while (0)
#define IADD(a, b) ((a) + (b))
#define ISUB(a, b) ((a) - (b))
#define TO_I(a) __builtin_convertvector(a, I4)
#define TO_V(a) __builtin_convertvector(a, V4)

static ALWAYS V4 min4(V4 a, V4 b) { return chosen4(ABOVE(b, a), a, b); }
static ALWAYS V4 max4(V4 a, V4 b) { return chosen4(ABOVE(a, b), a, b); }
static ALWAYS unsigned bits4(I4 m) { m &= (I4){1, 2, 4, 8}; return (unsigned)(m[0] | m[1] | m[2] | m[3]); }
/* The chosen lanes one after another, and what more the vector holds; how many they are. */
static ALWAYS int pack4(float *p, I4 mask, V4 v)
{
    int many = 0;
    for (int i = 0; i < 4; i++) {
        p[many] = v[i];
        many += mask[i] & 1;
    }
    return many;
}

static inline float sum_4(V4 v) { return (v[0] + v[1]) + (v[2] + v[3]); }

#include "_evidence_lanes.h"

#if defined(__x86_64__)

/* Eight lanes: AVX2 and FMA. */

#define LANES 8
#define ON __attribute__((target("avx2,fma,popcnt")))
#define V __m256
#define M __m256
#define I __m256i
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define SET(a) _mm256_set1_ps(a)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define LESS(c, a, b) _mm256_fnmadd_ps(a, b, c)
#define MIN(a, b) _mm256_min_ps(a, b)
#define MAX(a, b) _mm256_max_ps(a, b)
#define GUESS_INVERSE(a) _mm256_rcp_ps(a)
#define ROOT(a) _mm256_sqrt_ps(a)
#define GUESS_INVERSE_ROOT(a) _mm256_rsqrt_ps(a)
#define ABS(a) _mm256_andnot_ps(SET(-0.0f), a)
#define WITH_SIGN(a, of) _mm256_or_ps(a, _mm256_and_ps(SET(-0.0f), of))
#define ABOVE(a, b) _mm256_cmp_ps(a, b, _CMP_GT_OQ)
#define KEEP(m, a) _mm256_and_ps(m, a)
#define BITS(m) (unsigned)_mm256_movemask_ps(m)
#define PACK(p, m, v) pack8(p, m, v)
#define ILOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define ISTORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define IADD(a, b) _mm256_add_epi32(a, b)
#define ISUB(a, b) _mm256_sub_epi32(a, b)
#define TO_I(a) _mm256_cvttps_epi32(a)
#define TO_V(a) _mm256_cvtepi32_ps(a)

/* By set of lanes, their numbers one after another. */
static uint8_t chosen_lanes[256][8];

static void list_chosen_lanes(void)
{
    for (int set = 0; set < 256; set++)
        for (int lane = 0, many = 0; lane < 8; lane++)
            if (set >> lane & 1) chosen_lanes[set][many++] = (uint8_t)lane;
}

static inline ON int pack8(float *p, M mask, V v)
{
    unsigned set = BITS(mask);
    __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)chosen_lanes[set]));
    STORE(p, _mm256_permutevar8x32_ps(v, lanes));
    return __builtin_popcount(set);
}

static inline ON float sum_8(V v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#include "_evidence_lanes.h"

/* Sixteen lanes: AVX-512. */

#define LANES 16
#define ON __attribute__((target("avx512f,popcnt")))
#define V __m512
#define M __mmask16
#define I __m512i
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define SET(a) _mm512_set1_ps(a)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define LESS(c, a, b) _mm512_fnmadd_ps(a, b, c)
#define MIN(a, b) _mm512_min_ps(a, b)
#define MAX(a, b) _mm512_max_ps(a, b)
#define GUESS_INVERSE(a) _mm512_rcp14_ps(a)
#define ROOT(a) _mm512_sqrt_ps(a)
#define GUESS_INVERSE_ROOT(a) _mm512_rsqrt14_ps(a)
#define ABS(a) _mm512_abs_ps(a)
#define WITH_SIGN(a, of) \
    _mm512_castsi512_ps(_mm512_or_epi32( \
        _mm512_castps_si512(a), \
        _mm512_and_epi32(_mm512_castps_si512(of), _mm512_set1_epi32((int)0x80000000u))))
#define ABOVE(a, b) _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ)
#define KEEP(m, a) _mm512_maskz_mov_ps(m, a)
#define BITS(m) ((unsigned)(m))
#define PACK(p, m, v) pack16(p, m, v)
#define ILOAD(p) _mm512_loadu_si512(p)
#define ISTORE(p, v) _mm512_storeu_si512(p, v)
#define IADD(a, b) _mm512_add_epi32(a, b)
#define ISUB(a, b) _mm512_sub_epi32(a, b)
#define TO_I(a) _mm512_cvttps_epi32(a)
#define TO_V(a) _mm512_cvtepi32_ps(a)

static inline ON int pack16(float *p, M mask, V v)
{
    STORE(p, _mm512_maskz_compress_ps(mask, v));
    return __builtin_popcount(mask);
}

static inline ON float sum_16(V v) { return _mm512_reduce_add_ps(v); }

#include "_evidence_lanes.h"

#endif

typedef void (*Program)(const Frame *, Rows *, float *, List *);

/* By lanes, the widest first; NULL where this processor lacks the instructions. */
static struct {
    int lanes;
    Program evidence;
    void (*listed)(const Frame *, Py_ssize_t, List *);
} programs[] = {
#if defined(__x86_64__)
    {16, evidence_16, listed_16},
    {8, evidence_8, listed_8},
#endif
    {4, evidence_4, listed_4},
};
enum { PROGRAMS = sizeof programs / sizeof *programs };

static void drop_what_the_processor_lacks(void)
{
#if defined(__x86_64__)
    list_chosen_lanes();
#endif
    for (int i = 0; i < PROGRAMS; i++)
        if (!processor_runs(programs[i].lanes)) programs[i].evidence = NULL;
}

/* Scratch rows of zeros out of one block, each on a cache line's start; NULL when there is no
 * memory. */
static void *spread(Rows *rows, Py_ssize_t width)
{
    const size_t row = (size_t)width + 2 * PAD, bytes = ROWS * row * sizeof(float);
    float *block = aligned_alloc(64, bytes);
    if (!block) return NULL;
    memset(block, 0, bytes);
    float *next = block + PAD;
#define TAKE(into) ((into) = (void *)next, next += row)
    for (int i = 0; i < 9; i++) TAKE(rows->ordinary[i]);
    for (int i = 0; i < 5; i++) {
        TAKE(rows->inverse[i]);
        TAKE(rows->whole[i]);
        TAKE(rows->local[i]);
    }
    for (int i = 0; i < 17; i++) {
        TAKE(rows->excess[i]);
        TAKE(rows->rest[i]);
    }
    TAKE(rows->column);
    TAKE(rows->column2);
    TAKE(rows->far);
    TAKE(rows->none);
    TAKE(rows->sum_cells);
    TAKE(rows->sum_excess);
    TAKE(rows->sum_rest);
    TAKE(rows->near_cells);
    TAKE(rows->near_excess);
    TAKE(rows->near_rest);
    TAKE(rows->fours);
#undef TAKE
    return block;
}

/* What is seen of each candidate; zeros for those that hardly stand out. */
static void gather(const Frame *f, const List *list, float least, float *seen, int64_t *places)
{
    static const int around[3] = {0, 3, 7};
    memset(seen, 0, sizeof(float) * CANDIDATES * SEEN);
    for (Py_ssize_t i = 0; i < CANDIDATES; i++, seen += SEEN) {
        const Py_ssize_t at = (Py_ssize_t)(uint32_t)list->keys[i];
        const Py_ssize_t y = at / f->columns, x = at % f->columns;
        places[i] = at;
        if (!(ascended((uint32_t)(list->keys[i] >> 32)) > least)) continue;
        for (int map = 0; map <= MAPS; map++) seen[map] = plane(f, map, y)[x];
        float *next = seen + MAPS + 1;
        for (int of = 0; of < 3; of++)
            for (Py_ssize_t v = y - 1; v <= y + 1; v++, next += 3) {
                if (v < 0 || v >= f->rows) continue;
                const float *row = plane(f, around[of], v) + x;
                next[0] = x > 0 ? row[-1] : 0.0f;
                next[1] = row[0];
                next[2] = x + 1 < f->columns ? row[1] : 0.0f;
            }
    }
}

/* Whether a buffer has the type, sides and layout; otherwise an exception is set. */
static int fits(const Py_buffer *b, const char *name, int integers, int ndim,
                const Py_ssize_t *shape)
{
    const char *format = b->format ? b->format : "B";
    const Py_ssize_t size = integers ? sizeof(int64_t) : sizeof(float);
    int good = b->itemsize == size && (integers ? !strcmp(format, "l") || !strcmp(format, "q")
                                                : !strcmp(format, "f"));
    good = good && (uintptr_t)b->buf % (size_t)size == 0 && b->ndim == ndim;
    for (int i = 0; good && i < ndim; i++) good = b->shape[i] == shape[i];
    if (!good)
        PyErr_Format(PyExc_ValueError, "evidence(): %s is no %s array of the expected shape", name,
                     integers ? "int64" : "float32");
    return good;
}

PyDoc_STRVAR(evidence_doc,
"evidence(overview, bin_factor, chance, floors, least, planes, counts, candidates, places, lanes)\n"
"--\n\n"
"Fill planes (12, Y, X), counts (105), candidates (512, 39), all float32, and places (512) int64\n"
"from the overview (3, Y, X) float32, rows contiguous, Y and X multiples of 32, at least 512\n"
"cells. floors (9) float32 ascend; lanes is one of LANES. ValueError otherwise.");

static PyObject *evidence(PyObject *self, PyObject *args)
{
    PyObject *objects[6];
    double chance, least;
    int bin_factor, lanes;
    (void)self;
    if (!PyArg_ParseTuple(args, "OidOdOOOOi:evidence", &objects[0], &bin_factor, &chance,
                          &objects[1], &least, &objects[2], &objects[3], &objects[4], &objects[5],
                          &lanes))
        return NULL;

    static const char *const names[6] = {"overview", "floors",     "planes",
                                         "counts",   "candidates", "places"};
    Py_buffer buffers[6];
    int held = 0;
    PyObject *answer = NULL;
    void *block = NULL;
    List *list = NULL;
    for (; held < 6; held++) {
        int flags = PyBUF_FORMAT | (held == 0 ? PyBUF_STRIDES : PyBUF_C_CONTIGUOUS);
        if (held > 1) flags |= PyBUF_WRITABLE;
        if (PyObject_GetBuffer(objects[held], &buffers[held], flags) == 0) continue;
        if (PyErr_ExceptionMatches(PyExc_BufferError))
            PyErr_Format(PyExc_ValueError, "evidence(): %s is not contiguous or not writable",
                         names[held]);
        goto done;
    }
    const Py_buffer *overview = &buffers[0];
    if (overview->ndim != 3) {
        PyErr_SetString(PyExc_ValueError, "evidence(): overview has not three axes");
        goto done;
    }
    const Py_ssize_t height = overview->shape[1], width = overview->shape[2];
    const Py_ssize_t shapes[6][3] = {{3, height, width}, {THRESHOLDS},       {MAPS + 1, height, width},
                                     {COUNTS},           {CANDIDATES, SEEN}, {CANDIDATES}};
    static const int axes[6] = {3, 1, 3, 1, 2, 1};
    for (int i = 0; i < 6; i++)
        if (!fits(&buffers[i], names[i], i == 5, axes[i], shapes[i])) goto done;
    const Py_ssize_t *strides = overview->strides;
    if (strides[2] != sizeof(float) || strides[0] % (Py_ssize_t)sizeof(float) ||
        strides[1] % (Py_ssize_t)sizeof(float)) {
        PyErr_SetString(PyExc_ValueError, "evidence(): the overview's rows are not contiguous");
        goto done;
    }
    if (height < STEP || width < STEP || height % STEP || width % STEP || height > 65536 ||
        width > 32768 || bin_factor < 1 || bin_factor > 4096) {
        PyErr_Format(PyExc_ValueError,
                     "evidence(): overview of %zd x %zd cells of %d pixels a side; expected "
                     "multiples of %d cells",
                     height, width, bin_factor, STEP);
        goto done;
    }
    int program = 0;
    while (program < PROGRAMS &&
           (programs[program].lanes != lanes || !programs[program].evidence))
        program++;
    if (program == PROGRAMS) {
        PyErr_Format(PyExc_ValueError, "evidence(): no program of %d lanes here", lanes);
        goto done;
    }

    Frame frame = {
        .overview = overview->buf,
        .plane_bytes = strides[0],
        .row_bytes = strides[1],
        .planes = buffers[2].buf,
        .rows = height,
        .columns = width,
        .height = height,
        .width = width,
        .pixels = (float)bin_factor * (float)bin_factor,
        .chance = (float)chance,
    };
    memcpy(frame.floors, buffers[1].buf, sizeof frame.floors);
    leave_out_the_empty(&frame);
    Rows rows;
    block = spread(&rows, frame.width);
    list = malloc(sizeof *list);
    if (!block || !list) {
        PyErr_NoMemory();
        goto done;
    }
    PyThreadState *state = PyEval_SaveThread();
    list->n = 0;
    list->floor = (float)least;
    programs[program].evidence(&frame, &rows, buffers[3].buf, list);
    blank_the_rest(&frame);
    sort(list);
    if (list->n < CANDIDATES) {
        /* A quiet frame: the order goes on below what counts. */
        list->n = 0;
        list->floor = -INFINITY;
        frame.width = width;
        for (Py_ssize_t y = 0; y < height; y++) programs[program].listed(&frame, y, list);
        sort(list);
        /* Cells that are no numbers are in no order. */
        while (list->n < CANDIDATES) list->keys[list->n++] = (uint64_t)descending(-INFINITY) << 32;
    }
    gather(&frame, list, (float)least, buffers[4].buf, buffers[5].buf);
    PyEval_RestoreThread(state);
    answer = Py_NewRef(Py_None);

done:
    free(block);
    free(list);
    while (held > 0) PyBuffer_Release(&buffers[--held]);
    return answer;
}

static PyMethodDef methods[] = {
    {"evidence", evidence, METH_VARARGS, evidence_doc},
    {NULL, NULL, 0, NULL},
};

static int executed(PyObject *module)
{
    drop_what_the_processor_lacks();
    int lanes[PROGRAMS], count = 0;
    for (int i = 0; i < PROGRAMS; i++)
        if (programs[i].evidence) lanes[count++] = programs[i].lanes;
    return publish_lanes(module, lanes, count);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, executed}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_evidence",
    .m_doc = "The fast exit's maps, counts and candidates of one frame, in vectors.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__evidence(void)
{
    return PyModuleDef_Init(&definition);
}
