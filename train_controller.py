"""Trains the step controller s (Sec. 3.2) on MODEL/step_labels.jsonl; writes MODEL/controller.pt.

    python train_controller.py --data sidd --model runs/sidd
    python train_controller.py --data sample --preset small --model runs/try

--data and --root name the pictures that build_step_labels.py was given.
"""

import argparse
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F

from rng import checkpoint, data, labels, training
from rng.controller import STEPS, StepController
from rng.errors import InputError, number, script

# iterations: 30 epochs of 20,000 patches; 60 of 1,000, and an EMA that so short a training can follow
PRESETS = {
    "paper": dict(c=64, iterations=9400, batch=64, lr=1e-4, cosine=False, weight_decay=1e-4, clip_grad=1.0, ema=0.999),
    "small": dict(c=16, iterations=1000, batch=64, lr=1e-3, cosine=True, weight_decay=1e-2, clip_grad=1.0, ema=0.99),
}


@script
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=data.NAMES, default=["sidd"], help="data sets of the labels")
    parser.add_argument("--root", nargs="+", help="folder of each data set (default: datasets/NAME)")
    parser.add_argument("--c", type=number(int, 1), help="* channels of s's first block")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0,
                        help="0: cross-entropy with the best step, as in the paper (default); above 0: with "
                             "softmax(-LPIPS / temperature), which learns from all 11 values of a label")
    parser.add_argument("--holdout", type=number(float, 0, 1), default=0.2,
                        help="share of the labels kept for validation, in whole pictures (default: 0.2)")
    args = training.parse(parser, PRESETS, argv)

    found, held_out = held_out_first(labels.read(args.model), args.holdout)
    args.label_set = f"{len(found)} labels, hash {labels.fingerprint(found)}"      # a setting: other labels are no resuming
    patches, scores = labelled_patches(args, found)                                # (M, 3, P, P) float16, (M, 11)
    if held_out == len(found):
        raise InputError(f"the pictures of {len(found)} labels are too few to train on some and hold out others; "
                         "run build_step_labels.py with more --patches or pictures, or give a smaller --holdout")
    best = scores.argmin(dim=1)                                                    # ties go to the smaller step
    target = (scores / -args.temperature).softmax(dim=1) if args.temperature else F.one_hot(best, len(STEPS)).float()

    def stream(start, stop):
        """Random patches of those not held out, flipped and rotated: a function of (seed, iteration)."""
        for k in range(start, stop):
            generator = np.random.default_rng([args.seed, k])
            index = torch.from_numpy(generator.integers(held_out, len(patches), args.batch))
            turns, flips = generator.integers(4, size=args.batch), generator.integers(2, size=args.batch)
            x = [torch.rot90(patch.flip(2) if flip else patch, turn, (1, 2))
                 for patch, turn, flip in zip(patches[index], turns.tolist(), flips)]
            yield {"x": torch.stack(x).float(), "target": target[index], "name": [found[i]["image"] for i in index.tolist()]}

    def validate(networks):
        """Accuracy, and the LPIPS reached by the predicted steps beside the best fixed count's and the oracle's."""
        x = patches[:held_out].split(args.batch)
        steps = torch.cat([networks["controller"].predict_steps(some.to(run.device).float()).cpu() for some in x])
        classes = torch.tensor([STEPS.index(step) for step in steps.tolist()])
        fixed = scores[held_out:].mean(dim=0).argmin()                             # chosen on the training patches
        return {
            "accuracy": (classes == best[:held_out]).float().mean().item(),
            "lpips": scores[:held_out].gather(1, classes[:, None]).mean().item(),
            "lpips_fixed": scores[:held_out, fixed].mean().item(),
            "fixed_steps": STEPS[fixed],
            "lpips_oracle": scores[:held_out].amin(dim=1).mean().item(),
            "mean_steps": steps.float().mean().item(),
        }

    def publish(networks, info):
        config = {**s.config, "made_with": checkpoint.made_with(args.model)}
        checkpoint.save_weights(args.model / "controller.pt", "controller", config, networks["controller"], info)

    torch.manual_seed(args.seed)
    s = StepController(args.c)
    run = training.Run(args, "controller", {"controller": s}, stream, validate, publish)
    for batch in run.batches():
        with run.autocast():
            logits = run.replicas["controller"](batch["x"])                        # (N, 11)
        run.step(F.cross_entropy(logits.float(), batch["target"]))
    return 0


def held_out_first(found, share):
    """Labels -> (the same, picture by picture as they first occur; how many are held out: whole pictures, about `share`)."""
    pictures = {}
    for label in found:
        pictures.setdefault((label["set"], label["image"]), []).append(label)
    ends = np.cumsum([len(of_one) for of_one in pictures.values()]).tolist()
    return sum(pictures.values(), []), min(ends, key=lambda end: abs(end - share * len(found)), default=0)


def labelled_patches(args, found):
    """-> noisy patches (M, 3, P, P) float16, made again from their labels, and their LPIPS (M, 11), inf where not tried."""
    sizes = {label["size"] for label in found}
    if len(sizes) != 1:
        raise InputError(f"{args.model} holds no step_labels.jsonl, or patches of several sizes; "
                         "run build_step_labels.py with one --size")
    [size] = sizes
    sets, _ = data.training_items(args, 0)
    items = {(place, item.name): item for place, some in enumerate(sets) for item in some}
    patches, opened = torch.empty(len(found), 3, size, size, dtype=torch.float16), None
    for i, label in enumerate(found):
        name = label["set"], label["image"]
        if name not in items:
            raise InputError(f"step_labels.jsonl names the picture {name[1]}, not found; give the labels' own --data and --root")
        if name != opened:
            opened, pictures = name, items[name].read()
        patches[i] = labels.patch(*pictures, label)[0]
    return patches, torch.tensor([[math.inf if value is None else value for value in label["lpips"]] for label in found])


if __name__ == "__main__":
    sys.exit(main())
