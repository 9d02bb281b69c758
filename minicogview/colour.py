"""Colour profiles and transparency: what a picture looks like, and how an edited one keeps its own colours.

The idea: the models see and draw in sRGB, without transparency. A photo may be in another colour space, which the ICC
profile in its file names. Its colours are converted on the way to the models, those of new pixels on the way back.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms


def profile_of(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The picture's colour profile; None if it has none, or a damaged one."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    except (KeyError, TypeError, OSError):
        return None


def to_srgb(image: Image.Image) -> Image.Image:
    """The picture with its colours in sRGB, in which the models see and draw, and without a profile."""
    profile = profile_of(image)
    if profile is not None and not ImageCms.getProfileDescription(profile).startswith("sRGB"):
        image = converted(image, profile, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")))
    image = image.copy()
    image.info.pop("icc_profile", None)
    return image


def with_rgb_profile(image: Image.Image) -> Image.Image:
    """The picture; in sRGB if its profile is one of grey or CMYK, which would be wrong once its pixels are RGB."""
    profile = profile_of(image)
    return image if profile is None or profile.profile.xcolor_space.strip() == "RGB" else to_srgb(image)


def in_profile_of(image: Image.Image, other: Image.Image) -> Image.Image:
    """An sRGB picture with its colours in the profile of another picture."""
    profile = profile_of(other)
    if profile is None or ImageCms.getProfileDescription(profile).startswith("sRGB"):
        return image
    return converted(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), profile)


def converted(
    image: Image.Image, before: ImageCms.ImageCmsProfile, after: ImageCms.ImageCmsProfile
) -> Image.Image:  # fmt: skip
    """The picture's colours from one profile to another; unchanged if a profile does not fit."""
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        return ImageCms.profileToProfile(image, before, after, outputMode=mode) or image
    except ImageCms.PyCMSError:
        return image


def on_white(image: Image.Image) -> Image.Image:
    """The picture as it looks on white paper: RGB, in sRGB, with nothing transparent."""
    image = to_srgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def alike(pixels: np.ndarray, image: Image.Image) -> Image.Image:
    """New pixels (H, W, 3 or 4) as a picture with the profile and EXIF data of another one."""
    new = Image.fromarray(pixels)
    new.info.update({key: image.info[key] for key in ("icc_profile", "exif") if key in image.info})
    return new
