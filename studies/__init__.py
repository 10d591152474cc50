"""What the package's methods do on real data, with controls. ``python -m studies``; the pages are in ``results``."""
