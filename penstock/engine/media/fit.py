"""How a picture comes into a video of another aspect: arithmetic on sizes."""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Fitting:
    """What is taken of a picture, and where it lies in the frame.

    Attributes:
        box: the part of the picture: left, top, right and bottom in its pixels; None: all of it.
        inner: width and height that the part is scaled to.
        place: left and top of that in the frame; what is around it is black.
        told: what was done, for people; "" where the aspects are the same.
    """

    box: tuple[float, float, float, float] | None
    inner: Size
    place: Size = (0, 0)
    told: str = ""


def fitting(picture: Size, video: Size, fit: str, cell: int) -> Fitting:
    """Fit a picture into a video; sizes are width and height.

    ComfyUI's nodes and the makers' tools crop around the middle. What has the video's aspect but
    for the rounding of its sides is scaled as it is, as the makers' code does.

    Args:
        fit: "crop", "pad" or "stretch".
        cell: pixels that a side is rounded to.
    """
    (width, height), (wide, high) = picture, video
    # How far the picture's aspect is from the one or the other side of the video
    if min(abs(high * width / height - wide), abs(wide * height / width - high)) < cell:
        return Fitting(None, video)
    told = f"the picture is {width}x{height} and the video {wide}x{high}: it is "
    if fit == "stretch":
        return Fitting(None, video, told=told + "stretched (--fit crop or pad keep its shapes)")
    if fit == "crop":
        scale = min(width / wide, height / high)
        kept = scale * wide, scale * high
        left, top = (width - kept[0]) / 2, (height - kept[1]) / 2
        box = (left, top, left + kept[0], top + kept[1])
        what = f"cropped to {round(kept[0])}x{round(kept[1])} around its middle"
        return Fitting(box, video, told=f"{told}{what} (--fit pad keeps all of it)")
    scale = min(wide / width, high / height)
    inner = max(1, round(scale * width)), max(1, round(scale * height))
    place = (wide - inner[0]) // 2, (high - inner[1]) // 2
    return Fitting(None, inner, place, told + "padded with black (--fit crop fills the frame)")
