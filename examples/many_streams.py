"""Segment several videos at once: `python examples/many_streams.py VIDEO VIDEO ...`.

The frames of all streams go through the network together, which uses an accelerator better than one by one; the
results are the same. Streams may start and end when they like. All frames must have one size for the network: videos
of other shapes are fitted to it by the image processor's `size`.
"""

import sys

import ausm_hf


def main(*videos: str, size: tuple[int, int] = (256, 448)):
    model, processor = ausm_hf.load_model()
    fixed = {"height": size[0], "width": size[1]}
    running = {}
    for video in videos:
        source = ausm_hf.read_video(video)
        running[video] = (processor.init_video_session(seed=0), iter(source), source.size)
    while running:
        frames = {video: next(frames, None) for video, (_, frames, _) in running.items()}
        for video, frame in frames.items():
            if frame is None:
                session, _, _ = running.pop(video)
                print(f"{video}: {session.next_frame_idx} frames, {session.next_object_id - 1} objects")
        if not running:
            break
        outputs = model.step_sessions(
            [session for session, _, _ in running.values()],
            [processor(images=frames[video], size=fixed)["pixel_values"] for video in running],
        )
        sizes = [size for _, _, size in running.values()]
        for video, result in zip(running, processor.post_process_instance_segmentation(outputs, target_sizes=sizes)):
            result["segmentation"]  # (height, width), pixel = object id: do something with it
            if running[video][0].next_frame_idx % 100 == 0:
                print(f"{video}: frame {running[video][0].next_frame_idx}, {len(result['segments_info'])} objects")


if __name__ == "__main__":
    main(*sys.argv[1:])
