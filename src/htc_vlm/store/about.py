"""`store.json`: what made a store's images and how they are packed, written once and never changed.

Source:  ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensors_as_bytes

from htc_vlm.model.packing import LEAST_CALIBRATION, Levels
from htc_vlm.model.recipe import Recipe
from htc_vlm.store.rows import SCHEMA

FORMAT = "htc-vlm image store"
FILE, LEVELS_FILE = "store.json", "levels.safetensors"


@dataclass(frozen=True)
class About:
    """dtype: "model", "int8", "int4", "int2"; torch_dtype: of "model". layers, n_heads (of keys and values), head_dim."""

    recipe: Recipe
    dtype: str
    torch_dtype: torch.dtype
    layers: int
    n_heads: int
    head_dim: int
    levels: Levels | None = None

    @classmethod
    def read(cls, folder: Path) -> About | None:
        """None where there is no store. ValueError for a newer or damaged one, or another thing of that name."""
        path = folder / FILE
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: is a file; a store is a folder")
        if not path.exists():
            return None
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            if written["format"] != FORMAT:
                raise KeyError("format")
            if written["schema"] > SCHEMA:
                raise _NewerError(written["schema"])
            about = written["about"]
            if _check(about) != written["check"]:
                raise KeyError("check")
            read = cls(Recipe(about["recipe"]), about["dtype"], getattr(torch, about["torch_dtype"]), *about["sizes"])
        except _NewerError as error:
            raise ValueError(
                f"{folder}: a store of schema {error}; this htc-vlm knows {SCHEMA}: install a newer one"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: damaged, or not a store's ({error}); copy it from a backup, or from another store of the same model"
            ) from error
        return read.with_levels_of(folder)

    @classmethod
    def make(
        cls,
        folder: Path,
        recipe: Recipe,
        dtype: str,
        torch_dtype: torch.dtype,
        sizes: tuple[int, int, int],
        levels: Levels | None,
    ) -> About:
        """Write it, unless another process just did: then what that wrote holds."""
        folder.mkdir(parents=True, exist_ok=True)
        others = [one.name for one in folder.iterdir() if not one.name.startswith((FILE, LEVELS_FILE))]
        if others and not (folder / FILE).exists():  # another process may have made it since the caller looked, and begun
            raise ValueError(f"{folder}: is no store and not empty (it has {others[0]}); give a folder of its own")
        if levels is not None:
            if dtype != "int2":
                raise ValueError(f"levels are for int2, not {dtype}")
            _write_once(folder / LEVELS_FILE, _levels_as_bytes(levels))
        about = {"recipe": recipe.parts, "dtype": dtype, "torch_dtype": str(torch_dtype).removeprefix("torch."), "sizes": sizes}
        about = json.loads(json.dumps(about))
        written = {"format": FORMAT, "schema": SCHEMA, "about": about, "check": _check(about)}
        _write_once(folder / FILE, (json.dumps(written, indent=1) + "\n").encode())
        made = cls.read(folder)
        assert made is not None
        return made

    def with_levels_of(self, folder: Path) -> About:
        """With int2's levels, where they are calibrated already."""
        path = folder / LEVELS_FILE
        if self.dtype != "int2" or not path.exists():
            return self
        try:
            tensors = read_tensors(path.read_bytes())
            levels = Levels(tensors["levels"])
            if list(bytes.fromhex(levels.digest)) != tensors["check"].tolist():
                raise ValueError("its levels do not match their checksum")
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: damaged ({error}); copy it from a backup: no image can be read without") from error
        return replace(self, levels=levels)

    def calibrated(self, folder: Path, levels: Levels) -> About:
        """Write levels, unless another process just did."""
        _write_once(folder / LEVELS_FILE, _levels_as_bytes(levels))
        return self.with_levels_of(folder)

    def with_levels(self, folder: Path, levels: Levels) -> About:
        """Take levels that a caller has. ValueError where there are others, or none are used."""
        if self.dtype != "int2":
            raise ValueError(f"{folder}: levels are for int2, and this store keeps {self.dtype}; leave them out")
        about = self if self.levels is not None else self.calibrated(folder, levels)
        if about.levels is None or about.levels.digest != levels.digest:
            raise ValueError(f"{folder}: has int2 levels of its own, which differ from those given; leave them out")
        return about

    def check_recipe(self, recipe: Recipe, folder: Path) -> None:
        """ValueError that says what differs."""
        if recipe.digest != self.recipe.digest:
            differ = recipe.differences(self.recipe.parts)
            listed = ", ".join(differ[:4]) + (", ..." if len(differ) > 4 else "")
            raise ValueError(
                f"{folder}: made with another recipe ({listed} differ); open it with the model that made it, or make a new one"
            )

    def same_packing(self, other: About) -> bool:
        """Can rows of one stand in the other?"""
        levels = [one.levels.digest if one.levels else None for one in (self, other)]
        sizes = [(one.dtype, one.layers, one.n_heads, one.head_dim) for one in (self, other)]
        same_floats = self.dtype != "model" or self.torch_dtype == other.torch_dtype
        return sizes[0] == sizes[1] and levels[0] == levels[1] and same_floats


def check_levels(folder: str | os.PathLike[str], dtype: str = "model") -> None:
    """ValueError for a store of int2, there or to be made, without levels: pictures that come a few at a time make none."""
    about = About.read(Path(folder))
    if (dtype if about is None else about.dtype) == "int2" and (about is None or about.levels is None):
        raise ValueError(
            f"{folder}: int2 has no levels yet; begin the store with `htc-vlm store add {folder} PICTURES --dtype int2`, "
            f"{LEAST_CALIBRATION} pictures or more"
        )


class _NewerError(Exception):
    pass


def _check(about: Any) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _levels_as_bytes(levels: Levels) -> bytes:
    check = torch.tensor(list(bytes.fromhex(levels.digest)), dtype=torch.uint8)
    tensors = {"levels": levels.values.contiguous().cpu(), "check": check}
    return tensors_as_bytes(tensors, metadata={"format": f"{FORMAT} levels"})


def _write_once(path: Path, content: bytes) -> None:
    """Whole or not at all; a file that is there stays."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
