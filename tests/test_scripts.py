"""The six scripts in their order on tiny settings; what each writes and what it refuses; the README's commands."""

import argparse
import contextlib
import csv
import importlib
import io
import json
import re
import shlex
import shutil
import urllib.error
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import write_random_alexnet
from PIL import Image

import build_step_labels
import denoise
import evaluate
import train_controller
import train_gen
import train_recon
from rng import checkpoint, ddpm, labels, pipeline
from rng.controller import STEPS
from rng.errors import InputError
from rng.images import read_rgb
from rng.pipeline import RnG

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TINY = "--batch 2 --iterations 4 --save-every 4 --device cpu --precision float32".split()
CROPS = "--crop 32 --validation 2 --workers 0 --sigma 25".split()
TINY_R = "--width 4 --enc 1 --middle 1 --dec 1".split()
TINY_G = "--base 4 --blocks 1".split()
SEARCH = "--search-schedule --sigma 25 --limit 1 --centre-crop 32 --ends 0.3 0.5 --details 0.5 1 --device cpu".split()
LABELS = "--sigma 25 --patches 3 --size 64 --device cpu --precision float32".split()
EVALUATION = "--sigma 15 50 --steps 0 10 --device cpu --precision float32".split()


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def errors(self):
        return re.findall(r"^(?:[\w.]+: )?error: .*$", self.err, re.MULTILINE)  # argparse puts its program's name first


def call(script, *args):
    """Runs a script's main in process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = script.main([str(arg) for arg in args])
        except SystemExit as stop:  # argparse refused an option
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


def tree(folder):
    """Every file below a folder, with its bytes."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def picture(path, height=100, width=200, seed=0):
    """Writes a smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)


class Chain(NamedTuple):
    model: Path
    pictures: Path
    backbone: Path
    results: dict  # script's name -> Result


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The whole order of work, once."""
    folder = tmp_path_factory.mktemp("chain")
    model, pictures, backbone = folder / "model", folder / "pictures", write_random_alexnet(folder / "alexnet.npz")
    for n in range(3):
        picture(pictures / f"{n}.png", seed=n)
    here = ["--model", model, "--data", "images", "--root", pictures]
    lpips = ["--lpips-backbone", backbone]
    results = {
        "train_recon": call(train_recon, *here, *TINY, *CROPS, *TINY_R),
        "train_gen": call(train_gen, *here, *TINY, *CROPS, *TINY_G, *lpips),
        "search": call(evaluate, *here, *lpips, *SEARCH),
        "labels": call(build_step_labels, *here, *lpips, *LABELS),
        "train_controller": call(train_controller, *here, *TINY, "--c", 2),
        "evaluate": call(evaluate, *here, *lpips, *EVALUATION, "--limit", 2, "--csv", folder / "table.csv"),
    }
    assert {name: result.code for name, result in results.items()} == dict.fromkeys(results, 0), results
    return Chain(model, pictures, backbone, results)


