"""/v1/images: add, get, list, delete."""

from __future__ import annotations

import base64
import hashlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from htc_vlm.model.answering import Answerer
from htc_vlm.serve.limits import Limits
from htc_vlm.serve.pictures import Memory

from .conftest import QUESTION, Server, data_uri, png, scene, text, tiny


def test_a_picture_is_added_by_its_bytes_or_as_a_data_uri(client: Server) -> None:
    """The id is the SHA-256 of the bytes, and is nothing that a client may choose."""
    first = client.post("/v1/images?name=cat.png", content=png(40), headers={"Content-Type": "image/png"}).json()
    second = client.post("/v1/images", json={"url": data_uri(png(40)), "name": "cat.png"}).json()
    assert first == second
    assert first["id"] == hashlib.sha256(png(40)).hexdigest()
    assert (first["object"], first["tokens"]) == ("image", 1)
    assert client.get(f"/v1/images/{first['id']}").json() == first
    assert client.post("/v1/images", json={"url": data_uri(png(41)), "id": first["id"]}).status_code == 400


def test_the_list_goes_on_where_it_ended(client: Server) -> None:
    for number in range(50, 54):
        client.keep(number)
    whole = client.get("/v1/images").json()
    assert whole["total"] == len(whole["data"]) and not whole["has_more"]
    pages, after = [], {}
    while True:
        page = client.get("/v1/images", params={"limit": 3, **after}).json()
        pages += page["data"]
        if not page["has_more"]:
            break
        after = {"after": page["data"][-1]["id"]}
    assert pages == whole["data"]
    assert client.get("/v1/images", params={"after": "0" * 64}).status_code == 400


def test_a_picture_that_is_sent_again_keeps_its_place(client: Server) -> None:
    """It moved to the end of the list, and a client that was paging met it twice; a new name is kept."""
    url = client.keep(55)
    client.keep(56)
    before = client.get("/v1/images").json()["data"]
    assert client.keep(55, name="again.png") == url == client.keep(55)
    after = client.get("/v1/images").json()["data"]
    assert [one["id"] for one in after] == [one["id"] for one in before]
    assert next(one for one in after if url.endswith(one["id"]))["names"] == ["again.png"]


def test_a_name_that_is_no_utf8_is_listed(client: Server) -> None:
    """One such file name in the store made every GET /v1/images a 400."""
    key = client.keep(57).removeprefix("htc:")
    client.store.name([("caf\udce9.png", key)])
    assert next(one for one in client.get("/v1/images").json()["data"] if one["id"] == key)["names"] == ["caf\\udce9.png"]
    client.store.remove(key)


def test_a_name_like_an_id_is_refused(client: Server) -> None:
    response = client.post("/v1/images", json={"url": data_uri(png(40)), "name": "0" * 64})
    assert response.status_code == 400 and "is taken for an id" in response.json()["error"]["message"]


def test_base64_with_line_breaks_is_read(client: Server) -> None:
    """As `base64 FILE` writes it."""
    lines = base64.encodebytes(png(40)).decode()
    assert client.post("/v1/images", json={"url": "data:image/png;base64," + lines}).status_code == 200


def test_a_removed_picture_is_gone_and_can_come_back(client: Server) -> None:
    url = client.keep(60)
    path = f"/v1/images/{url.removeprefix('htc:')}"
    assert client.delete(path).json()["deleted"]
    for response in (client.get(path), client.delete(path), client.chat(QUESTION, url)):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "image_not_found")
    assert client.keep(60) == url and text(client.chat(QUESTION, url))


def test_a_picture_is_shown_and_removed_by_its_name(client: Server) -> None:
    """A folder's pictures are named by their paths; DELETE took ids only, and a path of two parts led nowhere."""
    url = client.keep(62, name="album/a cat.png")
    path = "/v1/images/album%2Fa%20cat.png"
    assert client.get(path).json()["id"] == url.removeprefix("htc:")
    assert client.delete(path).json() == {"id": url.removeprefix("htc:"), "object": "image", "deleted": True}
    for gone in (path, "/v1/images/nobody", "/v1/images/"):
        assert client.delete(gone).status_code == 404
    assert client.get("/v1/images/", params={"limit": 1}).json()["object"] == "list"


