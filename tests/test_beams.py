"""Beam search: what `transformers` finds, what looking at every text finds, and a cache that is copied little."""

from __future__ import annotations

import io
import re
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from config.errors import UserError
from inference.beams import BeamSearch, Found
from inference.constraints import regex
from inference.engine import Engine, Request
from inference.interactive import Session
from inference.prompting import sample_text
from inference.sampling import SamplingSettings
from inference.terminal import Printer
from model.cache import KVCache
from model.transformer import Transformer
from scripts.export import export
from scripts.generate import generate
from scripts.serve import serve
from tests.workspace import TEXTS, Workspace, make_workspace

STOPS = tuple(range(40, 55))  # many, so that texts end
LENGTHS = (9, 3, 14)


class Exported(NamedTuple):
    workspace: Workspace
    theirs: Any
    their_tokenizer: Any

    @property
    def prompts(self) -> list[list[int]]:
        ids = self.workspace.tokenizer.encode(TEXTS[0])
        return [ids[length : 2 * length] for length in LENGTHS]

    def search(self, requests: list[Request], beams: int, groups: int = 1, **options: Any) -> list[list[Found]]:
        return BeamSearch(self.workspace.model, self.workspace.tokenizer, beams, groups, **options).search(requests)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    import transformers

    folder = tmp_path_factory.mktemp("beams")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        workspace = make_workspace(folder)
        export(Path("out"))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    return Exported(workspace, model.eval(), transformers.AutoTokenizer.from_pretrained(folder / "out"))


def theirs(exported: Exported, prompts: list[list[int]], beams: int, **options: Any) -> list[list[tuple[Any, float]]]:
    """Tokens and score of the `beams` best texts of every prompt."""
    pad, longest = exported.workspace.tokenizer.pad_id, max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    found = exported.theirs.generate(
        ids,
        attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    rows = [[token for token in row if token != pad] for row in found.sequences[:, longest:].tolist()]
    pairs = list(zip(map(tuple, rows), found.sequences_scores.tolist(), strict=True))
    return [pairs[place : place + beams] for place in range(0, len(pairs), beams)]


def assert_alike(ours: list[list[Found]], others: list[list[tuple[Any, float]]]) -> None:
    for found, expected in zip(ours, others, strict=True):
        assert [each.tokens for each in found] == [tokens for tokens, _ in expected]
        assert [each.score for each in found] == pytest.approx([score for _, score in expected], rel=1e-4)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("beams", [2, 3, 7])
def test_texts_and_scores_are_those_of_transformers(exported: Exported, beams: int, length_penalty: float) -> None:
    ends = [exported.workspace.tokenizer.end_of_text_id, *STOPS]
    for early in (False, True):
        options: dict[str, Any] = {"length_penalty": length_penalty, "early_stopping": early}
        requests = [Request(prompt, 15, stop_tokens=STOPS) for prompt in exported.prompts]
        ours = exported.search(requests, beams, groups=2, **options)
        assert_alike(ours, theirs(exported, exported.prompts, beams, max_new_tokens=15, eos_token_id=ends, **options))
        for found in ours:
            assert all((each.finish == "stop") == (each.tokens[-1] in ends) for each in found)
            assert found == sorted(found, key=lambda each: -each.score)


def test_ends_are_by_tokens_by_texts_and_by_length_as_those_of_transformers(exported: Exported) -> None:
    tokenizer, stops = exported.workspace.tokenizer, ("e", " d", "х")
    for prompt in exported.prompts:
        (ours,) = exported.search([Request(prompt, 12, stop=stops)], 4)
        options: dict[str, Any] = {
            "stop_strings": list(stops),
            "tokenizer": exported.their_tokenizer,
            "max_new_tokens": 12,
        }
        options["eos_token_id"] = tokenizer.end_of_text_id
        assert_alike([ours], theirs(exported, [prompt], 4, **options))
        for each in ours:
            whole = tokenizer.decode(each.tokens, skip_special_tokens=True)
            cut = min((whole.find(stop) for stop in stops if stop in whole), default=len(whole))
            assert each.text == whole[:cut] and (each.finish == "stop") == (cut < len(whole))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_search_that_is_wide_enough_finds_the_best_of_all_texts(exported: Exported, length_penalty: float) -> None:
    """Of four tokens, up to five of them long: every text is looked at."""
    model, tokenizer = exported.workspace.model, exported.workspace.tokenizer
    letters, end = [70, 71, 72], tokenizer.end_of_text_id
    banned = tuple((token, -torch.inf) for token in range(tokenizer.vocab_size) if token not in (*letters, end))
    prompt = exported.prompts[0]

    def score(text: tuple[int, ...]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text]]))[0, len(prompt) - 1 : -1].double()
        chances = logits[:, [*letters, end]].log_softmax(-1)
        total = sum(float(row[[*letters, end].index(token)]) for row, token in zip(chances, text, strict=True))
        return total / float(len(text) ** length_penalty)

    ended = [(*text, end) for length in range(5) for text in product(letters, repeat=length)]
    texts = {text: score(text) for text in [*ended, *product(letters, repeat=5)]}
    best = sorted(texts, key=lambda text: -texts[text])[:20]
    request = Request(prompt, 5, SamplingSettings(logit_bias=banned))
    (found,) = exported.search([request], 400, length_penalty=length_penalty)
    assert len(found) == len(texts) > 300
    assert [each.tokens for each in found[:20]] == best
    assert [each.score for each in found[:20]] == pytest.approx([texts[text] for text in best], rel=1e-4)


