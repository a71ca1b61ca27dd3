"""The stream of training crops.

Sample i of iteration k is a function of (seed, k, i) alone: image, crop, flip, rotation, noise, and what a
stage draws beside them. So a resumed run, and one with other workers, sees exactly the same samples.
"""

import os
import signal
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from rng.support.data import training_sets, weights_of
from rng.support.device import rank, world_size
from rng.support.errors import InputError
from rng.support.images import to_tensor
from rng.support.noise import NoiseMix, wide_mix

CACHE_BYTES = 2 ** 30   # a set that fits is decoded once and kept, in each worker
GROUP, REUSE = 16, 64   # of a larger set 16 pictures are open at a time, each cut for 64 iterations
VALIDATION = 2 ** 40    # the "iteration" whose samples form the validation set
LABELS = 2 ** 41        # and the one whose samples become step labels


def cut(picture, top, left, size):
    """uint8 (H, W, 3) -> float32 (size, size, 3) in [0, 1]; a smaller picture is extended by reflection."""
    piece = picture[top:top + size, left:left + size]
    piece = np.pad(piece, ((0, size - piece.shape[0]), (0, size - piece.shape[1]), (0, 0)), mode="reflect")
    return piece.astype(np.float32) / 255


def random_place(picture, size, generator):
    """-> (top, left) of a random crop of uint8 (H, W, 3)."""
    height, width = picture.shape[:2]
    return tuple(int(generator.integers(max(1, side - size + 1))) for side in (height, width))


def places_of(weights, batch):
    """Where each data set's share of a batch begins, and where the last ends: ints, one more than weights."""
    return np.round(np.cumsum([0, *weights]) / sum(weights) * batch).astype(int)


