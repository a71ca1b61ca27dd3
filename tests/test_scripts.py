"""The six scripts in their order, tiny: what each writes and what it refuses; the README's commands."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import ALL, ROOT, call, picture, write_random_alexnet
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio as psnr

import build_step_labels
import denoise
import evaluate
import train_controller
import train_gen
import train_recon
from rng import ddpm, folder, metrics, scoring, search, tiling
from rng.controller import STEPS
from rng.pipeline import RnG
from rng.support.data import Item
from rng.support.errors import InputError, append_line
from rng.support.images import read_rgb, to_8_bit
from rng.support.noise import KINDS, wide_mix

TINY = "--batch 2 --iterations 4 --save-every 4 --device cpu --precision float32".split()
TINY_R = "--width 4 --enc 1 --middle 1 --dec 1".split()
CROPS = "--crop 32 --validation 2 --workers 0 --sigma 25".split()
SEARCH = "--search-schedule --sigma 25 --centre-crop 32 --ends 0.3 0.5".split()
OPTIONS = {"train_recon": [*TINY, *CROPS, *TINY_R], "train_gen": [*TINY, *CROPS, "--base", 4, "--blocks", 1],
           "build_step_labels": "--sigma 25 --patches 3 --size 64".split(),
           "train_controller": [*TINY, "--c", 2], "evaluate": "--limit 1 --steps".split()}


class Chain(NamedTuple):
    model: Path
    pictures: Path
    backbone: Path
    results: dict  # step -> Result

    def run(self, script, *options, model="model"):
        """Runs a script with tiny settings on a model folder and the pictures, and with these options."""
        args = ["--model", model, "--device", "cpu", "--precision", "float32"]
        if script == "denoise":
            return call(denoise, "noisy.png", "out.png", *args, *options)
        if script in ("train_gen", "evaluate", "build_step_labels"):
            args += ["--lpips-backbone", self.backbone]
        args += ["--data", "images", "--root", self.pictures, *OPTIONS[script]]
        return call(ALL[script], *args, *options)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The whole order of work, once."""
    place = tmp_path_factory.mktemp("chain")
    chain = Chain(place / "model", place / "pictures", write_random_alexnet(place / "alexnet.npz"), {})
    for n in range(3):
        picture(chain.pictures / f"{n}.png", seed=n)
    table = *"--sigma 15 50 --steps 0 10 --limit 2 --csv".split(), place / "table.csv"
    for name, script, options in (
            ("r", "train_recon", ()), ("g", "train_gen", ()), ("search", "evaluate", SEARCH),
            ("labels", "build_step_labels", ()), ("s", "train_controller", ()), ("table", "evaluate", table)):
        chain.results[name] = chain.run(script, *options, model=chain.model)
        assert chain.results[name].code == 0, chain.results[name]
    return chain