def test_one_beam_is_the_likeliest_token_every_time(exported: Exported) -> None:
    """With all that holds for a drawn text: penalties, bias, stop texts, a form, the end of the context."""
    model, tokenizer = exported.workspace.model, exported.workspace.tokenizer
    requests = [
        Request(prompt, limit, settings, stop=stop, context="stop", constraint=form)
        for prompt, limit, settings, stop, form in [
            (list[int](), 20, SamplingSettings(0.0), (), None),
            (exported.prompts[0], 100, SamplingSettings(0.0, repetition_penalty=1.4), (), None),
            (exported.prompts[1], 20, SamplingSettings(0.0, presence_penalty=1, frequency_penalty=0.5), ("th",), None),
            (exported.prompts[2], 10, SamplingSettings(0.0, logit_bias=((70, 3.0), (71, 3.1))), (), None),
            (exported.prompts[0], 20, SamplingSettings(0.0), (), regex("[a-f]{3}( [0-9]{2})+!", tokenizer)),
        ]
    ]
    engine = Engine(model, tokenizer)
    for request, (found,) in zip(requests, exported.search(requests, 1, groups=2), strict=True):
        pieces = list(engine.generate([request]))
        expected = [piece.token for piece in pieces], "".join(piece.text for piece in pieces), pieces[-1].finish
        assert (list(found.tokens), found.text, found.finish) == expected


def test_every_text_of_a_search_has_the_form(exported: Exported) -> None:
    request = Request(exported.prompts[0], 20, constraint=regex("[a-f]{2}-[0-9]{2}", exported.workspace.tokenizer))
    (found,) = exported.search([request], 5)
    texts = [each.text for each in found]
    assert len(set(texts)) == 5
    assert all(text[:2] <= "ff" and text[2] == "-" and text[3:].isdigit() and len(text) == 5 for text in texts)


def test_a_search_in_a_batch_is_as_if_alone(exported: Exported) -> None:
    """Of prompts that share beginnings, in rows where other texts were before."""
    ids = exported.workspace.tokenizer.encode(TEXTS[0] + TEXTS[1])
    requests = [Request(ids[:length] + ids[end : end + 2], 12, stop_tokens=STOPS) for length, end in PLACES]
    together = exported.search(requests, 3, groups=2)
    assert together == [exported.search([request], 3)[0] for request in requests]


PLACES = [(4, 30), (20, 31), (20, 35), (1, 36), (28, 40), (29, 44), (60, 3)]


