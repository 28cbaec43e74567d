"""Sinks: what happens to a frame and its decision after the verdict.

``forwarder`` sends messages on, ``publisher`` tells listeners, ``table`` and ``journal`` write
them down, ``nxmx`` keeps frames in files. A sink never changes a verdict. The pipeline calls
sinks from one thread, in the order in which frames were received.
"""

from __future__ import annotations
