"""rng/pipeline.py with tiny random networks, against Algorithm 1 patch by patch; model folders' faults."""

import functools
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import split, stitch
from rng import pipeline, tiling
from rng.controller import StepController
from rng.folder import GenSettings, Schedules, load_model, made_with, save_schedules
from rng.nafnet import NAFNet
from rng.pipeline import RnG
from rng.support.checkpoint import fingerprint, save_weights
from rng.support.errors import InputError
from rng.support.images import PEAK, to_pixels
from rng.unet import UNet

FOUND = Schedules(ends={1: 0.2, 2: 0.3, 3: 0.4})


class ByBrightness(nn.Module):  # a controller one can foresee: 0, 1, 2 or 3 steps
    def predict_steps(self, x):
        return (6 * x.mean(dim=(1, 2, 3)) - 2.5).long().clamp(0, 3)


def tiny_networks(condition="noisy"):
    features = 4 * (condition == "features")
    r, conditions = NAFNet(4, [1], 1, [1]), 1 + (condition in ("both", "features"))
    networks = r, UNet(4, (1, 2), 1, conditions, features=features)
    generator = torch.Generator().manual_seed(0)
    for parameter in nn.ModuleList(networks).parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return networks


def tiny_model(condition="noisy", target="residual", batch=None, precision="float32"):
    settings = GenSettings(condition, target, residual_scale=8.0)
    return RnG(*tiny_networks(condition), settings, ByBrightness(), FOUND, "cpu", precision, batch)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def calls_of(*networks):
    """A list to which each call of one of these networks adds its first input."""
    calls = []
    for network in networks:
        network.register_forward_pre_hook(lambda network, inputs: calls.append(inputs[0]))
    return calls


def random_image(height, width, dtype=np.float32):
    """Noise around a ramp from dark to light, so that patches differ; floats also leave [0, 1]."""
    y, x = np.mgrid[:height, :width]
    noise = 0.1 * np.random.default_rng(0).normal(size=(height, width, 3))
    image = 0.1 + 0.8 * ((y + x) / max(1, height + width - 2))[..., None] + noise
    return image.astype(dtype) if dtype == np.float32 else to_pixels(image, np.dtype(dtype))


PICTURE = random_image(30, 20)


@torch.inference_mode()
def algorithm_1(model, image, steps, seed=0, detail=1.0):
    """Algorithm 1 for each patch on its own, in the paper's symbols -> (H, W, 3), not clipped; the T's."""
    (height, width), pieces = image.shape[:2], []
    whole = torch.tensor(image.astype(np.float32) / PEAK[image.dtype]).permute(2, 0, 1)
    patches = [patch[None] for patch in split(whole)]
    counts = [model.controller.predict_steps(x).item() if steps == "auto" else steps for x in patches]
    for place, x, T in zip(np.ndindex(tiling.count(height), tiling.count(width)), patches, counts):
        noise = tiling.NoiseField([(seed, *place)], *x.shape[2:])
        y_r = torch.full_like(x, 0.5) if model.settings.target == "clean" else model.recon(x)     # line 1
        d = noise(0)
        seen = {"noisy": [x], "initial": [y_r], "both": [x, y_r],
                "features": [x, y_r, model.recon(x, features=True)[:, 3:]]}[model.settings.condition]
        end = FOUND.ends.get(T, min(0.5, 20 / max(T, 1)))
        alpha = 1 - (np.linspace(1e-6, end, T) if T > 1 else np.array([end]))
        for t in range(T, 0, -1):                                                                 # line 2
            alpha_t, gamma_t = alpha[t - 1], math.prod(alpha[:t])                                 # line 3
            eps_hat = model.gen(torch.cat(seen, dim=1), d, torch.tensor([gamma_t], dtype=torch.float64))
            d = (d - (1 - alpha_t) / math.sqrt(1 - gamma_t) * eps_hat) / math.sqrt(alpha_t)       # line 4
            if t > 1:
                d = d + math.sqrt(1 - alpha_t) * noise(t)
        pieces.append((y_r + detail * d / 8 if T else y_r)[0])                                # line 6
    return stitch(pieces, height, width).permute(1, 2, 0).numpy(), counts


