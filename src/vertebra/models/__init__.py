"""One file a paper. Each ends with `FAMILY`: its variants, published figures and checkpoints as data."""
