"""denoise.py from the command line to the files, with a quick stand-in for the networks."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from skimage.filters import gaussian
from test_images import KINDS, encoded, png, tiff

import denoise
from rng.pipeline import Parts
from rng.support.images import Picture, read_picture, write_picture
from rng.tiling import STRIDE


class BlurringRnG:
    """Takes RnG's place: blurs, and writes down how it was called."""

    calls = []

    @classmethod
    def load(cls, *args):
        cls.calls.append(("load", *args))
        return cls()

    def denoise(self, image, steps, seed, detail, progress, parts):
        self.calls.append(("denoise", steps, seed, detail))
        for done in (0.5, 1.0) if progress else ():
            progress(done)
        residual = np.linspace(-0.2, 0.2, image.size).reshape(image.shape).astype(np.float16)
        return Parts(result_of(image), blur(image), residual, np.zeros((1, 1), int))


def blur(image):
    return gaussian(image, 1, preserve_range=True, channel_axis=2).round().astype(image.dtype)


def result_of(image):
    return np.iinfo(image.dtype).max - blur(image)


@pytest.fixture(autouse=True)
def model(monkeypatch, tmp_path):
    monkeypatch.setattr(BlurringRnG, "calls", [])
    monkeypatch.setattr(denoise, "RnG", BlurringRnG)
    monkeypatch.chdir(tmp_path)
    return BlurringRnG


def noise(seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (20, 30, 3), dtype, endpoint=True)


def save(*paths, seed=0, **options):
    for path in paths:
        Path(path).parent.mkdir(exist_ok=True)
        Image.fromarray(noise(seed)).save(path, **options)
    return noise(seed)


def run(*argv):
    return denoise.main([str(word) for word in argv])


def files(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if not path.is_dir())


# Files in and out

@pytest.mark.parametrize("out", ["out.png", "out.jpg", "out.jpeg", "out.tif", "out.tiff", "out.webp",
                                 "out.PNG", "new/folder/out.png", "x" * 251 + ".png"])
def test_writes_what_the_model_returns(out, capsys):
    image = save("in.png")
    assert run("in.png", out) == 0
    result = read_picture(out).pixels.astype(int)
    assert np.abs(result - result_of(image)).max() <= (20 if "jp" in out else 0)
    printed, err = capsys.readouterr()
    assert re.fullmatch(r"in.png: 30 x 20, 0.0 steps, \d+\.\d s\n", printed) and err == ""
    assert files() == sorted(["in.png", out])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_kind_of_picture_is_kept(dtype, grey, alpha):
    pixels = noise(1, dtype=dtype)
    pixels = pixels[..., :1].repeat(3, 2) if grey else pixels
    plane = noise(2, dtype=dtype)[..., 0] if alpha else None
    write_picture("in.tif", pixels, Picture(pixels, grey, plane))
    assert run("in.tif", "out.tif") == 0
    result = read_picture("out.tif")
    assert result.grey == grey and np.array_equal(result.alpha, plane)
    assert result.pixels.dtype == dtype and np.array_equal(result.pixels, result_of(pixels))


@pytest.mark.parametrize("low, high, stars", [(0, 4095, 0), (100, 700, 0), (300, 9000, 5), (40000, 41000, 0)])
def test_16_bits_of_which_a_small_part_is_used(low, high, stars, capsys):
    """Denoised over that part, as of a microscope or a telescope; the stars that lie above stay."""
    pixels = np.random.default_rng(0).integers(low, high, (90, 80, 3), np.uint16)
    pixels[::19, 3][:stars] = 60000
    write_picture("in.tif", pixels)
    assert run("in.tif", "out.tif", "--compare", "crops.png") == 0
    assert read_picture("crops.png").pixels[:60].std() > 20  # stretched, else black
    assert "note: in.tif: it uses a small part of its 16 bits: denoised over" in capsys.readouterr().err
    result, star = read_picture("out.tif").pixels, pixels == 60000
    assert (result[star] == 60000).all() and star.sum() == 3 * stars
    of_span = np.where(star, high, pixels).astype(np.uint16)
    far = gaussian(star.astype(float), 1, channel_axis=2) == 0
    expected = low + high - blur(of_span).astype(float)
    assert np.abs(result - expected)[far].max() < 0.01 * (high - low)


def test_notes_are_told(capsys):
    Image.fromarray(noise()).quantize(8).save("in.png", transparency=1)
    assert run("in.png", "out.jpg") == 0
    assert re.fullmatch("note: in.png: .*palette.*\nnote: in.png: .*alpha.*\n", capsys.readouterr().err)


