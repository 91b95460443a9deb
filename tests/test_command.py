"""The command `deepmoe` itself: its help, its errors, configs by name, `run` and `doctor`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import deepmoe_command
import deepmoe_plugin
from deepmoe_plugin.cli import configs, doctor, run

ROOT = Path(__file__).parents[1]


def deepmoe(*arguments: str, cwd: Path = ROOT, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, *python, '-m', 'deepmoe_plugin', *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        'import sys, deepmoe_command\n'
        'try:\n    deepmoe_command.main(["--help"])\n'
        'finally:\n    assert not {"torch", "timm", "mmengine", "deepmoe_plugin"} & set(sys.modules)\n'
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f'  {name} ' in done.stdout for name in deepmoe_command.COMMANDS)


@pytest.mark.parametrize('command', list(deepmoe_command.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command in ('train', 'test'):
        pytest.importorskip('mmseg')
    with pytest.raises(SystemExit) as error:
        deepmoe_command.main([command, '--help'])
    assert error.value.code == 0
    assert f'usage: deepmoe {command}' in capsys.readouterr().out


OUTPUTS = [
    ('analyze pareto --series a b', '--out'),
    ('benchmark wide_deepmoe_resnet20_cifar', '--out'),
    ('compress resnet20_cifar --data-dir data --macs 0.5', '--output'),
    ('compress resnet18_camvid --checkpoint x --macs 0.5', '--output'),
    ('demo', '--output'),
    ('jittered-digits', ''),
    ('street-scenes', ''),
    ('test deepmoe_resnet18_street_scenes x', '--out'),
    ('test deepmoe_resnet18_street_scenes x', '--show-dir'),
    ('train deepmoe_resnet18_street_scenes', '--work-dir'),
    ('train-digits moe_mnist', '--out'),
]


@pytest.mark.parametrize('taken', ['file', 'file/folder', 'missing.png'])
@pytest.mark.parametrize(('command', 'option'), OUTPUTS)
def test_commands_write_to_folders(
    command: str, option: str, taken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command.startswith(('train ', 'test ')) or 'camvid' in command:
        pytest.importorskip('mmseg')
    (tmp_path / 'file').write_text('of somebody')
    with pytest.raises(SystemExit) as error:
        deepmoe_command.main([*command.split(), *([option] if option else []), str(tmp_path / taken)])
    assert error.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f'argument {option}' in line
    assert 'file: give a folder' in line
    assert [path.name for path in tmp_path.iterdir()] == ['file']
    assert (tmp_path / 'file').read_text() == 'of somebody'


@pytest.mark.parametrize('script', sorted((ROOT / 'tools').glob('*.py')), ids=lambda path: path.stem)
def test_scripts_are_the_commands(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(deepmoe_command, 'main', called.append)
    monkeypatch.setattr(sys, 'argv', [str(script), 'a', '--b'])
    code = compile(script.read_text(), str(script), 'exec')
    exec(code, {'__name__': '__main__'})
    assert called == [[script.stem.replace('_', '-'), 'a', '--b']]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    deepmoe_command.main(['--version'])
    assert capsys.readouterr().out == f'deepmoe-plugin {deepmoe_plugin.__version__}\n'


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        deepmoe_command.main(['evalute'])
    assert error.value.code == 2
    assert 'no command evalute; did you mean evaluate?' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('command', 'module', 'extra'),
    [
        (['train', 'x'], 'mmengine', 'mmseg'),
        (['analyze', 'dead', 'x'], 'sklearn', 'plot'),
        (['demo'], 'mlxtend', 'demo'),
        (['flops', 'deepmoe_resnet18_street_scenes', '--shape', '64', '64'], 'mmengine', 'mmseg'),
    ],
)
def test_missing_extras_are_named(command: list[str], module: str, extra: str, tmp_path: Path) -> None:
    (tmp_path / 'hide.py').write_text(
        'import runpy, sys\n'
        'class Hide:\n'
        '    def find_spec(self, name, *_):\n'
        f'        if name.partition(".")[0] == {module!r}:\n'
        '            raise ModuleNotFoundError(f"No module named {name!r}", name=name)\n'
        'sys.meta_path.insert(0, Hide())\n'
        'sys.argv[0:1] = []\n'
        'runpy.run_module("deepmoe_command", run_name="__main__")\n'
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    arguments = [sys.executable, str(tmp_path / 'hide.py'), 'deepmoe', *command]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"deepmoe {command[0]} needs {module}, which is not installed: pip install 'deepmoe-plugin[{extra}]'"
    )


def test_configs_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = configs.shipped_configs()
    assert len(shipped) == len(list(configs.configs_folder().glob('*/*.*'))) - 1  # the metafile of mim
    for name in ('deepmoe_drn50_cityscapes', 'table4_w1_high'):
        assert configs.find_config(name) == configs.find_config(shipped[name].name) == shipped[name]
    assert configs.find_config('table4_w1_high', 'mmseg') is None
    assert configs.find_config('table4_w1_high.py') is None
    (tmp_path / 'table4_w1_high.yaml').write_text('model: resnet18')
    assert configs.find_config('table4_w1_high.yaml') == Path('table4_w1_high.yaml')
    assert 'did you mean deepmoe_drn50_cityscapes' in configs.did_you_mean('deepmo_drn50_cityscapes', shipped)


SCRIPT = """
import json, multiprocessing, sys
from helper import HELP
import timm

