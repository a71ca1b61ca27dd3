"""Training on tiny networks: exact resume, signals, refusals, what is saved and logged."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import same, write_random_alexnet
from PIL import Image
from torch import nn

import train_controller
import train_gen
import train_recon
from rng import ddpm, folder, metrics, search
from rng.controller import STEPS
from rng.finish import ANCHOR, GRID, WARM_UP, finishing_loss, start_from
from rng.nafnet import NAFNet, reconstruction_loss
from rng.pipeline import RnG
from rng.support import checkpoint, crops, training
from rng.support.errors import script
from rng.unet import UNet

SCRIPTS = {"recon": train_recon, "gen": train_gen, "controller": train_controller}
COMMON = "--iterations 6 --save-every 3 --batch 2 --lr 1e-3 --device cpu --precision float32"
CROPS = f"{COMMON} --sigma 0-55 --clip-noisy 0.5 --validation 2 --workers 0"
OPTIONS = {"recon": f"{CROPS} --crop 16 --width 4 --enc 1 --middle 1 --dec 1",
           "gen": f"{CROPS} --crop 32 --base 4 --blocks 1", "controller": f"{COMMON} --c 2"}
FINISH = "--finish --init {world}/gen.pt --lpips-backbone {world}/alexnet.npz --crop 48"
LPIPS = "--perceptual-weight 1 --lpips-backbone {world}/alexnet.npz --crop 32"


def tiny(seed=1):
    """r and g with random weights -> (r, g)."""
    torch.manual_seed(seed)
    r, g = NAFNet(4, [1], 1, [1]), UNet(4, [1], 1)
    for network in (r, g):
        nn.init.normal_(network.ending.weight, std=0.05)
    return r, g


def write(path, kind, network):
    config = {"unet": network.config, "residual_scale": 8.0} if kind == "gen" else network.config
    checkpoint.save_weights(path, kind, config, network, {})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with six small pictures, g in gen.pt, and an AlexNet."""
    world = tmp_path_factory.mktemp("world")
    (world / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for n in range(6):
        small = Image.fromarray(generator.integers(0, 256, (6, 7, 3), np.uint8))
        small.resize((40, 36), Image.Resampling.BICUBIC).save(world / "pictures" / f"{n}.png")
    write(world / "gen.pt", "gen", tiny()[1])
    write_random_alexnet(world / "alexnet.npz")
    return world


@pytest.fixture
def arguments(world, tmp_path):
    """arguments(stage, name, options) -> the command line of a training in tmp_path / name."""
    def arguments(stage, name, options=""):
        return ["--model", str(tmp_path / name), "--data", "images", "--root", str(world / "pictures"),
                *OPTIONS[stage].split(), *[option.format(world=world) for option in options.split()]]

    return arguments


@pytest.fixture
def train(arguments, tmp_path, monkeypatch):
    """train(stage, name, options) -> exit code; a new folder first gets the networks of the stages before."""
    load_lpips = metrics.load_lpips
    monkeypatch.setattr(metrics, "load_lpips",
                        lambda backbone, device: backbone and load_lpips(backbone, device))
    monkeypatch.setattr(train_gen, "SCALE_BATCHES", 4)
    monkeypatch.setattr(train_gen, "VALIDATION_STEPS", 10)

    def train(stage, name, options=""):
        place = tmp_path / name
        if stage != "recon" and "--scheme" not in options and not place.exists():
            place.mkdir()
            r, g = tiny()
            write(place / "recon.pt", "recon", r)
            if stage == "controller":
                write(place / "gen.pt", "gen", g)
                (place / "step_labels.jsonl").write_text("".join(
                    json.dumps(label(n, checkpoint.fingerprint(g))._asdict()) + "\n" for n in range(10)))
        return SCRIPTS[stage].main(arguments(stage, name, options))

    return train


def label(n, made_with=""):
    lpips = np.random.default_rng(n).random(len(STEPS)).tolist()
    return search.Label(n, 0, f"{n % 6}.png", n, 2 * n, 16, 5.0 * n, n % 2 == 0, None, n, made_with, None, "",
                        lpips)


@pytest.fixture
def at_iteration(monkeypatch):
    """at_iteration(k, act): act(run, loss) -> loss is called in iteration k (from 1), before its step."""
    def arrange(k, act):
        def check(run, loss, norm):
            real(run, act(run, loss) if run.iteration == k - 1 else loss, norm)

        monkeypatch.setattr(training.Run, "check", check)

    real = training.Run.check
    return arrange


def sends(number):
    def act(run, loss):
        signal.raise_signal(number)
        return loss
    return act


@pytest.fixture
def stop(train, at_iteration):
    """stop(k, stage, name, options): a training that a signal stops in iteration k."""
    def stop(k, *command, number=signal.SIGINT):
        at_iteration(k, sends(number))
        with pytest.raises(SystemExit) as exit:
            train(*command)
        assert exit.value.code == 128 + number
        at_iteration(0, None)

    return stop


def load(path):
    return torch.load(path, weights_only=True)


def contents(place, pattern="*"):
    return {path.name: path.read_bytes() for path in place.glob(pattern)}


def log(place, stage):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (place / f"train_{stage}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


def same_weights(a, b):
    return same(load(a)["state_dict"], load(b)["state_dict"]) and load(a)["config"] == load(b)["config"]


def same_training(a, b, stage):
    """Whether two model folders hold the same states, weights and log, bit for bit."""
    return (same(load(a / f"last_{stage}.pt"), load(b / f"last_{stage}.pt"))
            and log(a, stage) == log(b, stage)
            and all(same_weights(path, b / path.name) for path in a.glob("*.pt") if "last_" not in path.name))


def refusal(capsys):
    """The one line on stderr that starts with `error: `."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


# Resume.

@pytest.mark.parametrize("stage, options, number", [
    ("recon", "", signal.SIGINT),
    ("recon", "--cosine --arch unet --base 4 --blocks 1", signal.SIGTERM),
    ("gen", "--condition both", signal.SIGTERM),
    ("gen", "--cosine --scheme intermediate", signal.SIGINT),
    ("gen", FINISH, signal.SIGINT),
    ("controller", "", signal.SIGINT),
    ("controller", "--cosine", signal.SIGTERM),
])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(stage, options, number, train, stop, tmp_path,
                                                               capsys):
    handler = signal.getsignal(number)
    assert train(stage, "whole", options) == 0
    stop(3, stage, "stopped", options, number=number)
    assert "stopped and saved at iteration 3" in capsys.readouterr().err
    assert signal.getsignal(number) == handler
    assert load(tmp_path / "stopped" / f"last_{stage}.pt")["iteration"] == 3

    assert train(stage, "stopped", options) == 0
    assert "going on at iteration 3" in capsys.readouterr().err
    assert same_training(tmp_path / "whole", tmp_path / "stopped", stage)
    assert [line["iteration"] for line in log(tmp_path / "whole", stage)] == [3, 6]


def test_a_signal_between_two_saves_saves_and_free_options_may_change(train, stop, tmp_path):
    assert train("recon", "whole") == 0
    stop(2, "recon", "stopped")
    assert load(tmp_path / "stopped" / "last_recon.pt")["iteration"] == 2
    assert (tmp_path / "stopped" / "recon.pt").exists()
    (tmp_path / "stopped").rename(tmp_path / "moved")
    assert train("recon", "moved", "--workers 2 --save-every 4 --device auto") == 0
    assert same(*(load(tmp_path / name / "last_recon.pt") for name in ("whole", "moved")))


def test_workers_do_not_change_the_result_but_the_seed_does(train, tmp_path):
    for name, options in (("0", ""), ("1", "--workers 1"), ("2", "--workers 2"), ("other", "--seed 1")):
        assert train("recon", name, f"--batch 3 --iterations 2 {options}") == 0
    for name in "12":
        assert same(load(tmp_path / "0" / "last_recon.pt"), load(tmp_path / name / "last_recon.pt"))
    assert not same_weights(tmp_path / "0" / "recon.pt", tmp_path / "other" / "recon.pt")


def test_the_same_command_after_the_end_changes_nothing(train, tmp_path):
    assert train("gen", "model") == 0
    before = contents(tmp_path / "model")
    assert train("gen", "model") == 0
    assert contents(tmp_path / "model") == before


@pytest.mark.parametrize("options", [
    "--lr 2e-3", "--batch 3", "--iterations 7", "--cosine", "--clip-grad 2", "--seed 1", "--weight-decay 0",
    "--sigma 15", "--width 8", "--ema 0.9", "--precision bfloat16"])
def test_changed_settings_are_refused(options, train, stop, tmp_path, capsys):
    stop(1, "recon", "model")
    before = contents(tmp_path / "model")
    assert train("recon", "model", options) == 2
    assert f"differs in {options.split()[0].removeprefix('--')} (was " in refusal(capsys)
    assert contents(tmp_path / "model") == before


def test_g_does_not_go_on_with_another_r(train, stop, tmp_path, capsys):
    stop(1, "gen", "model")
    write(tmp_path / "model" / "recon.pt", "recon", tiny(2)[0])
    assert train("gen", "model") == 2
    assert "differs in recon " in refusal(capsys)


@pytest.mark.parametrize("first, second, options", [
    ("recon", "gen", "--scheme joint"), ("recon", "gen", "--scheme intermediate"), ("gen", "recon", "")])
def test_a_trained_r_is_not_overwritten(first, second, options, train, tmp_path, capsys):
    assert train(first, "model", "--iterations 1") == 0
    before = contents(tmp_path / "model")
    assert train(second, "model", options) == 2
    assert "recon.pt would be overwritten" in refusal(capsys)
    assert contents(tmp_path / "model") == before


@pytest.mark.parametrize("spelling", ["--preset small", "--preset=small", "--pres small"])
@pytest.mark.parametrize("stage", SCRIPTS.values())
def test_a_preset_is_taken_however_it_is_spelled(stage, spelling, tmp_path):
    given = ["--model", str(tmp_path), *spelling.split()]
    small, own = vars(stage.parse(given)), vars(stage.parse([*given, "--batch", "3", "--no-cosine"]))
    assert stage.PRESETS["small"].items() <= small.items()
    assert own == {**small, "batch": 3, "cosine": False}


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="this system has no process groups")
def test_ctrl_c_in_a_terminal_reaches_the_workers_too(arguments, tmp_path):
    options = "--iterations 1000000 --save-every 1000000 --workers 2"
    process = subprocess.Popen([sys.executable, train_recon.__file__, *arguments("recon", "model", options)],
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    model = tmp_path / "model"
    try:
        # its first line of progress
        while not (model / "train_recon.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error and "stopped and saved" in error
    assert load(model / "last_recon.pt")["iteration"] == load(model / "recon.pt")["info"]["iteration"] >= 50


# A training that goes wrong.

def first_parameter(run):
    return next(next(iter(run.networks.values()))[0].parameters())


def nan_loss(run, loss):
    return loss * math.nan


def nan_gradient(run, loss):
    first_parameter(run).register_hook(lambda gradient: gradient * math.nan)  # from the next iteration on
    return loss


def nan_weights(run, loss):
    first_parameter(run).data *= math.nan
    return loss


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_loss_of_nan_keeps_the_last_checkpoint_and_the_log_goes_on_from_there(
        stage, train, at_iteration, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "REPORT_EVERY", 1)
    assert train(stage, "whole") == 0
    model, handler, kept = tmp_path / "model", signal.getsignal(signal.SIGINT), {}

    def become_nan(run, loss):
        kept.update(contents(model, "*.pt"))
        return loss * math.nan

    at_iteration(5, become_nan)
    assert train(stage, "model") == 2
    message = refusal(capsys)
    assert "nan at iteration 5" in message and "--lr" in message
    assert ".png" in message  # of which pictures
    assert signal.getsignal(signal.SIGINT) == handler
    assert contents(model, "*.pt") == kept and load(model / f"last_{stage}.pt")["iteration"] == 3
    assert [line["iteration"] for line in log(model, stage)] == [1, 2, 3, 4]

    with open(model / f"train_{stage}.jsonl", "a") as file:
        file.write('{"iteration": 5, "lo')  # a line torn by a kill
    at_iteration(0, None)
    assert train(stage, "model") == 0
    assert same_training(tmp_path / "whole", model, stage)
    assert [line["iteration"] for line in log(model, stage)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stage, options, spoil, what", [
    ("recon", "", nan_loss, "loss became nan at iteration 1"),
    ("recon", "", nan_gradient, "gradient became nan at iteration 2"),
    ("recon", LPIPS, nan_weights, "loss became nan at iteration 2"),
    ("gen", FINISH, nan_weights, "loss became nan at iteration 2"),
])
def test_what_is_not_finite_reaches_no_file(stage, options, spoil, what, train, at_iteration, tmp_path,
                                            capsys):
    at_iteration(1, spoil)
    assert train(stage, "model", options) == 2
    assert what in refusal(capsys)
    assert not (tmp_path / "model" / f"{stage}.pt").exists() and not list((tmp_path / "model").glob("*last*"))


@pytest.mark.parametrize("workers, damage", [
    # pixels, header
    (0, lambda data: data[:-600]), (2, lambda data: data[:-600]), (0, lambda data: data[:9])])
def test_a_picture_that_cannot_be_read_is_left_out(workers, damage, world, train, tmp_path, capsys):
    root = shutil.copytree(world / "pictures", tmp_path / "pictures")
    options = f"--root {root} --validation 1 --workers {workers}"  # the first one is for validation
    (root / "2.png").write_bytes(damage((root / "2.png").read_bytes()))
    assert train("recon", "model", options) == 0
    assert capsys.readouterr().err.count("note: 2.png is left out of the training: cannot read") == 1
    assert [line["left_out"] for line in log(tmp_path / "model", "recon")] == [1, 1]

    (root / "2.png").unlink()  # the same training goes on without it, but not without another
    assert train("recon", "model", options) == 0
    (root / "3.png").unlink()
    assert train("recon", "model", options) == 2
    assert "last_recon.pt differs in pictures (was 5, hash" in refusal(capsys)
    for n in (1, 4, 5):
        (root / f"{n}.png").write_bytes(damage((root / f"{n}.png").read_bytes()))
    assert train("recon", "other", options) == 2
    assert "none of 3 pictures can be read; the last one: cannot read" in refusal(capsys)


def test_a_held_out_picture_that_cannot_be_read_is_left_out(world, train, tmp_path, capsys):
    root = shutil.copytree(world / "pictures", tmp_path / "pictures")
    (root / "3.png").write_bytes((root / "3.png").read_bytes()[:-600])
    assert train("recon", "model", f"--root {root} --validation 4") == 0  # 0, 2 and 3 of the six
    assert capsys.readouterr().err.count("note: 3.png is left out of the training: cannot read") == 1
    assert [line["left_out"] for line in log(tmp_path / "model", "recon")] == [1, 1]


@pytest.mark.parametrize("change, message", [
    (lambda state: [1, 2], "last_recon.pt is not the state of this training"),
    (lambda state: {**state, "settings": {}}, "last_recon.pt differs in"),
    *[(lambda state, key=key: {**state, key: {}}, "last_recon.pt is damaged")
      for key in ("optimizer", "recon", "iteration")],
])
def test_a_damaged_state_is_refused(train, tmp_path, capsys, change, message):
    assert train("recon", "model", "--iterations 2") == 0
    torch.save(change(load(tmp_path / "model" / "last_recon.pt")), tmp_path / "model" / "last_recon.pt")
    assert train("recon", "model", "--iterations 2") == 2
    assert message in refusal(capsys)


@pytest.mark.parametrize("line", ["no JSON", "{}", "[]", '{"iteration": "first"}', "\x00"])
def test_a_damaged_log_is_refused(train, tmp_path, capsys, line):
    assert train("recon", "model", "--iterations 2") == 0
    with open(tmp_path / "model" / "train_recon.jsonl", "a") as file:
        file.write(line + "\n")
    assert train("recon", "model", "--iterations 2") == 2
    assert "train_recon.jsonl is damaged" in refusal(capsys)


def test_ctrl_c_outside_a_loop_ends_in_a_word(capsys, monkeypatch):
    @script
    def main(argv=None):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    assert main([]) == 130 and capsys.readouterr().err == "stopped\n"
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("stage, options, message", [
    ("gen", "--base 5", "--base must be even"),
    ("gen", "--crop 30", "--crop of at least 31"),
    ("recon", LPIPS + " --crop 30", "--crop of at least 31"),
    ("gen", FINISH + " --crop 45", "--crop of at least 46"),
    ("gen", "--finish --crop 48", "--finish needs a g that Eq. 5 has trained"),
    ("gen", "--finish --crop 48 --init {world}/gen.pt", "--finish needs LPIPS"),
    ("gen", FINISH + " --scheme joint", "--finish is for --scheme two-stage"),
    ("gen", FINISH + " --target clean", "--finish is for --scheme two-stage and --target residual"),
    ("gen", "--init {world}/gen.pt --condition both", "has --condition noisy"),
    ("recon", "--root nowhere", "nowhere"),
    ("recon", "--model {world}/gen.pt", "gen.pt"),  # a file for a folder
])
def test_what_cannot_be_trained_is_one_sentence(stage, options, message, train, tmp_path, capsys):
    assert train(stage, "model", options) == 2
    assert message in refusal(capsys)
    assert contents(tmp_path / "model").keys() <= {"recon.pt"}


class Killed(Exception):
    """Ends a script where a kill -9 would."""


@pytest.mark.parametrize("save", [1, 2])
@pytest.mark.parametrize("name", ["gen.pt", "last_gen.pt", "train_gen.jsonl"])
def test_a_kill_while_saving_is_made_good_by_the_same_command(name, save, train, tmp_path, monkeypatch):
    """At any of its files, at the first save and at the last."""
    assert train("gen", "whole") == 0
    moments, replace, report = [], os.replace, training.Run.report

    def reach(moment):
        moments.append(moment)
        if moments.count(name) == save:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace",
                      lambda source, target: (reach(Path(target).name), replace(source, target)))
        patch.setattr(training.Run, "report",
                      lambda run, scores: (reach("train_gen.jsonl"), report(run, scores))[1])
        train("gen", "model")
    assert train("gen", "model") == 0
    assert same_training(tmp_path / "whole", tmp_path / "model", "gen")


@pytest.mark.parametrize("full", ["train_recon.jsonl", "recon.pt", "last_recon.pt"])
def test_a_full_disk_is_one_sentence(full, train, stop, tmp_path, capsys):
    """The last checkpoint stays, nothing half written beside it; with space again the training goes on."""
    resource = pytest.importorskip("resource")
    assert train("recon", "whole", "--save-every 6") == 0
    stop(2, "recon", "model", "--save-every 6")
    kept = contents(tmp_path / "model", "*.pt")
    room = len(kept[full]) - 1 if full in kept else (tmp_path / "model" / full).stat().st_size + 5
    capsys.readouterr()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # no file may be larger
    try:
        assert train("recon", "model") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = refusal(capsys)
    assert re.search(rf"/{full}[ :]", message) and "make space" in message
    left = contents(tmp_path / "model", "*")
    assert left.keys() == {*kept, "train_recon.jsonl"} and left["last_recon.pt"] == kept["last_recon.pt"]
    assert full == "last_recon.pt" or left["recon.pt"] == kept["recon.pt"]
    assert train("recon", "model") == 0
    assert same(*(load(tmp_path / name / "last_recon.pt") for name in ("whole", "model")))
    assert same_weights(tmp_path / "whole" / "recon.pt", tmp_path / "model" / "recon.pt")


# One optimiser step.

@pytest.mark.parametrize("stage, options, ema, cosine, clip", [
    ("recon", "--arch unet --base 4", 0.9999, False, 1e-3), ("gen", "", 0.3, True, 1e9),
    ("gen", FINISH, 0.3, False, 1e-3),
    ("controller", "", 0.9999, True, 1e9), ("controller", "", 0.3, False, 1e-3)])
def test_average_learning_rate_and_clipping(stage, options, ema, cosine, clip, train, tmp_path, monkeypatch):
    seen, check = [], training.Run.check

    def look(run, loss, norm):
        network, averaged = ([p.detach().double().clone() for p in each.parameters()]
                             for each in run.networks[stage])
        clipped = nn.utils.get_total_norm(p.grad for p in run.networks[stage][0].parameters()).item()
        seen.append((network, averaged, run.optimizer.param_groups[0]["lr"], norm.item(), clipped))
        check(run, loss, norm)

    monkeypatch.setattr(training.Run, "check", look)
    options += f" --ema {ema} --clip-grad {clip} {'--cosine' if cosine else ''}"
    assert train(stage, "model", options) == 0
    _, averaged, rates, norms, clipped = zip(*seen)
    for k in range(5):  # with a warm-up
        decay = min(ema, (k + 1) / (k + 10))
        for before, after, parameter in zip(averaged[k], averaged[k + 1], seen[k + 1][0]):
            torch.testing.assert_close(after, decay * before + (1 - decay) * parameter, rtol=1e-5, atol=1e-6)
    state = load(tmp_path / "model" / f"last_{stage}.pt")[stage]
    for name in [name for name in state["weights"] if "running_" in name or "num_batches" in name]:
        assert torch.equal(state["averaged"][name], state["weights"][name]) and state["weights"][name].any()
    expected = 1e-3 * (0.5 * (1 + np.cos(np.pi * np.arange(6) / 6)) if cosine else np.ones(6))
    if "--finish" in options:
        expected *= np.arange(1, 7) / WARM_UP
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    np.testing.assert_allclose(clipped, np.minimum(norms, clip), rtol=1e-2)
    assert min(norms) > 1e-3


def test_reconstruction_loss():
    clean, estimate = np.random.default_rng(0).random((2, 3, 3, 5, 4), np.float32)
    squared = (clean.astype(np.float64) - estimate) ** 2
    psnr = [-10 * np.log10(one.mean()) for one in squared]
    both = torch.from_numpy(clean), torch.from_numpy(estimate)
    assert reconstruction_loss(*both).item() == pytest.approx(squared.mean(), rel=1e-6)
    assert reconstruction_loss(*both, "psnr").item() == pytest.approx(-np.mean(psnr), abs=1e-3)
    norms = []
    for off in (1e-6, 1e-4, 0.03):  # a picture without noise does not drown the others
        estimate = (both[0] + off).requires_grad_()
        reconstruction_loss(both[0], estimate, "psnr").backward()
        norms.append(estimate.grad.norm().item())
    assert 0 < norms[0] < norms[1] < norms[2]


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
    path = tmp_path / "model" / f"{stage}.pt"
    content, averaged = load(path), load(path.with_name(f"last_{stage}.pt"))[stage]["averaged"]
    assert content.keys() == {"kind", "config", "state_dict", "info"} and content["kind"] == stage
    assert_plain({**content, "state_dict": dict(content["state_dict"])})
    assert content["info"]["iteration"] == 6 and content["info"]["settings"]["lr"] == 1e-3
    assert content["state_dict"].keys() == averaged.keys()
    for name, tensor in content["state_dict"].items():
        if "num_batches_tracked" in name:
            assert tensor.dtype == torch.int64
        else:
            assert averaged[name].dtype == torch.float32
            assert tensor.dtype == (torch.float32 if "running_" in name else torch.float16)
        assert torch.equal(tensor, averaged[name].to(tensor.dtype))
    read = {"recon": folder.load_recon, "gen": folder.load_gen,
            "controller": folder.load_controller}[stage](path)
    config = (read if stage == "recon" else read[0]).config  # of the network made again from its file
    stored = content["config"].get("unet", content["config"])
    assert config == {key: value for key, value in stored.items() if key != "made_with"}


def test_log_and_validation(train, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "REPORT_EVERY", 2)
    command = "recon", "model", "--save-every 4 --validation 3"
    assert train(*command) == 0
    lines = [json.loads(line) for line in (tmp_path / "model" / "train_recon.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    assert all(line["loss"] > 0 and line["images_per_s"] > 0 for line in lines)
    assert [line.get("psnr", 0) > 0 for line in lines] == [False, True, True]
    held_out = crops.Stream(train_recon.parse(arguments(*command))).validation()
    assert held_out["clean"].shape == (3, 3, 16, 16)
    with torch.no_grad():  # the averaged weights, as the weight file holds them
        estimate = folder.load_recon(tmp_path / "model" / "recon.pt")(held_out["noisy"]).clamp(0, 1)
    assert metrics.psnr(estimate, held_out["clean"]).mean().item() == pytest.approx(lines[-1]["psnr"],
                                                                                    abs=0.02)


def test_controller_validation(train, tmp_path):
    assert train("controller", "model", "--holdout 0.4 --iterations 3") == 0
    [line] = log(tmp_path / "model", "controller")
    found, held_out = train_controller.held_out_first([label(n) for n in range(10)], 0.4)
    scores = np.array([label.lpips for label in found])
    fixed = scores[held_out:].mean(axis=0).argmin()
    assert line["lpips_oracle"] == pytest.approx(scores[:held_out].min(axis=1).mean(), abs=1e-6)
    assert line["lpips_fixed"] == pytest.approx(scores[:held_out, fixed].mean(), abs=1e-6)
    assert line["fixed_steps"] == STEPS[fixed]
    assert line["lpips_oracle"] <= line["lpips"]
    assert 0 <= line["accuracy"] <= 1 and 0 <= line["mean_steps"] <= 100


def test_s_learns_the_best_count_of_each_label(train, monkeypatch):
    targets, real = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, target, reduction: (
        targets.append(target), real(logits, target, reduction=reduction))[1])
    assert train("controller", "model", "--iterations 2") == 0
    best = {int(np.argmin(label(n).lpips)) for n in range(10)}
    assert len(targets) == 2 and {*torch.cat(targets).tolist()} <= best


@pytest.mark.parametrize("options", ["", "--by-cost"])
def test_labels_weigh_what_a_wrong_count_costs(options, train, monkeypatch):
    """In the paper equally; with --by-cost by the worst count's LPIPS less the best's, 1 on average."""
    costs, real = {}, train_controller.stream

    def stream(args, patches, target, cost, names, held_out, start, stop):
        costs.update(cost=cost, held_out=held_out)
        return real(args, patches, target, cost, names, held_out, start, stop)

    monkeypatch.setattr(train_controller, "stream", stream)
    assert train("controller", "model", f"{options} --iterations 2") == 0
    labels, _ = train_controller.held_out_first([label(n) for n in range(10)], 0.2)
    expected = np.array([max(label.lpips) - min(label.lpips) for label in labels] if options else [1] * 10)
    expected = expected / expected[costs["held_out"]:].mean()
    np.testing.assert_allclose(costs["cost"], expected, rtol=1e-5)
    tried = torch.tensor([[0.2, math.inf, 0.5], [0.3, 0.3, math.inf]])
    np.testing.assert_allclose(train_controller.cost_of_each(tried), [0.3, 0], atol=1e-6)


# Stage 2's variants.

@pytest.mark.parametrize("options, condition, scale", [
    ("--condition initial --precision bfloat16", "initial", None), ("--condition both", "both", None),
    ("--residual-scale 1", "noisy", 1.0), (FINISH + " --residual-scale 2", "features", 2.0)])
def test_two_stages_leave_r_untouched(options, condition, scale, train, world, tmp_path):
    model = tmp_path / "model"
    assert train("gen", "model", f"{options} --iterations 2") == 0
    write(tmp_path / "recon.pt", "recon", tiny()[0])
    assert same(load(model / "recon.pt"), load(tmp_path / "recon.pt"))
    assert "recon" not in load(model / "last_gen.pt")
    g, settings = folder.load_gen(model / "gen.pt")
    assert settings.condition == condition
    assert g.intro.in_channels == {"both": 9, "features": 9 + 4}.get(condition, 6)
    assert scale in (None, settings.residual_scale)
    assert g.ending.weight.any() and not same(dict(g.state_dict()), load(world / "gen.pt")["state_dict"])


@pytest.mark.parametrize("scheme, iterations, learns", [
    ("joint", 1, False),        # g is zero at the start, so Eq. 5 has no gradient for r yet
    ("joint", 3, True),
    ("intermediate", 1, True),  # Eq. 4 has
])
def test_joint_schemes_train_r(scheme, iterations, learns, train, tmp_path):
    assert train("gen", "model", f"--scheme {scheme} --iterations {iterations}") == 0
    content = checkpoint.load_weights(tmp_path / "model" / "recon.pt", "recon")
    assert content["config"]["arch"] == "unet" and content["config"]["noise_level"] is False
    assert bool(content["state_dict"]["ending.weight"].any()) == learns  # zero at the start
    assert load(tmp_path / "model" / "gen.pt")["config"]["residual_scale"] == 1


def test_target_clean_puts_a_constant_for_r(train, world, tmp_path):
    assert train("gen", "model", "--target clean --iterations 1") == 0
    model = RnG.load(tmp_path / "model", "cpu")
    assert model.settings.target == "clean"
    assert torch.equal(model.reconstruct(torch.rand(1, 3, 8, 8)), torch.full((1, 3, 8, 8), 0.5))
    std = np.std([np.asarray(Image.open(path)) / 255 - 0.5 for path in (world / "pictures").iterdir()])
    assert 1 / model.settings.residual_scale == pytest.approx(std, rel=0.2)


def test_residual_scale_is_measured_once(train, stop, tmp_path):
    path, options = tmp_path / "model" / "gen.pt", "--sigma 25 --clip-noisy 0"
    path.parent.mkdir()
    r = UNet(4, blocks=1, noise_level=False)  # the identity: the residual is the noise
    write(path.with_name("recon.pt"), "recon", r)
    stop(1, "gen", "model", options)
    content = load(path)
    assert content["config"]["residual_scale"] == pytest.approx(255 / 25, rel=0.03)
    content["config"]["residual_scale"] = 7.0
    torch.save(content, path)
    assert train("gen", "model", options) == 0  # reads it back
    assert load(path)["config"]["residual_scale"] == 7.0


def test_training_starts_from_an_official_checkpoint_or_another_g(train, world, tmp_path):
    torch.manual_seed(5)
    official, path = NAFNet(4, [1, 2], 1, [2, 1]).half().float(), tmp_path / "nafnet.pth"
    torch.save({"params": {f"module.{name}": value for name, value in official.state_dict().items()}}, path)
    assert train("recon", "r", f"--init {path} --lr 0 --iterations 1") == 0
    r = folder.load_recon(tmp_path / "r" / "recon.pt")
    assert r.config == official.config
    assert same(dict(r.state_dict()), dict(official.state_dict()))
    assert train("gen", "g", "--init {world}/gen.pt --lr 0 --iterations 1 --base 8") == 0
    assert same(load(world / "gen.pt")["state_dict"], load(tmp_path / "g" / "gen.pt")["state_dict"])


@pytest.mark.parametrize("conditions", [1, 2])
def test_finishing_starts_from_what_eq_5_has_trained(conditions):
    """With the old last layer and no condition more it is the old U-Net; as it starts, its d_0 is zero."""
    torch.manual_seed(2)
    g = UNet(4, [1, 2], 1, conditions)
    nn.init.normal_(g.ending.weight)
    x, y_r, d_t = torch.rand(3, 1, 3, 96, 96)
    gamma = torch.tensor([0.7], dtype=torch.float64)
    started = start_from(g, features=5)
    assert started.config["conditions"] == 2 and started.config["features"] == 5
    seen = torch.cat([x, y_r, torch.rand(1, 5, 96, 96)], dim=1)
    assert torch.equal(started(seen, d_t, gamma), ddpm.noise_in(d_t, torch.zeros_like(d_t), gamma))
    expected = g(seen[:, :3 * conditions], d_t, gamma)
    started.ending.load_state_dict(g.ending.state_dict())
    started.residual = False  # the U alone
    inside = slice(40, -40)   # what the padding does not reach
    assert torch.allclose(started(seen, d_t, gamma)[..., inside, inside], expected[..., inside, inside],
                          atol=1e-5)


def test_finishing_goes_on_from_what_was_finished_before_r_had_features():
    torch.manual_seed(2)
    before = UNet(4, [1, 2], 1, 2, residual=True)
    nn.init.normal_(before.ending.weight)
    x, y_r, d_t = torch.rand(3, 1, 3, 40, 40)
    gamma, seen = torch.tensor([0.7], dtype=torch.float64), torch.cat([x, y_r, torch.rand(1, 5, 40, 40)], 1)
    started = start_from(before, features=5)
    assert torch.allclose(started(seen, d_t, gamma), before(seen[:, :6], d_t, gamma), atol=1e-5)
    assert start_from(UNet(4, [1, 2], 1, 2, residual=True, softness=0.4), features=5).softness == 0


def test_a_finished_g_is_finished_further(train, world, tmp_path, capsys):
    once, twice = (tmp_path / name / "gen.pt" for name in ("once", "twice"))
    assert train("gen", "once", FINISH) == 0
    again = FINISH.replace("{world}/gen.pt", str(once))
    assert train("gen", "twice", again + " --lr 0 --iterations 1") == 0
    assert same(load(once)["state_dict"], load(twice)["state_dict"])
    settings = folder.load_gen(twice)[1]
    assert settings.condition == "features" and settings.residual_scale == 8
    capsys.readouterr()
    assert train("gen", "again", f"--init {once}") == 2
    assert "has been finished; give --finish" in refusal(capsys)


def test_a_g_that_sees_only_r_of_x_is_not_finished(train, tmp_path, capsys):
    assert train("gen", "initial", "--condition initial --iterations 1") == 0
    capsys.readouterr()
    options = FINISH.replace("{world}/gen.pt", str(tmp_path / "initial" / "gen.pt"))
    assert train("gen", "finished", options) == 2
    assert "--finish needs a g that sees x" in refusal(capsys)


def test_a_g_is_not_finished_for_an_r_without_its_features(train, tmp_path, capsys):
    assert train("gen", "narrow", FINISH) == 0
    again = FINISH.replace("{world}/gen.pt", str(tmp_path / "narrow" / "gen.pt"))
    for name, r in (("wide", NAFNet(6, [1], 1, [1])), ("unet", UNet(4, blocks=1, noise_level=False))):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "recon.pt", "recon", r)
        capsys.readouterr()
        assert train("gen", name, again) == 2
        assert "--finish needs a NAFNet for r" in refusal(capsys)


def test_finishing_loss(world):
    """It has gradients for g alone, and is a function of its generator."""
    g, lpips = tiny()[1], metrics.LPIPS(world / "alexnet.npz")
    y, noise = torch.rand(2, 2, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    y_r = (0.8 * y + 0.1).contiguous()

    def loss(seed):
        return finishing_loss(g, lpips, (y + 0.1 * noise).clamp(0, 1), y_r, y, 8.0,
                              np.random.default_rng(seed))

    torch.manual_seed(3)
    losses = [loss(seed) for seed in (0, 1, 2)]
    torch.manual_seed(4)
    assert [loss(seed).item() for seed in (0, 1, 2)] == [loss.item() for loss in losses]
    assert len({loss.item() for loss in losses}) == 3 and all(loss.item() > 0 for loss in losses)
    sum(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all()
               for p in g.parameters()) and g.intro.weight.grad.any()
    assert all(p.grad is None for p in lpips.parameters()) and not y_r.requires_grad


@pytest.mark.parametrize("seed, period", list(enumerate([2, 4, 4, 2])))
def test_finishing_guards_against_what_repeats_every_few_pixels(seed, period):
    generator = torch.Generator().manual_seed(seed)
    cell = torch.randn(period, period, generator=generator)
    cell -= cell.mean()  # so that the guard on colour is silent
    y = torch.rand(2, 3, 96, 96, generator=generator)

    def loss(signs):
        d_0 = torch.tensor(signs)[:, None, None, None] * cell.repeat(96 // period, 96 // period)

        def g(condition, d_t, gamma):  # for which estimate gives this d_0
            gamma = gamma.float()[:, None, None, None]
            return (d_t - gamma.sqrt() * d_0) / (1 - gamma).sqrt()

        generator = np.random.default_rng(seed)
        return finishing_loss(g, lambda a, b: torch.zeros(2), y, y, y, 8.0, generator).item()

    size = cell.abs().mean().item()
    assert loss([1.0, -1.0]) == pytest.approx(ANCHOR * size, rel=1e-3)  # no place is special in the batch
    assert loss([1.0, 1.0]) == pytest.approx(ANCHOR * size + GRID * size / 8, rel=1e-3)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_takes_the_same_steps(train, tmp_path):
    assert train("recon", "eager", "--iterations 2") == 0
    assert train("recon", "compiled", "--iterations 2 --compile") == 0
    eager, compiled = (load(tmp_path / name / "recon.pt")["state_dict"] for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    assert all(torch.allclose(eager[key].float(), compiled[key].float(), atol=2e-3) for key in eager)
