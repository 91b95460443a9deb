"""Draw street scenes with their labels, in the folder layout and with the train ids of CityScapes.

The scenes stand in for CityScapes where it is not at hand: a pinhole camera in a street with buildings, trees, cars,
people, poles and signs, under changing light. The same seed draws the same files.

The file is long since every kind of thing in a street is drawn by a method of its own, which nothing else uses.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from .parsing import create_parser, output_folder

ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER = range(13)
CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(13, 19)
IGNORE = 255

CITIES = {'train': 'alphaville', 'val': 'betatown'}
CAMERA_HEIGHT = 1.5  # metres
NEAR, FAR = 3.0, 90.0  # metres: nearest and farthest things drawn
OVERSAMPLING = 2  # drawn larger and then shrunk, which smooths the edges

Colour = Sequence[float] | np.ndarray
Point = tuple[float, float, float]


class Canvas:
    """A picture and its labels, on which things are drawn from far to near by their place in the street.

    Coordinates are metres: x to the right of the camera, y above the ground, z ahead.
    """

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng = rng
        self.width, self.height = width * OVERSAMPLING, height * OVERSAMPLING
        self.focal = self.width * rng.uniform(0.75, 0.95)
        self.centre = self.width * rng.uniform(0.42, 0.58)
        self.horizon = self.height * rng.uniform(0.38, 0.48)
        self.haze = rng.uniform(0.002, 0.015)
        self.picture = Image.new('RGB', (self.width, self.height))
        self.labels = Image.new('L', (self.width, self.height), IGNORE)
        self._draw_picture = ImageDraw.Draw(self.picture)
        self._draw_labels = ImageDraw.Draw(self.labels)
        self.sky = self.vary(((150, 185, 225), (200, 205, 210), (225, 215, 200))[rng.integers(3)], 15)

    def vary(self, colour: Colour, amount: float = 12) -> np.ndarray:
        """A colour close to the given one."""
        return np.clip(np.asarray(colour) + self.rng.normal(0, amount, 3), 0, 255)

    def project(self, point: Point) -> tuple[float, float]:
        x, y, z = point
        z = max(z, 0.5)
        return self.centre + self.focal * x / z, self.horizon + self.focal * (CAMERA_HEIGHT - y) / z

    def _faded(self, colour: Colour, z: float) -> tuple[int, ...]:
        """The colour as it looks through `z` metres of haze."""
        clear = np.exp(-self.haze * z)
        return tuple(int(value) for value in clear * np.asarray(colour) + (1 - clear) * self.sky)

    def polygon(self, points: Iterable[Point], label: int, colour: Colour) -> None:
        points = list(points)
        corners = [self.project(point) for point in points]
        self._draw_picture.polygon(corners, fill=self._faded(colour, float(np.mean([z for _, _, z in points]))))
        self._draw_labels.polygon(corners, fill=label)

    def upright(self, left: float, right: float, low: float, high: float, z: float, label: int, colour: Colour) -> None:
        """A rectangle that faces the camera."""
        self.polygon(((left, low, z), (right, low, z), (right, high, z), (left, high, z)), label, colour)

    def ellipse(self, x: float, y: float, z: float, radii: tuple[float, float], label: int, colour: Colour) -> None:
        left, top = self.project((x - radii[0], y + radii[1], z))
        right, bottom = self.project((x + radii[0], y - radii[1], z))
        self._draw_picture.ellipse((left, top, right, bottom), fill=self._faded(colour, z))
        self._draw_labels.ellipse((left, top, right, bottom), fill=label)

    def fill_sky(self) -> None:
        """A gradient with clouds, down to the horizon."""
        rows = np.linspace(1.0, 0.0, int(self.horizon) + 2)[:, None, None]
        clouds = self.noise(8) * self.rng.uniform(0, 30)
        pixels = self.sky - rows * (60, 40, 10) + clouds[: len(rows), :, None]
        self.picture.paste(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
        self._draw_labels.rectangle((0, 0, self.width, len(rows)), fill=SKY)

    def bonnet(self) -> None:
        """The camera's own car, which CityScapes leaves out of the score."""
        top = self.height * self.rng.uniform(0.93, 0.98)
        box = (-0.2 * self.width, top, 1.2 * self.width, top + self.height)
        self._draw_picture.ellipse(box, fill=(30, 30, 35))
        self._draw_labels.ellipse(box, fill=IGNORE)

    def noise(self, cells: int) -> np.ndarray:
        """Smooth noise over the whole picture, from -1 to 1; the more cells, the finer."""
        coarse = self.rng.uniform(-1, 1, (cells, 2 * cells)).astype(np.float32)
        return np.asarray(Image.fromarray(coarse).resize((self.width, self.height), Image.Resampling.BICUBIC))

    def finish(self) -> tuple[Image.Image, Image.Image]:
        """Light, texture, lens and sensor; then both in their final size."""
        rng = self.rng
        pixels = np.asarray(self.picture, dtype=np.float64)
        rough = np.isin(np.asarray(self.labels), (VEGETATION, TERRAIN, ROAD, SIDEWALK, BUILDING, WALL))
        texture = 0.5 * self.noise(64) + 0.5 * rng.uniform(-1, 1, rough.shape)
        leafy = np.where(np.asarray(self.labels) == VEGETATION, 3.0, 1.0)
        pixels = pixels * (1 + (0.09 * rough * leafy * texture)[..., None])
        gain = rng.uniform(0.6, 1.15) * (1 + 0.15 * self.noise(3))
        pixels = pixels * gain[..., None] * rng.uniform(0.93, 1.07, 3) + rng.uniform(-10, 10)
        size = (self.width // OVERSAMPLING, self.height // OVERSAMPLING)
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0))).resize(size, Image.Resampling.BOX)
        grain = rng.normal(0, rng.uniform(1, 6), (size[1], size[0], 3))
        picture = Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
        return picture, self.labels.resize(size, Image.Resampling.NEAREST)


