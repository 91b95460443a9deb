"""No import circles in the package: every module can be read after the ones that it imports."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import deepmoe_plugin

ROOT = Path(deepmoe_plugin.__file__).parent


def modules() -> dict[str, Path]:
    """Dotted name to file, for every module of the package."""
    names = {}
    for path in ROOT.rglob('*.py'):
        parts = path.relative_to(ROOT.parent).with_suffix('').parts
        names['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return names


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports anywhere in its source, for type checkers only included."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parents = package.split('.')[: len(package.split('.')) - node.level + 1]
                base = '.'.join([*parents, *([node.module] if node.module else [])])
            submodules = {f'{base}.{alias.name}' for alias in node.names} & known.keys()
            # Python runs the __init__ of a package, too; the one of the whole package re-exports everything.
            found |= submodules or {base}
    return {module for module in found if module in known and module != name}


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert graph['deepmoe_plugin.network'] >= {'deepmoe_plugin.gating', 'deepmoe_plugin.terms'}
    assert list(TopologicalSorter(graph).static_order())


def test_a_circle_would_be_found(tmp_path: Path) -> None:
    for name, text in (('a', 'from . import b'), ('b', 'def f():\n    from .a import x'), ('__init__', '')):
        (tmp_path / f'{name}.py').write_text(text)
    known = {'p.a': tmp_path / 'a.py', 'p.b': tmp_path / 'b.py', 'p': tmp_path / '__init__.py'}
    assert imports('p.a', known['p.a'], known) == {'p.b'}
    assert imports('p.b', known['p.b'], known) == {'p.a'}
