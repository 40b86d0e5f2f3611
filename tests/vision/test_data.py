"""Data sets: what is read, how it is split, and bad input refused by file, row or key."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vision.small_images import hub_folder, pairs, png
from vision.batches import Stream
from vision.config import DataConfig
from vision.data import DataSet, deal
from vision.decoding import Images, StoredImages

pytest.importorskip("datasets", reason="needs datasets: pip install 'rlexit[vision]'")
DATA = os.environ.get("RLEXIT_DATA", "")
TOY = DataConfig(kind="toy", toy_rows=120, toy_side=8, holdout=0.25)


def at(path, **settings) -> DataSet:
    return DataSet(DataConfig(path=str(path), holdout=settings.pop("holdout", 0.5), **settings))


# ---- what is read ----


def test_images_in_the_hub_s_layout_are_read_bit_for_bit(tmp_path):
    data = at(hub_folder(tmp_path / "pets", pairs(8), pairs(4, first=100)))
    assert data.classes == ("cat", "dog")
    assert data.side == 8
    test = data.evaluated("test")
    assert test.labels.tolist() == [0, 1, 0, 1]
    assert test.pixels.dtype == torch.uint8
    expected = np.random.default_rng(103).integers(256, size=(8, 8, 3), dtype=np.uint8)
    assert np.array_equal(test.pixels[3].permute(1, 2, 0).numpy(), expected)


def test_cifar_100_has_columns_of_its_own(tmp_path):
    data = at(hub_folder(tmp_path / "many", pairs(8), pairs(4), ("img", "fine_label")), kind="cifar100")
    assert len(data.evaluated("test")) == 4


def test_a_folder_of_one_folder_per_class_is_read(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for number, name in enumerate(("ant", "bee")):
            folder = tmp_path / "insects" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.png").write_bytes(png(10 * number + index))
    data = at(tmp_path / "insects", kind="images")
    assert data.classes == ("ant", "bee")
    assert sorted(data.evaluated("test").labels.tolist()) == [0, 0, 1, 1]


def test_labels_without_names_are_counted(tmp_path):
    data = at(hub_folder(tmp_path / "numbers", pairs(12, classes=3), pairs(6, classes=3), classes=None))
    assert data.classes == ("0", "1", "2")


def test_other_sizes_are_fitted_where_asked_for(tmp_path):
    rows = [(png(0, side=12), 0), (png(1, side=16, height=8), 1), *pairs(6)]
    data = at(hub_folder(tmp_path / "odd", rows, rows), side=8)
    assert data.evaluated("test").pixels.shape == (8, 3, 8, 8)
    # As wide as asked for after cutting, the image keeps its own pixels.
    whole = np.random.default_rng(1).integers(256, size=(8, 16, 3), dtype=np.uint8)
    assert np.array_equal(data.evaluated("test").pixels[1].permute(1, 2, 0).numpy(), whole[:, 4:12])


@pytest.mark.skipif(not DATA, reason="set RLEXIT_DATA to the folder of the given data and weights")
def test_the_real_cifar_10_is_read():
    data = DataSet(DataConfig(path=f"{DATA}/cifar10"))
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    test = data.evaluated("test")
    assert test.pixels.shape == (10_000, 3, 32, 32)
    assert torch.bincount(test.labels).tolist() == [1000] * 10


# ---- splits ----


def keys(images: Images) -> list[bytes]:
    return [pixels.numpy().tobytes() for pixels in images.pixels]


def test_no_image_is_in_two_splits_and_none_is_lost():
    data = DataSet(TOY)
    parts = [keys(part) for part in (data.train, data.evaluated("calibration"), data.evaluated("certification"))]
    together = [key for part in parts for key in part]
    assert len(set(together)) == len(together) == 120
    assert [len(part) for part in parts] == [88, 16, 16]
    assert len(data.evaluated("test")) == 120
    assert not set(together) & set(keys(data.evaluated("test")))


def test_splits_are_the_same_every_time():
    first, second = DataSet(TOY), DataSet(TOY)
    for split in ("calibration", "certification", "test"):
        assert keys(first.evaluated(split)) == keys(second.evaluated(split))
    assert first.fingerprint == second.fingerprint


def test_without_a_held_out_share_thresholds_come_from_the_other_half_of_the_test_images():
    halves = [DataSet(DataConfig(kind="toy", toy_rows=120, toy_side=8, holdout=0, half=half)) for half in (0, 1)]
    tested = [set(keys(data.evaluated("test"))) for data in halves]
    assert [len(half) for half in tested] == [60, 60]
    assert not tested[0] & tested[1]
    for data, other in zip(halves, tested[::-1], strict=True):
        chosen = set(keys(data.evaluated("calibration"))) | set(keys(data.evaluated("certification")))
        assert chosen == other
        assert len(data.train) == 120


def test_a_long_tail_thins_what_trains_and_nothing_else():
    data = DataSet(DataConfig(kind="toy", toy_rows=400, toy_side=8, holdout=0.25, long_tail=27))
    assert torch.bincount(data.train.labels).tolist() == [75, 25, 8, 2]  # 75, 75/3, 75/9, 75/27
    held_out = torch.cat([data.evaluated(split).labels for split in ("calibration", "certification")])
    assert torch.bincount(held_out).tolist() == [25] * 4
    assert torch.bincount(data.evaluated("test").labels).tolist() == [100] * 4


def test_cifar_2_has_the_horse_in_transport(tmp_path):
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    rows = pairs(40, classes=10)
    hub_folder(tmp_path / "c10", rows, rows, classes=names)
    data = at(tmp_path / "c10", relabel="cifar2")
    assert data.classes == ("animals", "transport")
    assert data.evaluated("test").labels.tolist()[:10] == [1, 1, 0, 0, 0, 0, 0, 1, 1, 1]


# ---- batches ----


def test_every_image_comes_once_per_epoch_in_another_order():
    data = DataSet(TOY)
    stream = Stream(data.train, DataConfig(kind="toy", crop=0, flip=False), 32, seed=5)
    assert stream.per_epoch == 3
    epochs = [torch.cat([stream[3 * epoch + place][0] for place in range(3)]) for epoch in range(2)]
    seen = [keys(Images(pixels, torch.zeros(len(pixels)))) for pixels in epochs]
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(keys(data.train))
    assert seen[0] != seen[1]


def test_a_batch_depends_on_its_place_and_the_seed_only():
    pytest.importorskip("kornia")
    data = DataSet(TOY)
    before = torch.get_rng_state()
    first, again, other = (Stream(data.train, data.config, 32, seed) for seed in (5, 5, 6))
    for index in range(4):
        first[index]
    assert torch.equal(first[4][0], again[4][0])
    assert torch.equal(first[4][1], again[4][1])
    assert not torch.equal(first[4][0], other[4][0])
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_are_black_outside_and_unchanged_inside():
    pytest.importorskip("kornia")
    images = Images(torch.full((64, 3, 8, 8), 200, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    varied, _ = Stream(images, DataConfig(kind="toy", crop=2, flip=True), 64, seed=0)[0]
    values = torch.unique((255 * varied).round()).tolist()
    assert values == [0.0, 200.0]
    assert varied.shape == (64, 3, 8, 8)
    assert (varied == 0).any(dim=3).any(dim=2).any(dim=1).double().mean() > 0.8


def test_a_mirrored_border_holds_nothing_but_the_image():
    pytest.importorskip("kornia")
    pixels = torch.randint(1, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.arange(16))
    config = DataConfig(kind="toy", crop=2, border="reflect", flip=False)
    varied, names = Stream(images, config, 16, seed=0)[0]
    padded = torch.nn.functional.pad(pixels[names].to(torch.float32) / 255, (2, 2, 2, 2), mode="reflect")
    for ours, whole in zip(varied, padded, strict=True):
        cuts = [whole[:, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
        assert any(torch.allclose(ours, cut) for cut in cuts)
    assert not torch.allclose(varied, padded[:, :, 2:10, 2:10])


def test_a_rest_too_small_is_left_out():
    images = Images(torch.zeros((9, 3, 8, 8), dtype=torch.uint8), torch.zeros(9, dtype=torch.int64))
    config = DataConfig(kind="toy", crop=0, flip=False)
    assert Stream(images, config, 4, 0, least=2).per_epoch == 2
    assert Stream(images, config, 4, 0).per_epoch == 3
    with pytest.raises(ValueError, match="`data` must leave at least 16 images to train on, got 9"):
        Stream(images, config, 16, 0, least=16)


# ---- large data sets ----


def two_ways(folder, images: int, **settings) -> list[DataSet]:
    """The same data set decoded once, and batch by batch because it has more than so many images."""
    return [at(folder, memory_gb=limit, workers=2, **settings) for limit in (4.0, memory_for(images))]


def memory_for(images: int) -> float:
    """`data.memory_gb` for so many images of 8 x 8."""
    return images * 3 * 8 * 8 / (1 << 30)


def test_large_data_sets_are_decoded_batch_by_batch_and_give_the_same_batches(tmp_path):
    folder = hub_folder(tmp_path / "large", pairs(21), pairs(4, first=100))
    kept, large = two_ways(folder, 20, holdout=0.3)
    assert isinstance(kept.train, Images)
    assert isinstance(large.train, StoredImages)
    plain = DataConfig(kind="toy", crop=0, flip=False)
    streams = [Stream(data.train, plain, 4, seed=3) for data in (kept, large)]
    for index in (0, 1, 2, 3, 4, 7, 5, 6):  # some prepared, some not
        (pixels, labels), (same, too) = (stream[index] for stream in streams)
        assert torch.equal(pixels, same)
        assert torch.equal(labels, too)
    for split in ("calibration", "certification", "test"):
        assert keys(kept.evaluated(split)) == keys(large.evaluated(split))


def test_large_data_sets_are_thinned_and_relabelled_too(tmp_path):
    names = [str(index) for index in range(10)]
    folder = hub_folder(tmp_path / "tail", pairs(80, classes=10), pairs(20, classes=10), classes=names)
    kept, large = two_ways(folder, 60, relabel="cifar2", long_tail=2.0)
    assert torch.equal(kept.train.labels, large.train.labels)
    assert torch.equal(kept.train.decoded().pixels, large.train.decoded().pixels)


def test_images_that_must_be_decoded_whole_and_do_not_fit_are_told_how_much_they_need(tmp_path):
    folder = hub_folder(tmp_path / "large", pairs(20), pairs(12))
    with pytest.raises(ValueError, match=r"`data.memory_gb` must be at least 2.15e-06 for the test split of '.*large'"):
        at(folder, memory_gb=memory_for(11)).evaluated("test")
    few = hub_folder(tmp_path / "few", pairs(20), pairs(2))
    assert len(at(few, memory_gb=memory_for(10)).evaluated("calibration")) == 4
    with pytest.raises(ValueError, match=r"for the held-out part of the train split of '.*few', .* got 7.15256e-07"):
        at(few, memory_gb=memory_for(4), holdout=0.5).evaluated("calibration")


def test_a_corrupt_image_in_the_middle_of_an_epoch_is_named_by_its_row(tmp_path):
    rows = pairs(12)
    rows[7] = (rows[7][0][:60], 1)
    data = at(hub_folder(tmp_path / "cut", rows, pairs(4)), memory_gb=memory_for(11), holdout=0.0)
    stream = Stream(data.train, DataConfig(kind="toy", crop=0, flip=False), 4, seed=0)
    with pytest.raises(ValueError, match=r"a corrupt one in row 7 of the train split of '.*cut'"):
        for index in range(3):
            stream[index]


def test_an_odd_size_in_the_middle_of_an_epoch_is_named_by_its_row(tmp_path):
    rows = [*pairs(5), (png(9, side=12), 0)]
    data = at(hub_folder(tmp_path / "odd", rows, pairs(4)), memory_gb=memory_for(5), holdout=0.0)
    with pytest.raises(ValueError, match=r"row 5 of the train split .* must be 8 x 8 as the first, got 12 x 12"):
        data.train.batch(torch.arange(6))


# ---- bad input ----


def test_missing_columns_are_named(tmp_path):
    folder = hub_folder(tmp_path / "named", pairs(4), pairs(4), ("image", "target"))
    with pytest.raises(
        ValueError, match=r"`data.kind` cifar10 must have the column 'img', got image, target in the train"
    ):
        at(folder).evaluated("test")


def test_grey_images_are_named_by_their_row(tmp_path):
    folder = hub_folder(tmp_path / "grey", pairs(4), [*pairs(2), (png(5, mode="L"), 0), *pairs(1)])
    with pytest.raises(ValueError, match=r"must hold RGB images, got mode L in row 2 of the test split of '.*grey'"):
        at(folder).evaluated("test")


def test_odd_sizes_are_named_by_their_row(tmp_path):
    wide = hub_folder(tmp_path / "wide", pairs(4), [*pairs(1), (png(5, height=4), 0)])
    with pytest.raises(ValueError, match=r"square images, got 8 x 4 in row 1 of the test split .* Set `data.side`"):
        at(wide).evaluated("test")
    large = hub_folder(tmp_path / "large", pairs(4), [*pairs(1), (png(5, side=9), 0)])
    with pytest.raises(ValueError, match=r"row 1 of the test split of '.*large' must be 8 x 8 as the first, got 9 x 9"):
        at(large).evaluated("test")


def test_a_corrupt_image_is_named_by_its_row(tmp_path):
    rows = pairs(4)
    rows[3] = (rows[3][0][:60], 1)
    with pytest.raises(
        ValueError, match=r"images that decode, got a corrupt one in row 3 of the train split of '.*cut'"
    ):
        _ = at(hub_folder(tmp_path / "cut", rows, pairs(4))).train


def test_a_corrupt_file_is_named(tmp_path):
    for folder in ("train/ant", "train/bee", "test/ant", "test/bee"):
        (tmp_path / "files" / folder).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "files" / folder / f"{index}.png").write_bytes(png(index))
    (tmp_path / "files" / "test" / "ant" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"corrupt one in row 1 of the test split of .*files.*1\.png"):
        at(tmp_path / "files", kind="images").evaluated("test")


def test_a_label_out_of_range_is_named_by_its_row(tmp_path):
    folder = hub_folder(tmp_path / "range", pairs(4), [*pairs(2), (png(3), 4)], classes=None)
    with pytest.raises(ValueError, match=r"`label` in row 2 of the test split of '.*range' must be in 0..1, got 4"):
        at(folder).evaluated("test")


def changed_labels(folder, change):
    """The same parquet files with other labels."""
    import datasets

    for path in (folder / "plain_text").iterdir():
        change(datasets.Dataset.from_parquet(str(path))).to_parquet(str(path))
    return folder


def test_labels_that_are_text_are_refused_by_their_column(tmp_path):
    import datasets

    folder = hub_folder(tmp_path / "text", pairs(4), pairs(4), classes=None)
    changed_labels(folder, lambda rows: rows.cast_column("label", datasets.Value("string")))
    with pytest.raises(ValueError, match="`label` in '.*text' must be of whole numbers or named classes, got string"):
        at(folder).evaluated("test")


@pytest.mark.parametrize("label", [None, -1, 1 << 16])
def test_a_label_that_is_missing_or_no_class_is_refused_by_its_row(tmp_path, label):
    def third(row, index):
        return {"label": label} if index == 2 else {}

    folder = hub_folder(tmp_path / "odd", pairs(4), pairs(4), classes=None)
    changed_labels(folder, lambda rows: rows.map(third, with_indices=True))
    with pytest.raises(
        ValueError, match=rf"`label` in row 2 of the train split of '.*odd' must be in 0..65535, got {label}"
    ):
        _ = at(folder).train


def test_a_missing_label_among_named_classes_is_refused_by_its_row(tmp_path):
    rows = pairs(4)
    rows[3] = (rows[3][0], None)
    with pytest.raises(ValueError, match=r"`label` in row 3 of the test split of '.*odd' must be in 0..1, got None"):
        at(hub_folder(tmp_path / "odd", pairs(4), rows)).evaluated("test")


def test_a_class_without_a_printable_name_is_refused(tmp_path):
    folder = hub_folder(tmp_path / "odd", pairs(4), pairs(4), classes=("cat", "do\ng"))
    with pytest.raises(ValueError, match="must name classes in printable text"):
        _ = at(folder).classes


def test_an_empty_folder_a_missing_one_and_none_are_told_apart(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="`data.path` must hold images or parquet files, got the empty folder"):
        at(tmp_path / "empty").evaluated("test")
    with pytest.raises(ValueError, match="`data.path` must be a data set that `datasets` reads, got .*nowhere"):
        at(tmp_path / "nowhere").evaluated("test")
    with pytest.raises(ValueError, match="`data.path` must be a folder or a hub id, got none. Say --data PATH"):
        at("").evaluated("test")


def test_a_data_set_without_a_test_split_is_refused(tmp_path):
    folder = hub_folder(tmp_path / "half", pairs(4), pairs(4))
    (folder / "plain_text" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="`data.path` must have the splits train and test or .*, got train"):
        at(folder).evaluated("test")


def test_a_class_absent_from_the_held_out_split_is_named(tmp_path):
    rows = [*pairs(9, classes=1), (png(50), 1)]
    data = at(hub_folder(tmp_path / "rare", rows, pairs(4)), holdout=0.2)
    with pytest.raises(
        ValueError, match=r"`data.holdout` must leave .* got 0 of the 1 of class 'dog' in the train images"
    ):
        _ = data.train
    with pytest.raises(ValueError, match="of class 'dog'"):
        data.evaluated("calibration")


def test_dealing_is_by_class():
    first, rest = deal(np.array([0, 1] * 10), 0.3, ("a", "b"), "train")
    assert (len(first), len(rest)) == (6, 14)
    assert sorted([*first, *rest]) == list(range(20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mnist"}, "`data.kind` must be one of cifar10, cifar100, images, toy, got 'mnist'"),
        ({"holdout": 0.9}, r"`data.holdout` must be in \[0, 0.5\], got 0.9"),
        ({"holdout": float("nan")}, "`data.holdout`"),
        ({"relabel": "cifar2", "kind": "cifar100"}, "`data.relabel` must go with kind cifar10"),
        ({"long_tail": 0.5}, "`data.long_tail` must be at least 1"),
        ({"side": -1}, "`data.side`"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_an_image_is_what_its_file_says_it_is(tmp_path):
    # JPEG among PNGs: what is read does not depend on the first one's format.
    Image.fromarray(np.full((8, 8, 3), 90, dtype=np.uint8)).save(tmp_path / "a.jpg")
    rows = [*pairs(3), ((tmp_path / "a.jpg").read_bytes(), 1)]
    test = at(hub_folder(tmp_path / "mixed", pairs(4), rows)).evaluated("test")
    assert test.pixels[3].unique().tolist() == [90]