def test_a_picture_that_is_removed_after_its_question_was_taken_is_still_answered(client: Server) -> None:
    """vLLM 33865: evicted between lookup and use, and the whole engine died."""
    url = client.keep(61)
    before = text(client.chat(QUESTION, url))
    with ThreadPoolExecutor(1) as pool:
        with client.held():
            answer = pool.submit(client.chat, QUESTION, url)
            client.wait_for_rows(1)
            client.store.remove([url.removeprefix("htc:")])
        assert text(answer.result()) == before


def test_a_damaged_entry_is_never_answered_from(client: Server) -> None:
    """The store finds the damage; the client hears which picture to add again."""

    url = client.keep(62)
    key = url.removeprefix("htc:")
    right = text(client.chat(QUESTION, url))
    with sqlite3.connect(Path(client.folder.name) / f"{key[0]}.sqlite") as db:
        kv = bytearray(db.execute("SELECT kv FROM images WHERE id = ?", (bytes.fromhex(key),)).fetchone()[0])
        kv[100] ^= 1
        db.execute("UPDATE images SET kv = ? WHERE id = ?", (bytes(kv), bytes.fromhex(key)))
    db.close()
    for path in ("/v1/chat/completions", "/v1/images/" + key):
        response = client.get(path) if key in path else client.chat(QUESTION, url)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "image_damaged")
        assert "add its picture again" in response.json()["error"]["message"]
    assert client.keep(62) == url
    assert text(client.chat(QUESTION, url)) == right


def test_pictures_of_questions_are_forgotten_least_recently_used_first() -> None:
    """Each of `tiny` is 6,144 bytes; the memory holds two."""
    kept = Answerer(*tiny()).encode([scene(0)])
    memory = Memory(2 * kept.nbytes)  # type: ignore[union-attr]
    for key in ("a", "b"):
        memory.put(key, kept)  # type: ignore[arg-type]
    memory.get("a")
    memory.put("c", kept)  # type: ignore[arg-type]
    assert [memory.get(key) is not None for key in "abc"] == [True, False, True]


def test_a_server_without_memory_compresses_again() -> None:
    with Server(limits=Limits(memory=0)) as forgetful:
        assert text(forgetful.chat(QUESTION, data_uri(png(0)))) == text(forgetful.chat(QUESTION, data_uri(png(0))))
        assert forgetful.metric("images_encoded_total") == 2


def test_a_picture_may_be_asked_about_by_its_name(client: Server) -> None:
    key = client.post("/v1/images?name=holiday/beach.png", content=png(63), headers={"Content-Type": "image/png"}).json()["id"]
    assert text(client.chat(QUESTION, "htc:holiday/beach.png")) == text(client.chat(QUESTION, f"htc:{key}"))
    entry = next(one for one in client.get("/v1/images").json()["data"] if one["id"] == key)
    assert entry["names"] == ["holiday/beach.png"] and entry["bytes"] == 6144 + 36


def test_an_empty_name_is_none_and_the_one_in_the_url_counts_too(client: Server) -> None:
    """Pictures that were sent with `name=` took each other's name, and `htc:` was the last of them."""
    body = {"url": data_uri(png(21))}
    assert client.post("/v1/images?name=", json=body).status_code == 200
    assert client.post("/v1/images", json={**body, "name": ""}).status_code == 200
    assert client.chat(QUESTION, "htc:").status_code == 404
    assert client.post("/v1/images?name=lions.png", json=body).status_code == 200
    assert client.chat(QUESTION, "htc:lions.png").status_code == 200


def test_the_map_travels_with_the_image(client: Server) -> None:
    """A number a patch, 255 at the most; the page draws it over the picture."""
    image = client.get("/v1/images/" + client.keep(64).removeprefix("htc:")).json()
    assert (image["map"]["rows"], image["map"]["columns"], len(image["map"]["values"])) == (6, 6, 36)
    assert max(image["map"]["values"]) == 255 and min(image["map"]["values"]) >= 0


def test_a_store_that_cannot_be_written_says_so_and_is_still_read(client: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = client.keep(65)
    monkeypatch.setattr(client.store, "read_only", True)
    monkeypatch.setattr(client.store._shards, "read_only", True)
    monkeypatch.setattr(client.store._shards, "_connections", {})
    response = client.post("/v1/images", content=png(66), headers={"Content-Type": "image/png"})
    assert (response.status_code, response.json()["error"]["code"]) == (507, "store_unavailable")
    assert "read-only" in response.json()["error"]["message"]
    assert text(client.chat(QUESTION, url))
