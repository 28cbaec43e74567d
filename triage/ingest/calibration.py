"""Pedestal and gain maps of charge-integrating detectors, from files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.errors import ConfigError
from triage.records import Calibration

__all__ = ["Maps", "load_maps"]

_STAGES = 3
_KEV_ANGSTROM = 12.398419843320026


class Maps:
    """Maps of a whole detector, given out where they fit a series.

    Args:
        pedestal: (3, y, x) converter units of a dark pixel, by gain stage.
        gain: (3, y, x) converter units per keV, negative where the signal falls.
        photon_energy_kev: > 0.
    """

    def __init__(
        self, pedestal: NDArray[Any], gain: NDArray[Any], photon_energy_kev: float
    ) -> None:
        adu_per_photon = gain.astype(np.float32) * np.float32(photon_energy_kev)
        with np.errstate(divide="ignore", invalid="ignore"):
            per_adu = np.float32(1.0) / adu_per_photon
        per_adu[~np.isfinite(per_adu)] = np.nan
        self._calibration = Calibration(
            pedestal=np.ascontiguousarray(pedestal, np.float32), photons_per_adu=per_adu
        )
        self.why_not = ""

    def fitting(
        self, shape: tuple[int, int], rows: NDArray[np.intp], columns: NDArray[np.intp]
    ) -> Calibration | None:
        """The maps for frames of ``shape`` (y, x), or None; ``why_not`` then says why.

        Args:
            rows, columns: where the rows and columns of maps without the gaps between modules
                stand in a frame.
        """
        came, bare = self._calibration.pedestal.shape, (_STAGES, len(rows), len(columns))
        if came == bare and bare[1:] != shape:
            spread = []
            for map_ in (self._calibration.pedestal, self._calibration.photons_per_adu):
                whole = np.full((_STAGES, *shape), np.nan, np.float32)
                whole[:, rows[:, None], columns] = map_
                spread.append(whole)
            self._calibration = Calibration(pedestal=spread[0], photons_per_adu=spread[1])
        if self._calibration.pedestal.shape == (_STAGES, *shape):
            return self._calibration
        self.why_not = (
            f"maps of {came}; expected {(_STAGES, *shape)} (stage, y, x), or {bare} without the "
            "gaps between modules, for frames of this detector"
        )
        return None


def load_maps(pedestal_file: Path, gain_file: Path, wavelength_angstrom: float) -> Maps:
    """The maps in two files.

    A file is HDF5, ``.npz`` or ``.npy``. Of several arrays in it the one is taken whose name
    holds ``pedestal`` or ``gain``, or the only one of three dimensions.

    Raises:
        ConfigError: a file that cannot be read or holds no such map, maps that do not fit each
            other, or no wavelength.
    """
    if not wavelength_angstrom > 0:
        raise ConfigError(
            f"[geometry] incident_wavelength_angstrom = {wavelength_angstrom}: expected > 0 with "
            "[source] gain_file, whose maps are in units per keV"
        )
    pedestal = _map(pedestal_file, "pedestal")
    gain = _map(gain_file, "gain")
    if pedestal.shape != gain.shape:
        raise ConfigError(
            f"[source] pedestal_file has {pedestal.shape}, gain_file {gain.shape}; expected the "
            "same (stage, y, x)"
        )
    return Maps(pedestal, gain, _KEV_ANGSTROM / wavelength_angstrom)


def _map(path: Path, name: str) -> NDArray[Any]:
    try:
        with _arrays(path) as arrays:
            maps = [key for key, array in arrays.items() if len(array.shape) == 3]
            named = [key for key in maps if name in key.rpartition("/")[2].lower()]
            found = named or maps
            if len(found) != 1 or arrays[found[0]].shape[0] != _STAGES:
                shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items())
                raise ConfigError(
                    f"[source] {name}_file = {str(path)!r}: holds {shapes or 'no array'}; expected "
                    f"one map of ({_STAGES}, y, x), by gain stage, called {name!r} where there are "
                    "several"
                )
            return np.asarray(arrays[found[0]])
    except (OSError, ValueError, EOFError) as err:
        raise ConfigError(
            f"[source] {name}_file = {str(path)!r}: {err}; expected an HDF5, .npz or .npy file"
        ) from err


@contextlib.contextmanager
def _arrays(path: Path) -> Iterator[Mapping[str, Any]]:
    """Arrays by name; of HDF5 not yet read, because dark frames may lie beside the maps."""
    if path.suffix == ".npy":
        yield {path.stem: np.load(path, allow_pickle=False)}
        return
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            yield {key: stored[key] for key in stored.files}
        return
    import h5py
    import hdf5plugin  # noqa: F401 - registers the filters

    found: dict[str, Any] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim == 3 and item.dtype.kind in "iuf":
            found[name] = item

    with h5py.File(path) as file:
        file.visititems(visit)
        yield found
