"""Command: let a checkpoint write."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from config.command import Overrides, PrintConfig, Recipe, resolve, run
from config.errors import UserError

SLOTS = 16  # samples that are generated together; more of them wait

Prompt = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="The text to continue. Without one: interactive.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--prompt-file", metavar="FILE|-", help="Read the prompt from a file, or from standard input (-)."),
]
Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="PATH|latest", help="A checkpoint, a folder of them, or the latest.")
]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token; higher is more daring.")]
TopK = Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens; 0 means all.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this total probability.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Penalty = Annotated[float | None, typer.Option(help="Above 1 makes tokens already present less likely.")]
TypicalP = Annotated[float | None, typer.Option(help="Sample among the most typical tokens of this probability.")]
Presence = Annotated[float | None, typer.Option(help="Taken from the logit of tokens that the text holds.")]
Frequency = Annotated[float | None, typer.Option(help="The same, as many times as the text holds the token.")]
JsonSchema = Annotated[
    str | None, typer.Option(metavar="FILE|object", help="Write JSON of the schema in a file, or any JSON object.")
]
Regex = Annotated[str | None, typer.Option(metavar="PATTERN", help="Write what this matches as a whole.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="The most tokens to write.")]
NumSamples = Annotated[int | None, typer.Option(help="How many continuations to write.")]
Beams = Annotated[
    int | None, typer.Option(help="Above 1: no drawing, but a search so wide for the likeliest text, shown at its end.")
]
LengthPenalty = Annotated[
    float | None, typer.Option(help="Of a beam search: 0 favours short texts, 1 none, more favours long ones.")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End where this appears; may be repeated.")]
StopToken = Annotated[
    list[str] | None, typer.Option(metavar="TOKEN", help="End at this token, by text or id; may be repeated.")
]
Context = Annotated[
    str | None,
    typer.Option(metavar="slide|stop", help="Where the model's context is full: go on with the newest part, or end."),
]
Device = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda|mps", help="Where to run.")]
ContextLength = Annotated[
    int | None, typer.Option(help="The most tokens seen at once; fewer need less memory. By default the model's.")
]
Quantize = Annotated[
    str | None, typer.Option(metavar="none|int8|int4", help="Weights in fewer bits: faster on a CPU, less exact.")
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKEN=BIAS", help="Added to the logit of a token, by text or id; may be repeated."),
]
Probabilities = Annotated[
    bool, typer.Option("--probabilities", help="Colour each token by how sure the model was of it.")
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Treat prompts as chat messages; by default as the model was trained."),
]


def generate(
    overrides: Overrides = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    checkpoint: Checkpoint = "latest",
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    typical_p: TypicalP = None,
    presence_penalty: Presence = None,
    frequency_penalty: Frequency = None,
    logit_bias: LogitBias = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    max_new_tokens: MaxNewTokens = None,
    num_samples: NumSamples = None,
    beams: Beams = None,
    length_penalty: LengthPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_token: StopToken = None,
    context: Context = None,
    device: Device = None,
    context_length: ContextLength = None,
    quantize: Quantize = None,
    chat: Chat = None,
    probabilities: Probabilities = False,
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Let a checkpoint continue a prompt, or talk to it line by line.

    With --prompt the text is written to the terminal as it comes. Without it every
    line you type is continued (or answered, where the model was fine-tuned on
    messages); /help lists what else can be typed, Ctrl-D leaves.
    """
    options = {
        "generation.temperature": temperature,
        "generation.top_k": top_k,
        "generation.top_p": top_p,
        "generation.min_p": min_p,
        "generation.repetition_penalty": repetition_penalty,
        "generation.typical_p": typical_p,
        "generation.presence_penalty": presence_penalty,
        "generation.frequency_penalty": frequency_penalty,
        "generation.logit_bias": _biases(logit_bias) if logit_bias else None,
        "generation.json_schema": None if json_schema is None else _literal(json_schema),
        "generation.regex": None if regex is None else _literal(regex),
        "generation.max_new_tokens": max_new_tokens,
        "generation.num_samples": num_samples,
        "generation.beams": beams,
        "generation.length_penalty": length_penalty,
        "generation.seed": seed,
        "generation.stop": _literal(stop) if stop else None,
        "generation.stop_tokens": _literal([_token(name) for name in stop_token]) if stop_token else None,
        "generation.context": context,
        "training.device": device,
        "generation.context_length": context_length,
        "generation.quantize": quantize,
    }
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    config = resolve(recipe, [*(overrides or []), *given], print_config)
    if probabilities and config.generation.beams > 1:
        raise UserError("--probabilities shows those of drawn texts, not of a beam search. Leave it out, or --beams.")
    text = _read_prompt(prompt, prompt_file)
    from model.waiting import watch_cores

    watch_cores()
    from inference.loading import load_for_generation
    from inference.prompting import check_beams, check_form

    explicit = [text.partition("=")[0] for text in [*(overrides or []), *given]]
    check_beams(config.generation, [key.removeprefix("generation.") for key in explicit])
    check_form(config.generation)
    loaded = load_for_generation(checkpoint, config)
    model, tokenizer = loaded.model, loaded.tokenizer
    chat = loaded.chat if chat is None else chat
    from inference.colours import Display, display_for, legend
    from inference.terminal import Printer

    display = display_for(sys.stdout, tokenizer) if probabilities else Display()
    if text is not None:
        from inference.once import write_once

        write_once(config.generation, model, tokenizer, text, chat, SLOTS, display)
        return
    from inference.interactive import Session, talk

    printer = Printer(sys.stdout)
    if sys.stdin.isatty():
        name = f"{model.num_parameters() / 1e6:,.1f}M parameters, context {model.config.context_length:,} tokens"
        print(f"{name}. Type a text; /help for help, Ctrl-D to leave.", file=sys.stderr)
    if display.coloured:
        print(legend())
    talk(Session(model, tokenizer, config, chat, printer, SLOTS, display), printer)


