"""YAML files that people write, and how they lie over each other.

One rule everywhere (recipes, stages, studies, the command line): mappings merge, lists and values replace.
"""

from __future__ import annotations

from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, get_loader, set_loader
from jsonargparse._actions import _ActionConfigLoad
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse._typehints import ActionTypeHint, NestedArg

from pl_attnedit.errors import UserError, invalid

RULE = (
    "Later files lie over earlier ones, and options over both: mappings merge, lists and values replace; null takes away "
    "a target, or an option of a stage or trainer."
)

# of each kind of file, fields that only it has, and the command that takes it
KINDS = {
    "recipe": ({"teacher", "targets", "stage1", "stage2"}, "pl-attnedit convert"),
    "config of a stage": ({"model"}, "pl-attnedit fit"),
    "study": ({"base", "variants"}, "pl-attnedit study"),
    "suite": ({"margins", "by_position", "retrieval", "library", "efficiency"}, "pl-attnedit eval --suite"),
}


def read_yaml(path: str | Path, field: str, *kinds: str) -> dict[str, Any]:
    """The mapping in a YAML file, in UTF-8 with or without a byte order mark.

    Args:
        field: what the file is to the user, for messages.
        kinds: those of `KINDS` that it may be; none = any.

    Raises:
        UserError: it cannot be read, is no YAML or no mapping, has a key twice, or is of another kind.
    """
    wanted = f"must be a {' or a '.join(kinds)}" if kinds else "must map fields to values"
    try:
        content = load_yaml(Path(path).expanduser().read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise invalid(field, str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise invalid(field, str(path), f"must be UTF-8, but has the byte 0x{byte:02x} in line {line}") from error
    except UserError as error:
        raise invalid(field, str(path), str(error)) from error
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds a {'list' if isinstance(content, list) else 'value'}"
        raise invalid(field, str(path), f"{what}, {wanted}")
    found = [kind for kind, (names, _) in KINDS.items() if names & content.keys()]
    if kinds and found and not set(kinds) & set(found):
        raise invalid(field, str(path), f"is a {found[0]}, which `{KINDS[found[0]][1]}` takes; {wanted}")
    if kinds:
        _check_groups(content, f", in {path}")
    return content


def _check_groups(content: Any, where: str = "") -> None:
    """Of these jsonargparse looks for a file by the name of a value, and null or a list would give all defaults."""
    for name in ("data", "trainer"):
        if name in content and not isinstance(content[name], dict):
            raise invalid(name, content[name], f"must be a mapping; null takes away single fields of it{where}")


def load_yaml(text: str) -> Any:
    """A YAML text as jsonargparse reads it.

    Raises:
        UserError: no YAML, a mapping that has a key twice, or something that contains itself.
    """
    try:
        if text.count(":") > 1 or "&" in text:
            _check_nodes(yaml.compose(text, yaml.SafeLoader), {})
        return _load(text) if text.strip() else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise UserError(f"is no YAML: {error.problem or error.context}{where}") from error
    except yaml.YAMLError as error:
        raise UserError(f"is no YAML: {' '.join(str(error).split())}") from error


def _check_nodes(node: yaml.Node | None, checked: dict[int, bool]) -> None:
    """checked: nodes that are, and (False) those that this one is in."""
    if id(node) in checked:  # an alias
        if node is not None and not checked[id(node)]:
            raise UserError(f"contains itself, from line {node.start_mark.line + 1} on")
        return
    checked[id(node)] = False
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    if isinstance(node, yaml.CollectionNode):
        for each in node.value:
            for part in each if isinstance(each, tuple) else (each,):
                _check_nodes(part, checked)
    checked[id(node)] = True


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(f"{key.value!r} is there twice, in line {lines[key.value]} and in line {line}")
            lines[key.value] = line


_load = get_loader("yaml")
set_loader("yaml", load_yaml, (yaml.YAMLError,))


def merged(base: Any, change: Any) -> dict[str, Any]:
    """`base` with the fields of `change`; mappings are merged by field, but not those of one `type` (a target) or class
    with those of another."""
    base, change = (each.as_dict() if isinstance(each, Namespace) else each for each in (base, change))
    if any(change.get(name, base.get(name)) != base.get(name) for name in ("type", "class_path")):
        return dict(change)
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict | Namespace) and isinstance(result.get(key), dict | Namespace)
        result[key] = merged(result[key], value) if both else value
    return result


def options_of(name: str, cls: type, skip: set[str], **types: Any) -> type:
    """A dataclass of the arguments of a class, of which none need be given (None): what it takes, a parser can list.

    Args:
        skip: names of arguments that are left out.
        types: instead of what the class declares.
    """
    found = [each for each in get_signature_parameters(cls, "__init__") if each.name not in skip]
    made = make_dataclass(
        name, [(each.name, types.get(each.name, each.annotation | None), field(default=None)) for each in found]
    )
    made.__doc__ = "\n".join([f"{name}.", "", "Args:", *(f"    {each.name}: {each.doc}" for each in found if each.doc)])
    return made


class LayeredParser(ArgumentParser):
    """Merges the mappings that files and options give. jsonargparse itself merges the fields of classes alone, and of a
    value that is a mapping keeps what came last."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        added = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            if type(action) is ActionTypeHint:
                action.__class__ = _Layer
        return added

    def _parse_known_args(self, args: Any, namespace: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        given = list(args) if self._subcommands_action else self._files_first(list(args))
        return super()._parse_known_args(given, namespace, **kwargs)

    def _files_first(self, args: list[str]) -> list[str]:
        """Files before options, wherever they stand; a mapping for a group of options as a config with this group alone,
        since jsonargparse merges those deeper than a group's fields."""
        groups = {f"--{action.dest}" for action in self._actions if isinstance(action, _ActionConfigLoad)}
        files, rest = [], []
        while args:
            first = args.pop(0)
            name, joined, value = first.partition("=")
            if name not in ("-c", "--config", *groups) or not (joined or args):
                rest.append(first)
                continue
            value = value if joined else args.pop(0)
            mapping = value.lstrip().startswith("{")
            if name in groups:
                rest += ["--config", f"{{{name[2:]}: {value}}}"] if mapping else [name, value]
            elif mapping:
                rest += ["--config", value]
            else:
                files += ["--config", value]
        return files + rest


class _Layer(ActionTypeHint):
    """The value of an option; all that files and the command line give goes through `_check_type`."""

    def _check_type(self, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        if isinstance(value, NestedArg) and self.is_mapping_typehint(self._typehint):
            key, value = value  # --targets.S.window 8
            if value == "":  # of a variable of the shell that is not set; it would be null
                raise UserError(f"{self.dest}.{key}: must have a value; null takes it away")
            value = load_yaml(value) if isinstance(value, str) else value
            for name in reversed(key.split(".")):
                value = {name: value}
        found = super()._check_type(value, append=append, cfg=cfg, mode=mode)
        before = cfg.get(self.dest) if cfg else None
        return merged(before, found) if isinstance(before, dict) and isinstance(found, dict) else found


class ConfigFile(ActionConfigFile):
    """The option `--config`: mistakes that only the file shows are named with it."""

    kinds: tuple[str, ...] = ()

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        if values.lstrip().startswith("{"):  # a mapping itself, as a study gives it
            _check_groups(load_yaml(values))
        else:
            content = read_yaml(values, "config", *self.kinds)
            if not Path(values).expanduser().is_file():  # a pipe, as of `-c <(...)`, can be read once
                values = yaml.safe_dump(content, default_flow_style=True, width=float("inf"))
        super().__call__(parser, cfg, values, option_string)


class RecipeFile(ConfigFile):
    kinds = ("recipe",)


class StageFile(ConfigFile):
    kinds = ("config of a stage",)
