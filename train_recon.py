"""Stage 1 (Sec. 3.3, Eq. 4): trains the reconstructive network r; writes MODEL/recon.pt.

    python train_recon.py --data sidd --model runs/sidd
    python train_recon.py --data div2k --model runs/div2k
    python train_recon.py --data sample --preset small --iterations 300 --model runs/try
"""

import argparse
import sys
from pathlib import Path

import torch

from rng import checkpoint, crops, device, metrics, training
from rng.errors import InputError, number, script
from rng.nafnet import NAFNet
from rng.unet import UNet

PRESETS = {
    "paper": dict(width=64, enc=[2, 2, 4, 8], middle=12, dec=[2, 2, 2, 2], base=64, blocks=3, loss="mse",
                  iterations=1_000_000, batch=256, crop=128, lr=1e-4, cosine=False, weight_decay=1e-4,
                  clip_grad=1.0, ema=0.9999),
    "small": dict(width=24, enc=[1, 1, 2, 2], middle=2, dec=[1, 1, 1, 1], base=32, blocks=1, loss="psnr",
                  iterations=6000, batch=16, crop=80, lr=2e-3, cosine=True, weight_decay=1e-4,
                  clip_grad=0.5, ema=0.999),
}


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=["nafnet", "unet"], default="nafnet", help="unet: Table 1's other r")
    parser.add_argument("--width", type=number(int, 1), help="* NAFNet's channels at full resolution")
    parser.add_argument("--enc", type=number(int, 0), nargs="+", help="* NAFNet's encoder blocks per level")
    parser.add_argument("--middle", type=number(int, 0), help="* NAFNet's middle blocks")
    parser.add_argument("--dec", type=number(int, 0), nargs="+", help="* NAFNet's decoder blocks per level")
    parser.add_argument("--base", type=number(int, 1), help="* the U-Net's channels at full resolution")
    parser.add_argument("--blocks", type=number(int, 1), help="* the U-Net's residual blocks per level")
    parser.add_argument("--loss", choices=["mse", "psnr"], help="* mse: Eq. 4 with p = 2; psnr: NAFNet's own")
    parser.add_argument("--perceptual-weight", type=number(float, 0), default=0.0,
                        help="so many times LPIPS is added to the loss: Table 2's NAFNet with perceptual loss (default: 0)")
    parser.add_argument("--lpips-backbone", help="AlexNet weights for it")
    parser.add_argument("--init", type=Path,
                        help="start from this recon.pt or official NAFNet checkpoint, whose sizes win")
    training.add_crop_arguments(parser)
    args = training.parse(parser, PRESETS, argv)

    if args.perceptual_weight and args.crop < metrics.LPIPS_SIZE:
        raise InputError(f"LPIPS needs a --crop of at least {metrics.LPIPS_SIZE} pixels")
    torch.manual_seed(args.seed)
    if args.init:
        r = checkpoint.load_recon(args.init)
    elif args.arch == "nafnet":
        if len(args.enc) != len(args.dec):
            raise InputError("--enc and --dec need one number for each level, equally many")
        r = NAFNet(args.width, args.enc, args.middle, args.dec)
    else:
        r = UNet(args.base, blocks=args.blocks, noise_level=False)

    stream, held_out = crops.training_stream(args)

    def validate(networks):
        estimate = networks["recon"](held_out["noisy"].to(run.device)).float().clamp(0, 1).cpu()
        return {"psnr": metrics.psnr(estimate, held_out["clean"]).mean().item()}

    def publish(networks, info):
        checkpoint.save_weights(args.model / "recon.pt", "recon", r.config, networks["recon"], info)

    lpips = metrics.LPIPS(args.lpips_backbone).to(device.pick(args.device)) if args.perceptual_weight else None
    run = training.Run(args, "recon", {"recon": r}, stream, validate, publish)
    for batch in run.batches():
        with run.autocast():
            estimate = run.replicas["recon"](batch["noisy"])                        # (N, 3, crop, crop)
        loss = training.reconstruction_loss(batch["clean"], estimate, args.loss)    # Eq. 4
        if lpips:  # which refuses nan; Eq. 4 keeps it, so that it is reported with its pictures
            loss = loss + args.perceptual_weight * lpips(estimate.float().nan_to_num().clamp(0, 1), batch["clean"]).mean()
        run.step(loss)
    return 0


if __name__ == "__main__":
    sys.exit(main())
