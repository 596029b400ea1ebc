"""The trainer: stores, learns, signs, publishes."""
