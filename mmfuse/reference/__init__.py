"""Plain PyTorch for every op. This is the specification that the other backends are tested against."""
