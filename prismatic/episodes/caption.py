"""A strip under a frame: the instruction, and how far the episode is or how it ended. The frame itself stays whole.

The font is the one that Pillow brings along: nothing is downloaded, and it is the same on every machine.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TEXT_SIZE, LINE, MARGIN = 12, 15, 5  # pixels
INK, SOFT, PAPER = (240, 240, 240), (170, 180, 190), (24, 28, 34)
COLOURS = {"success": (110, 210, 150), "failure": (250, 150, 120)}  # of a status that begins with the word


class Caption:
    """Draws one episode's instruction under its frames, all of one width. The strip's height is even, as videos need it."""

    def __init__(self, instruction: str, width: int) -> None:
        self.width = width
        self._font = ImageFont.load_default(TEXT_SIZE)
        self._lines = self._wrapped(instruction)
        height = 2 * MARGIN + LINE * (len(self._lines) + 1)
        self.height = height + height % 2

    def draw(self, frame: np.ndarray, status: str) -> np.ndarray:
        """(H, width, 3) uint8 → (H + height, width, 3)."""
        strip = Image.new("RGB", (self.width, self.height), PAPER)
        pen = ImageDraw.Draw(strip)
        for row, line in enumerate(self._lines):
            pen.text((MARGIN, MARGIN + LINE * row), line, fill=INK, font=self._font)
        colour = COLOURS.get(status.split(" ")[0], SOFT)
        pen.text((MARGIN, MARGIN + LINE * len(self._lines)), status, fill=colour, font=self._font)
        return np.concatenate([frame, np.asarray(strip)])

    def _wrapped(self, text: str) -> list[str]:
        """Lines that fit; a single word that does not is cut by the edge."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self._font.getlength(longer) > self.width - 2 * MARGIN:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines
