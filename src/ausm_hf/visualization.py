"""Masks drawn on frames, and frames laid out on a sheet."""

import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from math import ceil
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage


@lru_cache
def davis_palette() -> np.ndarray:
    """The colours of indexed masks: the PASCAL VOC colour map, which DAVIS uses too.

    Returns:
        uint8 array (256, 3) of RGB colours; row 0, the background, is black. Read-only.
    """
    index = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):  # bits 0, 1, 2 of the index give the top bit of R, G, B; bits 3, 4, 5 the next; and so on
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    palette.flags.writeable = False
    return palette


def indexed_image(masks: np.ndarray) -> Image.Image:
    """Masks as an image whose pixels are their ids, as DAVIS stores them: with its palette, or 16 bits above 255.

    Args:
        masks: integers (H, W), 0 to 65535.
    """
    if masks.max(initial=0) > 255:
        return Image.fromarray(masks.astype(np.uint16))
    image = Image.fromarray(masks.astype(np.uint8))
    image.putpalette(davis_palette().tobytes())
    return image


# Colours that people tell apart, the easiest first. (In DAVIS's palette 1, 8 and 9 are dark reds and 7 is grey.)
DRAWN_COLORS = np.array(
    [
        (0, 0, 0),  # the background
        (67, 99, 216),
        (245, 130, 49),
        (60, 180, 75),
        (240, 50, 230),
        (255, 225, 25),
        (230, 25, 75),
        (66, 212, 244),
        (145, 30, 180),
        (191, 239, 69),
        (250, 190, 212),
        (0, 150, 150),
        (154, 99, 36),
        (220, 190, 255),
        (170, 255, 195),
        (128, 0, 0),
        (128, 128, 0),
    ],
    np.uint8,
)


def color_of(object_id: int) -> tuple[int, int, int]:
    """The RGB colour in which an object is drawn. There are 16, taken in turn; 0 is black."""
    return tuple(DRAWN_COLORS[_color_index(np.asarray(object_id))].tolist())


def _color_index(ids: np.ndarray) -> np.ndarray:
    if ids.max(initial=0) >= len(DRAWN_COLORS) or ids.min(initial=0) < 0:
        ids = np.where(ids == 0, 0, (ids - 1) % (len(DRAWN_COLORS) - 1) + 1)
    return ids.astype(np.uint8, copy=False)


def object_labels(objects: list[dict]) -> dict[int, str]:
    """What to write beside each object: its id, its label and its score as far as known, as in `"3 dog 0.97"`.

    A label with a score below 0.5 has a question mark: `"3 dog? 0.31"`.

    Args:
        objects: dicts `{"id": int, "label": str | None, "score": float | None}`.
    """
    labels = {}
    for item in objects:
        label, score = item["label"], item["score"]
        words = [str(item["id"])]
        if label is not None:
            words.append(label if score is None or score >= 0.5 else f"{label}?")
        if score is not None:
            words.append(f"{score:.2f}")
        labels[item["id"]] = " ".join(words)
    return labels


