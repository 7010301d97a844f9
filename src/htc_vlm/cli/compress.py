"""htc-vlm compress: turn pictures into a file of compressed images that questions can be asked of later."""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from htc_vlm.cli._method import add_method, kept_method
from htc_vlm.cli._toys import tell_toy
from htc_vlm.files import MAX_PIXELS, check_output, picture_files, pixel_limit, positive

SAVE_EVERY_S = 60.0  # what is done so far is written about this often, so that a kill loses little
EXIT_INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(prog="htc-vlm compress", description=__doc__)
    arguments.add_argument(
        "pictures", nargs="+", type=Path, help="picture files; a folder stands for the pictures in it and in its subfolders"
    )
    arguments.add_argument("--output", type=Path, required=True, metavar="FILE", help="where the compressed pictures go")
    arguments.add_argument("--model", default="tiny", help="a shipped checkpoint's name or a folder (default: tiny)")
    arguments.add_argument("--batch-size", type=int, default=16, help="pictures compressed at once (default: 16)")
    arguments.add_argument("--max-pixels", type=positive, metavar="N", help=MAX_PIXELS)
    arguments.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    add_method(arguments)
    arguments.add_argument("--force", action="store_true", help="replace a file that htc-vlm did not write")
    return arguments


class Album:
    """Compressed pictures on their way into a file. A finished file of an earlier run is replaced by a finished one only:
    until then what is done is kept beside it, under FILE.unfinished."""

    def __init__(self, output: Path, n_files: int) -> None:
        self.output, self.n_files = output, n_files
        self.unfinished = output.with_name(output.name + ".unfinished") if output.exists() else output
        self.parts: list[Any] = []
        self.names: list[str] = []
        self._saved_at = time.monotonic()

    def add(self, images: Any, names: list[str]) -> None:
        """Keep some; write what there is once in a while. OSError as soon as it is clear that the disk is too small, and
        ValueError for images of another size, which no file holds beside those before."""
        if self.parts and self.parts[0].n_bottleneck != images.n_bottleneck:
            raise ValueError(
                f"{names[0]} gives {images.n_bottleneck} entries, {self.names[0]} {self.parts[0].n_bottleneck}, and a file "
                "holds pictures of one count; keep them in a store (htc-vlm store add), or fix the count (--budget 64)"
            )
        self.parts.append(images.to("cpu"))
        self.names += names
        needed, free = images[0].nbytes * self.n_files, shutil.disk_usage(self.output.absolute().parent).free
        if len(self.parts) == 1 and needed > free:
            told = f"{self.n_files} pictures need {needed:,} bytes, the disk has {free:,}"
            raise OSError(errno.ENOSPC, told, str(self.output))
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save(self.unfinished)

    def save(self, file: Path) -> Any:
        """Write all there are -> them."""
        from htc_vlm import CompressedImages

        images = CompressedImages.concat(self.parts)
        self.parts = [images]
        images.save(file)
        self._saved_at = time.monotonic()
        return images

    def finish(self) -> Any:
        images = self.save(self.output)
        if self.unfinished != self.output:
            self.unfinished.unlink(missing_ok=True)
        return images


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; give at least 1")
    method = kept_method(options)
    files, others = picture_files(options.pictures)
    check_output(options.output, options.force, files)
    if others:
        _tell(f"left out: {len(others)} files whose ending is no picture's, e.g. {others[0]}")
    if not files:
        raise ValueError("no picture among these, so there is nothing to write; e.g. htc-vlm compress photos --output album")
    from tqdm import tqdm  # type: ignore[import-untyped]

    from htc_vlm import load
    from htc_vlm.data.images import load_batches
    from htc_vlm.model.loading import to_device
    from htc_vlm.store.encoding import encode_each, encoder_of

    model, processor = load(options.model)
    tell_toy("compress", options.model)
    encoder = encoder_of(to_device(model, options.device), processor, method)
    album, refused = Album(options.output, len(files)), []

    def leave_out(file: Path, error: str) -> None:
        refused.append(file)
        _tell(f"left out: {error}")

    paths: list[Path] = []

    def unfit(number: int, why: str) -> None:
        leave_out(paths[number], f"{paths[number]}: {why}")

    code = 0
    try:
        with tqdm(total=len(files), desc="compress", unit="picture", disable=None) as bar:
            for paths, pictures in load_batches(files, options.batch_size, leave_out, **pixel_limit(options)):
                for numbers, images in encode_each(encoder, pictures, False, unfit):
                    album.add(images, [str(paths[i]) for i in numbers])
                bar.update(len(album.names) + len(refused) - bar.n)
        if not album.parts:
            raise ValueError("no picture could be read, so there is nothing to write")
        file, images = options.output, album.finish()
    except BaseException as error:
        if not album.parts or isinstance(error, OSError):
            raise
        file, images = album.unfinished, album.save(album.unfinished)
        _tell(f"stopped: {len(album.names)} of {len(files)} pictures are in {file}")
        if not isinstance(error, KeyboardInterrupt):
            raise
        code = EXIT_INTERRUPTED
    report = {
        "output": str(file), "pictures": album.names, "refused": len(refused), "bytes_per_picture": images[0].nbytes
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    return code or (1 if refused else 0)


def _tell(line: str) -> None:
    print(f"htc-vlm compress: {' '.join(line.split())}", file=sys.stderr)
