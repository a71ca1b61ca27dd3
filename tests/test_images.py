"""Picture files: every kind comes back as it went in, and every bad one is refused in a sentence."""

import io
import os
import resource
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps, IptcImagePlugin, PngImagePlugin
from PIL.ExifTags import GPS, IFD, Base

from rng.support import images
from rng.support.errors import InputError
from rng.support.images import Picture, read_picture, read_rgb, to_8_bit, write_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE, CMYK_PROFILE = SRGB[:16] + b"GRAY" + SRGB[20:], SRGB[:16] + b"CMYK" + SRGB[20:]
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
IPTC = b"\x1c\x02\x78\0\x05Title"
KINDS = ["PNG", "JPEG", "TIFF", "WEBP"]
TARGETS = [".png", ".jpg", ".tif", ".webp", "16.tif"]       # the last for pixels of 16 bits


def pixels_of(seed, dtype=np.uint8, channels=3):
    generator = np.random.default_rng(seed)
    shape = (*generator.integers(1, 40, 2), channels)
    return generator.integers(0, np.iinfo(dtype).max, shape, endpoint=True).astype(dtype)


def smooth(height=40, width=50):
    return np.add.outer(np.add.outer(np.arange(height) * 3, np.arange(width)), [0, 20, 40]).astype(np.uint8)


def exif_of(orientation):
    exif = Image.Exif()
    exif.update({Base.Make: "RnG", Base.Orientation: orientation, IFD.GPSInfo: {
        GPS.GPSLatitude: (1.0, 2.0, 3.0), GPS.GPSAltitude: 3.5}, IFD.Exif: {
        Base.DateTimeOriginal: "2020:01:02 03:04:05", Base.ExposureTime: 0.01, Base.ExifImageWidth: 50,
        Base.ExifImageHeight: 40, IFD.Interop: {1: "R98"}}})
    return exif.tobytes()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour_type, rows=b"", extra=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(kind, image=None, **options):
    (image or Image.fromarray(smooth())).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def tiff(planes, **options):
    tifffile.imwrite(file := io.BytesIO(), planes, **options)
    return file.getvalue()


def read(tmp_path, data):
    (tmp_path / "in").write_bytes(data)
    return read_picture(tmp_path / "in")


def write(path, picture):
    pixels = picture.pixels.astype(np.uint16) if "16" in path.name else picture.pixels
    return write_picture(path, pixels, picture)


# Round trips