@pytest.fixture
def model(chain, tmp_path, monkeypatch):
    """A copy of the chain's model folder, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(chain.model, tmp_path / "model")


def test_the_model_folder(chain):
    stages = "recon", "gen", "controller"
    assert {path.name for path in chain.model.iterdir()} == {"schedule.json", "step_labels.jsonl"}.union(
        *({f"{stage}.pt", f"last_{stage}.pt", f"train_{stage}.jsonl"} for stage in stages))
    loaded = RnG.load(chain.model, "cpu")
    assert loaded.recon.config["width"] == loaded.gen.config["base"] == 2 * loaded.controller.config["c"]


def test_schedule(chain):
    found = json.loads((chain.model / "schedule.json").read_text())
    ends = found["end"]
    rows = chain.results["search"].rows
    assert list(ends) == [row[0] for row in rows] == [str(T) for T in STEPS[1:]]
    for T, *cells, chosen in rows:
        tried = {end: float(cell) for end, cell in zip((0.3, 0.5), cells) if cell != "-"}
        assert float(chosen) == ends[T] and tried[float(chosen)] == min(tried.values())
    assert RnG.load(chain.model, "cpu").schedules == folder.Schedules(
        {int(T): end for T, end in ends.items()}, "paper")


def labels_of(model):
    return [json.loads(line) for line in (model / "step_labels.jsonl").read_text().splitlines()]


def write_labels(model, labels):
    (model / "step_labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels))


def test_labels_can_be_made_again(chain):
    """From their lines and the model alone; here for 0 and 20 steps."""
    loaded, lpips = RnG.load(chain.model, "cpu"), metrics.LPIPS(chain.backbone)
    labels = search.read_labels(chain.model)
    assert len(labels) == len({label.seed for label in labels}) == 3
    for label in labels:
        assert 0 <= label.top <= 100 - 64 and 0 <= label.left <= 200 - 64 and label.sigma == 25
        noisy, clean = search.labelled_patch(read_rgb(chain.pictures / label.image), None, label)
        x, y_r = noisy[None], loaded.reconstruct(noisy[None])
        for T in (0, 20):
            d_0 = loaded.generate(x, y_r, T, tiling.NoiseField([(label.seed, 0, 0)], 64, 64))
            y = (y_r + d_0).clamp(0, 1)
            assert lpips(y, clean[None]).item() == pytest.approx(label.lpips[STEPS.index(T)], abs=2e-4)


def test_labels_of_the_wide_mix_have_the_kinds_of_the_trainings(chain):
    args = SimpleNamespace(seed=0, size=8, noise="wide")
    sets, made_with = [[Item("", chain.pictures / "0.png")]], dict(gen="", schedule=None, options="")
    kinds = [build_step_labels.draw_patch(args, sets, [1.0], n, made_with)[0].kind for n in range(800)]
    for kind, share in KINDS.items():
        assert kinds.count(kind) == pytest.approx(800 * share, abs=40), kind


def test_table(chain):
    result = chain.results["table"]
    assert re.match("Protocol: .*2 pictures.*not clipped.*PSNR on RGB", result.out)
    methods = ["ground truth", "noisy input", "r alone", "0 steps", "10 steps", "RnG",
               "best of these counts for each picture"]
    rows, sigmas = result.rows, ("15", "50", "mean")
    assert [row[:2] for row in rows] == [[sigma, method] for sigma in sigmas for method in methods]
    for truth, noisy, r, zero, ten, chosen, best in (rows[i:i + 7] for i in (0, 7, 14)):
        assert truth[-1] == noisy[-1] == "-" and [row[-1] for row in (r, zero, ten)] == ["0.0", "0.0", "10.0"]
        assert [truth[2], *truth[4:6]] == ["0.0000", "inf", "1.0000"] and r[2:6] == zero[2:6] != ten[2:6]
        assert all(np.isfinite(float(cell)) for row in (noisy, r, ten, chosen, best) for cell in row[2:6])
        assert float(best[2]) <= min(float(r[2]), float(ten[2]))
        assert 0 <= float(best[-1]) <= 10 and 0 <= float(chosen[-1]) <= 100
    for low, high, mean in zip(rows[1:7], rows[8:14], rows[15:]):
        assert float(mean[4]) == pytest.approx((float(low[4]) + float(high[4])) / 2, abs=0.011)
    assert float(rows[1][4]) == pytest.approx(20 * np.log10(255 / 15), abs=0.7)  # clipped to 8 bit

    lines = [line.split(",") for line in (chain.model.parent / "table.csv").read_text().splitlines()]
    assert lines[0] == ["sigma", "method", "LPIPS", "NIQE", "PSNR", "SSIM", "steps"]
    for line, row in zip(lines[1:], rows, strict=True):
        assert line[:2] == row[:2]
        for value, cell, digits in zip(line[2:], row[2:], (4, 3, 2, 4, 1)):
            assert cell == ("-" if value == "nan" else f"{float(value):.{digits}f}")


@pytest.fixture
def label(chain, model, monkeypatch):
    """label(patches, *options) -> Result of build_step_labels.py on few and small step counts."""
    for module in (build_step_labels, search):
        monkeypatch.setattr(module, "STEPS", (0, 1, 2))
    (model / "step_labels.jsonl").unlink()
    return lambda patches, *options: chain.run("build_step_labels", "--patches", patches, *options)


def test_labels_go_on_after_a_torn_line(label, model):
    path = model / "step_labels.jsonl"
    assert label(5).code == 0
    whole = search.read_labels(model)
    path.unlink()
    assert label(2).code == 0
    assert search.read_labels(model) == whole[:2]  # a patch is a function of its number
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines()[0][:-20])
    assert label(5).code == 0 and search.read_labels(model) == whole
    assert "patch" not in label(5).err + label(3).err and search.read_labels(model) == whole


@pytest.mark.parametrize("command", ["build_step_labels", "train_controller", "evaluate --search-schedule"])
def test_a_model_that_ships_stays_as_it_is(command, chain, model, monkeypatch):
    monkeypatch.setattr(folder, "WEIGHTS", Path("weights"))
    shutil.move(model, "weights/shipped")
    assert "no model shipped; name its folder" in refused(chain, *command.split(), "--model", "shipped")


def test_ties_go_to_the_smaller_step(chain, model):
    values = [0.1 if steps in (30, 70) else 0.2 for steps in STEPS]
    write_labels(model, [{**label, "lpips": values} for label in labels_of(model)])
    (model / "last_controller.pt").unlink()
    options = "--iterations", 40, "--save-every", 40, "--lr", 0.01
    assert chain.run("train_controller", *options).code == 0
    found = json.loads((model / "train_controller.jsonl").read_text().splitlines()[-1])
    assert found["mean_steps"] == found["fixed_steps"] == 30 and found["accuracy"] == 1


def patches_of_s(model, data=("images",), root=None):
    args = SimpleNamespace(model=model, data=data, root=root)
    return train_controller.labelled_patches(args, search.read_labels(model))


def test_fewer_counts_are_the_same_values_and_the_only_choices(chain, label, model):
    assert label(6).code == 0
    all_three = [label["lpips"] for label in labels_of(model)]
    (model / "step_labels.jsonl").unlink()
    assert label(6, "--counts", 2, 0).code == 0
    for few, full in zip(labels_of(model), all_three, strict=True):
        assert few["lpips"][1] is None
        np.testing.assert_allclose(few["lpips"][::2], full[::2], rtol=1e-3)
    assert patches_of_s(model, root=[chain.pictures])[1].isinf().sum(dim=0).tolist() == [0, 6, 0]


@pytest.mark.parametrize("data, roots, noise", [
    ("images", "a", "--sigma 0-55 --clip-noisy 0.5"), ("images", "a", "--camera 1"), ("pairs", ".", ""),
    ("images images", "noisy clean", "")])
def test_the_controller_sees_the_patches_that_were_labelled(data, roots, noise, label, model, monkeypatch):
    seen = []
    monkeypatch.setattr(search, "label_patches", lambda model, lpips, noisy, *_: (
        seen.extend(noisy) or [[0.0] * 3] * len(noisy)))
    for n in range(9):
        picture(Path(["a", "noisy", "clean"][n // 3], f"{n % 3}.png"), seed=n)
    data, roots = data.split(), roots.split()
    assert label(6, "--data", *data, "--root", *roots, *noise.split()).code == 0
    patches, scores = patches_of_s(model, data, roots)
    seen = dict(zip([label["n"] for label in labels_of(model)], seen))  # picture by picture
    assert torch.equal(patches, torch.stack([seen[n] for n in range(6)]).half()) and scores.shape == (6, 3)


def test_a_picture_that_cannot_be_read_does_not_stop_the_others(label, model, chain, tmp_path):
    root = shutil.copytree(chain.pictures, tmp_path / "pictures")
    assert label(8).code == 0
    whole = search.read_labels(model)
    (model / "step_labels.jsonl").unlink()
    (root / "1.png").write_bytes(b"no picture")
    rest = [found for found in whole if found.image != "1.png"]
    for _ in range(2):
        result = label(8, "--root", root)
        assert result.code == 2 and search.read_labels(model) == rest and 0 < len(rest) < 8
        [error] = result.errors
        assert f"{8 - len(rest)} of the patches" in error and error.count("1.png") == 1
    shutil.copy(chain.pictures / "1.png", root)
    assert label(8, "--root", root).code == 0 and search.read_labels(model) == whole


def test_labels_on_a_full_disk():
    with pytest.raises(InputError, match="/dev/full.*no space left"):
        append_line(Path("/dev/full"), "{}")


def test_without_lpips_the_other_metrics_show(chain, model, monkeypatch):
    monkeypatch.delenv("RNG_ALEXNET", raising=False)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: Path("no/network").open())
    here, before = ("--model", model, "--data", "images", "--root", chain.pictures, "--device", "cpu"), tree()
    result = call(evaluate, *here, "--sigma", 25, *OPTIONS["evaluate"])
    assert result.code == 0 and not result.errors and "--lpips-backbone" in result.err  # says how to get it
    for row in result.rows[1:]:
        assert row[2] == "-" and all(np.isfinite(float(cell)) for cell in row[3:6])
    for script, options in ((build_step_labels, ["--patches", 3]), (evaluate, SEARCH)):
        result = call(script, *here, *options)
        assert result.code == 2 and re.fullmatch("error: .*--lpips-backbone.*\n", result.err)
    assert tree() == before | {Path("evaluation.csv"): Path("evaluation.csv").read_bytes()}


def test_clip_noisy_rounds_the_input_to_8_bit(chain, model):
    """What is scored is then what denoise.py makes of the noisy picture that --save wrote."""
    clean, rows = read_rgb(chain.pictures / "0.png"), []
    expected = clean / 255 + np.random.RandomState(0).normal(0, 50 / 255, clean.shape)
    for options, pixels in ([], expected), (["--clip-noisy"], (expected.clip(0, 1) * 255).round()):
        result = chain.run("evaluate", "--sigma", 50, *options, "--steps", 2, "--save", "saved")
        assert result.code == 0 and ("clipped and 8-bit" in result.out) == bool(options)
        _, noisy = scoring.inputs(Item("", clean), 50, clip_noisy=bool(options))
        np.testing.assert_allclose(noisy, pixels, atol=1e-6)
        rows.append(result.rows)
    assert rows[0][:2] == rows[1][:2] and rows[0][2] != rows[1][2]
    shutil.copy("saved/noisy input/0.png", "noisy.png")
    for name, *steps in ("2 steps", "--steps", 2), ("RnG",):
        assert chain.run("denoise", *steps).code == 0
        assert np.array_equal(read_rgb(Path("out.png")), read_rgb(Path("saved", name, "0.png")))


def test_every_kind_of_noise_is_scored_and_its_pairs_are_written(chain, model):
    result = chain.run("evaluate", "--noise", *KINDS, "--steps", "--detail", 0, "--save", "saved")
    rows = [row[0] for row in result.rows if row[1] == "noisy input"]
    assert rows == [*KINDS, "mean"] and "noise drawn by each image's name" in result.out
    for kind in KINDS:
        clean, noisy = wide_mix(read_rgb(chain.pictures / "0.png") / np.float32(255),
                                np.random.default_rng([*b"0.png"]), kind)
        for expected, name in (clean, "ground truth"), (noisy, "noisy input"):
            assert np.array_equal(read_rgb(Path("saved", name, kind, "0.png")), to_8_bit(expected))


def test_metric_patches(chain, model):
    picture(Path("large/0.png"), 256, 560)
    (model / "controller.pt").unlink()
    result = chain.run("evaluate", "--sigma", 25, "--metric-patches", "--root", "large")
    assert "256 x 256 patches" in result.out
    clean = read_rgb(Path("large/0.png"))
    _, noisy = scoring.inputs(Item("", clean), 25, clip_noisy=True)
    expected = np.mean([psnr(noisy[:, here], clean[:, here]) for here in (np.s_[:256], np.s_[256:512])])
    assert result.rows[1][4] == f"{expected:.2f}"
    assert "--metric-patches" in refused(chain, "evaluate", "--metric-patches")  # 100 x 200 is too small


def test_pairs_have_their_own_noise(chain, model):
    picture(Path("pairs/noisy/a.png"), seed=1)
    picture(Path("pairs/clean/a.png"), seed=2)
    (model / "controller.pt").unlink()
    result = chain.run("evaluate", "--centre-crop", 64, "--data", "pairs", "--root", "pairs")
    assert "real noise" in result.out and "centre 64 x 64" in result.out
    assert [row[:2] for row in result.rows] == [["-", "ground truth"], ["-", "noisy input"], ["-", "r alone"]]
    assert all(row[3] == "-" for row in result.rows)  # too small for NIQE
    noisy, clean = (read_rgb(Path("pairs", side, "a.png"))[18:82, 68:132] for side in ("noisy", "clean"))
    assert result.rows[1][4] == f"{psnr(noisy, clean):.2f}"


# Bad input: one sentence, exit code 2, nothing written.

def tree():
    """Every file of the working folder, with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def refused(chain, script, *options):
    """Calls a script that must refuse -> its sentence."""
    picture(Path("noisy.png"), 20, 20)
    before = tree()
    result = chain.run(script, *options)
    assert result.code == 2, result.err
    assert result.err.splitlines()[-1:] == result.errors and tree() == before
    return result.errors[0]


