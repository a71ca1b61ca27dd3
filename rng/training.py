"""What the training scripts share: options, EMA, checkpoint and resume, progress, log, signals."""

import argparse
import copy
import datetime
import json
import math
import signal
import sys
import time
from pathlib import Path

import torch

from rng import checkpoint, data, device, distributed
from rng.errors import InputError, number
from rng.files import append_line, make_folder, write_text

REPORT_EVERY = 50  # iterations
# Options that may change between two runs of one training without changing what is learned, but for rounding on another
# device. Other pictures under --root are told by their names (data.fingerprint).
FREE_OPTIONS = {"model", "root", "workers", "save_every", "device", "compile", "lpips_backbone"}


def parse(parser, presets, argv):
    """Adds the options that the training scripts share, takes defaults from presets {name: {option: value}}, parses."""
    add = parser.add_argument
    add("--model", type=Path, default=Path("runs/rng"),
        help="model folder, written to; the same command resumes (default: runs/rng)")
    add("--preset", choices=sorted(presets), default="paper",
        help="where the defaults marked * come from (default: paper)")
    add("--iterations", type=number(int, 1), help="* optimiser steps")
    add("--batch", type=number(int, 1), help="* samples per iteration")
    add("--lr", type=number(float, 0), help="* learning rate of AdamW")
    add("--cosine", action=argparse.BooleanOptionalAction, help="* the learning rate falls to zero as a half cosine")
    add("--weight-decay", type=number(float, 0), help="* of AdamW")
    add("--clip-grad", type=number(float, 0), help="* largest norm of the gradient")
    add("--ema", type=number(float, 0, 1), help="* decay of the averaged weights, reached after a warm-up")
    add("--seed", type=number(int, 0), default=0, help="of data, noise and initial weights (default: 0)")
    add("--save-every", type=number(int, 1), default=1000, help="iterations between validation and checkpoint (default: 1000)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--compile", action="store_true",
        help="torch.compile: faster where much lies between the convolutions; needs a C++ compiler")
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="auto: bfloat16 where it pays (default)")
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--preset", choices=sorted(presets), default="paper")
    parser.set_defaults(**presets[chosen.parse_known_args(argv)[0].preset])
    return parser.parse_args(argv)


def add_crop_arguments(parser):
    """The options of the stages that learn from crops."""
    data.add_arguments(parser)
    parser.add_argument("--crop", type=number(int, 8), help="* side of a crop, pixels")
    parser.add_argument("--validation", type=number(int, 1), default=16,
                        help="validation crops, of pictures held out (default: 16)")
    parser.add_argument("--workers", type=number(int, 0), default=2, help="processes that make the crops (default: 2)")


def reconstruction_loss(clean, estimate, kind="mse"):
    """Eq. 4 with p = 2, mean ||y - r(x)||^2; kind "psnr" is NAFNet's own loss, the mean of -PSNR in dB.

    clean, estimate: (N, 3, H, W) in [0, 1]. NAFNet's 1e-8 keeps the logarithm finite where both are equal.
    """
    squared = (clean - estimate.float()).square()
    return squared.mean() if kind == "mse" else 10 * torch.log10(squared.mean(dim=(1, 2, 3)) + 1e-8).mean()