@pytest.mark.parametrize("settings", [("noisy",), ("initial",), ("both",), ("features",),
                                      ("noisy", "clean")])
@pytest.mark.parametrize("size, dtype, steps, detail, seed", [
    ((20, 30), np.float32, 0, 1, 0), ((1, 1), np.uint8, 2, 1, 1), ((300, 17), np.uint16, 4, 2, 2),
    ((5, 259), np.uint8, 1, 1, 3), ((259, 5), np.float32, 3, 0.4, 4), ((270, 490), np.float32, "auto", 1, 5)])
def test_denoise_is_algorithm_1(settings, size, dtype, steps, detail, seed):
    model, image = tiny_model(*settings), random_image(*size, dtype)
    before, peak, calls = image.copy(), PEAK[image.dtype], calls_of(model.gen)
    out, _, residual, step_map = model.denoise(image, steps, seed, detail, parts=True)
    expected, counts = algorithm_1(model, image, steps, seed, detail)
    assert out.shape == image.shape and out.dtype == image.dtype and np.array_equal(image, before)
    assert np.abs(out - expected.clip(0, 1) * peak).max() < (1e-4 if peak == 1 else 0.5 + 1e-4 * peak)
    assert out.min() >= 0 and out.max() <= peak and (np.abs(residual).max() > 0.02) == (steps != 0)
    assert step_map.ravel().tolist() == counts and sum(map(len, calls)) == 2 * sum(counts)  # each made half
    assert steps != "auto" or counts == [0, 1, 1, 0, 1, 2]


@pytest.mark.parametrize("seed", range(8))
def test_each_picture_of_a_stack_comes_out_as_alone(seed):
    generator = np.random.default_rng(seed)
    size = (int(generator.integers(1, 40)), int(generator.integers(1, 500)))[::generator.choice([-1, 1])]
    stack = np.stack([np.roll(random_image(*size), n, axis=0) * np.float32(1 - 0.2 * n) for n in range(4)])
    model, options = tiny_model(batch=int(generator.integers(1, 9))), ("auto", seed, 1.5)
    out = model.denoise(stack, *options, parts=True)
    for n, image in enumerate(stack):
        for of_stack, of_one in zip(out, model.denoise(image, *options, parts=True)):
            np.testing.assert_allclose(of_stack[n], of_one, atol=1e-3 if of_one.dtype == np.float16 else 1e-5)
    assert np.array_equal(model.denoise(stack, *options), out.image)


@pytest.mark.parametrize("eps_hat", [float("nan"), float("inf"), -1e4])
def test_a_g_that_diverges_is_no_picture(eps_hat):
    model = tiny_model()
    model.gen.forward = lambda x, d_t, gamma: torch.full_like(d_t, eps_hat)
    with pytest.raises(InputError, match="g has diverged in 3 steps"):
        model.denoise(PICTURE, 3)


def test_same_input_and_seed_same_bytes(model):
    image = random_image(30, 300, np.uint8)
    first, again, other = (model.denoise(image, steps=2, seed=seed).tobytes() for seed in (0, 0, 1))
    tiling.cell_noise.cache_clear()
    torch.manual_seed(5)
    assert first == again == model.denoise(image, np.int64(2), np.uint8(0), np.float32(1)).tobytes() != other


