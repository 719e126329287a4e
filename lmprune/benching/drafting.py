"""A pruned model as the draft of its own base: how often they agree, what that should be worth, and what it is worth.

The draft is a real checkpoint or the cut in memory; `generate(assistant_model=...)` of transformers does the rest, and
what it gives is the base's own output, which is checked token for token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lmprune.benching import devices
from lmprune.benching.draft_rows import Costs, DraftReport, DraftRow, DraftSettings, Measured
from lmprune.cuts.recipe import Recipe
from lmprune.errors import HostError, ModelError, UsageError
from lmprune.models.cut import Cut, open_cut
from lmprune.models.locate import ModelFolder
from lmprune.models.runtimes import WRONG
from lmprune.models.serving import check_cut
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens, tokenize

now: Callable[[], float] = time.perf_counter
"""What is read before and after whatever is timed: benchmarks on a shared machine read the processor's time instead."""
_RUNS = 12
_APART = 5
"""Prompts on which the host's own work is found."""


def draft(
    base: str | Path | Recipe | Cut,
    cut: str | Path | Recipe | Cut | None = None,
    settings: DraftSettings | None = None,
    data: DataSettings | None = None,
) -> DraftReport:
    """Judge ``cut`` as a draft of ``base``.

    Args:
        base: whatever `open_cut` opens; a pruned model alone is judged as a draft of its own base.
        cut: the draft: likewise.

    Raises:
        ModelError: the two do not share a vocabulary, or the base of a pruned model cannot be found.
        UsageError: prompt and tokens pass a model's window.
        HostError: memory is short, or transformers cannot use this draft.
    """
    from lmprune.forward.machine import out_of_memory

    settings = settings or DraftSettings()
    whole, small = pair(base, cut)
    _check_vocabulary(whole, small)
    _check_window(whole, small, settings)
    compared, prompts = texts(whole, settings, data or DataSettings())
    try:
        return _judged(whole, small, compared, prompts, settings)
    except RuntimeError as exc:
        if not out_of_memory(exc):
            raise
        raise HostError("out of memory with base and draft. Use a smaller --max-length or --dtype bfloat16") from exc


def pair(base: str | Path | Recipe | Cut, cut: str | Path | Recipe | Cut | None) -> tuple[Cut, Cut]:
    """The base and its draft."""
    first = open_cut(base)
    if cut is not None:
        return first, open_cut(cut)
    origin = first.origin
    if origin.base is None:
        raise ModelError(f"{origin.problem}. Give the base, and the draft with --recipe")
    return _whole(origin.base), first


def _whole(folder: ModelFolder) -> Cut:
    return Cut(folder, name=folder.name)


def _check_vocabulary(base: Cut, draft: Cut) -> None:
    sizes = [_vocabulary(one) for one in (base, draft)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{draft.name} has a vocabulary of {sizes[1]} tokens and {base.name} one of {sizes[0]}: a draft needs the "
            "same. Cut the base itself"
        )
    words = [one.tokenizer().get_vocab() for one in (base, draft)]
    if words[0] != words[1]:
        example = next(word for word, number in words[0].items() if words[1].get(word) != number)
        raise ModelError(
            f"{draft.name} has another tokenizer than {base.name}: {example!r} is token {words[0][example]} of the "
            f"base and {words[1].get(example, 'none')} of the draft. Cut the base itself"
        )


def _vocabulary(cut: Cut) -> int:
    inner = cut.config.get("text_config") or cut.config
    return int(inner["vocab_size"])


def _check_window(base: Cut, draft: Cut, settings: DraftSettings) -> None:
    windows = [window for window in (base.window, draft.window) if window is not None]
    wanted = settings.prompt_length + settings.tokens + max(settings.numbers) + 1
    if windows and settings.prompts and wanted > min(windows):
        raise UsageError(
            f"--prompt-length {settings.prompt_length} and --tokens {settings.tokens} pass the window of {min(windows)}"
        )


def texts(base: Cut, settings: DraftSettings, data: DataSettings) -> tuple[Tokens, list[Any]]:
    """What is compared, and the beginnings of the samples that follow, as prompts.

    Raises:
        DataError, NetworkError: the text cannot be had.
    """
    every = tokenize(
        data,
        base.tokenizer(),
        samples=settings.samples + settings.prompts,
        max_length=min(max(settings.max_length, settings.prompt_length), base.window or settings.max_length),
        seed=settings.seed,
        default=base.default_data,
    )
    count = min(settings.samples, max(1, every.samples - settings.prompts))
    rest = every.rows[count:] or every.rows
    return every.take(count), [row[: settings.prompt_length] for row in rest[: settings.prompts]]


