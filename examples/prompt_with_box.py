"""Follow what is in a box: `python examples/prompt_with_box.py VIDEO X0 Y0 X1 Y1 [OUTPUT.mp4]`.

The box is in pixels of the video's first frame. Points say more: one on the object that the box should hold, or, with
the label 0, one on something in the box that isn't it.
"""

import sys

import ausm_hf
from ausm_hf.visualization import draw_overlay, object_labels


def main(video: str, *rest: str):
    box, output = [float(x) for x in rest[:4]], rest[4] if len(rest) > 4 else "followed.mp4"
    model, processor = ausm_hf.load_model()
    source = ausm_hf.read_video(video)
    session = processor.init_video_session()
    # As in SAM 2: [image][object][...]. With input_points=[[[[x, y]]]] and input_labels=[[[1]]] a click beside it.
    processor.add_inputs_to_inference_session(
        session, frame_idx=0, obj_ids=[1], input_boxes=[[box]], original_size=source.size
    )
    with ausm_hf.VideoWriter(output, source.fps, source.size, sound=source.sound) as writer:
        for frame in source:
            pixel_values = processor(images=frame)["pixel_values"]
            if session.next_frame_idx == 0:  # what the network makes of the box, before the stream moves on
                mask = model.preview_prompts(session, pixel_values)[1]
                print(f"the object covers {mask.float().mean():.1%} of the first frame")
            outputs = model(inference_session=session, frame=pixel_values)
            (result,) = processor.post_process_instance_segmentation(outputs, target_sizes=[source.size])
            writer.write(
                draw_overlay(frame, result["segmentation"].cpu().numpy(), object_labels(result["segments_info"]))
            )
    print(f"{session.next_frame_idx} frames in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