def test_existing_output_is_replaced_and_keeps_its_mode():
    image = save("in.png")
    save("out.png", seed=5)
    os.chmod("out.png", 0o600)
    assert run("in.png", "out.png") == 0
    assert np.array_equal(read_picture("out.png").pixels, result_of(image))
    assert os.stat("out.png").st_mode & 0o777 == 0o600


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_output_equal_to_input_needs_overwrite(model, link, capsys):
    image, out = save("in.png"), "./in.png"
    if link:
        os.makedirs("elsewhere")
        link(os.path.abspath("in.png"), out := "elsewhere/out.png")
    before = files()
    assert run("in.png", out) == 2
    assert re.fullmatch("error: .*--overwrite.*\n", capsys.readouterr().err)
    assert np.array_equal(read_picture("in.png").pixels, image) and model.calls == []

    assert run("in.png", out, "--overwrite") == 0
    assert np.array_equal(read_picture(out).pixels, result_of(image)) and files() == before
    assert os.path.islink(out) == (link is os.symlink)


# Options

def test_options_reach_the_model(model):
    save("in.png")
    assert run("in.png", "out.png") == 0
    assert run("in.png", "out.png", "--steps", 30, "--detail", 0.5, "--seed", 7, "--model", "runs/rng",
               "--device", "cpu", "--precision", "float32", "--batch", 3) == 0
    assert model.calls == [("load", "default", "auto", "auto", None), ("denoise", "auto", 0, 1.0),
                           ("load", "runs/rng", "cpu", "float32", 3), ("denoise", 30, 7, 0.5)]
    for steps, detail in ((0, 0), (2000, 2)):
        assert run("in.png", "out.png", "--steps", steps, "--detail", detail) == 0
        assert model.calls[-1] == ("denoise", steps, 0, detail)


@pytest.mark.parametrize("options", [
    ["--steps", "-1"], ["--steps", "2001"], ["--steps", "many"], ["--steps", "1.5"], ["--steps", ""],
    ["--detail", "-0.1"], ["--detail", "2.1"], ["--detail", "nan"], ["--detail", "inf"], ["--seed", "-1"],
    ["--batch", "0"], ["--batch", "-4"], ["--overwrite", "--resume"]])
def test_option_out_of_range(options, capsys):
    save("in.png")
    assert run("in.png", "out.png", *options) == 2 and files() == ["in.png"]
    assert re.fullmatch(f"error: .*{options[0]}.*\n", capsys.readouterr().err)


# Folders

def test_folder(model, capsys):
    images = {name: save(f"in/{name}", seed=seed) for seed, name in enumerate(["b.png", "a.tif", "a.png"])}
    images["c.WEBP"] = save("in/c.WEBP", lossless=True)
    save("in/deeper/d.png", "in/.hidden.png")
    for name in ("bad.jpg", "empty.png", "notes.txt", "e.heic"):
        Path("in", name).write_text("no picture" * (name == "bad.jpg"))

    assert run("in", "new/out", "--save-parts", "parts") == 2
    assert files("new/out") == sorted(images)
    assert files("parts") == sorted(f"{name}_{part}.png" for name in ("a.png", "a.tif", "b", "c")
                                    for part in ("recon", "residual", "steps"))
    for name, image in images.items():
        assert np.array_equal(read_picture(f"new/out/{name}").pixels, result_of(image))
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == sorted(images)
    note = r"note: in: left out \(2 files: 1 .heic, 1 .txt; 1 folder\)\n"
    assert re.fullmatch(note + "error: .*bad.jpg.*\nerror: .*empty.png.*\n", err)
    assert [call[0] for call in model.calls] == ["load"] + ["denoise"] * 4


def test_folder_onto_itself_needs_overwrite(capsys):
    image = save("in/a.png")
    os.symlink("in", "same")
    for out in ("in", "same"):
        assert run("in", out) == 2 and "--overwrite" in capsys.readouterr().err
    assert np.array_equal(read_picture("in/a.png").pixels, image)
    assert run("in", "same", "--overwrite") == 0
    assert np.array_equal(read_picture("in/a.png").pixels, result_of(image))


@pytest.mark.parametrize("parts", ["in", "out"])
def test_a_part_never_replaces_an_input_or_a_result(parts, capsys):
    save("in/a.png", "in/a_recon.png")
    before = files()
    assert run("in", "out", "--save-parts", parts) == 2
    assert re.fullmatch("error: .*\n", capsys.readouterr().err) and files() == before


def test_a_folder_resumes_where_it_was_stopped(model):
    """Neither doing a picture again nor leaving one out, whichever files a kill left unwritten."""
    save("in/a.png", "in/b.png", "in/c.png")
    assert run("in", "out", "--save-parts", "parts") == 0
    before = os.stat("out/a.png").st_mtime_ns
    os.remove("out/b.png")
    os.remove("parts/c_steps.png")
    model.calls.clear()
    assert run("in", "out", "--save-parts", "parts", "--resume") == 0
    assert [call[0] for call in model.calls] == ["load", "denoise", "denoise"]
    assert os.stat("out/a.png").st_mtime_ns == before
    assert files("out") == ["a.png", "b.png", "c.png"] and len(files("parts")) == 9


