"""Hostile and odd pictures, made on the fly; every expected pixel is worked out by hand."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from htc_vlm.data.images import (
    ImageError,
    fill_from_mean,
    from_bytes,
    load_for_model,
    load_image,
    named_warnings,
    pad_to_square,
)

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image: Image.Image) -> list[list[tuple[int, ...]]]:
    """Rows of pixels."""
    assert image.mode == "RGB"
    return [[tuple(int(channel) for channel in pixel) for pixel in row] for row in np.asarray(image)]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: colour 0 grey, 2 RGB, 3 palette, 4 grey + alpha; rows begin with a filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def tiff(array: np.ndarray, **tags: Any) -> bytes:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.items():
        info[int(number.removeprefix("tag"))] = value
    return encoded(Image.fromarray(array), "TIFF", tiffinfo=info)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    """`.convert("RGB")` clips: everything from 256 of 65535 on is white. 257 * 128 = 32896."""
    data = png(4, 1, 16, 0, b"\x00" + struct.pack(">4H", 0, 257, 32896, 65535))
    assert pixels(from_bytes(data)) == [[(0,) * 3, (1,) * 3, (128,) * 3, (255,) * 3]]


def test_sixteen_bit_grey_rounds_to_the_nearest_step() -> None:
    """128 of 257 is less than half a step, 129 is more."""
    data = tiff(np.array([[128, 129, 40000]], dtype=np.uint16))
    assert pixels(from_bytes(data)) == [[(0,) * 3, (1,) * 3, (156,) * 3]]


def test_sixteen_bit_grey_with_a_transparent_value_is_white_there() -> None:
    """The transparent value is in 16 bits and is compared before scaling: 257 and 258 both scale to 1."""
    data = png(2, 1, 16, 0, b"\x00" + struct.pack(">2H", 257, 258), (b"tRNS", struct.pack(">H", 257)))
    assert pixels(from_bytes(data)) == [[WHITE, (1, 1, 1)]]


def test_two_bit_grey_with_a_transparent_value_is_white_there() -> None:
    """Pillow widens the pixels 0 1 2 3 to 0 85 170 255 but leaves the transparent value at 1."""
    data = png(4, 1, 2, 0, bytes([0, 0b00_01_10_11]), (b"tRNS", struct.pack(">H", 1)))
    assert pixels(from_bytes(data)) == [[BLACK, WHITE, (170,) * 3, WHITE]]


def test_sixteen_bit_colour_keeps_the_high_byte() -> None:
    data = png(1, 1, 16, 2, b"\x00" + struct.pack(">3H", 0x8000, 0x00FF, 0xFFFF))
    assert pixels(from_bytes(data)) == [[(128, 0, 255)]]


def test_sixteen_bit_colour_with_a_transparent_colour_is_refused() -> None:
    """Pillow has only the high bytes left, so the colour cannot be compared."""
    data = png(1, 1, 16, 2, bytes(7), (b"tRNS", struct.pack(">3H", 0x8000, 0, 0)))
    with pytest.raises(ImageError, match="transparent colour in 16-bit RGB"):
        from_bytes(data)


def test_white_is_zero_in_a_sixteen_bit_tiff_is_inverted() -> None:
    """Scanners write it; Pillow inverts 8 bits but not 16. 65535 - 257 = 65278 -> 254."""
    data = tiff(np.array([[0, 257, 65535]], dtype=np.uint16), tag262=0)
    assert pixels(from_bytes(data)) == [[(255,) * 3, (254,) * 3, (0,) * 3]]


def test_sixteen_bit_pgm_is_scaled() -> None:
    """Pillow opens it in mode I, 32 bits, where `.convert` clips at 255."""
    assert pixels(from_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 32896, 65535))) == [[(128,) * 3, WHITE]]


def test_floats_from_0_to_1_are_scaled() -> None:
    """`.convert` truncates 0.5 to 0."""
    data = tiff(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert pixels(from_bytes(data)) == [[BLACK, (128,) * 3, WHITE]]


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0.0, 300.0]], dtype=np.float32),
        np.array([[-0.5, 0.5]], dtype=np.float32),
        np.array([[np.nan, 0.5]], dtype=np.float32),
        np.array([[0, 70000]], dtype=np.int32),
    ],
)
def test_values_without_a_known_white_are_refused(array: np.ndarray) -> None:
    """Depth maps and X-rays: a guessed scale gives a picture nobody took."""
    with pytest.raises(ImageError, match="scan.tif: has .* do not say what is white; save it with 8 bits"):
        from_bytes(tiff(array), name="scan.tif")


TURNED = {  # stored: red green / blue white. The orientation says where the stored top row and left column belong
    1: [[RED, GREEN], [BLUE, WHITE]], 2: [[GREEN, RED], [WHITE, BLUE]], 3: [[WHITE, BLUE], [GREEN, RED]],
    4: [[BLUE, WHITE], [RED, GREEN]], 5: [[RED, BLUE], [GREEN, WHITE]], 6: [[BLUE, RED], [WHITE, GREEN]],
    7: [[WHITE, GREEN], [BLUE, RED]], 8: [[GREEN, WHITE], [RED, BLUE]],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_the_camera_s_rotation_is_applied_once(kind: str) -> None:
    """Phones store a portrait lying down; "what is left of" is then wrong. Pillow already turns TIFF by itself."""
    image = Image.new("RGB", (2, 2))
    image.putdata([RED, GREEN, BLUE, WHITE])
    options = {"lossless": True} if kind == "WEBP" else {}
    seen = {}
    for orientation in TURNED:
        exif = Image.Exif()
        exif[0x0112] = orientation
        seen[orientation] = pixels(from_bytes(encoded(image, kind, exif=exif, **options)))
    assert seen == TURNED


def test_a_rotated_picture_swaps_width_and_height() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert from_bytes(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


def test_cmyk_inks_become_light() -> None:
    """(255 - ink) * (255 - black) / 255: cyan 255 leaves no red; half black halves white."""
    image = Image.new("CMYK", (3, 1))
    image.putdata([(255, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 128)])
    assert pixels(from_bytes(encoded(image, "TIFF"))) == [[(0, 255, 255), WHITE, (127, 127, 127)]]


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    """Adobe stores the inks inverted; read plainly a white page is black."""
    white = from_bytes(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert white.getpixel((4, 4)) == WHITE


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 128), (255, 127, 127)),  # 255 - 128 = 127 of white shines through
        ("LA", (0, 0), WHITE),
        ("LA", (0, 128), (127, 127, 127)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, WHITE),
        ("1", 0, BLACK),
    ],
)
def test_transparency_goes_onto_white(mode: str, value: Any, expected: tuple[int, ...]) -> None:
    """`.convert("RGB")` drops alpha and shows the black that most editors leave under transparent pixels."""
    assert pixels(from_bytes(encoded(Image.new(mode, (1, 1), value), "PNG"))) == [[expected]]


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_goes_onto_white(kind: str, transparency: int | bytes) -> None:
    if kind == "GIF" and isinstance(transparency, bytes):
        pytest.skip("GIF has no partly transparent palettes")
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    assert pixels(from_bytes(encoded(image, kind, transparency=transparency))) == [[WHITE, BLUE]]


def test_a_half_transparent_palette_entry_is_mixed_with_white() -> None:
    data = png(1, 1, 8, 3, b"\x00\x00", (b"PLTE", bytes(RED)), (b"tRNS", bytes([128])))
    assert pixels(from_bytes(data)) == [[(255, 127, 127)]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert pixels(from_bytes(data))[3][3] == RED


def test_of_a_stereo_picture_the_first_view_is_taken() -> None:
    """MPO, two JPEGs in one file, is what some cameras and phones write with the ending .jpg."""
    first, second = Image.new("RGB", (8, 8), WHITE), Image.new("RGB", (8, 8), BLACK)
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert from_bytes(data).getpixel((4, 4)) == WHITE


def test_a_single_pixel_survives(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), GREEN).save(tmp_path / "dot.png")
    assert pixels(load_image(tmp_path / "dot.png")) == [[GREEN]]


def test_the_ending_of_the_name_does_not_matter(tmp_path: Path) -> None:
    """A WebP saved as .jpg is the most common wild picture of all."""
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.new("RGB", (1, 1), GREEN), "PNG"))
    assert pixels(load_image(str(tmp_path / "photo.jpg"))) == [[GREEN]]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """A half download would train as a half grey picture."""
    file = tmp_path / "half"
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "QOI"):
        for share in (0.05, 0.5, 0.9):
            data = encoded(NOISE, kind)
            file.write_bytes(data[: int(len(data) * share)])
            with pytest.raises(ImageError, match=f"^{file}: .*again|^{file}: is not a picture"):
                load_image(file)
                pytest.fail(f"{share} of a {kind} was read")


def test_a_flipped_byte_in_a_png_is_refused() -> None:
    """PNG has checksums; ignoring them gives coloured stripes."""
    data = bytearray(encoded(NOISE, "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="is damaged"):
        from_bytes(bytes(data))


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    """60000 x 60000 black pixels are 450 kB of PNG and 10 GB of memory; here the data is not even there."""
    data = png(60000, 60000, 8, 2, b"")
    with pytest.raises(ImageError, match="bomb.png: .*(bomb|exceed)"):
        from_bytes(data, name="bomb.png")
    with pytest.raises(ImageError, match="raise Pillow's own limit, PIL.Image.MAX_IMAGE_PIXELS, beside max_pixels"):
        from_bytes(data, name="bomb.png", max_pixels=10**12)


def test_the_pixel_limit_is_exact_and_named() -> None:
    data = encoded(Image.new("RGB", (10, 10)), "PNG")
    assert from_bytes(data, max_pixels=100).size == (10, 10)
    with pytest.raises(ImageError, match="10 x 10 pixels exceed the limit of 99; scale it down, or raise max_pixels"):
        from_bytes(data, max_pixels=99)


def test_a_long_thin_picture_loads_but_is_not_padded() -> None:
    """200000 x 1 is small; its square has 40 billion pixels."""
    image = from_bytes(encoded(Image.new("RGB", (200_000, 1)), "PNG"))
    assert image.size == (200_000, 1)
    with pytest.raises(ImageError, match="200000 x 1 padded to a square .* switch padding off or crop it"):
        pad_to_square(image)


def test_files_that_are_no_pictures_are_named_with_a_remedy(tmp_path: Path) -> None:
    """"cannot identify image file <_io.BufferedReader>" helps nobody."""
    cases = {
        "empty.png": (b"", "is empty"),
        "text.png": (b"Dear diary, today", "is not a picture .it begins with b'Dear diary, '"),
        "page.jpg": (b"<!DOCTYPE html><html>", "is a web page"),
        "doc.jpg": (b"%PDF-1.7", "is a PDF"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG"),
        "figure.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is PostScript"),
        "phone.heic": (struct.pack(">I", 24) + b"ftypheic" + bytes(12), "HEIC is not supported; convert it to JPEG"),
        "zeros.png": (bytes(100), "is not a picture"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match=f"^{tmp_path / name}: {message}"):
            load_image(tmp_path / name)


def test_paths_that_are_no_files_are_named_with_a_remedy(tmp_path: Path) -> None:
    """A named pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone")
    cases = {".": "is a folder", "none.png": "no such file", "pipe.png": "not a regular", "dangling.png": "no such"}
    for name, message in cases.items():
        with pytest.raises(ImageError, match=f"^{tmp_path / name}: .*{message}"):
            load_image(tmp_path / name)


