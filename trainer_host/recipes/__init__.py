"""Which learner, which network, for which slot."""
