"""Pictures: files to RGB images, data sets to tensors of bytes, bytes to model inputs.

- `files`: opens picture files, upright and in RGB.
- `modes`: converts pictures of Pillow's modes to RGB, and masks to truth values.
- `pictures`: turns any data set of pictures into tensors of one size; boxes.
- `pixels`: tensors of bytes, resizing, and the normalisation of a model's inputs.
- `loading`: batches on the CPU.
- `sizes`: parses arguments that are a height and a width.
"""