def draw_overlay(
    frame: np.ndarray,
    masks: np.ndarray,
    labels: dict[int, str] | None = None,
    alpha: float = 0.5,
    contour: bool = True,
) -> np.ndarray:
    """Draws the objects of a frame on it, each in its own colour ([`color_of`]).

    Args:
        frame: uint8 RGB array (H, W, 3), or what numpy makes one of, such as an RGB image; it is not changed.
        masks: integer array or tensor (H, W): 0 background, else the id of the object that the pixel belongs to.
        labels: text to write above each object's largest piece, by id, or where there is room; those of objects not in
            `masks` are left out.
        alpha: how much of the colour is mixed in, 0 (none) to 1 (all).
        contour: whether to draw the objects' outlines, half way from their colour to white.

    Returns:
        uint8 RGB array (H, W, 3).

    Raises:
        ValueError: if `frame` or `masks` are not of these types, or differ in height or width.
    """
    frame, masks = np.asarray(frame), np.asarray(masks)
    _check_masks(frame, masks)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; wanted is 0 to 1")
    height, width = masks.shape

    # Pillow looks colours up and mixes them several times faster than numpy's indexing does.
    index = _color_index(masks)
    colors = Image.fromarray(index)
    colors.putpalette(DRAWN_COLORS.tobytes())
    strength = Image.fromarray((masks != 0).astype(np.uint8) * np.uint8(round(alpha * 255)))
    out = np.array(Image.composite(colors.convert("RGB"), Image.fromarray(frame), strength))

    if contour:
        edges = _inner_edges(masks, thickness=max(1, round(height / 480)))
        out[edges] = DRAWN_COLORS[index[edges]] // 2 + 128

    plates: list[tuple[slice, slice]] = []
    for object_id, text in (labels or {}).items():
        place = _place_of(object_id, masks)
        if place is not None:
            plates.append(_write(out, text, place, color_of(object_id), others=plates))
    return out


def _check_masks(frame: np.ndarray, masks: np.ndarray):
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"frame is {frame.dtype} {frame.shape}; wanted is uint8 (height, width, 3)")
    if not np.issubdtype(masks.dtype, np.integer) or masks.shape != frame.shape[:2]:
        raise ValueError(f"masks are {masks.dtype} {masks.shape}; wanted are integers of shape {frame.shape[:2]}")


def _inner_edges(masks: np.ndarray, thickness: int) -> np.ndarray:
    """Pixels of objects that have something else `thickness` pixels away: bool (H, W)."""
    edges = np.zeros(masks.shape, dtype=bool)
    across = masks[:, thickness:] != masks[:, :-thickness]
    edges[:, thickness:] |= across
    edges[:, :-thickness] |= across
    down = masks[thickness:] != masks[:-thickness]
    edges[thickness:] |= down
    edges[:-thickness] |= down
    edges &= masks != 0
    return edges


