"""A weighted mixture of data sets as a deterministic stream of training clips."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from scipy import ndimage

from .augment import (
    MIN_SHARE,
    drop_small,
    jitter_colour,
    random_anchor,
    random_view,
    select_objects,
    view_matrix,
    warp_clip,
)
from .clips import Clip, resolve_row
from .davis import davis
from .labels import LABEL_SETS
from .sampling import cut_object, paste_object, paste_path, pseudo_motion, sample_clip
from .stills import stills

PASTED = (0.5, 0.3, 0.2)  # of the clips with pasted objects, how many have one, two and three
UNMARKED = 0.4  # of the clips with pasted objects, how many have one that nobody marks
MOST_DRAWS = 1000  # of a clip with an object in view: videos may be empty for the most part


@dataclass
class ClipSource:
    """One data set of a mixture, and what is done with it.

    Attributes:
        clips: Rows in the clip format.
        pseudo_video: Make clips by moving a camera over single frames.
        strides: Frame distances to draw from, for video.
        reverse: Part of the clips that are played backwards, for video.
        paste: Part of the clips that get one to three objects pasted.
        cut: Part of the clips in which objects are away for some frames, to the end or not: the clip is cut to
            another one, or what was pasted is gone while the clip goes on.
        donor: Its objects may be pasted into clips of the mixture.
        detect: False: masks are prompts only. True: objects are there to be found. None: as the rows say.
        exhaustive: Whether whatever has no mask is background. None: as the rows say.
        grouped: A mask may be of several objects, as in salient-object sets. Those in more than one piece are prompts
            only, lest the network learn to find several objects as one.
    """

    clips: Dataset
    pseudo_video: bool = False
    strides: tuple[int, ...] = (1,)
    reverse: float = 0.3
    paste: float = 0.0
    cut: float = 0.0
    donor: bool = False
    detect: bool | None = None
    exhaustive: bool | None = None
    grouped: bool = False


class ClipMixture(torch.utils.data.Dataset):
    """Item i is a pure function of `(seed, i)`: any worker, process or resumed run gets the same clip for it.

    Use it with `DataLoader(mixture, sampler=range(first, last), collate_fn=...)`, where `first` is the number of items
    already consumed. An item is a dict of `"pixel_values"` `(T, 3, H, W)` uint8, `"masks"` `(N, T, H, W)` bool,
    `"class_labels"` `(N,)` int64 (-100: unknown), `"label_set"`, `"exhaustive"`, `"annotated_frames"` `(T,)` bool,
    `"ignore_mask"` `(T, H, W)` bool, `"first_frame_given"`.

    Args:
        sources: The data sets.
        weights: One positive number each, how often it is drawn.
        num_frames: Frames per clip, T.
        size: Height and width of the clips, multiples of 32.
        seed: Seed of everything random.
        max_objects: Most objects per clip; clips with more keep a random choice, the rest is ignored.
        label_sets: Labels of each label set, in the order of their class numbers. Defaults to those of
            `ausm_hf.data.labels`.
        length: Number of items; there is no end to them, but samplers want one.

    Raises:
        ValueError: An argument is out of range, or a source is empty.
    """

    def __init__(
        self,
        sources: list[ClipSource],
        weights: list[float],
        num_frames: int,
        size: tuple[int, int],
        seed: int = 0,
        max_objects: int = 8,
        label_sets: dict[str, list[str]] | None = None,
        length: int = 2**31,
    ):
        if len(sources) != len(weights) or not sources:
            raise ValueError(f"got {len(sources)} sources and {len(weights)} weights, want one weight per source")
        if min(weights) <= 0:
            raise ValueError(f"weights must be positive, got {list(weights)}")
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if len(size) != 2 or any(s < 32 or s % 32 for s in size):
            raise ValueError(f"size must be a height and a width in multiples of 32, got {tuple(size)}")
        if max_objects < 4:
            raise ValueError(f"max_objects must be at least 4, got {max_objects}: up to three are pasted")
        for number, source in enumerate(sources):
            if len(source.clips) == 0:
                raise ValueError(f"source {number} has no clips")
            if source.cut and sum(len(other.clips) for other in sources) < 2:
                raise ValueError(f"source {number} has cuts; wanted is a second video to cut to")
        self.sources = list(sources)
        self.weights = np.array(weights, dtype=float) / sum(weights)
        self.num_frames, self.size, self.seed = num_frames, (size[0], size[1]), seed
        self.max_objects, self.length = max_objects, length
        label_sets = LABEL_SETS if label_sets is None else label_sets
        self.class_numbers = {name: {label: n for n, label in enumerate(ls)} for name, ls in label_sets.items()}
        donors = [n for n, source in enumerate(sources) if source.donor]
        self.donors = donors
        self.donor_weights = self.weights[donors] / self.weights[donors].sum() if donors else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((self.seed, index))
        for _ in range(MOST_DRAWS):
            clip = self._draw(self.sources[rng.choice(len(self.sources), p=self.weights)], rng)
            if len(clip.masks):
                return self._sample(clip)
        raise ValueError(
            f"{MOST_DRAWS} clips in a row had no object in view (item {index}); are the annotations empty, or all "
            f"objects smaller than {MIN_SHARE:.2%} of the picture?"
        )

    def _draw(self, source: ClipSource, rng: np.random.Generator) -> Clip:
        stride = int(rng.choice(source.strides))
        clip = self._load(source, stride, bool(rng.random() < source.reverse), rng)
        if source.detect is not None:
            clip.first_frame_given = not source.detect
        if source.exhaustive is not None:
            clip.exhaustive = source.exhaustive
        if source.grouped and any(pieces(mask) > 1 for mask in clip.masks.flatten(0, 1)):
            clip.first_frame_given = True

        cutouts = []
        if rng.random() < source.paste:
            cutouts = [self._cutout(clip, stride, rng) for _ in range(rng.choice((1, 2, 3), p=PASTED))]
            cutouts = [cutout for cutout in cutouts if cutout is not None]
        clip = select_objects(clip, self.max_objects - len(cutouts), rng)

        scene = clip = self._view(clip, source, random_anchor(clip, rng) if rng.random() < 0.9 else None, rng)
        for cutout in cutouts:
            clip = paste_object(clip, cutout, paste_path(clip, cutout, rng), behind=bool(rng.random() < 0.5))
        if source.cut and self.num_frames > 1 and rng.random() < source.cut:
            if not cutouts or rng.random() < 0.5:
                scene = self._another(clip.video_id, stride, rng)
            clip = cut_to(clip, scene, rng)
        clip.frames = jitter_colour(clip.frames, rng)
        clip = drop_small(clip)
        if cutouts and len(clip.masks) > 1 and rng.random() < UNMARKED:
            clip = leave_one_unmarked(clip, rng)
        return clip

    def _view(
        self, clip: Clip, source: ClipSource, anchor: tuple[float, float] | None, rng: np.random.Generator
    ) -> Clip:
        """What a camera sees of a clip, `anchor` in view: a moving one of a single frame."""
        native = clip.frames.shape[-2], clip.frames.shape[-1]
        view = random_view(native, self.size, rng, anchor)
        if source.pseudo_video:
            return warp_clip(clip, pseudo_motion(view, native, self.size, self.num_frames, rng), self.size)
        return warp_clip(clip, np.repeat(view_matrix(self.size, **view)[None], self.num_frames, axis=0), self.size)

    def _load(self, source: ClipSource, stride: int, reverse: bool, rng: np.random.Generator) -> Clip:
        """Frames of a random video; for pseudo-video a single one."""
        row = resolve_row(source.clips[int(rng.integers(len(source.clips)))])
        if source.pseudo_video:
            return sample_clip(row, 1, 1, False, rng)
        return sample_clip(row, self.num_frames, stride, reverse, rng)

    def _cutout(self, clip: Clip, stride: int, rng: np.random.Generator):
        """An object from a donor; one time in five a copy of one of the clip's own, as a distractor."""
        if rng.random() < 0.2 or not self.donors:
            return cut_object(clip, rng)
        for _ in range(4):
            source = self.sources[rng.choice(self.donors, p=self.donor_weights)]
            donor = self._load(source, stride, bool(rng.random() < 0.5), rng)
            cutout = cut_object(donor, rng)
            if cutout is not None:
                if donor.label_set != clip.label_set:
                    cutout.label = None
                return cutout
        return None

    def _another(self, video_id: str, stride: int, rng: np.random.Generator) -> Clip:
        """A clip of another video than `video_id`, of which nobody says what is in it."""
        for _ in range(MOST_DRAWS):
            source = self.sources[rng.choice(len(self.sources), p=self.weights)]
            clip = self._load(source, stride, bool(rng.random() < source.reverse), rng)
            if clip.video_id != video_id:
                return self._view(replace(clip, masks=clip.masks[:0], labels=[], exhaustive=False), source, None, rng)
        raise ValueError(f"{MOST_DRAWS} videos in a row were {video_id}; a cut needs a second one")

    def _class_number(self, label_set: str, label: str | None) -> int:
        if label is None:
            return -100
        number = self.class_numbers.get(label_set, {}).get(label)
        if number is None:
            raise ValueError(f"label {label!r} isn't in label set {label_set!r}")
        return number

    def _sample(self, clip: Clip) -> dict:
        class_labels = [-100] * len(clip.labels)
        if clip.label_set is not None:
            class_labels = [self._class_number(clip.label_set, label) for label in clip.labels]
        return {
            "pixel_values": clip.frames,
            "masks": clip.masks,
            "class_labels": torch.tensor(class_labels, dtype=torch.int64),
            "label_set": clip.label_set,
            "exhaustive": clip.exhaustive,
            "annotated_frames": clip.annotated,
            "ignore_mask": clip.ignore,
            "first_frame_given": clip.first_frame_given,
        }


