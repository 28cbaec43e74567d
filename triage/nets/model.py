"""A model on disk: ``weights.safetensors`` and ``card.json``, and nothing that can run code.

The card says what the weights are: heads, input recipe, calibration, thresholds, how they were
trained and how they were validated. Weights and card are bound by a hash.

Beside them may lie the full exit in 8-bit integers, a graph of OpenVINO's as ``full_int8.xml`` and
``full_int8.bin``, with ``int8.json``, which binds the graph to the weights it was made from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triage.errors import ModelError
from triage.records import Recipe

if TYPE_CHECKING:
    from triage.nets.triagenet import Beside, Head, TriageNet

__all__ = [
    "BLANK_BY_SPOTS",
    "MOST_WEIGHT",
    "Card",
    "Model",
    "Quantised",
    "load_model",
    "save_model",
    "save_quantised",
]

BLANK_BY_SPOTS = "blank_by_spots"
"""The head of the full exit that says blank where the fast exit is not sure."""

CARD_FORMAT = 5
QUANTISED_FORMAT = 1
_LARGEST_CARD_BYTES = 1 << 24
_LARGEST_WEIGHTS_BYTES = 1 << 29
_LARGEST_RECIPE = {
    "grid": 1024, "radial_bins": 1024, "sectors": 64, "tiles": 64, "tile_px": 256,
}  # fmt: skip
"""Three times the shipped recipe and more: whoever writes a card says what is allocated for it."""

_MOST_HEADS = 64
MOST_WEIGHT = 10.0
"""Of what stands beside a head: more lets it answer alone."""
_DEFAULT = Path(__file__).parent / "default"
_GRAPH, _GRAPH_WEIGHTS, _GRAPH_CARD = "full_int8.xml", "full_int8.bin", "int8.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known of a model.

    Attributes:
        model_id: name and the first hex digits of the weights' hash.
        weights_sha256: binds the card to its weights.
        recipe: the input the model was trained on; frames prepared otherwise are refused.
        spot_features: names of the numbers that it reads of a whole list of spots, likewise.
        convolutions: whether its full exit looks at the overview and at tiles.
        heads: every output.
        thresholds: ``p_blank_veto``; with a head :data:`BLANK_BY_SPOTS` also ``p_blank_sure``: the
            ``p_blank`` of the fast exit from which its word stands. Without it none does.
        calibration: per binary head, (temperature, bias): p = sigmoid(logit / t + b).
        beside_weights: per head that has others' answers beside its own: by how much the logit of
            each one's probability is added to its own, in the order of ``Head.beside``.
        training: command, seed, data hash, frames.
        validation: data hash, counts, threshold, false-veto rate with interval; empty when the
            model was never validated, and then it may not enforce.
        tables: further figures.
        reference: distributions of its training frames, for ``triage.audit.drift``; empty when
            they were not written down, and then drift is not watched.
        versions: of the programs that made it.
    """

    model_id: str
    weights_sha256: str
    recipe: Recipe
    heads: tuple[Head, ...]
    thresholds: Mapping[str, float]
    spot_features: tuple[str, ...] = ()
    convolutions: bool = True
    calibration: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    beside_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def p_blank_sure(self) -> float:
        """``p_blank`` of the fast exit from which its word stands: 0 where it is the only one."""
        if not any(head.name == BLANK_BY_SPOTS for head in self.heads):
            return 0.0
        return self.thresholds.get("p_blank_sure", math.inf)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantised:
    """The full exit in 8-bit integers, as OpenVINO reads it: description and weights."""

    graph: bytes
    weights: bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """A network in evaluation mode, with its card, and its full exit quantised if it was."""

    net: TriageNet
    card: Card
    quantised: Quantised | None = None


