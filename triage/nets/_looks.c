/* What the members of a panel see in a frame's candidates: two small layers for each of them.
 *
 * Weights and the numbers under way stay in registers and the innermost cache. _looks_lanes.h is
 * the program; it is compiled for vectors of 4 (any processor), 8 (AVX2) and 16 (AVX-512), and
 * triage.nets.fast_exit has the twin.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    WIDTH = 39,    /* numbers of a candidate */
    CONTEXT = 6,   /* and of its frame */
    HIDDEN = 32,
    LOOKS = 12,
    PADDED = 16,   /* looks, up to whole vectors */
    TOGETHER = 8,  /* candidates come in multiples of it */
    MOST = 4096,   /* candidates */
};

typedef struct {
    const float *first;       /* (WIDTH, HIDDEN) */
    float base[HIDDEN];       /* bias and context */
    const float *second;      /* (HIDDEN, PADDED) */
    const float *second_bias; /* (PADDED) */
} Member;

#define NAME_(a, b) a##_##b
#define NAME_OF(a, b) NAME_(a, b)
#define NAME(x) NAME_OF(x, LANES)

typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

#define LANES 4
#define AT_ONCE 1
#define ON
#define FMA(a, b, c) ((a) * (b) + (c))
#define V V4
#define I I4
#include "_looks_lanes.h"

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
#include "_looks_lanes.h"

#define LANES 16
#define AT_ONCE 8
#define ON __attribute__((target("avx512f")))
#define FMA(a, b, c) ((V16)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define V V16
#define I I16
#include "_looks_lanes.h"

#endif

typedef void (*Program)(const Member *, const float *, const float *, Py_ssize_t, float *);

/* By lanes, the widest first; NULL where this processor lacks the instructions. */
static struct {
    int lanes;
    Program seen;
} programs[] = {
#if defined(__x86_64__)
    {16, seen_16},
    {8, seen_8},
#endif
    {4, seen_4},
};
enum { PROGRAMS = sizeof programs / sizeof *programs };

static void drop_what_the_processor_lacks(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    /* The first processors with AVX-512 slow down by it; those with VBMI2 no longer do. */
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vbmi2"))
        programs[0].seen = NULL;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) programs[1].seen = NULL;
#endif
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

enum { CANDIDATES, LAST, FIRST, OF_CONTEXT, BIAS, SECOND, SECOND_BIAS, OUT, ARRAYS };

static const char *const NAMES[ARRAYS] = {
    "candidates", "last", "first", "context", "bias", "second", "second_bias", "out",
};

PyDoc_STRVAR(seen_doc,
"seen(candidates, last, first, context, bias, second, second_bias, out, least, lanes)\n--\n\n"
"Fill out (members, 24): log(1 + sum) of each look over the candidates (K, 39), and of its cube.\n"
"last (6) is the frame's context; first (members, 39, 32), context (members, 32, 6), bias\n"
"(members, 32), second (members, 32, 16) and second_bias (members, 16) are the weights; all\n"
"float32 and contiguous, K a multiple of 8 and at most 4096. lanes is one of LANES. ValueError\n"
"otherwise.");

