"""The README and docs/: their commands run, and the names, tests and files they speak of exist."""

import ast
import functools
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import benchmark
import numpy as np
import pytest
import scipy.io
from helpers import ALL, ROOT, call, picture, write_random_alexnet

from rng import figures
from rng.nafnet import NAFNet
from rng.support.checkpoint import save_weights
from rng.support.errors import Parser


FEW = "--preset small --batch 2 --iterations 2 --device cpu"
TINY = {
    "train_recon": f"{FEW} --crop 32 --validation 1 --workers 0 --width 4 --enc 1 --middle 1 --dec 1",
    "train_gen": f"{FEW} --crop 32 --validation 1 --workers 0 --base 4 --blocks 1",
    "train_controller": f"{FEW} --c 2",
    "build_step_labels": "--patches 4 --size 64 --counts 0 10 --device cpu",
    "denoise": "--device cpu", "evaluate": "--limit 1 --sigma 25 --device cpu"}
SETS = ("CBSD68 bsd432 photos scenes objects graphics FOLDER/noisy FOLDER/clean "
        "polyu-train/noisy polyu-train/clean polyu-test/noisy polyu-test/clean")
SMALL_PICTURES = "--centre-crop 64 --ends 0.02"  # at 0.3 an untrained g diverges


def shell_lines(path):
    """The commands of a page: its lines in backticks and in blocks, with the shell's variables put in.

    Python handed to `python -` becomes one line, `exec` and the code's repr. torchrun becomes python.
    """
    text = re.sub("^python - <<'END'\n(.*?)^END$", lambda found: f"exec {found[1]!r}", path.read_text(),
                  flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^torchrun .*?(\w+\.py)", r"python \1", text, flags=re.MULTILINE)
    variables = re.findall(r'^(\w+)="(.*)"$|^for (\w+) in (\w+)', text, re.MULTILINE)
    for of_shell, value, of_loop, first in variables:
        text = text.replace(f"${of_shell or of_loop}", value or first)
    yield from re.findall(r"`(python \w+\.py [^`]*)`", text)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub("^for .*; do (.*); done$", r"\1", line)
            yield from (part.strip() for part in line.split("&&"))


def commands(*pages):
    """Every `python SCRIPT ...` of the pages and of the scripts' docstrings."""
    lines = "".join(script.__doc__ for script in ALL.values()).splitlines()
    lines = [re.sub(r"\s{2,}\(.*\)$", "", line).strip() for line in lines]
    lines += [line for page in pages for line in shell_lines(page)]
    return [line for line in lines if re.match(r"python \w+\.py\b", line)]


PAGES = ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))


def test_the_readme_has_commands_for_every_script():
    assert {command.split()[1] for command in commands(*PAGES)} == {f"{name}.py" for name in ALL}


@pytest.mark.parametrize("command", dict.fromkeys(commands(*PAGES)))
def test_documented_commands_parse(command, monkeypatch):
    real = Parser.parse_args

    def parse_args(parser, *args, **options):
        real(parser, *args, **options)
        raise EOFError("all options are read")

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    _, script, *args = shlex.split(command, comments=True)
    main = ALL[script.removesuffix(".py")].main
    if args == ["--help"]:
        with pytest.raises(SystemExit, match="^0$"):
            main(args)
        return
    with pytest.raises(EOFError):
        main(args)
    assert main([*args, "--no-such-option"]) == 2


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with all that the commands name: tiny data sets in the published layouts, a few pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RNG_ALEXNET", str(write_random_alexnet(tmp_path / "alexnet.npz")))
    for n in range(2):
        for seed, kind in enumerate(("GT", "NOISY")):
            scene = Path(f"datasets/sidd/SIDD_Medium_Srgb/Data/000{n}_00{n}_S6")
            picture(scene / f"000{n}_{kind}_SRGB_010.PNG", seed=seed)
        for place in "datasets/div2k/DIV2K_train_HR", "datasets/div2k/Flickr2K_HR", *SETS.split():
            picture(Path(place, f"{n}.png"), seed=n)
    picture(Path("datasets/div2k/DIV2K_valid_HR/0.png"), 260, 260)
    blocks = np.random.default_rng(0).integers(0, 256, (2, 1, 1, 256, 256, 3), np.uint8)
    for name, of_one in zip(("ValidationGtBlocksSrgb", "ValidationNoisyBlocksSrgb"), blocks):
        scipy.io.savemat(f"datasets/sidd/{name}.mat", {name: of_one})
    for name in "noisy.png", "noisy.jpg", "tests/data/noisy.png":
        picture(Path(name))
    picture(Path("results/restormer/00_00.png"), 256, 256)
    Path("rng").symlink_to(ROOT / "rng")
    Path("runs/sidd").mkdir(parents=True)
    r = NAFNet(4, [1], 1, [1])
    save_weights(Path("runs/sidd/recon.pt"), "recon", r.config, r, {})