@pytest.mark.parametrize("size, steps", [((490, 9), 2), ((9, 490), 2), ((260, 490), "auto"), ((480, 480), 1)])
def test_batch_size_does_not_matter_and_bounds_the_batches(model, size, steps):
    """It counts 256-pixel patches: of the lower ones of a low picture two go together as one."""
    whole = model.denoise(image := random_image(*size), steps)
    for batch in (1, 2, 64):
        other = tiny_model(batch=batch)
        calls, told = calls_of(other.recon, other.gen), []
        assert np.abs(other.denoise(image, steps, progress=told.append) - whole).max() < 1e-5
        assert 0 < told[0] < 0.8 and told == sorted(told) and told[-1] == 1
        assert max(x.numel() for x in calls) <= batch * 3 * 256 ** 2
        assert steps == "auto" or (max(map(len, calls)) > 1) == (batch > 1 or size == (9, 490))


@pytest.mark.parametrize("parts", [False, True, "steps"])
def test_wide_pictures_lie_on_their_side(model, parts, monkeypatch):
    high = model.denoise(image := random_image(301, 40), 2, parts=parts)
    monkeypatch.setattr(pipeline, "WIDEST", 299)
    wide = model.denoise(image.swapaxes(0, 1), 2, parts=parts)
    for one, other in zip(wide, high) if parts else [(wide, high)]:
        assert one is other is None or np.array_equal(one, other.swapaxes(0, 1))


def test_a_full_gpu_halves_the_batch(model, capsys):
    image, fits, small = random_image(480, 480), 2, tiny_model(batch=16)

    def refuse(network, inputs):
        if len(inputs[0]) > fits:
            raise torch.OutOfMemoryError("as torch says it")

    small.gen.register_forward_pre_hook(refuse)
    assert np.abs(small.denoise(image, steps=2) - model.denoise(image, steps=2)).max() < 1e-5
    notes = capsys.readouterr().err.splitlines()
    assert [note.split("with ")[1] for note in notes] == [f"{n} patches at a time" for n in (8, 4, 2)]
    fits = 0
    with pytest.raises(InputError, match="one patch"):
        small.denoise(image, steps=2)


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_other_precisions_come_close(model, precision):
    out, exact = (one.denoise(PICTURE, 2) for one in (tiny_model(precision=precision), model))
    assert np.abs(out - exact).mean() < 0.01 and (precision == "auto" or not np.array_equal(out, exact))


def test_no_gradients_also_with_an_r_of_ones_own(model):
    darker = tiny_model()
    darker.reconstruct = lambda x: 0.5 * darker.recon(x) * torch.is_inference_mode_enabled()
    out, whole = (one.denoise(PICTURE, 0) for one in (darker, model))
    assert 0.2 < out.mean() and np.abs(out - 0.5 * whole)[(0 < whole) & (whole < 1)].max() < 1e-5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_parts_add_up(model, dtype):
    image, peak = random_image(260, 100, dtype), PEAK[np.dtype(dtype)]
    parts = model.denoise(image, 3, parts=True)
    assert parts.recon.dtype == dtype and parts.residual.dtype == np.float16
    assert np.array_equal(parts.image, model.denoise(image, 3))
    assert np.array_equal(parts.recon, model.denoise(image, 0))
    total = (parts.recon / peak + parts.residual.astype(np.float64)).clip(0, 1)
    unclipped = (parts.recon > 0) & (parts.recon < peak)
    assert unclipped.mean() > 0.8 and parts.residual.std() > 0.02
    assert np.abs(parts.image / peak - total)[unclipped].max() < 1e-3 + (0 if peak == 1 else 1 / peak)
    image, *no_parts, steps = model.denoise(image, 3, parts="steps")
    assert np.array_equal(image, parts.image) and (steps == parts.steps).all() and no_parts == [None, None]


def test_missing_networks_are_named():
    only_r = RnG(tiny_networks()[0], device="cpu", precision="float32")
    assert np.array_equal(only_r.denoise(PICTURE, steps=0), only_r.denoise(PICTURE, detail=0))
    for steps, name in ((2, "gen.pt"), ("auto", "controller.pt")):
        with pytest.raises(InputError, match=name):
            only_r.denoise(PICTURE, steps)