def _judged(whole: Cut, small: Cut, compared: Tokens, prompts: Sequence[Any], settings: DraftSettings) -> DraftReport:
    from lmprune.forward.agreement import agreement
    from lmprune.forward.machine import pick_device

    device = str(pick_device(settings.device))
    base, draft = (one.load(dtype=settings.dtype, device=device) for one in (whole, small))
    agreed = agreement(base, draft, compared)
    costs = costs_of(base, draft, settings)
    rows = predicted(costs, agreed.greedy, agreed.acceptance, settings)
    best = max(rows, key=lambda row: row.greedy).proposed
    measured = _measured(base, draft, prompts, best, settings) if prompts else None
    return DraftReport(
        base=whole.name,
        draft=small.name,
        layers=(whole.layers, small.layers),
        greedy=agreed.greedy,
        acceptance=agreed.acceptance,
        compared=agreed.tokens,
        source=compared.source,
        costs=costs,
        rows=rows,
        measured=measured,
        device=devices.describe(device),
    )


def predicted(costs: Costs, greedy: float, acceptance: float, settings: DraftSettings) -> tuple[DraftRow, ...]:
    """What a draft should be worth, by number of draft tokens."""
    return tuple(DraftRow(g, costs.speed_up(greedy, g), costs.speed_up(acceptance, g)) for g in settings.numbers)


# --- what passes cost -------------------------------------------------------------------------------------------------


def costs_of(base: Any, draft: Any, settings: DraftSettings) -> Costs:
    """Median seconds of passes with a cache after a prompt, of both models in turns."""
    clock = _Clock(base, draft, settings.prompt_length, settings.numbers)
    for _ in range(_RUNS):
        clock.turn()
    return clock.costs()


class _Clock:
    """Times passes of both models, one after the other, whenever it is asked to."""

    def __init__(self, base: Any, draft: Any, prompt_length: int, numbers: Sequence[int]) -> None:
        import torch

        words = base.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(words, (1, prompt_length), generator=generator).to(base.device)
        self._base, self._draft = base, draft
        self._widths = [1, *(g + 1 for g in numbers)]
        self._spent: dict[tuple[str, int], list[float]] = {}
        self.turn()
        self._spent.clear()  # the first time of all is never typical

    def turn(self) -> None:
        """One pass of each kind."""
        for name, model, widths in (("base", self._base, self._widths), ("draft", self._draft, [1])):
            for width, seconds in _passes(model, self._ids, widths):
                self._spent.setdefault((name, width), []).append(seconds)

    def costs(self) -> Costs:
        """The medians of all turns."""
        middle = {key: statistics.median(times) for key, times in self._spent.items()}
        reading = {width: middle["base", width] for width in self._widths}
        return Costs(middle["base", 1], middle["draft", 1], reading, (middle["base", 0], middle["draft", 0]))


def _passes(model: Any, ids: Any, widths: Sequence[int]) -> Iterator[tuple[int, float]]:
    """Number of tokens -> seconds of a pass over them after the prompt ``ids``, whose own pass is that of 0."""
    import torch

    def timed(**given: Any) -> tuple[Any, float]:
        devices.wait(ids.device)
        began = now()
        cache = model(use_cache=True, **given).past_key_values
        devices.wait(ids.device)
        return cache, now() - began

    with torch.inference_mode():
        cache, seconds = timed(input_ids=ids)
        yield 0, seconds
        timed(input_ids=ids[:, :1], past_key_values=cache)  # after a prompt the first is the slowest
        for width in widths:
            yield width, timed(input_ids=ids[:, :1].expand(1, width), past_key_values=cache)[1]


# --- what it does -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """Greedy decoding after one prompt: seconds in all and in the models, tokens made, passes of base and draft."""

    ids: list[int]
    seconds: float
    inside: float
    tokens: int
    passes: int
    drafted: int

    @classmethod
    def of(cls, base: Any, prompt: Any, tokens: int, draft: Any = None) -> _Run:
        """Generate."""
        with _watched(base) as read, _watched(draft) as drafted:
            ids, seconds = _generated(base, prompt, tokens, draft)
        return cls(ids, seconds, sum(read) + sum(drafted), len(ids) - len(prompt), len(read), len(drafted))

    @property
    def host(self) -> float:
        """Seconds besides the models' passes, for each pass of the base."""
        return (self.seconds - self.inside) / self.passes


