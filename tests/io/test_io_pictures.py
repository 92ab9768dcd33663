"""Conversion of decoded frames through a filter graph: the values of swscale, memory used again."""

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation, VideoReformatter

from stvision.io.backends.pictures import Pictures


def frame(height: int, width: int, kind: str, seed: int = 0, colour: int = 1, span: int = 1):
    picture = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    made = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=kind)
    made.colorspace, made.color_range = colour, span
    return made


def plain(source, height: int, width: int) -> np.ndarray:
    picture = VideoReformatter().reformat(
        source, width, height, format="rgb24", interpolation=Interpolation.BILINEAR, threads=1
    )
    return picture.to_ndarray()


@pytest.mark.parametrize("kind", ["yuv420p", "yuvj420p", "yuv422p10le", "nv12", "gbrp", "gray"])
@pytest.mark.parametrize("size", [(270, 330), (300, 256), (20, 30)])
def test_values_are_those_of_a_plain_conversion(kind: str, size: tuple[int, int]) -> None:
    pictures = Pictures()
    # BT.709, BT.601 and BT.2020, limited and full range, one after the other in one video
    for number, (colour, span) in enumerate([(1, 1), (5, 1), (9, 2), (1, 2), (2, 0)]):
        source = frame(270, 330, kind, number, colour, span)
        np.testing.assert_array_equal(pictures.rgb(source, *size), plain(source, *size))


def test_a_format_that_changes_on_the_way() -> None:
    pictures = Pictures()
    for number, (height, width) in enumerate([(270, 330), (288, 352), (270, 330)]):
        source = frame(height, width, "yuv420p", number)
        np.testing.assert_array_equal(pictures.rgb(source, 270, 330), plain(source, 270, 330))


def test_pictures_that_are_held_stay_and_others_are_used_again() -> None:
    pictures = Pictures()
    sources = [frame(256, 256, "yuv420p", number) for number in range(12)]
    held = [pictures.rgb(source, 256, 256) for source in sources[:3]]
    places = set()
    for source in sources[3:]:
        rows = pictures.rgb(source, 256, 256)
        places.add(rows.__array_interface__["data"][0])
        del rows
    for source, rows in zip(sources, held, strict=False):
        np.testing.assert_array_equal(rows, plain(source, 256, 256))
    assert len(places) <= 2
    del pictures
    np.testing.assert_array_equal(held[0], plain(sources[0], 256, 256))
