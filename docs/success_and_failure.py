"""Draw docs/success-and-failure.png: five frames of a success over five of a failure, each row with its reason.

python docs/success_and_failure.py rollouts/EVAL-…      (a rollout folder that has both, with videos)
"""

import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAMES, BAR = 5, 26  # a row's frames; height in pixels of the line above it


def row(folder: Path, episode: dict) -> Image.Image:
    video = iio.imread(folder / episode["video"])
    frames = video[np.linspace(0, len(video) - 1, FRAMES).round().astype(int)]
    side = frames.shape[1]
    image = Image.new("RGB", (FRAMES * side, side + BAR), "white")
    image.paste(Image.fromarray(np.concatenate(list(frames), axis=1)), (0, BAR))
    what = "success" if episode["success"] else "failure"
    text = f"{what}  ·  “{episode['instruction']}”  ·  {episode['reason']}"
    font = ImageFont.load_default(size=15)
    ImageDraw.Draw(image).text((4, 4), text, fill="#1a7f37" if episode["success"] else "#b42318", font=font)
    return image


def main(folder: Path) -> None:
    episodes = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    rows = [row(folder, next(e for e in episodes if e["success"] is wanted)) for wanted in (True, False)]
    both = Image.new("RGB", (rows[0].width, sum(r.height for r in rows)))
    for number, image in enumerate(rows):
        both.paste(image, (0, number * rows[0].height))
    both.quantize(128, dither=Image.Dither.NONE).save(
        Path(__file__).with_name("success-and-failure.png"), optimize=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
