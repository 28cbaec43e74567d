"""Inputs that are almost right, for as long as there is time, led by what they make run.

    python benchmarks/fuzz.py cbor --seconds 600 --state DIR
    python benchmarks/fuzz.py cbor --seconds 0 --state DIR --record RECORD

Needs the extra ``fuzz`` (atheris). The targets are those of tests/fuzz_targets.py. DIR keeps the
inputs that led further, what was found, and the counts; a further run goes on from there, and a run
that is cut off loses nothing but its last seconds. An input that breaks a promise is kept under
DIR/findings with what was wrong, and the run goes on; so does it after one that ends the process or
takes longer than its time. The next run looks at all of them again and puts those that break
nothing any more under DIR/settled. The last line of output is the record as one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import mmap
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "tests")]

MOST_BYTES = 1 << 18
"""Of an input."""
HANG_S = 2.0
"""Processor time after which an input counts as hanging; it takes some milliseconds."""
MEMORY_BYTES = 64 << 20
"""By which an input of some kB may let the process grow."""
ADDRESS_BYTES = 1 << 30
"""By which all inputs together may."""

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where files cost no disk."""

_HEAD = struct.Struct("<QQQQQ")  # executions, findings, hangs, memory, bytes of the present input


class _Hang(BaseException):
    """Raised into an input that takes too long."""


# -- the process that runs inputs ----------------------------------------------------------------


class _Board:
    """Counts and the present input, in a file that outlives the process."""

    def __init__(self, file: Path) -> None:
        size = _HEAD.size + MOST_BYTES
        with file.open("a+b") as opened:
            opened.truncate(size)
            self._memory = mmap.mmap(opened.fileno(), size)

    def counts(self) -> list[int]:
        return list(_HEAD.unpack_from(self._memory))

    def put(self, counts: list[int]) -> None:
        _HEAD.pack_into(self._memory, 0, *counts)

    def present(self) -> bytes:
        length = self.counts()[4]
        return self._memory[_HEAD.size : _HEAD.size + length]

    def show(self, data: bytes, counts: list[int]) -> None:
        self._memory[_HEAD.size : _HEAD.size + len(data)] = data
        counts[4] = len(data)
        self.put(counts)


def _keep(folder: Path, kind: str, data: bytes, why: str) -> bool:
    """Keep an input with what it did, at most a few of a kind; True when it was kept."""
    # Numbers differ from case to case of one fault.
    name = hashlib.sha256(re.sub(r"\d+", "#", why).encode()).hexdigest()[:10]
    folder.mkdir(exist_ok=True)
    same = len(list(folder.glob(f"{kind}-{name}-*.bin")))
    if same >= 5:
        return False
    at = folder / f"{kind}-{name}-{hashlib.sha256(data).hexdigest()[:8]}.bin"
    if at.exists():
        return False
    at.write_bytes(data)
    at.with_suffix(".txt").write_text(why)
    return True