static PyObject *seen(PyObject *self, PyObject *args)
{
    PyObject *objects[ARRAYS];
    double least;
    int lanes;
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOOOOOOdi:seen", &objects[0], &objects[1], &objects[2],
                          &objects[3], &objects[4], &objects[5], &objects[6], &objects[7], &least,
                          &lanes))
        return NULL;
    Py_buffer buffers[ARRAYS];
    const float *of[ARRAYS];
    int held = 0;
    PyObject *answer = NULL;
    for (; held < ARRAYS; held++) {
        const int flags = PyBUF_C_CONTIGUOUS | (held == OUT ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(objects[held], &buffers[held], flags) < 0) goto done;
        of[held] = buffers[held].buf;
    }
    const Py_ssize_t number = buffers[CANDIDATES].len / (Py_ssize_t)(WIDTH * sizeof(float));
    const Py_ssize_t members = buffers[BIAS].len / (Py_ssize_t)(HIDDEN * sizeof(float));
    const Py_ssize_t sizes[ARRAYS] = {
        number * WIDTH, CONTEXT, members * WIDTH * HIDDEN, members * HIDDEN * CONTEXT,
        members * HIDDEN, members * HIDDEN * PADDED, members * PADDED, members * 2 * LOOKS,
    };
    for (int i = 0; i < ARRAYS; i++)
        if (buffers[i].len != sizes[i] * (Py_ssize_t)sizeof(float) ||
            (uintptr_t)of[i] % sizeof(float)) {
            PyErr_Format(PyExc_ValueError, "seen(): %s has %zd bytes; expected %zd numbers",
                         NAMES[i], buffers[i].len, sizes[i]);
            goto done;
        }
    if (number % TOGETHER || number > MOST) {
        PyErr_Format(PyExc_ValueError, "seen(): %zd candidates; expected a multiple of %d up to %d",
                     number, TOGETHER, MOST);
        goto done;
    }
    int program = 0;
    while (program < PROGRAMS && (programs[program].lanes != lanes || !programs[program].seen))
        program++;
    if (program == PROGRAMS) {
        PyErr_Format(PyExc_ValueError, "seen(): no program of %d lanes here", lanes);
        goto done;
    }

    PyThreadState *state = PyEval_SaveThread();
    float weights[MOST], sums[2 * PADDED], *out = buffers[OUT].buf;
    for (Py_ssize_t k = 0; k < number; k++)
        weights[k] = weight_of(of[CANDIDATES] + k * WIDTH, (float)least);
    for (Py_ssize_t m = 0; m < members; m++, out += 2 * LOOKS) {
        Member member = {
            .first = of[FIRST] + m * WIDTH * HIDDEN,
            .second = of[SECOND] + m * HIDDEN * PADDED,
            .second_bias = of[SECOND_BIAS] + m * PADDED,
        };
        for (int h = 0; h < HIDDEN; h++) {
            const float *context = of[OF_CONTEXT] + (m * HIDDEN + h) * CONTEXT;
            member.base[h] = of[BIAS][m * HIDDEN + h];
            for (int i = 0; i < CONTEXT; i++) member.base[h] += context[i] * of[LAST][i];
        }
        programs[program].seen(&member, of[CANDIDATES], weights, number, sums);
        for (int i = 0; i < LOOKS; i++) {
            out[i] = log1pf(sums[i]);
            out[LOOKS + i] = log1pf(sums[PADDED + i]);
        }
    }
    PyEval_RestoreThread(state);
    answer = Py_NewRef(Py_None);

done:
    while (held > 0) PyBuffer_Release(&buffers[--held]);
    return answer;
}

static PyMethodDef methods[] = {
    {"seen", seen, METH_VARARGS, seen_doc},
    {NULL, NULL, 0, NULL},
};

static int executed(PyObject *module)
{
    drop_what_the_processor_lacks();
    PyObject *lanes = PyList_New(0);
    if (!lanes) return -1;
    for (int i = 0; i < PROGRAMS; i++) {
        if (!programs[i].seen) continue;
        PyObject *number = PyLong_FromLong(programs[i].lanes);
        const int failed = !number || PyList_Append(lanes, number) < 0;
        Py_XDECREF(number);
        if (failed) {
            Py_DECREF(lanes);
            return -1;
        }
    }
    PyObject *widest_first = PyList_AsTuple(lanes);
    Py_DECREF(lanes);
    if (!widest_first) return -1;
    const int failed = PyModule_AddObjectRef(module, "LANES", widest_first) < 0;
    Py_DECREF(widest_first);
    return failed ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, executed}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_looks",
    .m_doc = "What the members of a panel see in a frame's candidates, in vectors.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__looks(void)
{
    return PyModuleDef_Init(&definition);
}
