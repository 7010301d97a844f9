"""The commands of `htc-vlm`, one file each, with `run(argv: list[str]) -> int`; `htc_vlm_cli.py` beside this package finds them."""
