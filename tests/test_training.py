"""Training: exact resume, signals, refusals, and what is saved and logged, each script in process on tiny networks."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from helpers import same, write_random_alexnet
from PIL import Image
from torch import nn

import train_controller
import train_gen
import train_recon
from rng import checkpoint, crops, ddpm, figures, metrics, training
from rng.controller import STEPS
from rng.errors import InputError, script
from rng.files import append_line
from rng.nafnet import NAFNet
from rng.pipeline import RnG
from rng.unet import UNet

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"recon": train_recon.main, "gen": train_gen.main, "controller": train_controller.main}
COMMON = "--iterations 6 --save-every 3 --batch 2 --lr 1e-3 --device cpu --precision float32".split()
CROPS = "--sigma 0-55 --clip-noisy 0.5 --crop 16 --validation 2 --workers 0".split()
OPTIONS = {
    "recon": [*CROPS, *"--width 4 --enc 1 --middle 1 --dec 1".split()],
    "gen": [*CROPS, *"--base 4 --blocks 1".split()],
    "controller": ["--c", "2"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of six small pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for n in range(6):
        small = Image.fromarray(generator.integers(0, 256, (6, 7, 3), np.uint8))
        small.resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{n}.png")
    return folder


@pytest.fixture
def train(pictures, tmp_path, monkeypatch):
    """train(stage, name, *options) -> exit code; runs a script on the model folder tmp_path / name."""
    monkeypatch.setattr(metrics, "load_lpips", lambda backbone, device: None)
    monkeypatch.setattr(train_gen, "SCALE_BATCHES", 4)

    def train(stage, name, *options):
        folder = tmp_path / name
        if stage == "gen" and "--scheme" not in options and not folder.exists():
            folder.mkdir()
            torch.manual_seed(1)
            r = NAFNet(4, [1], 1, [1])
            checkpoint.save_weights(folder / "recon.pt", "recon", r.config, r, {})
        if stage == "controller" and not folder.exists():
            folder.mkdir()
            torch.manual_seed(1)
            g = UNet(4, [1], 1)
            config = {"unet": g.config, "condition": "noisy", "target": "residual", "residual_scale": 8.0}
            checkpoint.save_weights(folder / "gen.pt", "gen", config, g, {})
            (folder / "step_labels.jsonl").write_text("".join(label(n, checkpoint.fingerprint(g)) for n in range(10)))
        return SCRIPTS[stage](["--model", str(folder), "--data", "images", "--root", str(pictures),
                               *COMMON, *OPTIONS[stage], *options])

    return train


def label(n, made_with):
    lpips = np.random.default_rng(n).random(len(STEPS)).tolist()
    return json.dumps({"n": n, "set": 0, "image": f"{n % 6}.png", "top": n, "left": 2 * n, "size": 16, "sigma": 5.0 * n,
                       "clip": n % 2 == 0, "seed": n, "gen": made_with, "schedule": None, "lpips": lpips, "best": STEPS[int(np.argmin(lpips))]}) + "\n"


@pytest.fixture
def at_iteration(monkeypatch):
    """at_iteration(k, act): act(run, loss) -> loss is called at the start of iteration k's (from 1) optimiser step."""
    def arrange(k, act):
        def step(run, loss):
            real_step(run, act(run, loss) if run.iteration == k - 1 else loss)

        monkeypatch.setattr(training.Run, "step", step)

    real_step = training.Run.step
    return arrange


def sends(number):
    def act(run, loss):
        signal.raise_signal(number)
        return loss
    return act


def load(path):
    return torch.load(path, weights_only=True)


def log(folder, stage):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / f"train_{stage}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def same_weights(a, b):
    return same(load(a)["state_dict"], load(b)["state_dict"]) and load(a)["config"] == load(b)["config"]


