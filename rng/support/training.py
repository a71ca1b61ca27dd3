"""What surrounds any training loop: options, resuming, saving, the log, signals; no losses or networks."""

import argparse
import datetime
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch

from rng.support import checkpoint, device
from rng.support.checkpoint import fingerprint
from rng.support.errors import InputError, append_line, make_folder, number, reading, write_text

REPORT_EVERY = 50  # iterations
# Options that may change when a training goes on: they do not change what is learned, but for rounding on
# another device. Other pictures under --root are noticed by their names.
FREE_OPTIONS = {"model", "root", "workers", "save_every", "device", "compile", "lpips_backbone"}


class Presets:
    """Options whose defaults --preset sets; values: {preset: {option: default}}, the default preset first."""

    def __init__(self, parser, values):
        self.values, first = values, next(iter(values))
        parser.add_argument("--preset", choices=list(values), default=first, help=f"defaults ({first})")

    def add(self, group, option, help, **settings):
        """add_argument, with the value that each preset gives in the help."""
        name = option.removeprefix("--").replace("-", "_")
        shown = "; ".join(f"{preset}: {_as_typed(values[name])}" for preset, values in self.values.items())
        group.add_argument(option, help=f"{help} ({shown})", **settings)

    def fill(self, args):
        """Gives the options that were not on the command line their defaults; returns args."""
        for name, value in self.values[args.preset].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        return args