def load_model(path: Path | None = None, *, quantised: bool = True) -> Model:
    """The model in folder ``path``, or the one that comes with the package.

    Args:
        quantised: with its quantised graph, where there is one.

    Raises:
        ModelError: files missing or not readable, weights that are not the card's, a card that
            does not fit this program, or a quantised graph of other weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from triage.nets.triagenet import TriageNet

    folder = _DEFAULT if path is None else path
    try:
        text = _content(folder / "card.json", _LARGEST_CARD_BYTES).decode("utf-8", "replace")
        weights = _content(folder / "weights.safetensors", _LARGEST_WEIGHTS_BYTES)
    except OSError as err:
        raise ModelError(
            f"model {folder}: {err.strerror} ({err.filename}); expected a folder with "
            "card.json and weights.safetensors"
        ) from err
    card = _card_from(folder, text)
    if hashlib.sha256(weights).hexdigest() != card.weights_sha256:
        raise ModelError(
            f"model {folder}: the weights are not those the card was written for; expected "
            f"SHA-256 {card.weights_sha256[:16]}...; take both files from the same training"
        )
    net = TriageNet(
        card.heads,
        radial_bins=card.recipe.radial_bins,
        spot_features=len(card.spot_features),
        convolutions=card.convolutions,
    )
    try:
        net.load_state_dict(load(weights), strict=True)
    except (SafetensorError, RuntimeError) as err:
        why = str(err).partition("\n")[2].strip()[:200] or str(err)
        raise ModelError(
            f"model {folder}: weights do not fit the network: {why}...; expected those of "
            "TriageNet with the card's heads; retrain, or use the version that made the model"
        ) from err
    net.eval()
    return Model(net=net, card=card, quantised=_quantised_in(folder, card) if quantised else None)


def _content(file: Path, most_bytes: int) -> bytes:
    """The bytes of a file of a model, which may not be larger than such a file can be."""
    with file.open("rb") as opened:
        content = opened.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ModelError(f"{file}: more than {most_bytes} bytes; expected a file of a model")
    return content


def _check_sizes(recipe: Recipe, heads: tuple[Head, ...], convolutions: bool) -> None:
    """See that what a card asks for is of the size of things before it is made.

    Raises:
        ValueError: it is not.
    """
    from triage.nets.triagenet import READABLE

    for name, most in _LARGEST_RECIPE.items():
        value = getattr(recipe, name)
        least = 0 if name == "tiles" and not convolutions else 1
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"recipe {name} {value!r}; expected {least} to {most}")
    if len(heads) > _MOST_HEADS or any(
        type(head.levels) is not int or not 1 < head.levels <= _MOST_HEADS for head in heads
    ):
        raise ValueError(
            f"heads; expected at most {_MOST_HEADS}, each of 2 to {_MOST_HEADS} levels"
        )
    for head in heads:
        if head.steps and len(head.steps) != head.outputs:
            raise ValueError(f"head {head.name!r}: steps {head.steps}; expected {head.outputs}")
        if not all(map(math.isfinite, head.steps)):
            raise ValueError(f"head {head.name!r}: steps {head.steps}; expected finite numbers")
        for each in head.beside:
            _check_beside(head, each, {h.name: h for h in heads})
        readable = {*READABLE} if convolutions else {*READABLE} - {"seen"}
        if not {*head.reads} <= {*READABLE} or not {*head.reads} & readable:
            raise ValueError(f"head {head.name!r}: reads {head.reads}; expected some of {READABLE}")


def _check_beside(head: Head, given: Beside, heads: Mapping[str, Head]) -> None:
    """Raises ValueError unless that answer may stand beside the head's own."""
    other = heads.get(given.head)
    if head.kind != "binary" or head.exit != "full":
        raise ValueError(
            f"head {head.name!r}: {head.kind} of the {head.exit} exit with {given.head!r} beside "
            "it; expected a binary one of the full exit"
        )
    says_the_same = other is not None and (
        (other.kind == "binary" and other.label == head.label)
        # That it is no more than background is what the lowest levels of quality say.
        or (other.kind == "ordinal" and (head.label, other.label) == ("blank", "quality"))
    )
    if other is None or other.beside or not says_the_same:
        raise ValueError(
            f"head {head.name!r}: {given.head!r} beside it; expected a head with nothing beside "
            f"itself that answers {head.label!r} too, or quality beside blank"
        )
    if not 0 <= given.step < other.outputs:
        raise ValueError(
            f"head {head.name!r}: answer {given.step} of {given.head!r} beside it; expected one "
            f"from 0 to {other.outputs - 1}"
        )


