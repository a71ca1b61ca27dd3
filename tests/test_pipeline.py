"""rng/pipeline.py with tiny random networks, against Algorithm 1 patch by patch; model folders and their faults."""

import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from rng import checkpoint, pipeline, tiling
from rng.controller import STEPS, StepController
from rng.errors import InputError
from rng.nafnet import NAFNet
from rng.pipeline import RnG
from rng.unet import UNet

ENDS, DETAILS = {1: 0.2, 2: 0.3, 3: 0.4}, {3: 0.7}


class ByBrightness(nn.Module):
    """A step controller one can foresee: 0, 1, 2 or 3 steps, more for brighter patches."""

    def predict_steps(self, x):
        return (4 * x.mean(dim=(1, 2, 3))).long().clamp(0, 3)


def tiny_networks(conditions=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        recon = NAFNet(width=4, enc=[1], middle=1, dec=[1])
        gen = UNet(base=4, multipliers=(1, 2), blocks=1, conditions=conditions)
        nn.init.normal_(gen.ending.weight, std=0.1)
        for block in (recon.encoders[0][0], recon.middle_blks[0], recon.decoders[0][0]):
            nn.init.normal_(block.beta)
            nn.init.normal_(block.gamma)
        nn.init.normal_(recon.ending.weight, std=0.02)
        nn.init.zeros_(recon.ending.bias)
    return recon, gen


def tiny_model(condition="noisy", target="residual", controller=None, precision="float32"):
    recon, gen = tiny_networks(2 if condition == "both" else 1)
    settings = {"condition": condition, "target": target, "residual_scale": 8.0}
    return RnG(recon, gen, settings, controller, ENDS, DETAILS, device_name="cpu", precision=precision)


@pytest.fixture(scope="module")
def model():
    return tiny_model(controller=ByBrightness())


def random_image(height, width, dtype=np.float32, seed=0):
    """Noise around a ramp from dark to light, so that patches differ in brightness."""
    y, x = np.mgrid[:height, :width]
    ramp = (y + x) / max(1, height + width - 2)
    noise = 0.1 * np.random.default_rng(seed).normal(size=(height, width, 3))
    image = np.clip(0.1 + 0.8 * ramp[..., None] + noise, 0, 1)
    return (image * pipeline.PEAK[np.dtype(dtype)] + (0 if dtype == np.float32 else 0.5)).astype(dtype)


@torch.inference_mode()
def algorithm_1(model, image, steps, seed=0, detail=1.0):
    """Algorithm 1 for each 256-pixel patch on its own, in the paper's symbols; float (H, W, 3), not clipped."""
    height, width = image.shape[:2]
    patches = tiling.split(torch.from_numpy(image.astype(np.float32) / pipeline.PEAK[image.dtype]).permute(2, 0, 1))
    pieces = []
    counts = [model.controller.predict_steps(x[None]).item() if steps == "auto" else steps for x in patches]
    details = np.array([DETAILS.get(T, 1) if T else 0 for T in counts]).reshape(-1, tiling.count(width))
    for i, (x, T) in enumerate(zip(patches, counts)):
        x = x[None]
        place = divmod(i, tiling.count(width))
        y_r = torch.full_like(x, 0.5) if model.settings["target"] == "clean" else model.recon(x)             # line 1
        here = np.s_[:, :x.shape[2], :x.shape[3]]
        d = tiling.patch_noise(seed, 0, *place)[here][None]
        cond = {"noisy": x, "initial": y_r, "both": torch.cat([x, y_r], 1)}[model.settings["condition"]]
        alpha = [1 - beta for beta in (np.linspace(1e-6, ENDS[T], T) if T > 1 else [ENDS[1]])] if T else []
        for t in range(T, 0, -1):                                                                            # line 2
            alpha_t, gamma_t = alpha[t - 1], math.prod(alpha[:t])                                            # line 3
            eps_hat = model.gen(cond, d, torch.tensor([gamma_t], dtype=torch.float64))
            d = (d - (1 - alpha_t) / math.sqrt(1 - gamma_t) * eps_hat) / math.sqrt(alpha_t)                  # line 4
            if t > 1:
                d = d + math.sqrt(1 - alpha_t) * tiling.patch_noise(seed, t, *place)[here]
        faded = torch.from_numpy(tiling.fade(details, *place, *x.shape[2:]))
        pieces.append(y_r + detail * faded * d / 8 if T else y_r)                                            # line 6
    return tiling.stitch([piece[0] for piece in pieces], height, width).permute(1, 2, 0).numpy()


# Algorithm 1


@pytest.mark.parametrize("condition, target", [("noisy", "residual"), ("initial", "residual"), ("both", "residual"),
                                               ("noisy", "clean")])
@pytest.mark.parametrize("size, steps, detail, seed", [((20, 30), 0, 1, 0), ((5, 259), 1, 1, 3), ((259, 5), 3, 0.4, 4),
                                                       ((270, 262), "auto", 1, 5)])
def test_denoise_is_algorithm_1(condition, target, size, steps, detail, seed):
    model = tiny_model(condition, target, ByBrightness())
    image = random_image(*size)
    parts = model.denoise(image, steps, seed, detail, parts=True)
    assert np.abs(parts.image - algorithm_1(model, image, steps, seed, detail).clip(0, 1)).max() < 1e-4
    assert (parts.residual.std() > 0.02) == (steps != 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("height, width", [(1, 1), (300, 17), (5, 259)])
def test_shape_and_type_stay(model, dtype, height, width):
    image = random_image(height, width, dtype)
    before = image.copy()
    out = model.denoise(image, steps=2)
    assert out.shape == image.shape and out.dtype == image.dtype and np.array_equal(image, before)
    peak = pipeline.PEAK[image.dtype]
    expected = algorithm_1(model, image, 2).clip(0, 1) * peak
    assert np.abs(out - expected).max() < (1e-4 if peak == 1 else 0.5 + 1e-4 * peak)
    assert out.min() >= 0 and out.max() <= peak


def test_noisy_floats_beyond_the_range_are_not_clipped_before_r(model):
    image = random_image(40, 40) * 3 - 1
    assert np.abs(model.denoise(image, steps=0) - algorithm_1(model, image, 0).clip(0, 1)).max() < 1e-5


def test_detail_is_linear_in_the_residual(model):
    image = random_image(60, 50)
    full = model.denoise(image, steps=2, parts=True)
    for detail in (0.25, 0.5, 2):
        parts = model.denoise(image, steps=2, detail=detail, parts=True)
        assert np.allclose(parts.residual, detail * full.residual.astype(np.float32), rtol=2e-3, atol=1e-4)
        assert np.array_equal(parts.recon, full.recon)
    assert np.array_equal(model.denoise(image, steps=2, detail=0), full.recon)
    assert np.array_equal(model.denoise(image, steps="auto", detail=0), full.recon)


def test_same_input_and_seed_same_bytes(model):
    image = random_image(30, 300, np.uint8)
    first, again, other = (model.denoise(image, steps=2, seed=seed).tobytes() for seed in (0, 0, 1))
    tiling.cell_noise.cache_clear()
    torch.manual_seed(5)
    assert first == again == model.denoise(image, steps=2).tobytes() != other


@pytest.mark.parametrize("size, steps, most", [((490, 20), 2, 2), ((20, 490), "auto", 2), ((480, 480), 1, 4)])
def test_batch_size_does_not_matter_and_bounds_the_batches(model, size, steps, most):
    image, sizes = random_image(*size), []
    whole = model.denoise(image, steps)
    hooks = [network.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0])))
             for network in (model.recon, model.gen)]
    for batch in (1, 2, 64):
        sizes.clear()
        assert np.abs(model.denoise(image, steps, batch=batch) - whole).max() < 1e-5
        assert max(sizes) == min(batch, most)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("parts", [False, True, "steps"])
