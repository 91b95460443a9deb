"""Every code block of the README and the documentation is run, or at least read by what would run it.

Python blocks run, page by page, on a small network under the name that the page gives. Of command lines, each `deepmoe`
command is read by its own parser, its network or config must exist, and the quick ones run. The options of timm's
scripts are read by their parsers where TIMM_REPO names a checkout of timm's repository.
"""

import argparse
import functools
import os
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import timm
import torch
import yaml
from timm.models import is_model
from torch import nn

import deepmoe_command
import deepmoe_plugin
from deepmoe_plugin.cli.configs import find_config

tomllib = pytest.importorskip('tomllib')
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
EXTRAS = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
TARGETS = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
TIMM_SCRIPTS = ('train.py', 'validate.py', 'inference.py', 'benchmark.py', 'onnx_export.py')
# Programs of others, which are only named.
OTHERS = ('csCreateTrainIdLabelImgs', 'pre-commit')
QUICK = ('doctor', 'flops')


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    def __repr__(self) -> str:
        return f'{self.page.relative_to(ROOT)}:{self.line}'


def blocks(page: Path) -> Iterator[Block]:
    fence = re.compile(r'^( *)```(\w*)\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
    text = page.read_text()
    for match in fence.finditer(text):
        indent, language, body = match.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        yield Block(page, text[: match.start()].count('\n') + 1, language, '\n'.join(lines))


BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without variables before it."""
    rest = ''
    for line in text.replace('\\\n', ' ').splitlines():
        rest += line
        if re.sub(r'#.*', '', rest).count('"') % 2:  # a string goes on in the next line
            rest += ' '
            continue
        for part in rest.split(' && '):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r'\w+=.*', words[0]):
                words = words[1:]
            if words:
                yield words[1:] if words[0] == 'eval' else words
        rest = ''


COMMANDS = [
    pytest.param(words, id=f'{block!r}: {" ".join(words)[:60]}')
    for block in BLOCKS
    if block.language == 'sh'
    for words in commands(block.text)
]


def test_blocks_are_found_and_of_a_known_language() -> None:
    assert len(COMMANDS) > 40
    assert sum(text.read_text().count('\n```') + text.read_text().startswith('```') for text in PAGES) >= len(BLOCKS)
    for block in BLOCKS:
        assert block.language in ('python', 'sh', 'yaml', 'mermaid', 'text'), block


class Parsed(Exception):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args_read = args


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The arguments of a `deepmoe` command as its own parser reads them; nothing runs."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise Parsed(parse(self, *args, **kwargs))

    def read(command: str, arguments: list[str]) -> argparse.Namespace:
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, 'parse_args', stop)
            with pytest.raises(Parsed) as caught:
                deepmoe_command._call(command, arguments)
        return caught.value.args_read

    return read


@functools.cache
def timm_parser(script: str) -> argparse.ArgumentParser:
    return runpy.run_path(str(Path(os.environ['TIMM_REPO'], script)), run_name='read')['parser']


def check_timm(script: str, arguments: list[str]) -> None:
    """Options of timm's script are its own, the config and the model exist."""
    assert Path(script).name in TIMM_SCRIPTS
    remaining = list(arguments)
    for flag in ('-c', '--config'):
        if flag in remaining:
            index = remaining.index(flag)
            name = remaining[index + 1].removeprefix('configs/timm/')
            assert find_config(name, 'timm'), name
            del remaining[index : index + 2]
    if '--model' in remaining:
        assert is_model(remaining[remaining.index('--model') + 1])
    if 'TIMM_REPO' in os.environ:
        timm_parser(Path(script).name).parse_args([word for word in remaining if not word.startswith('$')])


def check_network(name: str) -> None:
    """The network, or the config, that a command line names exists; words in capitals stand for something."""
    if not re.search(r'[A-Z{]|^out(put)?/', name):
        stem = name.removeprefix('configs/mmseg/').removeprefix('configs/timm/')
        assert is_model(name) or find_config(stem), name


@pytest.mark.parametrize('words', COMMANDS)
def test_command(words: list[str], read: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = words
    if program == 'torchrun':
        arguments = [word for word in arguments if not word.startswith('--nproc')]
        program = 'python'
    if program == 'python' and arguments[0] in TIMM_SCRIPTS:
        check_timm(arguments[0], arguments[1:])
        return
    if program == 'python':
        started = ' '.join(arguments[:2])
        if started == '-m deepmoe_plugin':
            arguments = arguments[2:]
        else:
            script = ROOT / arguments[0]
            assert script.parent.name == 'tools'
            assert script.is_file()
            arguments = [script.stem.replace('_', '-'), *arguments[1:]]
        program = 'deepmoe'
    if program == 'deepmoe':
        command, *arguments = arguments
        if command in ('train', 'test') or (command == 'compress' and find_config(arguments[0], 'mmseg')):
            pytest.importorskip('mmseg')
        args = read(command, arguments)
        if command == 'run':
            check_timm(args.script, args.arguments)
        networks = [getattr(args, name) for name in ('network', 'config') if hasattr(args, name)]
        for network in [*networks, *getattr(args, 'networks', [])]:
            check_network(network)
        if command in QUICK and not any(re.search('[A-Z{]', word) or word == '--paper' for word in arguments):
            if any('drn50' in word for word in arguments):
                pytest.importorskip('mmseg')
            deepmoe_command.main([command, *arguments])
            assert len(capsys.readouterr().out.splitlines()) > 2
    elif program == 'make':
        assert arguments[0] in TARGETS
    elif program == 'pip':
        for extra in re.findall(r'\[([\w,]+)\]', ' '.join(arguments)):
            assert set(extra.split(',')) <= set(EXTRAS)
        for file in [word for word in arguments if word.endswith('.txt')]:
            assert (ROOT / file).is_file()
    elif program == 'pytest':
        assert all((ROOT / word).exists() for word in arguments if word.startswith('tests/'))
    else:
        assert program in OTHERS, f'{program} is neither a command of this package nor one that is known'


@pytest.mark.parametrize('block', [block for block in BLOCKS if block.language == 'yaml'], ids=repr)
def test_yaml(block: Block) -> None:
    yaml.safe_load(block.text)


# Each block of this page is a training loop of its own, which tests/test_recipes.py runs.
RECIPES = ROOT / 'docs/recipes.md'
PYTHON = sorted({block.page for block in BLOCKS if block.language == 'python'} - {RECIPES})


@pytest.mark.parametrize('page', PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, on what its sentences take for granted."""
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def create_small(name: str, *args: Any, **kwargs: Any) -> nn.Module:
        small = {'layers': (1, 1, 1, 1)} if name.endswith('deepmoe_resnet50') else {}
        small |= {'widen': 0.25} if name.startswith('wide') and small else {}
        return create(name, *args, **{**small, **kwargs})

    monkeypatch.setattr(timm, 'create_model', create_small)
    torch.manual_seed(0)
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    dataset = torch.utils.data.TensorDataset(images, targets)
    namespace: dict[str, Any] = {
        'timm': timm,
        'torch': torch,
        'nn': nn,
        'deepmoe_plugin': deepmoe_plugin,
        'model': create_small('wide_deepmoe_resnet50', num_classes=5),
        'images': images,
        'targets': targets,
        'dataset': dataset,
        **dict.fromkeys(('loader', 'train_loader'), torch.utils.data.DataLoader(dataset, batch_size=2)),
    }
    for name, parameter in namespace['model'].named_parameters():
        if name.endswith('bn3.weight'):
            nn.init.constant_(parameter, 0.1)  # zero in a new network, which needs none of its experts
    compressed = Path('output/half/compressed.safetensors')
    compressed.parent.mkdir(parents=True)
    gated: dict[str, Any] = dict(num_latent_experts=8, embedding_channels=[8, 16])
    safetensors.torch.save_file(create_small('narrow_deepmoe_resnet50', **gated).state_dict(), compressed)
    options = dict(model='narrow_deepmoe_resnet50', model_kwargs=gated)
    compressed.with_name('args.yaml').write_text(yaml.safe_dump(options))
    for block in blocks(page):
        if block.language == 'python':
            exec(compile(block.text, repr(block), 'exec'), namespace)
    if 'custom_hooks' in namespace:
        pytest.importorskip('mmseg')
        from mmengine.registry import HOOKS, MODELS

        with torch.device('meta'):
            MODELS.build(namespace['model']['backbone'])
        for hook in namespace['custom_hooks']:
            HOOKS.build(hook)
    if 'criterion' in namespace:
        assert namespace['loss'].requires_grad
    if 'logits' in namespace:
        assert namespace['logits'].shape == (4, 5)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r'\]\(([^)#\s]+)', page.read_text()):
            if '://' not in target:
                assert (page.parent / target).exists(), f'{page.relative_to(ROOT)}: {target}'


def test_navigation_names_every_page() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor('tag:yaml.org,2002:python/name:', lambda *_: None)
    config = yaml.load((ROOT / 'mkdocs.yml').read_text(), Loader)

    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(part)

    assert sorted(files(config['nav'])) == sorted(str(page.relative_to(ROOT / 'docs')) for page in PAGES[2:])


def test_commands_page_lists_every_command() -> None:
    page = (ROOT / 'docs/commands.md').read_text()
    assert all(f'`{command}`' in page for command in deepmoe_command.COMMANDS)
