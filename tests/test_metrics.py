"""The metrics against their own formulas, and against the pictures and numbers of IQA-PyTorch."""

import copy
import csv
import os
from http.client import IncompleteRead
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from helpers import write_random_alexnet
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from scipy.special import gamma

from rng import metrics
from rng.support.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared"
CALIBRATION, ALEXNET = SHARED / "calibration", SHARED / "lpips" / "alexnet_features.npz"
seeds = pytest.mark.parametrize("seed", range(10))


@pytest.fixture(autouse=True)
def no_backbone_from_outside(monkeypatch):
    monkeypatch.delenv("RNG_ALEXNET", raising=False)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_random_alexnet(tmp_path_factory.mktemp("lpips") / "alexnet.npz")


@pytest.fixture(scope="module")
def lpips(backbone):
    return metrics.LPIPS(backbone)


def pictures(seed, n=2, size=(40, 37)):
    """Two seeded batches in [0, 1], the second a noisy version of the first, both rounded to 8 bit."""
    random = np.random.default_rng(seed)
    x = random.random((n, 3, *size))
    y = np.clip(x + random.normal(0, random.uniform(0.01, 0.3), x.shape), 0, 1)
    return [torch.from_numpy(np.rint(255 * p) / 255).float() for p in (x, y)]


def read(name):
    picture = np.array(Image.open(CALIBRATION / name).convert("RGB"))
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


def calibration(row):
    with open(CALIBRATION / "expected.csv", newline="") as file:
        expected = next(line for line in csv.DictReader(file) if line["metric"] == row)
    for name in ("I03", "I04", "I06", "I08", "I19"):
        yield read(f"ref/{name}.png"), read(f"dist/{name}.png"), float(expected[name])


@pytest.mark.skipif(not CALIBRATION.is_dir(), reason="../shared/calibration is absent")
@pytest.mark.parametrize("name, row, tolerance", [
    ("psnr", "psnr_rgb_iqa_pytorch", {"abs": 1e-3}), ("ssim", "ssim_y_iqa_pytorch", {"abs": 1e-3}),
    # not "niqe_matlab", which comes from the pristine model of MATLAB's toolbox, not the official release's
    ("niqe", "niqe_iqa_pytorch", {"rel": 1e-2}), ("lpips", "lpips_alex_v0.1", {"abs": 1e-3})])
def test_the_numbers_of_the_official_packages_are_reproduced(name, row, tolerance):
    if name == "lpips" and not ALEXNET.is_file():
        pytest.skip("../shared/lpips is absent")
    metric = metrics.LPIPS(ALEXNET) if name == "lpips" else getattr(metrics, name)
    for ref, dist, expected in calibration(row):
        score = metric(dist) if name == "niqe" else metric(dist, ref)
        assert score.item() == pytest.approx(expected, **tolerance)
    if name == "lpips":
        example = torch.cat([read("ex_p0.png"), read("ex_p1.png")])
        scores = metric(read("ex_ref.png").expand_as(example), example)
        assert scores.tolist() == pytest.approx([0.722, 0.138], abs=1e-3)


