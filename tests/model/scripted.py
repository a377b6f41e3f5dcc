"""A network that answers from a script."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

from ausm_hf.model.pixels_ausm import AusmFrameFeatures
from ausm_hf.model.prompts_ausm import ObjectPrompt
from ausm_hf.model.session_ausm import AusmInferenceSession
from ausm_hf.model.streaming_ausm import step_session

SIZE = (4, 6)  # of mask logits; frames are four times as large
FRAME = torch.zeros(3, 16, 24)
LABELS = ["cat", "dog"]


@dataclass
class Seen:
    """What the scripted network says of one object: where it is, how surely it is one, and which."""

    box: tuple[int, int, int, int]  # top, bottom, left, right in mask logits
    foreground: float = 0.9
    dog: float = 0.5
    bird: float = 0.0  # in a label set that has it
    logit: float = 5.0
    no_object: float = 0.0  # odds of "no object" in the class logits
    look: float = 0.0  # direction in which what it looks like lies, as an angle

    @property
    def mask(self) -> torch.Tensor:
        mask = torch.zeros(SIZE, dtype=torch.bool)
        top, bottom, left, right = self.box
        mask[top:bottom, left:right] = True
        return mask


NOTHING = Seen((0, 0, 0, 0), foreground=0.01)
A, B, C = Seen((0, 2, 0, 2)), Seen((2, 4, 0, 2)), Seen((0, 2, 4, 6))


def encode_frames(pixel_values: torch.Tensor) -> AusmFrameFeatures:
    """Features in which there is nothing to see."""
    stride_4 = pixel_values[:, :1, ::4, ::4]
    return AusmFrameFeatures((stride_4,), stride_4)


@dataclass
class FakeHistory:
    slots: torch.Tensor
    taken: torch.Tensor
    masks: torch.Tensor
    steps: int = 0
    states: None = None
    forgotten: tuple[int, ...] = ()  # columns whose looks were

    def replace_objects(self, slots, taken, masks):
        assert slots.shape == taken.shape == masks.shape[:2]
        assert slots.dtype == torch.int64 and taken.dtype == torch.bool and masks.dtype == torch.float32
        return replace(self, slots=slots, taken=taken, masks=masks)

    def to(self, device):
        return self

    def is_of(self, config):
        return True

    def forget_appearance(self, columns):
        return replace(self, forgotten=(*self.forgotten, *columns))

    def split(self, numbers):
        assert numbers == [self.slots.shape[1]]  # the script is one stream's
        return [self]


class ScriptedModel:
    """
    Answers frame `t` by `script[t] = (tracked, detected)`. `tracked` is a dict from object id to [`Seen`] (the order
    of the history is asked of the session), `detected` a list. Keeps the histories that it was given.
    """

    device, dtype = torch.device("cpu"), torch.float32
    encode_frames = staticmethod(encode_frames)

    def __init__(
        self, script, num_id_vectors=4, num_detection_queries=4, max_age=60, radius=0, likeness_scale=0, offset=0.9
    ):
        self.script = script
        self.num_detection_queries = num_detection_queries
        self.config = SimpleNamespace(
            num_id_vectors=num_id_vectors,
            foreground_threshold=0.5,
            duplicate_overlap=0.5,
            max_age=max_age,
            mask_propagation_radius=radius,
            likeness_scale=likeness_scale,
            likeness_offset=offset,
            label_sets={"pets": LABELS, "ships": ["tug", "yacht"], "birds": [*LABELS, "bird"], "pet": ["pet"]},
            default_label_set="pets",
        )
        self.histories = []
        self.session = None

    def init_history(self, batch_size):
        return FakeHistory(
            torch.zeros(batch_size, 0, dtype=torch.int64),
            torch.zeros(batch_size, 0, dtype=torch.bool),
            torch.zeros(batch_size, 0, 1, 1),
        )

    def odds(self, seen):
        number = len(self.config.label_sets[self.session.label_set or self.config.default_label_set])
        return {1: [1.0], 2: [1 - seen.dog, seen.dog], 3: [1 - seen.dog - seen.bird, seen.dog, seen.bird]}[number]

    def describe_objects(self, history, masks):
        tracked, _ = self.script[history.steps - 1]
        assert masks.shape == (1, masks.shape[1], *SIZE)
        looks = []
        for mask in masks[0] > 0:
            angles = [seen.look for seen in tracked.values() if seen.mask.equal(mask)]
            look = torch.tensor(angles[0] if angles else 0.0)
            looks.append(torch.stack([look.cos(), look.sin()]) * mask.any())
        return torch.stack(looks)[None]

    def step(self, pixel_values, history, label_set=None):
        self.histories.append(history)
        assert label_set == self.session.label_set
        tracked, detected = self.script[history.steps]
        # In a first frame the session's objects are only known by their number: prompts in the order given.
        ids = [followed.object_id for followed in self.session.objects] or list(tracked)
        assert len(ids) == history.slots.shape[1]
        rows = [tracked.get(object_id, NOTHING) for object_id in ids] + detected
        rows += [NOTHING] * (len(ids) + self.num_detection_queries - len(rows))
        return SimpleNamespace(
            masks_queries_logits=torch.stack([torch.where(x.mask, x.logit, -5.0) for x in rows])[None],
            foreground_queries_logits=torch.tensor([[x.foreground for x in rows]]).logit(),
            class_queries_logits=torch.tensor([[[*self.odds(x), x.no_object] for x in rows]]).log(),
            history=replace(history, steps=history.steps + 1),
        )


def play(script, session=None, prompts=None, **model_kwargs):
    """Runs the script. `prompts`: frame index -> object id -> mask of the frame's size."""
    model = ScriptedModel(script, **model_kwargs)
    session = session or AusmInferenceSession(seed=0)
    for frame_idx, masks in (prompts or {}).items():
        session.add_prompts(frame_idx, list(masks), [ObjectPrompt(mask=mask) for mask in masks.values()], (16, 24))
    model.session = session
    return model, session, [step_session(model, session, FRAME) for _ in script]


def frame_mask(seen: Seen) -> torch.Tensor:
    """The mask of a scripted object at the frame's size."""
    return seen.mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