def _check_numbers(card: Card) -> None:
    """Raises ValueError where what turns outputs into decisions is nothing to decide by."""
    for name, value in card.thresholds.items():
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"threshold {name!r}: {value}; expected a number from 0")
    for name, (temperature, bias) in card.calibration.items():
        if not (0.0 < temperature < math.inf and math.isfinite(bias)):
            raise ValueError(
                f"calibration of {name!r}: {(temperature, bias)}; expected a temperature above 0 "
                "and a bias"
            )
    asked = {head.name: len(head.beside) for head in card.heads if head.beside}
    told = {name: len(weights) for name, weights in card.beside_weights.items()}
    if asked != told:
        raise ValueError(
            f"beside_weights: {told} by head; expected {asked}, one for each answer beside it"
        )
    for name, weights in card.beside_weights.items():
        if not all(0.0 <= weight <= MOST_WEIGHT for weight in weights):
            raise ValueError(
                f"beside_weights of {name!r}: {weights}; expected each from 0 to {MOST_WEIGHT:g}"
            )


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r}; expected a whole number")
    return value


def _numbers(values: Any) -> tuple[float, ...]:
    """A string is a sequence as well, of digits."""
    if not isinstance(values, list):
        raise ValueError(f"{values!r}; expected a list of numbers")
    return tuple(map(float, values))


def _quantised_in(folder: Path, card: Card) -> Quantised | None:
    """The quantised graph of a folder; None where there is no ``int8.json``."""
    if not (folder / _GRAPH_CARD).exists():
        return None
    remedy = f"make it again with 'triage quantize', or remove {_GRAPH_CARD} to go without"
    try:
        said = json.loads(_content(folder / _GRAPH_CARD, _LARGEST_CARD_BYTES))
        graph = _content(folder / _GRAPH, _LARGEST_WEIGHTS_BYTES)
        weights = _content(folder / _GRAPH_WEIGHTS, _LARGEST_WEIGHTS_BYTES)
        known = (said["format"], said["weights_sha256"], said["graph_sha256"])
    except OSError as err:
        raise ModelError(
            f"model {folder}: {err.strerror} ({err.filename}); expected the quantised graph of "
            f"{_GRAPH_CARD}; {remedy}"
        ) from err
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise ModelError(f"model {folder}: {_GRAPH_CARD}: {err!r}; {remedy}") from err
    if known != (QUANTISED_FORMAT, card.weights_sha256, _digest_of(graph, weights)):
        raise ModelError(
            f"model {folder}: {_GRAPH} and {_GRAPH_WEIGHTS} are not those that {_GRAPH_CARD} "
            f"was written for, or were made from other weights or by another version; {remedy}"
        )
    return Quantised(graph=graph, weights=weights)


def _digest_of(graph: bytes, weights: bytes) -> str:
    return hashlib.sha256(hashlib.sha256(graph).digest() + weights).hexdigest()


def save_quantised(folder: Path, quantised: Quantised, card: Card, made: Mapping[str, Any]) -> None:
    """Write a quantised full exit beside the weights it was made from.

    Args:
        card: of those weights.
        made: how: command, calibration data, versions.
    """
    (folder / _GRAPH).write_bytes(quantised.graph)
    (folder / _GRAPH_WEIGHTS).write_bytes(quantised.weights)
    document = {
        "format": QUANTISED_FORMAT,
        "model_id": card.model_id,
        "weights_sha256": card.weights_sha256,
        "graph_sha256": _digest_of(quantised.graph, quantised.weights),
        **made,
    }
    (folder / _GRAPH_CARD).write_text(json.dumps(document, indent=2) + "\n")