def _biases(options: list[str]) -> str:
    """YAML of the biases: `50=-2` by a token's id, ` the=1` by its text, which may be quoted, as one of digits must."""
    biases: list[str] = []
    for option in options:
        name, _, value = option.rpartition("=")
        try:
            bias = float(value)
        except ValueError:
            bias = math.nan
        if not name or math.isnan(bias):
            raise UserError(f"--logit-bias {option}: give a token and a number, such as 50=-2 or ' the=1'.")
        biases.append(f"{json.dumps(_token(name), ensure_ascii=False)}: {bias}")
    return f"{{{', '.join(biases)}}}"


def _token(name: str) -> int | str:
    """A token as an option names it: its id, or its text, which may be quoted."""
    quoted = len(name) > 2 and name[0] == name[-1] == '"'
    return int(name) if name.isdecimal() else name[1:-1] if quoted else name


def _literal(value: str | Sequence[int | str]) -> str:
    """YAML of a text or several just as they are: what looks like an interpolation is none."""
    if isinstance(value, str):
        return yaml.safe_dump(_escaped(value), default_style='"', width=math.inf).strip()
    escaped = [_escaped(one) if isinstance(one, str) else one for one in value]
    return yaml.safe_dump(escaped, default_flow_style=True, width=math.inf).strip()


def _escaped(text: str) -> str:
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _read_prompt(prompt: str | None, path: Path | None) -> str | None:
    """The prompt of the command line, without the newline that ends a file."""
    if path is None:
        return prompt
    if prompt is not None:
        raise UserError("Give --prompt or --prompt-file, not both.")
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"The prompt in {path} is not UTF-8 text (byte {error.start:,}).") from error
    except OSError as error:
        raise UserError(f"{path} is not a file that can be read. Give --prompt-file a text file, or -.") from error


def main() -> None:
    """Run the command."""
    run(generate)


if __name__ == "__main__":
    main()
