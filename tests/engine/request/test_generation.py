import copy
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.families.wan import defaults as negative
from penstock.engine.families.wan.defaults import flow_shift, negative_prompt
from penstock.engine.model.grid import Grid
from penstock.engine.request.generation import (
    AREAS,
    MAX_SEED,
    GenerationRequest,
    check_task,
    frame_rate,
    parse_area,
    parse_size,
    size_for,
)
from penstock.errors import RequestError


def request(**fields):
    return GenerationRequest(**({"prompt": "a cat"} | fields))


def refusal(**fields):
    with pytest.raises(RequestError) as caught:
        request(**fields)
    return str(caught.value)


def test_official_defaults():
    made = request(image=Path("cat.png"))
    assert (made.frames, made.steps, made.guidance_scale, made.sampler, made.fps) == (
        81, 40, 5.0, "unipc", 16,
    )  # fmt: skip
    assert made.uses_guidance
    assert made.video_shape.frames == 81


def shift_of(made):
    return flow_shift(made.width, made.height, made.shift)


def test_shift_follows_the_resolution_unless_given():
    assert shift_of(request()) == 5.0
    assert shift_of(request(width=832, height=480)) == 3.0
    assert shift_of(request(width=480, height=832)) == 3.0
    assert shift_of(request(width=960, height=528)) == 5.0
    assert shift_of(request(width=832, height=480, shift=7)) == 7.0


def test_negative_prompt_follows_the_task_unless_given():
    shake = "镜头晃动"
    assert negative_prompt(request()) == negative.TEXT_TO_VIDEO
    assert not negative.TEXT_TO_VIDEO.startswith(shake)
    with_image = negative_prompt(request(image=Path("cat.png")))
    assert with_image == f"{shake}，{negative.TEXT_TO_VIDEO}"
    assert negative_prompt(request(negative_prompt="")) == ""
    assert negative_prompt(request(negative_prompt=negative.ENGLISH_SHORT)).startswith("bl")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"frames": 80}, ["4n+1", "80", "81"]),
        ({"frames": 82}, ["82", "nearest legal number of frames is 81"]),
        ({"frames": 83}, ["83", "nearest legal number of frames is 81"]),
        ({"frames": 84}, ["84", "nearest legal number of frames is 85"]),
        ({"frames": 0}, ["nearest legal number of frames is 1"]),
        ({"frames": -5}, ["nearest legal number of frames is 1"]),
        ({"frames": 10**6}, ["nearest legal number of frames is 4093"]),
        ({"frames": 81.0}, ["frames", "whole", "81.0"]),
        ({"frames": True}, ["whole", "True"]),
        ({"width": 1279}, ["multiple of 16", "1279", "nearest legal width is 1280"]),
        ({"height": 721}, ["nearest legal height is 720"]),
        ({"height": 728}, ["nearest legal height is 720"]),
        ({"height": 0}, ["nearest legal height is 16"]),
        ({"width": 10**6}, ["nearest legal width is 16384"]),
        ({"steps": 0}, ["steps", "1 to 1000", "nearest legal value is 1"]),
        ({"steps": 2000}, ["nearest legal value is 1000"]),
        ({"fps": 0}, ["fps", "1"]),
        ({"fps": 240.5}, ["fps", "nearest legal value is 240"]),
        ({"fps": math.nan}, ["fps", "nan", "trained at 16"]),
        ({"fps": "16"}, ["fps", "'16'"]),
        ({"fps": True}, ["fps", "True"]),
        ({"prompt": "caf\udce9"}, ["prompt is not text in UTF-8", "iconv"]),
        ({"negative_prompt": "caf\udce9"}, ["negative prompt is not text in UTF-8"]),
        ({"guidance_scale": -0.5}, ["guidance", "-0.5"]),
        ({"guidance_scale": math.nan}, ["guidance", "nan"]),
        ({"guidance_scale": math.inf}, ["guidance", "inf"]),
        ({"guidance_scale": "5"}, ["guidance", "'5'"]),
        ({"shift": 0.0}, ["shift", "above 0", "0.0"]),
        ({"shift": math.inf}, ["shift", "inf"]),
        ({"seed": -1}, ["seed", "-1", "4294967295 gives the same noise"]),
        ({"seed": 2**32 + 7}, ["seed", "7 gives the same noise"]),
        ({"seed": 1.5}, ["seed", "1.5"]),
        ({"sampler": "ddim"}, ["unipc or dpm++ or euler", "'ddim'"]),
        ({"prompt": " \n"}, ["prompt is empty"]),
        ({"prompt": None}, ["prompt is empty"]),
        ({"prompt": 3}, ["prompt is not text", "int"]),
        ({"negative_prompt": ["x"]}, ["negative prompt is not text", "list"]),
        ({"image": "cat.png"}, ["image is not a path", "str", "Path('cat.png')"]),
    ],
)
def test_illegal_fields_name_the_way_out(fields, parts):
    message = refusal(**fields)
    for part in parts:
        assert part in message


