"""Stage 2 (Sec. 3.1, Eqs. 1, 2 and 5): trains the generative network g, with r frozen; writes MODEL/gen.pt.

    python train_gen.py --data sidd --model runs/sidd
    python train_gen.py --data sample --preset small --iterations 300 --model runs/try
    python train_gen.py --data sidd --model runs/joint --scheme joint        (Table 1)
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from rng import checkpoint, crops, ddpm, device, distributed, metrics, training
from rng.errors import InputError, number, script
from rng.pipeline import RnG, condition
from rng.unet import UNet

PRESETS = {
    "paper": dict(base=64, multipliers=[1, 2, 3, 4], blocks=3, train_end=0.01, iterations=1_000_000, batch=256,
                  crop=128, lr=1e-4, cosine=False, weight_decay=1e-4, clip_grad=1.0, ema=0.9999),
    "small": dict(base=32, multipliers=[1, 2, 3, 4], blocks=1, train_end=0.006, iterations=10000, batch=16,
                  crop=64, lr=4e-4, cosine=True, weight_decay=1e-4, clip_grad=0.1, ema=0.999),
}
VALIDATION_STEPS = 100  # inverse steps of the validation LPIPS: fewer leave grain that hides what g has learned
OWN_GAMMA = 0.02        # noise level of --own-estimate: next to pure noise, but the estimate is not yet mostly amplified error
LPIPS_STRIDE = 4        # pixels between the places at which AlexNet looks
SCALE_BATCHES = 32      # on which the residual's standard deviation is measured


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=number(int, 1), help="* g's channels at full resolution")
    parser.add_argument("--multipliers", type=number(int, 1), nargs="+", help="* of base, g's channels at each level")
    parser.add_argument("--blocks", type=number(int, 1), help="* g's residual blocks per level")
    parser.add_argument("--train-end", type=number(float, 1e-6, 0.99),
                        help="* end point of 1 - alpha in training, where t runs to 2000; 0.006 leaves out noise levels "
                             "that 100 steps never meet")
    parser.add_argument("--scheme", choices=["two-stage", "joint", "intermediate"], default="two-stage",
                        help="two-stage: r is MODEL/recon.pt, frozen; joint: a new U-Net r learns through Eq. 5 alone; "
                             "intermediate: through Eqs. 4 and 5")
    parser.add_argument("--condition", choices=["noisy", "initial", "both"], default="noisy",
                        help="what g sees: x as in the paper, r(x) (Table 1), or both (not in the paper)")
    parser.add_argument("--target", choices=["residual", "clean"], default="residual",
                        help="clean: Table 4's generative part only, r is the constant 0.5")
    parser.add_argument("--residual-scale", type=number(float, 1e-3),
                        help="g learns (y - r(x)) times this; default 1 / std(y - r(x)); 1 is the paper's letter")
    parser.add_argument("--perceptual-weight", type=number(float, 0), default=0.0,
                        help="so many times LPIPS between y and r(x) + g's estimate of d_0 is added to Eq. 5; "
                             "not in the paper (default: 0)")
    parser.add_argument("--own-estimate", action="store_true",
                        help="in every second sample (of each process) d_0 is g's own estimate from pure noise, as in sampling, "
                             "where g goes on from what it made itself, and Eq. 5 alone teaches it to keep that; with "
                             "--perceptual-weight, which then sees the other samples; not in the paper")
    parser.add_argument("--init", type=Path, help="start from this gen.pt, whose sizes win")
    parser.add_argument("--lpips-backbone", help="AlexNet weights for LPIPS")
    training.add_crop_arguments(parser)
    args = training.parse(parser, PRESETS, argv)

    if args.base % 2:
        raise InputError("--base must be even: the noise level's embedding is half sines, half cosines")
    torch.manual_seed(args.seed)
    conditions = 2 if args.condition == "both" else 1
    if args.init:
        g = checkpoint.load_gen(args.init)[0]
        if g.config["conditions"] != conditions:
            raise InputError(f"{args.init} has another --condition; give the one it was trained with")
    else:
        g = UNet(args.base, args.multipliers, args.blocks, conditions)
    if args.scheme == "two-stage":
        r = checkpoint.load_recon(args.model / "recon.pt").requires_grad_(False)
        networks = {"gen": g}
        args.recon = checkpoint.fingerprint(r)  # a setting, so that a training does not go on with another r
        if args.compile:
            r.compile()
    else:
        if (args.model / "recon.pt").exists() and not (args.model / "gen.pt").exists():
            raise InputError(f"{args.model / 'recon.pt'} would be overwritten by --scheme {args.scheme}; name another --model folder")
        r = UNet(args.base, args.multipliers, args.blocks, noise_level=False)
        networks = {"gen": g, "recon": r}
    r = r.to(device.pick(args.device), memory_format=torch.channels_last)
    stream, held_out = crops.training_stream(args, ddpm.linear_schedule(ddpm.T_TRAIN, args.train_end))
    settings = {"condition": args.condition, "target": args.target, "residual_scale": args.residual_scale,
                "train_end": args.train_end}
    lpips = metrics.load_lpips(args.lpips_backbone, "cpu")
    least = metrics.LPIPS_SIZE + (LPIPS_STRIDE - 1 if args.perceptual_weight else 0)
    if lpips and args.crop < least:
        raise InputError(f"LPIPS needs a --crop of at least {least} pixels")
    true = slice(1, None, 2) if args.own_estimate else slice(None)  # samples whose d_0 is that of the data
    perceptual = metrics.LPIPS(args.lpips_backbone).to(device.pick(args.device)) if args.perceptual_weight else None

    def estimate(x):
        """r(x), or the constant of --target clean, for noisy crops (N, 3, H, W)."""
        return torch.full_like(x, 0.5) if args.target == "clean" else reconstruct(x).float()

    def validate(networks):
        model = RnG(networks.get("recon", r), networks["gen"], settings,
                    device_name=args.device, precision=args.precision)
        x = held_out["noisy"].to(run.device)
        y_r = model.reconstruct(x)
        d_0 = model.generate(x, y_r, [VALIDATION_STEPS] * len(x), fixed_noise(x))
        scores = {"generated_std": d_0.std().item(), "residual_std": (held_out["clean"] - y_r.cpu()).std().item()}
        for name, y in (("", y_r + d_0), ("_recon", y_r)):
            y = y.clamp(0, 1).cpu()
            scores[f"psnr{name}"] = metrics.psnr(y, held_out["clean"]).mean().item()
            if lpips:
                scores[f"lpips{name}"] = lpips(y, held_out["clean"]).mean().item()
        return scores

    def publish(networks, info):
        config = {"unet": g.config, **settings, "recon": checkpoint.fingerprint(networks.get("recon", r))}
        checkpoint.save_weights(args.model / "gen.pt", "gen", config, networks["gen"], info)
        if "recon" in networks:
            checkpoint.save_weights(args.model / "recon.pt", "recon", r.config, networks["recon"], info)

    run = training.Run(args, "gen", networks, stream, validate, publish)
    reconstruct = run.replicas.get("recon", r)
    if args.residual_scale is None:
        settings["residual_scale"] = measured_scale(args, run, estimate)
    for batch in run.batches():
        x, y = batch["noisy"], batch["clean"]
        with run.autocast():
            y_r = estimate(x)                                                        # (N, 3, crop, crop)
            d_0 = (y - y_r) * settings["residual_scale"]
            cond = condition(args.condition, x, y_r)
            if args.own_estimate:
                d_0[::2] = own_estimate(run.replicas["gen"], cond[::2], batch["eps"].roll(1, 0)[::2])

            def further(d_0_hat):
                """--perceptual-weight: LPIPS of a window placed at random, so that g learns no pattern of AlexNet's grid."""
                top, left = np.random.default_rng([args.seed, run.iteration]).integers(LPIPS_STRIDE, size=2)
                y_hat = (y_r + d_0_hat / settings["residual_scale"]).nan_to_num().clamp(0, 1)  # LPIPS refuses nan, Eq. 5 reports it
                return args.perceptual_weight * perceptual(y_hat[true, :, top:, left:], y[true, :, top:, left:]).mean()

            loss = ddpm.loss(run.replicas["gen"], cond, d_0, batch["gamma"], batch["eps"], p=1,
                             further=further if perceptual else None)                # Eq. 5
            if args.scheme == "intermediate":
                loss = loss + training.reconstruction_loss(y, y_r)                   # Eq. 4
        run.step(loss)
    return 0


