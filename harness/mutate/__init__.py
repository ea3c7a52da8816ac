"""Known bugs put back into the kernels on purpose: how many does the suite notice, and does it accuse the innocent."""
