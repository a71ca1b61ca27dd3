"""Noise of tests and training: white Gaussian (the paper), that of cameras, and a wide mix of kinds.

Everything is numpy, RGB, float32 (H, W, 3), with 1.0 for white. All randomness is the generator's.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

# Bilinear interpolation on a Bayer mosaic, and the gradient correction of Malvar et al. (ICASSP 2004), which
# gives green at a red or blue site part of the detail seen in that site's own colour.
GREEN = np.array([[0, 0, 0, 0, 0], [0, 0, 2, 0, 0], [0, 2, 0, 2, 0], [0, 0, 2, 0, 0], [0, 0, 0, 0, 0]]) / 8
GREEN_CORRECTION = np.array(
    [[0, 0, -1, 0, 0], [0, 0, 0, 0, 0], [-1, 0, 4, 0, -1], [0, 0, 0, 0, 0], [0, 0, -1, 0, 0]]
) / 8
RED_BLUE = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def gaussian_noise(clean, sigma, generator):
    """float32 (H, W, 3) in [0, 1] plus white Gaussian noise, unclipped; sigma in the same units, 25 / 255."""
    return clean + np.float32(sigma) * generator.standard_normal(clean.shape, np.float32)


def noisy_version(clean, sigma):
    """Clean uint8 (H, W, 3) plus Gaussian test noise -> float32, 1 for white, unclipped; sigma: 0 to 255."""
    eps = np.random.RandomState(0).normal(0, sigma / 255, clean.shape)  # seed 0 anew for each, as Restormer
    return (clean / 255 + eps).astype(np.float32)


class NoiseMix(NamedTuple):
    """Which noise is added to clean crops, drawn anew for each.

    sigma: ((low, high), ...) on the 0-255 scale: a range is drawn, then a value in it. camera: probability of
    camera noise in place of Gaussian. clip: probability that the noisy crop is clipped and rounded to 8 bit.
    """

    sigma: tuple
    camera: float = 0.0
    clip: float = 0.0

    def draw(self, generator):
        """-> (sigma on the 0-255 scale, or "camera"; whether to clip and round)."""
        low, high = self.sigma[generator.integers(len(self.sigma))]
        sigma = generator.uniform(low, high)
        return "camera" if generator.random() < self.camera else sigma, bool(generator.random() < self.clip)

    def __call__(self, clean, generator):
        """clean: float32 (H, W, 3) in [0, 1] -> (clean, noisy)."""
        return clean, add_noise(clean, *self.draw(generator), generator)


def add_noise(clean, sigma, clip, generator):
    """clean: float32 (H, W, 3) in [0, 1]; sigma, clip: as NoiseMix.draw returns them -> noisy."""
    camera = sigma == "camera"
    noisy = camera_noise(clean, generator) if camera else gaussian_noise(clean, sigma / 255, generator)
    return quantise(noisy) if clip else noisy


def equal_noise(clean, sigma, generator):
    """As gaussian_noise, but with the same noise in R, G and B, as in a grey picture kept as RGB."""
    return clean + np.float32(sigma) * generator.standard_normal((*clean.shape[:2], 1), np.float32)


def grain(clean, sigma, radius, colour, generator):
    """Gaussian noise correlated over about `radius` pixels, as in film; clean and sigma as in gaussian_noise.

    radius: std of its Gaussian window; colour: independent in R, G and B, else the same in all.
    """
    window = np.exp(-0.5 * (np.arange(-4, 5) / radius) ** 2)
    window /= np.sqrt((window ** 2).sum())  # keeps the variance
    noise = generator.standard_normal((*clean.shape[:2], 3 if colour else 1), np.float32)
    for axis in (0, 1):
        noise = ndimage.convolve1d(noise, window, axis, mode="wrap")
    return clean + np.float32(sigma) * noise


def low_light(clean, exposure, shot, read, generator):
    """-> (dark, noisy): the picture with `exposure` (0 to 1) of its light, and that with shot and read noise.

    clean: float32 (H, W, 3), sRGB in [0, 1]. Of a value x in linear light the variance is shot * x + read.
    """
    dark = np.float32(exposure) * to_linear(clean, False)
    std = np.sqrt(np.float32(shot) * dark + np.float32(read))
    noisy = dark + std * generator.standard_normal(clean.shape, np.float32)
    return to_srgb(dark, False).astype(np.float32), to_srgb(noisy, False).astype(np.float32)


KINDS = {  # of the wide mix, and how often each is drawn
    "white": 0.46, "equal": 0.11, "channels": 0.05, "camera": 0.12, "dark": 0.05, "grain": 0.06, "jpeg": 0.05,
    "clean": 0.10,
}
GREY = 1 / 8  # of the pictures are made grey


def draw_kind(generator):
    """A kind of the wide mix, as often as KINDS says."""
    return str(generator.choice(list(KINDS), p=list(KINDS.values())))


def wide_mix(clean, generator, kind=None):
    """Every noise that pictures come with, in one mix (not in the paper): draws a kind and its strength.

    clean: float32 (H, W, 3) in [0, 1] -> (clean, noisy). clean is grey in one of eight cases, and darkened
    for kind "dark". noisy is clipped and rounded to 8 bits in half of the cases. None draws the kind.
    """
    kind = kind or draw_kind(generator)
    grey = generator.random() < GREY
    if grey:
        clean = np.repeat((clean @ LUMA)[..., None], 3, axis=2)
    sigma = (generator.uniform(55, 75) if generator.random() < 0.08 else generator.uniform(0, 55)) / 255
    if kind == "white":
        noisy = gaussian_noise(clean, sigma, generator)
    elif kind == "equal":
        noisy = equal_noise(clean, sigma, generator)
    elif kind == "channels":
        noisy = gaussian_noise(clean, sigma * generator.uniform(0, 1, 3), generator)
    elif kind == "camera":
        noisy = camera_noise(clean, generator)
    elif kind == "dark":
        shot, read = noise_levels(generator)
        exposure = np.exp(generator.uniform(np.log(0.02), np.log(0.5)))
        clean, noisy = low_light(clean, exposure, shot / 3, read / 3, generator)
    elif kind == "grain":
        noisy = grain(clean, sigma, generator.uniform(0.5, 1.5), generator.random() < 0.5, generator)
    elif kind == "jpeg":
        add = equal_noise if generator.random() < 0.25 else gaussian_noise
        quality, subsampling = int(generator.integers(40, 96)), 2 * int(generator.integers(2))
        noisy = jpeg(quantise(add(clean, sigma, generator)), quality, subsampling,
                     phase=generator.integers(8, size=2))
    else:
        noisy = clean
    if grey:
        noisy = np.repeat(noisy[..., 1:2], 3, axis=2)
    return clean, quantise(noisy) if generator.random() < 0.5 else noisy


def quantise(image):
    """What an 8-bit file keeps: clipped to [0, 1] and rounded to multiples of 1 / 255; float32, any shape."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.float32) / np.float32(255)


