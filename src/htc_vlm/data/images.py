"""Load any picture file as 8-bit RGB with the right pixels, or refuse with the path and what to do.

Source:  ours; `pad_to_square` is LLaVA's `expand2square` (llava/mm_utils.py).
Differs: EXIF rotation, 16 bits, float, alpha and palettes are handled, where LLaVA calls `.convert("RGB")` alone,
         which clips 16-bit grey to white and turns transparent pixels black. Colour profiles are not applied:
         values are taken as sRGB, CMYK as plain inks, as every vision encoder's own preprocessing does.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's own limit for "probably a bomb" (89 million pixels, 256 MiB as RGB).
DEFAULT_MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3

# Without EPS, which runs Ghostscript, WMF, and those that any text file can be mistaken for (TGA, XBM).
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP")

WHITE_16_BIT = 65535
TIFF_BITS_PER_SAMPLE, TIFF_PHOTOMETRIC, TIFF_WHITE_IS_ZERO = 258, 262, 0
# PNG stores the transparent grey in the file's own depth; Pillow widens the pixels but not this value.
GREY_KEY_SCALE = {"L;2": 255 // 3, "L;4": 255 // 15}


class ImageError(ValueError):
    """A picture that cannot be used; the message begins with its path and says what to do."""


def load_image(path: str | os.PathLike[str], max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """The picture in a file as upright RGB, 8 bits per channel, transparency on white, first frame.

    `max_pixels` is compared with width x height before anything is decoded; above twice PIL.Image.MAX_IMAGE_PIXELS (179 M)
    Pillow refuses by itself, so raise that, too.
    Raises ImageError for whatever does not give right pixels.
    """
    file = Path(path)
    if file.is_dir():
        raise ImageError(f"{path}: is a folder; give the picture files in it")
    if not file.exists():
        raise ImageError(f"{path}: no such file; check the path")
    if not file.is_file():
        raise ImageError(f"{path}: is not a regular file; save the picture to disk first")
    try:
        with file.open("rb") as stream:
            return _decode(stream, str(path), max_pixels)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error


def load_for_model(path: str | os.PathLike[str], max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """`load_image`; ImageError also for a thin picture that, padded to a square as LLaVA does, would fill the memory."""
    picture = load_image(path, max_pixels)
    side = max(picture.size)
    if side * side > max_pixels:
        raise ImageError(
            f"{path}: {picture.width} x {picture.height} pixels, padded to a square, exceed {max_pixels:,}; crop it"
        )
    return picture


def load_batches(
    files: Sequence[Path], batch_size: int, leave_out: Callable[[Path, str], None], max_pixels: int = DEFAULT_MAX_PIXELS
) -> Iterator[tuple[list[Path], list[Image.Image]]]:
    """`load_for_model` of up to batch_size files at a time -> (files, pictures); `leave_out(file, message)` for each that
    cannot be used. No more than a batch of pictures is in memory."""
    paths: list[Path] = []
    pictures: list[Image.Image] = []
    for file in files:
        try:
            pictures.append(load_for_model(file, max_pixels))
            paths.append(file)
        except (ImageError, OSError) as error:
            leave_out(file, " ".join(str(error).split()))
        if len(pictures) == batch_size:
            yield paths, pictures
            paths, pictures = [], []
    if pictures:
        yield paths, pictures


def from_bytes(data: bytes, name: str = "picture", max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """`load_image` for a picture in memory; `name` takes the path's place in messages."""
    return _decode(io.BytesIO(data), name, max_pixels)


