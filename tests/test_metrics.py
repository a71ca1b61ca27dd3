import copy
import csv
import os
from http.client import IncompleteRead
from pathlib import Path
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
calibrated = pytest.mark.skipif(not CALIBRATION.is_dir(), reason="../shared/calibration is absent")
with_alexnet = pytest.mark.skipif(not (CALIBRATION.is_dir() and ALEXNET.is_file()),
                                  reason="../shared/lpips is absent")
seeds = pytest.mark.parametrize("seed", range(10))


@pytest.fixture(autouse=True)
def no_backbone_named(monkeypatch):
    monkeypatch.delenv("RNG_ALEXNET", raising=False)


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


# Calibration: the pictures and numbers of IQA-PyTorch


def read(name):
    picture = np.array(Image.open(CALIBRATION / name).convert("RGB"))
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


def calibration(row):
    with open(CALIBRATION / "expected.csv", newline="") as file:
        expected = next(line for line in csv.DictReader(file) if line["metric"] == row)
    for name in ("I03", "I04", "I06", "I08", "I19"):
        yield read(f"ref/{name}.png"), read(f"dist/{name}.png"), float(expected[name])


@calibrated
@pytest.mark.parametrize("metric, row", [("psnr", "psnr_rgb_iqa_pytorch"), ("ssim", "ssim_y_iqa_pytorch")])
def test_psnr_and_ssim_reproduce_iqa_pytorch(metric, row):
    for ref, dist, expected in calibration(row):
        assert getattr(metrics, metric)(dist, ref).item() == pytest.approx(expected, abs=1e-3)


@calibrated
def test_niqe_reproduces_iqa_pytorch():
    # Not the row "niqe_matlab": that one comes from the pristine model of MATLAB's toolbox, not the official
    # release's.
    for _, dist, expected in calibration("niqe_iqa_pytorch"):
        assert metrics.niqe(dist).item() == pytest.approx(expected, rel=1e-2)


@with_alexnet
def test_lpips_reproduces_the_official_package():
    lpips = metrics.LPIPS(ALEXNET)
    for ref, dist, expected in calibration("lpips_alex_v0.1"):
        assert lpips(ref, dist).item() == pytest.approx(expected, abs=1e-3)
    example = torch.cat([read("ex_p0.png"), read("ex_p1.png")])
    assert lpips(read("ex_ref.png").expand_as(example), example).tolist() == pytest.approx([0.722, 0.138],
                                                                                           abs=1e-3)


# PSNR and SSIM


@seeds
def test_psnr_is_its_formula(seed):
    x, y = pictures(seed, n=3)
    expected = [10 * np.log10(1 / np.mean((a - b) ** 2)) for a,
                b in zip(x.double().numpy(), y.double().numpy())]
    np.testing.assert_allclose(metrics.psnr(x, y), expected, rtol=1e-9)
    assert metrics.psnr(x, x).tolist() == [float("inf")] * 3


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
    covariance, variances = mean(a * b) - mu_a * mu_b, mean(a * a) - mu_a**2 + mean(b * b) - mu_b**2
    similarity = (2 * mu_a * mu_b + c1) * (2 * covariance
                                           + c2) / ((mu_a**2 + mu_b**2 + c1) * (variances + c2))
    assert metrics.ssim(x, y).item() == pytest.approx(similarity.mean(), abs=1e-9)


# NIQE