@pytest.mark.parametrize("page", ["README.md", "docs/reproduce.md", "docs/model_card.md",
                                  "docs/performance.md", "docs/exercises.md", "docs/tried.md"])
def test_documented_commands_run(page, world, monkeypatch):
    """In their order, as they stand, but for tiny networks and pictures, and fewer steps."""
    monkeypatch.setattr(figures, "STEPS", (0, 10))  # of Fig. 3
    for line in shell_lines(ROOT / page):
        if re.match("(mkdir|cp) ", line):
            subprocess.run(line, shell=True, check=True)
        elif line.startswith("exec "):
            exec(re.sub("for T in .*:", "for T in 2, 3:", ast.literal_eval(line.removeprefix("exec "))), {})
        elif line.startswith("grow "):  # the model card's deeper r, here the same
            start, end = map(Path, line.split()[1:3])
            end.parent.mkdir()
            shutil.copy(start, end)
        if not re.match(r"python \w+\.py\b", line):
            continue
        line = re.sub(r"--steps \d[\d ]*", "--steps 5 ", line).replace("/100 steps", "/5 steps")
        line = line.replace(" --compile", "")  # slow for tiny networks
        _, script, *args = shlex.split(line, comments=True)
        script = script.removesuffix(".py")
        tiny = [*TINY[script].split(), *(("--crop", "48") if "--finish" in args else ()),
                *(("--batch", "16") if "--weight" in args and script.startswith("train") else ())]
        if script == "evaluate" and "--steps" not in args:
            tiny += ["--steps", "5"]
        if {"--search-schedule", "--figures", "--plot"} & set(args):
            tiny += SMALL_PICTURES.split()
        result = call(ALL[script], *args, *tiny)
        assert result.code == 0, (line, result.err)


def test_the_benchmark_of_the_performance_page_runs(monkeypatch, capsys):
    [parts] = re.findall("`python tests/benchmark.py (.*?)`", (ROOT / "docs" / "performance.md").read_text())
    monkeypatch.setattr(benchmark, "SIDE", 32)
    for part in parts.split():
        benchmark.PARTS[part]()
    assert "| NAFNet, small preset |" in capsys.readouterr().out


def places_in_code():
    """(file, the names in it) of the README's map and of docs/choices.md."""
    section = (ROOT / "README.md").read_text().split("## Paper to code\n")[1].split("\n## ")[0]
    choices = (ROOT / "docs" / "choices.md").read_text()
    yield from re.findall(r"^\|.*?\| `([\w/]+)\.py` \|(.*)\|$", section + choices, re.MULTILINE)
    yield from re.findall(r"`([\w/]+)\.py`: ((?:`[\w.]+`(?:, )?)+)", choices)


def test_every_name_in_the_map_and_the_choices_exists():
    rows = list(places_in_code())
    assert len(rows) >= 40
    for file, names in rows:
        module = importlib.import_module(file.replace("/", "."))
        assert (ROOT / f"{file}.py").is_file() and "`" in names
        for name in re.findall("`(.*?)`", names):
            thing = functools.reduce(getattr, name.split("."), module)
            assert not callable(thing) or thing.__module__ == module.__name__, f"{name} is not of {file}"


def test_every_promise_of_the_readme_has_its_test():
    text = (ROOT / "docs" / "promises.md").read_text()
    files = re.findall(r"`(test_\w+\.py)`((?:[^`]|`(?!test_\w+\.py`))*)", text)
    assert len(files) >= 10
    for file, names in files:
        source = (ROOT / "tests" / file).read_text()
        for name in re.findall(r"`(test_\w+)`", names):
            assert f"def {name}(" in source, f"{name} is not in {file}"
