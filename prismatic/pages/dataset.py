"""A look at a data set as one page for offline reading, and its frames as one PNG: what doctor.py shows before training costs a day."""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from prismatic.atomic import write_whole
from prismatic.data.frames import FrameCache
from prismatic.data.look import BINS, Look
from prismatic.image import center_crop, decode_jpeg, encode_jpeg, resize_lanczos3
from prismatic.pages.gallery import render

EPISODES_SHOWN = 8
INSTRUCTIONS_SHOWN = 30
IMAGE_SIZE = 224  # pixels a side, of what OpenVLA sees
WIDTH, HEIGHT = 200, 40  # of a histogram, in its own units
CAPTION = 14  # pixels under an image of the contact sheet


class Shot(NamedTuple):
    """An image as the policy will see it."""

    name: str
    pixels: np.ndarray  # (S, S, 3) uint8


def write_page(
    cache: FrameCache, look: Look, reading: Sequence[str], folder: Path, *, crop: bool = True
) -> tuple[Path, Path]:
    """`folder/<data set>.html` and its contact sheet `.png`. reading: sentences about how it was read. crop: whether the policy crops the centre."""
    folder.mkdir(parents=True, exist_ok=True)
    picked = np.unique(np.linspace(0, len(look.lengths) - 1, EPISODES_SHOWN).round().astype(int))
    shots = {number: list(_shots(cache, number, crop=crop)) for number in picked.tolist() if look.lengths[number]}
    page, sheet = folder / f"{cache.name}.html", folder / f"{cache.name}.png"
    cards = [
        {
            "title": f"episode {number}, {look.lengths[number]} steps",
            "instruction": cache.instructions[number],
            "shots": [{"name": s.name, "data": base64.b64encode(encode_jpeg(s.pixels)).decode()} for s in found],
        }
        for number, found in shots.items()
    ]
    content = render(
        "dataset.html.jinja",
        name=cache.name,
        look=look,
        reading=reading,
        rate=f", {cache.fps:g} Hz" if cache.fps else ", rate not recorded",
        median=f"{np.median(look.lengths):g}",
        seen=f"resized to {IMAGE_SIZE} pixels"
        + (", the centre cropped (90 % of the area, as with --image_aug)" if crop else ""),
        cards=cards,
        paths=[_path(dimension.counts) for dimension in look.dimensions],
        bands=[_band(d.low, d.high, d.q01, d.q99) for d in look.dimensions],
        length_path=_path(np.histogram(look.lengths, min(BINS, len(look.lengths)))[0].tolist()),
        most=INSTRUCTIONS_SHOWN,
    )
    write_whole(page, content)
    write_whole(sheet, _contact_sheet(shots))
    return page, sheet


def _shots(cache: FrameCache, episode: int, *, crop: bool) -> Iterator[Shot]:
    frames = np.flatnonzero(cache.episode == episode)
    for step, frame in (("first", int(frames[0])), ("last", int(frames[-1]))):
        for view, read in (("image", cache.image_bytes), ("wrist", cache.wrist_bytes))[: 1 + cache.has_wrist]:
            pixels = resize_lanczos3(decode_jpeg(read(frame)), IMAGE_SIZE)
            yield Shot(f"{step} {view}", center_crop(pixels) if crop else pixels)


def _path(counts: Sequence[int]) -> str:
    """Bars as one SVG path."""
    most, width = max(counts) or 1, WIDTH / len(counts)
    bars = (
        f"M{n * width:.1f} {HEIGHT}v{-HEIGHT * count / most:.1f}h{width:.1f}V{HEIGHT}z"
        for n, count in enumerate(counts)
    )
    return "".join(bars)


def _band(low: float, high: float, q01: float, q99: float) -> tuple[float, float]:
    """Left and width of the part between the quantiles."""
    scale = WIDTH / (high - low) if high > low else 0.0
    return round((q01 - low) * scale, 1), round((q99 - q01) * scale, 1) if scale else WIDTH


def _contact_sheet(shots: dict[int, list[Shot]]) -> bytes:
    """A row an episode: PNG."""
    columns = max(len(found) for found in shots.values())
    side = IMAGE_SIZE // 2
    sheet = Image.new("RGB", (columns * side, len(shots) * (side + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (number, found) in enumerate(shots.items()):
        for column, shot in enumerate(found):
            place = column * side, row * (side + CAPTION)
            sheet.paste(Image.fromarray(shot.pixels).resize((side, side)), place)
            draw.text((place[0] + 2, place[1] + side + 1), f"{number} {shot.name}", fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
