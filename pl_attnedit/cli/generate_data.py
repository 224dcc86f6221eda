"""`pl-attnedit generate-data`: text for training, sampled from the teacher itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from pl_attnedit.cli.devices import device_option, torch_device
from pl_attnedit.cli.options import TEACHER_HELP, OptionParser, at_least, out_option
from pl_attnedit.files import check_output


def main(arguments: Sequence[str]) -> int:
    parser = OptionParser(
        prog="pl-attnedit generate-data",
        description="Text sampled from the teacher itself, as a parquet file for `source:` in a recipe. A run that was "
        "interrupted goes on by the same command. Several GPUs: one run each, with a --seed and a file of its own.",
    )
    parser.add_argument("--teacher", required=True, help=TEACHER_HELP)
    parser.add_argument("--tokens", type=int, required=True, help="to generate, duplicates not counted")
    out_option(parser, "data.parquet", "file with columns text, source (default data.parquet)")
    parser.add_argument(
        "--prompts",
        type=expanduser,
        default="auto",
        help="chat = the model asks and answers (default where it has a chat template), none = it writes from the first "
        "token on (default elsewhere), or a text file with a prompt on each line",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="1 = the teacher's own distribution (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 = all tokens (default)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a text, question or answer (default 1024)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences at a time (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    device_option(parser)
    parser.add_argument("--dtype", default="auto", help="of the weights; default the teacher's own")
    options = parser.parse_args(list(arguments))
    at_least(1, options, "tokens")

    check_output("--out", options.out)
    from pl_attnedit.data.generated import Sampling, TeacherWriter, generate_data
    from pl_attnedit.teachers.sources.resolve import load_teacher, teacher_fingerprint

    names = ("prompts", "temperature", "top_p", "max_tokens", "batch_size", "seed")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    device = torch_device(options.device)
    teacher, tokenizer = load_teacher(options.teacher, options.dtype, device)
    writer = TeacherWriter(teacher, tokenizer, sampling)
    began = time.monotonic()

    def report(documents: int, tokens: int) -> None:
        seconds = time.monotonic() - began
        done = f"{documents:,} documents, {tokens:,}/{options.tokens:,} tokens, {seconds:.0f} s"
        print(f"generate-data  {done}", file=sys.stderr)

    fingerprint = teacher_fingerprint(options.teacher)
    documents, tokens = generate_data(writer, options.teacher, Path(options.out), options.tokens, report, fingerprint)
    print(f"{options.out}: {documents:,} documents, {tokens:,} tokens")
    return 0
