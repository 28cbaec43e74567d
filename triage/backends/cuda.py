"""The CUDA backend; the only module that imports cupy."""

from __future__ import annotations

__all__ = ["unavailable"]


def unavailable() -> str | None:
    """Why no device can be used, or None when one can."""
    try:
        import cupy
    except ImportError:
        return "cupy is not installed"
    if not cupy.is_available():
        return "cupy finds no CUDA device"
    return None
