"""Find and follow objects live: `python examples/segment_webcam.py [SOURCE] [OUTPUT.mp4] [SECONDS]`.

SOURCE is a camera, as in `camera:0` (Linux), or anything else that can be read as a video; Ctrl-C ends it. What is
seen is said at once; the video with its objects is there at the end. A stream needs no more memory however long it
runs.
"""

import sys
import time

import ausm_hf
from ausm_hf.visualization import draw_overlay, object_labels


def main(source: str = "camera:0", output: str = "webcam.mp4", seconds: str = "inf"):
    model, processor = ausm_hf.load_model()
    video = ausm_hf.read_video(source)
    session = processor.init_video_session()  # nothing marked: objects are found
    start, seen = time.monotonic(), set()
    with ausm_hf.VideoWriter(output, video.fps, video.size) as writer:
        try:
            for frame_time, frame in video.with_times():
                outputs = model(inference_session=session, frame=processor(images=frame)["pixel_values"])
                (result,) = processor.post_process_instance_segmentation(outputs, target_sizes=[video.size])
                for info in result["segments_info"]:
                    if info["id"] not in seen:
                        seen.add(info["id"])
                        print(f"{time.monotonic() - start:6.1f} s: object {info['id']}, {info['label']}", flush=True)
                overlay = draw_overlay(
                    frame, result["segmentation"].cpu().numpy(), object_labels(result["segments_info"])
                )
                writer.write(overlay, frame_time)
                if time.monotonic() - start > float(seconds):
                    break
        except KeyboardInterrupt:
            pass
    frames = session.next_frame_idx
    print(f"{frames} frames, {frames / (time.monotonic() - start):.1f} per second, in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
