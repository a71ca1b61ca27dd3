"""evaluate.py beside other methods' pictures, its plane and figures; charts; the perceptual loss."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import write_random_alexnet
from PIL import Image
from test_scripts import TINY, TINY_R, call, picture
from torch import nn

import evaluate
import train_recon
from rng import figures, metrics, scoring
from rng.controller import StepController
from rng.folder import GenSettings
from rng.nafnet import NAFNet
from rng.pipeline import RnG
from rng.scoring import Method, Row
from rng.support import charts, checkpoint
from rng.support.data import Item
from rng.support.errors import InputError
from rng.support.images import read_rgb
from rng.unet import UNet


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, two pictures, a backbone."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    (folder / "model").mkdir()
    recon, gen, s = NAFNet(4, (1,), 1, (1,)), UNet(4, (1, 2), 1), StepController(4)
    nn.init.normal_(gen.ending.weight, std=0.05)
    configs = recon.config, {"unet": gen.config, **GenSettings(residual_scale=300.0)._asdict()}, s.config
    for kind, net, config in zip(("recon", "gen", "controller"), (recon, gen, s), (configs)):
        checkpoint.save_weights(folder / "model" / f"{kind}.pt", kind, config, net, {})
    for n in range(2):
        picture(folder / "pictures" / f"p{n}.png", seed=n)
    write_random_alexnet(folder / "alexnet.npz")
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Calls evaluate.py with these options."""
    monkeypatch.chdir(tmp_path)
    here = ("--model", world / "model", "--data", "images", "--root", world / "pictures", "--device", "cpu",
            "--precision", "float32", "--sigma", 25, "--steps", 2, "--lpips-backbone", world / "alexnet.npz")
    return lambda *options: call(evaluate, *here, *options)


def refused(result):
    assert result.code == 2 and not result.rows and len(result.err.splitlines()) == 1
    return result.err


@pytest.fixture
def other(world, tmp_path):  # a folder of another method's pictures
    return shutil.copytree(world / "pictures", tmp_path / "other")


@pytest.mark.parametrize("options, shape", [((), (100, 200, 3)), (("--centre-crop", 64), (64, 64, 3))])
def test_saved_pictures_scored_as_outputs_give_the_same_row(options, shape, run, tmp_path):
    options = "--sigma", 25, 50, *options
    first = {tuple(row[:2]): row[2:] for row in run(*options, "--save", "saved").rows}
    again = run(*options, "--outputs", "copy=saved/r alone", "truth=saved/ground truth").rows
    second = {tuple(row[:2]): row[2:] for row in again}
    assert len(first) == 3 * 5 and len(again) == 3 * 7 and second | first == second
    for sigma in ("25", "50", "mean"):
        assert second[sigma, "copy"] == [*first[sigma, "r alone"][:4], "-"]
        assert second[sigma, "truth"] == first[sigma, "ground truth"]
    assert read_rgb(tmp_path / "saved" / "ground truth" / "50" / "p1.png").shape == shape


def blank(path, size=(9, 9)):
    Image.new("RGB", size).save(path)


@pytest.mark.parametrize("damage, sentence", [
    (lambda path: path.unlink(), "p1 is missing"),
    (lambda path: path.rename(path.with_name("q.png")), "p1 is missing"),
    (lambda path: blank(path.with_name("extra.png")), "extra is not a picture of the data set"),
    (lambda path: blank(path.with_name("p1.jpg")), "p1.jpg and p1.png"),
    (lambda path: shutil.rmtree(path.parent), "is missing"),
    *((lambda path, size=size: blank(path, size), "{} x {}, its clean picture 200 x 100".format(*size))
      for size in [(198, 100), (200, 98), (300, 200), (64, 60)])])
@pytest.mark.parametrize("options", [("--figures", "figures"), ("--centre-crop", 64)])
def test_outputs_that_do_not_match(options, damage, sentence, run, other):
    damage(other / "p1.png")
    assert sentence in refused(run("--outputs", f"other={other}", *options))


@pytest.mark.parametrize("options", [
    "restormer", "=x", "name=", "copy=a & copy=b", "ground truth=x", "noisy input=x", "r alone=x", "RnG=x",
    "best of these counts for each picture=x", "2 steps=x", "../other=x", "a\\b=x", "/=x", ".=x", "..=x"])
