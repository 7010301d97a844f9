"""A server of a checkpoint without a bottleneck: a tiny LLaVA-NeXT of random weights, its pictures kept by divprune."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import htc_vlm
from htc_vlm.serve.app import make_app

from .. import tinies
from .conftest import QUESTION, Server, data_uri, png, scene, text

DIVPRUNE = {"name": "divprune", "budget": 8}
QUESTIONS = [QUESTION, "is there a cat ?"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return htc_vlm.load(tinies.save_llava_next(tmp_path_factory.mktemp("next")))


@pytest.fixture(scope="module")
def client(loaded: tuple[Any, Any]) -> Iterator[Server]:
    with Server(loaded, DIVPRUNE) as one:
        yield one


def test_answers_are_those_of_generate(client: Server, loaded: tuple[Any, Any]) -> None:
    """Two pictures, two questions each, one batch; some pictures come with their question."""
    kept = [htc_vlm.compress(*loaded, [scene(i)], **{"method": "divprune", "budget": 8}) for i in (0, 1)]
    expected = [
        answer for one in kept for answer in htc_vlm.generate(*loaded, compressed=one, text=QUESTIONS, max_new_tokens=4)
    ]
    urls = [client.keep(0), data_uri(png(1))]
    first = client.chat(QUESTION, urls[1], max_tokens=4)
    before = client.metric("batches_total")
    with ThreadPoolExecutor(4) as threads:
        with client.held():
            sent = [threads.submit(client.chat, asked, url, max_tokens=4) for url in urls for asked in QUESTIONS]
            client.wait_for_rows(4)
        answers = [one.result() for one in sent]
    assert [text(one) for one in answers] == expected and text(first) == expected[2]
    assert client.metric("batches_total") - before == 1
    usage = answers[0].json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == kept[0].n_bottleneck < usage["prompt_tokens"]


def test_a_conversation_goes_on_behind_its_picture(client: Server, loaded: tuple[Any, Any]) -> None:
    url = client.keep(0)
    turns = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what ?"}]},
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": "where ?"},
    ]
    kept = htc_vlm.compress(*loaded, [scene(0)], "divprune", budget=8)
    whole = htc_vlm.generate(*loaded, compressed=kept, text=["<image>what ? cat where ? "], max_new_tokens=3)
    given = client.post("/v1/chat/completions", json={"model": "tiny", "messages": turns, "max_tokens": 3})
    assert text(given) == whole[0]
    assert text(client.chat("what ?", max_tokens=3)) is not None  # and text alone


def test_what_would_be_another_answer_is_refused(client: Server) -> None:
    """A second picture, or other text before the first, would not be what was kept."""
    url = client.keep(0)
    two = client.chat("what ?", url, url)
    assert two.status_code == 400 and two.json()["error"]["code"] == "too_many_images"
    picture, words = {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what ?"}
    for messages in (
        [{"role": "user", "content": [words, picture]}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": [picture, words]}],
    ):
        refused = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
        assert refused.status_code == 400 and "must open the first message" in refused.json()["error"]["message"]
    assert client.chat("what is <image> ?", url).status_code == 400


def test_an_image_of_a_stock_model_has_no_map_and_its_store_must_be_its_own(
    client: Server, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    described = client.get(f"/v1/images/{client.keep(0)[4:]}").json()
    assert described["map"] is None and described["tokens"] == 8 and described["bytes"] > 0
    told = pytest.raises(ValueError, match="has no bottleneck, and the store was not made by it")
    with htc_vlm.ImageStore.open(tmp_path / "s", *htc_vlm.load("tiny")) as other, told:
        make_app(*loaded, other, "next")
