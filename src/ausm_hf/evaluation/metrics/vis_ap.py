"""AP of video instance segmentation, as an `evaluate` module."""

import datasets
import evaluate

from .streaming import StreamingMetric
from .video_ap import VideoAP

_DESCRIPTION = """
AP, AP50, AP75, AR1 and AR10 of video instance segmentation, as YouTube-VIS and OVIS define them: COCO's average
precision, where detections are tracks and the IoU of two tracks is the sum over frames of their intersections over the
sum over frames of their unions. With videos of one frame it is COCO's mask AP (with groups, if `images` is said). The
numbers equal those of pycocotools and TrackEval. Frames are reduced to numbers as they come: no video is kept.
"""

_INPUTS = """
Args:
    predictions: for each frame a list of dicts, one per object: "id" (of its track), "category_id", "score", and
        "mask", a numpy array (H, W), a COCO RLE, or None where the track is not in the frame. The score and category
        of a track are those that its last frame gave it.
    references: for each frame a list of dicts, one per true object: "id", "category_id", "mask", and "iscrowd" if it
        is a group that is not scored.
    video: for each frame, the id of its video.
    categories (`compute` only): ids of all categories there are; others are then reported.
    images (`compute` only): whether the videos are images; groups then match as in COCO, not as in YouTube-VIS.
Returns:
    AP, AP50, AP75, AR1, AR10: fractions of 1, means over categories that have ground truth; -1 where none has.
    categories: the same for each of them.
Example:
    >>> import numpy as np
    >>> mask = np.array([[0, 1], [0, 1]])
    >>> true = {"id": 7, "category_id": 1, "mask": mask}
    >>> predicted = {"id": 1, "category_id": 1, "mask": mask, "score": 0.9}
    >>> metric.add_batch(predictions=[[predicted]] * 3, references=[[true]] * 3, video=["bear"] * 3)
    >>> round(metric.compute()["AP"], 6)
    1.0
"""

_CITATION = """
@inproceedings{yang2019vis,
  author    = {Linjie Yang and Yuchen Fan and Ning Xu},
  title     = {Video Instance Segmentation},
  booktitle = {International Conference on Computer Vision},
  year      = {2019}
}
"""


class VisAp(StreamingMetric):
    """Average precision of tracks."""

    def _info(self):
        rle = {"size": datasets.Sequence(datasets.Value("int32")), "counts": datasets.Value("string")}
        true = {"id": datasets.Value("int64"), "category_id": datasets.Value("int64"), "mask": rle}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": [{**true, "score": datasets.Value("float64")}],
                    "references": [true],
                    "video": datasets.Value("string"),
                }
            ),
            reference_urls=["https://youtube-vos.org/dataset/vis/"],
        )

    def _start(self):
        self._scorer = VideoAP()

    def _add_frame(self, predictions, references, video):
        self._scorer.add(video, predictions, references)

    def _result(self, categories=None, images=False):
        return self._scorer.result(categories, images)