@pytest.mark.parametrize("command, missing, sentence", [
    *((script, "*", "no model model;|model/[a-z]+.pt does not exist") for script in list(ALL)[1:]),
    *((script, "*.pt", "recon.pt") for script in ("train_gen", "evaluate", "build_step_labels", "denoise")),
    ("build_step_labels", "gen.pt", "gen.pt"), ("evaluate --search-schedule", "gen.pt", "train"),
    ("denoise --steps 10", "gen.pt", "gen.pt"), ("denoise", "controller.pt", "--steps"),
    ("train_recon", "last_recon.pt", "gen.pt")])
def test_a_model_folder_that_lacks_something(command, missing, sentence, chain, model):
    for path in model.glob(missing):
        path.unlink()
    if missing == "*":
        model.rmdir()
    assert re.search(sentence, refused(chain, *command.split()))


@pytest.mark.parametrize("script", [script for script in ALL if script != "denoise"])
@pytest.mark.parametrize("data, layout", [("images", "folder of clean PNG"), ("pairs", "noisy/ and clean/")])
def test_a_missing_data_folder(data, layout, script, chain, model):
    assert re.search(f"nodata.*{layout}", refused(chain, script, "--data", data, "--root", "nodata"))


@pytest.mark.parametrize("script, name", [
    ("evaluate", "recon"), ("evaluate", "gen"), ("evaluate", "controller"), ("train_gen", "recon"),
    ("build_step_labels", "gen"), ("denoise", "controller"), ("train_controller", "last_controller")])
