"""The split, and batches in their order."""

import threading

import numpy as np
import pytest
import torch
from common import random_stars

from cache import PreparedStars, read_stars
from cli import DataError
from dataset import StarLoader, equal_batches, prefetch, random_stream, split_stars


def labels_alone(per_class: int) -> PreparedStars:
    return random_stars(per_class, image_size=1)._replace(spectra=None, images=None)


# The split


def test_the_split_is_stratified_complete_and_reproducible():
    prepared = labels_alone(40)
    splits = split_stars(prepared, 0.2, 0.1, seed=1)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(200))
    for part, size in (("train", 28), ("validation", 8), ("test", 4)):
        assert np.bincount(prepared.targets[splits[part]]).tolist() == [size] * 5
    again, other = (split_stars(prepared, 0.2, 0.1, seed=seed) for seed in (1, 2))
    assert all(np.array_equal(splits[part], again[part]) for part in splits)
    assert not np.array_equal(splits["validation"], other["validation"])


@pytest.mark.parametrize("seed", range(3))
def test_no_star_is_in_two_parts(seed):
    """Each star stands there one to four times, as several nights' spectra at nearly one place."""
    prepared, rng = labels_alone(40), np.random.default_rng(seed)
    rows = np.repeat(np.arange(200), rng.integers(1, 5, 200))
    stars = [
        prepared.stars[i]._replace(name=f"row {row}", mjd=row, dec=rng.uniform(-0.9, 0.9) / 3600)
        for row, i in enumerate(rows)
    ]
    splits = split_stars(prepared._replace(stars=stars, targets=prepared.targets[rows]), 0.25, 0.1, seed)
    parts = [set(rows[indices]) for indices in splits.values()]
    assert sum(map(len, parts)) == 200 and sum(map(len, splits.values())) == len(rows)


@pytest.mark.parametrize(
    "per_class, fractions, message",
    [
        (2, (0.2, 0.0), r"10 star\(s\) cannot be split .* at least 5, one for each"),
        (2, (0.5, 0.2), "every class needs at least 3 stars"),
        (1, (0.2, 0.0), r"class M0 has 1 usable spectra, of 1 star\(s\); every class needs at least 2 stars"),
    ],
)
def test_too_few_stars_are_refused(per_class, fractions, message):
    with pytest.raises(DataError, match=message):
        split_stars(labels_alone(per_class), *fractions, seed=0)


def test_a_part_without_a_class_is_refused():
    prepared = labels_alone(20)
    rows = [i for i in range(100) if i < 82]  # two M4
    few = prepared._replace(stars=[prepared.stars[i] for i in rows], targets=prepared.targets[rows])
    with pytest.raises(DataError, match="no M4 star in the train part"):
        split_stars(few, 0.9, 0.0, seed=0)


def test_classes_that_are_absent_can_be_allowed(capsys):
    """One M1, no M3: the others are split as evenly as ever."""
    prepared = labels_alone(20)
    rows = np.flatnonzero((prepared.targets != 3).numpy() & ((prepared.targets != 1).numpy() | (np.arange(100) == 20)))
    few = prepared._replace(stars=[prepared.stars[i] for i in rows], targets=prepared.targets[rows])
    splits = split_stars(few, 0.2, 0.2, seed=0, all_classes=False)
    counts = {part: np.bincount(few.targets[indices], minlength=5) for part, indices in splits.items()}
    assert sum(counts.values()).tolist() == [20, 1, 20, 0, 20]
    assert all(11 <= count <= 13 for count in counts["train"][[0, 2, 4]])
    assert all(3 <= count <= 5 for part in ("validation", "test") for count in counts[part][[0, 2, 4]])
    printed = capsys.readouterr().out
    for part in splits:
        assert f"no {'M3' if counts[part][1] else 'M1, M3'} star in the {part} part" in printed
    with pytest.raises(DataError, match="class M1 has 1 usable"):
        split_stars(few, 0.2, 0.2, seed=0)
    with pytest.raises(DataError, match=r"3 star\(s\) cannot be split"):
        split_stars(few._replace(stars=few.stars[19:22], targets=few.targets[19:22]), 0.2, 0.0, 0, all_classes=False)


