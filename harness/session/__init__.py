"""One backend under one case: `Session` draws, prepares, calls and judges."""