def test_a_damaged_weight_file(script, name, chain, model):
    path = model / f"{name}.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{name}.pt" in refused(chain, script)


@pytest.mark.parametrize("line", [
    "hello", "{", "3", "[]", "{}", '{"lpips": [1, 2]}', '{"lpips": 3}', "[" * 100_000, '{"n":' * 100_000,
    '{"n": %s}' % ("1" * 5000), "no image", "no seed", "a folder"], ids=lambda line: line[:20])
def test_malformed_labels(line, chain, model):
    path = model / "step_labels.jsonl"
    first, second, third = labels_of(model)
    if line.startswith("no "):
        line = json.dumps({key: value for key, value in second.items() if key != line[3:]})
    path.write_text(f"{json.dumps(first)}\n{line}\n{json.dumps(third)}\n")
    if line == "a folder":
        path.unlink()
        path.mkdir()
    assert "step_labels.jsonl is damaged" in refused(chain, "train_controller")
    assert "step_labels.jsonl is damaged" in refused(chain, "build_step_labels")


@pytest.mark.parametrize("key, values", [
    *((key, ("1", -1, 1.5, None, True, [1])) for key in ("n", "set", "top", "left", "size", "seed")),
    ("size", (0, 257)), ("image", (None, 3, ["0.png"])), ("clip", (None, 0, "no")),
    ("sigma", ("high", -1, 256, np.nan, [25], {})),
    ("lpips", (*([0.1] * 10 + [bad] for bad in (np.nan, np.inf, -0.1, True, "0.1", [0.1])), [0.1] * 10,
               [0.1] * 12, [None] * 11, "01234567890", 0.1, None, {"0": 0.1}))])
