"""The configs of this package, found by name."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

SUFFIXES = ('.py', '.yaml', '.yml')


def configs_folder() -> Path:
    """Where they are: in the package once it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / '.mim/configs'
    return installed if installed.is_dir() else package.parent / 'configs'


def shipped_configs(framework: str = '*') -> dict[str, Path]:
    """Name to file of the configs of one framework ('mmseg' or 'timm') or of all."""
    files = configs_folder().glob(f'{framework}/*')
    return {path.stem: path for path in sorted(files) if path.suffix in SUFFIXES and path.stem != 'metafile'}


def find_config(name: str, framework: str = '*') -> Path | None:
    """The file of a config: the one that is there under this path, or else the one of this package, None if neither.

    Args:
        name: a path, or the name of a config of this package, with its suffix or without.
    """
    if name.endswith(SUFFIXES) and Path(name).is_file():
        return Path(name)
    stem = name.removesuffix(Path(name).suffix) if name.endswith(SUFFIXES) else name
    path = shipped_configs(framework).get(stem)
    return path if path is not None and (stem == name or path.name == name) else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The end of a message about a name that is not among the candidates."""
    close = get_close_matches(name, list(candidates), n=3)
    return f'; did you mean {" or ".join(close)}?' if close else ''
