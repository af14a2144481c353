import numpy as np
import pytest

from voco_model.miniature.scenes import (
    COLOURS,
    DIGIT,
    KINDS,
    PLACES,
    QUARTER,
    SIZE,
    Drawn,
    Scene,
    ask,
    ask_many,
    digits,
    draw_scene,
    paint,
)


def scene(*quarters):
    """From (label, colour) or None in each quarter."""
    return Scene(tuple(q and Drawn(0, q[0], q[1], 0, 0) for q in quarters))


THREE = scene((7, "red"), None, (2, "blue"), (7, "red"))
FOUR = scene((1, "red"), (2, "green"), (3, "blue"), (9, "yellow"))


def test_no_handwriting_is_in_both_splits():
    train, test = digits("train"), digits("test")
    assert len(train.labels) == 1437 and len(test.labels) == 360
    # Of 1,797 scans a few are alike to the bit; none may be on both sides.
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in test.images}
    assert train.images.shape[1:] == (DIGIT, DIGIT)
    assert 0 <= train.images.min() and train.images.max() <= 1
    assert set(test.labels) == set(range(10))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="expected split 'train' or 'test', got 'dev'"):
        digits("dev")


def answers(shown, kind, tries=60):
    rng = np.random.default_rng(0)
    return {q.text: q.answer for q in (ask(shown, kind, rng) for _ in range(tries))}


@pytest.mark.parametrize(
    ("shown", "kind", "expected"),
    [
        (THREE, "digit", ["7", "none", "2", "7"]),
        (THREE, "colour", ["red", "none", "blue", "red"]),
        (FOUR, "digit", ["1", "2", "3", "9"]),
        (FOUR, "colour", ["red", "green", "blue", "yellow"]),
    ],
)
def test_questions_about_a_place(shown, kind, expected):
    found = answers(shown, kind)
    assert len(found) == 4
    for place, answer in zip(PLACES, expected, strict=True):
        (text,) = [text for text in found if place in text]
        assert found[text] == answer


@pytest.mark.parametrize(
    ("kind", "three", "four"),
    [("count", "3", "4"), ("largest", "7", "9"), ("smallest", "2", "1"), ("colours", "2", "4")],
)
def test_questions_about_the_whole(kind, three, four):
    assert set(answers(THREE, kind).values()) == {three}
    assert set(answers(FOUR, kind).values()) == {four}


def test_scenes_are_drawn_as_they_are_painted():
    rng = np.random.default_rng(3)
    counts, labels = set(), digits("test").labels
    for _ in range(60):
        shown = draw_scene(rng, "test")
        counts.add(len(shown.drawn()))
        picture = paint(shown, "test", rng)
        assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
        for place, digit in enumerate(shown.quarters):
            top, left = QUARTER * (place // 2), QUARTER * (place % 2)
            quarter = picture[top : top + QUARTER, left : left + QUARTER].astype(float)
            if digit is None:
                assert quarter.max() < 60  # noise alone
                continue
            assert labels[digit.index] == digit.label
            box = quarter[digit.down : digit.down + DIGIT, digit.right : digit.right + DIGIT]
            ink = box.reshape(-1, 3).mean(0)
            ratios = {
                name: np.corrcoef(ink, np.array(colour, float))[0, 1]
                for name, colour in COLOURS.items()
            }
            assert max(ratios, key=ratios.get) == digit.colour
            assert box.sum() > 0.9 * quarter[quarter > 60].sum()
    assert counts == {2, 3, 4}


def test_the_same_generator_draws_the_same():
    def drawn():
        rng = np.random.default_rng(1)
        shown = draw_scene(rng, "train")
        return shown, paint(shown, "train", rng), [ask(shown, kind, rng) for kind in KINDS]

    one, other = drawn(), drawn()
    assert one[0] == other[0] and np.array_equal(one[1], other[1]) and one[2] == other[2]


def test_a_conversation_never_asks_twice():
    rng = np.random.default_rng(0)
    for shown, most in ((THREE, 12), (FOUR, 12)):
        asked = ask_many(shown, 100, rng)
        assert len({question.text for question in asked}) == len(asked) == most
        assert {question.kind for question in asked} == set(KINDS)
        for question in asked:
            assert (question.text, question.answer) in KINDS[question.kind](shown)
        assert len(ask_many(shown, 5, rng)) == 5
    orders = {tuple(q.text for q in ask_many(FOUR, 3, rng)) for _ in range(20)}
    assert len(orders) > 10
