/* The walk of cbor.py for messages as detectors send them, without Python's steps between.
 *
 * It reads what is usual and declines everything else, also whatever is wrong: then cbor.py reads
 * the message from its first byte, so an error has one author. Byte strings come back as slices of
 * the view that was given, and are not touched.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { MOST_DEEP = 32, MOST_STRUCTURE = 1 << 20, SELF_DESCRIBED = 55799 };

struct walk {
    const uint8_t *bytes;
    Py_ssize_t size, at, strings;
    PyObject *view, *tagged;
};

static PyObject *item(struct walk *w, int depth);

static Py_ssize_t left(const struct walk *w) { return w->size - w->at; }

/* Major type and argument of the next head. Returns 0 for one to decline. */
static int head(struct walk *w, int *major, int *info, uint64_t *argument)
{
    if (left(w) < 1 || w->at - w->strings > MOST_STRUCTURE)
        return 0;
    uint8_t first = w->bytes[w->at++];
    *major = first >> 5;
    *info = first & 31;
    *argument = (uint64_t)*info;
    if (*info < 24)
        return 1;
    if (*info > 27)
        return 0;
    int size = 1 << (*info - 24);
    if (left(w) < size)
        return 0;
    uint64_t value = 0;
    for (int i = 0; i < size; i++)
        value = value << 8 | w->bytes[w->at++];
    *argument = value;
    return 1;
}

/* A NULL without an exception declines; every function here may give one. */
static PyObject *text(struct walk *w, uint64_t length)
{
    if (length > (uint64_t)left(w))
        return NULL;
    PyObject *found =
        PyUnicode_DecodeUTF8((const char *)w->bytes + w->at, (Py_ssize_t)length, "strict");
    if (found == NULL && PyErr_ExceptionMatches(PyExc_UnicodeDecodeError))
        PyErr_Clear();
    w->at += (Py_ssize_t)length;
    w->strings += (Py_ssize_t)length;
    return found;
}

static PyObject *slice(struct walk *w, uint64_t length)
{
    if (length > (uint64_t)left(w))
        return NULL;
    Py_ssize_t from = w->at;
    w->at += (Py_ssize_t)length;
    w->strings += (Py_ssize_t)length;
    return PySequence_GetSlice(w->view, from, w->at);
}

static PyObject *array(struct walk *w, uint64_t length, int depth)
{
    if (length > (uint64_t)left(w))
        return NULL;
    PyObject *list = PyList_New(0);
    for (uint64_t i = 0; list != NULL && i < length; i++) {
        PyObject *value = item(w, depth + 1);
        if (value == NULL || PyList_Append(list, value) < 0)
            Py_CLEAR(list);
        Py_XDECREF(value);
    }
    return list;
}

static PyObject *map(struct walk *w, uint64_t length, int depth)
{
    if (length > (uint64_t)left(w) / 2)
        return NULL;
    PyObject *found = PyDict_New();
    for (uint64_t i = 0; found != NULL && i < length; i++) {
        PyObject *key = NULL, *value = NULL;
        int major, info;
        uint64_t argument;
        if (head(w, &major, &info, &argument) && major == 3)
            key = text(w, argument);
        if (key != NULL)
            value = item(w, depth + 1);
        if (value == NULL || PyDict_SetItem(found, key, value) < 0)
            Py_CLEAR(found);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    return found;
}

static PyObject *constant(PyObject *value)
{
    Py_INCREF(value);
    return value;
}

static PyObject *simple(int info, uint64_t argument)
{
    switch (info) {
    case 20:
        return constant(Py_False);
    case 21:
        return constant(Py_True);
    case 22:
    case 23:
        return constant(Py_None);
    case 26: {
        uint32_t bits = (uint32_t)argument;
        float value;
        memcpy(&value, &bits, sizeof value);
        return PyFloat_FromDouble((double)value);
    }
    case 27: {
        double value;
        memcpy(&value, &argument, sizeof value);
        return PyFloat_FromDouble(value);
    }
    default:
        return NULL;
    }
}

static PyObject *item(struct walk *w, int depth)
{
    int major, info;
    uint64_t argument;
    if (depth > MOST_DEEP || !head(w, &major, &info, &argument))
        return NULL;
    switch (major) {
    case 0:
        return PyLong_FromUnsignedLongLong(argument);
    case 1:
        return argument > INT64_MAX ? NULL : PyLong_FromLongLong(-1 - (int64_t)argument);
    case 2:
        return slice(w, argument);
    case 3:
        return text(w, argument);
    case 4:
        return array(w, argument, depth);
    case 5:
        return map(w, argument, depth);
    case 7:
        return simple(info, argument);
    default:
        break;
    }
    PyObject *value = item(w, depth + 1);
    if (value == NULL || argument < 2 || argument == SELF_DESCRIBED)
        return value;
    PyObject *number = PyLong_FromUnsignedLongLong(argument), *tagged = NULL;
    if (number != NULL)
        tagged = PyObject_CallFunctionObjArgs(w->tagged, number, value, NULL);
    Py_XDECREF(number);
    Py_DECREF(value);
    return tagged;
}

PyDoc_STRVAR(walk_doc, "walk(view, tagged) -> dict or None: the map that a message is; None for "
                       "one that is not as usual. ``view`` is a memoryview of bytes.");

static PyObject *walk(PyObject *self, PyObject *args)
{
    (void)self;
    struct walk w = {0};
    Py_buffer buffer;
    if (!PyArg_ParseTuple(args, "OO", &w.view, &w.tagged) ||
        PyObject_GetBuffer(w.view, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    w.bytes = buffer.buf;
    w.size = buffer.len;
    if (w.size >= 3 && memcmp(w.bytes, "\xd9\xd9\xf7", 3) == 0)
        w.at = 3;
    PyObject *found = NULL;
    int major, info;
    uint64_t argument;
    if (head(&w, &major, &info, &argument) && major == 5)
        found = map(&w, argument, 0);
    PyBuffer_Release(&buffer);
    if (found == NULL && !PyErr_Occurred())
        return constant(Py_None);
    return found;
}

static PyMethodDef METHODS[] = {
    {"walk", walk, METH_VARARGS, walk_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_cbor",
    .m_size = 0,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__cbor(void) { return PyModuleDef_Init(&MODULE); }