@pytest.mark.parametrize("size", [(40, 300), (64, 301)])
def test_wide_pictures_lie_on_their_side(model, size, parts, monkeypatch):
    image = random_image(*size)
    turned = model.denoise(image.transpose(1, 0, 2).copy(), 2, parts=parts)
    monkeypatch.setattr(pipeline, "WIDEST", 299)
    wide = model.denoise(image, 2, parts=parts)
    for one, other in zip(wide, turned) if parts else [(wide, turned)]:
        assert (one is other is None) or np.array_equal(one, other.swapaxes(0, 1))
    assert (wide.image if parts else wide).shape == image.shape


@pytest.mark.parametrize("side, most", [(256, 1), (144, 3), (128, 4), (64, 10)])
def test_more_of_smaller_patches_go_together(model, side, most):
    sizes, x = [], torch.rand(1, 3, side, side)
    hook = model.gen.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0])))
    model.at_each_step(x, 0)
    hook.remove()
    assert max(sizes) == most


def test_a_full_gpu_halves_the_batch(model, capsys):
    """A g for which two patches are the most; then for which one is too many."""
    image, fits = random_image(480, 480), 2
    whole = model.denoise(image, steps=2)

    def refuse(network, inputs):
        if len(inputs[0]) > fits:
            raise torch.OutOfMemoryError("as torch says it")

    hook = model.gen.register_forward_pre_hook(refuse)
    assert np.abs(model.denoise(image, steps=2, batch=16) - whole).max() < 1e-5
    assert [line.split()[-5:] for line in capsys.readouterr().err.splitlines()] == [[n, "patches", "at", "a", "time"] for n in "842"]
    fits = 0
    with pytest.raises(InputError, match="one patch"):
        model.denoise(image, steps=2, batch=2)
    hook.remove()


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_other_precisions_come_close(model, precision):
    image = random_image(40, 40)
    out, exact = tiny_model(precision=precision).denoise(image, steps=2), model.denoise(image, steps=2)
    assert np.abs(out - exact).mean() < 0.01
    assert precision == "auto" or not np.array_equal(out, exact)


