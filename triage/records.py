"""The records that travel between stages: numpy and the standard library only, but for msgspec.

Conventions that hold everywhere: arrays are (y, x), slow axis first; pixel coordinates count
from the outer corner of pixel (0, 0), so its centre lies at (0.5, 0.5); names ending in
``_px``, ``_m``, ``_deg``, ``_ns`` carry that unit; time is ``time.monotonic_ns`` unless it
says otherwise. Records are frozen: a stage that changes something makes a new one. Those that every
message needs are made by msgspec, in a tenth of the time that a frozen dataclass takes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from triage.errors import TriageError

ROTATION_INCREMENT_DEG = 1e-6
"""A goniometer increment above this makes a series a rotation sweep, which is never thinned."""

LARGEST_FRAME_BYTES = 1 << 29
"""Decoded; four bytes for each of the 10,240 x 10,240 pixels that the recipe takes are 420 MB."""

LARGEST_MESSAGE_BYTES = 1 << 31
"""Of a ZeroMQ part; a train of European XFEL has half of it. Whoever announces more is refused."""

LARGEST_RATIO: Mapping[str, int] = MappingProxyType({"lz4": 255, "bslz4": 255, "bszstd": 4681})
"""By encoding, most decoded bytes for each that came; more would be a header that asks for memory.

No byte of LZ4 stands for more than 255. zstd has no such bound, but detectors compress blocks: of
one of 64 KiB, which is four times the largest seen, at least 14 bytes are left.
"""


class Verdict(StrEnum):
    """The policy's answer, before mode, audit and gate."""

    KEEP = "keep"
    VETO = "veto"


class Reason(StrEnum):
    """Why a frame got its verdict. Only ``score`` can come with a veto."""

    SCORE = "score"
    ROTATION = "rotation"
    LATE = "late"
    OVERLOAD = "overload"
    SCORER_ERROR = "scorer_error"
    MALFORMED = "malformed"
    UNKNOWN_ENCODING = "unknown_encoding"
    GEOMETRY_CHANGED = "geometry_changed"
    DEVICE_LOST = "device_lost"


class Override(StrEnum):
    """Why a frame with verdict veto was forwarded all the same."""

    NONE = ""
    SHADOW = "shadow"
    AUDIT = "audit"
    GATE_OPEN = "gate_open"


