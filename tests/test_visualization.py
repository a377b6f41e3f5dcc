import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from ausm_hf import visualization
from ausm_hf.visualization import color_of, contact_sheet, davis_palette, draw_overlay, object_labels


def discs(count, height=240, width=426):
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((height, width), np.uint8)
    for i in range(count):
        row, column = (i % 2 + 0.5) * height / 2, (i // 2 + 0.5) * width / 4
        masks[(y - row) ** 2 / (0.23 * height) ** 2 + (x - column) ** 2 / (0.115 * width) ** 2 < 1] = i + 1
    return masks


def test_palette_is_that_of_pascal_voc():
    # The colours as listed in the PASCAL VOC development kit.
    assert davis_palette()[:22].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128], [0, 128, 128], [128, 128, 128],
        [64, 0, 0], [192, 0, 0], [64, 128, 0], [192, 128, 0], [64, 0, 128], [192, 0, 128], [64, 128, 128],
        [192, 128, 128], [0, 64, 0], [128, 64, 0], [0, 192, 0], [128, 192, 0], [0, 64, 128], [128, 64, 128],
    ]  # fmt: skip
    assert davis_palette()[255].tolist() == [224, 224, 192]
    assert len(np.unique(davis_palette(), axis=0)) == 256


def test_objects_are_drawn_in_colours_that_people_tell_apart():
    assert color_of(0) == (0, 0, 0) and color_of(17) == color_of(1)
    colors = np.array([color_of(object_id) for object_id in range(1, 17)], int)
    apart = np.abs(colors[:, None] - colors).sum(-1) + 1000 * np.eye(16, dtype=int)
    assert apart[:10, :10].min() > 120 and apart.min() > 70
    assert (colors.max(1) - colors.min(1)).min() >= 60  # none is grey


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint16, np.int64])
def test_only_masked_pixels_are_blended(dtype):
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    before = frame.copy()
    masks = discs(3, 60, 80).astype(dtype)
    out = draw_overlay(frame, masks, alpha=0.25, contour=False)
    assert np.array_equal(frame, before)
    assert np.array_equal(out[masks == 0], frame[masks == 0])
    for object_id in (1, 2, 3):
        wanted = 0.75 * frame[masks == object_id] + 0.25 * np.array(color_of(object_id))
        assert abs(out[masks == object_id] - wanted).max() <= 1
    assert np.array_equal(draw_overlay(frame, masks, alpha=0, contour=False), frame)


def test_large_ids_have_colors():
    for ids in ([70_000], [70_000, 3, 0, 256], [-1, 3], [-1, 70_000]):
        masks = np.resize(np.array(ids, np.int32), (4, 6))
        out = draw_overlay(np.zeros((4, 6, 3), np.uint8), masks, alpha=1, contour=False)
        assert all((out[masks == object_id] == color_of(object_id)).all() for object_id in ids)
    assert color_of(70_000) != (0, 0, 0)


def test_contour_lies_inside_the_object():
    masks = np.zeros((20, 20), np.uint8)
    masks[5:15, 5:15] = 1
    masks[5:15, 10:15] = 2  # touches object 1
    frame = np.full((20, 20, 3), 50, np.uint8)
    changed = (draw_overlay(frame, masks, alpha=0) != frame).any(axis=-1)
    inside = np.zeros((20, 20), bool)
    inside[6:14, 6:9] = inside[6:14, 11:14] = True
    assert np.array_equal(changed, (masks > 0) & ~inside)


def test_label_stands_at_the_top_of_the_object():
    frame = np.full((120, 200, 3), 90, np.uint8)
    masks = np.zeros((120, 200), np.uint8)
    masks[60:100, 80:120] = 1
    plain = draw_overlay(frame, masks)
    out = draw_overlay(frame, masks, {1: "1 cat 0.93", 5: "not in this frame"})
    rows, columns = np.nonzero((out != plain).any(axis=-1))
    assert rows.max() == 59 and rows.min() >= 40  # just above
    assert abs((columns.min() + columns.max()) / 2 - 100) < 2  # and centred
    plate = out[rows.min() : 60, columns.min() : columns.max() + 1]
    assert (plate == color_of(1)).all(-1).mean() > 0.4 and (plate.min(-1) > 200).any()  # white on the object's colour

    other = draw_overlay(frame, masks, {1: "1 cat 0.94"})
    assert (other != out).any()


@pytest.fixture
def system_fonts(monkeypatch):
    """Fonts asked for by name, and by which one is there, if any."""
    asked, there = [], {}

    def truetype(name, size):
        asked.append(name)
        if name not in there:
            raise OSError("cannot open resource")
        return there[name]

    default = ImageFont.load_default(10), ImageFont.load_default(17)
    monkeypatch.setattr(visualization.ImageFont, "truetype", truetype)
    monkeypatch.setattr(visualization.ImageFont, "load_default", lambda size: default[size > 10])
    for cached in (visualization._font, visualization._wide_font, visualization._glyphs):
        cached.cache_clear()
    yield asked, there
    for cached in (visualization._font, visualization._wide_font, visualization._glyphs):
        cached.cache_clear()


