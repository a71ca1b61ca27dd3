"""Charts and picture grids, drawn with Pillow."""

import math
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # colour-blind safe
FINE = 3          # charts are drawn this many times larger, then reduced: Pillow's lines are not smoothed
MARGIN = 72, 28, 16, 52  # left, top, right and bottom of a chart's axes, pixels


class Series(NamedTuple):
    """A line or set of points of a chart; labels: a word beside each point; "" as name: not in the legend."""

    name: str
    x: list
    y: list
    labels: tuple = ()


def ticks(low, high, most=6):
    """Round numbers from low to high, at most `most` + 1 of them: 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    apart = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [apart * i for i in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)]


def chart(series, x_label, y_label, title="", size=(600, 380)):
    """Lines and points over two axes -> Image of `size` pixels."""
    width, height = (FINE * side for side in size)
    font = ImageFont.load_default(size=FINE * 12)
    left, top, right, bottom = (FINE * side for side in MARGIN)
    right += max(20 * FINE + font.getlength(one.name) if one.name else 0 for one in series)  # for the legend
    right, bottom = width - right, height - bottom
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)

    def limits(values):
        low, high = min(values), max(values)
        room = 0.1 * (high - low) or 0.1 * abs(high) or 1
        return low - room, high + room

    (x_low, x_high), (y_low, y_high) = (limits([v for s in series for v in s[axis]]) for axis in (1, 2))

    def place(x, y):
        return (left + (x - x_low) / (x_high - x_low) * (right - left),
                bottom - (y - y_low) / (y_high - y_low) * (bottom - top))

    for value in ticks(x_low, x_high):
        x, _ = place(value, y_low)
        draw.line((x, top, x, bottom), "#dddddd", FINE)
        draw.text((x, bottom + 5 * FINE), f"{value:g}", "black", font, "ma")
    for value in ticks(y_low, y_high):
        _, y = place(x_low, value)
        draw.line((left, y, right, y), "#dddddd", FINE)
        draw.text((left - 5 * FINE, y), f"{value:g}", "black", font, "rm")
    draw.rectangle((left, top, right, bottom), outline="black", width=FINE)

    for n, (one, colour) in enumerate(zip(series, COLOURS * len(series))):
        points = [place(x, y) for x, y in zip(one.x, one.y)]
        if len(points) > 1:
            draw.line(points, colour, 2 * FINE, joint="curve")
        for x, y in points if len(points) < 30 else []:
            draw.circle((x, y), 3.5 * FINE, colour)
        up = n % 2 == 0  # the labels of two lines that meet stay apart
        for (x, y), label in zip(points, one.labels):
            draw.text((x, y + (-5 if up else 5) * FINE), label, colour, font, "md" if up else "ma")
        if one.name:
            y = top + (10 + 16 * n) * FINE
            draw.rectangle((right + 6 * FINE, y - 4 * FINE, right + 14 * FINE, y + 4 * FINE), colour)
            draw.text((right + 20 * FINE, y), one.name, "black", font, "lm")

    draw.text(((left + right) / 2, height - 6 * FINE), x_label, "black", font, "md")
    draw.text((left, top - 6 * FINE), y_label, "black", font, "ld")
    draw.text((right, top - 6 * FINE), title, "black", font, "rd")
    return image.resize(size, Image.Resampling.LANCZOS)


def captioned(picture, text, zoom=1):
    """picture: uint8 (H, W, 3), enlarged without smoothing -> Image with a line of text below it."""
    picture = Image.fromarray(picture)
    picture = picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (picture.width, picture.height + 22), "white")
    canvas.paste(picture)
    centre = canvas.width / 2, picture.height + 11
    ImageDraw.Draw(canvas).text(centre, text, "black", ImageFont.load_default(size=13), "mm")
    return canvas


def grid(rows, gap=6):
    """Images side by side and in rows -> Image; rows: lists of Images."""
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    heights = [max(image.height for image in row) for row in rows]
    canvas = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(rows) - 1)),
                       "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(image, (sum(widths[:x]) + gap * x, sum(heights[:y]) + gap * y))
    return canvas
