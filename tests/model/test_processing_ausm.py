import inspect
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Sam2VideoProcessor

from ausm_hf import AusmImageProcessor, AusmProcessor
from ausm_hf.model.prompts_ausm import ObjectPrompt


@pytest.fixture(scope="module")
def processor():
    return AusmProcessor(AusmImageProcessor(size={"shortest_edge": 32}))


def noise(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


VIDEO = noise(3, 20, 30, 3)
MASK = np.zeros((20, 30), np.uint8)
MASK[5:9, 5:12] = 1


def test_every_kind_of_video_gives_the_same(processor):
    expected = processor(videos=VIDEO)["pixel_values_videos"]
    assert expected.shape == (1, 3, 3, 32, 64) and expected.dtype == torch.float32
    torch.testing.assert_close(expected[0], processor(images=list(VIDEO))["pixel_values"])
    kinds = {
        "tensor": torch.from_numpy(VIDEO).permute(0, 3, 1, 2),
        "list": list(VIDEO),
        "PIL": [Image.fromarray(frame) for frame in VIDEO],
        "generator": (frame for frame in VIDEO),
        "list of videos": [VIDEO],
        "list of lists": [list(VIDEO)],
        "batch": VIDEO[None],
    }
    for kind, videos in kinds.items():
        torch.testing.assert_close(processor(videos=videos)["pixel_values_videos"], expected, msg=kind)


def test_batch_in_one_array(processor):
    other = noise(3, 20, 30, 3, seed=1)
    batch = processor(videos=np.stack([VIDEO, other]))["pixel_values_videos"]
    torch.testing.assert_close(batch, processor(videos=[VIDEO, other])["pixel_values_videos"])
    assert batch.shape == (2, 3, 3, 32, 64) and not torch.equal(batch[0], batch[1])


def test_batch_of_videos_with_masks_for_training(processor):
    masks = [np.stack([np.stack([MASK] * 3)] * 2), np.zeros((0, 3, 20, 30), bool)]
    batch = processor(videos=[VIDEO, VIDEO], masks=masks, return_tensors="pt")
    size = batch["pixel_values_videos"].shape[-2:]
    assert batch["pixel_values_videos"].shape[:3] == (2, 3, 3)
    assert [tuple(mask.shape) for mask in batch["mask_labels"]] == [(2, 3, *size), (0, 3, *size)]
    expected = np.array(Image.fromarray(MASK).resize(size[::-1], Image.Resampling.NEAREST)).astype(bool)
    assert torch.equal(batch["mask_labels"][0][1, 2], torch.from_numpy(expected))
    assert set(batch) == {"pixel_values_videos", "mask_labels"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "images or videos must be given"),
        ({"images": VIDEO[0], "masks": [MASK]}, "masks are those of videos"),
        ({"videos": []}, "at least one frame"),
        ({"videos": "clip.mp4"}, "got 'clip.mp4'"),
        ({"videos": VIDEO[0]}, "4 axes"),
        ({"videos": [VIDEO, VIDEO[:2]]}, "agree in length and size"),
        ({"videos": VIDEO, "masks": np.zeros((1, 2, 20, 30))}, r"shape \(objects, 3, 20, 30\)"),
        *[
            ({"videos": VIDEO, "masks": masks}, r"masks of a video must be a tensor or an array of shape \(objects, 3")
            for masks in (b"", {}, "masks.png", [None], [np.zeros((3, 20, 30))] * 2 + [np.zeros((2, 20, 30))])
        ],
        ({"videos": [VIDEO, VIDEO], "masks": [np.zeros((1, 3, 20, 30))]}, "each of 2 videos"),
    ],
)
def test_wrong_inputs(processor, inputs, message):
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


def test_session_takes_its_frames_one_at_a_time(processor):
    taken = []

    def frames():
        for i, frame in enumerate(VIDEO):
            taken.append(i)
            yield frame

    session = processor.init_video_session(video=frames(), dtype=torch.float64)
    assert taken == [0] and (session.video_height, session.video_width) == (20, 30) and session.num_frames is None
    first = next(session.video)
    assert first.dtype == torch.float64 and taken == [0]
    torch.testing.assert_close(first.float(), processor(images=VIDEO[0])["pixel_values"][0])
    assert len(list(session.video)) == 2
    assert processor.init_video_session(video=VIDEO).num_frames == 3
    assert processor.init_video_session().video is None


