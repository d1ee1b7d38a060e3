"""Pictures, from a file to what a model takes, and the data sets that hold them."""
