"""What a message costs whatever is in it: small frames, and messages that are not even scored.

The processes are those of ``live``. A series whose start message never came goes on unscored: its
frames pass socket, parser, line, ledger, publisher and forwarder like any other, so what they cost
is the bare message path, and the rest of a scored frame is backend and network.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from triage.bench import Options, floors, ours
from triage.bench.chain import PLAIN_SETTINGS, Chain, Series, opened_chain
from triage.bench.frames import PoolSpec, made_pool
from triage.bench.measure import alternate
from triage.bench.record import Result

__all__ = ["climbed", "run"]

RATES_HZ = tuple(250.0 * 1.5**i for i in range(9))
_STEP_S = 3.0
_CORES = 2


def run(options: Options) -> Result:
    """Parsing in this process; then, at climbing rates, chains with and without a writer."""
    spec = PoolSpec(size=(options.sizes or ("0.1M",))[0], hit_every=10, count=20)
    pool = made_pool(spec)
    samples = alternate(
        {"parse": ours.parse(pool), "cbor2.loads": floors.cbor_library(pool)},
        len(pool.frames),
        budget_s=options.seconds,
    )
    figures = {"message_parse_us": samples["parse"].median_s * 1e6}
    rows: list[dict[str, Any]] = [
        {"what": name, "rate_hz": None, "cpu_us": each.median_s * 1e6, "on_time": ""}
        for name, each in samples.items()
    ]
    for writer in (False, True):
        way = "forwarded" if writer else "published"
        for scored in (False, True):
            what = f"{'scored' if scored else 'bare'}_{way}"
            options.say(what.replace("_", ", "))
            for series in climbed(spec, writer=writer, scored=scored):
                rows.append(
                    {
                        "what": what.replace("_", ", "),
                        "rate_hz": series.rate_hz,
                        "cpu_us": series.cpu_s / series.images * 1e6,
                        "on_time": "yes" if kept_up(series, scored=scored) else "no",
                    }
                )
                if kept_up(series, scored=scored):
                    figures[f"{what}_frames_per_s"] = _CORES * series.images / series.cpu_s
    return Result(
        figures=figures,
        tables={"messages": rows},
        notes={
            "per_s": "2 / CPU seconds of the triage process per message, at the highest rate of "
            "the ladder at which no frame was late",
            "published": "decisions to a listener, nothing forwarded",
            "forwarded": "decisions to a listener, and every frame to a writer",
            "settings": ", ".join(PLAIN_SETTINGS),
        },
        input={spec.name: pool.described},
    )


def climbed(spec: PoolSpec, *, writer: bool, scored: bool = True) -> Iterator[Series]:
    """Series at rates half as high again each, up to the first at which a frame is late."""
    with opened_chain(spec, PLAIN_SETTINGS, writer=writer) as chain:
        _at(chain, RATES_HZ[0], scored=scored)
        for rate_hz in RATES_HZ:
            series = _at(chain, rate_hz, scored=scored)
            yield series
            if not kept_up(series, scored=scored):
                return


def kept_up(series: Series, *, scored: bool) -> bool:
    """Whether nothing was late; where scores are asked for, every image must have one."""
    return series.is_on_time if scored else series.is_complete


def _at(chain: Chain, rate_hz: float, *, scored: bool) -> Series:
    return chain.send(round(_STEP_S * rate_hz), rate_hz, started=scored)