class MessageKind(StrEnum):
    """What a received message is to the ledger."""

    START = "start"
    IMAGE = "image"
    END = "end"
    CONTROL = "control"
    MALFORMED = "malformed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where the detector stands, each value rounded to float32.

    The rounding happens once, here, so that the same experiment read from a stream (float64),
    a file (float32) or a table gives the same radial bins.

    Attributes:
        beam_center_x_px, beam_center_y_px: direct beam, pixels from the outer corner.
        pixel_size_x_m, pixel_size_y_m: pixel pitch, metre, > 0.
        detector_distance_m: sample to detector along the beam, metre, > 0.
        incident_wavelength_angstrom: > 0.
    """

    beam_center_x_px: float
    beam_center_y_px: float
    pixel_size_x_m: float
    pixel_size_y_m: float
    detector_distance_m: float
    incident_wavelength_angstrom: float

    @classmethod
    def from_values(
        cls,
        *,
        beam_center_x_px: float | None,
        beam_center_y_px: float | None,
        pixel_size_x_m: float | None,
        pixel_size_y_m: float | None,
        detector_distance_m: float | None,
        incident_wavelength_angstrom: float | None,
    ) -> Geometry | None:
        """The geometry, or None when any value is missing, not finite or not physical.

        Files and streams often hold zeros where nobody set a value; a distance, pixel or
        wavelength of zero is therefore read as missing. The sign of the distance is dropped:
        recordings carry both. A beam centre of exactly (0, 0) is read as missing too.
        """
        values = (
            beam_center_x_px,
            beam_center_y_px,
            pixel_size_x_m,
            pixel_size_y_m,
            detector_distance_m,
            incident_wavelength_angstrom,
        )
        numbers: list[float] = []
        for value in values:
            if value is None or isinstance(value, bool):
                return None
            try:
                with np.errstate(over="ignore"):
                    number = float(np.float32(value))
            except (TypeError, ValueError, OverflowError):
                return None
            if not math.isfinite(number):
                return None
            numbers.append(number)
        numbers[4] = abs(numbers[4])
        if min(numbers[2:]) <= 0 or (numbers[0] == 0 and numbers[1] == 0):
            return None
        return cls(
            beam_center_x_px=numbers[0],
            beam_center_y_px=numbers[1],
            pixel_size_x_m=numbers[2],
            pixel_size_y_m=numbers[3],
            detector_distance_m=numbers[4],
            incident_wavelength_angstrom=numbers[5],
        )

    def inverse_d(self, x_px: NDArray[Any], y_px: NDArray[Any]) -> NDArray[np.float64]:
        """1/d in 1/angstrom at places in pixels from the outer corner, broadcast together.

        2 sin(theta) / lambda with tan(2 theta) = r / D.
        """
        x_m = (x_px - self.beam_center_x_px) * self.pixel_size_x_m
        y_m = (y_px - self.beam_center_y_px) * self.pixel_size_y_m
        two_theta = np.arctan2(np.hypot(x_m, y_m), self.detector_distance_m)
        inverse: NDArray[np.float64] = (
            2.0 * np.sin(0.5 * two_theta) / self.incident_wavelength_angstrom
        )
        return inverse


WARM_UP_GEOMETRY = Geometry(
    beam_center_x_px=32.0,
    beam_center_y_px=32.0,
    pixel_size_x_m=1e-4,
    pixel_size_y_m=1e-4,
    detector_distance_m=0.1,
    incident_wavelength_angstrom=1.0,
)
"""Of the frame of 64 x 64 pixels that kernels are compiled with."""


@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True, eq=False)
class Series:
    """One arm of the detector, or one recorded run: what its frames have in common.

    Attributes:
        series_id, series_unique_id: identity; -1 and "" when never told.
        started: False for a series known only from its images (joined late, start lost).
        image_size_x_px, image_size_y_px: declared size, 0 when not told.
        channels: names in the order of the stream.
        number_of_images: an upper bound, -1 when not told.
        saturation_value: largest valid count, None when not told.
        error_value: the count that marks a bad pixel in signed data, None when not told.
        pixel_mask: (y, x) uint32, NXmx bits, non-zero in the low 16 bits = leave out.
        geometry: None when incomplete.
        calibration: of frames whose pixels are no counts; None where none is needed or known.
        increments_deg: rotation per frame of each goniometer axis.
        starts_deg: angle of each goniometer axis at image 0; an axis that is not told is not there.
        rotation_told: False where a header says nothing of the experiment, so that a sweep cannot
            be told from stills.
    """

    series_id: int = -1
    series_unique_id: str = ""
    started: bool = True
    image_size_x_px: int = 0
    image_size_y_px: int = 0
    channels: tuple[str, ...] = ()
    number_of_images: int = -1
    saturation_value: int | None = None
    error_value: int | None = None
    pixel_mask: NDArray[np.uint32] | None = None
    geometry: Geometry | None = None
    calibration: Calibration | None = None
    increments_deg: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    starts_deg: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    rotation_told: bool = True
    count_time_s: float = math.nan
    frame_time_s: float = math.nan
    detector_description: str = ""
    detector_serial_number: str = ""
    sensor_material: str = ""
    sensor_thickness_m: float = math.nan

    @property
    def key(self) -> tuple[int, str]:
        """Identity within a run; ``series_unique_id`` alone may repeat on emulators."""
        return (self.series_id, self.series_unique_id)

    @property
    def is_rotation(self) -> bool:
        """True when any axis turns from frame to frame, or nobody said whether one does."""
        return not self.rotation_told or any(
            math.isfinite(v) and abs(v) > ROTATION_INCREMENT_DEG
            for v in self.increments_deg.values()
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """The part of a frame that one port of the detector sent, as it came.

    Attributes:
        payload: the bytes, not copied.
        top, left: its first pixel in the frame.
        shape: (y, x) of the piece.
        bits: of a pixel on the wire, 4, 8, 12, 16 or 32; 4 and 12 are packed.
        flipped: its rows run upwards.
        is_adc: its 16-bit words are JUNGFRAU's, two gain bits above 14 of the converter.
    """

    payload: Any
    top: int
    left: int
    shape: tuple[int, int]
    bits: int = 16
    flipped: bool = False
    is_adc: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """What turns the words of a charge-integrating detector into photons, by gain stage.

    Attributes:
        pedestal: (3, y, x) float32, converter units of a dark pixel.
        photons_per_adu: (3, y, x) float32, negative where the signal falls; not finite where a
            pixel was not calibrated. It is then left out in that stage.
    """

    pedestal: NDArray[np.float32]
    photons_per_adu: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Channel:
    """Pixels of a further channel of a frame, as :class:`Frame` has those of the scored one.

    Attributes:
        encoding: "" where the channel cannot be read.
    """

    name: str
    encoding: str = ""
    framed: bool = True
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype("<u2"))
    shape: tuple[int, int] = (0, 0)
    payload: Any = b""


class Frame(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One detector image with its pixels still compressed.

    Attributes:
        image_id: number within the series, -1 when it could not be read.
        channel: the channel that is scored.
        encoding: ``bslz4``, ``lz4``, ``bszstd`` or ``raw``; anything else is kept unscored.
        framed: the payload begins with the 12-byte HDF5 header (u64 BE bytes, u32 BE block
            bytes). Without it ``bslz4`` blocks are 8192 bytes and ``lz4`` is one bare block.
        dtype: native pixel type as on the wire, byte order included.
        shape: (y, x).
        payload: the compressed bytes of ``channel``, not copied.
        others: the channels that are not scored, in the order of the message.
        pieces: what the frame is made of where it came in several messages; ``payload`` is then
            empty, and ``dtype`` is that of the frame that the backend puts together.
        received_ns: monotonic, at receipt (recorded: at read).
        ordinal: arrival number, counted from 0 over the whole run.
        duplicate: the same series and image_id came before.
        fault: set when the frame must go on unscored; ``fault_detail`` says why.
        file, frame: recorded input as named and 0-based frame in it; live: "" and -1.
        size_bytes: bytes this frame's message holds in memory.
    """

    series: Series
    image_id: int
    channel: str = ""
    encoding: str = "raw"
    framed: bool = True
    dtype: np.dtype[Any] = np.dtype("<u2")
    shape: tuple[int, int] = (0, 0)
    payload: Any = b""
    others: tuple[Channel, ...] = ()
    pieces: tuple[Piece, ...] = ()
    received_ns: int = 0
    ordinal: int = 0
    duplicate: bool = False
    fault: Reason | None = None
    fault_detail: str = ""
    file: str = ""
    frame: int = -1
    size_bytes: int = 0


