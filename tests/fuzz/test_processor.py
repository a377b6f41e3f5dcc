"""Frames of any kind: tensors that the network takes, or a ValueError."""

import numpy as np
import torch
from fuzzing import numbers, tries
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ausm_hf import AusmImageProcessor, AusmProcessor

DTYPES = ["uint8", "int8", "int16", "int32", "int64", "uint16", "bool", "float16", "float32", "float64", "complex64"]
VALUES = st.sampled_from([0, 0, 0.5, 1, 1, 255, -1, 300, np.nan, np.inf, -np.inf])
SIDES = st.integers(0, 70)
CHANNELS = st.sampled_from([1, 3, 3, 3, 4, 2, 0, 5])


@st.composite
def arrays(draw):
    """Arrays and tensors of any dtype and order of axes, with one value that stands out."""
    height, width, channels = draw(SIDES), draw(SIDES), draw(CHANNELS)
    shape = draw(
        st.sampled_from(
            [(height, width, channels), (channels, height, width), (height, width), (2, height, width, channels)]
            + [(2, channels, height, width), (height,), (), (1, 1, height, width, channels)]
        )
    )
    with np.errstate(all="ignore"):
        array = np.full(shape, draw(VALUES)).astype(draw(st.sampled_from(DTYPES)))
        if array.size:
            array.flat[draw(st.integers(0, array.size - 1))] = np.array(draw(VALUES)).astype(array.dtype)
    turned = draw(st.sampled_from(["as it is", "mirrored", "read-only", "tensor"]))
    if turned == "mirrored" and array.ndim:
        array = array[..., ::-1]
    if turned == "read-only":
        array.setflags(write=False)
    return torch.from_numpy(array.copy()) if turned == "tensor" else array


IMAGES = st.builds(
    lambda mode, width, height: Image.new(mode, (width, height)),
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I", "F", "I;16", "YCbCr", "HSV"]),
    st.integers(1, 70),
    st.integers(1, 70),
)
JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.binary(), st.just({}), st.just(object()))
FRAMES = st.one_of(arrays(), arrays(), IMAGES, JUNK)
SIZES = st.one_of(
    st.none(),
    st.fixed_dictionaries({"height": st.integers(1, 96), "width": st.integers(1, 96)}),
    st.fixed_dictionaries({"shortest_edge": st.integers(-1, 96)}),
    st.just({"longest_edge": 32}),
)


@numbers(40, 5000)
def test_images(examples):
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 32, "longest_edge": 128}))

    @tries(examples)
    @given(st.one_of(FRAMES, st.lists(FRAMES, max_size=3)), st.booleans(), st.booleans(), SIZES)
    def check(images, do_resize, do_normalize, size):
        try:
            features = processor(images=images, do_resize=do_resize, do_normalize=do_normalize, size=size)
        except ValueError as error:
            assert str(error)
            return
        pixel_values = features["pixel_values"]
        assert pixel_values.dtype == torch.float32 and pixel_values.isfinite().all()
        assert pixel_values.shape[1] == 3 and all(side and side % 32 == 0 for side in pixel_values.shape[2:])
        assert len(features["original_sizes"]) == len(pixel_values) >= 1

    check()


@numbers(40, 3000)
def test_videos(examples):
    processor = AusmProcessor(AusmImageProcessor(size={"height": 32, "width": 32}))
    masks = st.one_of(st.none(), arrays(), st.lists(arrays(), max_size=2), JUNK)

    @tries(examples)
    @given(st.one_of(arrays(), st.lists(FRAMES, max_size=3), st.lists(st.lists(arrays(), max_size=2)), JUNK), masks)
    def check(videos, masks):
        try:
            features = processor(videos=videos, masks=masks)
        except ValueError as error:
            assert str(error)
            return
        pixel_values = features["pixel_values_videos"]
        assert pixel_values.ndim == 5 and pixel_values.shape[2:] == (3, 32, 32) and pixel_values.isfinite().all()
        for of_video in features.get("mask_labels", []):
            assert of_video.dtype == torch.bool and of_video.shape[1:] == (pixel_values.shape[1], 32, 32)

    check()


@numbers(60, 5000)
def test_prompts(examples):
    """Whatever is said of objects is taken into the session or refused; a refusal leaves the session as it was."""
    processor = AusmProcessor(AusmImageProcessor(size={"height": 32, "width": 32}))
    number = st.one_of(st.integers(-2, 70), st.floats(-2, 70), st.floats(), st.booleans(), st.none())
    nested = st.recursive(number, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
    point = st.lists(st.integers(0, 30), min_size=2, max_size=2)
    given_points = st.one_of(nested, st.lists(st.lists(point, min_size=1, max_size=3), min_size=1, max_size=2))
    ids = st.one_of(st.integers(-1, 5), st.lists(st.integers(0, 5), max_size=3), JUNK)

    @tries(examples)
    @given(
        st.one_of(st.none(), st.integers(-1, 2), JUNK),
        ids,
        st.one_of(st.none(), arrays(), st.lists(st.one_of(arrays(), IMAGES, JUNK), max_size=2), JUNK),
        st.one_of(st.none(), nested, st.just([0, 0, 9, 9])),
        st.one_of(st.none(), given_points),
        st.one_of(st.none(), nested),
        st.one_of(st.none(), given_points),
        st.one_of(st.just((32, 48)), st.none(), st.tuples(number, number), JUNK),
    )
    def check(frame_idx, obj_ids, masks, boxes, points, labels, scribbles, original_size):
        session = processor.init_video_session()
        arguments = (session, frame_idx, obj_ids, masks, boxes, points, labels, scribbles, original_size)
        try:
            processor.add_inputs_to_inference_session(*arguments)
        except ValueError as error:
            assert str(error) and not session.prompts and session.video_height is None
            return
        (prompts,) = session.prompts.values()
        size = (session.video_height, session.video_width)
        assert all(prompt.signal(size).shape == size for prompt in prompts.values() if prompt.mask is None)

    check()
