"""G of YouTube-VOS, as an `evaluate` module."""

from .jf import DataSetScorer, seen_and_unseen, summarize
from .streaming import StreamingMetric, info_of_masks

_DESCRIPTION = """
G of YouTube-VOS: the mean of J and F over objects of categories seen in training and of J and F over objects of unseen
ones. J is the intersection over union of masks and F the F-measure of their outlines, as in DAVIS. An object is scored
from the first frame that ground truth has it in, that frame included, to the end; what is predicted before does not
count. Frames are reduced to numbers as they come: no video is kept.
"""

_INPUTS = """
Args:
    predictions: masks (H, W) of ids, of integers, 0 = background: one per annotated frame, in order.
    references: true masks, likewise; 255 = void, not scored.
    sequence: for each frame, the name of its video.
    seen (`compute` only): dict, video -> dict, object id -> bool: is the object's category in the training set?
Returns:
    G, J_seen, F_seen, J_unseen, F_unseen: fractions of 1. Where there is no object of a kind, its J and F are None and
        G is the mean of the others.
    sequences: J&F, J, F, their recall and decay for each video and, under "objects", for each object.
Example:
    >>> import numpy as np
    >>> masks = [np.array([[0, 1], [2, 1]])] * 3
    >>> metric.add_batch(predictions=masks, references=masks, sequence=["bear"] * 3)
    >>> metric.compute(seen={"bear": {1: True, 2: False}})["G"]
    1.0
"""

_CITATION = """
@article{xu2018youtubevos,
  author  = {Ning Xu and Linjie Yang and Yuchen Fan and Dingcheng Yue and Yuchen Liang and Jianchao Yang and
             Thomas Huang},
  title   = {YouTube-VOS: A Large-Scale Video Object Segmentation Benchmark},
  journal = {arXiv:1809.03327},
  year    = {2018}
}
"""


class YoutubeVosG(StreamingMetric):
    """J and F over objects of seen and unseen categories, and their mean G."""

    def _info(self):
        return info_of_masks(_DESCRIPTION, _INPUTS, _CITATION, "https://youtube-vos.org")

    def _start(self):
        self._scorer = DataSetScorer("prompted")

    def _add_frame(self, predictions, references, sequence):
        self._scorer.add(sequence, predictions, references)

    def _result(self, seen):
        summary = summarize(self._scorer.result(False, False, "first_annotated"))
        return {**seen_and_unseen(summary, seen), "sequences": summary["sequences"]}
