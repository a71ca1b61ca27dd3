"""Weight files: {"kind", "config", "state_dict", "info"}, tensors and plain types only, written atomically."""

import hashlib
import zipfile
from pathlib import Path

import torch

from rng import ddpm
from rng.controller import StepController
from rng.errors import InputError
from rng.files import replacing
from rng.nafnet import NAFNet, config_from_state_dict
from rng.unet import UNet


def save_atomic(path, content):
    """torch.save beside the target, then a rename: a reader finds the old file or the new one, never half of one."""
    try:
        with replacing(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} could not be written ({error}); make space or name another --model folder") from error


def load(path):
    """torch.load with weights_only=True (no code in the file can run); raises InputError with one sentence."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; train it first (README, Train) or name another file or folder")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if file.testzip():  # torch.load does not look at the checksums: a flipped bit would be another weight
                    raise ValueError("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"{path} is damaged or not a weight file of this project; fetch or train it again") from error


def _as_stored(network):
    """The state dict in float16, but batch normalisation's statistics in float32."""
    return {name: tensor.half() if tensor.is_floating_point() and "running_" not in name else tensor.clone()
            for name, tensor in network.state_dict().items()}


def fingerprint(network):
    """Hash of a network's weights as its file holds them, 16 hexadecimal digits: says what was made with which r or g."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_as_stored(network).items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_weights(path, kind, config, network, info):
    """Writes one network, kind: recon, gen or controller."""
    save_atomic(path, {"kind": kind, "config": config, "state_dict": _as_stored(network), "info": info})


def load_weights(path, kind):
    """Reads a weight file; a wrong kind or a damaged file raises InputError. Returns the dictionary."""
    content = load(path)
    fields = {"kind": str, "config": dict, "state_dict": dict, "info": dict}
    if not isinstance(content, dict) or not all(isinstance(content.get(field), fields[field]) for field in fields):
        raise InputError(f"{path} is not a weight file of this project; fetch or train it again")
    if content["kind"] != kind:
        raise InputError(f"{path} holds a network of kind {content['kind']!r}, not {kind!r}; name another file")
    return content


def _rebuild(path, make, config, state_dict, *trial):
    """make(**config) with its parameters from state_dict, in eval mode; InputError unless it runs on the inputs `trial`."""
    try:
        with torch.device("meta"):  # takes no memory, so that wrong sizes in config do not either
            shapes = {name: tensor.shape for name, tensor in make(**config).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in state_dict.items()}:
            raise ValueError("other shapes")
        network = make(**config)
        network.load_state_dict(state_dict)
        with torch.no_grad():
            out = network.eval()(*trial)
    except Exception as error:  # a damaged file fails in many ways
        raise InputError(f"{path} does not hold the network it should; fetch or train it again") from error
    if not all(tensor.isfinite().all() for tensor in (*network.state_dict().values(), out)):
        raise InputError(f"{path} has weights that are not finite; fetch or train it again")
    return network


def load_recon(path):
    """r from recon.pt, or from an official NAFNet checkpoint {"params": state_dict}, with or without `module.`."""
    content, x = load(path), torch.zeros(1, 3, 16, 16)
    if isinstance(content, dict) and isinstance(content.get("params"), dict):
        try:
            state_dict = {name.removeprefix("module."): tensor for name, tensor in content["params"].items()}
            config = config_from_state_dict(state_dict)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path} has no NAFNet in it; name a NAFNet checkpoint") from error
        return _rebuild(path, NAFNet, config, state_dict, x)
    content = load_weights(path, "recon")
    config = {key: value for key, value in content["config"].items() if key != "arch"}
    make = UNet if content["config"].get("arch") == "unet" else NAFNet
    return _rebuild(path, make, config, content["state_dict"], x)


def load_gen(path):
    """g from gen.pt -> (UNet, settings): condition, target, residual_scale, train_end and recon, its r's fingerprint."""
    content = load_weights(path, "gen")
    settings = {"recon": None, "train_end": 0.01} | content["config"]
    unet = settings.pop("unet", None)
    if not isinstance(unet, dict) or not _possible(settings):
        raise InputError(f"{path} does not hold the network it should; fetch or train it again")
    config = {key: value for key, value in unet.items() if key != "arch"} | {"noise_level": True}
    x = torch.zeros(1, 6 if settings["condition"] == "both" else 3, 16, 16)
    d_t, gamma = torch.zeros(1, 3, 16, 16), torch.tensor([0.5], dtype=torch.float64)
    return _rebuild(path, UNet, config, content["state_dict"], x, d_t, gamma), settings


def _possible(settings):
    """Whether these are settings of g, as train_gen.py writes them."""
    if settings.keys() != {"condition", "target", "residual_scale", "recon", "train_end"}:
        return False
    scale, end = settings["residual_scale"], settings["train_end"]
    return (settings["condition"] in ("noisy", "initial", "both") and settings["target"] in ("residual", "clean")
            and type(scale) in (int, float) and 0 < scale <= torch.finfo(torch.float32).max
            and type(end) in (int, float) and ddpm.BETA_1 <= end < 1
            and isinstance(settings["recon"], str | None))


def load_controller(path):
    """s from controller.pt -> (StepController, what its labels were made with, as `made_with` returns it; None: not known)."""
    content = load_weights(path, "controller")
    config = dict(content["config"])
    made_with = config.pop("made_with", None)
    return _rebuild(path, StepController, config, content["state_dict"], torch.zeros(1, 3, 16, 16)), made_with


def made_with(folder):
    """What labels and s depend on: {"gen": fingerprint of g, "schedule": hash of schedule.json, None without one}."""
    path = folder / "schedule.json"
    return {"gen": fingerprint(load_gen(folder / "gen.pt")[0]),
            "schedule": hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None}
