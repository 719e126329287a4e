"""Evaluation by the standard harness. This package alone imports lm_eval."""

LIST_TASKS = "`lmprune eval ls tasks`"
"""The command that lists every task, for messages."""
