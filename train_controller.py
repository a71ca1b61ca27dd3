"""Trains the step controller s (Sec. 3.2) on MODEL/step_labels.jsonl; writes MODEL/controller.pt.

    python train_controller.py --data sidd --model runs/sidd
    python train_controller.py --data sample --preset small --model runs/try

--data and --root name the pictures that build_step_labels.py was given.
"""

import copy
import functools
import math
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F

from rng import folder, search
from rng.controller import STEPS, StepController
from rng.support import data, training
from rng.support.checkpoint import fingerprint, save_weights
from rng.support.device import autocast, pick, world_size
from rng.support.errors import InputError, Parser, number, script, writing

# iterations: 30 epochs of 20,000 patches; 60 of 1,000, and an EMA that so short a training can follow
PRESETS = {
    "paper": dict(c=64, iterations=9400, batch=64, lr=1e-4, cosine=False, weight_decay=1e-4, clip_grad=1.0,
                  ema=0.999),
    "small": dict(c=16, iterations=1000, batch=64, lr=1e-3, cosine=True, weight_decay=1e-2, clip_grad=1.0,
                  ema=0.99),
}


def parse(argv):
    parser = Parser(__doc__)
    presets = training.Presets(parser, PRESETS)
    group = parser.add_argument_group("network and labels")
    data.add_sets(group)
    presets.add(group, "--c", "channels of s's first block", type=number(int, 1))
    group.add_argument("--by-cost", action="store_true",
                       help="weigh each label by what its worst count costs in LPIPS; not in the paper")
    group.add_argument("--holdout", type=number(float, 0.01, 0.99), default=0.2,
                       help="share of the labels kept for validation, in whole pictures (default: 0.2)")
    training.add_optimiser_arguments(parser, presets)
    training.add_run_arguments(parser)
    return presets.fill(parser.parse_args(argv))