def count(name):
    import timm
    return len(timm.list_models(name))

if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        inside = pool.apply(str.upper, ('a',)), pool.apply(int, ('1',)), pool.apply(count, ('resnet18',))
    model = timm.create_model('wide_deepmoe_resnet20_cifar', device='meta')
    with open('result.json', 'w') as file:
        json.dump([sys.argv, __file__, HELP, inside, model.num_classes], file)
"""


def test_run_is_what_python_does(tmp_path: Path) -> None:
    """Arguments, `__main__`, the folder on the path, processes that are spawned; and our models have names."""
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts/script.py').write_text(SCRIPT)
    (tmp_path / 'scripts/helper.py').write_text('HELP = 3')
    done = deepmoe('run', 'scripts/script.py', '--config', 'table4_w1_high', '-x', 'run', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    argv, file, helped, inside, classes = json.loads((tmp_path / 'result.json').read_text())
    path = str(configs.shipped_configs()['table4_w1_high'])
    assert argv[1:] == ['--config', path, '-x', 'run']
    assert Path(file) == tmp_path / 'scripts/script.py'
    assert (helped, inside, classes) == (3, ['A', 1, 1], 100)


def test_run_takes_configs_by_name() -> None:
    path = str(configs.shipped_configs()['table4_w1_high'])
    for arguments in (['-c', 'table4_w1_high'], ['--config', 'table4_w1_high'], ['--config=table4_w1_high']):
        assert run._with_config_paths(arguments)[-1].removeprefix('--config=') == path
    assert run._with_config_paths(['--config', 'own.yaml', '--model', 'resnet56_cifar']) == [
        '--config', 'own.yaml', '--model', 'resnet56_cifar',
    ]  # fmt: skip


def test_run_names_a_missing_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(['validate.py'])
    assert "no file validate.py: timm's scripts are in its repository" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif('TIMM_REPO' not in os.environ, reason="TIMM_REPO (a checkout of timm's repository) is not set")
def test_run_validates_with_timm(tmp_path: Path) -> None:
    from PIL import Image

    for name in ('a', 'b'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        Image.new('RGB', (32, 32), 'red' if name == 'a' else 'blue').save(tmp_path / 'val' / name / '0.png')
    checkpoint = tmp_path / 'model.pth'
    model = timm.create_model('wide_deepmoe_resnet20_cifar', num_classes=2)
    torch.save(model.state_dict(), checkpoint)
    done = deepmoe(
        'run', str(Path(os.environ['TIMM_REPO'], 'validate.py')), '--data-dir', str(tmp_path), '--model',
        'wide_deepmoe_resnet20_cifar', '--num-classes', '2', '--checkpoint', str(checkpoint), '--device', 'cpu',
        '--workers', '0', cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'top1' in done.stdout


def test_doctor_tells_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main([])
    text = capsys.readouterr().out
    assert f'torch {torch.__version__.partition("+")[0]}' in text
    assert str(configs.configs_folder()) in text
    assert 'CPU, float32 and bfloat16: ' in text or 'no native program' in text


def test_doctor_tells_why_the_native_program_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(doctor.build, 'missing', lambda: 'there is no C++ compiler')
    assert 'there is no C++ compiler' in next(doctor.sparse_execution())
