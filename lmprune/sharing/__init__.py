"""What others get to see: a recipe told in the terminal, a folder with a card, a repository on the Hub.

``subjects``  what a name stands for, without opening weights     pure
``telling``   kept and dropped layers, and where they come from   pure
``results``   a sweep's scores in the Hub's two forms             pure
``card``      the model card                                      pure
``bundle``    the folder that is pushed
``private``   what must not leave this machine, found in it
``pushing``   the folder to the Hub
"""
