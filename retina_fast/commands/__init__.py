"""What the command line does, as functions: train, evaluate, detect."""
