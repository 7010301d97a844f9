"""Scenes of pictograms and questions about them; answers are checked by reading the question's words."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from htc_vlm.tiny import blind, pictograms, scenes
from htc_vlm.tiny.questions import Question, words
from htc_vlm.tiny.scenes import Concept, Scene, Thing

EVALUATED = ("test", "test-unseen")  # val is drawn as test is
STILL = (0, 0, 0, 0.0)
CAT = Concept("cat", "mammal", True)
PIG = Concept("pig", "mammal", True)
OWL = Concept("owl", "bird", True)
LEMON = Concept("lemon", "fruit", False)

# cat | owl
# pig | -
SCENE = Scene(
    (
        Thing(CAT, "noto", 0, "red", "big", "upright", STILL),
        Thing(OWL, "twemoji", 1, "blue", "small", "left", STILL),
        Thing(PIG, "noto", 2, "green", "big", "down", STILL),
    ),
    "white",
    "plain",
    1.0,
    0,
)


def ask(text: str, answer: str, kind: str) -> Question:
    return Question("q", "test/0", text, answer, kind)


def answered_by_hand(scene: Scene, text: str) -> str:
    """The answer to a question, worked out from its words alone."""
    at = {pictograms.PLACES[thing.cell]: thing for thing in scene.things}
    called = {thing.concept.label: thing for thing in scene.things} | {f"tile in {t.tile}": t for t in scene.things} | at
    counts = Counter(thing.concept.category for thing in scene.things)
    text = text.removesuffix(" ?")
    for start in ("what is at the ", "what is on the "):
        if text.startswith(start):
            return called[text.removeprefix(start)].concept.label
    if text.startswith("what kind of thing is at the "):
        return at[text.removeprefix("what kind of thing is at the ")].concept.category
    if text.startswith("is there a "):
        word = text.removeprefix("is there a ")
        return "yes" if word in counts or word in called else "no"
    if text == "how many things are there":
        return ("zero", "one", "two", "three", "four")[len(scene.things)]
    if text.startswith("how many things are of the kind "):
        return ("zero", "one", "two", "three", "four")[counts[text.split()[7]]]
    for word, step in (("left of", -1), ("right of", 1), ("above", -2), ("below", 2)):
        if text.startswith(f"what is {word} the "):
            cell = called[text.removeprefix(f"what is {word} the ")].cell + step
            return next(thing.concept.label for thing in scene.things if thing.cell == cell)
    if text.startswith("where is the "):
        cell = called[text.removeprefix("where is the ")].cell
        return ("top-left", "top-right", "bottom-left", "bottom-right")[cell]
    if text == "what colour is the background":
        return scene.background
    if text == "what pattern is the background":
        return scene.pattern
    if text.startswith("what colour is behind the "):
        return called[text.removeprefix("what colour is behind the ")].tile
    if text.startswith("which way up is the "):
        return called[text.removeprefix("which way up is the ")].turn
    if text.startswith("how big is the "):
        return called[text.removeprefix("how big is the ")].size
    raise AssertionError(f"a wording that this test does not know: {text!r}")


# ------------------------------------------------------------------------------------------------------- the atlas
def test_every_drawing_is_there_for_all_three_vendors() -> None:
    """Prevents a concept without a picture, which a model could not learn."""
    for vendor in ("noto", "twemoji", "fluent"):
        drawings = scenes.drawings(vendor)
        assert set(drawings) == {concept.label for concept in pictograms.concepts()}
        for label, drawing in drawings.items():
            n_drawn = int((np.asarray(drawing)[..., 3] > 128).sum())
            assert drawing.size == (72, 72) and n_drawn > 300, (vendor, label, n_drawn)


def test_licences_stand_beside_the_drawings_and_everything_is_small() -> None:
    """Prevents shipping drawings without the notices that their licences ask for."""
    files = {path.name: path for path in scenes.ATLAS.iterdir()}
    assert {"NOTICE.md", "LICENSE.apache", "LICENSE.mit", "LICENSE.ofl"} <= set(files)
    notice = files["NOTICE.md"].read_text("utf-8")
    assert all(name in notice for name in ("noto.png", "twemoji.png", "fluent.png", "CLDR", "licenses/by/4.0"))
    assert sum(path.stat().st_size for path in files.values()) < 4_000_000


def test_one_word_means_one_thing() -> None:
    """Prevents "is there a X ?" from having two readings: concept, category and colour words do not overlap."""
    labels = [concept.label for concept in pictograms.concepts()]
    groups = [labels, pictograms.categories(), pictograms.TILES, pictograms.BACKGROUNDS, pictograms.PLACE_WORDS]
    everything = [word for group in groups for word in group]
    assert len(everything) == len(set(everything))
    assert all(word == words(word) and " " not in word for word in everything)


def test_every_category_has_equally_many_concepts() -> None:
    """Prevents a category's frequency from telling the answer without the picture."""
    assert len(set(Counter(concept.category for concept in pictograms.concepts()).values())) == 1


