"""Run these plans over these batches into this collector. Knows no criterion, no harness and no statistics.

``batches``    which samples go through the model together
``calls``      how a decoder layer is called and what it hands on
``experts``    what enters the last projection of each of a layer's experts
``tree``       which layers several plans have in common            pure
``kept``       states that a walk leaves for later ones
``views``      pruned views of one loaded model, and their walk
``run``        views x batches -> a collector
``loss``       the loss of many plans on tokens
``states``     hidden states, and gradients
``streaming``  a model that is read layer by layer
``machine``    device, free memory, out of memory
``journal``    what an interrupted run goes on from                 pure
``processes``  several processes share the samples
"""
