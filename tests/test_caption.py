"""caption.py: the picture stays whole, the words are there and fit."""

import numpy as np
import pytest

from prismatic.episodes.caption import MARGIN, PAPER, Caption

SENTENCE = "pick up the black bowl between the plate and the ramekin and place it on the plate"


def test_the_frame_stays_whole_and_the_words_fit_under_it() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    caption = Caption(SENTENCE, 256)
    drawn = caption.draw(frame, "step 3")
    assert drawn.shape == (256 + caption.height, 256, 3) and caption.height % 2 == 0
    assert (drawn[:256] == frame).all()
    ink = (drawn[256:] != PAPER).any(axis=2)
    rows, columns = ink.any(axis=1), ink.any(axis=0)
    assert rows[MARGIN:-MARGIN].sum() > 20 and not rows[-2:].any()
    assert columns.sum() > 150 and not columns[-2:].any()  # wrapped before the edge


def test_instruction_and_outcome_are_what_is_drawn() -> None:
    frame = np.zeros((64, 256, 3), np.uint8)
    strips = {
        (words, status): Caption(words, 256).draw(frame, status)[64:].tobytes()
        for words in ("open the drawer", "open the door")
        for status in ("success after 9 steps", "failure after 9 steps", "step 9")
    }
    assert len(set(strips.values())) == len(strips)


@pytest.mark.parametrize("words", ["", "ö 蛋 \x00 ☂", "a" * 300])
def test_any_instruction_can_be_drawn(words: str) -> None:
    caption = Caption(words, 128)
    assert caption.draw(np.zeros((32, 128, 3), np.uint8), "step 0").shape == (32 + caption.height, 128, 3)