# ------------------------------------------------------------------------------------------------------- scenes
def test_a_scene_follows_from_its_id_alone() -> None:
    """Prevents a result file that a second run cannot reproduce, and a sampler that moves the global random state."""
    state = json.dumps(np.random.get_state()[1].tolist())  # type: ignore[union-attr]
    first = np.asarray(pictograms.picture("train/7"))
    asked = pictograms.sample_questions("train/7", 12, seed=3)
    pictograms.picture("train/8")
    pictograms.scene.cache_clear()
    assert (np.asarray(pictograms.picture("train/7")) == first).all()
    assert pictograms.sample_questions("train/7", 12, seed=3) == asked
    assert pictograms.sample_questions("train/7", 12, seed=4) != asked
    assert pictograms.scene("val/7") != pictograms.scene("train/7")
    assert json.dumps(np.random.get_state()[1].tolist()) == state  # type: ignore[union-attr]


def test_the_unseen_vendor_appears_in_its_split_only() -> None:
    """Prevents the unseen style from leaking into training."""
    for split, vendors in (("train", {"noto", "twemoji"}), ("test", {"noto", "twemoji"}), ("test-unseen", {"fluent"})):
        found = {thing.vendor for i in range(200) for thing in pictograms.scene(f"{split}/{i}").things}
        assert found == vendors


def test_a_scene_holds_one_to_four_things_that_differ() -> None:
    """Prevents a question with two right answers."""
    sizes = set()
    for i in range(300):
        things = pictograms.scene(f"train/{i}").things
        sizes.add(len(things))
        for values in ({t.concept.label for t in things}, {t.cell for t in things}, {t.tile for t in things}):
            assert len(values) == len(things)
        assert all(thing.concept.turns or thing.turn == "upright" for thing in things)
    assert sizes == {1, 2, 3, 4}


def test_the_picture_shows_the_scene() -> None:
    """By hand: cells are centred on 40 and 120 and tiles reach 34 either way, so 28 above the centre of a small thing
    (19 either way) is tile; the bottom right cell is empty. Noise is at most 6. Prevents tiles in the wrong cell."""
    pixels = np.asarray(pictograms.draw(SCENE), dtype=int)
    assert pixels.shape == (160, 160, 3)
    for x, y, colour in ((120, 12, (92, 132, 226)), (120, 120, (244, 244, 244)), (80, 2, (244, 244, 244))):
        assert np.abs(pixels[y, x] - colour).max() <= 7


@pytest.mark.parametrize(("turn", "quarters"), [("left", 1), ("down", 2), ("right", 3)])
def test_turned_left_means_that_the_top_points_left(turn: str, quarters: int) -> None:
    """np.rot90 turns counter-clockwise: after one quarter the top points left. Prevents left and right swapped."""
    def alone(turn: str) -> np.ndarray:
        thing = Thing(CAT, "noto", 0, "red", "big", turn, STILL)
        picture = pictograms.draw(Scene((thing,), "white", "plain", 1.0, 0))
        return np.asarray(picture, dtype=int)[12:68, 12:68]

    turned = alone(turn)
    errors = [np.abs(np.rot90(alone("upright"), k) - turned).mean() for k in range(4)]
    assert int(np.argmin(errors)) == quarters


