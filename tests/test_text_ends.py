"""Where a text ends: at tokens that one names, and where the model's context is full."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import typer
import yaml

from config.errors import UserError
from inference.beams import BeamSearch
from inference.engine import Engine, Request
from inference.sampling import SamplingSettings
from scripts.generate import generate
from tests.workspace import Workspace

PROMPT = "The quick brown"
LONG = "Text that goes on and on. " * 10
CONTEXT = 32


def written(workspace: Workspace, prompt: str, **options: Any) -> list[int]:
    """The tokens that the engine writes with the shipped settings, or with `options`."""
    sampling = SamplingSettings(temperature=0.8, top_p=0.95)
    request = Request(workspace.tokenizer.encode(prompt), 60, sampling, 3, **options)
    return [piece.token for piece in Engine(workspace.model, workspace.tokenizer).generate([request])]


def shown(workspace: Workspace, prompt: str, tokens: list[int]) -> str:
    """What the command prints where it writes `tokens`."""
    text = prompt + workspace.tokenizer.decode(tokens, skip_special_tokens=True)
    return text if text.endswith("\n") else text + "\n"


def test_stop_tokens_by_id_and_text(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    whole = written(workspace, PROMPT)
    names = {token: workspace.tokenizer.decode_bytes([token]) for token in whole[3:]}
    named = next(token for token in names if names[token].isascii() and token not in whole[:3])
    before = shown(workspace, PROMPT, whole[: whole.index(named)])
    text = names[named].decode()
    ways: list[dict[str, Any]] = [
        {"stop_token": [str(named)]},
        {"stop_token": ["<|endoftext|>", f'"{text}"']},
        {"overrides": [f"generation.stop_tokens=[{named}]"]},
    ]
    for way in ways:
        generate(prompt=PROMPT, seed=3, max_new_tokens=60, **way)
        assert capsys.readouterr().out == before


def test_where_the_context_is_full_a_text_goes_on_or_ends(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    room = CONTEXT - len(workspace.tokenizer.encode(PROMPT))
    whole = written(workspace, PROMPT)
    assert len(whole) == 60 > room
    for context, tokens in ((None, whole), ("slide", whole), ("stop", whole[:room])):
        generate(prompt=PROMPT, seed=3, max_new_tokens=60, context=context)
        assert capsys.readouterr().out == shown(workspace, PROMPT, tokens)


def test_the_interactive_mode_has_both(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = written(workspace, PROMPT)
    lines = f"/set context stop\n{PROMPT}\n/set stop_tokens [{whole[2]}]\n{PROMPT}\n/set stop_tokens [300]\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    generate(seed=3, max_new_tokens=60)
    full = shown(workspace, "", whole[: CONTEXT - len(workspace.tokenizer.encode(PROMPT))])
    said = f"context = 'stop'\n{full}stop_tokens = [{whole[2]}]\n"
    said += shown(workspace, "", whole[: whole.index(whole[2])])
    assert capsys.readouterr().out == said + "stop_tokens: there is no token 300; this vocabulary has 0 to 299.\n"


def test_texts_of_options_are_as_they_were_typed(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    stops = ["${never}", "\\${a}", "😀\u2028\x7f ", "null"]
    with pytest.raises(typer.Exit):
        generate(stop=stops, stop_token=["5", '"5"', "${"], regex="a${2}", print_config=True)
    settings = yaml.safe_load(capsys.readouterr().out)["generation"]
    assert settings["stop"] == stops
    assert settings["stop_tokens"] == [5, "5", "${"]
    assert settings["regex"] == "a${2}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_token": ["300"]}, "stop_tokens: there is no token 300"),
        ({"stop_token": ["not one"]}, "stop_tokens: 'not one' is not one token of this vocabulary"),
        ({"context": "jump"}, "context: 'jump' is not allowed; choose 'auto', 'slide' or 'stop'"),
        ({"prompt": LONG, "context": "stop"}, "tokens; the model sees 32 at once, the answer included"),
        ({"beams": 2, "context": "slide"}, "the texts of a beam search end where the context is full"),
    ],
)
def test_what_is_refused(
    workspace: Workspace, options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as refused:
        generate(**{"prompt": PROMPT, **options})
    assert message in str(refused.value)
    assert "cut off" not in capsys.readouterr().err


def test_a_search_refuses_a_prompt_that_must_not_be_cut(workspace: Workspace) -> None:
    request = Request(workspace.tokenizer.encode(LONG), 5, context="stop")
    with pytest.raises(UserError, match="the answer included"):
        BeamSearch(workspace.model, workspace.tokenizer, 2).search([request])
