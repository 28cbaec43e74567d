"""What `triage bench` measures on, how it measures, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import h5py
import hdf5plugin
import numpy as np
import pytest
import zmq
from typer.testing import CliRunner

from triage.bench import BENCHES, Options, floors, run_bench
from triage.bench.chain import Series
from triage.bench.detector import send_series
from triage.bench.frames import LEVELS, Pool, PoolSpec, made_pool, stamped
from triage.bench.goals import GOALS
from triage.bench.measure import Samples, SelfTimed, alternate, ratio
from triage.bench.peakfinder8 import PIXELS_PER_RADIUS, sampled
from triage.bench.record import Record, compared, read_record
from triage.bench.soak import trend
from triage.bench.tables import as_markdown, filled_in
from triage.bench.work import Cost, exponent, fitted
from triage.cli import app
from triage.errors import ConfigError
from triage.machine import machine, versions

SMALL = PoolSpec(size="0.1M", count=4)
README = Path(__file__).resolve().parents[2] / "README.md"
RECORDS = sorted((README.parent / "benchmarks" / "records").glob("bench_*.json"))


def read_by_hdf5(pool: Pool, i: int) -> np.ndarray[Any, Any]:
    frame = pool.frames[i]
    with h5py.File.in_memory() as file:
        dataset = file.create_dataset(
            "d", frame.shape, frame.dtype, chunks=frame.shape, **hdf5plugin.Bitshuffle(cname="lz4")
        )
        dataset.id.write_direct_chunk((0, 0), bytes(frame.payload))
        return np.asarray(dataset[()])


def a_record(**figures: float) -> Record:
    return Record(
        name="goals",
        figures=figures,
        tables={
            "goals": [
                {"figure": "a", "value": 0.51234, "must": 0.75, "met": "yes"},
                {"figure": "b|c", "value": None, "must": 2500.0, "met": "absent"},
            ]
        },
        machine=machine(),
        versions=versions(),
        command="triage bench goals",
        input={},
    )


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_frames_read_by_hdf5_are_what_they_are_said_to_be(bits: int) -> None:
    """Masked pixels have every bit set and no others; the level is the one asked for; every
    second frame has spots."""
    pool = made_pool(PoolSpec(size="0.5M", bits=bits, count=2))
    mask = pool.frames[0].series.pixel_mask
    assert mask is not None
    top = 2**bits - 1
    hit, blank = (read_by_hdf5(pool, i) for i in (0, 1))
    for image in (hit, blank):
        assert (image.dtype, image.shape) == (np.dtype(f"<u{bits // 8}"), (514, 1030))
        assert np.array_equal(image == top, mask != 0)
    centre, corner = LEVELS["typ"]
    assert corner < blank[mask == 0].mean() < centre
    assert blank[mask == 0].max() < 20 < hit[mask == 0].max()


def test_gaps_lie_where_an_eiger_has_them() -> None:
    """1M is two modules with 37 rows between; nothing else but single dead pixels is masked."""
    mask = made_pool(PoolSpec(size="1M", count=1)).frames[0].series.pixel_mask
    assert mask is not None
    assert (mask[514:551] == 1).all()
    rest = np.concatenate([mask[:514], mask[551:]])
    assert 0 < (rest != 0).mean() < 3e-4


def test_payloads_have_blocks_of_eight_kibibytes() -> None:
    """The header says the frame's bytes and 8192 per block, big-endian."""
    payload = bytes(made_pool(SMALL).frames[0].payload)
    assert int.from_bytes(payload[:8], "big") == 320 * 320 * 2
    assert int.from_bytes(payload[8:12], "big") == 8192


def test_the_same_seed_gives_the_same_bytes() -> None:
    """Made twice, a pool has the same hash; with another seed, another."""
    first = made_pool.__wrapped__(SMALL)
    again = made_pool.__wrapped__(SMALL)
    other = made_pool.__wrapped__(PoolSpec(size="0.1M", count=4, seed=1))
    assert first.sha256 == again.sha256 != other.sha256
    assert [bytes(f.payload) for f in first.frames] == [bytes(f.payload) for f in again.frames]


def test_stamped_messages_are_what_cbor_reads() -> None:
    """Series and image numbers are those asked for, and the payload is the frame's."""
    pool = made_pool(SMALL)
    start = cbor2.loads(stamped(pool.start, 7))
    image = cbor2.loads(stamped(pool.templates[1], 7, 123_456))
    assert (start["type"], start["series_id"]) == ("start", 7)
    assert (image["type"], image["series_id"], image["image_id"]) == ("image", 7, 123_456)
    tagged = image["data"]["threshold_1"].value[1].value.value
    assert list(tagged[:2]) == ["bslz4", 2]
    assert tagged[2] == bytes(pool.frames[1].payload)
    assert pool.frames[0].fault is None
    assert pool.frames[0].series.geometry is not None


