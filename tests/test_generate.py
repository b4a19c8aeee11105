"""`scripts/generate.py`: one prompt, many lines, a terminal, a chat, and what is refused."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config.errors import UserError
from data.tokenization.chat import encode_messages
from inference.engine import Engine, Request
from inference.interactive import Session
from inference.prompting import chat_prompt, chat_stop_tokens
from inference.sampling import SamplingSettings
from inference.terminal import Printer
from model.transformer import Transformer
from scripts.generate import generate
from tests.workspace import Workspace, command, make_workspace, small_tokenizer

PROMPT = "The quick brown"


def continuation(workspace: Workspace, prompt: list[int], **options: Any) -> str:
    """What the engine writes with the shipped settings (temperature 0.8, top-p 0.95), or with `options`."""
    sampling = SamplingSettings(temperature=0.8, top_p=0.95)
    request = Request(prompt, **{"max_new_tokens": 20, "sampling": sampling, "seed": 3, **options})
    return "".join(piece.text for piece in Engine(workspace.model, workspace.tokenizer).generate([request]))


def test_the_command_writes_prompt_and_continuation(workspace: Workspace) -> None:
    done = subprocess.run(
        command("scripts/generate.py", "--prompt", PROMPT, "--seed", "3", "--max-new-tokens", "20"),
        cwd=workspace.folder,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    text = continuation(workspace, workspace.tokenizer.encode(PROMPT))
    assert done.stdout.removesuffix("\n") == (PROMPT + text).removesuffix("\n")
    last = done.stderr.splitlines()[-1]
    assert re.match(r"20 tokens in .* seed 3\. Next: python scripts/generate\.py", last)


def test_lines_on_standard_input_are_prompts_and_commands(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "/set seed 3\n\n/set max_new_tokens 20\nThe quick brown\n/set top_p 2\n/nonsense\n /help\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    generate()
    text = continuation(workspace, workspace.tokenizer.encode(PROMPT))
    slash = continuation(workspace, workspace.tokenizer.encode("/help"))
    assert capsys.readouterr().out == (
        "seed = 3\nmax_new_tokens = 20\n"
        + line(text)
        + "/set: generation.top_p: input should be less than or equal to 1, not 2.\n"
        + "There is no command /nonsense. /help lists them.\n"
        + line(slash)
    )


def line(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def test_settings_that_came_or_went_since_then_do_not_matter_to_a_model(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workspace.config.model_dump()
    del config["generation"]["min_p"]
    config["data"]["preprocess"]["of_another_version"] = 1
    other = make_workspace(workspace.folder / "version", config=config)
    generate(prompt=PROMPT, seed=3, max_new_tokens=20, checkpoint=str(other.checkpoint))
    assert capsys.readouterr().out == line(PROMPT + continuation(workspace, workspace.tokenizer.encode(PROMPT)))

    del config["model"]["norm"]
    shutil.rmtree(other.folder)
    unknown = make_workspace(workspace.folder / "version", config=config)
    with pytest.raises(UserError, match=r"another version of this program.*model\.norm"):
        generate(prompt=PROMPT, checkpoint=str(unknown.checkpoint))


class Terminal:
    """The command on a pseudo-terminal, as a person has it."""

    def __init__(self, workspace: Workspace, *arguments: str) -> None:
        environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        environment["XDG_STATE_HOME"] = str(workspace.folder / "state")
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.process = subprocess.Popen(
            command("scripts/generate.py", *arguments),
            cwd=workspace.folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.master = master
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 150) -> str:
        """All that was shown up to the first match after the last one waited for."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < end, f"{pattern!r} did not appear in {self.shown!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                self.shown += self._read()
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def _read(self) -> str:
        try:
            raw = os.read(self.master, 65536).decode(errors="replace")
        except OSError:  # the other side is closed
            pytest.fail(f"the command has ended, after {self.shown!r}")
        return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>])", "", raw)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        os.close(self.master)


