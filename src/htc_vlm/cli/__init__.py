"""The commands of `htc-vlm`, one file each, with `run(argv: list[str]) -> int`; see `htc_vlm_cli.py`."""
