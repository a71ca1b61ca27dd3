"""The networks r (NAFNet, U-Net), g (U-Net) and s (controller), each written a second time with plain
functions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rng import folder
from rng.controller import STEPS, StepController
from rng.nafnet import LayerNorm2d, NAFBlock, NAFNet, SimpleGate, config_from_state_dict
from rng.unet import ResBlock, UNet, noise_level_embedding

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


@pytest.mark.parametrize("seed", range(5))
def test_layer_norm(seed):
    gen = np.random.default_rng(seed)
    c = int(gen.integers(2, 20))
    x = gen.normal(size=(2, c, 4, 5)) * 1e-3  # so small that eps shows
    weight, bias = gen.normal(size=(2, c))
    norm = LayerNorm2d(c)
    norm.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
    expected = expected * weight[:, None, None] + bias[:, None, None]
    assert np.allclose(norm(torch.tensor(x).float()).detach(), expected, rtol=1e-3, atol=1e-5)


def test_simple_gate():
    x = noise(2, 6, 3, 4)
    assert torch.equal(SimpleGate()(x), x[:, :3] * x[:, 3:])


@pytest.mark.parametrize("c", [1, 4, 16, 33])
def test_nafblock_is_the_identity_at_start(c):
    x = noise(2, c, 9, 7)
    assert torch.equal(NAFBlock(c)(x), x)


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
    multiple = 2 ** len(enc)
    padded = torch.zeros(*x.shape[:2], multiple * math.ceil(height / multiple),
                         multiple * math.ceil(width / multiple))
    padded[..., :height, :width] = x
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


def random_config(seed):
    gen = np.random.default_rng(seed)
    levels = int(gen.integers(1, 4))
    enc, dec = gen.integers(1, 4, (2, levels)).tolist()
    return {"width": int(gen.integers(1, 5)), "enc": enc, "middle": int(gen.integers(1, 4)), "dec": dec}


@pytest.mark.parametrize("seed, size", list(enumerate(ODD_SIZES)))
def test_nafnet_is_the_official_one(seed, size):
    config = random_config(seed)
    network = randomised(NAFNet(**config), seed, std=0.3)
    x = noise(2, 3, *size, seed=seed)
    expected = plain_nafnet(x, network.state_dict(), config["enc"], config["middle"], config["dec"])
    assert expected.shape == x.shape
    assert torch.allclose(network(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    assert_every_parameter_matters(network, noise(1, 3, 16, 16))


@pytest.mark.parametrize("width, millions", [(32, 29.16), (64, 115.98)])
def test_nafnet_has_the_official_size_and_names(width, millions):
    with torch.device("meta"):
        network = NAFNet(width=width, enc=(2, 2, 4, 8), middle=12, dec=(2, 2, 2, 2))
    block = ["beta", "gamma", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "sca.1.weight",
             "sca.1.bias"]
    block += [f"conv{i}.{kind}" for i in range(1, 6) for kind in ("weight", "bias")]
    places = [f"encoders.{i}.{j}" for i, blocks in enumerate((2, 2, 4, 8)) for j in range(blocks)]
    places += [f"middle_blks.{j}" for j in range(12)] + [f"decoders.{i}.{j}" for i in range(4)
                                                         for j in range(2)]
    names = {f"{place}.{name}" for place in places for name in block}
    layers = ["intro", "ending", *(f"downs.{i}" for i in range(4))]
    names |= {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    names |= {f"ups.{i}.0.weight" for i in range(4)}
    assert set(network.state_dict()) == names
    assert number_of_parameters(network) / 1e6 == pytest.approx(millions, abs=0.005)
    assert {"arch": "nafnet", **config_from_state_dict(network.state_dict())} == network.config


@pytest.mark.parametrize("seed", range(10))
def test_nafnet_configuration_is_read_off_the_names(seed):
    config = random_config(seed)
    network = NAFNet(**config)
    assert config_from_state_dict(network.state_dict()) == config
    assert network.config == {"arch": "nafnet", **config}


def test_other_names_are_not_a_nafnet():
    with pytest.raises(KeyError):
        config_from_state_dict(StepController(4).state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("seed", range(3))
def test_official_checkpoints_load(seed, prefix, tmp_path):
    network = randomised(NAFNet(**random_config(seed)), seed)
    params = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({"params": params}, tmp_path / "official.pth")
    loaded = folder.load_recon(tmp_path / "official.pth")
    x = noise(1, 3, 13, 10)
    assert not loaded.training and torch.equal(loaded(x), network(x))


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
    assert torch.cdist(embedding, embedding)[0, 1:].min() > 0.3
    # the first step of the paper's schedule is not yet gamma = 1
    assert torch.cdist(embedding, embedding)[3, 2] > 1e-3
    assert (out[0] - out[1]).abs().max() > 0.01 * out.abs().max()


@pytest.mark.parametrize("c_in, c_out, embedding", [(4, 4, 0), (4, 6, 0), (6, 6, 8), (8, 4, 8)])
def test_residual_block(c_in, c_out, embedding):
    block = randomised(ResBlock(c_in, c_out, embedding), std=0.3)
    p = block.state_dict()
    h, level = noise(2, c_in, 5, 6), noise(2, 8, seed=1) if embedding else None
    y = F.conv2d(h * torch.sigmoid(h), p["conv1.weight"], p["conv1.bias"], padding=1)
    if embedding:
        scale, shift = (level @ p["level.weight"].T + p["level.bias"]).view(2, 2, c_out, 1, 1).unbind(1)
        y = y + scale * y + shift
    y = F.conv2d(y * torch.sigmoid(y), p["conv2.weight"], p["conv2.bias"], padding=1)
    assert ("skip.weight" in p) == (c_in != c_out)
    skip = F.conv2d(h, p["skip.weight"], p["skip.bias"]) if c_in != c_out else h
    assert torch.allclose(block(h, level), skip + y, atol=1e-5)


def plain_u(network, h, level, depth=0):
    """The U as a recursion: encode, all that is below, come up, join what was encoded, decode."""
    def through(blocks, h):
        for block in blocks:
            h = block(h, level)
        return h

    if depth == len(network.downs):
        return through(network.middle, h)
    p = network.state_dict()
    down, up = f"downs.{depth}", f"ups.{len(network.ups) - 1 - depth}"
    h = through(network.encoders[depth], h)
    below = F.conv2d(F.pad(h, (1, 1, 1, 1)), p[f"{down}.weight"], p[f"{down}.bias"], stride=2)
    below = plain_u(network, below, level, depth + 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    above = F.conv2d(below, p[f"{up}.weight"], p[f"{up}.bias"], padding=1)
    return through(network.decoders[-1 - depth], torch.cat([above, h], 1))


@pytest.mark.parametrize("conditions, height, width", [(1, 8, 16), (1, 13, 9), (2, 24, 15)])
def test_unet_is_a_u(conditions, height, width):
    g = randomised(UNet(base=4, blocks=1, conditions=conditions), std=0.3)
    x, d_t = noise(2, 3 * conditions, height, width), noise(2, 3, height, width, seed=1)
    gamma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    rows, cols = (torch.arange(8 * math.ceil(size / 8)).clamp(max=size - 1) for size in (height, width))
    h = torch.cat([x, d_t], 1)[:, :, rows][..., cols]  # the last row and column repeated up to multiples of 8
    level = noise_level_embedding(gamma, 4)
    for layer in (0, 2):
        level = F.silu(F.linear(level, g.mlp[layer].weight, g.mlp[layer].bias))
    out = g.ending(F.silu(plain_u(g, g.intro(h), level)))[..., :height, :width]
    assert torch.allclose(g(x, d_t, gamma), out, rtol=1e-4, atol=1e-4 * out.abs().max())


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("conditions", [1, 2])
def test_g_is_zero_at_start_and_takes_any_size(conditions, size):
    g = UNet(base=4, blocks=1, conditions=conditions)
    x, d_t = noise(2, 3 * conditions, *size), noise(2, 3, *size, seed=1)
    gamma = torch.tensor([0.3, 0.999]).double()
    assert torch.equal(g(x, d_t, gamma), torch.zeros(2, 3, *size))
    out = randomised(g, std=0.3)(x, d_t, gamma)
    assert out.shape == d_t.shape and out.isfinite().all() and out.any()


@pytest.mark.parametrize("size", ODD_SIZES)
def test_unet_as_r_is_the_identity_at_start_and_takes_any_size(size):
    r, x = UNet(base=4, blocks=1, noise_level=False), noise(2, 3, *size)
    assert torch.equal(r(x), x)
    assert randomised(r)(x).shape == x.shape and not torch.equal(r(x), x)


@pytest.mark.parametrize("arguments", [dict(conditions=1), dict(conditions=2), dict(noise_level=False),
                                       dict(multipliers=(1, 2), blocks=3)])
def test_unet_depends_on_all_that_it_is_given(arguments):
    network = randomised(UNet(**{"base": 4, "blocks": 1, **arguments}), std=0.3)
    conditions = network.config["conditions"]
    inputs = [noise(2, 3 * conditions, 16, 16)]
    if network.noise_level:
        inputs += [noise(2, 3, 16, 16, seed=1), torch.tensor([0.2, 0.9], dtype=torch.float64)]
        assert not torch.allclose(network(*inputs), network(*inputs[:2], inputs[2].flip(0)), rtol=1e-2)
    for tensor in inputs:
        for channel in range(tensor.shape[1] if tensor.dim() == 4 else 0):
            other = tensor.clone()
            other[:, channel] += 1
            assert not torch.equal(network(*inputs),
                                   network(*[other if some is tensor else some for some in inputs]))
    assert_every_parameter_matters(network, *inputs)
    rebuilt = UNet(**{key: value for key, value in network.config.items() if key != "arch"})
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(rebuilt(*inputs), network(*inputs))


def test_unet_channels_blocks_and_levels():
    with torch.device("meta"):
        network = UNet(base=64, blocks=3)

    def widths(levels):
        return [[block.conv1.out_channels for block in level] for level in levels]

    assert widths(network.encoders) == [[64] * 3, [128] * 3, [192] * 3]
    assert widths([network.middle]) == [[256] * 6]
    assert widths(network.decoders) == [[192] * 3, [128] * 3, [64] * 3]
    assert not [name for name, _ in network.named_modules() if "norm" in name or "attention" in name]


@pytest.mark.parametrize("shift", [(8, 0), (0, 8), (16, 8)])
def test_unet_is_fully_convolutional(shift):
    g = randomised(UNet(base=4, blocks=1), seed=1, std=0.2)
    x, d_t, gamma = noise(1, 3, 224, 224), noise(1, 3, 224, 224, seed=1), torch.tensor([0.5]).double()
    dy, dx = shift
    here, moved = g(x, d_t, gamma), g(x[..., dy:, dx:], d_t[..., dy:, dx:], gamma)
    inside = slice(96, 224 - 96 - 16)  # beyond the reach of the borders
    assert torch.allclose(here[..., dy:, dx:][..., inside, inside], moved[..., inside, inside], atol=1e-5)
    assert here[..., inside, inside].std() > 0.01


# The step controller


def plain_controller(x, p):
    """Sec. 3.2 in its own order: eight blocks, max-pooling after 2, 5, 6 and 8, residuals 2 -> 4 and 6 -> 8.
    """
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


@pytest.mark.parametrize("n, height, width", [(1, 8, 8), (2, 32, 32), (3, 40, 24), (5, 17, 65),
                                              (1, 128, 128)])
def test_controller_is_the_papers(n, height, width):
    s = randomised(StepController(4), seed=n, std=0.3)
    x = noise(n, 3, height, width, seed=n)
    logits = s(x)
    assert logits.shape == (n, 11)
    assert torch.allclose(logits, plain_controller(x, s.state_dict()), rtol=1e-4, atol=1e-4)
    assert torch.allclose(logits, torch.cat([s(one) for one in x.split(1)]), atol=1e-4)


def test_controller_layers_and_shapes():
    s, seen = StepController(4).eval(), []
    for block in s.blocks:
        assert [type(layer) for layer in block] == [torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU]
        assert block[0].kernel_size == (3, 3)
        block.register_forward_hook(
            lambda block, inputs, output: seen.append((number[block], *output.shape[1:])))
    number = {block: i for i, block in enumerate(s.blocks, 1)}
    s(noise(2, 3, 64, 64))
    shapes = [(4, 64), (8, 64), (8, 32), (8, 32), (16, 32), (32, 16), (32, 8), (32, 8)]
    assert seen == [(i, c, side, side) for i, (c, side) in enumerate(shapes, 1)]
    assert_every_parameter_matters(s, noise(2, 3, 64, 64))


def test_controller_size():
    with torch.device("meta"):
        s = StepController()
    assert s.config == {"c": 64} and number_of_parameters(s) / 1e6 == pytest.approx(6.57, abs=0.005)


def test_predict_steps():
    assert STEPS == (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    s = randomised(StepController(4), std=0.3)
    x = noise(40, 3, 16, 16) * torch.linspace(0.1, 5, 40).view(-1, 1, 1, 1)
    s.fc.bias.sub_(s(x).mean(0))  # or one class wins everywhere
    steps = s.predict_steps(x)
    assert steps.shape == (40,) and steps.dtype == torch.int64
    assert steps.tolist() == [10 * max(range(11), key=row.__getitem__) for row in s(x).softmax(1).tolist()]
    assert len(set(steps.tolist())) > 4
    for label in range(11):
        s.fc.bias.copy_(1e6 * F.one_hot(torch.tensor(label), 11))
        assert s.predict_steps(x[:3]).tolist() == [10 * label] * 3
