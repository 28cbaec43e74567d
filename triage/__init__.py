"""In-line triage of X-ray diffraction frames between detector and file writer.

Importing this package loads nothing heavy; the command line and each plug-in import what they
need when they need it.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
