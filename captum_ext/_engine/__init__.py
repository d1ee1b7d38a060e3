"""How a model is run: the only place that sets hooks, modes or gradients.

- `hooks`: calls functions at modules, in one thread and inside one block.
- `state`: leaves the model and the random numbers as they were found.
- `outputs`: turns what a model returns into scores, of inputs made of a batch's examples.
- `capture`: activations and gradients at layers.
- `replay`: runs only what lies behind a layer, or only up to it.
- `channels`: finds the dimension of the channels.
- `receptive_field`: finds the part of the image that a unit sees.
"""
