"""Draw a contact sheet: five frames of an episode that failed over five of one that succeeded, each row with its reason.

python docs/success_and_failure.py SHEET.png rollouts/EVAL-… [rollouts/EVAL-…]      (rollout folders with videos: the failure's, the success's)
"""

import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAMES, BAR = 5, 26  # a row's frames; height in pixels of the line above it


def row(folder: Path, *, success: bool) -> Image.Image | None:
    """The first such episode of a rollout folder that has a video; None where it has none."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    found = [e for e in map(json.loads, lines) if e["success"] is success and e["video"]]
    if not found:
        return None
    episode = found[0]
    video = iio.imread(folder / episode["video"])
    frames = video[np.linspace(0, len(video) - 1, FRAMES).round().astype(int)]
    side = frames.shape[1]
    image = Image.new("RGB", (FRAMES * side, side + BAR), "white")
    image.paste(Image.fromarray(np.concatenate(list(frames), axis=1)), (0, BAR))
    text = f"{'success' if success else 'failure'}  ·  “{episode['instruction']}”  ·  {episode['reason']}"
    sizes = (ImageFont.load_default(size=size) for size in range(15, 8, -1))
    font = next(font for font in sizes if font.getlength(text) < image.width - 8 or font.size < 10)  # pyright: ignore
    ImageDraw.Draw(image).text((4, 4), text, fill="#1a7f37" if success else "#b42318", font=font)
    return image


def main(sheet: Path, of_failure: Path, of_success: Path | None = None) -> None:
    """Write the sheet with what there is."""
    rows = [row(of_failure, success=False), row(of_success or of_failure, success=True)]
    drawn = [np.asarray(image) for image in rows if image]
    if not drawn:
        sys.exit(f"no episode of {of_failure} has a video")
    Image.fromarray(np.concatenate(drawn)).quantize(128, dither=Image.Dither.NONE).save(sheet, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
