"""From what a person asks to what the engine runs: requests by the generation settings, and the prompts of a chat."""

from __future__ import annotations

import secrets
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from config.errors import UserError
from config.load import load_config
from config.schema import GenerationConfig
from data.tokenization.chat import encode_messages
from data.tokenization.special import END
from inference.beams import BeamSearch, Found
from inference.choosing import check_bias
from inference.constraints import Constraint, check_json_schema, check_regex, json_object, json_schema, regex
from inference.engine import Engine, Request
from inference.sampling import SamplingSettings

if TYPE_CHECKING:
    from data.tokenization import Tokenizer
    from model.transformer import Transformer

Message = Mapping[str, str]  # "role" (system, user or assistant) and "content"

# With the values that are none.
_DRAWN = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1, "prompt_lookup_tokens": 0}


def make_requests(
    settings: GenerationConfig,
    prompt: Sequence[int],
    seed: int,
    stop_tokens: Sequence[int] = (),
    constraint: Constraint | None = None,
    logprobs: int | None = None,
    answer: bool = False,
) -> list[Request]:
    """A request for each of `settings.num_samples` samples of one prompt; their seeds are seed, seed + 1 and so on.

    The settings must be such as `with_token_ids` gives; `stop_tokens` are besides theirs; the rest is as in `Request`.
    """
    sampling = SamplingSettings(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        typical_p=settings.typical_p,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        logit_bias=bias_of(settings),
    )
    return [
        Request(
            prompt,
            settings.max_new_tokens,
            sampling,
            seed + sample,
            tuple(settings.stop),
            (*stop_tokens, *stop_ids_of(settings)),
            "stop" if settings.context == "stop" else "slide",
            logprobs=logprobs,
            constraint=constraint,
            answer=answer,
            prompt_lookup_tokens=settings.prompt_lookup_tokens,
        )
        for sample in range(settings.num_samples)
    ]


def check_beams(settings: GenerationConfig, given: Collection[str] = ()) -> None:
    """Raise `UserError` where texts are to be searched for by beams, and a setting was made that only drawn texts have.

    That is one whose value is not the shipped one, or which is among the keys `given`.
    """
    if settings.beams == 1:
        return
    if settings.context == "slide":
        raise UserError(
            "generation.context: the texts of a beam search end where the context is full. Leave it out (or set it to "
            "stop), or set beams to 1."
        )
    shipped = load_config().generation
    for key, off in _DRAWN.items():
        value = getattr(settings, key)
        if value != off and (key in given or value != getattr(shipped, key)):
            why = "checks no guesses" if key == "prompt_lookup_tokens" else "draws nothing by chance"
            raise UserError(
                f"generation.{key}: a beam search {why}, so {value} could do nothing. Leave it out (or set it to "
                f"{off}), or set beams to 1."
            )


def best_texts(model: Transformer, tokenizer: Tokenizer, settings: GenerationConfig, request: Request) -> list[Found]:
    """The `settings.num_samples` best texts that a search as wide as `settings.beams` finds, best first."""
    search = BeamSearch(
        model,
        tokenizer,
        settings.beams,
        length_penalty=settings.length_penalty,
        early_stopping=settings.early_stopping,
        compiled=settings.compile,
    )
    return search.search([request])[0][: settings.num_samples]


def constraint_of(settings: GenerationConfig, tokenizer: Tokenizer) -> Constraint | None:
    """The form that the settings ask for. Raises `UserError` for one that cannot be, or a file that is none."""
    if settings.regex is not None:
        return regex(settings.regex, tokenizer)
    if settings.json_schema is None:
        return None
    if settings.json_schema == "object":
        return json_object(tokenizer)
    return json_schema(_read_schema(settings.json_schema), tokenizer)


def check_form(settings: GenerationConfig) -> None:
    """Raise `UserError` where `constraint_of` would, before there is a tokenizer."""
    if settings.regex is not None:
        check_regex(settings.regex)
    elif settings.json_schema not in (None, "object"):
        check_json_schema(_read_schema(settings.json_schema))


