"""Examples that every machine can make: from the signature of a standard-library function to what it does.

They are real text by many hands, enough to see fine-tuning work without a data set of one's own.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import orjson

from config.files import atomic_write

CHARACTERS = range(15, 200)
ExampleFormat = Literal["prompt-completion", "messages"]


def docstring_pairs(modules: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """`("def gcd(a, b):", "Return the greatest common divisor.")` for each public function of Python source files.

    The second is the first line of the docstring, where it is one whole sentence. A signature that comes twice is given
    once. Files that are not valid Python are passed over.
    """
    seen = set()
    for module in modules:
        for function in _functions(module):
            sentence = (ast.get_docstring(function) or "").partition("\n")[0].strip()
            signature = f"def {function.name}({ast.unparse(function.args)}):"
            if len(sentence) in CHARACTERS and sentence.endswith(".") and signature not in seen:
                seen.add(signature)
                yield signature, sentence


def _functions(module: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        try:
            tree = ast.parse(module.read_bytes())
        except (SyntaxError, ValueError):
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node


def as_record(signature: str, sentence: str, form: ExampleFormat) -> dict[str, Any]:
    """One line of a JSONL file. A completion begins with the space that stands between it and the prompt."""
    if form == "prompt-completion":
        return {"prompt": signature, "completion": f" {sentence}"}
    return {
        "messages": [{"role": "user", "content": signature}, {"role": "assistant", "content": sentence}],
    }


def write_examples(modules: Iterable[Path], form: ExampleFormat, path: Path) -> int:
    """Write the pairs of `modules` to `path` as JSON lines, atomically; returns how many."""
    count = 0
    with atomic_write(path) as file:
        for signature, sentence in docstring_pairs(modules):
            file.write(orjson.dumps(as_record(signature, sentence, form), option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count
