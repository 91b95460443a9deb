"""What the distribution says about itself, and the wheel where its builder is installed."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import deepmoe_command
import deepmoe_plugin
from deepmoe_plugin.models.registration import WEIGHTS

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


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a `wheel` or an `sdist` of `source` in `folder`."""
    pytest.importorskip('hatchling')
    command = [sys.executable, '-m', 'hatchling', 'build', '-t', kind, '-d', str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build('wheel', ROOT, tmp_path_factory.mktemp('wheel')))


def test_wheel_holds_configs_types_and_licence(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    configs = {
        str(path.relative_to(ROOT)) for path in (ROOT / 'configs').rglob('*.*') if '__pycache__' not in str(path)
    }
    assert {f'deepmoe_plugin/.mim/{name}' for name in [*configs, 'model-index.yml']} <= names
    assert {'deepmoe_plugin/py.typed', 'deepmoe_command.py'} <= names
    assert {str(path.relative_to(ROOT)) for path in WEIGHTS.iterdir()} <= names
    assert any(name.endswith('licenses/LICENSE') for name in names)
    assert not any(name.startswith(('tools/', 'tests/')) for name in names)


def test_sdist_builds_the_same_wheel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    with tarfile.open(build('sdist', ROOT, tmp_path / 'sdist')) as archive:
        archive.extractall(tmp_path / 'sources', filter='data')
    (sources,) = (tmp_path / 'sources').iterdir()
    other = zipfile.ZipFile(build('wheel', sources, tmp_path / 'wheel'))
    assert sorted(other.namelist()) == sorted(wheel.namelist())
    assert [name for name in wheel.namelist() if other.read(name) != wheel.read(name)] == []