@given(st.integers(-100, 20_000), st.integers(-100, 20_000))
def test_nearest_values_are_legal_and_nearest(frames, side):
    grid = Grid()
    legal_frames = min(range(1, grid.max_frames + 1, 4), key=lambda legal: abs(legal - frames))
    legal_side = min(range(16, grid.max_side + 1, 16), key=lambda legal: abs(legal - side))
    assert grid.nearest_frames(frames) == legal_frames
    assert grid.nearest_side(side) == legal_side
    request(frames=legal_frames, width=legal_side)


def test_another_grid_is_obeyed():
    made = request(grid=Grid(side=32, temporal=8), width=64, height=96, frames=17)
    assert made.frames == 17
    assert "nearest legal width is 64" in refusal(grid=Grid(side=32), width=80)


def test_seeds_that_share_their_low_32_bits_give_the_same_noise():
    def noise(seed):
        return torch.randn(8, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(noise(7), noise(2**32 + 7))
    assert not torch.equal(noise(7), noise(MAX_SEED))


def test_with_seed_draws_once_and_keeps_what_is_given():
    assert request(seed=0).with_seed().seed == 0
    drawn = [request().with_seed() for _ in range(2)]
    assert all(0 <= made.seed <= MAX_SEED for made in drawn)
    assert drawn[0].seed != drawn[1].seed
    assert replace(drawn[0], seed=None) == request()


def test_warnings_are_objects_and_not_errors():
    assert request(frames=121).warnings == ()
    assert request(frames=125).warnings == ()  # in windows
    (long,) = request(frames=125, window=0).warnings
    assert long.code == "long_video"
    assert "125" in long.message
    (weak,) = request(guidance_scale=0.5).warnings
    assert weak.code == "guidance_off"
    assert not request(guidance_scale=0.5).uses_guidance
    assert request(guidance_scale=0.0).warnings == request(guidance_scale=1.0).warnings == ()


def test_hashable_equal_and_copied_by_the_pickle_protocol():
    made = request(image=Path("cat.png"), seed=3)
    assert len({made, request(image=Path("cat.png"), seed=3)}) == 1
    function, arguments = made.__reduce_ex__(4)[:2]
    assert callable(function)
    assert arguments[0] is GenerationRequest
    assert copy.deepcopy(made) == made


def test_the_task_must_match_the_model():
    check_task(request(), image_to_video=False)
    check_task(request(image=Path("cat.png")), image_to_video=True)
    with pytest.raises(RequestError, match=r"text-to-video model.*cat\.png"):
        check_task(request(image=Path("cat.png")), image_to_video=False)
    with pytest.raises(RequestError, match="image-to-video model.*--image"):
        check_task(request(), image_to_video=True)


@pytest.mark.parametrize(
    ("image", "area", "size"),
    [
        ((1280, 720), "720p", (1280, 720)),
        ((720, 1280), "720p", (720, 1280)),
        ((832, 480), "480p", (832, 480)),
        ((480, 832), "480p", (480, 832)),
        ((1000, 1000), "720p", (960, 960)),
        ((1920, 1080), "528x960", (944, 528)),
        ((4, 3), "480p", (720, 544)),
    ],
)
def test_size_for_keeps_the_aspect(image, area, size):
    assert size_for(image, parse_area(area)) == size


@given(st.integers(1, 8000), st.integers(1, 8000), st.integers(256, 2**21))
def test_size_for_is_the_official_rule_within_the_area(width, height, area):
    try:
        sides = size_for((width, height), area)
    except RequestError:
        long = math.sqrt(area * max(width, height) / min(width, height))
        short = area / long
        assert short < 16.001 or long > 16384
        return
    assert sides[0] * sides[1] <= area
    request(width=sides[0], height=sides[1])
    for side, aspect in zip(sides, (width / height, height / width), strict=True):
        exact = math.sqrt(area * aspect)
        assert side <= exact * (1 + 1e-9) and side + 16 > exact * (1 - 1e-9)


def test_a_sliver_has_no_size():
    with pytest.raises(RequestError, match="5000x1 picture"):
        size_for((5000, 1), AREAS["720p"])


def test_parsing():
    assert parse_size("1280x720") == parse_size(" 1280 X 720 ") == parse_size("1280*720")
    assert parse_size("1280×720") == (1280, 720)
    assert parse_area("720P ") == 921_600
    assert parse_area("480p") == 399_360
    assert parse_area("528x960") == 506_880
    for text in ("", "1280", "1280x", "-1x5", "ax b"):
        with pytest.raises(RequestError, match="not a size"):
            parse_size(text)
    with pytest.raises(RequestError, match='480p or 720p or like "528x960"'):
        parse_area("1080p")


@pytest.mark.parametrize(
    ("fps", "ratio"),
    [
        (16, (16, 1)), (16.0, (16, 1)), (23.976, (24000, 1001)), (23.98, (24000, 1001)),
        (29.97, (30000, 1001)), (59.94, (60000, 1001)), (12.5, (25, 2)), (23.5, (47, 2)),
        (14.985, (15000, 1001)), (16.1, (161, 10)), (1.5, (3, 2)),
    ],
)  # fmt: skip
def test_a_rate_is_the_ratio_that_is_meant(fps, ratio):
    assert request(fps=fps).fps == fps
    assert frame_rate(fps) == Fraction(*ratio)
