"""`pl-attnedit bench serve`: students beside their teacher in vLLM, in one configuration."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from os.path import expanduser
from typing import Any

from pl_attnedit.cli.bench.shared import folder_name, new_name, show_measured
from pl_attnedit.cli.options import known_teacher, yaml_value
from pl_attnedit.errors import invalid


def add_to(commands: Any) -> None:
    serve = commands.add_parser(
        "serve", help="students beside their teacher in vLLM: texts at once, tokens/s, times to and between tokens"
    )
    serve.add_argument("--teacher", help="hub name or folder, as vLLM takes it (default the first student's own)")
    serve.add_argument("--student", nargs="+", required=True, type=expanduser, help="folders of converted models")
    serve.add_argument("--kv-gb", type=float, default=1.0, help="memory of the KV cache (1e9 bytes, default 1)")
    serve.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192], help="tokens of prompts (1k, 8k)")
    serve.add_argument("--new-tokens", type=int, default=128, help="tokens of each answer (default 128)")
    serve.add_argument("--requests", type=int, default=64, help="of each load (default 64)")
    rates = [float("inf")]
    serve.add_argument("--rates", nargs="+", type=float, default=rates, help="requests/s (default inf: all at once)")
    serve.add_argument(
        "--shared",
        nargs="+",
        type=float,
        default=[0.0, 0.75],
        help="shares of prompts that are in the cache when they come (default 0 0.75)",
    )
    serve.add_argument("--vllm", help="measure `COMMAND serve` over HTTP, by the openai client; else in this process")
    serve.add_argument("--engine", type=yaml_value, default={}, help="more of vLLM's options: '{dtype: bfloat16}'")
    serve.add_argument("--tracking-uri", help="also log it as a run of this MLflow, e.g. sqlite:///mlflow.db")
    serve.set_defaults(run=run)


def run(options: Namespace) -> int:
    from transformers import AutoConfig

    from pl_attnedit.eval.bench.serve import bench_serve, loads_of, serve_table
    from pl_attnedit.eval.bench.vllm_engines import in_process, over_http, vllm_version

    for name in ("contexts", "rates", "new_tokens", "requests", "kv_gb"):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value <= 0:
                raise invalid("--" + name.replace("_", "-"), value, "must be more than 0")
    for share in options.shared:
        if not 0 <= share < 1:
            raise invalid("--shared", share, "must be at least 0 and below 1")
    if not isinstance(options.engine, dict):
        raise invalid("--engine", options.engine, "must be a mapping of vLLM's options")
    models = {"teacher": known_teacher(options.teacher, *options.student), **names(options.student)}
    vocabulary = min(AutoConfig.from_pretrained(model).vocab_size for model in models.values())
    client = None
    if options.tracking_uri is not None:  # what cannot be reached is said before the work
        from pl_attnedit.tracking import connect

        client = connect(options.tracking_uri)
    engine = {
        "kv_cache_memory_bytes": int(1e9 * options.kv_gb),
        "max_model_len": max(options.contexts) + options.new_tokens,
        "max_num_seqs": options.requests,  # so that memory decides how many are at once
        **options.engine,
    }
    start: Any = partial(in_process, options=engine)
    if options.vllm is not None:
        start = partial(over_http, options.vllm, options=engine)
    loads = loads_of(options.contexts, options.rates, options.shared, options.requests, options.new_tokens)
    result = show_measured(
        partial(bench_serve, models, start, loads, vocabulary),
        serve_table,
        lambda _: {"engine": engine, "vllm": vllm_version(options.vllm), "models": models},
        as_json=options.json,
    )
    if client is not None:
        log(client, result)
    return 0


def names(folders: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for folder in folders:
        found[new_name(folder_name(folder), ["teacher", *found])] = folder
    return found


def log(client: Any, result: Mapping[str, Any]) -> str:
    """A run of its own: figures as metrics, named by model and load, and all as serve.json. Returns its id."""
    from time import time

    from mlflow.entities import Metric, Param

    from pl_attnedit.tracking.client import EXPERIMENT, KIND_TAG
    from pl_attnedit.tracking.conversion import experiment_id
    from pl_attnedit.tracking.environment import source_tags
    from pl_attnedit.tracking.run import valid_key

    tags = {**source_tags(), KIND_TAG: "serving"}
    run = client.create_run(experiment_id(client, EXPERIMENT), tags=tags, run_name="bench serve")
    now, metrics = round(1000 * time()), []
    for row in result["rows"]:
        place = f"serve/{row['model']}/{row['context']}_rate_{row['rate']}_shared_{row['shared']}"
        flat = {key: row[key] for key in ("at_once", "output_tokens_per_s", "hits", "preemptions")}
        flat |= {f"{key}_{q}": value for key in ("first_ms", "between_ms") for q, value in row[key].items()}
        metrics += [Metric(valid_key(f"{place}/{key}"), value, now, 0) for key, value in flat.items()]
    params = [
        Param(valid_key(key), str(value))
        for key, value in {"vllm": result["vllm"], **result["models"], **result["engine"]}.items()
    ]
    client.log_batch(run.info.run_id, metrics=metrics, params=params)
    client.log_dict(run.info.run_id, dict(result), "serve.json")
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)