class Crops(torch.utils.data.IterableDataset):
    """Batches of iterations start, ..., stop - 1: {"noisy", "clean": (N, 3, size, size), "name", "left_out"}.

    left_out: (name, why) of pictures that cannot be read; others take their places. sets: lists of Items.
    weights: their shares of each batch. draw(generator, shape) -> {name: tensor}: what else belongs to a
    sample, drawn after all the rest. part, parts: only this process's share of each batch.
    """

    def __init__(self, sets, weights, size, batch, mix, seed, start, stop, draw=None, part=0, parts=1):
        self.sets, self.size, self.batch, self.mix, self.seed = sets, size, batch, mix, seed
        self.start, self.stop, self.draw, self.part, self.parts = start, stop, draw, part, parts
        ends = places_of(weights, batch)
        self.slots = [(s, i - ends[s], ends[s + 1] - ends[s])  # (set, place in its share, its share)
                      for s in range(len(sets)) for i in range(ends[s], ends[s + 1])]
        self.fits = [_decoded_bytes(items) <= CACHE_BYTES for items in sets]
        self.held, self.unreadable, self.left_out = {}, set(), []

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        part, parts = self.part * parts + part, self.parts * parts
        mine = range(part * self.batch // parts, (part + 1) * self.batch // parts)
        for k in range(self.start, self.stop):
            try:
                samples = [self.sample(k, i) for i in mine]
            except InputError as error:
                if worker is None:
                    raise
                yield error  # raised by the parent: a DataLoader would wrap it in a traceback
                return
            yield {key: [sample[key] for sample in samples] if key == "name" else
                   torch.stack([sample[key] for sample in samples]) for key in samples[0]} | {
                       "left_out": self.left_out}
            self.left_out = []

    def sample(self, k, i):
        """Sample i of iteration k."""
        generator = np.random.default_rng([self.seed, k, i])
        name, (clean, noisy) = self._picture(k, i)
        place = *random_place(clean, self.size, generator), self.size
        quarter_turns, flip = generator.integers(4), generator.integers(2)

        def crop(picture):
            piece = cut(picture, *place)
            return np.rot90(piece[:, ::-1] if flip else piece, quarter_turns)

        clean = np.ascontiguousarray(crop(clean))
        clean, noisy = self.mix(clean, generator) if noisy is None else (clean, crop(noisy))
        sample = {"name": name, "noisy": to_tensor(noisy), "clean": to_tensor(clean)}
        return sample | (self.draw(generator, sample["clean"].shape) if self.draw else {})

    def _picture(self, k, i):
        """Name and decoded pictures of sample i: each place of the batch walks a seeded order of its set.

        Of a set too large to keep, GROUP pictures are open at a time and each serves REUSE iterations, as a
        16-megapixel PNG takes a second to decode.
        """
        s, place, places = self.slots[i]
        group, reuse = (places, 1) if self.fits[s] else (min(places, GROUP), REUSE)
        place = place * group // places
        serial = (k + place * reuse // group) // reuse * group + place
        turn, position = divmod(serial, len(self.sets[s]))
        order = _permutation(self.seed, s, turn, len(self.sets[s]))
        for index in np.roll(order, -position):     # the first that can be read
            item, key = self.sets[s][index], (s, index if self.fits[s] else place)
            try:
                if (s, index) in self.unreadable:
                    continue
                if key not in self.held or self.held[key][0] != index:
                    self.held[key] = (index, item.read())
                return item.name, self.held[key][1]
            except InputError as error:
                self.unreadable.add((s, index))
                self.left_out.append((item.name, str(error)))
        raise InputError(f"none of {len(order)} pictures can be read; the last one: {self.left_out[-1][1]}")


@lru_cache(maxsize=32)
def _permutation(seed, s, turn, length):
    return np.random.default_rng([seed, s, turn]).permutation(length)


def _decoded_bytes(items):
    total = 0
    for item in items:
        for source in (item.clean, item.noisy):
            if isinstance(source, Path):
                try:
                    with Image.open(source) as picture:
                        total += 3 * picture.width * picture.height
                except OSError:
                    pass    # left out when it is its turn
    return total


def batches(crops, workers):
    """Yields the batches of `crops` in order; workers > 0: processes that each make a part of every batch."""
    workers = min(workers, crops.batch // crops.parts)
    if workers == 0:
        yield from crops
        return
    loader = torch.utils.data.DataLoader(crops, batch_size=None, num_workers=workers,
                                         prefetch_factor=4,  # batches ahead: a slow picture delays none
                                         worker_init_fn=_leave_signals_to_parent)
    for parts in zip(*[iter(loader)] * workers):
        for part in parts:
            if isinstance(part, InputError):
                raise part
        yield {key: sum((part[key] for part in parts), []) if isinstance(parts[0][key], list) else
               torch.cat([part[key] for part in parts]) for key in parts[0]}


def _leave_signals_to_parent(worker):
    """A signal to the whole process group must not end the workers before the training has saved.

    They leave the group, and do not ignore SIGTERM, by which the parent ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()


class Stream:
    """The crops that the options of a training script ask for; pictures: their names.

    stream(start, stop) yields the batches of those iterations, under torchrun this process's share of them.
    """

    def __init__(self, args, draw=None):
        if args.batch % world_size():
            raise InputError(f"--batch {args.batch} is no multiple of the {world_size()} processes; give one")
        self.args, self.draw, self.weights = args, draw, weights_of(args)
        if 0 in np.diff(places_of(self.weights, args.batch)):
            raise InputError(f"--batch {args.batch} has no place for one of the data sets; give a larger one "
                             "or another --weight")
        self.sets, self.held_out = training_sets(args.data, args.root, args.validation)
        self.pictures, self.left_out = [[item.name for item in some] for some in self.sets], []
        self.mix = wide_mix if args.noise == "wide" else NoiseMix(args.sigma, args.camera, args.clip_noisy)

    def __call__(self, start, stop):
        args = self.args
        crops = Crops(self.sets, self.weights, args.crop, args.batch, self.mix, args.seed, start, stop,
                      self.draw, rank(), world_size())
        for batch in batches(crops, args.workers):
            batch["left_out"] += self.left_out
            self.left_out = []
            yield batch

    def validation(self, mix=None):
        """--validation crops of held-out pictures, the same at every call, with training's noise or `mix`."""
        args, mix = self.args, mix or self.mix
        batch = next(iter(Crops(self.held_out, self.weights, args.crop, args.validation, mix, args.seed,
                                VALIDATION, VALIDATION + 1, self.draw)))
        self.left_out += batch["left_out"]
        return batch