class Message(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One message as received: its meaning, and the parts that are forwarded untouched.

    Attributes:
        kind: what it is to the ledger.
        parts: the ZeroMQ parts (buffers), in order; empty for recorded input.
        followed_by: further ZeroMQ messages, each a tuple of parts, that hold the same frame and
            go where it goes: one for each further port of a detector that sends by port.
        received_ns: monotonic.
        series: set for ``start`` and ``end`` where known.
        frame: set exactly for ``image``.
        detail: why a ``malformed`` message is malformed, or the type of a ``control`` one.
        lane: index of the socket it came on, where a source reads several.
    """

    kind: MessageKind
    parts: tuple[Any, ...] = ()
    followed_by: tuple[tuple[Any, ...], ...] = ()
    received_ns: int = 0
    series: Series | None = None
    frame: Frame | None = None
    detail: str = ""
    size_bytes: int = 0
    lane: int = 0


HIT_SPOTS = 10
"""Visible spots of the sample's crystal from which a frame is a hit."""

LEAST_VALID = 0.1
"""Share of valid pixels from which anything can be said of a frame."""

ICE_D_ANGSTROM = (3.90, 3.67, 3.44, 2.67, 2.25, 2.07, 1.95, 1.92, 1.88)
"""Powder lines of hexagonal ice, those of cubic ice among them."""

EXPECTED_MAXIMUM = {
    2: np.float32(1.03),
    4: np.float32(1.77),
    8: np.float32(2.37),
    16: np.float32(2.83),
    32: np.float32(3.24),
}
"""Expected largest of k * k standard normals, by bin factor k; part of recipe 1.

Source: the mean of the largest order statistic, n * integral of x phi(x) Phi(x)^(n-1), n = k * k
(David and Nagaraja, Order Statistics, 3rd ed., 2003), to 0.01; only k = 8 lies off it, 0.026 above
the exact 2.344. A model holds for the values it was trained with, so they change with the recipe.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a frame becomes network input. Versioned; its fingerprint binds model to input.

    Overview: the frame in cells of k x k pixels, cell (0, 0) at pixel (0, 0), padded to
    ``grid`` x ``grid`` cells; k is the smallest of ``bin_factors`` that fits. Cells start at
    the frame's corner, not at the beam centre: cells then align with the bytes of a bitshuffled
    row, so a fused kernel can reduce bit planes, and the valid count of a cell depends on the
    mask alone; where the beam is enters through the radial view.
    Radial: ``sectors`` x ``radial_bins`` in 1/d^2 from 0 to ``s_max_inverse_angstrom2``.
    Tiles: ``tiles`` native crops of ``tile_px`` squared; none where no network looks at them.
    """

    version: int = 8
    grid: int = 320
    bin_factors: tuple[int, ...] = (2, 4, 8, 16, 32)
    radial_bins: int = 160
    sectors: int = 8
    s_max_inverse_angstrom2: float = 0.4
    tiles: int = 8
    tile_px: int = 64

    @property
    def fingerprint(self) -> str:
        """16 hex digits over every field."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def bin_factor(self, shape: tuple[int, int]) -> int:
        """Pixels per cell side for a frame of ``shape`` (y, x).

        Raises:
            ValueError: the frame has no pixels or does not fit the grid at the largest factor.
        """
        if min(shape) < 1:
            raise ValueError(f"frame shape {shape}: expected at least 1 x 1 pixels")
        for k in self.bin_factors:
            if max(shape) <= k * self.grid:
                return k
        raise ValueError(
            f"frame shape {shape}: expected at most "
            f"{self.grid * self.bin_factors[-1]} pixels a side"
        )


MOST_SPOTS = 512
"""Spots of a frame that are listed; a frame with more has its surest in the list."""


class Spot(IntEnum):
    """Columns of a list of spots, (MOST_SPOTS, len(Spot)) float32, the surest spot first.

    A spot is a set of connected pixels above a cut, or of bins where it is too wide and too weak
    for single pixels to show it. Rows behind the last spot are zero.
    """

    Y_PX = 0
    """Of the Gaussian that fits it, from the outer corner of pixel (0, 0)."""
    X_PX = 1
    INTENSITY = 2
    """Net counts in its pixels."""
    BACKGROUND = 3
    """Counts beneath it, per pixel."""
    NOISE = 4
    """Sigma of a background pixel, counts: as measured, and at least Poisson's of a bin of
    WIDTH_PX with no more than three counts."""
    SNR = 5
    """INTENSITY / sqrt(INTENSITY + PIXELS * NOISE^2)."""
    PIXELS = 6
    YY = 7
    """Variances of that Gaussian, px^2; where none fits, place and variances by its pixels."""
    YX = 8
    XX = 9
    PEAK = 10
    """Net counts of its brightest pixel, or bin."""
    CUT = 11
    """What a pixel has at least, as a share of PEAK."""
    PEAKS = 12
    """Local maxima in it that are clearly apart; more than one: split or smeared."""
    LONE = 13
    """1: nothing beside its brightest pixel, as of a hot pixel or a zinger."""
    SATURATED = 14
    """1: it touches a pixel beyond the saturation value."""
    AT_GAP = 15
    """1: it touches a masked pixel or the edge of the frame, and what is there is not in it."""
    VALID = 16
    """1: a spot."""
    MATCHED = 17
    """Sigma by which a filter of its width exceeds the background around, by which the list is
    ordered."""
    WIDTH_PX = 18
    """Of the bins of that filter: 1, 2, 4 or 8 pixels."""
    FITTED = 19
    """Signal to noise I / sqrt(I + B n) of the Gaussian that fits it, n the 4 pi sigma sigma pixels
    under that, at least four: what a reflection's visibility is told by."""
    FITTED_PX2 = 20
    """Product of the sigmas of that Gaussian along its axes, px^2; 0 where none fits."""
    BRIGHTEST = 21
    """Counts of its brightest measured pixel as a share of the saturation value, or of the largest
    value that counts where none is declared; 1 where SATURATED."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CloseUps:
    """What is seen of some frames of a batch at native resolution; the full exit's input.

    Attributes:
        tiles: (N, tiles, 2, tile_px, tile_px) float32: native crops at the strongest separate
            cells, ties by position. Channel 0 is the square root of the count, channel 1 is 1
            where the pixel is valid.
        spots: (N, MOST_SPOTS, len(Spot)) float32; zeros for a frame with an error.
        geometry: of each frame, None where it is not known.
        shape: (y, x) of each frame, pixels.
    """

    tiles: NDArray[np.float32]
    spots: NDArray[np.float32]
    geometry: tuple[Geometry | None, ...]
    shape: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnDevice:
    """Views where a device made them, for a network that runs on the same device.

    Attributes:
        stream: the CUDA stream they are filled on, by its handle. What is queued there sees them
            filled; nothing needs to wait.
        overview, radial: as in Views, arrays that speak DLPack. Rows of frames with an error may
            hold anything.
        bin_factor: (N,) float32, as in Views but never 0.
    """

    stream: int
    overview: Any
    radial: Any
    bin_factor: Any


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Views:
    """The network's input for N frames of one batch; row i belongs to frame i.

    Attributes:
        maximum, total: (N, grid, grid) uint32 and uint64; largest and summed valid count of a
            cell, 0 where the cell has no valid pixel.
        count: (N, grid, grid) uint16; valid pixels of a cell.
        bin_factor: (N,) int32.
        overview: (N, 3, grid, grid) float32, from the three integers above.
        radial: (N, 5, sectors, radial_bins) float32: counts per pixel, valid share, excluded
            share, the pixels that count, of which the error of the mean follows, and counts per
            pixel where cells that stand out of their ring are clipped.
        has_geometry: (N,) bool; False = the radial view is zero and ice is not scored.
        errors: one per frame; a frame with an error has zeros in every array.
        valid_px: (N,) int64, the sum of ``count`` where the backend knows it already; else None.
        on_device: the floats where a device made them; None: nowhere but here.
    """

    maximum: NDArray[np.uint32]
    total: NDArray[np.uint64]
    count: NDArray[np.uint16]
    bin_factor: NDArray[np.int32]
    overview: NDArray[np.float32]
    radial: NDArray[np.float32]
    has_geometry: NDArray[np.bool_]
    errors: tuple[TriageError | None, ...]
    valid_px: NDArray[np.int64] | None = None
    on_device: OnDevice | None = None


SCORE_NAMES = (
    "p_blank",
    "p_ice",
    "p_bad_ice",
    "p_multilattice",
    "quality",
    "n_lattices",
    "mosaicity_deg",
    "d_vis_angstrom",
    "uncertainty",
)
"""The float columns of a frame's scores, in table order. NaN = not scored."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """What the network says of one frame; NaN where a head was not run or not applicable.

    Attributes:
        ood: unlike anything trained on; such a frame is kept.
        provisional: ``p_blank`` is the fast exit's, which is not sure enough for its word to stand:
            the full exit has yet to speak. Such a score vetoes nothing.
    """

    p_blank: float = math.nan
    p_ice: float = math.nan
    p_bad_ice: float = math.nan
    p_multilattice: float = math.nan
    quality: float = math.nan
    n_lattices: float = math.nan
    mosaicity_deg: float = math.nan
    d_vis_angstrom: float = math.nan
    uncertainty: float = math.nan
    ood: bool = False
    provisional: bool = False


NOT_SCORED = Scores()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """One per received frame: verdict, reason, what was done, and the scores behind it.

    Attributes:
        verdict, reason: the policy's, the same in shadow and enforce.
        forwarded, override: what was done with it, and why a veto went on.
        latency_us: receipt (recorded: read) to decision.
        decided_ns: monotonic.
        detail: what went wrong, for an unscored frame.
    """

    series_id: int
    series_unique_id: str
    image_id: int
    file: str
    frame: int
    ordinal: int
    verdict: Verdict
    reason: Reason
    forwarded: bool
    override: Override
    scores: Scores
    model_id: str
    policy_id: str
    latency_us: float
    decided_ns: int = 0
    duplicate: bool = False
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesReport:
    """The ledger of one series. ``balanced`` is the promise: nothing received is unaccounted.

    Attributes:
        received: image messages, duplicates included.
        forwarded, dropped, undecided: where they are; undecided is 0 after a clean end.
        missing: image_ids never seen between the first expected and the last seen.
        duplicates: image messages whose series and image_id came before.
        control, malformed: other messages that went on.
        kept, vetoed: verdicts; by_reason and by_override count decisions.
        ended: an end message came (recorded: the run was read to its end), or the detector has
            gone on to other series without one.
        in_doubt: of them, at most so many did not reach the writer although they were handed on
            or were about to be: what ZeroMQ held when a process died that had the series.
        restarts: times that the program was started anew while the series ran. What it had
            received and not decided when it died stays ``undecided``.
    """

    series_id: int
    series_unique_id: str
    received: int
    forwarded: int
    dropped: int
    undecided: int
    missing: int
    duplicates: int
    control: int
    malformed: int
    kept: int
    vetoed: int
    by_reason: Mapping[str, int]
    by_override: Mapping[str, int]
    ended: bool
    in_doubt: int = 0
    restarts: int = 0

    @property
    def balanced(self) -> bool:
        """received = forwarded + dropped + undecided, and nothing undecided."""
        return self.received == self.forwarded + self.dropped and self.undecided == 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Begun:
    """A series that ran when an earlier process ended, for a source that is to go on with it.

    Attributes:
        key: (series_id, series_unique_id).
        start: parts of its start message as they came; () where none came or none is left.
        lanes: indices of the sockets that it came on.
        seen: runs of image_ids that came, (first, last), ascending.
    """

    key: tuple[int, str]
    start: tuple[bytes, ...] = ()
    lanes: tuple[int, ...] = (0,)
    seen: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What an independent spot finder says of a sample of vetoed frames.

    Attributes:
        audited: vetoed frames that were looked at.
        hits: those on which the finder sees a hit.
        hit_share_low, hit_share_high: 95 % interval (Clopper-Pearson) of their share, 0..1.
        skipped: frames of the sample that were not looked at, for want of time.
        unreadable: those that could not be decoded.
        limit: share from which the gate opens, 0..1.
        gate_open: the sample showed harm; nothing is dropped any more.
    """

    audited: int
    hits: int
    hit_share_low: float
    hit_share_high: float
    skipped: int
    unreadable: int
    limit: float
    gate_open: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Drifted:
    """How one quantity of recent frames compares with the frames of the model's card.

    Attributes:
        distance: largest distance of the two distribution functions, 0..1; NaN without frames.
        strange_share: share of frames that the card's frames hardly show, 0..1.
        limit: what that share may be.
        drifted: it is more, beyond doubt (one-sided, 99.99 %).
    """

    quantity: str
    distance: float
    strange_share: float
    limit: float
    drifted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """Whether recent frames look like those of the model's card.

    Attributes:
        frames: scored frames that were looked at, all told; figures are of the last 500.
        quantities: one each.
    """

    frames: int
    quantities: tuple[Drifted, ...]
