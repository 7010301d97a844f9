"""Chat completions: batches of different pictures, streams, several images and turns, what a request may ask for."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from htc_vlm import CompressedImages
from htc_vlm.model.answering import Answerer

from .conftest import QUESTION, Server, choices, data_uri, png, scene, text, tiny


def alone(answerer: Answerer, number: int, question: str = QUESTION) -> str:
    return answerer.answer(str(number), lambda: scene(number), [question], 16)[0]


def of_prompt(prompt: str, numbers: list[int]) -> str:
    """The answer of plain `generate` to a prompt of our own."""
    model, processor = tiny()
    inputs = processor(text=[prompt], return_tensors="pt")
    with torch.no_grad():
        kept = CompressedImages.concat([Answerer(model, processor).encode([scene(i)]) for i in numbers])  # type: ignore[misc]
        ids = model.generate(**inputs, compressed=kept, max_new_tokens=16, do_sample=False)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def stream(response: Any) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_different_pictures_share_a_batch_and_nobody_hears_about_another(client: Server, answerer: Answerer) -> None:
    """llama.cpp 4194: with slots > 0 the server answered about another client's picture."""
    urls = [client.keep(i) for i in range(8)]
    before = client.metric("batches_total")
    with ThreadPoolExecutor(8) as pool, client.held():
        answers = [pool.submit(client.chat, QUESTION, url) for url in urls]
        client.wait_for_rows(8)
    given = [text(one.result()) for one in answers]
    assert given == [alone(answerer, i) for i in range(8)]
    assert len(set(given)) > 4
    assert client.metric("batches_total") == before + 1


def test_questions_about_one_picture_share_it(client: Server, answerer: Answerer) -> None:
    questions = [QUESTION, "what pattern is the background ?", "is there a mammal ?"]
    with ThreadPoolExecutor(3) as pool, client.held():
        url = data_uri(png(20))
        answers = [pool.submit(client.chat, question, url) for question in questions]
    assert [text(one.result()) for one in answers] == [alone(answerer, 20, question) for question in questions]


def test_a_picture_is_compressed_once_however_often_it_is_sent(client: Server) -> None:
    """Four clients with the same bytes at the same time, and one afterwards."""
    before = client.metric("images_encoded_total")
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(client.chat, QUESTION, data_uri(png(21))) for _ in range(4)]
    assert len({text(one.result()) for one in answers}) == 1
    client.chat(QUESTION, data_uri(png(21)))
    assert client.metric("images_encoded_total") == before + 1


def test_limits_are_those_of_each_row(client: Server) -> None:
    """In one batch: one token, and as many as it takes (a word and its end)."""
    url = client.keep(0)
    with ThreadPoolExecutor(2) as pool, client.held():
        answers = [pool.submit(client.chat, QUESTION, url, max_tokens=n) for n in (1, 9)]
        client.wait_for_rows(2)
    short, long = (one.result().json() for one in answers)
    assert [one["choices"][0]["finish_reason"] for one in (short, long)] == ["length", "stop"]
    assert [one["usage"]["completion_tokens"] for one in (short, long)] == [1, 2]
    assert short["choices"][0]["message"] == long["choices"][0]["message"]


