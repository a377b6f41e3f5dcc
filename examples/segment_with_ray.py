"""Segment many videos with Ray Data: `python examples/segment_with_ray.py OUT "archive/**/*.mp4" [MODEL]`.

It needs `pip install "ray[data]"`. Each actor holds the model once and takes one video at a time; on a cluster with
GPUs give each an accelerator with `num_gpus=1`. The results are Parquet files of a row per object and frame, its mask
as COCO's run lengths:

    import pyarrow.parquet, pycocotools.mask
    for row in pyarrow.parquet.read_table("OUT").to_pylist():
        mask = pycocotools.mask.decode({"size": [row["height"], row["width"]], "counts": row["counts"]})
"""

import sys

import numpy as np
import pyarrow as pa
import ray
from pycocotools import mask as rle_tools

INTEGERS, TEXTS = ("frame", "id", "height", "width"), ("video", "path", "label", "counts", "error")
# Said beforehand, or a file in which all of a column is missing would not go together with the others.
SCHEMA = pa.schema([(x, pa.int32()) for x in INTEGERS] + [("score", pa.float64())] + [(x, pa.string()) for x in TEXTS])


class Segment:
    def __init__(self, model_name: str | None):
        import ausm_hf

        self.model, self.processor = ausm_hf.load_model(model_name)
        self.segment_video = ausm_hf.segment_video

    def __call__(self, row: dict):
        """The rows of one video; of one that can't be read, a row that says why."""
        row = dict.fromkeys(SCHEMA.names) | row
        try:
            for result in self.segment_video(row["path"], self.model, self.processor):
                height, width = result.masks.shape
                for item in result.objects:
                    rle = rle_tools.encode(np.asfortranarray(result.masks == item["id"]).view(np.uint8))
                    row |= {key: item[key] for key in ("id", "label", "score")}
                    row |= {"frame": result.index, "height": height, "width": width, "counts": rle["counts"].decode()}
                    yield row.copy()
        except ValueError as error:
            yield dict.fromkeys(SCHEMA.names) | {"video": row["video"], "path": row["path"], "error": str(error)}


def main(output: str, pattern: str, model_name: str | None = None, num_actors: int = 1):
    from ausm_hf.archive import find_videos

    videos = ray.data.from_items([{"video": name, "path": path} for name, path in find_videos([pattern]).items()])
    rows = videos.flat_map(
        Segment,
        fn_constructor_args=[model_name],
        compute=ray.data.ActorPoolStrategy(size=num_actors),
    )
    rows.write_parquet(output, schema=SCHEMA)


if __name__ == "__main__":
    main(*sys.argv[1:])