def test_unknown_frames_are_refused() -> None:
    """The message names what is known."""
    with pytest.raises(ConfigError, match="expected a size of"):
        made_pool(PoolSpec(size="2M"))


def test_the_detector_sends_start_numbered_images_and_end() -> None:
    """Images count from 0 and cycle through the pool; without a start there is none."""
    pool = made_pool(SMALL)
    context: zmq.Context[Any] = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    pull.bind("inproc://sent")
    push.connect("inproc://sent")
    try:
        for started in (True, False):
            sent = send_series(push, pool, series_id=3, frames=6, rate_hz=1e6, started=started)
            assert (sent.images, len(sent.sent_ns)) == (6, 6)
            came = [cbor2.loads(pull.recv()) for _ in range(7 + started)]
            assert [m["type"] for m in came] == ["start"] * started + ["image"] * 6 + ["end"]
            images = [m for m in came if m["type"] == "image"]
            assert [m["image_id"] for m in images] == list(range(6))
            payload = [m["data"]["threshold_1"].value[1].value.value[2] for m in images]
            assert payload[4] == payload[0] != payload[1]
    finally:
        push.close()
        pull.close()
        context.term()


def ticking(costs: dict[str, float]) -> tuple[dict[str, Any], Callable[[], float]]:
    """Candidates that take so many seconds of a clock of their own."""
    now = [0.0]

    def candidate(cost: float) -> Callable[[int], None]:
        def call(i: int) -> None:
            now[0] += cost * (1 + i)

        return call

    return {name: candidate(cost) for name, cost in costs.items()}, lambda: now[0]


def test_candidates_are_timed_by_the_given_clock() -> None:
    """A frame's cost is the mean over the frames of a round; a ratio is taken by round."""
    calls, clock = ticking({"a": 1.0, "b": 4.0})
    samples = alternate(calls, 3, budget_s=0.0, clock=clock)
    assert samples["a"].per_frame_s.tolist() == [2.0] * 5
    assert samples["b"].per_frame_s.tolist() == [8.0] * 5
    found = ratio(samples["a"], samples["b"])
    assert (found.value, found.low, found.high, found.rounds) == (0.25, 0.25, 0.25, 5)
    drifting = Samples(per_frame_s=np.array([1.0, 2.0, 30.0]))
    other = Samples(per_frame_s=np.array([2.0, 5.0, 40.0]))
    assert ratio(drifting, other).value == 0.5
    both = samples["a"] + samples["b"]
    assert both.median_s == 10.0


def test_work_in_another_process_counts_as_it_says() -> None:
    """A candidate that times itself is taken at its word, whatever the clock shows."""
    samples = alternate({"peer": SelfTimed(lambda i: 0.5 + i)}, 2, budget_s=0.0)
    assert samples["peer"].median_s == 1.0


def test_short_work_is_repeated_until_it_can_be_timed() -> None:
    """A call of one microsecond is called 200 times in a sample of 200 microseconds."""
    calls, clock = ticking({"short": 1e-6})
    counted = []
    call = calls["short"]
    samples = alternate(
        {"short": lambda i: counted.append(i) or call(i)}, 1, budget_s=0.0, clock=clock
    )
    assert samples["short"].median_s == pytest.approx(1e-6)
    assert len(counted) == 3 + 5 * 200


def test_a_fit_finds_the_parts_it_was_made_of() -> None:
    """Cost made of a fixed part, pixels and bytes is taken apart again, with no residual."""
    costs = [
        Cost(
            spec=SMALL,
            pixels=pixels,
            payload_bytes=size,
            seconds=1e-4 + 2e-10 * pixels + 3e-10 * size,
        )
        for pixels, size in (
            (100_000, 4e4),
            (1_000_000, 5e5),
            (4_000_000, 1e6),
            (16_000_000, 9e6),
        )
    ]
    fit = fitted(costs)
    assert fit.fixed_s == pytest.approx(1e-4)
    assert fit.per_px_s == pytest.approx(2e-10)
    assert fit.per_byte_s == pytest.approx(3e-10)
    assert fit.worst == pytest.approx(0.0, abs=1e-9)


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    """Cost that grows as the square root of pixels has exponent one half."""
    costs = [
        Cost(spec=SMALL, pixels=n, payload_bytes=0.0, seconds=math.sqrt(n)) for n in (100, 10_000)
    ]
    assert exponent(costs) == pytest.approx(0.5)
    assert math.isnan(exponent(costs[:1]))