@pytest.fixture
def model(chain, tmp_path, monkeypatch):
    """A copy of the chain's model folder, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(chain.model, tmp_path / "model")


# What the chain wrote.

def test_the_model_folder(chain):
    assert {path.name for path in chain.model.iterdir()} == {
        "recon.pt", "gen.pt", "controller.pt", "schedule.json", "step_labels.jsonl", "last_recon.pt", "last_gen.pt",
        "last_controller.pt", "train_recon.jsonl", "train_gen.jsonl", "train_controller.jsonl"}
    loaded = RnG.load(chain.model, "cpu")
    assert loaded.recon.config["width"] == 4 and loaded.gen.config["base"] == 4 and loaded.controller.config == {"c": 2}
    assert not any(result.errors for result in chain.results.values())


def test_stage_2_validates_with_lpips(chain):
    last = json.loads((chain.model / "train_gen.jsonl").read_text().splitlines()[-1])
    assert {"iteration", "images_per_s", "loss", "generated_std", "residual_std",
            "psnr", "psnr_recon", "lpips", "lpips_recon"} == last.keys()


def test_schedule(chain):
    found = json.loads((chain.model / "schedule.json").read_text())
    ends, details = found["end"], found["detail"]
    assert list(ends) == list(details) == [str(steps) for steps in range(10, 101, 10)]
    rows = [line.split("|")[1:-1] for line in chain.results["search"].out.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[0]) for row in rows] == list(range(10, 101, 10))
    least = ddpm.linear_schedule(2000, checkpoint.load_gen(chain.model / "gen.pt")[1]["train_end"]).gamma[-1]
    for steps, *cells, chosen in rows:
        tried = {end: re.fullmatch(r" (\S+) \((\S+)\) ", cell).groups()
                 for end, cell in zip((0.3, 0.5), cells) if cell != " - "}
        assert list(tried) == ([end for end in (0.3, 0.5) if least <= ddpm.linear_schedule(int(steps), end).gamma[-1] <= 0.1] or [0.3])
        assert float(chosen) == ends[steps.strip()]
        score, best = tried[float(chosen)]
        assert float(score) == min(float(score) for score, _ in tried.values())
        assert float(best) == details[steps.strip()] in (0.5, 1)
    loaded = RnG.load(chain.model, "cpu")
    assert loaded.variance == found["variance"] == "paper"
    np.testing.assert_array_equal(loaded.schedule(30).gamma, ddpm.linear_schedule(30, ends["30"]).gamma)
    np.testing.assert_array_equal(loaded.schedule(25).gamma, ddpm.linear_schedule(25, 10 / 25).gamma)


def labels_of(model):
    return [json.loads(line) for line in (model / "step_labels.jsonl").read_text().splitlines()]


def test_labels(chain):
    found = labels_of(chain.model)
    assert len(found) == 3 and len({label["seed"] for label in found}) == 3
    for label in found:
        assert {"image", "top", "left", "size", "sigma", "clip", "seed", "lpips", "best"} <= label.keys()
        assert (chain.pictures / label["image"]).exists()
        assert 0 <= label["top"] <= 100 - 64 and 0 <= label["left"] <= 200 - 64 and label["sigma"] == 25
        assert len(label["lpips"]) == 11 and all(np.isfinite(label["lpips"]))
        assert label["best"] == 10 * label["lpips"].index(min(label["lpips"]))


def test_a_label_can_be_made_again(chain):
    """From its line and the model alone; here for 0 and 20 steps."""
    label = labels_of(chain.model)[1]
    loaded, lpips = RnG.load(chain.model, "cpu"), build_step_labels.metrics.LPIPS(chain.backbone)
    clean = read_rgb(chain.pictures / label["image"])
    noisy, clean = labels.patch(clean, None, label)
    x, y_r = noisy[None], loaded.reconstruct(noisy[None])
    piece = np.s_[..., :64, :64]

    def noise(key, index):
        return build_step_labels.tiling.patch_noise(label["seed"], key, 0, 0)[piece][None]

    for steps in (0, 20):
        y = (y_r + loaded.detail_of(steps) * loaded.generate(x, y_r, [steps], noise)).clamp(0, 1)
        assert lpips(y, clean[None]).item() == pytest.approx(label["lpips"][STEPS.index(steps)], abs=2e-4)


def table(text):
    """The rows of the Markdown table: lists of cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["sigma", "method", "LPIPS", "NIQE", "PSNR", "SSIM", "steps"]
    return rows[1:]