def test_empty_folder(capsys):
    os.makedirs("in")
    assert run("in", "out") == 2 and os.listdir() == ["in"]
    assert re.fullmatch("error: in holds no picture.*\n", capsys.readouterr().err)


# Parts and progress

def test_parts():
    image = save("in.png")
    assert run("in.png", "out.png", "--save-parts", "new/parts") == 0
    assert files("new/parts") == ["in_recon.png", "in_residual.png", "in_steps.png"]
    recon, residual, steps = (read_picture(f"new/parts/{name}").pixels for name in files("new/parts"))
    assert np.array_equal(recon, blur(image)) and steps.shape == image.shape
    expected = 255 * np.clip(0.5 + 4 * np.linspace(-0.2, 0.2, image.size), 0, 1).reshape(image.shape)
    assert np.abs(residual - expected).max() <= 1


@pytest.mark.parametrize("parts", [[], ["--save-parts", "parts"]])
def test_comparison(parts):
    image = save("in.png")
    assert run("in.png", "out.png", "--compare", "new/crops.png", *parts) == 0
    crops = read_picture("new/crops.png").pixels[:60]                           # 20 x 20, three times
    for i, picture in enumerate((image, blur(image), result_of(image))):
        shown = crops[::3, i * 66:i * 66 + 60:3]
        assert any(np.array_equal(shown, picture[:, left:left + 20]) for left in range(11))


@pytest.mark.parametrize("argv", [["in.png", "in.png"], ["in.png", "out.png"], ["folder", "crops.png"]])
def test_comparison_replaces_nothing_and_is_of_one_picture(argv, capsys):
    save("in.png", "folder/in.png")
    before = files()
    assert run(argv[0], "out.png" if argv[0] == "in.png" else "out", "--compare", argv[1]) == 2
    assert re.fullmatch("error: .*\n", capsys.readouterr().err) and files() == before


