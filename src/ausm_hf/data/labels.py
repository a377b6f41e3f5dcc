"""Label sets of the field's data sets: names in the order of their class numbers, spelled as in the published JSON."""

from ausm_hf.model.configuration_ausm import COCO_LABELS

YOUTUBE_VIS_2019_LABELS = (
    "person giant_panda lizard parrot skateboard sedan ape dog snake monkey hand rabbit duck cat cow fish train horse "
    "turtle bear motorbike giraffe leopard fox deer owl surfboard airplane truck zebra tiger elephant snowboard boat "
    "shark mouse frog eagle earless_seal tennis_racket"
).split()

YOUTUBE_VIS_2021_LABELS = (
    "airplane bear bird boat car cat cow deer dog duck earless_seal elephant fish flying_disc fox frog giant_panda "
    "giraffe horse leopard lizard monkey motorbike mouse parrot person rabbit shark skateboard snake snowboard "
    "squirrel surfboard tennis_racket tiger train truck turtle whale zebra"
).split()

OVIS_LABELS = (
    "Person Bird Cat Dog Horse Sheep Cow Elephant Bear Zebra Giraffe Poultry Giant_panda Lizard Parrot Monkey Rabbit "
    "Tiger Fish Turtle Bicycle Motorcycle Airplane Boat Vehical"
).split()

LABEL_SETS: dict[str, list[str]] = {
    "coco": COCO_LABELS,
    "youtube_vis_2019": YOUTUBE_VIS_2019_LABELS,
    "youtube_vis_2021": YOUTUBE_VIS_2021_LABELS,
    "ovis": OVIS_LABELS,
}
