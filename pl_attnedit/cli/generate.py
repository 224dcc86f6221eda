"""`pl-attnedit generate`: text from a converted model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os.path import expanduser
from typing import Any

from pl_attnedit.cli.devices import device_option, torch_device
from pl_attnedit.cli.options import OptionParser
from pl_attnedit.errors import invalid


def main(arguments: Sequence[str]) -> int:
    parser = OptionParser(prog="pl-attnedit generate", description="Greedy or sampled text from a converted model.")
    parser.add_argument("model", type=expanduser, help="folder of a converted model, e.g. runs/quickstart/student")
    parser.add_argument("prompt", help="text to continue, or with --chat the user's message")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to generate (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    device_option(parser)
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    options = parser.parse_args(list(arguments))
    if options.max_new_tokens < 1:
        raise invalid("--max-new-tokens", options.max_new_tokens, "must be at least 1")
    if not 0 <= options.temperature < math.inf:
        raise invalid("--temperature", options.temperature, "must be at least 0")

    import torch

    from pl_attnedit import load
    from pl_attnedit.data.encoding import encode
    from pl_attnedit.data.tokens import check_vocabulary, load_tokenizer

    model: Any = load(options.model).to(torch_device(options.device))  # type: ignore[arg-type]
    tokenizer: Any = load_tokenizer(options.model)
    if options.chat:
        if tokenizer.chat_template is None:
            raise invalid("--chat", options.model, "its tokenizer has no chat template")
        messages = [{"role": "user", "content": options.prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        [ids] = encode(tokenizer, [options.prompt])
    if not ids:
        raise invalid("prompt", options.prompt, "has no token to go on from")
    check_vocabulary(tokenizer, max(ids), model.config.vocab_size, "the prompt")
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.max_new_tokens, **sampling
    )
    print(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    return 0
