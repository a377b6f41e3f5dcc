"""What the `evaluate` modules here share: they turn each frame into numbers at once.

`evaluate.Metric` writes everything it is given to a file and reads it back in `compute`. Masks of a whole data set are
too many for that, so `add`, `add_batch` and `compute` keep their signatures here but go to a scorer.
"""

import inspect
from abc import ABC, abstractmethod

import datasets
import evaluate


def info_of_masks(description: str, inputs_description: str, citation: str, url: str) -> evaluate.MetricInfo:
    """What a metric says of itself whose frames are masks (H, W), predicted and true, of named sequences."""
    mask = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs_description,
        features=datasets.Features({"predictions": mask, "references": mask, "sequence": datasets.Value("string")}),
        reference_urls=[url],
    )


class StreamingMetric(evaluate.Metric, ABC):
    """An `evaluate.Metric` whose inputs are frames, each reduced to numbers as it comes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.num_process != 1:
            raise ValueError(
                f"`num_process` is {self.num_process}; it must be 1. Let each process score its own videos, or add "
                "the frames of all videos in one process."
            )
        self._frames = 0
        self._start()

    @abstractmethod
    def _start(self) -> None:
        """Forgets everything that was added."""

    @abstractmethod
    def _add_frame(self, **inputs) -> None:
        """Adds one frame: one item of each feature, by the feature's name."""

    @abstractmethod
    def _result(self, **options) -> dict:
        """Computes the result of what was added."""

    def __len__(self):
        return self._frames

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one frame."""
        inputs = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: [value] for name, value in inputs.items()})

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds frames, in order. Frames of several videos may come mixed, those of each video in its order."""
        inputs = {"predictions": predictions, "references": references, **kwargs}
        names = self._feature_names()
        if set(inputs) != set(names) or any(value is None for value in inputs.values()):
            given = [name for name, value in inputs.items() if value is not None]
            raise ValueError(f"The inputs are {', '.join(given)}; they must be {', '.join(names)}.")
        lengths = {name: len(value) for name, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{length} {name}" for name, length in lengths.items())
            raise ValueError(f"There must be one of each for every frame, but there are {listed}.")
        for frame in zip(*inputs.values()):
            self._add_frame(**dict(zip(inputs, frame)))
            self._frames += 1

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Computes the result of all frames added, and of those given here, and starts afresh."""
        options = {name: value for name, value in kwargs.items() if name not in self._feature_names()}
        inputs = {name: value for name, value in kwargs.items() if name in self._feature_names()}
        inspect.signature(self._result).bind(**options)  # a slip in an option's name costs no frames
        if predictions is not None or references is not None or inputs:
            self.add_batch(predictions=predictions, references=references, **inputs)
        if self._frames == 0:
            raise ValueError("Nothing to compute: call `add` or `add_batch` first, or hand the frames to `compute`.")
        try:
            return self._result(**options)
        finally:
            self._frames = 0
            self._start()