def _read_schema(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a file that can be read. Give one with a JSON schema.") from error


def with_token_ids(settings: GenerationConfig, tokenizer: Tokenizer) -> GenerationConfig:
    """The settings with the ids of the tokens that `logit_bias` and `stop_tokens` name by their text.

    Raises `UserError` for a text that is not one token, an id that is none, and a token that is named twice.
    """
    bias: dict[int | str, float] = {}
    for name, value in settings.logit_bias.items():
        token = _token_of("logit_bias", name, tokenizer)
        if token in bias:
            raise UserError(f"logit_bias: token {token} is named twice, the second time as {name!r}.")
        bias[token] = value
    stops = [_token_of("stop_tokens", name, tokenizer) for name in settings.stop_tokens]
    resolved = settings.model_copy(update={"logit_bias": bias, "stop_tokens": stops})
    check_bias(bias_of(resolved), tokenizer.vocab_size)
    if (unknown := max(stops, default=0)) >= tokenizer.vocab_size:
        raise UserError(
            f"stop_tokens: there is no token {unknown}; this vocabulary has 0 to {tokenizer.vocab_size - 1}."
        )
    return resolved


def bias_of(settings: GenerationConfig) -> tuple[tuple[int, float], ...]:
    """The bias as the sampler takes it, of settings with ids."""
    return tuple((int(token), value) for token, value in settings.logit_bias.items())


def stop_ids_of(settings: GenerationConfig) -> tuple[int, ...]:
    """The stop tokens as a request has them, of settings with ids."""
    return tuple(int(token) for token in settings.stop_tokens)


def _token_of(key: str, text: int | str, tokenizer: Tokenizer) -> int:
    """The id of a token that the setting `key` names."""
    if isinstance(text, int):
        return text
    ids = tokenizer.encode(text, allow_special=True, continued=True)
    if len(ids) == 1:
        return ids[0]
    texts = [tokenizer.decode_bytes([token]).decode(errors="replace") for token in ids[:8]]
    parts = ", ".join(f"{name!r} ({token})" for name, token in zip(texts, ids))
    raise UserError(f"{key}: {text!r} is not one token of this vocabulary, but {parts or 'none'}. Name one.")


def seed_of(settings: GenerationConfig) -> int:
    """The seed that is set, or a new one; no random generator of the program is touched."""
    return secrets.randbits(31) if settings.seed is None else settings.seed


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], context_length: int, room: int
) -> tuple[list[int], int]:
    """The tokens that ask for the next answer, and how many of the oldest messages had to be left out.

    Messages are left out, a system message last, until `room` tokens remain for the answer or only the newest message
    is left. Raises `UserError` where the tokenizer has no chat template.
    """
    system, turns = list(messages[:1]), list(messages[1:])
    if messages[0]["role"] != "system":
        system, turns = [], list(messages)

    @cache
    def encoded(left_out: int) -> list[int]:
        return encode_messages(tokenizer, [*system, *turns[left_out:]], add_generation_prompt=True)[0]

    if len(encoded(0)) + room <= context_length or not turns:
        return encoded(0), 0
    newest = len(turns) - 1
    choices = [*range(2, newest, 2), newest]  # a question goes with its answer
    place = bisect_left(choices[:-1], True, key=lambda left_out: len(encoded(left_out)) + room <= context_length)
    return encoded(choices[place]), choices[place]


def chat_stop_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer, beside those that end every text."""
    return [tokenizer.special_tokens[END]] if END in tokenizer.special_tokens else []


def sample_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, settings: GenerationConfig, seed: int = 0
) -> str:
    """`prompt` and one continuation, for a look at a model in training.

    Leaves the model in the mode it was in, and touches no random generator.
    """
    was_training = model.training
    model.eval()
    try:
        settings = with_token_ids(settings, tokenizer)
        request = make_requests(settings, [*tokenizer.prefix_ids, *tokenizer.encode(prompt)], seed)[0]
        if settings.beams > 1:
            return prompt + best_texts(model, tokenizer, settings, request)[0].text
        return prompt + "".join(piece.text for piece in Engine(model, tokenizer).generate([request]))
    finally:
        model.train(was_training)
