"""Pictures, by matplotlib, which nothing else imports. Takes plain data and knows no stage.

``canvas``  what all pictures share: palette, labels, and how a figure becomes a file
``maps``    a profile: blocks of layers by start and size
``curves``  a sweep: quality, speed and memory by layers dropped
``losses``  a training: losses by step
"""
