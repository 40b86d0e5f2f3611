"""Training images in a shuffled and varied stream that depends on the seed and the place in it only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision.config import DataConfig
from vision.data import Images


class Stream:
    """Batches without end: every image once per epoch, in an order drawn per epoch, each varied by chance.

    Any batch can be asked for without those before it, so whoever resumes sees what an uninterrupted run sees.

    Args:
        images: to train on.
        config: how they are varied.
        batch: images per batch; the last one of an epoch may have fewer.
        seed: of order and variation.
        least: a rest of fewer images is left out.
    """

    def __init__(self, images: Images, config: DataConfig, batch: int, seed: int, least: int = 1) -> None:
        if len(images) < least:
            raise ValueError(
                f"`data` must leave at least {least} images to train on, got {len(images)}. Hold out fewer."
            )
        self.images, self.batch, self.seed = images, batch, seed
        rest = len(images) % batch
        self.per_epoch = len(images) // batch + (rest >= least)
        self.vary = _variation(config, images.pixels.shape[-1])
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) pixels, uint8 or float32 in [0, 1], and (B,) labels of the batch of that index, from 0."""
        epoch, place = divmod(index, self.per_epoch)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
            self._order = epoch, torch.from_numpy(order)
        chosen = self._order[1][place * self.batch : (place + 1) * self.batch]
        pixels, labels = self.images.pixels[chosen], self.images.labels[chosen]
        if self.vary is None:
            return pixels, labels
        # kornia draws from torch's global generator: what is drawn here must not move anyone else's.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int(np.random.SeedSequence([self.seed, index, 1]).generate_state(1)[0]))
            return self.vary(pixels.to(torch.float32).div_(255)), labels


def _variation(config: DataConfig, side: int) -> Any:
    """Crop and mirror as a module of kornia, or None."""
    if not (config.crop or config.flip):
        return None
    try:
        from kornia import augmentation
    except ImportError as error:
        raise ImportError("`data.crop` and `data.flip` need kornia: pip install 'rlexit[vision]'.") from error
    steps = [augmentation.RandomCrop((side, side), padding=config.crop)] if config.crop else []
    return torch.nn.Sequential(*steps, *([augmentation.RandomHorizontalFlip(p=0.5)] if config.flip else []))
