"""lm-evaluation-harness's tasks <- a model of ours: requests of texts in, log-likelihoods and texts out.

    task files ──lm_eval──> (context, continuation) ──encode as one text, cut──> ids ──score──> (sum, greedy)
                            (context, until, ...)   ──────────generate────────> text up to a stop string

Texts become ids as in the harness's own backend for transformers: context and continuation are
encoded together and cut where the context alone ends; white space at the context's end belongs to
the continuation. What has no context is predicted from the end-of-document id (from the BOS with
`add_bos`), which is also what long texts begin from.

The harness is an optional package; its version is in the results it writes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from castalia.errors import UserError
from castalia.evaluate.score import Progress, Request, inference, rolling_requests
from castalia.evaluate.subject import Subject

MAX_GENERATED = 256
"""Tokens generated at most where a task does not say, as in the harness."""


class Instance(Protocol):
    """A request of the harness."""

    args: Any


def need_harness() -> None:
    """Refuse in one sentence where the harness is not installed.

    Raises:
        UserError: it is not.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("tasks need lm-evaluation-harness, which is not installed: pip install 'castalia[eval]'")


def encode_pair(subject: Subject, context: str, continuation: str) -> Request:
    """Ids of a context and its continuation, cut where the context alone ends."""
    if context == "":
        ids = subject.tokenizer.encode(continuation)
        # A continuation that begins with the prefix itself is not given it twice.
        return Request([subject.prefix], ids) if ids[:1] != [subject.prefix] else Request(ids[:1], ids[1:])
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    whole, known = (_encode(subject, text) for text in (context + continuation, context))
    if not known:  # a context of white space alone
        return encode_pair(subject, "", continuation)
    return Request(known, whole[len(known) :])


def _encode(subject: Subject, text: str) -> list[int]:
    ids = subject.tokenizer.encode(text)
    return ids if subject.bos is None or ids[:1] == [subject.bos] else [subject.bos, *ids]


def log_likelihoods(
    subject: Subject, pairs: Sequence[tuple[str, str]], batch_size: int, progress: Progress | None = None
) -> list[tuple[float, bool]]:
    """(summed log-probability, whether it is the greedy continuation) of each continuation given its context."""
    requests = [encode_pair(subject, *pair) for pair in pairs]
    for (context, continuation), request in zip(pairs, requests, strict=True):
        if not request.continuation:
            raise UserError(f"{continuation!r} after {context[-40:]!r} has no token of its own: mend the task")
    return [(found.logprob, found.greedy) for found in subject.score(requests, batch_size, progress)]


def rolling(subject: Subject, texts: Sequence[str], batch_size: int) -> list[float]:
    """Log-probability of each text in whole, by windows that do not overlap but for the last."""
    requests, owners = [], []
    for number, text in enumerate(texts):
        windows = list(rolling_requests(subject.tokenizer.encode(text), subject.prefix, subject.max_length))
        requests += windows
        owners += [number] * len(windows)
    sums = [0.0] * len(texts)
    for owner, found in zip(owners, subject.score(requests, batch_size), strict=True):
        sums[owner] += found.logprob
    return sums


def generate_until(subject: Subject, requests: Sequence[tuple[str, dict[str, Any]]], batch_size: int) -> list[str]:
    """Continuations up to a stop string, which is left out; a context that is too long loses its beginning.

    Raises:
        UserError: more tokens are asked for than the model holds, or an option is not known.
    """
    team = subject.team
    texts: dict[int, str] = {}
    kinds: dict[str, list[int]] = {}
    for number, (_, options) in enumerate(requests):
        if team is not None and number % team.size != team.rank:
            continue
        kinds.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(number)
    for numbers in kinds.values():
        settings, stops = _sampling(subject, requests[numbers[0]][1])
        room = subject.max_length - settings["max_tokens"]
        if room < 1:
            raise UserError(
                f"max_gen_toks {settings['max_tokens']} leaves no room for a context in the model's "
                f"{subject.max_length} tokens: lower it in the task"
            )
        prompts = [_encode(subject, requests[number][0])[-room:] or [subject.prefix] for number in numbers]
        for number, text in zip(numbers, _generate(subject, prompts, settings, stops, batch_size), strict=True):
            texts[number] = text
    return [texts[i] for i in range(len(requests))] if team is None else team.texts(texts, len(requests))


