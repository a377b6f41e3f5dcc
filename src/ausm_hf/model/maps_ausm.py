"""
Maps of features and their tokens: averaged, resized, one as the other.

Letters: N batch, S = h * w pixels of a map, D hidden size.
"""

import torch.nn.functional as F
from torch import Tensor


def average_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Averages maps (N, C, height, width) over the area of each cell of a map of `size`."""
    if maps.shape[-2:] == size:
        return maps
    if not maps.shape[1]:
        return maps.new_zeros(*maps.shape[:2], *size)  # Apple's GPUs can't pool nothing
    stride = maps.shape[-2] // size[0]
    if maps.shape[-2:] == (stride * size[0], stride * size[1]):
        return F.avg_pool2d(maps, stride)  # the same in a fraction of the time
    return F.interpolate(maps, size=size, mode="area")


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, C, height, width) at another size: averaged where it is smaller, interpolated where it is larger."""
    if size[0] <= maps.shape[-2]:
        return average_maps(maps, size)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def channels_last(maps: Tensor) -> Tensor:
    """Maps (..., D, h, w) as (..., h, w, D)."""
    return maps.movedim(-3, -1)


def channels_first(maps: Tensor) -> Tensor:
    """Maps (..., h, w, D) as (..., D, h, w)."""
    return maps.movedim(-1, -3)


def to_maps(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Tokens (N, S, D) as maps (N, D, *size), without a copy: channels last in memory."""
    return channels_first(tokens.unflatten(1, size))


def to_tokens(maps: Tensor) -> Tensor:
    """Maps (N, D, h, w) as tokens (N, S, D), without a copy where channels are last in memory."""
    return channels_last(maps).flatten(1, 2)


def average_tokens(tokens: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """Averages tokens (N, S, D) of a map of `size` over squares of `stride` pixels."""
    if stride == 1:
        return tokens
    return to_tokens(F.avg_pool2d(to_maps(tokens, size), stride, ceil_mode=True, count_include_pad=False))
