"""Add, correct and remove objects while a stream runs: `python examples/add_and_remove_objects.py VIDEO`.

Nothing is known before it happens: prompts are for "now", the next frame that the stream will see. The places clicked
at here are made up; in a program they come from the user.
"""

import sys

import ausm_hf


def main(video: str):
    model, processor = ausm_hf.load_model()
    source = ausm_hf.read_video(video)
    height, width = source.size
    session = processor.init_video_session(find_new_objects=False)  # True: also find objects by itself

    for index, frame in enumerate(source):
        if index == 0:  # a click in the middle
            processor.add_inputs_to_inference_session(
                session, obj_ids=1, input_points=[width / 2, height / 2], original_size=source.size
            )
        if index == 4:  # a second object, in a box at the left
            processor.add_inputs_to_inference_session(
                session, obj_ids=2, input_boxes=[0.05 * width, 0.3 * height, 0.35 * width, 0.9 * height]
            )
        if index == 8:  # a correction of the first: more of it here, less of it there
            points = [[0.5 * width, 0.6 * height], [0.1 * width, 0.1 * height]]
            processor.add_inputs_to_inference_session(session, obj_ids=1, input_points=points, input_labels=[1, 0])
        if index == 12:
            session.remove_object(2)
        outputs = model(inference_session=session, frame=processor(images=frame)["pixel_values"])
        (result,) = processor.post_process_instance_segmentation(outputs, target_sizes=[source.size])
        segmentation = result["segmentation"]  # (height, width), pixel = object id
        areas = {i: f"{(segmentation == i).float().mean():.1%}" for i in outputs.object_ids}
        print(f"frame {index}: {areas}")
        if index == 8:  # the stream can be put aside and go on later, in another process, as if nothing had been
            session.save("stream.safetensors")
            session = ausm_hf.AusmInferenceSession.load("stream.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
