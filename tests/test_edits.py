"""What an EditRequest refuses, before anything is loaded."""

import math
from typing import Any

import pytest
from PIL import Image

from millicent.edits import MAX_SEED, EditRequest, EditResult, Timings
from millicent.errors import EmptyPromptError, InputError, MillicentError, ScheduleError, SizeError

PICTURE = Image.new("RGB", (8, 8))


def request(**changes: Any) -> EditRequest:
    return EditRequest(**{"images": (PICTURE,), "prompt": "make it navy", **changes})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"images": ()}, InputError),
        ({"prompt": "navy \udcff"}, InputError),
        ({"negative_prompt": "\ud83d"}, InputError),
        ({"prompt": ""}, EmptyPromptError),
        ({"prompt": " \n\t "}, EmptyPromptError),
        ({"height": 512}, SizeError),
        ({"width": 512}, SizeError),
        ({"height": 0, "width": 0}, SizeError),
        ({"height": -64, "width": 64}, SizeError),
        ({"height": 16, "width": 16 * 17}, SizeError),
        ({"height": 16385, "width": 16385}, SizeError),
        ({"fit": "stretch"}, SizeError),
        ({"steps": 0}, ScheduleError),
        ({"steps": 1001}, ScheduleError),
        ({"schedule": "karras"}, ScheduleError),
        ({"sigmas": ()}, ScheduleError),
        ({"sigmas": (math.nan,)}, ScheduleError),
        ({"sigmas": (1.0, math.nan, 0.5)}, ScheduleError),
        ({"sigmas": (math.inf, 0.5)}, ScheduleError),
        ({"sigmas": (1.0, 0.5, 0.0)}, ScheduleError),
        ({"sigmas": (0.5, 0.5)}, ScheduleError),
        ({"sigmas": (0.5, 0.9)}, ScheduleError),
        ({"sigmas": (1.1, 0.9)}, ScheduleError),
        ({"sigmas": (1.0, 0.5), "steps": 3}, ScheduleError),
        ({"sigmas": (1.0, 0.5), "schedule": "base"}, ScheduleError),
        ({"seed": -1}, InputError),
        ({"seed": MAX_SEED}, InputError),
        ({"variants": 0}, InputError),
        ({"variants": 65}, InputError),
        ({"true_cfg": math.nan}, InputError),
        ({"true_cfg": 0.5}, InputError),
    ],
)
def test_what_no_model_could_draw_is_refused(changes: dict[str, Any], error: type[MillicentError]) -> None:
    with pytest.raises(error) as caught:
        request(**changes)
    assert type(caught.value) is error
    assert caught.value.fix


def test_the_edges_of_what_is_allowed() -> None:
    request(height=16, width=256)
    request(height=16384, width=16384)
    request(sigmas=(1.0, 1e-6), steps=2)
    request(seed=MAX_SEED - 64, variants=64)
    request(true_cfg=1.0)


def test_a_result_answers_for_its_first_picture() -> None:
    result = EditResult(
        images=(PICTURE, PICTURE),
        seeds=(3, 4),
        sigmas=(1.0, 0.5, 0.0),
        schedule="sigmas",
        true_cfg=1.0,
        model="demo",
        weights_sha256="00",
        timings=Timings(prepare_s=0.25, encode_s=0.5, denoise_s=1.0, decode_s=2.0),
    )
    assert (result.image, result.seed, result.steps, result.timings.total_s) == (PICTURE, 3, 2, 3.75)