def measured_scale(args, run, estimate):
    """1 / std(y - r(x)) over training crops, so that g's data has about unit variance; read back on resume."""
    if args.scheme != "two-stage":
        return 1.0  # r is untrained: there is no residual to measure yet
    if run.iteration > 0:
        return checkpoint.load_gen(args.model / "gen.pt")[1]["residual_scale"]
    with torch.no_grad(), run.autocast():
        residuals = [batch["clean"] - estimate(batch["noisy"].to(run.device)).cpu()
                     for batch in run.stream(0, SCALE_BATCHES)]
    residuals = torch.cat(residuals).double()
    mean, square = distributed.mean([residuals.mean().item(), residuals.square().mean().item()], run.device)
    return (square - mean ** 2) ** -0.5


def own_estimate(g, cond, eps):
    """What g makes of pure noise eps (N, 3, H, W) in one step, for conditions cond (N, C, H, W): d_0, (N, 3, H, W)."""
    gamma = torch.full((len(eps),), OWN_GAMMA, dtype=torch.float64, device=eps.device)
    with torch.no_grad():
        return ddpm.estimate(eps, g(cond, eps, gamma).float(), gamma)


def fixed_noise(x):
    """Noise for ddpm.sample that is the same at every validation: a function of (key, patch)."""
    def noise(key, index):
        generators = [torch.Generator().manual_seed(1000 * key + i) for i in index]
        return torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators]).to(x.device)
    return noise


if __name__ == "__main__":
    sys.exit(main())