def slow_niqe(x):
    """NIQE block by block, with the search over all shapes and MATLAB's imresize from its definition."""
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

    def cubic(t):
        t = np.abs(t)
        return np.where(t <= 1, 1.5 * t**3 - 2.5 * t**2 + 1,
                        np.where(t <= 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))

    def half(n):
        matrix = np.zeros((n // 2, n))
        for i in range(n // 2):
            centre = 2 * i + 0.5
            for j in range(-8, n + 8):
                matrix[i, j if 0 <= j < n else -1 - j if j < 0
                       else 2 * n - 1 - j] += cubic((j - centre) / 2) / 2
        return matrix

    def blur(p):
        return (sliding_window_view(np.pad(p, 3, mode="edge"), (7, 7)) * metrics.GAUSSIAN_WINDOW).sum((2, 3))

    scales = []
    for size, p in ((96, luma[:h, :w]), (48, half(h) @ luma[:h, :w] @ half(w).T)):
        mean = blur(p)
        p = (p - mean) / (np.sqrt(np.abs(blur(p * p) - mean**2)) + 1)
        scale = []
        for top in range(0, p.shape[0], size):
            for left in range(0, p.shape[1], size):
                block = p[top : top + size, left : left + size]
                a, l, r = fit(block)
                row = [a, (l + r) / 2]
                for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
                    a, l, r = fit(block * np.roll(np.roll(block, dy, 0), dx, 1))
                    row += [a, (r - l) * gamma(2 / a) / gamma(1 / a), l, r]
                scale.append(row)
        scales.append(scale)
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


@pytest.mark.parametrize("seed, size", list(enumerate([(96, 192), (192, 96), (101, 290), (200, 230),
                                                       (383, 96)])))
def test_niqe_is_its_slow_self(seed, size):
    x = textures(seed, size)
    assert metrics.niqe(x).item() == pytest.approx(slow_niqe(x[0]), rel=1e-6)


def test_niqe_ignores_what_is_beyond_the_last_block():
    x = textures(5, (120, 230))
    torch.testing.assert_close(metrics.niqe(x), metrics.niqe(x[:, :, :96, :192]))


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_niqe_leaves_blocks_without_structure_out():
    x = textures(6, (192, 288))
    x[:, :, :104, :104] = 0  # a block and its margin; black, so that no rounding error gives a sign
    assert metrics.niqe(x).item() == pytest.approx(slow_niqe(x[0]), rel=1e-6)
    assert metrics.niqe(torch.full((1, 3, 192, 192), 0.5)).isnan().all()


@pytest.mark.parametrize("size", [(95, 400), (96, 191), (1, 1)])
def test_niqe_needs_two_blocks(size):
    with pytest.raises(ValueError, match="two blocks"):
        metrics.niqe(torch.rand(1, 3, *size))


# LPIPS


def slow_lpips(backbone, x, y):
    """LPIPS of one pair in numpy, float64, from the arrays in the backbone file and the heads."""

    def layers(p):
        shift, scale = np.reshape([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], (2, 3, 1, 1))
        p = (2 * p.double().numpy() - 1 - shift) / scale
        with np.load(backbone) as arrays:
            for i, stride, pad, pool in ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False),
                                         (10, 1, 1, False)):
                if pool:
                    p = sliding_window_view(p, (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))
                weight, bias = arrays[f"features.{i}.weight"], arrays[f"features.{i}.bias"]
                p = sliding_window_view(np.pad(p, ((0, 0), (pad, pad), (pad, pad))), weight.shape[2:], (1, 2))
                p = np.tensordot(weight.astype(float), p[:, ::stride, ::stride], ((1, 2, 3), (0, 3, 4)))
                p = np.maximum(p + bias[:, None, None], 0)
                yield p / (np.sqrt((p**2).sum(0)) + 1e-10)

    with np.load(metrics.WEIGHTS / "lpips_alex.npz") as heads:
        return sum(
            np.tensordot(heads[f"lin{k}"].astype(float), (u - v) ** 2, 1).mean()
            for k, (u, v) in enumerate(zip(layers(x), layers(y)))
        )


@pytest.mark.parametrize("seed, size", list(enumerate([(31, 31), (32, 47), (40, 33), (37, 64)])))
def test_lpips_is_its_slow_self(lpips, backbone, seed, size):
    x, y = pictures(seed, n=1, size=size)
    assert lpips(x, y).item() == pytest.approx(slow_lpips(backbone, x[0], y[0]), rel=1e-4)


@seeds
def test_lpips_is_differentiable_and_frozen(lpips, seed):
    x, y = pictures(seed)
    y.requires_grad_()
    lpips(x, y).sum().backward()
    assert y.grad.isfinite().all() and y.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in lpips.parameters()) and not lpips.training

    # a step against the gradient brings the pictures closer
    nearer = (y - 1e-3 * y.grad / y.grad.abs().max()).clamp(0, 1).detach()
    assert lpips(x, nearer).sum() < lpips(x, y).sum()


def test_lpips_has_a_gradient_where_all_features_are_dead(lpips):
    dead = copy.deepcopy(lpips)
    dead.features[10].bias.fill_(-1e6)
    x, y = pictures(0)
    x.requires_grad_()
    dead(x, y).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_lpips_is_float32_under_autocast_and_for_other_floats(lpips):
    x, y = pictures(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = lpips(x, y)
    assert score.dtype == torch.float32 and torch.equal(score, lpips(x, y))
    assert torch.equal(lpips(x.double(), y.double()), lpips(x, y))


def test_lpips_refuses_small_pictures(lpips):
    with pytest.raises(ValueError, match="31x31"):
        lpips(torch.rand(1, 3, 30, 64), torch.rand(1, 3, 30, 64))


# What all of them promise


@seeds
def test_batches_are_scored_one_by_one_and_pairs_in_either_order(lpips, seed):
    x, y = pictures(seed, n=4)
    for metric in (metrics.psnr, metrics.ssim, lpips):
        scores = metric(x, y)
        assert scores.shape == (4,)
        torch.testing.assert_close(scores, torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(4)]))
        torch.testing.assert_close(scores, metric(y, x))


@seeds
def test_equal_pictures_are_at_no_distance(lpips, seed):
    x, y = pictures(seed)
    assert metrics.psnr(x, x).isinf().all() and (metrics.ssim(x, x) == 1).all() and (lpips(x, x) == 0).all()
    assert metrics.psnr(x, y).isfinite().all() and (metrics.ssim(x, y) < 1).all() and (lpips(x, y) > 0).all()


def test_niqe_scores_a_batch_one_by_one():
    x = textures(7, (96, 200), n=3)
    torch.testing.assert_close(metrics.niqe(x), torch.cat([metrics.niqe(x[i : i + 1]) for i in range(3)]))


