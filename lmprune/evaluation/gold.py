"""The right answers of a task of the harness, as tokens: of documents that it is never tested on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from lmprune.errors import DataError, UsageError
from lmprune.evaluation.failing import in_our_words
from lmprune.text.tokens import Tokens, token_ids


def gold_answers(name: str, tokenizer: Any, *, samples: int, max_length: int, seed: int) -> Tokens:
    """Questions of the task or group ``name`` with their right answers, which are what counts.

    From its training split, or else its validation split: as the harness writes a document as an example. Of a group,
    its tasks in turns. An answer that does not fit into ``max_length`` tokens is left out, and so is a question that
    fills them.

    Raises:
        UsageError: there is no such task, or it has neither split, or no right answers.
        NetworkError: its data are not on this machine and cannot be fetched.
        HostError: the harness fails.
    """
    from lmprune.evaluation.indexing import manager_of
    from lmprune.evaluation.loaded import quiet_harness

    manager = manager_of([name], option=f"--objective task:{name}: ")
    with quiet_harness(bars=False), in_our_words(name):
        tasks: dict[str, Any] = manager.load([name])["tasks"]
        pairs = [_pairs(task, seed) for task in tasks.values()]
    rows, starts = [], []
    with in_our_words():
        for context, answer in _in_turns(pairs):
            row, start = _encoded(tokenizer, context, answer)
            if start < len(row) <= max_length:
                rows.append(np.array(row, dtype=np.int32))
                starts.append(max(1, start))
            if len(rows) == samples:
                break
    if not rows:
        raise DataError(f"--objective task:{name}: no answer fits into {max_length} tokens. Raise --max-length")
    return Tokens(tuple(rows), f"right answers of {name}", starts=tuple(starts))


def _pairs(task: Any, seed: int) -> Iterator[tuple[str, str]]:
    """Contexts and answers in seeded order."""
    name = task.config.task
    if task.has_training_docs():
        documents = list(task.training_docs())
    elif task.has_validation_docs():
        documents = list(task.validation_docs())
    else:
        raise UsageError(
            f"--objective task:{name}: it has no training or validation split, and a cut must not be chosen on what "
            "it is tested on. Choose another task"
        )
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise UsageError(f"--objective task:{name}: it scores whole texts, without right answers. Use --data instead")
    random.Random(f"lmprune-gold-{seed}").shuffle(documents)
    return (_pair(task, document) for document in documents)


def _pair(task: Any, document: Any) -> tuple[str, str]:
    """The question, and the answer as an example gives it: with its worked steps, where the task has them."""
    example = task.fewshot_cfg
    own = example.samples is not None  # its examples are others, and may be of another form
    target = task.doc_to_target(document, None if own else example.doc_to_target)
    choices = task.doc_to_choice(document) if task.config.doc_to_choice else None
    context: Any = task.fewshot_context(document, num_fewshot=0)
    if task.multiple_input:  # the question has several beginnings, and one end
        context = context[task.doc_to_text(document)]
    elif isinstance(target, list):
        target = target[0]
    elif isinstance(target, int) and choices is not None:
        target = choices[target]
    return context, f"{task.config.target_delimiter}{target}"


def _in_turns(sources: list[Iterator[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """One of each until all have ended."""
    while sources:
        for source in list(sources):
            try:
                yield next(source)
            except StopIteration:
                sources.remove(source)


def _encoded(tokenizer: Any, context: str, answer: str) -> tuple[list[int], int]:
    """The ids of both together, and where the answer begins; spaces at the context's end go to the answer."""
    bare = context.rstrip(" ")
    context, answer = bare, context[len(bare) :] + answer
    whole, first = (token_ids(text, tokenizer) for text in (context + answer, context))
    start = next((place for place, (a, b) in enumerate(zip(whole, first)) if a != b), min(len(whole), len(first)))
    return whole, start
