"""Many cuts of one model, measured: the curve that a user needs before choosing how much to cut.

``settings``  what can be asked for                        pure
``points``    which cuts, in which order                   pure
``folder``    the run folder and what it remembers         pure
``launch``    points for several machines
``run``       profile, recipes, evaluation, healing, speed
"""
