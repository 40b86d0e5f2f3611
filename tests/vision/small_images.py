"""Small data sets on disk and a small config, for runs that are over in seconds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlexit.config import CalibrateConfig, DistillConfig, EvaluateConfig
from vision.config import BackboneConfig, CollectConfig, DataConfig, NetworkConfig, TrainConfig, VisionConfig

SMALL = VisionConfig(
    methods=("ztw", "static"),
    data=DataConfig(kind="toy", holdout=0.4, crop=0, flip=False, toy_rows=192, toy_side=8),
    backbone=BackboneConfig(depth=8, width=0.25),
    network=NetworkConfig(every=1),
    train=TrainConfig(epochs=4, batch_size=32, learning_rate=0.05),
    collect=CollectConfig(batch=32, batches=2),
    distill=DistillConfig(
        steps=640,
        ensemble_steps=128,
        batch_size=32,
        epochs=1,
        learning_rate=0.01,
        label_weight=1.0,
        checkpoint_buffers=4,
        static_widths=(0.5,),
    ),
    calibrate=CalibrateConfig(target_macs=(1.2,), max_return_drop=(), episodes=2, rounds=1),
    evaluate=EvaluateConfig(episodes=4, grid=3, n_envs=16, latency_rows=2),
)


def changed(config: VisionConfig, section: str, **values: Any) -> VisionConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})  # type: ignore[arg-type]


def png(seed: int, side: int = 8, mode: str = "RGB", height: int | None = None) -> bytes:
    shape = (height or side, side, 3)
    array = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(array).convert(mode).save(packed, "PNG")
    return packed.getvalue()


def hub_folder(
    folder: Path,
    train: Sequence[tuple[bytes, int]],
    test: Sequence[tuple[bytes, int]],
    columns: tuple[str, str] = ("img", "label"),
    classes: Sequence[str] | None = ("cat", "dog"),
) -> Path:
    """Parquet files as on the hub: <folder>/plain_text/{train,test}-00000-of-00001.parquet."""
    import datasets

    label = datasets.ClassLabel(names=list(classes)) if classes else datasets.Value("int64")
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: label})
    (folder / "plain_text").mkdir(parents=True)
    for name, rows in (("train", train), ("test", test)):
        values = {columns[0]: [{"bytes": image, "path": None} for image, _ in rows], columns[1]: [y for _, y in rows]}
        made = datasets.Dataset.from_dict(values, features=features)
        made.to_parquet(str(folder / "plain_text" / f"{name}-00000-of-00001.parquet"))
    return folder


def pairs(count: int, classes: int = 2, first: int = 0, **how: Any) -> list[tuple[bytes, int]]:
    return [(png(first + index, **how), index % classes) for index in range(count)]
