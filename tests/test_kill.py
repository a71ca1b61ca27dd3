"""kill -9 at random moments: the same command then ends, bit for bit, where an uninterrupted training ends.

Three kills a stage in the suite; `RNG_KILLS=20 python -m pytest tests/test_kill.py` for more.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import same, write_random_alexnet
from PIL import Image

from rng.nafnet import NAFNet
from rng.support import checkpoint

ROOT = Path(__file__).resolve().parents[1]
KILLS = int(os.environ.get("RNG_KILLS", 3))
SAVES = 12 * KILLS
COMMON = "--save-every 2 --batch 2 --crop 32 --validation 1 --workers 1 --sigma 0-55 --device cpu"
OPTIONS = {"train_recon": "--width 4 --enc 1 --middle 1 --dec 1", "train_gen": "--base 4 --blocks 1"}


@pytest.mark.parametrize("script", OPTIONS)
def test_killed_training_ends_where_an_uninterrupted_one_does(script, tmp_path):
    (tmp_path / "pictures").mkdir()
    for n in range(5):
        pixels = np.random.default_rng(n).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{n}.png")
    stage, backbone = script.removeprefix("train_"), write_random_alexnet(tmp_path / "alexnet.npz")
    command = [sys.executable, ROOT / f"{script}.py", "--data", "images", "--root", tmp_path / "pictures",
               "--iterations", str(2 * SAVES), "--precision", "float32", *COMMON.split(),
               *OPTIONS[script].split()]

    def start(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if stage == "gen" and not (folder / "recon.pt").exists():
            torch.manual_seed(0)
            r = NAFNet(4, [1], 1, [1])
            checkpoint.save_weights(folder / "recon.pt", "recon", r.config, r, {})
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RNG_ALEXNET": str(backbone)}
        return subprocess.Popen([*command, "--model", folder], env=environment, stderr=subprocess.PIPE,
                                start_new_session=True, text=True)

    def log(name):
        path = tmp_path / name / f"train_{stage}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [{key: value for key, value in json.loads(line).items() if key != "images_per_s"}
                for line in lines if line.endswith("\n")]

    def finish(name):
        process = start(name)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error

    random = np.random.default_rng()
    for after in sorted(random.choice(np.arange(1, SAVES - 6), KILLS, replace=False)):  # saves, and a moment
        process = start("killed")
        while len(log("killed")) < after and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish("killed")
    finish("whole")
    assert log("killed") == log("whole") and len(log("whole")) == SAVES
    for file in (f"last_{stage}.pt", f"{stage}.pt"):
        killed, whole = (torch.load(tmp_path / name / file, weights_only=True)
                         for name in ("killed", "whole"))
        assert same(killed.get("state_dict", killed), whole.get("state_dict", whole))
    assert not [path for path in (tmp_path / "killed").iterdir() if path.suffix == ".tmp"]
