"""Weight files, {"kind", "config", "state_dict", "info"} of tensors and plain types, and fingerprints."""

import hashlib
import json
import zipfile
from pathlib import Path

import torch

from rng.support.errors import InputError, reading, replacing


def save_atomic(path, content):
    """torch.save beside the target, then a rename: a reader finds the old file or the new one, never half."""
    try:
        with replacing(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} could not be written ({error}); make space, name another folder") from error


def load(path):
    """torch.load with weights_only=True: no code in the file can run; InputError if missing or damaged."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; train it first (README, Train) or name another folder")
    with reading(f"{path} is damaged or not ours; fetch or train it again"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                # torch.load ignores the checksums: a flipped bit would be another weight
                if file.testzip():
                    raise ValueError("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)


def as_stored(network):
    """The state dict in float16, but batch normalisation's statistics in float32."""
    return {name: tensor.half() if tensor.is_floating_point() and "running_" not in name else tensor.clone()
            for name, tensor in network.state_dict().items()}


def fingerprint(content):
    """16 hex digits that tell what was made with what: of a network's weights as stored, else of the JSON."""
    digest = hashlib.sha256()
    if isinstance(content, torch.nn.Module):
        for name, tensor in sorted(as_stored(content).items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    else:
        digest.update((json.dumps(content, indent=1) + "\n").encode())  # whatever the line ends of a file
    return digest.hexdigest()[:16]


def save_weights(path, kind, config, network, info):
    """Writes one network. kind: what it is. config: arguments that rebuild it. info: how it was trained."""
    save_atomic(path, {"kind": kind, "config": config, "state_dict": as_stored(network), "info": info})


def load_weights(path, kind):
    """Reads a weight file; a wrong kind or a damaged file raises InputError. Returns the dictionary."""
    content = load(path)
    fields = {"kind": str, "config": dict, "state_dict": dict, "info": dict}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), fields[name])
                                                for name in fields):
        raise InputError(f"{path} is not a weight file of this project; fetch or train it again")
    if content["kind"] != kind:
        raise InputError(f"{path} holds a network of kind {content['kind']!r}, not {kind!r}; name another")
    return content


def rebuild(path, make, config, state_dict, *trial):
    """make(**config) with state_dict as parameters, in eval mode; InputError unless it runs on `trial`."""
    with reading(f"{path} does not hold the network it should, or weights that are not finite; "
                 "fetch or train it again"), torch.no_grad():
        with torch.device("meta"):  # takes no memory, whatever the sizes in config
            network = make(**config)
        network.load_state_dict(state_dict, assign=True)  # refuses other names and shapes
        out = network.float().eval()(*trial)
        if not all(tensor.isfinite().all() for tensor in (*network.state_dict().values(), out)):
            raise ValueError("not finite")
    return network
