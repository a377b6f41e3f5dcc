"""Checkpoints of a run: written whole or not at all, and read back without unpickling anything.

OUTPUT_DIR/step-00001000/
  config.json, model.safetensors     the network and its processor, as `from_pretrained` reads them
  ema/config.json, ...               its moving average, where there is one
  optimizer.safetensors, .json       AdamW's moments by parameter name; groups and gradient scaler
  rng-00000.safetensors, .json       torch's (and CUDA's); python's and numpy's; one pair per process
  state.json                         the step. Data and learning rate are functions of it.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ausm_hf.files import WholeFolder

STEP_FOLDER = re.compile(r"step-(\d{8})")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first. A folder gets its name only when all that is in it is on the disk."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    return sorted(p for p in output_dir.iterdir() if STEP_FOLDER.fullmatch(p.name) and p.is_dir())


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    model: PreTrainedModel,
    optimizer_state: tuple[dict[str, torch.Tensor], dict[str, Any]],
    rng_states: list[dict[str, Any]],
    ema: PreTrainedModel | None = None,
    processor: Any = None,
    scaler: torch.amp.GradScaler | None = None,
    keep: int = 2,
) -> Path:
    """Writes checkpoint `step`, then removes all but the newest `keep`. Call it in one process.

    Args:
        model: the whole network, see `gather_network`.
        optimizer_state: see `gather_optimizer_state`.
        rng_states: `rng_state()` of every process, in order of rank.
        processor: has `save_pretrained`; saved beside the weights.
    """
    output_dir = Path(output_dir)
    target = output_dir / f"step-{step:08d}"
    tensors, values = optimizer_state
    values = {**values, "scaler": scaler.state_dict() if scaler is not None else None}
    with FolderOnDisk(target) as checkpoint, no_progress_bars():
        for part, folder in ((model, checkpoint.partial), (ema, checkpoint.partial / "ema")):
            if part is not None:
                part.save_pretrained(folder)
                if processor is not None:
                    processor.save_pretrained(folder)
        save_file(tensors, checkpoint.partial / "optimizer.safetensors")
        _write_json(checkpoint.partial / "optimizer.json", values)
        for rank, state in enumerate(rng_states):
            save_file(state["tensors"], checkpoint.partial / f"rng-{rank:05d}.safetensors")
            _write_json(checkpoint.partial / f"rng-{rank:05d}.json", state["values"])
        _write_json(checkpoint.partial / "state.json", {"step": step, "processes": len(rng_states)})
    for old in checkpoints(output_dir)[:-keep]:
        # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a good name.
        doomed = output_dir / f".{old.name}.old-{uuid.uuid4().hex[:8]}"
        os.replace(old, doomed)
        shutil.rmtree(doomed)
    return target


def load_training_state(
    checkpoint: str | Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    ema: PreTrainedModel | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Puts weights, moving average and optimizer back in place.

    Returns:
        The number of optimizer steps done.

    Raises:
        ValueError: the checkpoint doesn't fit the model or the recipe.
    """
    checkpoint = Path(checkpoint)
    _load_weights(model, checkpoint)
    if ema is not None:
        if not (checkpoint / "ema").is_dir():
            raise ValueError(f"ema_decay: {checkpoint} has no moving average to go on from; use another output_dir")
        _load_weights(ema, checkpoint / "ema")
    _restore_optimizer(checkpoint, model, optimizer)
    values = json.loads((checkpoint / "optimizer.json").read_bytes())
    if scaler is not None and values["scaler"] is not None:
        scaler.load_state_dict(values["scaler"])
    return json.loads((checkpoint / "state.json").read_bytes())["step"]


def processes_of(checkpoint: Path) -> int:
    """How many processes wrote a checkpoint."""
    return json.loads((checkpoint / "state.json").read_bytes())["processes"]


