"""What the gates of a network whose experts mix do with a folder of images: figures of `deepmoe analyze`."""

import argparse
import csv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from ..digits import SHIFTS_FILE
from ..information import mutual_information
from ..mixture import mixture_record, specialisation_of
from . import mixture_figures as figures
from .images import Images, create_images
from .networks import create_network, read_settings
from .shuffling import Rows

Result = tuple[Figure, Rows]
STRONGEST = 9
"""Images shown of each pair of experts, as in the paper."""


class Choices(NamedTuple):
    """The gates of each layer for each image.

    Attributes:
        images: in the order of `labels`.
        labels: class of each image, shape (images,).
        predicted: class that the chosen expert predicts, or the network, shape (images,).
        gates: of each layer, p(e|x), shape (images, experts).
    """

    images: Images
    labels: Tensor
    predicted: Tensor
    gates: list[Tensor]


@torch.inference_mode()
def collect(args: argparse.Namespace) -> Choices:
    """Load what the command line names and run it over all images.

    Raises:
        FileNotFoundError, ValueError: something is not there or does not fit; the message names it.
    """
    settings = read_settings(args.network, args)
    images = create_images(args, settings)
    model: nn.Module = create_network(settings, args)
    labels, records = [], []
    for batch, classes in tqdm(images.loader, desc='gates', unit='batch', ncols=100):
        batch = batch.to(args.device)
        record = mixture_record(model, batch, model(batch).argmax(1))
        if record is None:
            raise ValueError(f'{settings["model"]} mixes no experts: there are no choices to look at.')
        labels.append(classes)
        records.append(record._replace(images=batch[:0]))
    gates = [torch.cat(parts) for parts in zip(*(record.gates for record in records), strict=True)]
    return Choices(images, torch.cat(labels), torch.cat([record.predicted for record in records]), gates)


def read_shifts(folder: Path, split: str, files: list[str]) -> Tensor:
    """Shift (dx, dy) of each image that `deepmoe jittered-digits` has written, shape (images, 2).

    Raises:
        ValueError: there is no table of shifts, or it leaves an image out.
    """
    path = folder / SHIFTS_FILE
    if not path.is_file():
        raise ValueError(f'There is no {path}: --data-dir must be a folder of `deepmoe jittered-digits`.')
    with path.open() as file:
        known = {row['file']: (int(row['dx']), int(row['dy'])) for row in csv.DictReader(file) if row['split'] == split}
    missing = next((name for name in files if name not in known), None)
    if missing is not None or not files:
        raise ValueError(f'{path} has no shift of {missing} of the split {split!r}: give --split as the table has it.')
    return torch.tensor([known[name] for name in files])


def group_means(gates: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean gates of the images of each group, shape (count, experts); NaN for a group without images."""
    one_hot = nn.functional.one_hot(groups, count).to(gates.dtype)
    return one_hot.T @ gates / one_hot.sum(0)[:, None]


def where_what(args: argparse.Namespace) -> Result:
    """mean gate of each expert by shift ('where') and by class ('what'), and what the choice tells about each"""
    choices = collect(args)
    split = args.split or 'validation'
    shifts = read_shifts(Path(args.data_dir), split, choices.images.files)
    largest = int(shifts.abs().max())
    side = 2 * largest + 1
    places = (shifts[:, 1] + largest) * side + shifts[:, 0] + largest
    classes = choices.images.classes
    rows: Rows = []
    layers = []
    for number, gates in enumerate(choices.gates, 1):
        chosen = gates.argmax(1)
        by_place = group_means(gates, places, side * side)
        by_class = group_means(gates, choices.labels, len(classes))
        about = {
            'shift': mutual_information(chosen, places).item(),
            'class': mutual_information(chosen, choices.labels).item(),
        }
        layers.append((by_place.T.unflatten(1, (side, side)), by_class, about))

        def row(of: str, value: Any, expert: int | str, number_of: float, layer: int = number) -> dict[str, Any]:
            return {'layer': layer, 'of': of, 'value': value, 'expert': expert, 'number': f'{number_of:.6g}'}

        rows += [row('information in bits', name, 'chosen', bits) for name, bits in about.items()]
        for expert in range(gates.shape[1]):
            for place, value in enumerate(by_place[:, expert].tolist()):
                shift = f'{place % side - largest} {place // side - largest}'
                rows.append(row('mean gate by shift', shift, expert, value))
            for name, value in zip(classes, by_class[:, expert].tolist(), strict=True):
                rows.append(row('mean gate by class', name, expert, value))
    return figures.draw_where_what(layers, classes), rows


def pairs(args: argparse.Namespace) -> Result:
    """use of each pair of experts of the first two layers, and the images with the largest product of their gates"""
    choices = collect(args)
    if len(choices.gates) < 2:
        raise ValueError('Pairs of experts need two layers with gates, as those of dmoe_4x100_4x100.')
    first, second = choices.gates[:2]
    products = first[:, :, None] * second[:, None, :]
    rows: Rows = []
    pictures: list[list[list[Any]]] = []
    dataset = choices.images.loader.dataset
    for i in range(first.shape[1]):
        pictures.append([])
        for j in range(second.shape[1]):
            best = products[:, i, j].topk(min(STRONGEST, len(products))).indices.tolist()
            pictures[-1].append([dataset[index][0][0].numpy() for index in best])
            use = products[:, i, j].mean().item()
            files = [choices.images.files[index] if choices.images.files else str(index) for index in best]
            rows.append({'first': i, 'second': j, 'use': f'{use:.6g}', 'strongest': ' '.join(files)})
    return figures.draw_pairs(products.mean(0), pictures), rows


def choice(args: argparse.Namespace) -> Result:
    """how often each class chooses each expert, and how sure the gates are"""
    choices = collect(args)
    classes = choices.images.classes
    rows: Rows = []
    layers = []
    for number, gates in enumerate(choices.gates, 1):
        chosen = nn.functional.one_hot(gates.argmax(1), gates.shape[1]).to(gates.dtype)
        use = group_means(chosen, choices.labels, len(classes))
        entropies = torch.special.entr(gates).sum(1) / torch.log(torch.tensor(2.0))
        numbers = {
            name: value.item() for name, value in specialisation_of(gates, choices.predicted, choices.labels).items()
        }
        layers.append((use, entropies, numbers))
        rows += [
            {'layer': number, 'class': name, 'expert': expert, 'chosen': f'{value:.6g}'}
            for name, values in zip(classes, use.tolist(), strict=True)
            for expert, value in enumerate(values)
        ]
        rows += [
            {'layer': number, 'class': name, 'expert': 'bits', 'chosen': f'{value:.6g}'}
            for name, value in numbers.items()
        ]
    return figures.draw_choice(layers, classes), rows
