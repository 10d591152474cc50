"""The optimizers, one page each: formula, coefficients, mathematics in plain PyTorch, class."""