def _own_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_interactive_mode_at_a_terminal(workspace: Workspace) -> None:
    """Continues a line, stops on Ctrl-C without ending, edits, remembers lines over sessions, leaves on Ctrl-D."""
    text = continuation(workspace, workspace.tokenizer.encode(PROMPT), max_new_tokens=12)
    history = workspace.folder / "state/quern/generate_history"
    history.parent.mkdir(parents=True)
    history.write_text("\n# 2026-01-01 00:00:00\n+from another day\n")
    terminal = Terminal(workspace, "--seed", "3", "--max-new-tokens", "12")
    try:
        terminal.wait_for("/help for help.*quern>")
        terminal.type("\x1b[A")  # arrow up
        terminal.wait_for("from another day")
        terminal.type("\x03")
        terminal.wait_for("quern>")
        terminal.type("The slow\x7f\x7f\x7f\x7fquick brown\r")  # four times backspace
        terminal.wait_for(r"quick brown.*" + r"\s+".join(map(re.escape, visible(text).split())) + ".*quern>")
        terminal.type("/set max_new_tokens 1000000000\r")
        terminal.wait_for("max_new_tokens = 1000000000.*quern>")
        terminal.type("endless\r")
        terminal.wait_for("endless.*\n.{200}")
        terminal.type("\x03\x03")
        terminal.wait_for("quern>")
        terminal.type("\x03")
        terminal.wait_for("quern>")
        terminal.type("/help\r")
        terminal.wait_for("Ctrl-D leaves.*quern>")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()
    kept = history.read_text()
    assert "+from another day" in kept and "+The quick brown" in kept and "+endless" in kept


def visible(text: str) -> str:
    """`text` as the command shows it on a terminal."""
    shown = FakeTerminal()
    Printer(shown).write(text)
    return shown.getvalue()


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.slow
def test_ctrl_c_while_a_prompt_is_continued_ends_the_command_with_130(workspace: Workspace) -> None:
    process = subprocess.Popen(
        command("scripts/generate.py", "--prompt", PROMPT, "--max-new-tokens", "1000000000", "--seed", "4"),
        cwd=workspace.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(len(PROMPT) + 50)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 130
    assert b"Traceback" not in errors


def test_lines_that_are_no_text_are_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="not UTF-8"):
        generate()


def test_a_terminal_that_is_not_utf8_gets_question_marks() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Printer(stream).write("na\u00efve")
    assert raw.getvalue() == b"na?ve"


