"""Fixed parts of larger tasks: documents at equal distances, the same in every run."""

from __future__ import annotations

import datasets


def _spread(docs: datasets.Dataset, count: int) -> datasets.Dataset:
    return docs.select([i * len(docs) // count for i in range(count)]) if len(docs) > count else docs


def spread_5(docs: datasets.Dataset) -> datasets.Dataset:
    """5 documents; of MMLU's subjects, so that its 5 worked examples stay whole."""
    return _spread(docs, 5)


def spread_100(docs: datasets.Dataset) -> datasets.Dataset:
    """100 documents."""
    return _spread(docs, 100)


def spread_400(docs: datasets.Dataset) -> datasets.Dataset:
    """400 documents."""
    return _spread(docs, 400)