def cut_to(clip: Clip, other: Clip, rng: np.random.Generator) -> Clip:
    """Show `other` for some frames, half of the time to the end. Its objects are the first of the clip's, or none."""
    steps = len(clip.frames)
    first = int(rng.integers(1, steps))
    last = steps if rng.random() < 0.5 else int(rng.integers(first, steps)) + 1
    away = slice(first, last)
    frames, masks, ignore = clip.frames.clone(), clip.masks.clone(), clip.ignore.clone()
    frames[away], ignore[away] = other.frames[away], other.ignore[away]
    masks[:, away] = False
    masks[: len(other.masks), away] = other.masks[:, away]
    return replace(clip, frames=frames, masks=masks, ignore=ignore, exhaustive=clip.exhaustive and other.exhaustive)


def pieces(mask: torch.Tensor) -> int:
    """In how many pieces a mask (H, W) is, without those of less than a twentieth of it."""
    labelled, number = ndimage.label(mask.numpy())
    areas = np.bincount(labelled.ravel(), minlength=number + 1)[1:]
    return int((areas >= 0.05 * areas.sum()).sum())


def leave_one_unmarked(clip: Clip, rng: np.random.Generator) -> Clip:
    """Take away the mask of one object: it is in the picture, and what follows the others must keep off it."""
    unmarked = int(rng.integers(len(clip.masks)))
    kept = [n for n in range(len(clip.masks)) if n != unmarked]
    return replace(
        clip,
        masks=clip.masks[kept],
        labels=[clip.labels[n] for n in kept],
        exhaustive=False,
        first_frame_given=True,
    )


