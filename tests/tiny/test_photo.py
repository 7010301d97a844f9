"""The photo world from a miniature of its packages: scenes, patches' words, balanced questions, crops that the tower names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from htc_vlm.cli import data
from htc_vlm.tiny import photo, photo_sources
from htc_vlm.tiny.questions import words

from .. import photo_files

N = 60  # scenes looked at


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """HTC_VLM_DATA with the miniature."""
    photo_files.forget()
    monkeypatch.setenv("HTC_VLM_DATA", str(photo_files.make(tmp_path)))
    yield tmp_path / "photo"
    photo_files.forget()


def test_cutouts_are_stamps_that_are_named_once_and_pictograms_of_seen_vendors(root: Path) -> None:
    """A mirrored stamp would count twice; "Eat your broccoli!" names nothing; the unseen vendor must stay unseen."""
    stamps = {thing.name: thing.kind for thing in photo_sources.cutouts() if not thing.file.startswith("pictogram:")}
    assert stamps == {"brown hen": "bird", "cat": "mammal", "red apple": "fruit", "bus": "vehicle"}
    assert len(photo_sources.cutouts()) == 4 + 2 * 96
    assert {thing.file for thing in photo_sources.cutouts() if ":" in thing.file} == {"pictogram:noto", "pictogram:twemoji"}


def test_no_test_photo_is_trained_on(root: Path) -> None:
    """Both test photos of the miniature are on disk; a pattern that is too wide would take them as background or crop."""
    files = [*photo_sources.backgrounds(), *(file for file, _ in photo_sources.photos())]
    assert set(files) == {"usr/share/backgrounds/wall.jpg", "usr/share/backgrounds/grey.jpg"}
    assert photo.picture("photos/0").getpixel((0, 0)) == (90, 90, 90)
    assert len(photo.questions("photos")) == 4 * 25


def test_half_of_the_pictures_show_one_thing_and_all_are_224_pixels_wide(root: Path) -> None:
    """Trained on small things alone, the pilot's model was wrong about photos, whose things fill the picture."""
    scenes = [photo.scene(image) for image in photo.images("train")[:400]]
    alone = [scene for scene in scenes if len(scene.placed) == 1]
    assert 160 < len(alone) < 240 and any(scene.placed[0].fills for scene in alone)
    assert all(one.side >= 170 for scene in alone for one in scene.placed)
    shown = next(photo.picture(image) for image in photo.images("train") if photo.scene(image).placed[0].fills)
    assert shown.size == (224, 224) and shown.getpixel((100, 100))[0] > 240  # the red wall's corner
    assert {photo.picture(image).size for image in photo.images("val")[:8]} == {(224, 224)}


def test_a_patch_has_the_words_of_the_thing_it_lies_on(root: Path) -> None:
    """Words of the left thing on the right would teach places wrongly; a corner lies on nothing."""
    image = next(i for i in photo.images("train") if len(photo.scene(i).placed) == 2)
    left, right = photo.scene(image).placed
    found = photo.patch_words(image, 7)
    for one in (left, right):
        patch = int(one.y * 7 / 224) * 7 + int(one.x * 7 / 224)
        assert found[patch] == [one.thing.name, one.thing.kind]
    assert found[0] == found[-1] == [] and len(found) == 49


def test_yes_is_right_about_what_is_there_and_no_about_nothing_like_it(root: Path) -> None:
    """ "Is there an animal?" of a cat is no "no"; nor is "Is there a cat?" of a crop that ImageNet calls tabby."""
    answers = []
    for image in photo.images("train")[:N]:
        asked = [q for q in photo.sample_questions(image, 99, seed=0) if q.kind == "exist"]
        n_yes = sum(question.answer == "Yes" for question in asked)
        assert 2 * n_yes == len(asked)
        things = [one.thing for one in photo.scene(image).placed]
        here = {photo.a(word) for thing in things for word in (thing.name, str(thing.kind))}
        for question in asked:
            assert (question.text.removeprefix("Is there ").rstrip("?") in here) == (question.answer == "Yes"), question
            if question.answer == "No" and any(thing.kind == "mammal" for thing in things):
                assert question.text not in ("Is there a mammal?", "Is there an animal?")
            if photo.scene(image).placed[0].fills:
                assert question.text != "Is there a cat?"
        answers += [question.answer for question in asked]
    assert answers.count("No") > N


