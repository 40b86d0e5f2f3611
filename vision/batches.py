"""Training images in a shuffled and varied stream that depends on the seed and the place in it only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlexit.config import require
from vision.config import DataConfig
from vision.decoding import Images, StoredImages

# Names of borders to kornia's.
PADDINGS = {"black": "constant", "reflect": "reflect"}


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

    def __init__(
        self, images: Images | StoredImages, config: DataConfig, batch: int, seed: int, least: int = 1
    ) -> None:
        if len(images) < least:
            raise ValueError(
                f"`data` must leave at least {least} images to train on, got {len(images)}. Hold out fewer."
            )
        self.images, self.batch, self.seed = images, batch, seed
        rest = len(images) % batch
        self.per_epoch = len(images) // batch + (rest >= least)
        self.vary = variation(config, images.side)
        self._orders: dict[int, Tensor] = {}

    def _chosen(self, index: int) -> Tensor:
        """(B,) images of the batch of that index."""
        epoch, place = divmod(index, self.per_epoch)
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
            # The epoch before may still be asked for, when this one is only being prepared.
            self._orders = {known: kept for known, kept in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = torch.from_numpy(order)
        return self._orders[epoch][place * self.batch : (place + 1) * self.batch]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) pixels, uint8 or float32 in [0, 1], and (B,) labels of the batch of that index, from 0."""
        pixels, labels = self.images.batch(self._chosen(index), self._chosen(index + 1))
        if self.vary is None:
            return pixels, labels
        # kornia draws from torch's global generator: what is drawn here must not move anyone else's.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int(np.random.SeedSequence([self.seed, index, 1]).generate_state(1)[0]))
            return self.vary(pixels.to(torch.float32).div_(255)), labels


def variation(config: DataConfig, side: int) -> Any:
    """Crop and mirror as a module of kornia, or None.

    Args:
        config: how images are varied.
        side: of the images, in pixels.
    Raises:
        ImportError: kornia is missing.
        ValueError: the images are too small for mirrored borders.
    """
    if not (config.crop or config.flip):
        return None
    try:
        from kornia import augmentation
    except ImportError as error:
        raise ImportError("`data.crop` and `data.flip` need kornia: pip install 'rlexit[vision]'.") from error
    how = PADDINGS[config.border]
    rule = f"be below the images' side of {side} where data.border is reflect"
    require(config.border != "reflect" or config.crop < side, "data.crop", rule, config.crop)
    steps = [augmentation.RandomCrop((side, side), padding=config.crop, padding_mode=how)] if config.crop else []
    return torch.nn.Sequential(*steps, *([augmentation.RandomHorizontalFlip(p=0.5)] if config.flip else []))