@pytest.mark.parametrize("image, options", [
    *((np.zeros(shape, np.uint8), {})
      for shape in ((4, 4), (4, 4, 1), (0, 4, 3), (4, 0, 3), (0, 4, 4, 3), (1, 1, 4, 4, 3))),
    *((PICTURE.astype(dtype), {}) for dtype in (np.float64, np.int32, bool)), (PICTURE * 255, {}),
    *((PICTURE + np.float32(offset), {}) for offset in (math.nan, math.inf, 200, -200)),
    *((PICTURE, {"steps": steps}) for steps in (-1, "fast", True, 1.5, None, np.float64(3))),
    *((PICTURE, {"detail": detail}) for detail in (3, -1, math.nan, math.inf, "1", None)),
    *((PICTURE, {"seed": seed}) for seed in (-1, 1.5, 2 ** 63, None)),
    *((image, {}) for image in ("noisy.png", Path("noisy.png"), Image.new("RGB", (4, 4)), PICTURE.tolist()))])
def test_arguments_that_cannot_be(model, image, options):
    with pytest.raises(ValueError if isinstance(image, np.ndarray) else TypeError, match="^[^\n]{20,200}$"):
        model.denoise(image, **{"steps": 0, **options})


def save_model(folder, *settings):
    """Writes a tiny model folder; the model, rounded to float16 as the files are, comes back."""
    (recon, gen), s = tiny_networks(*settings[:1]), StepController(4)
    s(torch.rand(2, 3, 16, 16))  # in training mode: the statistics move
    settings, found = GenSettings(*settings, residual_scale=500.0), FOUND._replace(variance="posterior")
    (folder / "schedule.json").write_text(json.dumps(dict(zip(("end", "variance"), found))))
    for kind, network, config in (("recon", recon, recon.config), ("controller", s, s.config),
                                  ("gen", gen, {"unet": gen.config, **settings._asdict()})):
        save_weights(folder / f"{kind}.pt", kind, config, network, {"iterations": 1})
        for parameter in network.parameters():
            parameter.data = parameter.data.half().float()
    return RnG(recon, gen, settings, s, found, "cpu", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(folder := tmp_path_factory.mktemp("model")) and folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path, dirs_exist_ok=True)


def assert_refused(folder, mention=""):
    with pytest.raises(InputError, match=f"^(?=.*{mention})[^\n]{{20,400}}$"):
        RnG.load(folder, "cpu")


@pytest.mark.parametrize("settings", [("noisy",), ("initial",), ("both", "clean"), ("features",)])
def test_saved_model_is_the_model(tmp_path, settings):
    saved, image = save_model(tmp_path, *settings), random_image(64, 64, np.uint8)
    loaded, x = RnG.load(tmp_path, "cpu", "float32"), torch.rand(3, 3, 32, 32)
    for steps in (2, "auto"):
        assert np.array_equal(saved.denoise(image, steps), loaded.denoise(image, steps))
    assert torch.equal(saved.controller(x), loaded.controller(x)) and loaded.schedules == saved.schedules


def test_networks_that_do_not_belong_together_are_refused(copy):
    recon, gen, settings, s, _ = load_model(copy)
    settings, path = settings._replace(recon=fingerprint(recon)), copy / "schedule.json"
    save_weights(copy / "gen.pt", "gen", {"unet": gen.config, **settings._asdict()}, gen, {})
    save_schedules(copy, FOUND, fingerprint(gen))
    save_weights(copy / "controller.pt", "controller", {**s.config, "made_with": made_with(copy)}, s, {})
    for line_end in (b"\n", b"\r\n"):  # which changes nothing
        path.write_bytes(line_end.join(path.read_bytes().splitlines()) + line_end)
        assert path.read_bytes().count(line_end) > 3 and load_model(copy)[3] and load_model(copy)[4] == FOUND
    save_schedules(copy, FOUND._replace(ends={**FOUND.ends, 70: 0.2}), fingerprint(gen))
    assert_refused(copy, "trained for another gen.pt or schedule.json")
    assert RnG.load(copy, "cpu", schedule=False).controller  # to search anew
    save_schedules(copy, FOUND, "another")
    assert_refused(copy, "searched with another gen.pt")
    assert RnG.load(copy, "cpu", schedule=False).schedules == Schedules()
    nn.init.normal_(recon.ending.weight)
    save_weights(copy / "recon.pt", "recon", recon.config, recon, {})
    assert_refused(copy, "trained with another recon.pt")