def _as_typed(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def add_optimiser_arguments(parser, presets):
    """The options of AdamW, of the schedule of its rate and of the moving average."""
    group = parser.add_argument_group("optimiser")
    presets.add(group, "--iterations", "optimiser steps", type=number(int, 1))
    presets.add(group, "--batch", "samples per iteration, of all processes together", type=number(int, 1))
    presets.add(group, "--lr", "learning rate of AdamW", type=number(float, 0))
    presets.add(group, "--cosine", "the learning rate falls to zero as a half cosine",
                action=argparse.BooleanOptionalAction)
    presets.add(group, "--weight-decay", "of AdamW", type=number(float, 0))
    presets.add(group, "--clip-grad", "largest norm of the gradient", type=number(float, 0))
    presets.add(group, "--ema", "decay of the averaged weights, reached after a warm-up",
                type=number(float, 0, 1))


def add_run_arguments(parser):
    """The options that say where a training goes and how it runs."""
    group = parser.add_argument_group("run")
    device.add_arguments(group)
    add = group.add_argument
    add("--model", type=Path, required=True, help="model folder, written to; the same command resumes")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of data, noise, weights (default: 0)")
    add("--save-every", type=number(int, 1), default=1000,
        help="iterations between validation and checkpoint (default: 1000)")
    add("--compile", action="store_true",
        help="torch.compile: faster for networks of many small operations, such as r; needs a C++ compiler")


def add_crop_arguments(parser, presets):
    """The options of the stages that learn from crops."""
    group = parser.add_argument_group("crops")
    presets.add(group, "--crop", "side of a crop, pixels", type=number(int, 8))
    group.add_argument("--validation", type=number(int, 1), default=16,
                       help="validation crops, of pictures held out (default: 16)")
    group.add_argument("--workers", type=number(int, 0), default=2,
                       help="processes that make the crops (default: 2)")


def half_cosine(k, iterations):
    """Factor of the learning rate in iteration k: from 1 at 0 to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * k / iterations))


@torch.no_grad()
def move_average(averaged, network, decay):
    """averaged <- decay * averaged + (1 - decay) * network, of each parameter; buffers are copied."""
    for average, parameter in zip(averaged.parameters(), network.parameters()):
        average.lerp_(parameter, 1 - decay)
    for average, buffer in zip(averaged.buffers(), network.buffers()):
        average.copy_(buffer)


class Run:
    """One training, from where it was stopped to its end. A script uses it so:

        for k, batch in run.batches(stream):     # k: iterations done before this one
            ...                                  # forward, loss, backward, clipping
            run.check(loss, norm)
            ...                                  # step, moving average
            if run.ended():                      # time to save, in the first process
                info = run.report(scores)
                ...                              # publish the weights
                run.save()

    args: of the script. stage: "recon", "gen" or "controller", names the files. networks: {name: (network,
    its moving average)}. settings: what tells one training from another beside args. pictures: their names, a
    list for each data set. The state of a stopped training is loaded into networks and optimizer; InputError
    if it is damaged or another training's.
    """

    def __init__(self, args, stage, networks, optimizer, settings, pictures=()):
        self.args, self.networks, self.optimizer = args, networks, optimizer
        self.device = next(networks[next(iter(networks))][0].parameters()).device
        self.iteration, self.signal, self.stopping, self.early = 0, None, False, False
        self.started, self.rate, self.losses = time.time(), 0.0, []  # since the last report; rate: a second
        make_folder(args.model)
        self.last, self.log_path = args.model / f"last_{stage}.pt", args.model / f"train_{stage}.jsonl"
        self.pictures, self.left_out = pictures, {}  # {name of a picture that cannot be read: why}
        told = {key: value for key, value in vars(args).items() if key not in FREE_OPTIONS} | settings
        if pictures:
            told["pictures"] = (f"{' + '.join(str(len(some)) for some in pictures)}, "
                                f"hash {fingerprint(pictures)}")
        self.settings = json.loads(json.dumps(told, default=str))
        if self.last.exists():
            self._resume()
        if device.rank() == 0:
            for left_by_a_kill in args.model.glob(".*.tmp"):
                left_by_a_kill.unlink()
            self._trim_log()

    def batches(self, stream):
        """Yields (k, batch) of each iteration left, on the device; stream(start, stop): their batches."""
        handlers = {which: signal.signal(which, self._stop) for which in (signal.SIGINT, signal.SIGTERM)}
        self.started = time.time()
        try:
            for batch in stream(self.iteration, self.args.iterations):
                self.names = batch.pop("name", [])
                for name, why in batch.pop("left_out", []):
                    if name not in self.left_out:
                        print(f"note: {name} is left out of the training: {why}", file=sys.stderr)
                    self.left_out[name] = why
                yield self.iteration, {key: value.to(self.device, non_blocking=True)
                                       for key, value in batch.items()}
                if self.stopping:
                    print(f"stopped and saved at iteration {self.iteration}; the same command goes on",
                          file=sys.stderr)
                    sys.exit(128 + (self.signal or signal.SIGTERM))
        finally:
            for which, handler in handlers.items():
                signal.signal(which, handler)

    def check(self, loss, norm):
        """InputError unless the loss, averaged over all processes, and its gradient's norm are finite."""
        # a signal to one process stops all of them, at the same iteration
        loss, self.stopping = device.mean([loss.item(), float(self.signal is not None)], self.device)
        for what, value in (("loss", loss), ("gradient", norm.item())):
            if not math.isfinite(value):
                of = f" ({', '.join(dict.fromkeys(self.names))})" if self.names else ""
                raise InputError(f"the {what} became {value} at iteration {self.iteration + 1}{of}; the last "
                                 "checkpoint is kept: try a smaller --lr or --precision float32, or look at "
                                 "these pictures")
        self.losses.append(loss)

    def ended(self):
        """Counts the iteration -> whether to save: every --save-every, at the end, and before a stop."""
        self.iteration += 1
        if device.rank() > 0:
            return False
        self.rate = len(self.losses) / (time.time() - self.started)
        due = self.iteration == self.args.iterations or self.iteration % self.args.save_every == 0
        self.early = self.stopping and not due  # a stop does not wait for a validation
        if due or self.stopping:
            return True
        if self.iteration % REPORT_EVERY == 0:
            self.report({})
            self.started, self.losses = time.time(), []
        return False

    def report(self, scores):
        """Logs and prints the progress and `scores` {name: number} -> the info for the weight files."""
        info = {"iteration": self.iteration, "images_per_s": self.rate * self.args.batch,
                "loss": sum(self.losses) / len(self.losses)} | scores
        info |= {"left_out": len(self.left_out)} if self.left_out else {}
        append_line(self.log_path, json.dumps(info))
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in info.items() if key != "iteration")
        left = datetime.timedelta(seconds=round((self.args.iterations - self.iteration) / self.rate))
        line = f"iteration {self.iteration}/{self.args.iterations}  {numbers}  left {left}"
        print(line, end="\033[K\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        return info | {"settings": self.settings}

    def save(self):
        """Writes the state to resume from, after the weights: a kill in between only repeats iterations."""
        state = {"settings": self.settings, "iteration": self.iteration, "pictures": self.pictures,
                 "left_out": self.left_out, "optimizer": self.optimizer.state_dict()}
        for name, (network, averaged) in self.networks.items():
            state[name] = {"weights": network.state_dict(), "averaged": averaged.state_dict()}
        checkpoint.save_atomic(self.last, state)
        self.started, self.losses = time.time(), []

    def _resume(self):
        state = checkpoint.load(self.last)
        fields = {"settings", "iteration", "pictures", "left_out", "optimizer", *self.networks}
        if not isinstance(state, dict) or not fields <= state.keys():
            raise InputError(f"{self.last} is not the state of this training; remove it, or name a new "
                             "--model folder")
        with reading(f"{self.last} is damaged; remove it, or name a new --model folder"):
            before, self.left_out = state["settings"], dict(state["left_out"])
            readable = [[[name for name in some if name not in self.left_out] for some in pictures]
                        for pictures in (state["pictures"], self.pictures)]
            if readable[0] == readable[1]:  # of the rest some may be gone
                before = before | {"pictures": self.settings.get("pictures")}
            differences = [f"{key.replace('_', '-')} (was {before.get(key)}, now {now})"
                           for key, now in self.settings.items() if before.get(key) != now]
            if not differences:
                self.optimizer.load_state_dict(state["optimizer"])
                for name, (network, averaged) in self.networks.items():
                    network.load_state_dict(state[name]["weights"])
                    averaged.load_state_dict(state[name]["averaged"])
                self.iteration = int(state["iteration"])
        if differences:
            raise InputError(f"{self.last} differs in {', '.join(differences)}; "
                             "use the same settings, or a new --model folder to start afresh")
        print(f"{self.last}: going on at iteration {self.iteration}", file=sys.stderr)

    def _trim_log(self):
        """Drops what was logged after the checkpoint: it happens again."""
        if self.log_path.exists():
            with reading(f"{self.log_path} is damaged; remove it, or the bad line"):
                lines = self.log_path.read_text().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n")
                        and json.loads(line)["iteration"] <= self.iteration]
            write_text(self.log_path, "".join(kept))

    def _stop(self, which, frame):
        self.signal = which
