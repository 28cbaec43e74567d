"""Builds the C kernels where a compiler is; everything else stands in pyproject.toml.

Each kernel has a twin in numba that serves where it could not be built, so a failing build is a
warning and no error.
"""

from pathlib import Path

from setuptools import Extension, setup

# Strict arithmetic: the kernels' integers equal their twins' bit for bit on every processor.
FLAGS = ["-O3", "-std=gnu11", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-psabi"]

setup(
    ext_modules=[
        Extension(
            ".".join(source.with_suffix("").parts),
            [str(source)],
            depends=[str(header) for header in source.parent.glob("*.h")],
            extra_compile_args=FLAGS,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
        for source in sorted(Path("triage").glob("*/_*.c"))
    ]
)
