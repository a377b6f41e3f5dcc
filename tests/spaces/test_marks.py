"""Clicks, boxes and strokes to masks, and the visit that keeps them."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from ausm_hf.demo.clips import Clip, Rooms
from ausm_hf.demo.marks import MAX_OBJECTS, Mark, masks_of_frame, read_mark
from ausm_hf.demo.network import News, Result, Stopped
from ausm_hf.demo.unpack import Limits, Refused
from ausm_hf.demo.visits import Visits

FRAME = np.zeros((40, 60, 3), dtype=np.uint8)


def masks(network, *marks, known=None):
    return masks_of_frame([Mark(0, *mark) for mark in marks], FRAME, network.refine, known)


def test_a_box_from_any_corner(signals_are_masks):
    wanted = np.zeros((40, 60), dtype=bool)
    wanted[5:20, 10:30] = True
    for points in (((10, 5), (30, 20)), ((30, 20), (10, 5)), ((10, 20), (30, 5))):
        np.testing.assert_array_equal(masks(signals_are_masks, (1, "box", points))[1], wanted)


def test_clicks_add_and_take_away(signals_are_masks):
    mask = masks(
        signals_are_masks, (1, "box", ((0, 0), (30, 40))), (1, "point", ((50, 20),)), (1, "point", ((10, 10),), False)
    )[1]
    assert mask[20, 50] and mask[30, 20] and not mask[10, 10]


def test_paint_and_erase_on_what_the_network_made(signals_are_masks):
    painted = masks(signals_are_masks, (3, "paint", ((10, 10), (40, 10)), True, 3))[3]
    assert painted[10, 10:41].all() and painted[8, 25] and not painted[15].any()
    assert abs(painted.sum() - (30 * 6 + math.pi * 9)) < 40
    both = masks(signals_are_masks, (3, "box", ((0, 0), (60, 40))), (3, "paint", ((10, 10), (40, 10)), False, 3))[3]
    np.testing.assert_array_equal(both, ~painted)


def test_marks_correct_what_is_known(signals_are_masks):
    known = np.zeros((40, 60), dtype=bool)
    known[:, :20] = True
    taken = masks(signals_are_masks, (1, "point", ((5, 5),), False), known={1: known})[1]
    assert taken[30, 10] and not taken[5, 5]
    painted = masks(signals_are_masks, (1, "paint", ((50, 30),), True, 2), known={1: known})[1]
    assert painted[30, 10] and painted[30, 50]
    with pytest.raises(Refused, match="First click on the object"):
        masks(signals_are_masks, (1, "point", ((5, 5),), False))


def test_objects_share_no_pixel(signals_are_masks):
    of = masks(signals_are_masks, (2, "box", ((0, 0), (30, 40))), (1, "box", ((20, 0), (60, 40))))
    assert list(of) == [1, 2] and not (of[1] & of[2]).any()
    assert of[1][10, 25] and of[2][10, 10]
    with pytest.raises(Refused, match="nothing of object 2, so nothing was changed"):
        masks(signals_are_masks, (2, "box", ((30, 0), (40, 40))), (1, "box", ((20, 0), (60, 40))))


def test_who_is_not_in_the_frame(signals_are_masks):
    """Because it is said, or because nothing is left of what was known; what is marked after that counts again."""
    box = (1, "box", ((0, 0), (30, 40)))
    other = (2, "box", ((20, 0), (60, 40)))
    known = {1: np.ones((40, 60), dtype=bool)}
    of = masks(signals_are_masks, box, other, (1, "away", ()), known=known)
    assert list(of) == [1, 2] and not of[1].any() and of[2][:, 20:].all()
    assert not masks(signals_are_masks, (1, "paint", ((10, 20), (50, 20)), False, 60), known=known)[1].any()
    again = masks(signals_are_masks, box, (1, "away", ()), (1, "paint", ((50, 30),), True, 2), known=known)
    assert again[1][30, 50] and not again[1][:, :40].any()
    again = masks(signals_are_masks, (1, "away", ()), box)
    assert again[1][:, :30].all()
    with pytest.raises(Refused, match="First click on the object"):
        masks(signals_are_masks, (1, "away", ()), (1, "point", ((5, 5),), False), known=known)
    with pytest.raises(Refused, match="nothing of object 1, so nothing was changed"):  # it was new
        masks(signals_are_masks, box, (1, "paint", ((10, 20), (50, 20)), False, 60))


GOOD = {"frame": 0, "kind": "box", "points": [[1, 2], [30, 20]], "add": True, "radius": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"frame": 7}, {"frame": -1}, {"frame": "x"}, {"kind": "star"}, {"kind": "point"}, {"points": "here"},
        {"points": [[1, 2]]}, {"points": [[1, 2], [math.nan, 3]]}, {"points": [[1, 2], [1e9, 3]]},
        {"points": [[1, 2], [1, 20]]}, {"kind": "paint", "points": [[1, 1]] * 5000}, {"kind": "paint", "radius": 1e6},
        {"kind": "paint", "radius": math.inf}, {"points": []}, {"kind": "point", "points": [[60, 20]]},
        {"kind": "point", "points": [[30, 40]]}, {"kind": "away"},
    ],
)  # fmt: skip
def test_what_a_browser_can_not_have_sent_is_refused(change):
    assert read_mark(GOOD, 1).check((40, 60), 3).points == ((1, 2), (30, 20))
    read_mark({**GOOD, "kind": "away", "points": []}, 1).check((40, 60), 3)
    read_mark({**GOOD, "points": [[1, 2], [60, 40]]}, 1).check((40, 60), 3)  # a box may end at the edge
    read_mark({**GOOD, "kind": "point", "points": [[59.9, 39.9]]}, 1).check((40, 60), 3)
    with pytest.raises(Refused):
        read_mark({**GOOD, **change}, 1).check((40, 60), 3)


def test_an_unknown_object_and_no_mark_at_all_are_refused():
    with pytest.raises(Refused, match="1 to 10"):
        read_mark(GOOD, MAX_OBJECTS + 1).check((40, 60), 3)
    for nothing in (None, {}, [], "box"):
        with pytest.raises(Refused):
            read_mark(nothing, 1)


@pytest.fixture
def rooms(tmp_path):
    return Rooms(tmp_path)


@pytest.fixture
def visit(rooms):
    from PIL import Image

    visit = Visits(rooms).of("somebody")
    folder = visit.new_folder("clip")
    folder.mkdir()
    for index in range(3):
        Image.fromarray(FRAME).save(folder / f"{index:05d}.jpg")
    visit.clip = Clip(folder, "clip", (40, 60), 3, 10.0, None)
    return visit


def test_a_mark_that_makes_no_mask_is_not_kept(visit, signals_are_masks):
    with pytest.raises(Refused):
        visit.mark(Mark(0, 1, "point", ((5, 5),), False), signals_are_masks)
    assert visit.marks == []
    picture = visit.mark(Mark(0, 1, "box", ((10, 10), (30, 30))), signals_are_masks)
    assert (picture[20, 20] != picture[35, 50]).any() and len(visit.marks) == 1


def test_a_refused_mark_leaves_those_like_it_where_they_were(visit, signals_are_masks):
    """The same box again would leave nothing of the one drawn over it; those before stay in their order."""
    outer, inner = (Mark(0, n, "box", corners) for n, corners in ((1, ((5, 5), (35, 35))), (2, ((10, 10), (20, 20)))))
    visit.mark(outer, signals_are_masks)
    visit.mark(inner, signals_are_masks)
    with pytest.raises(Refused, match="nothing of object 2, so nothing was changed"):
        visit.mark(Mark(0, 1, "box", ((5, 5), (35, 35))), signals_are_masks)
    assert visit.marks == [outer, inner]
    visit.picture(0, signals_are_masks)


def test_a_later_frame_shows_what_was_followed_and_takes_corrections(visit, signals_are_masks):
    from PIL import Image

    (visit.room / "run" / "masks").mkdir(parents=True)
    ids = np.zeros((40, 60), dtype=np.uint8)
    ids[:10] = 1
    Image.fromarray(ids).save(visit.room / "run" / "masks" / "00002.png")
    visit.followed = Result(visit.room / "run")
    assert visit.picture(2, signals_are_masks)[5, 5].any()
    visit.mark(Mark(2, 1, "paint", ((30, 30),), True, 4), signals_are_masks)
    mask = visit.masks(2, signals_are_masks)[1]
    assert mask[5, 5] and mask[30, 30]


@pytest.fixture
def network(signals_are_masks):
    """What is marked in a frame is there, and in the frames after it; each correction grows an object, too."""

    def run(clip, folder, masks=None, **how):
        (folder / "masks").mkdir()
        ids = np.zeros(clip.size, dtype=np.uint8)
        for index in range(clip.num_frames):
            for object_id, mask in (masks or {}).get(index, {}).items():
                ids[ids == object_id] = 0
                ids[mask] = object_id
            Image.fromarray(ids).save(folder / "masks" / f"{index:05d}.png")
        yield Result(folder)

    def grow(frame, prompts, known):
        return refine(frame, prompts, [mask if mask is None else mask | np.roll(mask, 1, axis=1) for mask in known])

    refine = signals_are_masks.refine
    signals_are_masks.refine, signals_are_masks.run = grow, run
    return signals_are_masks


def followed(visit, network) -> np.ndarray:
    assert list(visit.follow(network)) == []
    return np.stack([visit.result.mask(index) for index in range(3)])


def test_following_again_and_undoing_give_what_they_gave(visit, network):
    visit.mark(Mark(0, 1, "box", ((10, 10), (30, 30))), network)
    visit.mark(Mark(0, 2, "box", ((40, 10), (50, 30))), network)
    first = followed(visit, network)
    assert set(np.unique(first)) == {0, 1, 2}
    before = visit.picture(2, network)
    visit.mark(Mark(2, 1, "point", ((5, 5),), False), network)
    visit.mark(Mark(2, 1, "paint", ((50, 35),), True, 2), network)
    second = followed(visit, network)
    assert (second[2] != first[2]).any()
    np.testing.assert_array_equal(followed(visit, network), second)
    list(visit.find(network, 0.5, 10, "pets", True))
    np.testing.assert_array_equal(followed(visit, network), second)

    visit.marks.pop()
    visit.marks.pop()
    np.testing.assert_array_equal(visit.picture(2, network), before)  # at once
    visit.mark(Mark(2, 1, "point", ((5, 5),), False), network)
    visit.mark(Mark(2, 1, "paint", ((50, 35),), True, 2), network)
    np.testing.assert_array_equal(followed(visit, network), second)
    visit.marks.pop()
    visit.marks.pop()
    np.testing.assert_array_equal(followed(visit, network), first)
    np.testing.assert_array_equal(visit.picture(2, network), before)


def test_a_mark_undone_while_it_is_followed_is_undone(visit, network):
    visit.mark(Mark(0, 1, "box", ((10, 10), (30, 30))), network)
    first = followed(visit, network)
    before = visit.picture(2, network)
    visit.mark(Mark(2, 1, "paint", ((50, 35),), True, 2), network)
    run = network.run

    def undone_meanwhile(*args, **how):
        visit.marks.pop()
        yield from run(*args, **how)

    network.run = undone_meanwhile
    assert (followed(visit, network) != first).any()
    network.run = run
    np.testing.assert_array_equal(visit.picture(2, network), before)
    np.testing.assert_array_equal(followed(visit, network), first)


def test_only_who_is_marked_somewhere_can_be_away(visit, network):
    away = Mark(2, 1, "away", ())
    for marks in ([], [Mark(0, 2, "box", ((10, 10), (30, 30)))], [Mark(2, 1, "box", ((10, 10), (30, 30)))]):
        visit.marks = marks
        with pytest.raises(Refused, match="First mark object 1 in a frame in which it is"):
            visit.mark(away, network)
        assert visit.marks == marks
    visit.marks = []
    visit.mark(Mark(0, 1, "box", ((10, 10), (30, 30))), network)
    before = followed(visit, network)
    visit.mark(away, network)
    assert (visit.picture(2, network) == 0).all()
    after = followed(visit, network)
    assert (after[:2] == before[:2]).all() and before[2].any() and not after[2].any()
    # The other was undone, and what is left says where the object isn't.
    for left in (away, Mark(2, 1, "paint", ((0, 20), (59, 20)), False, 40)):
        visit.marks = [left]
        with pytest.raises(Refused, match="Mark something first"):
            followed(visit, network)


def test_the_page_says_who_is_away(visit):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'ausm-hf[demo]'")
    from ausm_hf.demo.page import _canvas_value

    visit.names = {2: "dog"}
    box = Mark(2, 1, "box", ((10, 10), (30, 30)))
    visit.marks = [Mark(0, 2, "away", ()), box, Mark(2, 2, "away", ()), Mark(2, 1, "away", ())]
    value = _canvas_value(visit, 2, 1, FRAME)
    assert (value["note"], value["marks"]) == ("Not in this frame: 1, 2 dog", [])
    visit.marks.append(box)
    value = _canvas_value(visit, 2, 1, FRAME)
    assert value["note"] == "Not in this frame: 2 dog" and [mark["kind"] for mark in value["marks"]] == ["box"]
    assert _canvas_value(visit, 1, 1, FRAME)["note"] == ""


def test_the_picture_to_mark_has_the_pixels_shape(visit):
    pytest.importorskip("gradio", reason="the demo needs gradio: pip install 'ausm-hf[demo]'")
    from ausm_hf.demo.page import _canvas_value

    visit.clip = replace(visit.clip, pixel_aspect=Fraction(4, 3))
    value = _canvas_value(visit, 0, 1, FRAME)
    assert (value["width"], value["height"], value["aspect"]) == (60, 40, 2)
    visit.clip = None  # it is still being read
    assert _canvas_value(visit, 0, 1, FRAME)["aspect"] == 1.5


def test_clearing_and_another_clip_forget_what_was_before_the_marks(visit, network):
    box = Mark(0, 1, "box", ((10, 10), (30, 30)))
    for forget in (visit.clear, visit.forget):
        visit.mark(box, network)
        followed(visit, network)
        visit.mark(Mark(2, 1, "paint", ((50, 35),), True, 2), network)
        forget()
        assert visit.before == {}


def test_who_marks_while_the_video_is_read_is_asked_to_wait(visit, rooms, clip_file, signals_are_masks):
    mark = Mark(0, 1, "box", ((10, 10), (30, 30)))
    reading = visit.take(str(clip_file), Limits(), rooms)
    assert not isinstance(next(reading), Clip)  # the first frame, for the visitor to see
    with pytest.raises(Refused, match="still being read"):
        visit.mark(mark, signals_are_masks)
    assert isinstance(next(reading), Clip)
    visit.mark(mark, signals_are_masks)
    list(reading)
    broken = clip_file.with_name("broken.mp4")
    broken.write_bytes(b"this is no video")
    with pytest.raises(Refused):
        list(visit.take(str(broken), Limits(), rooms))
    with pytest.raises(Refused, match="Upload a video first"):
        visit.mark(mark, signals_are_masks)


def test_names_objects_and_what_goes_without_a_clip(visit, signals_are_masks, tmp_path):
    assert visit.add_object() == 2
    visit.name(2, "  a <b>dog</b>\n" + "x" * 99)
    assert visit.names[2].startswith("a <b>dog</b> x") and len(visit.names[2]) == 30
    visit.name(2, " ")
    assert visit.names == {}
    with pytest.raises(Refused, match="no object 3"):
        visit.name(3, "x")
    for _ in range(MAX_OBJECTS - 2):
        visit.add_object()
    with pytest.raises(Refused, match="More than 10"):
        visit.add_object()
    with pytest.raises(Refused, match="Mark something first"):
        next(visit.follow(signals_are_masks))
    visit.forget()
    for call in (lambda: next(visit.follow(signals_are_masks)), lambda: visit.picture(0, signals_are_masks)):
        with pytest.raises(Refused, match="Upload a video first"):
            call()


def test_visitors_have_nothing_in_common_and_leave_nothing(tmp_path):
    visits = Visits(Rooms(tmp_path))
    mine, yours = visits.of("me"), visits.of("you")
    assert mine is visits.of("me") and mine.room != yours.room
    visits.end("me")
    assert not mine.room.exists() and yours.room.exists()
    assert visits.of("me").room != mine.room
    visits.end("nobody")
    for nameless in ("", None):  # they would all be one visitor
        with pytest.raises(Refused, match="load it again"):
            visits.of(nameless)


def test_a_new_upload_forgets_the_old_one(visit, rooms, clip_file, signals_are_masks):
    visit.mark(Mark(0, 1, "box", ((10, 10), (30, 30))), signals_are_masks)
    list(visit.take(str(clip_file), Limits(), rooms))
    assert visit.marks == [] and (visit.clip.size, visit.clip.num_frames) == ((48, 64), 6)


def test_a_run_that_was_overtaken_by_an_upload_changes_nothing(visit, rooms, clip_file, signals_are_masks):
    def run(clip, folder, **how):
        yield News(3, 3, 1.0, [])
        (folder / "masks").mkdir(parents=True)
        Image.new("L", (64, 48)).save(folder / "masks" / "00000.png")
        yield Result(folder)

    signals_are_masks.run = run
    visit.mark(Mark(0, 1, "box", ((10, 10), (30, 30))), signals_are_masks)
    first = list(visit.follow(signals_are_masks))
    before = visit.result.folder
    assert [item.done for item in first] == [3] and visit.followed is visit.result
    list(visit.follow(signals_are_masks))
    assert visit.result.folder != before and not before.exists()

    running = visit.follow(signals_are_masks)
    next(running)
    list(visit.take(str(clip_file), Limits(), rooms))
    with pytest.raises(Stopped):
        next(running)
    assert visit.result is None and visit.followed is None
    assert [path.name for path in visit.room.iterdir()] == [visit.clip.folder.name]


@pytest.mark.parametrize("backward", [True, False])
def test_following_goes_back_to_the_start_if_asked(visit, signals_are_masks, backward):
    asked = []

    def run(clip, folder, **how):
        asked.append(how["backward"])
        yield Result(folder)

    signals_are_masks.run = run
    visit.mark(Mark(2, 1, "box", ((10, 10), (30, 30))), signals_are_masks)
    list(visit.follow(signals_are_masks, backward))
    assert asked == [backward]


def test_a_run_whose_clip_has_been_removed_is_stopped_and_the_visit_goes_on(
    visit, rooms, clip_file, signals_are_masks
):
    def run(clip, folder, **how):
        for index in range(clip.num_frames):
            clip.frame(index)
            yield News(index + 1, clip.num_frames, 1.0, [])

    signals_are_masks.run = run
    visit.mark(Mark(0, 1, "box", ((10, 10), (30, 30))), signals_are_masks)
    running = visit.follow(signals_are_masks)
    next(running)
    list(visit.take(str(clip_file), Limits(), rooms))
    with pytest.raises(Stopped):
        next(running)
    assert visit.picture(5, signals_are_masks).shape == (48, 64, 3)


def test_a_stopped_run_leaves_no_files(visit, signals_are_masks):
    def run(clip, folder, **how):
        (folder / "key").mkdir()
        yield News(1, 3, 1.0, [])
        raise Stopped

    signals_are_masks.run = run
    visit.mark(Mark(0, 1, "box", ((10, 10), (30, 30))), signals_are_masks)
    with pytest.raises(Stopped):
        list(visit.follow(signals_are_masks))
    assert [path.name for path in visit.room.iterdir()] == [visit.clip.folder.name]


def test_one_visit_has_the_files_of_one_clip_and_respects_a_full_disk(visit, rooms, clip_file, monkeypatch):
    result = visit.new_folder("run")
    result.mkdir()
    visit.result = Result(result)
    for _ in range(3):
        list(visit.take(str(clip_file), Limits(), rooms))
        assert [path.name for path in visit.room.iterdir()] == [visit.clip.folder.name]

    (rooms.root / "others").write_bytes(bytes(2000))
    monkeypatch.setattr("ausm_hf.demo.clips.MOST_GIGABYTES", 1e-6)
    with pytest.raises(Refused, match="no room for more"):
        next(visit.take(str(clip_file), Limits(), rooms))
    assert visit.clip is None and not list(visit.room.iterdir())


def test_a_visitor_who_leaves_during_a_sweep_does_no_harm(rooms):
    visits = Visits(rooms)

    class Leaving(type(rooms.root)):
        def exists(self):
            visits.end("leaving")
            return False

    visits.of("leaving").room = Leaving(rooms.root / "rooms" / "gone")
    visits.sweep()
