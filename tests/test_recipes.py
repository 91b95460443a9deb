"""Every recipe of docs/recipes.md runs as it is printed, and trains the gates."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

RECIPES = (Path(__file__).parents[1] / 'docs/recipes.md').read_text()
NEEDS = {'Lightning': 'lightning', "Hugging Face's Trainer": 'transformers'}


def recipes() -> dict[str, str]:
    return dict(re.findall(r'^## (.+?)\n.*?```python\n(.*?)```', RECIPES, flags=re.S | re.M))


def test_there_is_a_recipe_for_each_kind_of_loop() -> None:
    assert list(recipes()) == [
        'A loop of your own, with any output',
        'Lightning',
        "Hugging Face's Trainer",
        'Detection with torchvision',
    ]


@pytest.mark.parametrize('title', recipes())
@pytest.mark.filterwarnings('ignore')
def test_recipe(title: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    torch.manual_seed(0)
    taken: list[dict[str, Any]] = []
    import deepmoe_plugin
    from deepmoe_plugin import losses

    def spy(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        taken.append(terms := deepmoe_plugin.terms.gating_terms(model, *args, **kwargs))
        return terms

    monkeypatch.setattr(deepmoe_plugin, 'gating_terms', spy)
    monkeypatch.setattr(losses, 'gating_terms', spy)
    exec(compile(recipes()[title], title, 'exec'), {'__name__': 'recipe'})
    assert taken
    assert all({'loss_gate', 'kept_experts'} <= terms.keys() for terms in taken)
    assert capsys.readouterr().out
