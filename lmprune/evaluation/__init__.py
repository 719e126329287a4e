"""Evaluation by the standard harness. This package alone imports lm_eval."""

LIST_TASKS = "`lm_eval ls tasks --include_path $(lmprune tasks)`"
"""The command that lists every task, for messages."""