def test_a_g_that_sees_features_wants_an_r_that_has_them(tmp_path):
    save_model(tmp_path, "features")
    for r in (NAFNet(6, [1], 1, [1]), UNet(base=4, blocks=1, noise_level=False)):
        save_weights(tmp_path / "recon.pt", "recon", r.config, r, {})
        assert_refused(tmp_path, "trained with another recon.pt")


def test_model_is_found_by_name_but_a_path_wins(folder, copy, monkeypatch):
    monkeypatch.setattr("rng.folder.WEIGHTS", folder.parent)
    monkeypatch.chdir(copy)
    assert RnG.load(folder.name, "cpu").controller is not None
    (copy / folder.name).mkdir()
    (copy / "recon.pt").rename(copy / folder.name / "recon.pt")
    model = RnG.load(folder.name, "cpu")
    assert model.gen is model.controller is None and model.schedules == Schedules()


def test_a_unet_is_an_r_but_not_one_that_wants_a_noise_level(copy):
    r, g = UNet(base=4, blocks=1, noise_level=False), tiny_networks()[1]
    save_weights(copy / "recon.pt", "recon", r.config, r, {})
    assert isinstance(RnG.load(copy, "cpu").recon, UNet)
    save_weights(copy / "recon.pt", "recon", g.config, g, {})
    assert_refused(copy, "recon.pt")


def test_missing_folders_and_files_and_folders_in_their_place(copy):
    assert_refused(copy / "nothing", "nothing")
    assert_refused(copy / "recon.pt", "recon.pt")
    for name in ("schedule.json", "recon.pt"):
        (copy / name).unlink()
        (copy / name).mkdir()
        assert_refused(copy, name)
    (copy / "recon.pt").rmdir()
    assert_refused(copy, "recon.pt does not exist")


each_file = pytest.mark.parametrize("name", ["recon.pt", "gen.pt", "controller.pt"])