def test_samples_have_seeds_of_their_own_and_come_in_order(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(prompt=PROMPT, num_samples=3, seed=3, max_new_tokens=20)
    ids = workspace.tokenizer.encode(PROMPT)
    texts = [line(PROMPT + continuation(workspace, ids, seed=3 + sample)) for sample in range(3)]
    assert len(set(texts)) == 3
    expected = "".join(f"--- sample {n + 1}, seed {3 + n} ---\n{text}" for n, text in enumerate(texts))
    assert capsys.readouterr().out == expected


def test_options_reach_the_sampling(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    ids = workspace.tokenizer.encode(PROMPT)
    sampling = SamplingSettings(1.3, 30, 0.9, 0.01, 1.2, 0.9, 0.5, 0.3, ((40, 2.0),))
    whole = continuation(workspace, ids, sampling=sampling, seed=9, max_new_tokens=40)
    stop = whole[10:13]
    generate(
        overrides=["generation.top_k=30", "generation.logit_bias={40: 2}"],
        prompt=PROMPT,
        temperature=1.3,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        typical_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        max_new_tokens=40,
        seed=9,
        stop=["${never}", stop],
    )
    assert capsys.readouterr().out == line(PROMPT + whole[: whole.index(stop)])


def test_a_text_that_repeats_itself_is_looked_up(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"prompt": PROMPT, "logit_bias": ["e=100"], "max_new_tokens": 60, "seed": 3}
    generate(**options)
    shown = capsys.readouterr()
    found = re.search(r"\), (\d+) of (\d+) looked-up tokens accepted, seed 3\.", shown.err)
    assert shown.out == f"{PROMPT}{'e' * 60}\n" and found and 30 < int(found[1]) <= int(found[2])
    generate(["generation.prompt_lookup_tokens=0"], **options)
    assert "looked-up" not in capsys.readouterr().err


def test_texts_of_a_form(workspace: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}')
    generate(prompt="", json_schema=str(schema), seed=3)
    assert isinstance(json.loads(capsys.readouterr().out)["n"], bool)
    generate(prompt="", regex="[0-9]{3} yes: no", seed=3)
    assert re.fullmatch("[0-9]{3} yes: no\n", capsys.readouterr().out)


@pytest.mark.parametrize("line", ["quantize int8", "precision = bf16", "compile=true", "context_length 8"])
def test_what_a_model_is_loaded_with_is_not_set_later(workspace: Workspace, line: str) -> None:
    out = io.StringIO()
    session = Session(workspace.model, workspace.tokenizer, workspace.config, False, Printer(out), slots=1)
    session.handle(f"/set {line}")
    key, value = re.split("[ =]+", line)
    assert out.getvalue() == f"{key} belongs to the loaded model. Start again with generation.{key}={value}.\n"
    assert session.settings == workspace.config.generation


def test_a_session_is_saved(workspace: Workspace, tmp_path: Path) -> None:
    generation = workspace.config.generation.model_copy(update={"seed": 3, "max_new_tokens": 5, "num_samples": 2})
    config = workspace.config.model_copy(update={"generation": generation})
    out = io.StringIO()
    session = Session(workspace.model, workspace.tokenizer, config, False, Printer(out), slots=2)
    session.handle(f"/save {tmp_path / 'early.md'}")
    session.handle(PROMPT)
    for name in ("all.json", "all.md", "all.doc"):
        session.handle(f"/save {tmp_path / name}")
    session.handle("/set logit_bias {300: 1}")
    texts = [continuation(workspace, workspace.tokenizer.encode(PROMPT), max_new_tokens=5, seed=n) for n in (3, 4)]
    saved = json.loads((tmp_path / "all.json").read_text())
    assert saved == {"texts": [{"prompt": PROMPT, "continuations": texts}]}
    assert all(f"**{PROMPT}**{text}" in (tmp_path / "all.md").read_text() for text in texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "all.md"]
    shown = out.getvalue()
    assert "nothing to save yet" in shown and "ends in .json or .md" in shown and "there is no token 300" in shown


def test_a_seed_is_drawn_and_named_where_none_is_given(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(prompt=PROMPT, max_new_tokens=20)
    first = capsys.readouterr()
    found = re.search(r"seed (\d+)", first.err)
    assert found
    generate(prompt=PROMPT, max_new_tokens=20, seed=int(found[1]))
    assert capsys.readouterr().out == first.out
    generate(prompt=PROMPT, max_new_tokens=20)
    assert capsys.readouterr().out != first.out


def test_prompts_from_a_file_and_from_standard_input(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "Zwölf\nBoxkämpfer"
    expected = line(text + continuation(workspace, workspace.tokenizer.encode(text)))
    path = tmp_path / "prompt.txt"
    path.write_text(text + "\n", encoding="utf-8")
    generate(prompt_file=path, seed=3, max_new_tokens=20)
    assert capsys.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    generate(prompt_file=Path("-"), seed=3, max_new_tokens=20)
    assert capsys.readouterr().out == expected


def test_an_empty_prompt_begins_a_new_document(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    generate(prompt="", seed=3, max_new_tokens=20)
    expected = continuation(workspace, [workspace.tokenizer.end_of_text_id])
    assert capsys.readouterr().out == line(expected)


def test_a_prompt_longer_than_the_context_keeps_its_end_and_says_so(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Text that goes on and on. " * 10
    generate(prompt=text, seed=3, max_new_tokens=20)
    shown = capsys.readouterr()
    ids = workspace.tokenizer.encode(text)
    assert f"the prompt has {len(ids)} tokens, the model sees 32" in shown.err
    assert shown.out == line(text + continuation(workspace, ids))


def test_a_smaller_context_is_all_that_the_model_sees(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """A text of more tokens than that slides over it; below, nothing changes."""
    ids = workspace.tokenizer.encode(PROMPT)
    narrow = Transformer(workspace.model.config.model_copy(update={"context_length": len(ids) + 4})).eval()
    narrow.load_state_dict(workspace.model.state_dict())
    whole, cut = continuation(workspace, ids), continuation(replace(workspace, model=narrow), ids)
    assert len(ids) + 20 < 31 and whole != cut
    for context, expected in ((len(ids) + 4, cut), (31, whole)):
        generate(prompt=PROMPT, seed=3, max_new_tokens=20, context_length=context)
        assert capsys.readouterr().out == line(PROMPT + expected)


def test_special_tokens_written_in_a_prompt_are_text(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    text = "<|endoftext|>"
    ids = workspace.tokenizer.encode(text)
    assert workspace.tokenizer.end_of_text_id not in ids
    generate(prompt=text, seed=3, max_new_tokens=20)
    assert capsys.readouterr().out == line(text + continuation(workspace, ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: input should be greater than or equal to 0, not -1"),
        ({"top_p": 2.0}, "top_p: input should be less than or equal to 1, not 2"),
        ({"top_k": -1}, "top_k: input should be greater than or equal to 0"),
        ({"min_p": 1.0}, "min_p: input should be less than 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: input should be greater than 0"),
        ({"typical_p": 0.0}, "typical_p: input should be greater than 0"),
        ({"presence_penalty": 3.0}, "presence_penalty: input should be less than or equal to 2, not 3"),
        ({"frequency_penalty": -3.0}, "frequency_penalty: input should be greater than or equal to -2"),
        ({"regex": "(a"}, "The regular expression '(a' cannot be used"),
        ({"regex": "a", "json_schema": "object"}, "regex: a text has one form"),
        ({"json_schema": "nowhere.json"}, "nowhere.json is not a file that can be read"),
        ({"overrides": ["generation.logit_bias={300: 1}"]}, "there is no token 300"),
        ({"max_new_tokens": 0}, "max_new_tokens: input should be greater than 0"),
        ({"context_length": 33}, "context_length: the model sees 32 tokens, not 33"),
        ({"num_samples": 0}, "num_samples: input should be greater than 0"),
        ({"device": "tpu"}, "device: 'tpu' is not allowed; choose 'auto', 'cpu', 'cuda' or 'mps'"),
        ({"overrides": ["generation.temprature=1"]}, "Did you mean 'temperature'"),
        ({"prompt_file": Path("nowhere.txt")}, "nowhere.txt is not a file"),
        ({"prompt_file": Path("latin.txt")}, "not UTF-8 text"),
        ({"prompt": PROMPT, "prompt_file": Path("latin.txt")}, "not both"),
        ({"checkpoint": "checkpoints/model_step_8.pt"}, "Steps that exist there: 7"),
        ({"checkpoint": "torn.pt"}, "cut short"),
        ({"overrides": ["training.checkpoint_dir=empty"]}, "python scripts/train.py"),
        ({"overrides": ["data.tokenizer_dir=other"], "checkpoint": "foreign.pt"}, "another tokenizer"),
    ],
)
def test_what_is_refused(workspace: Workspace, options: dict[str, Any], message: str) -> None:
    (workspace.folder / "latin.txt").write_bytes("Zwölf".encode("latin-1"))
    checkpoint = workspace.checkpoint.read_bytes()
    (workspace.folder / "torn.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    if options.get("checkpoint") == "foreign.pt":
        make_workspace(workspace.folder / "foreign", tokenizer_fingerprint="b" * 64)
        os.replace(workspace.folder / "foreign/checkpoints/model_step_7.pt", workspace.folder / "foreign.pt")
        small_tokenizer("data.tokenizer.vocab_size=290").save(workspace.folder / "other")
    with pytest.raises(UserError) as refused:
        generate(**{"prompt": None if "prompt_file" in options else PROMPT, **options})
    assert message in str(refused.value)


def test_the_tokenizer_of_the_checkpoint_is_found_where_it_was(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    small_tokenizer("data.tokenizer.vocab_size=280").save(workspace.folder / "newer")
    generate(overrides=["data.tokenizer_dir=newer"], prompt=PROMPT, seed=3, max_new_tokens=20)
    assert capsys.readouterr().out == line(PROMPT + continuation(workspace, workspace.tokenizer.encode(PROMPT)))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(
        tmp_path_factory.mktemp("chat"), "model.context_length=256", finetuning={"format": "messages"}
    )


class TestChat:
    """A checkpoint that was fine-tuned on messages."""

    def answer(self, chatty: Workspace, messages: list[dict[str, str]]) -> str:
        ids, _ = encode_messages(chatty.tokenizer, messages, add_generation_prompt=True)
        return continuation(chatty, ids, stop_tokens=chat_stop_tokens(chatty.tokenizer))

    def test_a_prompt_is_a_message(
        self, chatty: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(chatty.folder)
        answer = self.answer(chatty, [{"role": "user", "content": "Hello"}])
        generate(prompt="Hello", seed=3, max_new_tokens=20)
        assert capsys.readouterr().out == line(answer)
        generate(prompt="Hello", seed=3, max_new_tokens=20, chat=False)
        assert capsys.readouterr().out == line("Hello" + continuation(chatty, chatty.tokenizer.encode("Hello")))

    def test_the_conversation_is_kept_until_reset(self, chatty: Workspace) -> None:
        out = io.StringIO()
        generation = chatty.config.generation.model_copy(update={"seed": 3, "max_new_tokens": 20})
        config = chatty.config.model_copy(update={"generation": generation})
        session = Session(chatty.model, chatty.tokenizer, config, True, Printer(out), slots=1)
        talk: list[dict[str, str]] = []
        expected = ""
        for text in ("Hello", "You"):
            talk.append({"role": "user", "content": text})
            talk.append({"role": "assistant", "content": self.answer(chatty, talk)})
            expected += line(talk[-1]["content"])
            session.handle(text)
        session.handle(f"/save {chatty.folder / 'talk.json'}")
        assert json.loads((chatty.folder / "talk.json").read_text()) == {"messages": talk}
        session.handle("/reset")
        session.handle("You")
        alone = self.answer(chatty, [{"role": "user", "content": "You"}])
        assert alone != talk[-1]["content"]
        assert out.getvalue() == expected + f"Saved to {chatty.folder / 'talk.json'}.\n" + "Reset.\n" + line(alone)

    def test_it_goes_on_from_one_answer(self, chatty: Workspace) -> None:
        out = io.StringIO()
        session = Session(chatty.model, chatty.tokenizer, chatty.config, True, Printer(out), slots=1)
        session.handle("/set num_samples 2")
        assert "a conversation goes on from one answer" in out.getvalue()
        assert session.settings.num_samples == 1
        generation = chatty.config.generation.model_copy(update={"num_samples": 2})
        config = chatty.config.model_copy(update={"generation": generation})
        with pytest.raises(UserError, match="generation.num_samples"):
            Session(chatty.model, chatty.tokenizer, config, True, Printer(out), slots=1)

    def test_the_oldest_messages_go_when_the_context_is_full(self, chatty: Workspace) -> None:
        tokenizer = chatty.tokenizer
        turns = [
            {"role": role, "content": f"message {number}"}
            for number, role in enumerate(["user", "assistant", "user", "assistant", "user"])
        ]
        system = {"role": "system", "content": "Be brief"}
        whole, dropped = chat_prompt(tokenizer, [system, *turns], 1000, 20)
        assert dropped == 0 and whole == encode_messages(tokenizer, [system, *turns], add_generation_prompt=True)[0]
        shorter, dropped = chat_prompt(tokenizer, [system, *turns], len(whole) + 19, 20)
        assert dropped == 2
        assert shorter == encode_messages(tokenizer, [system, *turns[2:]], add_generation_prompt=True)[0]
        least, dropped = chat_prompt(tokenizer, [system, *turns], 1, 20)
        assert dropped == 4
        assert least == encode_messages(tokenizer, [system, turns[4]], add_generation_prompt=True)[0]

    def test_of_a_long_conversation_as_few_messages_go_as_can(
        self, chatty: Workspace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        talk = [{"role": ("user", "assistant")[n % 2], "content": f"{n} " + "x" * (n * 7 % 11)} for n in range(40)]

        def length(left_out: int) -> int:
            return len(encode_messages(chatty.tokenizer, talk[left_out:], add_generation_prompt=True)[0])

        lengths = {left_out: length(left_out) for left_out in [*range(0, 40, 2), 39]}
        calls: list[int] = []

        def counted(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            return encode_messages(*arguments, **options)

        monkeypatch.setattr("inference.prompting.encode_messages", counted)
        for limit in (
            1,
            lengths[39],
            lengths[38],
            lengths[20] - 1,
            lengths[20],
            lengths[2],
            lengths[0] - 1,
            lengths[0],
        ):
            calls.clear()
            ids, dropped = chat_prompt(chatty.tokenizer, talk, limit, 0)
            assert dropped == next((n for n, size in lengths.items() if size <= limit), 39)
            assert len(ids) == lengths[dropped] and len(calls) <= 7

    def test_without_a_chat_template_it_is_refused(self, chatty: Workspace) -> None:
        plain = small_tokenizer('data.tokenizer.special_tokens=["<|endoftext|>"]')
        with pytest.raises(UserError, match="no chat template"):
            chat_prompt(plain, [{"role": "user", "content": "Hello"}], 64, 1)


def test_control_characters_reach_a_terminal_as_symbols_only() -> None:
    terminal, file = FakeTerminal(), io.StringIO()
    text = "a\tb\n\x1b[2J\x07é\r\n"
    Printer(terminal).write(text)
    Printer(file).write(text)
    assert terminal.getvalue() == "a\tb\n␛[2J␇é\n"
    assert file.getvalue() == text
