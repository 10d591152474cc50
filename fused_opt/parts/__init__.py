"""The parts that a gradient is a sum of, and their norms: what CLARS divides by."""
