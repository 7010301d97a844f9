"""htc-vlm store: keep compressed pictures on disk, each once, and ask about them for ever."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from htc_vlm.cli._method import add_method, kept_method
from htc_vlm.cli._toys import tell_toy
from htc_vlm.files import printable

EXIT_PARTLY, EXIT_WRONG = 1, 2
DTYPES = ("model", "int8", "int4", "int2")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="htc-vlm store",
        description=__doc__,
        epilog="Options: add: --model --device --dtype --method --budget --maps --batch-size; get, export: --output --force; "
        "list: --limit --name --json. Exit code 0: done; 1: partly (some pictures could not be read, some images are "
        "damaged); 2: refused.",
    )
    actions = arguments.add_subparsers(dest="action", required=True, metavar="ACTION")

    add = _action(actions, "add", "compress pictures into a store; those that are there are not compressed again")
    add.add_argument("pictures", nargs="+", help="picture files, folders (with all folders in them), or patterns")
    add.add_argument("--model", default="tiny", help="a shipped checkpoint's name or a folder (default: tiny)")
    add.add_argument("--dtype", default="model", choices=DTYPES, help="how a new store packs images (default: the model's own)")
    add.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    add_method(add)
    add.add_argument("--maps", action="store_true", help="keep where the bottleneck looked, a byte a patch")
    add.add_argument("--batch-size", type=int, default=32, help="pictures a batch, and a commit (default: 32)")

    get = _action(actions, "get", "write images to a file that `htc-vlm ask --from` reads")
    get.add_argument("ids", nargs="+", help="ids or names of pictures")
    get.add_argument("--output", type=Path, required=True, metavar="FILE")
    get.add_argument("--force", action="store_true", help="replace a file that htc-vlm did not write")

    show = _action(actions, "list", "show ids, bytes and names")
    show.add_argument("--limit", type=int, help="at most so many")
    show.add_argument("--name", help="only pictures with a name that contains this")
    show.add_argument("--json", action="store_true", help="one JSON object a line")

    remove = _action(actions, "remove", "take images out")
    remove.add_argument("ids", nargs="+", help="ids or names of pictures")

    _action(actions, "verify", "read everything, and list damaged images (exit code 1 if there are any)")
    _action(actions, "compact", "give the room of removed images back to the disk")

    merge = _action(actions, "merge", "take over the images of other stores of the same model")
    merge.add_argument("others", nargs="+", type=Path, help="folders of the other stores")

    export = _action(actions, "export", "write all images to a parquet file (needs pyarrow)")
    export.add_argument("--output", type=Path, required=True, metavar="FILE.parquet")
    export.add_argument("--force", action="store_true", help="replace a file that htc-vlm did not write")
    return arguments


def _action(actions: Any, name: str, what: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = actions.add_parser(name, help=what, description=what)
    made.add_argument("store", type=Path, help="the store's folder")
    return made


def run(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    code: int = ACTIONS[options.action](options)
    return code


def add(options: argparse.Namespace) -> int:
    from htc_vlm import ImageStore, load
    from htc_vlm.model.loading import to_device
    from htc_vlm.store.pictures import paths_of

    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; give at least 1")
    paths = [path for given in options.pictures for path in paths_of(given)]  # before the model: a wrong path is told at once
    method = kept_method(options)
    model, processor = load(options.model)
    to_device(model, options.device)
    tell_toy("store", options.model)
    started = time.perf_counter()
    with ImageStore.open(options.store, model, processor, options.dtype, method=method, maps=options.maps) as store:
        added = store.add(paths, batch_size=options.batch_size, progress=sys.stderr.isatty(), on_refused=_tell)
        report = {
            "store": str(options.store), "pictures": len(added), "new": added.n_new, "refused": len(added.refused),
            "images": len(store), "bytes_per_image": store.get(added[0]).nbytes if added else None,
            "seconds": round(time.perf_counter() - started, 2),
        }  # fmt: skip
    print(json.dumps(report, indent=1))
    if not added:
        return 2
    return EXIT_PARTLY if added.refused else 0


def _tell(name: str, reason: str) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.write(f"htc-vlm store: left out: {reason if name in reason else f'{name}: {reason}'}", file=sys.stderr)


def get(options: argparse.Namespace) -> int:
    from htc_vlm.files import check_output

    check_output(options.output, options.force)
    with _open(options) as store:
        images = store.get(options.ids)
    images.save(options.output)
    print(json.dumps({"output": str(options.output), "images": len(images), "bytes_per_image": images[0].nbytes}, indent=1))
    return 0


def show(options: argparse.Namespace) -> int:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit is {options.limit}; give at least 1")
    with _open(options) as store:
        entries = store.list(options.limit, options.name)
        for one in entries:
            if options.json:
                print(json.dumps({"id": str(one), "names": one.names, "bytes": one.nbytes, "added": one.added}))
            else:
                print(f"{one}  {one.nbytes:>9,} bytes  {printable(', '.join(one.names))}")
        if not options.json:
            print(f"{len(entries)} of {len(store)} images, {store.about.dtype}, {store.nbytes_on_disk:,} bytes on disk")
    return 0


def remove(options: argparse.Namespace) -> int:
    with _open(options) as store:
        asked = list(dict.fromkeys(options.ids))
        unknown = [one for one in asked if not store.remove(one)]
        for one in unknown:
            print(f"htc-vlm store: not removed: {printable(one)}: no image of this id or name", file=sys.stderr)
        print(json.dumps({"removed": len(asked) - len(unknown), "images": len(store)}))
    if len(unknown) == len(asked):
        return EXIT_WRONG
    return EXIT_PARTLY if unknown else 0


def verify(options: argparse.Namespace) -> int:
    with _open(options) as store:
        damaged = store.verify(progress=sys.stderr.isatty())
        names = {one: own for one in store.list() if one in set(damaged) for own in [one.names]} if damaged else {}
        for one in damaged:
            print(f"damaged: {one}  {printable(', '.join(names.get(one, [])))}")
        print(f"{len(store)} images, {len(damaged)} damaged")
    return EXIT_PARTLY if damaged else 0


def compact(options: argparse.Namespace) -> int:
    with _open(options) as store:
        print(json.dumps({"bytes_freed": store.compact(), "bytes_on_disk": store.nbytes_on_disk}))
    return 0


def merge(options: argparse.Namespace) -> int:
    with _open(options) as store:
        n_new = [store.merge(other, progress=sys.stderr.isatty()) for other in options.others]
        print(json.dumps({"new": sum(n_new), "images": len(store)}))
    return 0


def export(options: argparse.Namespace) -> int:
    from htc_vlm.files import check_output

    check_output(options.output, options.force, suffixes=(".parquet",))
    with _open(options) as store:
        n_images = store.export(options.output, progress=sys.stderr.isatty())
    print(json.dumps({"output": str(options.output), "images": n_images}))
    return 0


def _open(options: argparse.Namespace) -> Any:
    from htc_vlm import ImageStore

    return ImageStore.open(options.store)


ACTIONS: dict[str, Any] = {
    "add": add, "get": get, "list": show, "remove": remove, "verify": verify, "compact": compact, "merge": merge,
    "export": export,
}  # fmt: skip