def test_the_prompt_is_computed_once_and_rows_are_copied_from_where_they_differ(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    copy_row = KVCache.copy_row

    def counting(self: KVCache, source: int, target: int, length: int, begin: int = 0) -> None:
        assert torch.equal(self.keys[:, source, :, :begin], self.keys[:, target, :, :begin])
        copied.append(length - begin)
        copy_row(self, source, target, length, begin)

    monkeypatch.setattr(KVCache, "copy_row", counting)
    prompt = exported.workspace.tokenizer.encode(TEXTS[0])[:16]
    exported.search([Request(prompt, 15)], 4)
    assert copied[:3] == [16, 16, 16]
    assert len(copied) > 6 and all(count < 15 for count in copied[3:])
    assert sum(copied[3:]) < 15 * len(copied[3:]) / 2, "beams share most of what they have written"


def test_an_interrupted_search_leaves_room_for_the_next(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    search = BeamSearch(exported.workspace.model, exported.workspace.tokenizer, 3)
    request = Request(exported.prompts[0], 10)
    expected = search.search([request])
    extend, calls = BeamSearch._extend, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        extend(*arguments)

    monkeypatch.setattr(BeamSearch, "_extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.search([request])
    assert search.search([request]) == expected


def test_a_prompt_longer_than_the_context_keeps_its_end(exported: Exported) -> None:
    """As a drawn text does that long: the window moves by half a context."""
    ids = exported.workspace.tokenizer.encode(TEXTS[0] + TEXTS[1])[:50]
    (long,), (short,) = exported.search([Request(ids, 5), Request(ids[32:], 5)], 1)
    assert long == short
    (full,) = exported.search([Request(ids[:30], 100)], 2)
    assert {(len(each.tokens), each.finish) for each in full} == {(2, "length")}


def test_weights_that_are_no_numbers_and_a_bias_of_no_token_are_named(exported: Exported) -> None:
    with pytest.raises(UserError, match="there is no token 300"):
        exported.search([Request([1], 5, SamplingSettings(logit_bias=((300, 1.0),)))], 2)
    broken = Transformer(exported.workspace.model.config).eval()
    with torch.no_grad():
        broken.output_weight[5] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        BeamSearch(broken, exported.workspace.tokenizer, 2).search([Request([1], 5)])


class TestCommands:
    PROMPT = "The quick"

    @pytest.fixture(autouse=True)
    def here(self, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(exported.workspace.folder)

    def found(self, exported: Exported, beams: int, **options: Any) -> list[Found]:
        ids = exported.workspace.tokenizer.encode(self.PROMPT)
        return exported.search([Request(ids, 12)], beams, **options)[0]

    def test_the_best_text_is_written(self, exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
        generate(prompt=self.PROMPT, beams=3, max_new_tokens=12, length_penalty=0.5, temperature=0.0)
        shown = capsys.readouterr()
        best, *_ = self.found(exported, 3, length_penalty=0.5)
        assert shown.out == f"{self.PROMPT}{best.text}".removesuffix("\n") + "\n"
        assert re.match(rf"{len(best.tokens)} tokens in .*, 3 beams\. Next: ", shown.err)

    def test_several_are_told_apart_by_their_score(
        self, exported: Exported, capsys: pytest.CaptureFixture[str]
    ) -> None:
        overrides = ["generation.beams=4", "generation.early_stopping=true"]
        generate(overrides=overrides, prompt=self.PROMPT, num_samples=2, max_new_tokens=12)
        best = self.found(exported, 4, early_stopping=True)[:2]
        lines = [
            f"--- text {n + 1}, score {each.score:.4f} ---\n{self.PROMPT}{each.text}" for n, each in enumerate(best)
        ]
        assert capsys.readouterr().out == "".join(line.removesuffix("\n") + "\n" for line in lines)

    def test_in_a_session_and_as_a_sample_of_training(self, exported: Exported) -> None:
        workspace = exported.workspace
        settings = workspace.config.generation.model_copy(update={"max_new_tokens": 12})
        config = workspace.config.model_copy(update={"generation": settings})
        out = io.StringIO()
        session = Session(workspace.model, workspace.tokenizer, config, False, Printer(out), slots=1)
        session.handle("/set beams 3")
        session.handle("/set temperature 0.8")
        session.handle(self.PROMPT)
        best = self.found(exported, 3)[0].text
        assert out.getvalue().removesuffix("\n").endswith("\n" + best.removesuffix("\n"))
        assert "generation.temperature: a beam search draws nothing by chance" in out.getvalue()
        sampled = sample_text(workspace.model, workspace.tokenizer, self.PROMPT, session.settings)
        assert sampled == self.PROMPT + best

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": 0.8}, r"generation\.temperature: a beam search draws nothing by chance, so 0\.8"),
            ({"overrides": ["generation.top_p=0.95"]}, r"generation\.top_p: .* set it to 1\)"),
            ({"overrides": ["generation.top_k=7"]}, r"generation\.top_k: "),
            ({"min_p": 0.1}, r"generation\.min_p: "),
            ({"typical_p": 0.5}, r"generation\.typical_p: "),
            ({"num_samples": 4}, "num_samples: 3 beams find no more than 3 texts"),
            ({"length_penalty": 11.0}, "length_penalty: input should be less than or equal to 10"),
        ],
    )
    def test_what_makes_no_sense_with_it_is_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            generate(prompt=self.PROMPT, beams=3, **options)

    def test_what_a_recipe_sets_is_refused_too(self, tmp_path: Path) -> None:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("generation: {temperature: 0.7}")
        with pytest.raises(UserError, match="temperature"):
            generate(prompt=self.PROMPT, beams=3, recipe=recipe)

    def test_the_server_refuses_it(self) -> None:
        with pytest.raises(UserError, match="generation.beams: the server"):
            serve(overrides=["generation.beams=2"])