# Parts, steps and progress


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_parts_add_up(model, dtype):
    image = random_image(260, 100, dtype)
    parts = model.denoise(image, steps=3, parts=True)
    peak = pipeline.PEAK[image.dtype]
    assert parts.recon.dtype == dtype and parts.residual.dtype == np.float16
    assert parts.image.shape == parts.recon.shape == parts.residual.shape == image.shape
    assert np.array_equal(parts.image, model.denoise(image, steps=3))
    assert np.array_equal(parts.recon, model.denoise(image, steps=0))
    total = (parts.recon / peak + parts.residual.astype(np.float64)).clip(0, 1)
    unclipped = (parts.recon > 0) & (parts.recon < peak)
    assert unclipped.mean() > 0.9 and parts.residual.std() > 0.02
    assert np.abs(parts.image / peak - total)[unclipped].max() < 1e-3 + (0 if peak == 1 else 1 / peak)
    light = model.denoise(image, steps=3, parts="steps")
    assert np.array_equal(light.image, parts.image) and np.array_equal(light.steps, parts.steps)
    assert light.recon is None and light.residual is None


def test_step_map_is_the_controllers_and_zero_steps_cost_nothing(model):
    image = 0.05 * random_image(480, 480) + np.repeat(np.repeat([[0.1, 0.3], [0.6, 0.9]], 240, 0), 240, 1)[..., None]
    image = image.astype(np.float32)
    evaluated = []
    hook = model.gen.register_forward_pre_hook(lambda gen, inputs: evaluated.append(inputs[0].mean((1, 2, 3)).tolist()))
    parts = model.denoise(image, batch=2, parts=True)
    hook.remove()
    assert parts.steps.tolist() == [[0, 1], [2, 3]]
    assert sum(map(len, evaluated)) == 6 and min(map(min, evaluated)) > 0.25
    assert not parts.residual[:236, :236].any() and parts.residual[244:, 244:].all(axis=2).mean() > 0.9
    assert model.denoise(image[:20], steps=1, parts=True).steps.tolist() == [[1, 1]]


