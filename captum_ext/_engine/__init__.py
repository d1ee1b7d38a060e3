"""Running models: the only package that sets hooks, modes or gradients.

- `modules`: finds the module behind a forward function, and its layers.
- `hooks`: registers hooks that act in one thread and inside one block.
- `state`: restores the model, the random numbers and the modes after a call.
- `targets`: selects the entries of an output to explain.
- `faults`: says why a model cannot take its inputs.
- `outputs`: turns model outputs into scores; targets and arguments follow their examples.
- `precision`: sums and gradients in half precision.
- `capture`: records activations and gradients at layers, in one forward pass.
- `replay`: runs the model behind a layer again, or only up to a layer.
- `channels`: finds the dimension of the channels; `layer_channels` does so at layers.
- `receptive_field`: computes the region of the image that a unit sees.

A method calls `LayerCapture` (or `LayerReplay`, for many edits of one layer). These hook the layer
with `edit_layers`, run the model through Captum's `_run_forward`, and return tensors. Nothing of
them remains on the model.
"""
