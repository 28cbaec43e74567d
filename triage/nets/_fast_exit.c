/* The learned part of the fast exit for CPUs: what the members of a panel see in a frame's
 * candidates, the rings of the radial view, and the members' answers.
 *
 * Weights and the numbers under way stay in registers and the innermost caches.
 * _fast_exit_lanes.h is the program; it is compiled for vectors of 4 (any processor), 8 (AVX2) and
 * 16 (AVX-512), and triage.nets.fast_exit has the twin.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "_lanes.h"

enum {
    WIDTH = 39,    /* numbers of a candidate */
    CONTEXT = 6,   /* and of its frame */
    HIDDEN = 32,
    LOOKS = 12,
    PADDED = 16,   /* looks, up to whole vectors */
    TOGETHER = 8,  /* candidates come in multiples of it */
    MOST = 4096,   /* candidates */
    FIRST_LAYER = 64,
    INPUTS = 256,  /* at most, of an answer */
    SECTORS = 16,  /* at most */
    BINS = 512,    /* at most */
    REACH = 12,    /* bins to each side that make the continuum */
    WIDTHS = 3,    /* of rings, against a parabola */
    SEEN = 6 + 6 * WIDTHS, /* numbers of a bin */
    RINGS = 64,
    TAPS = 5,
    EDGE = 16,                     /* zeros before a row of bins */
    BEHIND = 2 * 16 + 2,           /* and behind it: two vectors and the last taps */
    ROW = EDGE + BINS + BEHIND,
    HALF = EDGE + BINS / 2 + BEHIND,
};

/* Of the moments of the bins to both sides: with less a parabola would be made up. */
#define LEAST_DETERMINANT 1e-3f
#define SIGMA_SCALE 0.4f /* of a compressed sigma */

typedef struct {
    const float *first;       /* (WIDTH, HIDDEN) */
    float base[HIDDEN];       /* bias and context */
    const float *second;      /* (HIDDEN, PADDED) */
    const float *second_bias; /* (PADDED) */
} Member;

typedef struct {
    const float *first, *first_bias;   /* (SEEN, TAPS, 24), (24) */
    const float *second, *second_bias; /* (24, TAPS, 24), (24) */
    const float *third, *third_bias;   /* (24, TAPS, 12), (12) */
    const float *flat, *flat_bias;     /* (12 bins / 4, RINGS), (RINGS) */
} Rings;

typedef struct {
    int inputs;
    const float *first, *first_bias;   /* (inputs, FIRST_LAYER), (FIRST_LAYER) */
    const float *second, *second_bias; /* (FIRST_LAYER, HIDDEN), (HIDDEN) */
    const float *third, *third_bias;   /* (HIDDEN, PADDED), (PADDED) */
} Answer;

/* Variance of the sectors over Poisson's, in the middle of the bins that two sectors see; at least
 * 1. Numbers of no sign are in the order of their bits. */
static float scatter_of(const float *disagreement, const float *sectors, int bins)
{
    uint32_t bits[BINS], middle = 0;
    int seen = 0;
    for (int i = 0; i < bins; i++) {
        memcpy(&bits[i], &disagreement[i], sizeof bits[i]);
        if (sectors[i] >= 2.0f)
            seen++;
        else
            bits[i] = UINT32_MAX;
    }
    if (!seen) return 1.0f;
    for (uint32_t bit = UINT32_C(1) << 30; bit; bit >>= 1) {
        int below = 0;
        for (int i = 0; i < bins; i++) below += bits[i] < (middle | bit);
        if (below <= (seen - 1) / 2) middle |= bit;
    }
    float median;
    memcpy(&median, &middle, sizeof median);
    median *= 1.1f;
    return median < 1.0f ? 1.0f : median;
}

#define NAME_(a, b) a##_##b
#define NAME_OF(a, b) NAME_(a, b)
#define NAME(x) NAME_OF(x, LANES)

typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

#define LANES 4
#define ON
#if defined(__aarch64__)
#define AT_ONCE 2
#define FMA(a, b, c) ((V4)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define AT_ONCE 1
#define FMA(a, b, c) ((a) * (b) + (c))
#endif
#define V V4
#define I I4
#include "_fast_exit_lanes.h"

#if defined(__x86_64__)

typedef float V8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef float V16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));

#define LANES 8
#define AT_ONCE 2
#define ON __attribute__((target("avx2,fma")))
#define FMA(a, b, c) ((V8)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define V V8
#define I I8
#include "_fast_exit_lanes.h"

