"""Search for scale permutations: the space, what a point of it costs, how good it may be, and the study."""