def _card_from(folder: Path, text: str) -> Card:
    from triage.nets.spot_features import SPOT_FEATURES
    from triage.nets.spot_marks import SPOT_MARKS
    from triage.nets.triagenet import Beside, Head

    try:
        raw = json.loads(text)
        if raw["format"] != CARD_FORMAT:
            raise ModelError(
                f"model {folder}: card format {raw['format']}; expected {CARD_FORMAT}, of networks "
                "whose heads say what stands beside them; train it again with 'triage train', or "
                "use the version that made the model"
            )
        recipe_fields = dict(raw["recipe"])
        recipe_fields["bin_factors"] = tuple(recipe_fields["bin_factors"])
        recipe = Recipe(**recipe_fields)
        card = Card(
            model_id=str(raw["model_id"]),
            weights_sha256=str(raw["weights_sha256"]),
            recipe=recipe,
            heads=tuple(
                Head(
                    **head
                    | {
                        "steps": tuple(map(float, head.get("steps", ()))),
                        "reads": tuple(map(str, head["reads"])),
                        "beside": tuple(
                            Beside(str(each["head"]), _whole(each["step"]))
                            for each in head["beside"]
                        ),
                    }
                )
                for head in raw["heads"]
            ),
            spot_features=tuple(map(str, raw["spot_features"])),
            convolutions=bool(raw["convolutions"]),
            thresholds={str(k): float(v) for k, v in raw["thresholds"].items()},
            calibration={str(k): (float(v[0]), float(v[1])) for k, v in raw["calibration"].items()},
            beside_weights={str(k): _numbers(v) for k, v in raw["beside_weights"].items()},
            training=raw["training"],
            validation=raw["validation"],
            tables=raw["tables"],
            reference=raw.get("reference", {}),
            versions=raw["versions"],
        )
        _check_sizes(recipe, card.heads, card.convolutions)
        _check_numbers(card)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as err:
        raise ModelError(
            f"model {folder}: card.json is not a model card: {err!r}; copy the model again, or "
            "make it with 'triage train'"
        ) from err
    if recipe.version != Recipe().version or recipe.fingerprint != raw["recipe_fingerprint"]:
        raise ModelError(
            f"model {folder}: input recipe {raw['recipe_fingerprint']} (version "
            f"{recipe.version}); this program prepares {Recipe().fingerprint} (version "
            f"{Recipe().version}); retrain, or use the version that made the model"
        )
    if raw.get("spot_marks") != list(SPOT_MARKS):
        raise ModelError(
            f"model {folder}: reads other numbers of each spot than this program computes; "
            "retrain, or use the version that made the model"
        )
    unknown = [name for name in card.spot_features if name not in SPOT_FEATURES]
    if unknown or len(set(card.spot_features)) < len(card.spot_features):
        raise ModelError(
            f"model {folder}: reads {len(card.spot_features)} numbers of a list of spots, of which "
            f"this program does not compute {unknown[:3]}; retrain, or use the version that made "
            "the model"
        )
    if "p_blank_veto" not in card.thresholds or "blank" not in {h.name for h in card.heads}:
        raise ModelError(f"model {folder}: expected a head 'blank' and a threshold p_blank_veto")
    return card


def save_model(folder: Path, net: TriageNet, name: str, card: Mapping[str, Any]) -> str:
    """Write weights and card; the model_id they got. A graph quantised from others goes.

    Args:
        card: the fields of :class:`Card` except model_id, weights_sha256, heads and convolutions;
            without spot_features the network reads all that there are, and what has no weight
            beside a head has 0.
    """
    from safetensors.torch import save

    from triage.nets.spot_features import SPOT_FEATURES
    from triage.nets.spot_marks import SPOT_MARKS

    weights = save({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()})
    digest = hashlib.sha256(weights).hexdigest()
    recipe: Recipe = card["recipe"]
    given: Mapping[str, Sequence[float]] = card.get("beside_weights", {})
    if not net.convolutions:
        # Nothing else looks at tiles, and cutting them costs time.
        recipe = replace(recipe, tiles=0)
    document = {
        "format": CARD_FORMAT,
        "model_id": f"{name}-{digest[:8]}",
        "weights_sha256": digest,
        "recipe": asdict(recipe),
        "recipe_fingerprint": recipe.fingerprint,
        "heads": [asdict(head) for head in net.heads],
        "spot_features": list(card.get("spot_features", SPOT_FEATURES)),
        "spot_marks": list(SPOT_MARKS),
        "convolutions": net.convolutions,
        "beside_weights": {
            head.name: list(given.get(head.name, [0.0] * len(head.beside)))
            for head in net.heads
            if head.beside
        },
        **{
            key: card.get(key, {})
            for key in (
                "thresholds",
                "calibration",
                "training",
                "validation",
                "tables",
                "reference",
                "versions",
            )
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (_GRAPH_CARD, _GRAPH, _GRAPH_WEIGHTS):
        (folder / stale).unlink(missing_ok=True)
    (folder / "weights.safetensors").write_bytes(weights)
    (folder / "card.json").write_text(json.dumps(document, indent=2) + "\n")
    return str(document["model_id"])
