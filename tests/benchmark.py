"""How fast it is here, as tables in Markdown; run by hand on a machine with nothing else to do:

    python tests/benchmark.py                       everything
    python tests/benchmark.py pictures networks     these parts
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rng import metrics, scoring, search, tiling  # noqa: E402
from rng.nafnet import LayerNorm2d, NAFBlock, NAFNet, reconstruction_loss  # noqa: E402
from rng.pipeline import RnG  # noqa: E402
from rng.support import data, device  # noqa: E402
from rng.support.crops import Crops, batches  # noqa: E402
from rng.support.images import read_rgb, to_8_bit  # noqa: E402
from rng.support.noise import NoiseMix  # noqa: E402
from rng.unet import UNet  # noqa: E402
from test_metrics import slow_niqe  # noqa: E402

HERE = device.pick()
SIDE = tiling.PATCH  # of the pictures that the networks are timed on


def seconds(f, runs=7):
    """Median time of f() after one call to warm up."""
    taken = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        f()
        if HERE.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def table(*rows):
    """Prints rows of cells, the first one as the header."""
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows[1:]:
        cells = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row)
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def to_device(network):
    return network.to(HERE, memory_format=torch.channels_last)


def noisy_picture(height, width):
    """tests/data/noisy.png, repeated to this size, uint8."""
    picture = read_rgb(ROOT / "tests" / "data" / "noisy.png")
    turns = -(-height // picture.shape[0]), -(-width // picture.shape[1])
    return np.ascontiguousarray(np.tile(picture, (*turns, 1))[:height, :width])


class PlainLayerNorm(LayerNorm2d):
    """Layer by layer, as formulas are written."""

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        y = centred / (centred.square().mean(1, keepdim=True) + self.eps).sqrt()
        return self.weight[:, None, None] * y + self.bias[:, None, None]


class PlainBlock(NAFBlock):
    """The same block layer by layer."""

    def forward(self, x):
        y = self.sg(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.conv3(y * self.sca(y)) * self.beta
        return x + self.conv5(self.sg(self.conv4(self.norm2(x)))) * self.gamma


def plain(network):
    """The NAFNet with the same weights, computed layer by layer."""
    for module in network.modules():
        module.__class__ = {NAFBlock: PlainBlock, LayerNorm2d: PlainLayerNorm}.get(type(module), type(module))
    return network


def networks():
    """One evaluation of g against a large convolution; NAFNet against its layers one by one."""
    x = torch.rand(1, 3, SIDE, SIDE, device=HERE).contiguous(memory_format=torch.channels_last)
    gamma = torch.full((1,), 0.5, dtype=torch.float64, device=HERE)
    rows = []
    wide = to_device(torch.nn.Conv2d(256, 256, 3, padding=1))
    deep = torch.rand(1, 256, SIDE, SIDE, device=HERE).contiguous(memory_format=torch.channels_last)
    cases = {"3x3 convolution, 256 channels": lambda: wide(deep)}
    for base in (32, 48):
        g = to_device(UNet(base, (1, 2, 3, 4), 1)).eval()
        cases[f"g, base {base}, one patch"] = lambda g=g: g(x, x, gamma)
        four = [z.expand(4, *z.shape[1:]) for z in (x, x, gamma)]
        cases[f"g, base {base}, four patches"] = lambda g=g: g(*four)
    for name, f in cases.items():
        with torch.inference_mode(), device.autocast(HERE):
            with FlopCounterMode(display=False) as counter:
                f()
            rows.append((name, counter.get_total_flops() / 1e9, seconds(f)))
    peak = rows[0][1] / rows[0][2]
    table((f"network, {SIDE} x {SIDE}", "GFLOP", "seconds", "TFLOP/s", "share of the convolution's"),
          *((name, flop, time, flop / time / 1e3, flop / time / peak) for name, flop, time in rows))

    rows = []
    for name, change in (("NAFNet, small preset", lambda r: r), ("layer by layer", plain)):
        torch.manual_seed(0)
        r = change(to_device(NAFNet(24, (1, 1, 2, 2), 2, (1, 1, 1, 1))))

        def forward():
            with torch.inference_mode(), device.autocast(HERE):
                return r(x)

        def step():
            with device.autocast(HERE):
                y = r(x)
            reconstruction_loss(x, y, "psnr").backward()

        rows.append((name, seconds(forward), seconds(step)))
    table((f"r, {SIDE} x {SIDE}", "forward, s", "training step, s"), *rows)


def precision():
    """The shipped model in bfloat16 and in float32, both against the clean picture."""
    lpips = metrics.load_lpips()
    clean, noisy = scoring.inputs(data.items("sample")[0], 25, 256)
    rows = []
    for name in ("float32", "bfloat16"):
        y = RnG.load("default", precision=name).denoise(noisy, steps=50)
        distance, _, psnr, _ = scoring.measure(lpips, to_8_bit(y), clean)
        rows.append((name, f"{psnr:.3f}", f"{distance:.4f}"))
    table(("256 x 256, sigma 25, 50 steps", "PSNR, dB", "LPIPS"), *rows)


def pictures():
    """denoise.py on four sizes: seconds and peak memory; evaluations of g that the controller saves."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for height, width, steps in (*((side, side, "auto") for side in (512, 1024, 2048, 4096)),
                                     (1000, 50_000, "1"), (7072, 7072, "1")):
            Image.fromarray(noisy_picture(height, width)).save(Path(folder) / "in.png")
            started = time.perf_counter()
            subprocess.run([sys.executable, ROOT / "denoise.py", "in.png", "out.png", "--steps", steps],
                           cwd=folder, check=True, capture_output=True)
            # the most so far: it ascends
            memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2 ** 20
            taken = time.perf_counter() - started
            rows.append((f"{width} x {height}", steps, taken, taken / (height * width / 1e6), memory))
    table(("picture", "steps", "seconds", "seconds per megapixel", "peak memory, GB"), *rows)
    model = RnG.load("default")
    started = time.perf_counter()
    steps = model.denoise(noisy_picture(1024, 1024), parts=True).steps
    taken = time.perf_counter() - started
    x = torch.rand(1, 3, 256, 256, device=HERE).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), device.autocast(HERE):
        one = seconds(lambda: model.gen(x, x, torch.full((1,), 0.5, dtype=torch.float64, device=HERE)))
    table(("1024 x 1024", "evaluations of g", "times that of one 256 x 256 patch, s", "seconds"),
          ("s chooses", steps.sum(), float(steps.sum() * one), taken),
          ("100 steps everywhere", 100 * steps.size, 100 * steps.size * one, "-"))


