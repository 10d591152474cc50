"""What needs a place in the loops of other libraries; each module is for who uses its library, and imports it."""
