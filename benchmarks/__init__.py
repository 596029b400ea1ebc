"""`make bench`: what the system does, in figures, each beside a yardstick measured in the same run."""
