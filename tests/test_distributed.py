"""Two processes under torchrun train and label as one does."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import write_random_alexnet
from PIL import Image
from torch import nn

import build_step_labels
import train_gen
import train_recon
from rng import folder, search
from rng.nafnet import NAFNet
from rng.support import checkpoint, crops, data
from rng.support.noise import NoiseMix
from rng.unet import UNet

DEVICE = "--sigma 25 --device cpu --precision float32"
COMMON = f"--iterations 3 --save-every 1 --batch 4 --crop 32 --validation 2 --workers 0 {DEVICE}"
SCRIPTS = {train_recon: f"{COMMON} --width 4 --enc 1 --middle 1 --dec 1",
           train_gen: f"{COMMON} --base 4 --blocks 1",
           build_step_labels: f"--patches 5 --size 64 {DEVICE}"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures, a backbone, and equal folders of tiny r and g."""
    world = tmp_path_factory.mktemp("world")
    (world / "pictures").mkdir()
    for n in range(4):
        pixels = np.random.default_rng(n).integers(0, 256, (80, 90, 3), np.uint8)
        Image.fromarray(pixels).save(world / "pictures" / f"{n}.png")
    write_random_alexnet(world / "alexnet.npz")
    torch.manual_seed(0)
    r, g = NAFNet(4, [1], 1, [1]), UNet(4, [1, 2], 1)
    nn.init.normal_(g.ending.weight, std=0.05)
    config = {"unet": g.config, **folder.GenSettings(residual_scale=8.0)._asdict()}
    for name in ("train_gen1", "train_gen2", "build_step_labels1", "build_step_labels2", "unreadable"):
        (world / name).mkdir()
        checkpoint.save_weights(world / name / "recon.pt", "recon", r.config, r, {})
        checkpoint.save_weights(world / name / "gen.pt", "gen", config, g, {})
    return world


def arguments(world, script, name, pictures="pictures"):
    return ["--model", str(world / name), "--data", "images", "--root", str(world / pictures),
            "--lpips-backbone", str(world / "alexnet.npz"), *SCRIPTS[script].split()]


def torchrun(script, arguments):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           "2",
                           script.__file__, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_two_processes_do_the_work_of_one(script, world):
    one, two = (world / f"{script.__name__}{n}" for n in (1, 2))
    assert script.main(arguments(world, script, one)) == 0
    done = torchrun(script, arguments(world, script, two))
    assert done.returncode == 0, done.stderr

    def lines(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    if script is build_step_labels:
        alone, first, second = (sorted(lines(path), key=lambda label: label["n"]) for path in (
            one / "step_labels.jsonl", two / "step_labels.jsonl", two / "step_labels.1.jsonl"))
        assert [label["n"] for label in first] == [0, 2, 4] and [label["n"] for label in second] == [1, 3]
        both = sorted(first + second, key=lambda label: label["n"])
        for a, b in zip(alone, both, strict=True):  # other patches share a batch
            assert a.pop("lpips") == pytest.approx(b.pop("lpips"), abs=1e-5) and a == b
    else:
        alone, together = (lines(model / f"{script.__name__}.jsonl") for model in (one, two))
        assert [line["iteration"] for line in together] == [1, 2, 3]
        for key in ("loss", "psnr"):
            assert [line[key] for line in together] == pytest.approx([line[key] for line in alone], rel=1e-4)


def test_a_picture_that_cannot_be_read_stops_no_process(world):
    """Both label the other pictures, the one that fails does not end the other, and the exit code says so."""
    def image_of(n):
        generator = np.random.default_rng([0, crops.LABELS, n])
        generator.choice(1, p=[1])
        return f"{generator.integers(4)}.png"

    model, images = world / "unreadable", [image_of(n) for n in range(5)]
    bad = images[1]  # of the second process, which has less to do
    pictures = shutil.copytree(world / "pictures", model / "pictures")
    (pictures / bad).write_bytes(b"no picture")
    done = torchrun(build_step_labels, arguments(world, build_step_labels, model, pictures))
    assert done.returncode != 0 and re.search(f"error: . of the patches are not labelled: .*{bad}",
                                              done.stderr)
    assert [label.n for label in search.read_labels(model)] == [n for n in range(5) if images[n] != bad]


@pytest.mark.parametrize("seed", range(8))
def test_the_shares_of_all_processes_are_the_batch(seed, world):
    parts = int(np.random.default_rng(seed).choice([1, 2, 3, 4]))
    items = data.items("images", world / "pictures")

    def batches(*part):
        return crops.Crops([items], [1], 16, 12, NoiseMix(((0, 55),)), seed, 5, 7, None, *part)

    for whole, *shares in zip(batches(), *(batches(part, parts) for part in range(parts)), strict=True):
        assert sum((share["name"] for share in shares), []) == whole["name"]
        for key in ("noisy", "clean"):
            assert torch.equal(torch.cat([share[key] for share in shares]), whole[key])


def test_a_batch_that_cannot_be_shared_is_refused(world, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train_recon.main(arguments(world, train_recon, "none")) == 2
    assert "multiple" in capsys.readouterr().err