#define LANES 16
#define AT_ONCE 8
#define ON __attribute__((target("avx512f")))
#define FMA(a, b, c) ((V16)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define V V16
#define I I16
#include "_fast_exit_lanes.h"

#endif

/* By lanes, the widest first; those that this processor lacks have none. */
static struct {
    int lanes;
    void (*seen)(const Member *, const float *, const float *, Py_ssize_t, float *);
    void (*rings)(const float *, int, int, const Rings *, float *);
    void (*answered)(const Answer *, const float *, float *);
} programs[] = {
#if defined(__x86_64__)
    {16, seen_16, rings_16, answered_16},
    {8, seen_8, rings_8, answered_8},
#endif
    {4, seen_4, rings_4, answered_4},
};
enum { PROGRAMS = sizeof programs / sizeof *programs };

static void drop_what_the_processor_lacks(void)
{
    for (int i = 0; i < PROGRAMS; i++)
        if (!processor_runs(programs[i].lanes)) programs[i].lanes = 0;
}

/* How far a candidate counts: 0 at the least that one has, 1 from 0.2 above. A NaN passes by the
 * layers. */
static float weight_of(const float *candidate, float least)
{
    float peak = candidate[0];
    if (candidate[4] > peak) peak = candidate[4];
    if (candidate[6] > peak) peak = candidate[6];
    if (candidate[9] > peak) peak = candidate[9];
    const float weight = (peak - least) / 0.2f;
    return weight < 0.0f ? 0.0f : weight > 1.0f ? 1.0f : weight;
}

enum { ARRAYS = 10 };

/* Contiguous float32 buffers that a call holds, the last of them writable. */
typedef struct {
    int held;
    Py_buffer buffers[ARRAYS];
    const float *of[ARRAYS];
} Arrays;

static int hold(Arrays *a, PyObject *const *objects, int number)
{
    for (a->held = 0; a->held < number; a->held++) {
        Py_buffer *buffer = &a->buffers[a->held];
        const int flags = PyBUF_C_CONTIGUOUS | (a->held == number - 1 ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(objects[a->held], buffer, flags) < 0) return 0;
        a->of[a->held] = buffer->buf;
    }
    return 1;
}

static void let_go(Arrays *a)
{
    while (a->held > 0) PyBuffer_Release(&a->buffers[--a->held]);
}

static Py_ssize_t numbers_in(const Arrays *a, int i)
{
    return a->buffers[i].len / (Py_ssize_t)sizeof(float);
}

/* Whether the buffers hold as many numbers as they must; otherwise an exception is set. */
static int fit(const Arrays *a, const char *function, const char *const *names,
               const Py_ssize_t *sizes)
{
    for (int i = 0; i < a->held; i++)
        if (a->buffers[i].len != sizes[i] * (Py_ssize_t)sizeof(float) ||
            (uintptr_t)a->of[i] % sizeof(float)) {
            PyErr_Format(PyExc_ValueError, "%s(): %s has %zd bytes; expected %zd numbers",
                         function, names[i], a->buffers[i].len, sizes[i]);
            return 0;
        }
    return 1;
}

/* Which program has so many lanes; -1 and an exception if none. */
static int program_of(const char *function, int lanes)
{
    for (int i = 0; i < PROGRAMS; i++)
        if (lanes > 0 && programs[i].lanes == lanes) return i;
    PyErr_Format(PyExc_ValueError, "%s(): no program of %d lanes here", function, lanes);
    return -1;
}

PyDoc_STRVAR(seen_doc,
"seen(candidates, last, first, context, bias, second, second_bias, out, least, lanes)\n--\n\n"
"Fill out (members, 24): log(1 + sum) of each look over the candidates (K, 39), and of its cube.\n"
"last (6) is the frame's context; first (members, 39, 32), context (members, 32, 6), bias\n"
"(members, 32), second (members, 32, 16) and second_bias (members, 16) are the weights; all\n"
"float32 and contiguous, K a multiple of 8 and at most 4096. lanes is one of LANES. ValueError\n"
"otherwise.");

