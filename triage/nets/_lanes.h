/* Which widths of vector a processor runs, and how a module tells of them. */

/* Whether this processor has the instructions of programs for vectors of 16, 8 or 4 floats. */
static int processor_runs(int lanes)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    /* The first processors with AVX-512 slow down by it; those with VBMI2 no longer do. */
    if (lanes == 16)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vbmi2");
    if (lanes == 8) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return lanes == 4;
}

/* Set the module's LANES; -1 and an exception when that fails. */
static int publish_lanes(PyObject *module, const int *lanes, int count)
{
    PyObject *widest_first = PyTuple_New(count);
    for (int i = 0; widest_first && i < count; i++) {
        PyObject *number = PyLong_FromLong(lanes[i]);
        if (!number || PyTuple_SetItem(widest_first, i, number) < 0) Py_CLEAR(widest_first);
    }
    if (!widest_first) return -1;
    const int failed = PyModule_AddObjectRef(module, "LANES", widest_first) < 0;
    Py_DECREF(widest_first);
    return failed ? -1 : 0;
}