def gather_network(model: PreTrainedModel, copy_of_it: PreTrainedModel | None) -> Any:
    """The whole network, also where the processes hold a part of each parameter. Call it in all of them.

    Args:
        copy_of_it: takes the weights, if `model` is in parts; None in the processes that don't need them.

    Returns:
        `model` itself if it is whole, else `copy_of_it`.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    weights = {name: _whole(value) for name, value in model.state_dict().items()}
    if copy_of_it is not None:
        copy_of_it.load_state_dict(weights)
    return copy_of_it


def gather_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `save_checkpoint` writes of AdamW: its moments, whole, by parameter name. Call it in all processes."""
    names = _names(model, optimizer)
    tensors = {}
    for group, group_names in zip(optimizer.param_groups, names):
        for parameter, name in zip(group["params"], group_names):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}:{name}"] = _whole(value.detach()).contiguous()
    return tensors, {"groups": names}


def rng_state() -> dict[str, Any]:
    """States of the random number generators of this process, as tensors and JSON values."""
    python = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    values = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(gauss)],
    }
    return {"tensors": tensors, "values": values}


def restore_rng_state(checkpoint: str | Path, rank: int) -> None:
    """Puts the generators of process `rank` back. A process the checkpoint doesn't know keeps its own."""
    path = Path(checkpoint) / f"rng-{rank:05d}.safetensors"
    if not path.exists():
        return
    tensors = load_file(path)
    values = json.loads(path.with_suffix(".json").read_bytes())
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
    if torch.backends.mps.is_available() and "mps" in tensors:
        torch.mps.set_rng_state(tensors["mps"])


class FolderOnDisk(WholeFolder):
    """A folder that gets its name after all that is in it reached the disk: it is there after a power cut too."""

    def _finish(self):
        for root, _, files in os.walk(self.partial):
            for path in [os.path.join(root, name) for name in files] + [root]:
                _fsync(path)

    def _publish(self):
        super()._publish()
        _fsync(self.path.parent)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows one for every save, in the middle of that of the training."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def _fsync(path: str | Path) -> None:
    if os.name == "nt":  # it opens no folders, and flushes no files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_weights(model: PreTrainedModel, folder: Path) -> None:
    own = model.state_dict()
    file = folder / "model.safetensors"
    weights = load_file(file) if file.exists() else {}
    if {name: x.shape for name, x in weights.items()} != {name: x.shape for name, x in own.items()}:
        weights = _as_transformers_reads(model, folder)
    model.load_state_dict({name: _divided_as(value, own[name]) for name, value in weights.items()})


def _as_transformers_reads(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Weights by the names of the modules; transformers stores some backbones under others."""
    with no_progress_bars():
        stored: Any
        report: Any
        stored, report = type(model).from_pretrained(
            folder,
            config=copy.deepcopy(model.config),
            dtype=model.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    wrong = {kind: sorted(map(str, report[f"{kind}_keys"]))[:5] for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        raise ValueError(
            f"model: {folder} is of another network: "
            + ", ".join(f"{kind} {names}" for kind, names in wrong.items() if names)
            + "; use another output_dir"
        )
    return stored.state_dict()


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Parameter names of every group of the optimizer."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _divided_as(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor where the parameter is; the same part of it, if this process holds a part of that."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def _restore_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    # Clones: the tensors read are the open file's memory, and Windows removes no file that is open.
    tensors = {key: value.clone() for key, value in load_file(checkpoint / "optimizer.safetensors").items()}
    parameters = dict(model.named_parameters())
    trained = {name for group in _names(model, optimizer) for name in group}
    unknown = {key.partition(":")[2] for key in tensors} - trained
    if unknown:
        raise ValueError(
            f"optim: {checkpoint} trained other parameters, e.g. {sorted(unknown)[0]}; use another output_dir"
        )
    for key, value in tensors.items():
        kind, _, name = key.partition(":")
        parameter = parameters[name]
        # AdamW counts steps on the CPU; its moments live with the parameter.
        optimizer.state[parameter][kind] = value if kind == "step" else _divided_as(value, parameter)
