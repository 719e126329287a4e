"""Evaluation by the standard harness. This package alone imports lm_eval."""
