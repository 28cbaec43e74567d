"""From labelled shards to a model with a card.

Training sees frames through the serving backend, so what the network learns on is what it will
be shown. It knows the shard format and nothing of the program that made the shards.
"""

from __future__ import annotations
