"""Take the picture of the server's page for the README: three scenes, asked about their pattern and a thing that is in each.

    python scripts/screenshot_page.py [docs/assets/page.png]      (needs Debian's chromium, and playwright)
"""

from __future__ import annotations

import io
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import sync_playwright

from htc_vlm import ImageStore, load
from htc_vlm.serve.app import make_app
from htc_vlm.tiny import pictograms

PLACE = 3  # of PLACES: bottom right
QUESTIONS = (f"what is at the {pictograms.PLACES[PLACE]} ?", "what pattern is the background ?")


def scenes() -> list[str]:
    """The first three test scenes with something at the place that is asked about, and patterns of their own."""
    found: dict[str, str] = {}
    for name in pictograms.images("test"):
        scene = pictograms.scene(name)
        if any(thing.cell == PLACE for thing in scene.things) and scene.pattern not in found:
            found[scene.pattern] = name
        if len(found) == 3:
            break
    return list(found.values())


def main() -> int:
    output = sys.argv[1] if len(sys.argv) > 1 else "docs/assets/page.png"
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        files = []
        for name in scenes():
            files.append(Path(folder) / f"scene-{name.split('/')[1]}.png")
            pictograms.picture(name).save(files[-1])
        model, processor = load("tiny")
        store = ImageStore.open(Path(folder) / "store", model, processor, maps=True)
        app = make_app(model, processor, store, "tiny")
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        with sync_playwright() as engine:
            browser = engine.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1000, "height": 860})
            page.set_default_timeout(300_000)
            page.goto(f"http://127.0.0.1:{port}")
            page.set_input_files("#files", [str(file) for file in files])
            for file in files:
                page.get_by_text(file.name, exact=True).wait_for()
            for number, question in enumerate(QUESTIONS, 1):
                page.fill("#question", question)
                page.keyboard.press("Enter")
                while sum(text.endswith(" ms") for text in page.locator("dd small").all_text_contents()) < number * len(files):
                    time.sleep(0.1)
            page.locator("#question").blur()
            shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            browser.close()
        shot.resize((720, 619), Image.Resampling.LANCZOS).quantize(128).save(output, optimize=True)
        server.should_exit = True
        thread.join()
    print(output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
