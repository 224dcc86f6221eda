"""`pl-attnedit doctor`: what this machine offers, and whether a config can run on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from pl_attnedit.config_files import read_yaml
from pl_attnedit.errors import invalid
from pl_attnedit.files import json_text


@dataclass
class Placement:  # so that `--help` does not import Lightning
    """Where it runs: fields of Lightning's Trainer.

    Args:
        accelerator: cpu, gpu, npu, auto.
        devices: how many, or which.
        num_nodes: machines.
        strategy: auto, ddp, fsdp2, or a class with its arguments.
        precision: such as 32-true or bf16-mixed.
    """

    accelerator: Any = "auto"
    devices: Any = "auto"
    num_nodes: Any = 1
    strategy: Any = "auto"
    precision: Any = None


FIELDS = [field.name for field in fields(Placement)]


def main(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(
        prog="pl-attnedit doctor",
        exit_on_error=False,
        description="Print what this machine offers: devices, memory, versions, process groups, attention. With a config, "
        "say whether it can run here; status 1 where it cannot.",
    )
    help_ = "recipe, or config of a stage: its trainer counts; a second one and options given after it override it"
    parser.add_argument("-c", "--config", action=_TrainerOfConfig, help=help_)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_class_arguments(Placement, "trainer", instantiate=False)
    config = parser.parse_args(list(arguments))
    given = {name: value for name in FIELDS if (value := config.trainer[name]) != getattr(Placement, name)}
    trainer = _checked(given)

    from pl_attnedit.conversion.doctor import as_json, examine, obstacles
    from pl_attnedit.tracking.environment import environment

    platforms = examine()
    reasons: list[str] = []
    if config.config or given:
        reasons = obstacles(trainer, platforms)
    if config.json:
        result: dict[str, Any] = {"environment": environment(), "platforms": as_json(platforms)}
        if config.config or given:
            result["config"] = {"trainer": given, "runs": not reasons, "reasons": reasons}
        print(json_text(result, default=str), end="")
    else:
        print(_text(platforms))
        if config.config or given:
            print(_verdict(given, reasons))
    return 1 if reasons else 0


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The fields as the Trainer takes them."""
    import inspect

    from lightning.pytorch import Trainer

    import pl_attnedit.strategies  # noqa: F401  # knows `strategy: fsdp2`

    parser = ArgumentParser(exit_on_error=False)
    others = set(inspect.signature(Trainer.__init__).parameters) - {"self", *FIELDS}
    parser.add_class_arguments(Trainer, "trainer", skip=others, instantiate=False)
    return dict(parser.instantiate_classes(parser.parse_object({"trainer": given})).trainer)


class _TrainerOfConfig(ActionConfigFile):
    """Takes out of a recipe or a LightningCLI config where it is to run, and leaves the rest."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        trainer = read_yaml(values, "config", "recipe", "config of a stage").get("trainer") or {}
        if not isinstance(trainer, dict):
            raise invalid("trainer", trainer, "must be the fields of a Trainer")
        chosen = {name: trainer[name] for name in FIELDS if name in trainer}
        super().__call__(parser, cfg, json.dumps({"trainer": chosen}), option_string)


def _text(platforms: dict[str, Any]) -> str:
    """A `Platform` each."""
    lines = []
    for name, platform in platforms.items():
        about = [f"{count} x {device}" for device, count in _counted(platform.devices).items()] or ["no device"]
        lines.append(f"{name:5} {', '.join(about)}")
        versions = ", ".join(f"{part} {version}" for part, version in platform.versions.items())
        group = platform.process_group
        between = f"{group['backend']}{'' if group['available'] else ' is missing'}" if group else ""
        precision = "bfloat16" if platform.bfloat16 else ""
        facts = [
            ("versions", versions),
            ("processes", between),
            ("attention", platform.attention),
            ("precision", precision),
        ]
        lines += [f"      {what:10} {value}" for what, value in facts if value]
        lines += [f"      problem    {problem}" for problem in platform.problems]
    return "\n".join(lines)


def _counted(devices: list[dict[str, Any]]) -> dict[str, int]:
    """Devices of one name and memory, and how many of them there are."""
    counts: dict[str, int] = {}
    for device in devices:
        free = f", {device['free_bytes'] / 1e9:.1f} free" if "free_bytes" in device else ""
        text = f"{device['name']} ({device['memory_bytes'] / 1e9:.1f} GB{free})"
        counts[text] = counts.get(text, 0) + 1
    return counts


def _verdict(given: dict[str, Any], reasons: list[str]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in given.items()) or "the Trainer's defaults"
    if not reasons:
        return f"config ({settings}): can run here"
    return "\n".join([f"config ({settings}): cannot run here", *(f"      because    {reason}" for reason in reasons)])
