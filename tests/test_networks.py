"""The networks r (NAFNet, U-Net), g (U-Net) and s, each written a second time with plain functions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import correlate1d

from rng import ddpm, folder
from rng.controller import STEPS, StepController
from rng.nafnet import FEATURE_SCALE, NAFBlock, NAFNet, config_from_state_dict
from rng.unet import NEAR, QUIET, UNet, detail_kept, noise_level_embedding

ODD_SIZES = [(1, 1), (1, 2), (3, 1), (7, 5), (8, 8), (9, 17), (16, 31), (33, 20)]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(network, seed=0, std=0.1):
    """Every parameter and statistic random, so that nothing hides behind an initial zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator) * std
            positive = name.endswith(("running_var", "norm1.weight", "norm2.weight"))
            tensor.copy_(values.abs() + 0.5 if positive else values)
    return network.eval().requires_grad_(False)


def number_of_parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def assert_every_parameter_matters(network, *inputs):
    network.requires_grad_(True)
    network(*inputs).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]


# NAFNet


def plain_nafblock(x, p, prefix):
    """The official block, written from its parameter names alone."""
    def conv(h, name, **options):
        return F.conv2d(h, p[f"{prefix}{name}.weight"], p[f"{prefix}{name}.bias"], **options)

    def norm(h, name):
        mean, variance = h.mean(1, keepdim=True), h.var(1, keepdim=True, unbiased=False)
        h = (h - mean) / (variance + 1e-6).sqrt()
        return h * p[f"{prefix}{name}.weight"].view(1, -1, 1, 1) + p[f"{prefix}{name}.bias"].view(1, -1, 1, 1)

    c = x.shape[1]
    h = conv(conv(norm(x, "norm1"), "conv1"), "conv2", padding=1, groups=2 * c)
    h = h[:, :c] * h[:, c:]
    x = x + conv(h * conv(h.mean((2, 3), keepdim=True), "sca.1"), "conv3") * p[f"{prefix}beta"]
    h = conv(norm(x, "norm2"), "conv4")
    return x + conv(h[:, :c] * h[:, c:], "conv5") * p[f"{prefix}gamma"]


def plain_nafnet(x, p, enc, middle, dec):
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, -width % 2 ** len(enc), 0, -height % 2 ** len(enc)))
    h, skips = F.conv2d(padded, p["intro.weight"], p["intro.bias"], padding=1), []
    for i, blocks in enumerate(enc):
        for j in range(blocks):
            h = plain_nafblock(h, p, f"encoders.{i}.{j}.")
        skips.append(h)
        h = F.conv2d(h, p[f"downs.{i}.weight"], p[f"downs.{i}.bias"], stride=2)
    for j in range(middle):
        h = plain_nafblock(h, p, f"middle_blks.{j}.")
    for i, blocks in enumerate(dec):
        h = F.pixel_shuffle(F.conv2d(h, p[f"ups.{i}.0.weight"]), 2) + skips.pop()
        for j in range(blocks):
            h = plain_nafblock(h, p, f"decoders.{i}.{j}.")
    return (F.conv2d(h, p["ending.weight"], p["ending.bias"], padding=1) + padded)[..., :height, :width]


@pytest.mark.parametrize("c", [1, 4, 16, 33])
def test_nafblock_is_the_official_one_and_at_start_the_identity(c):
    block, x = NAFBlock(c), 1e-3 * noise(2, c, 9, 7)  # so small that the eps of its norms shows
    assert torch.equal(block(x), x)
    expected = plain_nafblock(x, randomised(block, c, std=0.3).state_dict(), "")
    assert torch.allclose(block(x), expected, rtol=1e-4, atol=1e-5)


def random_config(seed):
    gen = np.random.default_rng(seed)
    enc, dec = gen.integers(1, 4, (2, gen.integers(1, 4))).tolist()
    return {"width": int(gen.integers(1, 5)), "enc": enc, "middle": int(gen.integers(1, 4)), "dec": dec}


