"""A training recipe: one YAML file, read into plain dataclasses and checked before anything is loaded.

One recipe is one stage. A later stage starts from the result of an earlier one through `model.path`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ausm_hf.data.labels import LABEL_SETS
from ausm_hf.model.configuration_ausm import PRESETS


@dataclass
class ModelRecipe:
    """Which network, and where its weights start. Exactly one of `preset` and `path`.

    Args:
        preset: "nano", "tiny" or "base" (`AusmConfig.from_preset`).
        path: folder or hub name of an AUSM checkpoint to start from, e.g. the result of the stage before.
        reinitialize: beginnings of the names of parameters that are not taken from `path` but start anew.
        overrides: attributes of `AusmConfig` that replace those of the preset or the checkpoint.
        label_sets: exactly the label sets to have a class head for: name -> labels, or null for a name that
            `ausm_hf.data.labels` knows. The first one is the default. None leaves those of the preset or checkpoint.
        imagenet_backbone: start the backbone of the preset "nano" from ImageNet weights.
    """

    preset: str | None = None
    path: str | None = None
    reinitialize: list[str] = field(default_factory=list)
    overrides: dict[str, Any] = field(default_factory=dict)
    label_sets: dict[str, Any] | None = None
    imagenet_backbone: bool = False


@dataclass
class DataRecipe:
    """What the clips are. Exactly one of `mixture` and `sources`.

    Args:
        mixture: a mixture known by name ("nano"), built from the folder `root`.
        root: folder of that mixture.
        sources: one dictionary each, see `ausm_hf.training.data.build_data`.
        num_frames: T, frames per clip.
        size: (height, width) of a clip, multiples of 32. At inference frames are looked at in the size that the
            checkpoint of `model.path` says (its processor), and only after a preset in one like this.
        batch_size: clips per process and forward pass.
        workers: processes that prepare clips; 0 prepares them in the training process.
        max_objects: most objects in a clip of `sources`, at least 4 (up to three are pasted); more are ignored.
    """

    mixture: str | None = None
    root: str | None = None
    sources: list[dict[str, Any]] | None = None
    num_frames: int = 4
    size: list[int] = field(default_factory=lambda: [192, 320])
    batch_size: int = 1
    workers: int = 0
    max_objects: int = 8


@dataclass
class OptimRecipe:
    """AdamW, its learning rate over the steps, and when to stop.

    Args:
        lr: highest learning rate.
        backbone_lr_factor: the backbone learns at `lr` times this.
        weight_decay: decay of matrices and kernels. Norms, biases, embeddings and parameters flagged
            `_no_weight_decay` have none.
        betas: of AdamW.
        clip_grad_norm: largest gradient norm; None does not clip.
        warmup_steps: the learning rate rises linearly over these steps.
        schedule: after the warm-up: "linear" or "cosine" to 0 at `max_steps`, "step" (times 0.1 at every milestone) or
            "constant".
        milestones: steps at which the schedule "step" decays.
        max_steps: optimizer steps of the whole run.
    """

    lr: float = 1e-4
    backbone_lr_factor: float = 0.1
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_grad_norm: float | None = 1.0
    warmup_steps: int = 0
    schedule: str = "linear"
    milestones: list[int] = field(default_factory=list)
    max_steps: int = 1000


@dataclass
class Recipe:
    """All that `train` needs to know.

    Args:
        output_dir: receives checkpoints, the log and samples. If it holds a checkpoint, training goes on from it.
        model, data, optim: see there.
        mode: "parallel" trains all frames at once from ground-truth history (the paper's form), "iterative" frame by
            frame, feeding the network its own predictions (the baseline the paper compares with).
        switch_frame_prompt_probability: share of the objects visible in the first frame that are given as prompts
            (s_i = 0); the others are detected first and tracked after a random frame.
        history_corruption: probability that a mask in the history is dilated, eroded, shifted, dropped or swapped, and
            that an object's masks have a hole or a growth from some frame on.
        prompt_signals: probability that an object of the first frame is given as a box, clicks, a scribble or a wrong
            mask with clicks that correct it, not as a mask.
        scheduled_sampling: probability that a mask in the history is the network's own prediction.
        scheduled_sampling_form: how these predictions are made. "parallel": all frames at once from the true history,
            so they hold the errors of a single step. "iterative": frame by frame from the network's own masks, so
            errors add up as at inference.
        carried_state: clips are cut into this many pieces of `data.num_frames`; the state passes, detached, from each
            piece to the next, so the network trains on a history longer than T. 1 is off.
        ema_decay: also keep an exponential moving average of the weights; None is off.
        freeze_backbone: train everything but the backbone.
        gradient_accumulation_steps: forward passes per optimizer step.
        mixed_precision: "no", "bf16" or "fp16".
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        log_every, save_every, eval_every: in optimizer steps; `eval_every` 0 never evaluates (see `train`).
        keep_checkpoints: the newest n are kept.
        tracker: an Accelerate tracker, e.g. "tensorboard"; None writes `log.jsonl` only (always written).
        seed: of everything random. Clip number i is a function of (`seed`, i) alone, so a run that starts from the
            result of another on the same data wants another seed, or it sees the same clips again.
    """

    output_dir: str
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    mode: str = "parallel"
    switch_frame_prompt_probability: float = 0.5
    history_corruption: float = 0.0
    prompt_signals: float = 0.0
    scheduled_sampling: float = 0.0
    scheduled_sampling_form: str = "parallel"
    carried_state: int = 1
    ema_decay: float | None = None
    freeze_backbone: bool = False
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    eval_every: int = 0
    tracker: str | None = None
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError naming the first key whose value cannot work. Loads nothing."""
        _check_choice("mode", self.mode, ("parallel", "iterative"))
        _check_choice("scheduled_sampling_form", self.scheduled_sampling_form, ("parallel", "iterative"))
        _check_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        _check_choice("optim.schedule", self.optim.schedule, ("linear", "cosine", "step", "constant"))
        for key in ("switch_frame_prompt_probability", "history_corruption", "prompt_signals", "scheduled_sampling"):
            check_range(key, getattr(self, key), 0, 1)
        for key in ("carried_state", "gradient_accumulation_steps", "log_every", "save_every", "keep_checkpoints"):
            check_range(key, getattr(self, key), 1)
        check_range("eval_every", self.eval_every, 0)
        check_range("seed", self.seed, 0, 2**32 - 1)
        if self.ema_decay is not None:
            check_range("ema_decay", self.ema_decay, 0, 1)
        for key in ("batch_size", "num_frames"):
            check_range(f"data.{key}", getattr(self.data, key), 1)
        check_range("data.max_objects", self.data.max_objects, 4)
        check_range("data.workers", self.data.workers, 0)
        check_range("optim.max_steps", self.optim.max_steps, 1)
        check_range("optim.warmup_steps", self.optim.warmup_steps, 0)
        for key in ("lr", "backbone_lr_factor", "weight_decay"):
            check_range(f"optim.{key}", getattr(self.optim, key), 0)
        if self.optim.clip_grad_norm is not None and self.optim.clip_grad_norm <= 0:
            raise ValueError(f"optim.clip_grad_norm: got {self.optim.clip_grad_norm}, want a positive number or null")
        if len(self.optim.betas) != 2 or not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ValueError(f"optim.betas: got {self.optim.betas}, want two numbers from 0 to below 1")
        if self.optim.schedule == "step" and not self.optim.milestones:
            raise ValueError("optim.milestones: empty, but optim.schedule 'step' decays at milestones")
        if self.optim.schedule != "step" and self.optim.milestones:
            raise ValueError(f"optim.milestones: given, but optim.schedule {self.optim.schedule!r} has none")
        if len(self.data.size) != 2 or any(side < 32 or side % 32 for side in self.data.size):
            raise ValueError(f"data.size: got {self.data.size}, want [height, width], both multiples of 32")
        if self.mode == "iterative" and (self.history_corruption or self.scheduled_sampling or self.carried_state > 1):
            raise ValueError(
                "mode: 'iterative' feeds the network its own predictions; history_corruption, scheduled_sampling and "
                "carried_state belong to 'parallel'"
            )
        self._validate_model()
        self._validate_data()

    def _validate_model(self) -> None:
        model = self.model
        if model.preset is not None and model.path is not None:
            raise ValueError("model: want one of model.preset and model.path, got both")
        if model.preset is not None:
            _check_choice("model.preset", model.preset, tuple(PRESETS))
        if model.imagenet_backbone and model.preset != "nano":
            raise ValueError("model.imagenet_backbone: there are ImageNet weights for the preset 'nano' alone")
        if model.reinitialize and model.path is None:
            raise ValueError("model.reinitialize: given, but without model.path all parameters start anew")
        # "user/name" may be a name on the hub; anything else has to be a folder here.
        path = model.path
        if path is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).is_dir():
            raise ValueError(f"model.path: there is no folder {path}")
        if "label_sets" in model.overrides or "default_label_set" in model.overrides:
            raise ValueError("model.overrides.label_sets: say it in model.label_sets; the first one is the default")
        if model.label_sets is not None and not model.label_sets:
            raise ValueError("model.label_sets: empty, want at least one label set")
        for name, labels in (model.label_sets or {}).items():
            if not str(name).isidentifier():
                raise ValueError(
                    f"model.label_sets.{name}: want a name of letters, digits and _ that begins with no digit"
                )
            if labels is None and name not in LABEL_SETS:
                raise ValueError(
                    f"model.label_sets.{name}: has no labels, and only {', '.join(LABEL_SETS)} are known by name"
                )
            if labels is not None and (
                not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels)
            ):
                raise ValueError(f"model.label_sets.{name}: got {labels!r}, want a list of labels")

    def _validate_data(self) -> None:
        data = self.data
        if data.mixture is not None and data.sources is not None:
            raise ValueError("data: want one of data.mixture and data.sources, got both")
        if data.mixture is not None and data.root is None:
            raise ValueError(f"data.root: missing; the mixture {data.mixture!r} is built from that folder")
        if data.root is not None and data.sources is not None:
            raise ValueError("data.root: given beside data.sources, whose folders are in their arguments")
        if data.root is not None and not Path(data.root).is_dir():
            raise ValueError(f"data.root: there is no folder {data.root}")
        if data.sources is not None and not data.sources:
            raise ValueError("data.sources: empty, want at least one source")
        for i, source in enumerate(data.sources or []):
            arguments = source.get("arguments", {})
            if not isinstance(arguments, dict):
                raise ValueError(f"data.sources[{i}].arguments: got {arguments!r}, want keys and values")
            for key, value in arguments.items():
                # Whatever has a slash is a path: data sets take no other such strings.
                if isinstance(value, str) and "/" in value and not Path(value).exists():
                    raise ValueError(f"data.sources[{i}].arguments.{key}: there is no file or folder {value}")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe from a YAML file.

    Args:
        path: the YAML file.
        overrides: "key=value" strings with dotted keys, e.g. `["optim.lr=3e-4", "data.size=[96, 160]"]`; values are
            YAML. They replace what the file says.

    Returns:
        Recipe: checked.

    Raises:
        ValueError: unknown key, wrong type, missing path, value out of range; names the key.
        FileNotFoundError: there is no such file.
    """
    values = _from_yaml(Path(path).read_text(encoding="utf-8-sig"), f"recipe {path}")
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path}: want keys and values, got {type(values).__name__}")
    for override in overrides or []:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: want key=value")
        _set_dotted(values, key, _from_yaml(text, f"override {override!r}"))
    return recipe_from_dict(values)


def _from_yaml(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is no YAML: {error}") from error


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe that nested dictionaries describe, checked. Raises ValueError naming the key."""
    if isinstance(values, dict) and values.get("mixed_precision") is False:
        values = {**values, "mixed_precision": "no"}  # YAML reads an unquoted no as false
    recipe = _build(Recipe, values, "")
    recipe.validate()
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dictionaries that `recipe_from_dict` turns back into the same recipe."""
    return dataclasses.asdict(recipe)


def _set_dotted(values: Any, dotted_key: str, value: Any) -> None:
    """Sets `values["a"]["b"]` for "a.b". A number is a place in a list, as in "data.sources.0.weight"."""
    *parents, last = dotted_key.split(".")
    for parent in parents:
        if isinstance(values, dict) and values.get(parent) is None:
            values[parent] = {}
        values = values[_key_in(values, parent, dotted_key)]
    values[_key_in(values, last, dotted_key)] = value


def _key_in(values: Any, key: str, dotted_key: str) -> str | int:
    if isinstance(values, list):
        if not key.isdecimal() or int(key) >= len(values):
            raise ValueError(f"{dotted_key}: {key} is no place in a list of {len(values)}")
        return int(key)
    if not isinstance(values, dict):
        raise ValueError(f"{dotted_key}: there is a value where {key} wants keys")
    return key


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')}: got {values!r}, want keys and values")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ValueError(f"{prefix}{key}: unknown key; known are {', '.join(known)}")
    for f in dataclasses.fields(cls):
        no_default = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if no_default and f.name not in values:
            raise ValueError(f"{prefix}{f.name}: missing")
    return cls(**{key: convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()})


def convert(value: Any, wanted: Any, key: str) -> Any:
    """`value` as the annotated type `wanted`, or ValueError. Nothing is guessed but "1e-4", a string to YAML."""
    origin = typing.get_origin(wanted)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        wanted = next(t for t in typing.get_args(wanted) if t is not type(None))
        return convert(value, wanted, key)
    if wanted is Any:
        return value
    if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
        return _build(wanted, value, key + ".")
    if origin is list and isinstance(value, (list, tuple)):
        item_type = typing.get_args(wanted)[0]
        return [convert(item, item_type, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return value
    if wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    elif origin is None and isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    name = "a finite number" if wanted is float else getattr(wanted, "__name__", "") if origin is None else str(wanted)
    raise ValueError(f"{key}: got {value!r} ({type(value).__name__}), want {name}")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}: got {value!r}, want one of {', '.join(choices)}")


def check_range(key: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError naming the key, if the value isn't in the range."""
    if not low <= value <= high:
        wanted = f"at least {low}" if high == float("inf") else f"from {low} to {high}"
        raise ValueError(f"{key}: got {value}, want {wanted}")
