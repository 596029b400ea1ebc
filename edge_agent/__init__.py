"""The daemon on the Pi: answers, streams, swaps, judges."""
