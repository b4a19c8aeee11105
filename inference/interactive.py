"""Talking to a model at the terminal: line by line, with commands, history, and a conversation where it can chat."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from config.errors import UserError
from config.load import config_from_dict
from inference.colours import Display
from inference.engine import Engine, Request
from inference.prompting import (
    Message,
    best_texts,
    chat_prompt,
    chat_stop_tokens,
    check_beams,
    constraint_of,
    make_requests,
    seed_of,
    with_token_ids,
)
from inference.saving import Exchange, save_session
from inference.terminal import Printer, Samples

if TYPE_CHECKING:
    from config.schema import Config, GenerationConfig
    from data.tokenization import Tokenizer
    from model.transformer import Transformer

HELP = """\
Type a text and press Enter: the model {does}. Alt-Enter begins a new line.
  /set              show the settings
  /set KEY VALUE    change one, such as: /set temperature 0.7   /set stop ["END"]   /set seed null
  /reset            {forgets}go back to the settings of the start
  /save FILE        write what was said to FILE.json or FILE.md
  /help             this page
Ctrl-C stops a text that is being written. Ctrl-D leaves. A text that begins with / needs a space before it.
"""

LOADED = ("precision", "quantize", "compile", "context_length")  # what the model is loaded with, and keeps


class Session:
    """What the interactive mode remembers: settings and, with `chat`, the conversation."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: Config,
        chat: bool,
        printer: Printer,
        slots: int,
        display: Display = Display(),
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._chat = chat
        self._check(config)
        self._start = self._config = config
        self._printer = printer
        self._slots = slots
        self._display = display
        self._messages: list[Message] = []
        self._exchanges: list[Exchange] = []
        self._engine: Engine | None = None

    @property
    def settings(self) -> GenerationConfig:
        """The generation settings as they are now."""
        return self._config.generation

    def handle(self, line: str) -> None:
        """Obey a command, or answer a text. A mistake is printed."""
        if not line.strip():
            return
        try:
            if line.startswith("/"):
                self._obey(line)
            else:
                self._answer(line)
        except UserError as error:
            self._say(f"{error}\n")

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/help":
            does, forgets = ("answers", "forget the conversation, and ") if self._chat else ("continues it", "")
            self._say(HELP.format(does=does, forgets=forgets))
        elif command == "/reset":
            self._config, self._messages, self._exchanges = self._start, [], []
            self._say("Reset.\n")
        elif command == "/save" and rest.strip():
            save_session(Path(rest.strip()).expanduser(), self._exchanges, self._chat)
            self._say(f"Saved to {rest.strip()}.\n")
        elif command == "/save":
            raise UserError("/save needs the name of a file, such as: /save talk.md")
        elif command == "/set" and rest.strip():
            self._set(rest.strip())
        elif command == "/set":
            for key, value in self.settings.model_dump().items():
                self._say(f"{key} = {value!r}\n")
        else:
            raise UserError(f"There is no command {command}. /help lists them.")

    def _set(self, text: str) -> None:
        key, _, value = text.replace("=", " ", 1).partition(" ")
        if key in LOADED:
            raise UserError(f"{key} belongs to the loaded model. Start again with generation.{key}={value.strip()}.")
        try:
            parsed: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"The value of {key} is not valid: {value.strip()}") from error
        tree = self._config.model_dump()
        tree["generation"] = {**tree["generation"], key: parsed}
        config = config_from_dict(tree, "/set")
        check_beams(config.generation, [key])
        constraint_of(config.generation, self._tokenizer)
        with_token_ids(config.generation, self._tokenizer)
        self._check(config)
        self._config = config
        self._say(f"{key} = {getattr(self.settings, key)!r}\n")

    def _check(self, config: Config) -> None:
        if self._chat and config.generation.num_samples > 1:
            raise UserError(
                "generation.num_samples: a conversation goes on from one answer. Set it to 1, or ask once by --prompt."
            )

    def _answer(self, text: str) -> None:
        settings, context = with_token_ids(self.settings, self._tokenizer), self._model.config.context_length
        stop_tokens, messages = list[int](), list[Message]()
        if self._chat:
            messages = [*self._messages, {"role": "user", "content": text}]
            room = min(settings.max_new_tokens, context // 2)
            prompt, dropped = chat_prompt(self._tokenizer, messages, context, room)
            if dropped:
                messages = messages[dropped:]
                self._say(f"(the conversation is longer than the model's context: the oldest {dropped} messages go)\n")
            stop_tokens = chat_stop_tokens(self._tokenizer)
        else:
            text_ids = self._tokenizer.encode(text.removeprefix(" ") if text.startswith(" /") else text)
            prompt = [*self._tokenizer.prefix_ids, *text_ids]
        requests = make_requests(
            settings,
            prompt,
            seed_of(settings),
            stop_tokens,
            constraint_of(settings, self._tokenizer),
            self._display.logprobs,
            self._chat,
        )
        texts = self._search(settings, requests[0]) if settings.beams > 1 else self._draw(requests)
        if texts:
            self._exchanges.append((text, texts))
        if self._chat and texts:
            self._messages = [*messages, {"role": "assistant", "content": texts[0]}]

    def _draw(self, requests: Sequence[Request]) -> tuple[str, ...]:
        """Show the texts as they come; what has come of them when all are finished, or at Ctrl-C."""
        samples = Samples(
            len(requests),
            self._printer,
            lambda sample: self._begin("sample", sample, len(requests)),
            self._display.rows,
        )
        pieces = self._engine_of(min(self._slots, len(requests))).generate(requests)
        try:
            samples.show(pieces)
        except KeyboardInterrupt:
            self._printer.end_line()
        return tuple(samples.texts)

    def _search(self, settings: GenerationConfig, request: Request) -> tuple[str, ...]:
        """Show the best texts that beams find; none at Ctrl-C."""
        try:
            found = best_texts(self._model, self._tokenizer, settings, request)
        except KeyboardInterrupt:
            return ()
        for place, each in enumerate(found):
            self._begin("text", place, len(found))
            self._say(each.text)
            self._printer.end_line()
        return tuple(each.text for each in found)

    def _engine_of(self, slots: int) -> Engine:
        """The engine of the last answer where it has as many slots: it still holds the conversation so far."""
        if self._engine is None or self._engine.slots != slots:
            self._engine = Engine(self._model, self._tokenizer, slots, compiled=self._start.generation.compile)
        return self._engine

    def _begin(self, what: str, place: int, count: int) -> None:
        if count > 1:
            self._say(f"--- {what} {place + 1} ---\n")

    def _say(self, text: str) -> None:
        self._printer.write(text)


def talk(session: Session, printer: Printer) -> None:
    """Read lines and handle them until the end of the input: with editing and history at a terminal, else plainly."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        try:
            for line in sys.stdin:
                session.handle(line.rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise UserError("Standard input is not UTF-8 text.") from error
        return
    read = _line_editor()
    # Outside of the two places that are made for it, an impatient second Ctrl-C must not end the program.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            try:
                line = read()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                session.handle(line)
            except KeyboardInterrupt:
                printer.end_line()
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGINT, before)


def _line_editor() -> Callable[[], str]:
    """A function that reads a line at the terminal, with the lines of earlier sessions at the arrow keys."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        history: FileHistory | InMemoryHistory = FileHistory(path)
    except OSError:
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        "quern> ",
        history=history,
        auto_suggest=AutoSuggestFromHistory(),
        key_bindings=keys,
        completer=WordCompleter(["/help", "/set", "/reset", "/save"], sentence=True),
        complete_while_typing=False,
    )
    return session.prompt


def history_file() -> Path:
    """Where the lines typed in the interactive mode are kept: the user's state folder, as the XDG standard has it."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "quern" / "generate_history"
