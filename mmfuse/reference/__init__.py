"""Plain PyTorch for every op: the specification that the other backends are tested against."""
