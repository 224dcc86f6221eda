"""`pl-attnedit export`: a converted model in a checkpoint format that other software serves."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Sequence
from os.path import expanduser

from pl_attnedit.cli.options import OptionParser
from pl_attnedit.errors import UserError


def main(arguments: Sequence[str]) -> int:
    parser = OptionParser(
        prog="pl-attnedit export",
        description="Write a converted model as a stock checkpoint that needs nothing of ours.",
        epilog="deepseek_v3: MLA in every layer, with latent norm, of a dense teacher without biases and with plain RoPE. "
        "gguf: model.gguf for llama.cpp; GateSWA of a dense teacher, without sinks of either kind and element gates, or "
        "what deepseek_v3 takes, without graded frequencies. "
        "granite_swa: GateSWA without gates and kept sinks, learned ones allowed, of a teacher without QK-norm. "
        "qwen3_next: Gated DeltaNet without RoPE beside full layers, of a dense Qwen3 teacher. "
        "step3p5 and step3p7: GateSWA of a dense Qwen3 teacher, without sinks of either kind, for vLLM (text alone) "
        "and for transformers (with an unused vision tower). Qwen3-Next and Step store norms as weight - 1, which costs "
        "a student in bfloat16 digits of weights far below 1, one in float32 none.",
    )
    parser.add_argument("student", type=expanduser, help="folder of a converted model, e.g. runs/quickstart/student")
    parser.add_argument("folder", nargs="?", type=expanduser, help=SUPPRESS)  # as it was given before there was --out
    parser.add_argument("-o", "--out", type=expanduser, help="folder to write; must not exist")
    parser.add_argument(
        "--format", required=True, help="deepseek_v3, gguf, granite_swa, qwen3_next, step3p5 or step3p7"
    )
    options = parser.parse_args(list(arguments))
    if (options.folder is None) == (options.out is None):
        raise UserError("--out: must be given, once")

    from pl_attnedit.export import export

    print(export(options.student, options.out or options.folder, options.format))
    return 0
