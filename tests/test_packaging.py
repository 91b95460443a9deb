"""What the distribution says about itself, and the wheel where its builder is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import deepmoe_command
import deepmoe_plugin

tomllib = pytest.importorskip('tomllib')
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())


def test_citation_names_this_version_and_the_three_papers() -> None:
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == deepmoe_plugin.__version__
    assert f'## {deepmoe_plugin.__version__}' in (ROOT / 'CHANGELOG.md').read_text()
    numbers = {reference['url'].rpartition('/')[2] for reference in citation['references']}
    assert numbers == {'1806.01531', '1312.4314', '2302.14703'}


def test_extras_that_the_command_names_exist() -> None:
    assert set(deepmoe_command.EXTRAS.values()) <= set(PROJECT['project']['optional-dependencies'])


def test_index_of_mim_lists_every_config() -> None:
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    listed = []
    for file in index['Import']:
        content = yaml.safe_load((ROOT / file).read_text())
        collections = {collection['Name'] for collection in content['Collections']}
        for model in content['Models']:
            assert model['In Collection'] in collections
            assert Path(model['Config']).stem == model['Name']
            listed.append(ROOT / model['Config'])
    assert sorted(listed) == sorted((ROOT / 'configs/mmseg').glob('*.py'))


def test_wheel_holds_configs_types_and_licence(tmp_path: Path) -> None:
    pytest.importorskip('hatchling')
    command = [sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {
        str(path.relative_to(ROOT)) for path in (ROOT / 'configs').rglob('*.*') if '__pycache__' not in str(path)
    }
    assert {f'deepmoe_plugin/.mim/{name}' for name in [*configs, 'model-index.yml']} <= names
    assert {'deepmoe_plugin/py.typed', 'deepmoe_command.py'} <= names
    assert any(name.endswith('licenses/LICENSE') for name in names)
    assert not any(name.startswith(('tools/', 'tests/')) for name in names)