def test_labels_beyond_ascii(system_fonts):
    """In a font that has their letters; where there is none, without accents. Others are drawn as ever."""
    asked, there = system_fonts
    frame, masks = np.zeros((120, 200, 3), np.uint8), np.zeros((120, 200), np.uint8)
    masks[60:100, 80:120] = 1

    def drawn(label):
        return draw_overlay(frame, masks, {1: f"1 {label} 0.93"})

    plain = drawn("naive")
    assert asked == [] and np.array_equal(drawn("naïve"), plain)
    sheets = [np.asarray(contact_sheet([frame], titles=[title], title=title)) for title in ("naïve", "naive")]
    assert len(asked) == len(visualization._WIDE_FONTS) and np.array_equal(*sheets)

    visualization._wide_font.cache_clear()
    there["DejaVuSans.ttf"] = visualization._font(17)  # stands for it, and is larger than labels usually are
    wide = drawn("naïve")
    assert np.array_equal(drawn("naive"), plain)
    rows, usual = (np.flatnonzero((image[:60] != 0).any(axis=(1, 2))) for image in (wide, plain))
    assert len(rows) > 1.4 * len(usual)  # all words in it, not only that with the letter


def test_a_speck_far_above_an_object_has_not_its_label():
    masks = np.zeros((240, 426), np.uint8)
    masks[100:200, 100:200] = 1
    frame, labels = np.zeros((240, 426, 3), np.uint8), {1: "1 dog 0.93"}
    wanted = draw_overlay(frame, masks, labels, contour=False)
    masks[20:22, 400:402] = 1
    drawn = draw_overlay(frame, masks, labels, contour=False)
    assert (drawn[80:] == wanted[80:]).all() and (wanted[80:100] != 0).any() and not (drawn[:20] != 0).any()


def place_of_label(masks: np.ndarray, number: int = 1) -> tuple[int, int, int, int]:
    """First and last row and column of the label's plate."""
    frame = np.zeros((*masks.shape, 3), np.uint8)
    labels = {number: f"{number} dog 0.93"}
    with_it, without = (draw_overlay(frame, masks, x, contour=False) for x in (labels, None))
    rows, columns = np.nonzero((with_it != without).any(-1))
    return rows.min(), rows.max(), columns.min(), columns.max()


def test_a_label_belongs_to_the_largest_piece():
    masks = np.zeros((240, 426), np.uint8)
    masks[120:230, 250:400] = 1
    wanted = place_of_label(masks)
    masks[40:70, 20:60] = 1  # a piece of a tenth of its size, higher up
    assert place_of_label(masks) == wanted
    left, right = wanted[2:]
    assert left <= 325 <= right