def camera_noise(clean, generator):
    """The picture as a camera would have delivered it, with random sensor, light, processing and compression.

    clean: float32 (H, W, 3), sRGB in [0, 1]. Returns float32 (H, W, 3) in [0, 1]; its clean partner is
    `clean`. Follows "Unprocessing Images for Learned Raw Denoising" (Brooks et al., CVPR 2019). All ranges
    and probabilities below are theirs, widened, or our own, chosen until the result covers the real pairs of
    PolyU (standard deviation 2 to 8 of 255) and strong phone noise (about 40).
    """
    if clean.min() < 0 or clean.max() > 1:
        raise ValueError("camera_noise needs a picture in [0, 1]")
    tone = generator.random() < 0.5
    linear = to_linear(clean, tone)
    noise = sensor_noise(
        linear, *noise_levels(generator), gains=(generator.uniform(1.2, 2.4), 1, generator.uniform(1.2, 2.4)),
        correction=generator.random(), generator=generator,
    )
    # A camera's colour matrix widens the channels' differences, its chroma denoising smooths them. In PolyU
    # they correlate by 0.83, 0.66, 0.46 over 1, 2, 3 pixels, the luma noise by 0.58, 0.17, 0.02 (medians).
    luma = (noise @ LUMA)[..., None]
    chroma = ndimage.gaussian_filter(noise - luma, generator.uniform(0, 2), axes=(0, 1))
    noise = luma + np.float32(generator.uniform(0.3, 1.7)) * chroma
    if generator.random() < 0.4:  # resizing, or the denoising of the luma, makes the grain coarser
        noise = ndimage.gaussian_filter(noise, generator.uniform(0.4, 1), axes=(0, 1))
    # Demosaicking is linear: the noise passes it alone and is added to the sharp picture. With the picture
    # only the noisy half of the pair would be blurred, and the network would learn to sharpen.
    noisy = to_srgb(linear + noise, tone)
    if generator.random() >= 0.4:
        return noisy
    phase = generator.integers(8, size=2)
    return jpeg(noisy, int(generator.integers(60, 99)), int(generator.integers(3)), phase)


