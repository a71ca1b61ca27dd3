"""Stage 2 (Sec. 3.1, Eqs. 1, 2 and 5): trains the generative network g, with r frozen; writes MODEL/gen.pt.

    python train_gen.py --data sidd --model runs/sidd
    python train_gen.py --data sample --preset small --iterations 300 --model runs/try
    python train_gen.py --data sidd --model runs/joint --scheme joint        (Table 1)
"""

import copy
import functools
import sys
from pathlib import Path

import numpy as np
import torch

from rng import ddpm, folder, metrics, tiling
from rng.finish import OFFSET, WARM_UP, finishing_loss, start_from
from rng.nafnet import NAFNet, reconstruction_loss
from rng.pipeline import RnG
from rng.support import crops, data, training
from rng.support.checkpoint import fingerprint, save_weights
from rng.support.device import autocast, mean, pick, replica
from rng.support.errors import InputError, Parser, number, script
from rng.unet import UNet, condition

PRESETS = {
    "paper": dict(base=64, multipliers=[1, 2, 3, 4], blocks=3, train_end=0.01, iterations=1_000_000,
                  batch=256, crop=128, lr=1e-4, cosine=False, weight_decay=1e-4, clip_grad=1.0, ema=0.9999),
    "small": dict(base=32, multipliers=[1, 2, 3, 4], blocks=1, train_end=0.006, iterations=10000, batch=16,
                  crop=64, lr=4e-4, cosine=True, weight_decay=1e-4, clip_grad=0.1, ema=0.999),
}
VALIDATION_STEPS = 100  # of the validation LPIPS: fewer leave grain that hides what g has learned
SCALE_BATCHES = 32      # on which the residual's standard deviation is measured


def parse(argv):
    parser = Parser(__doc__)
    presets = training.Presets(parser, PRESETS)
    group = parser.add_argument_group("network")
    presets.add(group, "--base", "g's channels at full resolution", type=number(int, 1))
    presets.add(group, "--multipliers", "of base, g's channels at each level", type=number(int, 1), nargs="+")
    presets.add(group, "--blocks", "g's residual blocks per level", type=number(int, 1))
    group.add_argument("--condition", choices=["noisy", "initial", "both"], default="noisy",
                       help="what g sees: x as in the paper (default), r(x) (Table 1), or both")
    group.add_argument("--init", type=Path, help="start from this gen.pt, whose sizes win")
    group = parser.add_argument_group("scheme and loss")
    presets.add(group, "--train-end", "end point of 1 - alpha in training, where t runs to 2000; 0.006 "
                "leaves out noise levels that 100 steps never meet", type=number(float, 1e-6, 0.99))
    group.add_argument("--scheme", choices=["two-stage", "joint", "intermediate"], default="two-stage",
                       help="two-stage (default): r is MODEL/recon.pt, frozen; joint: a new U-Net r learns "
                            "through Eq. 5 alone; intermediate: through Eqs. 4 and 5")
    group.add_argument("--target", choices=["residual", "clean"], default="residual",
                       help="clean: Table 4's generative part only, r is the constant 0.5")
    group.add_argument("--residual-scale", type=number(float, 1e-3),
                       help="g learns (y - r(x)) times this (default: 1 / std(y - r(x)), or that of --init; "
                            "the paper: 1)")
    group.add_argument("--finish", action="store_true",
                       help="in place of Eq. 5: LPIPS of what g makes, for a g that Eq. 5 has trained "
                            "(--init); it then sees x, r(x) and r's features, whatever --condition says, "
                            "and gives d_0; not in the paper")
    group.add_argument("--lpips-backbone",
                       help="file with AlexNet's convolutions, for LPIPS (default: fetched once)")
    data.add_arguments(parser)
    training.add_crop_arguments(parser, presets)
    training.add_optimiser_arguments(parser, presets)
    training.add_run_arguments(parser)
    args = presets.fill(parser.parse_args(argv))
    if args.base % 2:
        raise InputError("--base must be even: the noise level's embedding is half sines, half cosines")
    least = metrics.LPIPS_SIZE + (OFFSET - 1 if args.finish else 0)
    if args.crop < least:
        raise InputError(f"LPIPS needs a --crop of at least {least} pixels")
    if args.finish and (args.scheme, args.target) != ("two-stage", "residual"):
        raise InputError("--finish is for --scheme two-stage and --target residual: r must be trained")
    if args.finish and not args.init:
        raise InputError("--finish needs a g that Eq. 5 has trained: give --init FILE, its gen.pt")
    return args