def test_auto_uses_the_real_controller():
    s = StepController(4)
    nn.init.zeros_(s.fc.weight)
    s.fc.bias.data[1] = 1
    parts = tiny_model(controller=s).denoise(random_image(30, 20), parts=True)
    assert parts.steps.tolist() == [[10]] and 10 in STEPS


@pytest.mark.parametrize("steps, batch", [(0, 1), (2, 4), ("auto", 1)])
def test_progress_rises_to_one(model, steps, batch):
    told = []
    model.denoise(random_image(490, 20), steps, batch=batch, progress=told.append)
    assert 0 < told[0] < 0.6 and all(a <= b for a, b in zip(told, told[1:])) and told[-1] == 1


def test_schedule_ends_where_the_search_or_the_rule_says(model):
    assert model.schedule(3).alpha[-1] == pytest.approx(1 - ENDS[3]) and len(model.schedule(3).alpha) == 4
    assert model.schedule(40).alpha[-1] == pytest.approx(0.75)


# What is refused


def test_missing_networks_are_named():
    recon, gen = tiny_networks()
    image = random_image(20, 20)
    only_r = RnG(recon, device_name="cpu", precision="float32")
    assert np.array_equal(only_r.denoise(image, steps=0), only_r.denoise(image, detail=0))
    with pytest.raises(InputError, match="gen.pt"):
        only_r.denoise(image, steps=2)
    with pytest.raises(InputError, match="controller.pt"):
        only_r.denoise(image)
    with pytest.raises(InputError, match="nowhere"):
        RnG(recon, device_name="nowhere")


@pytest.mark.parametrize("image", [
    np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 1), np.uint8),
    np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0, 3), np.float32), np.zeros((1, 4, 4, 3), np.float32),
    np.zeros((4, 4, 3), np.float64), np.zeros((4, 4, 3), np.int32)])
def test_arrays_that_are_no_pictures(model, image):
    with pytest.raises(ValueError):
        model.denoise(image, steps=0)


@pytest.mark.parametrize("steps", [-1, "fast"])
def test_steps_that_are_no_count(model, steps):
    with pytest.raises(ValueError):
        model.denoise(random_image(4, 4), steps=steps)


# Model folders


def save_model(folder, condition="noisy", target="residual"):
    """Writes a tiny model folder; its networks, rounded to float16 as the files are, come back."""
    recon, gen = tiny_networks(2 if condition == "both" else 1)
    s = StepController(4)
    s(torch.rand(2, 3, 16, 16))  # in training mode: the statistics move
    settings = {"condition": condition, "target": target, "residual_scale": 8.0}
    checkpoint.save_weights(folder / "recon.pt", "recon", recon.config, recon, {"iterations": 1})
    checkpoint.save_weights(folder / "gen.pt", "gen", {"unet": gen.config, **settings}, gen, {})
    checkpoint.save_weights(folder / "controller.pt", "controller", s.config, s, {})
    (folder / "schedule.json").write_text(json.dumps({"end": ENDS, "detail": DETAILS, "variance": "posterior"}))
    for network in (recon, gen, s):
        for parameter in network.parameters():
            parameter.data = parameter.data.half().float()
    return RnG(recon, gen, settings, s, ENDS, DETAILS, "cpu", "float32", "posterior")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("condition, target", [("noisy", "residual"), ("initial", "residual"), ("both", "clean")])