@pytest.mark.parametrize("image_id", ["train/100000", "test/1000", "test/-1", "test/x", "nowhere/1", "test"])
def test_an_unknown_scene_is_refused(image_id: str) -> None:
    """Prevents training on test scenes by an index that runs over."""
    with pytest.raises(ValueError, match="no pictogram scene"):
        pictograms.picture(image_id)


def test_an_unknown_split_is_refused() -> None:
    """Prevents an empty list for a misspelt split."""
    with pytest.raises(ValueError, match="test-unseen"):
        pictograms.images("testing")


# ------------------------------------------------------------------------------------------------------- questions
@pytest.mark.parametrize("split", EVALUATED)
def test_every_fixed_question_has_the_answer_that_its_words_ask_for(split: str) -> None:
    """Prevents a wrong answer key: 12,000 answers against a reader of the question texts."""
    for question in pictograms.questions(split):
        by_hand = answered_by_hand(pictograms.scene(question.image), question.text)
        assert by_hand == question.answer, question


@pytest.mark.parametrize("split", EVALUATED)
def test_the_fixed_lists_are_complete_and_their_words_known(split: str) -> None:
    """Prevents short lists, ids used twice, and words that the tokenizer would not know."""
    asked = pictograms.questions(split)
    assert set(Counter(question.image for question in asked).values()) == {12} and len(asked) == 12_000
    assert len({question.id for question in asked}) == len({(question.image, question.text) for question in asked})
    assert {question.kind for question in asked} == set(pictograms.KINDS)
    vocabulary = set(pictograms.vocabulary())
    assert all(set(q.text.split()) | {q.answer} <= vocabulary and words(q.text) == q.text for q in asked)
    assert asked[0].id == f"pictograms/{split}/0/0" and asked[0].image == f"{split}/0"


def test_answers_are_balanced() -> None:
    """Within four standard errors of equal shares. Prevents a score that a constant answer would get."""
    asked = [question for split in EVALUATED for question in pictograms.questions(split)]
    for kind, n_answers in (("exist", 2), ("size", 2), ("where", 4), ("tile", 6), ("category", 12)):
        counts = Counter(question.answer for question in asked if question.kind == kind)
        n, share = counts.total(), 1 / n_answers
        assert len(counts) == n_answers
        assert all(abs(c / n - share) < 4 * (share * (1 - share) / n) ** 0.5 + 0.01 for c in counts.values()), counts
    turns = Counter(question.answer for question in asked if question.kind == "turn")
    assert max(turns.values()) / turns.total() < 0.35
    assert pictograms.COUNTS[0] in {q.answer for q in asked if q.kind == "count"}


def test_question_texts_give_little_away() -> None:
    """At most ten points above guessing. Prevents kinds that can be answered blind."""
    train = [q for i in range(1500) for q in pictograms.sample_questions(f"train/{i}", 12, 0, paired=False)]
    known = blind.question_only_baseline(train, pictograms.questions("test"))
    chance = {"name": 1 / 96, "on": 1 / 96, "beside": 1 / 96, "category": 1 / 12, "where": 1 / 4, "tile": 1 / 6}
    chance |= {"exist": 1 / 2, "size": 1 / 2, "turn": 1 / 4, "background": (1 / 8 + 1 / 4) / 2}
    assert all(known[kind] < share + 0.10 for kind, share in chance.items()), known


def test_weights_choose_the_kinds() -> None:
    """Prevents a curriculum that is ignored."""
    found = pictograms.sample_questions("train/3", 6, seed=0, weights={"exist": 1.0})
    assert len(found) == 6 and {question.kind for question in found} == {"exist"}