@seeds
def test_psnr_is_its_formula(seed):
    x, y = pictures(seed, n=3)
    expected = -10 * np.log10(np.mean((x.double().numpy() - y.double().numpy()) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(metrics.psnr(x, y), expected, rtol=1e-9)


@seeds
def test_ssim_is_its_formula(seed):
    x, y = pictures(seed, n=1, size=(11 + seed, 21 - seed))
    taps = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    luma = [np.rint(255 * np.tensordot([0.299, 0.587, 0.114], p[0].double().numpy(), 1)) for p in (x, y)]
    a, b = (sliding_window_view(p, (11, 11)) for p in luma)

    def mean(p):
        return (p * window).sum((2, 3))

    mu_a, mu_b, c1, c2 = mean(a), mean(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    cov, variances = mean(a * b) - mu_a * mu_b, mean(a * a) - mu_a**2 + mean(b * b) - mu_b**2
    similarity = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (variances + c2))
    assert metrics.ssim(x, y).item() == pytest.approx(similarity.mean(), abs=1e-9)


def slow_niqe(x):
    """NIQE block by block, with the search over all shapes and MATLAB's imresize from its definition; what is
    beyond the last whole block does not count."""
    luma = np.rint(255 * np.tensordot([0.299, 0.587, 0.114], x.double().numpy(), 1))
    h, w = luma.shape[0] // 96 * 96, luma.shape[1] // 96 * 96
    shapes = np.arange(0.2, 10.001, 0.001)
    ratios = gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes))

    def fit(v):
        left, right = np.sqrt(np.mean(v[v < 0] ** 2)), np.sqrt(np.mean(v[v > 0] ** 2))
        g = left / right
        r = np.mean(np.abs(v)) ** 2 / np.mean(v**2) * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
        a = shapes[np.argmin((ratios - r) ** 2)]
        return a, left * np.sqrt(gamma(1 / a) / gamma(3 / a)), right * np.sqrt(gamma(1 / a) / gamma(3 / a))

    def half(p):  # along the first axis
        t = np.abs(np.arange(-3.5, 4)) / 2
        taps = np.where(t <= 1, 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2) / 2
        padded = np.pad(p, ((3, 3), (0, 0)), mode="symmetric")
        return sum(tap * padded[k:k + len(p):2] for k, tap in enumerate(taps))

    def blur(p):
        return (sliding_window_view(np.pad(p, 3, mode="edge"), (7, 7)) * metrics.GAUSSIAN_WINDOW).sum((2, 3))

    scales = []
    for size, p in ((96, luma[:h, :w]), (48, half(half(luma[:h, :w]).T).T)):
        mean = blur(p)
        p = (p - mean) / (np.sqrt(np.abs(blur(p * p) - mean**2)) + 1)
        scales.append(scale := [])
        for top, left in np.ndindex(h // 96, w // 96):
            block = p[size * top:, size * left:][:size, :size]
            a, l, r = fit(block)
            scale.append([a, (l + r) / 2])
            for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
                a, l, r = fit(block * np.roll(block, shift, (0, 1)))
                scale[-1] += [a, (r - l) * gamma(2 / a) / gamma(1 / a), l, r]
    features = np.concatenate(scales, axis=1)
    d = metrics.PRISTINE_MEAN - np.nanmean(features, axis=0)
    covariance = np.cov(features[np.isfinite(features).all(1)].T)
    return np.sqrt(d @ np.linalg.pinv((metrics.PRISTINE_COV + covariance) / 2) @ d)


def textures(seed, size, n=1):
    """Seeded pictures with structure at several scales and no flat areas."""
    random = np.random.default_rng(seed)
    fields = random.standard_normal((n, 3, *size))
    smooth = np.cumsum(np.cumsum(fields - fields.mean((2, 3), keepdims=True), axis=2), axis=3)
    y = 0.5 + 0.1 * smooth / smooth.std() + random.uniform(0.02, 0.1) * fields
    return torch.from_numpy(np.rint(255 * np.clip(y, 0, 1)) / 255).float()


@pytest.mark.parametrize("n, h, w", [(3, 96, 192), (1, 192, 96), (1, 101, 290), (1, 200, 230), (1, 383, 96)])
def test_niqe_is_its_slow_self(n, h, w):
    x = textures(h, (h, w), n)
    assert metrics.niqe(x).tolist() == pytest.approx([slow_niqe(picture) for picture in x], rel=1e-6)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_niqe_leaves_blocks_without_structure_out():
    x = textures(6, (192, 288))
    x[:, :, :104, :104] = 0  # a block and its margin; black, so that no rounding error gives a sign
    assert metrics.niqe(x).item() == pytest.approx(slow_niqe(x[0]), rel=1e-6)
    assert metrics.niqe(torch.full((1, 3, 192, 192), 0.5)).isnan().all()


def slow_lpips(backbone, x, y):
    """LPIPS of one pair in numpy, float64, from the arrays in the backbone file and the heads."""

    def layers(p):
        shift, scale = np.reshape([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], (2, 3, 1, 1))
        p = (2 * p.double().numpy() - 1 - shift) / scale
        with np.load(backbone) as arrays:
            for i, stride, pad in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
                if i in (3, 6):
                    p = sliding_window_view(p, (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))
                weight, bias = arrays[f"features.{i}.weight"], arrays[f"features.{i}.bias"]
                p = sliding_window_view(np.pad(p, ((0, 0), (pad, pad), (pad, pad))), weight.shape[2:], (1, 2))
                p = np.tensordot(weight.astype(float), p[:, ::stride, ::stride], ((1, 2, 3), (0, 3, 4)))
                p = np.maximum(p + bias[:, None, None], 0)
                yield p / (np.sqrt((p**2).sum(0)) + 1e-10)

    with np.load(metrics.WEIGHTS / "lpips_alex.npz") as heads:
        return sum(np.tensordot(heads[f"lin{k}"].astype(float), (u - v) ** 2, 1).mean()
                   for k, (u, v) in enumerate(zip(layers(x), layers(y))))


@pytest.mark.parametrize("seed, size", list(enumerate([(31, 31), (32, 47), (40, 33), (37, 64)])))
def test_lpips_is_its_slow_self(lpips, backbone, seed, size):
    x, y = pictures(seed, n=1, size=size)
    assert lpips(x, y).item() == pytest.approx(slow_lpips(backbone, x[0], y[0]), rel=1e-4)


@seeds
def test_lpips_is_differentiable_and_frozen(lpips, seed):
    x, y = pictures(seed)
    gradient, = torch.autograd.grad(lpips(x, y.requires_grad_()).sum(), y)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training
    nearer = (y - 1e-3 * gradient / gradient.abs().max()).clamp(0, 1).detach()
    assert lpips(x, nearer).sum() < lpips(x, y).sum()


def test_lpips_has_a_gradient_where_all_features_are_dead(lpips):
    dead = copy.deepcopy(lpips)
    dead.features[10].bias.fill_(-1e6)
    x, y = pictures(0)
    gradient, = torch.autograd.grad(dead(x.requires_grad_(), y).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_lpips_is_float32_under_autocast_and_for_other_floats(lpips):
    x, y = pictures(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = lpips(x, y)
    assert score.dtype == torch.float32 and torch.equal(score, lpips(x, y))
    assert torch.equal(lpips(x.double(), y.double()), lpips(x, y))


@seeds
def test_batches_are_scored_one_by_one_pairs_in_either_order_and_only_equal_pictures_are_equal(lpips, seed):
    x, y = pictures(seed, n=4)
    for metric, of_equal in ((metrics.psnr, np.inf), (metrics.ssim, 1), (lpips, 0)):
        scores = metric(x, y)
        assert scores.shape == (4,) and (scores != of_equal).all() and (metric(x, x) == of_equal).all()
        torch.testing.assert_close(scores, torch.cat([metric(*pair) for pair in zip(x.split(1), y.split(1))]))
        torch.testing.assert_close(scores, metric(y, x))


good = torch.full((1, 3, 96, 192), 0.5)


@pytest.mark.parametrize("bad", [
    good[0], good[:, :1], good.movedim(1, 3), good.to(torch.uint8),
    good * 255, good - 0.501, good + 0.501, good * np.nan, good * np.inf])
def test_pictures_of_another_shape_or_range_are_refused(lpips, bad):
    fits = bad.shape == good.shape and bad.is_floating_point()
    for metric, *given in ((metrics.niqe, bad), *[(metric, picture, bad) for picture in (good, bad)
                                                  for metric in (metrics.psnr, metrics.ssim, lpips)]):
        with pytest.raises(ValueError, match=r"lie in \[0, 1\]" if fits else "expected float pictures"):
            metric(*given)


def test_pairs_of_different_shapes_and_ssim_of_small_pictures_are_refused(lpips):
    """And pictures too small for the other metrics."""
    for metric, *sizes, sentence in (
            *[(metric, good.shape, other, "different shapes") for other in ((1, 3, 95, 192), (2, 3, 96, 192))
              for metric in (metrics.psnr, metrics.ssim, lpips)],
            (metrics.ssim, (1, 3, 10, 192), (1, 3, 10, 192), "11x11"),
            (lpips, (1, 3, 30, 64), (1, 3, 30, 64), "31x31"),
            *[(metrics.niqe, (1, 3, *size), "two blocks") for size in ((95, 400), (96, 191), (1, 1))]):
        with pytest.raises(ValueError, match=sentence):
            metric(*map(torch.rand, sizes))


def refusal(load, *named):
    with pytest.raises(InputError) as error:
        load(*named)
    sentence = str(error.value)
    assert "\n" not in sentence and metrics.ALEXNET_URL in sentence
    assert "--lpips-backbone FILE" in sentence and "RNG_ALEXNET" in sentence
    return sentence


def test_backbone_from_npz_pth_and_environment_are_one(lpips, backbone, tmp_path, monkeypatch):
    whole = write_random_alexnet(tmp_path / "alexnet.pth")
    torch.save(torch.load(whole, weights_only=True) | {"classifier.1.weight": torch.zeros(2, 2)}, whole)
    x, y = pictures(0)
    for named, environment in ((str(whole), ""), (None, backbone), (backbone, "not read if a file is named")):
        monkeypatch.setenv("RNG_ALEXNET", str(environment))
        for load in (metrics.LPIPS, metrics.load_lpips):
            assert torch.equal(load(named)(x, y), lpips(x, y))


class Trap(str):
    """A path; pickled, a call that makes a folder there when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def save(path, arrays):
    return np.savez(path, **arrays) if path.suffix == ".npz" else torch.save(arrays, path)


SPOIL = {
    "missing": lambda path: None, "folder": Path.mkdir, "empty": Path.touch,
    "truncated": lambda path: path.write_bytes(write_random_alexnet(path).read_bytes()[:5_000_000]),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "wrong names": lambda path: save(path, {"conv1.weight": torch.zeros(3)}),
    "wrong shapes": lambda path: save(path, {f"features.{i}.{part}": torch.zeros(3) for i in (0, 3, 6, 8, 10)
                                             for part in ("weight", "bias")}),
    "code": lambda path: save(path, {"features.0.weight": np.array([Trap(path.parent / "ran")], object)}),
}


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
@pytest.mark.parametrize("kind", SPOIL)
def test_bad_backbone_files_are_refused_in_one_sentence(kind, suffix, tmp_path, monkeypatch):
    path = tmp_path / f"alexnet{suffix}"
    SPOIL[kind](path)
    monkeypatch.setenv("RNG_ALEXNET", str(path))
    for load, *named in ((metrics.LPIPS, path), (metrics.load_lpips, path), (metrics.load_lpips,)):
        assert str(path) in refusal(load, *named)
    assert not (tmp_path / "ran").exists()  # nothing in the file was executed


@pytest.mark.parametrize("failure", [
    URLError("no route to host"), OSError("disk full"), IncompleteRead(b"", 9),
    RuntimeError("invalid hash value"), RuntimeError("one line\n\n\tand another\n" * 9)])
def test_a_failed_download_is_one_sentence_and_leaves_lpips_out(failure, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", Mock(side_effect=failure))
    sentence = refusal(metrics.LPIPS)
    assert metrics.load_lpips() is None
    assert capsys.readouterr().err == f"without LPIPS: {sentence}\n"


def test_the_download_is_the_official_file_checked_by_its_hash(lpips, tmp_path, monkeypatch):
    state, (x, y) = torch.load(write_random_alexnet(tmp_path / "alexnet.pth"), weights_only=True), pictures(0)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download := Mock(return_value=state))
    assert torch.equal(metrics.load_lpips()(x, y), lpips(x, y))
    (url,), options = download.call_args
    assert url == "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    assert options["check_hash"] and options["weights_only"]