def test_lab_is_refused_with_a_remedy() -> None:
    with pytest.raises(ImageError, match="LAB colours are not supported; convert it to RGB"):
        from_bytes(encoded(Image.new("LAB", (1, 1)), "TIFF"))


def test_broken_exif_does_not_lose_the_picture() -> None:
    """Editors write nonsense there; browsers show such pictures upright as stored."""
    data = encoded(Image.new("RGB", (8, 4), WHITE), "JPEG", exif=b"Exif\x00\x00" + b"\xffgarbage" * 3)
    assert from_bytes(data).size == (8, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_damaged_file_gives_a_picture_or_an_image_error(kind: str) -> None:
    """Pillow's decoders raise a dozen kinds of exceptions; one unexpected kind ends a training run at night."""
    whole, random = encoded(NOISE.resize((16, 16)), kind), np.random.default_rng(0)
    for _ in range(30):
        data = bytearray(whole)
        for position in random.integers(0, len(data), random.integers(1, 41)):
            data[position] = random.integers(0, 256)
        try:
            assert from_bytes(bytes(data)).mode == "RGB"
        except ImageError as error:
            assert str(error).startswith("picture: ")


@pytest.mark.parametrize("start", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"RIFF\0\0\0\0WEBP"])
def test_random_bytes_are_refused(start: bytes) -> None:
    """Also behind the first bytes of a picture, which choose a decoder."""
    random = np.random.default_rng(1)
    for n in range(0, 200, 9):
        with pytest.raises(ImageError):
            from_bytes(start + random.bytes(n))


