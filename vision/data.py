"""Data sets of images: read through `datasets`, and split by rules that never vary; `decoding` makes tensors of them."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision.config import DataConfig
from vision.decoding import COLUMNS, Images, StoredImages, decode, fits, label_names, stored

# Mean and deviation of the channels that published weights expect.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATION = {
    "cifar10": IMAGENET,
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "images": IMAGENET,
    "toy": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
}
TEST_NAMES = ("test", "validation", "valid", "val")
# CIFAR-10's airplane, automobile, horse, ship and truck are transport; the horse too, as in Zero Time Waste's supplement.
CIFAR2 = {"names": ("animals", "transport"), "classes": (1, 1, 0, 0, 0, 0, 0, 1, 1, 1)}


class DataSet:
    """One data set with its splits; each half is read when it is first asked for.

    Args:
        config: which, and how it is split.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    @cached_property
    def _found(self) -> Any:
        return None if self.config.kind == "toy" else _open(self.config)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, after relabelling."""
        if self.config.relabel:
            return CIFAR2["names"]  # type: ignore[return-value]
        return self._names

    @cached_property
    def _names(self) -> tuple[str, ...]:
        if self._found is None:
            return tuple(f"class {index}" for index in range(self.config.toy_classes))
        rows = self._found[0]
        feature = rows.features[COLUMNS[self.config.kind][1]]
        if hasattr(feature, "names"):
            named = [str(name) for name in feature.names]
            strange = next((name for name in named if not (name and name.isprintable())), None)
            if strange is not None:
                raise ValueError(f"`data.path` must name classes in printable text, got {strange!r}. Rename the class.")
            return tuple(named)
        if "int" not in str(feature.dtype):
            raise ValueError(
                f"`{COLUMNS[self.config.kind][1]}` in {self.config.path!r} must be of whole numbers or named classes, got "
                f"{feature.dtype}. Cast the column to ClassLabel."
            )
        return label_names(rows[COLUMNS[self.config.kind][1]], self.config, "train split")

    @cached_property
    def _train(self) -> Images | StoredImages:
        if self._found is None:
            return self._read(0)
        kept = stored(self._found[0], self.config, len(self._names), "train split")
        if fits(kept.decoded_bytes, self.config):
            return self._read(0)
        return kept.relabelled(CIFAR2["classes"]) if self.config.relabel else kept  # type: ignore[arg-type]

    @cached_property
    def _test(self) -> Images:
        return self._read(1)

    def _read(self, split: int) -> Images:
        if self._found is None:
            return toy_images(self.config, split)
        images = decode(self._found[split], self.config, len(self._names), f"{('train', 'test')[split]} split")
        if self.config.relabel:
            return Images(images.pixels, torch.tensor(CIFAR2["classes"])[images.labels])
        return images

    @cached_property
    def side(self) -> int:
        """H and W."""
        return self._test.pixels.shape[-1]

    @cached_property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of the channels, of pixels in [0, 1]."""
        return NORMALISATION[self.config.kind]

    @cached_property
    def fingerprint(self) -> str:
        """Hex digits that tell test sets apart."""
        # No copy: the pixels of a large test set are gigabytes.
        digest = hashlib.sha256(np.ascontiguousarray(self._test.pixels.numpy()).data)
        digest.update(np.ascontiguousarray(self._test.labels.numpy()).data)
        return digest.hexdigest()[:12]

    @cached_property
    def train(self) -> Images | StoredImages:
        """What trains: never a held-out image; thinned if a long tail is asked for."""
        images = self._train
        if self.config.holdout:
            images = images.take(self._held_out[1])
        return images if self.config.long_tail == 1 else images.take(self._tail(images.labels.numpy()))

    @cached_property
    def _held_out(self) -> tuple[np.ndarray, np.ndarray]:
        share = self.config.holdout
        source, split = (self._train, "train") if share else (self._test, "test")
        return deal(source.labels.numpy(), share or 0.5, self.classes, split)

    @cached_property
    def _thresholds(self) -> tuple[Images, Images]:
        held, rest = self._held_out
        if not self.config.holdout and self.config.half == 0:
            held, rest = rest, held
        source = self._train if self.config.holdout else self._test
        own = deal(source.labels.numpy()[held], 0.5, self.classes, "held-out")
        first, second = (source.take(held[part]) for part in own)
        return first.decoded(), second.decoded()

    def evaluated(self, split: str) -> Images:
        """Images of `calibration`, `certification` (both held out, apart from each other) or `test`."""
        if split == "calibration":
            return self._thresholds[0]
        if split == "certification":
            return self._thresholds[1]
        if self.config.holdout:
            return self._test
        return self._test.take(self._held_out[self.config.half])

    @property
    def tested(self) -> Images:
        """All test images, whatever `holdout` says."""
        return self._test

    @property
    def crossed(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Indices of the two halves of the test images, each the other's held-out images; None if others are held out."""
        return None if self.config.holdout else self._held_out

    def _tail(self, labels: np.ndarray) -> np.ndarray:
        """Indices that leave n_max * long_tail ** (-c / (C - 1)) images of class c, one at least.

        Source: Cui et al. 2019, arXiv 1901.05555, section 4.1.
        """
        counts = np.bincount(labels, minlength=len(self.classes))
        steps = np.arange(len(counts)) / max(len(counts) - 1, 1)
        wanted = np.maximum((counts.max() * self.config.long_tail**-steps).astype(np.int64), 1)
        kept = [np.flatnonzero(labels == index)[: wanted[index]] for index in range(len(counts))]
        return np.sort(np.concatenate(kept))


def deal(labels: np.ndarray, share: float, classes: tuple[str, ...], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Splits row indices in two, class by class and the same way every time.

    Args:
        labels: (N,) class indices.
        share: of every class that goes to the first part.
        classes: their names.
        split: what is split, for the error.
    Returns:
        Indices of the first part and of the rest, each rising.
    Raises:
        ValueError: a class would be absent from one of the parts.
    """
    generator = np.random.default_rng(0)
    first: list[np.ndarray] = []
    for index, name in enumerate(classes):
        mine = generator.permutation(np.flatnonzero(labels == index))
        count = round(share * len(mine))
        if not 0 < count < len(mine):
            raise ValueError(
                f"`data.holdout` must leave images of every class on both sides of the split, got {count} of the "
                f"{len(mine)} of class {name!r} in the {split} images. Choose another share, or more data."
            )
        first.append(mine[:count])
    chosen = np.sort(np.concatenate(first))
    rest = np.ones(len(labels), dtype=bool)
    rest[chosen] = False
    return chosen, np.flatnonzero(rest)


def toy_images(config: DataConfig, split: int) -> Images:
    """Classes are coarse patterns, more or less faint in noise, so that some images are easy and others are not."""
    patterns = np.random.default_rng(7).normal(size=(config.toy_classes, 3, 4, 4))
    generator = np.random.default_rng([11, split])
    # Every class is met equally often.
    labels = generator.permutation(np.arange(config.toy_rows) % config.toy_classes)
    scale = -(-config.toy_side // 4)
    large = patterns.repeat(scale, axis=2).repeat(scale, axis=3)[:, :, : config.toy_side, : config.toy_side]
    strength = generator.uniform(0.05, 0.4, size=(config.toy_rows, 1, 1, 1))
    noise = generator.normal(scale=0.2, size=(config.toy_rows, 3, config.toy_side, config.toy_side))
    pixels = np.clip(255 * (0.5 + strength * large[labels] + noise), 0, 255).astype(np.uint8)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def _open(config: DataConfig) -> tuple[Any, Any]:
    """Training and test rows, undecoded."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("`vision` needs datasets: pip install 'rlexit[vision]'.") from error
    if not config.path:
        raise ValueError("`data.path` must be a folder or a hub id, got none. Say --data PATH.")
    if Path(config.path).is_dir() and not any(path.is_file() for path in Path(config.path).rglob("*")):
        raise FileNotFoundError(f"`data.path` must hold images or parquet files, got the empty folder {config.path!r}.")
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(config.path)
    except Exception as error:  # its errors have no common ancestor, and many causes
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"`data.path` must be a data set that `datasets` reads, got {config.path!r}: {reason}"
        ) from error
    test = next((name for name in TEST_NAMES if name in found), None)
    if "train" not in found or test is None:
        raise ValueError(
            f"`data.path` must have the splits train and {' or '.join(TEST_NAMES)}, got {', '.join(found)} "
            f"in {config.path!r}."
        )
    for column in COLUMNS[config.kind]:
        for name in ("train", test):
            if column not in found[name].features:
                columns = ", ".join(found[name].features)
                raise ValueError(
                    f"`data.kind` {config.kind} must have the column {column!r}, got {columns} in the {name} split of "
                    f"{config.path!r}. Choose another kind, or rename the column."
                )
    raw = datasets.Image(decode=False)
    image = COLUMNS[config.kind][0]
    try:
        return found["train"].cast_column(image, raw), found[test].cast_column(image, raw)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{image}` in {config.path!r} must be a column of images, got {found[test].features[image]}."
        ) from (error)
