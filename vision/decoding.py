"""Images as tensors of uint8: decoded once and kept, or, of a large data set, batch by batch by workers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rlexit.machine import cores
from vision.config import DataConfig

# Image and label columns of a kind.
COLUMNS = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label"), "images": ("image", "label")}
DECODED_AT_ONCE = 1024
# Classes without names; a larger label is a mistake.
MAX_UNNAMED = 1 << 16


@dataclass(frozen=True)
class Images:
    """Some images in memory.

    Args:
        pixels: (N, 3, H, W) uint8.
        labels: (N,) int64 class indices.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def side(self) -> int:
        """H and W."""
        return self.pixels.shape[-1]

    def take(self, index: np.ndarray) -> Images:
        """The images of these indices."""
        where = torch.from_numpy(index)
        return Images(self.pixels[where], self.labels[where])

    def batch(self, index: Tensor, following: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) pixels and (B,) labels of these indices; what follows needs no preparation."""
        return self.pixels[index], self.labels[index]

    def decoded(self) -> Images:
        """They are."""
        return self


class StoredImages:
    """Images that stay as they are stored, because decoded they would not fit; batches are decoded by workers.

    Args:
        rows: of `datasets`, with undecoded images.
        config: names the column, the side and the workers.
        where: what an error calls the split.
        labels: (N,) int64 class indices.
        side: H and W of every image.
        index: (N,) rows of the images; None for all.
    """

    def __init__(
        self, rows: Any, config: DataConfig, where: str, labels: Tensor, side: int, index: np.ndarray | None = None
    ) -> None:
        self.rows, self.config, self.where, self.labels, self.side = rows, config, where, labels, side
        self.index = np.arange(len(labels)) if index is None else index
        self._ready: tuple[Tensor, list[Future[np.ndarray]]] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def decoded_bytes(self) -> int:
        """What all of them would take in memory."""
        return len(self) * 3 * self.side**2

    def take(self, index: np.ndarray) -> StoredImages:
        """The images of these indices."""
        kept = self.labels[torch.from_numpy(index)]
        return StoredImages(self.rows, self.config, self.where, kept, self.side, self.index[index])

    def relabelled(self, classes: Sequence[int]) -> StoredImages:
        """The same with another class for every class."""
        return StoredImages(
            self.rows, self.config, self.where, torch.tensor(classes)[self.labels], self.side, self.index
        )

    @cached_property
    def _workers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.config.workers or cores(), "decode")

    def _submit(self, index: Tensor) -> list[Future[np.ndarray]]:
        wanted = self.index[index.numpy()].tolist()
        cells = self.rows[wanted][COLUMNS[self.config.kind][0]]
        return [self._workers.submit(self._decode, *pair) for pair in zip(wanted, cells, strict=True)]

    def _decode(self, row: int, cell: Any) -> np.ndarray:
        """(3, H, W) uint8; decoding runs outside of Python's lock, so threads are workers enough."""
        place = f"row {row} of the {self.where} of {self.config.path!r}"
        array = _pixels(cell, self.config.side, [], place)
        if array.shape[-1] != self.side:
            sizes = f"{self.side} x {self.side} as the first, got {array.shape[2]} x {array.shape[1]}"
            raise ValueError(f"`{COLUMNS[self.config.kind][0]}` in {place} must be {sizes}. Set `data.side`.")
        return array

    def batch(self, index: Tensor, following: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) pixels and (B,) labels of these indices.

        Args:
            index: (B,).
            following: indices that are likely to be asked for next; workers begin with them at once.
        Raises:
            ValueError: an image is corrupt, grey or of another size; the message names its row.
        """
        ready, self._ready = self._ready, None
        waiting = ready[1] if ready is not None and torch.equal(ready[0], index) else self._submit(index)
        if following is not None:
            self._ready = following, self._submit(following)
        return torch.from_numpy(np.stack([one.result() for one in waiting])), self.labels[index]

    def decoded(self) -> Images:
        """All of them in memory.

        Raises:
            ValueError: they do not fit, or one is bad.
        """
        if not fits(self.decoded_bytes, self.config):
            raise _too_large(self.decoded_bytes, self.config, f"held-out part of the {self.where}")
        parts = [self.batch(index)[0] for index in torch.arange(len(self)).split(DECODED_AT_ONCE)]
        return Images(torch.cat(parts), self.labels)


def fits(total: int, config: DataConfig) -> bool:
    """Whether so many bytes of decoded images are kept in memory."""
    return total <= config.memory_gb * (1 << 30)


def _too_large(total: int, config: DataConfig, where: str) -> ValueError:
    return ValueError(
        f"`data.memory_gb` must be at least {total / (1 << 30):.3g} for the {where} of {config.path!r}, which is decoded "
        f"whole, got {config.memory_gb:g}. Raise it, set a smaller `data.side`, or hold out fewer."
    )


def stored(rows: Any, config: DataConfig, classes: int, where: str) -> StoredImages:
    """The rows of a split with their labels read and checked, and the first image decoded to know the size.

    Raises:
        ValueError: there are none, a label is out of range, or the first image is bad; the message names the row.
    """
    image, label = COLUMNS[config.kind]
    _some(rows, config, where)
    labels = torch.empty(len(rows), dtype=torch.int64)
    for row, index in enumerate(rows[label]):
        labels[row] = _label(index, classes, label, f"row {row} of the {where} of {config.path!r}")
    first = _pixels(rows[0][image], config.side, [], f"row 0 of the {where} of {config.path!r}")
    return StoredImages(rows, config, where, labels, first.shape[-1])


def _some(rows: Any, config: DataConfig, where: str) -> None:
    if not len(rows):
        raise ValueError(f"`data.path` must hold images, got none in the {where} of {config.path!r}.")


def label_names(labels: Sequence[Any], config: DataConfig, where: str) -> tuple[str, ...]:
    """Names of classes that have none: their numbers, from 0 to the largest label.

    Raises:
        ValueError: a label is missing, negative or too large for a class; the message names the row.
    """
    label = COLUMNS[config.kind][1]
    checked = (
        _label(index, MAX_UNNAMED, label, f"row {row} of the {where} of {config.path!r}")
        for row, index in enumerate(labels)
    )
    return tuple(map(str, range(max(checked, default=-1) + 1)))


def _label(index: Any, classes: int, label: str, place: str) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < classes:
        raise ValueError(f"`{label}` in {place} must be in 0..{classes - 1}, got {index!r}.")
    return index


def decode(rows: Any, config: DataConfig, classes: int, where: str) -> Images:
    """Decodes every image of a split once.

    Args:
        rows: of `datasets`, with undecoded images.
        config: names the columns, and the side.
        classes: number of classes of the labels as they are stored.
        where: what the error calls the split.
    Raises:
        ValueError: a row is corrupt, grey, of another size or out of the classes' range; the message names it.
    """
    image, label = COLUMNS[config.kind]
    _some(rows, config, where)
    pixels = np.empty(0, dtype=np.uint8)
    labels = torch.empty(len(rows), dtype=torch.int64)
    formats: list[str] = []
    for row, (stored, index) in enumerate(_cells(rows, image, label)):
        place = f"row {row} of the {where} of {config.path!r}"
        labels[row] = _label(index, classes, label, place)
        array = _pixels(stored, config.side, formats, place)
        if row == 0:
            if not fits(len(rows) * array.size, config):
                raise _too_large(len(rows) * array.size, config, where)
            pixels = np.empty((len(rows), *array.shape), dtype=np.uint8)
        if array.shape != pixels.shape[1:]:
            sizes = [f"{shape[2]} x {shape[1]}" for shape in (pixels.shape[1:], array.shape)]
            raise ValueError(f"`{image}` in {place} must be {sizes[0]} as the first, got {sizes[1]}. Set `data.side`.")
        pixels[row] = array
    return Images(torch.from_numpy(pixels), labels)


def _cells(rows: Any, image: str, label: str) -> Iterator[tuple[Any, Any]]:
    for batch in rows.iter(batch_size=DECODED_AT_ONCE):
        yield from zip(batch[image], batch[label], strict=True)


def _pixels(stored: Any, side: int, formats: list[str], place: str) -> np.ndarray:
    """(3, H, W) uint8 of one stored image; H = W. `formats` remembers what was met: trying all takes half of the time."""
    path = (stored or {}).get("path")
    if path and (stored or {}).get("bytes") is None:
        place = f"{place} ({path})"
    try:
        with _opened(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else path, formats) as picture:
            picture.load()
            mode = picture.mode
            if mode != "RGB":
                raise ValueError(f"`data.path` must hold RGB images, got mode {mode} in {place}. Convert them.")
            if side:
                picture = _fitted(picture, side)
            array = np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1)
    except (OSError, SyntaxError, KeyError, TypeError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"`data.path` must hold images that decode, got a corrupt one in {place}: {error}.") from error
    if array.shape[1] != array.shape[2]:
        size = f"{array.shape[2]} x {array.shape[1]}"
        raise ValueError(f"`data.path` must hold square images, got {size} in {place}. Set `data.side`.")
    return array


def _opened(source: Any, formats: list[str]) -> Image.Image:
    if formats:
        try:
            return Image.open(source, formats=formats)
        except UnidentifiedImageError:
            pass  # of another format, or of none
    picture = Image.open(source)
    formats[:] = [picture.format or ""]
    return picture


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """Resized so that the shorter side fits, and cut around the middle."""
    scale = side / min(picture.size)
    width, height = (max(round(length * scale), side) for length in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC) if scale != 1 else picture
    left, top = (width - side) // 2, (height - side) // 2
    return resized.crop((left, top, left + side, top + side))
