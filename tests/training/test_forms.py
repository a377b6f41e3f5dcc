"""The forms of training against each other, on the real network in its smallest size."""

import copy

import pytest
import torch

from ausm_hf.training.forms import CarriedForm, IterativeForm, RollOut, plan_clip, split_clip


@pytest.fixture
def network(tiny_model):
    network = copy.deepcopy(tiny_model).train()
    network.requires_grad_(True)
    return network


@pytest.fixture
def inputs():
    """Two clips of four frames; three objects, one of which is not there at first."""
    generator = torch.Generator().manual_seed(1)
    first = torch.zeros(2, 4, 64, 64, dtype=torch.bool)
    for t in range(4):
        first[0, t, 8 + 4 * t : 30 + 4 * t, 8:30] = True
        first[1, t, 36:60, 36 - 4 * t : 60 - 4 * t] = True
    second = torch.zeros(1, 4, 64, 64, dtype=torch.bool)
    second[0, 1:, 10:50, 20:40] = True
    return {
        "pixel_values_videos": torch.randn(2, 4, 3, 64, 64, generator=generator),
        "mask_labels": [first, second],
        "class_labels": [torch.tensor([0, 1]), torch.tensor([-100])],
        "class_sets": ["pets", None],
        "exhaustive": [True, False],
        "detect": [True, True],
        "annotated_frames": torch.ones(2, 4, dtype=torch.bool),
        "ignore_masks": torch.zeros(2, 4, 64, 64, dtype=torch.bool),
        "switch_frames": [torch.tensor([0, 3]), torch.tensor([2])],
        "id_slots": [torch.tensor([3, 0]), torch.tensor([1])],
    }


def test_pieces_with_carried_state_are_the_whole_clip(network, inputs):
    whole = network(**inputs)
    form, history, pieces = CarriedForm(network), None, []
    for piece in split_clip(network, inputs, 2):
        pieces.append(form(**piece, history=history))
        history = pieces[-1]["history"].detach()
    logits = torch.cat([piece["masks_queries_logits"] for piece in pieces], dim=1)
    torch.testing.assert_close(logits, whole.masks_queries_logits, atol=1e-4, rtol=1e-4)
    # What the state brings is not nothing: without it the second piece differs.
    forgetful = form(**list(split_clip(network, inputs, 2))[1], history=None)["masks_queries_logits"]
    assert (forgetful - whole.masks_queries_logits[:, 2:]).abs().max() > 1e-3


@pytest.mark.parametrize("pieces", [3, 8])
def test_clips_that_do_not_divide_into_pieces_are_refused(network, inputs, pieces):
    with pytest.raises(ValueError, match=f"^pixel_values_videos: got 4 frames, want a multiple of {pieces}"):
        list(split_clip(network, inputs, pieces))


def test_one_piece_has_the_loss_of_the_parallel_form(network, inputs):
    (piece,) = split_clip(network, inputs, 1)
    output = CarriedForm(network)(**piece, history=None)
    torch.testing.assert_close(output["loss"], network(**inputs).loss)


def test_iterative_form_on_true_masks_is_the_parallel_form(network, inputs):
    """Fed the truth instead of its own masks, it must give the same predictions, loss and gradients."""
    form = IterativeForm(network)
    instances, _ = plan_clip(network, inputs)
    steps = iter(range(4))
    form.own_masks = lambda prediction, tracked: instances.history_masks[:, :, next(steps)]
    output = form(**inputs)
    whole = network(**inputs)
    torch.testing.assert_close(output["masks_queries_logits"], whole.masks_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output["loss"], whole.loss, atol=1e-3, rtol=1e-4)


def test_iterative_form_feeds_back_what_it_predicts_with_gradients(network, inputs):
    form = IterativeForm(network)
    seen = []
    original = form.own_masks

    def watched(prediction, tracked):
        prediction["foreground"] = prediction["foreground"] + 100.0  # every object counts as seen
        masks = original(prediction, tracked)
        masks.retain_grad()
        seen.append(masks)
        return masks

    form.own_masks = watched
    form(**inputs)["masks_queries_logits"][:, 3, 0].sum().backward()
    assert seen[2].grad[0, 0].abs().sum() > 0  # the prompted object of the first clip
    assert seen[2].grad[1, 0].abs().sum() > 0  # handed over in frame 2, tracked in frame 3
    assert seen[2].grad[0, 1].abs().sum() == 0  # handed over in frame 3: its history is still the truth


def test_roll_out_is_the_stream_on_its_own_masks(network, inputs):
    """By hand with `step`: given in the first frame, then on with what it says itself, a pixel to one object."""
    network.foreground_head.bias.data += 0.3  # some are seen and some are not
    inputs["switch_frames"] = [torch.tensor([0, 0]), torch.tensor([2])]
    output = RollOut(network)(**inputs)
    slots, taken = inputs["id_slots"][0][None], torch.ones(1, 2, dtype=torch.bool)
    given = torch.nn.functional.avg_pool2d(inputs["mask_labels"][0][None, :, 0].float(), 4)
    history = network.init_history(1).replace_objects(slots, taken, (given >= 0.5).float())
    for t in range(4):
        with torch.no_grad():
            step = network.step(inputs["pixel_values_videos"][:1, t], history)
        logits, foreground = step.masks_queries_logits[0, :2], step.foreground_queries_logits[0, :2]
        torch.testing.assert_close(output["masks_queries_logits"][0, t, :2], logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output["foreground_queries_logits"][0, t, :2], foreground, atol=1e-4, rtol=1e-4)
        logits = logits.masked_fill((foreground <= 0)[:, None, None], -100.0)
        masks = torch.stack([(logits[0] > 0) & (logits[0] >= logits[1]), (logits[1] > 0) & (logits[1] >= logits[0])])
        masks = (given >= 0.5) if t == 0 else masks[None]  # of the frame in which it was marked its mask is the mark
        history = step.history.replace_objects(slots, taken, masks.float())
    assert not output["masks_queries_logits"].requires_grad


def test_roll_out_of_clips_without_objects(network, inputs):
    nothing = {"mask_labels": torch.zeros(0, 4, 64, 64, dtype=torch.bool)}
    nothing |= {name: torch.zeros(0, dtype=torch.long) for name in ("class_labels", "switch_frames", "id_slots")}
    output = RollOut(network)(**{**inputs, **{name: [value] * 2 for name, value in nothing.items()}})
    assert output["masks_queries_logits"].shape[:3] == (2, 4, network.config.num_detection_queries)