def test_labels_with_a_value_that_cannot_be(key, values, model):
    first, *others = labels_of(model)
    for value in values:
        write_labels(model, [{**first, key: value}, *others])
        with pytest.raises(InputError, match="step_labels.jsonl is damaged"):
            search.read_labels(model)


@pytest.mark.parametrize("options", [
    "--sigma 50", "--sigma 25 50", "--seed 1", "--counts 0 10", "--size 80", "--camera 0.5", "--clip-noisy 1",
    "--data images images --root ROOT ROOT", "--data sample --root ROOT"])
def test_labels_of_other_options_are_refused(options, chain, model):
    words = options.replace("ROOT", str(chain.pictures)).split()
    message = refused(chain, "build_step_labels", *words)
    assert words[0] in message and "another --model folder" in message


def test_labels_go_on_where_what_differs_does_not_matter(chain, model):
    before, options = tree(), ("--weight", 3, "--patches", 2, "--precision", "bfloat16")
    assert chain.run("build_step_labels", *options).code == 0 and tree() == before


def test_labels_of_another_g_are_refused(chain, model):
    write_labels(model, [{**label, "gen": "0123456789abcdef"} for label in labels_of(model)])
    for script in ("train_controller", "build_step_labels"):
        assert "another gen.pt" in refused(chain, script)


