"""The stream of training crops.

Sample i of iteration k is a function of (seed, k, i) alone: image, crop, flip, rotation, noise, and for stage 2 the
noise level and eps. So a resumed run, and one with other workers, sees exactly the same samples.
"""

import os
import signal
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from rng import data, ddpm, distributed, noise
from rng.errors import InputError

CACHE_BYTES = 2 ** 30   # a set that fits is decoded once and kept, in each worker
GROUP, REUSE = 16, 64   # one that does not: 16 pictures at a time, each cut for 64 iterations
VALIDATION = 2 ** 40    # the "iteration" whose samples form the validation set
LABELS = 2 ** 41        # and the one whose samples become step labels


class NoiseMix(NamedTuple):
    """Which noise is added to clean crops, drawn anew for each.

    sigma: ((low, high), ...) on the 0-255 scale, one range drawn, then a value in it; camera: probability of camera
    noise in place of Gaussian; clip: probability that the noisy crop is clipped and rounded to 8 bit.
    """

    sigma: tuple
    camera: float = 0.0
    clip: float = 0.0

    def draw(self, generator):
        """-> (sigma on the 0-255 scale, or "camera"; whether to clip and round)."""
        low, high = self.sigma[generator.integers(len(self.sigma))]
        sigma = generator.uniform(low, high)
        return "camera" if generator.random() < self.camera else sigma, bool(generator.random() < self.clip)


def add_noise(clean, sigma, clip, generator):
    """clean: float32 (H, W, 3) in [0, 1]; sigma, clip as NoiseMix.draw returns them -> noisy, the same shape."""
    if sigma == "camera":
        noisy = noise.camera_noise(clean, generator)
    else:
        noisy = noise.gaussian_noise(clean, sigma / 255, generator)
    return noise.quantise(noisy) if clip else noisy


def cut(picture, top, left, size):
    """uint8 (H, W, 3) -> float32 (size, size, 3) in [0, 1]; a picture smaller than size is extended by reflection."""
    piece = picture[top:top + size, left:left + size]
    piece = np.pad(piece, ((0, size - piece.shape[0]), (0, size - piece.shape[1]), (0, 0)), mode="reflect")
    return piece.astype(np.float32) / 255


def to_tensor(picture):
    """numpy (H, W, 3) -> tensor (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))


def random_place(picture, size, generator):
    """-> (top, left) of a random crop of uint8 (H, W, 3)."""
    height, width = picture.shape[:2]
    return int(generator.integers(max(1, height - size + 1))), int(generator.integers(max(1, width - size + 1)))


def shares_of(weights, batch):
    """Where the share of each data set begins in a batch, and its end: ints, one more than weights."""
    return np.round(np.cumsum([0, *weights]) / sum(weights) * batch).astype(int)


class Crops(torch.utils.data.IterableDataset):
    """Batches of training crops for the iterations start, ..., stop - 1.

    sets: lists of Items; weights: their shares of each batch; schedule: a ddpm.Schedule for stage 2, which adds
    gamma (N,) float64 and eps (N, 3, size, size) to each batch's noisy and clean (N, 3, size, size) and their names.
    rank, world_size: only this process's share of each batch.
    """

    def __init__(self, sets, weights, size, batch, mix, seed, start, stop, schedule=None, rank=0, world_size=1):
        self.sets, self.size, self.batch, self.mix, self.seed = sets, size, batch, mix, seed
        self.start, self.stop, self.schedule = start, stop, schedule
        self.rank, self.world_size = rank, world_size
        shares = shares_of(weights, batch)
        self.slots = [(s, i - shares[s], shares[s + 1] - shares[s])        # of each sample: set, place, places in all
                      for s in range(len(sets)) for i in range(shares[s], shares[s + 1])]
        self.fits = [_decoded_bytes(items) <= CACHE_BYTES for items in sets]
        self.held = {}

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        part, parts = self.rank * parts + part, self.world_size * parts
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
                   torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def sample(self, k, i):
        """Sample i of iteration k."""
        generator = np.random.default_rng([self.seed, k, i])
        name, (clean, noisy) = self._picture(k, i)
        place = *random_place(clean, self.size, generator), self.size
        quarter_turns, flip = generator.integers(4), generator.integers(2)

        def crop(picture):
            piece = cut(picture, *place)
            return np.rot90(piece[:, ::-1] if flip else piece, quarter_turns)

        clean = crop(clean)
        noisy = add_noise(clean, *self.mix.draw(generator), generator) if noisy is None else crop(noisy)
        sample = {"name": name, "noisy": to_tensor(noisy), "clean": to_tensor(clean)}
        if self.schedule is None:
            return sample
        gamma = torch.tensor(ddpm.draw_gamma(self.schedule, generator), dtype=torch.float64)
        eps = torch.from_numpy(generator.standard_normal(sample["clean"].shape, dtype=np.float32))
        return sample | {"gamma": gamma, "eps": eps}

    def _picture(self, k, i):
        """Name and decoded picture of sample i: each place in the batch walks through a seeded permutation of its set.

        Of a set too large to keep, GROUP pictures are open at a time and each serves REUSE iterations: a 16-megapixel
        PNG takes a second to decode.
        """
        s, place, places = self.slots[i]
        group, reuse = (places, 1) if self.fits[s] else (min(places, GROUP), REUSE)
        place = place * group // places
        serial = (k + place * reuse // group) // reuse * group + place
        turn, position = divmod(serial, len(self.sets[s]))
        index = _permutation(self.seed, s, turn, len(self.sets[s]))[position]
        key = (s, index if self.fits[s] else place)
        if key not in self.held or self.held[key][0] != index:
            self.held[key] = (index, self.sets[s][index].read())
        return self.sets[s][index].name, self.held[key][1]


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
                except OSError as error:
                    raise InputError(f"cannot read {source}: it is damaged; remove or replace it") from error
    return total


def batches(crops, workers):
    """Yields the batches of `crops` in order; with workers > 0 that many processes each make a part of every batch."""
    workers = min(workers, crops.batch // crops.world_size)
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
        yield {key: sum((part[key] for part in parts), []) if key == "name" else
               torch.cat([part[key] for part in parts]) for key in parts[0]}


def _leave_signals_to_parent(worker):
    """A signal to the whole process group must not end the workers before the training has saved.

    They leave the group, and do not ignore SIGTERM, by which the parent ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):  # not on Windows
        os.setsid()


def training_stream(args, schedule=None):
    """The crops that the options of a training script ask for -> (stream, validation batch).

    stream(start, stop) yields the batches of those iterations, under torchrun this process's share of them; the
    validation batch is made as they are, of pictures held out, and is the same at every call. schedule: as for Crops.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    if args.batch % world_size:
        raise InputError(f"--batch {args.batch} cannot be shared evenly among {world_size} processes; give a multiple")
    train, held_out = data.training_items(args, args.validation)
    args.pictures = data.fingerprint(train)  # a setting: other pictures are no resuming
    weights = args.weight or [1] * len(train)
    if 0 in np.diff(shares_of(weights, args.batch)):
        raise InputError(f"--batch {args.batch} has no place for one of the data sets; give a larger one or another --weight")
    mix = NoiseMix(args.sigma, args.camera, args.clip_noisy)

    def stream(start, stop):
        crops = Crops(train, weights, args.crop, args.batch, mix, args.seed, start, stop, schedule, rank, world_size)
        return batches(crops, args.workers)

    validation = Crops(held_out, weights, args.crop, args.validation, mix, args.seed,
                       VALIDATION, VALIDATION + 1, schedule)
    return stream, next(iter(validation))
