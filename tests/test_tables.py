"""evaluate.py beside other methods' pictures, its plane and figures; charts; the perceptual loss."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import write_random_alexnet
from PIL import Image
from torch import nn

import evaluate
import train_gen
import train_recon
from rng import checkpoint, figures, panels, scoring
from rng.controller import StepController
from rng.images import read_rgb
from rng.nafnet import NAFNet
from rng.unet import UNet


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, two pictures, a backbone."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    (folder / "model").mkdir()
    (folder / "pictures").mkdir()
    recon, gen, s = NAFNet(4, (1,), 1, (1,)), UNet(4, (1, 2), 1), StepController(4)
    nn.init.normal_(gen.ending.weight, std=0.05)
    settings = {"condition": "noisy", "target": "residual", "residual_scale": 10.0}
    checkpoint.save_weights(folder / "model" / "recon.pt", "recon", recon.config, recon, {})
    checkpoint.save_weights(folder / "model" / "gen.pt", "gen", {"unet": gen.config, **settings}, gen, {})
    checkpoint.save_weights(folder / "model" / "controller.pt", "controller", s.config, s, {})
    for n in range(2):
        small = np.random.default_rng(n).integers(0, 256, (10, 20, 3), np.uint8)
        Image.fromarray(small).resize((200, 100), Image.Resampling.BICUBIC).save(folder / "pictures" / f"p{n}.png")
    write_random_alexnet(folder / "alexnet.npz")
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """evaluate.py with these options -> (exit code, rows of the table as lists of cells, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        code = evaluate.main([str(option) for option in (
            "--model", world / "model", "--data", "images", "--root", world / "pictures", "--device", "cpu",
            "--precision", "float32", "--lpips-backbone", world / "alexnet.npz", "--steps", 2, *options)])
        out, err = capsys.readouterr()
        return code, [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()
                      if line.startswith("|")][2:], err
    return run


def test_saved_pictures_scored_as_outputs_give_the_same_row(run, tmp_path):
    _, rows, _ = run("--sigma", 25, 50, "--save", "saved")
    code, again, _ = run("--sigma", 25, 50, "--outputs", "copy=saved/r alone", "truth=saved/ground truth")
    assert code == 0 and len(rows) == 3 * 5 and len(again) == 3 * 7
    for sigma in ("25.0", "50.0", "mean"):
        first, second = ({row[1]: row[2:] for row in some if row[0] == sigma} for some in (rows, again))
        assert second["copy"][:4] == second["r alone"][:4] == first["r alone"][:4] and second["copy"][4] == "-"
        assert second["truth"][:4] == second["ground truth"][:4]
    assert read_rgb(tmp_path / "saved" / "ground truth" / "50" / "p1.png").shape == (100, 200, 3)


@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: (folder / "p1.png").unlink(), "p1 is missing"),
    (lambda folder: (folder / "p1.png").rename(folder / "q.png"), "p1 is missing"),
    (lambda folder: Image.new("RGB", (9, 9)).save(folder / "extra.png"), "extra is not a picture of the data set"),
    (lambda folder: Image.new("RGB", (9, 9)).save(folder / "p0.png"), "must be of one size"),
    (lambda folder: [path.unlink() for path in folder.iterdir()] and folder.rmdir(), "is missing")])