@pytest.mark.parametrize(
    "count, message",
    [
        (1, r"^1 star\(s\) cannot be split by --validation-split and --test-split: .* at least 1, one for each class$"),
        (2, r"^1 star\(s\) to train on; at least 3 are needed$"),
    ],
)
def test_a_few_stars_alone_are_refused_where_classes_may_be_absent(count, message):
    prepared = labels_alone(20)
    few = prepared._replace(stars=prepared.stars[:count], targets=prepared.targets[:count])
    with pytest.raises(DataError, match=message):
        split_stars(few, 0.2, 0.0, seed=0, all_classes=False)


# Batches


@pytest.mark.parametrize(
    "stars, batch_size, processes, expected",
    [(320, 32, 1, (10, 32)), (33, 32, 1, (2, 16)), (7, 32, 1, (1, 7)), (33, 32, 2, (2, 16)), (33, 16, 4, (3, 8))],
)
def test_batches_are_equal_and_few_stars_are_left_over(stars, batch_size, processes, expected):
    count, size = equal_batches(stars, batch_size, processes)
    assert (count, size) == expected and size <= batch_size and size % processes == 0
    assert stars - count * size < count * processes


def test_fewer_stars_than_processes_are_refused():
    with pytest.raises(DataError, match="^batches of 3 stars cannot be shared by 4 processes$"):
        equal_batches(3, 32, 4)


@pytest.fixture
def loader() -> StarLoader:
    return StarLoader(random_stars(8), np.arange(3, 36), torch.device("cpu"))


def test_an_epoch_is_every_star_once_in_an_order_of_its_own(loader):
    def order(seed: int) -> list[int]:
        batches = list(loader.epoch(11, torch.Generator().manual_seed(seed)))
        assert [len(batch.targets) for batch in batches] == [11, 11, 11]
        known = {tuple(spectrum[0, :3].tolist()): i for i, spectrum in enumerate(loader.prepared.spectra)}
        rows = [known[tuple(spectrum[0, :3].tolist())] for batch in batches for spectrum in batch.spectra]
        for place, row in enumerate(rows):
            batch, i = batches[place // 11], place % 11
            assert torch.equal(batch.images[i], loader.prepared.images[row])
            assert batch.targets[i] == loader.prepared.targets[row]
        return rows

    first, again, other = order(1), order(1), order(2)
    assert sorted(first) == list(range(3, 36)) and first == again != other


def test_evaluation_takes_all_stars_in_their_order(loader):
    batches = list(loader.in_order(10))
    assert [len(batch.targets) for batch in batches] == [10, 10, 10, 3]
    assert torch.equal(torch.cat([batch.spectra for batch in batches]), loader.prepared.spectra[3:36])


def test_an_input_that_is_not_read_is_none():
    prepared = random_stars(2)._replace(images=None)
    (batch,) = StarLoader(prepared, np.arange(10), torch.device("cpu")).in_order(10)
    assert batch.images is None and batch.spectra.shape == (10, 2, 3522)


def test_the_next_item_is_read_while_the_last_is_used():
    begun = [threading.Event() for _ in range(3)]
    for i in prefetch(lambda i: begun[i].set() or i, range(3)):
        assert all(event.wait(10) for event in begun[: i + 2])


def test_an_error_of_reading_comes_out():
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda x: 1 / x, [1, 0]))


def test_random_streams_have_nothing_in_common():
    """Neither those of neighbouring seeds and epochs, nor those of one epoch's processes."""
    keys = [(seed, epoch, *rank) for seed in range(40, 45) for epoch in range(1, 6) for rank in ((), (1,), (2,))]
    streams = {key: random_stream(*key) for key in keys}
    assert len(set(streams.values())) == 75 and streams[42, 2] == random_stream(42, 2)
    draws = {key: torch.rand(1000, generator=torch.Generator().manual_seed(s)) for key, s in streams.items()}
    assert not torch.isin(draws[42, 2], draws[43, 1]).any()


def test_stars_held_on_the_device_come_in_the_same_batches(stars_dir):
    prepared, _ = read_stars(stars_dir, "fusion", num_workers=1)
    loader, batches = StarLoader(prepared, np.arange(3, 17), torch.device("cpu")), []
    for stars in (None, loader._load()):
        loader.resident = stars  # as on a GPU with room for them
        order = torch.Generator().manual_seed(1)
        batches.append([*loader.in_order(13), *loader.epoch(5, order)])
    assert batches[0][1].spectra.shape == (1, 2, 3522)  # the last of 14 stars is alone
    for read, held in zip(*batches, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(read, held, strict=True))