def test_saved_model_is_the_model(tmp_path, condition, target):
    saved = save_model(tmp_path, condition, target)
    loaded = RnG.load(tmp_path, "cpu", "float32")
    image = random_image(30, 20, np.uint8)
    assert np.array_equal(saved.denoise(image, steps=2), loaded.denoise(image, steps=2))
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(saved.controller(x), loaded.controller(x)) and (loaded.ends, loaded.details) == (ENDS, DETAILS)
    assert not (loaded.recon.training or loaded.gen.training or loaded.controller.training)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["controller.pt", "gen.pt", "recon.pt", "schedule.json"]


def test_networks_that_do_not_belong_together_are_refused(copy):
    recon, gen = tiny_networks()
    config = {"unet": gen.config, "condition": "noisy", "target": "residual", "residual_scale": 8.0,
              "recon": checkpoint.fingerprint(checkpoint.load_recon(copy / "recon.pt"))}
    checkpoint.save_weights(copy / "gen.pt", "gen", config, gen, {})
    mine = checkpoint.fingerprint(checkpoint.load_gen(copy / "gen.pt")[0])
    assert mine == checkpoint.fingerprint(gen) != config["recon"]
    (copy / "schedule.json").write_text(json.dumps({"gen": mine, "end": ENDS}))
    assert RnG.load(copy, "cpu").ends == ENDS
    s = StepController(4)
    checkpoint.save_weights(copy / "controller.pt", "controller", {**s.config, "made_with": checkpoint.made_with(copy)}, s, {})
    assert RnG.load(copy, "cpu").controller
    (copy / "schedule.json").write_text(json.dumps({"gen": mine, "end": {**ENDS, "70": 0.2}}))
    assert_refused(copy, "trained for another gen.pt or schedule.json")
    assert RnG.load(copy, "cpu", schedule=False).controller  # to search anew
    (copy / "schedule.json").write_text(json.dumps({"gen": config["recon"], "end": ENDS}))
    assert_refused(copy, "searched with another gen.pt")
    assert RnG.load(copy, "cpu", schedule=False).ends == {}
    nn.init.normal_(recon.ending.weight)
    checkpoint.save_weights(copy / "recon.pt", "recon", recon.config, recon, {})
    assert_refused(copy, "trained with another recon.pt")


def test_unet_as_r_is_loaded(copy):
    r = UNet(base=4, blocks=1, noise_level=False)
    checkpoint.save_weights(copy / "recon.pt", "recon", r.config, r, {})
    assert isinstance(RnG.load(copy, "cpu").recon, UNet)


@pytest.mark.parametrize("kind", ["recon", "gen", "controller"])
def test_weight_files_hold_plain_types(folder, kind):
    content = torch.load(folder / f"{kind}.pt", weights_only=True)
    assert set(content) == {"kind", "config", "state_dict", "info"} and content["kind"] == kind
    for name, tensor in content["state_dict"].items():
        statistic = name.endswith(("running_mean", "running_var"))
        assert tensor.dtype == (torch.int64 if "num_batches" in name else torch.float32 if statistic else torch.float16)