@pytest.mark.parametrize("n", [17, 31, 56])
def test_as_many_questions_are_answered_yes_as_no(n: int) -> None:
    """At the numbers that presets draw and far above. A scene has few things to say yes to: of 31 different questions two of
    three were "no", and models learned to say no."""
    more = 0
    for i in range(60):
        asked = pictograms.sample_questions(f"train/{i}", n, 0, weights={"exist": 2.0, "name": 1.0, "turn": 1.0})
        given = Counter(question.answer for question in asked if question.kind == "exist")
        assert abs(given["yes"] - given["no"]) <= 1
        more += given["yes"] - given["no"]
    assert abs(more) <= 15  # of 60, where one is left over: by chance


# ------------------------------------------------------------------------------------------------------- baselines
def test_blind_baselines_by_hand() -> None:
    """"a ?" was always yes; "b ?" is new: the kind's majority (no, 3 of 5) is said. Prevents peeking at test."""
    train = [ask("a ?", "yes", "k")] * 2 + [ask("c ?", "no", "k")] * 3
    test = [ask("a ?", "yes", "k"), ask("a ?", "no", "k"), ask("b ?", "no", "k"), ask("b ?", "no", "k")]
    assert blind.question_only_baseline(train, test) == {"k": 0.75}
    assert blind.majority_baseline(train, test) == {"k": 0.75}
    assert blind.majority_baseline(train, test[:2]) == {"k": 0.5}


@pytest.mark.parametrize(
    ("question", "ceiling"),
    [
        (ask("what is at the top left ?", "cat", "name"), 1 / 3),
        (ask("what kind of thing is at the top right ?", "bird", "category"), 2 / 3),  # mammal, bird, mammal
        (ask("what is right of the cat ?", "owl", "beside"), 1 / 2),  # owl or pig: it is not the cat
        (ask("what is right of the tile in red ?", "owl", "beside"), 1 / 3),
        (ask("what is on the tile in red ?", "cat", "on"), 1 / 3),
        (ask("where is the owl ?", "top-right", "where"), 1 / 3),
        (ask("what colour is behind the top left ?", "red", "tile"), 1 / 3),
        (ask("how big is the top left ?", "big", "size"), 2 / 3),  # big, small, big
        (ask("which way up is the top left ?", "upright", "turn"), 1 / 3),
        (ask("how many things are there ?", "three", "count"), 1.0),
        (ask("is there a lemon ?", "no", "exist"), 1.0),
        (ask("what colour is the background ?", "white", "background"), 1.0),
    ],
)
def test_what_knowing_the_things_but_not_their_places_gives(question: Question, ceiling: float) -> None:
    """Three things: cat and pig big, owl small, all turned differently. Prevents calling that binding."""
    assert answered_by_hand(SCENE, question.text) == question.answer
    assert blind.bag_of_things_ceiling(SCENE, question) == pytest.approx(ceiling)


def test_the_atlas_script_and_the_committed_list_name_the_same_concepts() -> None:
    """Prevents an atlas that the script would no longer build."""
    script = Path(__file__).parents[2] / "scripts" / "build_atlas.py"
    scope: dict[str, object] = {"__file__": str(script), "__name__": "build_atlas"}
    exec(compile(script.read_text("utf-8"), str(script), "exec"), scope)
    listed: dict[str, tuple[str, str]] = scope["CATEGORIES"]  # type: ignore[assignment]
    wanted = [(label, c, label in turning.split()) for c, (turning, still) in listed.items()
              for label in turning.split() + still.split()]  # fmt: skip
    assert wanted == [(concept.label, concept.category, concept.turns) for concept in pictograms.concepts()]


def test_questions_may_be_kept_to_some_places() -> None:
    """A curriculum that names places must not ask about things elsewhere, and an unknown place is refused."""
    image_id = next(i for i in pictograms.images("train") if pictograms.n_things(i) == 4)
    kinds = {"name": 1.0, "where": 1.0}
    asked = pictograms.sample_questions(image_id, 20, 0, kinds, ("top left",))
    here = next(thing for thing in pictograms.scene(image_id).things if thing.cell == 0)
    assert {q.answer for q in asked} == {here.concept.label, "top-left"}
    with pytest.raises(ValueError, match="no place 'middle'"):
        pictograms.sample_questions(image_id, 1, 0, kinds, ("middle",))
