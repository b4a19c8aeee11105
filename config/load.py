"""Reading the configuration: four YAML files, a recipe over them, the command line over that.

Precedence: defaults < `extends:` chain < recipe < `section.key=value`. OmegaConf merges and interpolates; the result is
validated into the frozen models of `config.schema`.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from config.errors import UserError
from config.files import write_text
from config.schema import Config
from config.sources import SourceConfig

CONFIG_DIR = Path(__file__).parent
SECTIONS = ("model", "training", "data", "generation")
RENAMED = {("training", "muon", "newton_schulz_steps"): "steps"}
Layer = tuple[str, dict[str, Any]]  # where some values stand, and the values


def load_config(
    recipes: Sequence[Path] = (), overrides: Sequence[str] = (), saved: tuple[str, dict[str, Any]] | None = None
) -> Config:
    """Resolve the shipped defaults, `recipes` (later ones win) and `section.key=value` overrides into one whole.

    `saved` is an earlier run's resolved configuration and where it was found; it lies between defaults and recipes.
    Raises `UserError` naming the file, the key and the nearest right one, or the allowed values.
    """
    return _resolve(_layers(recipes, overrides, saved))


def read_setting(key: str, recipes: Sequence[Path] = (), overrides: Sequence[str] = ()) -> Any:
    """The value of `section.key` alone, where recipes and overrides need not make a valid whole by themselves."""
    value, _ = _merge(_layers(recipes, overrides))
    for part in key.split("."):
        value = value[part]
    return value


def _layers(
    recipes: Sequence[Path], overrides: Sequence[str], saved: tuple[str, dict[str, Any]] | None = None
) -> list[Layer]:
    layers = [(saved[0], copy.deepcopy(saved[1]))] if saved else []
    for _, layer in layers:
        # It holds every key of its variant, which the recipe of the earlier run may have been the only one to define.
        layer["model"]["variants"] = {layer["model"]["variant"]: {}}
    layers += [(str(path), layer) for recipe in recipes for path, layer in _recipe_chain(Path(recipe))]
    layers += [(f"command line: {text}", _parse_override(text)) for text in overrides]
    for _, layer in layers:
        _rename(layer)
    return layers


def _rename(layer: dict[str, Any]) -> None:
    """Give the keys of `layer` that have had other names those they have now."""
    for (*parents, old), new in RENAMED.items():
        tree: Any = layer
        for part in parents:
            tree = tree.get(part) if isinstance(tree, dict) else None
        if isinstance(tree, dict) and old in tree:
            tree.setdefault(new, tree.pop(old))


def config_from_dict(tree: dict[str, Any], origin: str) -> Config:
    """Validate a configuration that was saved earlier, from a checkpoint or a snapshot; `origin` is named in errors.

    A key that did not exist yet when it was saved has its default.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        if any(item["type"] == "missing" for item in error.errors()) and "variant" in tree.get("model", {}):
            return load_config(saved=(origin, tree))
        raise UserError(_explain(error, [(origin, tree)])) from error


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML; `load_config([saved_file])` gives it back."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def save_config(config: BaseModel, path: Path) -> None:
    """Write the resolved configuration to `path`, atomically."""
    write_text(path, to_yaml(config))


def with_vocab_size(config: Config, vocab_size: int) -> Config:
    """`config` with the tokenizer's vocabulary filled in, or `UserError` where the model's own is smaller."""
    given = config.model.vocab_size
    if given is not None and given < vocab_size:
        raise UserError(
            f"model.vocab_size is {given}, but the tokenizer has {vocab_size} tokens. "
            "Set model.vocab_size=null to take the tokenizer's, or train a smaller tokenizer."
        )
    model = config.model.model_copy(update={"vocab_size": given or vocab_size})
    return config.model_copy(update={"model": model})


def _resolve(layers: list[Layer]) -> Config:
    tree, origins = _merge(layers)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, origins)) from error