@contextmanager
def _watched(model: Any) -> Iterator[list[float]]:
    """Within the block, the seconds of each call of ``model``."""
    spent: list[float] = []
    if model is None:
        yield spent
        return
    began = [0.0]

    def before(*_: Any) -> None:
        began[0] = now()

    def after(*_: Any) -> None:
        devices.wait(model.device)
        spent.append(now() - began[0])

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def _measured(base: Any, draft: Any, prompts: Sequence[Any], proposed: int, settings: DraftSettings) -> Measured:
    """Generate greedily after each prompt, alone and with the draft, in turns; a few prompts before that do not count.

    What passes cost is timed between the prompts, so that a machine that becomes busier does so for all alike, and all
    is told by medians, since a busy machine makes single runs many times as long.

    Raises:
        HostError: transformers cannot use this draft.
    """
    _propose(draft, proposed)
    clock = _Clock(base, draft, settings.prompt_length, [proposed])

    def both(chosen: Sequence[Any]) -> list[tuple[_Run, _Run]]:
        pairs = []
        for number, prompt in enumerate(tqdm(chosen, "prompts", leave=False, disable=None)):
            turns = [None, draft] if number % 2 else [draft, None]  # neither always comes second
            made = {one is not None: _Run.of(base, prompt, settings.tokens, one) for one in turns}
            clock.turn()
            pairs.append((made[False], made[True]))
        return pairs

    both(prompts[:1])
    apart = both(prompts[:_APART])
    overhead = tuple(statistics.median(pair[which].host for pair in apart) for which in (0, 1))
    pairs = both(prompts)
    costs = clock.costs()

    def expected(hosts: Sequence[float]) -> float:
        return statistics.median(
            costs.alone(alone.tokens, hosts[0]) / costs.together(two.passes, two.drafted, proposed, hosts[1])
            for alone, two in pairs
        )

    return Measured(
        proposed=proposed,
        speed_up=statistics.median(alone.seconds / two.seconds for alone, two in pairs),
        predicted=expected((0.0, 0.0)),
        with_host=expected(overhead),
        overhead=(overhead[0], overhead[1]),
        prompts=len(prompts),
        same=sum(alone.ids == two.ids for alone, two in pairs),
        kept=sum(two.tokens for _, two in pairs) / sum(two.passes for _, two in pairs),
    )


def _propose(draft: Any, proposed: int) -> None:
    """Have transformers propose exactly so many tokens, and not fewer where the draft is unsure.

    By nothing else that its makers set: penalties would make it propose what the base does not say.
    """
    from transformers import GenerationConfig

    draft.generation_config = GenerationConfig(
        num_assistant_tokens=proposed,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
        eos_token_id=draft.generation_config.eos_token_id,
    )


def _generated(base: Any, prompt: Any, tokens: int, draft: Any = None) -> tuple[list[int], float]:
    """All token ids after greedy decoding, and the seconds it took."""
    import torch

    from lmprune.forward.calls import generating
    from lmprune.forward.machine import out_of_memory

    end = base.generation_config.eos_token_id
    ids = torch.as_tensor(prompt, dtype=torch.long, device=base.device)[None]
    devices.wait(base.device)
    began = now()
    try:
        with generating(base, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=end):
            found = base.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=draft)
    except (ValueError, RuntimeError, AttributeError) as exc:  # whatever assisted decoding lacks of a draft
        if draft is None or out_of_memory(exc):
            raise
        said = " ".join(str(exc).split())[:200]
        raise HostError(f"transformers cannot use this model as a draft: {said}. Use --prompts 0") from exc
    devices.wait(base.device)
    seconds = now() - began
    ids_out: list[int] = found[0].tolist()
    return ids_out, seconds


# --- how to use it ----------------------------------------------------------------------------------------------------


def commands(base: str, draft: str, proposed: int) -> dict[str, str]:
    """For each runtime what to run; ``base`` and ``draft`` are folders or Hub ids of checkpoints."""
    return {
        "transformers": (
            f"draft = AutoModelForCausalLM.from_pretrained({draft!r}); "
            f"draft.generation_config.num_assistant_tokens = {proposed}; "
            "model.generate(**inputs, assistant_model=draft)"
        ),
        "vllm": (
            f"vllm serve {base} --speculative-config "
            f'\'{{"method": "draft_model", "model": "{draft}", "num_speculative_tokens": {proposed}}}\''
        ),
        "llama.cpp": (
            f"lmprune export {base} base.gguf; lmprune export {draft} draft.gguf; "
            f"llama-server -m base.gguf --spec-type draft-simple -md draft.gguf --spec-draft-n-max {proposed}"
        ),
    }


def how_to_run(base: Cut, draft: Cut, proposed: int) -> list[str]:
    """Lines for people: how to write the draft where it is none yet, and `commands`."""
    lines = []
    folder = str(draft.base.path) if draft.base.revision is None else draft.base.name
    if draft.plan is not None:
        folder = "DRAFT"
        lines.append(f"lmprune {'prune' if draft.adapter is None else 'heal'} {draft.name} {folder}")
    whole = str(base.base.path) if base.base.revision is None else base.base.name
    for name, command in commands(whole, folder, proposed).items():
        refused = next((v for one in (draft, base) for v in check_cut(one, [name]) if v.verdict == WRONG), None)
        lines.append(f"{name}: {command}" if refused is None else f"{name}: not with these: it {refused.why}")
    return lines