@script
def main(argv=None):
    args = parse(argv)
    device = pick(args.device)
    if world_size() > 1:
        raise InputError("s is small and trains in one process; leave torchrun out")
    labels, held_out = held_out_first(search.read_labels(folder.own(args.model)), args.holdout)
    patches, scores = labelled_patches(args, labels)                   # (M, 3, P, P) float16, (M, 11)
    if held_out == len(labels):
        raise InputError(f"the pictures of {len(labels)} labels are too few to train on some and hold out "
                         "others; run build_step_labels.py with more --patches, or give a smaller --holdout")
    target = scores.argmin(dim=1)                                      # ties go to the smaller step
    cost = cost_of_each(scores) if args.by_cost else torch.ones(len(labels))  # in the paper equal
    cost = cost / cost[held_out:].mean()                               # (M,), 1 on average in training
    torch.manual_seed(args.seed)
    s = StepController(args.c).to(device, memory_format=torch.channels_last).train()
    averaged = copy.deepcopy(s).eval().requires_grad_(False)
    if args.compile:
        s.compile()
    optimizer = torch.optim.AdamW(s.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    names = [label.image for label in labels]
    told = {"label_set": f"{len(labels)} labels, hash {fingerprint([label._asdict() for label in labels])}"}
    run = training.Run(args, "controller", {"controller": (s, averaged)}, optimizer, told)

    for k, batch in run.batches(functools.partial(stream, args, patches, target, cost, names, held_out)):
        if args.cosine:                                                # in the paper the rate is constant
            optimizer.param_groups[0]["lr"] = args.lr * training.half_cosine(k, args.iterations)
        with autocast(device, args.precision):
            logits = s(batch["x"])                                     # (N, 11)
        loss = F.cross_entropy(logits.float(), batch["target"], reduction="none")  # Sec. 3.2, (N,)
        loss = (batch["cost"] * loss).mean()                           # in the paper the cost is 1
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(s.parameters(), args.clip_grad)
        run.check(loss, norm)
        optimizer.step()
        training.move_average(averaged, s, min(args.ema, (k + 1) / (k + 10)))
        if run.ended():
            info = run.report({} if run.early else validate(args, averaged, patches, scores, held_out))
            config = {**s.config, "made_with": folder.made_with(args.model)}
            save_weights(args.model / "controller.pt", "controller", config, averaged, info)
            run.save()
    return 0


def held_out_first(labels, share):
    """Labels -> (the same, picture by picture; how many are held out: whole pictures, about `share`)."""
    pictures = {}
    for label in labels:
        pictures.setdefault((label.set, label.image), []).append(label)
    ends = np.cumsum([len(of_one) for of_one in pictures.values()]).tolist()
    return sum(pictures.values(), []), min(ends, key=lambda end: abs(end - share * len(labels)), default=0)


def labelled_patches(args, labels):
    """-> noisy patches (M, 3, P, P) float16, made again, and LPIPS (M, 11), inf where not tried.

    The patches lie in a temporary file beside the model (20,000 take 8 GB), read as they are needed.
    """
    sizes = {label.size for label in labels}
    if len(sizes) != 1:
        raise InputError(f"{args.model} holds no step_labels.jsonl, or patches of several sizes; "
                         "run build_step_labels.py with one --size")
    [size] = sizes
    sets, _ = data.training_sets(args.data, args.root)
    items = {(place, item.name): item for place, some in enumerate(sets) for item in some}
    with writing(args.model):
        file, opened = tempfile.TemporaryFile(dir=args.model), None
    for label in labels:
        name = label.set, label.image
        if name not in items:
            raise InputError(f"step_labels.jsonl names the picture {label.image}, not found; "
                             "give the labels' own --data and --root")
        if name != opened:
            opened, pictures = name, items[name].read()
        patch = search.labelled_patch(*pictures, label)[0].half()
        with writing(f"the patches to {args.model}", "make space"):
            file.write(patch.numpy().tobytes())
    patches = np.memmap(file, np.float16, "c", shape=(len(labels), 3, size, size))
    return torch.from_numpy(patches), torch.tensor(
        [[math.inf if value is None else value for value in label.lpips] for label in labels])


def cost_of_each(scores):
    """LPIPS (M, 11), inf where not tried -> what the worst count tried of each label costs, (M,)."""
    return scores.where(scores.isfinite(), -math.inf).amax(dim=1) - scores.amin(dim=1)


def stream(args, patches, target, cost, names, held_out, start, stop):
    """Random patches of those not held out, flipped and rotated: a function of (seed, iteration)."""
    for k in range(start, stop):
        generator = np.random.default_rng([args.seed, k])
        index = torch.from_numpy(generator.integers(held_out, len(patches), args.batch))
        turns, flips = generator.integers(4, size=args.batch), generator.integers(2, size=args.batch)
        x = [torch.rot90(patch.flip(2) if flip else patch, turn, (1, 2))
             for patch, turn, flip in zip(patches[index], turns.tolist(), flips)]
        yield {"x": torch.stack(x).float(), "target": target[index], "cost": cost[index],
               "name": [names[i] for i in index.tolist()]}


@torch.no_grad()
def validate(args, s, patches, scores, held_out):
    """Accuracy, and the LPIPS of the predicted steps beside that of the best fixed count and the oracle."""
    device = pick(args.device)
    with autocast(device, args.precision):
        steps = torch.cat([s.predict_steps(x.to(device).float()).cpu()
                           for x in patches[:held_out].split(args.batch)])
    classes = torch.tensor([STEPS.index(step) for step in steps.tolist()])
    fixed = scores[held_out:].mean(dim=0).argmin()                     # chosen on the training patches
    scores = scores[:held_out]
    return {
        "accuracy": (classes == scores.argmin(dim=1)).float().mean().item(),
        "lpips": scores.gather(1, classes[:, None]).mean().item(),
        "lpips_fixed": scores[:, fixed].mean().item(),
        "fixed_steps": STEPS[fixed],
        "lpips_oracle": scores.amin(dim=1).mean().item(),
        "mean_steps": steps.float().mean().item(),
    }


if __name__ == "__main__":
    sys.exit(main())
