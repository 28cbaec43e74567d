"""The network, its weights and card, and the scorer that runs it.

This package turns :class:`triage.records.Views` into probabilities. It knows nothing of
sockets, files of frames or vetoes. Its invariant: a frame's scores do not depend on the other
frames of its batch.
"""

from __future__ import annotations