def test_a_label_stands_over_the_object_where_its_top_has_two_ends():
    masks = np.zeros((240, 426), np.uint8)
    masks[100:200, 100:300] = 1
    masks[100:180, 130:270] = 0  # a U
    masks[100:104, 130:140] = 1
    _, _, left, right = place_of_label(masks)
    assert masks[100, (left + right) // 2] == 1


def test_a_label_covers_nothing_of_its_object_in_a_large_frame():
    masks = np.zeros((1080, 1920), np.uint8)
    masks[307:700, 500:900] = 1
    first, last, *_ = place_of_label(masks)
    assert last == 306 and first > 250


def test_the_label_of_a_small_object_at_the_upper_edge_is_below_it():
    masks = np.zeros((240, 426), np.uint8)
    masks[3:20, 200:230] = 1
    first, last, *_ = place_of_label(masks)
    assert first >= 20 and last < 40
    masks[3:200, 200:230] = 1  # a large one is not hidden by it
    first, last, *_ = place_of_label(masks)
    assert first == 0


@pytest.mark.parametrize("number", range(1, 17))
def test_labels_can_be_read_on_every_colour(number):
    """The ink has the better contrast of black and white, as WCAG 2 measures it, and at least 4.4."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(color) / 255]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    masks = np.zeros((240, 426), np.uint8)
    masks[100:200, 100:300] = number
    first, last, left, right = place_of_label(masks, number)
    out = draw_overlay(np.zeros((240, 426, 3), np.uint8), masks, {number: f"{number} dog 0.93"}, contour=False)
    plate = out[first:last, left:right].reshape(-1, 3).astype(int)
    strongest = plate[np.abs(plate - color_of(number)).sum(1).argmax()]
    ink = np.full(3, 255 if luminance(strongest) > luminance(color_of(number)) else 0)
    high, low = sorted((luminance(ink), luminance(color_of(number))), reverse=True)
    assert (high + 0.05) / (low + 0.05) > 4.4


def test_an_overlay_of_what_the_processor_gives():
    """A PIL image, and a tensor of ids."""
    frame, masks = np.full((40, 60, 3), 90, np.uint8), np.zeros((40, 60), np.int32)
    masks[10:20, 10:30] = 3
    wanted = draw_overlay(frame, masks, {3: "3 dog"})
    assert np.array_equal(draw_overlay(Image.fromarray(frame), torch.from_numpy(masks), {3: "3 dog"}), wanted)


def test_labels_of_near_objects_do_not_cover_each_other():
    """Three objects that begin at about the same place: each label can be read whole, the first at its own place."""
    masks = np.zeros((240, 426), np.uint8)
    for number in (1, 2, 3):
        masks[60 + 4 * number : 200, 100 + 20 * number : 120 + 20 * number] = number
    frame, labels = np.zeros((240, 426, 3), np.uint8), {n: f"{n} person 0.9{n}" for n in (1, 2, 3)}
    together = draw_overlay(frame, masks, labels, contour=False)
    for number in labels:
        alone = draw_overlay(frame, masks, {number: labels[number]}, contour=False)
        plate = (alone == color_of(number)).all(axis=2)
        rows, columns = np.flatnonzero(plate.sum(axis=1) > 30), np.flatnonzero(plate.sum(axis=0) > 5)
        text = alone[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        down = [(together[top : top + len(text), columns[0] : columns[-1] + 1] == text).all() for top in range(200)]
        assert any(down) and (number > 1 or down[rows[0]])


@pytest.mark.parametrize("height, width", [(1, 1), (1, 200), (5, 5), (200, 1), (12, 300)])
def test_labels_fit_into_any_frame(height, width):
    masks = np.ones((height, width), np.uint8)
    out = draw_overlay(
        np.zeros((height, width, 3), np.uint8), masks, {1: "a label that is longer than the frame", 2: ""}
    )
    assert out.shape == (height, width, 3)
    draw_overlay(np.zeros((height, width, 3), np.uint8), masks, {1: ""})
    draw_overlay(np.zeros((height, width, 3), np.uint8), masks, {1: "two\nlines"})


def test_object_labels():
    objects = [
        {"id": 3, "label": "dog", "score": 0.9712},
        {"id": 4, "label": None, "score": None},
        {"id": 5, "label": None, "score": np.float32(1)},
        {"id": 6, "label": "cat", "score": 0.31},
        {"id": 7, "label": "cat", "score": None},
    ]
    assert object_labels(objects) == {3: "3 dog 0.97", 4: "4", 5: "5 1.00", 6: "6 cat? 0.31", 7: "7 cat"}


def test_overlay_refuses():
    frame, masks = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)
    for bad_frame in (np.zeros((4, 6), np.uint8), np.zeros((4, 6, 3))):
        with pytest.raises(ValueError, match="frame is"):
            draw_overlay(bad_frame, masks)
    for bad_masks in (np.zeros((6, 4), np.uint8), np.zeros((4, 6)), np.zeros((4, 6), bool)):
        with pytest.raises(ValueError, match="masks are"):
            draw_overlay(frame, bad_masks)
    with pytest.raises(ValueError, match="alpha"):
        draw_overlay(frame, masks, alpha=2)


def test_contact_sheet():
    frames = [np.full((30, 40, 3), 10 * i, np.uint8) for i in range(5)]
    frames[4] = frames[4][:20]
    plain = contact_sheet(frames, columns=2)
    assert isinstance(plain, Image.Image) and plain.mode == "RGB"
    assert plain.size == (2 * 44 + 4, 3 * 34 + 4)
    pixels = np.asarray(plain)
    for index, frame in enumerate(frames):
        y, x = 4 + index // 2 * 34, 4 + index % 2 * 44
        assert np.array_equal(pixels[y : y + len(frame), x : x + 40], frame)
    assert (pixels[-34:, -44:] == 255).all()  # the empty last cell

    titled = contact_sheet(frames, columns=2, titles=list("abcde"), title="five frames")
    assert titled.width == plain.width
    pixels = np.asarray(titled)
    row_height = (titled.height - 4 - 16) // 3  # a line is 16 pixels high here
    for index, frame in enumerate(frames):
        y, x = 4 + 16 + 16 + index // 2 * row_height, 4 + index % 2 * 44
        assert np.array_equal(pixels[y : y + len(frame), x : x + 40], frame)
        assert (pixels[y - 16 : y - 2, x : x + 40] < 100).any()  # its letter
    assert (pixels[:16] < 100).any()
    assert contact_sheet(frames[:1], columns=9).size == (48, 38)
    with pytest.raises(ValueError, match="empty"):
        contact_sheet([])
    with pytest.raises(ValueError, match="titles"):
        contact_sheet(frames, titles=["one"])
    with pytest.raises(ValueError, match="columns"):
        contact_sheet(frames, columns=0)
