"""The data maker is deterministic and the tracker judges rendered clips rightly."""

import numpy as np
import pytest

from training.clips import (
    OPPOSITE,
    Motion,
    caption,
    possible_motions,
    random_motion,
    random_scene,
    render,
    rng_for,
)
from training.score import judge


def test_same_seed_same_clip() -> None:
    clips = []
    for _ in range(2):
        rng = rng_for("train", 5)
        scene = random_scene(rng, 64, 96)
        motion = random_motion(rng, scene)
        clips.append((render(scene, motion), caption(rng, scene, motion)))
    assert clips[0][1] == clips[1][1]
    assert np.array_equal(clips[0][0], clips[1][0])
    assert clips[0][0].shape == (17, 64, 96, 3)


def test_splits_differ() -> None:
    first, second = (render(random_scene(rng_for(s, 0)), frames=1) for s in ("train", "test"))
    assert not np.array_equal(first, second)


def test_shape_stays_inside_and_first_frame_is_the_picture() -> None:
    for index in range(8):
        rng = rng_for("validation", index)
        scene = random_scene(rng)
        clip = render(scene, random_motion(rng, scene))
        assert np.array_equal(clip[0], render(scene, frames=1)[0])
        border = np.abs(clip - scene.background)[:, [0, -1]].max()
        assert border < 1e-5


@pytest.mark.parametrize("height,width", [(64, 64), (96, 64)])
def test_tracker_on_ground_truth(height: int, width: int) -> None:
    asked = right = wrong = others = 0
    for index in range(4):
        scene = random_scene(rng_for("validation", index), height, width)
        motions = possible_motions(scene)
        for motion in motions:
            clip = render(scene, motion)
            asked += 1
            right += judge(clip, scene, motion).right
            for other in {m.kind for m in motions} - {motion.kind}:
                others += 1
                wrong += judge(clip, scene, Motion(other)).motion
    assert right / asked == 1.0
    assert wrong / others == 0.0


def test_tracker_sees_changed_colour_and_background() -> None:
    scene = random_scene(rng_for("validation", 3))
    motion = possible_motions(scene)[0]
    clip = render(scene, motion)
    assert not judge(np.clip(clip + 0.15, 0, 1), scene, motion).right
    still = render(scene)
    assert not any(judge(still, scene, Motion(kind)).motion for kind in OPPOSITE)
