"""The released code of the methods: its sequence of PyTorch calls, in our own words.

Quirks are kept, with the Python loops, the reads of device values on the host, the new tensors and
the backward passes that only a log looks at: tests compare `official()` with these numbers, and
benchmarks measure these calls. TensorBoard, running losses and what else costs a step nothing is
left out. Two modalities, for MLB also three, found by their names, as there.

A file has the name of its method in the catalogue, whose card names repository and commit, as the
file's first lines do. `networks` has what they share.

`tests/golden/test_released_*.py` replay what the authors' own code has computed. Nothing here is
installed with mmfuse, and nothing here imports it.
"""