def _merge(layers: list[Layer]) -> tuple[Any, list[Layer]]:
    """The values of the defaults, the chosen variant and `layers`, and all layers that were merged, lowest first."""
    defaults, variants, shipped = _shipped()
    origins: list[Layer] = [(f"{CONFIG_DIR.name}/{name}_config.yaml", {name: defaults[name]}) for name in SECTIONS]
    for origin, layer in layers:
        _check_sections(origin, layer)
        variants = {**variants, **(layer.get("model", {}).pop("variants", None) or {})}
    try:
        given = OmegaConf.merge(*[OmegaConf.create(layer) for _, layer in layers]) if layers else OmegaConf.create({})
        assert isinstance(given, DictConfig)
        variant = str(OmegaConf.select(given, "model.variant") or defaults["model"]["variant"])
        if variant not in variants:
            where = _origin(["model", "variant"], [*origins, *layers])
            raise UserError(f"{where}: model.variant: there is no variant {variant!r}.{nearest(variant, variants)}")
        chosen = ("model.variants", {"model": _variant(variant, variants)})
        merged = OmegaConf.merge(shipped, chosen[1], given, {"model": {"variant": variant}})
        return OmegaConf.to_container(merged, resolve=True), [*origins, chosen, *layers]
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration does not resolve: {str(error).splitlines()[0]}") from error


@cache
def _shipped() -> tuple[dict[str, Any], dict[str, Any], DictConfig]:
    """The shipped settings, the variants of the model, and the settings as OmegaConf has them; not to be changed."""
    defaults = {name: read_yaml(CONFIG_DIR / f"{name}_config.yaml") for name in SECTIONS}
    variants = defaults["model"].pop("variants")
    return defaults, variants, OmegaConf.create(defaults)


