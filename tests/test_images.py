"""Picture files: every kind comes back as it went in, and every bad one is refused in a sentence."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms

from rng import images
from rng.errors import InputError
from rng.images import Picture, read_picture, read_rgb, to_8_bit, write_picture

TRANSPOSE = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_90}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = SRGB[:16] + b"GRAY" + SRGB[20:]
CMYK_PROFILE = SRGB[:16] + b"CMYK" + SRGB[20:]


def pixels_of(seed, dtype=np.uint8, channels=3, height=None, width=None):
    generator = np.random.default_rng(seed)
    shape = (height or generator.integers(1, 40), width or generator.integers(1, 40), channels)
    return generator.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def smooth(channels=3, height=40, width=50):
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width))
    return np.stack([ramp + 20 * c for c in range(channels)], 2).astype(np.uint8)


def exif_bytes(orientation=1):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "RnG"
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: "2020:01:02 03:04:05", ExifTags.Base.ExposureTime: 0.01,
                               ExifTags.IFD.Interop: {1: "R98"}}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (1.0, 2.0, 3.0)}
    return exif.tobytes()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour_type, rows=b"", extra=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


def encoded(format, image=None, **options):
    file = io.BytesIO()
    (image or Image.fromarray(smooth())).save(file, format, **options)
    return file.getvalue()


def encoded_tiff16(**options):
    file = io.BytesIO()
    tifffile.imwrite(file, smooth().astype(np.uint16) * 257, photometric="rgb", **options)
    return file.getvalue()


# Round trips

@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("extension", images.EXTENSIONS)
def test_round_trip(tmp_path, extension, dtype, grey, alpha):
    kind = images.EXTENSIONS[extension]
    keeps_16 = kind == "TIFF" or (kind == "PNG" and grey and not alpha)
    for seed in range(4):
        path = tmp_path / f"{seed}{extension}"
        pixels = pixels_of(seed, dtype)
        if kind == "JPEG":
            pixels = smooth() if dtype is np.uint8 else smooth() * np.uint16(257)
        if grey:
            pixels[...] = pixels[..., :1]
        plane = pixels_of(seed + 100, dtype, 1, *pixels.shape[:2])[..., 0] if alpha else None
        notes = write_picture(path, pixels, Picture(pixels, grey, plane))
        back = read_picture(path)

        assert back.notes == ()
        assert any("8 bit" in note for note in notes) == (dtype is np.uint16 and not keeps_16)
        assert any("alpha" in note for note in notes) == (alpha and kind == "JPEG")
        assert back.pixels.dtype == (dtype if keeps_16 else np.uint8)
        assert back.pixels.flags.c_contiguous and back.pixels.flags.writeable
        expected = pixels if keeps_16 else to_8_bit(pixels)
        if kind == "JPEG":
            assert np.abs(back.pixels.astype(int) - expected).mean() < 1
        else:
            assert np.array_equal(back.pixels, expected)
        assert back.grey == (grey and kind != "WEBP")
        if alpha and kind == "WEBP" and (to_8_bit(plane) == 255).all():
            assert back.alpha is None               # libwebp drops an opaque alpha channel
        elif alpha and kind != "JPEG":
            assert np.array_equal(back.alpha, plane if keeps_16 else to_8_bit(plane))
        else:
            assert back.alpha is None
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_is_the_rounded_mean(tmp_path, dtype):
    pixels = pixels_of(0, dtype)
    write_picture(tmp_path / "a.tif", pixels, Picture(pixels, grey=True))
    expected = np.rint(pixels.astype(np.float64).mean(2)).astype(dtype)
    assert np.array_equal(read_picture(tmp_path / "a.tif").pixels, np.dstack([expected] * 3))


def test_to_8_bit_takes_the_nearest_level():
    levels = np.arange(256, dtype=np.uint16)
    assert np.array_equal(to_8_bit(levels * 257), levels)
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(to_8_bit(every), np.rint(every / 257).astype(np.uint8))
    assert to_8_bit(np.uint8([7])) == 7


def test_read_rgb(tmp_path):
    pixels = pixels_of(3, np.uint16)
    write_picture(tmp_path / "a.tif", pixels)
    assert np.array_equal(read_rgb(tmp_path / "a.tif"), to_8_bit(pixels))
    write_picture(tmp_path / "a.png", pixels[..., :1].repeat(3, 2), Picture(pixels, grey=True, exif=exif_bytes()))
    assert read_rgb(tmp_path / "a.png").shape == pixels.shape


# EXIF and colour profile

def with_exif(path, kind, exif, orientation):
    """Writes a picture that is stored lying; returns its stored pixels."""
    pixels = smooth(height=16, width=24)
    if kind == "TIFF16":
        pixels = pixels.astype(np.uint16) * 257
        tifffile.imwrite(path, pixels, photometric="rgb",
                         extratags=[(274, 3, 1, orientation, True), (271, 2, 0, "RnG", True)])
    elif kind == "PNG16":
        pixels = pixels[..., :1].repeat(3, 2).astype(np.uint16) * 257
        Image.fromarray(pixels[..., 0]).save(path, exif=exif)
    else:
        Image.fromarray(pixels).save(path, kind, exif=exif, **{"WEBP": {"lossless": True}}.get(kind, {}))
        if kind == "JPEG":
            pixels = np.asarray(Image.open(path))
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind, extension", [("PNG", ".png"), ("JPEG", ".jpg"), ("TIFF", ".tif"), ("WEBP", ".webp"),
                                             ("PNG16", ".png"), ("TIFF16", ".tif")])
def test_orientation_is_applied_and_reset(tmp_path, kind, extension, orientation):
    source, result = tmp_path / f"a{extension}", tmp_path / "b.png"
    stored = with_exif(source, kind, exif_bytes(orientation), orientation)
    picture = read_picture(source)
    method = TRANSPOSE.get(orientation)
    for c in range(3):
        lying = Image.fromarray(stored[..., c])
        assert np.array_equal(picture.pixels[..., c], lying if method is None else lying.transpose(method))

    write_picture(result, picture.pixels, picture)
    exif = Image.open(result).getexif()
    assert exif[ExifTags.Base.Orientation] == 1 and exif[ExifTags.Base.Make] == "RnG"
    assert np.array_equal(read_picture(result).pixels, picture.pixels if kind == "PNG16" else to_8_bit(picture.pixels))


@pytest.mark.parametrize("target", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("source", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_travels(tmp_path, source, target):
    (tmp_path / "a").write_bytes(encoded(source, exif=exif_bytes(6)))
    picture = read_picture(tmp_path / "a")
    assert write_picture(tmp_path / f"b{target}", picture.pixels, picture) == []
    with Image.open(tmp_path / f"b{target}") as image:
        exif = image.getexif()
        assert exif[ExifTags.Base.Orientation] == 1 and exif[ExifTags.Base.Make] == "RnG"
        group = exif.get_ifd(ExifTags.IFD.Exif)
        assert group[ExifTags.Base.DateTimeOriginal] == "2020:01:02 03:04:05"
        assert float(group[ExifTags.Base.ExposureTime]) == pytest.approx(0.01)
        assert ExifTags.IFD.Interop not in group        # an offset that would lead nowhere
        assert tuple(map(float, exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude])) == (1, 2, 3)


def test_alpha_turns_with_the_picture(tmp_path):
    pixels = pixels_of(1, channels=4)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif_bytes(8))
    assert np.array_equal(read_picture(tmp_path / "a.png").alpha, np.rot90(pixels[..., 3]))


def test_exif_that_does_not_fit_is_left_out_with_a_word(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "x" * 70000
    picture = Picture(smooth(), exif=exif.tobytes())
    assert any("EXIF" in note for note in write_picture(tmp_path / "a.jpg", picture.pixels, picture))
    assert any("EXIF" in note for note in write_picture(tmp_path / "a.tif", picture.pixels.astype(np.uint16), picture))
    assert all(b"xxx" not in (tmp_path / name).read_bytes() for name in ("a.jpg", "a.tif"))


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40))
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.pixels.shape == (40, 50, 3) and picture.exif == b""


@pytest.mark.parametrize("extension", images.EXTENSIONS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colour_profile_is_kept(tmp_path, dtype, extension):
    for grey, profile in ((False, SRGB), (True, GREY_PROFILE)):
        pixels = smooth()[..., :1].repeat(3, 2).astype(dtype)
        write_picture(tmp_path / f"a{extension}", pixels, Picture(pixels, grey, icc=profile))
        kept = None if grey and extension == ".webp" else profile       # WebP turns grey into RGB
        with Image.open(tmp_path / f"a{extension}") as image:
            assert image.info.get("icc_profile") == kept
        assert read_picture(tmp_path / f"a{extension}").icc == (kept or b"")


def test_profile_of_another_colour_space_is_left_out(tmp_path):
    for mode, profile in (("RGB", CMYK_PROFILE), ("RGB", GREY_PROFILE), ("L", SRGB), ("CMYK", CMYK_PROFILE)):
        Image.fromarray(smooth()).convert(mode).save(tmp_path / "a.jpg", icc_profile=profile)
        assert read_picture(tmp_path / "a.jpg").icc == b""


# Modes that are converted

def test_palette(tmp_path):
    image = Image.fromarray(smooth()).quantize(16)
    image.save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert "palette" in picture.notes[0] and not picture.grey and picture.alpha is None
    assert np.array_equal(picture.pixels, image.convert("RGB"))

    image.save(tmp_path / "a.png", transparency=3)
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.alpha, np.where(np.asarray(image) == 3, 0, 255))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(tmp_path, kind):
    Image.fromarray(smooth()).convert("CMYK").save(tmp_path / "a", kind)
    picture = read_picture(tmp_path / "a")
    assert "CMYK" in picture.notes[0]
    assert np.abs(picture.pixels.astype(int) - smooth()).mean() < 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_one_bit(tmp_path, kind):
    bits = pixels_of(5)[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "a", kind)
    picture = read_picture(tmp_path / "a")
    assert picture.grey and np.array_equal(picture.pixels[..., 1], bits * 255)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_png_of_few_bits_is_stretched(tmp_path, depth):
    row = np.arange(8) * (2 ** depth - 1) // 7
    packed = np.packbits(((row[:, None] >> np.arange(depth)[::-1]) & 1).astype(np.uint8)).tobytes()
    (tmp_path / "a.png").write_bytes(png(8, 1, depth, 0, b"\0" + packed))
    assert np.array_equal(read_picture(tmp_path / "a.png").pixels[0, :, 0], row * 255 // (2 ** depth - 1))


def test_transparent_colour_becomes_alpha(tmp_path):
    pixels = pixels_of(6)
    for planes, colour in ((pixels[..., 0], int(pixels[0, 0, 0])), (pixels, tuple(map(int, pixels[0, 0])))):
        Image.fromarray(planes).save(tmp_path / "a.png", transparency=colour)
        hit = (planes.reshape(*pixels.shape[:2], -1) == planes[0, 0]).all(2)
        assert np.array_equal(read_picture(tmp_path / "a.png").alpha, np.where(hit, 0, 255))


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_16_bit_png(tmp_path, colour_type, channels):
    pixels = pixels_of(7, np.uint16, channels)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    (tmp_path / "a.png").write_bytes(png(pixels.shape[1], pixels.shape[0], 16, colour_type, rows))
    picture = read_picture(tmp_path / "a.png")
    if channels == 1:
        assert picture.notes == () and np.array_equal(picture.pixels, pixels.repeat(3, 2))
    else:
        assert "8 bit" in picture.notes[0]
        assert np.abs(picture.pixels[..., 0].astype(int) - (pixels[..., 0] >> 8)).max() <= 1


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("compression", [None, "zlib", "packbits"])
def test_16_bit_tiff_of_either_byte_order(tmp_path, byteorder, compression):
    for photometric, channels in (("rgb", 3), ("minisblack", 1), ("miniswhite", 1)):
        pixels = pixels_of(8, np.uint16, channels)
        if compression == "packbits":
            Image.fromarray(pixels[..., 0]).save(tmp_path / "a.tif", compression="packbits")
            pixels, photometric = pixels[..., :1], "minisblack"
        else:
            tifffile.imwrite(tmp_path / "a.tif", pixels.squeeze(), photometric=photometric, byteorder=byteorder,
                             compression=compression, predictor=bool(compression))
        expected = 65535 - pixels if photometric == "miniswhite" else pixels
        picture = read_picture(tmp_path / "a.tif")
        assert picture.pixels.dtype == np.uint16
        assert np.array_equal(picture.pixels, np.broadcast_to(expected, picture.pixels.shape))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_only_the_first_frame(tmp_path, kind):
    first, second = Image.fromarray(smooth()), Image.fromarray(255 - smooth())
    lossless = {"lossless": True} if kind == "WEBP" else {}
    first.save(tmp_path / "a", kind, save_all=True, append_images=[second], **lossless)
    picture = read_picture(tmp_path / "a")
    assert "first" in picture.notes[0] and np.array_equal(picture.pixels, smooth())


def test_only_the_first_page_of_a_16_bit_tiff(tmp_path):
    pages = np.stack([pixels_of(seed, np.uint16, height=9, width=9) for seed in range(2)])
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="rgb")
    picture = read_picture(tmp_path / "a.tif")
    assert "first" in picture.notes[0] and np.array_equal(picture.pixels, pages[0])


# Bad input

@pytest.mark.parametrize("array, options", [
    (np.zeros((9, 9), np.float32), {}),
    (np.zeros((9, 9, 3), np.float32), {"photometric": "rgb"}),
    (np.zeros((9, 9), np.int32), {}),
    (np.zeros((3, 9, 9), np.uint16), {"photometric": "rgb", "planarconfig": "separate"}),
    (np.zeros((9, 9, 4), np.uint16), {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
    (np.zeros((9, 9, 4), np.uint16), {"photometric": "separated"}),
    (np.zeros((9, 9), np.uint16), {"bigtiff": True}),
])
def test_tiff_of_other_kinds_is_refused(tmp_path, array, options):
    tifffile.imwrite(tmp_path / "a.tif", array, **options)
    with pytest.raises(InputError, match="a.tif.*save it again"):
        read_picture(tmp_path / "a.tif")


def test_16_bit_lzw_tiff_is_refused(tmp_path):
    Image.fromarray(pixels_of(0, np.uint16)[..., 0]).save(tmp_path / "a.tif", compression="tiff_lzw")
    with pytest.raises(InputError, match="a.tif.*Deflate.*not LZW"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("width, height", [(10000, 10001), (20000, 20000), (2 ** 31 - 1, 2 ** 31 - 1)])
def test_over_100_megapixels_is_refused_from_the_header(tmp_path, width, height):
    (tmp_path / "a.png").write_bytes(png(width, height, 8, 2))
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((2, 2), np.uint16), metadata=None, software=False)
    tiff = bytearray((tmp_path / "a.tif").read_bytes())
    for tag, value in ((256, width), (257, height)):
        place = tiff.index(struct.pack("<HH", tag, 4))
        struct.pack_into("<I", tiff, place + 8, value)
    (tmp_path / "a.tif").write_bytes(tiff)
    for name in ("a.png", "a.tif"):
        with warnings.catch_warnings(), pytest.raises(InputError, match=f"{name}.*100 megapixels"):
            warnings.simplefilter("error")
            read_picture(tmp_path / name)


def test_100_megapixels_pass_the_header(tmp_path):
    (tmp_path / "a.png").write_bytes(png(10000, 10000, 1, 0))
    with pytest.raises(InputError, match="damaged"):
        read_picture(tmp_path / "a.png")


BAD = {"empty": b"", "random": np.random.default_rng(0).bytes(5000), "text": b"not a picture\n" * 30,
       "signature alone": b"\x89PNG\r\n\x1a\n", "tiff signature alone": b"II*\0", "gif": encoded("GIF")}
WHOLE = {"png": encoded("PNG"), "jpeg": encoded("JPEG"), "tiff": encoded("TIFF"), "webp": encoded("WEBP"),
         "png 16": encoded("PNG", Image.fromarray(smooth()[..., 0].astype(np.uint16) * 257)),
         "tiff 16": encoded_tiff16(), "tiff 16 deflate": encoded_tiff16(compression="zlib", rowsperstrip=8)}
BAD |= {f"{name} cut to {share} %": data[:len(data) * share // 100]
        for name, data in WHOLE.items() for share in (2, 50, 80)}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_sentence(tmp_path, name):
    path = tmp_path / "bad.png"
    path.write_bytes(BAD[name])
    with pytest.raises(InputError, match="^cannot read .*bad.png: [^\n]*$"):
        read_picture(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "missing.png", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="^cannot read [^\n]*$"):
            read_picture(path)


@pytest.mark.parametrize("seed", range(60))
def test_fuzz_reads_or_refuses(tmp_path, seed, caplog, recwarn):
    generator = np.random.default_rng(seed)
    names = [*WHOLE, "exif"]
    name = names[seed % len(names)]
    data = bytearray(encoded("JPEG", exif=exif_bytes(6)) if name == "exif" else WHOLE[name])
    if generator.random() < 0.3:
        data = data[:generator.integers(len(data))]
    for place in generator.integers(0, min(len(data), generator.choice([200, 10 ** 6])), generator.integers(1, 6)):
        data[place] ^= 1 << generator.integers(8)
    (tmp_path / "a").write_bytes(data)
    try:
        picture = read_picture(tmp_path / "a")
    except InputError as error:
        assert "\n" not in str(error)
    else:
        for extension in (".png", ".jpg", ".tif"):
            write_picture(tmp_path / f"b{extension}", picture.pixels, picture)
    assert not caplog.records and not recwarn.list      # Pillow and tifffile say nothing beside the sentence


# Writing

@pytest.mark.parametrize("name, reason", [
    ("a.bmp", "end in one of .png"), ("a", "end in one of .png"), ("missing/a.png", "folder that exists"),
    ("file/a.png", "folder that exists"), ("folder.png", "name a file"), ("x" * 300 + ".png", "too long")])
def test_unwritable_path(tmp_path, name, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for call in (lambda path: write_picture(path, smooth()), images.check_writable):
        with pytest.raises(InputError, match=f"cannot write .*{reason}"):
            call(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


@pytest.mark.parametrize("extension, side", [(".webp", 16384), (".jpg", 65501)])
def test_longer_than_the_format_allows(tmp_path, extension, side):
    with pytest.raises(InputError, match="pixels a side"):
        write_picture(tmp_path / f"a{extension}", np.zeros((1, side, 3), np.uint8))
    write_picture(tmp_path / f"a{extension}", np.zeros((1, side - 1, 3), np.uint8))


def test_read_only_file_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)         # the super-user may write to any file
    with pytest.raises(InputError, match="read-only"):
        write_picture(tmp_path / "a.png", smooth())
    assert (tmp_path / "a.png").read_bytes() == b"old"


@pytest.mark.parametrize("dtype, owner, name", [(np.uint8, Image.Image, "save"), (np.uint16, tifffile, "imwrite")])
def test_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch, dtype, owner, name):
    def fail(*args, **options):
        path = next(arg for arg in args if isinstance(arg, os.PathLike))
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(owner, name, fail)
    (tmp_path / "a.tif").write_bytes(b"old")
    with pytest.raises(InputError, match="a.tif: no space left"):
        write_picture(tmp_path / "a.tif", smooth().astype(dtype))
    assert os.listdir(tmp_path) == ["a.tif"] and (tmp_path / "a.tif").read_bytes() == b"old"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "link.png").symlink_to("real.png")
    write_picture(tmp_path / "link.png", smooth())
    assert (tmp_path / "link.png").is_symlink() and np.array_equal(read_rgb(tmp_path / "real.png"), smooth())


def test_wrong_pixels_are_a_programming_error(tmp_path):
    for pixels in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ValueError, match="pixels must be"):
            write_picture(tmp_path / "a.png", pixels)