def test_failed_write_leaves_the_old_file(copy, monkeypatch):
    old = (copy / "recon.pt").read_bytes()

    def full_disk(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(InputError, match="recon.pt"):
        save_model(copy)
    assert (copy / "recon.pt").read_bytes() == old and len(list(copy.iterdir())) == 4
    with pytest.raises(InputError):
        checkpoint.save_atomic(copy / "no" / "recon.pt", {})


def test_model_is_found_by_name_but_a_path_wins(folder, copy, monkeypatch):
    monkeypatch.setattr(pipeline, "WEIGHTS", folder.parent)
    monkeypatch.chdir(copy)
    assert RnG.load(folder.name, "cpu").controller is not None
    (copy / folder.name).mkdir()
    (copy / "recon.pt").rename(copy / folder.name / "recon.pt")
    model = RnG.load(folder.name, "cpu")
    assert model.gen is model.controller is None and model.ends == {}
    assert model.denoise(random_image(9, 9), steps=0).shape == (9, 9, 3)


def test_a_unet_that_wants_a_noise_level_is_no_r(copy):
    g = tiny_networks()[1]
    checkpoint.save_weights(copy / "recon.pt", "recon", g.config, g, {})
    assert_refused(copy, "recon.pt")


def assert_refused(folder, mention=""):
    with pytest.raises(InputError, match=mention) as refusal:
        RnG.load(folder, "cpu")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_missing_folder_or_weights(tmp_path):
    assert_refused(tmp_path / "nothing", "nothing")
    assert_refused(tmp_path, "recon.pt does not exist")
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "file", "file")
    (tmp_path / "recon.pt").mkdir()
    assert_refused(tmp_path, "recon.pt")


DAMAGE = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[:len(content) // 2],
    "text": lambda content: b"<!DOCTYPE html><html>not found</html>",
    "opcode": lambda content: b"0",                    # a pickle that pops from an empty stack
    "short pickle": lambda content: b"\x80\x02J\x01",  # ... that ends within a number
    "flipped": lambda content: content.replace(b"state_dict", b"state_dirt"),
}