class Run:
    """One training: `for batch in run.batches(): ...; run.step(loss)`, with the networks called as run.replicas[name].

    args: as parse returns them; stage: "recon", "gen" or "controller", names the files; networks: {name: Module},
    trained together; stream(start, stop): yields the batches {name: tensor} of those iterations, as a function of the
    iteration alone; validate(networks) -> {name: number} and publish(networks, info), which writes the weight files,
    both get the averaged (EMA) networks. Under torchrun every process trains on its share of each batch, and the first
    one validates, reports and saves.
    """

    def __init__(self, args, stage, networks, stream, validate, publish):
        self.args, self.stage, self.networks, self.stream = args, stage, networks, stream
        self.validate, self.publish = validate, publish
        self.device = device.pick(args.device)
        for network in networks.values():
            network.to(self.device, memory_format=torch.channels_last).train()
        self.parameters = [p for network in networks.values() for p in network.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
        self.averaged = {name: copy.deepcopy(network).eval().requires_grad_(False)
                         for name, network in networks.items()}
        if args.compile:
            for network in networks.values():
                network.compile()
        self.replicas = {name: distributed.replica(network, self.device) for name, network in networks.items()}
        self.iteration, self.signal = 0, None
        make_folder(args.model)
        self.last, self.log_path = args.model / f"last_{stage}.pt", args.model / f"train_{stage}.jsonl"
        settings = {key: value for key, value in vars(args).items() if key not in FREE_OPTIONS}
        self.settings = json.loads(json.dumps(settings, default=str))
        if self.last.exists():
            self._resume()
        if distributed.rank() == 0:
            self._trim_log()

    def autocast(self):
        """The context of the forward pass, `--precision`."""
        return device.autocast(self.device, self.args.precision)

    def batches(self):
        """Yields the batch of each iteration left, on the device; reports, validates and saves in between."""
        args = self.args
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        started, losses = time.time(), []
        try:
            for batch in self.stream(self.iteration, args.iterations):
                self.names = batch.pop("name", [])
                yield {key: tensor.to(self.device, non_blocking=True) for key, tensor in batch.items()}
                losses.append(self.loss)
                save = self.iteration % args.save_every == 0 or self.iteration == args.iterations
                if distributed.rank() == 0 and (save or self.stopping or self.iteration % REPORT_EVERY == 0):
                    rate = len(losses) / (time.time() - started)
                    info = {"iteration": self.iteration, "images_per_s": rate * args.batch,
                            "loss": sum(losses) / len(losses)}
                    if save:
                        info |= self._validated()
                    self._report(info, (args.iterations - self.iteration) / rate)
                    if save or self.stopping:
                        self._save(info)
                    started, losses = time.time(), []
                if self.stopping:
                    print(f"stopped and saved at iteration {self.iteration}; the same command goes on", file=sys.stderr)
                    sys.exit(128 + (self.signal or signal.SIGTERM))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def step(self, loss):
        """Backward, clipped AdamW step, moving average of the weights."""
        args, k = self.args, self.iteration
        # a signal to one process stops all of them, at the same iteration
        self.loss, self.stopping = distributed.mean([loss.item(), float(self.signal is not None)], self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * (0.5 * (1 + math.cos(math.pi * k / args.iterations)) if args.cosine else 1)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, args.clip_grad).item()
        for what, value in (("loss", self.loss), ("gradient", norm)):
            if not math.isfinite(value):
                of = f" ({', '.join(dict.fromkeys(self.names))})" if self.names else ""
                raise InputError(f"the {what} became {value} at iteration {k + 1}{of}; the last checkpoint is kept: "
                                 "try a smaller --lr or --precision float32, or look at these pictures")
        self.optimizer.step()
        # warm-up, or a short run would show its initial weights
        decay = min(args.ema, (k + 1) / (k + 10))
        with torch.no_grad():
            for name, network in self.networks.items():
                for average, parameter in zip(self.averaged[name].parameters(), network.parameters()):
                    average.lerp_(parameter, 1 - decay)
                for average, buffer in zip(self.averaged[name].buffers(), network.buffers()):
                    average.copy_(buffer)
        self.iteration += 1

    def _validated(self):
        with torch.no_grad(), self.autocast():
            return self.validate(self.averaged)

    def _report(self, info, seconds_left):
        append_line(self.log_path, json.dumps(info))
        numbers = "  ".join(f"{key} {value:.4g}" for key, value in info.items() if key != "iteration")
        left = datetime.timedelta(seconds=round(seconds_left))
        line = f"iteration {self.iteration}/{self.args.iterations}  {numbers}  left {left}"
        print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    def _save(self, info):
        state = {"settings": self.settings, "iteration": self.iteration, "optimizer": self.optimizer.state_dict()}
        for name in self.networks:
            state[name] = {"weights": self.networks[name].state_dict(), "averaged": self.averaged[name].state_dict()}
        # the state comes last: after a kill in between, the same iterations run again and write the same weights
        self.publish(self.averaged, info | {"settings": self.settings})
        checkpoint.save_atomic(self.last, state)

    def _resume(self):
        state = checkpoint.load(self.last)
        if not isinstance(state, dict) or not {"settings", "iteration", "optimizer", *self.networks} <= state.keys():
            raise InputError(f"{self.last} is not the state of this training; remove it, or name a new --model folder")
        try:
            differences = [f"{key.replace('_', '-')} ({state['settings'].get(key)}, now {now})"
                           for key, now in self.settings.items() if state["settings"].get(key) != now]
            if not differences:
                self.optimizer.load_state_dict(state["optimizer"])
                for name in self.networks:
                    self.networks[name].load_state_dict(state[name]["weights"])
                    self.averaged[name].load_state_dict(state[name]["averaged"])
                self.iteration = int(state["iteration"])
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.last} is damaged; remove it, or name a new --model folder") from error
        if differences:
            raise InputError(f"{self.last} was made with another {', '.join(differences)}; "
                             "use the same settings, or a new --model folder to start afresh")
        print(f"{self.last}: going on at iteration {self.iteration}", file=sys.stderr)

    def _trim_log(self):
        """Drops what was logged after the checkpoint: it happens again."""
        if self.log_path.exists():
            try:
                lines = self.log_path.read_text().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= self.iteration]
            except (ValueError, LookupError, TypeError) as error:
                raise InputError(f"{self.log_path} is damaged; remove it, or the line that is no JSON") from error
            write_text(self.log_path, "".join(kept))

    def _stop(self, number, frame):
        self.signal = number