static PyObject *seen(PyObject *self, PyObject *args)
{
    static const char *const names[] = {"candidates", "last",   "first",       "context",
                                        "bias",       "second", "second_bias", "out"};
    PyObject *objects[8], *answer = NULL;
    double least;
    int lanes;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOOOOOdi:seen", &objects[0], &objects[1], &objects[2],
                          &objects[3], &objects[4], &objects[5], &objects[6], &objects[7], &least,
                          &lanes))
        return NULL;
    Arrays a;
    const int program = program_of("seen", lanes);
    if (program < 0) return NULL;
    if (!hold(&a, objects, 8)) goto done;
    const Py_ssize_t number = numbers_in(&a, 0) / WIDTH, members = numbers_in(&a, 4) / HIDDEN;
    const Py_ssize_t sizes[] = {
        number * WIDTH,   CONTEXT,
        members * WIDTH * HIDDEN,  members * HIDDEN * CONTEXT,
        members * HIDDEN, members * HIDDEN * PADDED,
        members * PADDED, members * 2 * LOOKS,
    };
    if (!fit(&a, "seen", names, sizes)) goto done;
    if (number % TOGETHER || number > MOST) {
        PyErr_Format(PyExc_ValueError, "seen(): %zd candidates; expected a multiple of %d up to %d",
                     number, TOGETHER, MOST);
        goto done;
    }

    PyThreadState *state = PyEval_SaveThread();
    float weights[MOST], sums[2 * PADDED], *out = a.buffers[7].buf;
    for (Py_ssize_t k = 0; k < number; k++)
        weights[k] = weight_of(a.of[0] + k * WIDTH, (float)least);
    for (Py_ssize_t m = 0; m < members; m++, out += 2 * LOOKS) {
        Member member = {
            .first = a.of[2] + m * WIDTH * HIDDEN,
            .second = a.of[5] + m * HIDDEN * PADDED,
            .second_bias = a.of[6] + m * PADDED,
        };
        for (int h = 0; h < HIDDEN; h++) {
            const float *context = a.of[3] + (m * HIDDEN + h) * CONTEXT;
            member.base[h] = a.of[4][m * HIDDEN + h];
            for (int i = 0; i < CONTEXT; i++) member.base[h] += context[i] * a.of[1][i];
        }
        programs[program].seen(&member, a.of[0], weights, number, sums);
        for (int i = 0; i < LOOKS; i++) {
            out[i] = log1pf(sums[i]);
            out[LOOKS + i] = log1pf(sums[PADDED + i]);
        }
    }
    PyEval_RestoreThread(state);
    answer = Py_NewRef(Py_None);

done:
    let_go(&a);
    return answer;
}

PyDoc_STRVAR(rings_doc,
"rings(radial, first, first_bias, second, second_bias, third, third_bias, flat, flat_bias, out,\n"
"      sectors, lanes)\n--\n\n"
"Fill out (64) from the radial view (5, sectors, bins). first (24, 5, 24), second (24, 5, 24) and\n"
"third (24, 5, 12) are the weights of the convolutions, flat (12 bins / 4, 64) those of the dense\n"
"layer, each with its biases; all float32 and contiguous, bins a multiple of 4 and at most 512,\n"
"sectors at most 16. lanes is one of LANES. ValueError otherwise.");

static PyObject *rings(PyObject *self, PyObject *args)
{
    static const char *const names[] = {"radial", "first",      "first_bias", "second",
                                        "second_bias", "third", "third_bias", "flat",
                                        "flat_bias", "out"};
    PyObject *objects[10], *answer = NULL;
    int sectors, lanes;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOOii:rings", &objects[0], &objects[1], &objects[2],
                          &objects[3], &objects[4], &objects[5], &objects[6], &objects[7],
                          &objects[8], &objects[9], &sectors, &lanes))
        return NULL;
    Arrays a;
    const int program = program_of("rings", lanes);
    if (program < 0) return NULL;
    if (!hold(&a, objects, 10)) goto done;
    if (sectors < 1 || sectors > SECTORS) {
        PyErr_Format(PyExc_ValueError, "rings(): %d sectors; expected at most %d", sectors, SECTORS);
        goto done;
    }
    const Py_ssize_t bins = numbers_in(&a, 0) / (5 * sectors);
    const Py_ssize_t sizes[] = {
        5 * sectors * bins, SEEN * TAPS * 24, 24, 24 * TAPS * 24,           24,
        24 * TAPS * 12,     12,            12 * (bins / 4) * RINGS, RINGS, RINGS,
    };
    if (!fit(&a, "rings", names, sizes)) goto done;
    if (bins < 4 || bins % 4 || bins > BINS) {
        PyErr_Format(PyExc_ValueError, "rings(): %zd bins; expected a multiple of 4 up to %d", bins,
                     BINS);
        goto done;
    }
    const Rings weights = {a.of[1], a.of[2], a.of[3], a.of[4], a.of[5], a.of[6], a.of[7], a.of[8]};
    PyThreadState *state = PyEval_SaveThread();
    programs[program].rings(a.of[0], sectors, (int)bins, &weights, a.buffers[9].buf);
    PyEval_RestoreThread(state);
    answer = Py_NewRef(Py_None);

