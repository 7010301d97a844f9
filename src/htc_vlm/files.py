"""Writes files whole or not at all, with the mode the user's umask asks for, and never over a file that is not ours.

Source:  ours.

`check_output` refuses before the work; `replacing` writes. Ours is what this library wrote: safetensors, PNG and JSON files
say so inside (`made_by_us`). Every command that writes a file uses these two.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAKER = "htc-vlm"  # PNG: the tEXt chunk Software; JSON: the key made_by; safetensors: how the metadata's format begins
FIGURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp", ".tif", ".tiff")  # what matplotlib writes
# Endings of pictures: those we read, and those (.heic, .heif, .svg) that are refused by name.
PICTURES = frozenset(
    ".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .avif .ppm .pgm .heic .heif .svg .mpo .jp2 .qoi .ico".split()
)
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
_HEAD_BYTES = 65536


def check_output(path: Path, force: bool = False, inputs: Iterable[Path] = (), suffixes: tuple[str, ...] = ()) -> None:
    """Refuse, before any work, a file that could not be written or would replace somebody else's.

    force: replace a foreign file; one of the command's own `inputs` is never replaced. suffixes: the endings that can be
    written. FileNotFoundError: no such folder; OSError: the folder cannot be written to; ValueError: everything else.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder does not exist; create it first")
    if suffixes and path.suffix and path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: its ending says no kind of file that can be written; known: {', '.join(suffixes)}")
    if path.exists():
        if path.is_dir():
            raise ValueError(f"{path}: is a folder; give the name of a file in it")
        if not path.is_file():
            raise ValueError(f"{path}: is no regular file; give the name of a file")
        if any(one.exists() and path.samefile(one) for one in inputs):
            raise ValueError(f"{path}: is read by this command and would be replaced; give another output")
        if not force and not made_by_us(path):
            raise ValueError(f"{path}: already there and not written by htc-vlm; give another name, or --force to replace it")
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from error


def picture_files(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Folders replaced by the pictures in them and in their subfolders, sorted -> (pictures, other files found there).

    A file that is named itself counts as a picture, whatever its ending; hidden files and folders are passed over.
    """
    pictures: list[Path] = []
    others: list[Path] = []
    for path in paths:
        if not path.is_dir():
            pictures.append(path)
            continue
        inside = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        for file in sorted(file for file in inside if not file.is_dir()):
            (pictures if file.suffix.lower() in PICTURES else others).append(file)
    return pictures, others


def made_by_us(path: Path) -> bool:
    """Does the file say that this library wrote it? An empty file is nobody's work, and counts as ours.

    >>> made_by_us(Path(__file__))
    False
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return True
    if head.startswith(PNG_HEAD):
        return b"tEXtSoftware\0" + MAKER.encode() in head
    if head[:1] in (b"{", b"["):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and str(found.get("made_by", "")).startswith(MAKER)
    return _safetensors_format(path, head).startswith(MAKER)


def _safetensors_format(path: Path, head: bytes) -> str:
    """The metadata's `format` of a safetensors file: 8 bytes with the length of a JSON header, then the header."""
    length = int.from_bytes(head[:8], "little")
    if not 2 <= length <= path.stat().st_size - 8 or head[8:9] != b"{":
        return ""
    with path.open("rb") as file:
        header = file.read(8 + length)[8:]
    try:
        return str(json.loads(header).get("__metadata__", {}).get("format", ""))
    except (ValueError, AttributeError, RecursionError):
        return ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write to; afterwards that file takes its place, complete. After an error or Ctrl-C
    nothing is left beside, and `path` is as it was. OSError names `path`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.chmod(0o666 & ~umask())
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None or str(error.filename) == str(path):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # by name: this file imports nothing heavy
            raise
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """`replacing` for a folder that is written by several calls: it takes the place of `path`, an older one of ours, when all
    of them are done; after an error nothing is left beside."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_new(path: Path, data: bytes, force: bool = False) -> None:
    """Write whole or not at all; the same bytes are left alone, others are a ValueError unless `force`."""
    if path.exists():
        if path.is_file() and path.read_bytes() == data:
            return
        if not force:
            raise ValueError(f"{path}: already there with other content; give another folder, or --force to replace it")
    with replacing(path) as partial:
        partial.write_bytes(data)


MAX_PIXELS = "refuse pictures of more pixels, once padded to a square (default: about 89 million)"


def positive(text: str) -> int:
    """A whole number of at least 1, as arguments of commands give it.

    >>> positive("100000000")
    100000000
    """
    number = int(text)
    if number < 1:
        raise ValueError(f"{text}: give at least 1")
    return number


def pixel_limit(options: Any) -> dict[str, int]:
    """`--max-pixels` as an argument of the loaders, {} where it was not given."""
    return {} if options.max_pixels is None else {"max_pixels": options.max_pixels}


def read_text(path: Path) -> str:
    """The text of somebody's file, without a byte-order mark. ValueError names the file where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); save it as UTF-8") from error


def printable(name: str) -> str:
    """A file name that is no UTF-8 in a form that can be written.

    >>> printable("caf" + chr(0xDCE9) + ".png")
    'caf\\\\udce9.png'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def check_text(text: str, where: str) -> None:
    """ValueError for half a letter (a lone surrogate, as JSON or a file name may hold), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text!a:.60} is no Unicode text; write it in UTF-8") from error


def read_object(path: Path, what_to_do: str = "copy it again") -> dict[str, Any]:
    """The JSON object in a file. ValueError names the file where there is none."""
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is damaged, or no JSON ({error}); {what_to_do}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object but a {type(found).__name__}; {what_to_do}")
    return found


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all, in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int = 2) -> None:
    """Write whole or not at all."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def save_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """A matplotlib figure -> a file of the kind its ending says (PNG without one), marked as ours where PNG allows it."""
    path = Path(path)
    kind = path.suffix[1:].lower() or "png"
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=kind, metadata={"Software": MAKER} if kind == "png" else None)


def umask() -> int:
    """The process's umask; read from Linux's /proc where it is, since asking for it means setting it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def open_to_umask(folder: Path) -> None:
    """Give files below `folder` that only their owner may read (safetensors writes them so) the mode of the umask."""
    mode = 0o666 & ~umask()
    for path in folder.rglob("*"):
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) == 0o600 != mode:
            path.chmod(mode)
