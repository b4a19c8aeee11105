"""Command: serve a checkpoint over HTTP, with OpenAI's interface and a page."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from config.command import Overrides, PrintConfig, Recipe, resolve, run, size_of
from config.errors import UserError

if TYPE_CHECKING:
    from config.schema import Config
    from inference.loading import Loaded
    from inference.server.prompts import Served

ENVIRONMENT_KEY = "QUERN_API_KEY"

Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="PATH|latest", help="A checkpoint, a folder of them, or the latest.")
]
Host = Annotated[str, typer.Option(help="Where to listen. Other machines reach it at 0.0.0.0, which needs a key.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help=f"API keys, one a line; or put one into {ENVIRONMENT_KEY}. Without: open to all."
    ),
]
Name = Annotated[str | None, typer.Option("--model-name", help="The model's id. By default its run and step.")]
Device = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda|mps", help="Where to run.")]
ContextLength = Annotated[
    int | None, typer.Option(help="The most tokens seen at once; fewer need less memory. By default the model's.")
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Answer chats; by default if the model was fine-tuned on messages."),
]
Concurrent = Annotated[int, typer.Option(min=1, help="The most texts that are written together.")]
Queue = Annotated[int, typer.Option(min=0, help="The most texts that wait for that; further ones are refused.")]
MaxBody = Annotated[str, typer.Option(metavar="SIZE", help="The longest body of a request, such as 1MB.")]
MaxPrompt = Annotated[int | None, typer.Option(min=1, help="The longest prompt. By default the context is the limit.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="The most tokens of one text. By default what has room.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")]
HeaderTimeout = Annotated[float, typer.Option(min=0.1, help="Seconds for the headers of a request to come.")]
Connections = Annotated[int, typer.Option(min=1, help="The most connections; further ones are refused.")]
Grace = Annotated[float, typer.Option(min=0.0, help="Seconds that running answers get when the server is ended.")]
AllowHost = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Another name by which a local server may be called.")
]
Origin = Annotated[
    list[str] | None, typer.Option(metavar="URL", help="A site whose pages may use the server from a browser (CORS).")
]


def serve(
    overrides: Overrides = None,
    checkpoint: Checkpoint = "latest",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    model_name: Name = None,
    device: Device = None,
    context_length: ContextLength = None,
    chat: Chat = None,
    max_concurrent: Concurrent = 16,
    queue: Queue = 64,
    max_body: MaxBody = "1MB",
    max_prompt_tokens: MaxPrompt = None,
    max_tokens: MaxTokens = None,
    timeout: Timeout = 600.0,
    header_timeout: HeaderTimeout = 20.0,
    max_connections: Connections = 8192,
    grace: Grace = 30.0,
    allow_host: AllowHost = None,
    cors_origin: Origin = None,
    recipe: Recipe = None,
    print_config: PrintConfig = False,
) -> None:
    """Serve a checkpoint over HTTP: OpenAI's interface at /v1, a page to talk to it at /.

    Only this machine reaches it unless --host says otherwise. The section generation
    holds what a request that leaves a setting out gets. SIGTERM or Ctrl-C lets
    running answers finish.
    """
    options = {"training.device": device, "generation.context_length": context_length}
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    config = resolve(recipe, [*(overrides or []), *given], print_config)
    if config.generation.beams > 1:
        raise UserError("generation.beams: the server gives texts as they are drawn. Set it to 1.")
    if config.generation.num_samples > 1:
        raise UserError("generation.num_samples: a request says by its field n how many texts it wants. Set it to 1.")
    body_limit, keys = size_of("--max-body", max_body), _keys(api_key_file)
    from inference.server.addresses import address_of, is_loopback, listen

    local = is_loopback(host)
    if not keys and not local:
        raise UserError(
            f"Without an API key, {host} would be open to the network: give --api-key-file or set {ENVIRONMENT_KEY}."
        )
    from model.waiting import watch_cores

    watch_cores()
    from inference.engine import Engine
    from inference.loading import load_for_generation
    from inference.prompting import check_form
    from inference.server.app import create_app
    from inference.server.connections import connections
    from inference.server.limits import Limits
    from inference.server.logs import log_as_json
    from inference.server.metrics import Metrics
    from inference.server.run import serve_until_signal
    from inference.server.service import Service

    check_form(config.generation)
    with listen(host, port) as listener:
        log_as_json()
        loaded = load_for_generation(checkpoint, config, logging.getLogger("quern.server").info)
        served = _served(loaded, config, model_name, chat, max_prompt_tokens, max_tokens)
        service = Service(
            lambda: Engine(loaded.model, loaded.tokenizer, max_concurrent, compiled=config.generation.compile),
            max_concurrent + queue,
            Metrics(),
        )
        service.start()
        hosts = {"localhost", "127.0.0.1", "::1", host, *(allow_host or [])} if local else None
        limits = Limits(body_limit, timeout, keys, frozenset(hosts) if hosts else None)
        app = create_app(service, served, limits, cors_origin or [])
        card, address = served.card, address_of(listener)
        kind = "chat and completions" if card.chat else "completions"
        print(
            f"Serving {card.id}: {kind}, context {card.context_length:,} tokens, {'key' if keys else 'no key'} needed."
        )
        print(f"Next: open {address}, or use OpenAI's client with base_url={address}/v1", flush=True)
        serve_until_signal(app, service, listener, grace, connections(header_timeout, max_connections))


def _keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of the file and of the environment."""
    keys = [os.environ.get(ENVIRONMENT_KEY, "").strip()]
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} is not a text file that can be read. Give --api-key-file one key a line."
            ) from error
        keys += [line.strip() for line in lines if not line.startswith("#")]
        if not any(keys):
            raise UserError(f"{path} holds no key. Write one a line.")
    return tuple(key for key in keys if key)


def _served(
    loaded: Loaded,
    config: Config,
    name: str | None,
    chat: bool | None,
    max_prompt_tokens: int | None,
    max_tokens: int | None,
) -> Served:
    """The model as its users see it."""
    from inference.prompting import constraint_of, with_token_ids
    from inference.server.answers import Defaults, ModelCard
    from inference.server.prompts import Served

    info = loaded.info
    if chat and loaded.tokenizer.chat_template is None:
        raise UserError("--chat: the tokenizer has no chat template.")
    settings = config.generation
    limit = min(settings.max_new_tokens, max_tokens or settings.max_new_tokens)
    shared = settings.model_dump(include=set(Defaults.model_fields))
    card = ModelCard(
        id=name or f"{info.run_name or 'model'}/{info.step}",
        created=int(info.path.stat().st_mtime),
        context_length=loaded.model.config.context_length,
        parameters=loaded.model.num_parameters(),
        chat=loaded.chat if chat is None else chat,
        defaults=Defaults(max_tokens=limit, **shared),
    )
    settings = with_token_ids(settings, loaded.tokenizer)
    form = constraint_of(settings, loaded.tokenizer)
    return Served(card, loaded.tokenizer, _weights(loaded), settings, max_prompt_tokens, max_tokens, form)


def _weights(loaded: Loaded) -> str:
    """What tells the weights from others: their checksum, or size and time of a checkpoint without, type and device."""
    from model.archive import checksum_of

    path, table = loaded.info.path, loaded.model.token_embedding.weight
    found = path.stat()
    checksum = checksum_of(path) if path.is_file() else None
    return f"{checksum or (found.st_size, found.st_mtime_ns)} {table.dtype} {table.device.type}"


def main() -> None:
    """Run the command."""
    run(serve)


if __name__ == "__main__":
    main()
