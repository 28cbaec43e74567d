"""What a detector sends: DECTRIS Stream V2 and V1, strict where real clients are picky."""

from __future__ import annotations
