import torch
from PIL import Image

from ausm_hf import AusmImageProcessor, AusmProcessor
from ausm_hf.training.samples import FIRST_CLIP, SampleWriter, follow, iou


class Clips(torch.utils.data.Dataset):
    asked = ()

    def __getitem__(self, index):
        self.asked = (*self.asked, index)
        masks = torch.zeros(2, 3, 64, 64, dtype=torch.bool)
        masks[0, :, 10:40, 10:40] = True
        masks[1, 1:, 45:60, 45:60] = True  # not there in the first frame: nothing to follow
        frames = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        return {"pixel_values": frames, "masks": masks, "annotated_frames": torch.ones(3, dtype=torch.bool)}


def collate(clips):
    return {"pixel_values_videos": torch.stack([clip["pixel_values"] for clip in clips]).float() / 255}


def test_sheet_and_score(tiny_model, tmp_path):
    clips = Clips()
    with torch.no_grad():
        values = SampleWriter(clips, collate, num_clips=2)(tiny_model, 7, tmp_path)
    assert 0 <= values["sample_iou"] <= 1
    assert clips.asked == (FIRST_CLIP, FIRST_CLIP + 1)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-00000007.jpg"]
    with Image.open(tmp_path / "samples" / "step-00000007.jpg") as sheet:
        # Two clips, truth and prediction of three frames each.
        assert sheet.width >= 3 * 64 and sheet.height >= 4 * 64


def test_clips_whose_objects_come_later(tiny_model, tmp_path):
    clips = Clips()
    late = {**clips[0], "masks": clips[0]["masks"][1:]}
    assert follow(tiny_model, torch.zeros(1, 3, 3, 64, 64), late["masks"][:0, 0]).shape == (0, 3, 64, 64)
    with torch.no_grad():
        assert SampleWriter({FIRST_CLIP: late}, collate, num_clips=1)(tiny_model, 1, tmp_path) == {}
    assert (tmp_path / "samples" / "step-00000001.jpg").exists()


@torch.no_grad()
def test_following_is_what_the_inference_session_does(tiny_model):
    clip = Clips()[0]
    frames = collate([clip])["pixel_values_videos"]
    prompts = torch.stack([clip["masks"][0, 0], clip["masks"][1, 1]])
    followed = follow(tiny_model, frames, prompts)
    assert followed.shape == (2, 3, 64, 64) and followed.dtype == torch.bool

    processor = AusmProcessor(AusmImageProcessor())
    session = processor.init_video_session(seed=0)
    for object_id, prompt in enumerate(prompts, 1):
        processor.add_inputs_to_inference_session(
            session, obj_ids=object_id, input_masks=[prompt.numpy()], original_size=(64, 64)
        )
    for t in range(3):
        output = tiny_model(inference_session=session, frame=frames[0, t])
        (result,) = processor.post_process_instance_segmentation(output, target_sizes=[(64, 64)])
        ids = torch.tensor([[[1]], [[2]]])
        assert torch.equal(followed[:, t], result["segmentation"] == ids)
    assert followed.any()


def test_iou():
    a = torch.zeros(1, 3, 4, 4, dtype=torch.bool)
    b = a.clone()
    a[0, 0, :2], b[0, 0, 1:3] = True, True  # 4 of 12 pixels
    a[0, 1] = True  # found, but not there
    assert torch.allclose(iou(a, b), torch.tensor([1 / 3, 0.0]))  # empty in both: no score
