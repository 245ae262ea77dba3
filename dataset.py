"""The prepared stars as training and evaluation take them: the split, and batches on the device."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distributed
from cache import PreparedStars
from catalog import CLASS_NAMES, group_same_stars
from cli import DataError
from preparation import Batch, move

MIN_TRAINING_STARS = 3  # of fewer, outliers.py cannot tell the scatter
NETWORK_SHARE = 0.5  # of the GPU's memory that is left to the network; stars may take the rest
STARS_PER_COPY = 1024  # stars that are copied to the GPU at once


def split_stars(
    prepared: PreparedStars, validation_split: float, test_split: float, seed: int, *, all_classes: bool = True
) -> dict[str, np.ndarray]:
    """Indices of the "train", "validation" and "test" stars: stratified by class, no star in two parts.

    Raises DataError if a class or a part has too few stars. With `all_classes` false, such a class is split together
    with the nearest one that has enough; classes missing from a part are printed.
    """
    from sklearn.model_selection import train_test_split  # here: it takes a second, which other commands do not need

    star_group = group_same_stars(prepared.stars)
    groups, first = np.unique(star_group, return_index=True)
    group_class = prepared.targets.numpy()[first]
    needed = 2 if test_split == 0 else 3
    rows = Counter(star.subclass for star in prepared.stars)
    for name, count in zip(CLASS_NAMES, np.bincount(group_class, minlength=len(CLASS_NAMES)), strict=True):
        if all_classes and count < needed:
            raise DataError(
                f"class {name} has {rows[name]} usable spectra, of {count} star(s); every class needs at least "
                f"{needed} stars to be split; only --initial-checkpoint allows fewer"
            )

    def part(groups: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        classes, counts = np.unique(group_class[groups], return_counts=True)
        enough = classes[counts >= min(2, counts.max())]
        strata = enough[np.abs(group_class[groups, None] - enough).argmin(axis=1)]  # its class, or the nearest
        try:
            return train_test_split(groups, test_size=fraction, stratify=strata, random_state=seed)
        except ValueError:  # scikit-learn's reason: fewer stars in a part than classes
            raise DataError(
                f"{len(groups)} star(s) cannot be split by --validation-split and --test-split: each part needs at "
                f"least {len(enough)}, one for each class"
            ) from None

    held_out = np.array([], dtype=int)
    if test_split > 0:
        groups, held_out = part(groups, test_split)
    training, validation = part(groups, validation_split / (1 - test_split))
    parts = {"train": training, "validation": validation, "test": held_out}
    splits = {name: np.flatnonzero(np.isin(star_group, members)) for name, members in parts.items()}
    for name, indices in splits.items():
        absent = [CLASS_NAMES[k] for k in np.setdiff1d(range(len(CLASS_NAMES)), prepared.targets[indices])]
        if len(indices) and absent:
            message = f"no {', '.join(absent)} star in the {name} part"
            if all_classes:
                raise DataError(f"{message}: too few stars, or too small a part")
            print(message)
    if len(splits["train"]) < MIN_TRAINING_STARS:
        raise DataError(f"{len(splits['train'])} star(s) to train on; at least {MIN_TRAINING_STARS} are needed")
    return splits


def equal_batches(stars: int, batch_size: int, processes: int = 1) -> tuple[int, int]:
    """The number and size of an epoch's batches: equal ones, of at most `batch_size` stars.

    The stars left over, fewer than one a batch and process, are left out of this epoch.
    Raises DataError where there are fewer stars than processes.
    """
    count = math.ceil(stars / batch_size)
    size = stars // count // processes * processes
    if size == 0:
        raise DataError(f"batches of {min(stars, batch_size)} stars cannot be shared by {processes} processes")
    return count, size


class StarLoader:
    """Batches of some of the prepared stars, on a device. With several processes, each takes its share of every batch.

    A GPU with enough memory holds all stars, and a batch is indexed there. Otherwise the next batch is read from the
    cache while the last one is in use.
    """

    def __init__(self, prepared: PreparedStars, indices: np.ndarray, device: torch.device) -> None:
        self.device, self.indices = device, torch.as_tensor(indices)
        self.prepared, self.resident = prepared, None
        if device.type == "cuda" and len(indices):
            star_bytes = sum(part[:1].nbytes for part in (prepared.spectra, prepared.images) if part is not None)
            free, total = torch.cuda.mem_get_info(device)
            if len(indices) * star_bytes <= free - NETWORK_SHARE * total:
                self.resident = self._load()

    def __len__(self) -> int:
        return len(self.indices)

    def num_batches(self, batch_size: int) -> int:
        """The number of batches in an epoch."""
        return equal_batches(len(self), batch_size, distributed.world_size())[0]

    def epoch(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """The stars in random order, in equal batches of at most `batch_size`; see `equal_batches`."""
        count, size = equal_batches(len(self), batch_size, distributed.world_size())
        batches = torch.randperm(len(self), generator=generator)[: count * size].view(count, size)
        yield from self._batches(batches[:, distributed.rank() :: distributed.world_size()])

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """All stars in their order; with several processes, each has batches of its own."""
        batches = torch.arange(len(self)).split(batch_size)
        yield from self._batches(batches[distributed.rank() :: distributed.world_size()])

    def _batches(self, batches: Iterable[Tensor]) -> Iterator[Batch]:
        if self.resident is None:
            yield from prefetch(self._read, batches)
            return
        # The indices are copied before the first step, so that none waits for a copy.
        for rows in [rows.to(self.device) for rows in batches]:
            yield Batch(*(None if part is None else part[rows] for part in self.resident))

    def _load(self) -> Batch:
        """All stars on the device, copied there in chunks."""
        few = self._read(torch.arange(1))
        stars = Batch(*(None if part is None else part.new_empty(len(self), *part.shape[1:]) for part in few))
        for rows in torch.arange(len(self)).split(STARS_PER_COPY):
            for own, part in zip(stars, self._read(rows), strict=True):
                if own is not None:
                    own[rows[0] : rows[-1] + 1] = part
        return stars

    def _read(self, rows: Tensor) -> Batch:
        chosen, prepared = self.indices[rows], self.prepared
        parts = (None if part is None else part[chosen] for part in (prepared.spectra, prepared.images))
        return move(Batch(*parts, prepared.targets[chosen]), self.device)


def prefetch(read: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """read(item) for each item; the next one is read in a thread of its own while the caller uses the last."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            following = pool.submit(read, item)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def random_stream(seed: int, *keys: int) -> int:
    """The seed of an independent stream of random numbers for each (seed, keys): (42, 2) and (43, 1) share nothing."""
    return int(np.random.SeedSequence(seed, spawn_key=keys).generate_state(1, np.uint64)[0] >> 1)
