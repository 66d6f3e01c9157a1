"""Every colour of the report, light and dark, in one place: the page, the SVG files and the PNG files read it.

Series colours are told apart by colour-blind readers in lightness or hue, and are never the only channel: runs also
differ in marker shape, teacher and student in dashes; colour and marker together repeat after 40 runs. The heat scale
is one hue whose lightness changes steadily, so its order survives any kind of colour blindness; text on every step of
it keeps a contrast of 4.5 (tested).
"""

from __future__ import annotations

SERIES = 8  # series colours before they repeat
MARKERS = ("circle", "square", "diamond", "triangle", "plus")  # their number has no factor in common with SERIES
HEAT_EDGES = (0.05, 0.2, 0.5, 0.8, 1.3, 2.0)  # nats; a token's heat is the number of edges at or below its entropy

LIGHT = {
    "paper": "#fbfaf7",
    "card": "#ffffff",
    "ink": "#1f1e1b",
    "muted": "#68645d",
    "line": "#e5e1d8",
    "faint": "#f2efe8",
    "good": "#1d6b4f",
    "bad": "#a63a2b",
    "c0": "#2b57b3",
    "c1": "#bf5312",
    "c2": "#16785a",
    "c3": "#84489e",
    "c4": "#8a6b00",
    "c5": "#b02c66",
    "c6": "#2a7f9e",
    "c7": "#5b5852",
    "h0": "#ffffff",
    "h1": "#fdf3dd",
    "h2": "#fbe4b8",
    "h3": "#f8cf8d",
    "h4": "#f3b366",
    "h5": "#eb9548",
    "h6": "#df7835",
}
DARK = {
    "paper": "#151513",
    "card": "#1c1c19",
    "ink": "#efede7",
    "muted": "#a8a49b",
    "line": "#35332e",
    "faint": "#24231f",
    "good": "#6cc7a0",
    "bad": "#f0907f",
    "c0": "#8fb0f7",
    "c1": "#f29d62",
    "c2": "#62c6a0",
    "c3": "#cba1e4",
    "c4": "#dcc057",
    "c5": "#f58cb7",
    "c6": "#80c9e4",
    "c7": "#bab7b0",
    "h0": "#1c1c19",
    "h1": "#2d2618",
    "h2": "#41311b",
    "h3": "#583d1c",
    "h4": "#6b461b",
    "h5": "#804f1b",
    "h6": "#985a1a",
}


def tone(index: int) -> str:
    """Name of the series colour of the ``index``-th run or series."""
    return f"c{index % SERIES}"


def marker(index: int) -> str:
    """Name of the marker of the ``index``-th run."""
    return MARKERS[index % len(MARKERS)]


def heat(entropy: float) -> int:
    """Step of the heat scale, 0 to 6, of a teacher entropy in nats."""
    return sum(edge <= entropy for edge in HEAT_EDGES)


def css_variables(colours: dict[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in colours.items())


def contrast(one: str, other: str) -> float:
    """WCAG 2.1 contrast ratio of two ``#rrggbb`` colours, 1 to 21."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