def _variant(name: str, variants: dict[str, Any], seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """One entry of `variants:` with everything it extends beneath it."""
    if name not in variants:
        raise UserError(f"model.variants.{seen[-1]}: extends {name!r}, which is none.{nearest(name, variants)}")
    if name in seen:
        raise UserError(f"model.variants: {' -> '.join((*seen, name))} extend each other in a circle.")
    own = dict(variants[name] or {})
    parent = own.pop("extends", None)
    return {**(_variant(parent, variants, (*seen, name)) if parent else {}), **own}


def _recipe_chain(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """The recipe at `path` after every recipe it `extends:`, lowest precedence first."""
    if not path.exists() and (CONFIG_DIR / "recipes" / f"{path.name}.yaml").exists():
        path = CONFIG_DIR / "recipes" / f"{path.name}.yaml"
    if path.resolve() in seen:
        raise UserError(f"{path} extends itself: {' -> '.join(str(step) for step in (*seen, path))}.")
    layer = read_yaml(path)
    parents = layer.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    chain = [step for parent in parents for step in _recipe_chain(path.parent / parent, (*seen, path.resolve()))]
    return [*chain, (path, layer)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`; `UserError` where there is no such file, or it holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        recipes = sorted(recipe.stem for recipe in (CONFIG_DIR / "recipes").glob("*.yaml"))
        raise UserError(f"There is no configuration file {path}. Recipes that ship: {', '.join(recipes)}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file (not UTF-8).") from error
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold `key: value` lines, not a {type(tree).__name__}.")
    return tree


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, several times as fast


class _UniqueKeyLoader(_SafeLoader):  # type: ignore[misc]
    """YAML that refuses a key written twice, and reads `1e-4` as the number that it is."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key_node, _ in node.value:
            keys.append(self.construct_object(key_node, deep=True))
            if keys[-1] in keys[:-1]:
                message = f"key {keys[-1]!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Its counterpart: quotes the text `1e-4`, which would read back as a number, and escapes Unicode's line breaks."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A line break other than a line feed would read back as one."""
        style = '"' if any(character in text for character in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


for _kind in (_UniqueKeyLoader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise UserError(f"{text!r} is not an override: write section.key=value, such as training.max_steps=100.")
    try:
        tree: Any = yaml.load(value, Loader=_UniqueKeyLoader) if value else ""
    except yaml.YAMLError as error:
        raise UserError(f"The value of {key} is not valid YAML: {value!r}") from error
    for part in reversed(parts):
        tree = {part: tree}
    assert isinstance(tree, dict)
    return tree


def _check_sections(origin: str, layer: dict[str, Any]) -> None:
    for key, value in list(layer.items()):
        if key not in SECTIONS:
            raise UserError(f"{origin}: there is no section {key!r}.{nearest(str(key), SECTIONS)}")
        if value is None:
            del layer[key]
        elif not isinstance(value, dict):
            raise UserError(f"{origin}: the section {key!r} must hold `key: value` lines, not {value!r}.")


def nearest(word: str, known: Any) -> str:
    """A sentence to end an error with: which of the `known` names may have been meant by `word`."""
    names = [str(name) for name in known]
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Choose from: {', '.join(names)}."


def _explain(error: ValidationError, origins: list[tuple[str, dict[str, Any]]]) -> str:
    """One sentence per mistake: what set the value, its key, and what would be right."""
    return "\n".join(_explain_one(item, origins) for item in error.errors())


def _explain_one(item: Any, origins: list[tuple[str, dict[str, Any]]]) -> str:
    location = [str(part) for part in item["loc"]]
    message: str = str(item["msg"]).removeprefix("Value error, ")
    key, colon, rest = message.partition(": ")
    if item["type"] == "value_error" and colon and all(part.isidentifier() for part in key.split(".")):
        location += key.split(".")
        message = rest
    path = _drop_union_tags(location)
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path.append("kind")
    where = f"{_origin(path, origins)}: {'.'.join(path)}"
    if item["type"] == "extra_forbidden":
        return f"{where}: there is no such key.{nearest(path[-1], _fields_at(path[:-1]))}"
    if item["type"] == "missing":
        return f"{where}: this key is missing."
    if item["type"] == "union_tag_not_found":
        kinds = [repr(get_args(source.model_fields["kind"].annotation)[0]) for source in _models_in(SourceConfig)]
        return f"{where}: this key is missing; choose {', '.join(kinds)}."
    if item["type"] == "union_tag_invalid":
        return f"{where}: {item['ctx']['tag']!r} is not allowed; choose {item['ctx']['expected_tags']}."
    if item["type"] == "model_type":
        return (
            f"{where}: must hold the keys {', '.join(_fields_at(path))}, not {json.dumps(item['input'], default=str)}."
        )
    if item["type"] == "literal_error":
        return f"{where}: {item['input']!r} is not allowed; choose {item['ctx']['expected']}."
    if item["type"] == "value_error":
        return f"{where}: {message}."
    return f"{where}: {message[0].lower()}{message[1:]}, not {json.dumps(item['input'], default=str)}."


def _drop_union_tags(location: list[str]) -> list[str]:
    """pydantic puts the tag of a union into the location (`sources.web.hub.split`), which no user ever wrote."""
    if location[:2] == ["data", "sources"] and len(location) > 3:
        del location[3]
    return location


def _origin(path: list[str], origins: list[tuple[str, dict[str, Any]]]) -> str:
    """The last layer that set the key, or else the innermost of its parents that any layer set."""
    for length in range(len(path), 0, -1):
        for origin, layer in origins[::-1]:
            if _has(layer, path[:length]):
                return origin
    return "configuration"


def _has(tree: Any, path: list[str]) -> bool:
    if not path:
        return True
    return isinstance(tree, dict) and path[0] in tree and _has(tree[path[0]], path[1:])


def _fields_at(path: list[str]) -> list[str]:
    """Names of the keys allowed under `path`."""
    kinds: list[Any] = [Config]
    for part in path:
        annotations = [
            kind.model_fields[part].annotation for kind in kinds if part in getattr(kind, "model_fields", {})
        ]
        if not annotations:
            break
        kinds = [model for annotation in annotations for model in _models_in(annotation)]
    return sorted({name for kind in kinds for name in kind.model_fields})


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
