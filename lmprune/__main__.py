"""``python -m lmprune``, which ``accelerate launch -m lmprune`` runs in each process."""

from lmprune.cli import main

main()
