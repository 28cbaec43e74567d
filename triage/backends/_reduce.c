/* The Python side of _reduce_frame.h: buffers and numbers checked, the interpreter released. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_reduce_frame.h"

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
    const char *wrong = describe(&f, block_bytes);
    if (wrong) return PyErr_Format(PyExc_ValueError, "workspace_bytes(): %s", wrong);
    return PyLong_FromSize_t(lay_out(&f, (size_t)block_bytes, 0, &unused, &unused));
}

PyDoc_STRVAR(
    reduce_doc,
    "reduce(payload, at, bits, is_signed, big_endian, ny, nx, block_bytes, k, high, error, "
    "negative_is_invalid, valid, valid_count, workspace, maximum, total, count, processor=None)\n--\n\n"
    "Reduce a bitshuffled LZ4 frame to cells of k x k pixels; 0, or a code of FAULTS.\n\n"
    "payload from byte `at` on: blocks of block_bytes, then the raw tail. valid: a bit for each\n"
    "pixel, the first lowest, 1 where the mask lets it through, and 64 bytes more; None: all.\n"
    "A pixel counts when it is at most `high`, not `error` and, where\n"
    "negative_is_invalid, not negative; a negative one that counts is 0.\n"
    "maximum uint32, total uint64, count uint16: ceil(ny / k) rows of cells, written whole; after\n"
    "a fault they hold nothing of use. valid_count: the same shape as count; the pixels of each\n"
    "cell that the mask lets through, of which those that are no measurement are taken off.\n"
    "processor: one of PROCESSORS, in place of the last.");

static PyObject *reduce(PyObject *self, PyObject *args) {
    struct frame f = {0};
    Py_buffer payload, work, maximum, total, count, valid_count, valid = {0};
    PyObject *valid_or_none, *result = 0;
    Py_ssize_t at;
    long long ny, nx, block_bytes, k, high, error;
    int big_endian;
    const char *processor = 0;
    uint8_t *scratch, *spare;
    if (!PyArg_ParseTuple(args, "y*nippLLLLLLpOy*w*w*w*w*|z", &payload, &at, &f.bits, &f.is_signed,
                          &big_endian, &ny, &nx, &block_bytes, &k, &high, &error,
                          &f.negative_is_invalid, &valid_or_none, &valid_count, &work, &maximum,
                          &total, &count, &processor))
        return 0;
    f.ny = ny;
    f.nx = nx;
    f.k = k;
    f.high = high;
    f.error = error;
    f.has_error = 1;
    f.big_endian = big_endian;
    const char *wrong = describe(&f, block_bytes);
    if (wrong) {
        PyErr_Format(PyExc_ValueError, "reduce(): %s", wrong);
        goto done;
    }
    const int64_t rows = (ny + k - 1) / k;
    f.stride = count.len / 2 / rows;
    if (f.stride < (nx + k - 1) / k || count.len != rows * f.stride * 2 ||
        maximum.len != rows * f.stride * 4 || total.len != rows * f.stride * 8 ||
        valid_count.len != count.len) {
        PyErr_Format(PyExc_ValueError,
                     "reduce(): cells of %zd, %zd, %zd and %zd bytes; expected 4, 8, 2 and 2 bytes "
                     "for each of %lld rows of at least %lld cells",
                     maximum.len, total.len, count.len, valid_count.len, (long long)rows, (nx + k - 1) / k);
        goto done;
    }
    reduce_frame_t kernel = 0;
    for (int i = 0; i < kinds; i++)
        if (!processor || !strcmp(processor, KINDS[i].processor)) kernel = KINDS[i].reduce_frame;
    if (!kernel) {
        PyErr_Format(PyExc_ValueError, "reduce(): no kernels for %s here", processor);
        goto done;
    }
    if (at < 0 || at > payload.len) {
        PyErr_SetString(PyExc_ValueError, "reduce(): `at` lies outside of the payload");
        goto done;
    }
    if (((uintptr_t)work.buf | (uintptr_t)total.buf | (uintptr_t)maximum.buf) % 8 ||
        ((uintptr_t)count.buf | (uintptr_t)valid_count.buf) % 2) {
        PyErr_SetString(PyExc_ValueError, "reduce(): cells and workspace begin at a word");
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
    if ((size_t)work.len < lay_out(&f, (size_t)block_bytes, 0, &scratch, &spare)) {
        PyErr_SetString(PyExc_ValueError, "reduce(): workspace is shorter than workspace_bytes()");
        goto done;
    }
    f.maximum = maximum.buf;
    f.total = total.buf;
    f.count = count.buf;
    f.valid_count = valid_count.buf;
    int fault;
    Py_BEGIN_ALLOW_THREADS;
    lay_out(&f, (size_t)block_bytes, work.buf, &scratch, &spare);
    const uint8_t *const bytes = payload.buf;
    fault = kernel(
        &f, bytes + at, bytes + payload.len, block_bytes / (f.bits / 8), scratch, spare);
    Py_END_ALLOW_THREADS;
    result = PyLong_FromLong(fault);
done:
    if (valid.obj) PyBuffer_Release(&valid);
    PyBuffer_Release(&payload);
    PyBuffer_Release(&valid_count);
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
    find_kernels();
    PyObject *m = PyModule_Create(&module), *names = PyTuple_New(kinds);
    for (int i = 0; names && i < kinds; i++) {
        PyObject *name = PyUnicode_FromString(KINDS[i].processor);
        if (!name || PyTuple_SetItem(names, i, name)) Py_CLEAR(names);
    }
    if (!m || !names || PyModule_AddObjectRef(m, "PROCESSORS", names) ||
        PyModule_AddStringConstant(m, "PROCESSOR", KINDS[kinds - 1].processor))
        Py_CLEAR(m);
    Py_XDECREF(names);
    return m;
}
