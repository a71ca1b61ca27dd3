"""Stage 1 (Sec. 3.3, Eq. 4): trains the reconstructive network r; writes MODEL/recon.pt.

    python train_recon.py --data sidd --model runs/sidd
    python train_recon.py --data div2k --model runs/div2k
    python train_recon.py --data sample --preset small --iterations 300 --model runs/try
"""

import copy
import functools
import sys
from pathlib import Path

import torch

from rng import folder, metrics
from rng.nafnet import NAFNet, reconstruction_loss
from rng.support import crops, data, training
from rng.support.checkpoint import save_weights
from rng.support.device import autocast, pick, replica
from rng.support.errors import InputError, Parser, number, script
from rng.support.noise import KINDS, wide_mix
from rng.unet import UNet

PRESETS = {
    "paper": dict(width=64, enc=[2, 2, 4, 8], middle=12, dec=[2, 2, 2, 2], base=64, blocks=3, loss="mse",
                  iterations=1_000_000, batch=256, crop=128, lr=1e-4, cosine=False, weight_decay=1e-4,
                  clip_grad=1.0, ema=0.9999),
    "small": dict(width=24, enc=[1, 1, 2, 2], middle=2, dec=[1, 1, 1, 1], base=32, blocks=1, loss="psnr",
                  iterations=6000, batch=16, crop=80, lr=2e-3, cosine=True, weight_decay=1e-4,
                  clip_grad=0.5, ema=0.999),
}


def parse(argv):
    parser = Parser(__doc__)
    presets = training.Presets(parser, PRESETS)
    group = parser.add_argument_group("network and loss")
    group.add_argument("--arch", choices=["nafnet", "unet"], default="nafnet", help="unet: Table 1's other r")
    presets.add(group, "--width", "NAFNet's channels at full resolution", type=number(int, 1))
    presets.add(group, "--enc", "NAFNet's encoder blocks per level", type=number(int, 0), nargs="+")
    presets.add(group, "--middle", "NAFNet's middle blocks", type=number(int, 0))
    presets.add(group, "--dec", "NAFNet's decoder blocks per level", type=number(int, 0), nargs="+")
    presets.add(group, "--base", "the U-Net's channels at full resolution", type=number(int, 1))
    presets.add(group, "--blocks", "the U-Net's residual blocks per level", type=number(int, 1))
    presets.add(group, "--loss", "mse: Eq. 4 with p = 2, psnr: NAFNet's own", choices=["mse", "psnr"])
    group.add_argument("--perceptual-weight", type=number(float, 0), default=0.0,
                       help="so many times LPIPS is added: Table 2's perceptual loss (default: 0)")
    group.add_argument("--lpips-backbone",
                       help="file with AlexNet's convolutions, for LPIPS (default: fetched once)")
    group.add_argument("--init", type=Path,
                       help="start from this recon.pt or official NAFNet checkpoint, whose sizes win")
    data.add_arguments(parser)
    training.add_crop_arguments(parser, presets)
    training.add_optimiser_arguments(parser, presets)
    training.add_run_arguments(parser)
    args = presets.fill(parser.parse_args(argv))
    if args.perceptual_weight and args.crop < metrics.LPIPS_SIZE:
        raise InputError(f"LPIPS needs a --crop of at least {metrics.LPIPS_SIZE} pixels")
    if len(args.enc) != len(args.dec):
        raise InputError("--enc and --dec need one number for each level, equally many")
    if (args.model / "gen.pt").exists() and not (args.model / "last_recon.pt").exists():
        raise InputError(f"{args.model} holds a gen.pt whose recon.pt would be overwritten; name another "
                         "--model folder")
    return args


@script
def main(argv=None):
    args = parse(argv)
    device = pick(args.device)
    torch.manual_seed(args.seed)
    r = make_r(args).to(device, memory_format=torch.channels_last).train()
    averaged = copy.deepcopy(r).eval().requires_grad_(False)
    if args.compile:
        r.compile()
    optimizer = torch.optim.AdamW(r.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    stream = crops.Stream(args)
    held_out = {"": stream.validation()}
    if args.noise == "wide":
        held_out |= {f"_{kind}": stream.validation(functools.partial(wide_mix, kind=kind)) for kind in KINDS}
    lpips = metrics.LPIPS(args.lpips_backbone).to(device) if args.perceptual_weight else None
    run = training.Run(args, "recon", {"recon": (r, averaged)}, optimizer, {}, stream.pictures)
    r_replica = replica(r, device)                                     # r itself, or its share under torchrun

    for k, batch in run.batches(stream):
        if args.cosine:                                                # in the paper the rate is constant
            optimizer.param_groups[0]["lr"] = args.lr * training.half_cosine(k, args.iterations)
        x, y = batch["noisy"], batch["clean"]                          # (N, 3, crop, crop)
        with autocast(device, args.precision):
            y_r = r_replica(x)                                         # (N, 3, crop, crop)
        loss = reconstruction_loss(y, y_r, args.loss)                  # Eq. 4
        if lpips:
            loss = loss + args.perceptual_weight * lpips(y_r.float().nan_to_num().clamp(0, 1), y).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(r.parameters(), args.clip_grad)
        run.check(loss, norm)
        optimizer.step()
        training.move_average(averaged, r, min(args.ema, (k + 1) / (k + 10)))
        if run.ended():
            info = run.report({} if run.early else validate(args, averaged, held_out))
            save_weights(args.model / "recon.pt", "recon", r.config, averaged, info)
            run.save()
    return 0


def make_r(args):
    """r, untrained or as --init names it."""
    if args.init:
        return folder.load_recon(args.init)
    if args.arch == "nafnet":
        return NAFNet(args.width, args.enc, args.middle, args.dec)
    return UNet(args.base, blocks=args.blocks, noise_level=False)


@torch.no_grad()
def validate(args, r, held_out):
    """PSNR of r(x) on the validation crops, up to 80 dB each; with --noise wide for each kind too."""
    device, scores = pick(args.device), {}
    for kind, crops_of_kind in held_out.items():
        with autocast(device, args.precision):
            y_r = r(crops_of_kind["noisy"].to(device)).float().clamp(0, 1).cpu()
        scores[f"psnr{kind}"] = metrics.psnr(y_r, crops_of_kind["clean"]).clamp(max=80).mean().item()
    return scores


if __name__ == "__main__":
    sys.exit(main())
