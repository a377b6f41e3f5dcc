"""From the data part of a recipe to clips and a collator."""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from ausm_hf.data.check import check_clips
from ausm_hf.data.collate import ClipCollator
from ausm_hf.data.mixture import ClipMixture, ClipSource, nano_mixture

from .recipe import Recipe, check_range, convert

if TYPE_CHECKING:
    from ausm_hf.model.configuration_ausm import AusmConfig
    from ausm_hf.model.image_processing_ausm import AusmImageProcessor


def build_data(recipe: Recipe, config: AusmConfig, processor: AusmImageProcessor) -> tuple[ClipMixture, ClipCollator]:
    """The clips of a recipe, and the collator that makes normalised batches of them.

    Args:
        recipe: its `data`, `seed` and `carried_state` count. A source is
            `{"dataset": NAME, "arguments": {...}, "weight": 1.0, ...}`: NAME is a function of `ausm_hf.data.NAME` that
            gives `datasets.Dataset` in the clip format, "arguments" are its own, "weight" is how often its clips are
            drawn, and the rest are fields of `ClipSource`.
        config: says which label sets have a class head, and how many objects a clip may have.
        processor: says how frames are normalised.

    Raises:
        ValueError: names the key of the recipe that can't work.
    """
    data = recipe.data
    num_frames = recipe.carried_state * data.num_frames
    height, width = data.size
    if data.mixture == "nano":
        root = str(data.root)
        for folder in ("davis", "stills"):
            if not (Path(root) / folder).is_dir():
                raise ValueError(f"data.root: there is no folder {folder} in {root}; see ausm_hf.data.prepare")
        mixture = nano_mixture(root, num_frames, (height, width), recipe.seed)
    elif data.mixture is not None:
        raise ValueError(f"data.mixture: got {data.mixture!r}, want nano")
    else:
        wanted = [_check_source(f"data.sources[{i}]", source) for i, source in enumerate(data.sources or [])]
        weights = [fields.pop("weight", 1.0) for _, fields in wanted]
        sources = [ClipSource(load(), **fields) for load, fields in wanted]
        for i, source in enumerate(sources):
            check_clips(source.clips, name=f"data.sources[{i}]")
        mixture = ClipMixture(
            sources,
            weights,
            num_frames,
            (height, width),
            recipe.seed,
            max_objects=data.max_objects,
            label_sets=config.label_sets,
        )
    if mixture.max_objects > config.num_id_vectors:
        raise ValueError(
            f"data.max_objects: {mixture.max_objects} objects in a clip, but the network has only "
            f"{config.num_id_vectors} ID vectors (model.overrides.num_id_vectors)"
        )
    for i, source in enumerate(mixture.sources):
        for name in source.clips.unique("label_set"):
            if name is not None and name not in config.label_sets:
                raise ValueError(
                    f"data.sources[{i}]: its label set {name!r} has no class head; add it to model.label_sets, which "
                    f"has {', '.join(config.label_sets)}"
                )
            if name is not None and list(mixture.class_numbers[name]) != config.label_sets[name]:
                raise ValueError(f"model.label_sets.{name}: its labels are not those of the data")
        for name, labels in _labels(source.clips).items():
            strange = sorted(labels - set(config.label_sets[name]))
            if strange:
                raise ValueError(
                    f"data.sources[{i}]: model.label_sets.{name} lacks {len(strange)} of its labels: "
                    f"{', '.join(map(repr, strange[:5]))}"
                )
    return mixture, ClipCollator(processor.image_mean, processor.image_std)


def _labels(clips: Dataset) -> dict[str, set[str]]:
    """The labels of each label set that objects have. Reads two columns and no object: there may be a million."""
    rows = clips.select_columns(["label_set", "objects"]).with_format("arrow")[:]
    labels = defaultdict(set)
    for batch in rows.to_batches():
        of_row = batch.column("label_set").take(pc.list_parent_indices(batch.column("objects")))
        of_object = pc.struct_field(pc.list_flatten(batch.column("objects")), "label")
        pairs = pa.table([of_row, of_object], ["label_set", "label"]).drop_null()
        for pair in pairs.group_by(["label_set", "label"]).aggregate([]).to_pylist():
            labels[pair["label_set"]].add(pair["label"])
    return labels


def _check_source(key: str, source: dict[str, Any]) -> tuple[Callable[[], Dataset], dict[str, Any]]:
    """What makes the source's data set, and the other fields of `ClipSource` and the weight, if all keys fit.

    Reads nothing.
    """
    hints = typing.get_type_hints(ClipSource) | {"strides": list[int], "weight": float}
    del hints["clips"]
    values = {}
    for given, value in source.items():
        if given in ("dataset", "arguments"):
            continue
        if given not in hints:
            raise ValueError(f"{key}.{given}: unknown key; known are {', '.join(['dataset', 'arguments', *hints])}")
        values[given] = convert(value, hints[given], f"{key}.{given}")
    for part in ("reverse", "paste", "cut"):
        check_range(f"{key}.{part}", values.get(part, 0), 0, 1)
    if not values.get("weight", 1) > 0:
        raise ValueError(f"{key}.weight: got {values['weight']}, want a positive number")
    if min(values.get("strides", [1]), default=0) < 1:
        raise ValueError(f"{key}.strides: got {values['strides']}, want frame distances of at least 1")
    name = source.get("dataset")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{key}.dataset: got {name!r}, want the name of a data set")
    try:
        loader = getattr(importlib.import_module(f"ausm_hf.data.{name}"), name)
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"{key}.dataset: there is no data set {name!r} in ausm_hf.data") from None
    arguments = source.get("arguments", {})
    parameters = inspect.signature(loader).parameters
    for argument in arguments:
        if argument not in parameters:
            raise ValueError(f"{key}.arguments.{argument}: unknown; {name} takes {', '.join(parameters)}")
    for argument, parameter in parameters.items():
        if parameter.default is parameter.empty and argument not in arguments:
            raise ValueError(f"{key}.arguments.{argument}: missing; {name} needs it")
    return functools.partial(loader, **arguments), values