@script
def main(argv=None):
    args = parse(argv)
    device = pick(args.device)
    torch.manual_seed(args.seed)
    r = None
    if args.scheme == "two-stage":
        r = folder.load_recon(args.model / "recon.pt").requires_grad_(False)
        r.to(device, memory_format=torch.channels_last)
    g, settings = make_g(args, r)
    g.to(device, memory_format=torch.channels_last).train()
    trained = {"gen": (g, copy.deepcopy(g).eval().requires_grad_(False))}
    parameters = list(g.parameters())
    if not r:
        r = untrained_recon(args, g).to(device, memory_format=torch.channels_last).train()
        trained["recon"] = r, copy.deepcopy(r).eval().requires_grad_(False)
        parameters += r.parameters()
    if args.compile:
        for network, _ in trained.values():
            network.compile()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = ddpm.linear_schedule(ddpm.T_TRAIN, args.train_end)
    stream = crops.Stream(args, functools.partial(draw_noise, schedule))
    held_out = stream.validation()
    lpips = metrics.load_lpips(args.lpips_backbone, device)
    if args.finish and not lpips:
        raise InputError("--finish needs LPIPS, and its backbone could not be had; give --lpips-backbone")
    told = {"recon": fingerprint(r) if args.scheme == "two-stage" else None}
    run = training.Run(args, "gen", trained, optimizer, told, stream.pictures)
    # A frozen r is not compiled in place: validate needs r as it is, for torch 2.13.0 compiles it to NaN for
    # single crops on a CPU with AMX.
    r_replica = replica(r, device) if "recon" in trained else torch.compile(r, disable=not args.compile)
    g_replica = replica(g, device)
    if settings.residual_scale is None:
        settings = settings._replace(residual_scale=measured_scale(args, run, r, stream))

    for k, batch in run.batches(stream):
        rate = training.half_cosine(k, args.iterations) if args.cosine else 1   # in the paper 1
        if args.finish:                                                # its last layer starts at zero
            rate *= min(1, (k + 1) / WARM_UP)
        optimizer.param_groups[0]["lr"] = args.lr * rate
        x, y, gamma, eps = batch["noisy"], batch["clean"], batch["gamma"], batch["eps"]
        with autocast(device, args.precision):
            of_r = reconstruct(args, r_replica, x)                     # (N, 3 or 3 + C, crop, crop)
            y_r = of_r[:, :3]
            cond = condition(settings.condition, x, y_r, of_r[:, 3:])
            d_0 = (y - y_r) * settings.residual_scale                  # unit variance; in the paper 1
            if args.finish:                                            # not in the paper
                loss = finishing_loss(g_replica, lpips, cond, y_r, y, settings.residual_scale,
                                      np.random.default_rng([args.seed, k]))
            else:
                loss = ddpm.loss(g_replica, cond, d_0, gamma, eps, p=1)   # Eq. 5
            if args.scheme == "intermediate":
                loss = loss + reconstruction_loss(y, y_r)              # Eq. 4
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad)
        run.check(loss, norm)
        optimizer.step()
        for network, averaged in trained.values():
            training.move_average(averaged, network, min(args.ema, (k + 1) / (k + 10)))
        if run.ended():
            model = RnG(trained.get("recon", (None, r))[1], trained["gen"][1], settings, device=args.device,
                        precision=args.precision)
            info = run.report({} if run.early else validate(model, held_out, lpips))
            publish(args, model, info)
            run.save()
    return 0