@each_file
def test_damaged_weights(copy, name):
    whole = (copy / name).read_bytes()
    for damaged in (b"", whole[:len(whole) // 2], whole.replace(b"state_dict", b"state_dirt"),
                    b"<!DOCTYPE html><html>not found</html>", b"0", b"\x80\x02J\x01"):
        (copy / name).write_bytes(damaged)
        assert_refused(copy, name)


@pytest.mark.parametrize("old_format", [False, True])
@each_file
@pytest.mark.parametrize("seed", range(int(os.environ.get("RNG_FUZZ", 200)) // 8))
def test_a_flipped_bit_of_a_weight_is_told(copy, seed, name, old_format):
    """Elsewhere, and in the old format of many NAFNet checkpoints, which has no checksums, or a result."""
    random, content = np.random.default_rng([seed, len(name), old_format]), torch.load(copy / name)
    if old_format:
        torch.save(content, copy / name, _use_new_zipfile_serialization=False)
    data = bytearray((copy / name).read_bytes())
    weights = max(content["state_dict"].values(), key=torch.numel).numpy().tobytes()
    place = int(random.integers(len(data)) if seed else data.index(weights))
    data[place] ^= 1 << random.integers(8)
    (copy / name).write_bytes(data)
    try:
        model = RnG.load(copy, "cpu", "float32")
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        assert (seed or old_format) and model.denoise(PICTURE, steps=2).shape == PICTURE.shape


def test_code_in_a_weight_file_is_not_run(copy):
    runs_code = type("RunsCode", (), {"__reduce__": lambda self: (Path.touch, (copy / "run",))})
    torch.save({"kind": "recon", "info": runs_code()}, copy / "recon.pt")
    assert_refused(copy, "recon.pt")
    assert not (copy / "run").exists()


INTRO = torch.zeros(4, 3, 3, 3)
WRONG = [(where, value) for where, values in {
    "recon.pt": [[1, 2], {"kind": "recon"}, *({"params": params} for params in (
        {}, 3, {3: INTRO}, *({"intro.weight": value} for value in (INTRO, 4, "text", torch.zeros(()))),
        {"intro.weight": INTRO, "downs.x.weight": INTRO}, {"intro.weight": INTRO, "middle_blks.": 3}))],
    "recon.pt kind": [torch.zeros(2), "gen"], "recon.pt info": [3], "gen.pt kind": ["recon"],
    "recon.pt state_dict": [None, [], {3: INTRO}, {"intro.weight": 3}], "controller.pt kind": ["recon"],
    "recon.pt config": [{}, {"arch": "nafnet", "depth": 3}, {"enc": 3}, {"dec": [None]}, {3: 4}, *(
        {"width": width} for width in (4, "4", -4, 10 ** 5, 10 ** 30)), {"arch": "unet", "multipliers": []}],
    "gen.pt config condition": ["foo", None, 3, ["noisy"], "both", "features"],
    "gen.pt config target": ["foo", None, {}],
    "gen.pt config residual_scale": [0, -1.0, math.nan, math.inf, "8", None, [8.0], True, 10 ** 400],
    "gen.pt config train_end": [0, 1, math.nan, "0.01", None], "gen.pt config recon": [3, []],
    "gen.pt config further": [1], "gen.pt config unet": [None, 3, [], {}], "gen.pt config unet noise": [1],
    "gen.pt config unet multipliers": [[], 3, "12"], "gen.pt config unet base": ["4", 4.0, 10 ** 5],
    "gen.pt config unet features": [1, -1, None, "3"],
    "gen.pt config unet blocks": [0, None], "gen.pt config unet conditions": [2]}.items() for value in values]


@pytest.mark.parametrize("where, value", WRONG, ids=lambda part: str(part)[:30])
def test_contents_that_are_none(copy, where, value):
    (*way, last), name = where.split(), where.split()[0]
    content = {name: torch.load(copy / name)}
    functools.reduce(dict.get, way, content)[last] = value
    torch.save(content[name], copy / name)
    assert_refused(copy, name + " holds a network of kind" * (last == "kind" and isinstance(value, str)))


@pytest.mark.parametrize("quarter, value", [(0, math.nan), (1, math.inf), (2, -math.inf), (3, math.nan)])
@each_file
def test_weights_that_are_not_finite(copy, name, quarter, value):
    """One weight of any tensor; a NaN that r or g met would make a black picture."""
    content = torch.load(copy / name)
    tensors = [tensor for tensor in content["state_dict"].values() if tensor.is_floating_point()]
    tensors[quarter * len(tensors) // 4].view(-1)[-1] = value
    torch.save(content, copy / name)
    assert_refused(copy, f"{name} does not hold the network it should, or weights that are not finite")


@pytest.mark.parametrize("text", [
    "", "{", "null", "[]", "{}", "\u00ff", "[" * 100_000, '{"end": ' * 100_000, '{"end": {}, "variance": []}',
    '{"end": {}, "detail": {"10": 0.5}}',
    '{"end": {"1000000000000": 0.1}}',
    *('{"end": %s}' % end for end in ("3", "[1]", '{"ten": 0.5}', '{"0": 0.5}', '{"1e2": 0.5}')),
    *('{"end": {"10": %s}}' % end for end in ('"high"', "null", "1.5", "NaN", "0", "1e999", "9" * 400))],
                         ids=lambda text: text[:30])
def test_malformed_schedule(copy, text):
    (copy / "schedule.json").write_text(text, encoding="latin-1")
    assert_refused(copy, "schedule.json")