@pytest.mark.parametrize("seed, size", list(enumerate(ODD_SIZES)))
def test_nafnet_is_the_official_one(seed, size):
    config = random_config(seed)
    network = randomised(NAFNet(**config), seed, std=0.3)
    x = noise(2, 3, *size, seed=seed)
    expected = plain_nafnet(x, network.state_dict(), config["enc"], config["middle"], config["dec"])
    assert torch.allclose(network(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    assert_every_parameter_matters(network, noise(1, 3, 16, 16))


@pytest.mark.parametrize("seed, size", list(enumerate(
    [(17, 17), (17, 40), (32, 32), (64, 20), (33, 31), (48, 25)])))
def test_nafnet_features_are_what_its_last_convolution_reads(seed, size):
    network, read = randomised(NAFNet(**random_config(seed)), seed), []
    x, here = noise(2, 3, *size, seed=seed), (..., *(slice(16, 16 + side) for side in size))
    out = network(x, features=True)
    network.ending.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))
    y_r = network(torch.from_numpy(np.pad(x, [(0, 0), (0, 0), (16, 16), (16, 16)], mode="reflect")))
    assert torch.allclose(out[:, :3], y_r[here], atol=1e-6)
    smooth = read[0].double().numpy()
    for axis in (2, 3):
        smooth = correlate1d(smooth, [0.25, 0.5, 0.25], axis)
    assert torch.allclose(out[:, 3:].double() / FEATURE_SCALE, torch.from_numpy(smooth)[here], atol=1e-5)


@pytest.mark.parametrize("width, millions", [(32, 29.16), (64, 115.98)])
def test_nafnet_has_the_official_size_and_names(width, millions):
    with torch.device("meta"):
        network = NAFNet(width=width, enc=(2, 2, 4, 8), middle=12, dec=(2, 2, 2, 2))
    block = {"beta", "gamma"} | {
        f"{layer}.{kind}" for kind in ("weight", "bias")
        for layer in ("norm1", "norm2", "sca.1", "conv1", "conv2", "conv3", "conv4", "conv5")}
    blocks = {"encoders.0": 2, "encoders.1": 2, "encoders.2": 4, "encoders.3": 8, "middle_blks": 12,
              "decoders.0": 2, "decoders.1": 2, "decoders.2": 2, "decoders.3": 2}
    names = {f"{level}.{i}.{name}" for level, n in blocks.items() for i in range(n) for name in block}
    names |= {f"{layer}.{kind}" for layer in ("intro", "ending", "downs.0", "downs.1", "downs.2", "downs.3")
              for kind in ("weight", "bias")} | {f"ups.{i}.0.weight" for i in range(4)}
    assert set(network.state_dict()) == names
    assert number_of_parameters(network) / 1e6 == pytest.approx(millions, abs=0.005)
    assert {"arch": "nafnet", **config_from_state_dict(network.state_dict())} == network.config


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("seed", range(3))
def test_official_checkpoints_load(seed, prefix, tmp_path):
    network = randomised(NAFNet(**random_config(seed)), seed)
    params = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({"params": params}, tmp_path / "official.pth")
    loaded = folder.load_recon(tmp_path / "official.pth")
    x = noise(1, 3, 13, 10)
    assert not loaded.training and torch.equal(loaded(x), network(x)) and loaded.config == network.config


# U-Net