def work(name: str, state: Path, seconds: int) -> None:
    """Run inputs of a target until the time is over; never returns."""
    import atheris
    from fuzz_targets import TARGETS

    wanted = TARGETS[name].modules
    # Whole packages are instrumented, and what numba compiles must not be.
    spared = [
        module
        for file in (HOME / "triage").rglob("*.py")
        if not (module := ".".join(file.relative_to(HOME).with_suffix("").parts)).startswith(wanted)
    ]
    packages = [module.partition(".")[0] for module in wanted]
    with atheris.instrument_imports(
        include=packages, exclude=[s.removesuffix(".__init__") for s in spared]
    ):
        target = TARGETS[name]()
    corpus, findings = state / "corpus", state / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        target.check(seed)
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    board = _Board(state / "board")
    counts = board.counts()

    def too_long(number: int, frame: FrameType | None) -> None:
        raise _Hang

    # A warning for each odd message would fill a log.
    warnings.simplefilter("error")
    signal.signal(signal.SIGPROF, too_long)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def one(data: bytes) -> None:
        if len(data) > MOST_BYTES:
            return
        counts[0] += 1
        board.show(data, counts)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_PROF, HANG_S)
        try:
            target.check(data)
        except _Hang:
            counts[2] += 1
            _keep(findings, "hang", data, traceback.format_exc())
        except Exception:  # noqa: BLE001 - whatever gets out of a check is a finding
            signal.setitimer(signal.ITIMER_PROF, 0)
            counts[1] += 1
            _keep(findings, "crash", data, traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
        if grown > MEMORY_BYTES:
            counts[3] += 1
            _keep(findings, "memory", data, f"grew by {grown} bytes")

    def changed(data: bytes, most_bytes: int, seed: int) -> bytes:
        rng = random.Random(seed)
        for _ in range(rng.choice([1, 1, 2, 4])):
            data = target.changed(data, rng)
        return data[:most_bytes]

    arguments = [
        *("fuzz", str(corpus), f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}"),
        *("-timeout=1000", "-rss_limit_mb=0", "-len_control=0", "-reload=0"),
        f"-artifact_prefix={state}/",
    ]
    atheris.Setup(arguments, one, custom_mutator=changed)
    atheris.Fuzz()


# -- the process that watches it -----------------------------------------------------------------


def _processor_s(process: subprocess.Popen[bytes]) -> float:
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _watched(process: subprocess.Popen[bytes], board: _Board) -> str:
    """Wait for a worker; why it ended before its time, or ""."""
    seen, used = -1, 0.0
    while True:
        try:
            code = process.wait(1.0)
            return "" if code == 0 else f"the process ended with {code}"
        except subprocess.TimeoutExpired:
            executions, now = board.counts()[0], _processor_s(process)
            if executions != seen:
                seen, used = executions, now
            elif seen > 0 and now - used > 15 * HANG_S:
                process.kill()
                process.wait()
                return "no answer, and none to a signal"


def _led_further(log: Path) -> dict[str, int]:
    """Edges, features and inputs kept, as libFuzzer last told them."""
    found = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log.read_text(errors="replace"))
    if not found:
        return {}
    edges, features, inputs = (int(number) for number in found[-1])
    return {"edges": edges, "features": features, "corpus": inputs}


def run(name: str, state: Path, seconds: float) -> None:
    """Run a target for so long, and add to the counts of its state."""
    state.mkdir(parents=True, exist_ok=True)
    _look_again(name, state)
    (state / "board").unlink(missing_ok=True)
    board = _Board(state / "board")
    began, used, log = time.monotonic(), _used_s(), state / "log.txt"
    while (left := seconds - (time.monotonic() - began)) >= 1:
        with log.open("wb") as written, tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            process = subprocess.Popen(
                [sys.executable, __file__, name, "--state", str(state), "--work", str(int(left))],
                stdout=written,
                stderr=subprocess.STDOUT,
                # What a worker writes goes with it, however it ends.
                env=os.environ | {"TMPDIR": folder},
            )
            try:
                why = _watched(process, board)
            except BaseException:
                process.kill()
                raise
        counts = board.counts()
        if re.search(r"^Done \d+ runs", log.read_text(errors="replace"), re.MULTILINE):
            # The library ends by exit(), which h5py's threads and files do not always outlive.
            why = ""
        if why and counts[0] == 0:
            raise SystemExit(f"{name}: {why} before its first input; see {log}")
        if why:
            kind = "hang" if "answer" in why else "crash"
            counts[2 if kind == "hang" else 1] += 1
            tail = log.read_text(errors="replace")[-3000:]
            _keep(state / "findings", kind, board.present(), f"{why}\n{tail}")
        _add(state, counts, time.monotonic() - began, _used_s() - used, _led_further(log))
        board.put([0, 0, 0, 0, 0])
        seconds -= time.monotonic() - began
        began, used = time.monotonic(), _used_s()