def test_table(chain):
    result = chain.results["evaluate"]
    [protocol] = [line for line in result.out.splitlines() if line.startswith("Protocol: ")]
    assert "2 pictures" in protocol and "not clipped" in protocol and "PSNR on RGB" in protocol
    rows = table(result.out)
    methods = ["ground truth", "noisy input", "r alone", "0 steps", "10 steps", "RnG", "best of these counts for each picture"]
    assert [row[1] for row in rows] == 3 * methods
    assert [row[0] for row in rows[::7]] in (["15.0", "50.0", "mean"], ["15", "50", "mean"])
    for truth, noisy, r, zero, ten, chosen, best in (rows[i:i + 7] for i in (0, 7, 14)):
        assert truth[-1] == noisy[-1] == "-" and [row[-1] for row in (r, zero, ten)] == ["0.0", "0.0", "10.0"]
        assert [truth[2], *truth[4:6]] == ["0.0000", "inf", "1.0000"]
        assert r[2:6] == zero[2:6] != ten[2:6]
        assert 0 <= float(chosen[-1]) <= 100
        assert all(np.isfinite(float(cell)) for row in (noisy, r, ten, chosen, best) for cell in row[2:6])
        assert float(best[2]) <= min(float(r[2]), float(ten[2])) and 0 <= float(best[-1]) <= 10
    assert float(rows[1][4]) == pytest.approx(20 * np.log10(255 / 15), abs=0.7)  # a little more, by clipping to 8 bit

    with open(chain.model.parent / "table.csv", newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["sigma", "method", "LPIPS", "NIQE", "PSNR", "SSIM", "steps"] and len(lines) == len(rows)
    for line, row in zip(lines, rows):
        assert line[:2] == row[:2]
        for value, cell in zip(line[2:], row[2:]):
            assert cell == "-" if value == "nan" else f"{float(value):.{len(cell.partition('.')[2])}f}" == cell


def test_mean_row(chain):
    rows = table(chain.results["evaluate"].out)
    for low, high, mean in list(zip(rows[:7], rows[7:14], rows[14:]))[1:]:
        assert float(mean[4]) == pytest.approx((float(low[4]) + float(high[4])) / 2, abs=0.011)


def test_denoise(chain, tmp_path):
    picture(tmp_path / "noisy.png", 40, 60)

    def denoised(*options):
        out = tmp_path / "out.png"
        result = call(denoise, tmp_path / "noisy.png", out, "--model", chain.model, "--device", "cpu", *options)
        assert result.code == 0 and not result.errors and Image.open(out).size == (60, 40)
        return out.read_bytes()

    first = denoised("--steps", 10)
    assert denoised("--steps", 10) == first
    assert denoised("--steps", 10, "--seed", 1) != first
    assert denoised("--steps", 10, "--detail", 0) == denoised("--steps", 0)
    steps = int(RnG.load(chain.model, "cpu").denoise(read_rgb(tmp_path / "noisy.png"), parts=True).steps[0, 0])
    assert denoised() == denoised("--steps", steps)


# The label file.

@pytest.fixture
def label(chain, model, monkeypatch):
    """label(patches, *options) -> Result of build_step_labels.py on few and small step counts."""
    for module in (build_step_labels, labels):
        monkeypatch.setattr(module, "STEPS", (0, 1, 2))

    def label(patches, *options):
        return call(build_step_labels, "--model", model, "--data", "images", "--root", chain.pictures, *LABELS,
                    "--lpips-backbone", chain.backbone, "--patches", patches, *options)

    (model / "step_labels.jsonl").unlink()
    return label


def test_labels_go_on_after_a_torn_line(label, model):
    path = model / "step_labels.jsonl"
    assert label(5).code == 0
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.unlink()
    assert label(2).code == 0
    assert path.read_bytes() == b"".join(lines[:2])  # a patch is a function of its number
    with open(path, "ab") as file:
        file.write(lines[2][:-20])
    result = label(5)
    assert result.code == 0 and path.read_bytes() == whole
    assert "patch 3/5" in result.err and "patch 2/5" not in result.err
    assert label(5).code == 0 and label(3).code == 0 and path.read_bytes() == whole


def test_labels_of_a_model_that_ships_lie_beside_it(label, model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    model.rename(tmp_path / "weights" / "shipped")
    assert label(1, "--model", "shipped").code == 0
    assert len(labels_of(tmp_path / "weights" / "shipped")) == 1


def test_ties_go_to_the_smaller_step(label, model, monkeypatch):
    monkeypatch.setattr(build_step_labels, "lpips_of_each_step", lambda *arguments: [0.2, 0.1, 0.1])
    assert label(1).code == 0
    assert labels_of(model)[0]["best"] == 1


def test_fewer_counts_are_the_same_values_and_the_only_choices(chain, label, model):
    assert label(6).code == 0
    all_three = labels_of(model)
    (model / "step_labels.jsonl").unlink()
    assert label(6, "--counts", 2, 0).code == 0
    for few, full in zip(labels_of(model), all_three, strict=True):
        zero, one, two = few["lpips"]
        assert one is None and few["best"] == (0 if zero <= two else 2)
        np.testing.assert_allclose([zero, two], full["lpips"][::2], rtol=1e-3)
    args = argparse.Namespace(model=model, data=["images"], root=[str(chain.pictures)])
    assert train_controller.labelled_patches(args, labels_of(model))[1].isinf().sum(dim=0).tolist() == [0, 6, 0]


@pytest.mark.parametrize("noise", [
    "--sigma 0-55 --clip-noisy 0.5", "--camera 1", "pairs", "two sets with the same names"])
def test_the_controller_sees_the_patches_that_were_labelled(noise, label, model, chain, tmp_path, monkeypatch):
    seen = []

    def remember(model, lpips, noisy, clean, seed, counts):
        seen.append(noisy)
        return [0.0] * 3

    monkeypatch.setattr(build_step_labels, "lpips_of_each_step", remember)
    data, roots, options = ["images"], [chain.pictures], []
    if noise == "pairs":
        for n in range(3):
            picture(tmp_path / "pairs" / "noisy" / f"{n}.png", seed=n)
            picture(tmp_path / "pairs" / "clean" / f"{n}.png", seed=10 + n)
        data, roots = ["pairs"], [tmp_path / "pairs"]
    elif noise.startswith("two"):
        for n in range(3):
            picture(tmp_path / "others" / f"{n}.png", seed=10 + n)
        data, roots = ["images", "images"], [chain.pictures, tmp_path / "others"]
    else:
        options = noise.split()
    assert label(6, "--data", *data, "--root", *roots, *options).code == 0
    args = argparse.Namespace(model=model, data=data, root=[str(root) for root in roots])
    patches, scores = train_controller.labelled_patches(args, labels.read(model))
    assert torch.equal(patches, torch.stack(seen).half()) and scores.shape == (6, 3)


def test_a_torn_line_is_no_reason_to_label_again(model, chain):
    """It is dropped, as build_step_labels.py does; the whole labels are hours of work."""
    path = model / "step_labels.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (model / "last_controller.pt").unlink()
    result = call(train_controller, "--model", model, "--data", "images", "--root", chain.pictures, *TINY, "--c", 2)
    assert result.code == 0 or "remove" not in result.errors[0]


# Evaluation's options.

def score(chain, model, *options, backbone=True, data="images", root=None):
    lpips = ["--lpips-backbone", chain.backbone] if backbone else []
    return call(evaluate, "--model", model, "--data", data, "--root", root or chain.pictures, *lpips,
                "--device", "cpu", "--limit", 1, "--steps", *options)


def test_without_lpips_the_other_metrics_show(chain, model, monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.delenv("RNG_ALEXNET", raising=False)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    (model / "controller.pt").unlink()
    result = score(chain, model, "--sigma", 25, backbone=False)
    assert result.code == 0 and not result.errors
    assert "--lpips-backbone" in result.err  # says how to get it
    for row in table(result.out)[1:]:
        assert row[2] == "-" and all(np.isfinite(float(cell)) for cell in row[3:6])
    assert Path("evaluation.csv").exists()

    before = tree(Path())
    for script, options in ((build_step_labels, LABELS), (evaluate, SEARCH)):
        result = call(script, "--model", model, "--data", "images", "--root", chain.pictures, *options)
        assert result.code == 2 and len(result.errors) == 1 and "--lpips-backbone" in result.errors[0]
    assert tree(Path()) == before


def test_the_ramp_sets_the_detail_of_each_step_count(chain, model):
    """It rises from 10 to --ramp-steps and stays; 0 detail makes every count r alone."""
    options = ["--model", model, "--data", "images", "--root", chain.pictures, "--lpips-backbone", chain.backbone, *SEARCH]
    assert call(evaluate, *options, "--ramp", "0.5", "1.5", "--ramp-steps", "60").code == 0
    found = json.loads((model / "schedule.json").read_text())["detail"]
    assert [found[str(steps)] for steps in range(10, 101, 10)] == [0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.5, 1.5, 1.5, 1.5]
    result = call(evaluate, *options, "--ramp", "0", "0")
    alone, best = (float(part.rsplit(" ", 1)[1]) for part in result.out.splitlines()[-1].split(";"))
    assert result.code == 0 and alone == best


def test_clip_noisy_rounds_the_input_to_8_bit(chain, model, monkeypatch):
    inputs = []

    def remember(self, image, steps, *args, **options):
        inputs.append(image)
        return pipeline.Parts(image, image, np.zeros_like(image), np.zeros((1, 1), int))

    monkeypatch.setattr(RnG, "denoise", remember)
    (model / "controller.pt").unlink()
    tables = []
    for options in (["--clip-noisy"], []):
        result = score(chain, model, "--sigma", 50, *options)
        assert result.code == 0 and ("clipped and 8-bit" in result.out) == bool(options)
        tables.append(table(result.out))
    clean = read_rgb(chain.pictures / "0.png")
    noisy = clean / 255 + np.random.RandomState(0).normal(0, 50 / 255, clean.shape)
    np.testing.assert_allclose(inputs[0], (noisy.clip(0, 1) * 255).round() / 255, atol=1e-6)
    np.testing.assert_allclose(inputs[1], noisy, atol=1e-6)
    assert inputs[1].dtype == np.float32 and inputs[1].min() < 0
    assert tables[0] == tables[1]  # the output is rounded in any case


def psnr(noisy, clean):
    return -10 * np.log10((((noisy.astype(float) - clean) / 255) ** 2).mean())


def test_metric_patches(chain, model, tmp_path):
    picture(tmp_path / "large" / "0.png", 256, 560)
    (model / "controller.pt").unlink()
    result = score(chain, model, "--sigma", 25, "--metric-patches", root=tmp_path / "large")
    assert result.code == 0 and "256 x 256 patches" in result.out
    clean = read_rgb(tmp_path / "large" / "0.png")
    noisy = clean / 255 + np.random.RandomState(0).normal(0, 25 / 255, clean.shape)
    noisy = (noisy.clip(0, 1) * 255).round()
    expected = np.mean([psnr(noisy[:, here], clean[:, here]) for here in (np.s_[:256], np.s_[256:512])])
    assert table(result.out)[1][4] == f"{expected:.2f}"
    assert len(score(chain, model, "--sigma", 25, "--metric-patches").errors) == 1  # 100 x 200 is too small


def test_pairs_have_their_own_noise(chain, model, tmp_path):
    picture(tmp_path / "pairs" / "noisy" / "a.png", seed=1)
    picture(tmp_path / "pairs" / "clean" / "a.png", seed=2)
    (model / "controller.pt").unlink()
    result = score(chain, model, "--centre-crop", 64, data="pairs", root=tmp_path / "pairs")
    assert result.code == 0 and "real noise" in result.out and "centre 64 x 64" in result.out
    rows = table(result.out)
    assert [row[:2] for row in rows] == [["-", "ground truth"], ["-", "noisy input"], ["-", "r alone"]]
    assert all(row[3] == "-" for row in rows)  # too small for NIQE
    noisy, clean = (read_rgb(tmp_path / "pairs" / side / "a.png")[18:82, 68:132] for side in ("noisy", "clean"))
    assert rows[1][4] == f"{psnr(noisy, clean):.2f}"


# Bad input: one sentence, exit code 2, nothing written.

ALL = {"train_recon": train_recon, "train_gen": train_gen, "evaluate": evaluate, "build_step_labels": build_step_labels,
       "train_controller": train_controller, "denoise": denoise}


def refused(chain, script, *options, model="model"):
    """Calls a script that must refuse -> its sentence."""
    args = ["--model", model, "--device", "cpu"]
    if script == "denoise":
        picture(Path("noisy.png"), 20, 20)
        args = ["noisy.png", "out.png", *args]
    else:
        args += ["--data", "images", "--root", chain.pictures]
    if script.startswith("train"):
        args += ["--batch", 2, "--iterations", 4, *(["--c", 2] if script == "train_controller" else CROPS)]
    if script == "train_recon":
        args += TINY_R
    if script == "train_gen":
        args += TINY_G
    if script in ("train_gen", "evaluate", "build_step_labels"):
        args += ["--lpips-backbone", chain.backbone]
    before = tree(Path())
    result = call(ALL[script], *args, *options)
    assert result.code == 2, result.err
    assert len(result.errors) == 1 and "Traceback" not in result.err
    assert result.err.splitlines()[-1] == result.errors[0]
    assert tree(Path()) == before
    return result.errors[0]


@pytest.mark.parametrize("script", ["train_gen", "evaluate", "build_step_labels", "train_controller", "denoise"])
def test_a_missing_model_folder(script, chain, model):
    assert "nowhere" in refused(chain, script, model="nowhere")


@pytest.mark.parametrize("script", ["train_gen", "evaluate", "build_step_labels", "denoise"])
def test_a_model_without_r(script, chain, model):
    for path in model.glob("*.pt"):
        path.unlink()
    assert "recon.pt" in refused(chain, script)


@pytest.mark.parametrize("script, option", [
    ("build_step_labels", []), ("evaluate", ["--search-schedule"]), ("denoise", ["--steps", "10"])])
def test_a_model_without_g(script, option, chain, model):
    (model / "gen.pt").unlink()
    refused(chain, script, *option)


def test_a_model_without_s(chain, model):
    (model / "controller.pt").unlink()
    assert "--steps" in refused(chain, "denoise")


@pytest.mark.parametrize("script", ["train_recon", "train_gen", "evaluate", "build_step_labels", "train_controller"])
@pytest.mark.parametrize("data, layout", [
    ("images", "folder"), ("pairs", "noisy"), ("div2k", "DIV2K"), ("sidd", "https://www.eecs.yorku.ca/~kamel/sidd")])
def test_a_missing_data_folder(data, layout, script, chain, model):
    for path in model.glob("last_*"):
        path.unlink()
    message = refused(chain, script, "--data", data, "--root", "nodata")
    assert "nodata" in message and layout in message


WEIGHT_FILES = [("evaluate", "recon"), ("evaluate", "gen"), ("evaluate", "controller"), ("train_gen", "recon"),
                ("build_step_labels", "gen"), ("denoise", "controller"), ("train_recon", "last_recon"),
                ("train_gen", "last_gen"), ("train_controller", "last_controller")]


def damaged(content, how):
    third = len(content) // 3
    return {"truncated": content[:-1000], "overwritten": content[:third] + bytes(third) + content[2 * third:],
            "empty": b"", "text": b"hello\n", "zeros": bytes(500), "random": np.random.default_rng(0).bytes(3000)}[how]


@pytest.mark.parametrize("script, name", WEIGHT_FILES)
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty", "text", "zeros", "random"])
def test_a_damaged_weight_file(damage, script, name, chain, model):
    path = model / f"{name}.pt"
    path.write_bytes(damaged(path.read_bytes(), damage))
    assert f"{name}.pt" in refused(chain, script)


@pytest.mark.parametrize("script, name", WEIGHT_FILES)
def test_a_weight_file_of_another_kind(script, name, chain, model):
    other = "gen" if name == "recon" else "recon"
    shutil.copy(model / f"{other}.pt", model / f"{name}.pt")
    assert f"{name}.pt" in refused(chain, script)


def test_a_weight_file_whose_parts_do_not_fit(chain, model):
    content = checkpoint.load_weights(model / "gen.pt", "gen")
    content["config"]["unet"]["base"] = 8
    torch.save(content, model / "gen.pt")
    assert "gen.pt" in refused(chain, "evaluate")
    torch.save({"params": {"conv.weight": torch.zeros(1)}}, model / "recon.pt")
    assert "recon.pt" in refused(chain, "evaluate")


@pytest.mark.parametrize("content", [
    "", "{", "[]", "3", '{"end": 3}', '{"end": {}, "variance": "none"}', '{"ends": {}}', '{"end": {"ten": 0.5}}', '{"end": {"10": "x"}}',
    '{"end": {"10": 2}}', '{"end": {"0": 0.5}}', '{"end": {"10": NaN}}', '{"end": {}, "detail": {"10": 3}}',
    '{"end": {}, "detail": []}', '{"end": {}, "detail": {"10": NaN}}'])
def test_a_malformed_schedule(content, chain, model):
    (model / "schedule.json").write_text(content)
    assert "schedule.json" in refused(chain, "evaluate")


@pytest.mark.parametrize("line", [
    "hello", "{", "3", "[]", "{}", '{"lpips": [1, 2]}', '{"lpips": 3}', "no image", "no seed", "10 values", "text",
    "no such picture"])
def test_malformed_labels(line, chain, model):
    path = model / "step_labels.jsonl"
    lines = path.read_text().splitlines()
    label = json.loads(lines[1])
    changes = {"no image": lambda: label.pop("image"), "no seed": lambda: label.pop("seed"),
               "10 values": lambda: label["lpips"].pop(), "text": lambda: label.update(lpips=["a"] * 11),
               "no such picture": lambda: label.update(image="nobody")}
    if line in changes:
        changes[line]()
        line = json.dumps(label)
    path.write_text("\n".join([lines[0], line, lines[2]]) + "\n")
    (model / "last_controller.pt").unlink()
    assert "step_labels.jsonl" in refused(chain, "train_controller")


NAN = float("nan")


@pytest.mark.parametrize("key, value", [
    *((key, value) for key in ("n", "set", "top", "left", "size", "seed") for value in ("1", -1, 1.5, None, True, [1])),
    ("size", 0), ("size", 257), *(("sigma", value) for value in ("high", -1, 256, NAN, [25], {})),
    *(("image", value) for value in (None, 3, ["0.png"])), *(("clip", value) for value in (None, 0, "no")),
    *(("lpips", value) for value in (
        [0.1] * 10, [0.1] * 12, [None] * 11, [NAN] * 11, [0.1] * 10 + [NAN], [0.1] * 10 + [float("inf")], [-0.1] * 11,
        [True] * 11, ["0.1"] * 11, [[0.1]] * 11, "01234567890", 0.1, None, {"0": 0.1}))])
def test_labels_with_a_value_that_cannot_be(key, value, model):
    path = model / "step_labels.jsonl"
    first, *others = labels_of(model)
    path.write_text("".join(json.dumps(label) + "\n" for label in [{**first, key: value}, *others]))
    with pytest.raises(InputError, match="step_labels.jsonl is damaged"):
        labels.read(model)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"n":' * 100_000, '{"n": %s}' % ("1" * 5000), None], ids=range(4))
def test_a_label_file_that_is_none(line, chain, model):
    path = model / "step_labels.jsonl"
    path.unlink()
    if line:
        path.write_text(line + "\n")
    else:
        path.mkdir()
    assert "step_labels.jsonl" in refused(chain, "train_controller")
    assert "step_labels.jsonl" in refused(chain, "build_step_labels")


@pytest.mark.parametrize("options", ["--sigma 50", "--sigma 25 50", "--seed 1", "--counts 0 10", "--size 80", "--camera 0.5",
                                     "--clip-noisy 1", "--data images images --root ROOT ROOT", "--data sample --root ROOT"])
def test_labels_of_other_options_are_refused(options, chain, model):
    words = options.replace("ROOT", str(chain.pictures)).split()
    message = refused(chain, "build_step_labels", *LABELS, *words)
    assert words[0] in message and "another --model folder" in message


def test_labels_go_on_where_what_differs_does_not_matter(chain, model):
    """Device, number of patches, weights that mean the same; and files of old, which do not say their options."""
    path = model / "step_labels.jsonl"
    whole = path.read_bytes()
    here = ["--model", model, "--data", "images", "--root", chain.pictures, "--lpips-backbone", chain.backbone, *LABELS]
    assert call(build_step_labels, *here, "--weight", 3, "--patches", 2, "--precision", "bfloat16").code == 0
    assert path.read_bytes() == whole
    found = [{key: value for key, value in label.items() if key != "options"} for label in labels_of(model)]
    path.write_text("".join(json.dumps(label) + "\n" for label in found))
    old = path.read_bytes()
    assert call(build_step_labels, *here, "--sigma", 50).code == 0 and path.read_bytes() == old


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(label, model, chain, tmp_path):
    root = shutil.copytree(chain.pictures, tmp_path / "pictures")
    assert label(8).code == 0
    path = model / "step_labels.jsonl"
    whole = labels_of(model)
    path.unlink()
    (root / "1.png").write_bytes(b"no picture")
    rest = [found for found in whole if found["image"] != "1.png"]
    for _ in range(2):
        result = label(8, "--root", root)
        assert result.code == 2 and labels_of(model) == rest and 0 < len(rest) < 8
        [error] = result.errors
        assert error.count("1.png") == 1 and f"{8 - len(rest)} of the patches" in error and result.err.endswith(f"{error}\n")
    shutil.copy(chain.pictures / "1.png", root)
    assert label(8, "--root", root).code == 0 and labels.read(model) == whole


def test_labels_on_a_full_disk():
    with pytest.raises(InputError, match="could not be written"):
        labels.append(Path("/dev/full"), {"n": 0})


@pytest.mark.parametrize("change", ["more", "fewer", "another value"])
def test_s_does_not_go_on_with_other_labels(change, chain, model):
    here = ["--model", model, "--data", "images", "--root", chain.pictures, *TINY, "--c", 2]
    result = call(train_controller, *here)
    assert result.code == 0 and "going on at iteration 4" in result.err
    path, found = model / "step_labels.jsonl", labels_of(model)
    if change == "more":
        found.append({**found[0], "n": 3})
    elif change == "fewer":
        found.pop()
    else:
        found[1]["lpips"][4] += 0.01
    path.write_text("".join(json.dumps(label) + "\n" for label in found))
    message = refused(chain, "train_controller", "--precision", "float32")
    assert "label-set (3 labels, hash " in message and f"now {len(found)} labels, hash " in message


@pytest.mark.parametrize("seed", range(20))
def test_whole_pictures_are_held_out(seed):
    """About the share asked for, from the labels alone; none of their pictures is trained on."""
    random = np.random.default_rng(seed)
    pictures, number, share = int(random.integers(2, 30)), int(random.integers(2, 300)), random.uniform(0, 0.9)
    found = [{"n": n, "set": int(random.integers(2)), "image": str(random.integers(pictures))} for n in range(number)]
    ordered, held_out = train_controller.held_out_first(found, share)
    assert sorted(ordered, key=lambda label: label["n"]) == found
    names = [(label["set"], label["image"]) for label in ordered]
    assert not set(names[:held_out]) & set(names[held_out:]) and held_out > 0
    assert abs(held_out - share * number) <= max(map(names.count, names))
    assert train_controller.held_out_first(found, 1)[1] == number
    assert train_controller.held_out_first([], share) == ([], 0)


@pytest.mark.parametrize("change", ["one picture", "a smaller picture", "a pair"])
def test_labels_that_do_not_fit_their_pictures(change, chain, model, tmp_path):
    root, data, mention = tmp_path / "others", "images", "is not the one of label"
    path, found = model / "step_labels.jsonl", labels_of(model)
    (model / "last_controller.pt").unlink()
    for n in range(3):
        if change == "a pair":
            for side in ("noisy", "clean"):
                picture(root / side / f"{n}.png", seed=n)
        else:
            picture(root / f"{n}.png", *((20, 30) if change == "a smaller picture" else ()), seed=n)
    if change == "a pair":
        data = "pairs"
    if change == "one picture":
        path.write_text("".join(json.dumps({**label, "image": "0.png"}) + "\n" for label in found))
        mention = "hold out"
    assert mention in refused(chain, "train_controller", "--data", data, "--root", root)


def test_labels_of_another_g_are_refused(chain, model):
    path = model / "step_labels.jsonl"
    path.write_text(re.sub('"gen": "[0-9a-f]{16}"', '"gen": "0123456789abcdef"', path.read_text()))
    assert "another gen.pt" in refused(chain, "train_controller")
    assert "another gen.pt" in refused(chain, "build_step_labels")


def test_labels_of_another_schedule_are_refused(chain, model):
    content = json.loads((model / "schedule.json").read_text())
    content["end"]["10"] = 0.123
    (model / "schedule.json").write_text(json.dumps(content))
    assert "another schedule.json" in refused(chain, "train_controller")
    (model / "controller.pt").unlink()
    assert "another schedule.json" in refused(chain, "build_step_labels")


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_labels(count, chain, model):
    path = model / "step_labels.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    (model / "last_controller.pt").unlink()
    assert "build_step_labels.py" in refused(chain, "train_controller")


@pytest.mark.parametrize("size", [-1, 0, 63, 257])
def test_label_patches_out_of_range(size, chain, model):
    assert "--size" in refused(chain, "build_step_labels", "--size", size)


@pytest.mark.parametrize("place", ["nowhere/table.csv", "model"])
def test_a_table_that_cannot_be_written(place, chain, model):
    (model / "controller.pt").unlink()
    assert place in refused(chain, "evaluate", "--csv", place, "--limit", 1, "--sigma", 25, "--steps")


@pytest.mark.parametrize("command", [
    "train_recon --batch 0", "train_recon --iterations -1", "train_recon --crop 0", "train_recon --save-every 0",
    "train_recon --validation 0", "train_recon --seed -1", "train_recon --workers -1", "train_recon --weight 0",
    "train_recon --weight 1 1", "train_recon --width 0", "train_recon --dec 1 1", "train_recon --init nowhere.pt",
    "train_recon --init noisy.png", "train_gen --crop 16", "train_gen --residual-scale 0",
    "train_controller --holdout 1", "train_controller --holdout -1", "train_controller --c 0",
    "build_step_labels --seed -1", "evaluate --limit -1", "evaluate --sigma -5", "evaluate --steps -1",
    "evaluate --centre-crop -1", "evaluate --seed -1", "evaluate --device nowhere",
    "evaluate --ends 1 --search-schedule", "evaluate --centre-crop 8 --search-schedule",
    "evaluate --lpips-backbone noisy.png",
])
def test_options_out_of_range(command, chain, model):
    for path in model.glob("last_*"):
        path.unlink()
    picture(Path("noisy.png"), 20, 20)
    refused(chain, *command.split())


# The README and the scripts' own examples.

class Parsed(Exception):
    """Raised in place of everything that a script does after its options are read."""


def commands():
    """Every `python SCRIPT ...` of the README and of the scripts' docstrings."""
    text = README.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`(python \w+\.py [^`]*)`", text)
    for script in ALL.values():
        lines += [re.sub(r"\s{2,}\(.*\)$", "", line) for line in script.__doc__.splitlines()]
    for name, value in re.findall(r'^(\w+)="(.*)"$', text, re.MULTILINE):
        lines = [line.replace(f"${name}", value) for line in lines]
    parts = [part.strip().removeprefix("$ ") for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"python \w+\.py\b", part)]


def test_the_readme_has_commands_for_every_script():
    assert {command.split()[1] for command in commands()} == {f"{name}.py" for name in ALL}


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_documented_commands_parse(command, monkeypatch):
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args, **options):
        real(parser, *args, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    _, script, *args = shlex.split(command, comments=True)
    main = importlib.import_module(script.removesuffix(".py")).main
    with pytest.raises(Parsed):
        main(args)
    with pytest.raises(SystemExit):
        main([*args, "--no-such-option"])


def paper_to_code():
    """Rows (file, names) of the README's table."""
    section = re.search(r"^#+ Paper to code\n(.*?)(?=^#+ |\Z)", README.read_text(), re.DOTALL | re.MULTILINE)[1]
    rows = [line.split("|") for line in section.splitlines() if re.match(r"\|.*`[\w/]+\.py`", line)]
    return [(re.search(r"`(.*?)`", row[2])[1], re.findall(r"`(.*?)`", row[3])) for row in rows]


def test_every_name_in_the_map_exists():
    rows = paper_to_code()
    assert len(rows) >= 10
    for file, names in rows:
        assert (ROOT / file).is_file() and names
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for name in names:
            thing = module
            for part in name.split("."):
                thing = getattr(thing, part)
            if callable(thing):
                assert thing.__module__ == module.__name__, f"{name} is not defined in {file}"


def test_every_promise_of_the_readme_has_its_test():
    section = re.search("## What you can rely on\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)[1]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        for file, names in re.findall(r"`(test_\w+\.py)`((?:[^`]|`(?!test_\w+\.py`))*)", row):
            source = (ROOT / "tests" / file).read_text()
            for name in re.findall(r"`(test_\w+)`", names):
                assert f"def {name}(" in source, f"{name} is not in {file}"
