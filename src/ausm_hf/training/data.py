"""From the data part of a recipe to clips and a collator."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ausm_hf.data.check import check_clips
from ausm_hf.data.collate import ClipCollator
from ausm_hf.data.mixture import ClipMixture, ClipSource, nano_mixture

from .recipe import Recipe

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
        wanted = data.sources or []
        loaders = [_check_source(f"data.sources[{i}]", source) for i, source in enumerate(wanted)]
        sources = [_build_source(loader, source) for loader, source in zip(loaders, wanted)]
        for i, source in enumerate(sources):
            check_clips(source.clips, name=f"data.sources[{i}]")
        mixture = ClipMixture(
            sources,
            [source.get("weight", 1.0) for source in wanted],
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
    return mixture, ClipCollator(processor.image_mean, processor.image_std)


def _check_source(key: str, source: dict[str, Any]) -> Callable:
    """The function that makes the source's data set, once all keys are known to fit. Reads nothing."""
    known = [f.name for f in fields(ClipSource) if f.name != "clips"]
    for given in source:
        if given not in ("dataset", "arguments", "weight", *known):
            wanted = ", ".join(["dataset", "arguments", "weight", *known])
            raise ValueError(f"{key}.{given}: unknown key; known are {wanted}")
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
    return loader


def _build_source(loader: Callable, source: dict[str, Any]) -> ClipSource:
    known = {f.name for f in fields(ClipSource)}
    return ClipSource(loader(**source.get("arguments", {})), **{k: v for k, v in source.items() if k in known})
