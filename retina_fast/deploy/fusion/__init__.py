"""Norms folded into convs, and convs that take along what follows them."""
