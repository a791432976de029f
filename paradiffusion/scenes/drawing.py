"""Drawing of the built-in scenes, the same pixels on every machine."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from paradiffusion.randomness import seed_from
from paradiffusion.scenes.world import BACKGROUNDS, CHALK, COLOURS, DARK_BACKGROUNDS, INK, Background, Rgb, Scene, SceneObject

SUPERSAMPLING = 4


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, ``scene.width`` x ``scene.height``; a function of the scene."""
    rng = random.Random(seed_from("imperfections", scene.imperfection))
    jitter = 12 if scene.imperfection else 0
    ground = _shifted(BACKGROUNDS[scene.background.colour], rng, jitter // 2)
    picture = _background(scene.width, scene.height, ground, scene.background)
    line = CHALK if scene.background.colour in DARK_BACKGROUNDS else INK
    for item in scene.objects:
        _draw_object(picture, item, _shifted(COLOURS[item.colour], rng, jitter), line)
    return _weathered(picture, rng) if scene.imperfection else picture


def cleanliness(scene: Scene, picture: Image.Image) -> float:
    """How near a picture of a scene is to the clean drawing of it: minus the mean difference in levels of 255, so 0 at most."""
    if not scene.imperfection:
        return 0.0
    if not scene.imperfection:
        return 0.0
    clean = np.asarray(draw(replace(scene, imperfection=0)), dtype=np.float32)
    return -float(np.abs(np.asarray(picture, dtype=np.float32) - clean).mean())


def _shifted(colour: Rgb, rng: random.Random, jitter: int) -> Rgb:
    red, green, blue = (min(255, max(0, round(c + (2 * rng.random() - 1) * jitter))) for c in colour)
    return red, green, blue


def mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """Colour ``a`` with ``share`` of ``b`` mixed in."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _background(width: int, height: int, colour: Rgb, background: Background) -> Image.Image:
    dark = background.colour in DARK_BACKGROUNDS
    strength = pattern_strength(width, height, background.pattern)[..., None]
    # The pattern is a faint shade: lighter on dark grounds, darker on light ones.
    shade = np.asarray(mix(colour, CHALK if dark else INK, 0.11), dtype=np.float32)
    ground = np.asarray(colour, dtype=np.float32)
    return Image.fromarray(np.rint(ground + (shade - ground) * strength).astype(np.uint8))


@lru_cache(maxsize=64)
def pattern_strength(width: int, height: int, pattern: str) -> np.ndarray:
    """How much of the shade each pixel has, float32 [H, W] in 0..1."""
    if pattern == "plain":
        return np.zeros((height, width), dtype=np.float32)
    if pattern == "gradient":
        return np.repeat(np.linspace(0, 1, height, dtype=np.float32)[:, None], width, axis=1)
    scale, step = SUPERSAMPLING, min(width, height) / 8
    big = Image.new("L", (width * scale, height * scale))
    pen = ImageDraw.Draw(big)
    if pattern == "stripes":
        for i in range(math.ceil(width / step)):
            pen.rectangle((i * step * scale, 0, (i + 0.5) * step * scale - 1, height * scale), fill=255)
    else:
        radius = 0.27 * step
        for j in range(math.ceil(height / step)):
            for i in range(math.ceil(width / step)):
                x, y = (i + 0.5) * step, (j + 0.5) * step
                pen.ellipse([scale * v for v in (x - radius, y - radius, x + radius, y + radius)], fill=255)
    return np.asarray(big.reduce(scale), dtype=np.float32) / 255


@cache
def outline_of(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape inside the box -1..1, y downwards; circles and hearts as fine polygons."""
    if shape in ("circle", "ring"):
        return tuple((math.cos(t), math.sin(t)) for t in np.linspace(0, 2 * math.pi, 48, endpoint=False))
    if shape == "square":
        return (-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)
    if shape == "triangle":
        return (0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)
    if shape == "diamond":
        return (0.0, -1.0), (0.78, 0.0), (0.0, 1.0), (-0.78, 0.0)
    if shape == "star":
        tips = [(1.0 if i % 2 == 0 else 0.46, math.pi * (i / 5 - 0.5)) for i in range(10)]
        return tuple((r * math.cos(t), r * math.sin(t) + 0.05) for r, t in tips)
    if shape == "cross":
        a, b = 0.36, 0.98
        return ((-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a),
                (-a, -a))  # fmt: skip
    if shape == "heart":
        curve = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        y = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in curve]
        return tuple((math.sin(t) ** 3, -(v + 2.5) / 15) for t, v in zip(curve, y, strict=True))
    raise ValueError(f"no such shape: {shape}")


def _draw_object(picture: Image.Image, item: SceneObject, colour: Rgb, line: Rgb) -> None:
    scale, radius = SUPERSAMPLING, item.radius
    left, top = math.floor(item.cx - radius) - 1, math.floor(item.cy - radius) - 1
    side = math.ceil(2 * radius) + 3
    cx, cy = (item.cx - left) * scale, (item.cy - top) * scale
    reach = radius * scale
    corners = [(cx + x * reach, cy + y * reach) for x, y in outline_of(item.shape)]
    mask = Image.new("L", (side * scale, side * scale))
    pen = ImageDraw.Draw(mask)
    pen.polygon(corners, fill=255)
    paint = Image.new("RGB", mask.size, colour)
    brush = ImageDraw.Draw(paint)
    if item.texture == "striped":
        step = 0.7 * reach
        shade = mix(colour, line, 0.5)
        for k in range(-8, 9):
            x = cx + (k - 0.2) * step
            brush.line([(x - 2 * reach, cy + 2 * reach), (x + 2 * reach, cy - 2 * reach)], shade, round(0.27 * step))
    elif item.texture == "outlined":
        # Half of the line falls outside the mask, so that the outline lies within the shape. The points of a star
        # leave little room inside: a line as thick as elsewhere would hide the colour of a small one.
        thickness = 0.18 if item.shape == "star" else 0.28
        brush.line([*corners, corners[0], corners[1]], line, round(thickness * reach), joint="curve")
    if item.shape == "ring":
        hole = Image.new("L", mask.size)
        inner = 0.5 * reach
        ImageDraw.Draw(hole).ellipse((cx - inner, cy - inner, cx + inner, cy + inner), fill=255)
        mask = ImageChops.subtract(mask, hole)
    picture.paste(paint.reduce(scale), (left, top), mask.reduce(scale))


def _weathered(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Small faults of web pictures: light that falls off to one side, sometimes a soft focus; colours stay readable."""
    tilt_x, tilt_y = (0.05 * (2 * rng.random() - 1) for _ in range(2))
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(0.4 * picture.height / 64))
    x = np.linspace(-1, 1, picture.width, dtype=np.float32)[None, :, None]
    y = np.linspace(-1, 1, picture.height, dtype=np.float32)[:, None, None]
    lit = np.asarray(picture, dtype=np.float32) * (1 + tilt_x * x + tilt_y * y)
    return Image.fromarray(np.rint(lit).clip(0, 255).astype(np.uint8))