def test_labels_of_another_schedule_are_refused(chain, model):
    content = json.loads((model / "schedule.json").read_text())
    content["end"]["10"] = 0.123
    (model / "schedule.json").write_text(json.dumps(content))
    assert "another schedule.json" in refused(chain, "train_controller")
    (model / "controller.pt").unlink()
    assert "another schedule.json" in refused(chain, "build_step_labels")


def test_a_torn_line_is_no_reason_to_label_again(chain, model):
    """It is dropped, as build_step_labels.py does; the whole labels are hours of work."""
    with open(model / "step_labels.jsonl", "a") as file:
        file.write('{"n": 3, "set": 0, "ima')
    assert chain.run("train_controller").code == 0


@pytest.mark.parametrize("change", [
    lambda found: [*found, {**found[0], "n": 3}], lambda found: found[:2],
    lambda found: [{**found[0], "lpips": [0.1] * 11}, *found[1:]]], ids=["more", "fewer", "another value"])
def test_s_does_not_go_on_with_other_labels(change, chain, model):
    result, found = chain.run("train_controller"), change(labels_of(model))
    assert result.code == 0 and "going on at iteration 4" in result.err
    write_labels(model, found)
    message = refused(chain, "train_controller")
    assert "label-set (was 3 labels, hash " in message and f"now {len(found)} labels, hash " in message


@pytest.mark.parametrize("seed", range(20))
def test_whole_pictures_are_held_out(seed):
    """About the share asked for, from the labels alone; none of their pictures is trained on."""
    random = np.random.default_rng(seed)
    pictures, number, share = random.integers(2, 30), random.integers(2, 300), random.uniform(0, 0.9)
    found = [SimpleNamespace(n=n, set=n % 2, image=random.integers(pictures)) for n in range(number)]
    ordered, held_out = train_controller.held_out_first(found, share)
    assert sorted(ordered, key=lambda label: label.n) == found
    names = [(label.set, label.image) for label in ordered]
    assert not set(names[:held_out]) & set(names[held_out:]) and held_out > 0
    assert abs(held_out - share * number) <= max(map(names.count, names))
    assert train_controller.held_out_first(found, 1)[1] == number
    assert train_controller.held_out_first([], share) == ([], 0)


@pytest.mark.parametrize("change, data, mention", [
    ({"image": "0.png"}, "large", "hold out"), ({"image": "nobody.png"}, "large", "nobody.png, not found"),
    ({}, "small", "is not the one of label"), ({}, "pairs", "is not the one of label"),
    (0, "large", "build_step_labels.py"), (1, "large", "build_step_labels.py")])
def test_labels_that_do_not_fit_their_pictures_or_are_too_few(change, data, mention, chain, model):
    found = labels_of(model)
    write_labels(model, found[:change] if type(change) is int else [{**label, **change} for label in found])
    for n in range(12):
        size = (20, 30) if n < 3 else (100, 200)
        picture(Path(("small", "large", "pairs/noisy", "pairs/clean")[n // 3], f"{n % 3}.png"), *size)
    options = "--data", "pairs" if data == "pairs" else "images", "--root", data
    assert mention in refused(chain, "train_controller", *options)


OUT_OF_RANGE = {
    "train_recon": "--batch 0, --iterations -1, --crop 0, --save-every 0, --validation 0, --seed -1, "
                   "--workers -1, --weight 0, --weight 1 1, --width 0, --dec 1 1, --init nowhere.pt, "
                   "--init noisy.png",
    "train_gen": "--crop 16, --residual-scale 0", "train_controller": "--holdout 1, --holdout -1, --c 0",
    "build_step_labels": "--seed -1, --size 63, --size 257",
    "evaluate": "--limit -1, --sigma -5, --steps -1, --centre-crop -1, --seed -1, --device nowhere, "
                "--lpips-backbone noisy.png, --csv nowhere/table.csv, --csv model, "
                "--ends 1 --search-schedule, --centre-crop 8 --search-schedule"}


@pytest.mark.parametrize("command", [f"{script} {option}" for script in OUT_OF_RANGE
                                     for option in OUT_OF_RANGE[script].split(", ")])
def test_options_out_of_range(command, chain, model):
    script, *options = command.split()
    assert re.search(f"{options[0]}|nowhere|noisy.png|cannot write model", refused(chain, script, *options))