def test_wrong_videos_for_a_session(processor):
    for video, message in [
        ([], "at least one frame"),
        ("clip.mp4", "decode a file first"),
        (3, "iterable of frames"),
        (VIDEO[0], "4 axes"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor.init_video_session(video=video)
    session = processor.init_video_session(video=[VIDEO[0], noise(20, 31, 3)])
    next(session.video)
    for _ in range(2):  # it is never passed over
        with pytest.raises(ValueError, match=r"\(20, 31\) \(height, width\) for frame 1"):
            next(session.video)


def test_several_ids_of_any_kind(processor):
    session = processor.init_video_session(video=VIDEO)
    processor.add_inputs_to_inference_session(session, 0, range(4, 6), input_masks=np.stack([MASK, MASK])[:, None])
    assert list(session.prompts[0]) == [4, 5]
    session.remove_object(torch.tensor(4))
    assert list(session.prompts[0]) == [5]
    with pytest.raises(ValueError, match=r"below 2\*\*30, got 1073741824"):
        processor.add_inputs_to_inference_session(session, 0, 2**30, input_masks=MASK)
    assert processor.init_video_session(find_new_objects=np.bool_(True)).find_new_objects is True


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        MASK.astype(bool),
        MASK * 255,
        torch.from_numpy(MASK)[None, None],
        Image.fromarray(MASK),
        MASK.astype(float),
    ],
    ids=["uint8", "bool", "255", "tensor", "PIL", "float"],
)
def test_every_kind_of_mask(processor, mask):
    session = processor.init_video_session(video=VIDEO)
    assert processor.add_inputs_to_inference_session(session, np.int64(0), np.int64(4), input_masks=mask) is session
    assert torch.equal(session.prompts[0][4].mask, torch.from_numpy(MASK).bool())
    processor.add_inputs_to_inference_session(session, 1, [4, 5], input_masks=[mask, mask])
    assert list(session.prompts[1]) == [4, 5]


def test_arguments_come_in_the_order_of_sam_2(processor):
    theirs = inspect.signature(Sam2VideoProcessor.add_inputs_to_inference_session).parameters
    ours = inspect.signature(AusmProcessor.add_inputs_to_inference_session).parameters
    assert list(ours)[: len(theirs)] == list(theirs) and ours["clear_old_inputs"].default is True


def test_points_are_added_to_what_was_said_before(processor):
    session = processor.init_video_session(video=VIDEO)
    say = partial(processor.add_inputs_to_inference_session, session)
    say(obj_ids=[1, 2], input_boxes=[[[1, 2, 9, 9], [3, 3, 8, 8]]])
    say(obj_ids=1, input_points=[4, 5], input_labels=[0], clear_old_inputs=False)
    say(obj_ids=[1, 3], input_points=[[[[6, 7], [8, 8]], [[2, 2]]]], clear_old_inputs=False)
    assert session.prompts == {
        0: {
            1: ObjectPrompt(box=(1, 2, 9, 9), points=((4, 5), (6, 7), (8, 8)), labels=(0, 1, 1)),
            2: ObjectPrompt(box=(3, 3, 8, 8)),
            3: ObjectPrompt(points=((2, 2),), labels=(1,)),
        }
    }
    say(1, 1, input_points=[4, 5], clear_old_inputs=False)  # another frame: nothing was said of it
    assert session.prompts[1][1].points == ((4, 5),)
    with pytest.raises(ValueError, match="input_masks and input_scribbles come first, and replace it"):
        say(obj_ids=1, input_boxes=[1, 2, 9, 9], clear_old_inputs=False)
    say(obj_ids=1, input_masks=MASK)
    with pytest.raises(ValueError, match="exact and stand alone"):
        say(obj_ids=1, input_points=[4, 5], clear_old_inputs=False)
    assert session.prompts[0][1].points == () and session.prompts[0][1].mask is not None