def nano_mixture(root: str, num_frames: int, size: tuple[int, int], seed: int = 0) -> ClipMixture:
    """What ausm-nano is trained on: DAVIS 2016 train clips and, for half of it, pseudo-video from stills.

    Every tenth photograph is left out, to measure on (`stills(..., split="held_out")`). What has a mask is there to be
    found in all sets but `street`, where one mask may be of several things; that whatever has none is background is
    only said of the exhaustive sets.

    Args:
        root: What `ausm_hf.data.prepare` wrote: `davis/` and `stills/`.
    """
    video = ClipSource(
        davis(os.path.join(root, "davis"), 2016, "train"),
        strides=(1, 2, 3, 5, 8),
        reverse=0.3,
        paste=0.8,
        donor=True,
        exhaustive=False,
    )
    # Per set: its weight (DAVIS has 0.6), and whether its masks are exact enough to be cut out and pasted elsewhere.
    parts = {
        "coco_mini": (0.18, True),
        "coco_mval": (0.16, True),
        "cats": (0.08, True),
        "fashion": (0.03, True),
        "balloon": (0.03, True),
        "ecssd": (0.06, True),
        "duts": (0.04, True),
        "sod": (0.02, False),
        "pennfudan": (0.03, False),
        "people": (0.02, False),
        "street": (0.02, False),
    }
    photographs = [
        ClipSource(
            stills(os.path.join(root, "stills", name), split="train"),
            pseudo_video=True,
            paste=0.4,
            donor=donor,
            detect=name != "street",
            grouped=name in ("ecssd", "duts", "sod"),
        )
        for name, (_, donor) in parts.items()
    ]
    weights = [0.6, *(weight for weight, _ in parts.values())]
    return ClipMixture([video, *photographs], weights, num_frames, size, seed, max_objects=16)