def from_image(image: Image.Image, name: str = "picture", max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """`load_image` for a picture that Pillow has opened or made, which stays as it is; of several frames, the one it is at."""
    with named_warnings(name):
        return _upright_rgb(image, name, max_pixels)


def pad_to_square(
    image: Image.Image, fill: tuple[int, int, int] = (0, 0, 0), max_pixels: int = DEFAULT_MAX_PIXELS
) -> Image.Image:
    """The picture in the middle of a square of its longer side, `fill` around it; a square picture as it is.

    An odd remainder goes below or to the right, as in LLaVA. Raises ImageError when the square exceeds `max_pixels`.

    >>> square = pad_to_square(Image.new("RGB", (2, 1), "red"), fill=(127, 127, 127))
    >>> [square.getpixel((0, y)) for y in (0, 1)]
    [(255, 0, 0), (127, 127, 127)]
    """
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    if side * side > max_pixels:
        raise ImageError(
            f"a picture of {width} x {height} padded to a square of {side} x {side} exceeds {max_pixels:,} pixels; "
            "switch padding off or crop it"
        )
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def fill_from_mean(image_mean: Sequence[float]) -> tuple[int, int, int]:
    """An image processor's mean as a colour, rounded down as LLaVA does.

    >>> fill_from_mean([0.48145466, 0.4578275, 0.40821073])
    (122, 116, 104)
    """
    red, green, blue = (int(channel * 255) for channel in image_mean)
    return red, green, blue


def _decode(stream: IO[bytes], name: str, max_pixels: int) -> Image.Image:
    """Open, check the size, decode, turn upright, convert."""
    head = stream.read(64)
    stream.seek(0)
    if not head:
        raise ImageError(f"{name}: is empty (0 bytes); download or copy it again")
    with named_warnings(name):
        image = _open(stream, name, head)
        return _upright_rgb(image, name, max_pixels)


def _upright_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """The rest of `_decode`, of an open picture."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} pixels exceed the limit of {max_pixels:,}; "
            "scale it down, or raise max_pixels if you trust the file"
        )
    if width * height == 0:
        raise ImageError(f"{name}: has no pixels ({width} x {height}); save it again")
    grey_key_scale = _grey_key_scale(image)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)  # a copy
        if grey_key_scale != 1:
            upright.info["transparency"] *= grey_key_scale
        return _to_rgb(upright, image, name)
    except ImageError:
        raise
    except Exception as error:
        # Pillow's decoders raise SyntaxError, struct.error, EOFError, zlib.error and more on damaged files.
        raise ImageError(
            f"{name}: is damaged or truncated ({type(error).__name__}: {error}); download or copy it again"
        ) from error


@contextmanager
def named_warnings(name: str) -> Iterator[None]:
    """Pillow's warnings ("Truncated File Read", ...) inside the block, told after it with the picture's name.

    Of bombs it does not warn: our own limit decides, and it refuses.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
    for warning in told:
        warnings.warn(f"{name}: {warning.message}", warning.category, stacklevel=3)


def _open(stream: IO[bytes], name: str, head: bytes) -> Image.Image:
    """Read the header only; an ImageError says what the file is if it is no picture."""
    Image.init()
    try:
        return Image.open(stream, formats=[known for known in FORMATS if known in Image.OPEN])
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: {_what_it_is(head)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: is a decompression bomb ({error}); scale it down, or, if you trust the file, raise Pillow's own limit, "
            "PIL.Image.MAX_IMAGE_PIXELS, beside max_pixels"
        ) from error
    except Exception as error:
        raise ImageError(
            f"{name}: has a damaged header ({type(error).__name__}: {error}); download or copy it again"
        ) from error


def _what_it_is(head: bytes) -> str:
    """From its first bytes, what a file is that is no readable picture, and what to do.

    >>> _what_it_is(bytes([0, 0, 0, 24]) + b"ftypheic")
    'HEIC is not supported; convert it to JPEG or PNG'
    """
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"):
        return "HEIC is not supported; convert it to JPEG or PNG"
    lowered = head.lstrip().lower()
    for start, kind in ((b"%pdf", "a PDF"), (b"%!ps", "PostScript"), (b"<svg", "SVG"), (b"<?xml", "XML or SVG")):
        if lowered.startswith(start):
            return f"is {kind}, not a pixel picture; convert it to PNG"
    if lowered.startswith((b"<!doctype", b"<html")):
        return "is a web page, not a picture; download the picture itself"
    return f"is not a picture (it begins with {head[:12]!r}); give one of {', '.join(FORMATS)}"


def _grey_key_scale(image: Image.Image) -> int:
    """What to multiply the transparent grey of a PNG of 2 or 4 bits by, 1 elsewhere; asked before loading pixels."""
    if image.format != "PNG" or image.mode != "L" or "transparency" not in image.info:
        return 1
    tiles = getattr(image, "tile", [])
    return GREY_KEY_SCALE.get(str(tiles[0].args), 1) if tiles else 1


def _to_rgb(image: Image.Image, opened: Image.Image, name: str) -> Image.Image:
    """A decoded picture of any mode -> RGB; `opened` still has the file's format and tags."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_grey_to_8_bit(image, opened, name)
    elif image.mode == "LAB":
        raise ImageError(f"{name}: LAB colours are not supported; convert it to RGB")
    elif image.mode == "RGB" and max(image.info.get("transparency", (0,))) > 255:
        raise ImageError(f"{name}: a transparent colour in 16-bit RGB is not supported; save it with an alpha channel")
    elif image.mode == "La":  # Pillow makes RGBA of RGBa, but not of this
        image = image.convert("LA")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return image.convert("RGB")


def _deep_grey_to_8_bit(image: Image.Image, opened: Image.Image, name: str) -> Image.Image:
    """Grey of 16 or 32 bits or float -> L, or LA where one grey value means transparent."""
    values = np.asarray(image)
    white = _white(values, opened, name)
    shares = values.astype(np.float64) / white
    tags = opened.tag_v2 if opened.format == "TIFF" else {}  # type: ignore[attr-defined]
    if tags.get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO:
        shares = 1 - shares
    grey = Image.fromarray(np.rint(shares * 255).astype(np.uint8))
    if "transparency" in image.info:
        alpha = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        grey = Image.merge("LA", (grey, alpha))
    return grey


def _white(values: np.ndarray, opened: Image.Image, name: str) -> float:
    """The value that means white; refuses where the file does not tell."""
    if opened.mode.startswith("I;16"):
        bits = opened.tag_v2.get(TIFF_BITS_PER_SAMPLE, (16,)) if opened.format == "TIFF" else (16,)  # type: ignore[attr-defined]
        return float(2 ** bits[0] - 1)
    if opened.mode == "I" and opened.format == "PPM":
        return float(WHITE_16_BIT)
    if opened.mode == "F" and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
        return 1.0
    kind = "floats outside 0 .. 1" if opened.mode == "F" else "32-bit or signed integers"
    raise ImageError(
        f"{name}: has {kind} ({values.min()} to {values.max()}), which do not say what is white; save it with 8 bits"
    )