@pytest.mark.parametrize("height, width", [(1, 1), (256, 256), (257, 256), (300, 700), (480, 481)])
def test_step_map(height, width):
    rows, cols = (max(1, -(-(size - 32) // STRIDE)) for size in (height, width))
    steps = np.random.default_rng(height).integers(0, 21, (rows, cols)) * 10    # more than 100 are white
    levels = np.minimum(255, np.rint(2.55 * steps)).astype(np.uint8)
    for axis, (side, count) in enumerate(((height, rows), (width, cols))):      # patch i begins at 224 i,
        edges = [0, *(224 * i + 16 for i in range(1, count)), side]             # and overlaps are halved
        levels = levels.repeat(np.diff(edges), axis)
    assert np.array_equal(denoise.steps_picture(steps, height, width), np.dstack([levels] * 3))


def test_progress_on_a_terminal_only(monkeypatch):
    save("in.png")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run("in.png", "out.png")
    assert re.fullmatch(r"\rin.png: 50 %, \d+ s left\033\[K\r\033\[K", terminal.getvalue())


# Bad input

@pytest.mark.parametrize("name", ["missing.png", "empty.png", "text.jpg", "cut.png", "cut.jpg", "cut.tif",
                                  "cut.webp", "x" * 300 + ".png"])
@pytest.mark.parametrize("parts", [[], ["--save-parts", "parts"]])
def test_bad_input(model, name, parts, capsys):
    if name.startswith("cut"):
        save(name)
        os.truncate(name, os.path.getsize(name) * 6 // 10)
    elif name in ("empty.png", "text.jpg"):
        Path(name).write_text(name[5:-4])
    before = files()
    assert run(name, "out.png", *parts) == 2
    assert re.fullmatch(f"error: .*{re.escape(name)}.*\n", capsys.readouterr().err)
    assert files() == before and not os.path.exists("parts")
    assert "denoise" not in [call[0] for call in model.calls]


@pytest.mark.parametrize("argv", [
    *(["in.png", out] for out in ("file/a.png", "in.png/a.png", "in", "folder.png", "a.gif", "a")),
    ["in.png", "x" * 252 + ".png"], ["in", "file"], ["in", "out", "--save-parts", "file/parts"]])
def test_bad_output_is_refused_before_the_work(model, argv, capsys):
    save("in.png", "in/a.png")
    os.makedirs("folder.png")
    Path("file").touch()
    before = files()
    assert run(*argv) == 2
    assert re.fullmatch("error: cannot [^\n]*\n", capsys.readouterr().err) and files() == before
    assert "denoise" not in [call[0] for call in model.calls]


def test_failure_of_the_model_is_said_once(model, monkeypatch, capsys):
    monkeypatch.setattr(model, "denoise", Mock(side_effect=denoise.InputError("there is no controller")))
    save("in/a.png", "in/b.png")
    assert run("in", "out") == 2
    assert capsys.readouterr().err == "error: there is no controller\n" and files("out") == []


def any_picture(generator):
    """A picture file of a random kind, size and format -> (extension, bytes)."""
    sizes = [(20, 30), (1, 1), (1, 500), (700, 3), (40, 40), (1, 5000), (5000, 1), (10, 40_000)]
    height, width = sizes[generator.integers(len(sizes))]
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
    kind, extension = ((*KINDS, *KINDS)[generator.integers(4):][i] for i in (0, generator.random() < 0.1))
    mode = ["RGB", "L", "1", "P", "RGBA", "I;16", "CMYK", "F", "animated", "deep"][generator.integers(10)]
    deep = generator.integers(0, 65536, (height, width, 3), np.uint16)
    rows = np.pad(deep.view(np.uint8).reshape(height, -1), ((0, 0), (1, 0))).tobytes()
    try:
        if mode == "deep":
            data = tiff(deep, photometric="rgb") if kind == "TIFF" else png(width, height, 16, 2, rows)
        elif mode == "animated":
            data = encoded(kind, image, save_all=True, append_images=[image.rotate(180)])
        else:
            image = image.convert("L") if mode == "I;16" else image
            data = encoded(kind, image.convert(mode), transparency=3 if mode == "P" else None)
    except (OSError, LookupError, ValueError, RuntimeError):  # the format does not know this mode or size
        data = encoded(kind, image.crop((0, 0, min(width, 16383), height)))
    return {"JPEG": ".jpg", "TIFF": ".tif"}.get(extension, f".{extension.lower()}"), bytearray(data)


@pytest.mark.parametrize("seed", range(int(os.environ.get("RNG_FUZZ", 200))))
def test_fuzz_result_or_one_sentence(seed, capsys):
    """Whole, cut, with flipped bits, mis-named: a result, or one sentence and no file."""
    generator = np.random.default_rng(seed)
    extension, content = any_picture(generator)
    damage = generator.integers(4)
    most = min(len(content), generator.choice([100, 10 ** 6]))
    for place in generator.integers(0, most, generator.integers(1, 5) if damage in (1, 3) else 0):
        content[place] ^= 1 << generator.integers(8)
    if damage in (2, 3):
        content = content[:generator.integers(len(content))]
    Path(f"in{extension}").write_bytes(content)
    code = run(f"in{extension}", "out.png")
    err = capsys.readouterr().err
    if code == 0:
        assert "error" not in err and files() == sorted([f"in{extension}", "out.png"])
        read_picture("out.png")
    else:
        assert code == 2 and re.fullmatch("error: [^\n]*\n", err) and files() == [f"in{extension}"]


@pytest.mark.parametrize("width, height", [(20_000, 20_000), (2 ** 31 - 1, 2 ** 31 - 1), (100_001, 1_000)])
def test_a_decompression_bomb_is_refused_unopened(width, height, capsys):
    Path("bomb.png").write_bytes(png(width, height, 8, 2, bytes(1000)))
    assert run("bomb.png", "out.png") == 2
    assert re.fullmatch("error: [^\n]*\n", capsys.readouterr().err) and files() == ["bomb.png"]


# As a process, r alone

def start(**options):
    command = [sys.executable, denoise.__file__, "in", "out", "--steps", "0", "--device", "cpu"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_extreme_pictures_take_less_than_2_gb():
    """On a folder: 100 megapixels that the file does not hold, and a strip of 40,000 x 10."""
    os.makedirs("in")
    Path("in/hollow.png").write_bytes(png(10_000, 9_999, 8, 2, bytes(1000)))
    Path("in/strip.png").write_bytes(png(40_000, 10, 8, 2, bytes(10 * 120_001)))
    with start() as process:
        err = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 2 and re.fullmatch("error: [^\n]*hollow.png[^\n]*\n", err)
    assert files("out") == ["strip.png"] and Image.open("out/strip.png").size == (40_000, 10)
    assert usage.ru_maxrss < 2 * 2 ** 20  # in kilobytes


def test_a_closed_pipe_and_an_output_of_ascii_alone():
    save("in/a\u00e9.png", os.fsdecode(b"in/b\xe9.png"), *(f"in/c{number}.png" for number in range(5)))
    with start(env={**os.environ, "PYTHONIOENCODING": "ascii"}) as process:
        assert process.stdout.readline().startswith(r"a\xe9.png: 30 x 20")
        assert process.stdout.readline().startswith("b?.png: 30 x 20")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_second_ctrl_c_says_nothing_more():
    save(*(f"in/{number}.png" for number in range(50)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
    with start() as process:
        process.stdout.readline()
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.stderr.read() == "stopped\n"
    assert process.returncode == 130