def test_usage_counts_what_came_from_the_cache(client: Server) -> None:
    """The question's own tokens, and one cached entry a picture."""
    usage = client.chat(QUESTION, client.keep(0), client.keep(1), max_tokens=1).json()["usage"]
    n_text = len(tiny()[1].tokenizer(QUESTION)["input_ids"])
    assert usage == {
        "prompt_tokens": n_text + 2, "completion_tokens": 1, "total_tokens": n_text + 3,
        "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


def test_a_stream_says_what_the_whole_answer_says(client: Server) -> None:
    url = client.keep(2)
    whole = client.chat(QUESTION, url).json()
    first, *middle, last, usage = stream(client.chat(QUESTION, url, stream=True, stream_options={"include_usage": True}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == text(client.chat(QUESTION, url))
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert {chunk["object"] for chunk in (first, *middle, last, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1


def test_several_images_are_read_in_their_order(client: Server) -> None:
    question = "what colour is the background ?"
    for numbers in ([3, 4], [4, 3], [3, 4, 5]):
        urls = [client.keep(i) for i in numbers]
        assert text(client.chat(question, *urls)) == of_prompt("<image>" * len(numbers) + question + " ", numbers)


def test_several_turns_are_one_prompt(client: Server) -> None:
    """As the chat template writes them: question, answer and its end, question."""
    image = {"type": "image_url", "image_url": {"url": client.keep(6)}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": QUESTION}, image]},
        {"role": "assistant", "content": "cat"},
        {"role": "user", "content": "what pattern is the background ?"},
    ]
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    end = tiny()[1].tokenizer.eos_token
    assert text(answer) == of_prompt(f"<image>{QUESTION} cat{end}what pattern is the background ? ", [6])


def test_a_question_without_a_picture_is_answered_beside_others(client: Server, answerer: Answerer) -> None:
    url = client.keep(30)
    with ThreadPoolExecutor(2) as pool, client.held():
        answers = [pool.submit(client.chat, QUESTION, *urls) for urls in ([], [url])]
        client.wait_for_rows(2)
    blind, seeing = (text(one.result()) for one in answers)
    assert blind and seeing == alone(answerer, 30)


def least_clear(answerer: Answerer, number: int) -> str:
    """The word of the vocabulary that the model answers least surely, whatever its weights are. No first token may have a
    fifth of the probability at temperature 2: then seeds that agree on six answers are one in a million."""
    words = [word for word in answerer.processor.tokenizer.get_vocab() if word.isalpha()]
    inputs, image = answerer.inputs(words, is_compressed=True), answerer.encode([scene(number)])[0]
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = answerer.model.generate(**inputs, compressed=image, **options).logits[0]
    surest = (logits / 2).softmax(-1).amax(-1)
    assert surest.min() < 0.2
    return words[int(surest.argmin())]


def test_choices_and_seeds(client: Server, answerer: Answerer) -> None:
    """n answers that differ, the same again for the same seed, and others for another."""
    url, unclear = client.keep(7), least_clear(answerer, 7)

    def drawn(seed: int) -> list[str]:
        answer = choices(client.chat(unclear, url, n=6, temperature=2.0, seed=seed))
        assert [one["index"] for one in answer] == list(range(6))
        return [one["message"]["content"] for one in answer]

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) > 1
    assert len({one["message"]["content"] for one in choices(client.chat(QUESTION, url, n=3))}) == 1, "greedy by default"


def test_a_temperature_near_nought_is_greedy(client: Server) -> None:
    """Scores divided by 1e-40 are all infinite, and the first of them is no answer."""
    key = client.keep(0)
    assert text(client.chat(QUESTION, key, temperature=1e-40, seed=1)) == text(client.chat(QUESTION, key, temperature=0))
    assert text(client.chat(QUESTION, key, temperature=2, top_p=0, seed=1)) == text(client.chat(QUESTION, key, temperature=0))


def test_a_stop_string_ends_the_answer_before_it(client: Server) -> None:
    url = client.keep(0)
    answer = text(client.chat(QUESTION, url))
    stopped = choices(client.chat(QUESTION, url, stop=[answer[2:5]]))[0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (answer[:2], "stop")


def test_a_checkpoint_that_samples_is_the_default(client: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What generation_config says holds until a request says otherwise; the official API's default is temperature 1."""
    from htc_vlm.serve.schema import ChatRequest

    writer = client.server.writer
    request = ChatRequest(model="tiny", messages=[{"role": "user", "content": "a"}])  # type: ignore[list-item]
    assert writer.sampling(request, 1).temperature == 0
    assert writer.sampling(request, 1).top_k == 0
    for name, value in {"do_sample": True, "temperature": 0.2, "top_k": 3}.items():
        monkeypatch.setattr(writer.own, name, value)
    assert (writer.sampling(request, 1).temperature, writer.sampling(request, 1).top_k) == (0.2, 3)
    assert writer.sampling(request.model_copy(update={"temperature": 0.0}), 1).temperature == 0


def test_a_checkpoint_s_other_options_do_not_change_answers(client: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """min_new_tokens and sequence_bias made other answers than `htc-vlm ask`, use_cache=False and stop_strings none at all."""
    from htc_vlm.model.generation_options import greedy_config

    engine, url = client.server.engine, client.keep(0)
    expected = text(client.chat(QUESTION, url))
    for name, value in {"min_new_tokens": 4, "use_cache": False, "stop_strings": ["x"], "prefill_chunk_size": 2}.items():
        monkeypatch.setattr(engine.model.generation_config, name, value)
    monkeypatch.setattr(engine, "_config", greedy_config(engine.model.generation_config))
    assert text(client.chat(QUESTION, url)) == expected


def test_sampling_that_rows_cannot_do_is_refused_at_the_start() -> None:
    """A checkpoint's min_p was dropped without a word."""
    from transformers import GenerationConfig

    from htc_vlm.serve.engine import check_sampling

    check_sampling(GenerationConfig(min_p=0.1))
    check_sampling(GenerationConfig(do_sample=True, temperature=0.3, top_p=0.9, top_k=4, typical_p=1.0))
    with pytest.raises(ValueError, match="samples with min_p=0.1; the server knows temperature, top_p and top_k"):
        check_sampling(GenerationConfig(do_sample=True, min_p=0.1))


def test_models_are_listed(client: Server) -> None:
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["object"] == "model"
    assert client.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"
