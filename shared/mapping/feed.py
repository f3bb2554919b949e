"""Feeding: how a new raster is read for a model, as the data it was trained on say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import RequestError
from shared.normalisation import Normalisation
from shared.rasters import Header, check_spectral


@dataclass(frozen=True)
class Feed:
    """What a model takes.

    classes: names, by index.  bands: numbers, from 1, of the bands of a training file, in the order of the model's.
    file_bands: names of all bands of a training file.  layout, fill: as ``read_image`` takes them.
    window: pixels along a side of what the model was trained on.
    band_files: pairs of a band and the pattern of its files where each is a file of its own (see
        ``shared.rasters.gather``); None where a file holds them all.
    """

    classes: tuple[str, ...]
    bands: tuple[int, ...]
    file_bands: tuple[str, ...]
    layout: str | None
    fill: float | None
    normalisation: Normalisation
    window: int
    band_files: tuple[tuple[str, str], ...] | None = None

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Feed:
        """From what data say of themselves (``Scenes.describe``). Raises RequestError where something is missing."""
        try:
            reading, scale = described["reading"], described["normalisation"]
            return cls(
                classes=tuple(described["classes"]),
                bands=tuple(reading["bands"]),
                file_bands=tuple(described["file_bands"]),
                layout=reading.get("layout"),
                fill=reading.get("fill"),
                normalisation=Normalisation(tuple(scale["mean"]), tuple(scale["std"])),
                window=described["window"],
                band_files=tuple(reading["band_files"].items()) if "band_files" in reading else None,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"the adapter file does not say how rasters are read: data lack {error}") from error

    def check_files(self, source: str, count: int) -> None:
        """Raises RequestError where a scene does not come as as many files as the model was trained on.

        source: what the user named.  count: the files of the scene.
        """
        if self.band_files is None and count > 1:
            raise RequestError(f"{source}: the model reads all bands from one file, not from {count}")
        if self.band_files is not None and count != len(self.band_files):
            patterns = ", ".join(f"{pattern} ({band})" for band, pattern in self.band_files)
            what = f"every band from a file of its own: {patterns}; name the folder that holds them"
            raise RequestError(f"{source}: the model reads {what}")

    def numbers(self, header: Header, given: Sequence[int] | None = None) -> list[int]:
        """The bands of a file, by number, in the order of the model's.

        given: them, whatever the file calls its bands. Else bands go by name where the file and the training files
        name theirs, and by number otherwise. Raises RequestError where they do not fit.
        """
        check_spectral(header)
        if given is not None:
            if len(given) != len(self.bands):
                raise RequestError(f"bands {list(given)}: the model reads {len(self.bands)}, state one number for each")
            return list(given)
        wanted = [self.file_bands[number - 1] for number in self.bands]
        if not (_numbered(header.band_names) or _numbered(self.file_bands)):
            names = [name.casefold() for name in header.band_names]
            if missing := [name for name in wanted if name.casefold() not in names]:
                raise RequestError(
                    f"{header.path}: no band is called {missing[0]!r} but {', '.join(header.band_names)}; the model "
                    f"reads {', '.join(wanted)} (if they are these under other names, state their numbers with bands)"
                )
            return [names.index(name.casefold()) + 1 for name in wanted]
        if len(self.file_bands) not in (header.bands, len(header.data_bands)):
            raise RequestError(
                f"{header.path}: {_count(len(header.data_bands))}; the model was trained on files of "
                f"{_count(len(self.file_bands))} (state the numbers of the {len(self.bands)} it reads with bands)"
            )
        return list(self.bands)


def _numbered(names: Sequence[str]) -> bool:
    """Whether a file leaves its bands without names."""
    return list(names) == [f"band {number}" for number in range(1, len(names) + 1)]


def _count(bands: int) -> str:
    return f"{bands} band" + "s" * (bands != 1)
