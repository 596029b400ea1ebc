"""The reference game: rules, a Gymnasium view, scripted players, and a game client over MQTT."""
