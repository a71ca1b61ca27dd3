"""A model folder: recon.pt (r), gen.pt (g), controller.pt (s), schedule.json, and whether they match."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from rng import ddpm
from rng.controller import StepController
from rng.nafnet import NAFNet, config_from_state_dict
from rng.support.checkpoint import fingerprint, load, load_weights, rebuild
from rng.support.errors import InputError, reading, write_text
from rng.unet import UNet, condition

WEIGHTS = Path(__file__).parent / "weights"


class GenSettings(NamedTuple):
    """How g was trained, kept beside its weights."""

    condition: str = "noisy"       # what g sees, see unet.condition
    target: str = "residual"       # of "clean" (Table 4) r is the constant 0.5
    residual_scale: float = 1.0    # d_0 = (y - r(x)) * residual_scale
    train_end: float = 0.01        # end point of 1 - alpha in training
    recon: str | None = None       # fingerprint of its r; None: not known


class Schedules(NamedTuple):
    """What Sec. 3.1's grid search found for each step count T that it tried, with defaults for the others."""

    ends: dict = {}                # {T: end point of 1 - alpha}, else ddpm.default_end
    variance: str = "paper"        # of Eq. 3's noise, see ddpm.linear_schedule

    def of(self, T):
        """The ddpm.Schedule of T steps."""
        return ddpm.linear_schedule(T, self.ends.get(T, ddpm.default_end(T)), self.variance)


def find(name_or_folder):
    """The model folder, or that of a model that ships in rng/weights; a path that exists wins."""
    for folder in (Path(name_or_folder), WEIGHTS / name_or_folder):
        if os.path.isdir(folder):  # False for a name that is too long, where Path's raises an error
            return folder
    raise InputError(f"there is no model {name_or_folder}; name a folder with recon.pt in it, or the default")


def own(folder):
    """The model folder as a Path, to write to; InputError where there is none, as for a model that ships."""
    if not os.path.isdir(folder):
        raise InputError(f"there is no model {folder}; name its folder, or a copy of a model that ships")
    return Path(folder)


def load_recon(path):
    """r from recon.pt or an official NAFNet checkpoint {"params": state_dict}, with or without `module.`."""
    content, x = load(path), torch.zeros(1, 3, 16, 16)
    if isinstance(content, dict) and isinstance(content.get("params"), dict):
        with reading(f"{path} has no NAFNet in it; name a NAFNet checkpoint"):
            state_dict = {name.removeprefix("module."): tensor for name, tensor in content["params"].items()}
            config = config_from_state_dict(state_dict)
        return rebuild(path, NAFNet, config, state_dict, x)
    content = load_weights(path, "recon")
    config = {key: value for key, value in content["config"].items() if key != "arch"}
    make = UNet if content["config"].get("arch") == "unet" else NAFNet
    return rebuild(path, make, config, content["state_dict"], x)


def load_gen(path):
    """g from gen.pt -> (UNet, GenSettings)."""
    content = load_weights(path, "gen")
    with reading(f"{path} does not hold the network it should; fetch or train it again"):
        config = dict(content["config"])
        unet = config.pop("unet")
        settings = GenSettings(**config)
        if not (settings.condition in ("noisy", "initial", "both", "features")
                and settings.target in ("residual", "clean") and settings.residual_scale is not True
                and 0 < settings.residual_scale <= torch.finfo(torch.float32).max
                and ddpm.BETA_1 <= settings.train_end < 1 and isinstance(settings.recon, str | None)):
            raise ValueError("impossible settings")
        unet = {key: value for key, value in unet.items() if key != "arch"} | {"noise_level": True}
        image, features = torch.zeros(1, 3, 16, 16), torch.zeros(1, unet.get("features", 0), 16, 16)
        x = condition(settings.condition, image, image, features)
    d_t, gamma = torch.zeros(1, 3, 16, 16), torch.tensor([0.5], dtype=torch.float64)
    return rebuild(path, UNet, unet, content["state_dict"], x, d_t, gamma), settings


def load_controller(path):
    """s from controller.pt -> (StepController, `made_with` of its labels or None where that is not known)."""
    content = load_weights(path, "controller")
    config = dict(content["config"])
    made_with = config.pop("made_with", None)
    return rebuild(path, StepController, config, content["state_dict"], torch.zeros(1, 3, 16, 16)), made_with


def read_schedule(folder):
    """schedule.json as it is, None without one; InputError if it is not JSON."""
    path = folder / "schedule.json"
    with reading(f"{path} is damaged; remove it and run evaluate.py --search-schedule again"):
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def load_schedules(folder, gen):
    """The Schedules in schedule.json, else defaults; InputError unless made for the g of fingerprint gen."""
    content, path = read_schedule(folder), folder / "schedule.json"
    if content is None and not path.exists():
        return Schedules()
    with reading(f"{path} is damaged; remove it and run evaluate.py --search-schedule again"):
        found = Schedules({int(T): float(end) for T, end in content["end"].items()},
                          content.get("variance", "paper"))
        searched_with = content.get("gen", gen)
        if content.keys() - {"gen", "variance", "end"} or found.variance not in ddpm.VARIANCES:
            raise ValueError("impossible settings")
        for T in found.ends:
            found.of(T)  # refuses end points that cannot be
    if searched_with != gen:
        raise InputError(f"{path} was searched with another gen.pt; run evaluate.py --search-schedule again")
    return found


def save_schedules(folder, found, gen):
    """Writes schedule.json, readable by eye: Schedules and the fingerprint of the g that they are for."""
    content = {"gen": gen, "variance": found.variance, "end": found.ends}
    write_text(folder / "schedule.json", json.dumps(content, indent=1) + "\n")


def made_with(folder):
    """The fingerprints that labels and s depend on: {"gen": g's, "schedule": schedule.json's or None}."""
    schedule = read_schedule(folder)
    return {"gen": fingerprint(load_gen(folder / "gen.pt")[0]),
            "schedule": None if schedule is None else fingerprint(schedule)}


def load_model(folder, schedule=True):
    """The networks of a folder -> (r, g or None, GenSettings or None, s or None, Schedules).

    Only recon.pt must be there. schedule=False does not read schedule.json. InputError if they do not match.
    """
    recon = load_recon(folder / "recon.pt")
    gen = settings = controller = None
    if (folder / "gen.pt").exists():
        gen, settings = load_gen(folder / "gen.pt")
        seen = settings.condition == "features" and recon.config.get("width") != gen.config["features"]
        if seen or settings.recon not in (None, fingerprint(recon)):
            raise InputError(f"{folder / 'gen.pt'} was trained with another recon.pt; bring back that one, "
                             "or train g again")
    schedules = load_schedules(folder, gen and fingerprint(gen)) if schedule else Schedules()
    if (folder / "controller.pt").exists():
        controller, labelled_with = load_controller(folder / "controller.pt")
        if gen and schedule and labelled_with not in (None, made_with(folder)):
            raise InputError(f"{folder / 'controller.pt'} was trained for another gen.pt or schedule.json; "
                             "bring those back, or remove it and train s again")
    return recon, gen, settings, controller, schedules
