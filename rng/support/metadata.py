"""What a picture file has beside its pixels: a new file gets what it can store, a note names the rest.

A dict whose keys are the names shown in notes. Values are bytes, but for "EXIF data" ({tag: value}, a group's
under its own), "resolution" (dots per inch, across and down), "text" and "colour chunks" ([(name, data)]).
"""

import re
import struct
import warnings

from PIL import ExifTags, Image, PngImagePlugin

SAVE = {"EXIF data": "exif", "colour profile": "icc_profile", "XMP data": "xmp", "resolution": "dpi",
        "comment": "comment"}
TIFF_TAGS = {"colour profile": 34675, "XMP data": 700, "IPTC data": 33723}
LACKS = {"PNG": ("comment", "IPTC data"), "JPEG": ("alpha channel", "text", "colour chunks"),
         "TIFF": ("comment", "text", "colour chunks"),
         "WEBP": ("comment", "IPTC data", "resolution", "text", "colour chunks")}
SEGMENT, IPTC = 65400, 0x0404       # bytes that a segment of a JPEG holds; Photoshop's number of IPTC data
PNG_TEXT, PNG_COLOUR = (b"tEXt", b"zTXt", b"iTXt"), (b"gAMA", b"cHRM", b"sRGB", b"cICP")
PNG_XMP, PNG_EXIF = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"    # kept in texts

EXIF, GPS, ORIENTATION = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.Base.Orientation
OTHER_TAGS = {EXIF, GPS, ExifTags.IFD.Interop, *TIFF_TAGS.values()}     # kept elsewhere, or offsets
PICTURE_TAGS = [ExifTags.Base[name] for name in (   # others below 700 describe the layout of the old file
    "ImageDescription", "Make", "Model", "XResolution", "YResolution", "ResolutionUnit", "Software", "Artist",
    "DateTime", "HostComputer", "Copyright", "DocumentName", "PageName", "Rating", "RatingPercent", "XPTitle",
    "XPComment", "XPAuthor", "XPKeywords", "XPSubject", "ExifImageWidth", "ExifImageHeight")]
TURNED = {282: 283, 283: 282, 40962: 40963, 40963: 40962, 41486: 41487, 41487: 41486}   # across: down


def png_chunks(data):
    """(name, whole chunk with length and checksum) of a PNG file, up to where it is cut off."""
    place = 8
    while (end := place + 12 + int.from_bytes(data[place:place + 4], "big")) <= len(data):
        yield data[place + 4:place + 8], data[place:end]
        place = end


def png_variants(data):
    """(PNG file, names of what it lacks): without what Pillow refuses if it unfolds to over a megabyte."""
    for lost in ([], ["text"], ["colour profile"], ["text", "colour profile"]):
        without = PNG_TEXT * ("text" in lost) + (b"iCCP",) * ("colour profile" in lost)
        chunks = (chunk for name, chunk in png_chunks(data) if name not in without)
        yield data[:8] + b"".join(chunks) if lost else data, [f"{name} (over 1 MB)" for name in lost]


def read(info, png=b""):
    """{name: value} of a PNG, JPEG or WebP. info: Pillow's, with a PNG's texts (str) too. png: a PNG file."""
    found = {"colour profile": info.get("icc_profile"), "XMP data": info.get("xmp")}
    if png or info.get("jfif_unit"):    # else Pillow takes that of the EXIF data, which is kept, or 72
        found["resolution"] = info.get("dpi")
    if not png:
        return found | {"comment": info.get("comment"), "IPTC data": info.get("photoshop", {}).get(IPTC)}
    chunks = [(name, chunk[8:-4]) for name, chunk in png_chunks(png) if name in PNG_TEXT + PNG_COLOUR]
    return found | {"text": [(name, data) for name, data in chunks
                             if name in PNG_TEXT and not data.startswith((PNG_XMP, PNG_EXIF))],
                    "colour chunks": [(name, data) for name, data in chunks if name in PNG_COLOUR]}


def read_tiff(page):
    """{name: value} of a page of tifffile."""
    found = {name: value for name, tag in TIFF_TAGS.items() if type(value := page.tags.valueof(tag)) is bytes}
    unit = {2: 1, 3: 2.54}.get(page.tags.valueof(296, 2))       # inch, centimetre
    return found | {"resolution": [unit * x for x in page.resolution] if unit and 282 in page.tags else ()}


