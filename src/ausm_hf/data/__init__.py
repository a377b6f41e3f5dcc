"""Data sets of video segmentation in one clip format, and the mixtures that train on them.

Each data set is a module with a function of its name that indexes it: `davis`, `youtube_vos`, `mose`, `sa_v`,
`youtube_vis`, `ovis`, `coco`, `stills`, `video_folder`, `vis_json`.
"""