def test_outputs_that_do_not_match(damage, sentence, run, world, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in (world / "pictures").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    code, rows, err = run("--sigma", 25, "--outputs", f"other={folder}")
    assert code == 2 and not rows and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("option", ["restormer", "=x", "name="])
def test_outputs_need_a_name_and_a_folder(option, run):
    with pytest.raises(SystemExit):
        run("--outputs", option)


def test_a_row_for_each_detail(run):
    _, rows, _ = run("--sigma", 25, "--detail", 0, 0.5, 1)
    _, single, _ = run("--sigma", 25)
    found = {row[1]: row[2:] for row in rows}
    assert found["2 steps, detail 0"][:4] == found["r alone"][:4]
    assert found["2 steps, detail 1"] == {row[1]: row[2:] for row in single}["2 steps"]
    assert list(found)[2:] == ["r alone", *(f"{method}, detail {detail}" for method in ("2 steps", "RnG")
                                            for detail in ("0", "0.5", "1"))]


def test_plane_and_figures_are_pictures(run, tmp_path):
    run("--sigma", 25, "--detail", 0.5, 1, "--plot", "plane.png")
    assert read_rgb(tmp_path / "plane.png").std() > 20
    code, rows, _ = run("--sigma", 25, "--figures", "figures")
    assert code == 0 and not rows
    shapes = [read_rgb(tmp_path / "figures" / f"fig{n}.png").shape for n in (3, 4, 5)]
    assert shapes[0][0] > 2 * 100 and shapes[1][0] == 2 * (2 * 100 + 22) + 6


def test_the_plane_without_lpips_is_refused(run, world, monkeypatch):
    monkeypatch.setattr(scoring.metrics, "load_lpips", lambda *_: None)
    code, _, err = run("--sigma", 25, "--plot", "plane.png")
    assert code == 2 and "--lpips-backbone" in err


@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_round_and_within(seed):
    generator = np.random.default_rng(seed)
    low = generator.normal() * 10.0 ** generator.integers(-4, 4)
    high = low + 10.0 ** generator.uniform(-4, 4)
    ticks = figures.ticks(low, high)
    apart = np.diff(ticks)
    assert 1 <= len(ticks) <= 7 and np.allclose(apart, apart[:1]) and low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9
    if len(ticks) > 1:
        mantissa = apart[0] / 10 ** np.floor(np.log10(apart[0]) + 1e-9)
        assert min(abs(mantissa - np.array([1, 2, 5, 10]))) < 1e-6


def test_spectrum_of_white_noise_is_flat_and_of_a_blur_falls():
    noise = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    frequency, power = panels.spectrum(noise)
    assert 0 < frequency[0] < frequency[-1] < 0.5 and np.abs(power[2:]).max() < 0.15
    _, blurred = panels.spectrum(nn.functional.avg_pool2d(noise, 3, 1, 1))
    assert blurred[2] - blurred[-1] > 1


def test_training_curves(tmp_path, capsys):
    lines = [{"iteration": k, "loss": 1 / k} | ({"psnr": 20 + k, "lpips": 0.1, "psnr_recon": 25, "lpips_recon": 0.2}
                                                if k % 2 == 0 else {}) for k in range(1, 9)]
    (tmp_path / "train_gen.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert figures.main([str(tmp_path), str(tmp_path / "curves.png")]) == 0
    assert read_rgb(tmp_path / "curves.png").std() > 10
    (tmp_path / "train_gen.jsonl").unlink()
    assert figures.main([str(tmp_path), str(tmp_path / "none.png")]) == 2 and not (tmp_path / "none.png").exists()
    assert figures.main([]) == 2 and "train first" in capsys.readouterr().err


@pytest.mark.parametrize("script, sizes", [(train_recon, "--width 4 --enc 1 --middle 1 --dec 1"),
                                           (train_gen, "--base 4 --blocks 1")])
def test_perceptual_weight_is_part_of_the_loss(script, sizes, world, tmp_path):
    def first_loss(weight):
        folder = tmp_path / str(weight)
        shutil.copytree(world / "model", folder)
        options = ("--data", "images", "--root", world / "pictures", "--model", folder, "--perceptual-weight", weight,
                   "--batch", 2, "--iterations", 1, "--crop", 64, "--validation", 1, "--workers", 0, "--sigma", 25,
                   "--device", "cpu", "--precision", "float32", "--lpips-backbone", world / "alexnet.npz")
        assert script.main([*sizes.split(), *map(str, options)]) == 0
        return json.loads(next(folder.glob("train_*.jsonl")).read_text().splitlines()[0])["loss"]

    plain, light, heavy = map(first_loss, (0, 1, 3))
    assert light > plain and heavy - plain == pytest.approx(3 * (light - plain), rel=1e-4)
