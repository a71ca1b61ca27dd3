"""Noise for training: white Gaussian noise, and the noise of a digital camera as it looks in finished pictures.

Everything is numpy, RGB, float32 (H, W, 3), with 1.0 for white; all randomness comes from the generator passed in.
"""

import io

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
    """White Gaussian noise added to a picture.

    clean: float32 (H, W, 3) in [0, 1]. sigma: standard deviation in the same units (25 / 255, not 25).
    Returns float32 (H, W, 3), not clipped.
    """
    return clean + np.float32(sigma) * generator.standard_normal(clean.shape, np.float32)


def quantise(image):
    """What an 8-bit file keeps: clipped to [0, 1] and rounded to multiples of 1 / 255; float32, any shape."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.float32) / np.float32(255)


def camera_noise(clean, generator):
    """The picture as a camera would have delivered it, with random sensor, light, processing and compression.

    clean: float32 (H, W, 3), sRGB in [0, 1]. Returns float32 (H, W, 3) in [0, 1]; its clean partner is `clean`.
    Follows "Unprocessing Images for Learned Raw Denoising" (Brooks et al., CVPR 2019). All ranges and probabilities below
    are theirs, widened, or our own, chosen until the result covers the real pairs of PolyU (standard deviation 2 to 8 of
    255) and strong phone noise (about 40).
    """
    if clean.min() < 0 or clean.max() > 1:
        raise ValueError("camera_noise needs a picture in [0, 1]")
    tone = generator.random() < 0.5
    linear = to_linear(clean, tone)
    noise = sensor_noise(
        linear, *noise_levels(generator), gains=(generator.uniform(1.2, 2.4), 1, generator.uniform(1.2, 2.4)),
        correction=generator.random(), generator=generator,
    )
    # The colour matrix of a camera widens the differences between the channels, its chroma denoising smooths them: in
    # PolyU they correlate by 0.83, 0.66, 0.46 over 1, 2, 3 pixels, the luma noise by 0.58, 0.17, 0.02 (medians).
    luma = (noise @ LUMA)[..., None]
    chroma = ndimage.gaussian_filter(noise - luma, generator.uniform(0, 2), axes=(0, 1))
    noise = luma + np.float32(generator.uniform(0.3, 1.7)) * chroma
    if generator.random() < 0.4:  # resizing, or the denoising of the luma, makes the grain coarser
        noise = ndimage.gaussian_filter(noise, generator.uniform(0.4, 1), axes=(0, 1))
    # Demosaicking is linear, so the noise passes through it alone and is added to the sharp picture. If the picture
    # went through as well, only the noisy half of the pair would be blurred, and the network would learn to sharpen.
    noisy = to_srgb(linear + noise, tone)
    return jpeg(noisy, generator) if generator.random() < 0.4 else noisy


def noise_levels(generator):
    """Random (shot, read): the variance of a raw value x in [0, 1] is shot * x + read.

    Shot noise is log-uniform from the weakest of Brooks et al. (1e-4) to 0.03: theirs ends at 0.012, the phones of SIDD
    reach 0.022. Read noise follows their log-log line, fitted to the Darmstadt noise data set.
    """
    log_shot = generator.uniform(np.log(1e-4), np.log(0.03))
    return np.exp(log_shot), np.exp(2.18 * log_shot + 1.20 + 0.26 * generator.standard_normal())


def sensor_noise(linear, shot, read, gains, correction, generator):
    """The noise of one exposure, without its picture, after white balance and demosaicking.

    linear: float32 (H, W, 3), linear light in [0, 1]. shot, read: see noise_levels. gains: white balance (R, G, B).
    correction: 0 for a bilinear demosaicker, 1 for a gradient-corrected one working on colour differences.
    Returns float32 (H, W, 3), linear light, with zero mean.
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
    green = np.where(site == 1, mosaic, ndimage.convolve(mosaic, GREEN + correction * GREEN_CORRECTION, mode="mirror"))
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


def jpeg(image, generator):
    """Through a JPEG file of random quality, chroma subsampling and block phase; float32 (H, W, 3) in [0, 1]."""
    top, left = generator.integers(8, size=2)
    padded = np.pad(np.rint(image * 255).astype(np.uint8), ((top, 0), (left, 0), (0, 0)), mode="edge")
    file = io.BytesIO()
    quality, subsampling = generator.integers(60, 99), generator.integers(3)
    Image.fromarray(padded).save(file, "JPEG", quality=int(quality), subsampling=int(subsampling))
    return np.asarray(Image.open(file))[top:, left:].astype(np.float32) / np.float32(255)