def test_names_of_other_methods_that_cannot_be_rows_and_folders(options, run, tmp_path):
    assert "--outputs" in refused(run("--save", "saved", "--outputs", *options.split(" & ")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--save=saved", "--outputs=other=other"])
def test_pictures_of_one_stem_cannot_be_saved_or_compared(option, run, tmp_path, other):
    blank(other / "p1.jpg", (200, 100))
    assert "p1.jpg and p1.png" in refused(run("--root", other, option)) and not (tmp_path / "saved").exists()
    assert run("--root", other).code == 0


def test_outputs_for_the_whole_set_do_for_a_part_of_it(run, other):
    options = "--limit", 1, "--centre-crop", 64, "--outputs", f"other={other}"
    rows = run(*options).rows
    assert rows[-1][:3] == ["25", "other", "0.0000"]
    (other / "p1.png").unlink()
    assert run(*options).rows == rows
    shutil.copy(other / "p0.png", other / "q.png")
    assert "q is not a picture of the data set" in refused(run(*options))


@pytest.mark.parametrize("options", [(), ("--figures", "figures"), ("--search-schedule",)])
def test_pictures_too_small_to_score_are_one_sentence(options, run):
    for side in (1, 30):
        assert f"p0.png: {side} x {side} pixels" in refused(run("--centre-crop", side, *options))


@pytest.mark.parametrize("size", [(30, 99), (99, 30), (31, 31), (95, 300), (96, 191), (96, 192), (192, 96)])
def test_pictures_are_scored_from_31_pixels_and_by_niqe_from_two_blocks(size, world):
    height, width = size
    item = Item("a.png", np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    if min(height, width) < 31:
        with pytest.raises(InputError, match=f"{width} x {height} pixels are too few"):
            scoring.inputs(item, 25)
        return
    clean, noisy = scoring.inputs(item, 25, clip_noisy=True)
    scores = scoring.measure(metrics.LPIPS(world / "alexnet.npz"), noisy, clean)
    assert np.isfinite(scores).tolist() == [True, (height // 96) * (width // 96) >= 2, True, True]


def test_niqe_is_the_mean_over_the_pictures_that_have_one(run, other):
    blank(other / "p1.png", (200, 100))
    table = run("--root", other)
    assert table.rows[0][3] == run("--root", other, "--limit", 1).rows[0][3] != "-"
    assert "NIQE has no value for these, flat or under two blocks of 96 pixels: p1.png\n" in table.out


@pytest.mark.parametrize("chosen, nearest", [(0, 1), (2, 1), (3, 4), (9, 4)])
@pytest.mark.parametrize("options", [[], ["--sigma", 25, 50, "--detail", 0.5, 1]])
def test_the_fixed_count_nearest_to_the_controllers_mean(options, chosen, nearest, run, monkeypatch):
    monkeypatch.setattr(RnG, "s", lambda self, x: torch.full((len(x),), chosen))
    last = run(*options, "--centre-crop", 32, "--steps", 4, 1).out.splitlines()[-1]
    assert last == f"The fixed count nearest to RnG's mean of {chosen:.1f} steps: {nearest} steps."
    assert "nearest" not in run(*options, "--centre-crop", 32, "--steps").out


def test_a_row_for_each_detail(run):
    found = {row[1]: row[2:] for row in run("--detail", 0, 0.5, 1).rows}
    assert found["2 steps, detail 0"][:4] == found["r alone"][:4]
    assert found["2 steps, detail 1"] == {row[1]: row[2:] for row in run().rows}["2 steps"]
    assert list(found)[2:] == ["r alone", *(f"{method}, detail {detail}" for method in ("2 steps", "RnG")
                                            for detail in ("0", "0.5", "1"))]


def test_plane_and_figures_are_pictures(run, tmp_path, recwarn, monkeypatch):
    run("--detail", 0.5, 1, "--plot", "plane.png")
    assert read_rgb(tmp_path / "plane.png").std() > 20
    assert not run("--figures", "figures").rows
    heights = [len(read_rgb(tmp_path / "figures" / f"fig{n}.png")) for n in (3, 4, 5)]
    assert heights[0] > 2 * 100 and heights[1] == 2 * (3 * 96 + 22) + 6
    assert run("--centre-crop", 31, "--figures", "small").code == 0 and not recwarn.list
    monkeypatch.setattr(metrics, "load_lpips", lambda *_: None)
    assert "--lpips-backbone" in refused(run("--plot", "none.png"))


def test_lines_of_the_plane(monkeypatch):
    """One line over the fixed counts, one of RnG over the details, a point for everything else."""
    methods = [("r", 0, 1), ("fixed", 10, 0.5), ("fixed", 10, 1), ("fixed", 20, 0.5), ("fixed", 20, 1),
               ("auto", "auto", 0.5), ("auto", "auto", 1), ("other", None, 1)]
    rows = [Row(None, Method(kind[0], *kind), n, 5, 30 + n, 0.9, 0) for n, kind in enumerate(methods)]
    monkeypatch.setattr(figures, "chart", lambda series, *_: {name: rest for name, *rest in series})
    assert figures.perception_distortion(rows) == {
        "fixed steps": [[32, 34], [2, 4], ["10", "20"]], "RnG": [[35, 36], [5, 6], ["0.5", "1"]],
        "r": [[30], [0], ()], "other": [[37], [7], ()]}
    assert figures.perception_distortion(rows[-2:]) == {"RnG": [[36], [6], ()], "other": [[37], [7], ()]}


@pytest.mark.parametrize("seed", range(5))
def test_every_d_0_of_fig_5_has_the_scale_of_the_sum(seed, world, monkeypatch):
    """At t = 1 Eq. 3 is the estimate, so that the last one, amplified, is what the sum adds to r(x)."""
    monkeypatch.setattr(figures, "shown", lambda y, text: (text, y))
    model = RnG.load(world / "model", "cpu", "float32")
    model.settings = GenSettings(residual_scale=10.0)
    pair = scoring.inputs(Item("p0", world / "pictures" / "p0.png"), 25, 48)
    first, second = figures.residual_rows(model, *pair, seed, 3, (3, 1))
    shown = dict([*first, *second[:-1]])
    d_0 = shown["r(x) + d_0"] - shown["r(x)"]
    expected = (0.5 + figures.AMPLIFY * d_0).clamp(0, 1)
    assert d_0.std() > 0.01 and torch.allclose(shown["d_0 as seen at t = 1"], expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_round_and_within(seed):
    generator = np.random.default_rng(seed)
    low, length = generator.normal() * 10.0 ** generator.integers(-4, 4), 10.0 ** generator.uniform(-4, 4)
    ticks = np.array(charts.ticks(low, low + length))
    assert 1 <= len(ticks) <= 7 and low - 1e-9 <= ticks[0] and ticks[-1] <= low + length + 1e-9
    apart = np.diff(ticks)
    mantissa = apart[:1, None] / 10 ** np.floor(np.log10(apart[:1, None]) + 1e-9)
    assert np.allclose(apart, apart[:1]) and (np.abs(mantissa - [1, 2, 5, 10]).min(axis=1) < 1e-6).all()


def test_spectrum_of_white_noise_is_flat_and_of_a_blur_falls():
    noise = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    frequency, power = figures.spectrum(noise)
    _, blurred = figures.spectrum(nn.functional.avg_pool2d(noise, 3, 1, 1))
    assert 0 < frequency[0] < frequency[-1] < 0.5 and np.abs(power[2:]).max() < 0.15
    assert blurred[2] - blurred[-1] > 1


def test_perceptual_weight_is_part_of_the_loss(world, tmp_path):
    def first_loss(weight):
        folder = tmp_path / str(weight)
        assert call(train_recon, "--data", "images", "--root", world / "pictures", "--model", folder, *TINY,
                    *TINY_R, *"--iterations 1 --crop 64 --validation 1 --workers 0 --sigma 25".split(),
                    "--perceptual-weight", weight, "--lpips-backbone", world / "alexnet.npz").code == 0
        return json.loads((folder / "train_recon.jsonl").read_text())["loss"]

    plain, light, heavy = map(first_loss, (0, 1, 3))
    assert light > plain and heavy - plain == pytest.approx(3 * (light - plain), rel=1e-4)
