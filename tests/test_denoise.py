"""denoise.py from the command line to the files, with a quick stand-in for the networks."""

import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image
from skimage.filters import gaussian

import denoise
from rng.images import Picture, read_picture, write_picture
from rng.pipeline import Parts
from rng.tiling import STRIDE


class BlurringRnG:
    """Takes RnG's place: blurs, and writes down how it was called."""

    calls = []

    @classmethod
    def load(cls, *args, **options):
        cls.calls.append(("load", args, options))
        return cls()

    def denoise(self, image, progress=None, parts=False, **options):
        self.calls.append(("denoise", (image,), options))
        if progress:
            progress(0.5)
            progress(1.0)
        recon = self.blur(image)
        residual = np.linspace(-0.2, 0.2, image.size).reshape(image.shape).astype(np.float16)
        steps = np.add.outer(*(10 * np.arange(max(1, -(-(size - 32) // STRIDE))) for size in image.shape[:2]))
        return Parts(255 - recon, recon, residual, steps)

    @staticmethod
    def blur(image):
        return gaussian(image, 1, preserve_range=True, channel_axis=2).round().astype(image.dtype)


@pytest.fixture(autouse=True)
def model(monkeypatch, tmp_path):
    monkeypatch.setattr(BlurringRnG, "calls", [])
    monkeypatch.setattr(denoise, "RnG", BlurringRnG)
    monkeypatch.chdir(tmp_path)
    return BlurringRnG


def noise(seed=0, height=20, width=30, channels=3, dtype=np.uint8):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top + 1, (height, width, channels)).astype(dtype)


def save(path, seed=0, **options):
    Image.fromarray(noise(seed)).save(path, **options)
    return noise(seed)


def run(*argv):
    return denoise.main([str(word) for word in argv])


def files(folder="."):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if not path.is_dir())


# Files in and out

@pytest.mark.parametrize("extension", [".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".PNG"])
def test_writes_what_the_model_returns(model, extension, capsys):
    image = save("in.png")
    assert run("in.png", f"out{extension}") == 0
    expected = 255 - model.blur(image)
    result = read_picture(f"out{extension}").pixels.astype(int)
    assert np.abs(result - expected).max() <= (20 if "jp" in extension else 0)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"in.png: 30 x 20, 0.0 steps, \d+\.\d s\n", out) and err == ""
    assert files() == sorted(["in.png", f"out{extension}"])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("alpha", [False, True])
def test_kind_of_picture_is_kept(dtype, grey, alpha):
    pixels = noise(1, dtype=dtype)
    if grey:
        pixels[...] = pixels[..., :1]
    plane = noise(2, dtype=dtype)[..., 0] if alpha else None
    write_picture("in.tif", pixels, Picture(pixels, grey, plane))
    assert run("in.tif", "out.tif") == 0
    result = read_picture("out.tif")
    assert result.grey == grey and result.pixels.dtype == dtype
    assert np.array_equal(result.alpha, plane) if alpha else result.alpha is None


def test_orientation_is_applied_once(model):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = save("in.png", exif=exif)
    assert run("in.png", "out.png") == 0
    assert np.array_equal(np.asarray(Image.open("out.png")), 255 - model.blur(np.rot90(image, -1)))
    assert Image.open("out.png").getexif().get(ExifTags.Base.Orientation, 1) == 1


def test_notes_are_told(capsys):
    Image.fromarray(noise()).quantize(8).save("in.png", transparency=1)
    assert run("in.png", "out.jpg") == 0
    notes = capsys.readouterr().err.splitlines()
    assert [line.split(":")[:2] for line in notes] == [["note", " in.png"]] * 2
    assert "palette" in notes[0] and "alpha" in notes[1]


def test_existing_output_is_replaced(model):
    image = save("in.png")
    save("out.png", seed=5)
    assert run("in.png", "out.png") == 0
    assert np.array_equal(read_picture("out.png").pixels, 255 - model.blur(image))


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_output_equal_to_input_needs_overwrite(model, link, capsys):
    image = save("in.png")
    out = "./in.png"
    if link:
        os.makedirs("elsewhere")
        link(os.path.abspath("in.png"), out := "elsewhere/out.png")
    before = files()
    assert run("in.png", out) == 2
    assert re.fullmatch("error: .*--overwrite.*\n", capsys.readouterr().err)
    assert np.array_equal(read_picture("in.png").pixels, image) and model.calls == []

    assert run("in.png", out, "--overwrite") == 0
    assert np.array_equal(read_picture(out).pixels, 255 - model.blur(image)) and files() == before
    assert os.path.islink(out) == (link is os.symlink)


# Options

def test_options_reach_the_model(model):
    save("in.png")
    assert run("in.png", "out.png") == 0
    assert run("in.png", "out.png", "--steps", 30, "--detail", 0.5, "--seed", 7, "--model", "runs/rng",
               "--device", "cpu", "--precision", "float32", "--batch", 3) == 0
    (_, *first_load), (_, _, first), (_, *second_load), (_, _, second) = model.calls
    assert first_load == [("default",), {"device": "auto", "precision": "auto"}]
    assert first == {"steps": "auto", "seed": 0, "detail": 1.0, "batch": None}
    assert second_load == [("runs/rng",), {"device": "cpu", "precision": "float32"}]
    assert second == {"steps": 30, "seed": 7, "detail": 0.5, "batch": 3}


@pytest.mark.parametrize("options", [
    ["--steps", "-1"], ["--steps", "2001"], ["--steps", "many"], ["--steps", "1.5"], ["--steps", ""],
    ["--detail", "-0.1"], ["--detail", "2.1"], ["--detail", "nan"], ["--detail", "inf"], ["--seed", "-1"],
    ["--batch", "0"], ["--batch", "-4"]])
def test_option_out_of_range(options, capsys):
    save("in.png")
    assert run("in.png", "out.png", *options) == 2
    assert re.fullmatch(f"error: {options[0]} .*\n", capsys.readouterr().err) and files() == ["in.png"]


def test_ends_of_the_ranges(model):
    save("in.png")
    for steps, detail in ((0, 0), (2000, 2)):
        assert run("in.png", "out.png", "--steps", steps, "--detail", detail) == 0
        assert (model.calls[-1][2]["steps"], model.calls[-1][2]["detail"]) == (steps, detail)


# Folders

def test_folder(model, capsys):
    os.makedirs("in/deeper")
    images = {name: save(f"in/{name}", seed) for seed, name in enumerate(["b.png", "a.tif", "a.png"])}
    images["c.WEBP"] = save("in/c.WEBP", lossless=True)
    save("in/deeper/d.png")
    save("in/.hidden.png")
    for name, content in (("bad.jpg", b"not a picture"), ("empty.png", b""), ("notes.txt", b"text")):
        with open(f"in/{name}", "wb") as file:
            file.write(content)

    assert run("in", "new/out") == 2
    assert files("new/out") == sorted(images)
    for name, image in images.items():
        assert np.array_equal(read_picture(f"new/out/{name}").pixels, 255 - model.blur(image))
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == sorted(images)
    assert len(err.splitlines()) == 2
    assert re.fullmatch("error: .*bad.jpg.*\nerror: .*empty.png.*\n", err)
    assert [call[0] for call in model.calls] == ["load"] + ["denoise"] * 4


def test_folder_with_parts_of_equal_stems():
    os.makedirs("in")
    for name in ("a.png", "a.tif", "b.png"):
        save(f"in/{name}")
    assert run("in", "out", "--save-parts", "parts") == 0
    assert files("parts") == sorted(f"{name}_{part}.png" for name in ("a.png", "a.tif", "b")
                                    for part in ("recon", "residual", "steps"))


def test_folder_onto_itself_needs_overwrite(model, capsys):
    os.makedirs("in")
    image = save("in/a.png")
    os.symlink("in", "same")
    for out in ("in", "same"):
        assert run("in", out) == 2
        assert "--overwrite" in capsys.readouterr().err
    assert np.array_equal(read_picture("in/a.png").pixels, image)
    assert run("in", "same", "--overwrite") == 0
    assert np.array_equal(read_picture("in/a.png").pixels, 255 - model.blur(image))


def test_a_part_never_replaces_an_input_or_a_result(capsys):
    os.makedirs("in")
    for name in ("a.png", "a_recon.png"):
        save(f"in/{name}")
    before = files()
    for parts in ("in", "out"):
        assert run("in", "out", "--save-parts", parts) == 2
        assert re.fullmatch("error: .*\n", capsys.readouterr().err) and files() == before


def test_a_folder_resumes_where_it_was_stopped(model, capsys):
    """Neither doing a picture again nor leaving one out, whichever files a kill left unwritten."""
    os.makedirs("in")
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        save(f"in/{name}", seed)
    assert run("in", "out", "--save-parts", "parts") == 0
    before = {path: os.stat(path).st_mtime_ns for path in ("out/a.png", "out/b.png", "out/c.png")}
    os.remove("out/b.png")
    os.remove("parts/c_steps.png")
    model.calls.clear()
    assert run("in", "out", "--save-parts", "parts", "--resume") == 0
    assert [call[0] for call in model.calls] == ["load", "denoise", "denoise"]
    assert os.stat("out/a.png").st_mtime_ns == before["out/a.png"]
    assert files("out") == ["a.png", "b.png", "c.png"] and len(files("parts")) == 9
    assert run("in", "in", "--resume", "--overwrite") == 2 and "one of them" in capsys.readouterr().err


def test_a_name_that_is_not_utf_8_does_not_stop_a_folder(capsys):
    os.makedirs("in")
    names = [os.fsdecode(b"caf\xe9.png"), "other.png"]
    for name in names:
        save(f"in/{name}")
    assert run("in", "out") == 0 and files("out") == sorted(names)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["caf?.png", "other.png"]


def test_empty_folder(capsys):
    os.makedirs("in")
    assert run("in", "out") == 2
    assert re.fullmatch("error: in holds no picture.*\n", capsys.readouterr().err) and not os.path.exists("out")


# Parts and progress

def test_parts(model):
    image = save("in.png")
    assert run("in.png", "out.png", "--save-parts", "new/parts") == 0
    assert files("new/parts") == ["in_recon.png", "in_residual.png", "in_steps.png"]
    assert np.array_equal(read_picture("new/parts/in_recon.png").pixels, model.blur(image))
    residual = np.linspace(-0.2, 0.2, image.size).reshape(image.shape).astype(np.float16).astype(np.float64)
    expected = np.rint(255 * np.clip(0.5 + 4 * residual, 0, 1))
    assert np.abs(read_picture("new/parts/in_residual.png").pixels - expected).max() <= 1
    assert read_picture("new/parts/in_steps.png").pixels.shape == image.shape


@pytest.mark.parametrize("height, width", [(1, 1), (256, 256), (257, 256), (300, 700), (480, 481), (300, 1000)])
def test_step_map(height, width):
    rows, cols = (max(1, -(-(size - 32) // STRIDE)) for size in (height, width))
    steps = np.random.default_rng(height).integers(0, 11, (rows, cols)) * 10
    picture = denoise.steps_picture(steps, height, width)
    assert picture.shape == (height, width, 3)
    for (row, col), count in np.ndenumerate(steps):     # patch i starts at 224 i; half of each overlap belongs to it
        top, left = (224 * row + 16 if row else 0), (224 * col + 16 if col else 0)
        bottom = height if row == rows - 1 else 224 * row + 240
        right = width if col == cols - 1 else 224 * col + 240
        block = picture[top:bottom, left:right]
        edge = np.concatenate([block[0], block[-1], block[:, 0], block[:, -1]])
        assert (edge == round(2.55 * count)).all()
        assert min(block.shape[:2]) < 50 or len(np.unique(block)) > 2       # the number


def test_more_than_100_steps_are_white():
    assert denoise.steps_picture(np.array([[2000]]), 256, 256)[0, 0].tolist() == [255] * 3


def test_progress_on_a_terminal_only(monkeypatch, capsys):
    save("in.png")
    run("in.png", "out.png")
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run("in.png", "out.png")
    assert re.fullmatch(r"\rin.png: 50 %, \d+ s left\033\[K\r\033\[K", terminal.getvalue())


# Bad input

def cut(name, share):
    data = open(name, "rb").read()
    with open(name, "wb") as file:
        file.write(data[:int(share * len(data))])


@pytest.mark.parametrize("name", ["missing.png", "empty.png", "text.jpg", "cut.png", "cut.jpg", "cut.tif", "cut.webp",
                                  "x" * 300 + ".png"])
@pytest.mark.parametrize("parts", [False, True])
def test_bad_input(model, name, parts, capsys):
    if name.startswith("cut"):
        save(name)
        cut(name, 0.6)
    elif name in ("empty.png", "text.jpg"):
        with open(name, "w") as file:
            file.write("" if name == "empty.png" else "no picture")
    before = files()
    assert run(name, "out.png", *(["--save-parts", "parts"] if parts else [])) == 2
    assert re.fullmatch(f"error: .*{re.escape(name)}.*\n", capsys.readouterr().err)
    assert files() == before and not os.path.exists("parts")
    assert "denoise" not in [call[0] for call in model.calls]


@pytest.mark.parametrize("out", ["missing/out.png", "file/out.png", "in.png/out.png", "folder", "folder.png", "out.gif",
                                 "out"])
def test_bad_output_is_refused_before_the_work(model, out, capsys):
    save("in.png")
    os.makedirs("folder")
    os.makedirs("folder.png")
    open("file", "w").close()
    before = files()
    assert run("in.png", out) == 2
    assert re.fullmatch(f"error: cannot write {out}.*\n", capsys.readouterr().err) and files() == before
    assert "denoise" not in [call[0] for call in model.calls]


@pytest.mark.parametrize("option", [False, True])
def test_bad_output_folder(option, capsys):
    os.makedirs("in")
    save("in/a.png")
    open("file", "w").close()
    before = files()
    assert run(*(["in", "out", "--save-parts", "file/parts"] if option else ["in", "file"])) == 2
    assert re.fullmatch("error: .*file.*\n", capsys.readouterr().err) and files() == before


def test_failure_of_the_model_is_said_once(model, monkeypatch, capsys):
    def fail(self, image, **options):
        raise denoise.InputError("this model has no controller")

    monkeypatch.setattr(model, "denoise", fail)
    os.makedirs("in")
    for name in ("a.png", "b.png"):
        save(f"in/{name}")
    assert run("in", "out") == 2
    assert capsys.readouterr().err == "error: this model has no controller\n" and files("out") == []


def png(width, height, depth, rows):
    """An RGB PNG file; rows: its uncompressed data, each row after a zero byte."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def any_picture(generator):
    """A picture file of a random kind, size and format -> (extension, bytes)."""
    sizes = [(20, 30), (1, 1), (1, 500), (700, 3), (40, 40), (1, 5000), (5000, 1), (10, 40_000)]
    height, width = sizes[generator.integers(len(sizes))]
    grey = generator.integers(0, 256, (height, width), np.uint8)
    colour = generator.integers(0, 256, (height, width, 3), np.uint8)
    kinds = {
        "RGB": [Image.fromarray(colour)], "grey": [Image.fromarray(grey)],
        "1 bit": [Image.fromarray(grey).convert("1")],
        "palette": [Image.fromarray(colour).convert("P")],
        "RGBA": [Image.fromarray(np.dstack([colour, grey]))],
        "16 bit": [Image.fromarray(grey.astype(np.uint16) * 257)],
        "CMYK": [Image.fromarray(colour).convert("CMYK")],
        "float": [Image.fromarray(np.where(grey > 9, grey / 255, np.nan).astype(np.float32))],
        "animated": [Image.fromarray(colour), Image.fromarray(255 - colour)],
        "16-bit colour": [],
    }
    first, *rest = kinds[list(kinds)[generator.integers(len(kinds))]] or [None]
    extension, kind = [(".png", "PNG"), (".jpg", "JPEG"), (".tif", "TIFF"), (".webp", "WEBP")][generator.integers(4)]
    if first is None:
        deep = generator.integers(0, 65536, (height, width, 3), np.uint16)
        if kind == "TIFF":
            tifffile.imwrite(file := io.BytesIO(), deep, photometric="rgb")
            return extension, bytearray(file.getvalue())
        rows = np.pad(deep.astype(">u2").view(np.uint8).reshape(height, -1), ((0, 0), (1, 0)))
        return ".png", bytearray(png(width, height, 16, rows.tobytes()))
    options = {"save_all": True, "append_images": rest} if rest and kind != "JPEG" else {}
    if first.mode == "P" and kind == "PNG":
        options["transparency"] = 3
    file = io.BytesIO()
    try:
        first.save(file, kind, **options)
    except (OSError, ValueError, RuntimeError):  # this format does not know this kind, or this size
        first.convert("RGB").crop((0, 0, min(width, 16383), height)).save(file, kind)
    if generator.random() < 0.1:
        extension = [".png", ".jpg", ".tif", ".webp"][generator.integers(4)]
    return extension, bytearray(file.getvalue())


@pytest.mark.parametrize("seed", range(int(os.environ.get("RNG_FUZZ", 200))))
def test_fuzz_result_or_one_sentence(seed, capsys):
    """Whole, cut, with flipped bits, mis-named: a result, or one sentence and no file."""
    generator = np.random.default_rng(seed)
    extension, content = any_picture(generator)
    damage = generator.integers(4)
    if damage in (1, 3):
        for place in generator.integers(0, min(len(content), generator.choice([100, 10 ** 6])), generator.integers(1, 5)):
            content[place] ^= 1 << generator.integers(8)
    if damage in (2, 3):
        content = content[:generator.integers(len(content))]
    with open(f"in{extension}", "wb") as file:
        file.write(content)
    code = run(f"in{extension}", "out.png")
    err = capsys.readouterr().err
    if code == 0:
        assert "error" not in err and files() == sorted([f"in{extension}", "out.png"])
        read_picture("out.png")
    else:
        assert code == 2 and re.fullmatch("error: [^\n]*\n", err) and files() == [f"in{extension}"]


@pytest.mark.parametrize("width, height", [(20_000, 20_000), (2 ** 31 - 1, 2 ** 31 - 1), (100_001, 1_000)])
def test_a_decompression_bomb_is_refused_unopened(width, height, capsys):
    """A few bytes that claim hundreds of megapixels."""
    Path("bomb.png").write_bytes(png(width, height, 8, bytes(1000)))
    assert run("bomb.png", "out.png") == 2
    assert re.fullmatch("error: [^\n]*\n", capsys.readouterr().err) and files() == ["bomb.png"]


def test_extreme_pictures_take_less_than_2_gb():
    """r alone on a folder: 100 megapixels that the file does not hold, and a strip of 40,000 x 10."""
    os.makedirs("in")
    Path("in/hollow.png").write_bytes(png(10_000, 9_999, 8, bytes(1000)))
    Path("in/strip.png").write_bytes(png(40_000, 10, 8, bytes(10 * 120_001)))
    process = subprocess.Popen([sys.executable, denoise.__file__, "in", "out", "--steps", "0", "--device", "cpu"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    err = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    assert process.returncode == 2 and re.fullmatch("error: [^\n]*hollow.png[^\n]*\n", err)
    assert files("out") == ["strip.png"] and Image.open("out/strip.png").size == (40_000, 10)
    assert usage.ru_maxrss < 2 * 2 ** 20  # in kilobytes