@pytest.mark.parametrize("dim", [4, 8, 64])
def test_noise_level_embedding(dim):
    gamma = np.append(np.random.default_rng(dim).uniform(size=20), [0, 1e-6, 0.5, 1 - 1e-6, 1])
    k = np.arange(dim // 2) / (dim // 2)
    angle = 5000 * np.sqrt(gamma)[:, None] * np.exp(-np.log(10000) * k)
    embedding = noise_level_embedding(torch.tensor(gamma), dim)
    assert embedding.dtype == torch.float32
    assert np.allclose(embedding, np.concatenate([np.sin(angle), np.cos(angle)], 1), atol=2e-3)
    assert np.allclose(embedding[:, 0], np.sin(angle[:, 0]), atol=1e-6)  # sqrt(gamma) itself stays float64


def test_noise_level_embedding_tells_close_levels_apart_under_autocast():
    gamma = torch.tensor([0.999, 0.9999, 1 - 1e-6, 1], dtype=torch.float64)
    network = randomised(UNet(base=8, blocks=1), std=0.2)
    x = torch.cat([noise(1, 3, 8, 8)] * 4)
    with torch.autocast("cpu", torch.bfloat16):
        embedding, out = noise_level_embedding(gamma, 64), network(x, x, gamma)
    assert embedding.dtype == torch.float32 and torch.equal(embedding, noise_level_embedding(gamma, 64))
    distances = torch.cdist(embedding, embedding)
    assert distances[0, 1:].min() > 0.3 and distances[3, 2] > 1e-3  # the paper's first is not yet gamma = 1
    assert (out[0] - out[1]).abs().max() > 0.01 * out.abs().max()


def plain_conv(h, p, name, edge, stride=1):
    """3 x 3, around the picture zeros (edge="constant") or its edge once more ("replicate")."""
    return F.conv2d(F.pad(h, (1, 1, 1, 1), edge), p[f"{name}.weight"], p[f"{name}.bias"], stride)


def plain_resblock(h, level, p, edge):
    y = plain_conv(h * torch.sigmoid(h), p, "conv1", edge)
    if level is not None:
        scale, shift = (level @ p["level.weight"].T + p["level.bias"])[:, :, None, None].chunk(2, 1)
        y = y + scale * y + shift
    y = plain_conv(y * torch.sigmoid(y), p, "conv2", edge)
    return y + (h if h.shape == y.shape else F.conv2d(h, p["skip.weight"], p["skip.bias"]))


def plain_u(network, h, level, edge, depth=0):
    """The U as a recursion: encode, all that is below, come up, join what was encoded, decode."""
    def through(blocks, h):
        for block in blocks:
            h = plain_resblock(h, level, block.state_dict(), edge)
        return h

    if depth == len(network.downs):
        return through(network.middle, h)
    p = network.state_dict()
    down, up = f"downs.{depth}", f"ups.{len(network.ups) - 1 - depth}"
    h = through(network.encoders[depth], h)
    below = plain_u(network, plain_conv(h, p, down, edge, stride=2), level, edge, depth + 1)
    above = plain_conv(below.repeat_interleave(2, 2).repeat_interleave(2, 3), p, up, edge)
    return through(network.decoders[-1 - depth], torch.cat([above, h], 1))


KINDS = [dict(conditions=1), dict(conditions=2), dict(noise_level=False), dict(multipliers=(1, 2), blocks=3),
         dict(conditions=2, residual=True, features=5), dict(conditions=2, residual=True, softness=0.4)]


def unet_and_inputs(arguments, height, width):
    network = UNet(**{"base": 4, "blocks": 1, **arguments})
    channels = 3 * network.config["conditions"] + network.config["features"]
    x, d_t = noise(2, channels, height, width), noise(2, 3, height, width, seed=1)
    return network, [x, d_t, torch.tensor([0.3, 0.999]).double()] if network.noise_level else [x]


@pytest.mark.parametrize("arguments", KINDS)
@pytest.mark.parametrize("height, width", [(8, 16), (13, 9), (24, 15)])
def test_unet_is_a_u(arguments, height, width):
    network, inputs = unet_and_inputs(arguments, height, width)
    p, level, multiple = randomised(network, std=0.3).state_dict(), None, 2 ** len(network.downs)
    edge = "replicate" if network.residual else "constant"
    rows, cols = (torch.arange(multiple * math.ceil(size / multiple)).clamp(max=size - 1)
                  for size in (height, width))  # the last row and column repeated
    h = torch.cat(inputs[:2], 1)[:, :, rows][..., cols]
    if network.noise_level:
        level = noise_level_embedding(inputs[2], 4)
        for layer in (0, 2):
            level = F.silu(F.linear(level, p[f"mlp.{layer}.weight"], p[f"mlp.{layer}.bias"]))
    out = plain_u(network, plain_conv(h, p, "intro", edge), level, edge)
    out = plain_conv(F.silu(out), p, "ending", edge)[..., :height, :width]
    if network.residual:  # it is d_0: the noise is what is left of d_t, in float64
        x, d_t, gamma = inputs[0], inputs[1].double(), inputs[2][:, None, None, None]
        smooth = F.pad(out, (1,) * 4, "replicate").unfold(2, 3, 1).unfold(3, 3, 1)  # (N, 3, H, W, 3, 3)
        smooth = (smooth * torch.tensor([1, 2, 1]) * torch.tensor([[1], [2], [1]])).sum((4, 5)) / 16
        out = out + network.softness * (smooth - out)
        out = (d_t - gamma.sqrt() * detail_kept(x[:, :3], x[:, 3:6]) * out) / (1 - gamma).sqrt()
        out = out.float()
    elif not network.noise_level:
        out = inputs[0] + out
    assert torch.allclose(network(*inputs), out, rtol=1e-4, atol=1e-4 * out.abs().max())


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("arguments", [*KINDS[:3], KINDS[4]])
def test_unet_is_zero_or_the_identity_at_start_and_takes_any_size(arguments, size):
    network, inputs = unet_and_inputs(arguments, *size)
    at_start = torch.zeros(2, 3, *size) if network.noise_level else inputs[0]
    if network.residual:  # a d_0 of zero: d_t is noise alone
        at_start = ddpm.noise_in(inputs[1], at_start, inputs[2])
    assert torch.equal(network(*inputs), at_start)
    out = randomised(network, std=0.3)(*inputs)
    assert out.shape == at_start.shape and out.isfinite().all()
    assert torch.equal(out, at_start) == (network.residual and size == (1, 1))  # one pixel has no gradient


@pytest.mark.parametrize("arguments", KINDS)
def test_unet_depends_on_all_that_it_is_given(arguments):
    network, inputs = unet_and_inputs(arguments, 16, 16)
    out = randomised(network, std=0.3)(*inputs)
    assert len(inputs) == 1 or not torch.allclose(out, network(*inputs[:2], inputs[2].flip(0)), rtol=1e-2)
    for tensor in inputs[:2]:
        for channel in tensor.unbind(1):  # a view
            channel *= -1
            assert not torch.equal(network(*inputs), out)
            channel *= -1
    assert_every_parameter_matters(network, *inputs)


@pytest.mark.parametrize("seed", range(10))
def test_detail_kept(seed):
    """The formula at each pixel, with loops; the picture's edge goes on outside."""
    gen = np.random.default_rng(seed)
    height, width = gen.integers(1, 40, 2)
    y_r = gen.uniform(0, 10 ** gen.uniform(-3, 0), (3, height, width))
    x = y_r + 10 ** gen.uniform(-3, 0) * gen.normal(size=y_r.shape)
    right, below = y_r[:, :, [*range(1, width), width - 1]], y_r[:, [*range(1, height), height - 1]]
    gradient = ((abs(right - y_r) + abs(below - y_r)) / 2).mean(0)
    square = ((x - y_r) ** 2).mean(0)
    expected = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            rows, cols = (np.arange(k - NEAR, k + NEAR + 1).clip(0, size - 1)
                          for k, size in ((i, height), (j, width)))
            noise = square[np.ix_(rows, cols)].mean() ** 0.5
            expected[i, j] = min(1, gradient[np.ix_(rows, cols)].mean() / noise ** 2, noise / QUIET)
    kept = detail_kept(*(torch.tensor(z[None], dtype=torch.float32) for z in (x, y_r)))
    assert kept.shape == (1, 1, height, width) and np.allclose(kept[0, 0], expected, rtol=1e-3, atol=1e-6)


def test_no_detail_is_kept_where_there_is_no_noise():
    y_r = torch.rand(1, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(detail_kept(y_r, y_r), torch.zeros(1, 1, 30, 30))


def test_unet_channels_blocks_and_levels():
    with torch.device("meta"):
        network = UNet(base=64, blocks=3)
    widths = [[block.conv1.out_channels for block in level]
              for level in (*network.encoders, network.middle, *network.decoders)]
    assert widths == [[64] * 3, [128] * 3, [192] * 3, [256] * 6, [192] * 3, [128] * 3, [64] * 3]


# The step controller


def plain_controller(x, p):
    """Sec. 3.2 in its own order: eight blocks, max-pooling after 2, 5, 6, 8, residuals 2 -> 4 and 6 -> 8."""
    outputs = {}
    for i in range(1, 9):
        name = f"blocks.{i - 1}"
        x = F.conv2d(x, p[f"{name}.0.weight"], padding=1)
        mean, variance, weight, bias = (p[f"{name}.1.{key}"].view(-1, 1, 1)
                                        for key in ("running_mean", "running_var", "weight", "bias"))
        x = ((x - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)
        if i in (4, 8):
            x = x + outputs[i - 2]
        if i in (2, 5, 6):
            x = F.max_pool2d(x, 2)
        if i == 8:
            x = F.max_pool2d(x, x.shape[-2:])
        outputs[i] = x
    return x.flatten(1) @ p["fc.weight"].T + p["fc.bias"]


@pytest.mark.parametrize("n, height, width", [(1, 8, 8), (2, 64, 64), (3, 40, 24), (5, 17, 65)])
def test_controller_is_the_papers(n, height, width):
    s = randomised(StepController(4), seed=n, std=0.3)
    x = noise(n, 3, height, width, seed=n)
    logits = s(x)
    assert logits.shape == (n, 11)
    assert torch.allclose(logits, plain_controller(x, s.state_dict()), rtol=1e-4, atol=1e-4)
    assert torch.allclose(logits, torch.cat([s(one) for one in x.split(1)]), atol=1e-4)
    assert_every_parameter_matters(s, x)


def test_controller_size():
    with torch.device("meta"):
        s = StepController()
    assert s.config == {"c": 64} and number_of_parameters(s) / 1e6 == pytest.approx(6.57, abs=0.005)
    assert [block[0].out_channels for block in s.blocks] == [64, 128, 128, 128, 256, 512, 512, 512]


def test_predict_steps():
    assert STEPS == (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    s = randomised(StepController(4), std=0.3)
    x = noise(40, 3, 16, 16) * torch.linspace(0.1, 5, 40).view(-1, 1, 1, 1)
    s.fc.bias.sub_(s(x).mean(0))  # or one class wins everywhere
    steps = s.predict_steps(x)
    assert steps.shape == (40,) and steps.dtype == torch.int64
    assert steps.tolist() == [10 * max(range(11), key=row.__getitem__) for row in s(x).softmax(1).tolist()]
    assert len(set(steps.tolist())) > 4
