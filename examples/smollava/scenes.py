"""Draws scenes and charts together with an exact description of each."""

import math
import random

from PIL import Image, ImageDraw

SIDE = 224
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 90, 210),
    "yellow": (240, 210, 50),
    "orange": (240, 140, 30),
    "purple": (130, 60, 170),
    "pink": (240, 130, 180),
    "brown": (120, 75, 40),
    "black": (20, 20, 20),
}
GROUNDS = {"white": (255, 255, 255), "gray": (190, 190, 190), "light blue": (200, 225, 245)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
THINGS = ("apples", "bikes", "books", "boats", "cars", "cats", "dogs", "eggs", "hats", "trees")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def place(row: int, column: int) -> str:
    """Name a cell of the three by three grid."""
    if (row, column) == (1, 1):
        return "in the center"
    if row == 1:
        return f"in the middle on the {COLUMNS[column]}"
    if column == 1:
        return f"at the {ROWS[row]} in the center"
    return f"at the {ROWS[row]} {COLUMNS[column]}"


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: tuple, colour: tuple) -> None:
    """Draw one shape into `box` (left, top, right, bottom)."""
    left, top, right, bottom = box
    x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, top), (right, bottom), (left, bottom)], fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=max(3, int(radius / 3)))
    elif shape == "cross":
        third = radius / 3
        pen.rectangle((left, y - third, right, y + third), fill=colour)
        pen.rectangle((x - third, top, x + third, bottom), fill=colour)
    else:
        points = []
        for corner in range(10):
            reach = radius if corner % 2 == 0 else radius * 0.42
            angle = math.pi * corner / 5 - math.pi / 2
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        pen.polygon(points, fill=colour)


def draw_scene(chance: random.Random) -> tuple[Image.Image, str]:
    """Draw one to five shapes on a grid and describe them row by row."""
    ground = chance.choice(list(GROUNDS))
    picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[ground])
    pen = ImageDraw.Draw(picture)
    cells = chance.sample([(row, column) for row in range(3) for column in range(3)], chance.randint(1, 5))
    sentences, shapes = [], []
    for row, column in sorted(cells):
        shape, colour = chance.choice(SHAPES), chance.choice(list(COLOURS))
        large = chance.random() < 0.5
        radius = chance.randint(27, 33) if large else chance.randint(14, 18)
        x = SIDE * (2 * column + 1) / 6 + chance.randint(-3, 3)
        y = SIDE * (2 * row + 1) / 6 + chance.randint(-3, 3)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw_shape(pen, shape, box, COLOURS[colour])
        size = "large" if large else "small"
        shapes.append(f"{size} {colour} {shape}")
        sentences.append(f"There is a {size} {colour} {shape} {place(row, column)}.")
    count = len(cells)
    text = f"The picture shows {NUMBERS[count]} shape{'s' * (count > 1)} on a {ground} background. "
    text += " ".join(sentences)
    listed = shapes[0] if count == 1 else ", a ".join(shapes[:-1]) + f" and a {shapes[-1]}"
    return picture, text + f" In all, from top to bottom, it shows a {listed}."


def draw_chart(chance: random.Random) -> tuple[Image.Image, str]:
    """Draw a bar chart and describe its bars from left to right."""
    picture = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    count = chance.randint(3, 5)
    things = chance.sample(THINGS, count)
    heights = [chance.randint(1, 10) for _ in things]
    colours = chance.sample(list(COLOURS), count)
    base, left, step = 190, 24, 190 / count
    pen.line((left, 12, left, base, SIDE - 6, base), fill=(0, 0, 0), width=2)
    sentences = []
    for index, (thing, height, colour) in enumerate(zip(things, heights, colours, strict=True)):
        x = left + 6 + index * step
        pen.rectangle((x, base - 17 * height, x + step * 0.7, base), fill=COLOURS[colour])
        pen.text((x, base + 6), thing, fill=(0, 0, 0))
        pen.text((x + 4, base - 17 * height - 12), str(height), fill=(0, 0, 0))
        sentences.append(f"The {colour} bar for {thing} reaches {height}.")
    tallest = things[heights.index(max(heights))]
    lowest = things[heights.index(min(heights))]
    text = f"A bar chart with {NUMBERS[count]} bars. From left to right the bars show "
    text += ", ".join(things[:-1]) + f" and {things[-1]}. " + " ".join(sentences)
    return picture, text + f" The tallest bar is {tallest}, and the lowest bar is {lowest}."


def draw(index: int, seed: int = 0) -> tuple[Image.Image, str]:
    """Draw picture `index`: three scenes to one chart, the same for the same seed."""
    chance = random.Random(f"{seed}-{index}")
    return draw_chart(chance) if index % 4 == 3 else draw_scene(chance)