def _place_of(object_id: int, masks: np.ndarray) -> tuple[int, int, int] | None:
    """
    Of an object's largest piece the first row, the row after its last, and the column of the middle of its top; None
    where it isn't.
    """
    for step in (max(1, min(masks.shape) // 120), 1):  # of large frames some of the pixels will do
        piece = masks[::step, ::step] == object_id
        if piece.any():
            break
    else:
        return None
    pieces, number = ndimage.label(piece)
    if number > 1:
        piece = pieces == np.bincount(pieces.flat)[1:].argmax() + 1
    rows = np.flatnonzero(piece.any(1))
    columns = np.flatnonzero(piece[rows[0]])
    center, top = step * int(columns[len(columns) // 2]), step * int(rows[0])
    passed_over = masks[max(0, top - step + 1) : top, step * columns[0] : step * columns[-1] + 1] == object_id
    above = int(np.count_nonzero(passed_over.any(1)))
    return top - above, step * int(rows[-1] + 1), center


def _write(
    image: np.ndarray,
    text: str,
    place: tuple[int, int, int],
    color: tuple[int, int, int],
    others: list[tuple[slice, slice]],
) -> tuple[slice, slice]:
    """
    Writes `text` into `image` on a plate of `color` above what is at `place` (see [`_place_of`]). Where the image ends
    or another plate is, it is below that, if it is small, or else farther down, as long as there is room. Returns the
    plate's rows and columns.
    """
    first, end, center = place
    height, width = image.shape[:2]
    text, font = _with_font(text, max(10, height // 30))
    glyphs = np.concatenate([_glyphs(word, font) for word in text.split() or [""]], axis=1)[:height, :width]
    plate_height, plate_width = glyphs.shape
    left = min(max(0, center - plate_width // 2), width - plate_width)
    beside = [rows for rows, columns in others if columns.start < left + plate_width and left < columns.stop]
    near = [first - plate_height, *([end] if end - first < 4 * plate_height else [])]
    farther = sorted(
        {max(0, first - plate_height), *(rows.stop for rows in beside if rows.stop > first - plate_height)}
    )
    top = max(0, first - plate_height)
    for candidate in [*near, *farther]:
        free = all(candidate + plate_height <= rows.start or rows.stop <= candidate for rows in beside)
        if free and 0 <= candidate <= height - plate_height:
            top = candidate
            break
    # The ink that stands out more, as WCAG measures it.
    luminance = np.dot((np.array(color) / 255) ** 2.2, (0.2126, 0.7152, 0.0722))
    ink = 0 if luminance > 0.179 else 255
    strength = glyphs[:, :, None] / np.float32(255)
    plate = np.array(color, np.float32) * (1 - strength) + ink * strength
    rows_and_columns = slice(top, top + plate_height), slice(left, left + plate_width)
    image[rows_and_columns] = plate.astype(np.uint8)
    return rows_and_columns


@lru_cache(maxsize=1024)  # words, not whole labels: a score of two digits is soon seen before
def _glyphs(word: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """The ink of one word in 0..255, as high as the line, half a space at either side: uint8 (height, width)."""
    space = max(2, ceil(font.getlength(" ") / 2))
    image = Image.new("L", (round(font.getlength(word)) + 2 * space, sum(font.getmetrics())))
    ImageDraw.Draw(image).text((space, 0), word, fill=255, font=font)
    return np.asarray(image)


def _with_font(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text as it can be written, and a font to write it in. Pillow's own font has boxes beyond ASCII."""
    if text.isascii():
        return text, _font(size)
    wide = _wide_font(size)
    if wide is not None:
        return text, wide
    letters = unicodedata.normalize("NFKD", text)
    return "".join(letter for letter in letters if not unicodedata.combining(letter)), _font(size)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
    "arial.ttf",
)


@lru_cache
def _wide_font(size: int) -> ImageFont.FreeTypeFont | None:
    """The first font of many letters that this system has, those of more letters first."""
    for name in _WIDE_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return None


def contact_sheet(
    frames: Sequence[np.ndarray],
    columns: int = 4,
    titles: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """Lays frames out on one picture, row by row.

    Args:
        frames: uint8 RGB arrays (H, W, 3); they may differ in size, each cell is as large as the largest.
        columns: cells per row.
        titles: a line above each frame.
        title: a line above all.

    Returns:
        `PIL.Image.Image` in RGB, on white.

    Raises:
        ValueError: without frames, for less than one column, or when `titles` are not as many as `frames`.
    """
    frames = [np.asarray(frame) for frame in frames]
    if len(frames) == 0:
        raise ValueError("frames is empty; wanted is at least one frame")
    if columns < 1:
        raise ValueError(f"columns is {columns}; wanted is at least 1")
    if titles is not None and len(titles) != len(frames):
        raise ValueError(f"titles are {len(titles)}, frames {len(frames)}; wanted is one title per frame")

    gap = 4
    cell_height = max(frame.shape[0] for frame in frames)
    cell_width = max(frame.shape[1] for frame in frames)
    size = max(10, cell_height // 16)
    line = round(1.6 * size)
    title_height = line if title is not None else 0
    row_height = cell_height + gap + (line if titles is not None else 0)
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)

    sheet = Image.new("RGB", (columns * (cell_width + gap) + gap, title_height + rows * row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    if title is not None:
        text, font = _with_font(title, size)
        draw.text((gap, gap), text, fill="black", font=font)
    for index, frame in enumerate(frames):
        x = gap + index % columns * (cell_width + gap)
        y = gap + title_height + index // columns * row_height
        if titles is not None:
            text, font = _with_font(titles[index], size)
            draw.text((x, y), text, fill="black", font=font)
            y += line
        sheet.paste(Image.fromarray(frame), (x, y))
    return sheet