def noise_levels(generator):
    """Random (shot, read): the variance of a raw value x in [0, 1] is shot * x + read.

    Shot noise is log-uniform from the weakest of Brooks et al. (1e-4) to 0.03: theirs ends at 0.012, the
    phones of SIDD reach 0.022. Read noise follows their log-log line, fitted to the Darmstadt noise data set.
    """
    log_shot = generator.uniform(np.log(1e-4), np.log(0.03))
    return np.exp(log_shot), np.exp(2.18 * log_shot + 1.20 + 0.26 * generator.standard_normal())


def sensor_noise(linear, shot, read, gains, correction, generator):
    """The noise of one exposure, without its picture, after white balance and demosaicking.

    linear: float32 (H, W, 3), linear light in [0, 1]. shot, read: see noise_levels. gains: white balance of
    R, G, B. correction: 0 for a bilinear demosaicker, 1 for a gradient-corrected one working on colour
    differences. Returns float32 (H, W, 3), linear light, with zero mean.
    """
    gains = np.asarray(gains, np.float32)
    # Colour of each site, from the random phase of the RGGB tile: 0 red, 1 green, 2 blue.
    row, column = ((np.arange(n) + generator.integers(2)) % 2 for n in linear.shape[:2])
    site = row[:, None] + column
    raw = np.take_along_axis(linear / gains, site[..., None], 2)[..., 0]
    # For all but the darkest pixels a Poisson count is close to a Gaussian of the same variance.
    std = gains[site] * np.sqrt(np.float32(shot) * raw + np.float32(read))
    mosaic = std * generator.standard_normal(site.shape, np.float32)

    # mode="mirror" does not repeat the edge, so the tile continues beyond it in step.
    kernel = GREEN + correction * GREEN_CORRECTION
    green = np.where(site == 1, mosaic, ndimage.convolve(mosaic, kernel, mode="mirror"))
    guide = np.float32(correction) * green
    red, blue = (
        guide + ndimage.convolve(np.where(site == colour, mosaic - guide, 0), RED_BLUE, mode="mirror")
        for colour in (0, 2)
    )
    return np.stack([red, green, blue], axis=2)


def to_linear(srgb, tone):
    """sRGB values in [0, 1] to linear light; tone=True first undoes the smoothstep curve of Brooks et al."""
    if tone:
        srgb = 0.5 - np.sin(np.arcsin(1 - 2 * srgb) / 3)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear, tone):
    """Inverse of to_linear; what leaves [0, 1] is clipped, as in a camera."""
    linear = np.clip(linear, 0, 1)
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (3 - 2 * srgb) * srgb**2 if tone else srgb


def jpeg(image, quality, subsampling, phase=(0, 0)):
    """Through a JPEG file; float32 (H, W, 3) in [0, 1].

    quality: 1 to 100. subsampling: 0, 1, 2 for 4:4:4, 4:2:2, 4:2:0. phase: of pixel (0, 0) in its 8x8 block.
    """
    top, left = phase
    padded = np.pad(np.rint(image * 255).astype(np.uint8), ((top, 0), (left, 0), (0, 0)), mode="edge")
    file = io.BytesIO()
    Image.fromarray(padded).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(file))[top:, left:].astype(np.float32) / np.float32(255)