class Street:
    """One street: its ground, and the things on it, ready to be drawn."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas
        rng = self.rng = canvas.rng
        self.left = -rng.uniform(3.5, 6.5)
        self.right = rng.uniform(3.5, 6.5)
        self.pavement = rng.uniform(2.0, 5.0)
        self.verge = max(0.0, rng.uniform(-3, 3))  # grass between the pavement and what lines it
        self.things: list[tuple[float, Callable[[], None]]] = []

    def draw(self) -> None:
        self.canvas.fill_sky()
        self.ground()
        for side in (-1, 1):
            self.frontage(side)
        self.traffic()
        self.people()
        for _, draw in sorted(self.things, key=lambda thing: -thing[0]):
            draw()
        self.canvas.bonnet()

    def add(self, z: float, draw: Callable[[], None]) -> None:
        self.things.append((z, draw))

    def kerb(self, side: int) -> float:
        return self.left if side < 0 else self.right

    def ground(self) -> None:
        canvas, rng = self.canvas, self.rng
        wide = 60.0

        def strip(left: float, right: float, label: int, colour: Colour) -> None:
            for near, far in ((0.5, 4), (4, 8), (8, 16), (16, 32), (32, 300)):
                canvas.polygon(((left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)), label, colour)

        strip(-wide, wide, TERRAIN, canvas.vary((110, 125, 75)))
        stone = canvas.vary((150, 140, 135))
        strip(self.left - self.pavement, self.left, SIDEWALK, stone)
        strip(self.right, self.right + self.pavement, SIDEWALK, stone)
        asphalt = canvas.vary((95, 95, 98), 8)
        strip(self.left, self.right, ROAD, asphalt)
        if rng.random() < 0.6:  # shadow of the buildings on one side
            width = rng.uniform(0.2, 0.7) * (self.right - self.left)
            strip(self.left, self.left + width, ROAD, asphalt * 0.65)
        middle = (self.left + self.right) / 2
        for z in np.arange(rng.uniform(3, 7), 60, 6):  # lane marks
            strip_near, strip_far = z, z + 2.5
            corners = [(middle - 0.07, 0, strip_near), (middle + 0.07, 0, strip_near)]
            corners += [(middle + 0.07, 0, strip_far), (middle - 0.07, 0, strip_far)]
            canvas.polygon(corners, ROAD, (205, 205, 200))

    def frontage(self, side: int) -> None:
        """What lines one side of the street: buildings with gaps, trees, walls, fences, poles."""
        rng = self.rng
        line = self.kerb(side) + side * (self.pavement + self.verge)
        z = rng.uniform(-5, 8)
        while z < FAR:
            depth = rng.uniform(7, 20)
            kind = rng.random()
            if kind < 0.7:
                self.building(side, line, z, depth)
            else:
                label = WALL if kind < 0.8 else FENCE
                self.barrier(line, z, depth, label)
                for _ in range(rng.integers(1, 4)):
                    self.tree(line + side * rng.uniform(1.5, 5), z + rng.uniform(0, depth))
            z += depth + rng.uniform(0, 2)
        edge = self.kerb(side) + side * 0.5
        for z in np.arange(rng.uniform(4, 12), FAR, rng.uniform(9, 18)):
            kind = rng.random()
            if kind < 0.45:
                self.tree(edge + side * 0.4, z)
            elif kind < 0.95:
                self.post(side, edge, z)

    def building(self, side: int, line: float, z: float, depth: float) -> None:
        canvas, rng = self.canvas, self.rng
        near, far = max(z, 1.0), max(z + depth, 2.0)
        height, floor = rng.uniform(6, 22), rng.uniform(2.8, 3.6)
        colour = canvas.vary(((165, 120, 95), (190, 180, 160), (135, 130, 130), (175, 90, 75))[rng.integers(4)])
        glass = canvas.vary((60, 70, 85))
        bay = rng.uniform(2.0, 3.5)
        gable = rng.uniform(4, 10)

        def draw() -> None:
            left, right = sorted((line, line + side * gable))
            canvas.upright(left, right, 0, height, near, BUILDING, colour * 0.8)
            canvas.polygon(
                ((line, 0, near), (line, height, near), (line, height, far), (line, 0, far)), BUILDING, colour
            )
            for low in np.arange(1.0, height - 2, floor):
                for start in np.arange(near + 0.6, min(far, 45) - 1.5, bay):
                    a, b = start, start + bay * 0.5
                    window = ((line, low, a), (line, low + 1.5, a), (line, low + 1.5, b), (line, low, b))
                    canvas.polygon(window, BUILDING, glass)

        self.add(near, draw)

    def barrier(self, line: float, z: float, depth: float, label: int) -> None:
        canvas, rng = self.canvas, self.rng
        near, far = max(z, 1.0), max(z + depth, 2.0)
        height = rng.uniform(1.2, 2.2)
        colour = canvas.vary((150, 130, 115) if label == WALL else (120, 95, 75))
        dark = colour * 0.6

        def draw() -> None:
            canvas.polygon(((line, 0, near), (line, height, near), (line, height, far), (line, 0, far)), label, colour)
            if label == FENCE:
                for start in np.arange(near, min(far, 40), 0.5):
                    canvas.polygon(
                        (
                            (line, 0, start),
                            (line, height, start),
                            (line, height, start + 0.15),
                            (line, 0, start + 0.15),
                        ),
                        label,
                        dark,
                    )

        self.add(near, draw)

    def tree(self, x: float, z: float) -> None:
        canvas, rng = self.canvas, self.rng
        z = max(z, NEAR)
        trunk, crown = rng.uniform(1.8, 3.2), rng.uniform(1.1, 2.6)
        green = canvas.vary((70, 105, 45), 14)
        leaves = [
            (rng.normal(0, 0.45, 2) * crown, rng.uniform(0.4, 0.75) * crown, rng.uniform(0.75, 1.25)) for _ in range(14)
        ]

        def draw() -> None:
            canvas.upright(x - 0.12, x + 0.12, 0, trunk + crown, z, VEGETATION, (75, 60, 45))
            for (dx, dy), radius, light in leaves:
                canvas.ellipse(
                    x + dx, trunk + crown + dy, z, (radius, radius), VEGETATION, np.clip(green * light, 0, 255)
                )

        self.add(z, draw)

    def post(self, side: int, x: float, z: float) -> None:
        """A lamp, a traffic light or a sign on its pole."""
        canvas, rng = self.canvas, self.rng
        kind = rng.integers(3)
        height = (6.5, 3.2, 2.6)[kind] * rng.uniform(0.9, 1.1)
        grey = canvas.vary((125, 125, 122), 8)
        face = ((200, 30, 40), (40, 70, 180), (235, 200, 50))[rng.integers(3)]
        lit = rng.integers(3)

        def draw() -> None:
            canvas.upright(x - 0.08, x + 0.08, 0, height, z, POLE, grey)
            if kind == 0:
                left, right = sorted((x, x - side * 1.6))
                canvas.upright(left, right, height - 0.15, height, z, POLE, grey)
            elif kind == 1:
                canvas.upright(x - 0.22, x + 0.22, height - 1.0, height, z, LIGHT, (35, 35, 35))
                colour = ((230, 50, 40), (240, 180, 40), (60, 210, 90))[lit]
                canvas.ellipse(x, height - 0.2 - 0.3 * lit, z, (0.13, 0.13), LIGHT, colour)
            else:
                canvas.ellipse(x, height - 0.4, z, (0.42, 0.42), SIGN, face)
                canvas.ellipse(x, height - 0.4, z, (0.28, 0.28), SIGN, (235, 235, 230))

        self.add(z, draw)

    def traffic(self) -> None:
        rng = self.rng
        middle = (self.left + self.right) / 2
        for side in (-1, 1):
            lane = (middle + self.kerb(side)) / 2
            z = rng.uniform(6, 20)
            while z < 60:  # moving
                self.vehicle(lane + rng.uniform(-0.4, 0.4), z)
                z += rng.uniform(10, 35)
            if rng.random() < 0.4 and self.right - self.left > 9:  # parked
                for z in np.arange(rng.uniform(5, 12), 50, rng.uniform(5.5, 8)):
                    self.vehicle(self.kerb(side) - side * 1.1, z, large=False)
        if rng.random() < 0.6:
            self.cyclist(self.kerb(1) - rng.uniform(0.6, 1.2), rng.uniform(4, 12))

    def vehicle(self, x: float, z: float, large: bool = True) -> None:
        """A car, or sometimes a bus or a truck, seen from behind, with the side that faces the camera's axis."""
        canvas, rng = self.canvas, self.rng
        kind = rng.random() if large else 0.0
        label, width, height, length = CAR, 1.75, rng.uniform(1.4, 1.7), 4.2
        if kind > 0.88:
            label, width, height, length = (BUS, 2.5, 3.0, 10.0) if kind > 0.94 else (TRUCK, 2.4, 3.3, 7.0)
        palette = ((170, 25, 30), (30, 50, 110), (200, 200, 205), (40, 40, 45), (120, 125, 130), (235, 235, 235))
        colour = canvas.vary((240, 190, 40) if label == BUS else palette[rng.integers(6)], 10)
        left, right = x - width / 2, x + width / 2
        inner = left if x > 0 else right
        shoulder = height * (0.55 if label == CAR else 0.5)

        def draw() -> None:
            shadow = (
                (left - 0.2, 0, z),
                (right + 0.2, 0, z),
                (right + 0.2, 0, z + length),
                (left - 0.2, 0, z + length),
            )
            canvas.polygon(shadow, ROAD, (45, 45, 48))
            body, back = (shoulder, z + length) if label == CAR else (height * 0.95, z + length)
            canvas.polygon(
                ((inner, 0.3, z), (inner, body, z), (inner, body, back), (inner, 0.3, back)), label, colour * 0.75
            )
            if label == CAR:
                cabin = ((inner, body, z), (inner, height, z + 0.4), (inner, height, z + 2.2), (inner, body, z + 3.0))
                canvas.polygon(cabin, label, colour * 0.55)
            for wheel in (left + 0.2, right - 0.2):
                canvas.upright(wheel - 0.13, wheel + 0.13, 0, 0.5, z, label, (25, 25, 25))
            canvas.upright(left, right, 0.3, shoulder, z, label, colour)
            roof = 0.8 if label == CAR else 1.0
            rear = (
                (left, shoulder, z),
                (right, shoulder, z),
                (x + roof * width / 2, height, z),
                (x - roof * width / 2, height, z),
            )
            canvas.polygon(rear, label, colour * 0.95)
            canvas.upright(x - 0.36 * width, x + 0.36 * width, shoulder + 0.05, height - 0.12, z, label, (45, 55, 65))
            for lamp in (left + 0.2, right - 0.2):
                canvas.upright(lamp - 0.14, lamp + 0.14, shoulder - 0.25, shoulder - 0.08, z, label, (200, 40, 40))

        self.add(z, draw)

    def cyclist(self, x: float, z: float) -> None:
        canvas = self.canvas
        coat = canvas.vary((180, 60, 50), 40)

        def draw() -> None:
            canvas.ellipse(x, 0.34, z, (0.12, 0.34), BICYCLE, (30, 30, 30))
            canvas.upright(x - 0.3, x + 0.3, 0.95, 1.02, z, BICYCLE, (50, 50, 55))
            self.figure(x, 0.75, z, 0.95, RIDER, coat)

        self.add(z, draw)

    def people(self) -> None:
        rng = self.rng
        for _ in range(rng.integers(3, 12)):
            side = rng.choice((-1, 1))
            x = self.kerb(side) + side * rng.uniform(0.6, self.pavement - 0.3)
            z = rng.uniform(4, 20)
            coat, size = self.canvas.vary((100, 80, 90), 50), rng.uniform(1.5, 1.9)
            self.add(z, partial(self.figure, x, 0, z, size, PERSON, coat))

    def figure(self, x: float, y: float, z: float, size: float, label: int, coat: Colour) -> None:
        """A person of the given height in metres, standing on height `y`."""
        canvas = self.canvas
        for leg in (-0.09, 0.09):
            canvas.upright(x + leg - 0.07, x + leg + 0.07, y, y + 0.5 * size, z, label, (45, 45, 65))
        canvas.ellipse(x, y + 0.63 * size, z, (0.25, 0.22 * size), label, coat)
        canvas.ellipse(x, y + 0.91 * size, z, (0.12, 0.09 * size), label, (205, 165, 140))