class PackageLPIPS(metrics.LPIPS):
    """The same distance in the order of operations of the lpips package: heads as 1 x 1 convolutions."""

    def _directions(self, x):
        x = (2 * x - 1 - self.shift) / self.scale
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU):
                yield x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

    def forward(self, x, y):
        layers = zip(list(self._directions(x)), list(self._directions(y)), self.heads)
        return sum(torch.nn.functional.conv2d((u - v) ** 2, head[None]).mean((2, 3))[:, 0]
                   for u, v, head in layers)


def scores():
    """LPIPS and NIQE, each against the plain way to write it, on one megapixel; step labels."""
    x = torch.from_numpy(noisy_picture(1024, 1024)).permute(2, 0, 1)[None].contiguous() / 255
    rows = [("NIQE", seconds(lambda: metrics.niqe(x), 3)),
            ("NIQE block by block", seconds(lambda: slow_niqe(x[0]), 1))]
    lpips = metrics.load_lpips()
    if lpips:
        package = PackageLPIPS()
        assert torch.allclose(package(x, x.flip(3)), lpips(x, x.flip(3)), rtol=1e-4)
        rows.append(("LPIPS", seconds(lambda: lpips(x, x.flip(3)))))
        rows.append(("LPIPS as the lpips package writes it", seconds(lambda: package(x, x.flip(3)))))
        model, patch = RnG.load("default"), x[:, :, :128, :128]
        rows.append(("one step label, 128 x 128", seconds(
            lambda: search.label_patches(model, lpips, patch, patch, [0]), 2)))
    table(("metric", "seconds"), *rows)


def waiting():
    """Share of the time that training on 16-megapixel PNG pairs waits for crops, two worker processes."""
    with tempfile.TemporaryDirectory() as folder:
        for n in range(20):
            for kind in ("noisy", "clean"):
                (Path(folder) / kind).mkdir(exist_ok=True)
                picture = Image.fromarray(np.roll(noisy_picture(4096, 4096), 97 * n, 1))
                picture.save(Path(folder) / kind / f"{n}.png", compress_level=1)
        items = data.items("pairs", folder)
        stream = batches(Crops([items], [1], 80, 16, NoiseMix(((0, 55),)), 0, 0, 200), workers=2)
        r = to_device(NAFNet(24, (1, 1, 2, 2), 2, (1, 1, 1, 1)))
        next(stream)
        started, waited, before = time.perf_counter(), 0.0, time.perf_counter()
        for batch in stream:
            waited += time.perf_counter() - before
            with device.autocast(HERE):
                y = r(batch["noisy"].to(HERE))
            reconstruction_loss(batch["clean"].to(HERE), y, "psnr").backward()
            before = time.perf_counter()
        table(("16-megapixel pairs, small preset, 199 iterations", "seconds", "share waiting for data"),
              ("", time.perf_counter() - started, waited / (time.perf_counter() - started)))


def processes():
    """Images a second of both training stages, with one process and with two."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("recon", "gen"):
            for count in (1, 2) if HERE.type == "cpu" else {1, torch.cuda.device_count()}:
                options = f"--preset small --data sample --iterations 101 --save-every 1000 --seed {count}"
                subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc_per_node", str(count), ROOT / f"train_{stage}.py", "--model", folder,
                                *options.split()], check=True, capture_output=True)
                log = (Path(folder) / f"train_{stage}.jsonl").read_text().splitlines()
                rows.append((stage, count, json.loads(log[1])["images_per_s"]))
                (Path(folder) / f"last_{stage}.pt").unlink()
    table(("stage", "processes", "images/s"), *rows)


# pictures first: the peak memory of a process counts from what the one that started it held
PARTS = {part.__name__: part for part in (pictures, networks, precision, scores, waiting, processes)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parts = parser.parse_args().parts or list(PARTS)
    if not set(parts) <= set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}")
    print(f"torch {torch.__version__}, {HERE}, {torch.get_num_threads()} threads, "
          f"{'bfloat16' if device.bfloat16_pays(HERE) else 'float32'}\n")
    for name, part in PARTS.items():
        if name in parts:
            part()