def _sampling(subject: Subject, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The engine's settings and the stop strings of a task's `generation_kwargs`."""
    known = dict(options)
    until = known.pop("until", None) or []
    stops = [until] if isinstance(until, str) else [str(text) for text in until]
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    wanted = [value for name in names if (value := known.pop(name, None)) is not None]
    temperature = float(known.pop("temperature", 0.0) or 0.0)
    if not known.pop("do_sample", temperature > 0):
        temperature = 0.0
    settings = {"max_tokens": int(wanted[0]) if wanted else MAX_GENERATED, "temperature": temperature}
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        if (value := known.pop(name, None)) is not None and (temperature > 0 or name == "repetition_penalty"):
            settings[name] = value
    settings["seed"] = int(known.pop("seed", 0))
    if known:
        raise UserError(
            f"generation_kwargs {', '.join(known)} of a task is not supported; there are until, max_gen_toks, "
            "do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed"
        )
    return settings, [text for text in stops if text]


def _generate(
    subject: Subject, prompts: list[list[int]], settings: dict[str, Any], stops: list[str], batch_size: int
) -> list[str]:
    from castalia.generate.engine import generate

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    given = [prompts[i] for i in order]
    found = generate(subject.engine, subject.tokenizer, given, **settings, stop=stops, batch_size=batch_size)
    texts = [""] * len(prompts)
    for i, result in zip(order, found, strict=True):
        text = result.text
        for stop in stops:
            text = text.split(stop)[0]
        texts[i] = text
    return texts


def make_adapter(subject: Subject, batch_size: int, progress: Progress | None = None) -> Any:
    """The model as lm-evaluation-harness wants it: an `lm_eval.api.model.LM`."""
    from lm_eval.api.model import TemplateLM

    class Castalia(TemplateLM):  # type: ignore[misc, unused-ignore]
        """Requests of the harness, answered by functions of this module."""

        @property
        def eot_token_id(self) -> int:
            return subject.tokenizer.eod if subject.tokenizer.eod is not None else subject.prefix

        @property
        def prefix_token_id(self) -> int:
            return subject.prefix

        @property
        def max_length(self) -> int:
            return subject.max_length

        @property
        def tokenizer_name(self) -> str:
            return str(subject.tokenizer.identity()["sha256"])

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return subject.tokenizer.encode(string) if add_special_tokens is False else _encode(subject, string)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            known, rest = encode_pair(subject, context, continuation)
            return list(known), list(rest)

        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = [request.args for request in requests]
            found = log_likelihoods(subject, pairs, batch_size, progress)
            for pair, answer in zip(pairs, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", pair, answer)
            return found

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            return list(subject.score([Request(known, rest) for _, known, rest in requests], batch_size))

        def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
            return rolling(subject, [request.args[0] for request in requests], batch_size)

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            return generate_until(subject, [request.args for request in requests], batch_size)

        def get_model_info(self) -> dict[str, Any]:
            from castalia import __version__

            return {
                "model": f"castalia ({subject.name})",
                "model_num_parameters": sum(p.numel() for p in subject.model.parameters()),
                "model_dtype": str(next(subject.model.parameters()).dtype),
                "castalia_version": __version__,
                "checkpoint_step": subject.step,
                "add_bos": subject.bos is not None,
            }

    return Castalia()


class FoundTasks(NamedTuple):
    """Tasks that exist: their names, or .yaml files, and the harness's manager that loads them."""

    names: list[str]
    manager: Any


def find_tasks(
    tasks: Sequence[str], include_path: str | None = None, offline: bool = False, own_only: bool = False
) -> FoundTasks:
    """Look tasks of the harness up.

    Args:
        tasks: names, groups or patterns, such as `hellaswag`, `mmlu` or `arc_*`; or a task's .yaml file.
        include_path: folder of further task files; where it has all of them, the harness's are not looked through.
        offline: data sets are read from files and the cache alone, from now on in this process.
        own_only: look nowhere else.

    Raises:
        UserError: the harness is not installed, or a task is not known.
    """
    need_harness()
    if offline:
        # Read when `datasets` is first imported, which is below.
        os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    from lm_eval.tasks import TaskManager

    files = all(_is_file(name) for name in tasks)
    for defaults in (False,) if own_only else (False, True):
        if not defaults and include_path is None and not files:
            continue
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        matched = [[name] if _is_file(name) else manager.match_tasks([name]) for name in tasks]
        if all(matched):
            return FoundTasks(list(dict.fromkeys(name for names in matched for name in names)), manager)
    missing = next(name for name, names in zip(tasks, matched, strict=True) if not names)
    near = get_close_matches(missing, manager.all_tasks, 3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UserError(f"{missing}: there is no such task; {hint}--include-path names a folder of your own task files")


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def run_tasks(
    subject: Subject,
    tasks: FoundTasks,
    few_shot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    bootstrap: int = 100_000,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate on tasks of the harness.

    Args:
        subject: the model.
        tasks: see `find_tasks`.
        few_shot: examples in front of each question; None: as the task says.
        limit: documents of each task, at most; below 1 a share of them.
        batch_size: rows of a forward pass.
        bootstrap: resamples for standard errors that have no formula; 0: no standard errors.
        progress: called with (requests done, all of them), for each kind of request.

    Returns:
        What the harness's `simple_evaluate` returns, `samples` included; the same on each process of a team.

    Raises:
        UserError: a task's data cannot be had.
    """
    from lm_eval.evaluator import simple_evaluate

    with _own_state(), inference(subject.model):
        try:
            found: dict[str, Any] = simple_evaluate(
                model=make_adapter(subject, batch_size, progress),
                tasks=list(tasks.names),
                num_fewshot=few_shot,
                batch_size=batch_size,
                device=str(subject.device),
                limit=limit,
                bootstrap_iters=bootstrap,
                task_manager=tasks.manager,
            )
        except (ConnectionError, FileNotFoundError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"the data of {', '.join(tasks.names)} cannot be had ({first}): fetch it where there is a network, or "
                "name task files that read local data with --include-path"
            ) from error
    return found


@contextmanager
def _own_state() -> Iterator[None]:
    """What the harness changes or looks at in the process, put back afterwards.

    It seeds Python's, numpy's and torch's global generators, and gives results to the process of LOCAL_RANK 0 alone.
    """
    import random

    import numpy as np

    python, numpy_, torch_ = random.getstate(), np.random.get_state(), torch.get_rng_state()
    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.set_rng_state(torch_)


def metrics_of(results: dict[str, Any]) -> dict[str, float]:
    """`task_metric` -> value, without standard errors; a filter's name stands between where there is one."""
    found = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in metric and chosen:
                found[f"{task}_{metric}" + ("" if chosen == "none" else f"_{chosen}")] = float(value)
    return found


def results_json(results: dict[str, Any], name: str, began: float) -> str:
    """The file of results as the harness writes it: without samples, with their hashes, 2 spaces deep."""
    from lm_eval.utils import handle_non_serializable, hash_string

    samples = results.get("samples") or {}
    hashes = {
        task: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in found))
        for task, found in samples.items()
    }
    ended = time.time()
    content = {key: value for key, value in results.items() if key != "samples"} | {
        "task_hashes": hashes,
        "model_source": "castalia",
        "model_name": name,
        "model_name_sanitized": name.strip("/").replace("/", "__"),
        "start_time": began,
        "end_time": ended,
        "total_evaluation_time_seconds": str(ended - began),
    }
    return json.dumps(content, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"


def samples_json(samples: Sequence[dict[str, Any]]) -> str:
    """One line for each document, as the harness logs them."""
    from lm_eval.utils import handle_non_serializable

    return "".join(json.dumps(s, default=handle_non_serializable, ensure_ascii=False) + "\n" for s in samples)