def draw_scene(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """Draw one street: an RGB picture and its train ids, 255 where there is none."""
    canvas = Canvas(rng, width, height)
    Street(canvas).draw()
    return canvas.finish()


def write_scenes(root: Path, counts: dict[str, int], width: int, height: int, seed: int) -> None:
    """Write `counts[split]` scenes for each split, under CityScapes' names."""
    scenes = [(split, index) for split, count in counts.items() for index in range(count)]
    for split, index in tqdm(scenes, desc='street scenes', ncols=100):
        picture, labels = draw_scene(np.random.default_rng((seed, split == 'val', index)), width, height)
        city = CITIES[split]
        stem = f'{city}_{index:06d}_000019'
        for kind, suffix, image in (
            ('leftImg8bit', 'leftImg8bit', picture),
            ('gtFine', 'gtFine_labelTrainIds', labels),
        ):
            folder = root / kind / split / city
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f'{stem}_{suffix}.png')


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    start = time.perf_counter()
    write_scenes(args.output, {'train': args.train, 'val': args.val}, args.width, args.height, args.seed)
    seconds = time.perf_counter() - start
    print(f'{args.train} training and {args.val} validation scenes are in {args.output}/ ({seconds:.1f} s)')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = create_parser('street-scenes', __doc__)
    parser.add_argument('output', type=output_folder, help='folder to write leftImg8bit and gtFine to')
    for split, count in (('train', 200), ('val', 40)):
        parser.add_argument(f'--{split}', type=int, default=count, help=f'{split} scenes (default: %(default)s)')
    parser.add_argument('--width', type=int, default=256, help='pixels (default: %(default)s)')
    parser.add_argument('--height', type=int, default=128, help='pixels (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='random seed (default: %(default)s)')
    args = parser.parse_args(argv)
    for name in ('train', 'val', 'width', 'height'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}')
    return args
