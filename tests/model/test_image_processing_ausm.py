import numpy as np
import pytest
import torch
from PIL import Image

from ausm_hf.model.image_processing_ausm import AusmImageProcessor, frame_to_tensor
from ausm_hf.model.session_ausm import AusmVideoSegmentationOutput


@pytest.fixture
def processor():
    return AusmImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width) -> np.ndarray:
    """A frame that looks the same however a pixel is weighted, so that two resizers can be compared."""
    y, x = np.mgrid[:height, :width]
    channels = [np.sin(y / 9 + k) * np.cos(x / 7 - k) * 100 + 128 for k in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(100, 150), (40, 40), (150, 100)])
def test_resize_equals_pil_to_one_grey_level(processor, height, width):
    frame = smooth(height, width)
    ours = processor(frame, do_normalize=False)["pixel_values"][0] * 255
    target = tuple(ours.shape[-2:])
    pil = np.array(Image.fromarray(frame).resize(target[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(ours.numpy() - pil).max() <= 1


@pytest.mark.parametrize(
    ("size", "frame", "target"),
    [
        ({"shortest_edge": 64}, (100, 150), (64, 96)),
        ({"shortest_edge": 64}, (150, 100), (96, 64)),
        ({"shortest_edge": 70}, (100, 100), (64, 64)),
        ({"shortest_edge": 64, "longest_edge": 128}, (10, 1000), (32, 128)),
        ({"shortest_edge": 64, "longest_edge": 128}, (1, 1), (64, 64)),
        ({"shortest_edge": 10}, (7, 7), (32, 32)),
        ({"height": 90, "width": 40}, (7, 7), (96, 32)),
        ({"shortest_edge": 1024, "longest_edge": 2048}, (480, 854), (1024, 1824)),
    ],
)
def test_target_size(size, frame, target):
    assert AusmImageProcessor(size=size).target_size(*frame) == target


def test_normalisation_of_the_small_backbone():
    """(x - 127) / 128, as EfficientNet-Lite wants it."""
    processor = AusmImageProcessor(do_resize=False, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)
    frame = noise(32, 64, 3)
    expected = (torch.from_numpy(frame).permute(2, 0, 1).float() - 127) / 128
    torch.testing.assert_close(processor(frame)["pixel_values"][0], expected, atol=1e-6, rtol=1e-6)


def test_channels_have_their_own_mean_and_deviation():
    processor = AusmImageProcessor(do_resize=False, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 4])
    values = processor(np.full((32, 32, 3), 255, np.uint8))["pixel_values"][0, :, 0, 0]
    torch.testing.assert_close(values, torch.tensor([0.9, 0.8 / 2, 0.7 / 4]))


def test_every_kind_of_frame_gives_the_same(processor, tmp_path):
    frame = noise(40, 50, 3)
    path = tmp_path / "frame.png"
    Image.fromarray(frame).save(path)
    expected = processor(frame)
    assert expected["pixel_values"].shape == (1, 3, 64, 64) and expected["pixel_values"].dtype == torch.float32
    assert expected["original_sizes"] == [[40, 50]]
    tensor = torch.from_numpy(frame).permute(2, 0, 1)
    kinds = {
        "PIL": Image.fromarray(frame),
        "path": path,
        "str": str(path),
        "tensor": tensor,
        "channels last tensor": torch.from_numpy(frame),
        "channels first array": frame.transpose(2, 0, 1),
        "float array": (frame / 255).astype(np.float32),
        "double tensor": tensor.double() / 255,
        "RGBA array": np.dstack([frame, noise(40, 50, 1)]),
        "RGBA PIL": Image.fromarray(np.dstack([frame, noise(40, 50, 1)])),
        "negative strides": np.ascontiguousarray(frame[..., ::-1])[..., ::-1],
        "list": [frame],
        "batch": frame[None],
        "batch tensor": tensor[None],
    }
    for kind, image in kinds.items():
        out = processor(image)
        torch.testing.assert_close(out["pixel_values"], expected["pixel_values"], msg=kind)
        assert out["original_sizes"] == [[40, 50]], kind


def test_values_that_rounding_took_past_one():
    white = torch.full((3, 90, 120), 1 + 2e-7)  # as torch resizes what is white
    assert white.max() > 1
    processor = AusmImageProcessor(size={"shortest_edge": 32}, do_normalize=False)
    assert processor(white, device="cpu")["pixel_values"].max() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        processor(white + 0.01)


def test_ambiguous_axes_are_last_in_arrays_and_first_in_tensors():
    frame = noise(3, 8, 4)
    assert frame_to_tensor(frame).shape == (3, 3, 8)
    assert frame_to_tensor(torch.from_numpy(frame)).shape == (3, 8, 4)


def test_grey_frames_and_a_single_pixel(processor):
    grey = noise(40, 50)
    expected = processor(np.dstack([grey] * 3))["pixel_values"]
    for image in (grey, Image.fromarray(grey), torch.from_numpy(grey), grey[..., None], torch.from_numpy(grey)[None]):
        torch.testing.assert_close(processor(image)["pixel_values"], expected)
    assert processor(noise(1, 1, 3))["pixel_values"].shape == (1, 3, 64, 64)


def test_batch_and_return_tensors(processor):
    batch = processor([noise(40, 50, 3), Image.fromarray(noise(40, 50, 3, seed=1))], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    assert batch["original_sizes"].tolist() == [[40, 50]] * 2
    assert isinstance(processor(noise(8, 8, 3), return_tensors="np")["pixel_values"], np.ndarray)
    assert processor(noise(8, 8, 3), size={"height": 32, "width": 64})["pixel_values"].shape == (1, 3, 32, 64)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one frame"),
        (noise(0, 5, 3), "without pixels"),
        (noise(5, 5, 2), "1, 3 or 4 channels"),
        (noise(2, 2, 5, 5, 3), "2 or 3 axes"),
        (noise(5, 5, 3).astype(np.int64), "wanted is uint8"),
        (noise(5, 5, 3).astype(np.float32), "values in 0..1"),
        (np.full((5, 5, 3), np.nan), "values in 0..1"),
        (Image.fromarray(np.zeros((5, 5), np.int32)), "mode 'I'"),
        (3, "holds a int"),
        ([noise(5, 5, 3), None], "holds a NoneType"),
        ([noise(5, 5, 3), noise(5, 50, 3)], "images must have one size"),
    ],
)
def test_what_is_no_frame(processor, images, message):
    with pytest.raises(ValueError, match=message):
        processor(images)


def test_unresized_frames_must_fit_the_strides(processor):
    assert processor(noise(32, 64, 3), do_resize=False)["pixel_values"].shape == (1, 3, 32, 64)
    with pytest.raises(ValueError, match=r"multiples of 32 when do_resize is False, got \(32, 65\)"):
        processor(noise(32, 65, 3), do_resize=False)


@pytest.mark.parametrize(
    "size",
    [
        64,
        {},
        {"longest_edge": 5},
        {"shortest_edge": 0},
        {"height": 32},
        {"height": "64", "width": 64},
        {"shortest_edge": 100.5},
        {"shortest_edge": True},
    ],
)
def test_wrong_size(size):
    with pytest.raises(ValueError, match="size must be a dict"):
        AusmImageProcessor(size=size)


def output(masks, ids=(3, 8), scores=(0.9, 0.4), prompted=(False, False)) -> AusmVideoSegmentationOutput:
    return AusmVideoSegmentationOutput(
        object_ids=list(ids),
        pred_masks=torch.tensor(masks, dtype=torch.float32).reshape(len(ids), 1, 2, 2),
        scores=torch.tensor(scores),
        labels=["cat", None],
        label_ids=[0, -1],
        prompted=list(prompted),
        frame_idx=0,
    )


OVERLAPPING = [[[5, 5], [-5, -5]], [[7, 3], [2, -1]]]


def test_map_gives_each_pixel_to_the_highest_logit(processor):
    (result,) = processor.post_process_instance_segmentation((output(OVERLAPPING),))
    assert result["segmentation"].tolist() == [[8, 3], [8, 0]] and result["segmentation"].dtype == torch.int32
    assert result["segments_info"] == [
        {"id": 3, "label_id": 0, "label": "cat", "score": pytest.approx(0.9)},
        {"id": 8, "label_id": -1, "label": None, "score": pytest.approx(0.4)},
    ]
    (panoptic,) = processor.post_process_panoptic_segmentation(output(OVERLAPPING))
    assert torch.equal(panoptic["segmentation"], result["segmentation"])
    assert panoptic["segments_info"] == result["segments_info"]


def test_threshold_applies_to_found_objects_and_frees_their_pixels(processor):
    (result,) = processor.post_process_instance_segmentation(output(OVERLAPPING), threshold=0.5)
    assert result["segmentation"].tolist() == [[3, 3], [0, 0]] and [x["id"] for x in result["segments_info"]] == [3]
    prompted = output(OVERLAPPING, prompted=(False, True))
    assert len(processor.post_process_instance_segmentation(prompted, threshold=0.5)[0]["segments_info"]) == 2


def test_binary_maps_may_overlap(processor):
    (result,) = processor.post_process_instance_segmentation(output(OVERLAPPING), return_binary_maps=True)
    assert result["segmentation"].tolist() == [[[True, True], [False, False]], [[True, True], [True, False]]]


@pytest.mark.parametrize("binary", [False, True])
def test_object_without_a_pixel_is_not_listed(processor, binary):
    masks = [[[-1, -1], [-1, -1]], [[7, 3], [2, -1]]]
    (result,) = processor.post_process_instance_segmentation(output(masks), return_binary_maps=binary)
    assert [x["id"] for x in result["segments_info"]] == [8]
    assert result["segmentation"].shape == ((1, 2, 2) if binary else (2, 2))


def test_masks_are_upsampled_bilinearly_to_the_frame(processor):
    logits = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    (upsampled,) = processor.post_process_masks([logits], [(13, 21)], binarize=False)
    expected = torch.nn.functional.interpolate(logits, (13, 21), mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsampled, expected)
    (masks,) = processor.post_process_masks([logits], torch.tensor([[13, 21]]), mask_threshold=0.5)
    assert masks.dtype == torch.bool and torch.equal(masks, expected > 0.5)
    sizes = [(8, 10), (3, 3)]
    results = processor.post_process_instance_segmentation([output(OVERLAPPING)] * 2, target_sizes=sizes)
    assert [tuple(result["segmentation"].shape) for result in results] == sizes


def test_map_of_many_objects_at_another_size(processor):
    ids = [90_000, 3, 17, 2, 41, 5]
    logits = torch.randn(6, 1, 9, 7, generator=torch.Generator().manual_seed(0)) - 0.5
    logits[3] = -1  # nowhere
    many = AusmVideoSegmentationOutput(ids, logits, torch.ones(6), [None] * 6, [-1] * 6, [False] * 6, 0)
    for size in [(9, 7), (20, 33), (5, 4), (5, 30)]:  # the same, larger, smaller (which averages), both
        resized = torch.nn.functional.interpolate(logits, size, mode="bilinear", antialias=True)[:, 0].numpy()
        expected = np.where(resized.max(0) > 0, np.array(ids)[resized.argmax(0)], 0)
        (result,) = processor.post_process_instance_segmentation(many, target_sizes=[size])
        np.testing.assert_array_equal(result["segmentation"].numpy(), expected)
        assert [x["id"] for x in result["segments_info"]] == [x for x in ids if (expected == x).any()]


def test_frame_without_objects(processor):
    empty = AusmVideoSegmentationOutput([], torch.zeros(0, 1, 2, 2), torch.zeros(0), [], [], [], 0)
    for binary in (False, True):
        (result,) = processor.post_process_instance_segmentation(
            empty, target_sizes=[(4, 4)], return_binary_maps=binary
        )
        assert result["segments_info"] == [] and not result["segmentation"].any()
    assert processor.post_process_masks([empty.pred_masks], [(4, 4)])[0].shape == (0, 1, 4, 4)


def test_one_size_per_frame(processor):
    with pytest.raises(ValueError, match="target_sizes must have one size"):
        processor.post_process_instance_segmentation(output(OVERLAPPING), target_sizes=[(4, 4)] * 2)
    with pytest.raises(ValueError, match="original_sizes must have one size"):
        processor.post_process_masks([torch.zeros(1, 1, 2, 2)], [(4, 4)] * 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"size_divisor": 0}, "size_divisor must be an integer of at least 1, got 0"),
        ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers"),
        ({"image_std": [1.0, float("nan"), 1.0]}, "image_std must be three numbers"),
        ({"image_std": [0.2, 0.0, 0.2]}, "image_std must not be 0"),
        ({"do_rescale": False}, "do_rescale is False; frames of uint8 are always divided by 255"),
    ],
)
def test_what_no_frame_can_be_prepared_with(arguments, message):
    with pytest.raises(ValueError, match=message):
        AusmImageProcessor(**arguments)
    assert AusmImageProcessor(image_mean=0.5).image_mean == [0.5, 0.5, 0.5]


def test_a_size_of_its_own_is_looked_at_too():
    processor = AusmImageProcessor()
    processor.size = 256
    with pytest.raises(ValueError, match="size must be a dict .*, got 256"):
        processor(np.zeros((32, 32, 3), np.uint8))