def test_floors_reduce_to_the_integers_of_the_slow_way() -> None:
    """Library decoding with a pass over pixels gives maximum and sum of the valid pixels of each
    cell, as numpy finds them."""
    pool = made_pool(PoolSpec(size="0.5M", count=1))
    mask = pool.frames[0].series.pixel_mask
    assert mask is not None
    image = np.where(mask == 0, read_by_hdf5(pool, 0), 0).astype(np.uint64)
    k, cells = 4, (-(-514 // 4), -(-1030 // 4))
    padded = np.zeros((cells[0] * k, cells[1] * k), np.uint64)
    padded[:514, :1030] = image
    grid = padded.reshape(cells[0], k, cells[1], k)
    largest, total = floors.hdf5_numpy_bin(pool, k)(0)
    assert np.array_equal(largest, grid.max((1, 3)))
    assert np.array_equal(total, grid.sum((1, 3)))
    fused = floors.dectris_numba_bin(pool, k)
    if fused is None:
        pytest.skip("dectris-compression is not installed: pip install 'braggtriage[bench]'")
    maximum, added, count = fused(0)
    valid = np.zeros_like(padded)
    valid[:514, :1030] = mask == 0
    assert np.array_equal(maximum, grid.max((1, 3)))
    assert np.array_equal(added, grid.sum((1, 3)))
    assert np.array_equal(count, valid.reshape(cells[0], k, cells[1], k).sum((1, 3)))


def test_the_library_chain_gives_the_pixels_of_its_message() -> None:
    """cbor2 and dectris-compression give the bytes that HDF5's filter gives."""
    pool = made_pool(SMALL)
    chain = floors.message_to_pixels(pool)
    if chain is None:
        pytest.skip("dectris-compression is not installed: pip install 'braggtriage[bench]'")
    assert chain(1) == read_by_hdf5(pool, 1).tobytes()


def test_lz4_alone_gives_all_bytes_of_the_frame() -> None:
    """What the floor of the decompressor writes is the frame's size, less the raw tail."""
    pool = made_pool(SMALL)
    call, by = floors.lz4_alone(pool)
    assert call(0) == 320 * 320 * 2
    assert by


def test_the_goals_are_those_of_the_project() -> None:
    """Names as they are quoted elsewhere, in their order, each with a bound and a harder one."""
    assert list(GOALS) == [
        "reduce_4m_u16_over_dectris",
        "reduce_16m_u16_over_dectris",
        "reduce_4m_u16_weak_over_dectris",
        "reduce_4m_u16_strong_over_dectris",
        "reduce_4m_u32_over_dectris",
        "reduce_numba_4m_over_dectris_numba_bin",
        "parse_4m_over_cbor2",
        "net_over_torch_eager",
        "decision_4m_over_dectris",
        "decision_16m_over_dectris",
        "decision_4m_over_peakfinder8",
        "two_workers_inflation",
        "replay_4m_efficiency",
        "small_frames_per_s",
    ]
    for goal in GOALS.values():
        assert goal.is_met(goal.stretch)
        assert goal.is_met(goal.must)
        assert not goal.is_met(goal.must * (0.9 if goal.at_least else 1.1))


def test_a_record_is_one_line_of_json_and_is_read_back(tmp_path: Path) -> None:
    """Figures are a flat map of numbers, to four digits; what is not a number is null."""
    record = a_record(a=1 / 3, b=math.nan)
    line = record.as_json()
    assert "\n" not in line
    document = json.loads(line)
    assert {"name", "figures", "machine", "versions", "input", "command"} <= document.keys()
    assert document["figures"] == {"a": 0.3333, "b": None}
    assert document["machine"]["cores"] >= 1
    assert {"braggtriage", "python", "numpy"} <= document["versions"].keys()
    path = tmp_path / "record.json"
    path.write_text(record.as_json(indent=1))
    assert read_record(path).figures == document["figures"]


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    """The message says what a record must have."""
    path = tmp_path / "other.json"
    for text in ("[]", "{}", "nonsense"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="expected the"):
            read_record(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_record(tmp_path / "none.json")


def test_comparison_knows_which_way_a_figure_should_go() -> None:
    """A ratio that rises, a rate that falls and a figure that is gone are worse; within the
    tolerance, better or new is not."""
    before = a_record(x_over_y=1.0, frames_per_s=100.0, same=1.0, gone=1.0, lost=0.0)
    after = a_record(x_over_y=1.2, frames_per_s=80.0, same=1.05, new=1.0, lost=1.0)
    worse = {c.figure for c in compared(before, after, 0.1) if c.worse}
    assert worse == {"x_over_y", "frames_per_s", "gone", "lost"}
    better = a_record(x_over_y=0.5, frames_per_s=200.0, same=1.0, gone=1.0, lost=0.0)
    assert not any(c.worse for c in compared(before, better, 0.1))
    assert compared(before, better, 0.1)[0].ratio == 0.5


def test_compare_fails_only_when_asked_to(tmp_path: Path) -> None:
    """Exit 1 for a worse figure with --fail, 0 without."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / f"{name}.json").write_text(a_record(figure=value).as_json())
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    run = CliRunner().invoke
    assert run(app, ["bench", "compare", *files]).exit_code == 0
    assert run(app, ["bench", "compare", *files, "--fail"]).exit_code == 1
    assert run(app, ["bench", "compare", *files, "--fail", "--tolerance", "1.5"]).exit_code == 0


def test_marked_tables_are_written_from_their_record(tmp_path: Path) -> None:
    """Only what stands between the marks changes; a second time nothing does."""
    (tmp_path / "goals.json").write_text(a_record().as_json())
    document = tmp_path / "page.md"
    document.write_text(
        "before\n<!-- bench: goals.json goals met=yes figure value -->\nold\n"
        "<!-- /bench -->\nafter\n"
    )
    run = CliRunner().invoke
    assert run(app, ["bench", "table", "--check", str(document)]).exit_code == 1
    assert run(app, ["bench", "table", str(document)]).exit_code == 0
    assert document.read_text() == (
        "before\n<!-- bench: goals.json goals met=yes figure value -->\n"
        "| figure | value |\n|---|---:|\n| a | 0.512 |\n<!-- /bench -->\nafter\n"
    )
    assert run(app, ["bench", "table", "--check", str(document)]).exit_code == 0


def test_a_table_shows_what_is_absent_and_keeps_its_columns_apart() -> None:
    """No value is an empty cell; a bar in a cell does not end it; thousands are told apart."""
    assert as_markdown(a_record(), "goals", ["figure", "value", "must"]) == (
        "| figure | value | must |\n|---|---:|---:|\n| a | 0.512 | 0.75 |\n| b\\|c |  | 2,500 |\n"
    )


@pytest.mark.parametrize(
    ("mark", "complaint"),
    [
        ("goals.json", "expected RECORD TABLE"),
        ("none.json goals", "No such file"),
        ("goals.json stages", "no table 'stages'"),
        ("goals.json goals speed", "no column 'speed'"),
    ],
)
def test_a_mark_that_names_nothing_is_an_error(tmp_path: Path, mark: str, complaint: str) -> None:
    """The message says what there is."""
    (tmp_path / "goals.json").write_text(a_record().as_json())
    with pytest.raises(ConfigError, match=complaint):
        filled_in(f"<!-- bench: {mark} -->\n<!-- /bench -->\n", tmp_path)


def test_a_mark_without_an_end_is_an_error(tmp_path: Path) -> None:
    """Nothing behind it is taken for its table."""
    (tmp_path / "goals.json").write_text(a_record().as_json())
    with pytest.raises(ConfigError, match="1 marks of tables and 0 ends"):
        filled_in("<!-- bench: goals.json goals -->\ntext\n", tmp_path)


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md", "docs/faults.md"])
def test_the_tables_of_the_documents_are_those_of_the_records(name: str) -> None:
    """``triage bench table`` would change nothing in them."""
    path = README.parent / name
    text = path.read_text()
    assert "<!-- bench:" in text
    assert filled_in(text, path.parent) == text


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_stored_records_say_what_they_were_measured_on(path: Path) -> None:
    """Each can be read, has figures, names its input by hash, and names no folder of a machine."""
    record = read_record(path)
    assert record.figures
    assert record.name in BENCHES
    assert all(len(pool["sha256"]) == 64 for pool in record.input.values())
    assert not re.search(r"(^|[\s=])/", record.command)


def test_a_series_is_on_time_only_when_every_frame_was_scored() -> None:
    """Late, lost and held-back frames each spoil it; unscored ones alone leave it complete."""

    def series(**changed: Any) -> Series:
        values = {
            "images": 10,
            "rate_hz": 1.0,
            "behind_s": 0.0,
            "scored": 10,
            "forwarded": 10,
            "dropped": 0,
            "missing": 0,
            "balanced": True,
            "lost": 0,
            "vetoed": 0,
            "latencies_ms": np.array([1.0, 3.0]),
            "cpu_s": 1.0,
            "by_reason": {"score": 10},
        }
        return Series(**{**values, **changed})

    assert series().is_on_time
    assert series().latency_ms(0.5) == 2.0
    assert not series(lost=1).is_complete
    assert not series(behind_s=1.0).is_complete
    assert not series(scored=9, by_reason={"score": 9, "late": 1}).is_complete
    unscored = series(scored=0, by_reason={"geometry_changed": 10})
    assert unscored.is_complete
    assert not unscored.is_on_time


def test_the_fast_mode_looks_at_so_many_pixels_of_each_radius() -> None:
    """All pixels of a radius that has few, a hundred of one that has many, none twice."""
    y, x = np.indices((120, 120))
    radius = np.hypot(x - 60.0, y - 60.0).astype(np.float32)
    index, radii = sampled(radius)
    there = np.bincount(np.rint(radius).astype(int).ravel())
    assert np.array_equal(np.bincount(radii), np.minimum(there, PIXELS_PER_RADIUS))
    assert np.unique(index).size == index.size
    assert np.array_equal(np.rint(radius).ravel()[index], radii)


def test_quartiles_enclose_the_median() -> None:
    """Of five rounds the quartiles are the second and the fourth."""
    samples = Samples(per_frame_s=np.array([5.0, 1.0, 4.0, 2.0, 3.0]))
    assert (samples.median_s, samples.quartiles_s, samples.rounds) == (3.0, (2.0, 4.0), 5)


def test_goals_and_stages_are_drawn_and_nothing_else(tmp_path: Path) -> None:
    """A picture for each record that has something to draw, named after it; else an error."""
    pytest.importorskip("matplotlib", reason="pip install 'braggtriage[train]'")
    goals = [
        {"figure": "x_over_y", "value": 0.5, "must": 0.75, "stretch": 0.5},
        {"figure": "frames_per_s", "value": 100.0, "must": 200.0, "stretch": 400.0},
        {"figure": "peer", "value": None, "must": 0.1, "stretch": 0.05},
    ]
    stages = [
        {"frames": "4M u16 typ", "stage": "reduce", "ms": 2.0, "floor_ms": 1.0, "over_floor": 2.0},
        {"frames": "4M u16 typ", "stage": "peer", "ms": 9.0, "floor_ms": None, "over_floor": None},
    ]
    for name, rows in (("goals", goals), ("stages", stages)):
        record = replace(a_record(), name=name, tables={name: rows})
        (tmp_path / f"{name}.json").write_text(record.as_json())
    files = [str(tmp_path / f"{name}.json") for name in ("goals", "stages")]
    answer = CliRunner().invoke(app, ["bench", "plot", *files, "--out", str(tmp_path / "out")])
    assert answer.exit_code == 0, answer.output
    for name in ("goals", "stages"):
        picture = (tmp_path / "out" / f"bench_{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text(replace(a_record(), tables={}).as_json())
    arguments = ["bench", "plot", str(tmp_path / "other.json"), "--out", str(tmp_path)]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, ConfigError)


@pytest.mark.parametrize("name", BENCHES)
def test_every_benchmark_has_its_module_and_its_command(name: str) -> None:
    """What ``BENCHES`` names can be found, and the command line offers it."""
    assert importlib.util.find_spec(BENCHES[name].module) is not None
    answer = CliRunner().invoke(app, ["bench", name, "--help"])
    assert answer.exit_code == 0
    assert "--record" in answer.output


def test_an_unknown_benchmark_is_refused() -> None:
    """The message lists those that are known."""
    with pytest.raises(ConfigError, match=", ".join(BENCHES)):
        run_bench("speed", Options(), "")


def test_a_trend_is_told_from_noise() -> None:
    """A line of 3 a minute is found, white noise round a level is flat, two samples say nothing."""
    minutes = [i / 10 for i in range(300)]
    noise = np.random.default_rng(8).normal(0.0, 5.0, 300)
    rising = trend(minutes, [1000.0 + 3.0 * m for m in minutes])
    assert rising.slope == pytest.approx(3.0)
    assert rising.half_width == pytest.approx(0.0, abs=1e-9)
    assert rising.share == pytest.approx(3.0 * 29.9 / (1000.0 + 3.0 * 14.95))
    assert not rising.is_flat
    assert trend(minutes, list(100.0 + noise)).is_flat
    assert not trend(
        minutes, [100.0 + e + 2.0 * m for e, m in zip(noise, minutes, strict=True)]
    ).is_flat
    assert math.isnan(trend([0.0, 1.0], [1.0, 2.0]).slope)