def tiff_exif(tiff, page):
    exif = Image.Exif()
    exif.endian, exif.bigtiff = tiff.byteorder, tiff.is_bigtiff
    exif.load_from_fp(tiff.filehandle, page.offset)
    return exif


def exif_bytes(tags):
    exif = Image.Exif()
    exif.update(tags)
    return exif.tobytes()


def upright(load_exif, found):
    """load_exif() and found, turned upright -> (orientation, {name: value}, names of what is lost)."""
    tags, groups, orientation, lost = {}, {}, 1, []
    with warnings.catch_warnings(record=True) as damage:    # Pillow warns of bad values, or raises
        warnings.simplefilter("always")
        try:
            exif = load_exif()
            orientation = exif.get(ORIENTATION) if exif.get(ORIENTATION) in range(1, 9) else 1
            groups = {None: exif, EXIF: exif.get_ifd(EXIF), GPS: exif.get_ifd(GPS)}
        except Exception as error:
            damage.append(error)
        for group, values in groups.items():
            for tag in sorted({*values} - OTHER_TAGS):
                try:
                    value = values[tag]
                    if isinstance(value, str) and not value.isascii():
                        value = value.encode("latin-1")     # as it was: Pillow would write question marks
                    exif_bytes({group: {tag: value}} if group else {tag: value})
                    writable = group or tag in PICTURE_TAGS
                except Exception:
                    writable = False
                if writable:
                    kept = tags.setdefault(group, {}) if group else tags
                    kept[TURNED.get(tag, tag) if orientation > 4 else tag] = value
                elif group or tag > 700 or tag in PICTURE_TAGS:
                    lost.append((ExifTags.GPSTAGS if group == GPS else ExifTags.TAGS).get(tag, f"tag {tag}"))
    lost += ["damaged EXIF data"] * bool(damage)

    found = {name: value for name, value in found.items() if value and not isinstance(value, str)}
    found |= {"EXIF data": {**tags, ORIENTATION: 1}} if tags else {}
    if "XMP data" in found:
        found["XMP data"] = re.sub(rb'(tiff:Orientation(?:="|>))[1-8]', rb"\g<1>1", found["XMP data"])
    dpi = found.pop("resolution", ())
    if dpi and all(0 < value < 1e7 for value in dpi):       # else it is unknown
        found["resolution"] = dpi[::-1] if orientation > 4 else dpi
    return orientation, found, lost


def save_options(kind, like):
    """-> (arguments of Image.save for what belongs to the Picture like, names of what kind cannot hold)."""
    beside = like.beside | ({} if like.alpha is None else {"alpha channel": b""})
    if kind != "TIFF" and "EXIF data" in beside:
        beside["EXIF data"] = exif_bytes(beside["EXIF data"])
    held = {name: value for name, value in beside.items() if name not in LACKS[kind]
            and not (kind == "JPEG" and name != "colour profile" and len(value) > SEGMENT)
            and not (kind == "JPEG" and name == "resolution" and max(value) > 65535)
            and not (kind == "WEBP" and name == "colour profile" and like.grey)}     # WebP is always RGB
    srgb = b"sRGB" in dict(beside.get("colour chunks", ()))     # which all are taken for
    lost = [name for name in beside if name not in held and not (name == "colour chunks" and srgb)]
    if kind == "TIFF":
        tags = {tag: held[name] for name, tag in TIFF_TAGS.items() if name in held}
        resolution = zip((282, 283, 296), (*held["resolution"], 2)) if "resolution" in held else ()
        return {"tiffinfo": {**held.get("EXIF data", {}), **tags, **dict(resolution)}}, lost
    options = {SAVE[name]: value for name, value in held.items() if name in SAVE}
    if kind == "PNG":
        xmp = [(b"iTXt", PNG_XMP + bytes(4) + held["XMP data"])] if "XMP data" in held else []
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for name, data in [*held.get("colour chunks", []), *held.get("text", []), *xmp]:
            options["pnginfo"].add(name, data)
    if kind == "JPEG" and "IPTC data" in held:
        iptc, size = held["IPTC data"], len(held["IPTC data"])
        data = struct.pack(f">14s4sHHI{size + size % 2}s", b"Photoshop 3.0", b"8BIM", IPTC, 0, size, iptc)
        options["extra"] = struct.pack(">HH", 0xFFED, 2 + len(data)) + data
    return options, lost