done:
    let_go(&a);
    return answer;
}

PyDoc_STRVAR(answer_doc,
"answer(known, more, first, first_bias, second, second_bias, third, third_bias, out, lanes)\n--\n\n"
"Fill out (outputs, at most 16) with the mean of the members' answers to the numbers known (n)\n"
"and more (members, m), or (1, m) for all. first (members, n + m, 64), second (members, 64, 32)\n"
"and third (members, 32, 16) are the weights, each with its biases; all float32 and contiguous,\n"
"n + m at most 256. lanes is one of LANES. ValueError otherwise.");

static PyObject *answer(PyObject *self, PyObject *args)
{
    static const char *const names[] = {"known",       "more",  "first",      "first_bias", "second",
                                        "second_bias", "third", "third_bias", "out"};
    PyObject *objects[9], *result = NULL;
    int lanes;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOOOOOOi:answer", &objects[0], &objects[1], &objects[2],
                          &objects[3], &objects[4], &objects[5], &objects[6], &objects[7],
                          &objects[8], &lanes))
        return NULL;
    Arrays a;
    const int program = program_of("answer", lanes);
    if (program < 0) return NULL;
    if (!hold(&a, objects, 9)) goto done;
    const Py_ssize_t members = numbers_in(&a, 7) / PADDED, outputs = numbers_in(&a, 8);
    const Py_ssize_t inputs = members ? numbers_in(&a, 2) / (members * FIRST_LAYER) : 0;
    const Py_ssize_t known = numbers_in(&a, 0), more = inputs - known;
    const int shared = numbers_in(&a, 1) == more;
    const Py_ssize_t sizes[] = {
        known,
        shared ? more : members * more,
        members * inputs * FIRST_LAYER,
        members * FIRST_LAYER,
        members * FIRST_LAYER * HIDDEN,
        members * HIDDEN,
        members * HIDDEN * PADDED,
        members * PADDED,
        outputs,
    };
    if (more < 0 || inputs > INPUTS || members < 1 || outputs > PADDED) {
        PyErr_Format(PyExc_ValueError,
                     "answer(): %zd inputs, %zd of them known, %zd members, %zd outputs; expected "
                     "at most %d inputs and %d outputs",
                     inputs, known, members, outputs, INPUTS, PADDED);
        goto done;
    }
    if (!fit(&a, "answer", names, sizes)) goto done;

    PyThreadState *state = PyEval_SaveThread();
    float x[INPUTS], one[PADDED], mean[PADDED] = {0}, *out = a.buffers[8].buf;
    memcpy(x, a.of[0], sizeof(float) * (size_t)known);
    for (Py_ssize_t m = 0; m < members; m++) {
        const Answer member = {
            .inputs = (int)inputs,
            .first = a.of[2] + m * inputs * FIRST_LAYER,
            .first_bias = a.of[3] + m * FIRST_LAYER,
            .second = a.of[4] + m * FIRST_LAYER * HIDDEN,
            .second_bias = a.of[5] + m * HIDDEN,
            .third = a.of[6] + m * HIDDEN * PADDED,
            .third_bias = a.of[7] + m * PADDED,
        };
        memcpy(x + known, a.of[1] + (shared ? 0 : m * more), sizeof(float) * (size_t)more);
        programs[program].answered(&member, x, one);
        for (int i = 0; i < PADDED; i++) mean[i] += one[i];
    }
    for (Py_ssize_t i = 0; i < outputs; i++) out[i] = mean[i] / (float)members;
    PyEval_RestoreThread(state);
    result = Py_NewRef(Py_None);

done:
    let_go(&a);
    return result;
}

static PyMethodDef methods[] = {
    {"seen", seen, METH_VARARGS, seen_doc},
    {"rings", rings, METH_VARARGS, rings_doc},
    {"answer", answer, METH_VARARGS, answer_doc},
    {NULL, NULL, 0, NULL},
};

static int executed(PyObject *module)
{
    drop_what_the_processor_lacks();
    int lanes[PROGRAMS], count = 0;
    for (int i = 0; i < PROGRAMS; i++)
        if (programs[i].lanes) lanes[count++] = programs[i].lanes;
    return publish_lanes(module, lanes, count);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, executed}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_fast_exit",
    .m_doc = "The learned part of the fast exit, in vectors.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__fast_exit(void)
{
    return PyModuleDef_Init(&definition);
}