@pytest.mark.parametrize("name", ["recon.pt", "gen.pt", "controller.pt"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_weights(copy, name, damage):
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    assert_refused(copy, name)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("name", ["recon.pt", "gen.pt", "controller.pt"])
@pytest.mark.parametrize("seed", range(int(os.environ.get("RNG_FUZZ", 200)) // 8))
def test_a_flipped_bit_of_a_weight_file(copy, seed, name, old_format):
    """Refused in one sentence, or a result; the old format, that of many NAFNet checkpoints, has no checksums."""
    random = np.random.default_rng([seed, len(name), old_format])
    if old_format:
        torch.save(torch.load(copy / name, weights_only=True), copy / name, _use_new_zipfile_serialization=False)
    content = bytearray((copy / name).read_bytes())
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    (copy / name).write_bytes(content)
    try:
        model = RnG.load(copy, "cpu", "float32")
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        assert model.denoise(random_image(20, 20, np.uint8), steps=2).shape == (20, 20, 3)


@pytest.mark.parametrize("name", ["recon.pt", "gen.pt", "controller.pt"])
def test_a_flipped_bit_of_a_weight_is_told(copy, name):
    content = bytearray((copy / name).read_bytes())
    tensors = torch.load(copy / name, weights_only=True)["state_dict"].values()
    place = content.index(max(tensors, key=torch.numel).numpy().tobytes())
    content[place] ^= 1
    (copy / name).write_bytes(content)
    assert_refused(copy, name)


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_code_in_a_weight_file_is_not_run(copy):
    torch.save({"kind": "recon", "info": RunsCode(copy / "run")}, copy / "recon.pt")
    assert_refused(copy, "recon.pt")
    assert not (copy / "run").exists()


@pytest.mark.parametrize("name, other", [("recon.pt", "gen.pt"), ("gen.pt", "controller.pt"),
                                         ("controller.pt", "recon.pt")])
def test_wrong_kind(copy, name, other):
    (copy / name).write_bytes((copy / other).read_bytes())
    assert_refused(copy, f"{name} holds a network of kind '{other[:-3]}'")


INTRO = torch.zeros(4, 3, 3, 3)
CONTENTS = [
    [1, 2], {"kind": "recon"}, {"params": {}}, {"params": 3}, {"params": {"intro.weight": INTRO}}, {"params": {3: INTRO}},
    {"params": {"intro.weight": 4}}, {"params": {"intro.weight": torch.zeros(())}}, {"params": {"intro.weight": "text"}},
    {"params": {"intro.weight": INTRO, "downs.x.weight": INTRO}}, {"params": {"intro.weight": INTRO, "middle_blks.": 3}},
    {"kind": torch.zeros(2), "config": {}, "state_dict": {}, "info": {}},
    {"kind": "recon", "config": {}, "state_dict": {}, "info": 3},
    *({"kind": "recon", "config": config, "state_dict": {}, "info": {}} for config in (
        {}, {"arch": "nafnet", "depth": 3}, {"arch": "nafnet", "width": 4}, {"width": "4"}, {"width": -4},
        {"width": 10 ** 5}, {"width": 10 ** 30}, {"enc": 3}, {"dec": [None]}, {3: 4}, {"arch": "unet", "multipliers": []})),
    *({"kind": "recon", "config": {"arch": "nafnet", "width": 4}, "state_dict": state_dict, "info": {}} for state_dict in (
        None, [], {3: INTRO}, {"intro.weight": 3}))]


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_other_contents(copy, content):
    torch.save(content, copy / "recon.pt")
    assert_refused(copy, "recon.pt")


@pytest.mark.parametrize("key, value", [
    *(("condition", value) for value in ("foo", None, 3, ["noisy"], "both")), *(("target", value) for value in ("foo", None, {})),
    *(("residual_scale", value) for value in (0, -1.0, math.nan, math.inf, "8", None, [8.0], True, 10 ** 400)),
    *(("train_end", value) for value in (0, 1, math.nan, "0.01", None)), ("recon", 3), ("recon", []), ("further", 1),
    *(("unet", value) for value in (None, 3, [], {})),
    *(("unet", {"base": 4, "multipliers": [1, 2], "blocks": 1, "conditions": 1, **change}) for change in (
        {"multipliers": []}, {"multipliers": 3}, {"multipliers": "12"}, {"base": "4"}, {"base": 4.0}, {"base": 10 ** 5},
        {"blocks": 0}, {"blocks": None}, {"conditions": 2}, {"noise": 1}))], ids=lambda part: repr(part)[:30])
def test_settings_of_g_that_are_none(copy, key, value):
    content = torch.load(copy / "gen.pt", weights_only=True)
    content["config"][key] = value
    torch.save(content, copy / "gen.pt")
    assert_refused(copy, "gen.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["recon.pt", "gen.pt", "controller.pt"])
@pytest.mark.parametrize("seed", range(4))
def test_weights_that_are_not_finite(copy, name, value, seed):
    """One weight of any tensor; a NaN that r or g met would make a black picture."""
    content, random = torch.load(copy / name, weights_only=True), np.random.default_rng(seed)
    tensors = [tensor for tensor in content["state_dict"].values() if tensor.is_floating_point()]
    tensor = tensors[random.integers(len(tensors))].view(-1)
    tensor[random.integers(len(tensor))] = value
    torch.save(content, copy / name)
    assert_refused(copy, f"{name} has weights that are not finite")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"end": 3}', '{"end": [1]}', '{"end": {"ten": 0.5}}',
                                  '{"end": {"10": "high"}}', '{"end": {"10": null}}', '{"end": {"10": 1.5}}',
                                  '{"end": {"10": NaN}}', '{"end": {"0": 0.5}}', '{"end": {"10": 0}}', "\u00ff",
                                  '{"end": {"10": 1e999}}', '{"end": {"10": 1%s}}' % ("0" * 400), '{"end": {"1e2": 0.5}}',
                                  '{"end": {}, "detail": {"10": -Infinity}}', '{"end": {}, "variance": []}',
                                  "[" * 100_000, '{"end": ' * 100_000], ids=lambda text: text[:30])
def test_malformed_schedule(copy, text):
    (copy / "schedule.json").write_text(text, encoding="latin-1")
    assert_refused(copy, "schedule.json")


def test_a_folder_in_place_of_the_schedule(copy):
    (copy / "schedule.json").unlink()
    (copy / "schedule.json").mkdir()
    assert_refused(copy, "schedule.json")
