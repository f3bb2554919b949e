"""The curriculum: weights by step and by loss, as published; frequencies; state that resumes."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from modalities.diffusion.masks import FAMILIES, TASKS
from shared.errors import RequestError
from shared.training.curriculum import Curriculum

GENERATION = ("i2v", "t2v", "it2v")
PREDICTION = ("pre_frame_prediction", "post_frame_prediction")


@pytest.mark.parametrize(
    ("step", "generation", "interpolation", "prediction"),
    [(0, 0.1, 0.9, 0.7), (250, 0.3, 0.7, 0.6), (500, 0.5, 0.5, 0.5), (1000, 0.9, 0.1, 0.3), (5000, 0.9, 0.1, 0.3)],
)
def test_weights_by_step_go_through_the_anchors(step, generation, interpolation, prediction):
    found = Curriculum(FAMILIES, 1000).by_step(step)
    expected = {"generation": generation, "interpolation": interpolation, "prediction": prediction}
    assert list(found) == list(TASKS)
    assert found == pytest.approx({task: expected[kind] for task, kind in FAMILIES.items()})


def test_cosine_goes_there_and_half_way_back():
    found = [Curriculum(FAMILIES, 1000, schedule="cosine").by_step(s) for s in (0, 500, 750, 1000)]
    assert [f["interpolation"] for f in found] == pytest.approx([1, 0, 0.5, 0.5])
    assert [f["t2v"] for f in found] == pytest.approx([0, 1, 0.5, 0.5])
    assert [f["pre_frame_prediction"] for f in found] == pytest.approx([0.25, 0.75, 0.5, 0.5])


def test_the_signal_is_proportional_integral_and_derivative():
    curriculum = Curriculum(FAMILIES, 100)
    assert curriculum.note(0.2) is None
    assert curriculum.note(0.1) == pytest.approx(5 * 0.1 + 3 * 0.15 - 1.3 * 0.1)  # 0.82
    assert curriculum.note(0.4) == pytest.approx(5 * 0.4 + 3 * 0.7 / 3 + 1.3 * 0.3)


def test_windows_keep_the_last_losses_and_signals():
    curriculum = Curriculum(FAMILIES, 100, window=3)
    signals = [curriculum.note(loss) for loss in (9.0, 1.0, 2.0, 3.0, 4.0)]
    assert list(curriculum.losses) == [2.0, 3.0, 4.0]
    assert list(curriculum.signals) == signals[2:]
    assert signals[-1] == pytest.approx(5 * 4 + 3 * 3 + 1.3)


@pytest.mark.parametrize(
    ("last", "level"), [(0.5, 4), (2.5, 4), (3.5, 3), (5.5, 2), (7.5, 1), (8.5, 1), (9.5, 0), (99.0, 0)]
)
def test_a_low_loss_allows_what_is_harder(last, level):
    curriculum = Curriculum(FAMILIES, 100, gains=(1.0, 0.0, 0.0))  # the signal is the loss
    curriculum.note(0.0)
    for loss in range(1, 11):
        curriculum.note(float(loss))
        assert curriculum.level == 2  # neutral while fewer than 10 signals are kept
    assert curriculum.note(last) == last
    assert curriculum.level == level
    weights = curriculum.weights(0)
    assert weights["t2v"] == pytest.approx(0.1 + 0.1 + 0.2 * level)
    assert weights["interpolation"] == pytest.approx(0.9 + 0.9 - 0.2 * level)
    assert weights["post_frame_prediction"] == pytest.approx(0.7 + 0.5)


def test_both_parts_are_added():
    curriculum = Curriculum(FAMILIES, 1000)
    assert curriculum.weights(0) == pytest.approx(
        {**dict.fromkeys(GENERATION, 0.6), "interpolation": 1.4, **dict.fromkeys(PREDICTION, 1.2)}
    )
    plain = Curriculum(FAMILIES, 1000, schedule="none", adaptive=False)
    assert set(plain.weights(3).values()) == {1.0}


@pytest.mark.parametrize("step", [0, 500, 1000])
def test_frequencies_are_the_weights(step):
    """Chi-square of 3,000 draws, 5 degrees of freedom: above 20.5 in one of a thousand fair trials."""
    curriculum, draws, count = Curriculum(FAMILIES, 1000), random.Random(step), 3000
    seen = Counter(curriculum.draw(step, draws) for _ in range(count))
    weights = curriculum.weights(step)
    expected = {task: count * weight / sum(weights.values()) for task, weight in weights.items()}
    assert sum((seen[task] - e) ** 2 / e for task, e in expected.items()) < 20.5


def test_training_shifts_from_interpolation_to_generation():
    curriculum, draws = Curriculum(FAMILIES, 1000), random.Random(0)
    early = Counter(FAMILIES[curriculum.draw(step, draws)] for step in range(300))
    for i in range(20):
        curriculum.note(1 / (i + 1))  # ever lower: the hardest level
    late = Counter(FAMILIES[curriculum.draw(step, draws)] for step in range(900, 1200))
    assert curriculum.level == 4
    assert late["generation"] > 1.5 * early["generation"]
    assert early["interpolation"] > 3 * late["interpolation"]


def test_it_goes_on_from_its_state_as_if_never_interrupted():
    losses = [random.Random(i).random() for i in range(60)]
    whole, first, second = (Curriculum(FAMILIES, 50, window=20) for _ in range(3))
    for loss in losses[:35]:
        whole.note(loss)
        first.note(loss)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))  # plain values, as checkpoints hold
    for step, loss in enumerate(losses[35:]):
        assert whole.note(loss) == second.note(loss)
        assert whole.weights(step) == second.weights(step)


def test_it_knows_nothing_of_frames():
    families = {"next chord": "easy", "whole piece": "hard"}
    curriculum = Curriculum(
        families, 10, anchors={"easy": (1, 0.5, 0), "hard": (0, 0.5, 1)}, levels={"easy": (1, 0), "hard": (0, 1)}
    )
    curriculum.level = 0
    assert curriculum.weights(0) == {"next chord": 2, "whole piece": 0}
    curriculum.level = 1
    assert curriculum.weights(10) == {"next chord": 0, "whole piece": 2}


def test_what_cannot_be_is_said():
    with pytest.raises(RequestError, match="no weights for the families chords"):
        Curriculum({"a": "chords"}, 10)
    with pytest.raises(RequestError, match="curriculum of 6 tasks, end 0"):
        Curriculum(FAMILIES, 0)
