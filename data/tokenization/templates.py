"""Chat templates: Jinja in a sandbox, with the functions and tags that the templates of Hugging Face's tokenizers use.

Templates come from strangers. They can call nothing but what is given to them here, and keep nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from config.errors import UserError
from data.tokenization.chat import GENERATED, GENERATED_END


def render(template: str, values: Mapping[str, Any], *, marked: bool = False) -> str:
    """`template` filled with `values`; if `marked`, what is between `{% generation %}` and `{% endgeneration %}` stands
    between two private characters.

    Raises `UserError` where the template is not valid, refuses the values, or tries what the sandbox forbids.
    """
    try:
        return _compiled(template, marked).render(**values)
    except TemplateError as error:
        raise UserError(f"The chat template refuses the messages: {error}.") from error


class _Generation(Extension):
    """The tag around what a model is to say, as `transformers` has it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> str:
        said = str(caller())
        return f"{GENERATED}{said}{GENERATED_END}" if getattr(self.environment, "marks_generation") else said


class _Namespace(Namespace):
    """Jinja's, without the attributes by which one reaches into Python."""

    def __init__(*arguments: Any, **values: Any) -> None:  # a template may name a value "self"
        _check_names(dict(*arguments[1:], **values))
        Namespace.__init__(*arguments, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_names([name])
        super().__setitem__(name, value)


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")


@cache
def _compiled(template: str, marked: bool) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "namespace": _Namespace,
    }
    environment.extend(marks_generation=marked)
    return environment.from_string(template)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