def test_size_of_a_stream_without_a_video(processor):
    session = processor.init_video_session()
    with pytest.raises(ValueError, match="original_size must be given"):
        processor.add_inputs_to_inference_session(session, 0, 1, input_masks=MASK)
    with pytest.raises(ValueError, match="size of the video"):
        processor.add_inputs_to_inference_session(session, 0, 1, input_masks=MASK, original_size=(30, 20))
    processor.add_inputs_to_inference_session(session, 0, 1, input_masks=MASK, original_size=torch.tensor([20, 30]))
    assert (session.video_height, session.video_width) == (20, 30)
    processor.add_inputs_to_inference_session(session, 1, 1, input_masks=MASK)
    with pytest.raises(ValueError, match="original_size must be that of the video"):
        processor.add_inputs_to_inference_session(session, 1, 1, input_masks=MASK, original_size=(40, 60))


@pytest.mark.parametrize(
    ("obj_ids", "masks", "message"),
    [
        (1, np.zeros_like(MASK), "empty mask for object 1"),
        (1, MASK[:, :-1], "size of the video"),
        (1, MASK + (np.arange(30) > 7).astype(np.uint8), "one mask per object"),
        (1, np.stack([MASK, MASK]), "shape"),
        (1, "mask.png", "arrays, tensors or PIL images, got str"),
        ("cat", MASK, "positive integers"),
        (True, MASK, "positive integers"),
        (0, MASK, "positive integers"),
        ([1, 2], [MASK], "as many as obj_ids"),
        ([1, 1], [MASK, MASK], "each one once"),
    ],
)
def test_wrong_masks(processor, obj_ids, masks, message):
    session = processor.init_video_session(video=VIDEO)
    with pytest.raises(ValueError, match=message):
        processor.add_inputs_to_inference_session(session, 0, obj_ids, input_masks=masks)
    assert not session.prompts


CODE = """
import json, sys
import numpy as np, torch
if {package}:
    import ausm_hf
else:
    sys.modules["ausm_hf"] = None  # as if it were not installed
from transformers import AutoImageProcessor, AutoProcessor
options = {{"trust_remote_code": True}} if not {package} else {{}}
processor = AutoProcessor.from_pretrained({folder!r}, **options)
image_processor = AutoImageProcessor.from_pretrained({folder!r}, **options)
frames = np.arange(2 * 20 * 30 * 3, dtype=np.uint8).reshape(2, 20, 30, 3)
session = processor.init_video_session(video=frames)
processor.add_inputs_to_inference_session(session, 0, 1, input_masks=frames[0, ..., 0] > 100)
print(json.dumps([
    type(processor).__module__.split(".")[0], type(processor).__name__, type(image_processor).__name__,
    float(processor(videos=frames)["pixel_values_videos"].double().sum()),
    float(image_processor(list(frames))["pixel_values"].double().sum()), image_processor.size,
]))
"""


@pytest.mark.parametrize("package", [True, False], ids=["package", "remote code"])
def test_auto_classes_load_it_in_a_clean_process(tmp_path, package):
    processor = AusmProcessor(AusmImageProcessor(size={"shortest_edge": 64}, image_std=[0.5, 0.25, 0.125]))
    folder = tmp_path / "saved"
    processor.save_pretrained(folder)
    code = tmp_path / "check.py"
    code.write_text(CODE.format(package=package, folder=str(folder)))
    done = subprocess.run(
        [sys.executable, str(code)],
        capture_output=True,
        text=True,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    module, name, image_name, videos_sum, images_sum, size = json.loads(done.stdout.splitlines()[-1])
    assert module == ("ausm_hf" if package else "transformers_modules")
    assert (name, image_name, size) == ("AusmProcessor", "AusmImageProcessor", {"shortest_edge": 64})
    frames = np.arange(2 * 20 * 30 * 3, dtype=np.uint8).reshape(2, 20, 30, 3)
    assert videos_sum == images_sum == float(processor(videos=frames)["pixel_values_videos"].double().sum())


def test_loading_with_another_size(processor, tmp_path):
    processor.image_processor.save_pretrained(tmp_path)
    loaded = AusmImageProcessor.from_pretrained(tmp_path, size={"height": 64, "width": 96})
    assert loaded.size == {"height": 64, "width": 96} and loaded.image_mean == processor.image_processor.image_mean