def test_questions_follow_from_picture_and_seed(root: Path) -> None:
    """A run that was killed would go on with other questions."""
    first, again, other = (photo.sample_questions("train/3", 6, seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert {q.kind for q in photo.sample_questions("train/3", 9, 0, weights={"name": 1})} == {"name"}


def test_other_files_make_another_version(root: Path) -> None:
    """Features of old pictures would be asked about as if they were the new ones: the cache is named by the version."""
    before = photo.version()
    assert before == photo.version() and len(before) == 8
    photo_files.write_crops(root, [{**photo_files.CROP, "name": "lynx"}])
    photo_files.forget()
    assert photo.version() != before


def test_photos_are_judged_by_words_that_were_written_before(root: Path) -> None:
    """The file's rows are complete, and no accepted word of a photo's name is what is asked as absent."""
    for shown in photo_sources.asked_photos():
        assert shown.name and shown.kind and shown.absent
        assert words(shown.absent) not in {words(word) for word in (shown.name, *shown.also, *shown.kind)}
    name, kind, *others = photo.questions("photos")[:4]
    assert photo.accepted(name) == ("cat", "kitten", "tabby") and "animal" in photo.accepted(kind)
    assert [(q.answer, photo.accepted(q)) for q in others] == [("Yes", ()), ("No", ())]


def test_the_tower_names_the_crops_it_is_sure_of(root: Path) -> None:
    """A head that sees only red: the red wall's 30 crops are class 951, the grey wall's are nothing sure."""
    seen = SimpleNamespace(image_size=8)
    tower = SimpleNamespace(config=seen, maps=lambda pixels: (pixels, None))  # the map after the head: the colours themselves
    weight, bias = torch.zeros(1000, 3), torch.zeros(1000)
    weight[951, 0], bias[951] = 20.0, -5.0
    (root / photo_sources.CROPS).unlink()
    assert photo_sources.label_crops(tower, (weight, bias)) == 30  # type: ignore[arg-type]
    rows = json.loads((root / photo_sources.CROPS).read_text())["crops"]
    wall = ("usr/share/backgrounds/wall.jpg", "class 951", "fruit")
    assert {(row["file"], row["name"], row["kind"]) for row in rows} == {wall}
    assert photo_sources.crops()[0].box == (0.0, 0.0, 1.0, 1.0)
    assert "30 crops" in photo.prepare()


def test_crops_of_another_version_are_named_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for good, they would be trained on with names that today's code would not give them."""
    before = [photo.scene(image) for image in photo.images("train")[:9]]
    monkeypatch.setattr(photo_sources, "SURE", 0.9)
    photo_files.forget()
    with pytest.raises(FileNotFoundError, match=r"of another version: `htc-vlm data photo"):
        photo.scene("train/0")
    monkeypatch.setattr(photo_sources, "label_crops", lambda *_: photo_files.write_crops(root, [photo_files.CROP]))
    monkeypatch.setattr("htc_vlm.tiny.tower.load_imagenet_weights", lambda: SimpleNamespace(config=SimpleNamespace()))
    monkeypatch.setattr("htc_vlm.tiny.tower.imagenet_head", lambda: None)
    assert "1 crops" in photo.prepare()
    assert [photo.scene(image) for image in photo.images("train")[:9]] == before


def test_in_a_view_there_may_be_anything_that_does_not_live(root: Path) -> None:
    """ "Is there a plant?" of a valley was answered with No; that no bear is in it is as sure as it was."""
    photo_files.write_crops(root, [{**photo_files.CROP, "name": "valley", "kind": "landscape"}])
    photo_files.forget()
    image = next(i for i in photo.images("train") if photo.scene(i).placed[0].fills)
    kinds = {word: kind for rows in photo._labels() for word, kind in rows}
    absent = [q.text.split(maxsplit=3)[3].rstrip("?") for q in photo.sample_questions(image, 99, 0) if q.answer == "No"]
    assert absent and all(kinds[word] in photo.LIVING for word in absent)


def test_the_data_command_counts_opens_and_writes_the_set(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its check of words is for sets with a word tokenizer; this one has real text and no vocabulary."""
    monkeypatch.setattr(photo, "N_FIXED", 6)
    assert data.run(["photo", "--data", str(root.parent), "--limit", "1", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("photo: 196 cut-outs of 98 names, 1 crops named by the tower, 2 backgrounds, 25 test photos\n")
    assert "photos: 1 images, 4 questions" in shown and "question only %" in shown
    assert (tmp_path / "out" / "images" / "photos" / "0.png").is_file()
    turns = json.loads((tmp_path / "out" / "photos.json").read_text())[0]["conversations"]
    assert [turn["value"] for turn in turns[:2]] == ["<image>\nWhat is this?", "A cat"]


def test_missing_files_are_named_with_the_way_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer without the packages; one who has not named the crops yet; one without a test photo."""
    photo_files.forget()
    monkeypatch.setenv("HTC_VLM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"scripts/fetch_photo\.sh"):
        photo_sources.cutouts()
    photo_files.make(tmp_path, crops=False)
    with pytest.raises(FileNotFoundError, match="htc-vlm data photo"):
        photo.scene("train/0")
    with pytest.raises(FileNotFoundError, match="fetch gradio"):
        photo.picture("photos/6")
    with pytest.raises(ValueError, match="no split 'dev'"):
        photo.images("dev")
