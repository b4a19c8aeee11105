"""`scripts/generate.py`: how sure the model was of each token, and tokens that are made likelier or banned."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from config.errors import UserError
from inference.beams import BeamSearch
from inference.colours import STEPS, Display, display_for, legend, painted, takes_colours
from inference.constraints import regex
from inference.engine import Engine, Piece, Request
from inference.interactive import Session
from inference.sampling import SamplingSettings
from inference.terminal import Printer, Samples
from scripts.generate import generate
from tests.workspace import Workspace

PROMPT = "The quick brown"


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pieces_of(workspace: Workspace, **options: Any) -> list[Piece]:
    """What the engine writes with the shipped settings."""
    sampling = SamplingSettings(temperature=0.8, top_p=0.95)
    request = Request(workspace.tokenizer.encode(PROMPT), 20, sampling, seed=3, logprobs=4)
    return list(Engine(workspace.model, workspace.tokenizer).generate([replace(request, **options)]))


def test_no_colours_where_none_are_wanted() -> None:
    terminal = FakeTerminal()
    assert takes_colours(terminal, {}) and takes_colours(terminal, {"NO_COLOR": "", "TERM": "xterm"})
    assert not takes_colours(terminal, {"NO_COLOR": "1"}) and not takes_colours(terminal, {"TERM": "dumb"})
    assert not takes_colours(io.StringIO(), {})


def test_every_step_has_a_colour_of_its_own_and_stands_in_the_legend() -> None:
    shown = [painted("a\n\nb", least) for least, _ in STEPS]
    assert shown[0] == "a\n\nb" and len(set(shown)) == len(STEPS)
    for text, (_, colour) in list(zip(shown, STEPS, strict=True))[1:]:
        assert text == f"\x1b[38;5;{colour}ma\x1b[0m\n\n\x1b[38;5;{colour}mb\x1b[0m"
        assert f"\x1b[38;5;{colour}m" in legend()
    assert painted("x", 0.899) == painted("x", 0.65) != painted("x", 0.9) == "x"
    words = re.sub(r"\x1b\[[0-9;]*m", "", legend())
    assert words == "probability of a token: 90 % and more  65 %  40 %  20 %  7 %  less"


def test_a_session_at_a_terminal_shows_them_by_colour(workspace: Workspace) -> None:
    """Text and colours together, symbols for control characters, the colour of the unlikeliest for joined tokens."""
    settings = workspace.config.generation.model_copy(update={"seed": 3, "max_new_tokens": 20})
    config = workspace.config.model_copy(update={"generation": settings})
    out = FakeTerminal()
    display = display_for(out, workspace.tokenizer)
    assert display == Display(0) and display.coloured
    Session(workspace.model, workspace.tokenizer, config, False, Printer(out), 1, display).handle(PROMPT)
    plain = FakeTerminal()
    Session(workspace.model, workspace.tokenizer, config, False, Printer(plain), 1).handle(PROMPT)
    assert re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()) == plain.getvalue()
    expected, least = "", 1.0
    for piece in pieces_of(workspace):
        assert piece.logprobs is not None
        least = min(least, math.exp(piece.logprobs.logprob))
        alone = FakeTerminal()
        Printer(alone).write(piece.text, least)
        expected, least = expected + alone.getvalue(), 1.0 if piece.text else least
    assert out.getvalue().rstrip("\n") == expected.rstrip("\n") and "\x1b[38;5;" in expected


def test_elsewhere_they_are_a_list_with_the_alternatives(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(prompt=PROMPT, seed=3, max_new_tokens=20, probabilities=True)
    lines = capsys.readouterr().out.splitlines()
    pieces = pieces_of(workspace)
    assert len(lines) == len(pieces) == 20
    for line, piece in zip(lines, pieces, strict=True):
        assert piece.logprobs is not None
        found = re.fullmatch(r" *([\d.]+) %  ('.*?'|\".*?\")  \((.*)\)", line)
        assert found and float(found[1]) == pytest.approx(100 * math.exp(piece.logprobs.logprob), abs=0.06)
        assert found[2] == repr(workspace.tokenizer.decode([piece.token]))
        others = [token for token, _ in piece.logprobs.top if token != piece.token][:3]
        shares = [float(share) for share in re.findall(r"([\d.]+) %", found[3])]
        assert len(shares) >= 3 and shares == sorted(shares, reverse=True)
        assert all(repr(workspace.tokenizer.decode([token])) in found[3] for token in others)


class TestBias:
    def test_by_text_by_id_and_by_quoted_digits(self, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
        tokenizer = workspace.tokenizer
        token, digit = tokenizer.encode("q")[0], tokenizer.encode("1")[0]
        generate(prompt=PROMPT, max_new_tokens=4, logit_bias=["q=100"])
        assert capsys.readouterr().out == f"{PROMPT}qqqq\n"
        generate(prompt=PROMPT, max_new_tokens=4, logit_bias=[f"{token}=100"])
        assert capsys.readouterr().out == f"{PROMPT}qqqq\n"
        generate(prompt=PROMPT, max_new_tokens=4, logit_bias=['"1"=100'])
        assert digit != 1 and capsys.readouterr().out == f"{PROMPT}1111\n"
        generate(overrides=['generation.logit_bias={"q": 100}'], prompt=PROMPT, max_new_tokens=4)
        assert capsys.readouterr().out == f"{PROMPT}qqqq\n"
        generate(prompt=PROMPT, logit_bias=["<|endoftext|>=100", "==-1"])
        assert capsys.readouterr().out == f"{PROMPT}\n"

    @pytest.mark.parametrize(
        ("biases", "message"),
        [
            (["q"], "--logit-bias q: give a token and a number"),
            (["=1"], "--logit-bias =1: give a token"),
            (["q=much"], "such as 50=-2"),
            (["q=101"], "less than or equal to 100, not 101"),
            (["300=1"], "there is no token 300; this vocabulary has 0 to 299"),
            (["Zebra=1"], r"'Zebra' is not one token of this vocabulary, but '.*' \(\d+\)"),
            (["q=1", "{q}=2"], "token {q} is named twice, the second time as"),
        ],
    )
    def test_what_is_none_is_named(self, workspace: Workspace, biases: list[str], message: str) -> None:
        token = str(workspace.tokenizer.encode("q")[0])
        with pytest.raises(UserError, match=message.replace("{q}", token)):
            generate(prompt=PROMPT, logit_bias=[bias.replace("{q}", token) for bias in biases])


class TestForms:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"json_schema": "none.json"}, "none.json is not a file that can be read"),
            ({"json_schema": "half.json"}, "The JSON schema is no JSON"),
            ({"json_schema": "not.json"}, "The JSON schema cannot be used: .*not"),
            ({"regex": "(a"}, "The regular expression '.a' cannot be used"),
        ],
    )
    def test_a_fault_is_told_before_any_weights_are_read(
        self, workspace: Workspace, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (workspace.folder / "half.json").write_text('{"type"')
        (workspace.folder / "not.json").write_text('{"not": {}}')

        def load(*_: Any) -> None:
            pytest.fail("the checkpoint was loaded")

        monkeypatch.setattr("inference.loading.load_for_generation", load)
        with pytest.raises(UserError, match=message):
            generate(prompt=PROMPT, **options)

    def test_a_form_that_fails_on_the_way_is_no_finished_text(self, workspace: Workspace) -> None:
        """The library then allows the end alone, as it does where a text is complete."""
        tokenizer = workspace.tokenizer
        broken = regex("[a-f]{3}", tokenizer)
        broken._matcher.consume_token(tokenizer.encode("z")[0])
        pieces = pieces_of(workspace, constraint=broken)
        assert [piece.finish for piece in pieces] == ["error"]
        assert pieces[0].failure is not None and "could not be followed to its end" in pieces[0].failure
        whole = pieces_of(workspace, constraint=regex("[a-f]{3}", tokenizer))
        assert (whole[-1].finish, whole[-1].failure) == ("stop", None)
        with pytest.raises(UserError, match="could not be followed"):
            Samples(1, Printer(io.StringIO()), lambda sample: None).show(pieces)
        with pytest.raises(UserError, match="could not be followed"):
            BeamSearch(workspace.model, tokenizer, 2).search([Request([1], 5, constraint=broken)])


def test_probabilities_of_a_beam_search_are_refused() -> None:
    with pytest.raises(UserError, match="--probabilities shows those of drawn texts"):
        generate(prompt=PROMPT, beams=2, probabilities=True)