def test_padding_puts_the_odd_pixel_below_or_to_the_right() -> None:
    """LLaVA: (5 - 2) // 2 = 1 row above, 2 below."""
    wide = pad_to_square(Image.new("RGB", (5, 2), RED), fill=BLUE)
    assert [row[0] for row in pixels(wide)] == [BLUE, RED, RED, BLUE, BLUE]
    tall = pad_to_square(Image.new("RGB", (2, 5), RED), fill=BLUE)
    assert pixels(tall)[0] == [BLUE, RED, RED, BLUE, BLUE]


def test_padding_leaves_a_square_alone() -> None:
    image = Image.new("RGB", (3, 3), RED)
    assert pixels(pad_to_square(image, fill=BLUE)) == pixels(image)


def test_the_fill_colour_is_clip_s_mean_rounded_down() -> None:
    """LLaVA-1.5's grey; rounding to nearest would give 123, 117, 104."""
    assert fill_from_mean([0.48145466, 0.4578275, 0.40821073]) == (122, 116, 104)


def test_both_loaders_take_the_limit_of_pixels(tmp_path: Path) -> None:
    """`load_for_model(path, max_pixels=...)` decoded under the default limit, whatever was given."""
    path = tmp_path / "big.png"
    Image.new("1", (9500, 9500)).save(path)  # 90 million pixels, above the default limit
    for load in (load_image, load_for_model):
        with pytest.raises(ImageError, match="exceed"):
            load(path)
        assert load(path, max_pixels=10**8).size == (9500, 9500)
        with pytest.raises(ImageError, match="limit of 1,000"):
            load(path, max_pixels=1000)


def test_pillows_warnings_name_the_file(tmp_path: Path) -> None:
    """`UserWarning: Truncated File Read`: of which of 2,000 photos?"""
    with pytest.warns(UserWarning, match=r"cat\.jpg: Corrupt EXIF data"), named_warnings("cat.jpg"):
        warnings.warn("Corrupt EXIF data", UserWarning, stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with named_warnings("big.png"):
            warnings.warn("could be a bomb", Image.DecompressionBombWarning, stacklevel=1)
