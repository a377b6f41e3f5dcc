"""J&F of video object segmentation, as an `evaluate` module."""

from .jf import DataSetScorer, summarize
from .streaming import StreamingMetric, info_of_masks

_DESCRIPTION = """
J, F and J&F of video object segmentation with the conventions of DAVIS: region similarity J is the intersection over
union of masks, boundary accuracy F the F-measure of their outlines (0.8% of the image's diagonal apart at most). Each
is a mean over the frames of an object, then over all objects of all sequences. Recall is the fraction of frames above
0.5, decay the mean of the first quarter of an object's frames less that of the last. The numbers equal those of the
DAVIS 2017 toolkit, TrackEval and vos-benchmark. Frames are reduced to numbers as they come: no video is kept.

Configurations: "prompted" (default), where predictions carry the ids of ground truth, and "best-track", where
predicted ids and true ones are paired one to one so that the sum of mean J&F is highest (DAVIS 2017 unsupervised).
"""

_INPUTS = """
Args:
    predictions: masks (H, W) of ids, of integers, 0 = background: one per frame, in order.
    references: true masks, likewise; 255 = void, not scored.
    sequence: for each frame, the name of its sequence.
    skip_first, skip_last (`compute` only): whether to leave out the first and last frame of each sequence. Default:
        as DAVIS does, both for "prompted", neither for "best-track".
    count_from (`compute` only): from which frame on an object counts. "start" (default: DAVIS toolkit, TrackEval),
        "first_seen" in prediction or ground truth (vos-benchmark, SA-V), "first_annotated" in ground truth.
Returns:
    J&F, J, J_recall, J_decay, F, F_recall, F_decay: fractions of 1, means over all objects.
    sequences: the same for each sequence and, under "objects", for each object.
Example:
    >>> import numpy as np
    >>> masks = [np.array([[0, 1], [0, 1]])] * 3
    >>> metric.add_batch(predictions=masks, references=masks, sequence=["bear"] * 3)
    >>> metric.compute()["J&F"]
    1.0
"""

_CITATION = """
@article{Pont-Tuset_arXiv_2017,
  author  = {Jordi Pont-Tuset and Federico Perazzi and Sergi Caelles and Pablo Arbelaez and
             Alexander Sorkine-Hornung and Luc {Van Gool}},
  title   = {The 2017 DAVIS Challenge on Video Object Segmentation},
  journal = {arXiv:1704.00675},
  year    = {2017}
}
"""

CONFIGS = ("prompted", "best-track")


class VosJf(StreamingMetric):
    """J&F per object, sequence and data set."""

    config_name: str

    def _info(self):
        if self.config_name == "default":
            self.config_name = CONFIGS[0]
        if self.config_name not in CONFIGS:
            raise ValueError(f"`config_name` is {self.config_name!r}; it must be one of {', '.join(CONFIGS)}.")
        return info_of_masks(_DESCRIPTION, _INPUTS, _CITATION, "https://davischallenge.org")

    def _start(self):
        self._scorer = DataSetScorer(self.config_name)

    def _add_frame(self, predictions, references, sequence):
        self._scorer.add(sequence, predictions, references)

    def _result(self, skip_first=None, skip_last=None, count_from="start"):
        skip = self.config_name == "prompted"
        skip_first = skip if skip_first is None else skip_first
        skip_last = skip if skip_last is None else skip_last
        return summarize(self._scorer.result(skip_first, skip_last, count_from))
