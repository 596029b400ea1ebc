"""The whole loop once, live in a terminal: play, stream, train, sign, swap, judge, roll back."""