good = torch.full((1, 3, 96, 192), 0.5)


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (good[0], "expected float pictures"),
        (good[:, :1], "expected float pictures"),
        (good.movedim(1, 3), "expected float pictures"),
        (good.to(torch.uint8), "expected float pictures"),
        (good * 255, r"lie in \[0, 1\]"),
        (good - 0.501, r"lie in \[0, 1\]"),
        (good + 0.501, r"lie in \[0, 1\]"),
        (good * float("nan"), r"lie in \[0, 1\]"),
        (good * float("inf"), r"lie in \[0, 1\]"),
    ],
)
def test_pictures_of_another_shape_or_range_are_refused(lpips, bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        metrics.niqe(bad)
    for metric in (metrics.psnr, metrics.ssim, lpips):
        with pytest.raises(ValueError, match=sentence):
            metric(good, bad)
        with pytest.raises(ValueError, match=sentence):
            metric(bad, bad)


def test_pairs_of_different_shapes_and_ssim_of_small_pictures_are_refused(lpips):
    for metric in (metrics.psnr, metrics.ssim, lpips):
        with pytest.raises(ValueError, match="different shapes"):
            metric(good, good[:, :, :95])
        with pytest.raises(ValueError, match="different shapes"):
            metric(good, good.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(good[:, :, :10], good[:, :, :10])


# The backbone: a file named, the environment, the download


def refuse_download(*args, **kwargs):
    raise AssertionError("nothing may be downloaded here")


def assert_one_sentence(error):
    sentence = str(error.value)
    assert "\n" not in sentence and metrics.ALEXNET_URL in sentence
    assert "--lpips-backbone FILE" in sentence and "RNG_ALEXNET" in sentence
    return sentence


def test_backbone_from_npz_pth_and_environment_are_one(lpips, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse_download)
    whole = write_random_alexnet(tmp_path / "alexnet.pth")
    torch.save(torch.load(whole, weights_only=True) | {"classifier.1.weight": torch.zeros(2, 2)}, whole)
    x, y = pictures(0)
    assert torch.equal(metrics.LPIPS(str(whole))(x, y), lpips(x, y))
    monkeypatch.setenv("RNG_ALEXNET", str(backbone))
    assert torch.equal(metrics.LPIPS()(x, y), lpips(x, y))
    assert torch.equal(metrics.load_lpips()(x, y), lpips(x, y))
    monkeypatch.setenv("RNG_ALEXNET", "not read where a file is named")
    assert torch.equal(metrics.LPIPS(backbone)(x, y), lpips(x, y))


def missing(path):
    pass


def folder(path):
    path.mkdir()


def empty(path):
    path.touch()


def truncated(path):
    write_random_alexnet(path)
    path.write_bytes(path.read_bytes()[:5_000_000])


def text(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def wrong_names(path):
    save(path, {"conv1.weight": np.zeros(3)})


def wrong_shapes(path):
    save(path, {f"features.{i}.{part}": np.zeros(3) for i in (0, 3, 6, 8, 10) for part in ("weight", "bias")})


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


class MakesFolder:
    """Pickled, a call that leaves a folder behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def code(path):
    trap = np.array([MakesFolder(path.parent / "ran")], dtype=object)
    if path.suffix == ".npz":
        np.savez(path, **{"features.0.weight": trap})
    else:
        torch.save({"features.0.weight": trap}, path)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
@pytest.mark.parametrize("spoil", [missing, folder, empty, truncated, text, wrong_names, wrong_shapes, code])
def test_bad_backbone_files_are_refused_in_one_sentence(spoil, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse_download)
    path = tmp_path / f"alexnet{suffix}"
    spoil(path)
    with pytest.raises(InputError) as error:
        metrics.LPIPS(path)
    assert str(path) in assert_one_sentence(error)
    with pytest.raises(InputError):
        metrics.load_lpips(path)
    monkeypatch.setenv("RNG_ALEXNET", str(path))
    with pytest.raises(InputError):
        metrics.load_lpips()
    assert not (tmp_path / "ran").exists()  # nothing in the file was executed


@pytest.mark.parametrize(
    "failure",
    [URLError("no route to host"), OSError("disk full"), RuntimeError("invalid hash value"),
     IncompleteRead(b"", 9),
     RuntimeError("one line\n\n\tand another\n" * 9)],
)
def test_a_failed_download_is_one_sentence_and_leaves_lpips_out(failure, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    with pytest.raises(InputError) as error:
        metrics.LPIPS()
    sentence = assert_one_sentence(error)
    assert metrics.load_lpips() is None
    assert capsys.readouterr().err == f"without LPIPS: {sentence}\n"


def test_the_download_is_the_official_file_checked_by_its_hash(lpips, tmp_path, monkeypatch):
    state = torch.load(write_random_alexnet(tmp_path / "alexnet.pth"), weights_only=True)

    def download(url, **options):
        assert url == "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
        assert options["check_hash"] and options["weights_only"]
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    x, y = pictures(0)
    assert torch.equal(metrics.load_lpips()(x, y), lpips(x, y))
