"""From text to tokens. Knows no models.

``world``    the demo's world                                   pure
``sources``  documents of every kind, in a seeded order
``tokens``   documents -> token ids, packed or not
``blocks``   text for healing, held-out documents apart
"""
