"""A look at a data set as one page for offline reading, and its frames as one PNG: what doctor.py shows before training costs a day."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from prismatic.atomic import write_whole, writing_to
from prismatic.data.frames import FrameCache
from prismatic.data.look import BINS, Look
from prismatic.image import center_crop, decode_jpeg, encode_jpeg, resize_lanczos3
from prismatic.pages.gallery import render

EPISODES_SHOWN = 8
INSTRUCTIONS_SHOWN = 30
IMAGE_SIZE = 224  # pixels a side, of what OpenVLA sees
WIDTH, HEIGHT = 200, 40  # of a histogram, in its own units
CAPTION = 14  # pixels under an image of the contact sheet

Shots = dict[str, np.ndarray]  # name → (S, S, 3) uint8: images of an episode as the policy will see them


def write_page(cache: FrameCache, look: Look, reading: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """`folder/<data set>.html` and its contact sheet `.png`. reading: sentences about how it was read."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    picked = np.unique(np.linspace(0, len(look.lengths) - 1, EPISODES_SHOWN).round().astype(int))
    episodes = {number: _shots(cache, number) for number in picked.tolist() if look.lengths[number]}
    page, sheet = folder / f"{cache.name}.html", folder / f"{cache.name}.png"
    cards = [
        {
            "title": f"episode {number}, {look.lengths[number]} steps",
            "instruction": cache.instructions[number],
            "shots": {name: base64.b64encode(encode_jpeg(pixels)).decode() for name, pixels in shots.items()},
        }
        for number, shots in episodes.items()
    ]
    content = render(
        "dataset.html.jinja",
        name=cache.name,
        look=look,
        reading=reading,
        rate=f", {cache.fps:g} Hz" if cache.fps else ", rate not recorded",
        median=f"{np.median(look.lengths):g}",
        seen=f"resized to {IMAGE_SIZE} pixels, the centre cropped (90 % of the area, as with --image_aug)",
        cards=cards,
        paths=[_path(dimension.counts) for dimension in look.dimensions],
        bands=[_band(d.low, d.high, d.q01, d.q99) for d in look.dimensions],
        length_path=_path(np.histogram(look.lengths, min(BINS, len(look.lengths)))[0].tolist()),
        most=INSTRUCTIONS_SHOWN,
    )
    write_whole(page, content)
    write_whole(sheet, _contact_sheet(episodes))
    return page, sheet


def _shots(cache: FrameCache, episode: int) -> Shots:
    frames = np.flatnonzero(cache.episode == episode)
    views = (("image", cache.image_bytes), ("wrist", cache.wrist_bytes))[: 1 + cache.has_wrist]
    return {
        f"{step} {view}": center_crop(resize_lanczos3(decode_jpeg(read(int(frame))), IMAGE_SIZE))
        for step, frame in (("first", frames[0]), ("last", frames[-1]))
        for view, read in views
    }


def _path(counts: Sequence[int]) -> str:
    """Bars as one SVG path."""
    most, width = max(counts) or 1, WIDTH / len(counts)
    return "".join(
        f"M{n * width:.1f} {HEIGHT}v{-HEIGHT * count / most:.1f}h{width:.1f}V{HEIGHT}z"
        for n, count in enumerate(counts)
    )


def _band(low: float, high: float, q01: float, q99: float) -> tuple[float, float]:
    """Left and width of the part between the quantiles."""
    scale = WIDTH / (high - low) if high > low else 0.0
    return round((q01 - low) * scale, 1), round((q99 - q01) * scale, 1) if scale else WIDTH


def _contact_sheet(episodes: dict[int, Shots]) -> bytes:
    """A row an episode: PNG."""
    columns, side = max(map(len, episodes.values())), IMAGE_SIZE // 2
    sheet = Image.new("RGB", (columns * side, len(episodes) * (side + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (number, shots) in enumerate(episodes.items()):
        for column, (name, pixels) in enumerate(shots.items()):
            left, top = column * side, row * (side + CAPTION)
            sheet.paste(Image.fromarray(pixels).resize((side, side)), (left, top))
            draw.text((left + 2, top + side + 1), f"{number} {name}", fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