def make_g(args, r):
    """-> (g, GenSettings), untrained or as --init names it; a residual_scale of None is to be measured."""
    # an untrained r leaves no residual to measure
    scale = args.residual_scale or (None if args.scheme == "two-stage" else 1.0)
    settings = folder.GenSettings(args.condition, args.target, scale, args.train_end)
    if not args.init:
        conditions = 2 if args.condition == "both" else 1
        return UNet(args.base, args.multipliers, args.blocks, conditions), settings
    g, before = folder.load_gen(args.init)
    if args.finish:  # which draws no noise levels
        if before.condition == "initial":
            raise InputError(f"{args.init} has --condition initial; --finish needs a g that sees x")
        if not isinstance(r, NAFNet) or g.config["features"] not in (0, r.config["width"]):
            raise InputError("--finish needs a NAFNet for r, as wide as the one that g was finished with")
        g = start_from(g, r.config["width"])
        settings = settings._replace(condition="features", train_end=before.train_end)
    elif before.condition == "features":
        raise InputError(f"{args.init} has been finished; give --finish to finish it further")
    elif before.condition != args.condition:
        raise InputError(f"{args.init} has --condition {before.condition}; give that")
    return g, settings._replace(residual_scale=scale or before.residual_scale)


def untrained_recon(args, g):
    """Table 1's r for --scheme joint and intermediate: a U-Net of g's size."""
    if (args.model / "recon.pt").exists() and not (args.model / "last_gen.pt").exists():
        raise InputError(f"{args.model / 'recon.pt'} would be overwritten by --scheme {args.scheme}; "
                         "name another --model folder")
    return UNet(g.config["base"], g.config["multipliers"], g.config["blocks"], noise_level=False)


def draw_noise(schedule, generator, shape):
    """What Eq. 5 needs beside a crop of `shape`: the noise level gamma, and eps ~ N(0, I)."""
    gamma = torch.tensor(ddpm.draw_gamma(schedule, generator), dtype=torch.float64)
    return {"gamma": gamma, "eps": torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))}


def reconstruct(args, r, x):
    """For noisy crops (N, 3, H, W): r(x), or the constant of --target clean; --finish: r's features too."""
    if args.target == "clean":
        return torch.full_like(x, 0.5)
    return (r(x, features=True) if args.finish else r(x)).float()


def measured_scale(args, run, r, stream):
    """1 / std(y - r(x)) over training crops, for data of about unit variance."""
    if run.iteration > 0:
        return folder.load_gen(args.model / "gen.pt")[1].residual_scale
    count, total, squares = 0, 0.0, 0.0
    with torch.no_grad(), autocast(run.device, args.precision):
        for batch in stream(0, SCALE_BATCHES):
            y_r = reconstruct(args, r, batch["noisy"].to(run.device))[:, :3].cpu()
            residual = (batch["clean"] - y_r).double()
            count, total, squares = (count + residual.numel(), total + residual.sum().item(),
                                     squares + residual.square().sum().item())
    average, square = mean([total / count, squares / count], run.device)
    return (square - average ** 2) ** -0.5


def validate(model, held_out, lpips):
    """PSNR and LPIPS of RnG after 100 steps and of r alone, and the strength of d_0."""
    x, y = held_out["noisy"].to(model.device), held_out["clean"].to(model.device)
    noise = tiling.NoiseField([(0, 0, 2 * n) for n in range(len(x))], *x.shape[2:], model.device)
    y_r = model.reconstruct(x)
    d_0 = model.generate(x, y_r, VALIDATION_STEPS, noise)
    scores = {"generated_std": d_0.std().item(), "residual_std": (y - y_r).std().item()}
    for name, y_hat in (("", y_r + d_0), ("_recon", y_r)):
        y_hat = y_hat.clamp(0, 1)
        scores[f"psnr{name}"] = metrics.psnr(y_hat, y).mean().item()
        if lpips:
            with torch.no_grad():
                scores[f"lpips{name}"] = lpips(y_hat, y).mean().item()
    return scores


def publish(args, model, info):
    """Writes gen.pt, and recon.pt where r was trained too."""
    settings = model.settings._replace(recon=fingerprint(model.recon))
    config = {"unet": model.gen.config, **settings._asdict()}
    save_weights(args.model / "gen.pt", "gen", config, model.gen, info)
    if args.scheme != "two-stage":
        save_weights(args.model / "recon.pt", "recon", model.recon.config, model.recon, info)


if __name__ == "__main__":
    sys.exit(main())
