"""evaluate.py beside other methods' pictures, its plane and figures; charts; the perceptual loss."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_random_alexnet
from PIL import Image
from torch import nn

import evaluate
import train_gen
import train_recon
from rng import checkpoint, data, figures, metrics, panels, scoring
from rng.controller import StepController
from rng.errors import InputError
from rng.images import read_rgb
from rng.nafnet import NAFNet
from rng.pipeline import RnG
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
def evaluated(world, tmp_path, monkeypatch, capsys):
    """evaluate.py with these options -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def evaluated(*options):
        code = evaluate.main([str(option) for option in (
            "--model", world / "model", "--data", "images", "--root", world / "pictures", "--device", "cpu",
            "--precision", "float32", "--lpips-backbone", world / "alexnet.npz", "--steps", 2, *options)])
        return code, *capsys.readouterr()
    return evaluated


@pytest.fixture
def run(evaluated):
    """evaluate.py with these options -> (exit code, rows of the table as lists of cells, stderr)."""

    def run(*options):
        code, out, err = evaluated(*options)
        return code, [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()
                      if line.startswith("|")][2:], err
    return run


@pytest.fixture
def other(world, tmp_path):
    """A folder of another method's pictures: those of the data set."""
    return shutil.copytree(world / "pictures", tmp_path / "other")


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
    (lambda folder: Image.new("RGB", (9, 9)).save(folder / "p0.jpg"), "p0.jpg and p0.png differ only in their ending"),
    (lambda folder: [path.unlink() for path in folder.iterdir()] and folder.rmdir(), "is missing")])
@pytest.mark.parametrize("options", [(), ("--figures", "figures")])
def test_outputs_that_do_not_match(options, damage, sentence, run, other):
    damage(other)
    code, rows, err = run("--sigma", 25, "--outputs", f"other={other}", *options)
    assert code == 2 and not rows and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("options", [
    "restormer", "=x", "name=", "copy=a copy=b", "ground truth=x", "noisy input=x", "r alone=x", "RnG=x", "RnG, detail 1=x",
    "20 steps=x", "LDM 200 steps=x", "LDM 200 steps, eta 0=x", "mean=x", "best of these counts for each picture=x",
    "../other=x", "a/b=x", "a\\b=x", "/=x", ".=x", "..=x"])
def test_names_of_other_methods_that_cannot_be_rows_and_folders(options, run, tmp_path):
    options = options.split() if options.startswith("copy") else [options]
    code, rows, err = run("--save", "saved", "--outputs", *options)
    assert code == 2 and not rows and "--outputs" in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["perceptual", "generative", "LDM-200", "r alone, wider", "steps", "my RnG", "PDASR v1.2"])
def test_other_names_of_other_methods_are_rows(name):
    assert scoring.named_folders([f"{name}=results/clean/100 steps", "b=c=d"]) == {
        name: Path("results/clean/100 steps"), "b": Path("c=d")}


@pytest.mark.parametrize("option", ["--save", "--outputs", None])
def test_pictures_of_one_stem_cannot_be_saved_or_compared(option, run, world, tmp_path, other):
    pictures = shutil.copytree(world / "pictures", tmp_path / "pictures")
    Image.open(pictures / "p1.png").save(pictures / "p1.jpg")
    values = {"--save": ["saved"], "--outputs": [f"other={other}"], None: []}[option]
    code, _, err = run("--sigma", 25, "--root", pictures, *filter(None, [option]), *values)
    assert code == (2 if option else 0) and ("p1.jpg and p1.png differ only in their ending" in err) == bool(option)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("size", [(198, 100), (200, 98), (300, 200), (64, 60)])
def test_sizes_are_compared_before_the_centre_is_cut(size, run, other):
    _, rows, _ = run("--sigma", 25, "--centre-crop", 64, "--outputs", f"other={other}")
    assert {row[1]: row[2:] for row in rows}["other"][0] == "0.0000"
    Image.new("RGB", size).save(other / "p1.png")
    code, rows, err = run("--sigma", 25, "--centre-crop", 64, "--outputs", f"other={other}")
    assert code == 2 and not rows and "{} x {}, its clean picture 200 x 100".format(*size) in err


def test_centres_that_were_saved_can_be_scored_again(run, tmp_path):
    _, first, _ = run("--sigma", 25, "--centre-crop", 64, "--save", "saved")
    _, rows, _ = run("--sigma", 25, "--centre-crop", 64, "--outputs", f"again={tmp_path / 'saved' / 'r alone'}")
    assert rows[-1][1] == "again" and rows[-1][2:6] == next(row[2:6] for row in first if row[1] == "r alone")


def test_outputs_for_the_whole_set_do_for_a_part_of_it(run, other):
    code, rows, _ = run("--sigma", 25, "--limit", 1, "--outputs", f"other={other}")
    assert code == 0 and rows[-1][:3] == ["25.0", "other", "0.0000"]
    (other / "p1.png").unlink()
    assert run("--sigma", 25, "--limit", 1, "--outputs", f"other={other}")[:2] == (code, rows)
    shutil.copy(other / "p0.png", other / "q.png")
    code, _, err = run("--sigma", 25, "--limit", 1, "--outputs", f"other={other}")
    assert code == 2 and "q is not a picture of the data set" in err