def refusal(capsys):
    """The one line on stderr that starts with `error: `."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


# Resume.

@pytest.mark.parametrize("stage, options, number", [
    ("recon", [], signal.SIGINT),
    ("recon", ["--cosine", "--arch", "unet", "--base", "4", "--blocks", "1"], signal.SIGTERM),
    ("gen", ["--condition", "both"], signal.SIGTERM),
    ("gen", ["--cosine", "--scheme", "intermediate"], signal.SIGINT),
    ("controller", [], signal.SIGINT),
    ("controller", ["--cosine"], signal.SIGTERM),
])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
        stage, options, number, train, at_iteration, tmp_path, capsys):
    handler = signal.getsignal(number)
    assert train(stage, "whole", *options) == 0
    at_iteration(3, sends(number))
    with pytest.raises(SystemExit) as stop:
        train(stage, "stopped", *options)
    assert stop.value.code == 128 + number
    assert "stopped and saved at iteration 3" in capsys.readouterr().err
    assert signal.getsignal(number) == handler
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert load(stopped / f"last_{stage}.pt")["iteration"] == 3

    assert train(stage, "stopped", *options) == 0
    assert "going on at iteration 3" in capsys.readouterr().err
    assert same(load(whole / f"last_{stage}.pt"), load(stopped / f"last_{stage}.pt"))
    for path in whole.glob("*.pt"):
        assert path.name.startswith("last_") or same_weights(path, stopped / path.name)
    assert log(whole, stage) == log(stopped, stage)
    assert [line["iteration"] for line in log(whole, stage)] == [3, 6]


def test_a_signal_between_two_saves_saves_and_free_options_may_change(train, at_iteration, tmp_path):
    assert train("recon", "whole") == 0
    at_iteration(2, sends(signal.SIGTERM))
    with pytest.raises(SystemExit):
        train("recon", "stopped")
    assert load(tmp_path / "stopped" / "last_recon.pt")["iteration"] == 2
    assert (tmp_path / "stopped" / "recon.pt").exists()
    (tmp_path / "stopped").rename(tmp_path / "moved")
    assert train("recon", "moved", "--workers", "2", "--save-every", "4", "--device", "auto") == 0
    whole, moved = (load(tmp_path / name / "last_recon.pt") for name in ("whole", "moved"))
    assert same(whole, moved)


def test_workers_do_not_change_the_result(train, tmp_path):
    for name, workers in (("none", "0"), ("one", "1"), ("two", "2")):
        assert train("recon", name, "--workers", workers, "--batch", "3", "--iterations", "2") == 0
    for name in ("one", "two"):
        assert same(load(tmp_path / "none" / "last_recon.pt"), load(tmp_path / name / "last_recon.pt"))


def test_the_same_command_after_the_end_changes_nothing(train, tmp_path):
    assert train("gen", "model") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert train("gen", "model") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_another_seed_is_another_training(train, tmp_path):
    for seed in ("0", "1"):
        assert train("recon", seed, "--seed", seed, "--iterations", "1") == 0
    assert not same_weights(tmp_path / "0" / "recon.pt", tmp_path / "1" / "recon.pt")


@pytest.mark.parametrize("options", [
    "--lr 2e-3", "--batch 3", "--iterations 7", "--cosine", "--clip-grad 2", "--seed 1", "--weight-decay 0",
    "--sigma 15", "--width 8", "--ema 0.9", "--precision bfloat16"])
def test_changed_settings_are_refused(options, train, at_iteration, tmp_path, capsys):
    at_iteration(1, sends(signal.SIGINT))
    with pytest.raises(SystemExit):
        train("recon", "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert train("recon", "model", *options.split()) == 2
    assert f"another {options.split()[0].removeprefix('--')} " in refusal(capsys)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_g_does_not_go_on_with_another_r(train, at_iteration, tmp_path, capsys):
    at_iteration(1, sends(signal.SIGINT))
    with pytest.raises(SystemExit):
        train("gen", "model")
    r = NAFNet(4, [1], 1, [1])
    nn.init.normal_(r.ending.weight)
    checkpoint.save_weights(tmp_path / "model" / "recon.pt", "recon", r.config, r, {})
    assert train("gen", "model") == 2
    assert "another recon " in refusal(capsys)


@pytest.mark.parametrize("scheme", ["joint", "intermediate"])
def test_a_joint_training_does_not_overwrite_a_trained_r(scheme, train, tmp_path, capsys):
    assert train("recon", "model") == 0
    before = (tmp_path / "model" / "recon.pt").read_bytes()
    assert train("gen", "model", "--scheme", scheme) == 2
    assert "recon.pt would be overwritten" in refusal(capsys)
    assert (tmp_path / "model" / "recon.pt").read_bytes() == before


@pytest.mark.parametrize("spelling", ["--preset small", "--preset=small", "--pres small"])
@pytest.mark.parametrize("stage", [train_recon, train_gen, train_controller])
def test_a_preset_is_taken_however_it_is_spelled(stage, spelling, monkeypatch):
    seen, parse = [], training.parse

    def remember(*given):
        seen.append(parse(*given))
        raise InputError("enough")

    monkeypatch.setattr(training, "parse", remember)
    assert stage.main(spelling.split()) == 2
    assert seen[0].batch == stage.PRESETS["small"]["batch"]


def test_ctrl_c_in_a_terminal_reaches_the_workers_too(pictures, tmp_path):
    command = [sys.executable, train_recon.__file__, "--model", tmp_path, "--data", "images", "--root", pictures,
               *COMMON, *OPTIONS["recon"], "--iterations", "1000000", "--save-every", "1000000", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not (tmp_path / "train_recon.jsonl").exists() and process.poll() is None:  # its first line of progress
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error and "stopped and saved" in error
    assert load(tmp_path / "last_recon.pt")["iteration"] == load(tmp_path / "recon.pt")["info"]["iteration"] >= 50


# A training that goes wrong.

@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_loss_of_nan_keeps_the_last_checkpoint_and_the_log_goes_on_from_there(
        stage, train, at_iteration, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "REPORT_EVERY", 1)
    assert train(stage, "whole") == 0
    handler, kept = signal.getsignal(signal.SIGINT), {}

    def become_nan(run, loss):
        kept.update({path.name: path.read_bytes() for path in (tmp_path / "model").glob("*.pt")})
        return loss * math.nan

    at_iteration(5, become_nan)
    assert train(stage, "model") == 2
    message = refusal(capsys)
    assert "nan at iteration 5" in message and "--lr" in message
    assert ".png" in message  # of which pictures
    assert signal.getsignal(signal.SIGINT) == handler
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").glob("*.pt")} == kept
    assert load(tmp_path / "model" / f"last_{stage}.pt")["iteration"] == 3
    assert [line["iteration"] for line in log(tmp_path / "model", stage)] == [1, 2, 3, 4]

    with open(tmp_path / "model" / f"train_{stage}.jsonl", "a") as file:
        file.write('{"iteration": 5, "lo')  # a line torn by a kill
    at_iteration(0, None)
    assert train(stage, "model") == 0
    assert log(tmp_path / "model", stage) == log(tmp_path / "whole", stage)
    assert [line["iteration"] for line in log(tmp_path / "model", stage)] == [1, 2, 3, 4, 5, 6]
    assert same(load(tmp_path / "model" / f"last_{stage}.pt"), load(tmp_path / "whole" / f"last_{stage}.pt"))


@pytest.mark.parametrize("workers", ["0", "1", "2"])
def test_a_picture_damaged_behind_its_header_is_one_sentence(pictures, tmp_path, workers):
    """In a process of its own, for worker processes must not outlive it."""
    shutil.copytree(pictures, tmp_path / "pictures")
    for n in range(1, 6):  # the first one is for validation
        path = tmp_path / "pictures" / f"{n}.png"
        path.write_bytes(path.read_bytes()[:-600])
    root = tmp_path / "pictures"
    command = [sys.executable, ROOT / "train_recon.py", "--model", tmp_path / "model", "--data", "images", "--root", root, *COMMON,
               *OPTIONS["recon"], "--validation", "1", "--workers", workers]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert process.stderr.startswith("error: cannot read") and process.stderr.count("\n") == 1


def test_a_loss_of_nan_at_the_first_iteration_writes_nothing(train, at_iteration, tmp_path, capsys):
    at_iteration(1, lambda run, loss: loss * math.nan)
    assert train("recon", "model") == 2
    assert "iteration 1" in refusal(capsys)
    assert not (tmp_path / "model").exists() or not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize("stage", ["recon", "gen"])
def test_weights_of_nan_are_reported_beside_a_perceptual_loss_too(stage, train, at_iteration, monkeypatch, tmp_path, capsys):
    def spoil(run, loss):
        run.parameters[0].data *= math.nan
        return loss

    at_iteration(1, spoil)
    monkeypatch.setenv("RNG_ALEXNET", str(write_random_alexnet(tmp_path / "alexnet.npz")))
    assert train(stage, "model", "--perceptual-weight", "1", "--crop", "40") == 2
    assert "nan at iteration" in refusal(capsys)


def test_a_full_disk_while_logging_is_one_sentence():
    with pytest.raises(InputError, match="could not be written"):
        append_line("/dev/full", "{}")


def test_a_log_or_state_that_is_none_is_refused(train, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    torch.save([1, 2], tmp_path / "model" / "last_recon.pt")
    assert train("recon", "model") == 2
    assert "is not the state of this training" in refusal(capsys)
    torch.save({"settings": {}, "iteration": 1, "optimizer": {}, "recon": None}, tmp_path / "model" / "last_recon.pt")
    assert train("recon", "model") == 2
    assert "last_recon.pt was made with another" in refusal(capsys)


@pytest.mark.parametrize("line", ["no JSON", "{}", "[]", '{"iteration": "first"}', "\x00"])
def test_a_damaged_log_is_refused(train, tmp_path, capsys, line):
    assert train("recon", "model", "--iterations", "2") == 0
    with open(tmp_path / "model" / "train_recon.jsonl", "a") as file:
        file.write(line + "\n")
    capsys.readouterr()
    assert train("recon", "model", "--iterations", "2") == 2
    assert "train_recon.jsonl is damaged" in refusal(capsys)


def test_no_curves_of_a_damaged_log(tmp_path):
    (tmp_path / "train_gen.jsonl").write_text('{"iteration": 1, "loss": 1, "psnr": 20}\n{"iter')
    with pytest.raises(InputError, match="train_gen.jsonl is damaged"):
        figures.training_curves(tmp_path)


@pytest.mark.parametrize("key", ["optimizer", "recon", "iteration"])
def test_a_damaged_state_is_refused(train, tmp_path, capsys, key):
    assert train("recon", "model", "--iterations", "2") == 0
    state = load(tmp_path / "model" / "last_recon.pt")
    torch.save(state | {key: {}}, tmp_path / "model" / "last_recon.pt")
    capsys.readouterr()
    assert train("recon", "model", "--iterations", "2") == 2
    assert "last_recon.pt is damaged" in refusal(capsys)


def test_ctrl_c_outside_a_loop_ends_in_a_word(capsys):
    @script
    def main(argv=None):
        raise KeyboardInterrupt

    assert main([]) == 130 and capsys.readouterr().err == "stopped\n"


def test_sizes_that_no_network_or_metric_takes(train, capsys):
    assert train("gen", "model", "--base", "5") == 2
    assert "--base must be even" in refusal(capsys)
    assert train("recon", "model", "--perceptual-weight", "1", "--crop", "16") == 2
    assert "--crop of at least 31" in refusal(capsys)


def test_a_gradient_of_nan_does_not_reach_a_checkpoint(train, at_iteration, tmp_path, capsys):
    def spoil(run, loss):
        run.parameters[0].register_hook(lambda gradient: gradient * math.nan)
        return loss

    at_iteration(3, spoil)
    assert train("recon", "model") == 2
    assert "iteration 3" in refusal(capsys)
    assert not list((tmp_path / "model").glob("*.pt"))


class Killed(Exception):
    """Ends a script where a kill -9 would."""


@pytest.mark.parametrize("save", [1, 2])
@pytest.mark.parametrize("name", ["gen.pt", "last_gen.pt", "train_gen.jsonl"])
def test_a_kill_while_saving_is_made_good_by_the_same_command(name, save, train, tmp_path, monkeypatch):
    """At any of its files, at the first save and at the last."""
    assert train("gen", "whole") == 0
    count, real_replace, real_save = 0, os.replace, training.Run._save

    def replace(source, target):
        if count == save and Path(target).name == name:
            raise Killed
        real_replace(source, target)

    def saving(run, info):
        nonlocal count
        count += 1
        if count == save and name == "train_gen.jsonl":
            raise Killed
        real_save(run, info)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace)
        patch.setattr(training.Run, "_save", saving)
        train("gen", "model")
    assert train("gen", "model") == 0
    assert same_weights(tmp_path / "whole" / "gen.pt", tmp_path / "model" / "gen.pt")
    assert log(tmp_path / "whole", "gen") == log(tmp_path / "model", "gen")


@pytest.mark.parametrize("failing", ["os.replace", "torch.save"])
def test_a_save_that_fails_leaves_the_old_file_alone(failing, tmp_path, monkeypatch):
    path, network = tmp_path / "controller.pt", nn.Conv2d(3, 3, 1)
    checkpoint.save_weights(path, "controller", {}, network, {})
    before = path.read_bytes()

    def fail(content, place):
        Path(content if failing == "os.replace" else place).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(InputError, match="could not be written"):
        checkpoint.save_weights(path, "controller", {}, nn.Conv2d(3, 3, 1), {})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["controller.pt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, a disk without space")
def test_a_full_disk_is_one_sentence(train, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".last_recon.pt.tmp").symlink_to("/dev/full")
    assert train("recon", "model") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and "could not be written" in lines[-1]
    assert not list((tmp_path / "model").glob("last_recon.pt*"))


# One optimiser step.

def tiny_run(folder, clip_grad=1e9, ema=0.9999, cosine=False):
    """A Run of 8 iterations on a network with batch normalisation -> (run, network)."""
    args = argparse.Namespace(model=folder, iterations=8, batch=4, lr=0.1, weight_decay=0.0, clip_grad=clip_grad,
                              ema=ema, cosine=cosine, save_every=1000, device="cpu", precision="float32", compile=False)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2 * 4 * 4, 1))

    def stream(start, stop):
        for k in range(start, stop):
            yield {"x": torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(k))}

    run = training.Run(args, "tiny", {"tiny": network}, stream, lambda networks: {}, lambda networks, info: None)
    return run, network


@pytest.mark.parametrize("ema", [0.9999, 0.3])
def test_the_average_warms_up(ema, tmp_path):
    run, network = tiny_run(tmp_path, ema=ema)
    expected = [parameter.detach().double().clone() for parameter in network.parameters()]
    for k, batch in enumerate(run.batches()):
        run.step(network(batch["x"]).square().mean())
        decay = min(ema, (k + 1) / (k + 10))
        expected = [decay * average + (1 - decay) * parameter.detach().double()
                    for average, parameter in zip(expected, network.parameters())]
        averaged = run.averaged["tiny"]
        for average, parameter in zip(averaged.parameters(), expected):
            torch.testing.assert_close(average.double(), parameter, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, averaged.buffers(), network.buffers()))
    assert network[1].num_batches_tracked == 8


@pytest.mark.parametrize("largest", [1e-3, 1e9])
def test_gradients_are_clipped_to_a_norm(largest, tmp_path):
    run, network = tiny_run(tmp_path, clip_grad=largest)
    for batch in run.batches():
        loss = network(batch["x"]).square().mean()
        full = torch.autograd.grad(loss, run.parameters, retain_graph=True)
        norm = torch.stack([gradient.norm() for gradient in full]).norm()
        run.step(loss)
        for gradient, parameter in zip(full, run.parameters):
            torch.testing.assert_close(parameter.grad, gradient * min(1, largest / norm.item()), rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("cosine", [False, True])
def test_learning_rate(cosine, tmp_path):
    run, network = tiny_run(tmp_path, cosine=cosine)
    rates = []
    for batch in run.batches():
        run.step(network(batch["x"]).square().mean())
        rates.append(run.optimizer.param_groups[0]["lr"])
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(8) / 8)) if cosine else np.full(8, 0.1)
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert rates[0] == 0.1


def test_reconstruction_loss():
    clean, estimate = np.random.default_rng(0).random((2, 3, 3, 5, 4), np.float32)
    squared = (clean.astype(np.float64) - estimate) ** 2
    psnr = [-10 * np.log10(one.mean()) for one in squared]
    both = torch.from_numpy(clean), torch.from_numpy(estimate)
    assert training.reconstruction_loss(*both).item() == pytest.approx(squared.mean(), rel=1e-6)
    assert training.reconstruction_loss(*both, "psnr").item() == pytest.approx(-np.mean(psnr), rel=1e-6)


# What is written.

def assert_plain(value):
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        [assert_plain(entry) for entry in value.values()]
    elif isinstance(value, list):
        [assert_plain(entry) for entry in value]
    else:
        assert value is None or type(value) in (str, int, float, bool, torch.Tensor)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_weight_files(stage, train, tmp_path):
    assert train(stage, "model") == 0
    content = load(tmp_path / "model" / f"{stage}.pt")
    assert content.keys() == {"kind", "config", "state_dict", "info"} and content["kind"] == stage
    assert_plain({**content, "state_dict": dict(content["state_dict"])})
    assert content["info"]["iteration"] == 6 and content["info"]["settings"]["lr"] == 1e-3
    averaged = load(tmp_path / "model" / f"last_{stage}.pt")[stage]["averaged"]
    assert content["state_dict"].keys() == averaged.keys()
    for name, tensor in content["state_dict"].items():
        if "num_batches_tracked" in name:
            assert tensor.dtype == torch.int64
        else:
            assert averaged[name].dtype == torch.float32
            assert tensor.dtype == (torch.float32 if "running_" in name else torch.float16)
        assert torch.equal(tensor, averaged[name].to(tensor.dtype))
    networks = {"recon": checkpoint.load_recon, "gen": lambda path: checkpoint.load_gen(path)[0],
                "controller": lambda path: checkpoint.load_controller(path)[0]}
    config = networks[stage](tmp_path / "model" / f"{stage}.pt").config  # the network made again from its file
    stored = content["config"].get("unet", content["config"])
    assert config == {key: value for key, value in stored.items() if key != "made_with"}


def test_log_and_validation(train, tmp_path, monkeypatch):
    seen, real_stream = [], crops.training_stream

    def remember(*arguments):
        seen.append(real_stream(*arguments))
        return seen[-1]

    monkeypatch.setattr(crops, "training_stream", remember)
    monkeypatch.setattr(training, "REPORT_EVERY", 2)
    assert train("recon", "model", "--save-every", "4", "--validation", "3") == 0
    lines = [json.loads(line) for line in (tmp_path / "model" / "train_recon.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    assert all(line["loss"] > 0 and line["images_per_s"] > 0 for line in lines)
    assert [line.get("psnr", 0) > 0 for line in lines] == [False, True, True]
    held_out = seen[0][1]
    assert held_out["clean"].shape == (3, 3, 16, 16)
    with torch.no_grad():  # the averaged weights, as the weight file holds them
        estimate = checkpoint.load_recon(tmp_path / "model" / "recon.pt")(held_out["noisy"]).clamp(0, 1)
    assert metrics.psnr(estimate, held_out["clean"]).mean().item() == pytest.approx(lines[-1]["psnr"], abs=0.02)


def test_controller_validation(train, tmp_path):
    assert train("controller", "model", "--holdout", "0.4", "--iterations", "3") == 0
    [line] = log(tmp_path / "model", "controller")
    found, held_out = train_controller.held_out_first([json.loads(label(n, "")) for n in range(10)], 0.4)
    scores = np.array([label["lpips"] for label in found])
    fixed = scores[held_out:].mean(axis=0).argmin()
    assert line["lpips_oracle"] == pytest.approx(scores[:held_out].min(axis=1).mean(), abs=1e-6)
    assert line["lpips_fixed"] == pytest.approx(scores[:held_out, fixed].mean(), abs=1e-6)
    assert line["fixed_steps"] == STEPS[fixed]
    assert line["lpips_oracle"] <= line["lpips"] and 0 <= line["accuracy"] <= 1 and 0 <= line["mean_steps"] <= 100


@pytest.mark.parametrize("temperature", [0, 0.01, 0.1])
def test_labels_become_targets(train, monkeypatch, temperature):
    """One-hot of the best count, or softmax(-LPIPS / temperature)."""
    targets = []
    real = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, target: (targets.append(target), real(logits, target))[1])
    assert train("controller", "model", "--temperature", str(temperature), "--iterations", "2") == 0
    scores = np.array([json.loads(label(n, ""))["lpips"] for n in range(10)])
    one_hot, soft = np.eye(11)[scores.argmin(1)], scipy.special.softmax(-scores / (temperature or 1), axis=1)
    expected = soft if temperature else one_hot
    assert len(targets) == 2
    for target in torch.cat(targets).numpy():
        assert np.abs(target - expected).max(axis=1).min() < 1e-5


# Stage 2's variants.

def test_two_stages_leave_r_untouched(train, tmp_path):
    r, folder = NAFNet(4, [1], 1, [1]), tmp_path / "model"
    folder.mkdir()
    checkpoint.save_weights(folder / "recon.pt", "recon", r.config, r, {})
    before = (folder / "recon.pt").read_bytes()
    assert train("gen", "model", "--iterations", "2", "--condition", "initial", "--precision", "bfloat16") == 0
    assert (folder / "recon.pt").read_bytes() == before
    assert load(folder / "gen.pt")["config"]["condition"] == "initial"
    assert "recon" not in load(folder / "last_gen.pt")


@pytest.mark.parametrize("scheme, iterations, learns", [
    ("joint", 1, False),        # g is zero at the start, so Eq. 5 has no gradient for r yet
    ("joint", 3, True),
    ("intermediate", 1, True),  # Eq. 4 has
])
def test_joint_schemes_train_r(scheme, iterations, learns, train, tmp_path):
    assert train("gen", "model", "--scheme", scheme, "--iterations", str(iterations)) == 0
    content = checkpoint.load_weights(tmp_path / "model" / "recon.pt", "recon")
    assert content["config"]["arch"] == "unet" and content["config"]["noise_level"] is False
    assert bool(content["state_dict"]["ending.weight"].any()) == learns  # zero at the start
    assert load(tmp_path / "model" / "gen.pt")["config"]["residual_scale"] == 1


def test_the_condition_both_has_two_pictures(train, tmp_path):
    assert train("gen", "model", "--condition", "both", "--iterations", "1") == 0
    g, settings = checkpoint.load_gen(tmp_path / "model" / "gen.pt")
    assert settings["condition"] == "both" and g.intro.in_channels == 9


def test_target_clean_puts_a_constant_for_r(train, pictures, tmp_path):
    assert train("gen", "model", "--target", "clean", "--iterations", "1") == 0
    model = RnG.load(tmp_path / "model", "cpu")
    assert model.settings["target"] == "clean"
    assert torch.equal(model.reconstruct(torch.rand(1, 3, 8, 8)), torch.full((1, 3, 8, 8), 0.5))
    std = np.std([np.asarray(Image.open(path)) / 255 - 0.5 for path in pictures.iterdir()])
    assert 1 / model.settings["residual_scale"] == pytest.approx(std, rel=0.2)


def test_residual_scale_is_measured_once(train, at_iteration, tmp_path):
    r = UNet(4, blocks=1, noise_level=False)  # the identity: the residual is the noise
    (tmp_path / "model").mkdir()
    checkpoint.save_weights(tmp_path / "model" / "recon.pt", "recon", r.config, r, {})
    options = ["--sigma", "25", "--clip-noisy", "0"]
    at_iteration(1, sends(signal.SIGINT))
    with pytest.raises(SystemExit):
        train("gen", "model", *options)
    path = tmp_path / "model" / "gen.pt"
    content = load(path)
    assert content["config"]["residual_scale"] == pytest.approx(255 / 25, rel=0.03)
    content["config"]["residual_scale"] = 7.0
    torch.save(content, path)
    assert train("gen", "model", *options) == 0  # reads it back
    assert load(path)["config"]["residual_scale"] == 7.0


def test_residual_scale_can_be_given(train, tmp_path):
    assert train("gen", "model", "--residual-scale", "1", "--iterations", "1") == 0
    assert load(tmp_path / "model" / "gen.pt")["config"]["residual_scale"] == 1.0


def test_training_starts_from_an_official_checkpoint(train, tmp_path):
    torch.manual_seed(5)
    official = NAFNet(4, [1, 2], 1, [2, 1]).half().float()
    path = tmp_path / "nafnet.pth"
    torch.save({"params": {f"module.{name}": value for name, value in official.state_dict().items()}}, path)
    assert train("recon", "model", "--init", str(path), "--lr", "0", "--iterations", "1") == 0
    r = checkpoint.load_recon(tmp_path / "model" / "recon.pt")
    assert r.config == official.config
    assert same(dict(r.state_dict()), dict(official.state_dict()))


def test_own_estimate_of_a_g_that_knows_is_what_it_knows():
    d_0, cond, eps = (torch.from_numpy(np.random.default_rng(n).standard_normal((4, 3, 8, 8))) for n in range(3))

    def g(x, d_t, gamma):
        gamma = gamma[:, None, None, None]
        return (d_t - gamma.sqrt() * d_0) / (1 - gamma).sqrt()

    assert torch.allclose(train_gen.own_estimate(g, cond, eps).double(), d_0, atol=1e-4)


def test_own_estimates_take_the_place_of_every_second_sample(train, monkeypatch):
    seen = []
    monkeypatch.setattr(train_gen, "own_estimate", lambda g, cond, eps: torch.full_like(eps, 3.0))
    real = ddpm.loss
    monkeypatch.setattr(ddpm, "loss", lambda g, x, d_0, *rest, **further: (seen.append(d_0), real(g, x, d_0, *rest, **further))[1])
    assert train("gen", "model", "--own-estimate") == 0
    assert all((d_0[::2] == 3).all() and (d_0[1::2] != 3).any() for d_0 in seen) and seen


@pytest.mark.parametrize("options, share", [((), 1), (("--own-estimate",), 2)])
def test_lpips_judges_the_samples_whose_truth_is_known(options, share, train, monkeypatch):
    judged = []

    class Judge(nn.Module):
        def forward(self, y_hat, y):
            judged.append(len(y))
            return (y_hat - y).abs().mean((1, 2, 3))

    monkeypatch.setattr(metrics, "load_lpips", lambda backbone, device: None)
    monkeypatch.setattr(metrics, "LPIPS", lambda backbone: Judge())
    assert train("gen", "model", "--perceptual-weight", "1", "--batch", "4", *options) == 0
    assert judged == [4 // share] * 6


def test_gen_starts_from_another_gen(train, tmp_path, capsys):
    assert train("gen", "first") == 0
    first = tmp_path / "first" / "gen.pt"
    assert train("gen", "second", "--init", str(first), "--lr", "0", "--iterations", "1", "--base", "8") == 0
    assert same(load(first)["state_dict"], load(tmp_path / "second" / "gen.pt")["state_dict"])
    assert train("gen", "third", "--init", str(first), "--condition", "both") == 2
    assert "--condition" in refusal(capsys)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_takes_the_same_steps(train, tmp_path):
    assert train("recon", "eager", "--iterations", "2") == train("recon", "compiled", "--iterations", "2", "--compile") == 0
    eager, compiled = (load(tmp_path / name / "recon.pt")["state_dict"] for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    assert all(torch.allclose(eager[key].float(), compiled[key].float(), atol=2e-3) for key in eager)


def test_a_first_stage_without_data_or_with_a_file_for_a_folder(train, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train("recon", "file") == 2
    assert "file" in refusal(capsys)
    assert train("recon", "model", "--root", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in refusal(capsys) and not (tmp_path / "model").exists()