@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("extension", images.EXTENSIONS)
def test_round_trip(tmp_path, extension, dtype, grey, alpha):
    kind = images.EXTENSIONS[extension]
    deep = dtype is np.uint16 and (kind == "TIFF" or (kind == "PNG" and grey and not alpha))
    for seed in range(4):
        path = tmp_path / f"{seed}{extension}"
        pixels = smooth() * dtype(np.iinfo(dtype).max // 255) if kind == "JPEG" else pixels_of(seed, dtype)
        pixels = pixels[..., :1].repeat(3, 2) if grey else pixels
        plane = (255 - pixels[..., 1]) // 2 if alpha else None
        notes = write_picture(path, pixels, Picture(pixels, grey, plane))
        back = read_picture(path)

        assert back.notes == () and back.grey == (grey and kind != "WEBP")
        assert any("8 bit" in note for note in notes) == (dtype is np.uint16 and not deep)
        assert any("alpha" in note for note in notes) == (alpha and kind == "JPEG")
        assert back.pixels.dtype == (np.uint16 if deep else np.uint8)
        assert back.pixels.flags.c_contiguous and back.pixels.flags.writeable
        expected = pixels if deep else to_8_bit(pixels)
        assert np.abs(back.pixels.astype(int) - expected).mean() <= (1 if kind == "JPEG" else 0)
        expected = None if plane is None or kind == "JPEG" else plane if deep else to_8_bit(plane)
        assert np.array_equal(back.alpha, expected)
        assert np.array_equal(read_rgb(path), to_8_bit(back.pixels))
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_is_the_rounded_mean(tmp_path, channels, target):
    """What has one channel keeps one; what has three equal ones keeps three equal ones."""
    source = smooth()[..., 0] if channels == 1 else smooth()[..., :1].repeat(3, 2)
    picture = read(tmp_path, encoded("PNG", Image.fromarray(source)))
    dtype = np.uint16 if "16" in target else np.uint8
    pixels = pixels_of(0, dtype) if "jpg" not in target else smooth()
    write_picture(tmp_path / f"a{target}", pixels, picture)
    back = read_picture(tmp_path / f"a{target}")
    assert back.grey == (channels == 1 and target != ".webp") and back.pixels.dtype == dtype
    expected = np.rint(pixels.astype(np.float64).mean(2, keepdims=True))
    assert np.abs(back.pixels - expected).max() <= (2 if target == ".jpg" else 0)


def test_to_8_bit_takes_the_nearest_level():
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(to_8_bit(every), np.rint(every / 257).astype(np.uint8))
    assert to_8_bit(np.uint8([7])) == 7 and to_8_bit(np.float32([-1, 0.501, 3])).tolist() == [0, 128, 255]


# EXIF data, colour profile and the rest

@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", [*KINDS, "TIFF16"])
def test_orientation_is_applied_and_reset(tmp_path, kind, orientation):
    pixels = smooth(16, 24)
    if kind == "TIFF16":
        tags = [(274, 3, 1, orientation, True), (271, 2, 0, "RnG", True)]
        data = tiff(pixels.astype(np.uint16), photometric="rgb", extratags=tags, resolution=(300, 200))
    else:
        options = {"xmp": XMP % orientation, "dpi": (300, 200), "lossless": True}
        image = Image.fromarray(np.dstack([pixels, pixels[..., 0]]) if kind == "PNG" else pixels)
        data = encoded(kind, image, exif=exif_of(orientation), **options)
    pixels = np.asarray(Image.open(io.BytesIO(data))) if kind == "JPEG" else pixels
    picture, lying = read(tmp_path, data), Image.fromarray(pixels)
    lying.getexif()[Base.Orientation] = orientation
    assert np.array_equal(picture.pixels, ImageOps.exif_transpose(lying))
    assert kind != "PNG" or np.array_equal(picture.alpha, picture.pixels[..., 0])

    write_picture(tmp_path / "b.tif", picture.pixels, picture)
    back, image = read_picture(tmp_path / "b.tif"), Image.open(tmp_path / "b.tif")
    exif, turn = image.getexif(), 1 if orientation < 5 else -1
    assert np.array_equal(back.pixels, picture.pixels) and exif[Base.Make] == "RnG"
    assert exif[Base.Orientation] == 1 and image.info.get("xmp", XMP % 1) == XMP % 1
    if kind != "WEBP":
        assert image.info["dpi"] == pytest.approx((300, 200)[::turn], abs=0.1)
    if kind != "TIFF16":
        sides = [exif.get_ifd(IFD.Exif)[tag] for tag in (Base.ExifImageWidth, Base.ExifImageHeight)]
        assert sides == [50, 40][::turn]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", KINDS)
def test_exif_travels(tmp_path, source, target):
    """All but the altitude below the sea, which Pillow reads and does not write."""
    def below_sea(data, order):
        data = data.replace(struct.pack(order + "HH", 6, 5), struct.pack(order + "HH", 6, 10))
        return data.replace(struct.pack(order + "ii", 7, 2), struct.pack(order + "ii", -7, 2))

    data = encoded(source, exif=exif_of(6) if source == "TIFF" else below_sea(exif_of(6), ">"))
    picture = read(tmp_path, below_sea(data, "<") if source == "TIFF" else data)
    assert picture.notes == ("left out: GPSAltitude",)
    assert picture.pixels.shape == (50, 40, 3) and write(tmp_path / f"b{target}", picture) == []
    with Image.open(tmp_path / f"b{target}") as image:
        exif = image.getexif()
        group = exif.get_ifd(IFD.Exif)
        assert exif[Base.Orientation] == 1 and exif[Base.Make] == "RnG"
        assert group[Base.DateTimeOriginal][:4] == "2020" and round(group[Base.ExposureTime], 4) == 0.01
        assert IFD.Interop not in group         # an offset that would lead nowhere
        assert exif.get_ifd(IFD.GPSInfo) == {GPS.GPSLatitude: (1, 2, 3)}


def beside(path):
    """What Pillow sees in a file beside its pixels, by the names that our notes use."""
    with Image.open(path) as image:
        image.load()
        info, iptc = image.info, IptcImagePlugin.getiptcinfo(image)
        seen = {"XMP data": info.get("xmp"), "comment": info.get("comment"), "text": info.get("Title"),
                "colour chunks": info.get("gamma"), "colour profile": info.get("icc_profile"),
                "IPTC data": iptc, "resolution": [*map(round, info.get("dpi", (1, 1)))]}
    return {name: value for name, value in seen.items() if value and value != [1, 1]}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", KINDS)
def test_what_belongs_to_a_picture_is_kept_or_named_in_one_note(tmp_path, source, target):
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a", zip=True)
    info.add_itxt("XML:com.adobe.xmp", XMP.decode() % 1)
    info.add(b"gAMA", struct.pack(">I", 45455))
    segment = b"Photoshop 3.0\0" + struct.pack(">4sHHI", b"8BIM", 0x0404, 0, len(IPTC)) + IPTC
    segment = struct.pack(">HH", 0xFFED, 2 + len(segment)) + segment
    options = {"PNG": {"pnginfo": info}, "JPEG": {"xmp": XMP % 1, "comment": b"hello", "extra": segment},
               "TIFF": {"tiffinfo": {700: XMP % 1, 33723: IPTC}}, "WEBP": {"xmp": XMP % 1}}
    picture = read(tmp_path, encoded(source, icc_profile=SRGB, dpi=(300, 200), **options[source]))
    before, notes = beside(tmp_path / "in"), write(tmp_path / f"b{target}", picture)
    assert picture.notes == () and len(before) == [5, 5, 4, 2][KINDS.index(source)]
    lacks = {".png": {"comment", "IPTC data"}, ".jpg": {"text", "colour chunks"},
             ".webp": {"comment", "IPTC data", "text", "colour chunks", "resolution"}}
    lost = before.keys() & lacks.get(target, {"comment", "text", "colour chunks"})
    assert beside(tmp_path / f"b{target}") == {name: before[name] for name in before.keys() - lost}
    assert len(notes) == bool(lost) and all(name in notes[0] for name in lost)


def test_exif_that_does_not_fit_is_left_out_with_a_word(tmp_path):
    exif = Image.Exif()
    exif[Base.ImageDescription] = "x" * 70000
    picture = read(tmp_path, encoded("PNG", exif=exif))
    assert "EXIF" in write(tmp_path / "a.jpg", picture)[0] and b"xxx" not in (tmp_path / "a.jpg").read_bytes()
    assert write(tmp_path / "a.tif", picture) == []


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    picture = read(tmp_path, encoded("JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40))
    assert picture.pixels.shape == (40, 50, 3) and "damaged EXIF" in picture.notes[0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grey, profile", [(False, SRGB), (True, GREY_PROFILE)])
def test_colour_profile_is_kept(tmp_path, grey, profile, target):
    notes = write(path := tmp_path / f"a{target}", Picture(smooth(), grey, None, {"colour profile": profile}))
    kept = None if grey and target == ".webp" else profile      # WebP turns grey into RGB
    assert beside(path).get("colour profile") == read_picture(path).beside.get("colour profile") == kept
    assert any("colour profile" in note for note in notes) == (kept is None)


@pytest.mark.parametrize("mode, profile", [("RGB", GREY_PROFILE), ("L", SRGB), ("CMYK", CMYK_PROFILE)])
def test_profile_of_another_colour_space_is_left_out(tmp_path, mode, profile):
    picture = read(tmp_path, encoded("JPEG", Image.fromarray(smooth()).convert(mode), icc_profile=profile))
    assert picture.beside == {} and "colour profile" in picture.notes[-1]


@pytest.mark.parametrize("name, head, lost", [(b"zTXt", b"a\0\0", "text"), (b"iTXt", b"a\0\1\0\0\0", "text"),
                                              (b"iCCP", b"a\0\0", "colour profile")])
def test_a_png_with_over_a_megabyte_of_text_or_profile_is_read(tmp_path, name, head, lost):
    extra = chunk(name, head + zlib.compress(bytes(2_000_000))) + chunk(b"pHYs", b"\0\0\x23\x28" * 2 + b"\1")
    picture = read(tmp_path, png(50, 40, 8, 2, b"".join(b"\0" + row.tobytes() for row in smooth()), extra))
    assert np.array_equal(picture.pixels, smooth()) and picture.notes == (f"left out: {lost} (over 1 MB)",)
    assert list(picture.beside) == ["resolution"]


# Modes that are converted

@pytest.mark.parametrize("mode, kind", [("P", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF")])
def test_other_colours_become_rgb(tmp_path, mode, kind):
    image = Image.fromarray(smooth()).convert(mode)
    picture = read(tmp_path, encoded(kind, image))
    assert f"{'the palette' if mode == 'P' else mode} is converted to RGB" in picture.notes
    assert not picture.grey and picture.alpha is None
    assert np.abs(picture.pixels.astype(int) - image.convert("RGB")).mean() < 3


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_transparent_colour_becomes_alpha(tmp_path, mode):
    image = Image.fromarray(smooth()).convert(mode)
    colour = image.getpixel((7, 7))
    picture = read(tmp_path, encoded("PNG", image, transparency=colour))
    assert np.array_equal(picture.alpha, np.where((np.atleast_3d(image) == colour).all(2), 0, 255))
    assert np.array_equal(picture.pixels, image.convert("RGB"))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_are_stretched(tmp_path, depth):
    row = np.arange(8) * (2 ** depth - 1) // 7
    packed = np.packbits(((row[:, None] >> np.arange(depth)[::-1]) & 1).astype(np.uint8)).tobytes()
    picture = read(tmp_path, png(8, 1, depth, 0, b"\0" + packed))
    assert picture.grey and np.array_equal(picture.pixels[0, :, 1], row * 255 // (2 ** depth - 1))


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_16_bit_png(tmp_path, colour_type, channels):
    pixels = pixels_of(7, np.uint16, channels)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    picture = read(tmp_path, png(pixels.shape[1], pixels.shape[0], 16, colour_type, rows))
    assert picture.grey == (channels < 3) and (picture.alpha is None) == (channels in (1, 3))
    assert picture.notes == () if channels == 1 else "8 bit" in picture.notes[0]
    expected = pixels if channels == 1 else pixels >> 8
    assert np.abs(picture.pixels[..., 0].astype(int) - expected[..., 0]).max() <= (channels > 1)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "predictor": True}, {"bigtiff": True}])
@pytest.mark.parametrize("photometric, channels", [("rgb", 3), ("minisblack", 1), ("miniswhite", 1)])
def test_16_bit_tiff_of_either_byte_order(tmp_path, photometric, channels, options):
    pixels = pixels_of(8, np.uint16, channels)
    expected = 65535 - pixels if photometric == "miniswhite" else pixels
    for order in "<>":
        data = tiff(pixels.squeeze(), photometric=photometric, byteorder=order, **options)
        assert (read(tmp_path, data).pixels == expected).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "TIFF16"])
def test_only_the_first_frame(tmp_path, kind):
    frames = np.stack([smooth(), 255 - smooth()])
    options = {"save_all": True, "append_images": [Image.fromarray(frames[1])], "lossless": True}
    picture = read(tmp_path, tiff(frames.astype(np.uint16)) if "16" in kind else encoded(kind, **options))
    assert "first" in picture.notes[0] and np.array_equal(picture.pixels, smooth())


def thumbnail_first(planes, nested=True, photometric="rgb", **options):
    with tifffile.TiffWriter(file := io.BytesIO()) as writer:
        writer.write(smooth()[::4, ::4].copy(), subfiletype=1, subifds=int(nested), **options)
        writer.write(planes, photometric=photometric)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("nested", [False, True])
def test_the_largest_page_of_a_tiff_that_begins_with_a_thumbnail(tmp_path, nested, dtype):
    picture = read(tmp_path, thumbnail_first(smooth().astype(dtype), nested))
    assert "first page" in picture.notes[0] and np.array_equal(picture.pixels, smooth())


# Bad input

@pytest.mark.parametrize("data, sentence", [
    (thumbnail_first(smooth()[..., 0], photometric="cfa"), "a raw file"),
    (thumbnail_first(smooth(), extratags=[(50706, 1, 4, b"\1\4\0\0", True)]), "a raw file"),
    (b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "a raw file"), (b"\0\0\0\x18ftypcrx " + bytes(99), "a raw file"),
    (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC is not"), (encoded("AVIF"), "AVIF is not"),
    (encoded("JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "a JPEG.*12-bit.*not supported"),
    (encoded("TIFF", Image.new("I;16", (9, 9)), compression="tiff_lzw"), "a TIFF.*Deflate.*not LZW")])
def test_what_is_not_supported_is_said(tmp_path, data, sentence):
    with pytest.raises(InputError, match=f"^cannot read [^\n]*in: {sentence}[^\n]*$"):
        read(tmp_path, data)


@pytest.mark.parametrize("dtype, shape, options", [
    ("float32", (9, 9, 3), {"photometric": "rgb"}), ("uint16", (9, 9, 4), {"photometric": "separated"}),
    ("int32", (9, 9), {}), ("uint16", (3, 9, 9), {"photometric": "rgb", "planarconfig": "separate"}),
    ("uint16", (9, 9, 4), {"photometric": "rgb", "extrasamples": ["assocalpha"]}),
    ("uint8", (9, 9, 4), {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": [0, 0, 0]})])
def test_tiff_of_other_kinds_is_refused(tmp_path, dtype, shape, options):
    with pytest.raises(InputError, match=f"in: a TIFF of . x {dtype}.* is not supported; save it again"):
        read(tmp_path, tiff(np.zeros(shape, dtype), **options))


@pytest.mark.parametrize("width, reason", [(10001, "100 meg"), (10000, "damaged"), (2 ** 31 - 1, "100 meg")])
def test_over_100_megapixels_is_refused_from_the_header(tmp_path, width, reason):
    large = bytearray(tiff(np.zeros((10000, 1), np.uint16), metadata=None, software=False))
    struct.pack_into("<I", large, large.index(struct.pack("<HH", 256, 4)) + 8, width)
    for data in (png(width, 10000, 8, 2), large):
        with pytest.raises(InputError, match=f"in.* {reason}"):
            read(tmp_path, data)


def test_a_full_memory_is_no_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_planes", lambda *args: bytes(2 ** 62))
    with pytest.raises(InputError, match="in: too large for the memory"):
        read(tmp_path, WHOLE[0])


DEEP = smooth().astype(np.uint16) * 257
WHOLE = [*map(encoded, KINDS), encoded("JPEG", exif=exif_of(6)), tiff(DEEP, photometric="rgb"),
         encoded("PNG", Image.fromarray(DEEP[..., 0])), tiff(DEEP, compression="zlib", rowsperstrip=8)]


@pytest.mark.parametrize("data", [
    b"", np.random.default_rng(0).bytes(5000), b"not a picture\n" * 30, b"\x89PNG\r\n\x1a\n", b"II*\0",
    encoded("GIF"), *(data[:len(data) * share // 100] for data in WHOLE for share in (2, 50, 80))])
def test_bad_file_is_one_sentence(tmp_path, data):
    with pytest.raises(InputError, match="^cannot read [^\n]*in: [^\n]*damaged[^\n]*$"):
        read(tmp_path, data)


@pytest.mark.parametrize("seed", range(60))
def test_fuzz_reads_or_refuses(tmp_path, seed, caplog, recwarn):
    generator = np.random.default_rng(seed)
    data = bytearray(WHOLE[seed % len(WHOLE)])
    data = data[:generator.integers(1, len(data))] if generator.random() < 0.3 else data
    for place in generator.integers(0, min(len(data), 200 + seed % 2 * 10 ** 6), generator.integers(1, 6)):
        data[place] ^= 1 << generator.integers(8)
    try:
        picture = read(tmp_path, data)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        for extension in (".png", ".jpg", ".tif"):
            write(tmp_path / f"b{extension}", picture)
    assert not caplog.records and not recwarn.list      # Pillow and tifffile say nothing beside the sentence


# Writing

@pytest.mark.parametrize("name, reason", [
    ("a.bmp", "end in one of .png"), ("a", "end in one of .png"), ("missing/a.png", "folder that exists"),
    ("file/a.png", "folder that exists"), ("folder.png", "is a directory"), ("x" * 300 + ".png", "too long"),
    pytest.param("locked.png", "permission denied",
                 marks=pytest.mark.skipif(not os.geteuid(), reason="the super-user may write to any file"))])
def test_unwritable_path(tmp_path, name, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked.png").touch(0o444)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=f"cannot write .*{reason}"):
        write_picture(tmp_path / name, smooth())
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png", "locked.png"]


@pytest.mark.parametrize("extension, side", [(".webp", 16384), (".jpg", 65501)])
def test_longer_than_the_format_allows(tmp_path, extension, side):
    with pytest.raises(InputError, match="pixels a side"):
        write_picture(tmp_path / f"a{extension}", np.zeros((1, side, 3), np.uint8))
    write_picture(tmp_path / f"a{extension}", np.zeros((1, side - 1, 3), np.uint8))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_failure_while_writing_leaves_the_old_file(tmp_path, dtype):
    (tmp_path / "a.tif").write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(InputError, match="a.tif: [^\n]*too large$"):
            write_picture(tmp_path / "a.tif", smooth().astype(dtype))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == ["a.tif"] and (tmp_path / "a.tif").read_bytes() == b"old"