@pytest.mark.parametrize("options", [(), ("--figures", "figures"), ("--search-schedule",)])
@pytest.mark.parametrize("side", [1, 10, 16, 30])
def test_pictures_too_small_to_score_are_one_sentence(side, options, run):
    code, rows, err = run("--sigma", 25, "--centre-crop", side, *options)
    assert code == 2 and not rows and f"p0.png: {side} x {side} pixels" in err and err.count("\n") == 1


@pytest.mark.parametrize("seed", range(20))
def test_pictures_are_scored_from_31_pixels_and_by_niqe_from_two_blocks(seed, world):
    generator = np.random.default_rng(seed)
    height, width = generator.integers(*((25, 37) if seed % 2 else (90, 200)), 2)
    image = generator.integers(0, 256, (height, width, 3), np.uint8)
    item = data.Item("a.png", image)
    if min(height, width) < 31:
        with pytest.raises(InputError, match=f"{width} x {height} pixels are too few"):
            scoring.inputs(item, 25)
        return
    clean, noisy = scoring.inputs(item, 25, clip_noisy=True)
    lpips, niqe, psnr, ssim = scoring.measure(metrics.LPIPS(world / "alexnet.npz"), noisy, clean)
    assert np.isfinite([lpips, psnr, ssim]).all() and np.isfinite(niqe) == ((height // 96) * (width // 96) >= 2)


def test_small_pictures_have_figures_too(run, recwarn):
    assert run("--sigma", 25, "--centre-crop", 31, "--figures", "figures")[0] == 0 and not recwarn.list


@pytest.mark.parametrize("chosen, nearest", [(0, 1), (1, 1), (2, 1), (3, 4), (4, 4), (9, 4)])
@pytest.mark.parametrize("options", ["--sigma 25", "--sigma 25 50 --detail 0.5 1"])
def test_the_fixed_count_nearest_to_the_controllers_mean(options, chosen, nearest, evaluated, monkeypatch):
    monkeypatch.setattr(RnG, "predict_steps", lambda self, x: [chosen] * len(x))
    _, out, _ = evaluated(*options.split(), "--centre-crop", 32, "--steps", 4, 1)
    assert out.splitlines()[-1] == f"The fixed count nearest to RnG's mean of {chosen:.1f} steps: {nearest} steps."
    assert "nearest" not in evaluated(*options.split(), "--centre-crop", 32, "--steps")[1]


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


@pytest.mark.parametrize("details", [(), (1.0,), (0.25, 0.5), (0, 0.75, 1)])
@pytest.mark.parametrize("counts", [(), (20,), (10, 20, 100)])
def test_lines_of_the_plane(counts, details, monkeypatch):
    """One line over the fixed counts, one of RnG over the details, a point for everything else."""
    names = [f"{method}, detail {detail}" if len(details) > 1 else method
             for method in (*(f"{n} steps" for n in counts), "RnG") for detail in details or [1]]
    rows = [(name, n / 100, 30 + n) for n, name in enumerate(["r alone", *names, "other"])]
    at = {name: psnr for name, _, psnr in rows}
    monkeypatch.setattr(panels, "chart", lambda series, *_: series)
    lines = {one.name: one for one in panels.perception_distortion(rows)}
    assert list(lines) == (["fixed steps"] if counts else []) + ["RnG", "r alone", "other"]
    last = f", detail {details[-1]}" if len(details) > 1 else ""
    if counts:
        assert list(lines["fixed steps"].x) == [at[f"{n} steps{last}"] for n in counts]
    assert list(lines["RnG"].x) == [psnr for name, psnr in at.items() if name.startswith("RnG")]
    assert all(one.labels == () or len(one.labels) == len(one.x) == len(one.y) > 1 for one in lines.values())


def test_the_plane_without_lpips_is_refused(run, world, monkeypatch):
    monkeypatch.setattr(scoring.metrics, "load_lpips", lambda *_: None)
    code, _, err = run("--sigma", 25, "--plot", "plane.png")
    assert code == 2 and "--lpips-backbone" in err


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("detail", [0.25, 0.75, 1, 1.25, 2])
def test_every_d_0_of_fig_5_has_the_scale_of_the_sum(detail, seed, world, monkeypatch):
    """At t = 1 Eq. 3 is the estimate, so that the last one, amplified, is what the sum adds to r(x)."""
    monkeypatch.setattr(panels, "shown", lambda y, text: (text, y))
    model = RnG.load(world / "model", "cpu", "float32")
    model.details[3] = detail
    clean, noisy = scoring.inputs(data.Item("p0", world / "pictures" / "p0.png"), 25, 48)
    shown = dict(panel for row in panels.residual_rows(model, clean, noisy, seed, 3, (3, 1)) for panel in row
                 if isinstance(panel, tuple))
    d_0 = shown["r(x) + d_0"] - shown["r(x)"]
    torch.testing.assert_close(shown["d_0 as seen at t = 1"], (0.5 + panels.AMPLIFY * d_0).clamp(0, 1), atol=1e-5, rtol=0)
    assert d_0.std() > 0.01


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