def _used_s() -> float:
    """Processor time of the workers that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _look_again(name: str, state: Path) -> None:
    """Put aside what was found before and breaks nothing any more."""
    for found in sorted((state / "findings").glob("*.bin")):
        command = [sys.executable, __file__, name, "--state", str(state), "--check", str(found)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60)
        except subprocess.TimeoutExpired:
            continue
        if done.returncode == 0:
            (state / "settled").mkdir(exist_ok=True)
            for part in (found, found.with_suffix(".txt")):
                part.replace(state / "settled" / part.name)


def check(name: str, file: Path) -> None:
    """Run one input; an exception if it breaks a promise, or takes too long."""
    from fuzz_targets import TARGETS

    warnings.simplefilter("error")
    target = TARGETS[name]()
    target.check(target.seeds[0])
    began = time.process_time()
    with contextlib.closing(target):
        target.check(file.read_bytes())
    if time.process_time() - began > HANG_S:
        raise SystemExit(f"{file} takes {time.process_time() - began:.1f} s")


def _totals(state: Path) -> dict[str, Any]:
    try:
        totals: dict[str, Any] = json.loads((state / "totals.json").read_text())
    except OSError:
        return {"seconds": 0.0, "executions": 0, "runs": 0}
    return totals


def _add(
    state: Path, counts: list[int], seconds: float, processor_s: float, led: dict[str, int]
) -> None:
    totals = _totals(state)
    totals["seconds"] = round(totals["seconds"] + seconds, 1)
    # Where several targets run beside each other, the less of the two times tells more.
    totals["processor_s"] = round(totals.get("processor_s", 0.0) + processor_s, 1)
    totals["executions"] += counts[0]
    totals["runs"] += 1
    totals |= led
    part = state / "totals.part"
    part.write_text(json.dumps(totals, indent=1) + "\n")
    part.replace(state / "totals.json")


# -- the record ----------------------------------------------------------------------------------


def _lines_of(code: CodeType) -> set[int]:
    lines = {line for _, _, line in code.co_lines() if line is not None}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            lines |= _lines_of(inner)
    return lines


def lines_run(name: str, state: Path) -> dict[str, list[int]]:
    """By module: lines that the kept inputs run, and lines that there are."""
    from fuzz_targets import TARGETS

    target = TARGETS[name]()
    loaded = [
        module
        for key, module in sys.modules.items()
        if key.startswith(TARGETS[name].modules) and getattr(module, "__file__", "")
    ]
    files = {str(module.__file__): module.__name__ for module in loaded if module.__file__}
    seen: dict[str, set[int]] = {file: set() for file in files if file.endswith(".py")}

    def local(frame: FrameType, event: str, argument: object) -> Any:
        seen[frame.f_code.co_filename].add(frame.f_lineno)
        return local

    def entered(frame: FrameType, event: str, argument: object) -> Any:
        return local if frame.f_code.co_filename in seen else None

    inputs = sorted((state / "corpus").iterdir())
    random.Random(0).shuffle(inputs)
    sys.settrace(entered)
    try:
        for path in inputs[:3000]:
            target.check(path.read_bytes())
    finally:
        sys.settrace(None)
    found = {}
    for file, lines in sorted(seen.items()):
        whole = _lines_of(compile(Path(file).read_text(), file, "exec"))
        # What stands outside of functions ran when the module was imported.
        outside = {line for _, _, line in compile(Path(file).read_text(), file, "exec").co_lines()}
        inside = whole - {line for line in outside if line is not None}
        found[files[file]] = [len(lines & inside), len(inside)]
    return found


def record(name: str, state: Path) -> dict[str, Any]:
    """What is known of a target so far."""
    machine = importlib.import_module("triage.machine")
    totals = _totals(state)
    found = [file.stem for file in sorted((state / "findings").glob("*.bin"))]
    for kind, word in (("crash", "crashes"), ("hang", "hangs"), ("memory", "memory_exceeded")):
        totals[word] = sum(name.startswith(kind) for name in found)
    # Faults of the product, or of an oracle, that were found and are no more. The name of an input
    # has three parts, the first two of which are the same for one fault.
    settled = (state / "settled").glob("*.bin")
    totals["settled"] = len({file.stem.rpartition("-")[0] for file in settled})
    return {
        "name": f"fuzz_{name}",
        "command": f"python benchmarks/fuzz.py {name} --seconds N --state DIR",
        "figures": totals,
        "lines_run_of": lines_run(name, state),
        "limits": {
            "hang_s": HANG_S,
            "memory_bytes": MEMORY_BYTES,
            "input_bytes": MOST_BYTES,
        },
        "findings": found,
        "machine": machine.machine(),
        "versions": machine.versions() | {"atheris": metadata.version("atheris")},
    }


def main() -> None:
    """Run, add up, print, record."""
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--check", type=Path, help="run this input alone, and nothing else")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.target, arguments.check)
        return
    if arguments.work:
        work(arguments.target, arguments.state, arguments.work)
    if arguments.seconds > 0:
        run(arguments.target, arguments.state, arguments.seconds)
    if arguments.record:
        document = record(arguments.target, arguments.state)
        arguments.record.write_text(json.dumps(document, indent=1) + "\n")
        print(json.dumps(document))
    else:
        print(json.dumps(_totals(arguments.state)))


if __name__ == "__main__":
    main()
