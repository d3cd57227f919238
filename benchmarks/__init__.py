"""How fast fastkernels is, beside the machine's floor and its peers: ``python -m benchmarks --help``."""
