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
from rng import checkpoint, crops, data, labels
from rng.nafnet import NAFNet
from rng.unet import UNet

COMMON = "--iterations 3 --save-every 1 --batch 4 --crop 32 --validation 2 --workers 0 --sigma 25 --device cpu --precision float32"
OPTIONS = {"train_recon": [*COMMON.split(), *"--width 4 --enc 1 --middle 1 --dec 1".split()],
           "train_gen": [*COMMON.split(), *"--base 4 --blocks 1".split()],
           "build_step_labels": "--patches 5 --size 64 --sigma 25 --device cpu --precision float32".split()}
SCRIPTS = {"train_recon": train_recon, "train_gen": train_gen, "build_step_labels": build_step_labels}

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures, a backbone, and equal folders of tiny r and g."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "pictures").mkdir()
    for n in range(4):
        pixels = np.random.default_rng(n).integers(0, 256, (80, 90, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{n}.png")
    write_random_alexnet(folder / "alexnet.npz")
    torch.manual_seed(0)
    r, g = NAFNet(4, [1], 1, [1]), UNet(4, [1, 2], 1)
    nn.init.normal_(g.ending.weight, std=0.05)
    settings = {"condition": "noisy", "target": "residual", "residual_scale": 8.0, "recon": checkpoint.fingerprint(r)}
    for name in ("alone", "together", "unreadable"):
        (folder / name).mkdir()
        checkpoint.save_weights(folder / name / "recon.pt", "recon", r.config, r, {})
        checkpoint.save_weights(folder / name / "gen.pt", "gen", {"unet": g.config, **settings}, g, {})
    return folder


def run_both(world, script):
    """Runs the script in this process on the folder `alone`, and in two under torchrun on `together`."""
    options = ["--data", "images", "--root", str(world / "pictures"), "--lpips-backbone", str(world / "alexnet.npz"),
               *OPTIONS[script]]
    assert SCRIPTS[script].main(["--model", str(world / "alone"), *options]) == 0
    done = subprocess.run([*TORCHRUN, SCRIPTS[script].__file__, "--model", str(world / "together"), *options],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["build_step_labels", "train_gen", "train_recon"])
def test_two_processes_do_the_work_of_one(script, world):
    run_both(world, script)
    if script == "build_step_labels":
        alone, first, second = ([json.loads(line) for line in (world / name).read_text().splitlines()] for name in (
            "alone/step_labels.jsonl", "together/step_labels.jsonl", "together/step_labels.1.jsonl"))
        assert [label["n"] for label in first] == [0, 2, 4] and [label["n"] for label in second] == [1, 3]
        assert sorted(first + second, key=lambda label: label["n"]) == alone
    else:
        name = f"train_{'recon' if script == 'train_recon' else 'gen'}.jsonl"
        alone, together = ([json.loads(line) for line in (world / folder / name).read_text().splitlines()]
                           for folder in ("alone", "together"))
        assert [line["iteration"] for line in together] == [1, 2, 3]
        for key in ("loss", "psnr"):
            assert [line[key] for line in together] == pytest.approx([line[key] for line in alone], rel=1e-4)


def test_a_picture_that_cannot_be_read_stops_no_process(world):
    """Both make the labels of the other pictures, the one that fails does not end the other, and the exit code says so."""
    def image_of(n):
        generator = np.random.default_rng([0, crops.LABELS, n])
        generator.choice(1, p=[1])
        return f"{generator.integers(4)}.png"

    folder, images = world / "unreadable", [image_of(n) for n in range(5)]
    bad = images[1]  # of the second process, which has less to do
    pictures = shutil.copytree(world / "pictures", folder / "pictures")
    (pictures / bad).write_bytes(b"no picture")
    done = subprocess.run([*TORCHRUN, build_step_labels.__file__, "--model", folder, "--data", "images", "--root", pictures,
                           "--lpips-backbone", world / "alexnet.npz", *OPTIONS["build_step_labels"]],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and re.search(f"error: . of the patches are not labelled: .*{bad}", done.stderr)
    assert [label["n"] for label in labels.read(folder)] == [n for n in range(5) if images[n] != bad]


@pytest.mark.parametrize("seed", range(8))
def test_the_shares_of_all_processes_are_the_batch(seed, world):
    random = np.random.default_rng(seed)
    world_size, batch = int(random.choice([1, 2, 3, 4])), 12
    items = data.items("images", world / "pictures")
    mix = crops.NoiseMix(((0, 55),))

    def batches(*share):
        return list(crops.Crops([items], [1], 16, batch, mix, seed, 5, 7, None, *share))

    shares = [batches(rank, world_size) for rank in range(world_size)]
    for k, whole in enumerate(batches()):
        assert sum((share[k]["name"] for share in shares), []) == whole["name"]
        for key in ("noisy", "clean"):
            assert torch.equal(torch.cat([share[k][key] for share in shares]), whole[key])


def test_a_batch_that_cannot_be_shared_is_refused(world, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert train_recon.main(["--model", str(world / "none"), "--data", "images", "--root", str(world / "pictures"),
                             *OPTIONS["train_recon"]]) == 2
    assert "multiple" in capsys.readouterr().err
